"""How a simulation runs."""

from __future__ import annotations

from dataclasses import dataclass

from overfill.lab.traffic.outcome import Objective
from overfill.routing.scaling import ScalingConfig


@dataclass(frozen=True, slots=True)
class Options:
    """How to run.

    Attributes:
        prefill, decode: workers at the start; all the time when ``scaling`` is None.
        policy: name of a routing policy.
        scaling: the scaling policy's configuration.
        prefix_cache: whether prefill workers keep prompts' KV.
        max_queue: most requests that wait in the router; the others are refused.
        report_gap: least seconds between two reports of a worker.
        mtbf: mean seconds until a worker dies; None: they do not. A new one starts in its place.
        check: hold the books and the *Waiting* rule after every event.
        seed: of failures.
        objective, max_misses: stop once more than ``max_misses`` requests have ended outside ``objective``.
        end_timeout: seconds after the last arrival when what has not ended has failed.
    """

    prefill: int = 1
    decode: int = 1
    policy: str = "default"
    scaling: ScalingConfig | None = None
    prefix_cache: bool = True
    max_queue: int = 1024
    report_gap: float = 0.05
    mtbf: float | None = None
    check: bool = False
    seed: int = 0
    end_timeout: float = 3600.0
    objective: Objective | None = None
    max_misses: int = 0
