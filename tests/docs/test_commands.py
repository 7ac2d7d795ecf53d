"""Every command that README, tutorial and how-tos show is typed as the page says, and prints what the page shows.

``make test-docs UPDATE=1`` writes what the commands printed into the pages.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from console_blocks import CTRL_C, PAGES, ROOT, NotRun, SavedFile, Step, read
from console_terminal import Terminal, matches, terminals, updated
from docs_sandbox import TALLY, Sandbox

UPDATE = bool(os.environ.get("UPDATE"))
TIMEOUT = 600.0  # of one command, in seconds
UPDATE_WAIT = 60.0  # an update also takes output that the page did not show


def check(step: Step, terminal: Terminal) -> None:
    """Runs a step, and compares what it prints with what the page shows."""
    place = f"line {step.line + 1}: {step.command}"
    if step.command == CTRL_C:
        terminal.press_ctrl_c()
    else:
        terminal.start(step.command)
    if step.until_ctrl_c:
        ready = terminal.wait_for(step.output, UPDATE_WAIT if UPDATE else TIMEOUT)
        assert terminal.wait(0) is None, f"{place}: ended\n{terminal.text}"
        assert ready or UPDATE, f"{place}: what the page shows did not come in {TIMEOUT:.0f} s\n{terminal.text}"
        return
    status = terminal.wait(TIMEOUT)
    assert status is not None, f"{place}: has not ended after {TIMEOUT:.0f} s\n{terminal.text}"
    # 130 is the shell's status of a program that ctrl-C has ended.
    assert status in ((0, 130) if step.command == CTRL_C else (0,)), f"{place}: exit status {status}\n{terminal.text}"
    if step.output and not step.varies and not UPDATE:
        shown = "\n".join(step.output)
        assert matches(step.output, terminal.lines, whole=True), (
            f"{place}: printed\n{terminal.text}\n\nThe page shows\n{shown}"
        )


def write(page: Path, outputs: list[tuple[Step, list[str]]], home: Path) -> None:
    """Puts what the commands printed into the page, with "…" for ``home``; from its end, so that line numbers hold."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for step, printed in sorted(outputs, key=lambda each: each[0].first, reverse=True):
        margin = " " * step.indent
        lines[step.first : step.last] = [
            f"{margin}{line}".rstrip().replace(str(home), "…") for line in updated(step.output, printed)
        ]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page(page: Path, sandbox: Sandbox) -> None:
    name = str(page.relative_to(ROOT))
    steps = read(page)
    for each in steps:
        if isinstance(each, NotRun):
            TALLY.not_run[each.reason] += len(each.commands)
    printed: list[tuple[Step, list[str]]] = []
    with terminals(sandbox.checkout, sandbox.environment) as opened:
        for step in steps:
            if isinstance(step, SavedFile):
                (sandbox.checkout / step.name).write_text(step.text, encoding="utf-8")
            elif isinstance(step, Step):
                if step.terminal not in opened:
                    opened[step.terminal] = Terminal(sandbox.checkout, sandbox.environment)
                terminal = opened[step.terminal]
                check(step, terminal)
                TALLY.ran[name] += step.command != CTRL_C
                if step.output:
                    printed.append((step, terminal.lines))
    if UPDATE:
        write(page, printed, sandbox.home)
