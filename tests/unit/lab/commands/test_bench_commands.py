"""Tests that ``overfill bench router`` runs and makes its measurements."""

import pytest

from overfill.lab.bench.router.cost import measure_cost
from overfill.lab.commands.bench import bench_group


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
    names = ["curve", "decode", "prefill", "router", "tasks", "vllm"]
    assert list(bench_group.commands) == names
