"""The life of one request across its attempts, from decode worker to decode worker until the answer is there.

Token ids in, token ids out; text, stop strings and clients are someone else's. Emitted tokens are facts: a
later attempt is told them and goes on behind them.
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
from overfill.routing.answer import Answer, Finish, TokenBatch
from overfill.routing.attempt import Attempt, GaveUp
from overfill.routing.dispatcher import Job
from overfill.routing.gate import Gate, Grant
from overfill.routing.stream import DecodeConnector
from overfill.routing.worker import Worker
from overfill.telemetry import tracing
from overfill.v1 import common_pb2, decode_pb2

logger = logging.getLogger(__name__)

RETRIED = (Unavailable, InternalError, TransferFailed, Incompatible, Overloaded)
"""Errors of a worker, after which another may succeed. All others are the request's own."""

_MOST_LOSSES = 8
"""Times ``max_attempts``: workers that one request may lose altogether, in case that it is the cause."""


@dataclass(frozen=True, slots=True)
class RelayRequest:
    """What a decode worker needs to know.

    Args:
        sampling: with ``seed`` and ``max_tokens`` set.
        emitted_token_ids: tokens of the answer that the client already has; at most ``max_tokens``.
        received: when the router received the request, seconds on the event loop's clock.
        deadline: on the same clock, or None.
        trace: ask for ``Finish.trace``.
        sample_index: which of several answers to the same prompt.
        codec: how the prompt's KV is to travel; 0 leaves it to the decode worker.
        cache_namespace: requests of different namespaces share no cached KV.
        priority, key: whose turn it is; see ``Job``.
        block_keys: names of the prompt's blocks in prefix caches; None: not known.
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
    """Is told of what goes wrong on the way of a request."""

    def attempt_failed(self, error: BaseException) -> None:
        """A decode worker failed the request."""

    def prefill_again(self, reason: decode_pb2.NeedPrefill.Reason) -> None:
        """A decode worker wants the prompt's KV again."""


class _Nobody:
    def attempt_failed(self, error: BaseException) -> None: ...
    def prefill_again(self, reason: decode_pb2.NeedPrefill.Reason) -> None: ...


