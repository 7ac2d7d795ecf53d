"""Every command that README, tutorial and how-tos show is typed as the page says, and prints what the page shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from console_blocks import CTRL_C, PAGES, ROOT, SavedFile, Step, read
from console_terminal import Terminal, matches, terminals
from docs_sandbox import Sandbox

TIMEOUT = 600.0  # of one command, in seconds


def check(step: Step, terminal: Terminal) -> None:
    """Runs a step, and compares what it prints with what the page shows."""
    place = f"line {step.line + 1}: {step.command}"
    if step.command == CTRL_C:
        terminal.press_ctrl_c()
    else:
        terminal.start(step.command)
    if step.until_ctrl_c:
        ready = terminal.wait_for(step.output, TIMEOUT)
        assert terminal.wait(0) is None, f"{place}: ended\n{terminal.text}"
        assert ready, f"{place}: what the page shows did not come in {TIMEOUT:.0f} s\n{terminal.text}"
        return
    status = terminal.wait(TIMEOUT)
    assert status is not None, f"{place}: has not ended after {TIMEOUT:.0f} s\n{terminal.text}"
    # 130 is the shell's status of a program that ctrl-C has ended.
    assert status in ((0, 130) if step.command == CTRL_C else (0,)), f"{place}: exit status {status}\n{terminal.text}"
    if step.output and not step.varies:
        shown = "\n".join(step.output)
        assert matches(step.output, terminal.lines, whole=True), (
            f"{place}: printed\n{terminal.text}\n\nThe page shows\n{shown}"
        )


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page(page: Path, sandbox: Sandbox) -> None:
    with terminals(sandbox.checkout, sandbox.environment) as opened:
        for step in read(page):
            if isinstance(step, SavedFile):
                home, name = step.name.startswith("~/"), step.name.removeprefix("~/")
                file = (sandbox.home if home else sandbox.checkout) / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(step.text, encoding="utf-8")
            else:
                if step.terminal not in opened:
                    opened[step.terminal] = Terminal(sandbox.checkout, sandbox.environment)
                check(step, opened[step.terminal])
