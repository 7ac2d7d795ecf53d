"""Who can take work: the workers of one stage, what they last reported, and what this router gave them.

Every call that depends on time takes ``now`` (seconds, monotonic). No I/O: workers report.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from overfill.errors import InvalidRequest
from overfill.kv.handshake import KvIdentity, check_same
from overfill.kv.spec import DTYPE_FROM_PROTO, KvSpec
from overfill.routing.index import STALE_AFTER, Index
from overfill.routing.policy import LeastLoad, Policy
from overfill.v1 import common_pb2, decode_pb2, registry_pb2

PREFILL = common_pb2.STAGE_PREFILL
DECODE = common_pb2.STAGE_DECODE


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker says about itself when it joins; fixed for one incarnation.

    ``startup_seconds`` is how long it took from the start of its process until it was ready; 0: not known.
    """

    id: str
    incarnation: int
    stage: common_pb2.Stage
    address: str
    data_address: str
    identity: KvIdentity
    max_model_len: int
    vocab_size: int
    startup_seconds: float = 0.0

    @classmethod
    def from_hello(cls, hello: registry_pb2.Hello) -> WorkerInfo:
        """Raises InvalidRequest when the message cannot describe a worker."""
        if not hello.worker_id:
            raise InvalidRequest("hello.worker_id", "is empty")
        if not hello.address:
            raise InvalidRequest("hello.address", "is empty")
        if hello.stage not in (PREFILL, DECODE):
            raise InvalidRequest("hello.stage", f"must be prefill or decode, got {hello.stage}")
        if hello.kv.dtype not in DTYPE_FROM_PROTO:
            raise InvalidRequest("hello.kv.dtype", f"unknown element type {hello.kv.dtype}")
        if not 0 <= hello.startup_seconds < math.inf:
            raise InvalidRequest("hello.startup_seconds", f"must be 0 or more, got {hello.startup_seconds}")
        return cls(
            id=hello.worker_id,
            incarnation=hello.incarnation,
            stage=hello.stage,
            address=hello.address,
            data_address=hello.data_address or hello.address,
            identity=KvIdentity(
                wire_version=hello.wire_version,
                full_digest=hello.model.full_digest,
                tokenizer_digest=hello.model.tokenizer_digest,
                kv=KvSpec.from_proto(hello.kv),
            ),
            max_model_len=hello.max_model_len,
            vocab_size=hello.vocab_size,
            startup_seconds=hello.startup_seconds,
        )


