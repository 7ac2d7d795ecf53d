"""Tests the answers of OpenAI's API, whole and in chunks: tool calls and log-probabilities."""

import json
import math
from functools import partial
from types import SimpleNamespace

import pytest

from overfill.api.openai import answers
from overfill.api.openai.answers import Choice, Envelope, TokenTexts
from overfill.routing.answer import AnswerDelta
from overfill.v1 import common_pb2, inference_pb2

TEXTS = [b"a", b' "b"\n', "é".encode(), b"\xff", b"\0", b"a"]  # of tokens 0 to 5; others have their number
DONE = inference_pb2.Finished(reason=common_pb2.FINISH_REASON_STOP)


def token_bytes(token, data=TEXTS):
    return data[token] if token < len(data) else b"%d" % token


def choice(kind="chat", logprobs=False, data=TEXTS):
    tokenizer = SimpleNamespace(token_bytes=partial(token_bytes, data=data))
    envelope = Envelope(kind, "id", "m", {}, "fp", TokenTexts(tokenizer))
    return Choice(index=0, envelope=envelope, seed=1, prompt_tokens=3, logprobs=logprobs)


def scored(tokens, first=0, text=""):
    """A delta whose tokens have two alternatives, all with the same text as the token or another."""
    entries = [common_pb2.TokenLogprobs(logprob=-t, top_ids=[5, 0], top_logprobs=[-1, -math.inf]) for t in tokens]
    return AnswerDelta(first, list(tokens), entries, text)


def shown(token, logprob):
    data = token_bytes(token)
    return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}


def content(tokens):
    top = [shown(5, -1.0), shown(0, -9999.0)]
    return [shown(t, -float(t)) | {"top_logprobs": top} for t in tokens]


def whole(choice, *deltas):
    for delta in deltas:
        choice.add(delta)
    choice.finished = DONE
    message = {"text": '"logprobs":"\\u0000"', "choices": [choice.whole()], "end": 1}
    made = list(answers.pieces(message, [choice.whole_scores()]))
    return made, json.loads(b"".join(made))


@pytest.mark.parametrize("count", [0, 1, 6, 16, 17, 500])
def test_a_whole_chat_has_the_log_probabilities_of_all_tokens(count):
    half = count // 2
    _, message = whole(choice(logprobs=True), scored(range(half), text="x"), scored(range(half, count), half))
    assert message["text"] == '"logprobs":"\\u0000"', "text that looks like the place stays"
    assert message["end"] == 1
    assert message["choices"][0]["logprobs"] == {"content": content(range(count)), "refusal": None}


@pytest.mark.parametrize("count", [0, 6, 500])
def test_a_whole_completion_has_the_log_probabilities_of_all_tokens(count):
    _, message = whole(choice("completion", logprobs=True), scored(range(count)))
    texts = [token_bytes(token).decode(errors="replace") for token in range(count)]
    assert (
        message["choices"][0]["logprobs"]
        == {
            "tokens": texts,
            "token_logprobs": [-float(token) for token in range(count)],
            "top_logprobs": [{"a": -1.0}] * count,  # of two tokens with one text, the likelier one
            "text_offset": [len("".join(texts[:index])) for index in range(count)],
        }
    )


def test_chunks_have_the_log_probabilities_of_their_tokens():
    for kind in ("chat", "completion"):
        stream, offsets = choice(kind, logprobs=True), []
        for first in (0, 3):
            delta = scored(range(first, first + 3), first, text="x")
            made = json.loads(b"".join(answers.pieces(stream.chunk(delta), [stream.scores(delta)])))
            if kind == "chat":
                assert made["delta"] == {"content": "x"}
                assert made["logprobs"] == {"content": content(range(first, first + 3)), "refusal": None}
            else:
                offsets += made["logprobs"]["text_offset"]
    assert offsets == [0, 1, 6, 7, 8, 9]


def test_a_character_counts_once_in_text_offset_at_the_token_that_completes_it():
    ids, data = [0, 1, 2, 3, 4, 5, 6], [b"a", b"\xf0\x9f", b"\x98", b"\x80b", b"\xc3", b"c", b"\xff\xe2\x82"]
    ids, data = [*ids, 7, 8], [*data, b"\xac", b"d"]
    texts = ["a", "", "", "\U0001f600b", "", "\ufffdc", "\ufffd", "€", "d"]
    assert b"".join(data).decode(errors="replace") == "".join(texts)
    expected = [len("".join(texts[:index])) for index in ids]
    for parts in ([ids], [ids[:2], ids[2:]], [[i] for i in ids]):  # a stream may divide a character
        stream, offsets = choice("completion", logprobs=True, data=data), []
        for part in parts:
            delta = scored(part, part[0])
            made = json.loads(b"".join(answers.pieces(stream.chunk(delta), [stream.scores(delta)])))
            offsets += made["logprobs"]["text_offset"]
        assert offsets == expected == [0, 1, 1, 1, 3, 3, 5, 6, 7]


def test_log_probabilities_come_in_small_pieces_and_are_freed_on_the_way():
    long = choice(logprobs=True)
    long.add(scored(range(2000)))
    pieces = long.whole_scores()
    (*_, last) = (next(pieces) for _ in range(10))
    assert last.count(b'"top_logprobs"') == answers._STEP
    assert sum(bool(entry.top_ids) for entry in long._entries) == 2000 - answers._FIRST_STEP - 8 * answers._STEP


def test_the_texts_of_few_tokens_are_kept(monkeypatch):
    monkeypatch.setattr(answers, "_MAX_KNOWN", 4)
    texts = choice().envelope.tokens
    assert [texts[token].data for token in range(10, 30)] == [b"%d" % token for token in range(10, 30)]
    assert len(texts) <= 4


def part(index, name="", arguments=""):
    return inference_pb2.ToolCallDelta(index=index, id=f"call_{index}" if name else "", name=name, arguments=arguments)


def test_a_chunk_has_one_entry_per_tool_call():
    """Clients such as instructor read the first entry of a chunk only."""
    parts = [part(0, arguments="}"), part(1, "now"), part(1, arguments='{"a'), part(1, arguments='": 1')]
    calls = choice().chunk(AnswerDelta(0, [7, 8], tool_calls=parts))["delta"]["tool_calls"]
    assert calls == [
        {"index": 0, "function": {"arguments": "}"}},
        {"index": 1, "id": "call_1", "type": "function", "function": {"name": "now", "arguments": '{"a": 1'}},
    ]
