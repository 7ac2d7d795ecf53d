"""Tiers with real workers: each answers as its own reference, on one prefill."""

from __future__ import annotations

from stacks import running_stack
from tiers import check_tiers
from vllm_stacks import prompts


def test_every_tier_answers_as_its_own_reference(tiny_tiers):
    with running_stack(None, tiers=tiny_tiers) as (_, address):
        check_tiers(address, tiny_tiers, prompts(12))
