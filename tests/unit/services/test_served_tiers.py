"""Tests the names under which a router serves its tiers, and what it tells an API key that may not use all of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from overfill.api.keys import ApiKey
from overfill.errors import InvalidRequest, ModelNotFound
from overfill.v1 import inference_pb2
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


def test_refusals_name_only_what_the_key_may_use(served: ServedTiers) -> None:
    asked = inference_pb2.GenerateRequest
    for request, error in (
        (asked(model="other"), ModelNotFound),
        (asked(model="tiny:fast", tier="x"), ModelNotFound),
        (asked(model="tiny:fast", fallback="x"), InvalidRequest),
    ):
        with pytest.raises(error, match=r"fast'$") as caught:
            served.requested(request, FAST_ONLY)
        assert "default" not in str(caught.value)
