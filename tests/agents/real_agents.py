"""The agents that the tests run: where they are, how they are started, and the task that the mock engine has them do.

Every agent gets an environment and a home of its own, without telemetry and without look-ups of updates or models.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HOME = Path(sys.prefix) / "agents"
"""Folder where ``make test-agents`` installs the agents."""
MODULES = HOME / "node_modules"
_ARCH = {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
_TRIPLE = f"{platform.machine()}-unknown-linux-musl"

MODEL = "mock"
BROKEN, REPAIRED = "def add(a, b):\n    return a - b\n", "def add(a, b):\n    return a + b\n"
_COMMAND = "python3 -c 'import sums; print(sums.add(2, 3))' > result.txt"

Call = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Agent:
    """An agent with its task.

    Attributes:
        program: file without which the agent is not installed.
        start: returns the command, for the base URL of a stack (without ``/v1``) and a prompt.
        calls: returns the calls that read, edit and run, for the project's folder.
        path: of the API that the agent speaks.
        environment: beside ``PATH`` and ``HOME``.
        files: returns the configuration, by path below the home, for the base URL.
    """

    name: str
    program: Path
    path: str
    start: Callable[[str, str], list[str]]
    calls: Callable[[Path], tuple[Call, ...]]
    environment: Callable[[str], dict[str, str]] = lambda url: {}
    files: Callable[[str], Mapping[str, str]] = field(default=lambda url: {})

    @property
    def prompt(self) -> str:
        return f"Repair sums.py with {self.name}, please."

    def script(self, project: Path) -> list[dict[str, Any]]:
        """The answers of the mock engine. Each is for prompts that have the text of the answer before."""
        answers, when = [], self.prompt
        for number, (name, arguments) in enumerate(self.calls(project), 1):
            text = f"Step {number} of {self.name}: I call {name} now, and look at what it says before I go on."
            answers.append({"when": when, "text": text, "tool_calls": [{"name": name, "arguments": arguments}]})
            when = text
        return [*answers, {"when": when, "text": self.final}]

    @property
    def final(self) -> str:
        return f"The file is repaired, says {self.name}."

    def run_environment(self, home: Path, url: str) -> dict[str, str]:
        """Writes the configuration into ``home``; returns the whole environment."""
        for name, text in self.files(url).items():
            file = home / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        python = f"{Path(sys.executable).parent}:{os.defpath}"
        return {"PATH": python, "HOME": str(home), "TERM": "dumb"} | self.environment(url)


_CODEX = MODULES / f"@openai/codex-linux-{_ARCH}/vendor/{_TRIPLE}/bin/codex"
_CLAUDE = MODULES / f"@anthropic-ai/claude-code-linux-{_ARCH}/claude"
_OPENCODE = MODULES / f"opencode-linux-{_ARCH}/bin/opencode"
_SDK = HOME / "python/agents/__init__.py"


def _codex_files(url: str) -> dict[str, str]:
    return {
        ".codex/config.toml": f"""\
model = "{MODEL}"
model_provider = "overfill"

[model_providers.overfill]
name = "OverFill"
base_url = "{url}/v1"
wire_api = "responses"
"""
    }


def _opencode_files(url: str) -> dict[str, str]:
    models = {MODEL: {"limit": {"context": 131072, "output": 8192}}}
    provider = {"npm": "@ai-sdk/openai-compatible", "options": {"baseURL": f"{url}/v1"}, "models": models}
    config = {"provider": {"overfill": provider}, "model": f"overfill/{MODEL}"}
    return {".config/opencode/opencode.json": json.dumps(config)}


AGENTS = (
    Agent(
        "codex",
        _CODEX,
        "/v1/responses",
        lambda url, prompt: [
            str(_CODEX), "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", prompt
        ],
        lambda project: (
            ("exec_command", {"cmd": "cat sums.py"}),
            ("exec_command", {"cmd": "sed -i 's/a - b/a + b/' sums.py"}),
            ("exec_command", {"cmd": _COMMAND}),
        ),
        files=_codex_files,
    ),
    Agent(
        "claude",
        _CLAUDE,
        "/v1/messages",
        lambda url, prompt: [str(_CLAUDE), "--print", "--dangerously-skip-permissions", "--model", MODEL, prompt],
        lambda project: (
            ("Read", {"file_path": f"{project}/sums.py"}),
            ("Edit", {"file_path": f"{project}/sums.py", "old_string": "a - b", "new_string": "a + b"}),
            ("Bash", {"command": _COMMAND}),
        ),
        lambda url: {
            "ANTHROPIC_BASE_URL": url,
            "ANTHROPIC_API_KEY": "none",
            "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "IS_SANDBOX": "1",
        },
    ),
    Agent(
        "opencode",
        _OPENCODE,
        "/v1/chat/completions",
        lambda url, prompt: [str(_OPENCODE), "run", prompt],
        lambda project: (
            ("read", {"filePath": f"{project}/sums.py"}),
            ("edit", {"filePath": f"{project}/sums.py", "oldString": "a - b", "newString": "a + b"}),
            ("bash", {"command": _COMMAND}),
        ),
        lambda url: {"OPENCODE_DISABLE_MODELS_FETCH": "1", "OPENCODE_DISABLE_AUTOUPDATE": "1"},
        _opencode_files,
    ),
    Agent(
        "agents-sdk",
        _SDK,
        "/v1/responses",
        lambda url, prompt: [
            sys.executable, str(Path(__file__).with_name("agents_sdk_task.py")), f"{url}/v1", MODEL, prompt
        ],
        lambda project: (
            ("read", {"path": "sums.py"}),
            ("edit", {"path": "sums.py", "old": "a - b", "new": "a + b"}),
            ("run", {"command": _COMMAND}),
        ),
        lambda url: {"PYTHONPATH": str(HOME / "python")},
    ),
)  # fmt: skip
