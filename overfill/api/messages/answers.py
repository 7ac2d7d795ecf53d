"""Writes an answer in the form of Anthropic's Messages API: as server-sent events, or whole. No sockets."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any

from pydantic_core import from_json

from overfill.api.messages.errors import error_body
from overfill.api.opaque_reasoning import encode_reasoning
from overfill.api.openai.answers import encode, encode_text
from overfill.api.openai.errors import ApiError
from overfill.api.report import answer_report
from overfill.api.translation import Served
from overfill.routing.answer import AnswerDelta
from overfill.v1 import common_pb2, inference_pb2

_PING = b'event: ping\ndata: {"type":"ping"}\n\n'
_STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
_DELTA = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":{"type":"%b","%b":'
_DELTA_END = b"}}\n\n"

_ESCAPE = re.compile(r"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(?P<lone>u[dD][89a-fA-F]..)|.)")

_EMPTY: dict[str, dict[str, Any]] = {
    "text": {"type": "text", "text": ""},
    "thinking": {"type": "thinking", "thinking": "", "signature": ""},
}
_FIELDS = {
    "text": (b"text_delta", b"text"),
    "thinking": (b"thinking_delta", b"thinking"),
    "tool_use": (b"input_json_delta", b"partial_json"),
}
"""Type and field of the events with more of a block, by its type."""


class MessageWriter:
    """Writes one answer as a message; see ``AnswerWriter``.

    Args:
        served: what answers the request.
        max_tokens: maximum of the answer's tokens that the client asks for; 0 asks for no answer.
        hide_thinking: whether thinking blocks come without their text. Their signature carries it then.
        stream: whether the answer is streamed; else ``delta`` is called once, with all of it.
    """

    def __init__(self, served: Served, *, max_tokens: int, hide_thinking: bool, stream: bool) -> None:
        self._served = served
        self._max_tokens = max_tokens
        self._hide_thinking = hide_thinking
        self._stream = stream
        self._accepted = inference_pb2.Accepted()
        self._whole: AnswerDelta | None = None
        self._index = -1  # of the open block
        self._open = ""  # type of the open block
        self._head = b""  # of the events with more of it
        self._hidden: list[str] = []  # the reasoning, if it is not shown

    def begin(self, accepted: inference_pb2.Accepted, cached_tokens: int) -> bytes:
        """Returns the event with the empty message."""
        self._accepted = accepted
        if not self._stream:
            return b""
        usage = _usage(accepted.prompt_tokens, cached_tokens, 0, 0)
        return _event("message_start", message={**self._message(None, None, usage), "content": []})

    def delta(self, delta: AnswerDelta) -> bytes:
        """Returns the events with a part of the answer."""
        if not self._max_tokens:
            return b""
        if not self._stream:
            self._whole = delta
            return b""
        if self._open == "text" and not delta.tool_calls:
            return self._more(delta.text)
        events = []  # thousands, if the reader was slow
        if delta.reasoning:
            events.append(self._opened("thinking"))
            if self._hide_thinking:
                self._hidden.append(delta.reasoning)
            else:
                events.append(self._more(delta.reasoning))
        if delta.text:
            events += [self._opened("text"), self._more(delta.text)]
        for part in delta.tool_calls:
            if part.name:
                events += [self._closed(), self._start(_tool_use(part))]
            events.append(self._more(part.arguments))
        return b"".join(events)

    def ping(self) -> bytes:
        """Returns the event that says nothing."""
        return _PING

    def end(self, finished: inference_pb2.Finished) -> bytes:
        """Returns the last events, with the reason and the usage."""
        reason, stop = self._reason(finished)
        return (
            self._closed()
            + _event(
                "message_delta",
                delta={"stop_reason": reason, "stop_sequence": stop},
                usage=self._final_usage(finished),
                overfill=self._report(finished),
            )
            + _STOP
        )

    def fail(self, error: ApiError) -> bytes:
        """Returns the event with an error."""
        return b"event: error\ndata: %b\n\n" % encode(error_body(error, self._served.id))

    def whole(self, finished: inference_pb2.Finished) -> bytes:
        """Returns the whole message."""
        message = self._message(*self._reason(finished), self._final_usage(finished))
        head = encode({**message, "overfill": self._report(finished)})[:-1]
        return b'%b,"content":[%b]}' % (head, b",".join(self._content()))

    def _message(self, reason: str | None, stop: str | None, usage: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self._served.id,
            "type": "message",
            "role": "assistant",
            "model": self._served.model,
            "stop_reason": reason,
            "stop_sequence": stop,
            "usage": usage,
        }

    def _content(self) -> list[bytes]:
        """The blocks of the whole answer as JSON, as clients put them together from the events of a stream."""
        content: list[bytes] = []
        answer = self._whole
        if answer is None:
            return content
        if answer.reasoning:
            shown, hidden = ("", answer.reasoning) if self._hide_thinking else (answer.reasoning, "")
            content.append(encode({"type": "thinking", "thinking": shown, "signature": encode_reasoning(hidden)}))
        if answer.text:
            content.append(encode({"type": "text", "text": answer.text}))
        for part in answer.tool_calls:
            content.append(
                b'%b,"input":%b}' % (encode(_tool_use(part))[: -len(',"input":{}}')], _object(part.arguments))
            )
        return content

    def _opened(self, kind: str) -> bytes:
        """Opens a block without content, unless it is open."""
        return b"" if self._open == kind else self._closed() + self._start(_EMPTY[kind])

    def _start(self, block: dict[str, Any]) -> bytes:
        self._index += 1
        self._open = block["type"]
        self._head = _DELTA % (self._index, *_FIELDS[self._open])
        return _event("content_block_start", index=self._index, content_block=block)

    def _more(self, text: str) -> bytes:
        return self._head + encode_text(text) + _DELTA_END if text else b""

    def _closed(self) -> bytes:
        """Closes the open block, if there is one."""
        if not self._open:
            return b""
        events = b""
        if self._open == "thinking":
            signed = {"type": "signature_delta", "signature": encode_reasoning("".join(self._hidden))}
            events = _event("content_block_delta", index=self._index, delta=signed)
        self._open = ""
        return events + _event("content_block_stop", index=self._index)

    def _reason(self, finished: inference_pb2.Finished) -> tuple[str, str | None]:
        """The stop reason, and the stop sequence that ended the answer."""
        if finished.reason == common_pb2.FINISH_REASON_TOOL_CALLS:
            return "tool_use", None
        if finished.reason == common_pb2.FINISH_REASON_LENGTH or not self._max_tokens:
            full = self._accepted.max_tokens < self._max_tokens
            return "model_context_window_exceeded" if full else "max_tokens", None
        return ("stop_sequence", finished.stop) if finished.stop else ("end_turn", None)

    def _final_usage(self, finished: inference_pb2.Finished) -> dict[str, Any]:
        usage = finished.usage
        completion = usage.completion_tokens if self._max_tokens else 0
        return _usage(usage.prompt_tokens, usage.cached_tokens, completion, usage.reasoning_tokens)

    def _report(self, finished: inference_pb2.Finished) -> dict[str, Any]:
        accepted = self._accepted
        return {"pair": self._served.pair, **answer_report(finished, accepted.seed, accepted.brownout_from)}


def _usage(prompt: int, cached: int, completion: int, reasoning: int) -> dict[str, Any]:
    """Token counts as Anthropic has them: ``input_tokens`` are those that were not in a cache."""
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": completion,
        "output_tokens_details": {"thinking_tokens": reasoning},
    }


def _object(text: str) -> bytes:
    """The JSON of the object in ``text``, as much as ``max_tokens`` has left of it.

    Many readers refuse escapes of lone surrogates.
    """
    text = _ESCAPE.sub(lambda escape: "?" if escape["lone"] else escape[0], text)
    with suppress(ValueError, RecursionError):
        json.loads(text, parse_int=float)
        return text.encode()  # what Python reads may differ, such as of 1e999
    with suppress(ValueError):
        return encode(from_json(text, allow_partial=True))
    return b"{}"


def _tool_use(part: inference_pb2.ToolCallDelta) -> dict[str, Any]:
    return {"type": "tool_use", "id": part.id, "name": part.name, "input": {}}


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), encode({"type": kind, **fields}))
