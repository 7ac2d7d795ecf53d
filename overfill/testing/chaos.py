"""Breaks the workers of a running stack, again and again, under load, and judges every answer.

A trial starts a stack of real processes, keeps a number of greedy streams going, and befalls its workers with one
kind of fault, never so that a stage is left without a healthy worker. Afterwards every answer is held against plain
transformers (``overfill.pair.reference``), as ``overfill verify`` does.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Literal

from overfill.cli.processes import Child
from overfill.cli.stack import Plan, Stack, free_ports
from overfill.client import AsyncClient, SamplingParams
from overfill.client.status import StackStatus, WorkerStatus
from overfill.errors import OverfillError
from overfill.pair.reference import Judged, Summary, TwoStageReference, judge, summarise
from overfill.testing.proxy import TcpProxy

FaultName = Literal["kill", "freeze", "partition", "drain"]

_SETTLE = 20.0  # seconds for all blocks to be free after the last answer, before the trial says that they are not
_POLL = 0.05
_LEAVE = 10.0  # seconds that a drained worker has beyond its grace period, to end its process


@dataclass(frozen=True, slots=True)
class Trial:
    """What a trial does.

    Attributes:
        prompts: token ids; requests take them in turn.
        requests: answers at least; more while ``hits`` are missing.
        hits: faults that must befall a worker with requests on it.
        streams: requests at a time.
        pause: mean seconds between two faults.
        down: seconds that a freeze or a partition lasts.
        limit: seconds after which no more hits are waited for.
    """

    fault: FaultName
    prompts: Sequence[Sequence[int]]
    requests: int
    hits: int
    streams: int
    max_tokens: int
    pause: float = 3.0
    down: float = 15.0
    limit: float = 1800.0
    seed: int = 0


@dataclass(slots=True)
class Outcome:
    """One request.

    Attributes:
        error: None when there is an answer.
        longest_pause: seconds without a new token, the wait for the first one included.
    """

    prompt: Sequence[int]
    error: str | None = None
    token_ids: tuple[int, ...] = ()
    finish_reason: Literal["stop", "length", "tool_calls"] = "length"
    migrations: int = 0
    longest_pause: float = 0.0


@dataclass(slots=True)
class Result:
    """What came of a trial.

    Attributes:
        strikes: faults by stage; ``hits``: those that befell a worker with requests on it.
        freed_after: seconds from the last answer until no worker, other than those a fault held, had a used block;
            None: some still had.
        leaked: workers with used blocks, or missing, in the end, when every fault was over.
        unclean_exits: drained workers that did not exit with 0 in time, and frozen ones that died of it.
    """

    trial: Trial
    outcomes: list[Outcome] = field(default_factory=list)
    strikes: dict[str, int] = field(default_factory=lambda: {"prefill": 0, "decode": 0})
    hits: int = 0
    freed_after: float | None = None
    leaked: list[str] = field(default_factory=list)
    unclean_exits: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def errors(self) -> list[str]:
        return [o.error for o in self.outcomes if o.error is not None]

    @property
    def migrations(self) -> int:
        return sum(o.migrations for o in self.outcomes)

    def delays(self) -> list[float]:
        """Seconds that each migrated answer was held up: its longest pause, less an undisturbed one's."""
        usual = median([o.longest_pause for o in self.outcomes if not o.migrations] or [0.0])
        return sorted(max(0.0, o.longest_pause - usual) for o in self.outcomes if o.migrations)

    def judge(self, reference: TwoStageReference, report: Callable[[str, int, int], None]) -> Summary:
        """Holds every answer against ``reference``; one that was given before has the same verdict."""
        judged: list[Judged] = []
        known: dict[tuple[object, ...], Judged] = {}
        for outcome in self.outcomes:
            if outcome.error is not None:
                judged.append(Judged((), f"no answer: {outcome.error}"))
            else:
                answer = tuple(outcome.prompt), tuple(outcome.token_ids), outcome.finish_reason
                if answer not in known:
                    prompt, tokens, reason = answer
                    known[answer] = judge(reference, prompt, tokens, reason, self.trial.max_tokens)
                judged.append(known[answer])
            report("Judging", len(judged), len(self.outcomes))
        return summarise(judged)


