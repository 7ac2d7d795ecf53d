"""Tests that an answer goes on at another router with its own prompt and writer, or is refused by name."""

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest

from overfill.client import AsyncClient, Incompatible, InvalidRequest, PromptTooLong, SamplingParams, Unavailable
from overfill.lab.chaos.proxy import TcpProxy
from overfill.making.tiny import make_tiny_pair
from overfill.model.manifest import Pair
from overfill.rpc.constants import WIRE_VERSION
from overfill.rpc.membership import Membership
from overfill.rpc.sequences import serve_sequences
from overfill.rpc.server import RpcServer
from overfill.settings.config import RouterConfig
from overfill.v1 import common_pb2, decode_pb2, decode_pb2_grpc, registry_pb2
from services.router.app import Router

PROMPT = list(range(100, 200))
LENGTH = 12
BEFORE = 4  # tokens that arrive before the first router is lost
SAMPLING = SamplingParams(temperature=0, max_tokens=LENGTH)
BLOCK = 16


def written(prompt, decoder_digest):
    """The answer that a decoder writes: every token depends on the whole prompt and on the decoder."""
    start = sum(prompt) + int(decoder_digest[:6], 16)
    return [32 + (start + index) % 200 for index in range(LENGTH)]


class Worker(decode_pb2_grpc.DecodeServicer):
    """A decode worker without an engine. ``stops_at`` makes it stop for ever after so many tokens."""

    def __init__(self, pair, stage, blocks, stops_at=LENGTH, dtype="float32", kv_cache_dtype="auto", reader=""):
        pair = replace(pair, reader=reader)
        self.pair, self.blocks, self.stops_at = pair, blocks, stops_at
        self.hello = registry_pb2.Hello(
            worker_id=f"w{stage}",
            incarnation=stage,
            stages=[stage],
            wire_version=WIRE_VERSION,
            model=pair.model_identity("decoder", kv_cache_dtype)
            if stage == common_pb2.STAGE_DECODE
            else pair.model_identity("full"),
            kv=pair.full_config.kv_spec(dtype).to_proto(),
            max_model_len=pair.full_config.max_positions,
            vocab_size=pair.full_config.vocab_size,
        )

    async def Serve(self, requests, context):
        await serve_sequences(requests, context, self._run)

    async def _run(self, served):
        served.put(decode_pb2.SequenceUpdate(reserved=decode_pb2.Reserved(blocks=1)))
        first = len(served.start.emitted_token_ids)
        ids = written(served.start.prompt_token_ids, self.pair.decoder_digest)[first : self.stops_at]
        tokens = decode_pb2.Tokens(first_index=first, ids=ids)
        if served.start.sampling.HasField("prompt_logprobs") and not first:
            scored = len(served.start.prompt_token_ids) - served.start.answer_start
            tokens.prompt_logprobs.logprobs.extend([-1.0] * scored)
            tokens.prompt_logprobs.ranks.extend([1] * scored)
        served.put(decode_pb2.SequenceUpdate(tokens=tokens))
        if self.stops_at < LENGTH:
            await asyncio.Event().wait()
        done = decode_pb2.DecodeDone(reason=common_pb2.FINISH_REASON_LENGTH)
        served.put(decode_pb2.SequenceUpdate(done=done))

    def report(self):
        load = decode_pb2.WorkerLoad(kv_blocks_total=self.blocks, block_size=BLOCK)
        return registry_pb2.Report(load=load, credits=8, ready=True)


@asynccontextmanager
async def stack(folder, blocks=128, stops_at=LENGTH, **formats):
    """A router with one worker of each stage; yields its address. ``formats`` are those of the workers."""
    async with AsyncExitStack() as exits:
        router = Router(RouterConfig(pair=folder, port=0, grace_period=0))
        address = await router.start()
        serving = asyncio.create_task(router.run())
        for stage in (common_pb2.STAGE_PREFILL, common_pb2.STAGE_DECODE):
            worker, server = Worker(Pair.load(folder), stage, blocks, stops_at, **formats), RpcServer()
            server.add(decode_pb2_grpc.add_DecodeServicer_to_server, worker, "overfill.v1.Decode")
            worker.hello.address = await server.start("127.0.0.1:0")
            exits.push_async_callback(server.stop, 0)
            membership = Membership(worker.hello, [address], worker.report)
            await membership.start()
            exits.push_async_callback(membership.stop)
        while sum(worker.credits_left > 0 for worker in router.roster.workers()) < 2:
            await asyncio.sleep(0.01)
        yield address
        router.drain()
        await serving


@asynccontextmanager
async def lost(*others, blocks=128, pair, **options):
    """An answer whose router is lost after ``BEFORE`` tokens; ``others`` are the addresses that follow."""
    async with AsyncExitStack() as exits:
        address = await exits.enter_async_context(stack(pair, blocks, BEFORE))
        proxy = await exits.enter_async_context(TcpProxy(address))
        client = await exits.enter_async_context(AsyncClient(",".join([proxy.address, *others])))
        stream = await exits.enter_async_context(client.stream(PROMPT, **{"sampling": SAMPLING, **options}))
        first = await anext(stream)
        assert len(first.token_ids) == BEFORE
        proxy.forward_to("127.0.0.1:1")  # no process listens there
        proxy.cut()
        yield stream


