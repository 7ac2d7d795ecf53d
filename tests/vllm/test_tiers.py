"""Tiers on vLLM, and on both engines: each tier answers as its own reference, on one prefill."""

from pathlib import Path

import pytest
from stacks import running_stack
from tiers import check_tiers
from vllm_stacks import EAGER, engines, prompts

from overfill.making.tiny import make_tiny_pair
from overfill.settings.tiers import TierSpec


@pytest.fixture(scope="module")
def family(vllm_pair: Path, tmp_path_factory) -> dict[str, Path]:
    """Pairs of ``vllm_pair``'s full model: itself, and another one whose decoder is the full model."""
    folder = tmp_path_factory.mktemp("pairs") / "full"
    return {"full": make_tiny_pair(folder, identity=True, head_dim=32), "fast": vllm_pair}


def specs(family, **settings):
    return tuple(TierSpec(name=name, pair=str(pair), settings=settings.get(name, {})) for name, pair in family.items())


def test_every_tier_on_vllm_answers_as_its_own_reference(family):
    tiers = specs(family)
    with running_stack(family["fast"], tiers=tiers, **engines("vllm", "vllm")) as (_, address):
        check_tiers(address, tiers, prompts(12))


def test_the_full_model_on_vllm_and_a_decoder_on_the_other_engine_answer_as_their_references(family):
    tiers = specs(family, full={"engine": "vllm", "engine_args": EAGER})
    with running_stack(family["fast"], tiers=tiers, **engines("vllm", "overfill")) as (_, address):
        check_tiers(address, tiers, prompts(12))
