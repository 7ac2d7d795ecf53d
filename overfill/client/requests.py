"""From what a caller says to a request on the wire. No I/O."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict

from overfill.errors import InvalidRequest
from overfill.params import SamplingParams, check_token_ids
from overfill.v1 import inference_pb2


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat; ``role`` is "system", "user" or "assistant"."""

    role: str
    content: str


Prompt: TypeAlias = "str | Sequence[int] | Sequence[Message | Mapping[str, str]]"
"""Text (tokenized as it is), token ids (used as they are), or a chat (rendered with the chat template).

A chat message may also be a mapping with ``role`` and ``content``.
"""


class Options(TypedDict, total=False):
    """What may go with every prompt; all by keyword, all optional.

    Keys:
        model: empty means the only one served.
        sampling: None means the defaults of SamplingParams.
        stop: strings that end the answer; not part of it.
        timeout: seconds for the whole request; None means no limit.
        request_id: empty lets the router make one.
        resume_token_ids: tokens of this answer that are there already; needs the first attempt's seed.
        trace: ask for ``Answer.trace``.
    """

    model: str
    sampling: SamplingParams | None
    stop: Sequence[str]
    timeout: float | None
    request_id: str
    resume_token_ids: Sequence[int]
    trace: bool


def build_request(prompt: Prompt, options: Options) -> inference_pb2.GenerateRequest:
    """The request, checked as far as can be without the model. Raises InvalidRequest naming the field.

    ``timeout`` is not part of it: it travels as the RPC's deadline.
    """
    stop, sampling = options.get("stop", ()), options.get("sampling")
    if isinstance(stop, str):
        raise InvalidRequest("stop", "give a sequence of strings, not one string")
    request = inference_pb2.GenerateRequest(
        model=_text("model", options.get("model", "")),
        sampling=sampling.to_proto() if sampling is not None else None,
        stop=[_text("stop", s) for s in stop],
        resume_token_ids=_ids("resume_token_ids", options.get("resume_token_ids", ())),
        request_id=_text("request_id", options.get("request_id", "")),
        trace=options.get("trace", False),
    )
    if isinstance(prompt, str):
        request.text = _text("text", prompt)
    elif not isinstance(prompt, Sequence):
        raise InvalidRequest("prompt", f"give text, token ids or messages, not {type(prompt).__name__}")
    elif not prompt:
        raise InvalidRequest("prompt", "is empty")
    elif isinstance(prompt[0], Message | Mapping):
        request.chat.messages.extend(_message(i, message) for i, message in enumerate(prompt))
    else:
        request.token_ids.ids.extend(_ids("token_ids.ids", prompt))
    return request


def check_timeout(timeout: float | None) -> None:
    """Raises InvalidRequest unless ``timeout`` is None or a positive, finite number of seconds."""
    if timeout is not None and not (math.isfinite(timeout) and timeout > 0):
        raise InvalidRequest("timeout", f"must be a positive number of seconds or None, got {timeout}")


def split_addresses(address: str) -> list[str]:
    """Splits a comma-separated list. Raises ValueError when an entry is empty."""
    addresses = [part.strip() for part in address.split(",")]
    if not all(addresses):
        raise ValueError(f"an address is host:port or unix:path, or a comma-separated list; got {address!r}")
    return addresses


def _message(index: int, message: Any) -> inference_pb2.ChatMessage:
    field = f"chat.messages[{index}]"
    if isinstance(message, Mapping):
        if set(message) != {"role", "content"}:
            raise InvalidRequest(field, f"needs exactly role and content, got {sorted(map(str, message))}")
        message = Message(**message)
    if not isinstance(message, Message):
        raise InvalidRequest(field, f"is not a message but {type(message).__name__}")
    return inference_pb2.ChatMessage(
        role=_text(f"{field}.role", message.role), content=_text(f"{field}.content", message.content)
    )


def _text(field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(field, f"must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        reason = f"is not valid Unicode: lone surrogate at character {error.start}"
        raise InvalidRequest(field, reason) from None
    return value


def _ids(field: str, values: Sequence[Any]) -> list[int]:
    try:
        ids = [operator.index(value) for value in values]
    except TypeError:
        raise InvalidRequest(field, "token ids are integers") from None
    check_token_ids(field, ids, 1 << 32)
    return ids
