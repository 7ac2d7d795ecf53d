"""Tests progress reports of long steps, in logs and pipes as well as on a terminal."""

from __future__ import annotations

import io
import sys

import pytest

from overfill.cli import progress
from overfill.cli.progress import LINE_SECONDS, progress_lines, show_progress


def test_lines_report_a_step_s_start_end_and_progress_now_and_then() -> None:
    now, lines = 0.0, list[str]()
    report = progress_lines(lines.append, lambda: now)
    for done in range(101):
        now = done / 100 * 2.5 * LINE_SECONDS
        report("Fitting", done, 100)
    report("Fitting", 100, 100)
    report("Loading", 1, 1)
    assert lines == [
        "Fitting",
        "Fitting: 40 % after 10 s, about 15 s left",
        "Fitting: 80 % after 20 s, about 5 s left",
        "Fitting: done after 25 s",
        "Loading: done",
    ]


def test_a_repeated_step_is_reported_again() -> None:
    now, lines = 0.0, list[str]()
    report = progress_lines(lines.append, lambda: now)
    for _ in range(2):
        report("Reading weights", 0, 2)
        now += 3
        report("Reading weights", 2, 2)
        now += 60
    assert lines == ["Reading weights", "Reading weights: done after 3 s"] * 2


def test_a_resumed_step_s_end_is_told_from_what_was_done_since() -> None:
    now, lines = 0.0, list[str]()
    report = progress_lines(lines.append, lambda: now)
    report("Distilling", 50, 100)
    now = 10
    report("Distilling", 55, 100)
    assert lines == ["Distilling", "Distilling: 55 % after 10 s, about 90 s left"]


def test_a_pipe_gets_lines_and_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich treat every output as a terminal
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    with show_progress() as report:
        for done in range(4):
            report("Reading weights", done, 3)
    lines = pipe.getvalue().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["Reading weights"] * 2
    assert not set(pipe.getvalue()) & set("\r\x1b")


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "progress_lines", None)
    with show_progress() as report:
        report("Reading weights", 3, 3)
    assert "100%" in terminal.getvalue()


def test_a_result_goes_to_the_pipe_beside_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in ``PAIR=$(overfill pair path default)``, typed in a terminal."""
    terminal, pipe = io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", pipe)
    monkeypatch.setenv("TERM", "xterm")
    with show_progress() as report:
        report("Reading weights", 1, 3)
        print("result")
    assert pipe.getvalue() == "result\n"
