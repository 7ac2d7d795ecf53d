"""Tests tiers through the router's interfaces: choosing one, keys, fallback, brownout. The workers compute nothing."""

from __future__ import annotations

import threading
import time

import pytest
from mocks import mock_stack

from overfill.api import key_file as keys
from overfill.client import Client, SamplingParams
from overfill.errors import InvalidPair, InvalidRequest, ModelNotFound, Overloaded, PermissionDenied
from overfill.making.tiny import make_tiny_pair

FIVE = SamplingParams(max_tokens=5, temperature=0)


def parts(answer):
    return [(part.tier, part.first_index) for part in answer.parts]


def test_requests_choose_their_tier(tiny_family):
    with (
        mock_stack(tiny_family["default"], tiers=tiny_family, served_model_name="tiny") as stack,
        Client(stack.grpc) as client,
    ):
        assert client.generate("Hi", sampling=FIVE).tier == "default"
        for tier in tiny_family:
            answer = client.generate("Hi", sampling=FIVE, tier=tier)
            assert (answer.tier, answer.decode_worker, parts(answer)) == (tier, f"decode-{tier}-0", [(tier, 0)])
            assert client.generate("Hi", sampling=FIVE, model=f"tiny:{tier}").tier == tier
        names = {model.name: model.decoder_digest for model in client.models()}
        assert list(names) == ["tiny", "tiny:default", "tiny:full", "tiny:fast"]
        assert len(set(names.values())) == 3
        assert names["tiny"] == names["tiny:default"]
        with pytest.raises(ModelNotFound, match="'best' does not exist; this router has 'default', 'full', 'fast'"):
            client.generate("Hi", sampling=FIVE, tier="best")
        with pytest.raises(ModelNotFound, match="'tiny:full'"):
            client.generate("Hi", sampling=FIVE, model="tiny:best")
        with pytest.raises(InvalidRequest, match="tier: is 'full', but the model names the tier 'fast'"):
            client.generate("Hi", sampling=FIVE, model="tiny:fast", tier="full")
        with pytest.raises(InvalidRequest, match="fallback: there is no tier 'best'"):
            client.generate("Hi", sampling=FIVE, fallback="best")
        status = client.status()
        assert {tier: (pool.ready, pool.expected) for tier, pool in status.tiers.items()} == dict.fromkeys(
            tiny_family, (1, 1)
        )
        assert {worker.id: worker.tier for worker in status.workers if worker.tier} == {
            f"decode-{tier}-0": tier for tier in tiny_family
        }


def test_the_default_tier_can_be_chosen(tiny_family):
    with (
        mock_stack(tiny_family["default"], tiers=tiny_family, default_tier="fast") as stack,
        Client(stack.grpc) as client,
    ):
        assert client.generate("Hi", sampling=FIVE).tier == "fast"


def test_keys_may_be_limited_to_tiers(tiny_family, tmp_path):
    file = tmp_path / "keys.json"
    cheap = keys.create(file, "cheap", tiers=["fast", "default"])
    every = keys.create(file, "every")
    with mock_stack(tiny_family["default"], tiers=tiny_family, api_keys=file) as stack:
        with Client(stack.grpc, api_key=every) as client:
            assert client.generate("Hi", sampling=FIVE, tier="full").tier == "full"
        with Client(stack.grpc, api_key=cheap) as client:
            assert [model.tier for model in client.models()] == ["default", "default", "fast"]
            assert client.generate("Hi", sampling=FIVE, tier="fast").tier == "fast"
            with pytest.raises(PermissionDenied, match="may not use the tier 'full'; it may use 'default', 'fast'"):
                client.generate("Hi", sampling=FIVE, tier="full")
            with pytest.raises(PermissionDenied, match="named as fallback"):
                client.generate("Hi", sampling=FIVE, tier="fast", fallback="full")


def test_a_request_may_decline_what_its_key_allows(tiny_family, tmp_path):
    file = tmp_path / "keys.json"
    key = keys.create(file, "browned", allow_brownout=True)
    limits, settings = {"full": {"max_num_seqs": 1, "step": 0.05}}, {"brownout": "full > fast", "max_queue": 1}
    with (
        mock_stack(
            tiny_family["default"], tiers=tiny_family, decode_settings=limits, api_keys=file, **settings
        ) as stack,
        Client(stack.grpc, api_key=key) as client,
    ):
        busy = [client.stream("Hi", sampling=SamplingParams(max_tokens=200), tier="full") for _ in range(2)]
        for stream in busy:
            stream.__enter__()
        time.sleep(0.3)
        assert client.generate("Hi", sampling=FIVE, tier="full").brownout_from == "full"
        with pytest.raises(Overloaded):
            client.generate("Hi", sampling=FIVE, tier="full", allow_brownout=False)
        for stream in busy:
            stream.__exit__(None, None, None)


