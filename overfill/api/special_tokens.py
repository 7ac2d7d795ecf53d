"""Tells special tokens that a chat template writes from texts of a client that spell them.

A template writes special tokens as text, such as ``<|im_end|>``, and the tokenizer makes tokens of it. A message with
this text could otherwise end its own turn and begin one of the system.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from typing import Any

import tokenizers

from overfill.errors import InvalidRequest


class SpecialTokens:
    """Encodes chats so that only the template writes special tokens. Safe to share between threads.

    A mark stands for each special token that a client's text spells, while the template is rendered. Marks are made of
    characters that templates do not change, and of a number that clients do not know.

    Args:
        backend: The tokenizer. Its special tokens are those that answers do not show; other added tokens, such as
            ``<think>``, are part of answers and stay tokens in messages.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        added = dict(sorted(backend.get_added_tokens_decoder().items()))
        special = {id: token for id, token in added.items() if token.special}
        nonce = secrets.randbelow(10**20)
        self._spelled = {f"~{nonce:020}.{id}~": token.content for id, token in special.items()}  # by mark
        self._marks = {text: mark for mark, text in self._spelled.items()}
        self._written = {token.content: f"~{nonce:020}:{id}~" for id, token in special.items()}
        self._in_json = _any_of(map(_json_text, self._marks))
        self._in_chat = _any_of([*self._spelled, *self._marks])
        # Shares the model, which holds the vocabulary. To this tokenizer, the special tokens' own texts are plain text.
        self._backend = tokenizers.Tokenizer(backend.model)
        if backend.normalizer is not None:
            self._backend.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            self._backend.pre_tokenizer = backend.pre_tokenizer
        own = {id: _plain(token, self._written.get(token.content, token.content)) for id, token in added.items()}
        self._backend.add_tokens(list(own.values()))
        # The id of each added token, by its id in this tokenizer.
        self._ids = {self._backend.token_to_id(token.content): id for id, token in own.items()}
        self._special_ids = frozenset(special)

    def mark(self, chat: Any) -> Any:
        """Returns a copy of ``chat`` with marks for the special tokens that its texts spell; None if they spell none.

        Args:
            chat: All that a template may show, of types that JSON has.
        """
        text = json.dumps(chat, ensure_ascii=False, default=dict)  # messages may be any mappings
        if self._in_json.search(text) is None:
            return None
        return json.loads(self._in_json.sub(lambda found: self._marks[json.loads(f'"{found[0]}"')], text))

    def encode(self, rendered: str) -> list[int]:
        """Returns the token ids of a rendered chat with marks; adds no special tokens.

        Raises:
            InvalidRequest: the tokenizer has no other tokens for a special token's text.
        """
        written = 0

        def swap(found: re.Match[str]) -> str:
            nonlocal written
            if (spelled := self._spelled.get(found[0])) is not None:
                return spelled
            written += 1
            return self._written[found[0]]

        (encoding,) = self._backend.encode_batch_fast([self._in_chat.sub(swap, rendered)], add_special_tokens=False)
        ids = [self._ids.get(id, id) for id in encoding.ids]
        if written != sum(id in self._special_ids for id in ids):
            raise InvalidRequest(
                "chat", "spells a special token that this tokenizer cannot write as plain text; leave its text out"
            )
        return ids


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Returns a pattern that matches the longest of ``texts`` at a place; without texts, it matches nothing.

    Hundreds of texts may begin alike. The pattern looks at a character of a chat once for all of them.
    """
    tree: dict[str, Any] = {}
    for text in texts:
        node = tree
        for character in text:
            node = node.setdefault(character, {})
        node[""] = {}  # a text ends here

    def pattern(node: dict[str, Any]) -> str:
        following = [re.escape(character) + pattern(rest) for character, rest in node.items() if character]
        if "" in node:
            return f"(?:{'|'.join(following)})?" if following else ""
        return following[0] if len(following) == 1 else f"(?:{'|'.join(following)})"

    return re.compile(pattern(tree) if tree else "(?!)")


def _json_text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _plain(token: tokenizers.AddedToken, text: str) -> tokenizers.AddedToken:
    """An added token with ``text`` that is found in the same way as ``token``."""
    return tokenizers.AddedToken(
        text,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=False,
    )
