"""Chats whose turns alternate, on a stack whose memory holds a quarter of their KV: what is computed a second time.

The first turn of every chat comes first, then the second of every chat, and so on (a closed loop). Between two turns of
a chat, the others evict its KV from memory. A turn's prompt has all tokens of the chat before it, the answers included.

A recorded trace runs in the same way: each of its requests is a chat of one turn.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from overfill.kv.spec import DTypeName
from overfill.lab.bench.measurement import Measurement
from overfill.lab.bench.serve.targets import GrpcTarget, OpenAiTarget, ReceivedAnswer
from overfill.lab.traffic.outcome import Outcome, RequestFailed, samples
from overfill.lab.traffic.traces import TraceRequest
from overfill.settings.worker_kinds import WorkerSettings
from overfill.stack.child import stop
from overfill.stack.describe import describe
from overfill.stack.placed import PlacedWorker, place
from overfill.stack.process_runner import ProcessRunner, running

Progress = Callable[[int, int], None]

DTYPE: DTypeName = "bfloat16"
"""Data type of every system's KV."""

_PREFILL = 2  # prefill workers
_DRAIN_SECONDS = 30.0  # after which a prefill worker that restarts is killed
_TIMEOUT = 600.0  # seconds of a request
_COPIED = 256 << 20  # bytes with which a bandwidth is measured
_RATE_PROMPTS = 2  # prompts with which the prefill rate is measured


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a chat.

    Attributes:
        session: number of the chat.
        number: number of the turn in it, from 1.
        tokens: tokens that the prompt has beyond all earlier tokens of the chat.
        message: how many of them are the user's new message.
        answer_tokens: length of the answer.
        later: whether a large part of the prompt has been computed for an earlier turn.
    """

    session: int
    number: int
    tokens: Sequence[int]
    message: int
    answer_tokens: int
    later: bool


def chat_turns(
    sessions: int, turns: int, system_tokens: int, message_tokens: int, answer_tokens: int, vocab_size: int
) -> list[Turn]:
    """Makes chats of random tokens that share a system prompt, in the order in which their turns are played."""
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(min(64, vocab_size // 2), vocab_size) for _ in range(count)]

    system = tokens(system_tokens)
    return [
        Turn(
            session,
            number,
            (system if number == 1 else []) + tokens(message_tokens),
            message_tokens,
            answer_tokens,
            later=number > 1,
        )
        for number in range(1, turns + 1)
        for session in range(sessions)
    ]


def trace_turns(requests: Sequence[TraceRequest], vocab_size: int) -> list[Turn]:
    """Makes chats of one turn of a trace's requests. Those whose first block came before are ``later``."""
    seen: set[int] = set()
    found = []
    for number, request in enumerate(requests):
        tokens = request.prompt(vocab_size, number)
        later = bool(request.blocks) and request.blocks[0] in seen
        found.append(Turn(number, 1, tokens, len(tokens), request.output_tokens, later))
        seen.update(request.blocks)
    return found


class KnownTokens:
    """The tokens that have been computed, each after all tokens before it."""

    def __init__(self) -> None:
        self._prefixes: set[int] = set()

    def add(self, tokens: Iterable[int]) -> int:
        """Adds a sequence. Returns how many of its tokens were not known after the same tokens before them."""
        prefix, before = 0, len(self._prefixes)
        for token in tokens:
            prefix = hash((prefix, token))
            self._prefixes.add(prefix)
        return len(self._prefixes) - before


def working_set(turns: Sequence[Turn]) -> int:
    """Returns the tokens of all chats together, with shared beginnings once and the answers."""
    known, chats = KnownTokens(), defaultdict[int, list[int]](list)
    for turn in turns:
        chats[turn.session] += turn.tokens
    return sum(map(known.add, chats.values())) + sum(turn.answer_tokens for turn in turns)


def longest_chat(turns: Sequence[Turn]) -> int:
    """Returns the tokens of the longest chat, its last answer included."""
    lengths = defaultdict[int, int](int)
    for turn in turns:
        lengths[turn.session] += len(turn.tokens) + turn.answer_tokens
    return max(lengths.values())


