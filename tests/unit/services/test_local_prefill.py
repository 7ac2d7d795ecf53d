"""A prompt that is prefilled in the process that writes its answer. The engine is scripted."""

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace
from unittest.mock import AsyncMock

import pytest

from overfill.engine.sequence import (
    AwaitingImport,
    ChunkComputed,
    DecodeSequence,
    Imported,
    Preempted,
    PrefillHere,
    PrefillScheduled,
    PromptComputed,
    Release,
    Reserved,
    SequenceFailed,
    StopRule,
    Yielded,
)
from overfill.errors import DeadlineExceeded, InternalError, InvalidRequest
from overfill.kv.imports import Imports
from overfill.kv.keys import PromptBlocks
from overfill.model.steps import SampledToken
from overfill.request.params import SamplingParams
from overfill.telemetry.metrics import DecodeMetrics, PrefillMetrics
from overfill.v1 import common_pb2, decode_pb2, kv_pb2
from services.colocated.local_prefill import LocalPrefills
from services.decode.sequence_session import SequenceSession


class Prefilling:
    """A session whose prompt is being prefilled; ``sent`` has the messages to the engine."""

    def __init__(self, emitted=(), answer_start=None, importer=None, holder=None):
        self.sent, self.first_tokens, self.in_place = [], [], 0
        config = SimpleNamespace(eos_token_ids=(9,))
        full = SimpleNamespace(
            blocks_of=lambda prompt, namespace: PromptBlocks(prompt, 4, None, namespace),
            config=config,
            prepare_processor=AsyncMock(return_value=None),
            store=SimpleNamespace(block_size=4),
            max_model_len=30,
        )
        self.metrics = PrefillMetrics()
        engine = SimpleNamespace(send=self.sent.append, load=SimpleNamespace(blocks_total=5))
        self.prefills = LocalPrefills(full, SimpleNamespace(engine=engine, importer=importer), self.metrics)
        sampling = common_pb2.SamplingParams(temperature=0, seed=3)
        start = decode_pb2.StartDecode(sampling=sampling, sample_index=2, cache_namespace="tenant")
        sequence = DecodeSequence("d", [1, 2, 3], list(emitted), SamplingParams(), StopRule(frozenset(), 4), 2)
        sequence.answer_start = answer_start
        wants_first = not emitted and answer_start is None
        self.session = SimpleNamespace(
            start=start, sequence=sequence, wants_first_token=wants_first, wants_scores=False, held_tokens=2
        )
        self.handoff = self.prefills.handoff(self.session, holder)

    async def start(self, timeout=None):
        self.task = asyncio.ensure_future(
            self.handoff.run(timeout, self.first_tokens.append, lambda: setattr(self, "in_place", self.in_place + 1))
        )
        while not self.sent and not self.task.done():
            await asyncio.sleep(0.001)
        return self.sent[0]

    def outcome(self, name):
        return self.metrics.registry.get_sample_value("overfill_prefill_prompts_total", {"outcome": name})


async def test_the_engine_gets_the_prompt_as_the_request_has_it_and_the_session_the_first_token():
    prefilling = Prefilling()
    here = await prefilling.start()
    assert isinstance(here, PrefillHere)
    assert (here.into, here.held_tokens) == ("d", 2)
    sequence = here.sequence
    assert sequence.prompt == [1, 2, 3]
    assert (sequence.sample_index, sequence.cache_namespace, sequence.sample_first_token) == (2, "tenant", True)
    assert sequence.id != "d"
    prefilling.prefills.on_events(
        [
            PrefillScheduled("another", [0], 0, None, 5),
            PrefillScheduled(sequence.id, [0], 1, None, prefilling.handoff.stats.started_ns + 1000),
            ChunkComputed(sequence.id, 1, 3),
            PromptComputed(sequence.id, SampledToken(7), prefilling.handoff.stats.started_ns + 3000),
        ]
    )
    await prefilling.task
    (first,) = prefilling.first_tokens
    assert (list(first.ids), first.prefill_queue_ns, first.prefill_compute_ns) == ([7], 1000, 2000)
    assert prefilling.in_place == 1
    assert prefilling.handoff.stats.cached_tokens == 1
    assert prefilling.sent == [here], "the engine has freed the prompt's blocks itself"
    assert prefilling.outcome("ok") == 1


async def test_an_answer_that_goes_on_gets_no_first_token():
    prefilling = Prefilling(emitted=[4])
    here = await prefilling.start()
    assert not here.sequence.sample_first_token
    prefilling.prefills.on_events([PromptComputed(here.sequence.id, None, 1)])
    await prefilling.task
    assert (prefilling.first_tokens, prefilling.in_place) == ([], 1)
    assert prefilling.metrics.registry.get_sample_value("overfill_prefill_compute_seconds_count") == 1


async def test_the_session_learns_the_times_of_a_prompt_that_the_decoder_goes_on_with():
    prefilling = Prefilling(answer_start=2)
    sequence = (await prefilling.start()).sequence
    assert (sequence.prompt, sequence.sample_first_token) == ([1, 2], False)
    began_ns = prefilling.handoff.stats.started_ns
    prefilling.prefills.on_events(
        [
            PrefillScheduled(sequence.id, [0], 1, None, began_ns + 1000),
            PromptComputed(sequence.id, None, began_ns + 3000),
        ]
    )
    await prefilling.task
    (told,) = prefilling.first_tokens
    assert (list(told.ids), told.prefill_queue_ns, told.prefill_compute_ns) == ([], 1000, 2000)
    assert prefilling.handoff.stats.first_token_ns > 0


