"""A request inside an engine, and the messages and events that engines exchange with their servicers.

All engines count tokens in the same way: *prompt* (given), *emitted* (sampled so far), *computed* (their KV is in
the sequence's blocks) and *scheduled* (part of the running step).
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeAlias

from overfill.errors import InternalError, InvalidRequest, StepFailed
from overfill.kv.keys import PromptBlocks
from overfill.kv.store import DeviceEvent
from overfill.model.adapter import LoraAdapter
from overfill.model.steps import SampledToken
from overfill.request.params import SamplingParams
from overfill.v1 import common_pb2

Processor: TypeAlias = Any
"""What an engine keeps for the sampling of one answer, as ``ServedHalf.new_processor`` makes it: penalties, bias and
grammar, or the script that a mock engine plays."""


class FinishReason(enum.Enum):
    """Reason for which a sequence ended."""

    STOP = common_pb2.FINISH_REASON_STOP
    LENGTH = common_pb2.FINISH_REASON_LENGTH


@dataclass(frozen=True, slots=True)
class StopRule:
    """Rule that decides after each token whether the sequence ends; it applies from the first token on.

    Attributes:
        stop_ids: token ids that end the sequence; they are not emitted.
        max_tokens: maximum number of emitted tokens, including those of earlier attempts.
    """

    stop_ids: frozenset[int]
    max_tokens: int

    @classmethod
    def of(cls, sampling: SamplingParams, eos_ids: Sequence[int], max_answer: int) -> StopRule:
        """The rule of a request; the context has space for an answer of ``max_answer`` tokens."""
        limit = max_answer if sampling.max_tokens is None else min(max_answer, sampling.max_tokens)
        return cls(sampling.end_ids(eos_ids), limit)

    def judge(self, token: int, emitted_before: int) -> tuple[bool, FinishReason | None]:
        """Judges ``token``, sampled after ``emitted_before`` others.

        Returns:
            True if the token is emitted; and the reason for which the sequence ends, or None if it continues.
        """
        if token in self.stop_ids:
            return False, FinishReason.STOP
        return True, FinishReason.LENGTH if emitted_before + 1 >= self.max_tokens else None


# Messages to a prefill engine ------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class PrefillSequence:
    """A prompt in a prefill engine. Any thread may set ``cancelled``; only the engine's thread touches the rest.

    Attributes:
        sample_index: number of the answer among the request's answers.
        cache_namespace: tenant whose cached prefixes the prompt may share.
        prompt_blocks: block hashes of ``prompt`` in ``cache_namespace``. None means that the engine's thread hashes.
        trace: whether the engine emits ``LayerStarted`` for this prompt.
        cached_tokens: prompt tokens whose KV was found in the prefix cache.
        computed: prompt tokens whose KV is in ``blocks``.
        scores: receives the log-probabilities of the prompt's tokens; None if they are not asked for.
        follower: token behind ``prompt`` that alone is scored; None scores the tokens of ``prompt``.
        submitted: when the engine took the prompt, on the clock of ``time.monotonic``.
        imports: whether the servicer may import KV that the prefix cache lacks: the engine then emits
            ``AwaitingImport``, once, and waits for ``Imported`` before it computes the prompt. False from then on.
    """

    id: str
    prompt: list[int]
    sampling: SamplingParams
    sample_index: int = 0
    sample_first_token: bool = True
    processor: Processor | None = None
    cache_namespace: str = ""
    prompt_blocks: PromptBlocks | None = None
    trace: bool = False
    cancelled: bool = False
    cached_tokens: int = 0
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    scores: common_pb2.PromptLogprobs | None = None
    follower: int | None = None
    submitted: float = 0.0
    imports: bool = False

    @property
    def emitted(self) -> Sequence[int]:
        """The answer so far: none, because a prompt is computed before it."""
        return ()

    @property
    def sampled_position(self) -> int:
        """Position of the next sampled token."""
        return len(self.prompt)

    @property
    def scores_all(self) -> bool:
        """True if the logits of every token of the prompt are needed, so that none can come from the prefix cache."""
        return self.scores is not None and self.follower is None

    @property
    def remaining(self) -> int:
        """Number of prompt tokens that are not computed."""
        return len(self.prompt) - self.computed


@dataclass(frozen=True, slots=True)
class Submit:
    """Asks the engine to compute a prompt and to keep its KV until ``Release``."""

    sequence: PrefillSequence


@dataclass(frozen=True, slots=True)
class Release:
    """Asks the engine to drop a sequence in any state. The sender has joined every stream that uses its blocks."""

    id: str


@dataclass(frozen=True, slots=True)
class PrefillHere:
    """Asks a worker with both stages to compute a prompt for the decode sequence ``into`` of the same worker.

    The engine copies the prompt's KV, except for the first ``held_tokens`` tokens, into the blocks of ``into``. Then it
    frees the prompt's blocks and emits ``PromptComputed``. If ``into`` does not wait for this KV any more, the engine
    copies and emits nothing.

    Attributes:
        sequence: the prompt, with an id of its own.
        held_tokens: as in ``Reserved``.
    """

    sequence: PrefillSequence
    into: str
    held_tokens: int


@dataclass(frozen=True, slots=True)
class Imported:
    """Answers ``AwaitingImport``: the blocks hold the KV of the prompt's first ``tokens`` tokens, and nothing writes.

    ``tokens`` is a multiple of the block size, at least the event's ``cached_tokens``, and less than the prompt's
    length. The engine publishes these blocks and computes the rest.
    """

    id: str
    tokens: int


# Messages to and events of both kinds of engines -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lend:
    """Asks for a reference on the cached blocks with the prompt's beginning, until ``Release``. Answered by ``Lent``.

    Nothing is computed or allocated, and the engine does not queue: it answers between two layers of a running step.

    Attributes:
        to_peer: whether another worker decides when the loan ends. Such loans leave blocks to sequences.
    """

    id: str
    prompt: PromptBlocks
    to_peer: bool = False


@dataclass(frozen=True, slots=True)
class Lent:
    """Once ``event`` has passed, ``blocks`` hold the KV of the prompt's first ``tokens`` tokens; 0 if none is cached.

    The blocks are only read until ``Release``, which follows in any case.
    """

    id: str
    blocks: list[int]
    tokens: int
    event: DeviceEvent | None


# Events of a prefill engine --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PrefillScheduled:
    """The prompt has its blocks, and its first chunk starts now.

    Once ``event`` has passed, the blocks hold the KV of the first ``cached_tokens`` tokens.
    """

    id: str
    blocks: list[int]
    cached_tokens: int
    event: DeviceEvent | None
    time_ns: int


@dataclass(frozen=True, slots=True)
class AwaitingImport:
    """The prompt has its blocks, and may be computed after ``Imported``. It comes before ``PrefillScheduled``.

    The blocks hold the KV of the first ``cached_tokens`` tokens, from the prefix cache, which nothing may write. The
    servicer may write the others, until it sends ``Imported`` or has joined its writers and sends ``Release``.
    """

    id: str
    blocks: list[int]
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class LayerStarted:
    """The step of this prompt, which has a trace, has reached ``layer``."""

    id: str
    layer: int
    time_ns: int


@dataclass(frozen=True, slots=True)
class KvWritten:
    """Once ``event`` has passed, the blocks hold the KV of ``layers`` of all positions below ``token_end``."""

    id: str
    layers: range
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
    """The whole prompt is computed; ``first`` is the full model's token, or None if none was requested.

    ``scores`` are the log-probabilities of the prompt's tokens, or None if none were requested.
    """

    id: str
    first: SampledToken | None
    time_ns: int
    scores: common_pb2.PromptLogprobs | None = None


@dataclass(frozen=True, slots=True)
class SequenceFailed:
    """The step that computed this sequence failed.

    Attributes:
        ends_engine: whether the failure ends the engine, and with it the worker.
    """

    id: str
    error: Exception
    ends_engine: bool = False

    def raise_for(self, stage: str) -> NoReturn:
        """Raises the error of the request: StepFailed if the engine has ended, ``error`` if the request is invalid.

        Every worker would fail an invalid request. Any other error becomes an InternalError.
        """
        if self.ends_engine:
            raise StepFailed(f"{stage} failed and ended its worker: {self.error}") from self.error
        if isinstance(self.error, InvalidRequest):
            raise self.error
        raise InternalError(f"{stage} failed: {self.error}") from self.error


PrefillEvent = (
    AwaitingImport
    | Lent
    | PrefillScheduled
    | LayerStarted
    | KvWritten
    | ChunkComputed
    | PromptComputed
    | SequenceFailed
)


# Messages to a decode engine -------------------------------------------------------------------------------------


class DecodeState(enum.Enum):
    """State of a sequence's KV; it decides who may touch the blocks."""

    RECEIVING = enum.auto()  # the receiver writes the prompt's KV into the blocks
    RUNNING = enum.auto()  # the engine reads and writes the blocks
    YIELDING = enum.auto()  # chosen for preemption; waits until the receiver no longer uses the blocks
    PREEMPTED = enum.auto()  # has no blocks and waits for new ones