@dataclass(frozen=True, slots=True)
class PlayedTurn:
    """A turn that was played.

    Attributes:
        new_tokens: prompt tokens that no worker had ever computed when the turn began.
    """

    turn: Turn
    outcome: Outcome
    received: ReceivedAnswer
    new_tokens: int

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that were computed for this turn."""
        return self.received.prompt_tokens - self.received.cached_tokens


class SessionTarget(Protocol):
    """A server that says what it answered."""

    def stream(
        self, prompt: Sequence[int], max_tokens: int, received: ReceivedAnswer | None = None
    ) -> AsyncIterator[int]:
        """As of ``Target``; fills ``received``."""


class SessionPlayer:
    """Plays turns on a target, and keeps the chats for further turns.

    Args:
        concurrency: turns that run at a time.
        returned: whether the KV that decode workers compute for answers counts as computed.
    """

    def __init__(self, concurrency: int, returned: bool = False) -> None:
        self._concurrency = concurrency
        self._returned = returned
        self._chats = defaultdict[int, list[int]](list)
        self._known = KnownTokens()

    async def play(self, target: SessionTarget, turns: Sequence[Turn], report: Progress) -> list[PlayedTurn]:
        """Plays ``turns`` in their order. Each waits for the turn before it in its chat."""
        locks = defaultdict[int, asyncio.Lock](asyncio.Lock)
        found: dict[int, tuple[list[int], Outcome, ReceivedAnswer]] = {}
        waiting = iter(enumerate(turns))

        async def work() -> None:
            for index, turn in waiting:
                async with locks[turn.session]:  # first come, first served
                    chat = self._chats[turn.session]
                    chat += turn.tokens
                    prompt = [*chat]
                    outcome, received = await _answer(target, prompt, turn.answer_tokens)
                    chat += received.token_ids
                    found[index] = prompt, outcome, received
                report(len(found), len(turns))

        async with asyncio.TaskGroup() as group:
            for _ in range(self._concurrency):
                group.create_task(work())
        played = []
        for turn, (prompt, outcome, received) in zip(turns, (found[i] for i in range(len(turns))), strict=True):
            new = self._known.add(prompt)
            if self._returned:  # the last token of an answer is sampled, and its KV is never computed
                self._known.add([*prompt, *received.token_ids[:-1]])
            played.append(PlayedTurn(turn, outcome, received, new))
        return played


async def _answer(target: SessionTarget, prompt: list[int], max_tokens: int) -> tuple[Outcome, ReceivedAnswer]:
    received, due, times = ReceivedAnswer(), time.perf_counter(), list[float]()
    error = None
    try:
        async with asyncio.timeout(_TIMEOUT):
            async for tokens in target.stream(prompt, max_tokens, received):
                times += [time.perf_counter()] * (tokens - len(times))
    except TimeoutError:
        error = f"not finished after {_TIMEOUT:g} s"
    except RequestFailed as failure:
        error = str(failure)
    return Outcome(due, tuple(times), error if error is not None or times else "no token arrived"), received


@dataclass(frozen=True, slots=True)
class MachineRates:
    """What this machine does at best.

    Attributes:
        prefill: prompt tokens that a worker computes per second.
        memory, disk: bytes that are copied in memory, and read from a file, per second.
        token_bytes: bytes of a token's KV.
    """

    prefill: float
    memory: float
    disk: float
    token_bytes: int

    def first_token_bound(self, played: PlayedTurn) -> float:
        """Lower bound of a turn's seconds to its first token: its new tokens computed, the others copied."""
        peer, disk = played.received.peer_tokens, played.received.disk_tokens
        copied = self.token_bytes * (peer / self.memory + disk / self.disk)
        return played.new_tokens / self.prefill + copied


async def prefill_rate(target: SessionTarget, tokens: int, vocab_size: int) -> float:
    """Measures the prompt tokens per second of a stack without other load, with prompts of ``tokens`` random tokens."""
    seconds = []
    for seed in range(_RATE_PROMPTS + 1):  # the first one warms up
        prompt = TraceRequest(0.0, tokens, 1).prompt(vocab_size, -1 - seed)
        outcome, _ = await _answer(target, prompt, 1)
        if not outcome.ok:
            raise RequestFailed(str(outcome.error))
        seconds.append(outcome.ttft)
    return tokens / min(seconds[1:])


def memory_bandwidth() -> float:
    """Measures the bytes per second that one thread copies."""
    source, target = np.ones(_COPIED, np.uint8), np.empty(_COPIED, np.uint8)
    return _COPIED / _fastest(lambda: np.copyto(target, source))


