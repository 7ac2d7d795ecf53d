"""The agents that the tests run, set up as ``docs/how-to/agents.md`` says, and their task, which the mock engine plays.

Each agent has an environment and a home of its own.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HOME = Path(sys.prefix) / "agents"
"""Folder where ``make test-agents`` installs the agents."""
MODULES = HOME / "node_modules"
_ARCH = {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "agents.md"
MODEL, URL, PROMPT = "coder", "http://127.0.0.1:8000", "Repair sums.py, please."
"""What the page has in its files and commands."""
PATCHING_MODEL = "gpt-5.5"
"""A model to which Codex gives its tool with a grammar."""
_FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)

BROKEN, REPAIRED = "def add(a, b):\n    return a - b\n", "def add(a, b):\n    return a + b\n"
_COMMAND = "python3 -c 'import sums; print(sums.add(2, 3))' > result.txt"

Call = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Agent:
    """An agent with its task.

    Attributes:
        title: heading of its section on the page.
        program: replaces the first word of the section's command.
        installed: file without which the agent is not installed.
        path: of the API that the agent speaks.
        calls: returns the calls that read, edit and run, for the project's folder.
        formats: of tool calls in which the mock engine plays its task.
        options: options with which the command asks nobody and makes no namespaces.
        environment: what it needs beside the variables of the section, for the same reason.
    """

    name: str
    title: str
    program: Path
    installed: Path
    path: str
    formats: tuple[str, ...]
    calls: Callable[[Path], tuple[Call, ...]]
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def final(self) -> str:
        return f"The file is repaired, says {self.name}."

    def says(self, number: int) -> str:
        """The text of an answer before its call."""
        return f"Step {number} of {self.name}: I call a tool now, and look at what it says before I go on."

    def script(self, project: Path) -> list[dict[str, Any]]:
        """The answers of the mock engine. Each is for prompts that have the text of the answer before."""
        answers, when = [], PROMPT
        for number, (name, arguments) in enumerate(self.calls(project), 1):
            text = self.says(number)
            call = {"name": name, "arguments": arguments}
            thought = f"<think>\nThe next tool is {name}.\n</think>\n\n"
            answers.append({"when": when, "text": f"{thought}{text}\n", "tool_calls": [call]})
            when = text
        return [*answers, {"when": when, "text": self.final}]

    def set_up(self, home: Path, project: Path, url: str) -> tuple[list[str], dict[str, str]]:
        """Writes the files of the page's section. Returns its command, and the whole environment."""
        section = PAGE.read_text(encoding="utf-8").partition(f"\n## {self.title}\n")[2].partition("\n## ")[0]
        typed: list[str] = []
        for language, title, text in _FENCE.findall(section.replace(URL, url)):
            if language == "console":
                typed += [line.removeprefix("$ ") for line in text.splitlines()]
                continue
            file = home / title.removeprefix("~/") if title.startswith("~/") else project / title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        *exports, command = typed
        variables = dict(line.removeprefix("export ").split("=", 1) for line in exports)
        *words, prompt = shlex.split(command)
        path = f"{Path(sys.executable).parent}:{os.defpath}"
        environment = {"PATH": path, "HOME": str(home), "TERM": "dumb"} | variables | self.environment
        return [str(self.program), *words[1:], *self.options, prompt], environment


_CODEX = MODULES / f"@openai/codex-linux-{_ARCH}/vendor/{platform.machine()}-unknown-linux-musl/bin/codex"
_CLAUDE = MODULES / f"@anthropic-ai/claude-code-linux-{_ARCH}/claude"
_OPENCODE = MODULES / f"opencode-linux-{_ARCH}/bin/opencode"

_CODEX_ALONE = ("--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox")
_MCP_SERVER = Path(__file__).with_name("mcp_files.py")
_PATCH = """\
*** Begin Patch
*** Update File: sums.py
@@
 def add(a, b):
-    return a - b
+    return a + b
*** End Patch
"""

AGENTS = (
    Agent(
        "codex", "Codex", _CODEX, _CODEX, "/v1/responses",
        ("hermes", "qwen3_coder"),
        lambda project: (
            ("exec_command", {"cmd": "cat sums.py"}),
            ("exec_command", {"cmd": "sed -i 's/a - b/a + b/' sums.py"}),
            ("exec_command", {"cmd": _COMMAND}),
        ),
        _CODEX_ALONE,
    ),
    Agent(
        "codex-patch", "Codex", _CODEX, _CODEX, "/v1/responses",
        ("hermes",),
        lambda project: (
            ("exec_command", {"cmd": "cat sums.py"}),
            ("apply_patch", {"input": _PATCH}),
            ("exec_command", {"cmd": _COMMAND}),
        ),
        (*_CODEX_ALONE, "--config", f'model="{PATCHING_MODEL}"'),
    ),
    Agent(
        "codex-mcp", "Codex", _CODEX, _CODEX, "/v1/responses",
        ("hermes",),
        lambda project: (
            ("mcp__files__read_text", {"path": "sums.py"}),
            ("exec_command", {"cmd": "sed -i 's/a - b/a + b/' sums.py"}),
            ("exec_command", {"cmd": _COMMAND}),
        ),
        (*_CODEX_ALONE, "--config", f'mcp_servers.files={{command="{sys.executable}",args=["{_MCP_SERVER}"]}}'),
    ),
    Agent(
        "claude", "Claude Code", _CLAUDE, _CLAUDE, "/v1/messages",
        ("hermes", "mistral"),
        lambda project: (
            ("Read", {"file_path": f"{project}/sums.py"}),
            ("Edit", {"file_path": f"{project}/sums.py", "old_string": "a - b", "new_string": "a + b"}),
            ("Bash", {"command": _COMMAND}),
        ),
        ("--dangerously-skip-permissions",), {"IS_SANDBOX": "1"},
    ),
    Agent(
        "opencode", "opencode", _OPENCODE, _OPENCODE, "/v1/chat/completions",
        ("hermes", "llama3_json"),
        lambda project: (
            ("read", {"filePath": f"{project}/sums.py"}),
            ("edit", {"filePath": f"{project}/sums.py", "oldString": "a - b", "newString": "a + b"}),
            ("bash", {"command": _COMMAND}),
        ),
    ),
    Agent(
        "agents-sdk", "Agents SDK", Path(sys.executable), HOME / "python/agents/__init__.py", "/v1/responses",
        ("hermes", "pythonic"),
        lambda project: (
            ("read", {"path": "sums.py"}),
            ("edit", {"path": "sums.py", "old": "a - b", "new": "a + b"}),
            ("run", {"command": _COMMAND}),
        ),
        environment={"PYTHONPATH": str(HOME / "python")},
    ),
)  # fmt: skip
