"""The pools of workers: the prefill workers, and the decode workers of each tier. A pool has its joined workers, their
latest reports and this router's requests on them.

Every call that depends on time takes ``now`` (seconds, monotonic). No I/O: the registry passes the reports in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from overfill.errors import Incompatible
from overfill.kv.handshake import check_same
from overfill.routing.adapters import Adapters
from overfill.routing.index import Index
from overfill.routing.policy import LeastLoad, Policy
from overfill.routing.prefix_index import PrefixIndex
from overfill.routing.tier import Adapter, Tier
from overfill.routing.worker import DECODE, PREFILL, STAGE_NAMES, Worker, WorkerInfo
from overfill.v1 import common_pb2, decode_pb2, registry_pb2

MAX_STARTUP_TIMES = 8
"""Number of start-up times that a pool keeps. An exceptional one is dropped when as many other workers have joined."""


class Pool:
    """The joined workers of one stage and tier, one per id. Every change to a worker goes through its pool.

    Attributes:
        tier: name of the tier of a decode pool; empty for prefill.
        adapters: the adapters of the decode pools of all tiers.
        prefixes: the KV of the workers of all pools.
        index: totals over the workers and the order of the policy; valid right after ``expire``.
        most_joined: largest number of workers that the pool has had at once.
    """

    def __init__(
        self,
        stage: common_pb2.Stage,
        policy: Policy | None = None,
        tier: str = "",
        adapters: Adapters | None = None,
        prefixes: PrefixIndex | None = None,
    ) -> None:
        self.stage = stage
        self.tier = tier
        self.adapters = adapters or Adapters(())
        self.prefixes = prefixes or PrefixIndex()
        self.index = Index(policy or LeastLoad())
        self.policy.use_prefixes(self.prefixes)
        self._startups: dict[tuple[str, int], float] = {}  # seconds, of the latest workers to join
        self._workers: dict[str, Worker] = {}
        self._detached: dict[tuple[str, int], Worker] = {}
        self._placements = 0
        self.most_joined = 0

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers.values())

    def __len__(self) -> int:
        return len(self._workers)

    def get(self, worker_id: str) -> Worker | None:
        return self._workers.get(worker_id)

    @property
    def title(self) -> str:
        """What the pool's workers are, for messages, such as "decode worker of the tier 'fast'"."""
        return STAGE_NAMES[self.stage] + " worker" + (f" of the tier {self.tier!r}" if self.tier else "")

    @property
    def policy(self) -> Policy:
        """The policy that orders the workers."""
        return self.index.policy

    def use(self, policy: Policy) -> None:
        """Replaces the policy. ``policy`` must be new and must not be shared with another pool."""
        self.index = Index(policy)
        policy.use_prefixes(self.prefixes)
        for worker in self:
            self.index.reported(worker)

    def join(self, info: WorkerInfo) -> Worker:
        """Adds a worker. The same incarnation keeps its count of requests; a new incarnation replaces the old one."""
        old = self._workers.get(info.id)
        if old is not None:
            self.remove(old)
        worker = self._detached.pop((info.id, info.incarnation), None) or Worker(info)
        # Reports from its previous stream are outdated, so the router waits for a new one.
        worker.info = info
        worker.set_report(None)
        self._workers[info.id] = worker
        self.most_joined = max(self.most_joined, len(self._workers))
        self._startups.pop(worker.process, None)  # count a worker that joins again only once
        self._startups[worker.process] = info.startup_seconds
        if len(self._startups) > MAX_STARTUP_TIMES:
            del self._startups[next(iter(self._startups))]
        self.adapters.set(worker, info.adapters)
        self.index.refresh(worker)
        return worker

    def report(self, worker: Worker, report: registry_pb2.Report, now: float) -> None:
        """Applies a worker's report and ends its pause."""
        worker.set_report(report)
        worker.reported_at = now
        worker.paused_until_report = worker.silent = False
        if self._joined(worker):
            self.prefixes.report(worker, report)
            if report.HasField("adapters"):
                self.adapters.set(worker, report.adapters.adapters)
            self.index.reported(worker)

    def refused(self, worker: Worker, load: decode_pb2.WorkerLoad | None) -> None:
        """Pauses a worker that refused a request. ``load`` is the load from its refusal, if it sent one."""
        worker.paused_until_report = True
        if load is not None and worker.report is not None:
            worker.report.load.CopyFrom(load)
            worker.set_report(worker.report)
        self._refresh(worker)

    def pause(self, worker: Worker) -> None:
        """Stops placements on the worker until its next report."""
        worker.paused_until_report = True
        self._refresh(worker)

    def remove(self, worker: Worker) -> None:
        """Removes ``worker`` from the pool. Its running requests continue and still use credits."""
        if self._joined(worker):
            del self._workers[worker.id]
            self.index.forget(worker)
            self.policy.left(worker)
            self.prefixes.left(worker)
            self.adapters.left(worker)
            if worker.in_flight:
                self._detached[worker.process] = worker

    def expire(self, now: float) -> None:
        """Removes silent workers from the index. Call it before reading ``index``."""
        for worker in self.index.expire(now):
            worker.silent = True

    def place(self, worker: Worker, tokens: int, cached: int = 0) -> None:
        """Counts a request of ``tokens`` on ``worker``, of which ``cached`` cost it no time (``ExpectedKv.cost``)."""
        self._placements += 1
        worker.in_flight += 1
        worker.placed += 1
        worker.placed_tokens += tokens - cached
        worker.placed_blocks += worker.blocks(tokens)
        worker.last_placed = self._placements
        self._refresh(worker)

    def release(self, worker: Worker) -> None:
        """Ends one request that ``place`` counted."""
        worker.in_flight -= 1
        if not worker.in_flight:
            self._detached.pop(worker.process, None)
        self._refresh(worker)

    @property
    def num_ready(self) -> int:
        """Number of ready workers; valid right after ``expire``."""
        return self.index.alive.total

    @property
    def longest_startup(self) -> float:
        """Longest start-up time of the last ``MAX_STARTUP_TIMES`` workers to join, in seconds; 0 means unknown."""
        return max(self._startups.values(), default=0.0)

    def having(self, adapter: Adapter | None) -> Collection[Worker]:
        """Returns the joined workers that have ``adapter``; all without one."""
        return self._workers.values() if adapter is None else self.adapters.holders(adapter)

    def capacity_tokens(self, adapter: Adapter | None = None) -> int | None:
        """Longest sequence that a worker of the pool with ``adapter`` can hold, in tokens; None while unknown.

        Draining workers do not count.
        """
        if adapter is None:
            return max((int(capacity) for capacity in self.index.not_draining.known), default=None)
        known = (worker.capacity_tokens for worker in self.having(adapter) if not worker.draining)
        return max((capacity for capacity in known if capacity is not None), default=None)

    def _joined(self, worker: Worker) -> bool:
        return self._workers.get(worker.id) is worker

    def _refresh(self, worker: Worker) -> None:
        if self._joined(worker):
            self.index.refresh(worker)


