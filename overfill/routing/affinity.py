"""Prefix affinity: a prompt goes where most of it is cached, as long as that saves more than the queue there costs."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeAlias

from overfill.routing.policy import LeastLoad, Policy, Request
from overfill.routing.worker import Worker

MAX_HOLDERS = 8
"""Workers that are looked at of all that have a prefix."""

PROMISED_BLOCKS = 64
"""Blocks of a placed prompt that its worker is expected to have before it reports them."""

MAX_PROMISES = 1 << 16
"""Keys of such blocks that are remembered."""


NUM_LEAST_LOADED = 4
"""Workers that are looked at whatever they have."""

_Level: TypeAlias = "tuple[dict[Worker, None], Worker | None]"
"""Workers that have reported a block, and the one that was sent it."""


class PrefixAffinity(Policy):
    """Least tokens ahead: those queued on the worker, and those of the prompt that its cache does not have.

    That is the bound on load: a worker whose queue is longer than the least loaded one's by more than what its cache
    saves does not get the prompt. Only blocks that are reported, or were sent there a moment ago, are known.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._load = LeastLoad(seed)
        self._admissible: set[Worker] = set()
        self._holders: dict[int, dict[Worker, None]] = {}
        self._promised: OrderedDict[int, Worker] = OrderedDict()
        self._block_size = 0

    def put(self, worker: Worker) -> None:
        # Of the whole pool: keys of different block sizes have nothing in common.
        self._block_size = worker.report.load.block_size if worker.report else self._block_size
        self._admissible.add(worker)
        self._load.put(worker)

    def drop(self, worker: Worker) -> None:
        self._admissible.discard(worker)
        self._load.drop(worker)

    def keys_changed(self, worker: Worker, added: Iterable[int], removed: Iterable[int]) -> None:
        for key in removed:
            if (holders := self._holders.get(key)) is not None:
                holders.pop(worker, None)
                if not holders:
                    del self._holders[key]
            self._keep(key, worker)
        for key in added:
            self._holders.setdefault(key, {})[worker] = None
            self._keep(key, worker)

    def best(self, request: Request) -> Iterator[Worker]:
        preferred: list[Worker] = []
        if levels := self._levels(request):
            size = self._block_size
            ahead = {w: w.queued_tokens - size * _depth(levels, w) for w in self._choices(request, levels)}
            preferred = sorted(ahead, key=lambda w: (ahead[w], LeastLoad.key(w), w.id))
        yield from preferred
        yield from (worker for worker in self._load.best(request) if worker not in preferred)

    def placed(self, request: Request, worker: Worker) -> int:
        cached = self._block_size * _depth(self._levels(request), worker)
        if request.block_keys is not None and self._block_size:
            for key in islice(request.block_keys(self._block_size), PROMISED_BLOCKS):
                if worker not in self._holders.get(key, ()):
                    self._promised[key] = worker
                    self._promised.move_to_end(key)
        while len(self._promised) > MAX_PROMISES:
            self._promised.popitem(last=False)
        return min(cached, request.prompt_tokens - 1)

    def check(self, workers: Sequence[Worker]) -> None:
        self._load.check(workers)
        if self._admissible != set(workers):
            raise AssertionError("prefix affinity: the workers are not the admissible ones")
        for key, holders in self._holders.items():
            if not holders or any(key not in worker.prefix_keys for worker in holders):
                raise AssertionError(f"block {key:x} is not where it is thought to be")

    def _keep(self, key: int, worker: Worker) -> None:
        """The worker has said whether it has the block."""
        if self._promised.get(key) is worker:
            del self._promised[key]

    def _levels(self, request: Request) -> list[_Level]:
        """Who has the first block, the first two blocks and so on, as far as anybody has."""
        levels: list[_Level] = []
        if request.block_keys is not None and self._block_size:
            for key in request.block_keys(self._block_size):
                holders, promised = self._holders.get(key, {}), self._promised.get(key)
                if not holders and promised is None:
                    break
                levels.append((holders, promised))
        return levels

    def _choices(self, request: Request, levels: list[_Level]) -> dict[Worker, None]:
        """Some of those that have most of the prompt, and some of the least loaded."""
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
        return found | dict.fromkeys(islice(self._load.best(request), NUM_LEAST_LOADED))


def _depth(levels: list[_Level], worker: Worker) -> int:
    """Blocks that ``worker`` has; who has a block has those before it."""
    return bisect_left(levels, True, key=lambda level: worker not in level[0] and level[1] is not worker)