async def run_trial(plan: Plan, trial: Trial, report: Callable[[str, int, int], None]) -> Result:
    """Runs ``trial`` on a stack of its own. On the main thread: children are tied to the thread that starts them."""
    async with AsyncExitStack() as exits:
        links: dict[str, list[TcpProxy]] = {}
        if trial.fault == "partition":
            plan, links = await _behind_proxies(plan, exits)
        stack = Stack(plan, lambda name, line: None)
        exits.callback(stack.stop)
        stack.start()
        await asyncio.to_thread(stack.wait_ready, threading.Event())
        client = await exits.enter_async_context(AsyncClient(",".join(plan.addresses), tls=plan.client_tls))
        return await _Run(stack, client, trial, links, report).run()


class _Run:
    def __init__(
        self,
        stack: Stack,
        client: AsyncClient,
        trial: Trial,
        links: dict[str, list[TcpProxy]],
        report: Callable[[str, int, int], None],
    ) -> None:
        self._stack = stack
        self._client = client
        self._trial = trial
        self._links = links
        self._report = report
        self._rng = random.Random(trial.seed)
        self._result = Result(trial)
        self._numbers = itertools.count()
        self._down: set[str] = set()  # workers that a fault holds
        self._deadline = time.monotonic() + trial.limit

    async def run(self) -> Result:
        started = time.monotonic()
        # A failure of the trial itself ends all of it, at once and with its cause.
        async with asyncio.TaskGroup() as mending:
            async with asyncio.TaskGroup() as group:
                striking = group.create_task(self._strike_on(mending))
                asking = [group.create_task(self._ask_on()) for _ in range(self._trial.streams)]
                await asyncio.wait(asking)
                striking.cancel()
            self._result.freed_after = await self._freed(time.monotonic())
            self._result.seconds = time.monotonic() - started
        self._result.leaked = await self._leaked()
        return self._result

    @property
    def _enough(self) -> bool:
        done, trial = self._result, self._trial
        return len(done.outcomes) >= trial.requests and (done.hits >= trial.hits or time.monotonic() > self._deadline)

    async def _ask_on(self) -> None:
        while not self._enough:
            prompt = self._trial.prompts[next(self._numbers) % len(self._trial.prompts)]
            self._result.outcomes.append(await self._ask(prompt))
            wanted = max(self._trial.requests, len(self._result.outcomes))
            self._report(f"Asking ({self._result.hits} hits)", len(self._result.outcomes), wanted)

    async def _ask(self, prompt: Sequence[int]) -> Outcome:
        outcome = Outcome(prompt)
        sampling = SamplingParams(temperature=0, max_tokens=self._trial.max_tokens)
        last = time.monotonic()
        try:
            async with self._client.stream(prompt, sampling=sampling) as stream:
                async for delta in stream:
                    if delta.token_ids:
                        now = time.monotonic()
                        outcome.longest_pause = max(outcome.longest_pause, now - last)
                        last = now
                answer = stream.answer
        except OverfillError as error:
            outcome.error = f"{type(error).__name__}: {error}"
        else:
            outcome.token_ids, outcome.finish_reason = answer.token_ids, answer.finish_reason
            outcome.migrations = answer.migrations
        return outcome

    async def _strike_on(self, mending: asyncio.TaskGroup) -> None:
        while not self._enough:
            await asyncio.sleep(self._rng.uniform(0.3, 1.7) * self._trial.pause)
            victim = self._victim(await self._client.status())
            if victim is None:
                continue
            name, stage, busy = victim
            self._result.strikes[stage] += 1
            self._result.hits += busy
            self._down.add(name)
            mending.create_task(self._befall(name))

    def _victim(self, status: StackStatus) -> tuple[str, str, bool] | None:
        """A random worker, its stage, and whether it has requests; None while a stage has no spare."""
        serving = [
            worker
            for worker in status.workers
            if worker.id not in self._down and worker.process is not None and worker.process.ready
        ]
        for stage in ("prefill", "decode"):
            if sum(worker.stage == stage for worker in serving) < 2:
                return None
        worker = self._rng.choice(serving)
        assert worker.process is not None
        load = worker.process.load
        return worker.id, worker.stage, load is not None and load.running + load.waiting > 0

    async def _befall(self, name: str) -> None:
        """One fault, until the worker may serve again."""
        child = self._stack.worker(name)
        match self._trial.fault:
            case "kill":
                os.kill(child.pid, signal.SIGKILL)
                await self._exit_of(name, 10)
                self._stack.restart(name)
            case "drain":
                os.kill(child.pid, signal.SIGTERM)
                grace = self._stack.plan.routers[0].grace_period
                if not await self._exit_of(name, grace + _LEAVE):
                    self._result.unclean_exits.append(f"{name} still ran {grace + _LEAVE:g} s after SIGTERM")
                    os.kill(child.pid, signal.SIGKILL)
                    await self._exit_of(name, 10)
                elif child.returncode != 0:
                    self._result.unclean_exits.append(_how_it_ended(child))
                self._stack.restart(name)
            case "freeze":
                os.kill(child.pid, signal.SIGSTOP)
                try:
                    await asyncio.sleep(self._trial.down)
                finally:
                    os.kill(child.pid, signal.SIGCONT)
                if child.returncode is not None:
                    self._result.unclean_exits.append(_how_it_ended(child))
                    self._stack.restart(name)
            case "partition":
                for link in self._links[name]:
                    link.partition()
                await asyncio.sleep(self._trial.down)
                for link in self._links[name]:
                    link.heal()
        self._down.discard(name)

    async def _exit_of(self, name: str, timeout: float) -> bool:
        child, deadline = self._stack.worker(name), time.monotonic() + timeout
        # A poll: the process is another's child object, and nothing here waits long.
        while child.returncode is None and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(_POLL)
        return child.returncode is not None

    async def _freed(self, since: float) -> float | None:
        while (now := time.monotonic()) - since < _SETTLE:
            workers = (await self._client.status()).workers
            if all(_is_empty(worker) for worker in workers if worker.id not in self._down):
                return now - since
            await asyncio.sleep(_POLL)
        return None

    async def _leaked(self) -> list[str]:
        """Gives restarted workers time to come back, and those that were cut off to notice it."""
        deadline = time.monotonic() + _SETTLE
        while True:
            empty = {worker.id for worker in (await self._client.status()).workers if _is_empty(worker)}
            leaked = [w.worker_id for _, w in self._stack.plan.workers() if w.worker_id not in empty]
            if not leaked or time.monotonic() > deadline:
                return leaked
            await asyncio.sleep(_POLL)


