"""What each format of tool calls has: rules for the grammar of answers, a reader, a writer."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from overfill.api.families.call_text import CallText, marker_character
from overfill.api.tools import ToolDefinition, as_openai
from overfill.request.params import Grammar


class Expressions(Protocol):
    """Lark expressions of what calls contain."""

    def arguments(self, tool: ToolDefinition) -> str:
        """The arguments of ``tool`` as one JSON object."""
        ...

    def input(self, text: Grammar, end: str) -> str:
        """The text that a tool takes, and ``end``. It is text of a JSON string if ``end`` is its closing quote."""
        ...


@dataclass(frozen=True, slots=True)
class Marker:
    """A text around calls that is a special token of some tokenizers.

    Answers do not show special tokens, so the detokenizer writes ``shown`` for one. No other text of an answer equals
    it: if it is a special token, it is a lone surrogate.

    Args:
        text: what writers write. A tokenizer makes the special token of it, if it has one.
        shown: what readers read.
        lark: what grammars require.
    """

    text: str
    shown: str
    lark: str

    @property
    def is_token(self) -> bool:
        """Whether it is a special token."""
        return self.shown != self.text


@dataclass(frozen=True, slots=True)
class CallRules:
    """Parts of the grammar of answers with calls, in Lark unless they say otherwise.

    The calls of an answer are ``marker lead call (separator call)* closing``; a call is ``before function after``.

    Literal texts are given in pieces: lexemes of the grammar. The lexer takes the longest lexeme and never goes back.
    Where JSON may stand too, the pieces are therefore those of JSON.

    Args:
        functions: for each tool the text with which its call begins, and what follows up to ``after``.
        marker: what shows that calls begin, or None.
        before: text of each call before its function.
        bare: text in place of ``marker lead`` for calls without the marker, which begin a line, or the answer after
            white space. None forbids them.
        lines: rules to which ``functions`` refer.
    """

    functions: Sequence[tuple[Sequence[str], str]]
    marker: Marker | None = None
    lead: str = ""
    before: Sequence[str] = ()
    after: str = ""
    separator: str = ""
    closing: str = ""
    bare: str | None = None
    lines: Sequence[str] = ()


class ToolFormat(ABC):
    """One format of tool calls, for one tokenizer.

    Args:
        ids: for each text in ``special``, the id of the special token with this text; None if the tokenizer has none.
    """

    name: ClassVar[str]
    """Name of the parser for this format in vLLM."""
    special: ClassVar[tuple[str, ...]] = ()
    """Texts that some tokenizers have as special tokens."""
    most_in_template: ClassVar[float] = math.inf
    """Number of calls of one message that the family's chat templates take."""
    instruction: ClassVar[str]
    """Tells a model how to call a function; an example follows it."""

    def __init__(self, ids: Sequence[int | None] = ()) -> None:
        self.ids = tuple(ids) or (None,) * len(self.special)
        self._markers = [_marker(n, text, id) for n, (text, id) in enumerate(zip(self.special, self.ids, strict=True))]

    @property
    def shown(self) -> dict[int, str]:
        """What the detokenizer writes for special tokens, by id."""
        pairs = zip(self.ids, self._markers, strict=True)
        return {id: marker.shown for id, marker in pairs if id is not None}

    @abstractmethod
    def rules(self, tools: Sequence[ToolDefinition], expressions: Expressions) -> CallRules:
        """Rules for answers that call ``tools``."""

    @abstractmethod
    def openings(self, tools: Sequence[ToolDefinition]) -> Mapping[str, bool]:
        """Texts with which calls may begin; True if this text must begin a line."""

    @abstractmethod
    def read(self, text: CallText, tools: Mapping[str, ToolDefinition]) -> Iterator[None]:
        """Reads all calls. ``text`` begins with one of ``openings``. Yields where it needs more text."""

    @abstractmethod
    def write(self, calls: Sequence[tuple[str, str]], tools: Sequence[ToolDefinition] = ()) -> str:
        """Text of ``calls`` as the model writes it.

        Args:
            calls: pairs of name and arguments, which are JSON text.
            tools: the called tools, as far as they are known.
        """

    def template_id(self, id: str) -> str:
        """The id of a call as the model's chat template takes it."""
        return id

    def describe(self, tools: Sequence[ToolDefinition]) -> str:
        """Text that describes ``tools``, for the system message of models whose chat template supports no tools."""
        lines = "\n".join(json.dumps(as_openai(tool), ensure_ascii=False) for tool in tools)
        example = self.write([("function-name", '{"argument-name": "value"}')])
        return (
            "You may call functions. These are available, one JSON object per line:\n"
            f"<tools>\n{lines}\n</tools>\n{self.instruction}\n{example}"
        )


def _marker(number: int, text: str, id: int | None) -> Marker:
    if id is None:
        return Marker(text, text, json.dumps(text))
    return Marker(text, marker_character(number), f"<[{id}]>")
