"""Writes answers in the form of the Responses API: as events, or as one response. No sockets."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from overfill.api.opaque_reasoning import encode_reasoning
from overfill.api.openai.answers import encode, encode_text
from overfill.api.openai.errors import ApiError
from overfill.api.report import answer_report
from overfill.api.responses.input_text import InputText
from overfill.api.responses.tools import Callee
from overfill.api.translation import Served
from overfill.request.names import FINISH_REASONS
from overfill.routing.answer import AnswerDelta
from overfill.v1 import inference_pb2

_UNKNOWN = inference_pb2.Accepted()


@dataclass(frozen=True, slots=True)
class Asked:
    """What the response takes from the request.

    Attributes:
        echo: fields of the response that repeat the request.
        callees: the client's tool for each name that the model sees.
        encrypts: whether the client asks for the ``encrypted_content`` of reasoning. Codex sends no other text of it
            back.
    """

    echo: Mapping[str, Any]
    callees: Mapping[str, Callee]
    encrypts: bool


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of output item.

    Attributes:
        id: beginning of its id.
        fields: fields that every such item has.
        delta, done: names of the events with a part of its text and with all of it.
        text: name of the text in the item, or in its content part, and in the event ``done``.
        part: fields of its content part beside the text; None if the text is in the item itself.
        more: fields of the events ``delta`` and ``done`` beside the usual ones, as JSON.
    """

    id: str
    fields: dict[str, Any]
    delta: str
    done: str
    text: str
    part: dict[str, Any] | None = None
    more: bytes = b""


_REASONING = _Kind(
    "rs",
    {"type": "reasoning", "summary": []},
    "response.reasoning_text.delta",
    "response.reasoning_text.done",
    "text",
    {"type": "reasoning_text"},
)
_MESSAGE = _Kind(
    "msg",
    {"type": "message", "role": "assistant"},
    "response.output_text.delta",
    "response.output_text.done",
    "text",
    {"type": "output_text", "annotations": [], "logprobs": []},
    b',"logprobs":[]',
)
_CALL = _Kind(
    "fc",
    {"type": "function_call"},
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "arguments",
)
_CUSTOM = _Kind(
    "ctc",
    {"type": "custom_tool_call"},
    "response.custom_tool_call_input.delta",
    "response.custom_tool_call_input.done",
    "input",
)


class _Item:
    """An output item whose text arrives.

    Args:
        fields: the item's id, and fields that its kind does not have.
        index: index of the item in the response.
    """

    __slots__ = ("_delta", "_fields", "_texts", "input", "kind", "place")

    def __init__(self, kind: _Kind, fields: dict[str, Any], index: int) -> None:
        self.kind = kind
        self._fields = kind.fields | fields
        self.input = InputText() if kind is _CUSTOM else None
        content = b"" if kind.part is None else b',"content_index":0'
        self.place = b'"item_id":%b,"output_index":%d%b' % (encode_text(fields["id"]), index, content)
        self._delta = b'event: %b\ndata: {"type":"%b",%b%b,"sequence_number":' % (
            kind.delta.encode(), kind.delta.encode(), self.place, kind.more
        )  # fmt: skip
        self._texts: list[str] = []

    def delta(self, text: str, sequence: int) -> bytes:
        """Adds ``text``. Returns the event."""
        self._texts.append(text)
        return b'%b%d,"delta":%b}\n\n' % (self._delta, sequence, encode_text(text))

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def item(self, status: str, *, encrypts: bool = False) -> bytes:
        """Returns the item with its text, as JSON, and with ``encrypted_content`` if ``encrypts``."""
        kind, text, fields = self.kind, self.text, self._fields | {"status": status}
        if kind.part is None:
            return encode(fields | {kind.text: text})
        if encrypts:
            fields["encrypted_content"] = encode_reasoning(text)
        opened = status != "in_progress"
        return encode(fields | {"content": [kind.part | {kind.text: text}] if opened else []})


