"""Workers of two revisions of a pair, in one process, without a router: they exchange no KV."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest
from decode_calls import DecodeCall
from listening_registry import ListeningRegistry
from mocks import mock_worker

from overfill.request.params import SamplingParams
from overfill.rpc.channel import open_channel
from overfill.settings.config import ColocatedConfig, DecodeConfig, PrefillConfig
from overfill.v1 import decode_pb2, decode_pb2_grpc

GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


@asynccontextmanager
async def joined(kind, pair, revision):
    """Yields the Hello of a worker of a revision, on the mock engine."""
    registry = ListeningRegistry()
    settings = {"pair": pair, "routers": await registry.start(), "revision": revision, "max_model_len": 64}
    async with mock_worker(kind, settings):
        yield await registry.next_worker(30)
    await registry.stop()


async def assign(call, reader):
    """Has the worker ``reader`` prefill the prompt; returns the first update that is not a token."""
    place = {"worker_id": reader.worker_id, "incarnation": reader.incarnation, "address": reader.address}
    await call.send(assign_prefill=decode_pb2.AssignPrefill(**place))
    while (update := await call.read()).HasField("tokens"):
        pass
    return update


@pytest.mark.parametrize("writer_kind", [DecodeConfig, ColocatedConfig])
@pytest.mark.parametrize("reader_kind", [PrefillConfig, ColocatedConfig])
async def test_a_worker_takes_no_kv_of_another_revision(tiny_pair, writer_kind, reader_kind):
    async with (
        joined(writer_kind, tiny_pair, "r1") as writer,
        joined(reader_kind, tiny_pair, "r1") as same,
        joined(reader_kind, tiny_pair, "r2") as other,
        open_channel(writer.address) as channel,
    ):
        assert [hello.model.revision for hello in (writer, same, other)] == ["r1", "r1", "r2"]
        call = DecodeCall(decode_pb2_grpc.DecodeStub(channel))
        start = decode_pb2.StartDecode(
            request_id="r",
            expected_incarnation=writer.incarnation,
            prompt_token_ids=range(20, 40),
            sampling=GREEDY.to_proto(),
            eos_token_ids=[1],
        )
        await call.send(start=start)
        assert (await call.read()).HasField("reserved")
        refusal = (await assign(call, other)).need_prefill
        assert refusal.reason == decode_pb2.NeedPrefill.REASON_INCOMPATIBLE
        assert "revision (here 'r1', there 'r2')" in refusal.detail
        assert (await assign(call, same)).HasField("done")
