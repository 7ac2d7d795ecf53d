"""Turns token ids into text as they arrive. Each piece is final, and all pieces join to the answer's whole text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from overfill.api.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"

# A character has at most 4 bytes, so at most 3 tokens at the end can belong to an incomplete character. If more tokens
# are held, they are bytes that never form a character, or U+FFFD itself.
_MAX_INCOMPLETE = 3
_MAX_HELD = 8
_MAX_CONTEXT = 8


class StreamDetokenizer:
    """Decodes one answer in time linear in its length.

    A token whose text does not depend on its neighbours is looked up. For any other token a short window is decoded:
    *context*, tokens whose text has been returned, which decide about leading spaces and continued bytes; and *held*
    tokens, which end inside a character.

    Args:
        prompt_ids: Prompt that the answer continues, given for plain text prompts, so that the first word keeps its
            leading space. Without it the answer is decoded as a separate text.
        shown: Text that stands for special tokens, by id. Other special tokens have no text.

    Attributes:
        tokenizer, shown: as the arguments.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), shown: Mapping[int, str] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.shown = shown or {}
        self._context = [i for i in prompt_ids[-_MAX_CONTEXT:] if tokenizer.has_text(i)]
        self._context_text = tokenizer.decode(self._context) if self._context else ""
        self._held: list[int] = []

    def push(self, ids: Sequence[int]) -> str:
        """The text that becomes final with ``ids``: whole characters only."""
        text = ""
        for token in ids:
            if token in self.shown:
                text += self.finish() + self.shown[token]
                self._context, self._context_text = [], ""
            elif not self._held and (piece := self.tokenizer.piece(token)) is not None:
                if self._context:
                    self._context, self._context_text = [], ""
                text += piece
            elif self.tokenizer.has_text(token):
                text += self._push_one(token)
        return text

    def finish(self) -> str:
        """The text of the held tokens, at the end of the answer. An incomplete character becomes U+FFFD."""
        return self._release(len(self._held), self._held_text())

    def _push_one(self, token: int) -> str:
        self._held.append(token)
        text = self._held_text()
        if text and not text.endswith(_REPLACEMENT):
            return self._release(len(self._held), text)
        if len(self._held) > _MAX_HELD:
            return self._release_most()
        return ""

    def _release_most(self) -> str:
        """Releases all tokens but the last ones, which may still become a character."""

        def damage(cut: int) -> int:
            # A cut inside a character yields more replacement characters than a cut between two characters.
            head, tail = self._text_after_context(self._held[:cut]), self.tokenizer.decode(self._held[cut:])
            return head.count(_REPLACEMENT) + tail.count(_REPLACEMENT)

        last = len(self._held)
        cut = min(range(last - _MAX_INCOMPLETE, last), key=damage)
        return self._release(cut, self._text_after_context(self._held[:cut]))

    def _release(self, count: int, text: str) -> str:
        released = self._held[:count]
        if released:
            del self._held[:count]
            self._context = released
            self._context_text = self.tokenizer.decode(released)
        return text

    def _held_text(self) -> str:
        return self._text_after_context(self._held)

    def _text_after_context(self, ids: list[int]) -> str:
        whole = self.tokenizer.decode(self._context + ids)
        if whole.startswith(self._context_text):
            return whole[len(self._context_text) :]
        # With the new tokens the context decodes differently, but its text has been returned. Decode them separately.
        return self.tokenizer.decode(ids)
