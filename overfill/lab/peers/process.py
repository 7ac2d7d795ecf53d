"""A process that is driven over JSON lines, such as plain vLLM."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from overfill.errors import OverfillError

_LAST_LINES = 8


class PeerFailed(OverfillError):
    """A peer did not start, or failed. The notes hold the last lines that it printed."""


class JsonProcess:
    """A process that answers each JSON line on its stdin with one on its stdout, and ends when stdin closes.

    Args:
        name: Name in messages.
        log: File for the process's stderr; its last lines are shown when a request fails.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self._log = log
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True, env=environment
            )

    def close(self) -> None:
        """Closes the process's stdin, and kills the process if it has not exited after 10 s."""
        stdin, stdout = self._pipes()
        with suppress(BrokenPipeError):  # the peer died with input unread
            stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        stdout.close()

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Sends a request and waits for its answer. Raises PeerFailed if the process fails or has exited."""
        stdin, stdout = self._pipes()
        try:
            stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the process exited"}
        if "error" in answer:
            failure = PeerFailed(f"{self.name} failed in {op!r}: {answer['error']}")
            for line in self._log.read_text(errors="replace").splitlines()[-_LAST_LINES:]:
                failure.add_note(line)
            raise failure
        return answer

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise AssertionError("stdin and stdout are pipes")
        return stdin, stdout
