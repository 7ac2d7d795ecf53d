"""Tests how new conversations are divided between two revisions."""

import math

import pytest

from overfill.errors import InvalidRequest
from overfill.routing.rollout import MAX_MESSAGES, RolloutState, conversation, place
from overfill.rpc.membership import next_generation
from overfill.v1 import inference_pb2, registry_pb2

START = RolloutState(revision="r2", from_percent=10, to_percent=10)


def test_a_share_changes_evenly_until_its_time_has_passed():
    state = START.set(60, over=100, now=1000.0, generation=1, tie_break=5)
    assert [state.share(now) for now in (990, 1000, 1050, 1100, 9999)] == [10, 10, 35, 60, 60]
    assert [state.remaining(now) for now in (990, 1000, 1050, 1100)] == [100, 100, 50, 0]


def test_a_new_change_begins_where_the_last_one_is():
    rising = START.set(60, over=100, now=1000.0, generation=1, tie_break=5)
    falling = rising.set(0, over=10, now=1050.0, generation=2, tie_break=1)
    assert falling.newer_than(rising)
    assert [falling.share(now) for now in (1050, 1055, 1060)] == [35, 17.5, 0]


def test_a_paused_share_stays_and_one_that_has_arrived_cannot_be_paused():
    rising = START.set(60, over=100, now=1000.0, generation=1, tie_break=5)
    paused = rising.pause(1050.0, generation=2, tie_break=0)
    assert (paused.paused, paused.share(5000), paused.remaining(1051), paused.to_percent) == (True, 35, 0, 60)
    assert not paused.set(60, over=0, now=5000.0, generation=3, tie_break=0).paused
    assert rising.pause(2000.0, generation=2, tie_break=0) is rising


def test_all_routers_agree_which_of_two_states_is_newer():
    states = [RolloutState(1, 9), RolloutState(2, 3), RolloutState(2, 4)]
    for index, state in enumerate(states):
        assert [state.newer_than(other) for other in states] == [i < index for i in range(3)]


@pytest.mark.parametrize("generation", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_no_generation_is_the_last(generation):
    state = RolloutState(generation)
    after = RolloutState(next_generation(generation))
    assert after.newer_than(state)
    assert not state.newer_than(after)
    assert after.newer_than(RolloutState()), "a router that starts learns it"
    RolloutState.from_proto(after.to_proto())


def test_a_state_survives_the_wire():
    state = RolloutState(3, 2**64 - 1, "r2", 12.5, 99.5, 1_800_000_000_123, 60_000, paused=True)
    assert RolloutState.from_proto(registry_pb2.Rollout.FromString(state.to_proto().SerializeToString())) == state


@pytest.mark.parametrize(
    "fields",
    [
        {"to_percent": math.nan},
        {"to_percent": 100.1},
        {"from_percent": -1.0},
        {"from_percent": math.inf},
        {"duration_ms": 8 * 24 * 3600 * 1000},
        {"generation": 0},
    ],
)
def test_a_state_out_of_bounds_is_refused_by_its_field(fields):
    message = registry_pb2.Rollout(**{"generation": 1, "revision": "r2"} | fields)
    with pytest.raises(InvalidRequest) as error:
        RolloutState.from_proto(message)
    assert error.value.field == f"rollout.{next(iter(fields))}"


@pytest.mark.parametrize(("percent", "over"), [(math.nan, 0), (-1, 0), (101, 0), (1, -1), (1, math.nan), (1, 700_000)])
def test_a_change_out_of_bounds_is_refused(percent, over):
    with pytest.raises(InvalidRequest):
        START.set(percent, over=over, now=0.0, generation=1, tie_break=0)


def test_places_are_even_and_depend_on_key_and_conversation():
    places = sorted(place("key", b"%d" % number) for number in range(10_000))
    assert places[0] >= 0
    assert places[-1] < 100
    assert max(abs(place - index / 100) for index, place in enumerate(places)) < 2  # Kolmogorov and Smirnov: p < 1e-3
    assert place("a", b"b") == place("a", b"b")
    assert len({place("a", b"b"), place("a", b"c"), place("b", b"b"), place("ab", b""), place("", b"ab")}) == 5


def chat(*texts, session=""):
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    messages = [inference_pb2.ChatMessage(role=role, content=text) for role, text in zip(roles, texts, strict=False)]
    return inference_pb2.GenerateRequest(chat=inference_pb2.Chat(messages=messages), session=session)


def test_all_turns_of_a_conversation_have_its_place_and_others_have_their_own():
    turns = {conversation(chat("s", "hello", *more)) for more in ((), ("a", "b"), ("a", "b", "c", "d"))}
    assert len(turns) == 1
    assert conversation(chat("s", "hello", session="x")) == conversation(chat("s", "other", session="x"))
    request = inference_pb2.GenerateRequest
    others = [
        chat("s", "hello"), chat("s", "other"), chat("", "shello"), chat("s", "hello", session="x"),
        request(text="hello"), request(text="hello you"), request(token_ids=inference_pb2.TokenIds(ids=[1, 2])),
        request(token_ids=inference_pb2.TokenIds(ids=[1, 3])), request(),
    ]  # fmt: skip
    assert len({conversation(one) for one in others}) == len(others)


def test_a_chat_of_many_messages_is_named_by_its_beginning():
    message = inference_pb2.ChatMessage(role="system", content="s")
    first, longer = (inference_pb2.Chat(messages=[message] * count) for count in (MAX_MESSAGES, MAX_MESSAGES + 9))
    request = inference_pb2.GenerateRequest
    assert conversation(request(chat=first)) == conversation(request(chat=longer))
    del first.messages[0]
    assert conversation(request(chat=first)) != conversation(request(chat=longer))
