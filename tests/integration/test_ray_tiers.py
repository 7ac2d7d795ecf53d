"""Tests a stack of two tiers of mock workers on a Ray that ``overfill up`` starts."""

from __future__ import annotations

import os
import signal

import pytest
from ray_stacks import up_on_ray
from stacks import wait_until

from overfill.client import Client, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=5)


@pytest.mark.timeout(300)
def test_each_tier_is_a_deployment_whose_lost_worker_is_replaced(tiny_pair):
    tiers = (f"--tier=full={tiny_pair}", f"--tier=fast={tiny_pair}:2,quantize=int8", "--default-tier=fast")
    with up_on_ray("--engine=mock", "--grace-period=1", *tiers) as up, Client(up.address) as client:

        def workers(tier):
            return {w.id: w.process.pid for w in client.status().workers if w.tier == tier and w.process is not None}

        assert {tier: len(workers(tier)) for tier in ("full", "fast")} == {"full": 1, "fast": 2}
        for tier, expected in (("full", "full"), ("", "fast")):
            answer = client.generate("Hello", sampling=GREEDY, tier=tier)
            assert (answer.tier, answer.decode_worker in workers(expected)) == (expected, True)
        ((lost, pid),) = workers("full").items()
        others = workers("fast")
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: workers("full").keys() - {lost}, 120, "the tier has a worker again")
        assert client.generate("Hello", sampling=GREEDY, tier="full").tier == "full"
        assert workers("fast") == others
