"""Tests which revision answers a request, and how routers, workers and operators agree on the shares."""

import asyncio
import time
from types import SimpleNamespace

import pytest
from cores import FakeCore, one_revision

from overfill.errors import Incompatible, InvalidRequest
from overfill.routing.rollout import RolloutState, conversation, place
from overfill.routing.worker import DECODE, PREFILL
from overfill.rpc.membership import is_newer
from overfill.v1 import admin_pb2, common_pb2, inference_pb2, registry_pb2
from services.router.revisions import Revisions

CHANGE = admin_pb2.ChangeRolloutRequest
STATE = RolloutState(3, 5, "r2", 0.0, 40.0)


@pytest.fixture
async def cores():
    return FakeCore("r1"), FakeCore("r2")


def chats(count):
    message = inference_pb2.ChatMessage(role="user")
    for number in range(count):
        message.content = f"conversation {number}"
        yield inference_pb2.GenerateRequest(chat=inference_pb2.Chat(messages=[message]))


def chosen(revisions, request, key=None):
    return revisions.choose(request, key).revision


async def test_a_conversation_moves_once_as_the_share_grows_and_back_when_it_is_undone(cores):
    revisions, requests = Revisions(cores), list(chats(300))
    key = SimpleNamespace(id="k")
    moved = []
    for percent in (0, 20, 55, 100):
        revisions.change(CHANGE(set=admin_pb2.SetShare(revision="r2", percent=percent)))
        now = [chosen(revisions, request, key) == "r2" for request in requests]
        assert now == [place("k", conversation(request)) < percent for request in requests]
        assert all(new for old, new in zip(moved, now, strict=False) if old)
        moved = now
    assert all(moved)
    assert revisions.main.revision == "r2"
    revisions.change(CHANGE(undo=True))
    assert {chosen(revisions, request, key) for request in requests} == {"r1"}
    assert revisions.main.revision == "r1"


async def test_an_answer_goes_on_in_its_own_revision(cores):
    revisions = Revisions(cores, 100.0)
    identity = inference_pb2.AnswerIdentity
    request = inference_pb2.GenerateRequest(resume_identity=identity(revision="r1"), resume_token_ids=[1])
    cores[0].set_ready("p", "d", ready=False)
    assert chosen(revisions, request) == "r1"
    for other in ("r3", ""):
        request.resume_identity.CopyFrom(identity(revision=other))
        with pytest.raises(Incompatible, match=f"revision '{other}'; this router serves 'r1' and 'r2'") as error:
            revisions.choose(request, None)
        assert error.value.fields == ("resume_identity.revision",)


async def test_a_revision_that_cannot_answer_gets_nothing_while_the_other_can(cores):
    revisions = Revisions(cores, 100.0)
    asked = inference_pb2.GenerateRequest(text="x")
    fast = inference_pb2.GenerateRequest(text="x", tier="fast")
    assert chosen(revisions, asked) == chosen(revisions, fast) == "r2"
    cores[1].set_ready("f", ready=False)
    assert (chosen(revisions, asked), chosen(revisions, fast)) == ("r2", "r1")
    cores[1].set_ready("p", ready=False)
    assert chosen(revisions, asked) == "r1"
    cores[0].set_ready("d", ready=False)
    assert chosen(revisions, asked) == "r2", "neither can answer, so the request waits in its own"


async def test_an_adapter_of_one_revision_is_found_there(cores):
    revisions = Revisions(cores, 100.0)
    cores[0].roster.adapters.add(cores[0].workers["d"], common_pb2.Adapter(name="judge", digest="1" * 64))
    for request in (
        inference_pb2.GenerateRequest(text="x", tier="judge"),
        inference_pb2.GenerateRequest(text="x", model="tiny:judge"),
    ):
        assert chosen(revisions, request) == "r1"
        cores[0].set_ready("d", ready=False)
        assert chosen(revisions, request) == "r1", "the other would refuse it"
        cores[0].set_ready("d", ready=True)
    assert chosen(revisions, inference_pb2.GenerateRequest(text="x", tier="nothing")) == "r2"


async def test_a_line_that_differs_between_the_turns_of_a_chat_does_not_move_it(cores):
    revisions, message = Revisions(cores, 50.0), inference_pb2.ChatMessage
    for chat in range(20):
        asked = message(role="user", content=f"{chat}")
        turns = [
            inference_pb2.Chat(messages=[message(role="system", content=system), asked])
            for system in ("x-anthropic-billing-header: a=1;\nBe brief.", "x-anthropic-billing-header: a=2;\nBe brief.")
        ]
        assert len({chosen(revisions, inference_pb2.GenerateRequest(chat=turn)) for turn in turns}) == 1


