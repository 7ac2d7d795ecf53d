"""Tests the text of a streamed answer: batches, stop strings, replayed tokens."""

import pytest

from overfill.api.answer_text import AnswerText
from overfill.api.detokenizer import StreamDetokenizer
from overfill.api.families.hermes import Hermes
from overfill.api.tokenizer import Tokenizer
from overfill.routing.answer import AnswerDelta
from overfill.v1 import common_pb2

HERMES = Hermes()


@pytest.fixture(scope="module")
def tokenizer(tiny_pair):
    return Tokenizer.load(tiny_pair / "full")


def write(tokenizer, ids, cuts, stops=(), replayed=(), calls=None):
    """Pushes ``ids`` cut into batches of ``cuts`` tokens; returns the text, the token ids and the state.

    Adds tool calls to the list ``calls``; without one, the answer has none.
    """
    text = AnswerText(StreamDetokenizer(tokenizer), stops, replayed, None if calls is None else (HERMES, ()))
    pieces, tokens, first = [], [], len(replayed)
    for start in range(0, len(ids), cuts):
        if text.stop is not None:
            break
        logprobs = [common_pb2.TokenLogprobs(logprob=-1.0) for _ in ids[start : start + cuts]]
        delta = text.push(AnswerDelta(first + start, list(ids[start : start + cuts]), logprobs))
        assert delta.first_index == first + start
        assert len(delta.logprobs) == len(delta.token_ids)
        pieces.append(delta.text)
        tokens += delta.token_ids
        for part in delta.tool_calls:
            if part.name:
                calls.append((part.name, ""))
            name, arguments = calls[part.index]
            calls[part.index] = (name, arguments + part.arguments)
    if text.stop is None:
        rest = text.finish()
        pieces.append("" if rest is None else rest.text)
    return "".join(pieces), tokens, text


@pytest.mark.parametrize("cuts", [1, 2, 3, 100])
def test_text_does_not_depend_on_how_batches_are_cut(tokenizer, cuts):
    ids = tokenizer.encode("Grüße, 世界 🎉 and the rest of it")
    text, tokens, state = write(tokenizer, ids, cuts)
    assert text == "Grüße, 世界 🎉 and the rest of it"
    assert tokens == ids
    assert state.num_tokens == len(ids)


@pytest.mark.parametrize("cuts", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("before", "stop", "behind"), [("one two ", "END", " three four"), ("नमस्ते 👩‍👩‍👧 ", "｡ﾟ終わり🛑 ﾟ", " Ăâ 世界")]
)
def test_a_stop_string_cuts_text_exactly_and_tokens_behind_it(tokenizer, cuts, before, stop, behind):
    ids = tokenizer.encode(before + stop + behind)
    text, tokens, state = write(tokenizer, ids, cuts, stops=[stop, "four", "🛑🛑"])
    assert text == before
    assert state.stop == stop
    assert tokens == ids[: len(tokens)]
    assert stop in tokenizer.decode(tokens)
    assert stop not in tokenizer.decode(tokens[:-1])
    assert state.num_tokens == len(tokens)


def test_text_that_may_become_a_stop_string_is_held_back_and_released_at_the_end(tokenizer):
    text, _, state = write(tokenizer, tokenizer.encode("one EN"), 1, stops=["END"])
    assert text == "one EN"
    assert state.stop is None


def test_replayed_tokens_are_not_sent_again_but_count_for_stop_strings(tokenizer):
    ids = tokenizer.encode("one two END three")
    cut = next(i for i in range(len(ids)) if "E" in tokenizer.decode(ids[:i]))
    before, _, _ = write(tokenizer, ids[:cut], 1, stops=["END"])
    said = AnswerText(StreamDetokenizer(tokenizer), ["END"])
    held_back = said.push(AnswerDelta(0, list(ids[:cut]))).text
    assert held_back != before, "the E is held back"
    text, tokens, state = write(tokenizer, ids[cut:], 1, stops=["END"], replayed=ids[:cut])
    assert held_back + text == "one two "
    assert state.stop == "END"
    assert state.num_tokens == cut + len(tokens)


def test_a_stop_string_within_replayed_tokens_ends_the_answer_at_once(tokenizer):
    ids = tokenizer.encode("one END")
    assert AnswerText(StreamDetokenizer(tokenizer), ["END"], ids).stop == "END"


@pytest.mark.parametrize("cuts", [1, 2, 100])
def test_stop_strings_count_behind_min_tokens(tokenizer, cuts):
    ids = [tokenizer.encode_continuation(letter)[0] for letter in "a.b.c.d"]
    text = AnswerText(StreamDetokenizer(tokenizer), ["."], min_tokens=4)
    shown = ""
    for start in range(0, len(ids), cuts):
        if text.stop is None:
            shown += text.push(AnswerDelta(start, ids[start : start + cuts], [])).text
    assert (shown, text.stop, text.num_tokens) == ("a.b.c", ".", 6)
    client_resumed = AnswerText(StreamDetokenizer(tokenizer), ["."], ids[:3], min_tokens=4)
    assert client_resumed.push(AnswerDelta(3, ids[3:])).text == ".c"


CALLS = [("weather", '{"city": "Paris", "days": [1]}'), ("now", "{}")]


@pytest.mark.parametrize("cuts", [1, 2, 3, 100])
@pytest.mark.parametrize("stop", ["\n", "}", "Paris", "</tool_call>", "<tool_call>", "Paris, not"])
def test_a_stop_string_inside_or_between_calls_does_not_count(tokenizer, cuts, stop):
    calls = []
    text, tokens, state = write(tokenizer, ids := tokenizer.encode(HERMES.write(CALLS)), cuts, [stop], calls=calls)
    assert (text, calls, state.stop, tokens) == ("", CALLS, None, ids)
    assert state.called_tools


@pytest.mark.parametrize("cuts", [1, 2, 3, 100])
def test_a_stop_string_before_a_call_ends_the_answer(tokenizer, cuts):
    calls = []
    ids = tokenizer.encode(f"Let me look.END {HERMES.write(CALLS)}")
    text, _, state = write(tokenizer, ids, cuts, stops=["END"], calls=calls)
    assert (text, calls, state.stop) == ("Let me look.", [], "END")


@pytest.mark.parametrize("cuts", [1, 2, 3, 100])
def test_the_beginning_of_a_stop_string_before_a_call_is_text(tokenizer, cuts):
    calls = []
    ids = tokenizer.encode(f"Let me look: EN{HERMES.write(CALLS)}")
    text, _, state = write(tokenizer, ids, cuts, stops=["END", "EN<tool"], calls=calls)
    assert (text, calls, state.stop) == ("Let me look: EN", CALLS, None)


@pytest.mark.parametrize("cuts", [1, 2, 3, 100])
@pytest.mark.parametrize("before", ["Hello world <", "Hello \n\n", "<tool_call>", "", "  "])
@pytest.mark.parametrize("stop", ["STOP", "\nSTOP", "never", "\n", "<", "\n\nS"])
def test_text_does_not_depend_on_whether_the_answer_could_have_called_tools(tokenizer, cuts, before, stop):
    ids = tokenizer.encode(f"{before}STOP and more")
    plain, _, plain_state = write(tokenizer, ids, cuts, [stop])
    text, _, state = write(tokenizer, ids, cuts, [stop], calls=[])
    assert (text, state.stop) == (plain, plain_state.stop)
