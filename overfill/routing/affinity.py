"""Prefix affinity: places a prompt where most of it is cached, unless the queue there costs more than that saves."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice
from typing import TypeAlias

from overfill.routing.job import Job
from overfill.routing.policy import LeastLoad, Policy
from overfill.routing.sessions import LatestWorkers
from overfill.routing.worker import Worker

MAX_HOLDERS = 8
"""Maximum number of workers with a cached prefix that are compared per request and block size."""

PROMISED_BLOCKS = 64
"""Number of a placed prompt's first unreported blocks that count as cached on its worker before it reports them."""

MAX_PROMISES = 1 << 16
"""Maximum number of promised blocks that are kept."""

SESSION_TOKENS = 512
"""Tokens by which the worker that a session used last may have more ahead than another, and still goes before it."""

NUM_LEAST_LOADED = 4
"""Number of least loaded workers that are compared as well, cached prefix or not."""

BlockKeys: TypeAlias = Callable[[int], Iterator[int]]
"""Returns the keys of a prompt's full blocks for a block size."""

_Level: TypeAlias = "tuple[dict[Worker, None], Worker | None]"
"""The workers that have reported a block, and the worker to which a prompt with it was sent last."""

_Levels: TypeAlias = "dict[int, list[_Level]]"
"""Block size -> the levels of a prompt's leading blocks of that size; without sizes of which no worker has a block."""


class _Found:
    """What the policy has found for one prompt, by block size.

    Attributes:
        keys: the prompt's ``block_keys``, which all answers to it share.
        levels: see ``_Level``.
        holders: the workers to compare.
    """

    def __init__(self, keys: BlockKeys) -> None:
        self.keys = keys
        self.levels: _Levels = {}
        self.holders: dict[int, dict[Worker, None]] = {}