async def test_routers_agree_on_the_newest_state(cores):
    one, other = Revisions(cores), Revisions(cores)
    one.change(CHANGE(set=admin_pb2.SetShare(revision="r1", percent=90, over_seconds=600)))
    told = one.state.to_proto()
    other.learn(told)
    assert other.state == one.state
    assert (other.state.revision, other.state.to_percent) == ("r2", 10)
    other.change(CHANGE(pause=True))
    assert other.state.newer_than(one.state)
    other.learn(told)  # a worker that has not heard of the change yet
    assert other.state.paused


@pytest.mark.parametrize(
    "fields",
    [{"revision": "r3"}, {"revision": "r1"}, {"to_percent": 101.0}, {"generation": 2**64 - 1, "revision": "r3"}],
)
async def test_a_state_that_is_not_of_this_rollout_is_ignored_and_outdone_by_the_next_change(cores, fields, caplog):
    revisions = Revisions(cores, 30.0)
    message = STATE.to_proto()
    message.MergeFrom(registry_pb2.Rollout(**fields))
    for tie_break in (7, 8, 9):
        message.tie_break = tie_break
        revisions.learn(message)
    assert (revisions.state.generation, revisions.state.share(time.time())) == (0, 30)
    assert len(caplog.records) == 1, "reports come often"
    revisions.change(CHANGE(undo=True))
    assert is_newer(revisions.state, message)


async def test_a_state_wakes_what_waits_for_it(cores):
    revisions = Revisions(cores)
    waiting = [asyncio.create_task(revisions.changed_since(revisions.state)) for _ in range(3)]
    await asyncio.sleep(0)
    revisions.learn(STATE.to_proto())
    assert await asyncio.gather(*waiting) == [STATE] * 3


async def test_the_status_has_both_revisions_with_what_an_operator_must_know(cores):
    revisions = Revisions(cores, 25.0)
    cores[1].set_ready("p", ready=False)
    status = revisions.status()
    assert [(r.name, r.percent, r.ready, r.running) for r in status.revisions] == [
        ("r1", 75, True, 7),
        ("r2", 25, False, 7),
    ]
    pools = [(pool.stage, pool.tier, pool.ready, pool.expected) for pool in status.revisions[1].pools]
    assert pools == [(PREFILL, "", 0, 1), (DECODE, "default", 1, 1), (DECODE, "fast", 1, 1)]
    revisions.change(CHANGE(set=admin_pb2.SetShare(revision="r2", percent=75, over_seconds=600)))
    status = revisions.status()
    assert (status.target_percent, status.paused) == (75, False)
    for running, shown in ((9, 14), (1, 7)):  # 2 wait on this router; of its others, a worker may not have reported yet
        cores[0].set_ready("d", ready=True, running=running, waiting=3)
        assert revisions.status().revisions[0].running == shown
    status = revisions.status()
    assert 0 < status.remaining_seconds <= 600


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (CHANGE(set=admin_pb2.SetShare(revision="r3", percent=5)), "set.revision"),
        (CHANGE(set=admin_pb2.SetShare(revision="r2", percent=101)), "set.percent"),
        (CHANGE(set=admin_pb2.SetShare(revision="r1", percent=float("nan"))), "set.percent"),
        (CHANGE(set=admin_pb2.SetShare(revision="r2", percent=1, over_seconds=1e9)), "set.over_seconds"),
        (CHANGE(pause=False), "pause"),
        (CHANGE(undo=False), "undo"),
    ],
)
async def test_a_change_that_is_not_valid_is_refused_and_changes_nothing(cores, change, field):
    revisions = Revisions(cores, 30.0)
    with pytest.raises(InvalidRequest) as error:
        revisions.change(change)
    assert error.value.field == field
    assert revisions.state.generation == 0


async def test_a_router_with_one_revision_has_a_status_and_nothing_to_change(cores):
    revisions = Revisions(cores[:1])
    revisions.change(CHANGE())
    status = revisions.status()
    assert [(r.name, r.percent) for r in status.revisions] == [("r1", 100)]
    assert (status.target_percent, status.remaining_seconds) == (100, 0)
    with pytest.raises(Incompatible, match="serves one revision, 'r1'"):
        revisions.change(CHANGE(undo=True))
    handler = object()
    assert one_revision(handler).choose(inference_pb2.GenerateRequest(), None) is handler
