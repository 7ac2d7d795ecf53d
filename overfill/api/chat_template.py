"""Renders messages to text with a checkpoint's chat template, as transformers does. No tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from overfill.errors import InvalidPair, InvalidRequest

_MAX_INDENTED = 8 << 20
"""Maximum number of characters of one indented JSON text. Nesting may make it four hundred times as long."""

_END_OF_TEXT = "end of the last message 8d0b6c"
"""Marker that the renderer appends to the message to continue; it cuts the output there."""


@dataclass(frozen=True, slots=True)
class TemplateOptions:
    """Options for rendering a chat.

    Args:
        variables: Additional variables for the template, such as ``{"enable_thinking": False}``. A template ignores
            variables that it does not use.
        add_generation_prompt: Whether the text ends with the opening of the assistant's answer.
        continue_final_message: Whether the text ends with the last message's text, as the beginning of the answer.
        max_length: Maximum number of characters of the text; None means no limit.
        parse_special: Whether the text of a special token, such as ``<|im_end|>``, becomes that token in messages,
            tools and variables too. Otherwise it stays text there.

    Raises:
        InvalidRequest: ``add_generation_prompt`` and ``continue_final_message`` are both set.
    """

    variables: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    parse_special: bool = False
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.add_generation_prompt and self.continue_final_message:
            raise InvalidRequest(
                "chat.continue_final_message",
                "conflicts with add_generation_prompt: an answer continues the last message or opens a new one",
            )


_DEFAULT_OPTIONS = TemplateOptions()


class ChatTemplate:
    """A compiled chat template. Templates are code of the checkpoint's author, so they run in a sandbox.

    Args:
        source: Jinja source.
        special_tokens: Special tokens by name, such as ``{"bos_token": "<s>"}``; the template can read them.

    Attributes:
        source: Jinja source.
        knows_tools: Whether the template itself renders tools.

    Raises:
        InvalidPair: the source is not a Jinja template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            # Every render copies the globals, which is slow for Jinja's own mapping of mappings.
            self._template.globals = dict(self._template.globals)
            self._known = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as error:
            raise InvalidPair(f"the chat template does not compile: {error}") from error
        self.source = source
        self.knows_tools = "tools" in self._known
        self._takes_blocks = "'thinking'" in source and "reasoning_content" not in source  # Mistral's
        self._special_tokens = dict(special_tokens)
        self._reserved = {*_OWN_VARIABLES, *special_tokens, *environment.globals}
        odd = not self._takes("user", "assistant", "user")  # it does not show messages as they are; it gets them so
        self._system_anywhere = odd or self._takes("system", "system", "user", "assistant", "system", "user")
        self._system_first = odd or self._takes("system", "user")
        self._turns_in_parts = odd or self._takes("user", "user")

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: TemplateOptions = _DEFAULT_OPTIONS,
    ) -> str:
        """The conversation as text, up to the start of the assistant's answer.

        Args:
            tools: Tools in OpenAI's format; the template ignores them unless ``knows_tools``.

        Raises:
            InvalidRequest: the template refuses these messages, with its own message; a request may not set one of the
                variables; the last message cannot be continued; or the text is too long.
        """
        self._check_variables(options.variables)
        shown = self._adapted(messages)
        if options.continue_final_message:
            content = shown[-1].get("content") if shown else None
            if not content or not isinstance(content, str):
                raise InvalidRequest("chat.continue_final_message", "needs a last message that has text")
            shown[-1]["content"] = content + _END_OF_TEXT
        if self._takes_blocks:
            shown = [_with_blocks(message) for message in shown]
        limit = math.inf if options.max_length is None else options.max_length
        pieces, length = [], 0
        try:
            for piece in self._template.generate(
                {"documents": None} | dict(options.variables),
                messages=shown,
                tools=[dict(tool) for tool in tools] if tools else None,
                add_generation_prompt=options.add_generation_prompt,
                **self._special_tokens,
            ):
                length += len(piece)
                if length > limit:
                    raise InvalidRequest(
                        "chat", f"becomes more than {limit} characters long by this model's chat template; shorten it"
                    )
                pieces.append(piece)
        except InvalidRequest:
            raise
        except Exception as error:  # a template is code that runs on the client's values, and may raise anything
            reason = str(error) or type(error).__name__
            raise InvalidRequest("chat.messages", f"are refused by the chat template: {reason}") from error
        text = "".join(pieces)
        if not options.continue_final_message:
            return text
        # The text must contain the message once and unchanged; some templates repeat a message or cut it.
        before, found, _ = text.rpartition(_END_OF_TEXT)
        wanted = shown[-1]["content"].removesuffix(_END_OF_TEXT).strip()
        if not found or _END_OF_TEXT in before or not before.rstrip().endswith(wanted):
            raise InvalidRequest(
                "chat.continue_final_message",
                "the chat template of this model repeats or changes the last message, so it cannot be continued",
            )
        return before

    def _takes(self, *roles: str) -> bool:
        """Whether the template shows messages of these roles, all of them and in their order."""
        texts = [f"text {index} 8d0b6c" for index in range(len(roles))]
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        try:
            shown = self._template.render(
                documents=None, messages=messages, tools=None, add_generation_prompt=True, **self._special_tokens
            )
        except Exception:  # a template is code that may raise anything
            return False
        places = [shown.find(text) for text in texts]
        return places[0] >= 0 and places == sorted(places)

    def _adapted(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Copies of ``messages``, without what the template would refuse or leave out.

        Agents send several system messages, also late ones, and several messages of the user in a row. A system message
        that the template does not take becomes the user's in the same place: the text before it, which is in prefix
        caches, stays the same.
        """
        made: list[dict[str, Any]] = []
        for message in messages:
            role = message["role"]
            if role == "system" and not self._system_anywhere:
                first = not made or made[-1]["role"] == "system"  # it follows nothing else, as later ones are renamed
                role = "system" if first and self._system_first else "user"
            several = {"system": self._system_anywhere, "user": self._turns_in_parts}.get(role, True)
            if made and made[-1]["role"] == role and not several:
                made[-1]["content"] += f"\n\n{message['content']}"
            else:
                made.append({**message, "role": role})
        return made

    def _check_variables(self, variables: Mapping[str, Any]) -> None:
        for name in variables:
            place = f"chat.chat_template_kwargs.{name[:80]}"
            if name in self._reserved:
                raise InvalidRequest(place, "is the server's to set, not a request's; leave it out")
        if variables.get("documents") and "documents" not in self._known:
            raise InvalidRequest("chat.documents", "the chat template does not show documents; put them into a message")


def _with_blocks(message: dict[str, Any]) -> dict[str, Any]:
    """``message`` with its reasoning as a block of its content."""
    if not message.get("reasoning_content"):
        return message
    thinking = {"type": "thinking", "thinking": message["reasoning_content"]}
    text = {"type": "text", "text": message["content"]}
    return message | {"content": [thinking, text] if message["content"] else [thinking]}


_OWN_VARIABLES = (
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "tokenize",
)
"""Variables that ``chat_template_kwargs`` may not set, because other fields or the server set them."""


class _GenerationTag(jinja2.ext.Extension):
    """The tag ``{% generation %}``, which marks answers for training. Here it renders its body."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's interface

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML.
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if indent is None:
        return encoder.encode(value)
    pieces, length = [], 0
    for piece in encoder.iterencode(value):
        length += len(piece)
        if length > _MAX_INDENTED:
            raise InvalidRequest(
                "chat", f"becomes more than {_MAX_INDENTED} characters long when this model's chat template indents it"
            )
        pieces.append(piece)
    return "".join(pieces)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
