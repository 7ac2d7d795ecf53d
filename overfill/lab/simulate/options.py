"""Options of a simulation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

from overfill.lab.simulate.profiles import Profile
from overfill.lab.traffic.outcome import Objective
from overfill.routing.policies import PolicyName
from overfill.routing.scaling import Bounds, ScalingConfig
from overfill.routing.tier import DEFAULT_TIER, Objectives

DEFAULT_OBJECTIVE = Objective(ttft=2.0, itl=0.1)

DEFAULT_POLICY = "default"
POLICY_NAMES = (DEFAULT_POLICY, *get_args(PolicyName))
"""Names of routing policies. ``default`` stands for the router's defaults, which differ by stage."""


@dataclass(frozen=True, slots=True)
class SimTier:
    """A tier: its decode workers, and the requests that ask for it.

    Attributes:
        profile: Speed of its decode workers.
        workers: Number of decode workers at the start; constant without scaling.
        max_workers: Maximum number with scaling.
        share: Weight of the requests that ask for it.
        ttft, itl: Its objectives in seconds; None means those of all requests.
    """

    name: str
    profile: Profile
    workers: int = 1
    max_workers: int | None = None
    share: float = 1.0
    ttft: float | None = None
    itl: float | None = None

    def objective(self, common: Objective) -> Objective:
        """Returns the objective of a request that asks for the tier."""
        return replace(common, ttft=self.ttft or common.ttft, itl=self.itl or common.itl)

    def objectives(self, common: Objective) -> Objectives:
        """Returns the objectives as the router has them, which are always set."""
        own, default = self.objective(common), Objectives()
        return Objectives(own.ttft or default.ttft, own.itl or default.itl)


@dataclass(frozen=True, slots=True)
class SimulationOptions:
    """Options of a simulation.

    Attributes:
        prefill, decode: Number of workers with one stage at the start; constant when ``scaling`` is None.
        colocated: Number of workers with both stages; constant.
        tiers: The tiers. Empty means one tier, of ``decode`` workers.
        brownout: Order of the tiers from the best to the cheapest. Empty means no brownout.
        brownout_share: Share of the requests that allow a brownout.
        objective: Objective of the requests, except those of tiers with their own.
        policy: One of ``POLICY_NAMES``. Decode workers are chosen by their default if it is none of theirs.
        scaling: Configuration of the scaling policy. None means no scaling.
        kv_peers: True if workers lend each other KV.
        kv_disk_size: Bytes of KV that each prefill worker may keep on disk.
        max_queue: Maximum requests in a tier's queue; further ones are refused.
        max_wait: Longest expected wait in seconds with which a request is admitted. None means no limit.
        mtbf: Mean seconds until a worker dies and is replaced. None means never.
        check: Check all counters and the *Waiting* rule after every event.
        seed: Random seed for failures, policies and the tiers of requests.
        max_misses: Stop once more requests than this have missed their objective. None means to play all.
    """

    prefill: int = 1
    decode: int = 1
    colocated: int = 0
    tiers: tuple[SimTier, ...] = ()
    brownout: tuple[str, ...] = ()
    brownout_share: float = 1.0
    objective: Objective = DEFAULT_OBJECTIVE
    policy: str = DEFAULT_POLICY
    scaling: ScalingConfig | None = None
    kv_peers: bool = True
    kv_disk_size: int = 0
    max_queue: int = 1024
    max_wait: float | None = None
    mtbf: float | None = None
    check: bool = False
    seed: int = 0
    max_misses: int | None = None

    def all_tiers(self, profile: Profile) -> dict[str, SimTier]:
        """Returns the tiers by name; without any, the only one, with decode workers of ``profile``."""
        tiers = self.tiers or (SimTier(DEFAULT_TIER, profile, self.decode),)
        return {tier.name: tier for tier in tiers}

    def scaling_of(self, tier: SimTier, config: ScalingConfig) -> ScalingConfig:
        """Returns the scaling policy's settings of one tier."""
        if not self.tiers:
            return config
        goal, model = tier.objectives(self.objective), tier.profile.decode
        bounds = config.decode if tier.max_workers is None else Bounds(config.decode.min, tier.max_workers)
        return replace(
            config, ttft=goal.ttft, itl=goal.itl, decode=bounds, step=model.cost, max_batch=model.max_num_seqs
        )
