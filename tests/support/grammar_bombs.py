"""Grammars that would end a worker, sent to workers as a router and a decode worker send requests."""

import json

from decode_calls import DecodeCall

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


def _sampling(bomb):
    return common_pb2.SamplingParams(temperature=0, max_tokens=8, seed=1, grammar=common_pb2.Grammar(json_schema=bomb))


async def _decode(worker, bomb):
    """Sends a router's request to a decode worker and returns its error."""
    channel = open_channel(worker.address)
    try:
        call = DecodeCall(decode_pb2_grpc.DecodeStub(channel))
        await call.send(start=decode_pb2.StartDecode(
            request_id="r", prompt_token_ids=PROMPT, sampling=_sampling(bomb),
            expected_incarnation=worker.process.incarnation,
        ))  # fmt: skip
        return await call.failure()
    finally:
        await channel.close(None)


async def _prefill(worker, bomb):
    """Sends a decode worker's request to a prefill worker and reads to its error."""
    channel = open_channel(worker.address)
    try:
        call = prefill_pb2_grpc.PrefillStub(channel).Prefill()
        await call.write(prefill_pb2.PrefillRequest(start=prefill_pb2.StartPrefill(
            request_id="r", prompt_token_ids=PROMPT, sampling=_sampling(bomb), sample_first_token=True,
            transfer_id=bytes(16), layers=[0], codec=common_pb2.KV_CODEC_RAW,
            expected_incarnation=worker.process.incarnation,
        )))  # fmt: skip
        await checked_response(call.read(), worker.address)
        raise AssertionError("the prefill worker accepted the grammar")
    except InvalidRequest as error:
        return error
    finally:
        await channel.close(None)


async def assert_only_their_requests_fail(address):
    """Sends bombs to every stage of every worker, and compares the answers and workers before and after them."""
    plain = SamplingParams(max_tokens=4, ignore_eos=True)
    grammar = SamplingParams(max_tokens=8, seed=3, temperature=1.0, grammar=GOOD)
    with Client(address) as client:
        before = client.generate(PROMPT, sampling=grammar)
        workers = client.status().workers
        for bomb in BOMBS:
            for worker in workers:
                calls = {"prefill": [_prefill], "decode": [_decode]}.get(worker.id.split("-")[0], [_prefill, _decode])
                for call in calls:
                    error = await call(worker, bomb)
                    assert isinstance(error, InvalidRequest)
                    assert error.field == "sampling.grammar.json_schema"
                    assert "is too complex" in str(error)
        assert client.generate(PROMPT, sampling=grammar).token_ids == before.token_ids
        assert len(client.generate(PROMPT, sampling=plain).token_ids) == 4
        running = {worker.id: worker.process.incarnation for worker in client.status().workers}
        assert running == {worker.id: worker.process.incarnation for worker in workers}
