"""Tests what a client that does not read costs: its RPCs count against its API key until they have ended."""

import asyncio
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from overfill.errors import DeadlineExceeded, Overloaded
from overfill.rpc.access import caller
from overfill.v1 import inference_pb2
from services.router import inference
from services.router.inference import InferenceServicer


class Context:
    """An RPC whose client reads nothing."""

    def __init__(self):
        self.callbacks = []
        self.add_done_callback = self.callbacks.append

    def time_remaining(self):
        return None

    async def send_initial_metadata(self, metadata):
        pass

    async def write(self, message):
        await asyncio.Event().wait()

    def end(self):
        for callback in self.callbacks:
            callback(self)


class Answer(nullcontext):
    accepted = inference_pb2.Accepted()


async def check(*arguments):
    return None


HANDLER = SimpleNamespace(
    check=check,
    reserve=nullcontext,
    start=lambda *arguments: Answer(),
    metrics=SimpleNamespace(refusing=nullcontext),
)


async def test_a_key_whose_answers_are_not_read_is_refused_until_one_has_ended(monkeypatch):
    monkeypatch.setattr(inference, "STALLED_TIMEOUT", 0.0)
    monkeypatch.setattr(inference, "MAX_STALLED", 2)
    servicer = InferenceServicer(HANDLER)

    async def ask(key):
        caller.set(SimpleNamespace(id=key))
        context = Context()
        with pytest.raises(DeadlineExceeded, match="has read nothing"):
            await servicer.Generate(inference_pb2.GenerateRequest(), context)
        return context

    first = await ask("a")
    await ask("a")
    with pytest.raises(Overloaded, match="reads none of 2 answers"):
        await ask("a")
    await ask("b")
    first.end()
    await ask("a")
