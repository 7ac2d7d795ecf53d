"""Turns a chat with tools into messages for a chat template, and into token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from overfill.api.chat_template import TemplateOptions
from overfill.api.families.parameters import KnownTools
from overfill.api.families.tool_format import ToolFormat
from overfill.api.tokenizer import Tokenizer
from overfill.api.tools import (
    Mode,
    ToolDefinition,
    as_openai,
    check_count,
    check_tools,
)
from overfill.errors import InvalidRequest
from overfill.request.json_text import read_json
from overfill.request.params import Grammar
from overfill.v1 import inference_pb2

ROLES = ("system", "user", "assistant", "tool")

MAX_MESSAGES = 4096
MAX_PARTS = 1024  # of the content of one message, and tool calls of one message
MAX_ITEMS = 16_384  # messages with their parts and tool calls, of one request
MAX_DOCUMENTS = 1024

MAX_EXPANSION = 2
"""A chat template may make a chat this many times as long as ``added_by_template`` expects."""

EXPANSION_ROOM = 1 << 20
"""Characters that a chat template may add on top."""

_ITEM = 64
"""Characters that a template typically writes around a message, tool call or document."""

_Choice = inference_pb2.ToolChoice


def encode_chat(chat: inference_pb2.Chat, tokenizer: Tokenizer) -> list[int]:
    """Token ids of ``chat`` up to the start of the answer; an empty list for a chat without messages.

    Raises:
        InvalidRequest: a message or tool is wrong; ``field`` names it.
    """
    return encode_with_generation_prompt(chat, tokenizer, count=False)[0]


def encode_with_generation_prompt(
    chat: inference_pb2.Chat, tokenizer: Tokenizer, *, count: bool = True
) -> tuple[list[int], int]:
    """Returns what ``encode_chat`` returns, and how many of the tokens are the generation prompt.

    ``Tokenizer.encode_with_generation_prompt`` explains the count.
    """
    size = chat.ByteSize() + added_by_template(chat)
    _check_messages(chat.messages)
    tools = read_tools(chat)
    mode, _ = tool_choice(chat)
    options = replace(template_options(chat), max_length=MAX_EXPANSION * size + EXPANSION_ROOM)
    if not chat.messages:
        return [], 0
    shown, known = tools if mode != "none" else [], KnownTools(tools)
    if tokenizer.template_knows_tools:
        native = [_native(m, tokenizer.tool_format, known) for m in chat.messages]
        described = [as_openai(t) for t in shown] or None
        return tokenizer.encode_with_generation_prompt(native, described, options, count=count)
    format = tokenizer.tool_format
    messages = [_plain(m, format, known) for m in chat.messages]
    if shown:
        text = format.describe(shown)
        if messages[0]["role"] == "system":
            messages[0] = {"role": "system", "content": f"{messages[0]['content']}\n\n{text}"}
        else:
            messages.insert(0, {"role": "system", "content": text})
    return tokenizer.encode_with_generation_prompt(messages, options=options, count=count)


def added_by_template(chat: inference_pb2.Chat) -> int:
    """Estimate of the characters that a chat template adds to ``chat``.

    An empty tool call takes two bytes of a request, and sixty characters of a prompt.

    Raises:
        InvalidRequest: the chat has too many messages, tool calls or tools.
    """
    messages, calls = chat.messages, 0
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest("chat.messages", f"has {len(messages)} messages; at most {MAX_MESSAGES} are allowed")
    for index, message in enumerate(messages):
        count = len(message.tool_calls)
        if count > MAX_PARTS:
            raise InvalidRequest(
                f"chat.messages[{index}].tool_calls", f"has {count} tool calls; at most {MAX_PARTS} are allowed"
            )
        calls += count
    items = len(messages) + calls
    if items > MAX_ITEMS:
        raise InvalidRequest(
            "chat.messages", f"has {items} messages and tool calls together; at most {MAX_ITEMS} are allowed"
        )
    check_count(len(chat.tools))
    variables = chat.chat_template_kwargs
    items += variables.count(",") + variables.count("{")
    return _ITEM * items


def template_options(chat: inference_pb2.Chat) -> TemplateOptions:
    """Options for rendering ``chat``. Raises InvalidRequest."""
    field = "chat.chat_template_kwargs"
    variables = read_json(field, chat.chat_template_kwargs) if chat.chat_template_kwargs else {}
    if not isinstance(variables, dict):
        raise InvalidRequest(field, "is not a JSON object")
    documents = variables.get("documents")
    if isinstance(documents, list) and len(documents) > MAX_DOCUMENTS:
        raise InvalidRequest("chat.documents", f"has {len(documents)} documents; at most {MAX_DOCUMENTS} are allowed")
    continued = chat.continue_final_message
    opened = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else not continued
    return TemplateOptions(variables, opened, continued, chat.parse_special)


def read_tools(chat: inference_pb2.Chat) -> list[ToolDefinition]:
    """The tools of ``chat``, checked. Raises InvalidRequest."""
    tools = []
    for index, tool in enumerate(chat.tools):
        parameters: Any = read_json(f"chat.tools[{index}].parameters", tool.parameters) if tool.parameters else None
        if parameters is not None and not isinstance(parameters, dict):
            raise InvalidRequest(f"chat.tools[{index}].parameters", "is not a JSON object")
        text = None
        if tool.HasField("input"):
            try:
                text = Grammar.from_proto(tool.input)
            except InvalidRequest as error:
                raise InvalidRequest(f"chat.tools[{index}].input", error.reason) from error
        known = ToolDefinition(tool.name, tool.description, strict=tool.strict, input=text)
        tools.append(replace(known, parameters=parameters) if parameters else known)
    check_tools(tools)
    return tools


def tool_choice(chat: inference_pb2.Chat) -> tuple[Mode, str]:
    """The mode of ``chat``, and the name of the only tool that may be called, or "". Raises InvalidRequest."""
    choice = chat.tool_choice
    if choice.name and choice.mode != _Choice.MODE_REQUIRED:
        raise InvalidRequest("chat.tool_choice.name", "is set; it needs mode REQUIRED")
    if choice.mode == _Choice.MODE_NONE or (not chat.tools and choice.mode != _Choice.MODE_REQUIRED):
        return "none", ""
    if not chat.tools:
        raise InvalidRequest("chat.tool_choice", "is REQUIRED, but the chat has no tools; give tools or leave it out")
    if choice.name and choice.name not in {tool.name for tool in chat.tools}:
        raise InvalidRequest("chat.tool_choice", f"names {choice.name[:80]!r}, which is not one of the tools")
    return ("required" if choice.mode == _Choice.MODE_REQUIRED else "auto"), choice.name


def _native(message: inference_pb2.ChatMessage, format: ToolFormat, tools: KnownTools) -> dict[str, Any]:
    """``message`` for a template that supports tools: the arguments of calls are objects.

    When ``max_tokens`` has cut a call, its arguments are no object, which templates expect. Models may also write lone
    surrogates, which no text can show. Then all calls of the message become text, as the model wrote them. So they do
    if they are more than the family's templates take.
    """
    arguments = [_object(call.arguments or "{}") for call in message.tool_calls]
    if None in arguments or len(arguments) > format.most_in_template:
        return _plain(message, format, tools)
    result: dict[str, Any] = {"role": message.role, "content": message.content} | _reasoning(message)
    if message.tool_calls:
        result["tool_calls"] = [
            {"id": format.template_id(call.id), "type": "function", "function": {"name": call.name, "arguments": value}}
            for call, value in zip(message.tool_calls, arguments, strict=True)
        ]
    if message.tool_call_id:
        result["tool_call_id"] = format.template_id(message.tool_call_id)
    return result


def _plain(message: inference_pb2.ChatMessage, format: ToolFormat, tools: KnownTools) -> dict[str, str]:
    """``message`` with role and content only: tool calls and their results become text."""
    if message.role == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message.content}\n</tool_response>"}
    content = message.content
    if message.tool_calls:
        calls = format.write([(call.name, call.arguments or "{}") for call in message.tool_calls], tools)
        content = f"{content}\n{calls}" if content else calls
    return {"role": message.role, "content": content} | _reasoning(message)


def _reasoning(message: inference_pb2.ChatMessage) -> dict[str, str]:
    """What the assistant thought, by the name that chat templates read."""
    return {"reasoning_content": message.reasoning} if message.reasoning else {}


def _check_messages(messages: Sequence[inference_pb2.ChatMessage]) -> None:
    called: set[str] = set()
    for index, message in enumerate(messages):
        place = f"chat.messages[{index}]"
        if message.role not in ROLES:
            raise InvalidRequest(f"{place}.role", f"must be one of {', '.join(ROLES)}; got {message.role[:80]!r}")
        if message.reasoning and message.role != "assistant":
            raise InvalidRequest(
                f"{place}.reasoning", f"is set in a message of role {message.role!r}; only an assistant thinks"
            )
        if message.tool_calls and message.role != "assistant":
            raise InvalidRequest(
                f"{place}.tool_calls", f"is set in a message of role {message.role!r}; only an assistant calls tools"
            )
        for call, made in enumerate(message.tool_calls):
            if not made.name:
                raise InvalidRequest(f"{place}.tool_calls[{call}].name", "is empty; give the name of the called tool")
            called.add(made.id)
        if message.role == "tool" and message.tool_call_id not in called:
            raise InvalidRequest(
                f"{place}.tool_call_id",
                f"is {message.tool_call_id[:80]!r}, which is the id of no tool call in the messages before it",
            )


def _object(text: str) -> dict[str, Any] | None:
    """The JSON object in ``text``; None if it is something else."""
    try:
        value = read_json("", text)
    except InvalidRequest:
        return None
    return value if isinstance(value, dict) else None
