"""Tests what a router makes of the answers of decode workers that are to load or unload an adapter."""

from types import SimpleNamespace

import pytest
from jobs import worker_info

from overfill.errors import (
    DeadlineExceeded,
    Incompatible,
    InvalidRequest,
    ModelNotFound,
    OverfillError,
    Overloaded,
    Unavailable,
)
from overfill.routing.pool import Roster
from overfill.routing.tier import Tier
from overfill.routing.worker import DECODE
from overfill.v1 import admin_pb2, common_pb2
from services.router import adapter_changes
from services.router.adapter_changes import AdapterChanges

ONE, TWO = (common_pb2.Adapter(name="judge", digest=digit * 64) for digit in "12")
OTHER_DECODER = Incompatible("is of the decoder 1f", ["decoder_digest"])
NO_FOLDER = Incompatible("takes no adapters", ["adapters"])


@pytest.fixture
def roster():
    return Roster(tiers=[Tier("default"), Tier("fast")])


@pytest.fixture
def change(roster, monkeypatch):
    """Returns a function that changes "judge" on workers with scripted answers, given as keyword arguments by id.

    Workers whose ids begin with f have the tier fast.
    """

    async def answer(call, peer):
        if isinstance(call, OverfillError):
            raise call
        return admin_pb2.ChangeAdapterResponse(workers=[admin_pb2.AdapterChange(adapter=call)])

    def channel(info):
        def call(request, timeout):
            return answers[info.id]

        return SimpleNamespace(LoadAdapter=call, UnloadAdapter=call)

    monkeypatch.setattr(adapter_changes, "checked_response", answer)
    monkeypatch.setattr(adapter_changes.admin_pb2_grpc, "AdminStub", lambda channel: channel)
    answers = {}

    async def change(name="judge", load=True, **workers):
        answers.update(workers)
        for id in workers:
            if roster.find(id) is None:
                roster.join(worker_info(id, DECODE, tier="fast" if id[0] == "f" else "default"))
        changes = await AdapterChanges([roster], SimpleNamespace(channel=channel)).change(name, load=load)
        return {one.worker_id: None if one.error is None else type(one.error) for one in changes}

    return change


@pytest.mark.parametrize(
    ("workers", "result"),
    [
        ({"d0": ONE, "d1": ONE}, {"d0": None, "d1": None}),
        ({"d0": ONE, "f0": OTHER_DECODER}, {"d0": None}),  # an adapter is of one tier's decoder
        ({"d0": ONE, "f0": NO_FOLDER}, {"d0": None}),
        ({"d0": ONE, "d1": NO_FOLDER}, {"d0": None, "d1": Incompatible}),  # but all workers of the tier count
        ({"d0": ONE, "d1": Overloaded("full")}, {"d0": None, "d1": Overloaded}),
        ({"d0": ONE, "d1": TWO}, {"d0": None, "d1": Incompatible}),  # their folders differ
    ],
)
async def test_each_worker_that_may_have_the_adapter_answers_for_itself(roster, change, workers, result):
    assert await change(**workers) == result
    adapter = roster.adapters.get("judge")
    assert {worker.id for worker in roster.adapters.holders(adapter)} == {id for id, e in result.items() if e is None}


@pytest.mark.parametrize(
    "workers",
    [
        {"d0": ModelNotFound("no such folder"), "f0": ModelNotFound("no such folder")},
        {"d0": NO_FOLDER, "f0": Overloaded("full")},
        {"d0": DeadlineExceeded("still loads")},
        {"f0": OTHER_DECODER, "d0": OTHER_DECODER},
    ],
)
async def test_an_adapter_that_no_worker_has_loaded_is_refused_for_their_reason(roster, change, workers):
    *_, error = workers.values()
    with pytest.raises(type(error), match=str(error)):
        await change(**workers)
    assert roster.adapters.known() == []


async def test_an_adapter_is_gone_at_once_where_it_was_unloaded(roster, change):
    await change(d0=ONE, d1=ONE)
    assert await change(load=False, d0=ONE, d1=Unavailable("gone")) == {"d0": None, "d1": Unavailable}
    assert [worker.id for worker in roster.adapters.holders(roster.adapters.get("judge"))] == ["d1"]
    assert await change(load=False, d0=ModelNotFound("not loaded"), d1=ONE) == {"d1": None}
    assert roster.adapters.known() == []
    with pytest.raises(ModelNotFound, match="not loaded"):
        await change(load=False, d0=ModelNotFound("not loaded"), d1=ModelNotFound("not loaded"))


async def test_a_worker_that_drains_loads_no_adapter_but_unloads_its_own(roster, change):
    await change(d0=ONE, d1=ONE)
    roster.find("d0").draining = True
    assert await change(d0=ONE, d1=ONE) == {"d1": None}
    assert await change(load=False, d0=ONE, d1=ONE) == {"d0": None, "d1": None}
    assert roster.adapters.known() == []


@pytest.mark.parametrize("name", ["", "a/b", "..", "/etc/passwd", "x" * 65, "a\n", "fast"])
async def test_a_name_that_no_adapter_can_have_reaches_no_worker(change, name):
    with pytest.raises(InvalidRequest, match=r"^name: is "):
        await change(name, d0=ONE)


async def test_without_decode_workers_nothing_can_be_loaded(change):
    with pytest.raises(Unavailable, match="no decode worker has joined"):
        await change()
