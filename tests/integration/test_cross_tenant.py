"""Tests that a tenant cannot learn another's prompts from the time that its own take, because keys separate the cache.

The test compares the counters of cached blocks, which determine the time. It prints times, but does not judge them,
because they prove nothing on a busy machine.
"""

from __future__ import annotations

import random
import statistics

import pytest
from stacks import loads, running_stack, wait_accepted, wait_until

from overfill.api import key_file as keys
from overfill.client import Client, SamplingParams

BLOCK = 16
SAMPLING = SamplingParams(temperature=0, max_tokens=1)


def probe(client, address, guess, secret):
    """Sends one guess; returns (tokens cached at prefill workers, cached tokens reported, seconds of prefill)."""

    def load():
        return loads(address, api_key=secret)["prefill-0"]

    before = load()
    answer = client.generate(guess, sampling=SAMPLING)
    looked_up = before.prefix_tokens_looked_up
    wait_until(lambda: load().prefix_tokens_looked_up > looked_up, 10, "the worker has reported its cache")
    found = load().prefix_tokens_found - before.prefix_tokens_found
    return found, answer.usage.cached_tokens, answer.timing.prefill_compute


@pytest.mark.parametrize("with_keys", [True, False], ids=["keys", "no-keys"])
def test_a_guess_that_is_right_looks_like_one_that_is_wrong(tiny_pair, tmp_path, with_keys):
    rng = random.Random(5)
    file = tmp_path / "keys.json"
    settings, victim_key, attacker_key, heir = {}, None, None, None
    if with_keys:
        victim_key, attacker_key = keys.create(file, "victim"), keys.create(file, "attacker")
        settings["api_keys"] = file
    right, wrong = [], []
    with running_stack(tiny_pair, prefix_cache="on", **settings) as (stack, address):
        secret = stack.placed.secret
        with Client(address, api_key=victim_key) as victim, Client(address, api_key=attacker_key) as attacker:
            for _ in range(10):
                prompt = [rng.randrange(20, 490) for _ in range(6 * BLOCK)]
                probe(victim, address, prompt, secret)
                assert with_keys or probe(victim, address, prompt, secret)[0] > 0
                other = [rng.randrange(20, 490) for _ in range(6 * BLOCK)]
                # Each guess is sent once, because the second would find the blocks of the first.
                right.append(probe(attacker, address, [*prompt[: 5 * BLOCK], *other[5 * BLOCK :]], secret))
                wrong.append(probe(attacker, address, other, secret))
            if with_keys:
                assert probe(victim, address, prompt, secret)[0] == 5 * BLOCK, "the victim finds its own blocks"
                # A later key with the victim's name is another tenant.
                keys.revoke(file, "victim")
                heir = keys.create(file, "victim")
        if with_keys:
            wait_accepted(address, heir)
            with Client(address, api_key=heir) as client:
                assert probe(client, address, prompt, secret)[:2] == (0, 0)
    found = {"right": {probe[:2] for probe in right}, "wrong": {probe[:2] for probe in wrong}}
    times = {name: statistics.median(p[2] for p in probes) for name, probes in (("right", right), ("wrong", wrong))}
    print(f"tokens found: {found}; median prefill of a right guess {times['right'] * 1e3:.2f} ms, "
          f"of a wrong one {times['wrong'] * 1e3:.2f} ms")  # fmt: skip
    if with_keys:
        assert found == {"right": {(0, 0)}, "wrong": {(0, 0)}}
    else:
        assert found == {"right": {(5 * BLOCK, 5 * BLOCK)}, "wrong": {(0, 0)}}
