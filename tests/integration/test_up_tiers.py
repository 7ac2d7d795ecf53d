"""Tests that `overfill up --tier` starts workers that routers accept, each with its tier's decoder."""

from __future__ import annotations

import pytest
from stacks import mocked, running_stack

from overfill.client import Client, SamplingParams
from overfill.making.pair_json import write_manifest
from overfill.model.manifest import Pair
from overfill.settings.tiers import TierSpec


@pytest.fixture(scope="module")
def identity(tiny_pair, tmp_path_factory):
    """The identity pair of the tiny pair's full model."""
    folder = tmp_path_factory.mktemp("pairs") / "identity"
    folder.mkdir()
    (folder / "full").symlink_to(tiny_pair / "full")
    write_manifest(folder, decoder="full")
    return folder


def test_every_worker_runs_its_tiers_decoder(tiny_pair, identity):
    texts = (f"full={identity}", f"fast={tiny_pair}:2,quantize=int8,kv-cache-dtype=int8")
    tiers = tuple(map(TierSpec.parse, texts))
    with (
        running_stack(None, **mocked(), tiers=tiers, default_tier="fast") as (_, address),
        Client(address) as client,
    ):
        status = client.status()
        decoders = {
            worker.id: (worker.tier, worker.process.tier, worker.process.model.decoder_digest)
            for worker in status.workers
            if worker.stage == "decode"
        }
        full, fast = Pair.load(identity).decoder_digest, Pair.load(tiny_pair).decoder_digest
        assert decoders == {
            "decode-full-0": ("full", "full", full),
            "decode-fast-0": ("fast", "fast", fast),
            "decode-fast-1": ("fast", "fast", fast),
        }
        formats = {w.tier: (w.process.model.decoder_quantize, w.process.model.kv_cache_dtype) for w in status.workers}
        assert (formats["full"], formats["fast"]) == (("", ""), ("int8", "int8"))
        assert {name: pool.expected for name, pool in status.tiers.items()} == {"full": 1, "fast": 2}
        greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        for tier, expected in (("full", "full"), ("", "fast")):
            answer = client.generate([5, 6, 7], sampling=greedy, tier=tier)
            assert (answer.tier, answer.decode_worker.startswith(f"decode-{expected}-")) == (expected, True)


def test_the_decoder_of_one_pair_may_be_loaded_in_another_format(tiny_pair):
    with running_stack(tiny_pair, quantize="int8", **mocked()) as (_, address), Client(address) as client:
        (worker,) = [one for one in client.status().workers if one.stage == "decode"]
        assert (worker.id, worker.process.model.decoder_quantize) == ("decode-0", "int8")
