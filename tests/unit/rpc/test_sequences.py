"""Both ends of ``Decode.Serve``: what ends one sequence ends no other, and nothing is left behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from jobs import worker_info

from overfill.errors import DeadlineExceeded, InternalError, InvalidRequest, OverfillError, Unavailable
from overfill.kv.blocks import BlockPool
from overfill.routing import stream
from overfill.routing.stream import GrpcConnector
from overfill.routing.worker import DECODE, WorkerInfo
from overfill.rpc.constants import MAX_MESSAGE_BYTES
from overfill.rpc.sequences import OutgoingUpdates, ServedSequence, serve_sequences
from overfill.rpc.server import RpcServer
from overfill.v1 import common_pb2, decode_pb2, decode_pb2_grpc

Update = decode_pb2.SequenceUpdate


def tokens(first: int, *ids: int) -> Update:
    return Update(tokens=decode_pb2.Tokens(first_index=first, ids=ids))


def done() -> Update:
    return Update(done=decode_pb2.DecodeDone(reason=common_pb2.FINISH_REASON_STOP))


class Worker(decode_pb2_grpc.DecodeServicer):
    """A decode worker whose sequences run what the test says. Each holds a block while it runs."""

    def __init__(self) -> None:
        self.pool = BlockPool(64, 4)
        self.messages: list[decode_pb2.WorkerMessage] = []
        self.received: list[decode_pb2.RouterMessage] = []
        self.run: Callable[[ServedSequence], Any] = self.echo
        self.running = 0
        self.streams = 0

    async def Serve(self, request_iterator: AsyncIterator[decode_pb2.RouterMessage], context: Any) -> None:
        self.streams += 1

        async def recorded() -> AsyncIterator[decode_pb2.RouterMessage]:
            async for message in request_iterator:
                self.received.append(message)
                yield message

        await serve_sequences(recorded(), _Recorder(context, self.messages), self._run)  # type: ignore[arg-type]

    async def _run(self, served: ServedSequence) -> None:
        owner = f"{served.start.request_id}/{self.streams}/{served.number}"
        blocks = self.pool.acquire(owner, 1)
        if blocks is None:
            served.put(Update(refused=decode_pb2.Refused(reason="full")))
            return
        self.running += 1
        try:
            await self.run(served)
        finally:
            self.running -= 1
            self.pool.release(owner, blocks)

    async def echo(self, served: ServedSequence) -> None:
        """Reserves, waits for a prefill worker, and answers with the prompt."""
        served.put(Update(reserved=decode_pb2.Reserved(blocks=1)))
        command = await served.commands.get()
        if isinstance(command, Exception):
            raise command
        if isinstance(command, decode_pb2.Evict):
            raise Unavailable("evicted")
        for index, token in enumerate(served.start.prompt_token_ids):
            served.put(tokens(index, token))
        served.put(done())


class _Recorder:
    """A context that keeps what it writes."""

    def __init__(self, context: Any, messages: list[decode_pb2.WorkerMessage]) -> None:
        self._context = context
        self._messages = messages

    async def write(self, message: decode_pb2.WorkerMessage) -> None:
        self._messages.append(message)
        await self._context.write(message)


class Sequence:
    """The router's end of one sequence."""

    def __init__(self, connector: GrpcConnector, worker: WorkerInfo) -> None:
        self.got: list[Any] = []
        self.news = asyncio.Event()
        self._stream, self._number = connector.open(worker, self._receive)

    def _receive(self, update: Update | OverfillError) -> None:
        self.got.append(update)
        self.news.set()

    def start(self, *prompt: int, **more: Any) -> None:
        start = decode_pb2.StartDecode(request_id="r", prompt_token_ids=prompt, **more)
        self.send(start=start)

    def assign(self) -> None:
        self.send(assign_prefill=decode_pb2.AssignPrefill(worker_id="p"))

    def send(self, **command: Any) -> None:
        self._stream.send(self._number, decode_pb2.SequenceCommand(**command))

    def close(self) -> None:
        self._stream.close(self._number)

    async def until(self, condition: Callable[[list[Any]], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition(self.got):
                self.news.clear()
                await self.news.wait()

    async def reserved(self) -> None:
        await self.until(lambda got: bool(got))
        assert got_kinds(self.got)[0] == "reserved"

    async def end(self) -> Any:
        """Returns the last update or error."""
        await self.until(lambda got: bool(got) and is_last(got[-1]))
        return self.got[-1]

    @property
    def ids(self) -> list[int]:
        return [i for update in self.got if isinstance(update, Update) for i in update.tokens.ids]


def is_last(update: Any) -> bool:
    return isinstance(update, OverfillError) or update.WhichOneof("message") in ("done", "refused")


def got_kinds(got: list[Any]) -> list[str]:
    return [type(u).__name__ if isinstance(u, OverfillError) else u.WhichOneof("message") for u in got]


class Ends:
    def __init__(self, worker: Worker, connector: GrpcConnector, info: WorkerInfo, server: RpcServer) -> None:
        self.worker = worker
        self.connector = connector
        self.info = info
        self.server = server

    def open(self) -> Sequence:
        return Sequence(self.connector, self.info)

    async def running(self) -> Sequence:
        """Returns a sequence whose worker has reserved blocks."""
        sequence = self.open()
        sequence.start(1)
        await sequence.reserved()
        return sequence

    async def idle(self) -> None:
        """Waits until the worker runs nothing; checks that no block is used."""
        async with asyncio.timeout(20):
            while self.worker.running or self.worker.pool.num_used:
                await asyncio.sleep(0.01)
        self.worker.pool.check_integrity()


@asynccontextmanager
async def both_ends() -> AsyncIterator[Ends]:
    worker, server = Worker(), RpcServer()
    server.add(decode_pb2_grpc.add_DecodeServicer_to_server, worker, "overfill.v1.Decode")
    address = await server.start("127.0.0.1:0")
    info = worker_info("d", DECODE, address=address)
    connector = GrpcConnector()
    connector.add(info)
    try:
        yield Ends(worker, connector, info, server)
    finally:
        await connector.close()
        await server.stop(0)


@pytest.fixture
async def ends() -> AsyncIterator[Ends]:
    async with both_ends() as ends:
        yield ends
        await ends.connector.close()  # a router that dies frees all its sequences
        await ends.idle()


async def test_sequences_share_one_stream(ends: Ends) -> None:
    sequences = [ends.open() for _ in range(5)]
    for number, sequence in enumerate(sequences):
        sequence.start(10 + number, 20 + number)
    for number, sequence in enumerate(sequences):
        await sequence.reserved()
        sequence.assign()
        assert (await sequence.end()).HasField("done")
        assert sequence.ids == [10 + number, 20 + number]
    assert ends.worker.streams == 1


async def test_one_message_carries_the_tokens_of_all_sequences(ends: Ends) -> None:
    step = asyncio.Event()

    async def run(served: ServedSequence) -> None:
        served.put(Update(reserved=decode_pb2.Reserved(blocks=1)))
        await step.wait()
        served.put_token(0, served.number)
        await asyncio.sleep(0)  # a turn of the loop later
        served.put(done())

    ends.worker.run = run
    sequences = [await ends.running() for _ in range(8)]
    before = len(ends.worker.messages)
    step.set()
    for sequence in sequences:
        await sequence.end()
    (message,) = ends.worker.messages[before:]
    assert len(message.updates) == 16


async def test_commands_that_wait_share_a_message_up_to_its_maximum(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = [ends.open() for _ in range(8)]
    for sequence in sequences:  # without a turn of the event loop, nothing is sent
        sequence.start(1)
    for sequence in sequences:
        await sequence.reserved()
    assert [len(message.commands) for message in ends.worker.received] == [8]
    monkeypatch.setattr(stream, "MAX_MESSAGE_BYTES", 2048)
    large = [ends.open() for _ in range(5)]
    for sequence in large:
        sequence.start(*[100_000] * 300)  # 900 bytes
    for sequence in large:
        await sequence.reserved()
    assert [len(message.commands) for message in ends.worker.received[1:]] == [2, 2, 1]


async def test_an_error_ends_one_sequence_only(ends: Ends) -> None:
    good, bad = await ends.running(), await ends.running()
    bad.send(start=decode_pb2.StartDecode())  # a second start is not allowed
    error = await bad.end()
    assert isinstance(error, InvalidRequest)
    assert error.field == "start"
    good.assign()
    assert (await good.end()).HasField("done")
    assert ends.worker.streams == 1


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (InvalidRequest("sampling.seed", "is required"), InvalidRequest),
        (RuntimeError("a bug"), InternalError),
        (None, InternalError),  # it ends without a last update
        (asyncio.CancelledError(), InternalError),  # something that it awaited was cancelled, not the sequence
    ],
)
async def test_errors_keep_their_class_and_field(
    ends: Ends, failure: BaseException | None, expected: type[OverfillError]
) -> None:
    async def run(served: ServedSequence) -> None:
        if failure is not None:
            raise failure

    ends.worker.run = run
    sequence = ends.open()
    sequence.start(1)
    error = await sequence.end()
    assert type(error) is expected
    if isinstance(failure, InvalidRequest):
        assert (error.field, str(error)) == ("sampling.seed", "sampling.seed: is required")


async def test_the_worker_keeps_the_deadline(ends: Ends) -> None:
    sequence, other = ends.open(), ends.open()
    sequence.start(1, time_left_ns=50_000_000)
    other.start(1)
    assert isinstance(await sequence.end(), DeadlineExceeded)
    await other.reserved()
    assert ends.worker.running == 1


async def test_a_number_is_free_as_soon_as_its_sequence_is_cancelled(ends: Ends) -> None:
    begun = asyncio.Event()

    async def talks_to_the_end(served: ServedSequence) -> None:
        try:
            served.put(Update(reserved=decode_pb2.Reserved(blocks=1)))
            begun.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # the next sequence with its number has begun
            served.put(tokens(0, 1))

    ends.worker.run = talks_to_the_end
    sequence = ends.open()
    sequence.start(1)
    await begun.wait()
    ends.worker.run = ends.worker.echo
    # Without a turn of the event loop, all go in one message.
    sequence.send(cancel=decode_pb2.CancelDecode())
    sequence.start(2)
    sequence.send(cancel=decode_pb2.CancelDecode())
    sequence.start(3)
    sequence.assign()
    assert (await sequence.end()).HasField("done")
    assert sequence.ids == [3]
    await ends.idle()


async def test_a_command_that_is_too_large_fails_its_own_request_before_it_is_sent(ends: Ends) -> None:
    other, large = await ends.running(), ends.open()
    with pytest.raises(InvalidRequest, match="bytes between router and worker"):
        large.start(*[2**31] * (MAX_MESSAGE_BYTES // 5))
    large.close()
    other.assign()
    assert (await other.end()).HasField("done")


async def test_an_old_stream_ends_with_its_last_sequence(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    first = await ends.running()
    (old,) = ends.connector._connections["d", 1]._streams
    monkeypatch.setattr(stream, "_MAX_AGE", -1.0)
    await ends.running()
    assert ends.worker.streams == 2
    assert not old.ended
    first.assign()
    assert (await first.end()).HasField("done")
    await asyncio.wait_for(old._reading, 10)
    assert ends.worker.running == 1


async def test_a_channel_to_a_worker_that_has_left_closes_with_its_last_sequence(ends: Ends) -> None:
    begun = await ends.running()
    ends.connector.forget(ends.info)
    late = ends.open()  # the dispatcher chose the worker before it left
    late.start(2)
    await late.reserved()
    channels = {connection.channel: task for connection, task in ends.connector._retiring.items()}
    assert len(channels) == 2
    for sequence in (begun, late):
        sequence.assign()
        assert (await sequence.end()).HasField("done")
    async with asyncio.timeout(20):
        await asyncio.gather(*channels.values())
    assert [channel._channel.closed() for channel in channels] == [True, True]  # type: ignore[attr-defined]
    assert not ends.connector._retiring


async def test_a_receiver_that_raises_ends_no_other_sequence(ends: Ends) -> None:
    def fails(update: object) -> None:
        raise RuntimeError("a bug")

    good = ends.open()
    bad, number = ends.connector.open(ends.info, fails)
    bad.send(number, decode_pb2.SequenceCommand(start=decode_pb2.StartDecode(request_id="bad")))
    good.start(1)
    await good.reserved()
    good.assign()
    assert (await good.end()).HasField("done")
    bad.close(number)


async def test_commands_of_a_closed_sequence_are_not_kept(ends: Ends) -> None:
    await ends.running()
    (current,) = ends.connector._connections["d", 1]._streams
    for _ in range(50):  # without a turn of the event loop, nothing is sent
        other = ends.open()
        other.start(1, 2, 3)
        other.close()
    assert not current._commands


async def test_a_stream_that_breaks_fails_its_sequences_and_another_follows(ends: Ends) -> None:
    sequences = [await ends.running() for _ in range(3)]
    (current,) = ends.connector._connections["d", 1]._streams
    current.cancel()
    for sequence in sequences:
        assert isinstance(await sequence.end(), Unavailable)
        sequence.close()
    await ends.idle()
    await ends.running()
    assert ends.worker.streams == 2


async def test_ten_thousand_starts_and_cancels_in_random_order_leave_nothing(ends: Ends) -> None:
    rng = random.Random(7)

    async def client() -> None:
        for _ in range(200):
            sequence = ends.open()
            sequence.start(*range(rng.randrange(1, 4)))
            how = rng.random()
            if how < 0.3:  # cancelled at once, perhaps before the worker has begun
                if how < 0.1:
                    await asyncio.sleep(0)
            else:
                await sequence.until(lambda got: bool(got))
                if how > 0.5 and not is_last(sequence.got[-1]):
                    sequence.assign()
                    if how > 0.7:
                        await sequence.end()
            sequence.close()

    await asyncio.gather(*(client() for _ in range(50)))
    await ends.idle()
    (current,) = ends.connector._connections["d", 1]._streams
    assert not current._receivers
    assert ends.worker.streams == 1


async def test_a_stream_that_cannot_be_written_ends(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = await ends.running()
    monkeypatch.setattr(OutgoingUpdates, "take", lambda self: 1 / 0)
    sequence.assign()
    assert isinstance(await sequence.end(), Unavailable)


@pytest.mark.parametrize("alone", [0, 1, 2])
async def test_unread_tokens_merge_into_one_update(alone: int) -> None:
    """Tokens that are put alone, and in an update, follow each other in the same way."""
    outgoing = OutgoingUpdates()
    for index in range(1000):
        if index % 2 < alone:
            outgoing.put_token(3, index, index)
        else:
            outgoing.put(3, tokens(index, index))
    outgoing.put(3, done())
    first, last = outgoing.take().updates
    assert list(first.tokens.ids) == list(range(1000))
    assert (first.sequence, first.tokens.first_index) == (3, 0)
    assert last.HasField("done")
    assert not outgoing.take().updates


@pytest.mark.parametrize(("sequences", "length"), [(40, 200), (1, 70_000)])
async def test_what_a_slow_router_has_not_read_leaves_in_messages_of_bounded_size(sequences: int, length: int) -> None:
    outgoing = OutgoingUpdates()
    entry = common_pb2.TokenLogprobs(top_ids=range(20), top_logprobs=[0.0] * 20)
    for number in range(sequences):
        for index in range(length):
            outgoing.put(number, Update(tokens=decode_pb2.Tokens(first_index=index, ids=[1], logprobs=[entry])))
    sent = [0] * sequences
    while (message := outgoing.take()).updates:
        assert message.ByteSize() < MAX_MESSAGE_BYTES / 4
        for update in message.updates:
            assert update.tokens.first_index == sent[update.sequence]
            sent[update.sequence] += len(update.tokens.ids)
    assert sent == [length] * sequences


async def test_scores_of_long_prompts_that_a_slow_router_has_not_read_leave_in_messages_of_bounded_size() -> None:
    outgoing = OutgoingUpdates()
    scores = common_pb2.PromptLogprobs(
        logprobs=[-1.0] * 8191,
        ranks=[100_000] * 8191,
        top_ids=[100_000] * (20 * 8191),
        top_logprobs=[-1.0] * (20 * 8191),
    )
    for number in range(8):
        outgoing.put(number, Update(tokens=decode_pb2.Tokens(ids=[1], prompt_logprobs=scores)))
    sizes = []
    while (message := outgoing.take()).updates:
        sizes.append(message.ByteSize())
    assert len(sizes) == 8
    assert max(sizes) < MAX_MESSAGE_BYTES / 4


async def test_tokens_with_a_gap_or_of_another_form_do_not_merge() -> None:
    outgoing = OutgoingUpdates()
    entry = common_pb2.TokenLogprobs(logprob=-1.0)
    outgoing.put(1, tokens(0, 5))
    outgoing.put(1, tokens(2, 6))
    outgoing.put(1, Update(tokens=decode_pb2.Tokens(first_index=3, ids=[7], logprobs=[entry])))
    outgoing.put_token(1, 4, 8)
    outgoing.put_token(1, 6, 9)
    outgoing.put(1, Update(need_prefill=decode_pb2.NeedPrefill()))
    outgoing.put_token(1, 7, 10)
    assert [list(update.tokens.ids) for update in outgoing.take().updates] == [[5], [6], [7], [8], [9], [], [10]]


async def test_a_dropped_sequence_leaves_nothing_in_any_message_and_its_number_is_free() -> None:
    outgoing = OutgoingUpdates()
    for index in range(20_000):  # more than a message takes
        outgoing.put_token(1, index, 5)
        outgoing.put_token(2, index, 6)
    outgoing.drop(1)
    outgoing.put_token(1, 0, 7)
    sent = {1: [], 2: []}  # type: dict[int, list[int]]
    while (message := outgoing.take()).updates:
        for update in message.updates:
            sent[update.sequence] += update.tokens.ids
    assert sent == {1: [7], 2: [6] * 20_000}


async def test_tokens_merge_without_the_loss_of_what_they_say_of_the_handoff() -> None:
    outgoing = OutgoingUpdates()
    for index, decode_ns in enumerate([1, None, 2, None]):
        so_far = None if decode_ns is None else decode_pb2.DecodeDone(decode_ns=decode_ns)
        outgoing.put(1, Update(tokens=decode_pb2.Tokens(first_index=index, ids=[5], so_far=so_far)))
    sent = [(len(update.tokens.ids), update.tokens.so_far.decode_ns) for update in outgoing.take().updates]
    assert sent == [(2, 1), (2, 2)]
