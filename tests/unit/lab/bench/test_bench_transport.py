"""The benchmarks of the handoff run, and say what they found."""

import json
import subprocess
import sys

import pytest


def bench(*arguments):
    command = [sys.executable, "-m", "overfill.cli.main", "bench", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode in (0, 1), done.stderr  # 1: a bound is missed, which is not a test's business
    figures = {figure["name"]: figure for figure in map(json.loads, done.stdout.splitlines())}
    assert (done.returncode == 0) == all(figure["reached"] for figure in figures.values())
    return figures


def test_kv_is_held_against_the_raw_stream(tiny_pair):
    figures = bench("kv", f"--pair={tiny_pair}", "--tokens=4096", "--rounds=2")
    assert list(figures) == ["grpc_raw", "kv_grpc", "kv_grpc_rate", "kv_same_host", "kv_same_host_rate"]
    assert (figures["kv_grpc"]["bound"], figures["kv_same_host"]["bound"]) == (0.85, 2.0)
    for name in ("kv_grpc", "kv_same_host"):
        rate = figures[f"{name}_rate"]
        assert 0 < rate["low"] <= rate["value"] <= rate["high"]
        assert rate["peer_value"] == figures["grpc_raw"]["value"]
        assert 0 < figures[name]["low"] <= figures[name]["value"] <= figures[name]["high"]


def test_handoff_holds_a_request_against_a_plain_prefill(tiny_pair):
    figures = bench("handoff", f"--pair={tiny_pair}", "--tokens=256", "--rounds=2", "--dtype=float32")
    assert 0 < figures["prefill_compute"]["value"] <= figures["ttft"]["value"]
    assert figures["ttft"]["peer_value"] == figures["plain_prefill"]["value"] > 0
    assert figures["ttft_ratio"]["bound"] == 1.1
    assert figures["handoff_exposed"]["bound"] == 0.05


def test_chat_shows_what_is_reused(tiny_pair):
    arguments = ["--turns=3", "--chats=2", "--turn-tokens=64", "--answer-tokens=8", "--dtype=float32"]
    figures = bench("chat", f"--pair={tiny_pair}", *arguments)
    assert [name for name in figures if name.startswith("ttft")] == ["ttft_turn_1", "ttft_turn_2", "ttft_turn_3"]
    assert figures["prompt_of_the_last_turn"]["value"] == 3 * 64 + 2 * 8
    for name in ("hit_rate", "did_not_travel"):  # 0 of 64, 64 of 136, 128 of 208
        assert figures[name]["value"] == pytest.approx((64 + 128) / (64 + 136 + 208), rel=1e-3)
        assert figures[name]["peer_value"] == 0