def test_an_answer_goes_on_in_another_tier_if_it_may(tiny_family):
    slow = {"full": {"step": 0.05}}
    with (
        mock_stack(tiny_family["default"], tiers=tiny_family, decode_settings=slow, absent_after=1) as stack,
        Client(stack.grpc) as client,
    ):
        ends = {}

        def ask(name, **options):
            sampling = SamplingParams(max_tokens=40, temperature=0)
            try:
                with client.stream("Hi", sampling=sampling, tier="full", **options) as stream:
                    for _ in stream:
                        pass
                    ends[name] = stream.answer
            except Exception as error:
                ends[name] = error

        threads = [threading.Thread(target=ask, args=("leaves",), kwargs={"fallback": "fast"})]
        threads += [threading.Thread(target=ask, args=("stays",))]
        for thread in threads:
            thread.start()
        time.sleep(0.6)
        stack.call(stack.workers["decode-full-0"].stop())
        for thread in threads:
            thread.join(20)
        leaves, stays = ends["leaves"], ends["stays"]
        assert "no decode worker of the tier 'full'" in str(stays)
        assert leaves.usage.completion_tokens == 40
        (first, second) = parts(leaves)
        assert first == ("full", 0)
        assert second[0] == leaves.tier == "fast"
        assert 0 < second[1] < 40
        assert leaves.migrations == 1


def test_a_request_for_a_tier_without_workers_is_admitted_where_it_falls_back(tiny_family):
    limits = {"fast": {"max_num_seqs": 1, "step": 0.05}}
    with (
        mock_stack(tiny_family["default"], tiers=tiny_family, decode_settings=limits, max_queue=1) as stack,
        Client(stack.grpc) as client,
    ):
        stack.call(stack.workers["decode-full-0"].stop())
        time.sleep(0.3)
        long = SamplingParams(max_tokens=200)
        busy = [client.stream("Hi", sampling=long, tier="full", fallback="fast") for _ in range(2)]
        for stream in busy:
            stream.__enter__()
        time.sleep(0.3)
        with pytest.raises(Overloaded):
            client.generate("Hi", sampling=FIVE, tier="full", fallback="fast")
        assert client.generate("Hi", sampling=FIVE, tier="full", fallback="default").tier == "default"
        for stream in busy:
            stream.__exit__(None, None, None)


def test_overload_costs_quality_where_the_request_allows_it(tiny_family):
    small = {"max_model_len": 1000}
    limits = {"full": {"max_num_seqs": 1, "step": 0.05}, "default": small, "fast": small}
    settings = {"brownout": "full > default > fast", "max_queue": 1, "ttft_objective": 0.2}
    with (
        mock_stack(tiny_family["default"], tiers=tiny_family, decode_settings=limits, **settings) as stack,
        Client(stack.grpc) as client,
    ):
        busy = [client.stream("Hi", sampling=SamplingParams(max_tokens=200), tier="full") for _ in range(2)]
        for stream in busy:
            stream.__enter__()
        time.sleep(0.3)
        with pytest.raises(Overloaded):
            client.generate("Hi", sampling=FIVE, tier="full")
        answer = client.generate("Hi", sampling=FIVE, tier="full", allow_brownout=True)
        assert (answer.tier, answer.brownout_from) == ("default", "full")
        whole = SamplingParams(max_tokens=1500, temperature=0)
        with pytest.raises(Overloaded):
            client.generate("Hi", sampling=whole, tier="full", allow_brownout=True)  # the others are too small for it
        for stream in busy:
            stream.__exit__(None, None, None)
        answer = client.generate("Hi", sampling=FIVE, tier="fast", allow_brownout=True)
        assert (answer.tier, answer.brownout_from) == ("fast", None)


def test_tiers_with_another_full_model_are_refused(tiny_family, tmp_path):
    other = make_tiny_pair(tmp_path / "other", seed=1)
    with (
        pytest.raises(InvalidPair, match="have different full models"),
        mock_stack(tiny_family["default"], tiers=tiny_family | {"odd": other}),
    ):
        pass
