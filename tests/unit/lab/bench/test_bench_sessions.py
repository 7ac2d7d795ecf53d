"""Tests the benchmark of chats without servers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from overfill.lab.bench.serve.targets import ReceivedAnswer
from overfill.lab.bench.sessions import (
    KnownTokens,
    MachineRates,
    PlayedTurn,
    SessionMemory,
    SessionPlayer,
    SessionRow,
    Turn,
    chat_turns,
    longest_chat,
    measurements_of,
    session_stack,
    trace_turns,
    working_set,
)
from overfill.lab.traffic.outcome import Outcome, RequestFailed
from overfill.lab.traffic.traces import TraceRequest
from overfill.stack.describe import describe
from overfill.stack.placed import PlacedStack

SYSTEM, MESSAGE, ANSWER = 5, 4, 3


def chats(sessions: int, turns: int) -> list[Turn]:
    return chat_turns(sessions, turns, SYSTEM, MESSAGE, ANSWER, 1000)


class Target:
    """Answers with ``ANSWER`` tokens, except to the prompts whose numbers are in ``bad``. It caches nothing."""

    def __init__(self):
        self.prompts: list[list[int]] = []
        self.bad: set[int] = set()
        self.running = self.most = 0

    async def stream(self, prompt, max_tokens, received=None):
        self.prompts.append([*prompt])
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        if len(self.prompts) in self.bad:
            raise RequestFailed("refused")
        for count in range(1, max_tokens + 1):
            yield count
        received.token_ids = [2000 + len(prompt) + i for i in range(max_tokens)]
        received.prompt_tokens, received.cached_tokens = len(prompt), 0


def test_turns_of_all_chats_alternate_and_share_the_system_prompt():
    turns = chats(3, 2)
    assert [(turn.number, turn.session) for turn in turns] == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
    assert [turn.later for turn in turns] == [False] * 3 + [True] * 3
    assert {tuple(turn.tokens[:SYSTEM]) for turn in turns[:3]} == {tuple(turns[0].tokens[:SYSTEM])}
    assert len({tuple(turn.tokens[-MESSAGE:]) for turn in turns}) == 6
    assert working_set(turns) == SYSTEM + 6 * (MESSAGE + ANSWER)
    assert longest_chat(turns) == SYSTEM + 2 * (MESSAGE + ANSWER)


def test_a_trace_becomes_chats_of_one_turn_whose_shared_blocks_are_known():
    requests = [TraceRequest(0.0, 12, 2, blocks, 4) for blocks in ((1, 2), (7, 2), (1, 3))]
    turns = trace_turns(requests, 1000)
    assert [turn.later for turn in turns] == [False, False, True]
    assert turns[2].tokens[:4] == turns[0].tokens[:4]
    assert working_set(turns) == 12 + 12 + 8 + 3 * 2


def test_only_tokens_after_the_same_beginning_are_known():
    known = KnownTokens()
    assert [known.add(tokens) for tokens in ([1, 2, 3], [1, 2, 4], [2, 3], [1, 2, 3, 5])] == [3, 1, 2, 1]


async def test_a_turn_has_the_answers_before_it_and_waits_for_them():
    target, done = Target(), []
    played = await SessionPlayer(4).play(target, chats(2, 3), lambda *progress: done.append(progress))
    assert target.most == 2, "turns of a chat never run at once"
    assert done[-1] == (6, 6)
    for chat in range(2):
        prompts = [prompt for prompt, one in zip(target.prompts, played, strict=True) if one.turn.session == chat]
        assert [len(prompt) for prompt in prompts] == [9, 16, 23]
        assert prompts[1][:12] == [*prompts[0], *(2000 + 9 + i for i in range(ANSWER))]
    assert [one.new_tokens for one in played] == [9, 4, 7, 7, 7, 7]


async def test_answers_that_are_returned_are_known_except_for_their_last_token():
    played = await SessionPlayer(1, returned=True).play(Target(), chats(1, 3), lambda *_: None)
    assert [one.new_tokens for one in played] == [9, MESSAGE + 1, MESSAGE + 1]


async def test_turns_go_on_after_a_restart_with_the_same_chats():
    target, player, turns = Target(), SessionPlayer(2), chats(2, 2)
    await player.play(target, turns[:2], lambda *_: None)
    played = await player.play(target, turns[2:], lambda *_: None)
    assert [one.new_tokens for one in played] == [7, 7]


async def test_a_failed_turn_is_counted_and_its_chat_goes_on():
    target = Target()
    target.bad = {1}
    row = SessionRow("before", await SessionPlayer(1).play(target, chats(1, 3), lambda *_: None), 1.0)
    figures = {one.name: one for one in measurements_of(row, row, None)}
    assert figures["sessions_before_failed"].value == 1
    assert not figures["sessions_before_failed"].reached
    assert figures["sessions_before_computed"].value == (13 + 20) / (4 + 7)


def played(number: int, first: float, cached: int, *, peer: int = 0, disk: int = 0, gap: float = 0.1) -> PlayedTurn:
    """A turn with a prompt of 100 tokens, 10 of which are new."""
    turn = Turn(0, number, [1] * 10, 10, 2, later=number > 1)
    return PlayedTurn(turn, Outcome(0.0, (first, first + gap)), ReceivedAnswer([5, 6], 100, cached, peer, disk), 10)


def row(name: str, firsts: list[float], cached: int, *, restarted: int = 0, **more) -> SessionRow:
    return SessionRow(name, [played(n, first, cached, **more) for n, first in enumerate(firsts, 1)], 1.0, restarted)


def test_rows_are_compared_with_the_first_and_judged_by_the_aims():
    before = row("before", [9.0, 4.0, 8.0], 50)
    disk = row("disk", [9.0, 1.0, 3.0], 90, peer=20, disk=40, gap=0.2)
    rates = MachineRates(prefill=100, memory=1e3, disk=1e2, token_bytes=1)
    figures = {one.name.removeprefix("sessions_disk_"): one for one in measurements_of(disk, before, rates)}
    assert figures["computed"].value == 1.0
    assert [figures[f"from_{of}"].value for of in ("memory", "peer", "disk")] == [0.3, 0.2, 0.4]
    assert figures["first_p50"].value == pytest.approx(2000)
    assert figures["first_p50"].peer_value == pytest.approx(1e3 * (10 / 100 + 20 / 1e3 + 40 / 1e2))
    assert figures["first_p50_ratio"].value == pytest.approx(2 / 6)
    assert figures["last_turn_computed"].value == 1.0
    missed = {name for name, one in figures.items() if not one.reached}
    assert missed == {"gap_p99_ratio"}
    assert {name for name, one in figures.items() if one.bound is not None} == {
        "failed", "computed", "first_p50_ratio", "first_p95_ratio", "gap_p99_ratio",
    }  # fmt: skip
    names = {one.name for one in measurements_of(before, before, rates)}
    assert not any("ratio" in name for name in names)


def test_a_restart_is_compared_with_the_same_turns():
    before, restart = row("before", [9.0, 4.0, 8.0], 50), row("restart", [9.0, 4.0, 2.0], 50, restarted=2)
    figures = {one.name: one.value for one in measurements_of(restart, before, None)}
    assert figures["sessions_restart_first_p50_ratio"] == 0.25


def test_memory_is_a_quarter_of_all_chats_on_two_workers_but_holds_two_chats():
    turns = chats(100, 2)
    assert SessionMemory.of(turns, 10) == SessionMemory(10 * (working_set(turns) // 8), 10 * working_set(turns))
    assert SessionMemory.of(chats(1, 2), 10).prefill == 10 * 2 * longest_chat(chats(1, 2))


@pytest.mark.parametrize("name", ["before", "peers", "disk", "restart", "identity"])
def test_each_row_has_its_settings(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    placed: list[PlacedStack] = []
    asked: dict[str, object] = {}

    def described(pair, *, settings, **counts):
        asked.update(settings)
        return describe(pair, settings=settings, **counts)

    def running(stack, log):
        placed.append(stack)
        raise KeyboardInterrupt

    monkeypatch.setattr("overfill.lab.bench.sessions.describe", described)
    monkeypatch.setattr("overfill.lab.bench.sessions.running", running)
    memory = SessionMemory(1 << 20, 8 << 20)
    with pytest.raises(KeyboardInterrupt), session_stack(name, tmp_path, chats(1, 2), memory, tmp_path, print):
        pass
    assert asked["kv_peers"] == (name != "before")
    assert ("kv_disk" in asked) == (name in ("disk", "restart"))
    configs = {worker.id: worker.config for worker in placed[0].workers}
    assert [configs[f"prefill-{number}"].kv_memory for number in range(2)] == [1 << 20] * 2
    assert configs["decode-0"].kv_memory == (10 << 20 if name == "identity" else None)
