"""Tests that long prompts are hashed for the prefix cache on neither the engine's thread nor the event loop's."""

import asyncio
import threading
from types import SimpleNamespace
from unittest.mock import AsyncMock

import pytest
import torch
from counting import CountingRunner

from overfill.engine.decode import DecodeEngine
from overfill.engine.prefill import PrefillEngine
from overfill.engine.sequence import (
    DecodeSequence,
    PrefillSequence,
    PromptComputed,
    Reserve,
    Reserved,
    Start,
    StopRule,
    Submit,
)
from overfill.kv import keys
from overfill.kv.blocks import BlockPool
from overfill.kv.cache import KvCache
from overfill.kv.prefix import PrefixCache
from overfill.kv.spec import KvSpec, RopeSpec
from overfill.request.names import CODECS
from overfill.request.params import SamplingParams
from overfill.v1 import common_pb2, decode_pb2, prefill_pb2, registry_pb2
from services.decode.servicer import DecodeServicer
from services.prefill.servicer import PrefillServicer

GREEDY = SamplingParams(temperature=0)
PROMPT = [n % 60 for n in range(42)]
KV = KvSpec(2, 1, 4, "float32", RopeSpec())


@pytest.fixture
def hashed(monkeypatch):
    """Records the threads on which hashes are computed."""
    monkeypatch.setattr("services.prompt_hasher._SHORT", len(PROMPT) - 1)
    threads, original = [], keys._hash64

    def spy(data):
        threads.append(threading.get_ident())
        return original(data)

    monkeypatch.setattr(keys, "_hash64", spy)
    return threads


@pytest.fixture
def prefix():
    return PrefixCache(BlockPool(32, 4), "digest")


def test_a_prefill_engine_hashes_nothing(prefix, hashed):
    events = []
    engine = PrefillEngine(CountingRunner(), prefix.pool, 8, 4, events.extend, prefix)
    prompts = [prefix.blocks_of(PROMPT) for _ in range(2)]
    hashed.clear()
    for name, made in zip("ab", prompts, strict=True):
        engine.handle(Submit(PrefillSequence(name, list(PROMPT), GREEDY, prompt_blocks=made)))
        while engine.step():
            pass
    assert len([event for event in events if isinstance(event, PromptComputed)]) == 2
    assert prefix.tokens_found == 40
    assert not hashed


def test_a_decode_engine_hashes_nothing(prefix, hashed):
    events = []
    engine = DecodeEngine(CountingRunner(), prefix.pool, 4, 16, events.extend, prefix)
    prompts = [prefix.blocks_of(PROMPT) for _ in range(2)]
    hashed.clear()
    held = []
    for name, made in zip("ab", prompts, strict=True):
        stop = StopRule(frozenset(), 8)
        engine.handle(Reserve(DecodeSequence(name, list(PROMPT), [], GREEDY, stop, prompt_blocks=made)))
        held += [event.held_tokens for event in events if isinstance(event, Reserved)]
        events.clear()
        engine.handle(Start(name, 1))
        while engine.step():
            pass
    assert held == [0, 40]
    assert not hashed


async def begun(responses, sent):
    """Reads until a message was sent to the engine, then closes the call."""
    reading, waiting = asyncio.ensure_future(anext(responses)), asyncio.ensure_future(sent.wait())
    await asyncio.wait([reading, waiting], timeout=10, return_when=asyncio.FIRST_COMPLETED)
    if not sent.is_set():
        reading.result()
    waiting.cancel()
    reading.cancel()
    await asyncio.wait([reading])
    await responses.aclose()


def new_engine(kind):
    """Makes a stand-in engine that keeps the sequence of the first message of ``kind``."""
    sent, found = asyncio.Event(), []

    def send(message):
        if isinstance(message, kind):
            found.append(message.sequence)
            sent.set()

    return SimpleNamespace(send=send, load=SimpleNamespace(waiting=0)), sent, found


async def stream(message):
    yield message
    await asyncio.Event().wait()


def parts(prefix):
    return SimpleNamespace(
        store=KvCache(KV, 4, 4, torch.device("cpu")),
        blocks_of=prefix.blocks_of,
        kv=KV,
        max_model_len=64,
        config=SimpleNamespace(vocab_size=64, num_layers=2),
        prepare_processor=AsyncMock(return_value=None),
        codecs=tuple(CODECS.values()),
        new_scores=lambda params: None,
        ranks=None,
    )


def check(sequence, hashed):
    assert [len(block) for block in sequence.prompt_blocks.tokens] == [16] * 10
    assert len(hashed) >= 10
    assert threading.get_ident() not in hashed, "the event loop hashed the prompt"


async def test_a_prefill_worker_hashes_prompts_before_it_submits_them(prefix, hashed):
    servicer = PrefillServicer(parts(prefix), registry_pb2.Hello(worker_id="p"), None, max_leases=2)
    servicer.engine, sent, found = new_engine(Submit)
    servicer.host = SimpleNamespace(draining=False)
    start = prefill_pb2.StartPrefill(
        transfer_id=b"t" * 16,
        prompt_token_ids=PROMPT,
        layers=[0, 1],
        codec=common_pb2.KV_CODEC_RAW,
        sampling=GREEDY.to_proto(),
        cache_namespace="tenant",
    )
    await begun(servicer.Prefill(stream(prefill_pb2.PrefillRequest(start=start)), None), sent)
    check(found[0], hashed)
    assert found[0].prompt_blocks.cache_namespace == "tenant"


async def test_a_decode_worker_hashes_prompts_before_it_reserves_blocks(prefix, hashed):
    servicer = DecodeServicer(parts(prefix), registry_pb2.Hello(worker_id="d"), SimpleNamespace(use=None), None)
    servicer.engine, sent, found = new_engine(Reserve)
    servicer.host = SimpleNamespace(draining=False)
    start = decode_pb2.StartDecode(
        prompt_token_ids=PROMPT,
        sampling=SamplingParams(temperature=0, max_tokens=4).to_proto(),
        cache_namespace="tenant",
    )
    serving = asyncio.create_task(
        servicer.Serve(
            stream(decode_pb2.RouterMessage(commands=[decode_pb2.SequenceCommand(sequence=1, start=start)])), None
        )
    )
    await asyncio.wait_for(sent.wait(), timeout=10)
    serving.cancel()
    await asyncio.wait([serving])
    check(found[0], hashed)
    assert found[0].prompt_blocks.cache_namespace == found[0].cache_namespace == "tenant"
