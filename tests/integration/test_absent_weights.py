"""Tests decode workers on hosts that do not have the full model's weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import forked
import pytest
from stacks import running_stack

from overfill.client import Client, SamplingParams
from overfill.pair.reference import TwoStageReference

SETTINGS = ("--dtype=float32", "--kv-memory=4MiB", "--max-model-len=512")


@pytest.fixture(scope="module")
def bare(tiny_tiers, tmp_path_factory):
    """The pair of the tier ``fast``, without the full model's weights."""
    folder = tmp_path_factory.mktemp("hosts") / "bare"
    shutil.copytree(tiny_tiers[2].pair, folder)
    (folder / "full" / "model.safetensors").unlink()
    return folder


@pytest.fixture(scope="module")
def address(tiny_tiers, bare):
    """A stack of two tiers, whose prefill worker has the pair of the other tier."""
    tiers = [tiny_tiers[1], tiny_tiers[2].model_copy(update={"pair": str(bare)})]
    with running_stack(None, tiers=tiers) as (_, address):
        yield address


def test_a_decode_worker_answers_without_the_weights_of_the_full_model(address, tiny_tiers):
    reference = TwoStageReference(Path(tiny_tiers[2].pair))
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with Client(address) as client:
        for seed in range(3):
            prompt = [(7 * seed + i) % 200 + 20 for i in range(60)]
            answer = client.generate(prompt, sampling=greedy, tier=tiny_tiers[2].name)
            assert len(answer.token_ids) == 12
            assert all(verdict.kind == "identical" for verdict in reference.score(prompt, answer.token_ids))


def test_a_decode_worker_whose_manifest_lies_about_the_full_model_is_refused(address, bare, tmp_path):
    lying = tmp_path / "lying"
    shutil.copytree(bare, lying)
    manifest = json.loads((lying / "pair.json").read_text())
    manifest["full"]["digest"] = "0" * 64
    (lying / "pair.json").write_text(json.dumps(manifest))
    status, output = forked.run("services.decode.main", f"--pair={lying}", f"--routers={address}", *SETTINGS)
    assert status == 1
    assert "full_digest" in output
