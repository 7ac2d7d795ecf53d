"""What a strike does to a process: at once, and until it is over."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from collections import Counter
from collections.abc import Callable

from overfill.cli.processes import Child
from overfill.lab.chaos.clock import Clocks
from overfill.lab.chaos.control import Control
from overfill.lab.chaos.stack import BreakableStack, Links
from overfill.lab.chaos.strikes import FaultName, Strike
from overfill.lab.faults.proxy import TcpProxy

SILENCING: frozenset[FaultName] = frozenset({"kill", "drain", "freeze", "partition"})
"""Faults that leave a stage without the worker, so that another one has to be there."""

_DELAY = 0.15  # seconds, at most, per piece
_LOSS = 0.05  # of the pieces
_RATE = 48 * 1024  # bytes per second and connection
_CHUNKS = 3  # that are damaged
_LEAVE = 10.0  # seconds that a drained process has beyond its grace period
_POLL = 0.05


class Faults:
    """Strikes at the processes of ``stack``."""

    def __init__(self, stack: BreakableStack, links: Links, control: Control, clocks: Clocks) -> None:
        self._stack = stack
        self._links = links
        self._control = control
        self._clocks = clocks
        self._cut: Counter[TcpProxy] = Counter()  # a link is that of the processes at both its ends

    def begin(self, strike: Strike, name: str) -> None:
        """Does the harm."""
        child = self._stack.process(name)
        match strike.fault:
            case "kill":
                os.kill(child.pid, signal.SIGKILL)
            case "drain":
                os.kill(child.pid, signal.SIGTERM)
            case "freeze":
                os.kill(child.pid, signal.SIGSTOP)
            case "partition":
                for link in self._links.of[name]:
                    self._cut[link] += 1
                    link.partition()
            case "delay":
                self._each(name, lambda link: setattr(link, "delay", _DELAY))
            case "loss":
                self._each(name, lambda link: setattr(link, "loss", _LOSS))
            case "bandwidth":
                self._each(name, lambda link: setattr(link, "rate", _RATE))
            case "corrupt":
                self._control.say(name, {"corrupt": _CHUNKS})
            case "clock":
                self._clocks.jump(name, strike.jump)
            case "disk":
                # No file can grow and no memory be set aside for sharing, as on a full disk.
                resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            case "slow" | "vanish":
                raise AssertionError(f"{strike.fault} befalls clients")

    async def mend(self, strike: Strike, name: str) -> str | None:
        """Ends it after ``strike.seconds``; starts again what has ended. Says what went wrong, if something did."""
        child = self._stack.process(name)
        complaint = None
        if strike.fault == "drain":
            grace = self._stack.plan.routers[0].grace_period
            if not await _ended(child, grace + _LEAVE):
                complaint = f"{name} still ran {grace + _LEAVE:g} s after SIGTERM"
                os.kill(child.pid, signal.SIGKILL)
            elif child.returncode != 0:
                complaint = _how_it_ended(child)
        if strike.fault in ("kill", "drain"):
            await _ended(child, 10.0)
            self._stack.restart(name)
            return complaint
        try:
            await asyncio.sleep(strike.seconds)
        finally:
            self._end(strike.fault, name, child)
        if child.returncode is not None:
            self._stack.restart(name)
            return _how_it_ended(child)
        return None

    def _end(self, fault: FaultName, name: str, child: Child) -> None:
        match fault:
            case "freeze":
                os.kill(child.pid, signal.SIGCONT)
            case "partition":
                for link in self._links.of[name]:
                    self._cut[link] -= 1
                    if not self._cut[link]:
                        link.heal()
            case "delay":
                self._each(name, lambda link: setattr(link, "delay", 0.0))
            case "loss":
                self._each(name, lambda link: setattr(link, "loss", 0.0))
            case "bandwidth":
                self._each(name, lambda link: setattr(link, "rate", None))
            case "clock":
                self._clocks.jump(name, 0.0)
            case "disk" if child.returncode is None:
                unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
                resource.prlimit(child.pid, resource.RLIMIT_FSIZE, unlimited)

    def _each(self, name: str, change: Callable[[TcpProxy], None]) -> None:
        for link in self._links.of[name]:
            change(link)


async def _ended(child: Child, timeout: float) -> bool:
    deadline = asyncio.get_running_loop().time() + timeout
    # A poll: the process is another's child object, and nothing here waits long.
    while child.returncode is None and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(_POLL)
    return child.returncode is not None


def _how_it_ended(child: Child) -> str:
    return f"{child.name} {child.describe_exit()}: {' | '.join(child.last_lines()[-3:])}"
