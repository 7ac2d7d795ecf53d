"""Records a run: snapshots over time, and the totals of each worker."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from overfill.lab.simulate.clock import Clock
from overfill.lab.simulate.request import Counters, Snapshot
from overfill.lab.simulate.workers import SimWorker
from overfill.routing.scaling import Targets


class RunRecorder:
    """Records snapshots and adds up what the workers did.

    Attributes:
        samples: Snapshots so far.
    """

    def __init__(self, clock: Clock, workers: Mapping[str, SimWorker], counters: Counters) -> None:
        self._clock, self._workers, self._counters = clock, workers, counters
        self.samples: list[Snapshot] = []
        self._then = (0.0, 0.0, 0.0, 0)  # last snapshot: time, busy seconds of prefill and decode, arrivals

    def sample(self, waiting: int, arrived: int, targets: Targets | None, brownout: frozenset[str]) -> None:
        """Adds a snapshot. ``waiting`` requests are in the router's queue; ``arrived`` have arrived so far."""
        now, counters = self._clock.now, self._counters
        then, prefill_busy, decode_busy, before = self._then
        if self.samples and now <= then:
            return
        prefill = [worker for worker in self._workers.values() if worker.prefill is not None]
        decode = [worker for worker in self._workers.values() if worker.decode is not None]
        ready = [sum(w.ready_since is not None and not w.draining for w in pool) for pool in (prefill, decode)]
        busy = [
            counters.prefill_busy + sum(w.prefill.busy for w in prefill if w.prefill is not None),
            counters.decode_busy + sum(w.decode.busy for w in decode if w.decode is not None),
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
                # Capped: work counts when a step begins (prefill) or a phase ends (decode), outside of a short span.
                prefill_busy=min(1.0, (busy[0] - prefill_busy) / span / max(1, ready[0])),
                decode_busy=min(1.0, (busy[1] - decode_busy) / span / max(1, ready[1])),
                waiting=waiting,
                arrived=arrived - before,
                tier_workers=dict(Counter(worker.tier for worker in decode)),
                brownout=tuple(sorted(brownout)),
            )
        )
        self._then = (now, busy[0], busy[1], arrived)

    def account(self, worker: SimWorker) -> None:
        """Adds a worker's time to the totals. Call it when the worker leaves, or at the end."""
        lived, counters = self._clock.now - worker.since, self._counters
        counters.worker_seconds += lived
        if worker.prefill is not None:
            counters.prefill_worker_seconds += lived
            counters.prefill_busy += worker.prefill.busy
        if worker.decode is not None:
            counters.decode_worker_seconds += lived
            counters.decode_busy += worker.decode.busy
