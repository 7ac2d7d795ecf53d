"""Requests of a load test: shared prefixes of a trace, and the shards of several processes."""

from __future__ import annotations

import json

import pytest

from overfill.lab.loadtest.plan import LoadPlan
from overfill.lab.loadtest.workload import ProcessShard, Workload


@pytest.fixture
def trace(tmp_path):
    """Two requests that share their first block, one that shares none."""
    path = tmp_path / "mooncake.jsonl"
    blocks = ([1, 2], [1, 3], [4, 5])
    lines = [
        {"timestamp": 1000 * i, "input_length": 1000, "output_length": 20, "hash_ids": ids}
        for i, ids in enumerate(blocks)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_equal_hashes_are_equal_text_in_every_process(trace):
    plan = LoadPlan(trace=trace, length_scale=0.125)
    here, there = Workload(plan), Workload(plan)
    a, b, c = here.prompt(0), there.prompt(1), there.prompt(2)
    assert len(a) == len(b) == len(c) == 125
    assert a[:64] == b[:64]
    assert a[64:] != b[64:]
    assert a[:64] != c[:64]
    assert here.total == 3
    assert here[1].output_tokens == 2


def test_arrivals_end_with_the_time_or_the_count(trace):
    assert Workload(LoadPlan(trace=trace, duration=1.5)).total == 2
    assert Workload(LoadPlan(trace=trace, requests=1)).total == 1
    assert Workload(LoadPlan(rate=10.0, requests=7)).total == 7
    by_time = Workload(LoadPlan(rate=10.0, duration=20.0))
    assert 100 < by_time.total < 300
    assert by_time.last_arrival < 20


def test_every_request_falls_to_one_process_once():
    shards = [ProcessShard(10, index, 3) for index in range(3)]
    assert [list(shard.ordinals()) for shard in shards] == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    taken = [ordinal for shard in shards for ordinal in iter(shard.take, None)]
    assert sorted(taken) == list(range(10))
    endless = ProcessShard(None, 1, 2)
    assert [endless.take() for _ in range(3)] == [1, 3, 5]
