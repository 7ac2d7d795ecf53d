"""Separates what a model thinks from its answer, by the tokens that its family writes around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from overfill.api.detokenizer import StreamDetokenizer
from overfill.api.tokenizer import Tokenizer
from overfill.errors import InvalidPair
from overfill.request.thinking import ReasoningParser, ThinkingTokens

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How the models of a family mark what they think. They think at the beginning of an answer only.

    Attributes:
        name: vLLM's name of the format.
        begin: text of the token that opens the thinking.
        end: text of the token that closes it.
        assumed: whether an answer begins inside, even if the prompt does not open the thinking.
    """

    name: str
    begin: str
    end: str
    assumed: bool = False


_FORMATS = (
    ReasoningFormat("qwen3", "<think>", "</think>"),
    ReasoningFormat("mistral", "[THINK]", "[/THINK]"),
    ReasoningFormat("deepseek_r1", "<think>", "</think>", assumed=True),
)


class Reasoning:
    """The format of one checkpoint's reasoning.

    Args:
        form: the format.
        tokenizer: the checkpoint's tokenizer.

    Attributes:
        name: name of the format.

    Raises:
        InvalidPair: the tokenizer does not have the format's tokens.
    """

    def __init__(self, form: ReasoningFormat, tokenizer: Tokenizer) -> None:
        begin, end = tokenizer.added_id(form.begin), tokenizer.added_id(form.end)
        if begin is None or end is None:
            raise InvalidPair(
                f"--reasoning-parser {form.name} needs the tokens {form.begin!r} and {form.end!r}, which this "
                "model's tokenizer does not have; give auto or none"
            )
        self.name = form.name
        self._form, self._begin, self._end = form, begin, end
        self._tokenizer = tokenizer

    def thinking(self, prompt: Sequence[int], continued: str | None = None) -> ThinkingTokens | None:
        """Returns how an answer to a chat thinks; None if it only answers, because the prompt has closed the thinking.

        Args:
            prompt: token ids of the rendered chat.
            continued: text of the message that the answer continues; None if it begins a new one.
        """
        if continued is not None:
            opened = continued.rfind(self._form.begin) > continued.rfind(self._form.end)
            return ThinkingTokens(self._begin, self._end, True) if opened else None
        last = next((id for id in reversed(prompt) if not self._tokenizer.is_space(id)), None)
        if last == self._end:
            return None
        return ThinkingTokens(self._begin, self._end, last == self._begin or self._form.assumed)


def find_reasoning(parser: ReasoningParser, tokenizer: Tokenizer) -> Reasoning | None:
    """Returns the format that ``parser`` names; None if answers are not separated.

    "auto" takes the first format whose closing token the chat template names and the tokenizer has.

    Raises:
        InvalidPair: the tokenizer does not have the tokens of the named format.
    """
    if parser == "none":
        return None
    if parser != "auto":
        return Reasoning(next(form for form in _FORMATS if form.name == parser), tokenizer)
    for form in _FORMATS:
        if form.end in tokenizer.chat_template_source and None not in map(tokenizer.added_id, (form.begin, form.end)):
            return Reasoning(form, tokenizer)
    return None


def thinking_variables(effort: Effort | None = None, enabled: bool | None = None) -> dict[str, Any]:
    """Returns the variables with which chat templates of all families switch the thinking on or off.

    A template does not look at the variables that it does not know.

    Args:
        effort: how much the model should think; "none" switches it off, the others switch it on.
        enabled: whether it thinks; None means what ``effort`` says.
    """
    if enabled is None:
        if effort is None:
            return {}
        enabled = effort != "none"
    variables: dict[str, Any] = {"enable_thinking": enabled, "thinking": enabled}
    return variables if effort is None else variables | {"reasoning_effort": effort}


class ReasoningReader:
    """Reads what an answer thinks from its first tokens. The text does not depend on how the tokens are divided.

    It drops white space at both ends of the thinking.

    Args:
        detokenizer: also that of the answer, which follows.

    Attributes:
        tokens: number of tokens of the thinking, those around it included.
        over: whether the rest of the tokens are the answer's.
    """

    def __init__(self, thinking: ThinkingTokens, detokenizer: StreamDetokenizer) -> None:
        self.tokens = 0
        self.over = False
        self._thinking = thinking
        self._inside = thinking.opened
        self._detokenizer = detokenizer
        self._count = 0  # of all tokens read
        self._begun = False  # a token that is not white space has been read
        self._space: list[str] = []  # before it, in pieces
        self._answers = False  # the answer has text
        self._has_text = False
        self._held: list[str] = []  # white space at the end of the text so far, in pieces

    def push(self, ids: Sequence[int]) -> tuple[str, int]:
        """Returns new text of the thinking, and the number of tokens read. The answer has the rest of ``ids``."""
        text, read = self._read(ids)
        self._count += read
        if self._inside:
            self.tokens = self._count
            self._inside = not self.over
        return text, read

    def answer(self, text: str) -> str:
        """Returns what the client sees of ``text`` of the answer: after thinking, it begins without white space."""
        if not self._answers:
            text = text.lstrip() if self.tokens else "".join([*self._space, text])
            self._answers = bool(text)
        return text

    def finish(self) -> str:
        """Returns the text that was held back, at the end of an answer that thinks to its end."""
        return "".join([*self._held, self._detokenizer.finish()]) if self._inside else ""

    def _read(self, ids: Sequence[int]) -> tuple[str, int]:
        read, is_space = 0, self._detokenizer.tokenizer.is_space
        if not self._begun:
            read = next((index for index, id in enumerate(ids) if not is_space(id)), len(ids))
            self._space.append(self._detokenizer.push(ids[:read]))
            if read == len(ids):
                return "", read
            self._begun = True
            if ids[read] == self._thinking.begin:
                self._inside, read = True, read + 1
            if not self._inside:
                self.over = True
                return "", read
        try:
            end = ids.index(self._thinking.end, read)
        except ValueError:
            return self._text(ids[read:]), len(ids)
        self.over = True
        return self._text(ids[read:end]), end + 1

    def _text(self, ids: Sequence[int]) -> str:
        """Returns what of the text of ``ids`` is known not to be white space at an end of the thinking."""
        # Texts that stand for special tokens are for readers of the answer.
        text = self._detokenizer.push([id for id in ids if id not in self._detokenizer.shown])
        if self.over:
            text += self._detokenizer.finish()
        if not self._has_text:
            text = text.lstrip()
        shown = text.rstrip()
        space = text[len(shown) :]
        if shown:
            shown, self._held, self._has_text = "".join([*self._held, shown]), [], True
        if space:
            self._held.append(space)
        return shown