def _how_it_ended(child: Child) -> str:
    return f"{child.name} {child.describe_exit()}: {' | '.join(child.last_lines()[-3:])}"


def _is_empty(worker: WorkerStatus) -> bool:
    """Whether it answers and owns no block."""
    load = None if worker.process is None else worker.process.load
    return load is not None and load.kv_blocks_used == 0


async def _behind_proxies(plan: Plan, exits: AsyncExitStack) -> tuple[Plan, dict[str, list[TcpProxy]]]:
    """``plan`` with every worker reachable through a proxy only, and reaching the routers through its own."""
    links: dict[str, list[TcpProxy]] = {}
    ports = iter(free_ports("127.0.0.1", len(plan.workers())))
    moved = []
    for _, worker in plan.workers():
        port = next(ports)
        inbound = await exits.enter_async_context(TcpProxy(f"127.0.0.1:{port}"))
        outbound = [await exits.enter_async_context(TcpProxy(address)) for address in plan.addresses]
        links[worker.worker_id] = [inbound, *outbound]
        routers = tuple(proxy.address for proxy in outbound)
        moved.append(worker.model_copy(update={"port": port, "advertise": inbound.address, "routers": routers}))
    prefill, decode = moved[: len(plan.prefill)], moved[len(plan.prefill) :]
    return replace(plan, prefill=tuple(prefill), decode=tuple(decode)), links  # type: ignore[arg-type]
