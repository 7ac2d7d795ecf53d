"""Tests that ``overfill bench kv``, ``handoff`` and ``router`` run and print their measurements."""

import json
import re

import forked
import pytest
from click.testing import CliRunner

from overfill.lab.bench.router.cost import measure_cost
from overfill.lab.bench.router.decisions import measure_decisions
from overfill.lab.bench.router.profile import profile_router
from overfill.lab.commands.bench import bench_group


def bench(*arguments):
    code, output = forked.run("overfill.cli.main", "bench", *arguments, "--json")
    assert code in (0, 1), output  # 1: a bound is missed; tests do not judge speed
    printed = [json.loads(line) for line in output.splitlines() if line.startswith("{")]  # logs are there too
    figures = {figure["name"]: figure for figure in printed}
    assert (code == 0) == all(figure["reached"] for figure in figures.values())
    return figures


def test_kv_is_compared_with_the_raw_stream(tiny_pair):
    figures = bench("kv", f"--pair={tiny_pair}", "--tokens=4096", "--rounds=2")
    assert list(figures) == ["grpc_raw", "kv_grpc", "kv_grpc_rate", "kv_shm", "kv_shm_rate"]
    assert (figures["kv_grpc"]["bound"], figures["kv_shm"]["bound"]) == (0.85, 2.0)
    for name in ("kv_grpc", "kv_shm"):
        rate = figures[f"{name}_rate"]
        assert 0 < rate["low"] <= rate["value"] <= rate["high"]
        assert rate["peer_value"] == figures["grpc_raw"]["value"]
        assert 0 < figures[name]["low"] <= figures[name]["value"] <= figures[name]["high"]


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


@pytest.mark.slow
def test_the_profile_names_functions_of_the_router_for_each_load(tiny_pair):
    profile = profile_router(tiny_pair, 1.0, streams=4, answer=200)
    for protocol in ("http", "grpc"):
        for what in ("request of one token", "token"):
            assert re.search(rf"^{protocol}, 4 streams: \d+ us of CPU per {what}, 1", profile, re.MULTILINE)
    assert profile.count("%  main (services/router/main.py:") == 4


def test_decisions_are_compared_with_the_first_number_of_workers():
    found = {one.name: one for one in measure_decisions([2, 4], requests=2000)}
    assert list(found) == [
        f"{name}_{count}_workers" for count in (2, 4) for name in ("decision_mean", "decision_p99", "request", "report")
    ]
    assert all(one.value > 0 for one in found.values())
    assert found["request_4_workers"].peer_value == found["request_2_workers"].value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["handoff", "--plot=x.png"], "--plot cannot be used without --timeline"),
        (["handoff", "--timeline", "--kv-codec=int8", "--rounds=2"], "--rounds, --kv-codec cannot be used with --time"),
        (["router", "--overload=5", "--decisions=1"], "--overload and --decisions cannot be used together"),
        (["router", "--overload=5", "--profile=x"], "--overload and --profile cannot be used together"),
        (["router", "--decisions=1,x"], "is not a list of positive whole numbers"),
    ],
)
def test_a_wrong_call_says_what_to_do(arguments, message):
    result = CliRunner().invoke(bench_group, arguments, terminal_width=200)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_there_are_eight_subcommands():
    assert list(bench_group.commands) == ["decode", "prefill", "kv", "handoff", "links", "router", "serve", "vllm"]
