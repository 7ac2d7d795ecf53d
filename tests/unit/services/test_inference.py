"""Tests what a client that does not read costs: the message that waits for it counts against its API key."""

import asyncio
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from cores import one_revision

from overfill.errors import DeadlineExceeded, Overloaded
from overfill.rpc import shares
from overfill.rpc.shares import RpcShares
from overfill.v1 import decode_pb2, inference_pb2
from services.router import inference
from services.router.inference import InferenceServicer


class Context:
    """An RPC whose client reads nothing."""

    def time_remaining(self):
        return None

    async def send_initial_metadata(self, metadata):
        pass

    async def write(self, message):
        await asyncio.Event().wait()


class Answer(nullcontext):
    accepted = inference_pb2.Accepted(request_id="x" * 50)


async def check(*arguments):
    return SimpleNamespace(tier="default", prompt_token_ids=(), start=decode_pb2.StartDecode())


HANDLER = SimpleNamespace(
    tiers=SimpleNamespace(identity=lambda writer, job: inference_pb2.AnswerIdentity()),
    check=check,
    requests=SimpleNamespace(hold_quota=nullcontext),
    start=lambda *arguments: Answer(),
    statistics=SimpleNamespace(refusing=nullcontext),
)


async def test_a_key_whose_answers_are_not_read_is_refused_until_one_has_ended(monkeypatch):
    monkeypatch.setattr(inference, "STALLED_TIMEOUT", 0.0)
    monkeypatch.setattr(shares, "MAX_UNREAD_BYTES", 100)
    servicer, callers = InferenceServicer(one_revision(HANDLER)), RpcShares(100)

    async def ask(key):
        rpc = callers.open(SimpleNamespace(name=key), True, "")
        shares.current.set(rpc)
        with pytest.raises(DeadlineExceeded, match="has read nothing"):
            await servicer.Generate(inference_pb2.GenerateRequest(), Context())
        return rpc

    first = await ask("a")
    await ask("a")
    with pytest.raises(Overloaded, match=r"API key 'a' has 1\d\d bytes of answers that no client has read"):
        await ask("a")
    await ask("b")
    first.end()
    await ask("a")
