"""Tests that ``overfill bench handoff`` and ``router`` run and print their measurements."""

import json

import forked
import pytest

from overfill.lab.bench.router.cost import measure_cost
from overfill.lab.commands.bench import bench_group


def bench(*arguments):
    code, output = forked.run("overfill.cli.main", "bench", *arguments, "--json")
    assert code in (0, 1), output  # 1: a bound is missed; tests do not judge speed
    printed = [json.loads(line) for line in output.splitlines() if line.startswith("{")]  # logs are there too
    figures = {figure["name"]: figure for figure in printed}
    assert (code == 0) == all(figure["reached"] for figure in figures.values())
    return figures


def test_handoff_compares_a_request_with_a_plain_prefill(tiny_pair):
    figures = bench("handoff", f"--pair={tiny_pair}", "--tokens=256", "--rounds=2", "--dtype=float32")
    assert 0 < figures["prefill_compute"]["value"] <= figures["ttft"]["value"]
    assert figures["ttft"]["peer_value"] == figures["plain_prefill"]["value"] > 0
    assert figures["ttft_ratio"]["bound"] == 1.1
    assert figures["handoff_exposed"]["bound"] == 0.05


@pytest.mark.slow
def test_the_router_is_measured_beside_bare_servers_over_http_and_grpc(tiny_pair):
    found = {one.name: one for one in measure_cost(tiny_pair, 0.2, streams=(1, 4), idle_streams=8)}
    assert found["failed_requests"].value == 0
    for protocol, peer, memory in (("http", "bare uvicorn", 12), ("grpc", "bare grpc.aio", 60)):
        for name in ("request_cpu_1", "request_cpu_4", "token_cpu_1", "token_cpu_4", "ttft_p50", "tokens_per_second"):
            one = found[f"{protocol}_{name}"]
            assert one.peer == peer
            assert one.value > 0
            assert one.peer_value > 0
        assert found[f"{protocol}_tokens_per_event_4"].value >= 1
        assert found[f"{protocol}_tokens_per_event_4"].peer_value == 1
        bounds = {"memory_per_stream": memory, "request_cpu_4": 650, "ttft_alone_p50": 3, "ttft_64_at_once_max": 50}
        for name, bound in bounds.items():
            one = found[f"{protocol}_{name}"]
            assert one.bound == bound
            assert one.peer == peer
        ratio = found[f"{protocol}_token_cpu_ratio_4"]
        assert ratio.value == found[f"{protocol}_token_cpu_4"].peer_ratio


def test_these_are_the_subcommands():
    names = ["decode", "prefill", "fan-out", "handoff", "router", "serve", "sessions", "tasks", "vllm"]
    assert list(bench_group.commands) == names
