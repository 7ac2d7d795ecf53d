"""KV that workers on vLLM, with one rank and with two, and on OverFill's engine take from each other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from kv_pulls import prefill_process
from peer_workers import PrefillClient, holder_of, prompt_of
from stacks import running_stack
from vllm_stacks import EAGER, GREEDY, engines

from overfill.client import Client, SamplingParams
from overfill.kv.peers import PrefillPeer
from overfill.making.tiny import make_tiny_pair
from overfill.pair.reference import TwoStageReference, judge
from overfill.v1 import common_pb2, decode_pb2

pytestmark = pytest.mark.timeout(400)  # five processes load vLLM

VLLM = ("--kv-memory=4MiB", "--engine=vllm", "--block-size=32", f"--engine-args={EAGER}")


@pytest.fixture(scope="module")
def hellos(vllm_pair):
    pair = f"--pair={vllm_pair}"
    with (
        prefill_process(pair, "--kv-memory=4MiB") as own,
        prefill_process(pair, *VLLM) as vllm,
        prefill_process(pair, *VLLM, "--tensor-parallel-size=2") as ranks,
    ):
        yield {"own": own, "vllm": vllm, "ranks": ranks}


@pytest.fixture
async def workers(hellos, vllm_pair):
    with ThreadPoolExecutor(2) as executor:
        workers = {name: PrefillClient(hello, vllm_pair, executor) for name, hello in hellos.items()}
        await workers["ranks"].peer.close()
        workers["ranks"].peer = peer = _peer_with_ranks(hellos["ranks"])
        peer.codecs = frozenset({common_pb2.KV_CODEC_RAW})
        yield SimpleNamespace(**workers)
        for worker in workers.values():
            await worker.until_free()
            await worker.peer.close()


def _peer_with_ranks(hello):
    target = decode_pb2.AssignPrefill(worker_id=hello.worker_id, incarnation=hello.incarnation, address=hello.address)
    target.data_addresses.extend(hello.data_addresses)
    return PrefillPeer(target, 2, None, False)


PAIRS = [("own", "vllm"), ("vllm", "own"), ("own", "ranks"), ("ranks", "own"), ("vllm", "ranks"), ("ranks", "vllm")]


@pytest.mark.parametrize(("lender", "borrower"), PAIRS)
async def test_borrowed_kv_is_the_holders_and_the_next_token_is_the_same(workers, lender, borrower):
    prompt = prompt_of(1 + PAIRS.index((lender, borrower)))
    lender, borrower = getattr(workers, lender), getattr(workers, borrower)
    computed = await lender.prefill(prompt)
    named = holder_of(lender.hello, data_addresses=lender.hello.data_addresses)
    borrowed = await borrower.prefill(prompt, named)
    assert borrowed.peer >= 128
    assert torch.equal(borrowed.kv[:, :, : borrowed.peer], computed.kv[:, :, : borrowed.peer])
    torch.testing.assert_close(borrowed.kv, computed.kv, atol=1e-4, rtol=1e-4)
    assert borrowed.token == computed.token


@pytest.fixture(scope="module")
def one_model(tmp_path_factory):
    """A pair whose decoder is the full model."""
    return make_tiny_pair(tmp_path_factory.mktemp("pairs") / "full", identity=True, head_dim=32)


def check_chats(address, pair):
    """Leads chats in turn, and checks their answers. Workers borrow at least once.

    While the others are answered, the router learns which worker has a chat's last answer.
    """
    reference, borrowed = TwoStageReference(pair), 0
    chats = [prompt_of(30 + number, 20) for number in range(4)]
    with Client(address) as client:
        for turn in range(5):
            for number, prompt in enumerate(chats):
                answer = client.generate(prompt, sampling=SamplingParams(**GREEDY, max_tokens=50))
                assert judge(reference, prompt, answer.token_ids, answer.finish_reason, 50).correct
                borrowed += answer.usage.peer_tokens
                prompt += [*answer.token_ids, *prompt_of(40 + 10 * turn + number, 20)]
    assert borrowed


def test_a_chat_on_vllm_goes_on_with_returned_answers(one_model):
    with running_stack(one_model, prefill=2, **engines("vllm", "vllm")) as (_, address):
        check_chats(address, one_model)


def test_a_chat_on_mixed_engines_goes_on_with_returned_answers(one_model):
    with running_stack(one_model, prefill=2, **engines("overfill", "vllm")) as (_, address):
        check_chats(address, one_model)
