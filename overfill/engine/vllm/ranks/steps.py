"""What a worker's scheduler and its ranks tell each other about each step, through vLLM's connector metadata."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from overfill.errors import InternalError
from overfill.model.steps import SampledToken
from overfill.request.params import SamplingParams


@dataclass(frozen=True, slots=True)
class RowSpec:
    """What a rank needs to choose a request's tokens, beside the tokens that vLLM tells it.

    Attributes:
        sample_index: number of the answer among the request's answers.
        num_prompt: length of the prompt; vLLM's prompt also has the tokens of the answer that were known before.
        processor: key of the answer's processor in the ranks; empty means none.
    """

    sampling: SamplingParams
    sample_index: int
    num_prompt: int
    processor: str = ""


@dataclass(frozen=True, slots=True)
class RankChunk:
    """A prompt's part of a step, on a prefill worker.

    Attributes:
        num_tokens: its tokens in the step.
        token_end: after the step, the blocks hold the positions below this.
        first_block: index of the first of ``blocks`` in the prompt.
        blocks: blocks that the prompt has got for this step.
    """

    id: str
    num_tokens: int
    token_end: int
    first_block: int
    blocks: Sequence[int]


@dataclass(frozen=True, slots=True)
class RankStep(KVConnectorMetadata):  # type: ignore[misc]
    """A step, as the ranks see it.

    Attributes:
        unsampled: requests that get no token.
    """

    chunks: Sequence[RankChunk] = ()
    unsampled: frozenset[str] = frozenset()


@dataclass(slots=True)
class RankExtras(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What a rank says of a step's tokens besides their ids. vLLM takes the object before the rank fills it.

    Attributes:
        details: request -> its token with log-probabilities, where it wants them; from rank 0 alone.
        errors: request -> why its token is void; from any rank.
    """

    details: dict[str, SampledToken] = field(default_factory=dict)
    errors: dict[str, Exception] = field(default_factory=dict)

    def aggregate(self, other: RankExtras) -> RankExtras:
        return RankExtras(self.details | other.details, other.errors | self.errors)


def portable(error: Exception) -> Exception:
    """The error, or one with its words if it does not survive the way to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return InternalError(str(error))
    return error
