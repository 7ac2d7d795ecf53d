"""A tier as the router knows it: one decoder, its objectives, and where its answers may go on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

DEFAULT_TIER = "default"
"""Name of the only tier of a stack with one pair. In other stacks, a tier of this name is the default."""

NO_FALLBACK = "none"
"""Value of a request's ``fallback`` that declines the fallback of its tier. No tier has this name."""


@dataclass(frozen=True, slots=True)
class TierChoice:
    """The tier of one request.

    Attributes:
        tier: tier that writes the answer.
        fallback: tier in which the answer goes on when that tier has no worker left; empty means none.
        brownout_from: requested tier, if ``tier`` writes the answer instead because of a brownout.
        fallback_from: requested tier, if it has no worker and ``tier`` is the one to which it falls back.
    """

    tier: str = DEFAULT_TIER
    fallback: str = ""
    brownout_from: str = ""
    fallback_from: str = ""

    @property
    def asked(self) -> str:
        """The tier that would write the answer without a brownout."""
        return self.brownout_from or self.tier


@dataclass(frozen=True, slots=True)
class Objectives:
    """What a tier's answers should keep, in seconds: time to first token, and mean time between tokens."""

    ttft: float = 2.0
    itl: float = 0.1


@dataclass(frozen=True, slots=True)
class Tier:
    """One decoder of the full model, with its own pool of decode workers.

    Attributes:
        name: unique in the stack.
        decoder: required values of a worker's decoder, by field of ``WorkerInfo.decoder``, such as ``decoder_digest``.
            Further fields must be equal on all workers of the tier.
        fallback: tier in which an answer goes on when this tier has no worker left; empty means that it waits.
        objectives: of the tier's answers.
    """

    name: str = DEFAULT_TIER
    decoder: Mapping[str, object] = field(default_factory=dict)
    fallback: str = ""
    objectives: Objectives = field(default_factory=Objectives)
