"""Reads the ``console`` blocks of a page: what a reader types, in which terminal, and what the page shows as output.

<!-- not run: needs a GPU -->        the next block is not run, for this reason
<!-- output varies -->               the next block runs, and its output is not compared

```console title="Terminal 2"        a block of a second terminal; without a title, of "Terminal 1"
$ overfill generate \\                a command, continued over lines that end with a backslash
    "Why is the sky blue?"
Because …                            output; "…" stands for any text, alone in a line for any lines
^C                                   the reader presses ctrl-C: the command before it runs until then
```

```python title="ask.py"             a file that the reader saves under this name
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Every page that tells its reader to type something.
PAGES = [
    ROOT / "README.md",
    ROOT / "docs" / "index.md",
    *sorted((ROOT / "docs" / "tutorial").glob("*.md")),
    *sorted((ROOT / "docs" / "how-to").glob("*.md")),
]
CTRL_C = "^C"
_FENCE = re.compile(r"^( *)```([\w-]*)(.*)$")
_MARK = re.compile(r"^\s*<!-- (?:not run: (?P<reason>.+?)|(?P<varies>output varies)) -->$")
_ALMOST_A_MARK = re.compile(r"^\s*<!--\s*(?:not|output)\b|-->$")
# Commands that change the reader's machine, or need more of it than a checkout.
_NEVER_RUN = re.compile(r"(?:^|[;&|]\s*|\$\()(?:sudo|pip|docker|podman|kubectl|helm|apt-get|serve|make) ")
_TITLE = re.compile(r'title="([^"]+)"')


@dataclass
class Step:
    """A command with the output that the page shows, or ctrl-C."""

    terminal: str
    command: str
    line: int
    output: list[str] = field(default_factory=list)
    varies: bool = False
    until_ctrl_c: bool = False  # the command runs until ctrl-C is pressed in its terminal


@dataclass(frozen=True)
class SavedFile:
    """A block that the reader saves as a file."""

    name: str
    text: str


@dataclass(frozen=True)
class _Block:
    language: str
    title: str
    line: int  # of the first line within the fences, counted from 0
    lines: list[str]
    mark: re.Match[str] | None


def _blocks(text: str) -> Iterator[_Block]:
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        if fence is None:
            number += 1
            continue
        indent = len(fence[1])
        end = next(at for at in range(number + 1, len(lines)) if lines[at].strip() == "```")
        before = next((line for line in reversed(lines[:number]) if line.strip()), "")
        title = _TITLE.search(fence[3])
        inside = [line[indent:] for line in lines[number + 1 : end]]
        mark = _MARK.match(before)
        if mark is None and _ALMOST_A_MARK.search(before):
            raise ValueError(f"line {number}: a block's mark is '<!-- not run: REASON -->' or '<!-- output varies -->'")
        yield _Block(fence[2], title[1] if title else "", number + 1, inside, mark)
        number = end + 1


def _steps(block: _Block) -> list[Step]:
    terminal = block.title or "Terminal 1"
    varies = block.mark is not None and bool(block.mark["varies"])
    steps: list[Step] = []
    continued = False
    for offset, line in enumerate(block.lines):
        number = block.line + offset
        if continued:
            steps[-1].command += f"\n{line}"
        elif line.startswith("$ ") or line == CTRL_C:
            steps.append(Step(terminal, line.removeprefix("$ "), number, varies=varies))
        elif not steps:
            raise ValueError(f"line {number + 1}: a console block begins with '$ ' or '{CTRL_C}', not with {line!r}")
        else:
            steps[-1].output.append(line)
        continued = line.endswith("\\") and (continued or line.startswith("$ "))
    return steps


def _runs_until_ctrl_c(command: str) -> bool:
    return command.startswith("overfill up") and "&" not in command and "--dry-run" not in command


def read(page: Path) -> list[Step | SavedFile]:
    """Returns what a reader of ``page`` does, in the order of the page.

    Raises:
        ValueError: a console block does not begin with a command; a mark is mistyped or missing; or the page has no
            ctrl-C for an ``overfill up``.
    """
    found: list[Step | SavedFile] = []
    running: dict[str, Step] = {}
    started: list[Step] = []
    for block in _blocks(page.read_text(encoding="utf-8")):
        if block.language == "console":
            steps = _steps(block)
            if block.mark is not None and block.mark["reason"]:
                continue
            for step in steps:
                if _NEVER_RUN.search(step.command):
                    raise ValueError(f"line {step.line + 1}: {step.command!r} needs a mark that says why it is not run")
                if step.command == CTRL_C and step.terminal in running:
                    running[step.terminal].until_ctrl_c = True
                running[step.terminal] = step
            found += steps
            started += [step for step in steps if _runs_until_ctrl_c(step.command)]
        elif "." in block.title and not block.title.startswith("examples/"):
            found.append(SavedFile(block.title, "\n".join(block.lines) + "\n"))
    for step in started:
        if step.varies:
            raise ValueError(f"line {step.line + 1}: show the line of {step.command!r} to wait for, without a mark")
        if not step.until_ctrl_c:
            raise ValueError(f"line {step.line + 1}: {step.command!r} needs a {CTRL_C} later in {step.terminal}")
    return found
