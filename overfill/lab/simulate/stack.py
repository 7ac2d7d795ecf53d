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

from overfill.errors import OverfillError, Overloaded
from overfill.lab.simulate.autoscale import LoadObserver
from overfill.lab.simulate.blocks import KeptBlocks
from overfill.lab.simulate.clock import Clock
from overfill.lab.simulate.decode import SequenceState, SimDecode
from overfill.lab.simulate.histogram import Histogram
from overfill.lab.simulate.options import SimulationOptions
from overfill.lab.simulate.prefill import SimPrefill, Ticket
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
        # Tokens of a block that prompts may share; 0 without such blocks.
        self._block_tokens = next((request.block_tokens for request in trace if request.blocks), 0)
        self._computed: set[int] = set()  # keys of the blocks that a full model has computed somewhere
        self._requests: list[SimRequest] = []
        self._gaps = Histogram()
        self._started = 0
        self._random = random.Random(options.seed)
        self._tier_random = random.Random(f"tiers {options.seed}")
        config = options.scaling or ScalingConfig()
        configs = {name: tier.scaling(config) if options.tiers else config for name, tier in self.tiers.items()}
        self._observer = LoadObserver(self.clock, Scaler(config, configs), self.tiers, self.workers)
        self.brownout = Brownout(options.brownout, goals, self._predict)

    def run(
        self, progress: Callable[[int, int], None] = lambda done, total: None, max_misses: float = inf
    ) -> SimulationResult:
        """Plays the whole trace, or until more than ``max_misses`` requests have missed their objective.

        Calls ``progress`` with the numbers of ended requests and of all requests.
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
            self.clock.at(0.0, self._repeat, self._update_brownout)
        if self.options.colocated:
            self.clock.at(0.0, self._repeat, self._update_short_prompts)
        limit, reported = self._trace[-1].arrival + _END_TIMEOUT, 0
        while (self.open or len(self._requests) < len(self._trace)) and self._misses <= max_misses:
            if self.clock.now >= limit or not self.clock.step():
                break
            if self.options.check:
                self._check()
            if (ended := len(self._requests) - len(self.open)) >= reported + 500:
                reported = ended
                progress(reported, len(self._trace))
        for request in list(self.open.values()):
            self._end(request, "did not end in time")
        for worker in self.workers.values():
            self._account(worker)
        self.counters.events = self.clock.events
        return SimulationResult(self.options, self._requests, self._gaps, self.counters)

    def _repeat(self, action: Callable[[], None]) -> None:
        """Calls ``action`` now and after every ``INTERVAL``."""
        action()
        self.clock.after(INTERVAL, self._repeat, action)

    # -- workers ---------------------------------------------------------------------------------------------------

    def _start_worker(self, stages: Stages, delay: float, tier: str = "", disk: KeptBlocks | None = None) -> SimWorker:
        """Starts a worker, which is ready after ``delay``.

        Args:
            tier: Of its answers.
            disk: That of the worker that it replaces; None means an empty one if it prefills.
        """
        self._started += 1
        name = f"{_LETTERS[stages]}{self._started}"
        block_bytes, size = self._block_tokens * self.profile.kv_token_bytes, self.options.kv_disk_size
        if PREFILL in stages and disk is None and size and block_bytes:
            disk = KeptBlocks(lambda: size // block_bytes)
        worker = SimWorker(
            name,
            stages,
            self.clock,
            self,
            self.profile,
            self.tiers.get(tier),
            self._gaps,
            self._block_tokens,
            lends=self.options.kv_peers and self._block_tokens > 0,
            disk=disk,
        )
        self.workers[name] = worker
        self.counters.most_workers |= Counter(pool for other in self.workers.values() for pool in other.pools)
        self.clock.after(delay, self._join, worker)
        if self.options.mtbf is not None:
            self.clock.after(delay + self._random.expovariate(1 / self.options.mtbf), self._fail, worker)
        return worker

    def _drain_worker(self, worker: SimWorker) -> None:
        """Drains a worker: it accepts no new requests; those left after the grace period migrate."""
        if not worker.entries:  # it has not joined yet
            self._remove(worker)
            return
        worker.draining = True
        worker.push()
        self.clock.after(self.profile.grace, self._abandon, worker, False)

    def reported(self, worker: SimWorker, reports: Sequence[registry_pb2.Report]) -> None:
        if worker.entries:
            for entry, report in zip(worker.entries, reports, strict=True):
                self.dispatcher.report(entry, report, self.clock.now)
            if worker.draining and not worker.active:
                self._remove(worker)
            self._poll()

    def _join(self, worker: SimWorker) -> None:
        if not worker.gone:
            worker.ready_since = self.clock.now
            worker.entries = self.roster.join_all(worker.infos)
            worker.push()

    def _remove(self, worker: SimWorker) -> None:
        worker.leave()
        self.workers.pop(worker.name, None)
        self._account(worker)
        for entry in worker.entries:
            self.roster.pool_of(entry).remove(entry)

    def _account(self, worker: SimWorker) -> None:
        """Adds a worker's time to the totals. Call it when the worker leaves, or at the end."""
        lived, counters = self.clock.now - worker.since, self.counters
        counters.worker_seconds += lived
        if worker.prefill is not None:
            counters.prefill_worker_seconds += lived
            counters.prefill_busy += worker.prefill.busy
        if worker.decode is not None:
            counters.decode_worker_seconds += lived
            counters.decode_busy += worker.decode.busy

    def _fail(self, worker: SimWorker) -> None:
        if worker.gone:
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
        if worker.gone:
            return
        if worker.decode is not None:
            for sequence in list(worker.decode.sequences):
                emitted = worker.decode.emitted(sequence)
                if not failed:
                    worker.decode.release(sequence)
                self.clock.after(self.profile.hop, self._lost, sequence, emitted, failed)
        if worker.prefill is not None:
            for ticket in worker.prefill.tickets():
                if not failed:
                    worker.prefill.cancel(ticket)
                self.clock.after(2 * self.profile.hop, self._prefill_lost, ticket, failed)

    def _scale(self) -> None:
        """Starts and drains workers as the scaling policy recommends."""
        targets = self._observer.targets(self.open)
        self._resize(PREFILL_ONLY, "", targets.prefill)
        for tier in self.tiers:
            self._resize(DECODE_ONLY, tier, targets.decode_pools[tier].workers)

    def _resize(self, stages: Stages, tier: str, target: int) -> None:
        staying = [w for w in self.workers.values() if (w.stages, w.tier) == (stages, tier) and not w.draining]
        limit = None if self.options.scaling is None else self.options.scaling.max_total
        for _ in range(target - len(staying)):
            # A draining worker occupies its machine until it has left.
            if limit is not None and len(self.workers) >= limit:
                return
            self._start_worker(stages, self.profile.startup, tier)
        staying.sort(key=lambda w: (w.ready_since is not None, w.active, -w.since))
        for worker in staying[: max(0, len(staying) - target)]:
            self._drain_worker(worker)

    # -- the router's side -----------------------------------------------------------------------------------------

    def _arrive(self, index: int) -> None:
        trace = self._trace[index]
        job = make_job(f"r{index}", trace)
        asked = self._asked()
        request = SimRequest(trace, job, asked, self.tiers[asked].objective)
        request.allows_brownout = self._tier_random.random() < self.options.brownout_share
        self._requests.append(request)
        if index + 1 < len(self._trace):
            self.clock.at(self._trace[index + 1].arrival, self._arrive, index + 1)
        self.open[job] = request
        try:
            self._submit_job(request)
        except OverfillError as error:
            self._end(request, type(error).__name__)
            return
        finally:
            counters = self.counters
            hit_rate = counters.cached_tokens / counters.prompt_tokens if counters.prompt_tokens else 0.0
            self._observer.arrived(request, hit_rate)
        self._poll()

    def _asked(self) -> str:
        """Returns the tier that the next request asks for."""
        shares = [tier.share for tier in self.tiers.values()]
        return self._tier_random.choices([*self.tiers], shares)[0] if len(shares) > 1 else next(iter(self.tiers))

    def _submit_job(self, request: SimRequest) -> None:
        """Submits the request's job in the tier that the router would choose."""
        asked, brownout, job = request.asked, self.brownout, request.job
        tiers: Iterable[str] = (asked,)
        if request.allows_brownout:
            chosen = brownout.choose(asked, lambda tier: True, self.clock.now)
            tiers = dict.fromkeys((chosen, asked, *brownout.cheaper(asked)))
        refusal: Overloaded | None = None
        for tier in tiers:
            job.tier = tier
            try:
                self.dispatcher.submit(job, self.clock.now)
            except Overloaded as error:
                refusal = refusal or error
            else:
                return
        job.tier = asked
        assert refusal is not None
        raise refusal

    def _predict(self, tier: str) -> Prediction:
        return predict(self.roster, self.dispatcher, tier, self.clock.now, self._observer.scaler.expected_itl)

    def _update_brownout(self) -> None:
        self.brownout.update(self.clock.now)

    def _update_short_prompts(self) -> None:
        self.roster.prefill.policy.set_short_prompts(self._observer.short_prompts())

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
                if (prefill := self.dispatcher.prefill_with_start(request.job)) is not None:
                    attempt.with_start = prefill.id
                self.clock.after(self.profile.hop, self._reserve, attempt)

    def _reserved(self, attempt: DecodeAttempt) -> None:
        if not attempt.over:
            self.dispatcher.reserved(attempt.request.job)
            self._poll()

    def _refused(self, attempt: DecodeAttempt, load: decode_pb2.WorkerLoad) -> None:
        if not attempt.over:
            attempt.over = True
            self.counters.refusals += 1
            self.dispatcher.refused(attempt.request.job, load)
            self._poll()

    def _tokens(self, attempt: DecodeAttempt) -> None:
        """Handles the arrival of an attempt's first token at the client."""
        if attempt.over:
            return
        request = attempt.request
        if request.first is None:
            request.first, request.emitted = self.clock.now, 1
        if request.job.prefill is not None:
            self.dispatcher.prefill_done(request.job, self.clock.now)
            self._poll()

    def _done(self, attempt: DecodeAttempt) -> None:
        if not attempt.over:
            attempt.request.last = self.clock.now
            self._end(attempt.request, "")
            self._poll()

    def _lost(self, attempt: DecodeAttempt, emitted: int, gone: bool) -> None:
        """Handles a decode worker's failure (``gone``) or its eviction of a request."""
        if attempt.over:
            return
        self._cancel(attempt)
        attempt.over = True
        request = attempt.request
        if request.first is not None:  # otherwise the first token never reached the router
            request.emitted = max(request.emitted, emitted)
        if request.emitted >= request.trace.output_tokens:
            request.last = self.clock.now
            self._end(request, "")
        else:
            self.counters.migrations += 1
            request.job.emitted = request.emitted
            self.dispatcher.lost(request.job, self.clock.now, gone=gone)
        self._poll()

    def _need_prefill(self, attempt: DecodeAttempt, failed: bool) -> None:
        job = attempt.request.job
        if attempt.over or job.state is JobState.WANTS_PREFILL:  # it already waits for a prefill worker
            return
        self.dispatcher.need_prefill(job, job.prefill, failed=failed, pause=failed)
        self._poll()

    def _end(self, request: SimRequest, error: str) -> None:
        if request.ended:
            raise AssertionError(f"{request.job.id} ended twice")
        request.ended, request.error = True, error
        if request.attempt is not None:
            self._cancel(request.attempt)
            request.attempt.over = True
        if not error:
            self._observer.finished(request)
        self._misses += not request.met
        self.dispatcher.finish(request.job)
        del self.open[request.job]

    # -- on the way to and from workers ----------------------------------------------------------------------------

    def _reserve(self, attempt: DecodeAttempt) -> None:
        if attempt.over:
            return
        worker, hop = self.workers.get(attempt.worker), self.profile.hop
        if worker is None or worker.decode is None or worker.gone:
            self.clock.after(hop, self._lost, attempt, attempt.emitted, True)
        elif not worker.draining and worker.decode.reserve(attempt):
            self.clock.after(hop, self._reserved, attempt)
            if attempt.with_start:
                away = 0.0 if attempt.with_start == attempt.worker else hop
                self.clock.after(away, self._submit, attempt, attempt.with_start)
        else:
            self.clock.after(hop, self._refused, attempt, worker.decode_load())

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
        if worker is None or worker.prefill is None or worker.gone:
            self.clock.after(2 * self.profile.hop, self._prefill_lost, ticket, True)
        else:
            worker.prefill.submit(ticket)

    def lender(self, name: str) -> SimPrefill | KeptBlocks | None:
        worker = self.workers.get(name)
        return None if worker is None else worker.lent

    def _count_computed(self, keys: Sequence[int], prompt_tokens: int) -> int:
        """Notes that a prompt's blocks are computed. Returns the number of its tokens that had not been before."""
        known = next((index for index, key in enumerate(keys) if key not in self._computed), len(keys))
        self._computed.update(keys)
        return max(1, prompt_tokens - known * self._block_tokens)

    def prompt_computed(self, ticket: Ticket) -> None:
        counters = self.counters
        counters.prompts += 1
        counters.local_prompts += ticket.local
        counters.prompt_tokens += ticket.prompt_tokens
        counters.cached_tokens += ticket.cached
        counters.peer_tokens += ticket.imported["peer"]
        counters.disk_tokens += ticket.imported["disk"]
        counters.new_tokens += self._count_computed(ticket.keys, ticket.prompt_tokens)
        if ticket.local:
            self._first_token(ticket)
            self._kv_arrived(ticket)
        else:
            self.clock.after(self.profile.hop, self._first_token, ticket)

    def _first_token(self, ticket: Ticket) -> None:
        if (engine := self._receiver(ticket)) is not None:
            self.clock.after(self.profile.hop, self._tokens, ticket.owner)
            engine.first_token(ticket.owner)

    def kv_sent(self, ticket: Ticket) -> None:
        self.clock.after(self.profile.hop, self._kv_arrived, ticket)

    def _kv_arrived(self, ticket: Ticket) -> None:
        if (engine := self._receiver(ticket)) is not None:
            ticket.owner.ticket = None
            engine.kv_arrived(ticket.owner)

    def answer_done(self, attempt: DecodeAttempt) -> None:
        self._cancel(attempt)  # a one-token answer needs no KV: cancel its transfer
        self._return_kv(attempt)
        self.clock.after(self.profile.hop, self._done, attempt)

    def _return_kv(self, attempt: DecodeAttempt) -> None:
        """Keeps the KV of a prompt and its answer on a decode worker whose decoder is the full model."""
        request = attempt.request
        if self.tiers[request.job.tier].profile.returns_kv and (keys := answer_keys(request.trace)):
            self._computed.update(keys)
            worker = self.workers.get(attempt.worker)
            if worker is not None and worker.returned is not None:
                worker.returned.keep(keys)

    def kv_needed(self, attempt: DecodeAttempt) -> None:
        self.clock.after(self.profile.hop, self._need_prefill, attempt, False)

    def preempted(self, attempt: DecodeAttempt) -> None:
        self.counters.preemptions += 1
        self._cancel(attempt)

    def _prefill_lost(self, ticket: Ticket, failed: bool) -> None:
        attempt = ticket.owner
        if not attempt.over and attempt.ticket is ticket:
            attempt.ticket = None
            self._need_prefill(attempt, failed)

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
