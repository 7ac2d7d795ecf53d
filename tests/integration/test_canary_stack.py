"""Tests that a document with a canary starts the workers of both revisions, and routers that divide conversations."""

from __future__ import annotations

import pytest
from stacks import BASE, mocked, running_spec

from overfill.client import Client, SamplingParams
from overfill.making.tiny import make_tiny_pair
from overfill.model.manifest import Pair
from overfill.stack.spec import StackSpec


@pytest.fixture(scope="module")
def new_pair(tmp_path_factory):
    """A pair with other weights in both halves."""
    return make_tiny_pair(tmp_path_factory.mktemp("pairs") / "new", seed=1)


def test_each_conversation_has_a_revision_whose_workers_answer_it(tiny_pair, new_pair):
    document = {
        "runner": "processes",
        "pair": str(tiny_pair),
        "canary": {"revision": "r2", "percent": 50, "pair": str(new_pair), "decode": {"replicas": 2}},
        "settings": BASE | mocked() | {"threads": 1},
    }
    greedy = SamplingParams(temperature=0, max_tokens=3)
    with running_spec(StackSpec.read(document)) as (_, address), Client(address) as client:
        status = client.status()
        revisions = {worker.id: worker.revision for worker in status.workers}
        assert revisions == {
            "prefill-0": "", "decode-0": "", "prefill-r2-0": "r2", "decode-r2-0": "r2", "decode-r2-1": "r2"
        }  # fmt: skip
        decoders = {w.revision: w.process.model.decoder_digest for w in status.workers if w.stage == "decode"}
        assert decoders == {"": Pair.load(tiny_pair).decoder_digest, "r2": Pair.load(new_pair).decoder_digest}
        first, again = ([client.generate(f"Story {n}", sampling=greedy) for n in range(24)] for _ in range(2))
        for answer in first + again:
            assert answer.identity.decoder_digest == decoders[answer.identity.revision]
            workers = {revisions[answer.prefill_worker], revisions[answer.decode_worker]}
            assert workers == {answer.identity.revision}
        assert [a.identity.revision for a in first] == [a.identity.revision for a in again], "places do not change"
        assert {answer.identity.revision for answer in first} == {"", "r2"}
