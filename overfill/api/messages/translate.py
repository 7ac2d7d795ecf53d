"""Turns requests of ``schema`` into our messages."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from overfill.api.messages import schema
from overfill.api.messages.answers import MessageWriter
from overfill.api.messages.errors import THREAD_UNSUPPORTED
from overfill.api.opaque_reasoning import decode_reasoning
from overfill.api.openai.errors import ApiError
from overfill.api.openai.fields import function_tool, invalid, json_text, schema_grammar, set_filters
from overfill.api.reasoning import thinking_variables
from overfill.api.translation import OwnField, Served, Translation
from overfill.errors import InvalidRequest, OverfillError, PromptTooLong
from overfill.v1 import common_pb2, inference_pb2

_Choice = inference_pb2.ToolChoice
_MODES = {
    "auto": _Choice.MODE_AUTO,
    "any": _Choice.MODE_REQUIRED,
    "tool": _Choice.MODE_REQUIRED,
    "none": _Choice.MODE_NONE,
}

_SEARCH = "tool_search_tool_"
"""Beginning of the types of Anthropic's tools that search tools."""

# Patterns of our field paths, and the names that Anthropic has for these fields.
_FIELDS = (
    (re.compile(r"^sampling\.grammar.*"), "output_config.format"),
    (re.compile(r"^(sampling|chat)\."), ""),
    (re.compile(r"^stop\b"), "stop_sequences"),
    (re.compile(r"^messages\[.*"), "messages"),  # joined turns have other numbers
    (re.compile(r"^(chat|prompt|continue_final_message)$"), "messages"),
    (re.compile(r"\.parameters$"), ".input_schema"),
)
_TOOL = re.compile(r"(?<=^tools\[)\d+")


def messages(request: schema.MessagesRequest, request_id: str) -> Translation:
    """Translates a request for a message. Raises ApiError."""
    if request.thread is not None:
        message = "'thread' is not supported: the server stores nothing; send the whole conversation"
        raise ApiError(400, message, param="thread", code=THREAD_UNSUPPORTED)
    chat, places, left_out = _chat(request)
    generate = inference_pb2.GenerateRequest(
        model=request.model,
        chat=chat,
        sampling=_sampling(request),
        stop=request.stop_sequences or (),
        request_id=request_id,
        fit_max_tokens=True,
    )
    thinking, stream = request.thinking, bool(request.stream)
    hide_thinking = thinking is not None and thinking.display == "omitted"

    def writer(served: Served) -> MessageWriter:
        return MessageWriter(served, max_tokens=request.max_tokens, hide_thinking=hide_thinking, stream=stream)

    return Translation(generate, stream, writer, partial(_own_field, places), left_out)


def count_tokens(
    request: schema.CountTokensRequest,
) -> tuple[inference_pb2.TokenizeRequest, OwnField]:
    """Translates a request to count a prompt's tokens; also returns ``Translation.own_field``. Raises ApiError."""
    chat, places, _ = _chat(request)
    return inference_pb2.TokenizeRequest(model=request.model, chat=chat), partial(_own_field, places)


def _own_field(tools: Sequence[int], error: OverfillError) -> OverfillError:
    """Returns ``error`` with Anthropic's name of the field. ``tools`` are the places of the tools in the request."""
    if not isinstance(error, InvalidRequest):
        return error
    if isinstance(error, PromptTooLong) and error.field == "prompt":
        # Claude Code recognises this sentence.
        sizes = f"{error.tokens} tokens > {error.limit} maximum" if error.tokens else error.reason
        return PromptTooLong("", f"prompt is too long: {sizes}")
    name = error.field
    for pattern, replacement in _FIELDS:
        name = pattern.sub(replacement, name)
    name = _TOOL.sub(lambda number: str(tools[int(number[0])]), name)
    return type(error)("", f"'{name}' {error.reason}" if name else error.reason)


def _sampling(request: schema.MessagesRequest) -> common_pb2.SamplingParams:
    params = common_pb2.SamplingParams(max_tokens=max(1, request.max_tokens))
    set_filters(params, request.temperature, request.top_p, request.top_k)
    config = request.output_config
    if config is not None and config.format is not None:
        grammar = schema_grammar("output_config.format.schema", config.format.schema_)
        params.grammar.CopyFrom(grammar.to_proto())
    return params


def _chat(request: schema.CountTokensRequest) -> tuple[inference_pb2.Chat, list[int], list[str]]:
    """The chat of a request, the places of its tools in the request, and what was left out."""
    chat = inference_pb2.Chat()
    turns = _Turns()
    turns.read(request)
    for turn in turns.all:
        chat.messages.add(
            role=turn.role,
            content="\n".join(turn.texts),
            tool_calls=turn.calls,
            tool_call_id=turn.tool_call_id,
            reasoning="\n".join(turn.reasoning),
        )
    if not turns.all:
        raise invalid("messages", "have no text")
    last = turns.all[-1]
    if last.role == "assistant":
        if last.calls:
            place = f"messages[{len(request.messages) - 1}]"
            raise invalid(place, "is the last message and uses tools; give their results in a message after it")
        chat.continue_final_message = True
    if variables := _thinking(request):
        chat.chat_template_kwargs = json.dumps(variables)
    places, left_out = _add_tools(request, turns.offered, chat)
    _choose_tools(request.tool_choice, chat)
    if request.mcp_servers:
        left_out.append("mcp_servers")
    return chat, places, left_out