@dataclass(slots=True, eq=False)
class DecodeSequence:
    """A sequence in a decode engine.

    Attributes:
        sample_index: number of the answer among the request's answers.
        cache_namespace: tenant and KV codec (``kv.keys.codec_namespace``); the sequence shares cached prefixes with
            sequences of the same ones.
        prompt_blocks: block hashes of the first ``num_shared`` tokens in ``cache_namespace``. None means that the
            engine's thread hashes.
        answer_start: index of the first prompt token that the decoder computes; None means the prompt's length.
        adapter: slot of the adapter that writes the answer; None means the decoder alone.
        scores: receives the log-probabilities of the prompt's tokens behind ``answer_start``; None without scores.
        failed: True after a step of the sequence failed; the engine does not schedule it again.
        computed: tokens of prompt and answer whose KV is in ``blocks``.
    """

    id: str
    prompt: list[int]
    emitted: list[int]
    sampling: SamplingParams
    stop: StopRule
    sample_index: int = 0
    processor: Processor | None = None
    cache_namespace: str = ""
    prompt_blocks: PromptBlocks | None = None
    answer_start: int | None = None
    adapter: int | None = None
    scores: common_pb2.PromptLogprobs | None = None
    state: DecodeState = DecodeState.RECEIVING
    failed: bool = False
    computed: int = 0
    blocks: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.emitted)

    @property
    def sampled_position(self) -> int:
        """Position of the next sampled token."""
        return self.num_tokens

    @property
    def num_shared(self) -> int:
        """Number of leading prompt tokens whose KV is the full model's."""
        return len(self.prompt) if self.answer_start is None else self.answer_start

    @property
    def needs_only_kv(self) -> bool:
        """Whether nothing but KV is needed of the full model: neither the first token nor scores of the prompt."""
        return self.answer_start is not None and self.scores is None

    @property
    def num_pending(self) -> int:
        """Number of tokens in ``pending``, without a copy of a long prompt's."""
        return self.num_tokens - self.computed

    def pending(self) -> list[int]:
        """Known tokens whose KV is not computed: one in a normal step, all of the decoder's in a replay."""
        return self.tokens_from(self.computed)

    def tokens_from(self, start: int) -> list[int]:
        """Known tokens from position ``start`` on."""
        own = start - len(self.prompt)
        return self.emitted[own:] if own >= 0 else [*self.prompt[own:], *self.emitted]


