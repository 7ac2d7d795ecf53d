"""The simulated stack: the real dispatcher and roster, modelled workers, and the messages between them.

``overfill.routing`` makes all of the router's decisions. This module carries messages, each of which takes a ``hop``,
and replaces the parts of ``routing/attempt.py`` and ``relay.py`` that use sockets. There is one router, and clients
never disconnect.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from math import inf
from typing import Any

from overfill.errors import OverfillError, Overloaded
from overfill.lab.simulate.autoscale import note_work, pool_states, short_prompts
from overfill.lab.simulate.blocks import KeptBlocks, SharedBlocks
from overfill.lab.simulate.clock import Clock
from overfill.lab.simulate.decode import SequenceState, SimDecode
from overfill.lab.simulate.histogram import Histogram
from overfill.lab.simulate.options import SimulationOptions
from overfill.lab.simulate.prefill import Ticket
from overfill.lab.simulate.profiles import Profile
from overfill.lab.simulate.request import DecodeAttempt, SimRequest, answer_keys, make_job
from overfill.lab.simulate.result import Counters, SimulationResult
from overfill.lab.simulate.workers import BOTH, DECODE_ONLY, PREFILL_ONLY, SimWorker, Stages
from overfill.lab.traffic.traces import TraceRequest
from overfill.routing import invariant
from overfill.routing.brownout import Brownout, Prediction, predict
from overfill.routing.dispatcher import Dispatcher, Rejection
from overfill.routing.job import Job, JobState
from overfill.routing.policies import DECODE_DEFAULT, POLICIES, PREFILL_DEFAULT
from overfill.routing.pool import Roster
from overfill.routing.scaling import INTERVAL, Scaler, ScalingConfig
from overfill.routing.tier import Tier
from overfill.routing.worker import PREFILL
from overfill.v1 import decode_pb2, registry_pb2

_LETTERS = {PREFILL_ONLY: "p", DECODE_ONLY: "d", BOTH: "c"}
"""First letter of the names of workers with these stages."""

_END_TIMEOUT = 3600.0
"""Seconds after the last arrival after which unfinished requests count as failed."""


class Simulation:
    """Simulates one run of ``trace`` on workers of ``profile``. Call ``run`` only once."""

    def __init__(self, trace: Sequence[TraceRequest], profile: Profile, options: SimulationOptions) -> None:
        self.clock = Clock()
        self.tiers = options.all_tiers(profile)
        goals = {name: tier.goals for name, tier in self.tiers.items()}
        self.roster = Roster(tiers=[Tier(name, objectives=goal) for name, goal in goals.items()])
        self.roster.use(POLICIES[PREFILL_DEFAULT](options.seed), lambda: POLICIES[DECODE_DEFAULT](options.seed))
        self.dispatcher = Dispatcher(self.roster, max_wait=options.max_wait)
        self.counters = Counters()
        self.profile, self.options = profile, options
        self.open: dict[Job, SimRequest] = {}
        self.workers: dict[str, SimWorker] = {}
        self._trace = trace
        self._misses = 0
        self.block_tokens = next((request.block_tokens for request in trace if request.blocks), 0)
        self.lends_kv = options.kv_peers and self.block_tokens > 0
        self._computed: set[int] = set()  # keys of the blocks that a full model has computed somewhere
        self._requests: list[SimRequest] = []
        self.gaps = Histogram()
        self._all_workers: list[SimWorker] = []  # also those that have left
        self._random = random.Random(options.seed)
        self._tier_random = random.Random(f"tiers {options.seed}")
        config = options.scaling or ScalingConfig()
        own = options.tiers or options.scaling is not None
        configs = {name: tier.scaling(config) if own else config for name, tier in self.tiers.items()}
        self.scaler = Scaler(config, configs)
        self.brownout = Brownout(options.brownout, goals, self._predict)

    def run(
        self, report: Callable[[str, int, int], object] = lambda what, done, total: None, max_misses: float = inf
    ) -> SimulationResult:
        """Plays the whole trace, or until more than ``max_misses`` requests have missed their objective.

        Calls ``report`` with "Simulating" and the numbers of ended requests and of all requests.
        """
        for _ in range(self.options.prefill):
            self._start_worker(PREFILL_ONLY, 0.0)
        for tier in self.tiers.values():
            for _ in range(tier.workers):
                self._start_worker(DECODE_ONLY, 0.0, tier.name)
        for _ in range(self.options.colocated):
            self._start_worker(BOTH, 0.0, self.roster.default_tier)
        # Events run in the order of scheduling, so workers join and report before the first request.
        self.clock.at(self._trace[0].arrival, self._arrive, 0)
        if self.options.scaling is not None:
            self.clock.at(0.0, self._repeat, self._scale)
        if self.options.brownout:
            self.clock.at(0.0, self._repeat, lambda: self.brownout.update(self.clock.now))
        if self.options.colocated:
            self.clock.at(0.0, self._repeat, self._set_short_prompts)
        limit, reported = self._trace[-1].arrival + _END_TIMEOUT, 0
        while (self.open or len(self._requests) < len(self._trace)) and self._misses <= max_misses:
            if self.clock.now >= limit or not self.clock.step():
                break
            if self.options.check:
                self._check()
            if (ended := len(self._requests) - len(self.open)) >= reported + 500:
                reported = ended
                report("Simulating", reported, len(self._trace))
        for request in list(self.open.values()):
            self._end(request, "did not end in time")
        for worker in self.workers.values():
            worker.leave()
        return SimulationResult(self.options, self._requests, self._all_workers, self.gaps, self.counters)

    def _repeat(self, action: Callable[[], None]) -> None:
        """Calls ``action`` now and after every ``INTERVAL``."""
        action()
        self.clock.after(INTERVAL, self._repeat, action)

    # -- workers ---------------------------------------------------------------------------------------------------

    def _start_worker(self, stages: Stages, delay: float, tier: str = "", disk: KeptBlocks | None = None) -> None:
        """Starts a worker, which is ready after ``delay``.

        Args:
            tier: Of its answers.
            disk: That of the worker that it replaces; None means an empty one if it prefills.
        """
        name = f"{_LETTERS[stages]}{len(self._all_workers) + 1}"
        block_bytes, size = self.block_tokens * self.profile.kv_token_bytes, self.options.kv_disk_size
        if PREFILL in stages and disk is None and size and block_bytes:
            disk = KeptBlocks(lambda: size // block_bytes)
        self.workers[name] = worker = SimWorker(name, stages, tier, self, disk)
        self._all_workers.append(worker)
        self.counters.most_workers |= Counter(pool for other in self.workers.values() for pool in other.pools)
        self.clock.after(delay, self._join, worker)
        if self.options.mtbf is not None:
            self.clock.after(delay + self._random.expovariate(1 / self.options.mtbf), self._fail, worker)

    def _join(self, worker: SimWorker) -> None:
        if worker.name in self.workers:
            worker.entries = self.roster.join_all(worker.infos)
            worker.push()

    def reported(self, worker: SimWorker, reports: Sequence[registry_pb2.Report]) -> None:
        for entry, report in zip(worker.entries, reports, strict=True):
            self.dispatcher.report(entry, report, self.clock.now)
        if worker.draining and not worker.active:
            self._remove(worker)
        self._poll()

    def _drain_worker(self, worker: SimWorker) -> None:
        """Drains a worker: it accepts no new requests; those left after the grace period migrate."""
        if not worker.entries:  # it has not joined yet
            self._remove(worker)
            return
        worker.draining = True
        worker.push()
        self.clock.after(self.profile.grace, self._abandon, worker, False)

    def _fail(self, worker: SimWorker) -> None:
        if worker.name not in self.workers:
            return
        self.counters.failures += 1
        self._abandon(worker, True)
        worker.kill()
        self._remove(worker)
        if not worker.draining:
            self._start_worker(worker.stages, self.profile.startup, worker.tier, worker.disk)
        self._poll()

    def _abandon(self, worker: SimWorker, failed: bool) -> None:
        """Loses the requests of a worker that has ``failed``; migrates those that are left after a grace period."""
        if worker.name not in self.workers:
            return
        if worker.decode is not None:
            for sequence in list(worker.decode.sequences):
                emitted = worker.decode.emitted(sequence)
                if not failed:
                    worker.decode.release(sequence)
                self._tell_router(self._lost, sequence, emitted, failed)
        if worker.prefill is not None:
            for ticket in worker.prefill.tickets:
                if not failed:
                    worker.prefill.cancel(ticket)
                self.clock.after(2 * self.profile.hop, self._prefill_lost, ticket, failed)

    def _remove(self, worker: SimWorker) -> None:
        del self.workers[worker.name]
        for entry in worker.entries:
            self.roster.pool_of(entry).remove(entry)
        worker.leave()

    def _scale(self) -> None:
        """Starts and drains workers as the scaling policy recommends."""
        note_work(self.scaler, self.workers.values())
        states = pool_states(self.tiers, self.workers.values(), self.open)
        targets = self.scaler.targets(self.clock.now, *states)
        self._resize(PREFILL_ONLY, "", targets.prefill)
        for tier in self.tiers:
            self._resize(DECODE_ONLY, tier, targets.decode_pools[tier].workers)

    def _set_short_prompts(self) -> None:
        note_work(self.scaler, self.workers.values())
        tokens = short_prompts(self.scaler, self.tiers, self.workers.values())
        self.roster.prefill.policy.set_short_prompts(tokens)

    def _resize(self, stages: Stages, tier: str, target: int) -> None:
        staying = [w for w in self.workers.values() if (w.stages, w.tier) == (stages, tier) and not w.draining]
        limit = self.scaler.config.max_total or inf
        for _ in range(target - len(staying)):
            # A draining worker occupies its machine until it has left.
            if len(self.workers) < limit:
                self._start_worker(stages, self.profile.startup, tier)
        staying.sort(key=lambda w: (bool(w.entries), w.active, -w.since))
        for worker in staying[: max(0, len(staying) - target)]:
            self._drain_worker(worker)

    # -- the router's side -----------------------------------------------------------------------------------------

    def _arrive(self, index: int) -> None:
        trace = self._trace[index]
        [asked] = self._tier_random.choices([*self.tiers], [tier.share for tier in self.tiers.values()])
        request = SimRequest(trace, make_job(f"r{index}", trace), asked, self.tiers[asked].objective)
        allows_brownout = self._tier_random.random() < self.options.brownout_share
        self._requests.append(request)
        if index + 1 < len(self._trace):
            self.clock.at(self._trace[index + 1].arrival, self._arrive, index + 1)
        self.open[request.job] = request
        hit_rate = self.counters.cached_tokens / max(1, self.counters.prompt_tokens)
        self.scaler.arrived(asked, self.clock.now, trace.prompt_tokens, int(hit_rate * trace.prompt_tokens))
        try:
            self._submit_job(request, allows_brownout)
        except OverfillError as error:
            self._end(request, type(error).__name__)
        else:
            self._poll()

    def _submit_job(self, request: SimRequest, allows_brownout: bool) -> None:
        """Submits the request's job in the tier that the router would choose."""
        asked, brownout, job = request.asked, self.brownout, request.job
        tiers: Iterable[str] = (asked,)
        if allows_brownout:
            chosen = brownout.choose(asked, lambda tier: True, self.clock.now)
            tiers = dict.fromkeys((chosen, asked, *brownout.cheaper(asked)))
        refusals = []
        for tier in tiers:
            job.tier = tier
            try:
                return self.dispatcher.submit(job, self.clock.now)
            except Overloaded as error:
                refusals.append(error)
        job.tier = asked
        raise refusals[0]

    def _predict(self, tier: str) -> Prediction:
        return predict(self.roster, self.dispatcher, tier, self.clock.now, self.scaler.expected_itl)

    def _poll(self) -> None:
        for outcome in self.dispatcher.poll(self.clock.now):
            request = self.open[outcome.job]
            if isinstance(outcome, Rejection):
                self._end(request, type(outcome.error).__name__)
            elif outcome.worker.info.stage == PREFILL:
                assert request.attempt is not None
                hops = 1 if outcome.worker.id == request.attempt.worker else 2
                self.clock.after(hops * self.profile.hop, self._submit, request.attempt, outcome.worker.id)
            else:
                attempt = request.start(outcome.worker.id)
                prefill = self.dispatcher.prefill_with_start(request.job)
                self.clock.after(self.profile.hop, self._reserve, attempt, "" if prefill is None else prefill.id)

    def _tell_router(self, handle: Callable[..., None], attempt: Any, *about: object) -> None:
        """Sends the router a message about an attempt, which it handles unless the attempt is over by then."""

        def arrived() -> None:
            if not attempt.over:
                handle(attempt, *about)
                self._poll()

        self.clock.after(self.profile.hop, arrived)

    def _reserved(self, attempt: DecodeAttempt) -> None:
        self.dispatcher.reserved(attempt.request.job)

    def _refused(self, attempt: DecodeAttempt, load: decode_pb2.WorkerLoad) -> None:
        attempt.over = True
        self.counters.refusals += 1
        self.dispatcher.refused(attempt.request.job, load)

    def _first_token(self, attempt: DecodeAttempt) -> None:
        """Handles the arrival of an attempt's first token at the client."""
        request = attempt.request
        if request.first is None:
            request.first, request.emitted = self.clock.now, 1
        if request.job.prefill is not None:
            self.dispatcher.prefill_done(request.job, self.clock.now)

    def _done(self, attempt: DecodeAttempt) -> None:
        """Handles the arrival of the last token at the client."""
        request, now = attempt.request, self.clock.now
        request.last = now
        job, trace = request.job, request.trace
        running = job.decode.report.load.running if job.decode is not None and job.decode.report is not None else 0
        itl = request.outcome.itl
        self.scaler.finished(job.tier, now, trace.prompt_tokens, trace.output_tokens, itl, running)
        self._end(request, "")

    def _lost(self, attempt: DecodeAttempt, emitted: int, gone: bool) -> None:
        """Handles a decode worker's failure (``gone``) or its eviction of a request."""
        self._cancel(attempt)
        attempt.over = True
        request = attempt.request
        if request.first is not None:  # otherwise the first token never reached the router
            request.emitted = max(request.emitted, emitted)
        if request.emitted >= request.trace.output_tokens:
            self._done(attempt)
        else:
            self.counters.migrations += 1
            request.job.emitted = request.emitted
            self.dispatcher.lost(request.job, self.clock.now, gone=gone)

    def _need_prefill(self, attempt: DecodeAttempt, failed: bool) -> None:
        job = attempt.request.job
        if job.state is not JobState.WANTS_PREFILL:  # otherwise it already waits for a prefill worker
            self.dispatcher.need_prefill(job, job.prefill, failed=failed, pause=failed)

    def _prefill_lost(self, ticket: Ticket, failed: bool) -> None:
        attempt = ticket.owner
        if not attempt.over and attempt.ticket is ticket:
            attempt.ticket = None
            self._need_prefill(attempt, failed)
            self._poll()

    def _end(self, request: SimRequest, error: str) -> None:
        request.error = error
        if request.attempt is not None:
            self._cancel(request.attempt)
            request.attempt.over = True
        self._misses += not request.met
        self.dispatcher.finish(request.job)
        del self.open[request.job]  # it fails if a request ends twice

    # -- on the way to and from workers ----------------------------------------------------------------------------

    def _reserve(self, attempt: DecodeAttempt, prefill: str) -> None:
        """Reserves blocks on the decode worker, which sends the prompt to ``prefill`` if the router has named it."""
        worker = self.workers.get(attempt.worker)
        if attempt.over:
            return
        if worker is None or worker.decode is None:
            self._tell_router(self._lost, attempt, attempt.emitted, True)
        elif not worker.draining and worker.decode.reserve(attempt):
            self._tell_router(self._reserved, attempt)
            if prefill:
                away = 0.0 if prefill == attempt.worker else self.profile.hop
                self.clock.after(away, self._submit, attempt, prefill)
        else:
            self._tell_router(self._refused, attempt, worker.decode.load())

    def _submit(self, attempt: DecodeAttempt, name: str) -> None:
        """Sends a prompt from the decode worker to the prefill worker that the router assigned."""
        request = attempt.request
        if attempt.over or attempt.state is not SequenceState.RECEIVING:
            return
        self._cancel(attempt)
        attempt.prefill = name
        attempt.ticket = ticket = Ticket(
            f"{request.job.id}/{self.clock.events}",
            attempt.prompt_tokens,
            request.trace.blocks,
            attempt,
            local=name == attempt.worker,
            holder="" if (holder := request.job.expected.holder) is None else holder.id,
        )
        worker = self.workers.get(name)
        if worker is None or worker.prefill is None:
            self.clock.after(2 * self.profile.hop, self._prefill_lost, ticket, True)
        else:
            worker.prefill.submit(ticket)

    def lender(self, name: str) -> SharedBlocks | None:
        worker = self.workers.get(name)
        return None if worker is None else worker.lent

    def prompt_computed(self, ticket: Ticket) -> None:
        counters = self.counters
        counters.prompts += 1
        counters.local_prompts += ticket.local
        counters.prompt_tokens += ticket.prompt_tokens
        counters.cached_tokens += ticket.cached
        counters.peer_tokens += ticket.imported["peer"]
        counters.disk_tokens += ticket.imported["disk"]
        known = next((i for i, key in enumerate(ticket.keys) if key not in self._computed), len(ticket.keys))
        counters.new_tokens += max(1, ticket.prompt_tokens - known * self.block_tokens)
        self._computed.update(ticket.keys)
        if ticket.local:
            self._send_first_token(ticket)
            self._kv_arrived(ticket)
        else:
            self.clock.after(self.profile.hop, self._send_first_token, ticket)

    def _send_first_token(self, ticket: Ticket) -> None:
        if (engine := self._receiver(ticket)) is not None:
            self._tell_router(self._first_token, ticket.owner)
            engine.first_token(ticket.owner)

    def kv_sent(self, ticket: Ticket) -> None:
        self.clock.after(self.profile.hop, self._kv_arrived, ticket)

    def _kv_arrived(self, ticket: Ticket) -> None:
        if (engine := self._receiver(ticket)) is not None:
            ticket.owner.ticket = None
            engine.kv_arrived(ticket.owner)

    def answer_done(self, attempt: DecodeAttempt) -> None:
        self._cancel(attempt)  # a one-token answer needs no KV: cancel its transfer
        request = attempt.request
        if self.tiers[request.job.tier].profile.returns_kv and (keys := answer_keys(request.trace)):
            # A decode worker whose decoder is the full model keeps the KV of the prompt and its answer.
            self._computed.update(keys)
            worker = self.workers.get(attempt.worker)
            if worker is not None and worker.returned is not None:
                worker.returned.keep(keys)
        self._tell_router(self._done, attempt)

    def kv_needed(self, attempt: DecodeAttempt) -> None:
        self._tell_router(self._need_prefill, attempt, False)

    def preempted(self, attempt: DecodeAttempt) -> None:
        self.counters.preemptions += 1
        self._cancel(attempt)

    def _cancel(self, attempt: DecodeAttempt) -> None:
        """Cancels the attempt's prefill, if one is running."""
        ticket, attempt.ticket = attempt.ticket, None
        worker = self.workers.get(attempt.prefill)
        if ticket is not None and worker is not None and worker.prefill is not None:
            self.clock.after(0.0 if ticket.local else self.profile.hop, worker.prefill.cancel, ticket)

    def _receiver(self, ticket: Ticket) -> SimDecode | None:
        """Returns the decode engine that receives a prefill's message.

        None means that the message is stale or the worker has left, which the router may not know yet.
        """
        attempt = ticket.owner
        worker = self.workers.get(attempt.worker)
        return None if attempt.over or attempt.ticket is not ticket or worker is None else worker.decode

    # -- checks ----------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        self.counters.checks += 1
        invariant.check(self.dispatcher, self.clock.now)
        for worker in self.workers.values():
            worker.check()
        if self.dispatcher.num_jobs != len(self.open):
            raise AssertionError(f"{len(self.open)} requests are open, the dispatcher knows {self.dispatcher.num_jobs}")
