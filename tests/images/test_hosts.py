"""Stacks whose processes run on hosts of their own, with links that are slow, lossy, down or gone. Needs root."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from overfill.cli.main import main
from overfill.lab.chaos.fault_plan import PlannedFault
from overfill.lab.hosts.network import CannotMakeHosts, Host, check_requirements, make_hosts
from overfill.lab.hosts.place import place_on_hosts
from overfill.rpc.access import NAME
from overfill.stack.describe import describe
from overfill.stack.placed import place
from overfill.stack.process_runner import ProcessRunner

pytestmark = pytest.mark.images

SETTINGS = {"dtype": "float32", "kv_memory": "4MiB", "max_model_len": "512", "grace_period": 2}
QUESTIONS = [f"Question {i}: what comes after {i * 7} blocks of sixteen tokens, and why is that so?" for i in range(12)]
FAULTS = [  # (fault, phase, target, seconds)
    ("partition", "handoff", "decode", 4.0),
    ("vanish", "decode", "decode", 2.0),
    ("vanish", "prefill", "prefill", 2.0),
    ("partition", "queued", "router", 2.0),
    ("loss", "handoff", "prefill", 1.0),
    ("delay", "decode", "router", 1.0),
    ("bandwidth", "handoff", "prefill", 1.0),
    ("corrupt", "handoff", "decode", 0.0),
    ("kill", "decode", "decode", 0.0),
]
SERVER = """
import contextlib, socket, sys
server = socket.create_server((sys.argv[1], 5000))
print("listening", flush=True)
while True:
    peer, _ = server.accept()
    with contextlib.suppress(OSError):
        pieces = []
        while piece := peer.recv(65536):
            pieces.append(piece)
        peer.sendall(b"".join(pieces))
    peer.close()
"""
CLIENT = """
import socket, sys, time
peer = socket.create_connection((sys.argv[1], 5000), timeout=float(sys.argv[2]))
sent = b"x" * int(sys.argv[3])
started = time.monotonic()
peer.sendall(sent)
peer.shutdown(socket.SHUT_WR)
while sent:
    received = peer.recv(65536)
    assert received
    sent = sent[len(received):]
print(time.monotonic() - started)
"""
MAKING = """
import time
from overfill.lab.hosts.network import make_hosts
with make_hosts(["a", "b"]):
    print(1, flush=True)
    time.sleep(60)
