"""Injects faults into the processes of a stack and ends them."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import psutil

from overfill.lab.chaos.clock import Clocks
from overfill.lab.chaos.control import ProbeControl
from overfill.lab.chaos.fault_plan import FaultName, PlannedFault
from overfill.lab.chaos.stack import BreakableStack, Link, Links, ranks_of
from overfill.stack.child import Child

SILENCING: frozenset[FaultName] = frozenset({"kill", "drain", "freeze", "partition", "vanish"})
"""Faults during which the process serves nothing. Another process of its stage must be ready first."""

_MAX_DELAY = 0.15  # maximum seconds per piece; on a host, seconds of every frame
_LOSS = 0.05  # share of the pieces or frames
_BANDWIDTH = 48 * 1024  # bytes per second and connection; on a host, of all its connections
_CORRUPT_CHUNKS = 3  # chunks to damage
_EXIT_SLACK = 10.0  # seconds beyond its grace period in which a drained process must exit
_LOST_RANK = 25.0  # seconds after which a worker must have ended that has lost a rank, or has a frozen one
_POLL = 0.05


class FaultInjector:
    """Injects faults into the processes of ``stack``."""

    def __init__(self, stack: BreakableStack, links: Links, control: ProbeControl, clocks: Clocks) -> None:
        self._stack = stack
        self._links = links
        self._control = control
        self._clocks = clocks
        self._ranks: dict[int, list[psutil.Process]] = {}  # fault -> the ranks that it has hit
        self._cut: Counter[Link] = Counter()  # faults that cut a link; it belongs to the processes at both ends

    def inject(self, fault: PlannedFault, name: str) -> None:
        """Starts the fault in process ``name``."""
        child = self._stack.process(name)
        if fault.ranks:
            ranks = ranks_of(child.pid)
            self._ranks[fault.number] = [ranks[number] for number in fault.ranks]
            for rank in self._ranks[fault.number]:
                rank.send_signal(signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
            return
        match fault.kind:
            case "kill":
                os.kill(child.pid, signal.SIGKILL)
            case "drain":
                os.kill(child.pid, signal.SIGTERM)
            case "freeze":
                os.kill(child.pid, signal.SIGSTOP)
            case "partition":
                for link in self._links.by_process[name]:
                    self._cut[link] += 1
                    link.partition()
            case "delay":
                self._change_links(name, lambda link: setattr(link, "delay", _MAX_DELAY))
            case "loss":
                self._change_links(name, lambda link: setattr(link, "loss", _LOSS))
            case "bandwidth":
                self._change_links(name, lambda link: setattr(link, "rate", _BANDWIDTH))
            case "corrupt":
                self._control.send(name, {"corrupt": _CORRUPT_CHUNKS})
            case "clock":
                self._clocks.jump(name, fault.jump)
            case "disk":
                # No file can grow and no shared memory can be allocated, as on a full disk.
                resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            case "vanish":
                # The link is down first, so that no peer hears of the end of the process or of its connections.
                self._links.hosts[name].partition()
                os.kill(child.pid, signal.SIGKILL)
            case "slow":
                raise AssertionError("slow is a fault of clients")

    async def end(self, fault: PlannedFault, name: str) -> str | None:
        """Ends the fault after ``fault.seconds`` and restarts the process if it has exited.

        Returns a description if the process did not exit as it should, else None.
        """
        child = self._stack.process(name)
        if fault.ranks:
            return await self._end_of_ranks(fault, name, child)
        problem = None
        if fault.kind == "drain":
            grace = self._stack.placed.routers[0].grace_period
            if not await _wait_for_exit(child, grace + _EXIT_SLACK):
                problem = f"{name} still ran {grace + _EXIT_SLACK:g} s after SIGTERM"
                os.kill(child.pid, signal.SIGKILL)
            elif child.returncode != 0:
                problem = _describe_exit(child)
        if fault.kind in ("kill", "drain", "vanish"):
            await _wait_for_exit(child, 10.0)
            if fault.kind == "vanish":
                await asyncio.sleep(fault.seconds)
                self._links.hosts[name].reboot()
            self._stack.restart(name)
            return problem
        try:
            await asyncio.sleep(fault.seconds)
        finally:
            self._undo(fault.kind, name, child)
        if child.returncode is not None:
            self._stack.restart(name)
            return _describe_exit(child)
        return None

    async def _end_of_ranks(self, fault: PlannedFault, name: str, child: Child) -> str | None:
        problem = None
        ends = fault.kind == "kill" or fault.seconds > _LOST_RANK
        if not await _wait_for_exit(child, _LOST_RANK if ends else fault.seconds) and ends:
            problem = f"{name} still ran {_LOST_RANK:g} s after it had lost a rank"
            os.kill(child.pid, signal.SIGKILL)
            await _wait_for_exit(child, 10.0)
        for rank in self._ranks.pop(fault.number):
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(signal.SIGCONT)
        if child.returncode is not None:
            self._stack.restart(name)
        return problem

    def _undo(self, fault: FaultName, name: str, child: Child) -> None:
        match fault:
            case "freeze":
                os.kill(child.pid, signal.SIGCONT)
            case "partition":
                for link in self._links.by_process[name]:
                    self._cut[link] -= 1
                    if not self._cut[link]:
                        link.heal()
            case "delay":
                self._change_links(name, lambda link: setattr(link, "delay", 0.0))
            case "loss":
                self._change_links(name, lambda link: setattr(link, "loss", 0.0))
            case "bandwidth":
                self._change_links(name, lambda link: setattr(link, "rate", None))
            case "clock":
                self._clocks.jump(name, 0.0)
            case "disk" if child.returncode is None:
                unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
                resource.prlimit(child.pid, resource.RLIMIT_FSIZE, unlimited)

    def _change_links(self, name: str, change: Callable[[Link], None]) -> None:
        for link in self._links.by_process[name]:
            change(link)


async def _wait_for_exit(child: Child, timeout: float) -> bool:
    deadline = asyncio.get_running_loop().time() + timeout
    # Poll: waiting for the process belongs to its Child object, and the wait is short.
    while child.returncode is None and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(_POLL)
    return child.returncode is not None


def _describe_exit(child: Child) -> str:
    return f"{child.name} {child.describe_exit()}: {' | '.join(child.last_lines()[-3:])}"