async def rest_of(stream):
    """The whole answer after its router was lost."""
    async for _ in stream:
        pass
    return list(stream.answer.token_ids)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """The tiny pair, one with another decoder, and one with another full model."""
    folder = tmp_path_factory.mktemp("pairs")
    small = {"num_layers": 1, "hidden_size": 32}
    return {
        "pair": make_tiny_pair(folder / "pair", **small),
        "decoder": make_tiny_pair(folder / "decoder", decoder_seed=7, **small),
        "model": make_tiny_pair(folder / "model", seed=7, **small),
    }


def answer_of(pairs, prompt):
    return written(prompt, Pair.load(pairs["pair"]).decoder_digest)


async def test_an_answer_goes_on_where_prompt_and_writer_are_the_same(pairs):
    async with stack(pairs["pair"]) as other, lost(other, pair=pairs["pair"]) as stream:
        assert await rest_of(stream) == answer_of(pairs, PROMPT)


async def test_a_prompt_that_was_truncated_for_a_small_router_stays_so_at_a_large_one(pairs):
    async with (
        stack(pairs["pair"]) as other,
        lost(other, pair=pairs["pair"], blocks=4, truncate_prompt_tokens=-1) as stream,
    ):
        kept = PROMPT[-(4 * BLOCK - LENGTH) :]
        assert await rest_of(stream) == answer_of(pairs, kept)
        assert stream.answer.usage.prompt_tokens == stream.answer.identity.prompt_tokens == len(kept)


async def test_a_small_router_refuses_to_go_on_with_a_prompt_that_it_would_truncate(pairs):
    async with (
        stack(pairs["pair"], blocks=4) as other,
        lost(other, pair=pairs["pair"], truncate_prompt_tokens=-1) as stream,
    ):
        with pytest.raises(PromptTooLong, match="has 100 tokens; the context of 64 tokens"):
            await rest_of(stream)


@pytest.mark.parametrize(
    ("other", "formats", "fields"),
    [
        ("decoder", {}, {"decoder_digest"}),
        ("model", {}, {"full_digest", "reader_digest", "decoder_digest"}),
        ("pair", {"kv_cache_dtype": "int8"}, {"kv_cache_dtype"}),
        ("pair", {"dtype": "bfloat16"}, {"kv_dtype"}),
        ("pair", {"reader": "mock"}, {"reader_digest"}),
    ],
)
async def test_a_router_with_another_writer_refuses_and_names_the_fields(pairs, other, formats, fields):
    async with stack(pairs[other], **formats) as address, lost(address, pair=pairs["pair"]) as stream:
        with pytest.raises(Incompatible) as caught:
            await rest_of(stream)
        assert set(caught.value.fields) == {f"resume_identity.{name}" for name in fields}
        assert list(caught.value.produced.token_ids) == answer_of(pairs, PROMPT)[:BEFORE]


async def test_a_router_that_cannot_go_on_is_passed_over(pairs):
    async with (
        stack(pairs["decoder"]) as wrong,
        stack(pairs["pair"], blocks=4) as small,
        stack(pairs["pair"]) as right,
        lost(wrong, small, right, pair=pairs["pair"], truncate_prompt_tokens=-1) as stream,
    ):
        assert await rest_of(stream) == answer_of(pairs, PROMPT)


async def test_an_answer_that_is_resumed_by_hand_keeps_its_prompt_and_writer(pairs):
    async with lost(pair=pairs["pair"]) as stream:
        with pytest.raises(Unavailable) as caught:
            await rest_of(stream)
    produced = caught.value.produced
    resumed = {"sampling": SAMPLING, "resume_token_ids": produced.token_ids, "resume_identity": produced.identity}
    async with stack(pairs["pair"]) as address, AsyncClient(address) as client:
        answer = await client.generate(PROMPT, **resumed)
        assert [*produced.token_ids, *answer.token_ids] == answer_of(pairs, PROMPT)
        for prompt, fields in ((PROMPT[1:], ("prompt_tokens", "prompt_digest")), (PROMPT[::-1], ("prompt_digest",))):
            with pytest.raises(Incompatible) as refused:
                await client.generate(prompt, **resumed)
            assert refused.value.fields == tuple(f"resume_identity.{name}" for name in fields)
        for name in ("adapter_digest", "revision"):
            changed = replace(produced.identity, **{name: "other"})
            with pytest.raises(Incompatible) as refused:
                await client.generate(PROMPT, **(resumed | {"resume_identity": changed}))
            assert refused.value.fields == (f"resume_identity.{name}",)
        with pytest.raises(InvalidRequest) as missing:
            await client.generate(PROMPT, sampling=SAMPLING, resume_token_ids=produced.token_ids)
        assert missing.value.field == "resume_identity"


async def test_an_answer_behind_an_answer_start_goes_on_only_behind_the_same(pairs):
    scored = replace(SAMPLING, prompt_logprobs=0)
    async with lost(pair=pairs["pair"], sampling=scored, answer_start=40) as stream:
        with pytest.raises(Unavailable) as caught:
            await rest_of(stream)
    produced = caught.value.produced
    resumed = {"resume_token_ids": produced.token_ids, "resume_identity": produced.identity}
    async with stack(pairs["pair"]) as address, AsyncClient(address) as client:
        answer = await client.generate(PROMPT, sampling=scored, answer_start=40, **resumed)
        assert [*produced.token_ids, *answer.token_ids] == answer_of(pairs, PROMPT)
        for options in ({"sampling": SAMPLING}, {"sampling": scored, "answer_start": 41}):
            with pytest.raises(Incompatible) as refused:
                await client.generate(PROMPT, **options, **resumed)
            assert refused.value.fields == ("resume_identity.answer_start",)
