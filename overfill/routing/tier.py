"""What writes answers, as the router knows it: a tier, which is one decoder, or an adapter on a tier's decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

DEFAULT_TIER = "default"
"""Name of the only tier of a stack with one pair. In other stacks, a tier of this name is the default."""

NO_FALLBACK = "none"
"""Value of a request's ``fallback`` that declines the fallback of its tier. No tier has this name."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that decode workers of a tier have loaded.

    Attributes:
        name: unique among the adapters and tiers of the stack.
        digest: identifies its weights and config.
        tier: the tier on whose decoder it works.
        tail_tokens: number of tokens at a prompt's end that the decoder computes; 0 means the generation prompt.
    """

    name: str
    digest: str
    tier: str
    tail_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TierChoice:
    """The tier of one request, and its adapter.

    Attributes:
        tier: tier that writes the answer.
        fallback: tier in which the answer goes on when that tier has no worker left; empty means none.
        brownout_from: requested tier, if ``tier`` writes the answer instead because of a brownout.
        fallback_from: requested tier, if it has no worker and ``tier`` is the one to which it falls back.
        adapter: adapter that writes the answer, on the decoder of ``tier``; None means the decoder alone.
    """

    tier: str = DEFAULT_TIER
    fallback: str = ""
    brownout_from: str = ""
    fallback_from: str = ""
    adapter: Adapter | None = None

    @property
    def writer(self) -> str:
        """Name of what writes the answer: the adapter or the tier."""
        return self.tier if self.adapter is None else self.adapter.name

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
