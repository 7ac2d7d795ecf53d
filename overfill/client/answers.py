"""From the events of a stream to deltas and an answer. No I/O; every token is accounted for by its index."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from overfill.client.requests import ToolCall
from overfill.errors import InternalError, OverfillError, Produced
from overfill.request.names import CODEC_NAMES, FINISH_REASONS, FinishReason
from overfill.v1 import common_pb2, inference_pb2, kv_pb2

E = TypeVar("E", bound=OverfillError)

TTFT_PARTS = ("router_queue", "decode_reservation", "prefill_queue", "prefill_compute", "return_path")
"""Fields of ``Timing`` that make up its ``ttft``, in the order they happen."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities under softmax(logits), before temperature and filters.

    Attributes:
        logprob: of the chosen token.
        top: (token id, log-probability) of the most likely tokens, best first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Accepted:
    """What the router said when it took the request. ``seed`` and ``max_tokens`` are those in use."""

    request_id: str
    prompt_tokens: int
    seed: int
    model: str
    max_tokens: int


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """What tokens add to the ``index``-th tool call of an answer; ``id`` and ``name`` come with its first part."""

    index: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of an answer.

    Attributes:
        first_index: index in the answer of ``token_ids[0]``.
        token_ids: may be empty, when only text that was held back comes.
        text: new text; may be empty while a character or a possible stop string is incomplete.
        logprobs: one per token, or None when they were not asked for.
        tool_calls: what the tokens add to tool calls; none of it is in ``text``.
    """

    first_index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] | None
    tool_calls: tuple[ToolCallDelta, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts; ``cached_tokens`` are those of the prompt whose KV a prefix cache had."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of one request went, in seconds; None where it is not known.

    Each is measured on one host's monotonic clock, none as a remainder. ``ttft`` runs from the request's
    arrival at the router to the hand-over of the first token to the client's stream; ``handoff_exposed`` from
    the first token to the first decode step.
    """

    ttft: float | None = None
    router_queue: float | None = None
    decode_reservation: float | None = None
    prefill_queue: float | None = None
    prefill_compute: float | None = None
    return_path: float | None = None
    handoff_exposed: float | None = None
    decode: float | None = None
    total: float | None = None

    @property
    def unattributed(self) -> float | None:
        """``ttft`` less the parts in ``TTFT_PARTS`` that are known; transit is in it."""
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
    """The prefill worker's side of a handoff: seconds since it scheduled the first chunk, on its clock.

    ``layer_start`` and ``layer_end`` have one entry per full-model layer.
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
    """One handoff: seconds since the decode worker asked for it, on its clock, and what it received.

    Of the prompt's tokens, the prefill worker's prefix cache had ``cached_tokens``, and ``held_tokens`` did not travel:
    the decode worker had their KV from an earlier prompt. ``broken_streams``: data streams that brought a wrong chunk
    or too little, and were begun anew.
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
            prefill=PrefillTrace.from_proto(message.prefill),
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. Tokens given as ``resume_token_ids`` are not repeated in it.

    Attributes:
        finish_reason: "stop" (a stop token or string), "length" (``max_tokens``, or the context is
            full) or "tool_calls".
        seed: that the router used; with the tokens it resumes or repeats the answer.
        migrations: times the sequence moved to another decode worker, as the last router knows.
        routers: that wrote of it, one after another; more than one when a router was lost, or left, meanwhile.
        stop: the stop string that ended the answer; None when none did.
        trace: None unless asked for.
        client_ttft: seconds from the call to the first token, on this side; None without tokens.
        tool_calls: that the answer makes; their text is not in ``text``.
        codec: in which the prompt's KV travelled, such as "raw"; None when it did not.
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


