"""Checks a pool's totals, and its policy's order, against the workers one by one. Serving code does not import it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from overfill.routing.affinity import PrefixAffinity
from overfill.routing.conditional import Conditional
from overfill.routing.index import Capacities, capacity_of
from overfill.routing.policy import Policy, PowerOfTwo, Ranked
from overfill.routing.pool import Pool
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
        case PrefixAffinity():
            _check_policy(policy._load, workers)
            _check_affinity(policy, workers)
        case PowerOfTwo():
            require(
                set(policy._workers) == set(workers) and len(policy._places) == len(policy._workers), "power of two"
            )
        case Ranked():
            order = sorted((policy.rank(worker), worker.id, worker) for worker in workers)
            require(policy._order == order, f"{type(policy).__name__}: the order differs from the workers' ranks")
        case _:
            raise AssertionError(f"no check of {type(policy).__name__}")


def _check_affinity(policy: PrefixAffinity, workers: Sequence[Worker]) -> None:
    require(policy._admissible == {worker: worker.block_size for worker in workers}, "prefix affinity: its workers")
    require(policy._block_sizes == Counter(policy._admissible.values()), "prefix affinity: its block sizes")
    for key, holders in policy._holders.items():
        on_all = holders and all(key in worker.prefix_keys for worker in holders)
        require(bool(on_all), f"block {key:x} is not on every worker listed for it")
    if (found := policy._found) is not None:
        for size, levels in found.levels.items():
            current = policy._levels_of(found.keys(size))
            require(levels == current, "prefix affinity: what it has found for the latest prompt is out of date")
        for size, known in found.holders.items():
            current_holders = list(policy._holders_of(found.levels[size]))
            require(list(known) == current_holders, "prefix affinity: the latest prompt's holders are out of date")


def require(holds: bool, what: str) -> None:
    """Raises AssertionError with ``what`` unless it ``holds``."""
    if not holds:
        raise AssertionError(what)
