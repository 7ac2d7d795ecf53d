"""Turns a caller's arguments into a request message, and checks them. No I/O."""

from __future__ import annotations

import json
import math
import operator
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, TypeAlias, TypedDict, TypeVar

from overfill.errors import InvalidRequest
from overfill.request.messages import shared_fields
from overfill.request.names import CODECS
from overfill.request.params import SamplingParams, check_token_ids
from overfill.v1 import common_pb2, inference_pb2

T = TypeVar("T", "Message", "ToolCall")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One tool call in an answer.

    Attributes:
        id: Id of the call, unique in the conversation.
        name: Name of the tool.
        arguments: Arguments, as JSON text of an object.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call.

    Args:
        name: Name of the function: 1 to 128 letters, digits, ``_`` and ``-``.
        description: What it does, for the model.
        parameters: JSON schema of its arguments; None means that it has none.
        strict: Whether a schema that a grammar cannot enforce in full is an error. Otherwise, calls follow what it can
            enforce.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat.

    Args:
        role: "system", "user", "assistant" or "tool".
        content: Text of the message.
        tool_calls: Tool calls that the assistant made in this message; only with role "assistant".
        tool_call_id: Id of the tool call that ``content`` answers; only with role "tool".
        reasoning: What the assistant thought before ``content``; only with role "assistant". A chat template may leave
            it out.
    """

    role: str
    content: str = ""
    tool_calls: Sequence[ToolCall] = ()
    tool_call_id: str = ""
    reasoning: str = ""


@dataclass(frozen=True, slots=True)
class AnswerIdentity:
    """What the tokens of an answer depend on besides its sampling: the prompt, and what reads and writes.

    A router continues an answer only if every field is the same there. Digests are SHA-256 in hexadecimal.

    Attributes:
        full_digest: Digest of the full model.
        config_digest: Digest of its config.
        reader_digest: Digest of the weights that compute the prompt's KV; today the full model's.
        reader_quantize: Format to which these weights are rounded on load; empty means none.
        tokenizer_digest: Digest of tokenizer.json.
        decoder_digest: Digest of the decoder.
        decoder_config_digest: Digest of the decoder's config and layer map.
        decoder_quantize: Format to which the decoder's weights are rounded on load, such as "int8"; empty means none.
        kv_cache_dtype: Format in which decode workers hold KV, such as "int8"; empty means the dtype that travels.
        adapter_digest: Digest of the adapter that writes; empty means none.
        revision: Revision of the pair; empty in a stack without revisions.
        prompt_tokens: Number of tokens in the prompt, after its truncation.
        prompt_digest: Digest of the prompt's token ids, each 4 bytes, little-endian.
        kv_dtype: Element type in which the workers compute, such as "bfloat16"; empty means that the router did not
            know it yet, and fits each.
        answer_start: The request's ``answer_start``; 0 means that it had none.
        answer_format: Formats in which the router reads the answer's text: of tool calls and, if it reads one, of
            reasoning, such as "hermes,qwen3".
    """

    full_digest: str = ""
    config_digest: str = ""
    reader_digest: str = ""
    reader_quantize: str = ""
    tokenizer_digest: str = ""
    decoder_digest: str = ""
    decoder_config_digest: str = ""
    decoder_quantize: str = ""
    kv_cache_dtype: str = ""
    adapter_digest: str = ""
    revision: str = ""
    prompt_tokens: int = 0
    prompt_digest: str = ""
    kv_dtype: str = ""
    answer_start: int = 0
    answer_format: str = ""

    def to_proto(self) -> inference_pb2.AnswerIdentity:
        return inference_pb2.AnswerIdentity(**asdict(self))

    @classmethod
    def from_proto(cls, message: inference_pb2.AnswerIdentity) -> AnswerIdentity:
        return cls(**shared_fields(cls, message))


_MODES = {
    "auto": inference_pb2.ToolChoice.MODE_AUTO,
    "none": inference_pb2.ToolChoice.MODE_NONE,
    "required": inference_pb2.ToolChoice.MODE_REQUIRED,
}

Prompt: TypeAlias = "str | Sequence[int] | Sequence[Message | Mapping[str, Any]]"
"""Text (tokenized unchanged), token ids (used unchanged), or a chat (rendered with the chat template).

