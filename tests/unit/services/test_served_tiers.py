"""Tests the names under which a router serves its tiers, and what it tells an API key that may not use all of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from jobs import worker_info

from overfill.api.keys import ApiKey
from overfill.errors import InvalidRequest, ModelNotFound, PermissionDenied, Unavailable
from overfill.routing.worker import DECODE
from overfill.v1 import common_pb2, inference_pb2
from services.router.served_tiers import ServedTiers

FAST_ONLY = ApiKey("cheap", "0" * 64, "2026-01-01", tiers=frozenset({"fast"}))


@pytest.fixture
def served(serve_tiers: Callable[..., ServedTiers]) -> ServedTiers:
    return serve_tiers("default", "fast")


def test_a_key_sees_the_models_of_its_tiers(served: ServedTiers) -> None:
    assert served.listed(None) == ("tiny", "tiny:default", "tiny:fast")
    assert served.listed(FAST_ONLY) == ("tiny:fast",)
    assert served.describe("tiny", None).tier == "default"
    assert served.describe("tiny:fast", FAST_ONLY).tier == "fast"


@pytest.mark.parametrize("name", ["tiny", "tiny:default", "tiny:other", "other"])
def test_for_a_key_a_model_of_another_tier_does_not_exist(served: ServedTiers, name: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        served.describe(name, FAST_ONLY)
    assert str(caught.value) == f"model {name!r} does not exist; this router serves 'tiny:fast'"


def test_a_router_says_that_there_is_no_such_adapter_once_it_knows_all_workers(
    serve_tiers: Callable[..., ServedTiers],
) -> None:
    served = serve_tiers("default", "fast", "empty", complete={"fast": 2, "empty": 0})
    asked, workers = inference_pb2.GenerateRequest, {"d0": "fast", "d1": "default", "d2": "fast"}
    for name, tier in workers.items():
        for request in (asked(tier="judge"), asked(model="tiny:judge")):
            with pytest.raises(Unavailable, match=r"not all decode workers have joined this router.*does not exist"):
                served.requested(request, None)
        with pytest.raises(ModelNotFound, match="other"):
            served.requested(asked(model="other:judge"), None)
        served.roster.join(worker_info(name, DECODE, tier=tier))
    fast, default = served.roster.decode["fast"], served.roster.decode["default"]
    fast.remove(next(iter(fast)))
    with pytest.raises(ModelNotFound, match="'judge' does not exist"):
        served.requested(asked(tier="judge"), None)
    default.remove(next(iter(default)))
    with pytest.raises(Unavailable, match="not all decode workers have joined"):
        served.requested(asked(tier="judge"), None)


def test_refusals_name_only_what_the_key_may_use(served: ServedTiers) -> None:
    for tier in served.roster.decode:
        served.roster.join(worker_info(tier, DECODE, tier=tier))
    asked = inference_pb2.GenerateRequest
    for request, error in (
        (asked(model="other"), ModelNotFound),
        (asked(model="tiny:fast", tier="x"), ModelNotFound),
        (asked(model="tiny:fast", fallback="x"), InvalidRequest),
    ):
        with pytest.raises(error, match=r"fast'$") as caught:
            served.requested(request, FAST_ONLY)
        assert "default" not in str(caught.value)


DIGEST = "a" * 64


@pytest.fixture
def with_adapters(served: ServedTiers) -> ServedTiers:
    """The tiers, and adapters of a worker of the tier fast."""
    adapters = [common_pb2.Adapter(name=name, digest=DIGEST) for name in ("judge", "coder")]
    served.roster.join(worker_info("d0", DECODE, tier="fast", adapters=tuple(adapters)))
    served.roster.join(worker_info("d1", DECODE, tier="default"))
    return served


JUDGE_ONLY = ApiKey("judge", "0" * 64, "2026-01-01", tiers=frozenset({"judge"}), allow_brownout=True)


def test_adapters_are_models_of_their_own_to_keys_that_may_use_them(with_adapters: ServedTiers) -> None:
    assert with_adapters.listed(None)[-2:] == ("tiny:coder", "tiny:judge")
    assert with_adapters.listed(FAST_ONLY) == ("tiny:fast",), "a key for a tier is none for its adapters"
    assert with_adapters.listed(JUDGE_ONLY) == ("tiny:judge",)
    model = with_adapters.describe("tiny:judge", JUDGE_ONLY)
    assert (model.tier, model.adapter_digest, model.decoder_digest[0]) == ("fast", DIGEST, "f")


@pytest.mark.parametrize(
    "fields", [{"model": "tiny:judge"}, {"tier": "judge"}, {"model": "tiny:judge", "tier": "judge"}]
)
def test_a_request_may_name_an_adapter_as_model_or_tier(with_adapters: ServedTiers, fields: dict[str, str]) -> None:
    request = inference_pb2.GenerateRequest(**fields, allow_brownout=True)
    choice = with_adapters.requested(request, JUDGE_ONLY)
    assert (choice.tier, choice.writer, choice.fallback) == ("fast", "judge", "")
    assert choice.adapter is with_adapters.roster.adapters.get("judge")
    assert with_adapters.model_name(choice) == "tiny:judge"
    assert with_adapters.fingerprint(choice) == f"fp_{'f' * 12}-{DIGEST[:12]}"
    asked: list[str] = []
    assert with_adapters.admitted(choice, request, JUDGE_ONLY, asked.append, 0.0) is choice
    assert asked == ["fast"], "overload moves the request to no other tier"


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        (
            {"model": "tiny:nobody"},
            ModelNotFound,
            "serves 'tiny', 'tiny:default', 'tiny:fast', 'tiny:coder', 'tiny:judge'",
        ),
        ({"tier": "nobody"}, ModelNotFound, "this router has 'default', 'fast', 'coder', 'judge'"),
        ({"model": "tiny:fast", "tier": "judge"}, InvalidRequest, "tier: is 'judge', but the model names 'fast'"),
        (
            {"tier": "judge", "fallback": "default"},
            InvalidRequest,
            "fallback: is 'default', but only the adapter 'judge'",
        ),
        (
            {"tier": "nobody", "resume_identity": {"adapter_digest": DIGEST}},
            Unavailable,
            "no decode worker has the adapter",
        ),
    ],
)
def test_what_is_asked_of_adapters_and_cannot_be_is_refused(
    with_adapters: ServedTiers, fields: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=re.escape(says)):
        with_adapters.requested(inference_pb2.GenerateRequest(**fields), None)


def test_a_key_may_not_use_an_adapter_that_its_list_leaves_out(with_adapters: ServedTiers) -> None:
    with pytest.raises(PermissionDenied, match=r"may not use the adapter 'coder'; it may use 'judge'$"):
        with_adapters.requested(inference_pb2.GenerateRequest(tier="coder"), JUDGE_ONLY)


def test_only_a_part_of_a_prompt_can_be_scored_with_an_adapter(with_adapters: ServedTiers) -> None:
    request = inference_pb2.GenerateRequest(tier="judge", sampling={"prompt_logprobs": 0})
    choice = with_adapters.requested(request, None)
    with_adapters._pairs["fast"].identity = True  # type: ignore[misc]
    with_adapters._pairs["default"].identity = True  # type: ignore[misc]
    with pytest.raises(InvalidRequest, match="the adapter 'judge' writes the answer"):
        with_adapters.check_can_score(request, choice, None)
    request.answer_start = 3
    with_adapters.check_can_score(request, choice, None)


def test_messages_name_a_few_of_many_adapters(with_adapters: ServedTiers) -> None:
    worker = with_adapters.roster.decode["fast"].get("d0")
    assert worker is not None
    many = [common_pb2.Adapter(name=f"a{index:03}", digest=DIGEST) for index in range(500)]
    with_adapters.roster.adapters.set(worker, many)
    with pytest.raises(ModelNotFound, match=r"'a016', 'a017' and 482 more$"):
        with_adapters.requested(inference_pb2.GenerateRequest(tier="nobody"), None)
