"""Tests the subcommands of ``overfill bench``, and that ``bench router`` makes its measurements."""

import os
import signal
import sys

import click
import pytest
from click.testing import CliRunner

from overfill.cli.main import main
from overfill.lab.bench.router.cost import measure_cost
from overfill.lab.commands.bench import bench_group


@pytest.mark.slow
def test_the_router_is_measured_beside_the_bare_server():
    found = measure_cost((), 0.2, lambda name, line: None, streams=(1, 4), open_streams=8)
    rows = {one.name: one for one in found}
    assert len(rows) == len(found)
    assert rows["failed_requests"].value == rows["failed_requests"].peer_value == 0
    for name in ("request_cpu_1", "request_cpu_4", "token_cpu_1", "token_cpu_4", "ttft_p50", "memory_at_rest"):
        assert rows[name].peer.startswith("bare uvicorn")
        assert rows[name].value > 0
        assert rows[name].peer_value > 0
    assert rows["tokens_per_event_4"].peer_value == 1
    for name, bound in {"memory_per_stream": 12, "ttft_64_at_once_max": 50, "failed_requests": 0}.items():
        assert rows[name].bound == bound


@pytest.mark.parametrize(
    ("peers", "message"),
    [("dynamo,other", "'other' is not one of 'dynamo', 'smg', 'vllm-router'"), ("smg", "smg is not installed")],
)
def test_a_peer_that_cannot_be_measured_is_named(peers, message, monkeypatch, tmp_path):
    monkeypatch.setenv("OVERFILL_HOME", str(tmp_path))
    done = CliRunner().invoke(bench_group, ["router", "--peers", peers])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


@pytest.mark.parametrize(("arguments", "measured"), [([], ["smg"]), (["--peers="], []), (["--peers", "smg"], ["smg"])])
def test_the_installed_peers_are_measured_unless_others_are_named(arguments, measured, monkeypatch, tmp_path):
    monkeypatch.setenv("OVERFILL_HOME", str(tmp_path))
    (tmp_path / "envs" / "smg").mkdir(parents=True)
    (tmp_path / "envs" / "smg" / "ready").touch()
    asked = []
    monkeypatch.setattr(
        "overfill.lab.bench.router.cost.measure_cost", lambda peers, *_, **__: asked.extend(peers) or []
    )
    CliRunner().invoke(bench_group, ["router", *arguments], standalone_mode=False, catch_exceptions=False)
    assert asked == measured


def test_dynamo_is_measured_where_loopback_is_the_only_network(monkeypatch):
    ran = []
    monkeypatch.setattr("overfill.lab.commands.bench_router.peer_pythons", lambda *_: {})
    monkeypatch.setattr("overfill.lab.bench.router.cost.measure_cost", lambda peers, *_, **__: ran.append(peers) or [])
    monkeypatch.setattr(os, "execvp", lambda program, command: ran.append(command) or sys.exit())
    for networks in (["eth0"], []):
        monkeypatch.setattr("overfill.lab.peers.routers.other_networks", lambda networks=networks: networks)
        CliRunner().invoke(bench_group, ["router", "--peers=dynamo"])
    command, measured = ran
    assert command[:2] == ["unshare", "-rn"]
    assert command[-len(sys.orig_argv) :] == [sys.executable, *sys.orig_argv[1:]]
    assert measured == ("dynamo",)


def test_these_are_the_subcommands():
    names = ["curve", "decode", "prefill", "quality", "router", "vllm"]
    assert list(bench_group.commands) == names


def test_sigterm_lets_a_benchmark_stop_its_servers(monkeypatch):
    before, stopped = signal.getsignal(signal.SIGTERM), []

    def measure():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            stopped.append(True)

    monkeypatch.setitem(bench_group.commands, "wait", click.Command("wait", callback=measure))
    assert main(["bench", "wait"]) == 130
    assert stopped
    assert signal.getsignal(signal.SIGTERM) == before
