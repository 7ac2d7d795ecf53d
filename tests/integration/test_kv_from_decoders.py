"""KV of answers that prefill workers take from a decode worker whose decoder is the full model. No router runs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import grpc
import pytest
import torch
from decode_calls import DecodeCall
from kv_pulls import opened, worker_process
from peer_workers import PrefillClient, holder_of, prompt_of, until_free

from overfill.request.params import SamplingParams
from overfill.rpc.channel import open_channel
from overfill.rpc.status import from_rpc_error
from overfill.v1 import common_pb2, decode_pb2, decode_pb2_grpc, prefill_pb2

ANSWER = 60


async def answer(hello, prompt, target, holder=None, codec=common_pb2.KV_CODEC_RAW):
    """Has the decode worker answer ``prompt``, which ``target`` prefills. Returns the tokens and ``DecodeDone``."""
    channel = open_channel(hello.address)
    assigned = decode_pb2.AssignPrefill(
        worker_id=target.worker_id, incarnation=target.incarnation, address=target.address, holder=holder
    )
    sampling = SamplingParams(temperature=0, seed=1, max_tokens=ANSWER, ignore_eos=True).to_proto()
    start = decode_pb2.StartDecode(
        request_id="r",
        expected_incarnation=hello.incarnation,
        prompt_token_ids=prompt,
        sampling=sampling,
        codec=codec,
        trace=True,
        assign_prefill=assigned,
    )
    call, ids = DecodeCall(decode_pb2_grpc.DecodeStub(channel)), []
    await call.send(start=start)
    while not (update := await call.read()).HasField("done"):
        assert not update.HasField("failed"), update
        ids += update.tokens.ids
    call.cancel()
    await channel.close(None)
    return ids, update.done


@pytest.fixture(scope="module")
def hellos(tiny_family):
    """Two prefill workers and workers with a decoder: the full model's, a pruned one, and one with both stages."""
    flags = ("--kv-memory=4MiB",)
    same, pruned = (f"--pair={tiny_family[name]}" for name in ("full", "fast"))
    with (
        worker_process("prefill", same, *flags) as holder,
        worker_process("prefill", same, *flags) as borrower,
        worker_process("decode", same, *flags) as decoder,
        worker_process("decode", pruned, *flags) as other_decoder,
        worker_process("colocated", same, *flags) as both,
    ):
        yield SimpleNamespace(holder=holder, borrower=borrower, decoder=decoder, pruned=other_decoder, both=both)


@pytest.fixture
async def workers(hellos, tiny_family):
    with ThreadPoolExecutor(2) as executor:
        borrower, holder = (PrefillClient(h, tiny_family["full"], executor) for h in (hellos.borrower, hellos.holder))
        yield SimpleNamespace(**vars(hellos) | {"borrower": borrower, "holder": holder})
        for hello in vars(hellos).values():
            await until_free(hello)
        for client in (borrower, holder):
            await client.peer.close()


async def test_the_next_turn_computes_nothing_of_an_answer_whose_decoder_is_the_full_model(workers):
    assert workers.decoder.lends_kv
    prompt = prompt_of(1)
    ids, _ = await answer(workers.decoder, prompt, workers.holder.hello)
    turn = [*prompt, *ids, *prompt_of(2, 20)]
    borrowed = await workers.borrower.prefill(turn, holder_of(workers.decoder, len(prompt) + ANSWER))
    # The last token of the answer was sampled, and its KV never computed.
    assert borrowed.peer == (len(prompt) + ANSWER - 1) // 16 * 16
    computed = await workers.holder.prefill(turn)
    assert computed.cached == len(prompt) // 16 * 16
    torch.testing.assert_close(borrowed.kv, computed.kv, atol=1e-4, rtol=1e-4)
    assert borrowed.token == computed.token


async def test_a_decode_worker_tells_its_prefill_worker_of_the_holder_and_its_router_of_the_loan(workers):
    prompt = prompt_of(3)
    await workers.holder.prefill(prompt)
    named = holder_of(workers.holder.hello)
    _, done = await answer(workers.pruned, prompt, workers.borrower.hello, named)
    assert (done.usage.cached_tokens, done.usage.peer_tokens, done.usage.disk_tokens) == (144, 144, 0)
    assert done.trace.peer_tokens == 144


async def test_a_worker_with_both_stages_borrows_too(workers):
    prompt = prompt_of(4)
    await workers.holder.prefill(prompt)
    ids, done = await answer(workers.both, prompt, workers.both, holder_of(workers.holder.hello))
    assert (done.usage.cached_tokens, done.usage.peer_tokens) == (144, 144)
    elsewhere, _ = await answer(workers.decoder, prompt, workers.holder.hello)
    assert ids == elsewhere
    lent = await workers.borrower.prefill(prompt, holder_of(workers.both))
    assert lent.peer == 144, "it lends the prompts that it has computed"


async def test_kv_that_came_in_a_lossy_codec_is_not_lent(workers):
    prompt = prompt_of(5)
    await answer(workers.decoder, prompt, workers.holder.hello, codec=common_pb2.KV_CODEC_INT8)
    assert (await workers.borrower.prefill(prompt, holder_of(workers.decoder))).peer == 0


@pytest.mark.parametrize("rpc", ["Lend", "Describe", "PullKv"])
async def test_a_pruned_decoder_lends_nothing(workers, rpc):
    assert not workers.pruned.lends_kv
    peer = opened(workers.pruned)
    with pytest.raises(grpc.RpcError) as caught:
        if rpc == "Describe":
            await peer.control.Describe(prefill_pb2.DescribePrefillRequest())
        elif rpc == "Lend":
            await peer.control.Lend(iter([prefill_pb2.LendRequest()])).read()
        else:
            await peer.control.PullKv(prefill_pb2.PullKvRequest()).read()
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    await peer.close()


async def test_a_decode_worker_that_lends_computes_no_prompts(workers):
    peer = opened(workers.decoder)
    with pytest.raises(grpc.RpcError) as caught:
        await peer.control.PrefillAtOnce(prefill_pb2.StartPrefill())
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED, from_rpc_error(caught.value, "it")
    await peer.close()
