"""One request across its attempts: the relay moves it from decode worker to decode worker until the answer is complete.

Token ids in, token ids out: this module knows no text, stop strings or clients. Emitted tokens are final. A later
attempt sends them to its worker, which continues after them.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Protocol

from overfill.errors import (
    DeadlineExceeded,
    Incompatible,
    InternalError,
    OverfillError,
    Overloaded,
    TransferFailed,
    Unavailable,
)
from overfill.kv.keys import PromptKeys
from overfill.routing.answer import AnswerState, Finish
from overfill.routing.async_dispatcher import AsyncDispatcher, PlacementFuture
from overfill.routing.attempt import Attempt, GaveUp
from overfill.routing.dispatcher import Job
from overfill.routing.stream import DecodeConnector
from overfill.routing.worker import Worker
from overfill.telemetry import tracing
from overfill.v1 import common_pb2, decode_pb2

logger = logging.getLogger(__name__)

RETRIED = (Unavailable, InternalError, TransferFailed, Incompatible, Overloaded)
"""Errors after which the relay tries another decode worker. All other errors end the request."""

_MAX_LOSSES_FACTOR = 8
"""Multiple of ``max_attempts``: total number of lost workers after which a request is given up.

It stops a request that itself crashes the workers.
"""


@dataclass(frozen=True, slots=True)
class RelayRequest:
    """The parts of a request that routing and decode workers need.

    Args:
        sampling: sampling parameters with ``seed`` and ``max_tokens`` set.
        emitted_token_ids: answer tokens that the client already has; at most ``max_tokens``.
        received: time when the router received the request, seconds on the event loop's clock.
        deadline: seconds on the same clock, or None.
        trace: True to request ``Finish.trace``.
        sample_index: index of this answer among several answers to the same prompt.
        codec: encoding of the prompt's KV on the wire; 0 lets the decode worker choose.
        cache_namespace: cache namespace; requests of different namespaces share no cached KV.
        priority, key: rank and API key; see ``Job``.
        block_keys: keys of the prompt's blocks in prefix caches. None means unknown.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    sampling: common_pb2.SamplingParams
    eos_token_ids: tuple[int, ...]
    received: float
    deadline: float | None = None
    emitted_token_ids: tuple[int, ...] = ()
    trace: bool = False
    sample_index: int = 0
    codec: common_pb2.KvCodec = common_pb2.KV_CODEC_UNSPECIFIED
    cache_namespace: str = ""
    priority: int = 0
    key: str = ""
    block_keys: PromptKeys | None = None


class Observer(Protocol):
    """Receives the failures of a request's attempts, for metrics."""

    def attempt_failed(self, error: BaseException) -> None:
        """A decode worker failed the request."""

    def prefill_again(self, reason: decode_pb2.NeedPrefill.Reason) -> None:
        """A decode worker needs the prompt's KV again."""


class _NoObserver:
    def attempt_failed(self, error: BaseException) -> None: ...
    def prefill_again(self, reason: decode_pb2.NeedPrefill.Reason) -> None: ...


