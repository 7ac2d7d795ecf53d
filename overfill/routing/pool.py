"""The pools of workers: per stage, the joined workers, their latest reports and this router's requests on them.

Every call that depends on time takes ``now`` (seconds, monotonic). No I/O: the registry passes the reports in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from overfill.kv.handshake import check_same
from overfill.routing.index import Index
from overfill.routing.policy import LeastLoad, Policy
from overfill.routing.worker import DECODE, PREFILL, Worker, WorkerInfo
from overfill.v1 import common_pb2, decode_pb2, registry_pb2

MAX_STARTUP_TIMES = 8
"""Number of start-up times that a pool keeps. An exceptional one is dropped when as many other workers have joined."""


class Pool:
    """The joined workers of one stage, one per id. Every change to a worker goes through its pool.

    Attributes:
        index: totals over the workers and the order of the policy; valid right after ``expire``.
    """

    def __init__(self, stage: common_pb2.Stage, policy: Policy | None = None) -> None:
        self.stage = stage
        self.index = Index(policy or LeastLoad())
        self._startups: dict[tuple[str, int], float] = {}  # seconds, of the latest workers to join, by key
        self._workers: dict[str, Worker] = {}
        self._detached: dict[tuple[str, int], Worker] = {}
        self._placements = 0

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers.values())

    def __len__(self) -> int:
        return len(self._workers)

    def get(self, worker_id: str) -> Worker | None:
        return self._workers.get(worker_id)

    @property
    def policy(self) -> Policy:
        """The policy that orders the workers."""
        return self.index.policy

    def use(self, policy: Policy) -> None:
        """Replaces the policy. ``policy`` must be new and must not be shared with another pool."""
        self.index = Index(policy)
        for worker in self:
            self.index.reported(worker)
            policy.keys_changed(worker, worker.prefix_keys, ())

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
        self._startups.pop(worker.key, None)  # count a worker that joins again only once
        self._startups[worker.key] = info.startup_seconds
        if len(self._startups) > MAX_STARTUP_TIMES:
            del self._startups[next(iter(self._startups))]
        self.index.refresh(worker)
        return worker

    def report(self, worker: Worker, report: registry_pb2.Report, now: float) -> None:
        """Applies a worker's report and ends its pause."""
        worker.set_report(report)
        worker.reported_at = now
        worker.paused_until_report = False
        joined = self._joined(worker)
        if report.HasField("prefix"):
            removed = list(worker.prefix_keys) if report.prefix.replaces else report.prefix.removed
            worker.prefix_keys.difference_update(removed)
            worker.prefix_keys.update(report.prefix.added)
            if joined:
                gone = [key for key in removed if key not in worker.prefix_keys]
                self.policy.keys_changed(worker, report.prefix.added, gone)
        if joined:
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
            self.policy.keys_changed(worker, (), worker.prefix_keys)
            worker.prefix_keys.clear()
            if worker.in_flight:
                self._detached[worker.key] = worker

    def expire(self, now: float) -> None:
        """Removes silent workers from the index. Call it before reading ``index``."""
        self.index.expire(now)

    def place(self, worker: Worker, tokens: int, cached: int = 0) -> None:
        """Counts a request of ``tokens`` on ``worker``, of which the worker probably has ``cached`` in its cache."""
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
            self._detached.pop(worker.key, None)
        self._refresh(worker)

    @property
    def num_ready(self) -> int:
        """Number of ready workers; valid right after ``expire``."""
        return self.index.alive.total

    @property
    def longest_startup(self) -> float:
        """Longest start-up time of the last ``MAX_STARTUP_TIMES`` workers to join, in seconds; 0 means unknown."""
        return max(self._startups.values(), default=0.0)

    @property
    def capacity_tokens(self) -> int | None:
        """Longest sequence that a worker of the pool can hold, draining ones excluded; None while unknown."""
        return max((int(capacity) for capacity in self.index.not_draining.known), default=None)

    def check(self, now: float) -> None:
        """Raises AssertionError if ``index`` differs from the workers' state. Call it after ``expire``."""
        self.index.check(self, now)

    def _joined(self, worker: Worker) -> bool:
        return self._workers.get(worker.id) is worker

    def _refresh(self, worker: Worker) -> None:
        if self._joined(worker):
            self.index.refresh(worker)


@dataclass(slots=True)
class Roster:
    """The pools of both stages. All workers have the same full model and KV geometry.

    Args:
        expected: values required of every worker, by field of ``KvIdentity.flat()``, such as ``full_digest``.
    """

    expected: Mapping[str, object] = field(default_factory=dict)
    prefill: Pool = field(default_factory=lambda: Pool(PREFILL))
    decode: Pool = field(default_factory=lambda: Pool(DECODE))

    def pool(self, stage: common_pb2.Stage) -> Pool:
        return self.prefill if stage == PREFILL else self.decode

    def find(self, worker_id: str) -> Worker | None:
        """Returns the joined worker with this id, of either stage, or None."""
        return self.prefill.get(worker_id) or self.decode.get(worker_id)

    def unready_stages(self, now: float) -> list[common_pb2.Stage]:
        """Returns the stages without a ready worker. No request can be answered unless the list is empty."""
        for pool in (self.prefill, self.decode):
            pool.expire(now)
        return [pool.stage for pool in (self.prefill, self.decode) if not pool.num_ready]

    def workers(self) -> list[Worker]:
        """Returns all joined workers, ordered by stage and id."""
        return sorted([*self.prefill, *self.decode], key=lambda w: (w.info.stage, w.id))

    def join(self, info: WorkerInfo) -> Worker:
        """Adds ``info``'s worker to its pool.

        Raises:
            Incompatible: the worker differs from ``expected`` or from the joined workers; ``fields`` names where.
        """
        ours = dict(self.expected)
        for worker in self.workers():
            if worker.id != info.id:
                ours = worker.info.identity.flat() | ours
                break
        check_same(ours, info.identity.flat(), f"worker {info.id} does not fit this router's workers")
        return self.pool(info.stage).join(info)
