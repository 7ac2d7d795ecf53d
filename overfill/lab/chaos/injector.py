"""Injects faults into the processes of a stack and ends them."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from collections.abc import Callable
from contextlib import ExitStack, suppress

import psutil

from overfill.lab.chaos.fault_plan import FaultName, PlannedFault
from overfill.lab.chaos.stack import BreakableStack, ranks_of
from overfill.stack.child import Child

SILENCING: frozenset[FaultName] = frozenset({"kill", "drain", "freeze", "partition", "vanish"})
"""Faults during which the process serves nothing. Another process of its stage must be ready first."""

_LINK_FAULTS: dict[FaultName, tuple[str, float, float | None]] = {
    "delay": ("delay", 0.15, 0.0),  # maximum seconds per piece; on a host, seconds of every frame
    "loss": ("loss", 0.05, 0.0),  # share of the pieces or frames
    "bandwidth": ("rate", 48 * 1024, None),  # bytes per second and connection; on a host, of all its connections
}
"""Fault -> the attribute of a link that it sets, to which value, and the value of a link without a fault."""

_CORRUPT_CHUNKS = 3  # chunks to damage
_EXIT_SLACK = 10.0  # seconds beyond its grace period in which a drained process must exit
_LOST_RANK = 25.0  # seconds after which a worker must have ended that has lost a rank, or has a frozen one
_POLL = 0.05


async def inject(stack: BreakableStack, fault: PlannedFault, name: str, begun: Callable[[], None]) -> str | None:
    """Injects the fault into process ``name``, ends it, and restarts the process if it has exited.

    Args:
        begun: called when the fault has begun.

    Returns a description if the process did not exit as it should, else None.
    """
    child = stack.process(name)
    with ExitStack() as undo:
        _begin(stack, fault, child, undo)
        begun()
        problem = await _outlast(fault, child, stack.placed.routers[0].grace_period)
    if child.returncode is not None:
        stack.restart(name)
    return problem


def _begin(stack: BreakableStack, fault: PlannedFault, child: Child, undo: ExitStack) -> None:
    links = stack.links.by_process[child.name]
    match fault.kind:
        case "kill" | "freeze" if fault.ranks:
            ranks = ranks_of(child.pid)
            for number in fault.ranks:
                ranks[number].send_signal(signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
                undo.callback(_go_on, ranks[number])
        case "kill":
            os.kill(child.pid, signal.SIGKILL)
        case "drain":
            os.kill(child.pid, signal.SIGTERM)
        case "freeze":
            os.kill(child.pid, signal.SIGSTOP)
            undo.callback(os.kill, child.pid, signal.SIGCONT)
        case "partition":
            for link in links:
                link.partition()
                undo.callback(link.heal)
        case "delay" | "loss" | "bandwidth":
            attribute, value, usual = _LINK_FAULTS[fault.kind]
            for link in links:
                setattr(link, attribute, value)
                undo.callback(setattr, link, attribute, usual)
        case "corrupt":
            stack.control.send({"corrupt": _CORRUPT_CHUNKS}, child.name)
        case "clock":
            stack.clocks.jump(child.name, fault.jump)
            undo.callback(stack.clocks.jump, child.name, 0.0)
        case "disk":
            # No file can grow and no shared memory can be allocated, as on a full disk.
            _limit_files(child, 0)
            undo.callback(_limit_files, child, resource.RLIM_INFINITY)
        case "vanish":
            # The link is down first, so that no peer hears of the end of the process or of its connections.
            host = stack.links.hosts[child.name]
            host.partition()
            os.kill(child.pid, signal.SIGKILL)
            undo.callback(host.reboot)
        case "slow":
            raise AssertionError("slow is a fault of clients")


async def _outlast(fault: PlannedFault, child: Child, grace_period: float) -> str | None:
    """Waits until the fault is to end. Returns a description if the process did not exit as it should."""
    if fault.ranks:
        if fault.kind == "kill" or fault.seconds > _LOST_RANK:
            return await _ensure_exit(child, _LOST_RANK, "it had lost a rank")
        await _wait_for_exit(child, fault.seconds)
        return None
    if fault.kind == "drain":
        problem = await _ensure_exit(child, grace_period + _EXIT_SLACK, "SIGTERM")
        return problem if problem or not child.returncode else _describe_exit(child)
    if fault.kind in ("kill", "vanish"):
        await _wait_for_exit(child, _EXIT_SLACK)
        await asyncio.sleep(fault.seconds)
        return None
    await asyncio.sleep(fault.seconds)
    return None if child.returncode is None else _describe_exit(child)


def _go_on(rank: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        rank.send_signal(signal.SIGCONT)


def _limit_files(child: Child, size: int) -> None:
    if child.returncode is None:
        resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


async def _ensure_exit(child: Child, patience: float, after: str) -> str | None:
    """Waits for the exit of a process, and kills it after ``patience`` seconds. Returns a description if it did."""
    if await _wait_for_exit(child, patience):
        return None
    os.kill(child.pid, signal.SIGKILL)
    await _wait_for_exit(child, _EXIT_SLACK)
    return f"{child.name} still ran {patience:g} s after {after}"


async def wait_until(condition: Callable[[], bool], timeout: float) -> bool:
    """Waits until ``condition`` is true, for at most ``timeout`` seconds. Returns False when it is not by then."""
    end = asyncio.get_running_loop().time() + timeout
    while not (met := condition()) and asyncio.get_running_loop().time() < end:  # noqa: ASYNC110  # other processes
        await asyncio.sleep(_POLL)
    return met


async def _wait_for_exit(child: Child, timeout: float) -> bool:
    return await wait_until(lambda: child.returncode is not None, timeout)


def _describe_exit(child: Child) -> str:
    return f"{child.name} {child.describe_exit()}: {' | '.join(child.last_lines()[-3:])}"
