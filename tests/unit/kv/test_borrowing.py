"""Tests how much of a loan is pulled, and that each loan ends. The holder and the puller are scripted."""

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace

import grpc.aio
import pytest

from overfill.errors import TransferFailed
from overfill.kv.borrowing import Borrower
from overfill.kv.spec import KvSpec, RopeSpec
from overfill.v1 import kv_pb2, prefill_pb2

KV = KvSpec(3, 2, 4, "float32", RopeSpec())
PROMPT = list(range(100))


class Holder:
    """One holder's ``Lend``, and the puller from it."""

    def __init__(self, answer):
        self.answer, self.sent, self.pulls, self.cancelled = answer, [], [], False
        self.error = None
        self.control = SimpleNamespace(Lend=self.lend)
        self.target = SimpleNamespace(worker_id="holder", incarnation=7)
        self.sources = [kv_pb2.DataAddress(address="x:1", num_kv_heads=2)]

    @asynccontextmanager
    async def use(self, target):
        assert (target.worker_id, target.incarnation, target.address) == ("holder", 7, "x:1")
        yield self

    def lend(self, timeout):
        return self

    async def write(self, message):
        self.sent.append(message.WhichOneof("message"))
        if message.HasField("start"):
            self.start = message.start

    async def read(self):
        answer, self.answer = self.answer, grpc.aio.EOF
        return answer if answer is grpc.aio.EOF else prefill_pb2.LendResponse(tokens=answer)

    def cancel(self):
        self.cancelled = True

    async def pull(self, pull, on_moved):
        self.pulls.append(pull)
        if self.error is not None:
            raise self.error


async def borrow(holder, held=0, block_size=16):
    start = prefill_pb2.StartLend(prompt_token_ids=PROMPT, already_held_tokens=held)
    named = kv_pb2.KvHolder(worker_id="holder", incarnation=7, address="x:1", tokens=96)
    borrower = Borrower(holder, KV, block_size, lambda peer: holder)
    return await borrower.borrow(named, start, list(range(7)))


@pytest.mark.parametrize(
    ("lent", "held", "block_size", "end"),
    [
        (96, 32, 16, 96),
        (64, 0, 16, 64),  # the holder has blocks of 32
        (98, 0, 16, 96),  # of 49
        (70, 0, 32, 64),
        (91, 21, 7, 91),
        (100, 0, 10, 90),  # the last token is computed
        (100, 0, 1, 99),
    ],
)
async def test_the_borrower_pulls_whole_blocks_of_its_own_size(lent, held, block_size, end):
    holder = Holder(lent)
    assert await borrow(holder, held, block_size) == end
    (pull,) = holder.pulls
    assert (pull.spec.tokens, pull.spec.layers, pull.layer_map) == ((held, end), (0, 1, 2), (0, 1, 2))
    assert pull.spec.transfer_id == holder.start.transfer_id
    assert (len(holder.start.transfer_id), holder.start.expected_incarnation) == (16, 7)
    assert holder.sent == ["start", "end"]
    assert holder.cancelled


@pytest.mark.parametrize(("lent", "held"), [(0, 0), (32, 32), (47, 32), (16, 48)])
async def test_nothing_is_pulled_of_a_holder_without_a_block_more(lent, held):
    holder = Holder(lent)
    assert await borrow(holder, held) == held
    assert not holder.pulls
    assert holder.cancelled


@pytest.mark.parametrize("lent", [101, 2**32 - 1, grpc.aio.EOF])
async def test_a_holder_that_claims_what_cannot_be_is_refused(lent):
    holder = Holder(lent)
    with pytest.raises(TransferFailed):
        await borrow(holder)
    assert not holder.pulls
    assert holder.cancelled


async def test_the_loan_ends_when_the_pull_fails():
    holder = Holder(96)
    holder.error = TransferFailed("a wrong checksum")
    with pytest.raises(TransferFailed, match="checksum"):
        await borrow(holder)
    assert holder.sent == ["start"]
    assert holder.cancelled


async def test_a_holder_that_freezes_after_its_last_chunk_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("overfill.kv.borrowing._FAREWELL", 0.01)
    holder = Holder(96)
    read = holder.read

    async def freeze():
        if holder.answer is grpc.aio.EOF:
            await asyncio.Event().wait()
        return await read()

    holder.read = freeze
    assert await borrow(holder) == 96
    assert holder.cancelled