@dataclass(frozen=True, slots=True)
class Reserve:
    """Asks for blocks for prompt + emitted + 1 tokens; the engine answers ``Reserved`` or ``Refused``."""

    sequence: DecodeSequence


@dataclass(frozen=True, slots=True)
class Start:
    """Tells the engine that the prompt's KV is complete, so that the sequence can run.

    ``first`` is the full model's token, the answer's first. The engine ignores it if the sequence has emitted tokens.
    """

    id: str
    first: int | None


@dataclass(frozen=True, slots=True)
class Share:
    """Tells the engine that the KV of a sequence's shared prompt is complete, and that others wait for it.

    Sent before ``Start``. The engine publishes the prompt in the prefix cache. For each follower that still receives,
    it answers ``Reserved``, with cached blocks in place of the follower's own, which nothing has written.

    Attributes:
        id: the sequence; empty if its prompt is published already.
    """

    id: str
    followers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Yielded:
    """Answers ``Preempted``: no stream uses the sequence's blocks any more."""

    id: str


@dataclass(frozen=True, slots=True)
class ChangeAdapter:
    """Asks for an adapter in a slot that no sequence uses; the engine answers ``AdapterChanged``.

    Attributes:
        adapter: the adapter, which ``AdapterSlots.stage`` has prepared; None empties the slot.
    """

    slot: int
    adapter: LoraAdapter | None


