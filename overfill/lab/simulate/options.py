"""Options of a simulation. Each ``option_field`` is an option of the command too."""

from __future__ import annotations

from dataclasses import dataclass, replace

import click

from overfill.cli.options import Number, option_field
from overfill.lab.simulate.profiles import Profile
from overfill.lab.traffic.outcome import Objective
from overfill.routing.scaling import Bounds, ScalingConfig
from overfill.routing.tier import DEFAULT_TIER, Objectives

DEFAULT_OBJECTIVE = Objective(ttft=2.0, itl=0.1)

_POSITIVE = Number(0, min_open=True)
_COUNT = click.IntRange(0)


def _size_in_bytes(_context: click.Context, _option: click.Parameter, text: str) -> int:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        raise click.BadParameter(f"must be a size such as 50GiB, got {text!r}") from None


@dataclass(frozen=True, slots=True)
class SimTier:
    """A tier: its decode workers, and the requests that ask for it.

    Attributes:
        profile: Speed of its decode workers.
        workers: Number of decode workers at the start; constant without scaling.
        max_workers: Maximum number with scaling.
        share: Weight of the requests that ask for it.
        objective: Objective of these requests.
    """

    name: str
    profile: Profile
    workers: int = 1
    max_workers: int | None = None
    share: float = 1.0
    objective: Objective = DEFAULT_OBJECTIVE

    @property
    def goals(self) -> Objectives:
        """The objective as the router has it: it always has both limits."""
        default = Objectives()
        return Objectives(self.objective.ttft or default.ttft, self.objective.itl or default.itl)

    def scaling(self, config: ScalingConfig) -> ScalingConfig:
        """Returns the scaling policy's settings of this tier, given those of all tiers."""
        goals, model = self.goals, self.profile.decode
        bounds = Bounds(config.decode.min, self.max_workers or config.decode.max)
        return replace(
            config, ttft=goals.ttft, itl=goals.itl, decode=bounds, step=model.cost, max_batch=model.max_num_seqs
        )


@dataclass(frozen=True, slots=True)
class SimulationOptions:
    """Options of a simulation.

    Attributes:
        tiers: The tiers. Empty means one tier, of ``decode`` workers.
        brownout: Order of the tiers from the best to the cheapest. Empty means no brownout.
        objective: Objective of the requests without ``tiers``.
        scaling: Configuration of the scaling policy, in which each tier replaces what is its own. None means that the
            numbers of workers are constant.
        seed: Random seed for failures, policies and the tiers of requests.
    """

    prefill: int = option_field(1, "Number of prefill workers; with --autoscale at the start.", _COUNT)
    decode: int = option_field(1, "Number of decode workers; with --autoscale at the start.", _COUNT)
    colocated: int = option_field(
        0, "Number of workers with both stages. With them, --prefill and --decode are 0 by default.", _COUNT
    )
    brownout_share: float = option_field(1.0, "With --brownout: share of the requests that allow it.", Number(0, 1))
    kv_peers: bool = option_field(True, "Whether workers lend each other KV of prompts.", bool)
    kv_disk_size: int = option_field(
        0,
        "KV that each prefill worker keeps on disk, such as 50GiB.",
        str,
        metavar="SIZE",
        callback=_size_in_bytes,
    )
    max_wait: float | None = option_field(
        None, "Refuse requests that would wait longer, in seconds.", _POSITIVE, otherwise="no limit"
    )
    mtbf: float | None = option_field(
        None, "Mean seconds until a worker dies and is replaced.", _POSITIVE, otherwise="never"
    )
    check: bool = option_field(
        False,
        "After every event, check all counters, and that no request waits while a worker could serve it; slow.",
        bool,
        is_flag=True,
    )
    tiers: tuple[SimTier, ...] = ()
    brownout: tuple[str, ...] = ()
    objective: Objective = DEFAULT_OBJECTIVE
    scaling: ScalingConfig | None = None
    seed: int = 0

    def all_tiers(self, profile: Profile) -> dict[str, SimTier]:
        """Returns the tiers by name; without any, the only one, with decode workers of ``profile``."""
        tiers = self.tiers or (SimTier(DEFAULT_TIER, profile, self.decode, objective=self.objective),)
        return {tier.name: tier for tier in tiers}
