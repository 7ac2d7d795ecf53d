"""A rank's end of the link: a thread with an event loop that moves the rank's share of the KV, beside vLLM's model.

On a prefill worker it serves PullKv on an address of its own. On a decode worker it pulls into the rank's cache. It
also keeps the processors of answers that need one. It knows nothing of vLLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from overfill.engine.sequence import KvWritten, Processor
from overfill.engine.vllm.ranks.messages import (
    NO_COMMAND,
    BrokenLink,
    Cancel,
    CloseTransfer,
    Connect,
    Done,
    Failed,
    Forget,
    MessageDecoder,
    OpenTransfer,
    Ping,
    Prepare,
    RankHello,
    Serve,
    Stop,
    encode,
)
from overfill.errors import InternalError, RequestCancelled, Unavailable
from overfill.kv.puller import DataChannels, LocalPuller
from overfill.kv.ranks import Pull
from overfill.kv.sender import KvSender
from overfill.kv.shm import ShmServer
from overfill.kv.store import DeviceEvent, KvStore
from overfill.kv.streams import TransferStreams, unknown_transfer
from overfill.kv.wire import SERVICE, add_prefill_to_server
from overfill.process.open_files import allow_connections
from overfill.request.params import SamplingParams
from overfill.rpc.constants import MAX_CONNECTIONS
from overfill.rpc.interceptors import Context
from overfill.rpc.server import RpcServer
from overfill.rpc.status import to_bytes
from overfill.rpc.tls import TlsError
from overfill.v1 import prefill_pb2, prefill_pb2_grpc

log = logging.getLogger(__name__)

_CONNECT = 10.0  # seconds
_RECEIVE = 1 << 18  # bytes
_MAX_EARLY = 4096
"""Limit on transfers whose progress is kept before they are opened, and on closed ones that are remembered."""

_News = TypeVar("_News")

MakeProcessor = Callable[[SamplingParams, Sequence[int], Sequence[int]], Processor | None]
"""Makes a processor from a request's parameters, its prompt and the model's end-of-sequence ids."""


@dataclass(slots=True)
class _Early:
    """What the model has done for a transfer before the worker opened it."""

    blocks: dict[int, Sequence[int]] = field(default_factory=dict)  # by the index of the first of them
    ready: dict[int, tuple[int, DeviceEvent | None]] = field(default_factory=dict)  # by layer


@dataclass(frozen=True, slots=True)
class _Transfer:
    sender: KvSender
    streams: TransferStreams
    block_table: list[int]


class RankAgent:
    """Connects to the worker, introduces the rank, and serves the worker's commands until the link closes.

    The constructor blocks until the rank is introduced. If the link closes without a ``Stop``, the worker has ended.
    The process then ends at once too.

    Args:
        config: ``RankLinks.config``, or a mapping with these keys among others.
        hello: what the rank says of itself. With an ``error``, the agent does nothing else.
        store: the rank's blocks. Its chunks name the model's KV heads, of which the store holds ``hello.heads``.
        executor: threads that copy KV.
        make_processor: called on a thread of the agent's own.
        on_orphaned: called in place of the end of the process.

    Attributes:
        hello: the same.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        hello: RankHello,
        store: KvStore | None,
        executor: Executor,
        make_processor: MakeProcessor,
        on_orphaned: Callable[[], object] = lambda: os._exit(1),
    ) -> None:
        self.hello = hello
        self._store = store
        self._executor = executor
        self._make_processor = make_processor
        self._on_orphaned = on_orphaned
        self._compilers = ThreadPoolExecutor(1, "processors")
        self._processors: dict[str, Processor | None] = {}
        self._transfers: dict[bytes, _Transfer] = {}
        self._early: dict[bytes, _Early] = {}
        self._closed: dict[bytes, None] = {}  # transfers, in order of their end
        self._running: dict[int, asyncio.Task[object]] = {}  # commands, by number
        self._server: RpcServer | None = None
        self._channels: DataChannels | None = None
        self._stopped = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Without a timeout yet: with one, a full queue of the worker's socket is an error at once.
        self._socket.connect(f"\0{config['link']}")
        self._socket.settimeout(_CONNECT)
        self._socket.sendall(bytes.fromhex(config["link_token"]) + encode(NO_COMMAND, hello))
        self._socket.setblocking(False)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="rank-agent", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Waits until the link is closed and the agent's thread has ended."""
        self._thread.join()

    # The model's thread -----------------------------------------------------------------------------------------

    def assign(self, blocks: Sequence[tuple[bytes, int, Sequence[int]]]) -> None:
        """Notes blocks of transfers: the id, the index of the first block in the prompt, and the blocks from there on.

        The model's thread calls it before a step that computes into the blocks. vLLM gives a prompt its blocks step by
        step, so that the worker does not know all of them when it opens the transfer.
        """
        self._soon(self._take_blocks, blocks)

    def mark_ready(self, written: Sequence[KvWritten]) -> None:
        """Notes that layers of some transfers are computed; their ids are the transfers' in hexadecimal digits.

        Progress of a transfer that is not open yet is kept. It is dropped when the transfer is closed.
        """
        self._soon(self._take_ready, written)

    def processor(self, key: str) -> Processor | None:
        """Returns what ``Prepare`` has made under ``key``. Raises KeyError if there is none."""
        return self._processors[key]

    def _soon(self, take: Callable[[_News], None], news: _News) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the worker has stopped this rank
            self._loop.call_soon_threadsafe(take, news)

    # The agent's thread -----------------------------------------------------------------------------------------

    def _take_blocks(self, blocks: Sequence[tuple[bytes, int, Sequence[int]]]) -> None:
        for transfer_id, first, more in blocks:
            if (transfer := self._transfers.get(transfer_id)) is not None:
                transfer.block_table[first : first + len(more)] = more
            elif (early := self._early_of(transfer_id)) is not None:
                early.blocks[first] = more

    def _take_ready(self, written: Sequence[KvWritten]) -> None:
        for one in written:
            transfer_id = bytes.fromhex(one.id)
            if (transfer := self._transfers.get(transfer_id)) is not None:
                for layer in one.layers:
                    transfer.sender.mark_ready(layer, one.token_end, one.event)
            elif (early := self._early_of(transfer_id)) is not None:
                early.ready |= dict.fromkeys(one.layers, (one.token_end, one.event))

    def _early_of(self, transfer_id: bytes) -> _Early | None:
        """Returns what is kept for a transfer that is not open; None if it has been closed."""
        if transfer_id in self._closed:
            return None
        early = self._early.setdefault(transfer_id, _Early())
        _forget_oldest(self._early)
        return early

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve_link())
        except Exception:
            log.exception("the rank's agent has failed")
        if not self._stopped:
            self._on_orphaned()
        self._loop.close()

    async def _serve_link(self) -> None:
        """Takes commands until the link closes."""
        reader, self._writer = await asyncio.open_unix_connection(sock=self._socket)
        decoder = MessageDecoder()
        try:
            while data := await reader.read(_RECEIVE):
                for number, command in decoder.feed(data):
                    self._take(number, command)
        except (BrokenLink, OSError) as error:
            log.warning("the link to the worker broke: %s", error)
        finally:
            self._writer.close()

    def _take(self, number: int, command: object) -> None:
        match command:
            case Ping():
                self._answer(number, Done())
            case Cancel(cancelled):
                if (task := self._running.get(cancelled)) is not None:
                    task.cancel()
            case _:
                self._running[number] = task = self._loop.create_task(self._value(number, command))
                task.add_done_callback(partial(self._ended, number))

    def _ended(self, number: int, task: asyncio.Task[object]) -> None:
        """Answers a command whose task has ended."""
        del self._running[number]
        if task.cancelled():
            self._answer(number, Failed(to_bytes(RequestCancelled("the worker has cancelled the command"))))
        elif (error := task.exception()) is not None:
            # The worker prints it: TlsError is no error that travels.
            self._answer(number, Failed(to_bytes(Unavailable(str(error)) if isinstance(error, TlsError) else error)))
        else:
            self._answer(number, Done(task.result()))

    def _answer(self, number: int, body: object) -> None:
        self._writer.write(encode(number, body))

    async def _value(self, number: int, command: object) -> object:
        match command:
            case Serve():
                return await self._serve(command)
            case OpenTransfer():
                self._open(command)
            case CloseTransfer(transfer_id):
                return await self._close(transfer_id)
            case Connect(streams, credentials):
                self._channels = DataChannels(streams, credentials)
            case Pull():
                await self._pull(number, command)
            case Prepare(key, params, prompt, eos_ids):
                make = partial(self._make_processor, params, prompt, eos_ids)
                self._processors[key] = await self._loop.run_in_executor(self._compilers, make)
            case Forget(key):
                self._processors.pop(key, None)
            case Stop():
                await self._stop()
            case _:
                raise InternalError(f"a rank has no command {type(command).__name__}")
        return None

    async def _serve(self, command: Serve) -> str:
        if self._server is not None:
            raise InternalError("the rank serves already")
        allow_connections(MAX_CONNECTIONS)
        server = RpcServer(command.tls, command.max_rpcs, command.access)
        server.add(add_prefill_to_server, _RankPrefill(self._transfers), SERVICE)
        address = await server.start(command.address)
        server.set_ready(True)
        self._server = server
        return address

    def _open(self, command: OpenTransfer) -> None:
        assert self._store is not None
        id = command.spec.transfer_id
        early = self._early.pop(id, _Early())
        table = list(command.block_table)
        for first, blocks in early.blocks.items():
            table[first : first + len(blocks)] = blocks
        sender = KvSender(command.spec, self._store, self._executor)
        # The cached tokens need no event: the worker learns of them after the step that computed them has ended.
        sender.begin(table, command.cached_tokens, None)
        for layer, (token_end, event) in early.ready.items():
            sender.mark_ready(layer, token_end, event)
        self._transfers[id] = _Transfer(sender, TransferStreams(sender, self.hello.heads), table)

    async def _close(self, transfer_id: bytes) -> tuple[int, int]:
        self._early.pop(transfer_id, None)
        self._closed[transfer_id] = None
        _forget_oldest(self._closed)
        if (transfer := self._transfers.pop(transfer_id, None)) is None:
            return 0, 0
        await transfer.streams.join()
        return transfer.sender.first_sent_ns or 0, transfer.sender.last_sent_ns or 0

    async def _pull(self, number: int, command: Pull) -> None:
        if self._store is None or self._channels is None:
            raise InternalError("the rank has not been told how to pull")
        puller = LocalPuller(self._store, self._executor, self._channels, heads=self.hello.heads)
        await puller.pull(command, lambda moved: self._answer(number, moved))

    async def _stop(self) -> None:
        self._stopped = True
        this = asyncio.current_task()
        others = [task for task in self._running.values() if task is not this]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self._server is not None:
            await self._server.stop()
        if self._channels is not None:
            await self._channels.close()
        self._compilers.shutdown(wait=False, cancel_futures=True)


class _RankPrefill(prefill_pb2_grpc.PrefillServicer):
    """The Prefill service of a rank: PullKv alone. The worker has the other RPCs, and payloads always travel."""

    def __init__(self, transfers: Mapping[bytes, _Transfer]) -> None:
        self._transfers = transfers
        self._shm_server = ShmServer(enabled=False)

    async def PullKv(self, request: prefill_pb2.PullKvRequest, context: Context) -> AsyncIterator[bytes]:
        """Yields encoded ``KvChunk``s."""
        if (transfer := self._transfers.get(request.transfer_id)) is None:
            raise unknown_transfer()
        async with aclosing(transfer.streams.serve(request, self._shm_server)) as messages:
            async for message in messages:
                yield message


def _forget_oldest(kept: dict[bytes, Any]) -> None:
    if len(kept) > _MAX_EARLY:
        del kept[next(iter(kept))]
