"""Turns our messages into responses of OpenAI's API, whole or in chunks. No sockets."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import Any, Literal

from pydantic_core import to_json

from overfill.api.tokenizer import Tokenizer
from overfill.request.names import CODEC_NAMES, FINISH_REASONS
from overfill.routing.answer import AnswerDelta
from overfill.v1 import inference_pb2

_RULED_OUT = -9999.0
"""Log-probability that OpenAI reports for a probability of zero, because JSON has no infinity."""

_TIMES: tuple[tuple[str, Any], ...] = tuple(
    (f"{name}_ms", f"{name}_ns")
    for name in (
        "ttft",
        "router_queue",
        "decode_reservation",
        "prefill_queue",
        "prefill_compute",
        "return_path",
        "handoff_exposed",
        "decode",
        "total",
    )
)
"""Durations of an answer: the name in the response, and the field of ``Timing``."""

Kind = Literal["chat", "completion"]


@dataclass(frozen=True, slots=True)
class Envelope:
    """Fields that all messages of one response share.

    Attributes:
        id: Id of the response.
        model: Name of the model; with several tiers, also of the tier that begins the first choice.
        pair: Description of that tier's pair, for the ``overfill`` object.
        fingerprint: Fingerprint of the weights; different weights have a different one.
        created: Unix time of the response, seconds.
    """

    kind: Kind
    id: str
    model: str
    pair: dict[str, Any]
    fingerprint: str
    tokenizer: Tokenizer
    created: int = field(default_factory=lambda: int(time.time()))

    def wrap(self, choices: list[dict[str, Any]], *, chunk: bool, **more: Any) -> dict[str, Any]:
        """A response, or a chunk of one, with ``choices`` and the fields in ``more``."""
        name = {"chat": "chat.completion", "completion": "text_completion"}[self.kind]
        if chunk and self.kind == "chat":
            name += ".chunk"
        return {
            "id": self.id,
            "object": name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
            **more,
        }

    def extension(self, ended: Sequence[Choice]) -> dict[str, Any]:
        """The ``overfill`` object, which extends OpenAI's response, for choices that have ended."""
        return {"pair": self.pair, "choices": [choice.report() for choice in ended]}


