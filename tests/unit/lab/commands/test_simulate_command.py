"""Tests ``overfill simulate`` on the command line."""

import json

import pytest

from overfill.cli.main import main


def lines(capsys):
    """The JSON lines that a command has printed."""
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def figures(capsys):
    return {row["name"]: row["value"] for row in lines(capsys)}


SMALL = ("simulate", "--requests", "40", "--rate", "2", "--prompt-tokens", "300", "--output-tokens", "20")


def test_one_run_as_a_table_and_as_json(capsys):
    assert main([*SMALL, "--check"]) == 0
    text = capsys.readouterr().out
    assert "ttft" in text
    assert "checked_events" in text
    assert main([*SMALL, "--json", "--objective", "ttft=1"]) == 0
    found = figures(capsys)
    assert (found["requests"], found["failed"]) == (40, 0)
    assert 0 < found["attainment"] <= 1
    assert main([*SMALL, "--json", "--objective", "ttft=1e-9"]) == 0
    assert figures(capsys)["attainment"] == 0


def test_traces_of_both_kinds_in_a_row(capsys, tmp_path):
    azure, mooncake = tmp_path / "a.csv", tmp_path / "m.jsonl"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.1,374,4\n2023-11-16 18:15:47.1,3,4\n"
    )
    mooncake.write_text('{"timestamp": 5, "input_length": 600, "output_length": 3, "hash_ids": [1, 2]}\n')
    assert main(["simulate", "--trace", f"azure:{azure}", "--trace", f"mooncake:{mooncake}", "--json"]) == 0
    assert figures(capsys)["requests"] == 3
    azure.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.1,0,4\n")
    assert main(["simulate", "--trace", str(azure)]) == 2
    assert "line 2: ContextTokens: Input should be greater than 0, got '0'" in capsys.readouterr().err


def test_sizes_and_scaling(capsys):
    assert main([*SMALL, "--size", "--json", "--costs", "3,1"]) == 0
    sizes = lines(capsys)
    assert all(size["value"] == 3 * size["prefill"] + size["decode"] for size in sizes)
    assert sizes[0]["value"] == min(size["value"] for size in sizes)
    assert main([*SMALL, "--size"]) == 0
    assert "1 prefill + 1 decode" in capsys.readouterr().out
    assert main([*SMALL, "--rate", "20", "--autoscale", "--max-workers", "4", "--startup", "1", "--json"]) == 0
    found = figures(capsys)
    assert 2 < found["workers.prefill"] + found["workers.default"] <= 4


def test_chats_with_kv_from_peers_and_disk(capsys):
    chats = ("simulate", "--trace", "sessions:6:4:640", "--prompt-tokens", "320", "--prefill", "2", "--decode", "2")
    assert main([*chats, "--kv-disk-size", "1GiB", "--json"]) == 0
    assert figures(capsys)["requests"] == 24
    assert main([*chats, "--json"]) == 0
    peers = figures(capsys)
    assert main([*chats, "--json", "--no-kv-peers"]) == 0
    alone = figures(capsys)
    assert peers["cached_peer"] > 0 == alone["cached_peer"]


TIERS = ("--tier", "full=cpu:2,weights=6,share=2,itl-objective=0.05", "--tier", "fast=cpu")


def test_tiers_and_brownouts(capsys):
    assert main([*SMALL, *TIERS, "--brownout", "full > fast", "--json"]) == 0
    found = figures(capsys)
    assert found["requests.full"] + found["requests.fast"] == 40
    assert main(["simulate", "--trace", "synthetic:5:20", "--trace", "synthetic:2:10", *TIERS, "--json"]) == 0
    found = figures(capsys)
    assert found["requests"] == 30
    assert found["answers.full"] + found["answers.fast"] == 30
    assert (found["workers.full"], found["workers.fast"]) == (2, 1)


def test_workers_with_both_stages_alone_and_beside_others(capsys):
    assert main([*SMALL, "--colocated", "2", "--json"]) == 0
    found = figures(capsys)
    assert (found["workers.prefill"], found["workers.default"], found["local"]) == (2, 2, 1)
    assert main([*SMALL, "--colocated", "1", "--prefill", "1", "--json"]) == 0
    found = figures(capsys)
    assert (found["workers.prefill"], found["workers.default"]) == (2, 1)
    mixed = ("--prompt-tokens", "20", "--colocated", "2", "--prefill", "1", "--json")
    assert main([*SMALL, *mixed]) == 0
    assert figures(capsys)["local"] > 0.5, "short prompts stay"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((*TIERS, "--brownout", "full > cheap"), 2, "there is no tier 'cheap'"),
        ((*TIERS, "--decode", "2"), 2, "leave out --decode"),
        ((*TIERS, "--size"), 2, "--size and --tier exclude each other"),
        (("--tier", "full=cpu,bytes=2"), 2, "bytes is unknown; allowed are share, weights"),
        (("--tier", "full=cpu,weights=-1"), 2, "weights must be a number above 0, got '-1'"),
        (("--tier", "full=cpu,share=0"), 2, "no request asks for any tier"),
        ((*TIERS, "--brownout-share", "2"), 2, "'--brownout-share'"),
        (("--brownout", "full > fast"), 2, "there is no tier 'full'"),
        (("--trace", "synthetic:fast"), 2, "expected synthetic:RATE or synthetic:RATE:REQUESTS"),
        (("--trace", "sessions:3:0:100"), 2, "expected sessions:CHATS:TURNS:TOKENS"),
        (("--kv-disk-size", "much"), 2, "must be a size such as 50GiB, got 'much'"),
        (("--colocated", "1", "--size"), 2, "--size and --colocated exclude each other"),
        (("--decode", "0"), 2, "each stage needs a worker"),
        (("--size", "--autoscale"), 2, "exclude each other"),
        (("--max-workers", "4"), 2, "needs --autoscale"),
        (("--size", "--costs", "1"), 2, "must be two numbers such as 3,1, got 1"),
        (("--size", "--objective", "itl=1e-9"), 1, "is not met by 95% of the requests"),
    ],
)
def test_conflicting_options_are_refused(capsys, arguments, code, message):
    assert main([*SMALL, *arguments]) == code
    assert message in capsys.readouterr().err