def disk_bandwidth(folder: Path) -> float:
    """Measures the bytes per second that one thread reads from a file in ``folder`` that was just written."""
    file = folder / "bandwidth"
    file.write_bytes(os.urandom(1 << 20) * (_COPIED >> 20))
    buffer = bytearray(_COPIED)

    def read() -> None:
        with file.open("rb", buffering=0) as source:
            view = memoryview(buffer)
            while len(view) and (count := source.readinto(view)):
                view = view[count:]

    try:
        return _COPIED / _fastest(read)
    finally:
        file.unlink()


def _fastest(run: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


@dataclass(frozen=True, slots=True)
class SessionRow:
    """What one system did with all turns.

    The systems:

    * before: without KV from other workers.
    * peers, disk: with it; with it and a disk tier.
    * restart: as disk; both prefill workers restart after half of the turns.
    * identity: as peers, with a decoder that is the full model, and memory of a decode worker for all chats.
    * vllm: vLLM's server, with the memory of both prefill workers.

    Attributes:
        name: of the system.
        seconds: duration of the load, without starts and restarts.
        restarted: index of the first turn after a restart; 0 without one. First tokens count from there.
    """

    name: str
    played: Sequence[PlayedTurn]
    seconds: float
    restarted: int = 0

    def first_tokens(self, begin: int) -> list[PlayedTurn]:
        """Returns the turns from index ``begin`` on whose prompts had been computed in large part before."""
        return [one for one in self.played[begin:] if one.turn.later and one.outcome.ok]


_AIMS = {
    ("disk", "computed"): 1.1,
    ("disk", "first_p50_ratio"): 0.4,
    ("disk", "first_p95_ratio"): 0.6,
    ("disk", "gap_p99_ratio"): 1.1,
    ("restart", "first_p50_ratio"): 0.5,
    ("restart", "first_p95_ratio"): 0.7,
    ("identity", "last_turn_computed"): 1.2,
}


def measurements_of(row: SessionRow, before: SessionRow | None, rates: MachineRates | None) -> list[Measurement]:
    """Returns a row's figures, those that compare it with the row ``before`` among them.

    The lower bound beside a first token computes the prompt's new tokens alone, and copies what came from elsewhere.
    """
    found: list[Measurement] = []

    def add(figure: str, value: float, unit: str, bound: float | None = None, least: float | None = None) -> None:
        bound = _AIMS.get((row.name, figure), bound)
        peer = None if least is None else "lower bound"
        found.append(Measurement(f"sessions_{row.name}_{figure}", value, unit, bound, peer=peer, peer_value=least))

    done = [one for one in row.played if one.outcome.ok]
    add("failed", len(row.played) - len(done), "requests", 0.0)
    if not done:
        return found
    add("seconds", row.seconds, "s")
    add("computed", sum(one.computed_tokens for one in done) / sum(one.new_tokens for one in done), "x new tokens")
    peer, disk = (sum(getattr(one.received, f"{of}_tokens") for one in done) for of in ("peer", "disk"))
    memory = sum(one.received.cached_tokens for one in done) - peer - disk
    prompts = sum(one.received.prompt_tokens for one in done)
    for of, tokens in (("memory", memory), ("peer", peer), ("disk", disk)):
        add(f"from_{of}", tokens / prompts, "of prompt tokens")
    compared = before if before is not row else None
    later = row.first_tokens(row.restarted)
    for percent in (50, 95) if later else ():
        value = 1e3 * _percentile([one.outcome.ttft for one in later], percent)
        bounds = [1e3 * rates.first_token_bound(one) for one in later] if rates else []
        add(f"first_p{percent}", value, "ms", least=_percentile(bounds, percent) if bounds else None)
        if compared and (others := compared.first_tokens(row.restarted)):
            earlier = 1e3 * _percentile([one.outcome.ttft for one in others], percent)
            add(f"first_p{percent}_ratio", value / earlier, "x before")
    if gaps := samples([one.outcome for one in done], "itl"):
        add("gap_p99", 1e3 * _percentile(gaps, 99), "ms")
        if compared:
            others_gaps = samples([one.outcome for one in compared.played], "itl")
            add("gap_p99_ratio", _percentile(gaps, 99) / _percentile(others_gaps, 99), "x before")
    if (last := max(one.turn.number for one in done)) > 1:
        ends = [one for one in done if one.turn.number == last]
        share = sum(one.computed_tokens for one in ends) / sum(one.turn.message for one in ends)
        add("last_turn_computed", share, "x tokens of the message")
    return found


def _percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent))


