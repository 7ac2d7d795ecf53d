"""A trial: a stack of its own, load on it, strikes, and what came of it all.

A strike waits until a request comes into its phase, holds it there, does its harm and lets go. No process is silenced
unless another of its stage is there and ready.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from overfill.cli.stack import StackPlan
from overfill.client import AsyncClient
from overfill.client.status import WorkerStatus
from overfill.errors import OverfillError
from overfill.lab.chaos.clock import Clocks
from overfill.lab.chaos.control import Caught, Control
from overfill.lab.chaos.faults import SILENCING, Faults
from overfill.lab.chaos.load import Load, Outcome
from overfill.lab.chaos.stack import BreakableStack, Links, behind_links
from overfill.lab.chaos.strikes import Strike
from overfill.lab.chaos.watch import Sample, watch
from overfill.pair.reference import JudgedAnswer, Summary, TwoStageReference, judge, summarise

_HOLD = 0.5  # seconds that a request is held in its phase at most, while the strike comes
_CATCH = 8.0  # seconds to wait for a request in a phase, before one that is not there is done without
_LOOK = 0.4  # seconds between looks at who is ready
_PATIENCE = 60.0  # seconds for a spare to be there
_SETTLE = 20.0  # seconds for all blocks to be free after the last answer, before the trial says that they are not
_BACK = 60.0  # seconds for workers that were started again to be there in the end
_POLL = 0.05
_MEASURED = 20.0  # seconds of undisturbed load that tell what the stack can do


@dataclass(frozen=True, slots=True)
class Trial:
    """What a trial does.

    Attributes:
        strikes: one after the other, ``abreast`` of them at a time.
        prompts: token ids; requests take them in turn.
        requests: at least.
        streams: requests at a time; with ``share``, while the stack's capacity is measured.
        share: of the measured capacity at which requests arrive, whatever becomes of others; None: ``streams`` always.
        seconds: after which no more strikes begin and no requests arrive; None: once all strikes are over.
        limit: seconds after which no more strikes begin.
    """

    strikes: Iterable[Strike]
    prompts: Sequence[Sequence[int]]
    requests: int
    streams: int
    max_tokens: int
    share: float | None = None
    seconds: float | None = None
    abreast: int = 1
    limit: float = 3600.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Struck:
    """A strike that was made.

    Attributes:
        at: seconds since the load began.
        victim: the process; or "client".
        request: that was held for it; empty: none came into that phase, and the strike did without.
        took: seconds until it was over, a restart included.
    """

    strike: Strike
    at: float
    victim: str
    request: str
    took: float

    def as_dict(self) -> dict[str, object]:
        """The strike's fields among the others, for a report."""
        return asdict(self.strike) | {
            "at": round(self.at, 2),
            "victim": self.victim,
            "request": self.request,
            "took": round(self.took, 2),
        }


@dataclass(slots=True)
class Result:
    """What came of a trial.

    Attributes:
        missed: strikes for which there was never a victim.
        freed_after: seconds from the last answer until no worker, other than those a fault held, had a used block;
            None: some still had.
        leaked: workers with used blocks, or missing, in the end, when every fault was over.
        unclean_exits: processes that did not end as they should.
        capacity, rate: answers per second that the stack gave undisturbed, and that were asked for.
        unavailable: faults that cannot be made on this machine.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    struck: list[Struck] = field(default_factory=list)
    missed: list[Strike] = field(default_factory=list)
    freed_after: float | None = None
    leaked: list[str] = field(default_factory=list)
    unclean_exits: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    seconds: float = 0.0
    capacity: float | None = None
    rate: float | None = None
    unavailable: list[str] = field(default_factory=list)

    def ended(self, ending: str) -> list[Outcome]:
        """The requests that ended so."""
        return [outcome for outcome in self.outcomes if outcome.ending == ending]

    @property
    def migrations(self) -> int:
        return sum(o.migrations for o in self.outcomes)

    def usual_pause(self) -> float:
        """The median of the longest pauses of requests that nothing befell, seconds."""
        struck = {one.request for one in self.struck}
        calm = [o for o in self.ended("answered") if not o.migrations and not o.slow and o.request not in struck]
        return median([o.longest_pause for o in calm] or [0.0])

    def delays(self) -> list[float]:
        """Seconds that each migrated answer was held up: its longest pause, less an undisturbed one's; ascending."""
        usual = self.usual_pause()
        moved = [o for o in self.ended("answered") if o.migrations and not o.slow]
        return sorted(max(0.0, o.longest_pause - usual) for o in moved)

    def judge(
        self, reference: TwoStageReference, max_tokens: int, report: Callable[[str, int, int], None]
    ) -> tuple[Summary, set[str]]:
        """Holds every answer against ``reference``; one that was given before has the same verdict.

        Returns the summary of all answers, and the requests whose answers are wrong.
        """
        known: dict[tuple[object, ...], JudgedAnswer] = {}
        judged, wrong = [], set()
        answered = self.ended("answered")
        for outcome in answered:
            answer = tuple(outcome.prompt), tuple(outcome.token_ids), outcome.finish_reason
            if answer not in known:
                known[answer] = judge(reference, *answer, max_tokens)
            judged.append(known[answer])
            if not known[answer].correct:
                wrong.add(outcome.request)
            report("Judging", len(judged), len(answered))
        return summarise(judged), wrong


