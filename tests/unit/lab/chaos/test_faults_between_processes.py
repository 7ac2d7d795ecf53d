"""The tools of a trial: slow and lossy links, wall clocks of single processes, probes that hold a request."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from overfill.lab.chaos.clock import Clocks
from overfill.lab.chaos.control import ProbeControl
from overfill.lab.chaos.probe import Probe
from overfill.lab.chaos.proxy import TcpProxy

DATA = bytes(range(256)) * 400  # seven pieces


@asynccontextmanager
async def echo() -> AsyncIterator[TcpProxy]:
    """Yields a proxy in front of a server that sends everything back."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(65536):
            writer.write(piece)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server, TcpProxy(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", seed=1) as proxy:
        yield proxy


async def through(proxy: TcpProxy) -> tuple[bytes, float]:
    """Sends DATA; returns what comes back and the seconds that this took."""
    host, _, port = proxy.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    started = asyncio.get_running_loop().time()
    writer.write(DATA)
    writer.write_eof()
    back = await reader.read(-1)
    writer.close()
    return back, asyncio.get_running_loop().time() - started


async def test_a_late_link_delivers_everything_in_order() -> None:
    async with echo() as proxy:
        proxy.delay = 0.05
        back, _ = await through(proxy)
    assert back == DATA


async def test_a_lossy_link_delivers_everything_after_retransmissions() -> None:
    async with echo() as proxy:
        proxy.loss = 0.3
        back, seconds = await through(proxy)
    assert back == DATA
    assert seconds > 0.2  # minimum delay of one loss


CLOCK = """
import sys, threading, time
ahead = lambda since=time.time() - time.monotonic(): round(time.time() - time.monotonic() - since)
print(ahead(), flush=True)
sys.stdin.readline()
print(ahead(), flush=True)
began = time.monotonic()
threading.Event().wait(0.2)  # takes 0.2 s of real time
print(0.1 < time.monotonic() - began < 30, flush=True)
"""


@pytest.mark.parametrize("seconds", [3600, -86400])
def test_a_clock_is_set_for_one_process_while_it_runs(tmp_path: Path, seconds: int) -> None:
    clocks = Clocks(tmp_path)
    if not clocks.available:
        pytest.skip("no C compiler here")
    process = subprocess.Popen(
        [sys.executable, "-c", CLOCK],
        env=os.environ | clocks.environment("one"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "0\n"
    clocks.jump("one", seconds)
    rest, _ = process.communicate("\n", timeout=60)
    assert rest.splitlines() == [str(seconds), "True"]


async def test_a_request_is_held_in_its_phase_until_it_is_let_go(tmp_path: Path) -> None:
    async with ProbeControl(tmp_path) as control:
        probe = await asyncio.to_thread(Probe, control.path, "worker-0")
        other = await asyncio.to_thread(Probe, control.path, "decode-of-no-stage")
        waiting_for = asyncio.ensure_future(control.hold_next("reserving", 30.0, 30.0))
        holding = asyncio.ensure_future(until_held(probe, "reserving", "r1"))
        held = await waiting_for
        assert (held.process, held.request) == ("worker-0", "r1")
        assert control.processes_of("r1") == {"decode": "worker-0"}
        assert not holding.done()
        control.release(held)
        await asyncio.wait_for(holding, 10)
        await probe.hold("reserving", "r2")  # no breakpoint holds this one
        probe.reached("prefill", "r1")
        other.reached("prefill", "r2")
        async with asyncio.timeout(10):
            while len(control.processes_of("r1")) < 2 or len(control.processes_of("r2")) < 2:
                await asyncio.sleep(0.001)
        assert control.processes_of("r1") == {"decode": "worker-0", "prefill": "worker-0"}
        assert control.processes_of("r2") == {"decode": "worker-0", "prefill": "decode-of-no-stage"}
        probe.close()
        other.close()


@pytest.mark.parametrize("connects", ["before", "meanwhile"])
async def test_a_breakpoint_holds_one_request_of_all_processes(tmp_path: Path, connects: str) -> None:
    async with ProbeControl(tmp_path) as control:
        probes = {"worker-0": await asyncio.to_thread(Probe, control.path, "worker-0")}
        if connects == "meanwhile":
            waiting = asyncio.ensure_future(control.hold_next("prefill", 60.0, 30.0))
            await asyncio.sleep(0)
        probes["worker-1"] = await asyncio.to_thread(Probe, control.path, "worker-1")
        if connects == "before":
            waiting = asyncio.ensure_future(control.hold_next("prefill", 60.0, 30.0))
        async with asyncio.timeout(10):
            while not all(probe.waits_for("prefill") for probe in probes.values()):
                await asyncio.sleep(0.001)
            held = {name: probe.reached("prefill", f"of {name}") for name, probe in probes.items()}
            chosen = held.pop((await waiting).process)
            (other,) = held.values()
            while other is not None and other.holds:
                await asyncio.sleep(0.001)
        assert chosen is not None
        assert chosen.holds
        for probe in probes.values():
            probe.close()


async def test_nobody_waits_for_longer_than_asked(tmp_path: Path) -> None:
    async with ProbeControl(tmp_path) as control:
        probe = await asyncio.to_thread(Probe, control.path, "decode-0")
        assert (await control.hold_next("decode", 0.05, 0.05)).request == ""
        await asyncio.wait_for(until_held(probe, "decode", "r1"), 10)
        probe.close()


async def until_held(probe: Probe, phase: str, request: str) -> None:
    """Enters the phase again and again, as one request after another does, until it was held once."""
    while True:
        breakpoint = probe.reached(phase, request, quiet=True)
        if breakpoint is not None:
            while breakpoint.holds:
                await asyncio.sleep(0.005)
            return
        if phase == "decode":
            return
        await asyncio.sleep(0.005)