class PrefixAffinity(Policy):
    """Orders workers by the tokens to compute first: those queued on the worker plus the uncached part of the prompt.

    So a worker does not get the prompt if its queue exceeds the least loaded worker's by more than its cache saves. The
    policy knows only blocks that workers have reported and blocks of prompts placed since. Among workers that are about
    equal, the session's latest one goes first.

    Workers may differ in block size. Keys of different block sizes are unrelated, so each worker is looked up with the
    keys of its own block size.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._load = LeastLoad(seed)
        self._latest = LatestWorkers()
        self._admissible: dict[Worker, int] = {}  # worker -> its block size
        self._block_sizes: Counter[int] = Counter()  # number of admissible workers of each block size
        self._holders: dict[int, dict[Worker, None]] = {}
        self._promised: OrderedDict[int, Worker] = OrderedDict()
        # For the latest prompt, so that its placement and other answers to it look up no block again. None after a
        # change of blocks, promises or admissible workers.
        self._found: _Found | None = None

    def put(self, worker: Worker) -> None:
        if self._admissible.get(worker) != worker.block_size:
            self._forget(worker)
            self._found = None
            self._admissible[worker] = worker.block_size
            self._block_sizes[worker.block_size] += 1
        self._load.put(worker)

    def drop(self, worker: Worker) -> None:
        self._forget(worker)
        self._load.drop(worker)

    def keys_changed(self, worker: Worker, added: Iterable[int], removed: Iterable[int]) -> None:
        for key in removed:
            if (holders := self._holders.get(key)) is not None:
                self._found = None
                holders.pop(worker, None)
                if not holders:
                    del self._holders[key]
            self._keep(key, worker)
        for key in added:
            self._found = None
            self._holders.setdefault(key, {})[worker] = None
            self._keep(key, worker)

    def best(self, job: Job) -> Iterator[Worker]:
        preferred: list[Worker] = []
        if len(self._admissible) > 1:  # a single worker needs no comparison
            levels, latest = self._levels(job, self._block_sizes), self._latest.of(job)
            if levels or (latest is not None and latest in self._admissible):
                ahead = {w: w.queued_tokens - _cached_tokens(levels, w) for w in self._choices(job, levels)}
                if latest is not None and latest in ahead:
                    ahead[latest] -= SESSION_TOKENS
                preferred = sorted(ahead, key=lambda w: (ahead[w], LeastLoad.rank(w), w.id))
        yield from preferred
        yield from (worker for worker in self._load.best(job) if worker not in preferred)

    def placed(self, job: Job, worker: Worker) -> int:
        self._latest.placed(job, worker)
        cached = job.prompt_tokens - self.uncached_tokens(job, worker)
        for key in self._first_unreported(job, worker):
            if self._promised.get(key) is not worker:
                self._found = None
                self._promised[key] = worker
            self._promised.move_to_end(key)
        while len(self._promised) > MAX_PROMISES:
            self._found = None
            self._promised.popitem(last=False)
        return cached

    def uncached_tokens(self, job: Job, worker: Worker) -> int:
        """Returns the number of prompt tokens that ``worker`` probably has to compute; at least 1."""
        cached = _cached_tokens(self._levels(job, [worker.block_size]), worker)
        return max(1, job.prompt_tokens - cached)

    def not_computed(self, job: Job, worker: Worker) -> None:
        for key in self._first_unreported(job, worker):
            self._keep(key, worker)

    def left(self, worker: Worker) -> None:
        self._latest.left(worker)
        for key in [key for key, promised in self._promised.items() if promised is worker]:
            self._keep(key, worker)

    def _first_unreported(self, job: Job, worker: Worker) -> Iterator[int]:
        """Returns the keys of the blocks that may be promised: the first ones that ``worker`` has not reported."""
        size = worker.block_size
        if job.block_keys is None or not size:
            return iter(())
        levels = self._levels(job, [size]).get(size, [])
        reported = bisect_left(levels, True, key=lambda level: worker not in level[0])
        return islice(job.block_keys(size), reported, reported + PROMISED_BLOCKS)

    def _forget(self, worker: Worker) -> None:
        if (size := self._admissible.pop(worker, None)) is not None:
            self._found = None
            self._block_sizes[size] -= 1
            if not self._block_sizes[size]:
                del self._block_sizes[size]

    def _keep(self, key: int, worker: Worker) -> None:
        """Drops the promise of a block: the worker has kept or broken it."""
        if self._promised.get(key) is worker:
            self._found = None
            del self._promised[key]

    def _levels(self, job: Job, block_sizes: Collection[int]) -> _Levels:
        """Returns, block by block, the workers that have the prompt's block, up to the first that no worker has."""
        if job.block_keys is None:
            return {}
        found = self._found_for(job.block_keys).levels
        for size in block_sizes:
            if size and size not in found:
                found[size] = self._levels_of(job.block_keys(size))
        return {size: found[size] for size in block_sizes if found.get(size)}

    def _levels_of(self, keys: Iterable[int]) -> list[_Level]:
        levels: list[_Level] = []
        for key in keys:
            holders, promised = self._holders.get(key, {}), self._promised.get(key)
            if not holders and promised is None:
                break
            levels.append((holders, promised))
        return levels

    def _found_for(self, keys: BlockKeys) -> _Found:
        if self._found is None or self._found.keys is not keys:
            self._found = _Found(keys)
        return self._found

    def _choices(self, job: Job, levels: _Levels) -> dict[Worker, None]:
        """Returns workers to compare: with the longest cached prefixes, the session's latest, and the least loaded."""
        found: dict[Worker, None] = {}
        if job.block_keys is not None:
            known = self._found_for(job.block_keys).holders
            for size, levels_of_size in levels.items():
                if size not in known:
                    known[size] = self._holders_of(levels_of_size)
                found |= known[size]
        latest = self._latest.of(job)
        if latest is not None and latest in self._admissible:
            found[latest] = None
        return found | dict.fromkeys(islice(self._load.best(job), NUM_LEAST_LOADED))

    def _holders_of(self, levels: list[_Level]) -> dict[Worker, None]:
        """Returns about ``MAX_HOLDERS`` admissible workers of one block size, those with the longest prefixes."""
        found: dict[Worker, None] = {}
        seen = -1
        for holders, promised in reversed(levels):
            if promised is not None and promised in self._admissible:
                found[promised] = None
            if len(holders) != seen:  # shorter prefixes have the same holders, or more
                seen = len(holders)
                found |= {holder: None for holder in islice(holders, MAX_HOLDERS) if holder in self._admissible}
            if len(found) >= MAX_HOLDERS:
                break
        return found


def _cached_tokens(levels: _Levels, worker: Worker) -> int:
    """Returns the number of leading prompt tokens whose blocks are on ``worker``."""
    size = worker.block_size
    return size * _depth(levels[size], worker) if size in levels else 0


def _depth(levels: list[_Level], worker: Worker) -> int:
    """Returns the number of leading blocks on ``worker``; a worker with a block has all blocks before it."""
    return bisect_left(levels, True, key=lambda level: worker not in level[0] and level[1] is not worker)