class Roster:
    """The pools of all stages and tiers. All workers have the same full model and KV geometry.

    Args:
        expected: values required of every worker, by field of ``KvIdentity.flat()``, such as ``full_digest``.
        tiers: the tiers of the stack, the default one first. Each has a pool of decode workers.

    Attributes:
        tiers: the tiers by name.
        prefill: the prefill workers, which all tiers share.
        decode: the decode workers of each tier, by its name.
        adapters: the adapters that they have.
        prefixes: the KV of prompts that they have.
    """

    def __init__(self, expected: Mapping[str, object] | None = None, tiers: Sequence[Tier] = (Tier(),)) -> None:
        self._expected = expected or {}
        self.tiers = {tier.name: tier for tier in tiers}
        self.prefixes = PrefixIndex()
        self.prefill = Pool(PREFILL, prefixes=self.prefixes)
        self.adapters = Adapters(self.tiers.keys())
        # Messages of a stack with one pair do not speak of tiers.
        titles = {name: name if len(tiers) > 1 else "" for name in self.tiers}
        self.decode = {
            name: Pool(DECODE, tier=title, adapters=self.adapters, prefixes=self.prefixes)
            for name, title in titles.items()
        }

    def use(self, prefill: Policy, decode: Callable[[], Policy]) -> None:
        """Replaces the policies. Every tier's pool gets its own from ``decode``."""
        self.prefill.use(prefill)
        for pool in self.decode.values():
            pool.use(decode())

    @property
    def default_tier(self) -> str:
        """Name of the tier of requests that name none."""
        return next(iter(self.tiers))

    def pools(self) -> tuple[Pool, ...]:
        """Returns all pools: prefill, then one per tier."""
        return (self.prefill, *self.decode.values())

    @property
    def changes(self) -> int:
        """Grows with each change of the adapters, of which workers have joined and do not drain, or of their size."""
        return self.adapters.changes + sum(pool.index.changes for pool in self.pools())

    def pool_of(self, worker: Worker) -> Pool:
        """Returns the pool to which a worker that has joined belongs."""
        return self.prefill if worker.info.stage == PREFILL else self.decode[worker.info.tier]

    def find(self, worker_id: str) -> Worker | None:
        """Returns the joined worker with this id, of any pool, or None."""
        return next(iter(self.find_all(worker_id)), None)

    def find_all(self, worker_id: str) -> list[Worker]:
        """Returns the joined worker with this id in each of its pools: two if it has both stages."""
        return [worker for pool in self.pools() if (worker := pool.get(worker_id)) is not None]

    def unready_stages(self, now: float) -> list[common_pb2.Stage]:
        """Returns the stages without a ready worker. No request can be answered unless the list is empty.

        A decode worker of any tier counts: the answers of the other tiers do not depend on a tier without workers.
        """
        for pool in self.pools():
            pool.expire(now)
        ready = {PREFILL: self.prefill.num_ready, DECODE: sum(pool.num_ready for pool in self.decode.values())}
        return [stage for stage, count in ready.items() if not count]

    def workers(self) -> list[Worker]:
        """Returns all joined workers, ordered by stage, tier and id; a worker with both stages once for each."""
        return [worker for pool in self.pools() for worker in sorted(pool, key=lambda worker: worker.id)]

    def join(self, info: WorkerInfo) -> Worker:
        """Adds a worker with one stage to its pool; see ``join_all``."""
        return self.join_all([info])[0]

    def join_all(self, infos: Sequence[WorkerInfo]) -> tuple[Worker, ...]:
        """Adds a worker to the pool of each of its stages, which ``infos`` describe.

        Raises:
            Incompatible: the worker differs from ``expected`` or from the joined workers, there is no such tier, or its
                decoder is not the tier's; ``fields`` names where.
        """
        checked = [self._checked(info) for info in infos]  # all before the first joins
        pools = [self.prefill if info.stage == PREFILL else self.decode[info.tier] for info in checked]
        # A worker may have restarted with another stage or tier before its end is known.
        for old in self.find_all(infos[0].id):
            if (pool := self.pool_of(old)) not in pools:
                pool.remove(old)
        return tuple(pool.join(info) for pool, info in zip(pools, checked, strict=True))

    def _checked(self, info: WorkerInfo) -> WorkerInfo:
        """Returns ``info`` with its tier. Raises as ``join_all`` does."""
        ours = dict(self._expected)
        for worker in self.workers():
            if worker.id != info.id:
                ours = worker.info.identity.flat() | ours
                break
        check_same(ours, info.identity.flat(), f"worker {info.id} does not fit this router's workers")
        if info.stage == PREFILL:
            return info
        info = replace(info, tier=self._tier_of(info))
        pool = self.decode[info.tier]
        decoder = dict(self.tiers[info.tier].decoder)
        other = next((worker for worker in pool if worker.id != info.id), None)
        if other is not None:
            decoder = {**other.info.decoder, **decoder}
        tier = f"the tier {info.tier!r}" if pool.tier else "this stack's pair"
        check_same(decoder, info.decoder, f"worker {info.id} runs another decoder than {tier}")
        return info

    def _tier_of(self, info: WorkerInfo) -> str:
        if not info.tier and len(self.tiers) == 1:
            return self.default_tier
        if info.tier in self.tiers:
            return info.tier
        names = ", ".join(map(repr, self.tiers))
        given = f"belongs to the tier {info.tier!r}" if info.tier else "names no tier"
        raise Incompatible(
            f"worker {info.id} {given}; this router has the tiers {names}: give the worker --tier with one of them",
            ["hello.tier"],
        )