# Events of a decode engine ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reserved:
    """The sequence has (new) blocks; the receiver must fetch the prompt's KV except for ``held_tokens`` tokens.

    The blocks hold the KV of the first ``held_tokens`` tokens already.
    """

    id: str
    blocks: list[int]
    held_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Refused:
    """The engine has no capacity for the sequence now."""

    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Preempted:
    """The engine takes the sequence's blocks back: the servicer joins its streams, then sends ``Yielded``."""

    id: str


@dataclass(slots=True)
class TokenSampled:
    """One sequence's part of ``StepSampled``. ``token`` is None when a stop id ended the sequence.

    ``scores``, with the first token, are those of the prompt's tokens if the sequence asks for them.
    """

    id: str
    index: int
    token: SampledToken | None
    finish: FinishReason | None
    step_started_ns: int
    scores: common_pb2.PromptLogprobs | None = None


@dataclass(slots=True)
class StepSampled:
    """A step has sampled one token for each of these sequences.

    There is one event per step, because the engine's thread has no time for an object per token.

    Attributes:
        ids: the sequences.
        indices: index of each token in its answer.
        token_ids: the tokens. One that ends its sequence for ``FinishReason.STOP`` is not emitted.
        finishes: why sequences have ended, by id.
        details: tokens with log-probabilities, by id.
        scores: log-probabilities of prompts whose first token is among these, by id.
    """

    step_started_ns: int
    ids: list[str] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finishes: dict[str, FinishReason] = field(default_factory=dict)
    details: dict[str, SampledToken] = field(default_factory=dict)
    scores: dict[str, common_pb2.PromptLogprobs] = field(default_factory=dict)

    def take(self, sequence: DecodeSequence, token: int) -> bool:
        """Adds the step's token to ``sequence``, all of whose known tokens are computed. Returns whether it ends."""
        id, index = sequence.id, len(sequence.emitted)
        sequence.computed = sequence.num_tokens
        emitted, finish = sequence.stop.judge(token, index)
        if emitted:
            sequence.emitted.append(token)
        self.ids.append(id)
        self.indices.append(index)
        self.token_ids.append(token)
        if finish is None:
            return False
        self.finishes[id] = finish
        return True

    @property
    def not_plain(self) -> set[str]:
        """The sequences of which the step tells more than a token."""
        return self.finishes.keys() | self.details.keys() | self.scores.keys()

    def part(self, row: int) -> TokenSampled:
        """The part of one sequence."""
        id, token_id = self.ids[row], self.token_ids[row]
        finish = self.finishes.get(id)
        token = None if finish is FinishReason.STOP else self.details.get(id) or SampledToken(token_id)
        return TokenSampled(id, self.indices[row], token, finish, self.step_started_ns, self.scores.get(id))

    def by_sequence(self) -> Iterator[TokenSampled]:
        """Each sequence's part."""
        return map(self.part, range(len(self.ids)))


@dataclass(frozen=True, slots=True)
class AdapterChanged:
    """Sequences may use the slot's adapter from now on; or ``error`` says why the slot is empty."""

    slot: int
    error: Exception | None = None


DecodeEvent = Lent | Reserved | Refused | Preempted | StepSampled | SequenceFailed | AdapterChanged
SequenceEvent = Reserved | Refused | Preempted | TokenSampled | SequenceFailed
"""What a decode engine tells of one sequence."""
