"""Which workers have the KV of which prompts, and what a prompt costs each of them. No I/O, no clock.

A prefill worker is at one of three distances from the KV of a prompt's beginning: it is in the worker's memory, on its
disk, or in the memory of another worker that lends it (a *holder*). The index knows the blocks that workers have
reported. The first blocks of a prompt that was placed on a worker are *promised*: they count as being in its memory
until it has reported them, and other workers cannot borrow them.

Workers may differ in block size. Keys of different block sizes are unrelated, so each worker is looked up with the keys
of its own block size.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice
from typing import NamedTuple, TypeAlias

from overfill.routing.job import ExpectedKv, Job
from overfill.routing.worker import DECODE, Worker
from overfill.v1 import registry_pb2

MAX_HOLDERS = 8
"""Number of workers with the longest known prefixes that are compared per request, kind of workers and block size."""

PROMISED_BLOCKS = 64
"""Number of a placed prompt's first unreported blocks that count as cached on its worker before it reports them."""

MAX_PROMISES = 1 << 16
"""Maximum number of promised blocks that are kept."""

MAX_WORKER_KEYS = 1 << 18
"""Maximum number of blocks in memory that are kept for each worker, and of blocks on disk. Others are ignored."""

BlockKeys: TypeAlias = Callable[[int], Iterator[int]]
"""Returns the keys of a prompt's full blocks for a block size."""

_Level: TypeAlias = "dict[Worker, bool]"
"""The workers that have a block: True if the worker has reported it, False if it is promised."""

_NONE: _Level = {}

_KINDS = _PREFILL_ONLY, _BOTH_STAGES, _DECODE_ONLY = range(3)
"""Kinds of workers. Each has a part of the index, so that many workers of one kind do not hide those of another."""


class _Levels(NamedTuple):
    """The workers of one kind and block size that have a prompt's leading blocks, block by block.

    Both lists end before the first block that no worker has; ``disk`` is empty if no worker has blocks on disk. A
    worker that has a block in memory has all blocks before it there. On disk, blocks that are in memory may be missing.
    """

    memory: list[_Level]
    disk: list[_Level]


NO_LEVELS = _Levels([], [])


class _Lender(NamedTuple):
    worker: Worker
    tokens: int


class _Part:
    """The blocks of all workers of one kind.

    Attributes:
        memory, disk: key of a block -> the workers that have it.
        block_sizes: number of workers of each block size.
    """

    def __init__(self) -> None:
        self.memory: dict[int, _Level] = {}
        self.disk: dict[int, _Level] = {}
        self.block_sizes: Counter[int] = Counter()

    def levels(self, keys: Iterable[int]) -> _Levels:
        levels = _Levels([], [])
        memory, disk = self.memory.get, self.disk.get
        if not self.disk:
            for key in keys:
                if (level := memory(key)) is None:
                    break
                levels.memory.append(level)
            return levels
        for key in keys:
            level, on_disk = memory(key, _NONE), disk(key, _NONE)
            if not level and not on_disk:
                break
            levels.memory.append(level)
            levels.disk.append(on_disk)
        return levels


