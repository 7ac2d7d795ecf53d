"""The plan of a load test: conflicts of its options, its requests and tiers, and its users over time."""

from __future__ import annotations

import json
from itertools import islice

import pytest

from overfill.errors import InvalidRequest
from overfill.lab.loadtest.plan import LoadPlan


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
    return path


def test_a_target_without_a_scheme_is_a_router():
    for target in ("127.0.0.1:7600", "grpc://127.0.0.1:7600"):
        plan = LoadPlan(target=target)
        assert (plan.http, plan.address) == (False, "127.0.0.1:7600")
    assert LoadPlan(target="http://127.0.0.1:8000/v1").http


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"target": "127.0.0.1"}, "target"),
        ({"rate": 1.0, "shape": "ramp"}, "rate"),
        ({"shape": "arrivals"}, "shape"),
        ({"rate": 1.0}, "rate"),
        ({"objective": "ttft=1"}, "objective"),
        ({"tier": ("full=x",)}, "tier"),
        ({"tier": ("full=0",)}, "tier"),
        ({"tier": ("Full",)}, "tier"),
        ({"tier": ("full", "full=2")}, "tier"),
    ],
)
def test_contradictions_are_told(options, field):
    with pytest.raises(InvalidRequest) as error:
        LoadPlan(**options)
    assert error.value.field == field


def test_tiers_are_mixed_by_weight_and_alike_in_every_test():
    assert next(iter(LoadPlan().load())).tier == ""
    plan = LoadPlan(tier=("full", "fast=3"), requests=400)
    named = [request.tier for request in plan.load()]
    assert 250 < named.count("fast") < 350
    assert named.count("full") == 400 - named.count("fast")
    assert named == [request.tier for request in plan.load()]


def test_the_scale_of_a_trace_applies_to_its_shared_prefixes(trace):
    requests = LoadPlan(trace=trace, length_scale=0.125).load()
    a, b, c = (request.prompt(1000, seed) for seed, request in enumerate(requests))
    assert len(a) == len(b) == len(c) == 125
    assert a[:64] == b[:64]
    assert a[64:] != b[64:]
    assert a[:64] != c[:64]
    assert requests[1].output_tokens == 2


def test_arrivals_end_with_the_time_or_the_count(trace):
    assert len(LoadPlan(trace=trace, duration=1.5).load()) == 2
    assert len(LoadPlan(trace=trace, requests=1).load()) == 1
    assert len(LoadPlan(rate=10.0, requests=7).load()) == 7
    by_time = LoadPlan(rate=10.0, duration=20.0).load()
    assert 100 < len(by_time) < 300
    assert by_time[-1].arrival < 20


def test_users_have_as_many_requests_as_the_count_says_or_as_the_time_allows(trace):
    assert len(LoadPlan(requests=7).load()) == 7
    again = LoadPlan(trace=trace, shape="constant", requests=5).load()
    assert [request.blocks for request in again] == [(1, 2), (1, 3), (4, 5), (1, 2), (1, 3)]
    endless = LoadPlan(trace=trace, shape="ramp")
    assert [request.blocks[0] for request in islice(endless.load(), 4)] == [1, 1, 4, 1]
    assert (endless.seconds, LoadPlan().seconds, LoadPlan(shape="soak").seconds) == (120, 60, 3600)


def test_users_over_time():
    def users(shape, users=10):
        plan = LoadPlan(shape=shape, users=users, duration=100.0)
        return [plan.users_at(elapsed) for elapsed in range(0, 100, 10)]

    assert users("constant") == users("soak") == [10] * 10
    assert users("ramp") == [*range(1, 11)]
    assert users("spike") == [1, 1, 1, 1, 10, 10, 1, 1, 1, 1]
    assert users("ramp", users=2) == [1] * 5 + [2] * 5
    assert users("spike", users=1)[4] == 1
