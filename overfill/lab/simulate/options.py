"""Options of a simulation."""

from __future__ import annotations

from dataclasses import dataclass

from overfill.lab.traffic.outcome import Objective
from overfill.routing.scaling import ScalingConfig


@dataclass(frozen=True, slots=True)
class SimulationOptions:
    """Options of a simulation.

    Attributes:
        prefill, decode: Number of workers at the start; constant when ``scaling`` is None.
        policy: Name of a routing policy.
        scaling: Configuration of the scaling policy. None means no scaling.
        prefix_cache: True if prefill workers cache prompts' KV.
        max_queue: Maximum requests in the router's queue; further ones are refused.
        report_gap: Minimum seconds between two reports of a worker.
        mtbf: Mean seconds until a worker dies and is replaced. None means never.
        check: Check all counters and the *Waiting* rule after every event.
        seed: Random seed for failures and policies.
        objective, max_misses: Stop once more than ``max_misses`` requests have missed ``objective``.
        end_timeout: Seconds after the last arrival after which unfinished requests count as failed.
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