class Relay:
    """Runs one request in a task of its own; the reader may be as slow as it likes.

    ::

        relay.start()
        try:
            while not isinstance(event := await relay.next(), Finish): ...
        finally:
            await relay.close()

    Args:
        max_attempts: decode workers that may be lost, and prefill workers that may fail, one after the other without
            a new token in between, before the request is given up.
        observer: told of what goes wrong on the way.

    Attributes:
        answer: what is known of the answer.
        decode_worker: id of the latest one; empty before there is one.
    """

    def __init__(
        self,
        request: RelayRequest,
        gate: Gate,
        connector: DecodeConnector,
        *,
        max_attempts: int = 4,
        observer: Observer | None = None,
    ) -> None:
        self._request = request
        self._gate = gate
        self._connector = connector
        self._max_attempts = max_attempts
        self._observer = observer or _Nobody()
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
        self.answer = Answer(request.emitted_token_ids, request.sampling.max_tokens, request.received)
        self.decode_worker = ""

    @property
    def usage(self) -> common_pb2.Usage:
        """Tokens so far; ``cached_tokens`` is known only at the end, from ``Finish.usage``."""
        return common_pb2.Usage(prompt_tokens=self._job.prompt_tokens, completion_tokens=len(self.answer.emitted))

    @property
    def resumed(self) -> bool:
        """Whether the answer's first token was there before the request came."""
        return bool(self._request.emitted_token_ids)

    def start(self) -> None:
        """Queues the request.

        Raises:
            PromptTooLong: no worker could ever hold it.
            Overloaded: the queue is full.
        """
        if self.answer.full:
            self.answer.end(self._finish(decode_pb2.DecodeDone(reason=common_pb2.FINISH_REASON_LENGTH)))
            return
        grant = self._gate.submit(self._job)
        self._task = asyncio.create_task(self._run(grant), name=f"relay {self._request.id}")

    async def next(self) -> TokenBatch | Finish:
        """The tokens that came since the last call, waiting for some; in the end, the Finish.

        Raises:
            DeadlineExceeded: the deadline passed.
            Unavailable: too many workers were lost; the message says how many tokens had been produced.
            OverfillError: a worker's answer that no other worker would change.
        """
        return await self.answer.next()

    def abort(self, error: OverfillError) -> None:
        """Ends the request with ``error``."""
        self.answer.end(error)
        if self._task is not None:
            self._task.cancel()

    async def close(self) -> None:
        """Cancels what still runs, on the decode worker too, and frees every slot."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            # A task that is cancelled before its first step never comes to its own finally.
            self._gate.finish(self._job)

    async def _run(self, grant: Grant) -> None:
        try:
            async with asyncio.timeout_at(self._request.deadline):
                self.answer.end(await self._answer(grant))
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
            self._gate.finish(self._job)

    async def _answer(self, grant: Grant) -> Finish:
        losses, in_vain = 0, 0  # in all, and since the last new token
        known = len(self.answer.emitted)
        while True:
            with tracing.child("router.queue"):
                worker = await grant
            try:
                done = await self._attempt(worker)
            except RETRIED as error:
                logger.warning("request %s: decode worker %s failed: %s", self._request.id, worker.id, error)
                self._observer.attempt_failed(error)
                losses += 1
                in_vain = 1 if len(self.answer.emitted) > known else in_vain + 1
                known = len(self.answer.emitted)
                if self.answer.full:
                    return self._finish(decode_pb2.DecodeDone(reason=common_pb2.FINISH_REASON_LENGTH))
                if in_vain >= self._max_attempts or losses >= _MOST_LOSSES * self._max_attempts:
                    raise GaveUp(
                        Unavailable(f"gave up after {losses} attempts; {self.answer.progress}; the last: {error}")
                    ) from error
                self._job.emitted = len(self.answer.emitted)
                grant = self._gate.lost(self._job, gone=isinstance(error, Unavailable))
            else:
                if isinstance(done, decode_pb2.DecodeDone):
                    return self._finish(done)
                grant = self._gate.refused(self._job, done.load if done.HasField("load") else None)

    async def _attempt(self, worker: Worker) -> decode_pb2.DecodeDone | decode_pb2.Refused:
        """One stream with one worker, to its end."""
        deadline = self._request.deadline
        left = None if deadline is None else max(0.0, deadline - asyncio.get_running_loop().time())
        start = self._start(worker)
        self._opened += 1
        self.decode_worker = worker.id
        with tracing.child("router.attempt", "client", worker=worker.id, attempt=self._opened) as span:
            attempt = Attempt(
                self._connector.open(worker.info, left),
                self._gate,
                self._job,
                self.answer,
                max_prefill_failures=self._max_attempts,
                on_need_prefill=self._observer.prefill_again,
            )
            try:
                done = await attempt.run(start)
            finally:
                await attempt.close()
            span.set(refused=isinstance(done, decode_pb2.Refused))
            return done

    def _start(self, worker: Worker) -> decode_pb2.StartDecode:
        return decode_pb2.StartDecode(
            request_id=self._request.id,
            attempt=self._opened,
            expected_incarnation=worker.info.incarnation,
            prompt_token_ids=self._request.prompt_token_ids,
            emitted_token_ids=self.answer.emitted,
            sampling=self._request.sampling,
            eos_token_ids=self._request.eos_token_ids,
            trace=self._request.trace,
            codec=self._request.codec,
            sample_index=self._request.sample_index,
            cache_namespace=self._request.cache_namespace,
        )

    def _finish(self, done: decode_pb2.DecodeDone) -> Finish:
        timing = self.answer.timing
        if done.HasField("handoff_exposed_ns"):
            timing.handoff_exposed_ns = done.handoff_exposed_ns
        if done.HasField("decode_ns"):
            timing.decode_ns = done.decode_ns
        # Of two assignments that crossed a NeedPrefill, only the worker knows which one it took.
        self.answer.prefill_worker = done.prefill_worker_id or self.answer.prefill_worker
        usage = self.usage
        usage.cached_tokens = done.usage.cached_tokens
        return Finish(done.reason, usage, done.trace if done.HasField("trace") else None, done.codec)
