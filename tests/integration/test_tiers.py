"""Tests tiers through the router's interfaces: the default, fallback, brownout. The workers compute nothing."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from mocks import mock_stack
from stacks import wait_until

from overfill.api import key_file as keys
from overfill.client import Client, OverfillError, SamplingParams
from overfill.errors import InvalidPair, Overloaded
from overfill.making.tiny import make_tiny_pair

FIVE = SamplingParams(max_tokens=5, temperature=0)
ONE_AT_A_TIME = {"max_num_seqs": 1, "step": 0.05}


@contextmanager
def tiered(pairs, key=None, **settings):
    """Yields a stack with a worker per tier, and a client of it."""
    with mock_stack(pairs["default"], tiers=pairs, **settings) as stack, Client(stack.grpc, api_key=key) as client:
        yield stack, client


@contextmanager
def full_queue(stack, client, **options):
    """Keeps a worker that runs one sequence busy, and another request in the queue, which has room for one."""
    long = SamplingParams(max_tokens=200)
    with client.stream("Hi", sampling=long, **options) as running:
        next(running)  # the other one would be refused while this one waits
        with client.stream("Hi", sampling=long, **options):
            wait_until(lambda: stack.router.dispatcher.num_waiting == 1, 20, "the other one waits")
            yield


def test_the_default_tier_can_be_chosen(tiny_family):
    with tiered(tiny_family, default_tier="fast") as (_, client):
        assert client.generate("Hi", sampling=FIVE).tier == "fast"


def test_a_request_may_decline_what_its_key_allows(tiny_family, tmp_path):
    file = tmp_path / "keys.json"
    key = keys.create(file, "browned", allow_brownout=True)
    settings = {"decode_settings": {"full": ONE_AT_A_TIME}, "brownout": "full > fast", "max_queue": 1}
    with (
        tiered(tiny_family, key, api_keys=file, **settings) as (stack, client),
        full_queue(stack, client, tier="full"),
    ):
        assert client.generate("Hi", sampling=FIVE, tier="full").brownout_from == "full"
        with pytest.raises(Overloaded):
            client.generate("Hi", sampling=FIVE, tier="full", allow_brownout=False)


def test_an_answer_goes_on_in_another_tier_if_it_may(tiny_family):
    long = {"sampling": SamplingParams(max_tokens=40, temperature=0), "tier": "full"}
    with (
        tiered(tiny_family, decode_settings={"full": {"step": 0.05}}, absent_after=1) as (stack, client),
        client.stream("Hi", **long, fallback="fast") as leaves,
        client.stream("Hi", **long) as stays,
    ):
        next(leaves)
        next(stays)
        stack.call(stack.workers["decode-full-0"].stop())
        for _ in leaves:
            pass
        with pytest.raises(OverfillError, match="no decode worker of the tier 'full'"):
            list(stays)
        answer = leaves.answer
        assert answer.usage.completion_tokens == 40
        (first, second) = answer.parts
        assert (first.tier, first.first_index) == ("full", 0)
        assert second.tier == answer.tier == "fast"
        assert 0 < second.first_index < 40
        assert answer.migrations == 1


def test_a_request_for_a_tier_without_workers_is_admitted_where_it_falls_back(tiny_family):
    with tiered(tiny_family, decode_settings={"fast": ONE_AT_A_TIME}, max_queue=1) as (stack, client):
        stack.call(stack.workers["decode-full-0"].stop())
        wait_until(lambda: stack.router.roster.find("decode-full-0") is None, 20, "the router forgets the worker")
        with full_queue(stack, client, tier="full", fallback="fast"):
            with pytest.raises(Overloaded):
                client.generate("Hi", sampling=FIVE, tier="full", fallback="fast")
            assert client.generate("Hi", sampling=FIVE, tier="full", fallback="default").tier == "default"


def test_overload_costs_quality_where_the_request_allows_it(tiny_family):
    small = {"max_model_len": 1000}
    settings = {"decode_settings": {"full": ONE_AT_A_TIME, "default": small, "fast": small}}
    settings |= {"brownout": "full > default > fast", "max_queue": 1, "ttft_objective": 0.2}
    with tiered(tiny_family, **settings) as (stack, client):
        with full_queue(stack, client, tier="full"):
            with pytest.raises(Overloaded):
                client.generate("Hi", sampling=FIVE, tier="full")
            answer = client.generate("Hi", sampling=FIVE, tier="full", allow_brownout=True)
            assert (answer.tier, answer.brownout_from) == ("default", "full")
            with pytest.raises(Overloaded):  # the other tiers are too small for it
                whole = SamplingParams(max_tokens=1500, temperature=0)
                client.generate("Hi", sampling=whole, tier="full", allow_brownout=True)
        answer = client.generate("Hi", sampling=FIVE, tier="fast", allow_brownout=True)
        assert (answer.tier, answer.brownout_from) == ("fast", None)


def test_tiers_with_another_full_model_are_refused(tiny_family, tmp_path):
    other = make_tiny_pair(tmp_path / "other", seed=1)
    with pytest.raises(InvalidPair, match="have different full models"), tiered(tiny_family | {"odd": other}):
        pass