@dataclass(frozen=True, slots=True)
class SessionMemory:
    """Bytes of KV.

    Attributes:
        prefill: of each of the two prefill workers.
        all_chats: of all tokens of all chats.
    """

    prefill: int
    all_chats: int

    @classmethod
    def of(cls, turns: Sequence[Turn], token_bytes: int) -> Self:
        """Gives the prefill workers a quarter of all chats together, but at least room for two long chats each."""
        tokens = working_set(turns)
        return cls(token_bytes * max(tokens // (4 * _PREFILL), 2 * longest_chat(turns)), token_bytes * tokens)


@contextmanager
def session_stack(
    name: str,
    pair: Path,
    turns: Sequence[Turn],
    memory: SessionMemory,
    disk: Path,
    log: Callable[[str, str], None],
) -> Iterator[ProcessRunner]:
    """Starts the stack of a row: two prefill workers and a decode worker, with a thread each.

    Args:
        disk: folder of the disk tier, for the rows that have one.
    """
    settings: dict[str, Any] = {
        "dtype": DTYPE,
        "kv_peers": name != "before",
        "max_model_len": longest_chat(turns) + 16,
        "log_level": "error",
        "grace_period": 2,
    }
    if name in ("disk", "restart"):
        settings |= {"kv_disk": disk, "kv_disk_size": 2 * memory.all_chats}
    placed = place(describe(pair, prefill=_PREFILL, threads=1, settings=settings))

    def sized(worker: PlacedWorker) -> WorkerSettings:
        if worker.kind.stages == ("prefill",):
            return worker.config.model_copy(update={"kv_memory": memory.prefill})
        # The answers' KV of all chats must be there when their next turns come; the prompts' KV is there too.
        held = {"kv_memory": memory.all_chats * 5 // 4} if name == "identity" else {}
        return worker.config.model_copy(update=held)

    with running(placed.with_configs(sized), log) as stack:
        yield stack


def restart_prefill(stack: ProcessRunner) -> None:
    """Drains both prefill workers at once, and starts them again. Call it on the main thread."""
    names = [worker.id for worker in stack.placed.workers if worker.kind.stages == ("prefill",)]
    stop(map(stack.worker, names), _DRAIN_SECONDS)
    for name in names:
        stack.restart(name)
    stack.wait_ready(threading.Event())


def play_on_stack(
    name: str, stack: ProcessRunner, turns: Sequence[Turn], concurrency: int, report: Progress
) -> SessionRow:
    """Plays all turns on a row's stack. Call it on the main thread."""
    player = SessionPlayer(concurrency, returned=name == "identity")
    restarted = len(turns) // 2 if name == "restart" else 0
    played: list[PlayedTurn] = []
    seconds = 0.0
    for part in filter(None, (turns[:restarted], turns[restarted:])):
        if played:
            restart_prefill(stack)
        began = time.perf_counter()
        played += asyncio.run(_play(GrpcTarget(stack.addresses[0]), player, part, report))
        seconds += time.perf_counter() - began
    return SessionRow(name, played, seconds, restarted)


def play_on_vllm(url: str, turns: Sequence[Turn], concurrency: int, report: Progress) -> SessionRow:
    """Plays all turns on vLLM's server."""
    began = time.perf_counter()
    played = asyncio.run(_play(OpenAiTarget(url), SessionPlayer(concurrency), turns, report))
    return SessionRow("vllm", played, time.perf_counter() - began)


async def _play(
    target: GrpcTarget | OpenAiTarget, player: SessionPlayer, turns: Sequence[Turn], report: Progress
) -> list[PlayedTurn]:
    async with target:
        return await player.play(target, turns, report)


def measure_rates(address: str, turns: Sequence[Turn], token_bytes: int, vocab_size: int, folder: Path) -> MachineRates:
    """Measures this machine, with prompts of half the longest chat on the stack at ``address``."""

    async def rate() -> float:
        async with GrpcTarget(address) as target:
            return await prefill_rate(target, max(2, longest_chat(turns) // 2), vocab_size)

    return MachineRates(asyncio.run(rate()), memory_bandwidth(), disk_bandwidth(folder), token_bytes)
