"""One request inside an engine, and the messages by which engines are reached.

Token counts, used everywhere: *prompt* (given), *emitted* (sampled so far), *computed* (KV in our blocks),
*scheduled* (being computed in the running step).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from overfill.kv.keys import PromptBlocks
from overfill.kv.tensors import DeviceEvent
from overfill.model.processors import LogitProcessor
from overfill.model.sampling import SampledToken
from overfill.request.params import SamplingParams
from overfill.v1 import common_pb2


class FinishReason(enum.Enum):
    """Why a sequence ended."""

    STOP = common_pb2.FINISH_REASON_STOP
    LENGTH = common_pb2.FINISH_REASON_LENGTH


@dataclass(frozen=True, slots=True)
class StopRule:
    """When a sequence ends, token by token; holds from the first token on.

    Attributes:
        stop_ids: end the sequence and are not emitted.
        max_tokens: most tokens emitted, earlier attempts included.
    """

    stop_ids: frozenset[int]
    max_tokens: int

    @classmethod
    def of(cls, sampling: SamplingParams, eos_ids: Sequence[int], room: int) -> StopRule:
        """``room``: tokens that the context leaves for the answer."""
        limit = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
        return cls(sampling.end_ids(eos_ids), limit)

    def judge(self, token: int, emitted_before: int) -> tuple[bool, FinishReason | None]:
        """Whether ``token``, sampled after ``emitted_before`` others, is emitted, and whether the sequence ends."""
        if token in self.stop_ids:
            return False, FinishReason.STOP
        return True, FinishReason.LENGTH if emitted_before + 1 >= self.max_tokens else None


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """A snapshot of an engine, taken between steps.

    Attributes:
        blocks_reserved: of those used, blocks of prompts whose KV is not all there.
        blocks_leaked: neither free nor anybody's; a fault, after which the worker ends itself.
    """

    blocks_used: int
    blocks_total: int
    running: int
    waiting: int
    queued_tokens: int = 0
    blocks_cached: int = 0
    prefix_tokens_looked_up: int = 0
    prefix_tokens_found: int = 0
    blocks_reserved: int = 0
    blocks_leaked: int = 0

    def roomier_than(self, other: EngineLoad) -> bool:
        """Whether something has ended since ``other``, or fits that did not."""
        ended = self.running + self.waiting < other.running + other.waiting
        return ended or self.blocks_used < other.blocks_used


# Messages to a prefill engine ------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class PrefillSequence:
    """A prompt in a prefill engine. ``cancelled`` may be set from any thread; everything else is the engine's.

    Attributes:
        cache_namespace: the prompt shares prefixes with prompts of the same namespace only.
        prompt_blocks: of ``prompt`` and ``cache_namespace``; None: the engine hashes the prompt on its own thread.
        cached_tokens: of the prompt, found in the prefix cache.
    """

    id: str
    prompt: list[int]
    sampling: SamplingParams
    sample_index: int = 0
    sample_first_token: bool = True
    processor: LogitProcessor | None = None
    cache_namespace: str = ""
    prompt_blocks: PromptBlocks | None = None
    cancelled: bool = False
    cached_tokens: int = 0
    computed: int = 0
    blocks: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Submit:
    """Compute this prompt; its KV stays until ``Release``."""

    sequence: PrefillSequence


@dataclass(frozen=True, slots=True)
class Release:
    """Forget a sequence, wherever it is; every stream on its blocks has been joined."""

    id: str


# Events of a prefill engine --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PrefillScheduled:
    """The prompt has its blocks and the first chunk starts now.

    The KV of its first ``cached_tokens`` tokens is in them once ``event`` has passed.
    """

    id: str
    blocks: list[int]
    cached_tokens: int
    event: DeviceEvent | None
    time_ns: int


@dataclass(frozen=True, slots=True)
class LayerStarted:
    id: str
    layer: int
    time_ns: int


@dataclass(frozen=True, slots=True)
class KvWritten:
    """Positions below ``token_end`` of ``layer`` are in the cache once ``event`` has passed."""

    id: str
    layer: int
    token_end: int
    event: DeviceEvent | None


@dataclass(frozen=True, slots=True)
class ChunkComputed:
    """Prompt positions ``token_start..token_end`` have passed the last layer."""

    id: str
    token_start: int
    token_end: int


@dataclass(frozen=True, slots=True)
class PromptComputed:
    """The whole prompt is computed; ``first`` is the full model's token, if one was wanted."""

    id: str
    first: SampledToken | None
    time_ns: int


@dataclass(frozen=True, slots=True)
class SequenceFailed:
    """The step that computed this sequence failed; the engine goes on."""

    id: str
    error: Exception


PrefillEvent = PrefillScheduled | LayerStarted | KvWritten | ChunkComputed | PromptComputed | SequenceFailed


# Messages to a decode engine -------------------------------------------------------------------------------------


class DecodeState(enum.Enum):
    """Where a sequence's KV is, and so who may touch its blocks."""

    RECEIVING = enum.auto()  # prompt KV on its way into our blocks; written by the receiver
    RUNNING = enum.auto()  # computed by the engine
    YIELDING = enum.auto()  # chosen to lose its blocks; waits for the receiver to let go of them
    PREEMPTED = enum.auto()  # has no blocks; waits for new ones


@dataclass(slots=True, eq=False)
class DecodeSequence:
    """A sequence in a decode engine. ``computed`` counts tokens (prompt and answer) whose KV is in our blocks.

    Attributes:
        cache_namespace: tenant and codec of the KV; prompts of one namespace share prefixes.
        prompt_blocks: of ``prompt`` and ``cache_namespace``; None: the engine hashes the prompt on its own thread.
    """

    id: str
    prompt: list[int]
    emitted: list[int]
    sampling: SamplingParams
    stop: StopRule
    sample_index: int = 0
    processor: LogitProcessor | None = None
    cache_namespace: str = ""
    prompt_blocks: PromptBlocks | None = None
    state: DecodeState = DecodeState.RECEIVING
    failed: bool = False
    computed: int = 0
    blocks: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.emitted)

    def pending(self) -> list[int]:
        """Known tokens whose KV is not computed: one in a normal step, all emitted ones in a replay."""
        return self.emitted[self.computed - len(self.prompt) :]


@dataclass(frozen=True, slots=True)
class Reserve:
    """Acquire blocks for prompt + emitted + 1 tokens; answered by ``Reserved`` or ``Refused``."""

    sequence: DecodeSequence


@dataclass(frozen=True, slots=True)
class Start:
    """The prompt's KV is in place: go on.

    ``first`` is the full model's token, the answer's first; None, or ignored, when the sequence has emitted tokens.
    """

    id: str
    first: int | None


@dataclass(frozen=True, slots=True)
class Yielded:
    """Answer to ``Preempted``: no stream touches the sequence's blocks any more."""

    id: str


# Events of a decode engine ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reserved:
    """The sequence has blocks (again); its prompt's KV is wanted in them, but for the first ``held_tokens`` tokens."""

    id: str
    blocks: list[int]
    held_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Refused:
    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Preempted:
    """The sequence must give its blocks back: stop and join its streams, then send ``Yielded``."""

    id: str


@dataclass(frozen=True, slots=True)
class TokenSampled:
    """A token of the answer. ``token`` is None when a stop id ended the sequence."""

    id: str
    index: int
    token: SampledToken | None
    finish: FinishReason | None
    step_started_ns: int


DecodeEvent = Reserved | Refused | Preempted | TokenSampled | SequenceFailed
