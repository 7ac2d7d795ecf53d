"""Tests the buffer of an answer: unread tokens merge, repeats are dropped, gaps are errors."""

import pytest

from overfill.errors import InternalError, Unavailable
from overfill.routing.answer import AnswerDelta, AnswerState, joined
from overfill.v1 import common_pb2, decode_pb2, inference_pb2

DONE = decode_pb2.DecodeDone(reason=common_pb2.FINISH_REASON_STOP)


def tokens(first, *ids, logprobs=()):
    return decode_pb2.Tokens(first_index=first, ids=ids, logprobs=logprobs)


async def test_unread_tokens_merge_into_one_delta():
    answer = AnswerState((), 10, 0.0)
    answer.accept(tokens(0, 7), 1.0)
    answer.accept(tokens(1, 8, 9), 2.0)
    delta = await answer.next()
    assert (delta.first_index, delta.token_ids, answer.first_token_at) == (0, [7, 8, 9], 1.0)
    answer.accept(tokens(3, 5), 3.0)
    delta = await answer.next()
    assert (delta.first_index, delta.token_ids, answer.first_token_at) == (3, [5], 1.0)


async def test_all_tokens_come_before_the_end():
    answer = AnswerState((), 10, 0.0)
    answer.accept(tokens(0, 7), 1.0)
    answer.end(Unavailable("lost"))
    answer.end(DONE)
    assert (await answer.next()).token_ids == [7]
    with pytest.raises(Unavailable):
        await answer.next()


async def test_an_identical_repeat_is_dropped():
    answer = AnswerState((), 10, 0.0)
    lp = [common_pb2.TokenLogprobs(logprob=-x) for x in (1.0, 2.0, 3.0)]
    answer.accept(tokens(0, 7, 8, logprobs=lp[:2]), 1.0)
    await answer.next()
    answer.accept(tokens(0, 7), 1.0)
    answer.accept(tokens(1, 8, 9, logprobs=lp[1:]), 2.0)
    delta = await answer.next()
    assert (delta.first_index, delta.token_ids, delta.logprobs) == (2, [9], lp[2:])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (tokens(3, 9), "2..2 of the answer are missing"),
        (tokens(1, 9), "differ"),
        (tokens(0, 7, 9), "differ"),
        (tokens(2, 1, 1, 1), "more than max_tokens=4"),
        (tokens(2, 1, 1, logprobs=[common_pb2.TokenLogprobs()]), "1 log-probabilities for 2 tokens"),
    ],
)
def test_gaps_contradictions_and_surplus_are_errors_that_add_nothing(bad, message):
    answer = AnswerState((), 4, 0.0)
    answer.accept(tokens(0, 7, 8), 1.0)
    with pytest.raises(InternalError, match=message):
        answer.accept(bad, 2.0)
    assert answer.emitted == [7, 8]


async def test_log_probabilities_do_not_keep_the_workers_message():
    answer = AnswerState((), 9, 0.0)
    tokens = decode_pb2.Tokens(first_index=0, ids=[7], logprobs=[common_pb2.TokenLogprobs(logprob=-1.0)])
    answer.accept(tokens, 0.0)
    tokens.logprobs[0].logprob = -2.0
    assert (await answer.next()).logprobs[0].logprob == -1.0, "the delta refers to the message"


def scores(tokens=2, top=2, ranks=None):
    values = [-1.0] * tokens
    count = tokens if ranks is None else ranks
    return common_pb2.PromptLogprobs(
        logprobs=values, ranks=[1] * count, top_ids=[0] * tokens * top, top_logprobs=values * top
    )


async def test_scores_of_the_prompt_come_once_also_without_a_token():
    for ids in ((7,), ()):
        answer = AnswerState((), 10, 0.0, num_scores=(2, 2))
        assert answer.accept(decode_pb2.Tokens(ids=ids, prompt_logprobs=scores()), 1.0)
        delta = await answer.next()
        assert (delta.token_ids, delta.prompt_logprobs) == ([*ids], scores())
        answer.accept(decode_pb2.Tokens(first_index=len(ids), ids=[8]), 2.0)
        assert (await answer.next()).prompt_logprobs is None


@pytest.mark.parametrize("bad", [None, scores(1), scores(3), scores(2, 1), scores(2, 2, 1)])
def test_scores_that_do_not_fit_the_prompt_are_an_error(bad):
    answer = AnswerState((), 10, 0.0, num_scores=(2, 2))
    with pytest.raises(InternalError, match="2 tokens to score"):
        answer.accept(decode_pb2.Tokens(ids=[7], prompt_logprobs=bad), 1.0)
    assert answer.emitted == []


def test_parts_of_an_answer_join_with_one_part_of_each_call():
    parts = [
        AnswerDelta(0, [1], reasoning="Hm"),
        AnswerDelta(1, [2, 3], text="a"),
        AnswerDelta(3, [4], text="b", tool_calls=[call(0, "", "c0", "f")]),
        AnswerDelta(4, [5], tool_calls=[call(0, '{"x"'), call(0, ":1}"), call(1, "{", "c1", "g")]),
        AnswerDelta(5, [], tool_calls=[call(1, "}")]),
    ]
    calls = [call(0, '{"x":1}', "c0", "f"), call(1, "{}", "c1", "g")]
    assert joined(parts) == AnswerDelta(0, [1, 2, 3, 4, 5], text="ab", reasoning="Hm", tool_calls=calls)


def call(index, arguments, id="", name=""):
    return inference_pb2.ToolCallDelta(index=index, id=id, name=name, arguments=arguments)


@pytest.mark.parametrize(("decoder_first", "bases"), [(False, [1, 1, 2]), (True, [0, 0, 2])])
def test_a_decode_worker_is_timed_from_the_first_token_that_it_samples(decoder_first, bases):
    answer = AnswerState([], 8, 0.0, decoder_first=decoder_first)
    seen = [answer.decode_base]
    answer.begin_attempt()
    seen.append(answer.decode_base)
    answer.accept(decode_pb2.Tokens(first_index=0, ids=[5, 6]), 0.0)
    answer.begin_attempt()
    assert [*seen, answer.decode_base] == bases
