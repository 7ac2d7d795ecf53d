"""Tests ``overfill loadtest`` over both protocols on a stack of real processes."""

from __future__ import annotations

import json

import pytest
from stacks import running_stack

from overfill.cli.main import main

TINY = ["--vocab-size=512", "--prompt-tokens=20", "--output-tokens=6"]


@pytest.fixture(scope="module")
def stack(tiny_pair):
    with running_stack(tiny_pair, http=0) as (stack, address):
        yield f"grpc://{address}", stack.spec.openai_urls(stack.placed.addresses)[0]


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_trace_over_grpc_meets_its_objectives(stack, tmp_path, capfd):
    trace, told, page = tmp_path / "trace.jsonl", tmp_path / "told.jsonl", tmp_path / "report.html"
    lines = [
        {"timestamp": 50 * i, "input_length": 1000, "output_length": 200, "hash_ids": [1, 2 + i]} for i in range(6)
    ]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = [f"--target={stack[0]}", f"--trace={trace}", "--length-scale=0.05", *TINY[:1]]
    code = main(["loadtest", *arguments, "--objective=ttft_p95=60,itl_p99=60", f"--records={told}", f"--report={page}"])
    out = capfd.readouterr().out
    assert code == 0, out
    assert ["requests", "6", "requests"] in [line.replace("│", "").split() for line in out.splitlines()]
    found = records(told)
    assert [len(record["times"]) for record in found] == [10] * 6
    assert [round(record["due"], 3) for record in found] == pytest.approx([0.05 * i for i in range(6)], abs=0.01)
    assert all(record["timing"]["prefill_compute"] > 0 for record in found)
    assert page.read_text().count("<svg") == 1


def test_users_over_openai_miss_an_impossible_objective(stack, tmp_path, capfd):
    told = tmp_path / "told.jsonl"
    arguments = [f"--target={stack[1]}", "--requests=6", "--users=2", f"--records={told}", *TINY]
    assert main(["loadtest", *arguments, "--objective=e2e_p50=0.000001,errors=0"]) == 1
    captured = capfd.readouterr()
    assert "missed: e2e_p50: " in captured.err
    assert "missed: errors" not in captured.err
    found = records(told)
    assert [len(record["times"]) for record in found] == [6] * 6
    assert all(record["timing"]["prefill_compute"] > 0 for record in found), "answers have the parts of their time"


def test_requests_name_their_tier(stack, tmp_path, capfd):
    told = tmp_path / "told.jsonl"
    arguments = [f"--target={stack[1]}", "--requests=4", "--users=2", f"--records={told}", *TINY]
    assert main(["loadtest", *arguments, "--tier=default=2", "--fallback=none", "--allow-brownout"]) == 0
    assert {(record["tier"], record["written_by"]) for record in records(told)} == {("default", "default")}
    rows = [line.replace("│", "").split() for line in capfd.readouterr().out.splitlines()]
    assert ["attainment", "1", "of", "requests"] in rows
    assert ["written", "by", "default", "4", "answers"] in rows


def test_an_unreachable_stack_is_neither_met_nor_missed(capfd):
    assert main(["loadtest", "--target=http://127.0.0.1:9/v1", "--requests=1", *TINY]) == 2
    assert "nothing was measured" in capfd.readouterr().err
