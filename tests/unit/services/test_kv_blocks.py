"""Tests the gauges that an endpoint picker reads from a router."""

import pytest
from jobs import worker_info
from picker import Load, Refused, load
from prometheus_client import CollectorRegistry, generate_latest

from overfill.routing.pool import Roster
from overfill.routing.tier import Tier
from overfill.routing.worker import DECODE, PREFILL, STALE_AFTER
from overfill.telemetry.picker import PickerGauges
from overfill.v1 import decode_pb2, registry_pb2
from services.router.kv_blocks import kv_blocks


def add(roster, name, stage, used, total, block_size, tier="", draining=False):
    worker = roster.join(worker_info(name, stage, tier=tier))
    blocks = decode_pb2.WorkerLoad(kv_blocks_used=used, kv_blocks_total=total, block_size=block_size)
    pool = roster.decode[tier] if tier else roster.prefill
    pool.report(worker, registry_pb2.Report(load=blocks, ready=True, draining=draining), 0.0)


def picked(rosters, now=0.0):
    """What a picker reads from a router with these workers, three waiting and two running requests."""
    registry = CollectorRegistry()
    registry.register(PickerGauges(lambda: 3, lambda: 2, lambda: kv_blocks(rosters, now)))
    return load(generate_latest(registry).decode(), {})


def test_a_picker_reads_requests_of_the_router_and_blocks_of_all_workers_that_take_requests():
    roster, other = Roster(tiers=[Tier("full"), Tier("fast")]), Roster(tiers=[Tier("full")])
    add(roster, "p0", PREFILL, 50, 60, 32)
    add(roster, "p1", PREFILL, 0, 40, 32)
    add(roster, "d0", DECODE, 90, 100, 16, "full")
    add(roster, "d1", DECODE, 10, 50, 16, "fast")
    add(roster, "d2", DECODE, 70, 70, 16, "fast", draining=True)
    add(other, "d3", DECODE, 0, 50, 16, "full")
    assert picked([roster, other]) == Load(waiting=3, running=2, kv_usage=0.5, block_size=32, num_blocks=100)


def test_a_router_without_workers_tells_no_size_of_blocks_and_no_use():
    roster = Roster(tiers=[Tier("full")])
    add(roster, "p0", PREFILL, 50, 60, 32)
    blocks = kv_blocks([roster], STALE_AFTER + 1)
    assert (blocks.total, blocks.block_size) == (0, 0)
    with pytest.raises(Refused, match="cache_config_info"):
        picked([roster], STALE_AFTER + 1)