class ResponseWriter:
    """Writes one answer; see ``AnswerWriter``."""

    def __init__(self, served: Served, asked: Asked) -> None:
        self._served = served
        self._asked = asked
        self._accepted = _UNKNOWN
        self._sequence = 0
        self._done: list[bytes] = []  # complete items as JSON
        self._item: _Item | None = None  # the one that is not complete
        # The request's tools and instructions may be long, and three events repeat them.
        self._constant = encode(
            {
                "id": served.id,
                "object": "response",
                "created_at": int(time.time()),
                "model": served.model,
                "background": False,
                "max_tool_calls": None,
                "previous_response_id": None,
                "service_tier": "default",
                "store": False,
                "top_logprobs": 0,
                "truncation": "disabled",
                **asked.echo,
            }
        )[:-1]

    def begin(self, accepted: inference_pb2.Accepted, cached_tokens: int) -> bytes:
        """Returns the events before the first part."""
        self._accepted = accepted
        return self._progress("created") + self._progress("in_progress")

    def ping(self) -> bytes:
        """Returns an event that says nothing new. Codex does not count comments as signs of life."""
        return self._progress("in_progress")

    def delta(self, delta: AnswerDelta) -> bytes:
        """Adds a part. Returns its events."""
        events = []  # thousands, if the reader was slow
        if delta.reasoning:
            events.append(self._text(_REASONING, delta.reasoning))
        if delta.text:
            events.append(self._text(_MESSAGE, delta.text))
        for part in delta.tool_calls:
            if part.name:
                events.append(self._open_call(part.id, part.name))
            if part.arguments:
                events.append(self._arguments(part.arguments))
        return b"".join(events)

    def end(self, finished: inference_pb2.Finished) -> bytes:
        """Returns the last events."""
        status, events = self._complete(finished)
        return events + self._event(f"response.{status}", b'"response":' + self._response(status, finished))

    def whole(self, finished: inference_pb2.Finished) -> bytes:
        """Returns the response."""
        status, _ = self._complete(finished)
        return self._response(status, finished)

    def fail(self, error: ApiError) -> bytes:
        """Returns the event of an answer that failed."""
        events = self._close("incomplete")
        code, message = error.code or "server_error", error.message
        if error.status >= 500:
            code = "server_error"
        if error.status == 429:  # Codex waits as long as this sentence says
            message = f"{message} Please try again in {error.retry_after or 1} s."
        failure = {"code": code, "message": message}
        return events + self._event("response.failed", b'"response":' + self._response("failed", error=failure))

    def _complete(self, finished: inference_pb2.Finished) -> tuple[str, bytes]:
        """Returns the status of the response, and the last item's events."""
        cut = FINISH_REASONS[finished.reason] == "length"
        events = b""
        if self._item is None and not self._done and not cut:
            events = self._open(_MESSAGE)  # clients expect one
        status = "incomplete" if cut else "completed"
        return status, events + self._close(status)

    def _text(self, kind: _Kind, text: str) -> bytes:
        item, events = self._item, b""
        if item is None or item.kind is not kind:
            events = self._open(kind)
            item = self._item
            assert item is not None
        self._sequence += 1
        return events + item.delta(text, self._sequence - 1)

    def _open_call(self, id: str, name: str) -> bytes:
        callee = self._asked.callees.get(name) or Callee(name, "", custom=False)
        fields = {"call_id": id, "name": callee.name} | ({"namespace": callee.namespace} if callee.namespace else {})
        return self._open(_CUSTOM if callee.custom else _CALL, **fields)

    def _arguments(self, text: str) -> bytes:
        item = self._item
        assert item is not None
        if item.input is not None:
            text = item.input.push(text)
            if not text:
                return b""
        self._sequence += 1
        return item.delta(text, self._sequence - 1)

    def _open(self, kind: _Kind, **fields: str) -> bytes:
        """Closes the open item and opens another."""
        events, index = self._close("completed"), len(self._done)
        self._item = item = _Item(kind, {"id": f"{kind.id}_{self._served.id}_{index}", **fields}, index)
        events += self._event(
            "response.output_item.added", b'"output_index":%d,"item":%b' % (index, item.item("in_progress"))
        )
        if kind.part is not None:
            part = encode(kind.part | {kind.text: ""})
            events += self._event("response.content_part.added", b'%b,"part":%b' % (item.place, part))
        return events

    def _close(self, status: str) -> bytes:
        """Returns the last events of the open item, if there is one."""
        item = self._item
        if item is None:
            return b""
        kind, index, text = item.kind, len(self._done), item.text
        made = item.item(status, encrypts=self._asked.encrypts and kind is _REASONING)
        events = self._event(
            kind.done, b'%b%b,"%b":%b' % (item.place, kind.more, kind.text.encode(), encode_text(text))
        )
        if kind.part is not None:
            part = encode(kind.part | {kind.text: text})
            events += self._event("response.content_part.done", b'%b,"part":%b' % (item.place, part))
        events += self._event("response.output_item.done", b'"output_index":%d,"item":%b' % (index, made))
        self._done.append(made)
        self._item = None
        return events

    def _progress(self, name: str) -> bytes:
        return self._event(f"response.{name}", b'"response":' + self._response("in_progress"))

    def _event(self, name: str, fields: bytes) -> bytes:
        kind, sequence = name.encode(), self._sequence
        self._sequence += 1
        return b'event: %b\ndata: {"type":"%b","sequence_number":%d,%b}\n\n' % (kind, kind, sequence, fields)

    def _response(
        self, status: str, finished: inference_pb2.Finished | None = None, error: dict[str, str] | None = None
    ) -> bytes:
        changing: dict[str, Any] = {
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "usage": None if finished is None else _usage(finished.usage),
        }
        if finished is not None:
            report = answer_report(finished, self._accepted.seed, self._accepted.brownout_from)
            changing["overfill"] = {"pair": self._served.pair, **report}
        output = b"" if status == "in_progress" else b",".join(self._done)
        return b'%b,%b,"output":[%b]}' % (self._constant, encode(changing)[1:-1], output)


def _usage(usage: Any) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
