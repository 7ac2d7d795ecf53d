"""The decode worker's end of ``Decode.Serve``: reads a router's commands and writes its sequences' updates.

Each sequence runs in a task of its own. Updates of all sequences that are not yet sent leave in one message, and
consecutive tokens of one sequence merge. So one message leaves per engine step while the router keeps up. A router that
reads slowly delays no engine step, and costs at most the memory of its sequences' tokens.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from overfill.errors import DeadlineExceeded, InternalError, InvalidRequest
from overfill.rpc.constants import LAST_UPDATES
from overfill.rpc.interceptors import Context
from overfill.rpc.status import to_bytes
from overfill.telemetry import logs, tracing
from overfill.v1 import decode_pb2

_MAX_TOKENS_PER_UPDATE = 1_024
_MAX_TOKENS_PER_MESSAGE = 16_384
"""Bounds a message's size after a router has read slowly. A token counts 1, each log-probability 1 more."""


@dataclass(eq=False, slots=True)
class ServedSequence:
    """One sequence of a router's stream.

    Attributes:
        start: The router's first command.
        commands: The router's later commands, and the InvalidRequest of a command that is not allowed. The sequence may
            put its own events into the same queue.
        deadline: Seconds on the event loop's clock; None without one.
        answered: Its last update has been put.
        cancelled: The router no longer wants it; what it still puts is dropped.
    """

    start: decode_pb2.StartDecode
    deadline: float | None
    outgoing: OutgoingUpdates
    number: int
    answered: bool = False
    cancelled: bool = False
    commands: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)

    def put(self, update: decode_pb2.SequenceUpdate) -> None:
        """Queues an update for the router."""
        if self.cancelled:
            return
        self.answered = self.answered or update.WhichOneof("message") in LAST_UPDATES
        self.outgoing.put(self.number, update)

    def put_token(self, index: int, token: int) -> None:
        """Queues token ``index`` of the answer, without log-probabilities."""
        if not self.cancelled:
            self.outgoing.put_token(self.number, index, token)

    def fail(self, error: Exception, trace_id: str) -> None:
        """Queues the sequence's error for the router."""
        failed = decode_pb2.SequenceFailed(status=to_bytes(error), trace_id=trace_id)
        self.put(decode_pb2.SequenceUpdate(failed=failed))

    def time_left(self) -> float | None:
        """Seconds until the deadline; None without one."""
        return None if self.deadline is None else max(0.0, self.deadline - asyncio.get_running_loop().time())


RunSequence = Callable[[ServedSequence], Awaitable[None]]
"""Runs one sequence to its end. An exception fails the sequence; a cancel means that the router no longer wants it."""


async def serve_sequences(
    messages: AsyncIterator[decode_pb2.RouterMessage], context: Context, run: RunSequence
) -> None:
    """Serves one stream until the router ends it, and then cancels its sequences."""
    stream = _RouterStream(run)
    writing = asyncio.create_task(stream.outgoing.write_to(context))
    reading = asyncio.current_task()
    assert reading is not None
    defects: list[BaseException] = []
    gone = False

    def end_with_writer(writing: asyncio.Task[None]) -> None:
        nonlocal gone
        error = None if writing.cancelled() else writing.exception()
        if error is None:
            return
        if type(error).__module__.startswith("grpc"):
            gone = True  # gRPC itself ends the reading of a router that has gone
            return
        defects.append(error)
        reading.cancel()

    writing.add_done_callback(end_with_writer)
    try:
        async for message in messages:
            for command in message.commands:
                stream.handle(command)
        if gone:
            raise asyncio.CancelledError  # gRPC would log that it cannot send the status
    except asyncio.CancelledError:
        if not defects:
            raise
        reading.uncancel()
        # A stream that is read and never written would hang its sequences.
        raise InternalError("the decode worker cannot write its updates") from defects[0]
    finally:
        running = stream.cancel_all()
        stream.outgoing.close()
        # gRPC sends no status while a write is in flight, and the engine must know that the sequences have ended.
        await asyncio.wait([writing, *running])