@dataclass(slots=True)
class _Turn:
    """A message of the chat, to which consecutive messages of one role add."""

    role: str
    tool_call_id: str = ""
    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[inference_pb2.ToolCall] = field(default_factory=list)


class _Turns:
    """Reads the messages of a request.

    Attributes:
        all: the chat's messages.
        offered: names of the deferred tools that the conversation offers.
    """

    def __init__(self) -> None:
        self.all: list[_Turn] = []
        self.offered: set[str] = set()
        self._called: set[str] = set()  # ids of the calls so far

    def read(self, request: schema.CountTokensRequest) -> None:
        """Reads the system prompt and the messages. Raises ApiError."""
        system = request.system or ()
        if system:
            texts = [system] if isinstance(system, str) else [block.text for block in system]
            self._turn("system").texts += texts
        for index, message in enumerate(request.messages):
            place, content = f"messages[{index}].content", message.content
            if isinstance(content, str):
                self._turn(message.role).texts.append(content)
                continue
            if not content:
                self._turn(message.role)
            for number, block in enumerate(content):
                self._add(message.role, block, f"{place}[{number}]")

    def _turn(self, role: str) -> _Turn:
        if not self.all or self.all[-1].role != role:
            self.all.append(_Turn(role))
        return self.all[-1]

    def _add(self, role: str, block: schema.Block, place: str) -> None:
        match block, role:
            case schema.TextBlock(), _:
                self._turn(role).texts.append(block.text)
            case schema.ToolUseBlock(), "assistant":
                self._called.add(block.id)
                arguments = json_text(f"{place}.input", block.input)
                self._turn(role).calls.append(inference_pb2.ToolCall(id=block.id, name=block.name, arguments=arguments))
            case schema.ToolResultBlock(), "user":
                if block.tool_use_id not in self._called:
                    id = block.tool_use_id[:80]
                    raise invalid(f"{place}.tool_use_id", f"is {id!r}; no 'tool_use' block before it has this id")
                self.all.append(_Turn("tool", block.tool_use_id, [self._result(block, place)]))
            case schema.ThinkingBlock(), "assistant":
                text = block.thinking or decode_reasoning(block.signature)
                self._turn(role).reasoning += [text] if text else []
            case schema.RedactedThinkingBlock(), "assistant":
                self._turn(role)
            case schema.ToolChangeBlock(), "system":
                change = self.offered.add if block.type == "tool_addition" else self.offered.discard
                change(block.tool.name)
            case schema.OtherBlock(), _:
                raise _refused(block, place)
            case _:
                raise invalid(f"{place}.type", f"{block.type!r} is not allowed in a message of role {role!r}")

    def _result(self, result: schema.ToolResultBlock, place: str) -> str:
        """The text of a tool's result."""
        content, texts = result.content, ["Error:"] if result.is_error else []
        if isinstance(content, str):
            texts.append(content)
            content = None
        for number, block in enumerate(content or ()):
            match block:
                case schema.TextBlock():
                    texts.append(block.text)
                case schema.ToolReferenceBlock():
                    self.offered.add(block.tool_name)
                    texts.append(f"The tool {block.tool_name} can be used now.")
                case _:
                    raise _refused(block, f"{place}.content[{number}]")
        return "\n".join(texts)


def _add_tools(
    request: schema.CountTokensRequest, offered: set[str], chat: inference_pb2.Chat
) -> tuple[list[int], list[str]]:
    """Adds the tools of a request to ``chat``. Returns their places in the request, and the types of those left out."""
    places, left_out, tools = [], [], request.tools or ()
    # This server cannot search the deferred tools for the model, so it offers all of them.
    unsearched = any((tool.type or "").startswith(_SEARCH) for tool in tools)
    for index, tool in enumerate(tools):
        place = f"tools[{index}].input_schema"
        if tool.type not in (None, "custom"):
            left_out.append(tool.type)
            continue
        if tool.defer_loading and not unsearched and tool.name not in offered:
            continue
        if tool.input_schema is None:
            raise invalid(place, "is missing; give the JSON schema of the tool's input")
        places.append(index)
        chat.tools.append(function_tool(tool.name, tool.description, place, tool.input_schema, strict=tool.strict))
    return places, left_out


def _thinking(request: schema.CountTokensRequest) -> dict[str, Any]:
    """The variables of the chat template that say whether and how much the model thinks."""
    effort = None if request.output_config is None else request.output_config.effort
    kind = "" if request.thinking is None else request.thinking.type
    return thinking_variables(effort, {"enabled": True, "disabled": False}.get(kind))


def _choose_tools(choice: schema.ToolChoice | None, chat: inference_pb2.Chat) -> None:
    if choice is None:
        return
    chat.tool_choice.mode = _MODES[choice.type]
    if choice.type == "any" and not chat.tools:
        raise invalid("tool_choice.type", "is 'any', but the request has no tool that this server can offer")
    if choice.type == "tool":
        if choice.name not in {tool.name for tool in chat.tools}:
            name = (choice.name or "")[:80]
            raise invalid("tool_choice.name", f"is {name!r}, which is not one of the tools that this server can offer")
        chat.tool_choice.name = choice.name
    # A model calls a named tool once.
    chat.single_tool_call = bool(choice.disable_parallel_tool_use) or choice.type == "tool"


def _refused(block: schema.OtherBlock, place: str) -> ApiError:
    supported = "blocks of text, thinking, tool_use and tool_result are"
    return invalid(f"{place}.type", f"{block.type[:50]!r} is not supported; {supported}")
