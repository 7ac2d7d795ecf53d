"""The holder's end of a loan: lends cached KV to other workers. Each ``Lend`` RPC is a lease on one prompt's blocks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import AsyncExitStack, aclosing, asynccontextmanager

from overfill.engine.protocol import ServedHalf
from overfill.errors import Incompatible, InvalidRequest, Overloaded, PromptTooLong, Unavailable
from overfill.kv.chunks import TRANSFER_ID_BYTES, TransferSpec
from overfill.kv.keys import is_raw
from overfill.kv.ranks import RankLost
from overfill.kv.sender import KvSender
from overfill.kv.shielded import shielded
from overfill.kv.shm import ShmServer
from overfill.kv.streams import TransferStreams, unknown_transfer
from overfill.request.params import check_token_ids
from overfill.rpc.constants import MAX_LOAN_TIME
from overfill.rpc.interceptors import Context
from overfill.rpc.worker import fill_description
from overfill.telemetry import logs
from overfill.telemetry.metrics import EngineMetrics
from overfill.v1 import prefill_pb2, prefill_pb2_grpc, registry_pb2
from services.engine_loans import EngineLoans
from services.prompt_hasher import PromptHasher

logger = logging.getLogger(__name__)


class Lender:
    """Lends blocks of an engine's prefix cache. It lends while the worker drains, too: then they are wanted most.

    Args:
        loans: asks the engine for the blocks.
        executor: threads that copy KV out of the cache.
        max_loans: maximum number of loans at once; 0 means that the worker lends nothing.
        shm_server: shares memory with borrowers on this host.
        is_lease: whether a transfer id is of a lease. Ranks know leases and loans by this id alone.
    """

    def __init__(
        self,
        served: ServedHalf,
        hello: registry_pb2.Hello,
        loans: EngineLoans,
        executor: Executor,
        max_loans: int,
        shm_server: ShmServer,
        metrics: EngineMetrics,
        is_lease: Callable[[bytes], bool] = lambda transfer_id: False,
    ) -> None:
        self._half = served
        self._hello = hello
        self._loans = loans
        self._executor = executor
        self._max_loans = max_loans
        self._shm_server = shm_server
        self._metrics = metrics
        self._is_lease = is_lease
        self._hasher = PromptHasher(served.blocks_of)
        self._asked: set[bytes] = set()  # transfer ids of all loans
        self._streams: dict[bytes, TransferStreams] = {}  # of those whose blocks this process reads
        self._unreleased: list[AsyncExitStack] = []  # loans whose blocks a rank may still read; the worker ends

    async def serve(
        self, requests: AsyncIterator[prefill_pb2.LendRequest]
    ) -> AsyncGenerator[prefill_pb2.LendResponse, None]:
        """Serves the RPC ``Lend``. At its end, nothing reads the blocks, and the engine has them back.

        Raises:
            InvalidRequest: a field is out of range, or a message is of the wrong kind.
            Incompatible: the worker lends nothing.
            Unavailable: the borrower means an earlier incarnation, or holds the loan for too long.
            Overloaded: the worker has as many loans as it may have.
        """
        first = await anext(aiter(requests), None)
        if first is None or first.WhichOneof("message") != "start":
            raise InvalidRequest("start", "the first message of Lend is StartLend")
        start = first.start
        logs.request_id.set(start.request_id)
        self._check(start)
        self._asked.add(start.transfer_id)
        try:
            # The limit is for the answer, too: a borrower may not read it.
            async with asyncio.timeout(MAX_LOAN_TIME), self._loan(start) as tokens:
                yield prefill_pb2.LendResponse(tokens=tokens)
                if tokens > start.already_held_tokens:
                    await _end_of(requests)
        except TimeoutError:
            raise Unavailable(f"{self._hello.worker_id} lends KV for at most {MAX_LOAN_TIME:g} s") from None
        finally:
            self._asked.discard(start.transfer_id)

    def lends(self, transfer_id: bytes) -> bool:
        """True if a loan has this transfer id."""
        return transfer_id in self._asked

    async def pull(self, request: prefill_pb2.PullKvRequest) -> AsyncGenerator[bytes, None]:
        """Serves ``PullKv`` of a loan: yields encoded ``KvChunk``s. Raises TransferFailed if there is no such loan."""
        if (streams := self._streams.get(request.transfer_id)) is None:
            raise unknown_transfer()
        async with aclosing(streams.serve(request, self._shm_server)) as messages:
            async for message in messages:
                yield message

    def _check(self, start: prefill_pb2.StartLend) -> None:
        worker, length = self._hello.worker_id, len(start.prompt_token_ids)
        if not self._max_loans:
            raise Incompatible(f"{worker} lends no KV", ["lends_kv"])
        if start.expected_incarnation != self._hello.incarnation:
            raise Unavailable(f"{worker} was restarted since the router chose it")
        if len(start.transfer_id) != TRANSFER_ID_BYTES:
            raise InvalidRequest("transfer_id", f"must have {TRANSFER_ID_BYTES} bytes; got {len(start.transfer_id)}")
        if self.lends(start.transfer_id) or self._is_lease(start.transfer_id):
            raise InvalidRequest("transfer_id", "is in use by another loan or lease")
        if length > self._half.max_model_len:
            raise PromptTooLong(
                "prompt_token_ids", f"has {length} tokens; the limit here is {self._half.max_model_len}"
            )
        check_token_ids("prompt_token_ids", start.prompt_token_ids, self._half.config.vocab_size)
        if start.already_held_tokens >= length:
            raise InvalidRequest(
                "already_held_tokens",
                f"must be less than the prompt's {length} tokens; got {start.already_held_tokens}",
            )
        if not is_raw(start.cache_namespace):
            raise InvalidRequest("cache_namespace", "names KV that a codec has changed; only exact KV is lent")
        if len(self._asked) >= self._max_loans:
            raise Overloaded(f"{worker} has {len(self._asked)} loans, which is its maximum")

    @asynccontextmanager
    async def _loan(self, start: prefill_pb2.StartLend) -> AsyncIterator[int]:
        """Provides the number of tokens on loan. Joins every reader before the engine has its blocks back."""
        prompt = await self._hasher.blocks_of(list(start.prompt_token_ids), start.cache_namespace)
        held, kv, ranks = start.already_held_tokens, self._half.kv, self._half.ranks
        async with AsyncExitStack() as stack:
            lent = await stack.enter_async_context(self._loans.lend(prompt, to_peer=True))
            if lent.tokens <= held:
                yield lent.tokens
                return
            spec = TransferSpec(start.transfer_id, 0, kv, tuple(range(kv.num_layers)), (held, lent.tokens))
            sender = KvSender(spec, self._half.store, self._executor)
            sender.begin(lent.blocks, lent.tokens, lent.event)
            streams = TransferStreams(sender)
            try:
                if ranks is None:
                    self._streams[spec.transfer_id] = streams
                else:
                    await ranks.open(spec, lent.blocks, lent.tokens)
                self._metrics.lent(lent.tokens - held)
                yield lent.tokens
            finally:
                self._streams.pop(spec.transfer_id, None)
                try:
                    await shielded(streams.join() if ranks is None else ranks.close(spec.transfer_id))
                except RankLost as error:  # other ranks may still read the blocks
                    logger.error("the blocks of a loan stay in use: %s", error)
                    self._unreleased.append(stack.pop_all())


class LendingServicer(prefill_pb2_grpc.PrefillServicer):
    """What each worker that lends serves of the Prefill service. A decode worker serves nothing else of it."""

    def __init__(self, lender: Lender, served: ServedHalf, hello: registry_pb2.Hello, shm_server: ShmServer) -> None:
        self._lender = lender
        self._half = served
        self._hello = hello
        self._shm_server = shm_server

    async def Describe(
        self, request: prefill_pb2.DescribePrefillRequest, context: Context
    ) -> prefill_pb2.DescribePrefillResponse:
        description = prefill_pb2.DescribePrefillResponse(codecs=self._half.codecs, shm=self._shm_server.offer)
        return fill_description(description, self._hello)

    async def Lend(
        self, request_iterator: AsyncIterator[prefill_pb2.LendRequest], context: Context
    ) -> AsyncIterator[prefill_pb2.LendResponse]:
        async with aclosing(self._lender.serve(request_iterator)) as responses:
            async for response in responses:
                yield response

    async def PullKv(self, request: prefill_pb2.PullKvRequest, context: Context) -> AsyncIterator[bytes]:
        """Yields encoded ``KvChunk``s."""
        async with aclosing(self._lender.pull(request)) as messages:
            async for message in messages:
                yield message


async def _end_of(requests: AsyncIterator[prefill_pb2.LendRequest]) -> None:
    """Waits for the borrower's last message. A borrower that is gone has none."""
    request = await anext(aiter(requests), None)
    if request is not None and request.WhichOneof("message") != "end":
        raise InvalidRequest("message", "only EndLend may follow StartLend")