class _RouterStream:
    """The sequences of one stream, by number, each in a task of its own.

    Attributes:
        outgoing: the updates for the router.
    """

    def __init__(self, run: RunSequence) -> None:
        self.outgoing = OutgoingUpdates()
        self._run = run
        self._sequences: dict[int, tuple[ServedSequence, asyncio.Task[None]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # those of cancelled sequences too, until they have ended

    def handle(self, command: decode_pb2.SequenceCommand) -> None:
        """Handles one command. A command that is not allowed fails its own sequence only."""
        kind = command.WhichOneof("message")
        sequence, task = self._sequences.get(command.sequence, (None, None))
        if sequence is None or task is None:
            if kind == "start":
                self._begin(command.sequence, command.start)
            # Other commands are about a sequence that has ended meanwhile.
        elif kind == "assign_prefill":
            sequence.commands.put_nowait(command.assign_prefill)
        elif kind == "evict":
            sequence.commands.put_nowait(command.evict)
        elif kind == "cancel":
            del self._sequences[command.sequence]  # the next start with this number is another sequence
            sequence.cancelled = True
            self.outgoing.drop(command.sequence)
            task.cancel()
        else:
            problem = "only AssignPrefill, Evict and CancelDecode may follow StartDecode"
            sequence.commands.put_nowait(InvalidRequest(kind or "message", problem))

    def cancel_all(self) -> list[asyncio.Task[None]]:
        """Cancels every sequence and returns their tasks."""
        for task in self._tasks:
            task.cancel()
        return [*self._tasks]

    def _begin(self, number: int, start: decode_pb2.StartDecode) -> None:
        now = asyncio.get_running_loop().time()
        deadline = now + start.time_left_ns / 1e9 if start.HasField("time_left_ns") else None
        sequence = ServedSequence(start, deadline, self.outgoing, number)
        task = asyncio.create_task(self._run_one(sequence), name=f"sequence {start.request_id}")
        # A callback, because a task that is cancelled before its first step never runs.
        task.add_done_callback(lambda _: self._forget(sequence, task))
        self._sequences[number] = sequence, task
        self._tasks.add(task)

    def _forget(self, sequence: ServedSequence, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not sequence.cancelled:
            del self._sequences[sequence.number]

    async def _run_one(self, sequence: ServedSequence) -> None:
        start = sequence.start
        logs.request_id.set(start.request_id)
        span = tracing.serve("decode.attempt", [(tracing.TRACEPARENT, start.traceparent)])
        try:
            try:
                async with asyncio.timeout_at(sequence.deadline) as deadline:
                    await self._run(sequence)
                if not sequence.answered:
                    raise InternalError("the decode worker ended the sequence without an answer")
            except TimeoutError as error:
                if not deadline.expired():
                    raise
                raise DeadlineExceeded("the deadline passed on the decode worker") from error
        except Exception as error:
            span.end(error)
            sequence.fail(error, span.trace_id)
        except asyncio.CancelledError as error:
            span.end(error)
            task = asyncio.current_task()
            if task is not None and not task.cancelling():  # something that the sequence awaited was cancelled
                sequence.fail(InternalError("the decode worker cancelled the sequence"), span.trace_id)
                return
            raise
        else:
            span.end()


class OutgoingUpdates:
    """Updates that the router has not been sent yet, in the messages that will carry them."""

    def __init__(self) -> None:
        self._messages: deque[decode_pb2.WorkerMessage] = deque()  # only the last one takes updates
        self._size = 0  # of the last message
        self._last: dict[int, decode_pb2.SequenceUpdate] = {}  # each sequence's last update in the last message
        self._changed = asyncio.Event()
        self._closed = False

    def close(self) -> None:
        """Ends ``write_to`` after the message that it writes now."""
        self._closed = True
        self._changed.set()

    def put(self, number: int, update: decode_pb2.SequenceUpdate) -> None:
        """Queues an update. Tokens are appended to the sequence's last update if they continue it."""
        size, message = _size(update.tokens), self._open_message()
        last = self._last.get(number)
        if last is not None and _continues(last, update):
            last.tokens.ids.extend(update.tokens.ids)
            last.tokens.logprobs.extend(update.tokens.logprobs)
        else:
            update.sequence = number
            message.updates.append(update)
            self._last[number] = message.updates[-1]
        self._size += size

    def put_token(self, number: int, index: int, token: int) -> None:
        """Queues one token without log-probabilities, as ``put`` would."""
        message = self._open_message()
        self._size += 1
        if (last := self._last.get(number)) is not None and _takes(last, index, False):
            last.tokens.ids.append(token)
            return
        update = self._last[number] = message.updates.add()
        update.sequence = number
        tokens = update.tokens
        tokens.first_index = index
        tokens.ids.append(token)

    def drop(self, number: int) -> None:
        """Forgets the updates of a sequence that the router no longer wants."""
        for message in self._messages:
            for place in reversed(range(len(message.updates))):
                if message.updates[place].sequence == number:
                    del message.updates[place]
        self._last.pop(number, None)

    def take(self) -> decode_pb2.WorkerMessage:
        """Removes the updates of one message and returns it; it has none when none wait."""
        if not self._messages:
            return decode_pb2.WorkerMessage()
        message = self._messages.popleft()
        if not self._messages:
            self._last.clear()
        return message

    async def write_to(self, context: Context) -> None:
        """Writes messages until ``close``. Raises what ``context.write`` raises when the call has ended."""
        while not self._closed:
            if self._messages:
                if (message := self.take()).updates:  # all may have been dropped
                    await context.write(message)
            else:
                self._changed.clear()
                await self._changed.wait()
                # What this turn of the loop adds shares the message, such as the end behind a last token. A prefill RPC
                # that it begins leaves first.
                await asyncio.sleep(0)

    def _open_message(self) -> decode_pb2.WorkerMessage:
        """Returns the message that takes the next update: a new one once the last has as much as a message may."""
        if not self._messages or self._size >= _MAX_TOKENS_PER_MESSAGE:
            self._messages.append(decode_pb2.WorkerMessage())
            self._size = 0
            self._last.clear()
            self._changed.set()
        return self._messages[-1]


def _size(tokens: decode_pb2.Tokens) -> int:
    scores = tokens.prompt_logprobs
    of_prompt = len(scores.logprobs) + len(scores.top_logprobs)
    return 1 + len(tokens.ids) + sum(len(entry.top_ids) for entry in tokens.logprobs) + of_prompt


def _continues(last: decode_pb2.SequenceUpdate, update: decode_pb2.SequenceUpdate) -> bool:
    """True if ``update`` has the tokens that follow those of ``last``, in the same form, and both fit one update.

    An update with ``so_far`` stays separate: it concerns the handoff before its own tokens.
    """
    if not update.HasField("tokens") or update.tokens.HasField("so_far"):
        return False
    return _takes(last, update.tokens.first_index, bool(update.tokens.logprobs))


def _takes(last: decode_pb2.SequenceUpdate, index: int, logprobs: bool) -> bool:
    """True if tokens from ``index`` on, with or without log-probabilities, can follow those of ``last``."""
    if not last.HasField("tokens"):
        return False
    count = len(last.tokens.ids)
    return (
        count < _MAX_TOKENS_PER_UPDATE
        and index == last.tokens.first_index + count
        and logprobs == bool(last.tokens.logprobs)
    )
