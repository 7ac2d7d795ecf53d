"""Prints the state of a running test: one line that is updated in a terminal, or a line every 10 s in a log."""

from __future__ import annotations

import time
from typing import TextIO

import gevent

from overfill.lab.loadtest.run import LoadTestRun
from overfill.lab.traffic.outcome import figures

_TERMINAL_SECONDS = 1.0
_LOG_SECONDS = 10.0


class Progress:
    """Writes progress to ``out`` until the process ends."""

    def __init__(self, run: LoadTestRun, out: TextIO) -> None:
        self._run = run
        self._out = out
        self._began = time.monotonic()

    def run(self) -> None:
        terminal = self._out.isatty()
        while True:
            gevent.sleep(_TERMINAL_SECONDS if terminal else _LOG_SECONDS)
            start, end = ("\r\033[K", "") if terminal else ("", "\n")
            self._out.write(f"{start}{self._line()}{end}")
            self._out.flush()

    def _line(self) -> str:
        run = self._run
        total = run.workload.total
        found = {figure.name: figure.value for figure in figures(run.outcomes[-500:], None)}
        latencies = [
            f"{name} {1e3 * value:.0f} ms" for name in ("ttft_p90", "itl_p90") if (value := found[name]) is not None
        ]
        of = "" if total is None else f" of {total}"
        failed = sum(not outcome.ok for outcome in run.outcomes)
        parts = [f"{time.monotonic() - self._began:.0f} s", f"{len(run.outcomes)}{of} answered"]
        return ", ".join([*parts, f"{failed} failed", *latencies])