class PrefixIndex:
    """The KV of all workers with one full model.

    A prompt is looked up once for all calls in a row about it, unless a block has changed meanwhile.
    """

    def __init__(self) -> None:
        self._parts = [_Part() for _ in _KINDS]
        self._block_sizes: dict[Worker, int] = {}
        # The promised blocks of each placement, the oldest first. Some may have been kept or broken.
        self._promises: deque[tuple[Worker, list[int]]] = deque()
        self._num_promised = 0
        self._keys: BlockKeys | None = None  # of the latest prompt
        self._levels: dict[tuple[int, int], _Levels] = {}  # of that prompt, by kind and block size; none is empty

    # Changes ---------------------------------------------------------------------------------------------------------

    def report(self, worker: Worker, report: registry_pb2.Report) -> None:
        """Takes the changes that a worker of any stage reports."""
        if worker.info.stage == DECODE and not worker.info.lends_kv:
            return
        part = self._parts[kind_of(worker)]
        if self._block_sizes.get(worker) != worker.block_size:
            self._forget_size(worker)
            self._block_sizes[worker] = worker.block_size
            part.block_sizes[worker.block_size] += 1
        if report.HasField("prefix"):
            self._change(part.memory, worker, worker.prefix_keys, report.prefix)
        if report.HasField("disk"):
            self._change(part.disk, worker, worker.disk_keys, report.disk)

    def left(self, worker: Worker) -> None:
        """Forgets a worker that has left its pool, with all its keys."""
        part, promises = self._parts[kind_of(worker)], self._promises
        for blocks, keys in ((part.memory, worker.prefix_keys), (part.disk, worker.disk_keys)):
            for key in keys:
                _drop(blocks, key, worker)
            keys.clear()
        self._promises, self._num_promised = deque(), 0
        for other, promised in promises:
            if other is worker:
                self._break(worker, promised)
            else:
                self._promises.append((other, promised))
                self._num_promised += len(promised)
        self._forget_size(worker)
        self._keys = None

    def place(self, job: Job, worker: Worker) -> ExpectedKv:
        """Records that ``worker`` gets the prompt. Names the holder from which to borrow, and promises blocks."""
        ((_, expected),) = self._expected(job, [worker])
        if (holder := expected.holder) is not None:
            holder.named += 1
            # The next of equal holders goes first next time.
            level = self._of(job, holder).memory[expected.holder_tokens // holder.block_size - 1]
            level[holder] = level.pop(holder)
        blocks = self._parts[kind_of(worker)].memory
        promised = [key for key in self._unreported(job, worker) if worker not in blocks.get(key, _NONE)]
        for key in promised:
            blocks.setdefault(key, {})[worker] = False
        if promised:
            self._keys = None
            self._promises.append((worker, promised))
            self._num_promised += len(promised)
            while self._num_promised > MAX_PROMISES:
                other, oldest = self._promises.popleft()
                self._num_promised -= len(oldest)
                self._break(other, oldest)
        return expected

    def not_computed(self, job: Job, worker: Worker) -> None:
        """Records that ``worker`` did not compute the prompt that was placed on it."""
        self._break(worker, list(self._unreported(job, worker)))

    def _change(
        self, blocks: dict[int, _Level], worker: Worker, keys: set[int], delta: registry_pb2.PrefixDelta
    ) -> None:
        self._keys = None
        for key in list(keys) if delta.replaces else delta.removed:
            keys.discard(key)
            _drop(blocks, key, worker)
        for key in islice(delta.added, MAX_WORKER_KEYS - len(keys)):
            keys.add(key)
            if (level := blocks.get(key)) is None:
                blocks[key] = {worker: True}
            else:
                level[worker] = True

    def _break(self, worker: Worker, promised: Iterable[int]) -> None:
        """Drops those promised blocks that ``worker`` has not reported."""
        blocks = self._parts[kind_of(worker)].memory
        for key in promised:
            if blocks.get(key, _NONE).get(worker) is False:
                self._keys = None
                _drop(blocks, key, worker)

    def _forget_size(self, worker: Worker) -> None:
        if (size := self._block_sizes.pop(worker, None)) is not None:
            sizes = self._parts[kind_of(worker)].block_sizes
            sizes[size] -= 1
            if not sizes[size]:
                del sizes[size]

    # Look-ups --------------------------------------------------------------------------------------------------------

    @property
    def block_sizes(self) -> set[int]:
        """Block sizes with whose keys prompts are looked up."""
        return {size for part in self._parts for size in part.block_sizes if size}

    def nearest(self, job: Job, workers: Collection[Worker]) -> dict[Worker, None]:
        """Returns those of ``workers`` that have the longest prefixes: about ``MAX_HOLDERS`` in memory and on disk."""
        found: dict[Worker, None] = {}
        for (kind, _), levels in self._known(job).items():
            if kind == _DECODE_ONLY:
                continue
            for medium in levels:
                here: dict[Worker, None] = {}
                for _, level in _steps(medium):
                    here |= {worker: None for worker in islice(level, MAX_HOLDERS) if worker in workers}
                    if len(here) >= MAX_HOLDERS:
                        break
                found |= here
        return found

    def costs(self, job: Job, workers: Iterable[Worker]) -> dict[Worker, int]:
        """Returns ``ExpectedKv.cost`` of the prompt on each of these prefill workers."""
        return {worker: expected.cost for worker, expected in self._expected(job, workers)}

    def _known(self, job: Job) -> dict[tuple[int, int], _Levels]:
        """Returns what is known of the prompt's blocks, by kind of workers and block size."""
        if job.block_keys is None:
            return {}
        if self._keys is not job.block_keys:
            self._keys, self._levels = job.block_keys, {}
            for kind, part in enumerate(self._parts):
                if part.memory or part.disk:
                    for size in filter(None, part.block_sizes):
                        if (levels := part.levels(job.block_keys(size))).memory:
                            self._levels[kind, size] = levels
        return self._levels

    def _of(self, job: Job, worker: Worker) -> _Levels:
        return self._known(job).get((kind_of(worker), worker.block_size), NO_LEVELS)

    def _unreported(self, job: Job, worker: Worker) -> Iterator[int]:
        """Returns the keys of the blocks that may be promised: the first ones that ``worker`` has not reported."""
        if job.block_keys is None or not worker.block_size:
            return iter(())
        reported = _reported(self._of(job, worker).memory, worker)
        return islice(job.block_keys(worker.block_size), reported, reported + PROMISED_BLOCKS)

    def _expected(self, job: Job, workers: Iterable[Worker]) -> Iterator[tuple[Worker, ExpectedKv]]:
        known, prompt = self._known(job), job.prompt_tokens
        importable, lender = job.importable_tokens, self._lender(job) if known else None
        for worker in workers:
            size = worker.block_size
            levels = known.get((kind_of(worker), size), NO_LEVELS)
            blocks = _depth(levels.memory, worker)
            memory = on_disk = at_peer = blocks * size
            if levels.disk:
                on_disk = max(memory, min(_depth(levels.disk, worker, blocks), importable // size) * size)
            # The lender itself has as much in memory, so it borrows nothing.
            if lender is not None and size and worker.info.lends_kv and lender.worker is not worker:
                at_peer = max(memory, min(lender.tokens, importable) // size * size)
            if worker.disk_cost <= worker.peer_cost:  # as the worker does, first from where it is cheaper
                disk, peer = on_disk - memory, max(0, at_peer - on_disk)
            else:
                disk, peer = max(0, on_disk - at_peer), at_peer - memory
            cost = prompt - memory - int(peer * (1 - worker.peer_cost) + disk * (1 - worker.disk_cost))
            if lender is None or not peer:
                yield worker, ExpectedKv(memory, 0, disk, max(1, cost))
            else:
                yield worker, ExpectedKv(memory, peer, disk, max(1, cost), lender.worker, lender.tokens)

    def _lender(self, job: Job) -> _Lender | None:
        """Returns a worker from which the prompt's longest prefix can be borrowed now; None without one.

        Among those with equally long prefixes, a prefill worker goes before a decode worker, whose steps the loan may
        delay. Then the one with the least load does.
        """
        found: dict[Worker, int] = {}
        for (_, size), levels in self._known(job).items():
            for blocks, level in islice(_steps(levels.memory), MAX_HOLDERS):
                if found and max(found.values()) > blocks * size:
                    break
                for worker in islice(level, MAX_HOLDERS):
                    if worker.block_size != size:
                        continue  # its reports contradict each other: these keys are for another block size
                    if worker.lends and worker not in found and worker.seat not in job.avoid:
                        reported = blocks if level[worker] else _reported(levels.memory, worker)
                        if reported:
                            found[worker] = reported * size
        most = job.importable_tokens

        def rank(worker: Worker) -> tuple[int, bool, int]:
            return -min(found[worker], most), worker.info.stage == DECODE, worker.requests + worker.named

        best = min(found, key=rank, default=None)
        return None if best is None else _Lender(best, found[best])


def kind_of(worker: Worker) -> int:
    """Returns the kind of a worker: with prefill only, of both stages, or with decode only."""
    if worker.info.stage == DECODE:
        return _DECODE_ONLY
    return _BOTH_STAGES if worker.info.colocated else _PREFILL_ONLY


def _drop(blocks: dict[int, _Level], key: int, worker: Worker) -> None:
    if (level := blocks.get(key)) is not None:
        level.pop(worker, None)
        if not level:
            del blocks[key]


def _steps(levels: list[_Level]) -> Iterator[tuple[int, _Level]]:
    """Yields the last level, then the last one of those before it that have more workers, and so on.

    Each comes with the number of levels up to it. Shorter prefixes have the same workers, or more.
    """
    end = len(levels)
    while end:
        level = levels[end - 1]
        yield end, level
        end = bisect_left(levels, -len(level), hi=end - 1, key=lambda other: -len(other))


def _depth(levels: list[_Level], worker: Worker, begin: int = 0) -> int:
    """Returns the number of leading blocks that ``worker`` has, promised ones too, if it has the first ``begin``."""
    return bisect_left(levels, True, begin, key=lambda level: worker not in level)


def _reported(levels: list[_Level], worker: Worker) -> int:
    """Returns the number of leading blocks that ``worker`` has reported."""
    return bisect_left(levels, True, key=lambda level: level.get(worker) is not True)
