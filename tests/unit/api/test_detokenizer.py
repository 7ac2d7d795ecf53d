"""Tests that streamed pieces join to the whole text, never split a character, and are not held back without need."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from overfill.api.detokenizer import StreamDetokenizer
from overfill.api.tokenizer import Tokenizer

SCRIPTS = "hello world. Grüße ŁÓDŹ Привет 你好世界 こんにちは 안녕하세요 שלום مرحبا नमस्ते ไทย 🇩🇪 👨‍👩‍👧 👋🏽 \n\t ​\ufffd"
texts = st.lists(
    st.one_of(st.text(alphabet=SCRIPTS, max_size=12), st.text(max_size=8), st.just(" hello"), st.just("👨‍👩‍👧"))
).map("".join)


def stream(tokenizer: Tokenizer, pieces: Sequence[Sequence[int]], prompt: Sequence[int] = ()) -> list[str]:
    detokenizer = StreamDetokenizer(tokenizer, prompt)
    return [*(detokenizer.push(piece) for piece in pieces), detokenizer.finish()]


def singly(ids: Sequence[int]) -> list[list[int]]:
    return [[token] for token in ids]


def test_the_bytes_of_tokens_join_to_the_text(any_tokenizer: Tokenizer) -> None:
    joined = b"".join(any_tokenizer.token_bytes(token) for token in any_tokenizer.encode_continuation(SCRIPTS))
    assert joined.decode().removeprefix(" ") == SCRIPTS


@given(text=texts)
@example(text="\ufffd\ufffd👨‍👩‍👧")
@settings(max_examples=300)
def test_pieces_join_to_the_whole(any_tokenizer: Tokenizer, text: str) -> None:
    ids = any_tokenizer.encode(text)
    assert "".join(stream(any_tokenizer, singly(ids))) == any_tokenizer.decode(ids)


@given(text=texts, cuts=st.lists(st.integers(0, 40), max_size=5))
def test_pieces_do_not_depend_on_how_tokens_are_batched(any_tokenizer: Tokenizer, text: str, cuts: list[int]) -> None:
    ids = any_tokenizer.encode(text)
    bounds = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    pieces = [ids[a:b] for a, b in pairwise(bounds)]
    assert "".join(stream(any_tokenizer, pieces)) == "".join(stream(any_tokenizer, singly(ids)))


@given(ids=st.lists(st.integers(0, 410), max_size=60))
@settings(max_examples=500)
def test_any_ids_at_all_join_to_the_whole(byte_level_tokenizer: Tokenizer, ids: list[int]) -> None:
    assert "".join(stream(byte_level_tokenizer, singly(ids))) == byte_level_tokenizer.decode(ids)


@given(text=st.text(alphabet="aé字👋", max_size=30))
def test_no_piece_shows_half_a_character(any_tokenizer: Tokenizer, text: str) -> None:
    assert not any("\ufffd" in piece for piece in stream(any_tokenizer, singly(any_tokenizer.encode(text))))


@pytest.mark.parametrize("character", ["é", "字", "👋"])
def test_a_character_of_several_tokens_comes_with_its_last_one(
    sentencepiece_tokenizer: Tokenizer, character: str
) -> None:
    ids = sentencepiece_tokenizer.encode(f"hello{character}")
    detokenizer = StreamDetokenizer(sentencepiece_tokenizer)
    pieces = [detokenizer.push([token]) for token in ids]
    assert pieces == ["hello", *[""] * (len(character.encode()) - 1), character]
    assert detokenizer.finish() == ""


def test_text_is_not_held_back_without_need(byte_level_tokenizer: Tokenizer) -> None:
    ids = byte_level_tokenizer.encode("Hello, world! How are you today?")
    detokenizer = StreamDetokenizer(byte_level_tokenizer)
    shown = ""
    for count, token in enumerate(ids, start=1):
        shown += detokenizer.push([token])
        assert shown == byte_level_tokenizer.decode(ids[:count])


def test_special_tokens_and_padding_ids_have_no_text(sentencepiece_tokenizer: Tokenizer) -> None:
    hello, world = sentencepiece_tokenizer.encode("hello world")
    padding = sentencepiece_tokenizer.vocab_size - 1
    assert stream(sentencepiece_tokenizer, singly([1, hello, 3, padding, world, 2])) == [
        "",
        "hello",
        "",
        "",
        " world",
        "",
        "",
    ]


def test_the_prompt_decides_about_a_leading_space(sentencepiece_tokenizer: Tokenizer) -> None:
    hello, world = sentencepiece_tokenizer.encode("hello world")
    assert stream(sentencepiece_tokenizer, [[world]]) == ["world", ""]
    assert stream(sentencepiece_tokenizer, [[world]], prompt=[hello]) == [" world", ""]


def test_an_incomplete_end_is_shown_as_a_replacement(any_tokenizer: Tokenizer) -> None:
    ids = any_tokenizer.encode("ab\u0fd2")[:-1]  # Tibetan, in neither corpus
    pieces = stream(any_tokenizer, singly(ids))
    assert "".join(pieces[:-1]) == "ab"
    assert set(pieces[-1]) == {"\ufffd"}


class CountingTokenizer:
    """Counts the tokens that decoding looks at."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.has_text = tokenizer.has_text
        self.piece = tokenizer.piece
        self.decoded = 0

    def decode(self, ids: Sequence[int]) -> str:
        self.decoded += len(ids)
        return self._tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["text", "invalid"])
def test_work_grows_with_the_answer_and_not_its_square(byte_level_tokenizer: Tokenizer, kind: str) -> None:
    invalid = byte_level_tokenizer._backend.token_to_id("ÿ")  # the byte FF
    ids = byte_level_tokenizer.encode("Hello, 你好 👋! " * 100) if kind == "text" else [invalid] * 2000
    counting = CountingTokenizer(byte_level_tokenizer)
    assert "".join(stream(counting, singly(ids))) == byte_level_tokenizer.decode(ids)  # type: ignore[arg-type]
    assert counting.decoded < 100 * len(ids)
