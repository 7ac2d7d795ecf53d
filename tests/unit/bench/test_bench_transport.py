"""The benchmarks of the handoff run, and say what they found."""

import json
import subprocess
import sys

import pytest


def bench(*arguments):
    command = [sys.executable, "-m", "overfill.cli.main", "bench", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode in (0, 1), done.stderr  # 1: a bound is missed, which is not a test's business
    return json.loads(done.stdout), done.returncode


def test_kv_prints_its_rows_beside_the_raw_stream(tiny_pair):
    document, code = bench("kv", f"--pair={tiny_pair}", "--tokens=4096", "--rounds=2")
    rows = {row["name"]: row for row in document["rows"]}
    assert list(rows) == ["grpc_raw", "kv_grpc", "kv_same_host"]
    assert document["kv_bytes"] == 4096 * 4 * 2 * 2 * 16 * 2
    assert rows["grpc_raw"]["ratio"] == 1
    assert (rows["kv_grpc"]["bound"], rows["kv_same_host"]["bound"]) == (0.85, 2.0)
    assert (code == 0) == document["reached"] == all(row["reached"] for row in rows.values())


def test_handoff_holds_a_request_against_a_plain_prefill(tiny_pair):
    document, _ = bench("handoff", f"--pair={tiny_pair}", "--tokens=256", "--rounds=2", "--dtype=float32")
    assert len(document["rounds"]) == 2
    for each in document["rounds"]:
        assert 0 < each["prefill"] <= each["ttft"]
        assert each["plain"] > 0


def test_chat_shows_what_is_reused(tiny_pair):
    arguments = ["--turns=3", "--chats=2", "--turn-tokens=64", "--answer-tokens=8", "--dtype=float32"]
    document, _ = bench("chat", f"--pair={tiny_pair}", *arguments)
    on, off = document
    assert (on["cache"], off["cache"]) == ("on", "off")
    assert on["prompt_tokens"] == 3 * 64 + 2 * 8
    # 0 of 64, 64 of 136, 128 of 208.
    assert on["hit_rate"] == on["held_rate"] == pytest.approx((64 + 128) / (64 + 136 + 208))
    assert off["hit_rate"] == off["held_rate"] == 0
