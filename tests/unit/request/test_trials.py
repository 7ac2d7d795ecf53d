"""Tests trials of clients' grammars: what ends a process ends a trial only, and no client waits for another's bombs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from realistic_grammars import grammars as realistic_grammars

from overfill.errors import InvalidRequest, Overloaded
from overfill.request import trial_frames
from overfill.request.fair_permits import FairPermits
from overfill.request.grammar import GrammarFailed, Grammars, Matcher
from overfill.request.grammar_limits import GrammarLimits
from overfill.request.params import Grammar
from overfill.request.trials import WAITING, Trials


def chain(links: int, how: str) -> str:
    """A schema whose definitions each reference the next one."""
    wrap: dict[str, Any] = {
        "properties": lambda inner: {"type": "object", "properties": {"a": inner}},
        "anyOf": lambda inner: {"anyOf": [inner, {"type": "null"}]},
    }
    definitions: dict[str, Any] = {f"d{i}": wrap[how]({"$ref": f"#/$defs/d{i + 1}"}) for i in range(links)}
    return json.dumps({"$ref": "#/$defs/d0", "$defs": definitions | {f"d{links}": {"type": "string"}}})


def rules(count: int) -> str:
    return "start: r0\n" + "".join(f'r{i}: "a" r{i + 1}\n' for i in range(count)) + f'r{count}: "b"\n'


PRODUCT = json.dumps({"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(1, 41)]})
BOMBS = {
    "references in properties": ("json_schema", chain(1500, "properties"), "refer to each other, too deeply"),
    "references in anyOf": ("json_schema", chain(1500, "anyOf"), "refer to each other, too deeply"),
    "rules": ("lark", rules(4000), "refer to each other, too deeply"),
    "product of automata": ("json_schema", PRODUCT, "more than 64 MiB of memory"),
    "multiple of a large number": ("json_schema", '{"type": "integer", "multipleOf": 4000037}', "more than 64 MiB"),
    "nesting": ("json_schema", '{"a":' * 5000 + "1" + "}" * 5000, "at most 200 levels"),
    "digits": ("json_schema", '{"type": "integer", "minimum": ' + "9" * 5000 + "}", "is not JSON"),
    "product of terminals": (
        "lark",
        "start: P\nP: " + " & ".join(f"/(.*a.{{{i}}}b.*)/" for i in range(1, 25)),
        "is too complex",
    ),
    "no answer": (
        "json_schema",
        '{"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}}',
        "allows no",
    ),
    "not a grammar": ("lark", "start: nothing", "nothing"),
}


@pytest.fixture
async def trials(tiny_pair: Path) -> AsyncIterator[Trials]:
    made = Trials(tiny_pair / "full" / "tokenizer.json", 512, [1])
    yield made
    made.close()


@pytest.mark.parametrize("name", BOMBS)
async def test_a_bomb_is_refused_and_costs_its_trial_only(trials: Trials, name: str) -> None:
    kind, text, reason = BOMBS[name]
    with pytest.raises(InvalidRequest, match=f"^sampling.grammar.{kind}: .*{reason}"):
        await trials.try_text(kind, text)
    helper = trials.helper_pid
    with pytest.raises(InvalidRequest, match=reason):
        await trials.try_text(kind, text)
    assert await trials.try_text("regex", "[0-9]{3}") >= 0
    assert trials.helper_pid == helper


async def test_a_slow_grammar_ends_at_its_cpu_time(tiny_pair: Path) -> None:
    limits = GrammarLimits(memory=1 << 30, seconds=1)
    trials = Trials(tiny_pair / "full" / "tokenizer.json", 512, [1], limits)
    with pytest.raises(InvalidRequest, match="takes more than 1 s of CPU time"):
        await trials.try_text("json_schema", PRODUCT)
    trials.close()


async def test_verdicts_are_remembered(trials: Trials) -> None:
    kind, text, reason = BOMBS["product of automata"]
    await trials.try_text("regex", "a|b")
    with pytest.raises(InvalidRequest, match=reason):
        await trials.try_text(kind, text)
    os.kill(trials.helper_pid or 0, signal.SIGSTOP)  # no trial can end now
    await trials.try_text("regex", "a|b")
    with pytest.raises(InvalidRequest, match=reason):
        await trials.try_text(kind, text, "another client")
    assert await trials.try_text("json_object", "") == 0


async def test_bombs_of_one_client_do_not_delay_another(trials: Trials) -> None:
    bombs = [
        asyncio.ensure_future(trials.try_text("json_schema", PRODUCT.replace("]", f', {{"maxLength": {i}}}]'), "one"))
        for i in range(900, 905)
    ]
    await asyncio.sleep(0)
    await trials.try_text("regex", "x{5}", "other")
    await trials.try_text("regex", "y{5}", "other")
    assert sum(bomb.done() for bomb in bombs) < len(bombs)
    for bomb in bombs:
        bomb.cancel()
    await asyncio.wait(bombs)


async def test_one_client_may_have_only_so_many_trials_waiting(trials: Trials) -> None:
    many = [asyncio.ensure_future(trials.try_text("regex", f"x{{{i}}}", "one")) for i in range(WAITING + 2)]
    outcomes = await asyncio.gather(*many, return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, Overloaded)]
    assert len(refused) == 1
    assert len([outcome for outcome in outcomes if isinstance(outcome, float)]) == WAITING + 1


async def test_a_dead_helper_is_replaced_and_its_trials_are_repeated(trials: Trials) -> None:
    await trials.try_text("regex", "a")
    first = trials.helper_pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    trial = asyncio.ensure_future(trials.try_text("regex", "b"))
    await asyncio.sleep(0)
    os.kill(first, signal.SIGKILL)
    assert await trial >= 0
    assert trials.helper_pid not in (None, first)


async def test_a_helper_that_takes_no_request_is_replaced_at_once(trials: Trials, monkeypatch) -> None:
    await trials.try_text("regex", "a")
    first, write = trials.helper_pid, trial_frames.write_frame

    def broken(*frame: Any) -> None:
        if trials.helper_pid == first:  # its end is not noticed before both attempts
            raise BrokenPipeError
        write(*frame)

    monkeypatch.setattr(trial_frames, "write_frame", broken)
    assert await trials.try_text("regex", "b") >= 0
    assert trials.helper_pid != first


async def test_a_cancelled_trial_goes_on_and_frees_its_turn(trials: Trials) -> None:
    kind, text, reason = BOMBS["product of automata"]
    trial = asyncio.ensure_future(trials.try_text(kind, text, "one"))
    waiting = asyncio.ensure_future(trials.try_text("regex", "ab", "one"))
    await asyncio.sleep(0)
    trial.cancel()
    waiting.cancel()
    await asyncio.wait([trial, waiting])
    assert await trials.try_text("regex", "abc", "one") >= 0
    os.kill(trials.helper_pid or 0, signal.SIGSTOP)
    with pytest.raises(InvalidRequest, match=reason):
        await trials.try_text(kind, text)


async def test_the_helper_has_no_port_and_no_secrets(trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERFILL_API_KEY", "hidden")
    await trials.try_text("regex", "a")
    helper = psutil.Process(trials.helper_pid)
    assert not helper.net_connections("inet")
    assert "hidden" not in helper.environ().values()
    assert helper.num_threads() == 1


PARENT = """
import asyncio, os, signal, sys
from pathlib import Path
from overfill.request.trials import Trials

