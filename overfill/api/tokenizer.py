"""A checkpoint's tokenizer, read from its folder with the ``tokenizers`` library. Loads no model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import tokenizers

from overfill.api.chat_template import ChatTemplate, TemplateOptions
from overfill.api.families.choose import choose_format
from overfill.api.families.tool_format import ToolFormat
from overfill.api.special_tokens import SpecialTokens
from overfill.errors import InvalidPair, InvalidRequest
from overfill.model.config import eos_ids, read_json
from overfill.request.names import ToolCallParser

_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The byte for each character of byte-level BPE: printable ones stand for themselves, U+0100 on for the rest."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (b for b in range(256) if b not in printable)
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTES = _byte_alphabet()

_PROBE = "A question that no template contains?"


class Tokenizer:
    """Turns text into token ids and back. Use ``load`` to make one; safe to share between threads.

    Attributes:
        digest: SHA-256 of tokenizer.json, lower-case hex.
        eos_token_ids: End-of-sequence ids from generation_config.json, or from config.json if it has none.
        vocab_size: Number of rows of the model's embedding. Smaller ids are valid, even those without text.
        special_tokens: Special tokens by name, such as ``{"bos_token": "<s>"}``.
        tool_format: How the model writes tool calls.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        digest: str,
        eos_token_ids: Sequence[int],
        vocab_size: int,
        special_tokens: Mapping[str, str],
        chat_template: ChatTemplate | None,
        tool_call_parser: ToolCallParser = "auto",
    ) -> None:
        # tokenizer.json may hold truncation and padding from training, which would cut prompts.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._chat_template = chat_template
        added = backend.get_added_tokens_decoder()
        self._added_ids = frozenset(added)
        self._skipped_ids = frozenset(i for i, t in added.items() if t.special)
        # To llguidance, tokens such as <tool_call> are special even if answers show them, as those of Qwen do.
        self.tool_format: ToolFormat = choose_format(
            tool_call_parser,
            "" if chat_template is None else chat_template.source,
            {token.content: id for id, token in added.items()},
        )
        self._special = SpecialTokens(backend)
        self._byte_level = "ByteLevel" in str(backend.decoder)
        # Other decoders look at a token's neighbours, for example to drop the first space of a text.
        self._joins_tokens = isinstance(backend.decoder, tokenizers.decoders.ByteLevel)
        self._pieces: dict[int, str | None] = {}
        self.digest = digest
        self.eos_token_ids = tuple(eos_token_ids)
        self.vocab_size = vocab_size
        self.special_tokens = dict(special_tokens)

    @classmethod
    def load(
        cls, folder: str | Path, tool_call_parser: ToolCallParser = "auto", chat_template: Path | None = None
    ) -> Self:
        """Reads tokenizer.json, tokenizer_config.json, the chat template, config.json and generation_config.json.

        Args:
            tool_call_parser: Format of the model's tool calls.
            chat_template: File with a chat template that replaces the checkpoint's own.

        Raises:
            InvalidPair: tokenizer.json, config.json or the file ``chat_template`` is missing, or a file is damaged.
        """
        folder = Path(folder)
        data = _read(folder / "tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises nothing narrower
            raise InvalidPair(f"{folder / 'tokenizer.json'} is not a tokenizer: {error}") from error
        config = read_json(folder / "config.json")
        vocab_size = config.get("vocab_size")
        if not isinstance(vocab_size, int):
            raise InvalidPair(f"{folder / 'config.json'} has no vocab_size")
        tokenizer_config = _read_json(folder / "tokenizer_config.json")
        special_tokens = _special_tokens(tokenizer_config)
        template = _chat_template(folder, chat_template, tokenizer_config, special_tokens)
        generation_config = _read_json(folder / "generation_config.json")
        return cls(
            backend,
            digest=hashlib.sha256(data).hexdigest(),
            eos_token_ids=eos_ids(generation_config) or eos_ids(config),
            vocab_size=vocab_size,
            special_tokens=special_tokens,
            chat_template=template,
            tool_call_parser=tool_call_parser,
        )

    @property
    def end_of_answer(self) -> int | None:
        """The id with which the model ends an answer. None means that it has no end-of-sequence id.

        Of several end-of-sequence ids, it is the tokenizer's own.
        """
        own = self._backend.token_to_id(self.special_tokens.get("eos_token", ""))
        return own if own in self.eos_token_ids else next(iter(self.eos_token_ids), None)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with the special tokens that the tokenizer adds.

        Raises:
            InvalidRequest: the text has a lone surrogate, which is not valid Unicode.
        """
        return self._encode(text, add_special_tokens=True)

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of text inside a longer text: the tokenizer adds no special tokens."""
        return self._encode(text, add_special_tokens=False)

    @property
    def chat_template_source(self) -> str:
        """Jinja source of the chat template; empty without one."""
        return "" if self._chat_template is None else self._chat_template.source

    @property
    def template_knows_tools(self) -> bool:
        """Whether the chat template itself renders tools."""
        return self._chat_template is not None and self._chat_template.knows_tools

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: TemplateOptions | None = None,
    ) -> str:
        """A chat as text, up to the start of the assistant's answer.

        Args:
            messages: Messages with ``role`` and ``content``, and other keys that the template supports.
            tools: Tools in OpenAI's format; only for a template that supports tools.
            options: Options for the template; None means the defaults.

        Raises:
            InvalidRequest: the model has no chat template, or the template refuses these messages.
        """
        if self._chat_template is None:
            raise InvalidRequest("chat", "this model has no chat template; send text or token ids")
        return self._chat_template.render(messages, tools, options or TemplateOptions())

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: TemplateOptions | None = None,
    ) -> list[int]:
        """Token ids of a chat. Only the template adds special tokens; their texts in messages and tools stay text.

        Arguments and errors are those of ``render``. With ``options.parse_special``, messages add special tokens too.
        """
        return self.encode_with_generation_prompt(messages, tools, options, count=False)[0]

    def encode_with_generation_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: TemplateOptions | None = None,
        *,
        count: bool = True,
    ) -> tuple[list[int], int]:
        """Returns a chat's token ids, as ``encode_chat`` does, and how many at their end are the generation prompt.

        The generation prompt is what the template adds for ``add_generation_prompt``. It counts from the token boundary
        at or before its text. The count is 0 if the template adds nothing, or changes other text too. Training and
        serving both call this method, so that ``request.answer_start`` is the same in both.

        Args:
            count: False to return 0 instead, without the second rendering that the count needs.
        """
        options = options or TemplateOptions()
        encode: Callable[[str], list[int]] = partial(self._encode, add_special_tokens=False)
        shown = None if options.parse_special else self._special.mark([messages, tools, options.variables])
        if shown is not None:
            encode = self._special.encode
            messages, tools, variables = shown
            options = replace(options, variables=variables)
        text = self.render(messages, tools, options)
        ids = encode(text)
        if not count or not options.add_generation_prompt:
            return ids, 0
        try:
            before = self.render(messages, tools, replace(options, add_generation_prompt=False))
        except InvalidRequest:  # the template takes no chat without an answer that ends in these messages
            return ids, 0
        if before == text or not text.startswith(before):
            return ids, 0
        added = encode(text[len(before) :])
        if ids[-len(added) :] == added:
            return ids, len(added)
        # A token spans the boundary: the tokens before it are those that both texts begin with.
        return ids, len(ids) - _num_common(ids, encode(before))

    def encode_user_opening(self, messages: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Token ids of a chat up to the text of the user's next message. A model continues them as the user.

        Args:
            messages: The chat so far.

        Raises:
            InvalidRequest: the model has no chat template, or the template changes messages.
        """
        before, shown, _ = self.render([*messages, {"role": "user", "content": _PROBE}]).partition(_PROBE)
        if not shown:
            raise InvalidRequest("chat", "the chat template changes a user's message, so the text before it is unknown")
        return self._encode(before, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens; U+FFFD replaces bytes that form no character."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token: possibly part of a character; a special token's name; empty for an unknown id."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._added_ids:
            return token.encode()
        if self._byte_level:
            return bytes(_BYTES[c] for c in token) if all(c in _BYTES for c in token) else token.encode()
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(byte[1], 16)])
        return token.replace("▁", " ").encode()

    def added_id(self, text: str) -> int | None:
        """The id of the added token ``text``, such as "<think>"; None without such a token."""
        id = self._backend.token_to_id(text)
        return id if id in self._added_ids else None

    def is_space(self, token_id: int) -> bool:
        """Whether the text of a token is white space only."""
        return self.token_bytes(token_id).isspace()

    def has_text(self, token_id: int) -> bool:
        """Whether decoding uses this id; it skips special tokens and unknown ids."""
        return token_id not in self._skipped_ids and self._backend.id_to_token(token_id) is not None

    def piece(self, token_id: int) -> str | None:
        """Text that a token adds to any text of whole characters; None if it depends on the tokens around it."""
        try:
            return self._pieces[token_id]
        except KeyError:
            text = self.decode([token_id]) if self._joins_tokens else None
            piece = None if text is None or "\ufffd" in text else text
            if token_id < self.vocab_size:  # bounds the memory
                self._pieces[token_id] = piece
            return piece

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # Unlike ``encode``, the call for batches can leave out the tokens' places in the text, a fifth of the time.
        try:
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except TypeError:
            _check_unicode(text)
            raise
        return encoding.ids


def _num_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Returns the length of the longest common beginning."""
    different = (index for index, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
    return next(different, min(len(first), len(second)))


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            "prompt", f"is not valid Unicode: lone surrogate at character {error.start}; leave it out"
        ) from None


def _chat_template(
    folder: Path, given: Path | None, tokenizer_config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> ChatTemplate | None:
    """The chat template in the file ``given``, or else that of the checkpoint."""
    own = folder / "chat_template.jinja"
    path = given or (own if own.exists() else None)
    template = tokenizer_config.get("chat_template") if path is None else _read_text(path)
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
    try:
        return None if template is None else ChatTemplate(template, special_tokens)
    except InvalidPair as error:
        raise InvalidPair(f"{path or folder / 'tokenizer_config.json'}: {error}") from error


def _special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in _SPECIAL_TOKENS:
        value = tokenizer_config.get(name)
        if isinstance(value, Mapping):
            value = value.get("content")
        if value is not None:
            tokens[name] = str(value)
    return tokens


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidPair(f"cannot read {path}: {error.strerror}") from error


def _read_text(path: Path) -> str:
    try:
        return _read(path).decode()
    except UnicodeDecodeError as error:
        raise InvalidPair(f"{path} is not UTF-8 text: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
