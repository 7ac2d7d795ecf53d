"""Child processes that cannot outlive their parent, and whose output is read line by line.

Knows nothing about models or gRPC.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from overfill.errors import OverfillError
from overfill.process.tied import tied_to_parent

TAIL_LINES = 20


class StartFailed(OverfillError):
    """The stack did not start. The exception's notes have the last lines of the process that exited."""


class Child:
    """A running child process in its own process group.

    Create it on the main thread, because Linux ties the child's life to the thread that forked it.

    Args:
        name: name in messages.
        command: program and arguments.
        env: complete environment.
        sink: called with ``(name, line)`` for every line of stdout and stderr, on a thread of this child.
        orphaned: signal that the child gets when this process dies. Use SIGTERM if it must end children of its own.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str],
        sink: Callable[[str, str], None],
        orphaned: signal.Signals = signal.SIGKILL,
    ) -> None:
        self.name = name
        self._sink = sink
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._process = self._start(command, env, orphaned)
        self._pump = threading.Thread(target=self._read, name=f"output-{name}", daemon=True)
        self._pump.start()

    def _start(self, command: Sequence[str], env: Mapping[str, str], orphaned: signal.Signals) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*tied_to_parent(orphaned), *command],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit status; negative for a signal, None while the process runs."""
        return self._process.poll()

    def last_lines(self) -> list[str]:
        """Returns the last lines that an exited process wrote."""
        self._pump.join(timeout=5)
        return list(self._tail)

    def describe_exit(self) -> str:
        """Returns in words how an exited process ended."""
        code = self._process.wait()
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._tail.append(line.rstrip("\n"))
                self._sink(self.name, line.rstrip("\n"))

    def _signal_group(self, number: signal.Signals) -> None:
        if self.returncode is None:
            os.killpg(self.pid, number)

    def _wait(self, timeout: float) -> bool:
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True


def stop(children: Iterable[Child], grace: float) -> list[Child]:
    """Sends SIGTERM to all children, and SIGKILL to those still running after ``grace`` seconds, which it returns."""
    children = list(children)
    stragglers = []
    try:
        for child in children:
            child._signal_group(signal.SIGTERM)
        deadline = time.monotonic() + grace
        stragglers = [c for c in children if not c._wait(max(0.0, deadline - time.monotonic()))]
    finally:
        for child in children:
            child._signal_group(signal.SIGKILL)
            child._wait(timeout=10)
            child._pump.join(timeout=5)
    return stragglers
