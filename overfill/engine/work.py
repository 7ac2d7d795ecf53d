"""What the schedulers give a runner, and the runner's protocol. No torch.

Two runners take it: ``engine.runner`` computes, and ``engine.mock.runner`` waits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from overfill.engine.sequence import DecodeSequence, PrefillSequence
from overfill.errors import InternalError
from overfill.kv.store import KvStore
from overfill.model.steps import NO_HOOKS, LayerHooks, SampledToken
from overfill.v1 import common_pb2

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Scoring:
    """Known tokens of a prompt whose log-probabilities a step computes.

    Attributes:
        targets: one per scored row. These rows are the last ones of the work, before the one that is sampled.
        count: number of most likely tokens to list beside each.
        into: receives the log-probabilities.
    """

    targets: Sequence[int]
    count: int
    into: common_pb2.PromptLogprobs


@dataclass(frozen=True, slots=True)
class Work:
    """One sequence's part of a step: ``tokens`` at positions from ``start`` on; ``blocks`` hold the KV before them.

    ``blocks`` is the same list object in all steps of a sequence and only grows. Code that replaces a block must pass a
    new list. ``adapter`` is the slot of the adapter whose products are added; None adds none.
    """

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    wants_logits: bool
    scoring: Scoring | None = None
    adapter: int | None = None

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def num_scored(self) -> int:
        return 0 if self.scoring is None else len(self.scoring.targets)


Sampled: TypeAlias = PrefillSequence | DecodeSequence
"""A sequence that gets a token."""


def plain_greedy(sequence: Sampled) -> bool:
    """True if the sequence needs the most likely token of the unchanged logits and nothing else."""
    processor, sampling = sequence.processor, sequence.sampling
    changed = processor is not None and processor.needed(len(sequence.emitted))
    return sampling.greedy and not changed and sampling.logprobs is None


def always_plain(sequence: Sampled) -> bool:
    """True if ``plain_greedy`` holds for each token of the answer."""
    return sequence.processor is None and sequence.sampling.greedy and sequence.sampling.logprobs is None


def new_scoring(sequence: Sampled, targets: Sequence[int]) -> Scoring | None:
    """What a step scores of a sequence; None if nothing."""
    count = sequence.sampling.prompt_logprobs
    return None if sequence.scores is None or count is None else Scoring(targets, count, sequence.scores)


def score_error(sequence: Sampled) -> Exception | None:
    """The error of a sequence whose scores are not finite, because its logits are not."""
    if sequence.scores is None or all(map(math.isfinite, sequence.scores.logprobs)):
        return None
    return InternalError("the logits are not finite")


class Runner(Protocol):
    """A model with the KV cache that it reads and writes, as the schedulers see it.

    Attributes:
        device: where it computes; None means that it needs no torch.
        cache: its KV cache.
        token_layer_bytes: bytes of one token's keys and values in one layer.
        max_scored: maximum number of tokens that one step scores; 0 if the runner cannot score tokens.
        mixes_lengths: whether a few tokens of a sequence cost less in a step of single tokens than in their own step.
    """

    @property
    def max_scored(self) -> int: ...

    @property
    def mixes_lengths(self) -> bool: ...

    @property
    def device(self) -> torch.device | None: ...

    @property
    def cache(self) -> KvStore: ...

    @property
    def token_layer_bytes(self) -> int: ...

    def next_tokens(
        self, works: Sequence[Work], sequences: Sequence[Sampled], hooks: LayerHooks = NO_HOOKS
    ) -> tuple[list[SampledToken], dict[int, Exception]]:
        """Runs one step, scores the works' known tokens, and samples the token after each work that wants logits.

        Args:
            sequences: one per work that wants logits.

        Returns:
            The tokens; and row -> error for rows that failed, whose tokens are meaningless.
        """
        ...

    def copy_kv(
        self,
        source: Any,
        source_blocks: Sequence[int],
        blocks: Sequence[int],
        layer_map: Sequence[int],
        num_tokens: int,
        start: int,
    ) -> None:
        """Copies tokens ``start..num_tokens`` of a sequence from ``source``, a runner of the same kind.

        ``layer_map[i]`` is the source layer that is copied to layer i of this runner's cache.
        """
        ...

    def synchronize(self) -> None:
        """Waits until no earlier kernel touches the cache any more."""
        ...

    def clean_up(self, error: Exception) -> None:
        """Cleans up after a step that failed with ``error``."""
        ...