@dataclass(eq=False, slots=True)
class Worker:
    """One incarnation of a worker.

    Attributes:
        report: the latest, or None before the first.
        reported_at: when it came, seconds.
        in_flight: requests that this router has on the worker now.
        closed: refused or failed something; gets nothing new until its next report.
        placed: requests placed since the latest report, which does not count them yet.
        placed_tokens, placed_blocks: tokens of theirs that are likely to be computed, and blocks that they take.
        last_placed: ordinal of the latest placement in the pool; 0 for none.
        prefix_keys: keys of the blocks in its prefix cache (``kv.prefix.block_key``), as last reported.
    """

    info: WorkerInfo
    report: registry_pb2.Report | None = None
    reported_at: float = 0.0
    in_flight: int = 0
    closed: bool = False
    placed: int = 0
    placed_tokens: int = 0
    placed_blocks: int = 0
    last_placed: int = 0
    prefix_keys: set[int] = field(default_factory=set)

    @property
    def id(self) -> str:
        return self.info.id

    @property
    def credits_left(self) -> int:
        """Requests that may still be placed; 0 before the first report."""
        return max(0, self.report.credits - self.in_flight) if self.report else 0

    @property
    def key(self) -> tuple[str, int]:
        """Id and incarnation: a restarted worker is another one."""
        return self.info.id, self.info.incarnation

    @property
    def staying(self) -> bool:
        """Whether the worker takes work or will once it is warm; a draining one never does again."""
        return self.report is None or not self.report.draining

    def alive(self, now: float) -> bool:
        """Whether the worker works, though it may be full at the moment."""
        return (
            self.report is not None
            and self.report.ready
            and not self.report.draining
            and now - self.reported_at <= STALE_AFTER
        )

    def admissible(self, now: float) -> bool:
        """Whether the worker may be given one more request of some size."""
        return self.alive(now) and not self.closed and self.credits_left > 0

    @property
    def capacity_tokens(self) -> int | None:
        """Longest sequence the worker could ever hold, in tokens; None before it has said."""
        load = self.report.load if self.report else None
        if load is None or not load.kv_blocks_total:
            return None
        tokens = load.kv_blocks_total * load.block_size
        return min(tokens, self.info.max_model_len) if self.info.max_model_len else tokens

    def could_hold(self, tokens: int) -> bool:
        """Whether an empty worker holds a sequence of ``tokens``; True while its size is not known."""
        capacity = self.capacity_tokens
        return capacity is None or tokens <= capacity

    def has_room(self, tokens: int) -> bool:
        """Whether ``tokens`` fit now, by the latest report and placements since. Cached blocks give way."""
        return tokens <= self.room_tokens

    @property
    def room_tokens(self) -> float:
        """Most tokens that fit now; infinite while that is not known."""
        load = self.report.load if self.report else None
        if load is None or not load.kv_blocks_total or not load.block_size:
            return math.inf
        return (load.kv_blocks_total - load.kv_blocks_used - self.placed_blocks) * load.block_size

    @property
    def requests(self) -> int:
        """Requests on the worker, those of other routers included, as far as this router knows."""
        load = self.report.load if self.report else None
        reported = load.running + load.waiting if load else 0
        return max(reported + self.placed, self.in_flight)

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens ahead of a new request (prefill)."""
        reported = self.report.load.queued_tokens if self.report else 0
        return reported + (self.placed_tokens if self.info.stage == PREFILL else 0)

    def forget_placed(self) -> None:
        """What was placed is part of the load that the worker says it has."""
        self.placed = self.placed_tokens = self.placed_blocks = 0

    def blocks(self, tokens: int) -> int:
        """Blocks that hold ``tokens``; 0 while the block size is not known."""
        block_size = self.report.load.block_size if self.report else 0
        return -(-tokens // block_size) if block_size else 0


class Pool:
    """The joined workers of one stage, one per id. All that changes a worker goes through here.

    Attributes:
        index: what is known of all of them together; right after ``expire``.
        longest_startup: seconds that the slowest of all workers that ever joined took to start; 0: not known.
    """

    def __init__(self, stage: common_pb2.Stage, policy: Policy | None = None) -> None:
        self.stage = stage
        self.index = Index(policy or LeastLoad())
        self.longest_startup = 0.0
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
            self.leave(old)
        worker = self._detached.pop((info.id, info.incarnation), None) or Worker(info)
        # What it said on its last stream is history: nothing new before it reports again.
        worker.info, worker.report = info, None
        self._workers[info.id] = worker
        self.longest_startup = max(self.longest_startup, info.startup_seconds)
        self.index.refresh(worker)
        return worker

    def report(self, worker: Worker, report: registry_pb2.Report, now: float) -> None:
        """Takes a pushed report; opens the worker again after a refusal."""
        worker.report = report
        worker.reported_at = now
        worker.closed = False
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
        worker.closed = True
        if load is not None and worker.report is not None:
            worker.report.load.CopyFrom(load)
            worker.forget_placed()
        self._refresh(worker)

    def close(self, worker: Worker) -> None:
        """Nothing goes to the worker until its next report."""
        worker.closed = True
        self._refresh(worker)

    def leave(self, worker: Worker) -> None:
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
        return self.index.alive.holding(0)

    @property
    def capacity_tokens(self) -> int | None:
        """Longest sequence that some staying worker could hold; None while none has said."""
        return max((int(capacity) for capacity in self.index.staying.known), default=None)

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
