"""Tests what a decode worker believes of the numbers that a prefill worker reports."""

import pytest

from overfill.kv.receiver import PullStats
from overfill.v1 import prefill_pb2


@pytest.mark.parametrize(
    ("told", "believed"),
    [((48, 16, 32), (48, 16, 32)), ((48, 64, 32), (48, 48, 0)), ((48, 16, 64), (48, 16, 32)), ((0, 1, 1), (0, 0, 0))],
)
def test_imported_tokens_are_part_of_the_cached_ones(told, believed):
    stats = PullStats()
    cached, peer, disk = told
    stats.note_scheduled(prefill_pb2.PrefillScheduled(cached_tokens=cached, peer_tokens=peer, disk_tokens=disk))
    assert (stats.cached_tokens, stats.peer_tokens, stats.disk_tokens) == believed
    trace = stats.to_proto()
    assert (trace.cached_tokens, trace.peer_tokens, trace.disk_tokens) == believed
