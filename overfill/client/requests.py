"""From what a caller says to a request on the wire. No I/O."""

from __future__ import annotations

import json
import math
import operator
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias, TypedDict

from overfill.errors import InvalidRequest
from overfill.request.names import CODECS
from overfill.request.params import SamplingParams, check_token_ids
from overfill.v1 import common_pb2, inference_pb2


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool in an answer; ``arguments`` is the JSON text of an object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; ``parameters`` is the JSON schema of its arguments."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat.

    Args:
        role: "system", "user", "assistant" or "tool".
        tool_calls: of an assistant's message, those that it made.
        tool_call_id: of a tool's message, the call that ``content`` answers.
    """

    role: str
    content: str = ""
    tool_calls: Sequence[ToolCall] = ()
    tool_call_id: str = ""


_MODES = {
    "auto": inference_pb2.ToolChoice.MODE_AUTO,
    "none": inference_pb2.ToolChoice.MODE_NONE,
    "required": inference_pb2.ToolChoice.MODE_REQUIRED,
}

Prompt: TypeAlias = "str | Sequence[int] | Sequence[Message | Mapping[str, Any]]"
"""Text (tokenized as it is), token ids (used as they are), or a chat (rendered with the chat template).

A chat message may also be a mapping with the fields of ``Message``.
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
        sample_index: which of several answers to the prompt; with one seed, each index has an answer of its own.
        priority: -2 to 2; the smaller goes first, among requests that wait for a place.
        kv_codec: how the prompt's KV travels: "raw", "int8" or "fp8"; empty leaves it to the workers.
        tools: that the model may call; only with a chat.
        tool_choice: "auto" (text, calls or both; the default with tools), "none", "required" (calls only), or the name
            of the tool to call.
        single_tool_call: at most one call in the answer.
        chat_template_kwargs: variables for the chat template, such as ``{"enable_thinking": False}``; only with a chat.
        continue_final_message: the answer goes on with the last message's text; only with a chat.
        truncate_prompt_tokens: keep so many of the prompt's last tokens; -1: as many as the context holds beside
            ``max_tokens``.
    """

    model: str
    sampling: SamplingParams | None
    stop: Sequence[str]
    timeout: float | None
    request_id: str
    resume_token_ids: Sequence[int]
    trace: bool
    sample_index: int
    kv_codec: str
    priority: int
    tools: Sequence[Tool]
    tool_choice: str
    single_tool_call: bool
    chat_template_kwargs: Mapping[str, Any]
    continue_final_message: bool
    truncate_prompt_tokens: int


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
        sample_index=_count("sample_index", options.get("sample_index", 0)),
        kv_codec=_codec(options.get("kv_codec", "")),
        priority=_small("priority", options.get("priority", 0)),
    )
    if "truncate_prompt_tokens" in options:
        request.truncate_prompt_tokens = _small("truncate_prompt_tokens", options["truncate_prompt_tokens"])
    if isinstance(prompt, str):
        request.text = _text("text", prompt)
    elif not isinstance(prompt, Sequence):
        raise InvalidRequest("prompt", f"give text, token ids or messages, not {type(prompt).__name__}")
    elif not prompt:
        raise InvalidRequest("prompt", "is empty")
    elif isinstance(prompt[0], Message | Mapping):
        request.chat.CopyFrom(build_chat(prompt))
    else:
        request.token_ids.ids.extend(_ids("token_ids.ids", prompt))
    _add_tools(request, options)
    _add_template_options(request, options)
    return request


def check_messages(messages: object) -> None:
    """Raises InvalidRequest when ``messages`` is text, which would be continued without the chat template."""
    if isinstance(messages, str):
        raise InvalidRequest("messages", 'is text; give a list such as [Message("user", text)], or call generate(text)')


def build_chat(messages: Sequence[Any]) -> inference_pb2.Chat:
    """Raises InvalidRequest naming the field."""
    return inference_pb2.Chat(messages=[_message(index, message) for index, message in enumerate(messages)])


def authorization(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """Metadata of every call. Raises ValueError when ``api_key`` cannot be sent."""
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
        raise ValueError("the API key has characters that no key has; copy it again")
    return () if api_key is None else (("authorization", f"Bearer {api_key}"),)


def sample_options(n: int, options: Options) -> list[Options]:
    """Options of ``n`` requests for different answers to one prompt."""
    if n < 1:
        raise InvalidRequest("n", f"must be at least 1, got {n}")
    sampling = options.get("sampling") or SamplingParams()
    if sampling.seed is None:  # one for all, so that no two draw the same
        sampling = replace(sampling, seed=secrets.randbits(64))
    first = _count("sample_index", options.get("sample_index", 0))
    each: list[Options] = []
    for index in range(first, first + n):
        one: Options = {**options, "sampling": sampling, "sample_index": index}
        if options.get("request_id"):
            one["request_id"] = f"{options['request_id']}-{index}"
        each.append(one)
    return each


def check_timeout(timeout: float | None) -> None:
    """Raises InvalidRequest unless ``timeout`` is None or a positive, finite number of seconds."""
    if timeout is not None and not (math.isfinite(timeout) and timeout > 0):
        raise InvalidRequest("timeout", f"must be a positive number of seconds or None, got {timeout}")


def split_addresses(address: str) -> list[str]:
    """Splits a comma-separated list. Raises ValueError when an entry is empty or a URL."""
    addresses = [part.strip() for part in address.split(",")]
    if url := next((a for a in addresses if a.lower().startswith(("http://", "https://"))), None):
        raise ValueError(
            f"{url!r} is a URL; an address is HOST:PORT, of the router's gRPC port, such as 127.0.0.1:7600. "
            "The URL of the OpenAI endpoint is for OpenAI's clients"
        )
    if bare := next((a for a in addresses if a and ":" not in a), None):
        raise ValueError(f"{bare!r} has no port; an address is HOST:PORT, such as {bare}:7600")
    if not all(addresses):
        raise ValueError(f"an address is host:port or unix:path, or a comma-separated list; got {address!r}")
    return addresses


def _message(index: int, message: Any) -> inference_pb2.ChatMessage:
    field = f"chat.messages[{index}]"
    if isinstance(message, Mapping):
        if unknown := set(message) - {f.name for f in fields(Message)}:
            raise InvalidRequest(field, f"has unknown fields: {sorted(map(str, unknown))}")
        if "role" not in message:
            raise InvalidRequest(field, "needs a role")
        message = Message(**message)
    if not isinstance(message, Message):
        raise InvalidRequest(field, f"is not a message but {type(message).__name__}")
    return inference_pb2.ChatMessage(
        role=_text(f"{field}.role", message.role),
        content=_text(f"{field}.content", message.content),
        tool_calls=[
            inference_pb2.ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in message.tool_calls
        ],
        tool_call_id=_text(f"{field}.tool_call_id", message.tool_call_id),
    )


def _add_tools(request: inference_pb2.GenerateRequest, options: Options) -> None:
    tools, choice = options.get("tools", ()), options.get("tool_choice", "")
    if not tools and not choice:
        return
    if not request.HasField("chat"):
        raise InvalidRequest("tools", "are only for chats")
    for tool in tools:
        request.chat.tools.add(
            name=_text("tools.name", tool.name),
            description=_text("tools.description", tool.description),
            parameters="" if tool.parameters is None else _json_text("tools.parameters", tool.parameters),
        )
    kind = inference_pb2.ToolChoice
    if choice in _MODES:
        request.chat.tool_choice.mode = _MODES[choice]
    elif choice:
        request.chat.tool_choice.mode, request.chat.tool_choice.name = kind.MODE_REQUIRED, choice
    request.chat.single_tool_call = options.get("single_tool_call", False)


def _add_template_options(request: inference_pb2.GenerateRequest, options: Options) -> None:
    for name in ("chat_template_kwargs", "continue_final_message"):
        if options.get(name) and not request.HasField("chat"):
            raise InvalidRequest(name, "is only for chats")
    if variables := options.get("chat_template_kwargs"):
        request.chat.chat_template_kwargs = _json_text("chat_template_kwargs", variables)
    if options.get("continue_final_message"):
        request.chat.continue_final_message = True


def _json_text(field: str, value: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(field, f"is not JSON: {error}") from None


def _count(field: str, value: int) -> int:
    if not 0 <= value < 1 << 32:
        raise InvalidRequest(field, f"must be 0 or more, got {value}")
    return value


def _small(field: str, value: int) -> int:
    if not -(1 << 31) <= value < 1 << 31:
        raise InvalidRequest(field, f"must be a small integer, got {value}")
    return value


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


def _codec(name: str) -> common_pb2.KvCodec:
    if not name:
        return common_pb2.KV_CODEC_UNSPECIFIED
    for known, codec in CODECS.items():
        if name == known:
            return codec
    raise InvalidRequest("kv_codec", f"is {name!r}; give {', '.join(CODECS)}")
