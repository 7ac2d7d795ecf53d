"""Checks a pool's totals, and its policy's order, against the workers one by one. Serving code does not import it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from overfill.routing.conditional import Conditional
from overfill.routing.index import Capacities, capacity_of
from overfill.routing.policy import Policy, PowerOfTwo, Ranked
from overfill.routing.pool import Pool
from overfill.routing.prefix_index import NO_LEVELS, PrefixIndex, kind_of
from overfill.routing.worker import Worker


def check_pool(pool: Pool, now: float) -> None:
    """Raises AssertionError if the pool's index differs from its workers' state. Call it after ``Pool.expire``."""
    index = pool.index
    not_draining, alive, admissible = Capacities(), Capacities(), Capacities()
    present, free, rooms = 0, 0, []
    for worker in pool:
        present += worker.starting or worker.alive(now)
        capacity = capacity_of(worker)
        if not worker.draining:
            not_draining.change(capacity, 1)
        if worker.alive(now):
            alive.change(capacity, 1)
        if worker.admissible(now):
            admissible.change(capacity, 1)
            free += worker.credits_left
            rooms.append((worker.room_tokens, worker.id, worker))
    for name, ours, theirs in (
        ("not_draining", index.not_draining, not_draining),
        ("alive", index.alive, alive),
        ("admissible", index.admissible, admissible),
    ):
        require(ours._counts == theirs._counts, f"{name} workers: {ours._counts} counted, {theirs._counts} exist")
    require(index.present == present, f"{index.present} present workers counted, {present} exist")
    require(index.free_credits == free, f"{index.free_credits} credits counted, {free} exist")
    require(index._rooms == sorted(rooms), "the order by room differs from the admissible workers")
    _check_policy(pool.policy, [worker for _, _, worker in rooms])


def _check_policy(policy: Policy, workers: Sequence[Worker]) -> None:
    """Raises AssertionError unless the order of ``policy`` holds exactly ``workers``, each in its place."""
    match policy:
        case Conditional():
            colocated = [worker for worker in workers if worker.info.colocated]
            _check_policy(policy._colocated, colocated)
            _check_policy(policy._prefill_only, [worker for worker in workers if not worker.info.colocated])
            require(policy._by_process == {worker.process: worker for worker in colocated}, "workers with both stages")
        case PowerOfTwo():
            require(
                set(policy._workers) == set(workers) and len(policy._places) == len(policy._workers), "power of two"
            )
        case Ranked():
            order = sorted((policy.rank(worker), worker.id, worker) for worker in workers)
            require(policy._order == order, f"{type(policy).__name__}: the order differs from the workers' ranks")
        case _:
            raise AssertionError(f"no check of {type(policy).__name__}")


def check_prefixes(prefixes: PrefixIndex, workers: Iterable[Worker]) -> None:
    """Raises AssertionError if ``prefixes`` differs from what ``workers``, all that have joined, have reported.

    The latest prompt's look-up must be up to date, and each promise must be kept in the list by which it ends.
    """
    workers = set(workers)
    of_kind = [{worker for worker in workers if kind_of(worker) == kind} for kind in range(len(prefixes._parts))]
    promises = {(worker, key) for worker, keys in prefixes._promises for key in keys}
    require(prefixes._num_promised == sum(len(keys) for _, keys in prefixes._promises), "number of promised blocks")
    require(all(worker in workers for worker, _ in promises), "a worker that has left is to keep a promise")
    for part, here in zip(prefixes._parts, of_kind, strict=True):
        sizes = Counter(prefixes._block_sizes[worker] for worker in here if worker in prefixes._block_sizes)
        require(part.block_sizes == sizes, f"block sizes: {part.block_sizes} counted, {sizes} exist")
        for blocks, keys in ((part.memory, "prefix_keys"), (part.disk, "disk_keys")):
            listed = {(worker, key): reported for key, level in blocks.items() for worker, reported in level.items()}
            require(all(blocks.values()), "a block of no worker")
            reported = {pair for pair, is_reported in listed.items() if is_reported}
            require(reported == {(w, key) for w in here for key in getattr(w, keys)}, f"{keys} differ from the index")
            require(listed.keys() - reported <= promises, "a block is neither reported nor promised")
    if prefixes._keys is not None:
        for kind, part in enumerate(prefixes._parts):
            for size in filter(None, part.block_sizes):
                known, now = prefixes._levels.get((kind, size), NO_LEVELS), part.levels(prefixes._keys(size))
                require(known == now, "what is known of the latest prompt is out of date")


def require(holds: bool, what: str) -> None:
    """Raises AssertionError with ``what`` unless it ``holds``."""
    if not holds:
        raise AssertionError(what)
