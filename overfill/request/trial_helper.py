"""The helper process that tries clients' grammars: ``python -m overfill.request.trial_helper``.

It forks a child for each trial. A grammar that exhausts memory, time or stack ends its child only. The parent starts
this process by exec and talks to it over a pair of sockets, so it has no port. Forking is safe here and not in the
parent: this process has one thread, and no gRPC.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

from overfill.errors import InvalidRequest
from overfill.request.grammar_limits import GrammarLimits
from overfill.request.trial_frames import INVALID, LATE, OK, TOO_COMPLEX, WALL_FACTOR, read_frame, write_frame

_TOO_DEEP = "its parts are nested, or refer to each other, too deeply"
_LOWEST_PRIORITY = 19
_FIRST_PRIORITY = 5
_FIRST_SECONDS = 0.2
"""Seconds after which a trial gets the lowest priority. Usual grammars need less, also on a busy machine."""


class _Bench(Protocol):
    """What all trials share; see ``overfill.request.trial.Bench``."""

    @property
    def limits(self) -> GrammarLimits: ...

    def virtual_bytes(self) -> int:
        """Returns the size of this process's address space."""
        ...


@dataclass(slots=True)
class _Child:
    number: int
    pid: int
    began: float
    reply: bytearray = field(default_factory=bytearray)
    lowered: bool = False
    late: bool = False


class _Helper:
    def __init__(self, connection: socket.socket, bench: _Bench) -> None:
        self._connection = connection
        self._bench = bench
        self._children: dict[int, _Child] = {}  # by the pipe on which each replies
        self._wall = WALL_FACTOR * bench.limits.seconds

    def run(self) -> None:
        """Serves until the parent has ended. The system then closes the parent's end of the connection."""
        while True:
            wait = 0.05 if self._children else None
            sources: list[Any] = [self._connection, *self._children]
            ready, _, _ = select.select(sources, [], [], wait)
            for source in ready:
                if source is self._connection:
                    frame = read_frame(self._connection)
                    if frame is None:
                        return
                    self._start(*frame)
                else:
                    self._read(source)
            self._watch()

    def stop(self) -> None:
        """Ends the trials that still run."""
        for child in self._children.values():
            os.kill(child.pid, signal.SIGKILL)

    def _start(self, number: int, body: bytes) -> None:
        name, _, argument = body.partition(b"\0")
        function = _named(name.decode())  # imported here, so that no child imports it again
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            self._connection.close()
            _try(self._bench, function, argument, writing)
        os.close(writing)
        self._children[reading] = _Child(number, pid, time.monotonic())

    def _read(self, source: int) -> None:
        child = self._children[source]
        part = os.read(source, 1 << 20)
        child.reply += part
        if part:
            return
        del self._children[source]
        os.close(source)
        _, status = os.waitpid(child.pid, 0)
        write_frame(self._connection, child.number, self._outcome(child, status))

    def _outcome(self, child: _Child, status: int) -> bytes:
        if child.late:
            return LATE
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0 and child.reply:
            return bytes(child.reply)
        limits = self._bench.limits
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        if number in (signal.SIGSEGV, signal.SIGBUS):
            reason = _TOO_DEEP
        elif number == signal.SIGXCPU:
            reason = limits.too_slow
        elif number:  # Rust ends a process that gets no memory by SIGABRT, and the kernel by SIGKILL
            reason = limits.too_much_memory
        else:
            reason = "its check failed on this server"  # a defect of OverFill, which the child has reported
        return TOO_COMPLEX + reason.encode()

    def _watch(self) -> None:
        now = time.monotonic()
        for child in self._children.values():
            if not child.lowered and now - child.began > _FIRST_SECONDS:
                child.lowered = True
                with suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, child.pid, _LOWEST_PRIORITY)
            if not child.late and now - child.began > self._wall:
                child.late = True
                os.kill(child.pid, signal.SIGKILL)


def _named(name: str) -> Any:
    """Returns what ``module:attribute`` names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _try(bench: _Bench, function: Callable[[bytes, _Bench], bytes], argument: bytes, writing: int) -> NoReturn:
    """Runs a trial in a new child process, writes the reply, and ends the process."""
    stderr = os.dup(2)
    try:
        _confine(bench)
        try:
            reply = OK + function(argument, bench)
        except InvalidRequest as error:
            message = error.reason
            reply = INVALID + json.dumps([error.field, message]).encode()
        except RecursionError:
            reply = TOO_COMPLEX + _TOO_DEEP.encode()
        except MemoryError:
            reply = TOO_COMPLEX + bench.limits.too_much_memory.encode()
        rest = memoryview(reply)
        while rest:
            rest = rest[os.write(writing, rest) :]
        os._exit(0)
    except BaseException:
        os.dup2(stderr, 2)
        traceback.print_exc()
    finally:
        os._exit(1)


def _end_with_parent() -> None:
    """Lets the kernel kill this process when its parent ends, also while this process is stopped."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def _confine(bench: _Bench) -> None:
    limits = bench.limits
    _end_with_parent()
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # Rust reports there that it gets no memory
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (limits.seconds, limits.seconds + 1))
    most = bench.virtual_bytes() + limits.trial_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (limits.stack_bytes, hard))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where a container's memory ends, the kernel ends a trial first
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, _FIRST_PRIORITY)


def main() -> None:
    """Runs the helper. Its standard input is the connection to the parent; its arguments name and describe a Bench."""
    _end_with_parent()
    with socket.socket(fileno=0) as connection, suppress(ConnectionError):
        bench = _named(sys.argv[1])(**json.loads(sys.argv[2]))
        gc.freeze()  # a collection in a child would copy every page of the heap
        helper = _Helper(connection, bench)
        try:
            helper.run()
        finally:
            helper.stop()


if __name__ == "__main__":
    main()
