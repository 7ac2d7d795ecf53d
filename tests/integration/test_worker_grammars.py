"""Tests that workers try a grammar before their engines compile it, whatever a router lets through."""

import json
import os
import signal

import psutil
import pytest
from decode_calls import DecodeCall
from stacks import children, running_stack

from overfill.client import Client, Grammar, SamplingParams
from overfill.errors import InvalidRequest
from overfill.rpc.calls import checked_response
from overfill.rpc.channel import open_channel
from overfill.v1 import common_pb2, decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc

PROMPT = [20, 21, 22]
GOOD = Grammar("regex", "[0-9]{3}")
BOMBS = (
    json.dumps({"type": "integer", "multipleOf": 4000037}),
    json.dumps({"$ref": "#/$defs/d0", "$defs": {
        **{f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(2000)}, "d2000": {}}}),
)  # fmt: skip


def sampling(bomb):
    return common_pb2.SamplingParams(temperature=0, max_tokens=8, seed=1, grammar=common_pb2.Grammar(json_schema=bomb))


async def decode(worker, bomb):
    """Sends a router's request to a decode worker and returns its error."""
    channel = open_channel(worker.address)
    try:
        call = DecodeCall(decode_pb2_grpc.DecodeStub(channel))
        await call.send(start=decode_pb2.StartDecode(
            request_id="r", prompt_token_ids=PROMPT, sampling=sampling(bomb),
            expected_incarnation=worker.process.incarnation,
        ))  # fmt: skip
        return await call.failure()
    finally:
        await channel.close(None)


async def prefill(worker, bomb):
    """Sends a decode worker's request to a prefill worker and reads to its error."""
    channel = open_channel(worker.address)
    try:
        call = prefill_pb2_grpc.PrefillStub(channel).Prefill()
        await call.write(prefill_pb2.PrefillRequest(start=prefill_pb2.StartPrefill(
            request_id="r", prompt_token_ids=PROMPT, sampling=sampling(bomb), sample_first_token=True,
            transfer_id=bytes(16), layers=[0], codec=common_pb2.KV_CODEC_RAW,
            expected_incarnation=worker.process.incarnation,
        )))  # fmt: skip
        await checked_response(call.read(), worker.address)
        raise AssertionError("the prefill worker accepted the grammar")
    except InvalidRequest as error:
        return error
    finally:
        await channel.close(None)


@pytest.mark.parametrize("colocated", [False, True], ids=["stages", "colocated"])
async def test_a_bomb_at_a_worker_fails_its_own_request(tiny_pair, colocated):
    counts = {"prefill": 0, "decode": 0, "colocated": 1} if colocated else {}
    with running_stack(tiny_pair, **counts) as (stack, address), Client(address) as client:
        plain = SamplingParams(max_tokens=4, ignore_eos=True)
        grammar = SamplingParams(max_tokens=8, seed=3, temperature=1.0, grammar=GOOD)
        before = client.generate(PROMPT, sampling=grammar)
        workers = client.status().workers
        for bomb in BOMBS:
            for worker in workers:
                calls = [prefill, decode] if colocated else [prefill if worker.id.startswith("prefill") else decode]
                for call in calls:
                    error = await call(worker, bomb)
                    assert isinstance(error, InvalidRequest)
                    assert error.field == "sampling.grammar.json_schema"
                    assert "is too complex" in str(error)
        assert client.generate(PROMPT, sampling=grammar).token_ids == before.token_ids
        assert len(client.generate(PROMPT, sampling=plain).token_ids) == 4
        ended = {worker.id: worker.process.incarnation for worker in workers}
        assert {worker.id: worker.process.incarnation for worker in client.status().workers} == ended
        for child in [*stack._workers]:
            (helper,) = psutil.Process(child.pid).children()
            assert not helper.net_connections("inet")


def test_helpers_end_with_their_processes(tiny_pair):
    """The router is killed, the workers are drained."""
    with running_stack(tiny_pair) as (stack, address):
        with Client(address) as client:
            client.generate(PROMPT, sampling=SamplingParams(max_tokens=8, grammar=GOOD))
        (router,) = children(stack, "router")
        pids = [router.pid, *(child.pid for child in stack._workers)]
        helpers = [helper for pid in pids for helper in psutil.Process(pid).children()]
        assert len(helpers) == 3
        of_router = psutil.Process(router.pid).children()
        os.kill(router.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(of_router, 30)
        assert not alive
    _, alive = psutil.wait_procs(helpers, 30)
    assert not alive