class AnswerBuilder:
    """Takes the messages of one ``Inference.Generate`` in order, or of several that go on where one was lost.

    Args:
        request: that was sent.
        clock: seconds; read when the builder is made, at the call, and at the first token.
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
        self._logprobs: list[TokenLogprobs] = []
        self._calls: list[ToolCall] = []
        self._client_ttft: float | None = None
        self._answer: Answer | None = None

    def request(self) -> inference_pb2.GenerateRequest:
        """What to send for the rest of the answer, now or after its router was lost: at first, the whole request."""
        if self.accepted is None:
            return self._request
        rest = inference_pb2.GenerateRequest()
        rest.CopyFrom(self._request)
        rest.request_id = self.accepted.request_id
        rest.sampling.seed = self.accepted.seed
        rest.sampling.max_tokens = self.accepted.max_tokens
        rest.resume_token_ids.extend(self._token_ids)
        return rest

    @property
    def complete(self) -> bool:
        """Whether the whole answer is there, however its stream ends."""
        return self._answer is not None

    def failed(self, error: E) -> E:
        """``error``, with what there is of the answer."""
        if self.accepted is not None:
            accepted = self.accepted
            error.produced = Produced("".join(self._text), tuple(self._token_ids), accepted.request_id, accepted.seed)
        return error

    def add(self, response: inference_pb2.GenerateResponse) -> Delta | None:
        """The delta in ``response``, if there is one.

        Raises:
            InternalError: tokens are missing, repeated or without their log-probabilities, or events are out
                of order.
        """
        if self._answer is not None:
            raise InternalError("the server sent more after the end of the answer")
        kind = response.WhichOneof("message")
        if kind == "accepted":
            accepted = response.accepted
            self._routers += 1
            self.accepted = Accepted(
                accepted.request_id, accepted.prompt_tokens, accepted.seed, accepted.model, accepted.max_tokens
            )
        elif self.accepted is None:
            raise InternalError("the server answered without having accepted the request")
        elif kind == "delta":
            return self._add_delta(response.delta)
        elif kind == "finished":
            finished = response.finished
            rest = self._add_delta(finished.rest) if finished.HasField("rest") else None
            self._answer = self._finish(self.accepted, finished)
            return rest
        return None

    def answer(self) -> Answer:
        """The whole answer, once the stream has ended. Raises InternalError when it is incomplete."""
        if self._answer is None:
            raise InternalError("the stream ended before the answer did")
        return self._answer

    def _add_delta(self, message: inference_pb2.Delta) -> Delta:
        ids = tuple(message.token_ids)
        if ids and message.first_index != self._next_index:
            raise InternalError(
                f"tokens are missing or repeated: index {message.first_index} came, not {self._next_index}"
            )
        if len(message.logprobs) != (len(ids) if self._wants_logprobs else 0):
            raise InternalError(f"{len(message.logprobs)} log-probabilities came for {len(ids)} tokens")
        if ids and self._client_ttft is None:
            self._client_ttft = self._clock() - self.started
        logprobs = tuple(
            TokenLogprobs(entry.logprob, tuple(zip(entry.top_ids, entry.top_logprobs, strict=False)))
            for entry in message.logprobs
        )
        calls = tuple(ToolCallDelta(c.index, c.id, c.name, c.arguments) for c in message.tool_calls)
        delta = Delta(self._next_index, ids, message.text, logprobs if self._wants_logprobs else None, calls)
        for part in calls:
            self._add_call(part)
        self._next_index += len(ids)
        self._token_ids += ids
        self._text.append(message.text)
        self._logprobs += logprobs
        return delta

    def _add_call(self, part: ToolCallDelta) -> None:
        if part.name:
            self._calls.append(ToolCall(part.id, part.name, ""))
        if part.index != len(self._calls) - 1:
            raise InternalError(f"part of tool call {part.index} came, with {len(self._calls)} begun")
        last = self._calls[-1]
        self._calls[-1] = replace(last, arguments=last.arguments + part.arguments)

    def _finish(self, accepted: Accepted, message: inference_pb2.Finished) -> Answer:
        if message.reason not in FINISH_REASONS:
            raise InternalError(f"the answer ended for an unknown reason ({message.reason})")
        return Answer(
            text="".join(self._text),
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs) if self._wants_logprobs else None,
            finish_reason=FINISH_REASONS[message.reason],
            usage=Usage(message.usage.prompt_tokens, message.usage.completion_tokens, message.usage.cached_tokens),
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
        )
