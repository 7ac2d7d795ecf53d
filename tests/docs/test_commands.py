"""Every command that README, tutorial and how-tos show is typed as the page says, and prints what the page shows.

``make test-docs UPDATE=1`` writes what the commands printed into the pages.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import Sandbox, Tally
from pages import CTRL_C, PAGES, ROOT, NotRun, SavedFile, Step, read
from terminal import Terminal, matches, terminals, updated

UPDATE = bool(os.environ.get("UPDATE"))
TIMEOUT = 600.0  # of one command, in seconds


def check(step: Step, terminal: Terminal) -> None:
    """Runs a step, and compares what it prints with what the page shows."""
    place = f"line {step.line + 1}: {step.command}"
    if step.command == CTRL_C:
        terminal.press_ctrl_c()
    else:
        terminal.start(step.command)
    if step.until_ctrl_c:
        ready = terminal.wait_for([] if step.varies else step.output, TIMEOUT)
        assert terminal.wait(0) is None, f"{place}: ended\n" + "\n".join(terminal.lines)
        assert ready, f"{place}: the output that the page shows did not come within {TIMEOUT:.0f} s\n" + "\n".join(
            terminal.lines
        )
        return
    status = terminal.wait(TIMEOUT)
    printed = "\n".join(terminal.lines)
    assert status is not None, f"{place}: has not ended after {TIMEOUT:.0f} s\n{printed}"
    assert status == 0 or step.command == CTRL_C, f"{place}: exit status {status}\n{printed}"
    if step.output and not step.varies and not UPDATE and step.command != CTRL_C:
        assert matches(step.output, terminal.lines, whole=True), (
            f"{place}: printed\n{printed}\n\nThe page shows\n" + "\n".join(step.output)
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
def test_the_commands_of_a_page(page: Path, sandbox: Sandbox, tally: Tally) -> None:
    name = str(page.relative_to(ROOT))
    steps = read(page)
    tally.not_run += [(name, len(each.commands), each.reason) for each in steps if isinstance(each, NotRun)]
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
                tally.ran[name] += step.command != CTRL_C
                if step.output:
                    printed.append((step, terminal.lines))
    if UPDATE:
        write(page, printed, sandbox.home)