"""


def left_behind() -> list[str]:
    """Namespaces and devices of hosts on this machine."""
    spaces = subprocess.run(["ip", "-json", "netns"], capture_output=True, text=True, check=True).stdout
    links = subprocess.run(["ip", "-json", "link"], capture_output=True, text=True, check=True).stdout
    names = [one["name"] for one in json.loads(spaces or "[]")] + [one["ifname"] for one in json.loads(links)]
    return [name for name in names if name.startswith(("overfill-", "of")) and any(c.isdigit() for c in name)]


@pytest.fixture(autouse=True)
def hosts_can_be_made_and_none_is_left():
    try:
        check_requirements()
    except CannotMakeHosts as error:
        pytest.skip(str(error))
    before = left_behind()
    yield
    assert [name for name in left_behind() if name not in before] == []


@pytest.fixture
def two_hosts():
    """Two hosts, and a function that returns the seconds of a round trip from one to the other; None if none is had."""
    with make_hosts(["a", "b"]) as hosts:
        a, b = hosts.values()
        server = [*b.enter, sys.executable, "-c", SERVER, b.address]
        with subprocess.Popen(server, stdout=subprocess.PIPE, text=True) as listening:
            assert listening.stdout.readline() == "listening\n"

            def round_trip(timeout: float = 30.0, size: int = 1) -> float | None:
                client = [*a.enter, sys.executable, "-c", CLIENT, b.address, str(timeout), str(size)]
                done = subprocess.run(client, capture_output=True, text=True, timeout=120)
                return float(done.stdout) if done.returncode == 0 else None

            yield a, b, round_trip
            listening.kill()


def test_frames_take_the_delay_of_every_link_that_they_cross(two_hosts):
    a, b, round_trip = two_hosts
    assert round_trip() is not None
    a.delay, b.delay = 0.03, 0.02
    assert round_trip() >= 0.1
    b.delay = 0.0
    assert round_trip() >= 0.06


def test_a_link_that_is_down_or_loses_all_carries_nothing(two_hosts):
    a, b, round_trip = two_hosts
    b.partition()
    assert round_trip(timeout=1.0) is None
    b.heal()
    assert round_trip() is not None
    a.loss = 1.0
    assert round_trip(timeout=1.0) is None


def test_a_rate_limits_both_directions(two_hosts):
    a, _, round_trip = two_hosts
    a.rate = 100_000
    assert round_trip(size=50_000) >= 0.9  # half a second to the server, which has all of it before it answers
    a.rate = None
    a.delay = 0.01
    assert round_trip(size=50_000) is not None


def hardware_address(host: Host) -> str:
    shown = subprocess.run(["ip", "-n", host.name, "-json", "link", "show", "eth0"], capture_output=True, text=True)
    return json.loads(shown.stdout)[0]["address"]


def test_a_host_that_boots_again_is_the_same_one_for_its_peers(two_hosts):
    a, _, round_trip = two_hosts
    a.delay = 0.1
    assert round_trip() >= 0.2
    before = hardware_address(a)
    a.reboot()
    assert hardware_address(a) == before  # peers remember it for seconds
    assert a.delay == 0.0
    assert round_trip() is not None


def test_a_killed_process_leaves_no_hosts(tmp_path):
    with subprocess.Popen([sys.executable, "-c", MAKING], stdout=subprocess.PIPE, text=True) as making:
        assert making.stdout.readline() == "1\n"
        mine = [name for name in left_behind() if str(making.pid) in name]
        assert len(mine) == 4  # two hosts, the bridge's namespace, and this machine's device
        making.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while any(str(making.pid) in name for name in left_behind()):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.timeout(300)
def test_answers_over_a_bad_link_are_those_of_the_reference(tiny_pair: Path, tmp_path: Path, capsys):
    """20 ms, 1 % loss and 100 Mbit/s between the stages; `overfill verify` runs on this machine."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in QUESTIONS), encoding="utf-8")
    lines: list[str] = []
    plan = place(describe(tiny_pair, decode=2, threads=1, settings=SETTINGS))
    with place_on_hosts(plan) as (placed, hosts):
        prefixes = {name: host.enter for name, host in hosts.items()}
        stack = ProcessRunner(placed, lambda name, line: lines.append(line), prefixes=prefixes)
        try:
            stack.start()
            stack.wait_ready(threading.Event())
            link = hosts["prefill-0"]
            link.delay, link.loss, link.rate = 0.02, 0.01, 1e8 / 8
            tls = placed.client_tls
            arguments = [f"--questions={questions}", "--max-tokens=24", f"--pair={tiny_pair}"]
            arguments += [f"--address={placed.addresses[0]}", f"--tls-ca={tls.ca}", f"--tls-cert={tls.cert}"]
            arguments += [f"--tls-key={tls.key}", f"--tls-name={NAME}", f"--api-key={placed.api_key}"]
            assert main(["verify", *arguments]) == 0
        finally:
            stack.stop()
    assert capsys.readouterr().out.splitlines()[-1] == "12/12 correct (12 identical, 0 ties)"
    assert any("shares no memory with this one" in line for line in lines)


@pytest.mark.timeout(420)
def test_chaos_over_hosts(tmp_path: Path):
    replay, report = tmp_path / "faults.json", tmp_path / "report.json"
    faults = [asdict(PlannedFault(number, *fault)) for number, fault in enumerate(FAULTS)]
    replay.write_text(json.dumps({"strikes": faults}), encoding="utf-8")
    command = [sys.executable, "-m", "overfill.cli.main", "chaos", "--hosts", f"--replay={replay}"]
    command += [f"--report={report}", "--requests=40", "--streams=6", "--max-tokens=32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text(encoding="utf-8"))
    assert found["missed"] == []
    assert found["correct"] == found["answers"] > 0
    assert sorted((one["kind"], one["target"]) for one in found["strikes"]) == sorted((f, t) for f, _, t, _ in FAULTS)
