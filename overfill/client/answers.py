"""Builds deltas and an answer from the messages of a stream, and checks the index of every token. No I/O."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from overfill.client.requests import AnswerIdentity, Message, ToolCall
from overfill.errors import InternalError, OverfillError, Produced
from overfill.request.names import CODEC_NAMES, FINISH_REASONS, TTFT_PARTS, FinishReason
from overfill.v1 import common_pb2, inference_pb2, kv_pb2

E = TypeVar("E", bound=OverfillError)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities under softmax(logits), before temperature and filters.

    Attributes:
        logprob: Log-probability of the token, which was chosen or is part of the prompt.
        top: Pairs (token id, log-probability) of the most likely tokens, the most likely first.
        rank: Of a prompt's token: its rank among all token ids; 1 means that none is more likely. None in an answer.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    """The router's reply when it accepts a request.

    Attributes:
        request_id: Id of the request.
        prompt_tokens: Number of tokens in the prompt.
        seed: Seed in use.
        model: Name of the model.
        max_tokens: Maximum number of tokens in the answer, in use.
        tier: Tier that will write the answer.
        brownout_from: Requested tier, if it is overloaded and ``tier`` writes the answer instead; otherwise None.
        identity: What the answer depends on; a request that resumes it needs this.
    """

    request_id: str
    prompt_tokens: int
    seed: int
    model: str
    max_tokens: int
    tier: str = ""
    brownout_from: str | None = None
    identity: AnswerIdentity = field(default_factory=AnswerIdentity)


@dataclass(frozen=True, slots=True)
class AnswerPart:
    """Part of an answer that one tier wrote. It ends where the next part begins.

    Attributes:
        tier: Name of the tier.
        first_index: Index of the part's first token in the answer, from 0.
    """

    tier: str
    first_index: int


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A part of a tool call of an answer.

    Attributes:
        index: Number of the call in the answer, from 0.
        id: Id of the call; empty except in its first part.
        name: Name of the tool; empty except in the call's first part.
        arguments: Next piece of the arguments' JSON text.
    """

    index: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of an answer.

    Attributes:
        first_index: Index of ``token_ids[0]`` in the answer.
        token_ids: New tokens; empty if the router only releases text that it held back.
        text: New text; empty while a character or a possible stop string is incomplete.
        logprobs: One entry per token; None means that the request did not ask for them.
        tool_calls: New parts of tool calls; ``text`` does not include them.
        parts: Parts of the answer that begin with one of ``token_ids``, because another tier continues the answer.
        prompt_logprobs: In the first delta, if the request asks for it: as ``Answer.prompt_logprobs``.
        reasoning: New text of what the model thinks before it answers; ``text`` does not include it.
    """

    first_index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] | None
    tool_calls: tuple[ToolCallDelta, ...] = ()
    parts: tuple[AnswerPart, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    reasoning: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request.

    Attributes:
        prompt_tokens: Number of tokens in the prompt.
        completion_tokens: Number of tokens in the answer, those of ``resume_token_ids`` included.
        cached_tokens: Number of prompt tokens that the full model did not compute when the prompt was first computed.
        reasoning_tokens: Number of tokens of the answer with which the model thought; part of ``completion_tokens``.
        peer_tokens: Part of ``cached_tokens`` that the prefill worker took from another worker. Unknown, and therefore
            0, after another router has finished the answer.
        disk_tokens: Part of ``cached_tokens`` that the prefill worker read from disk; 0 likewise.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int = 0
    peer_tokens: int = 0
    disk_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """Durations of the parts of one request, in seconds; None means unknown.

    Each part is measured on one host's monotonic clock; none is computed as a remainder.

    Attributes:
        ttft: From the request's arrival at the router until it writes the first token to the client's stream.
        router_queue: In the router: validation, tokenization, queue, and waiting for workers of both stages.
        decode_reservation: From the decode worker's receipt of the request until it has reserved blocks.
        prefill_queue: From the prefill worker's receipt of the prompt until it schedules the first chunk.
        prefill_compute: From then until the prefill worker has sampled the first token, or computed the prompt.
        handoff: Only if the decoder samples the first token: from the news on the decode worker that the prompt is
            computed until its KV is in place.
        first_step: Likewise: from then until the decoder has sampled the first token.
        return_path: Time of the first token inside each process on its way to the client.
        handoff_exposed: From the decode worker's receipt of the first token to its first decode step.
        decode: From the first decode step to the last token, on the last decode worker.
        total: From the request's arrival at the router until the answer ended.
    """

    ttft: float | None = None
    router_queue: float | None = None
    decode_reservation: float | None = None
    prefill_queue: float | None = None
    prefill_compute: float | None = None
    handoff: float | None = None
    first_step: float | None = None
    return_path: float | None = None
    handoff_exposed: float | None = None
    decode: float | None = None
    total: float | None = None

    @property
    def unattributed(self) -> float | None:
        """``ttft`` minus the known parts in ``TTFT_PARTS``; this includes time on the network. None means unknown."""
        if self.ttft is None:
            return None
        return self.ttft - sum(getattr(self, part) or 0.0 for part in TTFT_PARTS)

    @classmethod
    def from_proto(cls, message: common_pb2.Timing) -> Timing:
        def seconds(name: Any) -> float | None:
            return getattr(message, name) / 1e9 if message.HasField(name) else None

        return cls(**{f.name: seconds(f"{f.name}_ns") for f in fields(cls)})


@dataclass(frozen=True, slots=True)
class PrefillTrace:
    """A handoff as the prefill worker saw it, in seconds on its clock since it scheduled the first chunk.

    Attributes:
        layer_start: Start of each full-model layer in the prompt's last chunk, by layer.
        layer_end: End of each full-model layer in the prompt's last chunk, by layer.
        first_kv_sent: First KV chunk passed to the transport.
        last_kv_sent: Last KV chunk passed to the transport.
        first_token_sent: First token passed to the transport.
        last_ack: Every range acknowledged.
    """

    layer_start: tuple[float, ...]
    layer_end: tuple[float, ...]
    first_kv_sent: float
    last_kv_sent: float
    first_token_sent: float
    last_ack: float

    @classmethod
    def from_proto(cls, message: kv_pb2.PrefillTrace) -> PrefillTrace:
        return cls(
            layer_start=tuple(ns / 1e9 for ns in message.layer_start_ns),
            layer_end=tuple(ns / 1e9 for ns in message.layer_end_ns),
            first_kv_sent=message.first_kv_sent_ns / 1e9,
            last_kv_sent=message.last_kv_sent_ns / 1e9,
            first_token_sent=message.first_token_sent_ns / 1e9,
            last_ack=message.last_ack_ns / 1e9,
        )


@dataclass(frozen=True, slots=True)
class Trace:
    """One handoff as the decode worker saw it. Times are seconds on its clock since it asked for the handoff.

    Attributes:
        first_token_received: First token received.
        first_kv_received: First KV chunk written to the cache.
        last_kv_received: Last KV chunk written to the cache.
        kv_bytes: Bytes of payloads and scales received.
        kv_chunks: Number of chunks received.
        broken_streams: Number of data streams that delivered a wrong chunk, or too few, and were restarted.
        cached_tokens: Number of prompt tokens whose KV the prefill worker did not compute.
        held_tokens: Number of prompt tokens whose KV did not travel, because the decode worker held it already.
        prefill: The same handoff as the prefill worker saw it.
        peer_tokens: Part of ``cached_tokens`` that the prefill worker took from another worker.
        disk_tokens: Part of ``cached_tokens`` that the prefill worker read from disk.
    """

    first_token_received: float
    first_kv_received: float
    last_kv_received: float
    kv_bytes: int
    kv_chunks: int
    broken_streams: int
    cached_tokens: int
    held_tokens: int
    prefill: PrefillTrace
    peer_tokens: int = 0
    disk_tokens: int = 0

    @classmethod
    def from_proto(cls, message: kv_pb2.HandoffTrace) -> Trace:
        return cls(
            first_token_received=message.first_token_received_ns / 1e9,
            first_kv_received=message.first_kv_received_ns / 1e9,
            last_kv_received=message.last_kv_received_ns / 1e9,
            kv_bytes=message.kv_bytes,
            kv_chunks=message.kv_chunks,
            broken_streams=message.broken_streams,
            cached_tokens=message.cached_tokens,
            held_tokens=message.held_tokens,
            peer_tokens=message.peer_tokens,
            disk_tokens=message.disk_tokens,
            prefill=PrefillTrace.from_proto(message.prefill),
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. It does not repeat the tokens given as ``resume_token_ids``.

    Attributes:
        text: Text of the answer, without the stop string that ended it.
        token_ids: Tokens of the answer, without the stop token that ended it.
        logprobs: One entry per token; None means that the request did not ask for them.
        finish_reason: "stop" (a stop token or string), "length" (``max_tokens``, or the context is
            full) or "tool_calls".
        usage: Token counts.
        timing: Durations, as the router reports them.
        request_id: Id of the request.
        model: Name of the model.
        seed: Seed that the router used; with it and the tokens a request can resume the answer.
        prefill_worker: Id of the last prefill worker.
        decode_worker: Id of the last decode worker.
        migrations: Number of times that the sequence moved to another decode worker. Moves before the router
            that sent the last part took over are not counted.
        routers: Number of routers that sent parts of the answer; more than 1 if a router was lost or shut down.
        stop: Stop string that ended the answer; None means that no stop string did.
        trace: Trace of the handoff; None means that the request did not ask for it.
        client_ttft: Seconds from the call to the first token, measured by this client; None without tokens.
        tool_calls: Tool calls that the answer makes; ``text`` does not include them.
        codec: Codec in which the prompt's KV travelled, such as "raw"; None means that no KV travelled.
        prefill_engine: Engine of ``prefill_worker`` with its version, such as "overfill 0.2.0"; None means unknown.
        decode_engine: Engine of ``decode_worker``, likewise.
        tier: Tier that wrote the last part of the answer.
        parts: Parts of the answer by tier, in order. There is one, unless the answer changed its tier. The first begins
            at token 0, or after ``resume_token_ids``.
        brownout_from: Requested tier, if it was overloaded and another wrote the answer; otherwise None.
        identity: What the last part of the answer depends on; a request that resumes the answer needs this.
        prompt_logprobs: One entry per token of the prompt, None for the first; None means that the request did not ask
            for them.
        reasoning: What the model thought before it answered; ``text`` does not include it.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason
    usage: Usage
    timing: Timing
    request_id: str
    model: str
    seed: int
    prefill_worker: str
    decode_worker: str
    migrations: int
    stop: str | None
    trace: Trace | None
    client_ttft: float | None
    tool_calls: tuple[ToolCall, ...] = ()
    codec: str | None = None
    routers: int = 1
    prefill_engine: str | None = None
    decode_engine: str | None = None
    tier: str = ""
    parts: tuple[AnswerPart, ...] = ()
    brownout_from: str | None = None
    identity: AnswerIdentity = field(default_factory=AnswerIdentity)
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    reasoning: str = ""

    @property
    def message(self) -> Message:
        """The answer, with its reasoning and tool calls, as the next message of the chat."""
        return Message("assistant", self.text, self.tool_calls, reasoning=self.reasoning)


class AnswerBuilder:
    """Builds one answer from the messages of one ``Inference.Generate`` call, or of several that continue each other.

    Args:
        request: The client's request.
        clock: Returns seconds. Read when the builder is made, which is at the call, and at the first token.
    """

    def __init__(self, request: inference_pb2.GenerateRequest, clock: Callable[[], float] = time.monotonic) -> None:
        self.accepted: Accepted | None = None
        self._routers = 0
        self.started = clock()
        self._request = request
        self._clock = clock
        self._wants_logprobs = request.sampling.HasField("logprobs")
        self._next_index = len(request.resume_token_ids)
        self._token_ids: list[int] = []
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
        self._calls: list[ToolCall] = []
        self._requested_tier = ""
        self._identity = AnswerIdentity()  # of what writes the answer now
        self._earlier_parts: list[AnswerPart] = []  # of routers before the current one
        self._next_parts: tuple[AnswerPart, ...] = ()  # a part that begins with the next delta, after another router's
        self._parts: list[AnswerPart] = []
        self._client_ttft: float | None = None
        self._cached_tokens: int | None = None  # as the first router has said: a later one finds what that one left
        self._answer: Answer | None = None

    def request(self) -> inference_pb2.GenerateRequest:
        """The request for the rest of the answer. Before a router has accepted it, this is the whole request."""
        if self.accepted is None:
            return self._request
        rest = inference_pb2.GenerateRequest()
        rest.CopyFrom(self._request)
        rest.request_id = self.accepted.request_id
        rest.sampling.seed = self.accepted.seed
        rest.sampling.max_tokens = self.accepted.max_tokens
        rest.resume_token_ids.extend(self._token_ids)
        if self.has_tokens:
            rest.resume_identity.CopyFrom(self._identity.to_proto())
        if self._tier:
            self._pin_tier(rest)
        return rest

    def _pin_tier(self, rest: inference_pb2.GenerateRequest) -> None:
        """Lets the tier that wrote the last tokens write the rest: another decoder would continue differently."""
        rest.tier, rest.allow_brownout = self._tier, False
        if rest.tier != self._requested_tier:
            rest.model = rest.model.removesuffix(f":{self._requested_tier}")

    @property
    def has_tokens(self) -> bool:
        """Whether the client has tokens of the answer, so that ``request`` asks for the rest of it."""
        return bool(self._token_ids or self._request.resume_token_ids)

    @property
    def complete(self) -> bool:
        """Whether the whole answer has arrived."""
        return self._answer is not None

    def failed(self, error: E) -> E:
        """``error``, with the part of the answer that has arrived as ``produced``."""
        if self.accepted is not None:
            accepted = self.accepted
            text, ids = "".join(self._text), tuple(self._token_ids)
            reasoning = "".join(self._reasoning)
            error.produced = Produced(
                text, ids, accepted.request_id, accepted.seed, self._tier, self._identity, reasoning
            )
        return error

    def add(self, response: inference_pb2.GenerateResponse) -> Delta | None:
        """Adds the next response; returns its delta, or None if it has none.

        Raises:
            InternalError: tokens are missing, repeated, without their log-probabilities or of another revision than
                those before, or messages are out of order.
        """
        if self._answer is not None:
            raise InternalError("the server sent more after the end of the answer")
        kind = response.WhichOneof("message")
        if kind == "accepted":
            accepted = response.accepted
            self._routers += 1
            before = self.accepted.brownout_from if self.accepted is not None else None
            self._write_by(accepted.identity)
            self.accepted = Accepted(
                accepted.request_id,
                accepted.prompt_tokens,
                accepted.seed,
                accepted.model,
                accepted.max_tokens,
                accepted.tier,
                before or accepted.brownout_from or None,
                self._identity,
            )
            self._requested_tier = self._requested_tier or accepted.brownout_from or accepted.tier
            self._earlier_parts = list(self._parts)
            if accepted.tier:
                part = AnswerPart(accepted.tier, self._next_index)
                self._next_parts = (part,) if self._token_ids and self._tier != part.tier else ()
                _join(self._parts, part)
        elif self.accepted is None:
            raise InternalError("the server sent an answer before it accepted the request")
        elif kind == "delta":
            return self._add_delta(self.accepted, response.delta)
        elif kind == "finished":
            finished = response.finished
            rest = self._add_delta(self.accepted, finished.rest) if finished.HasField("rest") else None
            self._answer = self._finish(self.accepted, finished)
            return rest
        return None

    def answer(self) -> Answer:
        """The whole answer, once the stream has ended. Raises InternalError if the answer is incomplete."""
        if self._answer is None:
            raise InternalError("the stream ended before the answer did")
        return self._answer

    def _write_by(self, message: inference_pb2.AnswerIdentity) -> None:
        """Notes what writes the answer from here on. Raises InternalError if it is another revision than before."""
        identity = AnswerIdentity.from_proto(message)
        if self._token_ids and identity.revision != self._identity.revision:
            raise InternalError(
                f"the revision {self._identity.revision!r} began the answer, and {identity.revision!r} goes on with it"
            )
        self._identity = identity

    def _add_delta(self, accepted: Accepted, message: inference_pb2.Delta) -> Delta:
        ids = tuple(message.token_ids)
        if ids and message.first_index != self._next_index:
            raise InternalError(
                f"tokens are missing or repeated: index {message.first_index} arrived instead of {self._next_index}"
            )
        if len(message.logprobs) != (len(ids) if self._wants_logprobs else 0):
            raise InternalError(f"{len(message.logprobs)} log-probabilities came for {len(ids)} tokens")
        if ids and self._client_ttft is None:
            self._client_ttft = self._clock() - self.started
            self._cached_tokens = message.cached_tokens
        logprobs = tuple(
            TokenLogprobs(entry.logprob, tuple(zip(entry.top_ids, entry.top_logprobs, strict=False)))
            for entry in message.logprobs
        )
        calls = tuple(ToolCallDelta(c.index, c.id, c.name, c.arguments) for c in message.tool_calls)
        parts = _parts(message.parts)
        if message.parts:
            self._write_by(message.parts[-1].identity)
        if ids:
            if not parts or parts[0].first_index != self._next_index:  # else the router has changed the tier again
                parts = self._next_parts + parts
            self._next_parts = ()
        scores = None
        if message.HasField("prompt_logprobs"):
            scores = _prompt_logprobs(message.prompt_logprobs, accepted.prompt_tokens)
        self._prompt_logprobs = self._prompt_logprobs or scores
        own = logprobs if self._wants_logprobs else None
        delta = Delta(self._next_index, ids, message.text, own, calls, parts, scores, message.reasoning)
        for beginning in parts:
            _join(self._parts, beginning)
        for part in calls:
            self._add_call(part)
        self._next_index += len(ids)
        self._token_ids += ids
        self._text.append(message.text)
        self._reasoning.append(message.reasoning)
        self._logprobs += logprobs
        return delta

    def _add_call(self, part: ToolCallDelta) -> None:
        if part.name:
            self._calls.append(ToolCall(part.id, part.name, ""))
        if part.index != len(self._calls) - 1:
            raise InternalError(
                f"the server sent a part of tool call {part.index} after the start of {len(self._calls)} tool calls"
            )
        last = self._calls[-1]
        self._calls[-1] = replace(last, arguments=last.arguments + part.arguments)

    @property
    def _tier(self) -> str:
        """Tier that wrote the last token, or will write the first one; empty if the router does not say."""
        return self._parts[-1].tier if self._parts else ""

    def _finish(self, accepted: Accepted, message: inference_pb2.Finished) -> Answer:
        if message.reason not in FINISH_REASONS:
            raise InternalError(f"the answer ended for a reason that this client does not know: {message.reason}")
        wants_scores = self._request.sampling.HasField("prompt_logprobs") and not self._request.resume_token_ids
        if wants_scores and self._prompt_logprobs is None:
            raise InternalError("the server sent no log-probabilities of the prompt")
        if message.parts:
            self._parts = self._earlier_parts
            for part in _parts(message.parts):
                _join(self._parts, part)
        usage = message.usage
        cached, peer, disk = usage.cached_tokens, usage.peer_tokens, usage.disk_tokens
        if self._routers > 1 and self._cached_tokens is not None:
            cached, peer, disk = self._cached_tokens, 0, 0
        return Answer(
            text="".join(self._text),
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs) if self._wants_logprobs else None,
            finish_reason=FINISH_REASONS[message.reason],
            usage=Usage(usage.prompt_tokens, usage.completion_tokens, cached, usage.reasoning_tokens, peer, disk),
            timing=Timing.from_proto(message.timing),
            request_id=accepted.request_id,
            model=accepted.model,
            seed=accepted.seed,
            prefill_worker=message.prefill_worker,
            decode_worker=message.decode_worker,
            migrations=message.migrations,
            stop=message.stop or None,
            trace=Trace.from_proto(message.trace) if message.HasField("trace") else None,
            client_ttft=self._client_ttft,
            tool_calls=tuple(self._calls),
            codec=CODEC_NAMES.get(message.codec),
            routers=self._routers,
            prefill_engine=message.prefill_engine or None,
            decode_engine=message.decode_engine or None,
            tier=self._tier,
            parts=tuple(self._parts),
            brownout_from=accepted.brownout_from,
            identity=self._identity,
            prompt_logprobs=self._prompt_logprobs,
            reasoning="".join(self._reasoning),
        )


def _prompt_logprobs(message: common_pb2.PromptLogprobs, prompt_tokens: int) -> tuple[TokenLogprobs | None, ...]:
    """One entry per token of the prompt, None for the first ones, which have none."""
    count = len(message.top_ids) // max(1, len(message.logprobs))
    top = list(zip(message.top_ids, message.top_logprobs, strict=True))
    scored = (
        TokenLogprobs(logprob, tuple(top[index * count : (index + 1) * count]), rank)
        for index, (logprob, rank) in enumerate(zip(message.logprobs, message.ranks, strict=True))
    )
    return (*[None] * (prompt_tokens - len(message.logprobs)), *scored)


def _parts(messages: Iterable[inference_pb2.AnswerPart]) -> tuple[AnswerPart, ...]:
    return tuple(AnswerPart(part.tier, part.first_index) for part in messages)


def _join(parts: list[AnswerPart], new: AnswerPart) -> None:
    """Adds ``new`` to ``parts``. It replaces parts that wrote no token, and continues a part of the same tier."""
    while parts and parts[-1].first_index >= new.first_index:
        parts.pop()
    if not parts or parts[-1].tier != new.tier:
        parts.append(new)
