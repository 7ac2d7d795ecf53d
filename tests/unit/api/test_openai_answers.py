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


def choice(kind="chat", logprobs=False, data=TEXTS, **more):
    tokenizer = SimpleNamespace(token_bytes=partial(token_bytes, data=data))
    envelope = Envelope(kind, "id", "m", {}, "fp", TokenTexts(tokenizer))
    return Choice(index=0, envelope=envelope, seed=1, prompt_tokens=3, logprobs=logprobs, **more)


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
    made = list(answers.pieces(message, list(choice.whole_scores())))
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


def with_scores(prompt, top):
    """A first delta with the scores of a prompt: its token i has the log-probability -i."""
    entries, later = len(prompt) - 1, range(1, len(prompt))
    return AnswerDelta(
        0,
        [],
        prompt_logprobs=common_pb2.PromptLogprobs(
            logprobs=[-float(i) for i in later],
            ranks=list(later),
            top_ids=top * entries,
            top_logprobs=[-0.5, -1.5] * entries,
        ),
    )


@pytest.mark.parametrize("count", [1, 2, 300])
def test_an_echoed_prompt_s_scores_precede_those_of_the_answer(count):
    prompt = [index % 7 for index in range(count)]
    echoing = choice("completion", logprobs=True, prompt=prompt)
    _, message = whole(echoing, with_scores(prompt, [2, 3]), scored(range(20)))
    found = message["choices"][0]["logprobs"]
    texts = [token_bytes(token).decode(errors="replace") for token in (*prompt, *range(20))]
    assert found["tokens"] == texts
    assert found["token_logprobs"] == [None, *(-float(i) for i in range(1, count)), *(-float(i) for i in range(20))]
    assert found["top_logprobs"][:count] == [None, *[{texts_of(2): -0.5, texts_of(3): -1.5}] * (count - 1)]
    assert found["text_offset"] == [len("".join(texts[:index])) for index in range(count + 20)]


def test_scores_of_a_prompt_alone_leave_the_answer_out():
    prompt = [4, 2, 9]
    alone = choice("completion", logprobs=True, prompt=prompt, without_answer=True)
    _, message = whole(alone, with_scores(prompt, [2, 3]), scored(range(20), text="x"))
    assert message["choices"][0]["text"] == ""
    assert message["choices"][0]["logprobs"]["token_logprobs"] == [None, -1.0, -2.0]
    assert alone.completion_tokens == 0


def test_prompt_logprobs_are_those_of_vllm():
    prompt = [4, 2, 9]
    asked = choice("completion", prompt=prompt, prompt_logprobs=True)
    _, message = whole(asked, with_scores(prompt, [2, 3]), AnswerDelta(0, [5], text="x"))
    likely = {"2": {"logprob": -0.5, "rank": 1, "decoded_token": texts_of(2)}}
    other = {"3": {"logprob": -1.5, "rank": 2, "decoded_token": texts_of(3)}}
    assert message["choices"][0]["prompt_logprobs"] == [
        None,
        {"2": {"logprob": -1.0, "rank": 1, "decoded_token": texts_of(2)}} | other,
        {"9": {"logprob": -2.0, "rank": 2, "decoded_token": texts_of(9)}} | likely | other,
    ]
    assert message["choices"][0]["logprobs"] is None


def texts_of(token):
    return token_bytes(token).decode(errors="replace")


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
    (pieces,) = long.whole_scores()
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


@pytest.mark.parametrize(
    ("reasoning", "text", "shown", "hidden"),
    [
        ("Hm", "", {"reasoning_content": "Hm"}, None),
        ("", "x", {"content": "x"}, {"content": "x"}),
        ("Hm", "x", {"reasoning_content": "Hm", "content": "x"}, {"content": "x"}),
    ],
)
def test_chunks_have_reasoning_apart_from_text(reasoning, text, shown, hidden):
    delta = AnswerDelta(0, [7], text=text, reasoning=reasoning)
    assert choice().chunk(delta)["delta"] == shown
    assert choice().only_text(delta) == (not reasoning)
    chunk = choice(include_reasoning=False).chunk(delta)
    assert (chunk and chunk["delta"]) == hidden


def test_a_scored_prompt_without_an_answer_ends_by_its_length():
    """Also where the token that the router computes all the same would end an answer."""
    scored = choice(without_answer=True, finished=inference_pb2.Finished(reason=common_pb2.FINISH_REASON_STOP))
    assert scored.reason == "length"
