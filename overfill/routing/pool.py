"""Who can take work: the workers of one stage, what they last reported, and what this router gave them.

Every call that depends on time takes ``now`` (seconds, monotonic). No I/O: workers report.
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
"""Start-up times that a pool remembers. One exceptional start is forgotten once as many other workers have joined."""


class Pool:
    """The joined workers of one stage, one per id. All that changes a worker goes through here.

    Attributes:
        index: what is known of all of them together; right after ``expire``.
    """

    def __init__(self, stage: common_pb2.Stage, policy: Policy | None = None) -> None:
        self.stage = stage
        self.index = Index(policy or LeastLoad())
        self._startups: dict[tuple[str, int], float] = {}  # of the last workers that joined, by key
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
        """Who comes first."""
        return self.index.policy

    def use(self, policy: Policy) -> None:
        """Orders the workers by ``policy``, which is new and this pool's own, from now on."""
        self.index = Index(policy)
        for worker in self:
            self.index.reported(worker)
            policy.keys_changed(worker, worker.prefix_keys, ())

    def join(self, info: WorkerInfo) -> Worker:
        """Adds a worker. The same incarnation keeps its count of requests; another one replaces the old."""
        old = self._workers.get(info.id)
        if old is not None:
            self.remove(old)
        worker = self._detached.pop((info.id, info.incarnation), None) or Worker(info)
        # What it said on its last stream is history: nothing new before it reports again.
        worker.info, worker.report = info, None
        self._workers[info.id] = worker
        self._startups.pop(worker.key, None)  # a worker that joins again counts once
        self._startups[worker.key] = info.startup_seconds
        if len(self._startups) > MAX_STARTUP_TIMES:
            del self._startups[next(iter(self._startups))]
        self.index.refresh(worker)
        return worker

    def report(self, worker: Worker, report: registry_pb2.Report, now: float) -> None:
        """Takes a pushed report; opens the worker again after a refusal."""
        worker.report = report
        worker.reported_at = now
        worker.paused_until_report = False
        worker.forget_placed()
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
        """Closes the worker until its next report; ``load`` is what it said of itself, if it did."""
        worker.paused_until_report = True
        if load is not None and worker.report is not None:
            worker.report.load.CopyFrom(load)
            worker.forget_placed()
        self._refresh(worker)

    def pause(self, worker: Worker) -> None:
        """Nothing goes to the worker until its next report."""
        worker.paused_until_report = True
        self._refresh(worker)

    def remove(self, worker: Worker) -> None:
        """Stops new placements on ``worker``. What runs there judges itself and still counts."""
        if self._joined(worker):
            del self._workers[worker.id]
            self.index.forget(worker)
            self.policy.keys_changed(worker, (), worker.prefix_keys)
            worker.prefix_keys.clear()
            if worker.in_flight:
                self._detached[worker.key] = worker

    def expire(self, now: float) -> None:
        """To be called before ``index`` is looked at: the silent are not counted on."""
        self.index.expire(now)

    def place(self, worker: Worker, tokens: int, cached: int = 0) -> None:
        """Counts one request of ``tokens`` on ``worker``, ``cached`` of which it is likely to have already."""
        self._placements += 1
        worker.in_flight += 1
        worker.placed += 1
        worker.placed_tokens += tokens - cached
        worker.placed_blocks += worker.blocks(tokens)
        worker.last_placed = self._placements
        self._refresh(worker)

    def release(self, worker: Worker) -> None:
        """Takes back one ``place``."""
        worker.in_flight -= 1
        if not worker.in_flight:
            self._detached.pop(worker.key, None)
        self._refresh(worker)

    @property
    def num_ready(self) -> int:
        """Workers that are ready, right after ``expire``."""
        return self.index.alive.total

    @property
    def longest_startup(self) -> float:
        """Longest start-up time of the last ``MAX_STARTUP_TIMES`` workers that joined, in seconds; 0: unknown."""
        return max(self._startups.values(), default=0.0)

    @property
    def capacity_tokens(self) -> int | None:
        """Longest sequence that some not_draining worker could hold; None while none has said."""
        return max((int(capacity) for capacity in self.index.not_draining.known), default=None)

    def check(self, now: float) -> None:
        """Raises AssertionError unless ``index`` is what the workers are. Call after ``expire``."""
        self.index.check(self, now)

    def _joined(self, worker: Worker) -> bool:
        return self._workers.get(worker.id) is worker

    def _refresh(self, worker: Worker) -> None:
        if self._joined(worker):
            self.index.refresh(worker)


@dataclass(slots=True)
class Roster:
    """Both stages of one pair, held to one full model and one KV geometry.

    Args:
        expected: fields of ``KvIdentity.flat()`` that are known beforehand, such as ``full_digest``.
    """

    expected: Mapping[str, object] = field(default_factory=dict)
    prefill: Pool = field(default_factory=lambda: Pool(PREFILL))
    decode: Pool = field(default_factory=lambda: Pool(DECODE))

    def pool(self, stage: common_pb2.Stage) -> Pool:
        return self.prefill if stage == PREFILL else self.decode

    def find(self, worker_id: str) -> Worker | None:
        """The joined worker of that id, of either stage."""
        return self.prefill.get(worker_id) or self.decode.get(worker_id)

    def lacking(self, now: float) -> list[common_pb2.Stage]:
        """Stages without a worker that is ready now; while there is one, no request can be answered."""
        for pool in (self.prefill, self.decode):
            pool.expire(now)
        return [pool.stage for pool in (self.prefill, self.decode) if not pool.num_ready]

    def workers(self) -> list[Worker]:
        """Every joined worker, ordered by stage and id."""
        return sorted([*self.prefill, *self.decode], key=lambda w: (w.info.stage, w.id))

    def join(self, info: WorkerInfo) -> Worker:
        """Adds ``info``'s worker to its pool.

        Raises:
            Incompatible: it differs from what is expected or from the workers here; ``fields`` says where.
        """
        ours = dict(self.expected)
        for worker in self.workers():
            if worker.id != info.id:
                ours = worker.info.identity.flat() | ours
                break
        check_same(ours, info.identity.flat(), f"worker {info.id} does not fit this router's workers")
        return self.pool(info.stage).join(info)
