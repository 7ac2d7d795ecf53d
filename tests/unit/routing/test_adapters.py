"""Tests what a router makes of the adapters that workers say they have."""

import logging

import pytest

from overfill.routing.adapters import MAX_ADAPTERS, MAX_WORKER_ADAPTERS, Adapters
from overfill.routing.tier import Adapter
from overfill.routing.worker import DECODE, Worker, WorkerInfo
from overfill.v1 import common_pb2

ONE, TWO = "1" * 64, "2" * 64


def worker(name, tier="default"):
    return Worker(WorkerInfo(name, 1, DECODE, "h:1", (), None, 0, 0, tier=tier))


def said(name="judge", digest=ONE, tail_tokens=0):
    return common_pb2.Adapter(name=name, digest=digest, tail_tokens=tail_tokens)


@pytest.fixture
def adapters():
    return Adapters(["default", "fast"])


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (said("a/b"), "a name has 1 to 64"),
        (said("../x"), "a name has 1 to 64"),
        (said(""), "a name has 1 to 64"),
        (said("a\n"), "a name has 1 to 64"),
        (said("x" * 65), "a name has 1 to 64"),
        (said("fast"), "a tier has this name"),
        (said("a", "z" * 64), "a digest has 64"),
        (said("a", ""), "a digest has 64"),
        (said("a", tail_tokens=257), "tail_tokens is at most 256"),
        (said("taken", TWO), "the same name has the digest 111111111111"),
        (said("taken", ONE, 1), "the same name has the digest"),
    ],
)
def test_an_adapter_that_is_wrong_or_not_unique_is_ignored_with_a_warning(adapters, caplog, bad, reason):
    first, second = worker("d0"), worker("d1")
    adapters.set(first, [said("taken")])
    with caplog.at_level(logging.WARNING):
        adapters.set(second, [bad, said("good", TWO)])
    assert [adapter.name for adapter in adapters.known()] == ["good", "taken"]
    assert list(second.adapters) == ["good"]
    assert adapters.get("taken") == Adapter("taken", ONE, "default")
    (warning,) = caplog.messages
    assert "worker d1: ignored the adapters" in warning
    assert reason in warning


def test_the_numbers_of_adapters_are_bounded(adapters, caplog):
    for index in range(5):
        adapters.set(worker(f"d{index}"), [said(f"a{index}.{number}") for number in range(2 * MAX_WORKER_ADAPTERS)])
    assert len(adapters.known()) == MAX_ADAPTERS
    assert len(caplog.messages) == 6, "one for each worker, and one for the last worker's adapters"
    assert "ignored the adapters 'a4.0', 'a4.1', 'a4.2' and 1021 more: this router knows 4096" in caplog.text


def test_a_name_goes_to_another_worker_when_the_first_one_is_gone(adapters):
    first, second, third = worker("d0"), worker("d1"), worker("d2", "fast")
    adapters.set(first, [said()])
    adapters.set(second, [said(digest=TWO)])
    adapters.set(third, [said()])
    old, changes = adapters.get("judge"), adapters.changes
    assert [*adapters.holders(old)] == [first]
    adapters.set(first, [])
    new = adapters.get("judge")
    assert new == Adapter("judge", TWO, "default")
    assert [*adapters.holders(new)] == [second]
    assert not adapters.holders(old)
    assert not first.has(old)
    assert second.has(new)
    assert adapters.changes > changes
    adapters.left(second)
    assert adapters.get("judge") == Adapter("judge", ONE, "fast")


def test_an_adapter_outlives_its_last_worker_for_a_while_but_not_its_removal(adapters):
    gone, other = worker("d0"), worker("d1")
    adapters.set(gone, [said(), said("coder", TWO)])
    adapters.set(other, [said()])
    adapters.left(gone)
    assert adapters.expire(0.0, lambda tier: 10.0) == []
    assert adapters.expire(9.0, lambda tier: 10.0) == []
    assert [adapter.name for adapter in adapters.known()] == ["coder", "judge"]
    assert adapters.expire(10.0, lambda tier: 10.0) == [Adapter("coder", TWO, "default")]
    assert [adapter.name for adapter in adapters.known()] == ["judge"]
    adapters.set(other, [])
    assert adapters.known() == []


def test_a_worker_that_returns_keeps_its_adapters_and_a_new_version_replaces_lost_ones(adapters):
    first = worker("d0")
    adapters.set(first, [said(), said("coder")])
    adapters.left(first)
    adapters.expire(0.0, lambda tier: 10.0)
    again = worker("d0")
    adapters.set(again, [said(), said("coder", TWO)])
    assert adapters.expire(99.0, lambda tier: 10.0) == []
    assert {name: adapter.digest for name, adapter in again.adapters.items()} == {"judge": ONE, "coder": TWO}


def test_an_adapter_that_a_worker_loads_is_ignored_for_its_own_reason(adapters):
    first, second = worker("d0"), worker("d1")
    adapters.set(first, [said()])
    adapters.set(second, [said(digest=TWO)])
    assert adapters.add(second, said("coder")) is None
    assert sorted(second.adapters) == ["coder"]
    for _ in range(2):
        assert "the same name has the digest 1111" in adapters.add(second, said(digest=TWO))
    assert adapters.add(second, said()) is None
    assert [*adapters.holders(adapters.get("judge"))] == [first, second]
    assert "a tier has this name" in adapters.add(second, said("fast"))
    assert adapters.add(worker("d2"), said()) == "it has left"
    assert sorted(second.adapters) == ["coder", "judge"]