A chat message may also be a mapping with the fields of ``Message``, and each of its tool calls one with those of
``ToolCall``. An assistant's ``content`` may be None or missing.
"""


class Options(TypedDict, total=False):
    """Options of every request; all are keyword arguments, and all are optional.

    Attributes:
        model: Name of the model, "NAME:TIER" or "NAME:ADAPTER"; empty means the only one served.
        sampling: How tokens are sampled; None means the defaults of SamplingParams.
        stop: Strings that end the answer; the answer does not include them. In an answer with tool calls, they count in
            the text before the first call.
        timeout: Seconds for the whole request; None means no limit.
        request_id: Id of the request: at most 128 letters, digits, ``_``, ``.``, ``:``, ``/`` and ``-``. Empty means
            that the router makes one.
        resume_token_ids: Tokens of this answer that an earlier request returned; needs that request's seed and
            ``resume_identity``.
        resume_identity: ``identity`` of the answer, or of the error's ``produced``, that ``resume_token_ids`` are from.
            A router at which the answer would depend on something else refuses it.
        trace: Whether the answer has a ``trace``.
        sample_index: Number of this answer among several answers to the prompt. With one seed, each index gives a
            different answer.
        priority: Class in the router's queue, -2 to 2; smaller numbers go first.
        session: Session of yours to which the request belongs, such as a chat's id; empty means none. Its next request
            goes to the same workers, where its prompt is cached, and the sessions of an API key take turns.
        kv_codec: Encoding in which the prompt's KV travels: "raw" or "int8"; empty means that the workers
            choose.
        tools: Tools that the model may call; only with a chat.
        tool_choice: "auto" (text, calls or both; the default with tools), "none", "required" (calls only), or the name
            of the tool to call.
        single_tool_call: Whether the answer may have at most one tool call.
        chat_template_kwargs: Variables for the chat template, such as ``{"enable_thinking": False}``; only with a chat.
        continue_final_message: Whether the answer continues the last message's text; only with a chat.
        parse_special: Whether the text of a special token, such as ``<|im_end|>``, becomes that token in messages and
            tools; only with a chat. Otherwise it stays text.
        truncate_prompt_tokens: Number of the prompt's last tokens to keep; -1 means as many as fit the context
            together with ``max_tokens``.
        stream_interval: Minimum number of tokens in a delta, except in the first and the last one. The router's own
            minimum counts if it is larger.
        answer_start: Index of the first prompt token that the tier's decoder computes, on the full model's KV of those
            before; only with ``prompt_logprobs``. The full model scores this token, the decoder those after it.
        tier: Tier or adapter that writes the answer; empty means the one in ``model``, as in "NAME:TIER", or else the
            stack's default tier.
        fallback: Tier that continues the answer when its own tier has no decode worker left; "none" means that the
            request waits; empty means what the tier's settings say.
        allow_brownout: Whether the next tier of the router's ``--brownout`` may write the answer when the requested
            tier is overloaded or has no ready worker; None means what the API key says.
    """

    model: str
    sampling: SamplingParams | None
    stop: Sequence[str]
    timeout: float | None
    request_id: str
    resume_token_ids: Sequence[int]
    resume_identity: AnswerIdentity | None
    trace: bool
    sample_index: int
    kv_codec: str
    priority: int
    session: str
    tools: Sequence[Tool]
    tool_choice: str
    single_tool_call: bool
    chat_template_kwargs: Mapping[str, Any]
    continue_final_message: bool
    parse_special: bool
    truncate_prompt_tokens: int
    stream_interval: int
    answer_start: int
    tier: str
    fallback: str
    allow_brownout: bool | None


def build_request(prompt: Prompt, options: Options) -> inference_pb2.GenerateRequest:
    """Builds the request message. Checks all that needs no model; raises InvalidRequest that names the field.

    The message does not include ``timeout``, which gRPC sends as the RPC's deadline.

    Raises:
        TypeError: there is no such option.
    """
    if unknown := sorted(options.keys() - Options.__annotations__.keys()):
        of_sampling = [name for name in unknown if name in SamplingParams.__dataclass_fields__]
        where = f"; {', '.join(of_sampling)} belong in sampling=SamplingParams(...)" if of_sampling else ""
        raise TypeError(f"a request has no option {', '.join(unknown)}{where}")
    stop, sampling = options.get("stop", ()), options.get("sampling")
    if isinstance(stop, str):
        raise InvalidRequest("stop", f"is one string; give a sequence of strings, such as [{stop[:50]!r}]")
    request = inference_pb2.GenerateRequest(
        model=_text("model", options.get("model", "")),
        sampling=sampling.to_proto() if sampling is not None else None,
        stop=[_text("stop", s) for s in stop],
        resume_token_ids=_ids("resume_token_ids", options.get("resume_token_ids", ())),
        request_id=_text("request_id", options.get("request_id", "")),
        trace=options.get("trace", False),
        sample_index=_uint32("sample_index", options.get("sample_index", 0)),
        kv_codec=_codec(options.get("kv_codec", "")),
        priority=_int32("priority", options.get("priority", 0)),
        session=_text("session", options.get("session", "")),
        stream_interval=_uint32("stream_interval", options.get("stream_interval", 0)),
        tier=_text("tier", options.get("tier", "")),
        fallback=_text("fallback", options.get("fallback", "")),
    )
    if (identity := options.get("resume_identity")) is not None:
        if not isinstance(identity, AnswerIdentity):
            raise InvalidRequest("resume_identity", f"is of type {type(identity).__name__}; give an AnswerIdentity")
        request.resume_identity.CopyFrom(identity.to_proto())
    if (allowed := options.get("allow_brownout")) is not None:
        request.allow_brownout = allowed
    if "answer_start" in options:
        request.answer_start = _uint32("answer_start", options["answer_start"])
    if "truncate_prompt_tokens" in options:
        request.truncate_prompt_tokens = _int32("truncate_prompt_tokens", options["truncate_prompt_tokens"])
    if isinstance(prompt, str):
        request.text = _text("text", prompt)
    elif not isinstance(prompt, Sequence):
        raise InvalidRequest("prompt", f"is of type {type(prompt).__name__}; give text, token ids or messages")
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
    """Raises InvalidRequest if ``messages`` is text, which the model would continue without the chat template."""
    if isinstance(messages, str):
        raise InvalidRequest("messages", 'is text; give a list such as [Message("user", text)], or call generate(text)')


def build_chat(messages: Sequence[Any]) -> inference_pb2.Chat:
    """The chat as a message on the wire. Raises InvalidRequest that names the field."""
    return inference_pb2.Chat(messages=[_message(index, message) for index, message in enumerate(messages)])


def authorization(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """gRPC metadata for ``api_key``, empty for None. Raises ValueError if a header cannot hold the key."""
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
        raise ValueError("the API key contains characters other than printable ASCII; copy the key again")
    return () if api_key is None else (("authorization", f"Bearer {api_key}"),)


def sample_options(n: int, options: Options) -> list[Options]:
    """Options for ``n`` requests that give different answers to one prompt. Raises InvalidRequest."""
    if n < 1:
        raise InvalidRequest("n", f"must be at least 1, got {n}")
    sampling = options.get("sampling") or SamplingParams()
    if sampling.seed is None:  # one seed for all: each sample_index then gives another answer
        sampling = replace(sampling, seed=secrets.randbits(64))
    first = _uint32("sample_index", options.get("sample_index", 0))
    each: list[Options] = []
    for index in range(first, first + n):
        one: Options = {**options, "sampling": sampling, "sample_index": index}
        if options.get("request_id"):
            one["request_id"] = f"{options['request_id']}-{index}"
        each.append(one)
    return each


def task_options(tasks: Sequence[str], options: Options) -> list[Options]:
    """Options for a request to each of ``tasks``, all in one session. Raises InvalidRequest."""
    if isinstance(tasks, str) or not tasks:
        raise InvalidRequest("tasks", f"is {tasks!r}; give a sequence of names of tiers and adapters")
    if options.get("tier"):
        raise InvalidRequest(
            "tier", f"is {options['tier']!r}, but each of `tasks` is what writes an answer; leave it out"
        )
    shared: Options = {**options, "session": options.get("session") or secrets.token_hex(8)}
    each: list[Options] = []
    for index, task in enumerate(tasks):
        one: Options = {**shared, "tier": task}
        if options.get("request_id"):
            one["request_id"] = f"{options['request_id']}-{index}"
        each.append(one)
    return each


def check_timeout(timeout: float | None) -> None:
    """Raises InvalidRequest unless ``timeout`` is None or a positive, finite number of seconds."""
    if timeout is not None and not (math.isfinite(timeout) and timeout > 0):
        raise InvalidRequest("timeout", f"must be a positive number of seconds or None, got {timeout}")


def _message(index: int, given: Any) -> inference_pb2.ChatMessage:
    field = f"chat.messages[{index}]"
    if isinstance(given, Mapping) and "role" not in given:
        raise InvalidRequest(field, "has no role; give system, user, assistant or tool")
    message = _from_mapping(field, given, Message)
    if isinstance(message.tool_calls, str | Mapping) or not isinstance(message.tool_calls, Sequence):
        reason = f"is of type {type(message.tool_calls).__name__}; give a sequence of tool calls"
        raise InvalidRequest(f"{field}.tool_calls", reason)
    if isinstance(given, Mapping) and "content" not in given and message.role != "assistant":
        raise InvalidRequest(f"{field}.content", f"is missing; a message of role {message.role!r} needs it")
    content = "" if message.content is None and message.role == "assistant" else message.content
    return inference_pb2.ChatMessage(
        role=_text(f"{field}.role", message.role),
        content=_text(f"{field}.content", content),
        tool_calls=[_tool_call(f"{field}.tool_calls[{i}]", call) for i, call in enumerate(message.tool_calls)],
        tool_call_id=_text(f"{field}.tool_call_id", message.tool_call_id),
        reasoning=_text(f"{field}.reasoning", message.reasoning),
    )


def _tool_call(field: str, given: Any) -> inference_pb2.ToolCall:
    call = _from_mapping(field, given, ToolCall)
    return inference_pb2.ToolCall(**{f.name: _text(f"{field}.{f.name}", getattr(call, f.name)) for f in fields(call)})


def _from_mapping(field: str, given: Any, kind: type[T]) -> T:
    """Returns ``given``, which is a ``kind`` or a mapping with its fields."""
    if isinstance(given, kind):
        return given
    if not isinstance(given, Mapping):
        reason = f"is of type {type(given).__name__}; give a {kind.__name__} or a mapping with its fields"
        raise InvalidRequest(field, reason)
    known = {f.name: f.default is MISSING for f in fields(kind)}  # whether each must be given
    if unknown := given.keys() - known:
        raise InvalidRequest(field, f"has unknown fields {sorted(map(str, unknown))}; known are {list(known)}")
    if missing := [name for name, required in known.items() if required and name not in given]:
        raise InvalidRequest(field, f"has no {', '.join(missing)}")
    return kind(**given)


def _add_tools(request: inference_pb2.GenerateRequest, options: Options) -> None:
    tools, choice = options.get("tools", ()), options.get("tool_choice", "")
    if not tools and not choice:
        return
    if not request.HasField("chat"):
        raise InvalidRequest("tools", "are only for chats; give messages as the prompt")
    for tool in tools:
        request.chat.tools.add(
            name=_text("tools.name", tool.name),
            description=_text("tools.description", tool.description),
            parameters="" if tool.parameters is None else _json_text("tools.parameters", tool.parameters),
            strict=tool.strict,
        )
    kind = inference_pb2.ToolChoice
    if choice in _MODES:
        request.chat.tool_choice.mode = _MODES[choice]
    elif choice:
        request.chat.tool_choice.mode, request.chat.tool_choice.name = kind.MODE_REQUIRED, choice
    request.chat.single_tool_call = options.get("single_tool_call", False)


def _add_template_options(request: inference_pb2.GenerateRequest, options: Options) -> None:
    for name in ("chat_template_kwargs", "continue_final_message", "parse_special"):
        if options.get(name) and not request.HasField("chat"):
            raise InvalidRequest(name, "is only for chats; give messages as the prompt")
    if variables := options.get("chat_template_kwargs"):
        request.chat.chat_template_kwargs = _json_text("chat_template_kwargs", variables)
    for name in ("continue_final_message", "parse_special"):
        if options.get(name):
            setattr(request.chat, name, True)


def _json_text(field: str, value: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(field, f"is not JSON: {error}") from None


def _uint32(field: str, value: int) -> int:
    if not 0 <= value < 1 << 32:
        raise InvalidRequest(field, f"must be in [0, 2^32), got {value}")
    return value


def _int32(field: str, value: int) -> int:
    if not -(1 << 31) <= value < 1 << 31:
        raise InvalidRequest(field, f"must be in [-2^31, 2^31), got {value}")
    return value


def _text(field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(field, f"is of type {type(value).__name__}; give text")
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
        raise InvalidRequest(field, "holds a value that is not an integer; give token ids") from None
    check_token_ids(field, ids, 1 << 32)
    return ids


def _codec(name: str) -> common_pb2.KvCodec:
    if not name:
        return common_pb2.KV_CODEC_UNSPECIFIED
    for known, codec in CODECS.items():
        if name == known:
            return codec
    raise InvalidRequest("kv_codec", f"is {name!r}; known are {', '.join(CODECS)}")