async def run_trial(plan: StackPlan, trial: Trial, report: Callable[[str, int, int], None]) -> Result:
    """Runs ``trial`` on a stack of its own. On the main thread: children are tied to the thread that starts them."""
    async with AsyncExitStack() as exits:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="overfill-chaos-")))
        clocks = Clocks(folder)
        control = await exits.enter_async_context(Control(folder))
        plan, links = await behind_links(plan, exits, trial.seed)
        stack = BreakableStack(plan, control.path, clocks)
        exits.callback(stack.stop)
        stack.start()
        await asyncio.to_thread(stack.wait_ready, threading.Event())
        return await _Run(stack, links, control, clocks, trial, report).run()


class _Run:
    def __init__(
        self,
        stack: BreakableStack,
        links: Links,
        control: Control,
        clocks: Clocks,
        trial: Trial,
        report: Callable[[str, int, int], None],
    ) -> None:
        self._stack = stack
        self._control = control
        self._clocks = clocks
        self._faults = Faults(stack, links, control, clocks)
        self._trial = trial
        self._report = report
        self._rng = random.Random(trial.seed)
        self._load = Load(links.routers, stack.plan.client_tls, trial.prompts, trial.max_tokens, trial.seed)
        self._result = Result(outcomes=self._load.outcomes)
        self._down: set[str] = set()  # processes that a fault holds
        self._back: dict[str, float] = {}  # when a fault let go of them
        self._seen: dict[str, tuple[float, set[str]]] = {}  # router -> when it was asked, and who was ready
        self._over = asyncio.Event()  # nobody asks any more
        self._began = time.monotonic()

    async def run(self) -> Result:
        # A failure of the trial itself ends all of it, at once and with its cause.
        done = asyncio.Event()
        async with asyncio.TaskGroup() as looking:
            looks = [looking.create_task(self._look_on(name)) for name in self._stack.routers]
            looking.create_task(watch(self._stack.processes, self._result.samples, done))
            if self._trial.share is not None:
                await self._measure(self._trial.share)
            self._began = time.monotonic()
            async with asyncio.TaskGroup() as group:
                striking = group.create_task(self._strike_on())
                for work in self._asking():
                    group.create_task(work)
                await striking
                await self._asked_enough()
                self._over.set()
            self._result.freed_after = await self._freed(time.monotonic())
            self._result.seconds = time.monotonic() - self._began
            self._result.leaked = await self._leaked()
            done.set()
            for look in looks:
                look.cancel()
        await self._load.close()
        return self._result

    def _asking(self) -> list[Coroutine[object, object, None]]:
        if self._result.rate is not None:
            return [self._load.keep_arriving(self._result.rate, self._over)]
        return [self._load.keep_asking(self._over) for _ in range(self._trial.streams)]

    async def _measure(self, share: float) -> None:
        """What the stack can do, before anything befalls it."""
        over = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for _ in range(self._trial.streams):
                group.create_task(self._load.keep_asking(over))
            await asyncio.sleep(_MEASURED / 4)  # everything is warm
            before = len(self._result.outcomes)
            await asyncio.sleep(_MEASURED)
            self._result.capacity = (len(self._result.outcomes) - before) / _MEASURED
            over.set()
        self._result.rate = share * self._result.capacity

    async def _asked_enough(self) -> None:
        while len(self._result.outcomes) < self._trial.requests:
            if time.monotonic() - self._began > self._trial.limit:
                return
            await asyncio.sleep(_POLL)

    # Striking

    @property
    def _late(self) -> bool:
        seconds = time.monotonic() - self._began
        return seconds > self._trial.limit or (self._trial.seconds is not None and seconds > self._trial.seconds)

    async def _strike_on(self) -> None:
        places = asyncio.Semaphore(self._trial.abreast)
        strikes = self._trial.strikes
        total = len(strikes) if isinstance(strikes, Sequence) else 0

        async def one(strike: Strike) -> None:
            try:
                if not await self._strike(strike):
                    self._result.missed.append(strike)
            finally:
                places.release()
            so_far = len(self._result.struck)
            self._report("Striking", so_far, total or so_far + 1)

        async with asyncio.TaskGroup() as group:
            for strike in strikes:
                if strike.after:
                    await self._rest(strike.after)
                await places.acquire()
                if self._late:
                    return
                if strike.fault == "clock" and not self._clocks.available:
                    if "clock" not in self._result.unavailable:
                        self._result.unavailable.append("clock")
                    places.release()
                    continue
                group.create_task(one(strike))

    async def _rest(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._late:  # noqa: ASYNC110  # two clocks
            await asyncio.sleep(min(0.5, seconds))

    async def _strike(self, strike: Strike) -> bool:
        """False when there was no victim in time."""
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            if strike.target != "client" and not any(
                self._may(strike, name) for name in self._stack.names(strike.target)
            ):
                await asyncio.sleep(_POLL)
                continue
            try:
                caught = await self._control.catch(strike.phase, _HOLD, _CATCH)
            except TimeoutError:
                caught = None  # a quiet moment
            if strike.target == "client":
                if caught is not None and await self._strike_client(strike, caught):
                    return True
            elif (name := self._victim(strike, caught)) is not None:
                await self._strike_process(strike, name, caught)
                return True
            if caught is not None:
                self._control.release(caught)
            await asyncio.sleep(_POLL)
        return False

    def _victim(self, strike: Strike, caught: Caught | None) -> str | None:
        """The process on the side of the caught request; where that is not known yet, any."""
        known = None if caught is None else self._control.where(caught.request).get(strike.target)
        if known is not None:
            return known if self._may(strike, known) else None
        among = [name for name in self._stack.names(strike.target) if self._may(strike, name)]
        return self._rng.choice(among) if among else None

    def _may(self, strike: Strike, name: str) -> bool:
        if name in self._down:
            return False
        stage = name.partition("-")[0]
        ready = self._ready(stage)
        return name in ready and (strike.fault not in SILENCING or len(ready) > 1)

    def _ready(self, stage: str) -> set[str]:
        """Processes of a stage that serve, in the eyes of every router that does."""
        views = {
            router: ready
            for router, (asked, ready) in self._seen.items()
            if router not in self._down and asked > self._back.get(router, 0.0)
        }
        complete = [
            router
            for router, ready in views.items()
            if all(any(name.startswith(s) for name in ready) for s in ("prefill", "decode"))
        ]
        if stage == "router":
            return set(complete)
        if not complete:
            return set()
        common: set[str] = views[complete[0]].intersection(*(views[router] for router in complete))
        return {
            name
            for name in common
            if name.startswith(stage)
            and name not in self._down
            and all(self._seen[router][0] > self._back.get(name, 0.0) for router in complete)
        }

    async def _strike_client(self, strike: Strike, caught: Caught) -> bool:
        at = time.monotonic()
        done = (
            await self._load.vanish(caught.request)
            if strike.fault == "vanish"
            else self._load.slow_down(caught.request)
        )
        self._control.release(caught)
        if done:
            self._record(strike, "client", caught, at)
        return done

    async def _strike_process(self, strike: Strike, name: str, caught: Caught | None) -> None:
        self._down.add(name)
        at = time.monotonic()
        self._faults.begin(strike, name)
        if caught is not None:
            self._control.release(caught)
        complaint = await self._faults.mend(strike, name)
        if complaint is not None:
            self._result.unclean_exits.append(complaint)
        self._back[name] = time.monotonic()
        self._down.discard(name)
        self._record(strike, name, caught, at)

    def _record(self, strike: Strike, victim: str, caught: Caught | None, at: float) -> None:
        request = "" if caught is None else caught.request
        self._result.struck.append(Struck(strike, at - self._began, victim, request, time.monotonic() - at))

    # Looking

    async def _look_on(self, router: str) -> None:
        address = self._stack.plan.addresses[self._stack.routers.index(router)]
        async with AsyncClient(address, tls=self._stack.plan.client_tls) as client:
            while True:
                asked = time.monotonic()
                try:
                    status = await client.status(timeout=5)
                    pid = status.process.pid
                    if pid == self._stack.process(router).pid:
                        ready = {w.id for w in status.workers if w.process is not None and w.process.ready}
                        self._seen[router] = asked, ready
                except OverfillError:
                    self._seen.pop(router, None)
                await asyncio.sleep(_LOOK)

    async def _workers(self) -> list[list[WorkerStatus]]:
        """What each router says of its workers; one that does not answer says nothing of any."""
        found = []
        for address in self._stack.plan.addresses:
            try:
                async with AsyncClient(address, tls=self._stack.plan.client_tls) as client:
                    found.append(list((await client.status(timeout=5)).workers))
            except OverfillError:
                found.append([])
        return found

    async def _freed(self, since: float) -> float | None:
        while (now := time.monotonic()) - since < _SETTLE:
            if all(_is_empty(w) for seen in await self._workers() for w in seen if w.id not in self._down):
                return now - since
            await asyncio.sleep(_POLL)
        return None

    async def _leaked(self) -> list[str]:
        """Gives restarted workers time to come back, and those that were cut off to notice it."""
        deadline = time.monotonic() + _BACK
        wanted = {worker.worker_id for _, worker in self._stack.plan.workers()}
        while True:
            empty = [{worker.id for worker in seen if _is_empty(worker)} for seen in await self._workers()]
            leaked = sorted(name for name in wanted if not all(name in ids for ids in empty))
            if not leaked or time.monotonic() > deadline:
                return leaked
            await asyncio.sleep(_POLL)


def _is_empty(worker: WorkerStatus) -> bool:
    """Whether it answers, and owns no block and has no request."""
    load = None if worker.process is None else worker.process.load
    return load is not None and load.kv_blocks_used == load.running == load.waiting == 0
