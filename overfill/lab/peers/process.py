"""Runs programs of other projects: starts them, waits until they answer, and shows what they printed when they fail."""

from __future__ import annotations

import http.client
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from types import MappingProxyType

from overfill.errors import OverfillError
from overfill.stack.child import Child, stop

HOST = "127.0.0.1"
_POLL_SECONDS = 0.2

Start = Callable[..., Child]
"""Function that ``peer_processes`` yields."""


class PeerFailed(OverfillError):
    """A peer did not start, or failed. The notes hold the last lines that it printed."""

    @classmethod
    def of(cls, child: Child, how: str) -> PeerFailed:
        """Makes the error of a process that has exited."""
        failure = cls(f"{child.name} {how}")
        for line in child.last_lines():
            failure.add_note(line)
        return failure


@contextmanager
def peer_processes(environment: Mapping[str, str | None] = MappingProxyType({}), grace: float = 5.0) -> Iterator[Start]:
    """Yields a function that starts a process, and ends all with their children. Call it on the main thread only.

    The function takes a name, a command, and how to wait for the process. ``ready`` says whether it answers; by default
    nothing is waited for. ``seconds`` is the longest wait. ``orphaned`` is as of ``Child``. It returns the process, and
    raises PeerFailed if one of the processes exits during the wait, or the time is over.

    Args:
        environment: variables that differ from ours; None removes one. ``PYTHONPATH`` is removed.
        grace: seconds between SIGTERM and SIGKILL.
    """
    changed = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": None, **environment}
    kept = {name: value for name, value in changed.items() if value is not None}
    children: list[Child] = []

    def start(
        name: str,
        command: Sequence[str],
        ready: Callable[[], bool] = lambda: True,
        seconds: float = 60.0,
        orphaned: signal.Signals = signal.SIGKILL,
    ) -> Child:
        children.append(Child(name, command, kept, lambda name, line: None, orphaned))
        deadline = time.monotonic() + seconds
        while not ready():
            for child in children:
                if child.returncode is not None:
                    raise PeerFailed.of(child, f"{child.describe_exit()} during start-up")
            if time.monotonic() > deadline:
                raise PeerFailed(f"{name} did not answer within {seconds:g} s")
            time.sleep(_POLL_SECONDS)
        return children[-1]

    try:
        yield start
    finally:
        stop(children, grace)
        for child in children:  # ``stop`` leaves the children of a process that has exited
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


def answers(port: int, path: str, body: str | None = None) -> bool:
    """Returns whether an HTTP server on loopback answers a GET, or with a body of JSON a POST."""
    try:
        with closing(http.client.HTTPConnection(HOST, port, timeout=10)) as connection:
            connection.request("POST" if body else "GET", path, body, {"content-type": "application/json"})
            return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
