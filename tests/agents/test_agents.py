"""Tests that real agents finish a task on a stack, and that none of them notices the loss of a decode worker."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from real_agents import AGENTS, BROKEN, MODEL, PATCHING_MODEL, REPAIRED, Agent
from recording_proxy import Exchange, RecordingProxy
from up_stack import Stack, stack_of

STEP = 0.01
"""Seconds of a decode step: an answer of 60 tokens takes long enough to lose its worker."""
KILLED_AFTER = 12
"""Events of the second answer after which its worker is killed."""


@contextmanager
def stack_for(agent: Agent, calls: str, folder: Path) -> Iterator[Stack]:
    """Runs a stack with two decode workers, whose mock engines play the agent's task with ``calls`` of that format."""
    script = folder / "script.json"
    script.write_text(json.dumps(agent.script(folder / "project")), encoding="utf-8")
    arguments = json.dumps({"script": str(script), "step": STEP, "tool_call_parser": calls})
    named = ("--served-model-name", f"{MODEL},{PATCHING_MODEL}", "--tool-call-parser", calls)
    with stack_of("--engine", "mock", "--engine-args", arguments, "--decode", "2", *named) as stack:
        yield stack


def start(agent: Agent, folder: Path, url: str) -> subprocess.CompletedProcess[str]:
    """Asks ``agent`` to repair a file in the project of ``folder``. Skips the test if it is not installed."""
    if not agent.installed.exists():
        pytest.skip(f"{agent.name} is not installed: {agent.installed} is missing")
    project, home = folder / "project", folder / "home"
    for place in (project, home):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
    (project / "sums.py").write_text(BROKEN, encoding="utf-8")
    command, environment = agent.set_up(home, project, url)
    return subprocess.run(
        command,
        cwd=project,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def run(agent: Agent, folder: Path, proxy: RecordingProxy) -> list[Exchange]:
    """Has ``agent`` repair a file; returns the exchanges of its turns."""
    done = start(agent, folder, proxy.url)
    project = folder / "project"
    said = f"{done.stdout}\n{done.stderr}"
    statuses = [(exchange.method, exchange.path, exchange.status) for exchange in proxy.exchanges]
    assert done.returncode == 0, said
    assert agent.final in done.stdout, said
    assert (project / "sums.py").read_text(encoding="utf-8") == REPAIRED, said
    assert (project / "result.txt").read_text(encoding="utf-8") == "5\n", said
    assert all(status < 400 for _, path, status in statuses if path.startswith("/v1/")), statuses
    # opencode also asks for a title, at any time and without tools.
    return [exchange for exchange in proxy.exchanges if exchange.body and "tools" in json.loads(exchange.body)]


OTHER_IN_EACH_RUN = {
    "id", "item_id", "call_id", "created", "created_at", "completed_at", "sequence_number", "prompt_cache_key",
    "input_tokens", "prompt_tokens", "total_tokens", "cached_tokens", "cache_read_input_tokens", "overfill",
}  # fmt: skip
"""Ids, times and workers. The length of a prompt, in which tools say what is another each time, and its cached part."""
DELTAS = {"content", "arguments", "delta", "text", "partial_json"}
"""Fields with a part of a text. How many tokens a part has depends on the pace of the processes."""


def plain(exchange: Exchange) -> list[dict[str, object]]:
    """The events of a stream, each as its values by path, with all parts of a text in one event."""
    events: list[dict[str, object]] = []
    for line in exchange.answer.decode().splitlines():
        if not line.startswith("data: {"):
            continue
        event = dict(_values(json.loads(line.removeprefix("data: "))))
        last = events[-1] if events else {}
        parts = [path for path in event if ".delta" in path and path.rpartition(".")[2] in DELTAS]
        if len(parts) == 1 and event.keys() == last.keys() and event == last | {parts[0]: event[parts[0]]}:
            last[parts[0]] = f"{last[parts[0]]}{event[parts[0]]}"
        else:
            events.append(event)
    return events


def _values(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yields path and value of everything in a JSON value that is the same in each run."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in OTHER_IN_EACH_RUN:
                yield from _values(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _values(inner, f"{path}.{index}")
    else:
        yield path, value


@pytest.mark.parametrize(
    ("agent", "calls"),
    [(agent, calls) for agent in AGENTS for calls in agent.formats],
    ids=lambda value: getattr(value, "name", value),
)
def test_an_agent_finishes_its_task_and_does_not_notice_a_killed_worker(agent, calls, tmp_path):
    killed: list[str] = []
    before, after = (answer["text"].strip().encode() for answer in agent.script(tmp_path)[:2])

    def kill(exchange: Exchange) -> None:
        in_step_2 = before in exchange.body and after not in exchange.body
        if in_step_2 and not killed and exchange.answer.count(b"data:") >= KILLED_AFTER:
            killed.append(stack.kill_busy_worker())

    with stack_for(agent, calls, tmp_path) as stack:
        with RecordingProxy(stack.url) as proxy:
            whole = run(agent, tmp_path, proxy)
        with RecordingProxy(stack.url) as proxy:
            proxy.passing = kill
            resumed = run(agent, tmp_path, proxy)
    assert len(killed) == 1
    assert [exchange.path.partition("?")[0] for exchange in whole] == [agent.path] * 4
    for one, other in zip(whole, resumed, strict=True):
        assert plain(one) == plain(other)