async def main():
    trials = Trials(Path(sys.argv[1]), 512, [1])
    await trials.try_text("regex", "a")
    trial = asyncio.ensure_future(trials.try_text("json_schema", sys.argv[2]))
    while not os.listdir(f"/proc/{trials.helper_pid}/task") or trial.done():
        await asyncio.sleep(0)
    print(trials.helper_pid, flush=True)
    if sys.argv[4] == "stopped":
        os.kill(trials.helper_pid, signal.SIGSTOP)
    os.kill(os.getpid(), getattr(signal, sys.argv[3]))
    await trial

asyncio.run(main())
"""


@pytest.mark.parametrize("end", ["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize("state", ["running", "stopped"])
def test_the_helper_ends_with_its_parent(tiny_pair: Path, end: str, state: str) -> None:
    tokenizer = str(tiny_pair / "full" / "tokenizer.json")
    command = [sys.executable, "-c", PARENT, tokenizer, PRODUCT, end, state]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        helper = int(parent.stdout.readline())
        try:
            family = [psutil.Process(helper), *psutil.Process(helper).children()]
        except psutil.NoSuchProcess:
            family = []
        assert parent.wait() != 0
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive


async def test_realistic_grammars_pass(trials: Trials) -> None:
    made = dict(realistic_grammars())
    assert len(made) > 90
    for name, grammar in made.items():
        await trials.try_text(grammar.kind, grammar.text, name)


def test_an_ambiguous_grammar_fails_before_its_steps_take_long(tiny_pair: Path) -> None:
    grammars = Grammars(tiny_pair / "full" / "tokenizer.json", 512, [1])
    matcher: Matcher = grammars.matcher(Grammar("lark", 'start: s\ns: s s | "a"\n'))
    (a,) = (token for token in range(512) if _allows(matcher, token))
    with pytest.raises(GrammarFailed, match="is too complex: tokens"):
        matcher.accept([a] * 600)


def _allows(matcher: Matcher, token: int) -> bool:
    return bool(matcher._matcher.validate_tokens([token]))


async def test_permits_go_round_between_keys() -> None:
    permits, order = FairPermits(most=2, waiting=9), []

    async def use(key: str, number: int) -> None:
        await permits.take(key)
        order.append(f"{key}{number}")
        await asyncio.sleep(0)
        permits.release(key)

    await asyncio.gather(*[use(key, number) for key in "aaab" for number in (1,)], use("c", 1), use("b", 2))
    assert [name[0] for name in order] == ["a", "b", "c", "a", "b", "a"]


@pytest.mark.parametrize("granted", [True, False], ids=["granted to it", "not granted yet"])
async def test_a_permit_passes_by_a_cancelled_caller(granted: bool) -> None:
    permits = FairPermits(most=1, waiting=9)
    await permits.take("a")
    second, third = (asyncio.ensure_future(permits.take(key)) for key in ("b", "c"))
    await asyncio.sleep(0)
    steps = [lambda: permits.release("a"), second.cancel]
    for step in steps if granted else reversed(steps):
        step()
    await asyncio.wait([second])
    assert second.cancelled()
    await asyncio.wait_for(third, 10)
    permits.release("c")
    await asyncio.wait_for(permits.take("d"), 10)
