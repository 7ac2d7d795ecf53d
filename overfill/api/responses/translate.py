"""Turns requests of ``schema`` into the router's, with error messages that name the client's fields."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from overfill.api.opaque_reasoning import decode_reasoning
from overfill.api.openai.errors import ApiError
from overfill.api.openai.fields import invalid, json_text, router_request, sampling_params, schema_grammar, uint32
from overfill.api.reasoning import thinking_variables
from overfill.api.responses import schema
from overfill.api.responses.answers import Asked, ResponseWriter
from overfill.api.responses.tools import ToolSet
from overfill.api.tools import TEXT_PARAMETER
from overfill.api.translation import AnswerWriter, Served, Translation
from overfill.errors import InvalidRequest, OverfillError
from overfill.request.params import Grammar
from overfill.v1 import common_pb2, inference_pb2

_SCHEMA = "text.format.schema"
_LIST = re.compile(r"chat\.(messages|tools)\[(\d+)\](.*)")
_CALL = re.compile(r"\.tool_calls\[(\d+)\](.*)")
_NAMES = {
    **dict.fromkeys(("prompt", "chat", "chat.messages", "text"), "input"),
    "chat.documents": "chat_template_kwargs.documents",
    "sampling.max_tokens": "max_output_tokens",
}
"""The client's names of fields that have no place in a list."""

_TEXT_PARTS = frozenset({"input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text"})
_Choice = inference_pb2.ToolChoice
_MODES = {"auto": _Choice.MODE_AUTO, "none": _Choice.MODE_NONE, "required": _Choice.MODE_REQUIRED}


def responses(request: schema.ResponsesRequest, request_id: str) -> Translation:
    """Translates a request. Raises ApiError."""
    sampling = sampling_params(request)
    if request.max_output_tokens is not None:
        sampling.max_tokens = uint32("max_output_tokens", request.max_output_tokens)
    generate = router_request(request, request_id, sampling)
    chat = generate.chat
    effort = request.reasoning.effort if request.reasoning is not None else None
    if variables := thinking_variables(effort) | (request.chat_template_kwargs or {}):
        chat.chat_template_kwargs = json_text("chat_template_kwargs", variables)
    tools = ToolSet(chat.tools)
    tools.add(request.tools or (), "tools")
    conversation = _Conversation(chat, tools)
    if request.instructions:
        conversation.system(request.instructions, "instructions")
    if isinstance(request.input, str):
        chat.messages.add(role="user", content=request.input)
        conversation.places.append(("input", []))
    else:
        conversation.add(request.input)
    _tool_choice(request, tools, chat)
    _format(request, generate.sampling)
    encrypts = "reasoning.encrypted_content" in (request.include or ())
    asked = Asked(_echo(request, tools), tools.callees, encrypts)

    def writer(served: Served) -> AnswerWriter:
        return ResponseWriter(served, asked)

    names = _FieldNames(conversation.places, tools.places)
    return Translation(generate, bool(request.stream), writer, names.own_field, list(tools.left_out))


class _Conversation:
    """The messages of a chat, made from items in their order.

    Attributes:
        places: for each message, the client's name of it and of the calls in it.
    """

    def __init__(self, chat: inference_pb2.Chat, tools: ToolSet) -> None:
        self.places: list[tuple[str, list[str]]] = []
        self._chat = chat
        self._tools = tools
        self._calls: dict[str, bool] = {}  # id of a call -> whether its tool is custom
        # The assistant's message that the next item may extend, and its parts so far: a message with a part more would
        # be a copy.
        self._open: inference_pb2.ChatMessage | None = None
        self._reasoning: list[str] = []
        self._texts: list[str] = []

    def system(self, text: str, place: str) -> None:
        self._message("system", place).content = text

    def add(self, items: Sequence[Any]) -> None:
        for index, item in enumerate(items):
            place = f"input[{index}]"
            match item:
                case schema.MessageItem():
                    text = _text(item.content, f"{place}.content")
                    if item.role == "assistant":
                        self._assistant(place, after_calls=False)
                        self._texts += [text] if text else []
                    else:
                        role = "system" if item.role == "developer" else item.role
                        self._message(role, place).content = text
                case schema.ReasoningItem():
                    if text := _reasoning(item, place):
                        self._assistant(place, after_calls=False, after_text=False)
                        self._reasoning.append(text)
                case schema.FunctionCallItem():
                    self._call(item, item.arguments, place)
                case schema.CustomCallItem():
                    self._call(item, json.dumps({TEXT_PARAMETER: item.input}, ensure_ascii=False), place)
                case schema.CallOutputItem():
                    self._output(item, place)
                case schema.AdditionalToolsItem():
                    self._tools.add(item.tools, f"{place}.tools")
                case schema.OtherItem():
                    raise _unknown(item, place)
        self._close()

    def _close(self) -> None:
        if self._open is not None:
            self._open.reasoning, self._open.content = "".join(self._reasoning), "\n\n".join(self._texts)
            self._open, self._reasoning, self._texts = None, [], []

    def _message(self, role: str, place: str) -> inference_pb2.ChatMessage:
        self._close()
        self.places.append((place, []))
        return self._chat.messages.add(role=role)

    def _assistant(self, place: str, *, after_calls: bool = True, after_text: bool = True) -> inference_pb2.ChatMessage:
        """Returns the open message, or a new one if the item cannot follow what the open one has."""
        message = self._open
        if message is None or (message.tool_calls and not after_calls) or (self._texts and not after_text):
            message = self._message("assistant", place)
            self._open = message
        return message

    def _call(self, item: schema.FunctionCallItem | schema.CustomCallItem, arguments: str, place: str) -> None:
        message = self._assistant(place)
        message.tool_calls.add(id=item.call_id, name=self._tools.flat(item.namespace, item.name), arguments=arguments)
        self.places[-1][1].append(place)
        self._calls[item.call_id] = isinstance(item, schema.CustomCallItem)

    def _output(self, item: schema.CallOutputItem, place: str) -> None:
        custom = self._calls.get(item.call_id)
        if custom is None:
            raise invalid(f"{place}.call_id", f"is {item.call_id[:80]!r}, but no call before it has this id")
        if custom != item.type.startswith("custom"):
            kind = "custom_tool_call_output" if custom else "function_call_output"
            raise invalid(f"{place}.type", f"is {item.type!r}; the output of this call is a {kind!r}")
        message = self._message("tool", place)
        message.tool_call_id = item.call_id
        message.content = _text(item.output, f"{place}.output")