@pytest.mark.parametrize(
    ("error", "raised"), [(InvalidRequest("x", "y"), InvalidRequest), (ValueError("z"), InternalError)]
)
async def test_a_failed_prefill_frees_its_blocks(error, raised):
    prefilling = Prefilling()
    here = await prefilling.start()
    prefilling.prefills.on_events([SequenceFailed(here.sequence.id, error)])
    with pytest.raises(raised):
        await prefilling.task
    assert prefilling.sent[1:] == [Release(here.sequence.id)]
    assert prefilling.in_place == 0


async def test_a_cancelled_prefill_stops_the_engine_before_the_sequence_gives_its_blocks_back():
    prefilling = Prefilling()
    here = await prefilling.start()
    prefilling.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await prefilling.task
    assert here.sequence.cancelled
    assert prefilling.sent[1:] == [Release(here.sequence.id)]
    prefilling.prefills.on_events([PromptComputed(here.sequence.id, None, 1)])  # too late: the prompt has ended
    assert prefilling.in_place == 0


async def test_the_deadline_ends_a_prefill():
    prefilling = Prefilling()
    here = await prefilling.start(timeout=0.05)
    with pytest.raises(DeadlineExceeded):
        await prefilling.task
    assert prefilling.sent[1:] == [Release(here.sequence.id)]
    assert prefilling.outcome("deadline") == 1


async def test_a_preempted_session_stops_its_local_prefill_before_it_gives_the_blocks_back():
    """The engine handles messages in order, so it copies nothing into blocks that another sequence has."""
    prefilling, told = Prefilling(), []

    @asynccontextmanager
    async def here(target, session):
        yield prefilling.prefills.handoff(session)

    sequence = DecodeSequence("d", [1, 2, 3], [], SamplingParams(temperature=0), StopRule(frozenset(), 4))
    start = decode_pb2.StartDecode(sampling=common_pb2.SamplingParams(temperature=0, seed=3))
    start.assign_prefill.worker_id = "w"
    served = SimpleNamespace(start=start, commands=asyncio.Queue(), put=told.append, time_left=lambda: None)
    worker = SimpleNamespace(
        metrics=DecodeMetrics(), send=prefilling.sent.append, new_handoff=here, own_assignment=lambda tokens: None
    )
    session = SequenceSession(served, sequence, worker)
    running = asyncio.ensure_future(session.run())
    session.inbox.put_nowait(Reserved("d", [0], 0))
    while not any(isinstance(message, PrefillHere) for message in prefilling.sent):
        await asyncio.sleep(0.001)
    prompt = prefilling.sent[-1].sequence
    session.inbox.put_nowait(Preempted("d"))
    while prefilling.sent[-1] != Yielded("d"):
        await asyncio.sleep(0.001)
    assert prefilling.sent[-2:] == [Release(prompt.id), Yielded("d")]
    running.cancel()
    await asyncio.wait([running])


@pytest.mark.parametrize(("tokens", "fits"), [(20, True), (21, False)])
def test_only_a_prompt_that_the_full_models_cache_holds_fits(tokens, fits):
    assert Prefilling().prefills.fits(tokens) == fits


class Importing:
    """An importer whose import ends when the test says so."""

    def __init__(self):
        self.requests, self.go_on, self.writing, self.computed = [], asyncio.Event(), False, []

    def may_import(self, holder, prompt):
        return holder is not None

    def note_computed(self, prompt):
        self.computed.append(prompt)

    async def run(self, request):
        self.requests.append(request)
        self.writing = True
        try:
            await self.go_on.wait()
        finally:
            self.writing = False
        return Imports(2, peer_tokens=2)


async def importing():
    holder = kv_pb2.KvHolder(worker_id="h", incarnation=3)
    prefilling = Prefilling(importer=Importing(), holder=holder)
    here = await prefilling.start()
    assert here.sequence.imports
    prefilling.prefills.on_events([AwaitingImport(here.sequence.id, [5], 0)])
    while not prefilling.prefills.importer.requests:
        await asyncio.sleep(0.001)
    (request,) = prefilling.prefills.importer.requests
    assert (request.prompt, request.blocks, request.holder) == ([1, 2, 3], [5], holder)
    return prefilling, here.sequence


async def test_a_worker_with_both_stages_imports_what_its_cache_lacks():
    prefilling, sequence = await importing()
    prefilling.prefills.importer.go_on.set()
    while len(prefilling.sent) < 2:
        await asyncio.sleep(0.001)
    assert prefilling.sent[1] == Imported(sequence.id, 2)
    began_ns = prefilling.handoff.stats.started_ns
    prefilling.prefills.on_events(
        [
            PrefillScheduled(sequence.id, [5], 2, None, began_ns + 1000),
            PromptComputed(sequence.id, SampledToken(7), began_ns + 3000),
        ]
    )
    await prefilling.task
    stats = prefilling.handoff.stats
    assert (stats.cached_tokens, stats.peer_tokens, stats.disk_tokens) == (2, 2, 0)
    assert prefilling.prefills.importer.computed == [sequence.prompt_blocks]


async def test_a_cancelled_import_stops_writing_before_the_blocks_are_released():
    prefilling, sequence = await importing()
    writing = []
    prefilling.prefills._stage.engine.send = lambda message: writing.append(
        (message, prefilling.prefills.importer.writing)
    )
    prefilling.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await prefilling.task
    assert writing == [(Release(sequence.id), False)]
