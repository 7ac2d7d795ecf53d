"""Watches a run: samples over time, and what every worker did in its life."""

from __future__ import annotations

from collections.abc import Mapping

from overfill.lab.simulate.clock import Clock
from overfill.lab.simulate.request import Counters, Snapshot
from overfill.lab.simulate.workers import SimWorker
from overfill.routing.scaling import Targets
from overfill.routing.worker import PREFILL


class Observer:
    """Attributes:
    samples: so far.
    """

    def __init__(self, clock: Clock, workers: Mapping[str, SimWorker], counters: Counters) -> None:
        self._clock, self._workers, self._counters = clock, workers, counters
        self.samples: list[Snapshot] = []
        self._then = (0.0, 0.0, 0.0, 0)  # time, seconds of work of either pool, arrivals at the last sample

    def sample(self, waiting: int, arrived: int, targets: Targets | None) -> None:
        """Notes how things are; ``waiting`` requests wait in the router, ``arrived`` have come so far."""
        now, counters = self._clock.now, self._counters
        then, prefill_busy, decode_busy, before = self._then
        if self.samples and now <= then:
            return
        prefill = [worker for worker in self._workers.values() if worker.stage == PREFILL]
        decode = [worker for worker in self._workers.values() if worker.stage != PREFILL]
        ready = [sum(w.ready_since is not None and not w.draining for w in pool) for pool in (prefill, decode)]
        busy = [
            counters.prefill_busy + sum(worker.busy for worker in prefill),
            counters.decode_busy + sum(worker.busy for worker in decode),
        ]
        span = max(now - then, 1e-9)
        self.samples.append(
            Snapshot(
                time=now,
                prefill_workers=len(prefill),
                decode_workers=len(decode),
                prefill_ready=ready[0],
                decode_ready=ready[1],
                prefill_target=targets.prefill if targets else None,
                decode_target=targets.decode if targets else None,
                # Work is counted when a step begins (prefill) or a phase ends (decode): a short span may get too much.
                prefill_busy=min(1.0, (busy[0] - prefill_busy) / span / max(1, ready[0])),
                decode_busy=min(1.0, (busy[1] - decode_busy) / span / max(1, ready[1])),
                waiting=waiting,
                arrived=arrived - before,
                prefill_need=targets.prefill_pool.need if targets else None,
                decode_need=targets.decode_pool.need if targets else None,
            )
        )
        self._then = (now, busy[0], busy[1], arrived)

    def account(self, worker: SimWorker) -> None:
        """Adds what a worker did to the totals: it has left, or all is over."""
        lived, counters = self._clock.now - worker.since, self._counters
        if worker.stage == PREFILL:
            counters.prefill_worker_seconds += lived
            counters.prefill_busy += worker.busy
        else:
            counters.decode_worker_seconds += lived
            counters.decode_busy += worker.busy
