"""Asks every tier of a stack and judges each answer by the tier's own decoder."""

from __future__ import annotations

from pathlib import Path

from stacks import idle, wait_until
from vllm_stacks import GREEDY, wrong_answers

from overfill.client import Client, SamplingParams
from overfill.pair.reference import TwoStageReference
from overfill.settings.tiers import TierSpec


def check_tiers(address: str, tiers: tuple[TierSpec, ...], prompts: list[list[int]]) -> None:
    """Asserts that every tier answers as its own reference, and that all share one prefill of a prompt."""
    with Client(address) as client:
        for tier in tiers:
            reference = TwoStageReference(Path(tier.pair))
            assert wrong_answers(client, reference, prompts, tier=tier.name) == [], tier.name
        shared = prompts[-1][::-1]
        sampling = SamplingParams(**GREEDY, max_tokens=12)
        answers = {tier.name: client.generate(shared, sampling=sampling, tier=tier.name) for tier in tiers}
        cached = [answer.usage.cached_tokens for answer in answers.values()]
        assert cached[0] == 0
        assert all(count > 0 for count in cached[1:]), "the other tiers find the first one's prefill"
        texts = {answer.token_ids for answer in answers.values()}
        assert len(texts) == len(tiers), "the decoders write different answers, or the check would prove nothing"
        for name, answer in answers.items():
            assert answer.tier == name
            assert answer.decode_worker.startswith(f"decode-{name}-")
    wait_until(lambda: idle(address), 5, "all blocks free")
