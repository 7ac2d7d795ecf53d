"""A terminal in which the steps of a page run, and the comparison of its output with the page."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")
_END = "end-of-command-of-the-docs"
# What differs between two runs: numbers, identifiers, the width of columns and bars.
_VARIABLE = (
    (re.compile(r"\b[0-9a-f]{8,}\b"), "0"),
    (re.compile(r"\b(router|prefill|decode|colocated)-(?:\w+-)?[a-z0-9]{8}\b"), r"\1-0"),  # as Ray names replicas
    (re.compile(r"\d[\d.,:]*"), "0"),
    (re.compile(r"[\s━╸╺█▏─]+"), " "),
)
# Ray forwards the logs of replicas, whose lines may come between any two lines of the command.
_FORWARDED = re.compile(r"\(ServeReplica:\S+ pid=\d+\) ")
_SHARE = re.compile(r"\b(\d[\d,]*)(?:/| of )(\d[\d,]*)\b")
_NONE = re.compile(r"\b0(?= (?:failed|ties|errors)\b)")


class Terminal:
    """One bash, whose commands have no standard input. ``run`` starts one command after the other."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._bash = subprocess.Popen(
            ["bash", "--norc", "--noprofile"],
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._text = ""
        self._changed = threading.Condition()
        self._status: int | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        # Each command is a process group of its own, which ctrl-C can reach; bash itself survives it.
        self._send("set -m; trap : INT")

    def _send(self, text: str) -> None:
        assert self._bash.stdin is not None
        self._bash.stdin.write(f"{text}\n".encode())
        self._bash.stdin.flush()

    def _read(self) -> None:
        assert self._bash.stdout is not None
        while chunk := os.read(self._bash.stdout.fileno(), 65536):
            with self._changed:
                self._text += chunk.decode(errors="replace")
                if end := re.search(rf"{_END} (\d+)\n", self._text):
                    self._status = int(end[1])
                    self._text = self._text[: end.start()]
                self._changed.notify_all()
        with self._changed:
            self._status = -1 if self._status is None else self._status
            self._changed.notify_all()

    def start(self, command: str) -> None:
        with self._changed:
            self._text, self._status = "", None
        self._send(f"{{ {command}\n}} </dev/null\necho {_END} $?")

    @property
    def lines(self) -> list[str]:
        """What the current command has printed, as a terminal would show it."""
        with self._changed:
            text = _ESCAPE.sub("", self._text)
        lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait(self, timeout: float) -> int | None:
        """Waits until the command ends. Returns its exit status; None after ``timeout`` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._status is not None, timeout)
            return self._status

    def wait_for(self, shown: Sequence[str], timeout: float) -> bool:
        """Waits until the output has all of ``shown``, while the command runs. Returns whether it has."""
        end = time.monotonic() + timeout
        while not matches(shown, self.lines, whole=False):
            with self._changed:
                if self._status is not None or time.monotonic() > end:
                    break
                self._changed.wait(0.2)
        return matches(shown, self.lines, whole=False)

    def press_ctrl_c(self) -> None:
        """Interrupts the command. If bash has not started it yet, waits for that."""
        while not (children := _children(self._bash.pid)) and self.wait(0.05) is None:
            pass
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(os.getpgid(child), signal.SIGINT)

    def close(self) -> None:
        """Ends the terminal and the processes that still run in it."""
        for stop in (signal.SIGTERM, signal.SIGKILL):
            for child in _children(self._bash.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(os.getpgid(child), stop)
            if self.wait(20) is not None:
                break
        self._bash.kill()
        self._bash.wait()
        self._reader.join(10)
        for pipe in (self._bash.stdin, self._bash.stdout):
            assert pipe is not None
            pipe.close()


def _children(parent: int) -> list[int]:
    try:
        return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    except FileNotFoundError:
        return []


def _plain(line: str) -> str:
    # Whether all were right, and whether any failed, is no variable figure.
    line = _SHARE.sub(lambda share: "all" if share[1] == share[2] else "some", line)
    line = _NONE.sub("none", line)
    for pattern, instead in _VARIABLE:
        line = pattern.sub(instead, line)
    return line.strip()


def _pattern(shown: str) -> str:
    """A pattern for the printed lines that a shown line stands for; "…" stands for any text, or for any lines."""
    if shown.strip() == "…":
        return r"(?:.*\n)*"
    parts = (re.escape(part.strip()) for part in _plain(shown).split("…"))
    return r" *.* *".join(parts) + r"\n"


def matches(shown: Sequence[str], printed: Sequence[str], *, whole: bool) -> bool:
    """Says whether ``printed``, without blank lines, is what the page shows; with ``whole`` unset, more may follow."""
    text = "".join(f"{_plain(line)}\n" for line in printed if line.strip() and not _FORWARDED.match(line))
    pattern = "".join(_pattern(line) for line in shown if line.strip())
    return (re.fullmatch if whole else re.match)(pattern, text) is not None


@contextlib.contextmanager
def terminals(folder: Path, environment: Mapping[str, str]) -> Iterator[dict[str, Terminal]]:
    """Yields a dictionary that the caller fills with terminals by name; ends them all."""
    opened: dict[str, Terminal] = {}
    try:
        yield opened
    finally:
        for terminal in reversed(opened.values()):
            terminal.close()