class Relay:
    """Runs one request in its own task, independent of how fast the caller reads.

    ::

        relay.start()
        try:
            while not isinstance(event := await relay.answer.next(), Finish): ...
        finally:
            await relay.close()

    Args:
        max_attempts: number of decode workers lost in a row, or of prefill failures in a row, after which the request
            is given up. A new token restarts both counts.
        observer: receives the failures of attempts.

    Attributes:
        answer: the answer so far. Its ``next`` raises DeadlineExceeded, Unavailable if too many workers were lost, or a
            worker's error that another worker would repeat.
        decode_worker: id of the latest decode worker; empty before the first.
    """

    def __init__(
        self,
        request: RelayRequest,
        dispatcher: AsyncDispatcher,
        connector: DecodeConnector,
        *,
        max_attempts: int = 4,
        observer: Observer | None = None,
    ) -> None:
        self._request = request
        self._dispatcher = dispatcher
        self._connector = connector
        self._max_attempts = max_attempts
        self._observer = observer or _NoObserver()
        self._task: asyncio.Task[None] | None = None
        self._opened = 0
        self._job = Job(
            id=request.id,
            prompt_tokens=len(request.prompt_token_ids),
            max_tokens=request.sampling.max_tokens,
            emitted=len(request.emitted_token_ids),
            priority=request.priority,
            key=request.key,
            deadline=request.deadline,
            block_keys=request.block_keys,
        )
        self.answer = AnswerState(request.emitted_token_ids, request.sampling.max_tokens, request.received)
        self.decode_worker = ""

    @property
    def usage(self) -> common_pb2.Usage:
        """Token counts so far. Only ``Finish.usage`` has ``cached_tokens``."""
        return common_pb2.Usage(prompt_tokens=self._job.prompt_tokens, completion_tokens=len(self.answer.emitted))

    @property
    def client_resumed(self) -> bool:
        """True if the client brought the first tokens of the answer with its request."""
        return bool(self._request.emitted_token_ids)

    def start(self) -> None:
        """Queues the request.

        Raises:
            PromptTooLong: no worker can ever hold the request.
            Overloaded: the queue is full.
        """
        if self.answer.full:
            self.answer.end(self._finish(decode_pb2.DecodeDone(reason=common_pb2.FINISH_REASON_LENGTH)))
            return
        placement = self._dispatcher.submit(self._job)
        self._task = asyncio.create_task(self._run(placement), name=f"relay {self._request.id}")

    def abort(self, error: OverfillError) -> None:
        """Ends the request with ``error``."""
        self.answer.end(error)
        if self._task is not None:
            self._task.cancel()

    async def close(self) -> None:
        """Cancels the request here and on the decode worker, and releases its slots."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            # A task that is cancelled before its first step never reaches its own finally.
            self._dispatcher.finish(self._job)

    async def _run(self, placement: PlacementFuture) -> None:
        try:
            async with asyncio.timeout_at(self._request.deadline):
                self.answer.end(await self._answer(placement))
        except TimeoutError:
            self.answer.end(DeadlineExceeded(f"the deadline passed; {self.answer.progress}"))
        except GaveUp as gave_up:
            self.answer.end(gave_up.error)
        except OverfillError as error:
            self.answer.end(error)
        except Exception as error:
            logger.exception("request %s failed in the router", self._request.id)
            self.answer.end(InternalError(f"the router failed: {error}"))
        finally:
            self._job.emitted = len(self.answer.emitted)
            self._dispatcher.finish(self._job)

    async def _answer(self, placement: PlacementFuture) -> Finish:
        losses, consecutive = 0, 0  # lost workers: in total, and since the last new token
        known = len(self.answer.emitted)
        while True:
            with tracing.child("router.queue"):
                worker = await placement
            try:
                done = await self._attempt(worker)
            except RETRIED as error:
                logger.warning("request %s: decode worker %s failed: %s", self._request.id, worker.id, error)
                self._observer.attempt_failed(error)
                losses += 1
                consecutive = 1 if len(self.answer.emitted) > known else consecutive + 1
                known = len(self.answer.emitted)
                if self.answer.full:
                    return self._finish(decode_pb2.DecodeDone(reason=common_pb2.FINISH_REASON_LENGTH))
                if consecutive >= self._max_attempts or losses >= _MAX_LOSSES_FACTOR * self._max_attempts:
                    raise GaveUp(
                        Unavailable(
                            f"gave up after {losses} attempts; {self.answer.progress}; the last failure: {error}"
                        )
                    ) from error
                self._job.emitted = len(self.answer.emitted)
                placement = self._dispatcher.lost(self._job, gone=isinstance(error, Unavailable))
            else:
                if isinstance(done, decode_pb2.DecodeDone):
                    return self._finish(done)
                placement = self._dispatcher.refused(self._job, done.load if done.HasField("load") else None)

    async def _attempt(self, worker: Worker) -> decode_pb2.DecodeDone | decode_pb2.Refused:
        """Runs the request on one worker until the stream ends."""
        self._opened += 1
        self.decode_worker = worker.id
        with tracing.child("router.attempt", "client", worker=worker.id, attempt=self._opened) as span:
            attempt = Attempt(
                self._dispatcher,
                self._job,
                self.answer,
                max_prefill_failures=self._max_attempts,
                on_need_prefill=self._observer.prefill_again,
                span=span,
            )
            done = await attempt.run(self._connector, worker.info, self._start(worker))
            span.set(refused=isinstance(done, decode_pb2.Refused))
            return done

    def _start(self, worker: Worker) -> decode_pb2.StartDecode:
        start = decode_pb2.StartDecode(
            request_id=self._request.id,
            attempt=self._opened - 1,
            expected_incarnation=worker.info.incarnation,
            prompt_token_ids=self._request.prompt_token_ids,
            emitted_token_ids=self.answer.emitted,
            sampling=self._request.sampling,
            eos_token_ids=self._request.eos_token_ids,
            trace=self._request.trace,
            codec=self._request.codec,
            sample_index=self._request.sample_index,
            cache_namespace=self._request.cache_namespace,
            traceparent=tracing.current().traceparent,
        )
        if self._request.deadline is not None:
            left = self._request.deadline - asyncio.get_running_loop().time()
            start.time_left_ns = max(0, round(left * 1e9))
        return start

    def _finish(self, done: decode_pb2.DecodeDone) -> Finish:
        timing = self.answer.timing
        if done.HasField("handoff_exposed_ns"):
            timing.handoff_exposed_ns = done.handoff_exposed_ns
        if done.HasField("decode_ns"):
            timing.decode_ns = done.decode_ns
        # When an assignment and a NeedPrefill cross, only the worker knows which assignment it used.
        self.answer.prefill_worker = done.prefill_worker_id or self.answer.prefill_worker
        usage = self.usage
        usage.cached_tokens = done.usage.cached_tokens
        return Finish(done.reason, usage, done.trace if done.HasField("trace") else None, done.codec)
