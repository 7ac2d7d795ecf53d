"""A peer in an environment of its own: a process that is driven over JSON lines (``outside.py``)."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from overfill.errors import OverfillError

_SCRIPT = Path(__file__).with_name("outside.py")
_LAST_LINES = 8


class PeerFailed(OverfillError):
    """A peer did not start or broke down; notes hold what it printed last."""


class PeerProcess:
    """Starts the process, loads the model, and passes on what a contender is asked for.

    Args:
        kind: an engine of ``outside.py``.
        log: takes what the engine prints; its end is shown when it fails.
        options: of the engine.

    Raises:
        PeerFailed: the engine did not start.
    """

    def __init__(self, kind: str, python: Path, threads: int, log: Path, **options: Any) -> None:
        self.name = kind
        self._log = log
        # Bound to the threads that it is given, whatever the environment says for us.
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        environment.pop("PYTHONPATH", None)
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [str(python), str(_SCRIPT), kind],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                env=environment,
            )
        try:
            self.version = str(self._ask("load", threads=threads, **options)["version"])
        except BaseException:
            self.close()
            raise

    def begin(self, batch: int, prompt_tokens: int, steps: int) -> None:
        self._ask("begin", batch=batch, prompt_tokens=prompt_tokens, steps=steps)

    def steps(self, count: int) -> list[float]:
        return [float(seconds) for seconds in self._ask("steps", count=count)["seconds"]]

    def end(self) -> None:
        self._ask("end")

    def prefill(self, lengths: Sequence[int]) -> float:
        return float(self._ask("prefill", lengths=list(lengths))["seconds"])

    def serve(self, requests: Sequence[tuple[float, Sequence[int], int]]) -> list[list[float]]:
        """Plays requests of (due, prompt, max_tokens); when each one's tokens came. Seconds since the start."""
        times: list[list[float]] = self._ask("serve", requests=list(requests))["times"]
        return times

    def close(self) -> None:
        """Ends the process, by force when it does not leave by itself."""
        stdin, stdout = self._pipes()
        with suppress(BrokenPipeError):  # of a peer that has died with something unread
            stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        stdout.close()

    def _ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        stdin, stdout = self._pipes()
        try:
            stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        answer: dict[str, Any] = json.loads(line) if line else {"error": "it ended"}
        if "error" in answer:
            failure = PeerFailed(f"{self.name} failed in {op!r}: {answer['error']}")
            for line in self._log.read_text(errors="replace").splitlines()[-_LAST_LINES:]:
                failure.add_note(line)
            raise failure
        return answer

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise AssertionError("both are pipes")
        return stdin, stdout