@dataclass(slots=True)
class Choice:
    """One choice of a response, built while its answer arrives.

    Attributes:
        logprobs: Whether the request asked for log-probabilities.
        brownout_from: Requested tier, if it is overloaded and another writes the answer; otherwise empty.
        echo: Text that precedes the answer.
        finished: Last message of the answer; None until it arrives.
        cached_tokens: Number of prompt tokens that were in a prefix cache, as far as it is known before ``finished``.
    """

    index: int
    envelope: Envelope
    seed: int
    prompt_tokens: int
    logprobs: bool
    brownout_from: str = ""
    echo: str = ""
    finished: inference_pb2.Finished | None = None
    completion_tokens: int = 0
    cached_tokens: int = 0
    _text: list[str] = field(default_factory=list)
    _scores: list[dict[str, Any]] = field(default_factory=list)
    _offset: int = 0
    _calls: list[dict[str, Any]] = field(default_factory=list)

    def add(self, delta: AnswerDelta) -> None:
        """Add ``delta`` to the whole answer."""
        self.completion_tokens += len(delta.token_ids)
        self._text.append(delta.text)
        for part in delta.tool_calls:
            if part.name:
                self._calls.append(_call(part.id, part.name))
            self._calls[-1]["function"]["arguments"] += part.arguments
        if self.logprobs:
            self._scores += self._score(delta)

    def whole(self) -> dict[str, Any]:
        """The choice for a response that is not streamed."""
        text = "".join(self._text)
        if self.envelope.kind == "completion":
            scores = _legacy(self._scores) if self.logprobs else None
            return {"index": self.index, "text": self.echo + text, "logprobs": scores, "finish_reason": self.reason}
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self._calls:
            message["tool_calls"] = self._calls
            message["content"] = text or None
        scores = {"content": self._scores, "refusal": None} if self.logprobs else None
        return {"index": self.index, "message": message, "logprobs": scores, "finish_reason": self.reason}

    def first(self) -> dict[str, Any] | None:
        """The choice for a stream's first chunk, before any token; None if there is nothing to send."""
        if self.envelope.kind == "chat":
            return self._chunk({"role": "assistant", "content": "", "refusal": None}, None)
        return self._chunk(self.echo, None) if self.echo else None

    def only_text(self, delta: AnswerDelta) -> bool:
        """Count the tokens of ``delta`` and return True if its chunk is ``text(delta.text)``; else do nothing."""
        if self.logprobs or delta.tool_calls or not delta.text:
            return False
        self.completion_tokens += len(delta.token_ids)
        return True

    def text(self, text: str) -> dict[str, Any]:
        """The choice for a chunk with ``text`` and nothing else."""
        return self._chunk(text if self.envelope.kind == "completion" else {"content": text}, None)

    def chunk(self, delta: AnswerDelta) -> dict[str, Any] | None:
        """The choice for a chunk with ``delta``; None if it would be empty, as inside a character."""
        self.completion_tokens += len(delta.token_ids)
        scores = self._score(delta) if self.logprobs else None
        if self.envelope.kind == "completion":
            if not delta.text and not scores:
                return None
            return self._chunk(delta.text, _legacy(scores) if scores is not None else None)
        if not delta.text and not delta.tool_calls and not scores:
            return None
        content: dict[str, Any] = {"content": delta.text} if delta.text or not delta.tool_calls else {}
        if delta.tool_calls:
            content["tool_calls"] = _call_deltas(delta.tool_calls)
        return self._chunk(content, None if scores is None else {"content": scores, "refusal": None})

    def last(self) -> dict[str, Any]:
        """The choice for the last chunk, which holds the finish reason."""
        empty: Any = "" if self.envelope.kind == "completion" else {}
        return {**self._chunk(empty, None), "finish_reason": self.reason}

    def report(self) -> dict[str, Any]:
        """The choice in the ``overfill`` object, once its answer has ended: who wrote it, in which times."""
        assert self.finished is not None
        finished, timing = self.finished, self.finished.timing
        return {
            "index": self.index,
            "tier": finished.parts[-1].tier if finished.parts else None,
            "parts": [{"tier": part.tier, "first_index": part.first_index} for part in finished.parts],
            "brownout_from": self.brownout_from or None,
            "prefill_worker": finished.prefill_worker,
            "decode_worker": finished.decode_worker,
            "prefill_engine": finished.prefill_engine or None,
            "decode_engine": finished.decode_engine or None,
            "migrations": finished.migrations,
            "codec": CODEC_NAMES.get(finished.codec),
            "seed": self.seed,
            "stop": finished.stop or None,
            "timing": {
                name: round(getattr(timing, field) / 1e6, 3) if timing.HasField(field) else None
                for name, field in _TIMES
            },
        }

    @property
    def reason(self) -> str:
        """Finish reason of the answer, once it has ended."""
        assert self.finished is not None
        return FINISH_REASONS[self.finished.reason]

    def _chunk(self, content: Any, scores: Any) -> dict[str, Any]:
        key = "text" if self.envelope.kind == "completion" else "delta"
        return {"index": self.index, key: content, "logprobs": scores, "finish_reason": None}

    def _score(self, delta: AnswerDelta) -> list[dict[str, Any]]:
        scores = []
        for token, entry in zip(delta.token_ids, delta.logprobs, strict=False):
            scored = self._scored(token, entry.logprob)
            scored["top_logprobs"] = [
                self._scored(other, value) for other, value in zip(entry.top_ids, entry.top_logprobs, strict=False)
            ]
            scored["_offset"] = self._offset
            self._offset += len(scored["token"])
            scores.append(scored)
        if self.envelope.kind == "chat":
            for scored in scores:
                del scored["_offset"]
        return scores

    def _scored(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.envelope.tokenizer.token_bytes(token)
        value = logprob if math.isfinite(logprob) else _RULED_OUT
        return {"token": data.decode(errors="replace"), "logprob": value, "bytes": list(data)}


class EventFrame:
    """The constant bytes around the text in the events of one choice.

    Args:
        chunk: a chunk whose text is ``MARK``.
    """

    MARK = "\0"

    def __init__(self, chunk: dict[str, Any]) -> None:
        # After the text, a chunk has no strings, so the last one that equals the mark is the text.
        self._head, _, self._tail = event(chunk).rpartition(encode_text(self.MARK))

    def event(self, text: str) -> bytes:
        """Returns the bytes of the server-sent event for a chunk with ``text``."""
        return self._head + encode_text(text) + self._tail


def usage(choices: Sequence[Choice], n: int) -> dict[str, Any]:
    """Token counts of all choices together. A prompt with ``n`` choices counts once."""
    prompt = sum(choice.prompt_tokens for choice in choices[::n])
    completion = sum(choice.completion_tokens for choice in choices)
    cached = sum(
        choice.cached_tokens if choice.finished is None else choice.finished.usage.cached_tokens
        for choice in choices[::n]
    )
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
    }


def encode(message: dict[str, Any]) -> bytes:
    """``message`` as JSON without white space."""
    return to_json(message)


def encode_text(text: str) -> bytes:
    """``text`` as a JSON string, as ``encode`` writes it."""
    return encode_basestring(text).encode()


def event(message: dict[str, Any]) -> bytes:
    """``message`` as one server-sent event."""
    return b"data: " + encode(message) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def _call(id: str, name: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": ""}}


def _call_deltas(parts: Sequence[inference_pb2.ToolCallDelta]) -> list[dict[str, Any]]:
    """``parts`` with one entry per call, as at OpenAI: some clients read only the first entry of a chunk."""
    calls: dict[int, dict[str, Any]] = {}
    for part in parts:
        if part.index not in calls:
            made = _call(part.id, part.name) if part.name else {"function": {"arguments": ""}}
            calls[part.index] = {"index": part.index, **made}
        calls[part.index]["function"]["arguments"] += part.arguments
    return list(calls.values())


def _legacy(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """``scores`` in the format of ``/v1/completions``. If tokens have the same text, the likelier one remains."""
    return {
        "tokens": [s["token"] for s in scores],
        "token_logprobs": [s["logprob"] for s in scores],
        "top_logprobs": [{t["token"]: t["logprob"] for t in reversed(s["top_logprobs"])} for s in scores],
        "text_offset": [s["_offset"] for s in scores],
    }