def _unknown(item: schema.OtherItem, place: str) -> ApiError:
    if item.type == "item_reference":
        return invalid(f"{place}.type", "'item_reference' is not supported: send the items; nothing is stored")
    known = ", ".join(schema.ITEM_TYPES)
    return invalid(f"{place}.type", f"{item.type[:80]!r} is not supported; the items that are: {known}")


def _text(content: str | Sequence[schema.ItemPart], place: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in _TEXT_PARTS:
            raise invalid(f"{place}[{index}].type", f"{part.type[:80]!r} is not supported: this model reads text only")
        if text is None:
            raise invalid(f"{place}[{index}]", f"is of type {part.type!r} and has no text")
        texts.append(text)
    return "\n".join(texts)


def _reasoning(item: schema.ReasoningItem, place: str) -> str:
    """Returns the text of reasoning that the client sends back; empty if only another server can read it."""
    if item.content:
        return _text(item.content, f"{place}.content")
    return decode_reasoning(item.encrypted_content or "") or _text(item.summary or (), f"{place}.summary")


def _format(request: schema.ResponsesRequest, sampling: common_pb2.SamplingParams) -> None:
    asked = request.text.format if request.text is not None else None
    if asked is None or asked.type == "text":
        return
    if asked.type == "json_object":
        grammar = Grammar("json_object")
    elif asked.schema_ is None:
        raise invalid("text.format.schema", "is missing; type 'json_schema' needs it")
    else:
        grammar = schema_grammar(_SCHEMA, asked.schema_, strict=bool(asked.strict))
    sampling.grammar.CopyFrom(grammar.to_proto())


def _tool_choice(request: schema.ResponsesRequest, tools: ToolSet, chat: inference_pb2.Chat) -> None:
    choice = request.tool_choice
    named = isinstance(choice, schema.ToolChoiceObject) and choice.type != "allowed_tools"
    # As with OpenAI, a model calls a named tool once.
    chat.single_tool_call = request.parallel_tool_calls is False or named
    if choice is None:
        return
    if not isinstance(choice, schema.ToolChoiceObject):
        chat.tool_choice.mode = _MODES[choice]
    elif named:
        chat.tool_choice.mode, chat.tool_choice.name = _Choice.MODE_REQUIRED, tools.chosen(choice, "tool_choice")
    else:
        if choice.mode is None or choice.tools is None:
            raise invalid("tool_choice", "of type 'allowed_tools' needs 'mode' and 'tools'")
        chat.tool_choice.mode = _MODES[choice.mode]
        tools.keep({tools.chosen(tool, f"tool_choice.tools[{index}]") for index, tool in enumerate(choice.tools)})
    if chat.tool_choice.mode == _Choice.MODE_REQUIRED and not chat.tools:
        raise invalid("tool_choice", "requires a call, but there is no tool that this server can offer to the model")


def _echo(request: schema.ResponsesRequest, tools: ToolSet) -> dict[str, Any]:
    """Returns the response's fields that repeat the request."""
    text: dict[str, Any] = {"format": {"type": "text"}, "verbosity": "medium"}
    if request.text is not None:
        text |= request.text.model_dump(by_alias=True, exclude_none=True, exclude={"format": {"description"}})
    choice = request.tool_choice
    return {
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {"effort": request.reasoning and request.reasoning.effort, "summary": None},
        "safety_identifier": request.safety_identifier,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": text,
        "tool_choice": choice.model_dump(exclude_unset=True)
        if isinstance(choice, schema.ToolChoiceObject)
        else choice or "auto",
        "tools": tools.shown,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "presence_penalty": request.presence_penalty or 0.0,
        "frequency_penalty": request.frequency_penalty or 0.0,
        "user": request.user,
        "metadata": request.metadata or {},
    }


class _FieldNames:
    """The client's names of fields in errors of the router."""

    def __init__(self, messages: Sequence[tuple[str, Sequence[str]]], tools: Sequence[str]) -> None:
        self._messages = messages
        self._tools = tools

    def own_field(self, error: OverfillError) -> OverfillError:
        """Returns ``error`` with the client's name of the field."""
        if not isinstance(error, InvalidRequest):
            return error
        field = self._name(error.field)
        return error if field == error.field else type(error)(field, error.reason)

    def _name(self, field: str) -> str:
        if found := _LIST.fullmatch(field):
            kind, index, rest = found[1], int(found[2]), found[3]
            if kind == "tools":
                return self._tools[index] + (".format.definition" if rest.startswith(".input") else rest)
            place, calls = self._messages[index]
            if call := _CALL.fullmatch(rest):
                return calls[int(call[1])] + call[2]
            return place + rest
        if field.startswith("sampling.grammar"):
            return _SCHEMA if field.endswith("json_schema") else "text.format"
        if field in _NAMES:
            return _NAMES[field]
        return field.removeprefix("sampling.").removeprefix("chat.")
