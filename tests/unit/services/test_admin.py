"""Tests what a router with two revisions says of its workers and pools."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from cores import FakeCore

from overfill.errors import Incompatible, InvalidRequest
from overfill.routing.worker import DECODE, PREFILL
from overfill.v1 import admin_pb2
from services.router.admin import AdminServicer
from services.router.core import Core
from services.router.port_group import Member
from services.router.revisions import Revisions

ROUTER = SimpleNamespace(
    http_address="",
    status=lambda: admin_pb2.ProcessStatus(ready=True),
    member=lambda: Member("r", "h:1", ""),
    activity=lambda histograms: admin_pb2.Activity(),
)


def servicer(*cores):
    return AdminServicer(ROUTER, Revisions(cores), None, lambda: (), None, None)


async def test_the_status_has_the_workers_and_pools_of_both_revisions():
    cores = FakeCore("r1"), FakeCore("r2")
    cores[1].set_ready("d", ready=False)
    status = await servicer(*cores).known()
    assert [(w.id, w.revision) for w in status.workers] == [
        (f"{revision}-{name}", revision) for revision in ("r1", "r2") for name in ("p", "d", "f")
    ]
    pools = [(pool.revision, pool.stage, pool.tier, pool.ready) for pool in status.pools]
    assert pools == [
        ("r1", PREFILL, "", 1),
        ("r1", DECODE, "default", 1),
        ("r1", DECODE, "fast", 1),
        ("r2", PREFILL, "", 1),
        ("r2", DECODE, "default", 0),
        ("r2", DECODE, "fast", 1),
    ]
    assert not status.complete
    cores[1].set_ready("d", ready=True)
    assert (await servicer(*cores).known()).complete


async def test_workers_are_counted_by_what_they_are_and_do():
    core = FakeCore("r2")
    core.roster.join(replace(core.workers["f"].info, id="r2-g"))
    core.set_ready("d", ready=False)
    counts = dict(Core.workers(core))  # the fake one's own attribute has this name
    assert {labels: count for labels, count in counts.items() if count} == {
        ("prefill", "", "r2", "ready"): 1,
        ("decode", "default", "r2", "starting"): 1,
        ("decode", "fast", "r2", "ready"): 1,
        ("decode", "fast", "r2", "starting"): 1,
    }
    assert counts["decode", "fast", "r2", "silent"] == 0, "a series that starts late would miss the first one"


async def test_a_worker_to_drain_is_looked_for_in_both_revisions():
    admin = servicer(FakeCore("r1"), FakeCore("r2"))
    assert admin._find("r2-f").id == "r2-f"
    with pytest.raises(InvalidRequest, match="joined: r1-p, r1-d, r1-f, r2-p, r2-d, r2-f"):
        await admin.Drain(admin_pb2.DrainRequest(worker_id="r3-p"), None)


async def test_a_change_is_answered_with_the_new_shares():
    admin = servicer(FakeCore("r1"), FakeCore("r2"))
    change = admin_pb2.ChangeRolloutRequest(set=admin_pb2.SetShare(revision="r2", percent=5))
    shown = [await admin.ChangeRollout(change, None), await admin.ChangeRollout(admin_pb2.ChangeRolloutRequest(), None)]
    assert [[(r.name, r.percent) for r in status.revisions] for status in shown] == [[("r1", 95), ("r2", 5)]] * 2
    with pytest.raises(Incompatible):
        await servicer(FakeCore("r1")).ChangeRollout(change, None)
