"""Runs requests of both protocols: checks them, relays them to workers, and turns tokens into text.

Each answer has its own relay.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from overfill.api.answer_text import AnswerText
from overfill.api.chat import encode_chat
from overfill.api.detokenizer import StreamDetokenizer
from overfill.api.keys import ApiKey
from overfill.api.priority import check_priority
from overfill.api.requests import GenerationRequest, validate_generate
from overfill.api.tokenizer import Tokenizer
from overfill.errors import (
    InvalidRequest,
    OverfillError,
    RequestCancelled,
    ShuttingDown,
)
from overfill.kv.keys import PromptKeys, root_key
from overfill.request.params import check_token_ids
from overfill.routing.admission import KeyLimiter, KeyQuota
from overfill.routing.answer import AnswerDelta, Finish
from overfill.routing.async_dispatcher import AsyncDispatcher
from overfill.routing.pool import Roster
from overfill.routing.relay import Relay
from overfill.routing.rolling_stats import RollingStats
from overfill.routing.signals import Signals
from overfill.routing.stream import DecodeConnector
from overfill.telemetry import logs, tracing
from overfill.telemetry.metrics import RouterMetrics
from overfill.telemetry.outcomes import outcome_of
from overfill.v1 import common_pb2, decode_pb2, inference_pb2
from services.router.pace import Pace
from services.router.served_tiers import ServedTiers, TierChoice

T = TypeVar("T")

LONG_REQUEST = 16 << 10
"""Size in bytes from which on a request is tokenized in a thread, so that it does not delay other streams."""


class StartGeneration(Protocol):
    """Queues a request."""

    def __call__(self, checked: GenerationRequest, received: float, time_left: float | None) -> Generation:
        """
        Args:
            received: arrival time, seconds on the event loop's clock.
            time_left: seconds until the deadline; None without one.

        Raises:
            PromptTooLong, Overloaded: the request cannot be queued.
        """


class Generator:
    """Starts and tracks the requests to the tiers of one full model.

    Args:
        tiers: the tiers, and the choice of one for each request.
        max_attempts: number of workers lost in a row, without a new token, after which a request is given up.
        max_request_bytes: maximum size of a request in bytes.
        max_request_time: maximum duration of a request in seconds, even if its deadline is later.
        stream_interval: minimum number of tokens in a delta, except in the first and the last one.

    Attributes:
        tiers: as the argument.
        tokenizer: the full model's tokenizer.
        rolling_stats: statistics of the last minute.
        pace: the turns in which streams write.
    """

    def __init__(
        self,
        tiers: ServedTiers,
        tokenizer: Tokenizer,
        roster: Roster,
        dispatcher: AsyncDispatcher,
        connector: DecodeConnector,
        metrics: RouterMetrics,
        signals: Signals,
        key_limiter: KeyLimiter,
        *,
        max_attempts: int,
        max_request_bytes: int,
        max_request_time: float = math.inf,
        stream_interval: int = 1,
    ) -> None:
        self.tiers = tiers
        self.tokenizer = tokenizer
        self.metrics = metrics
        self.signals = signals
        self.rolling_stats = RollingStats()
        self.pace = Pace()
        self._roster = roster
        self._dispatcher = dispatcher
        self._connector = connector
        self._max_attempts = max_attempts
        self._max_request_bytes = max_request_bytes
        self._max_request_time = max_request_time
        self._stream_interval = stream_interval
        self._running: dict[Relay, ApiKey | None] = {}
        self._key_limiter = key_limiter
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False

    @property
    def draining(self) -> bool:
        """True once the router refuses new requests."""
        return self._draining

    async def check(
        self,
        request: inference_pb2.GenerateRequest,
        caller: ApiKey | None = None,
        time_left: float | None = None,
        answers: int = 1,
    ) -> GenerationRequest:
        """Validates ``request`` and returns it ready to start. Checks quotas and queues first, before any costly work.

        Args:
            caller: API key of the request; None if the router uses no keys.
            time_left: seconds until the deadline; None without one.
            answers: number of answers to start together. Each counts as a request of the key.

        Raises:
            ShuttingDown, ModelNotFound, PermissionDenied, InvalidRequest, Overloaded: the request is refused.
        """
        with self.metrics.refusing(""):
            self._check_open()
            choice = self.tiers.requested(request, caller)
        with self.metrics.refusing(choice.tier):
            return await self._check(request, choice, caller, time_left, answers)

    async def _check(
        self,
        request: inference_pb2.GenerateRequest,
        choice: TierChoice,
        caller: ApiKey | None,
        time_left: float | None,
        answers: int,
    ) -> GenerationRequest:
        size = request.ByteSize()
        self._check_size(size)
        check_priority(request.priority)
        if caller is not None:
            self._key_limiter.check(caller.id, _quota(caller), asyncio.get_running_loop().time(), answers)
        priority, client_resumes = _priority(request.priority, caller), bool(request.resume_token_ids)

        def admit(tier: str) -> None:
            self._dispatcher.admit(tier, priority, _name(caller), time_left, client_resumes=client_resumes)

        choice = self.tiers.admitted(choice, request, caller, admit, asyncio.get_running_loop().time())
        asked = choice.brownout_from or choice.tier
        arguments = (request, self.tokenizer, self.tiers.max_model_len(asked), self.tiers.vocab_size)
        # Checking a grammar may be slow, also for the grammars of tools.
        slow = request.sampling.HasField("grammar") or request.chat.tools or size >= LONG_REQUEST
        checked = await _run(validate_generate, *arguments, in_thread=bool(slow))
        longest = len(checked.prompt_token_ids) + checked.start.sampling.max_tokens
        if choice.tier != asked and longest > self.tiers.max_model_len(choice.tier):
            admit(asked)
            choice = replace(choice, tier=asked, brownout_from="")
        return replace(checked, **asdict(choice))

    @contextmanager
    def starting(self, caller: ApiKey | None = None, answers: int = 1) -> Iterator[StartGeneration]:
        """Yields a function that queues a request; call it at most ``answers`` times within the block.

        All answers count against the key's quota together, before the first is queued. Those that are not queued
        within the block are released.

        Raises:
            InvalidRequest, Overloaded: the key's quota does not admit this number of answers.
        """
        left = answers
        if caller is not None:
            with self.metrics.refusing(""):
                self._key_limiter.acquire(caller.id, _quota(caller), asyncio.get_running_loop().time(), answers)

        def start(checked: GenerationRequest, received: float, time_left: float | None) -> Generation:
            nonlocal left
            generation = self._start(checked, received, time_left, caller)
            left -= 1
            return generation

        try:
            yield start
        finally:
            for _ in range(left):
                self._release(caller)

    def _start(
        self, checked: GenerationRequest, received: float, time_left: float | None, caller: ApiKey | None
    ) -> Generation:
        start, prompt, key = checked.start, checked.prompt_token_ids, _name(caller)
        prompt_tokens = len(prompt)
        logs.request_id.set(start.request_id)
        tracing.current().set(request_id=start.request_id, prompt_tokens=prompt_tokens)
        now = asyncio.get_running_loop().time()
        if caller is not None:
            start.cache_namespace = caller.cache_namespace
        relay = Relay(
            start,
            self._dispatcher,
            self._connector,
            received=received,
            deadline=self._deadline(received, now, time_left),
            tier=checked.tier,
            fallback=checked.fallback,
            priority=_priority(checked.priority, caller),
            key=key,
            block_keys=self._block_keys(prompt, start.cache_namespace),
            max_attempts=self._max_attempts,
            observer=self.metrics,
        )
        text = AnswerText(
            StreamDetokenizer(self.tokenizer, prompt if checked.continues_text else ()),
            checked.stop,
            replayed=start.emitted_token_ids,
            tool_call_id_seed=f"{start.request_id}/{start.sample_index}" if checked.calls_tools else None,
            min_tokens=start.sampling.min_tokens,
        )
        with self.metrics.refusing(checked.tier):
            relay.start()
        self._running[relay] = caller
        self._idle.clear()
        # The tier that was asked for is what should grow.
        self.signals.arrived(checked.brownout_from or checked.tier, prompt_tokens)
        self.metrics.accepted(prompt_tokens, key)
        if checked.brownout_from:
            self.metrics.brownout(checked.brownout_from, checked.tier)
        if checked.fallback_from:
            self.metrics.fell_back(checked.fallback_from, checked.tier)
        accepted = inference_pb2.Accepted(
            request_id=start.request_id,
            prompt_tokens=prompt_tokens,
            seed=start.sampling.seed,
            max_tokens=start.sampling.max_tokens,
            model=self.tiers.model,
            tier=checked.tier,
            brownout_from=checked.brownout_from,
        )
        return Generation(self, relay, text, accepted, key, max(self._stream_interval, checked.stream_interval))

    async def tokenize(self, request: inference_pb2.TokenizeRequest) -> list[int]:
        """Returns the token ids of a prompt. Raises the errors of ``check``."""
        self._check_open()
        self.tiers.parse_model(request.model)
        self._check_size(request.ByteSize())
        kind = request.WhichOneof("prompt")
        if kind is None:
            raise InvalidRequest("prompt", "is missing: give text or chat")
        long = request.ByteSize() >= LONG_REQUEST
        if kind == "chat":
            return await _run(encode_chat, request.chat, self.tokenizer, in_thread=long)
        encode = self.tokenizer.encode_continuation if request.no_special_tokens else self.tokenizer.encode
        return await _run(encode, request.text, in_thread=long)

    async def detokenize(self, request: inference_pb2.DetokenizeRequest) -> str:
        """Returns the text of token ids. Raises the errors of ``check``."""
        self._check_open()
        self.tiers.parse_model(request.model)
        self._check_size(request.ByteSize())
        check_token_ids("ids", request.ids, self.tiers.vocab_size)
        return await _run(self.tokenizer.decode, request.ids, in_thread=request.ByteSize() >= LONG_REQUEST)

    def drain(self) -> None:
        """Refuses new requests from now on."""
        self._draining = True

    async def wait_idle(self) -> None:
        """Returns once no request runs."""
        await self._idle.wait()

    def abort_all(self, error: OverfillError) -> None:
        """Ends every running request with ``error``."""
        # Ends waiting requests first: each running one that ends frees a slot, which would go to a waiting one.
        for relay in sorted(self._running, key=lambda relay: relay.placed):
            relay.abort(error)

    def close(self, relay: Relay, error: BaseException | None) -> None:
        """Ends ``relay`` and forgets it. ``error`` is the reason, for traces, if the request is not answered."""
        relay.close(error)
        if relay in self._running:
            self._release(self._running.pop(relay))
        if not self._running:
            self._idle.set()

    def _deadline(self, received: float, now: float, time_left: float | None) -> float | None:
        deadline = min(received + self._max_request_time, math.inf if time_left is None else now + time_left)
        return None if deadline == math.inf else deadline

    def _release(self, caller: ApiKey | None) -> None:
        if caller is not None:
            self._key_limiter.release(caller.id)

    def _block_keys(self, prompt: Sequence[int], cache_namespace: str) -> PromptKeys | None:
        """Returns the keys of the prompt's blocks in prefix caches; None while no prefill worker has joined."""
        worker = next(iter(self._roster.prefill), None)
        if worker is None:
            return None
        identity = worker.info.identity
        return PromptKeys(root_key(identity.full_digest, identity.kv.dtype, cache_namespace), prompt)

    def _check_open(self) -> None:
        if self._draining:
            raise ShuttingDown("this router is shutting down")

    def _check_size(self, size: int) -> None:
        if size > self._max_request_bytes:
            raise InvalidRequest("", f"the request has {size} bytes; the maximum is {self._max_request_bytes}")


class Generation:
    """One running answer. Call ``next`` until it returns None, within ``with``; then read ``finished``.

    Attributes:
        accepted: first message to the client.
        rest: text held back until the end, because it might have been part of a stop string; ``finished`` has it too.
    """

    def __init__(
        self,
        generator: Generator,
        relay: Relay,
        text: AnswerText,
        accepted: inference_pb2.Accepted,
        key: str,
        interval: int,
    ) -> None:
        self.accepted = accepted
        self._key = key
        self._interval = interval
        self._failure: BaseException | None = RequestCancelled("the answer was not read to its end")
        self._generator = generator
        self._relay = relay
        self._text = text
        self._handed: AnswerDelta | None = None  # the delta that the caller is handing to the client
        self._handed_at: float | None = None  # time when the previous tokens had been handed to the client
        self._ttft_ns: int | None = None
        self.rest: AnswerDelta | None = None
        self._finished: inference_pb2.Finished | None = None

    @property
    def finished(self) -> inference_pb2.Finished:
        """The end of the answer; available after the last delta."""
        assert self._finished is not None
        return self._finished

    @property
    def complete(self) -> bool:
        """True if the answer has ended well and all its tokens have been returned: ``next`` returns None at once."""
        return self._text.stop is not None or self._relay.answer.complete

    async def next(self) -> AnswerDelta | None:
        """Waits for new tokens and returns all that have arrived, at least ``interval``; None at the end of the answer.

        The first token and the last tokens are returned at once. A call tells that the client has the previous delta.

        Raises:
            OverfillError: the answer failed; all its tokens have been returned.
        """
        if self._handed is not None:
            self._count(self._handed)
            self._handed = None
        if self._text.stop is not None:
            self._finish(None)
            return None
        answer, pace = self._relay.answer, self._generator.pace
        first = self._handed_at is None
        delta: AnswerDelta | None = None
        while True:
            try:
                event = await answer.next()
            except OverfillError as error:
                if delta is not None:
                    break  # the next call raises the error
                self._failure = error
                raise
            if isinstance(event, Finish):
                if delta is not None:
                    break  # the next call returns None
                self._finish(event)
                return None
            part = self._text.push(event)
            if delta is None:
                delta = part
            else:
                delta.extend(part)
            if self._text.stop is not None:
                # Stop the worker now, before the client has read this delta.
                self._relay.close()
                break
            if first:
                break
            if pace.paused:
                await pace.resumed()
            if len(delta.token_ids) >= self._interval and not answer.unread:
                break
        pace.writing()
        self._handed = delta
        return delta

    def _count(self, handed: AnswerDelta) -> None:
        generator, last, relay = self._generator, self._handed_at, self._relay
        now = self._handed_at = asyncio.get_running_loop().time()
        tier = relay.tier
        generator.metrics.tokens(len(handed.token_ids), None if last is None else now - last, self._key, tier)
        generator.rolling_stats.tokens(len(handed.token_ids), now)
        # An answer that a client resumes has its first token already, so it has no TTFT.
        if last is None and not relay.client_resumed:
            self._ttft_ns = _nanoseconds_since(relay.answer.received)
            tracing.current().event("first token")
            if relay.answer.timing.HasField("return_path_ns"):
                relay.answer.timing.return_path_ns += _nanoseconds_since(relay.answer.first_token_at)

    def _finish(self, finish: Finish | None) -> None:
        generator, relay, text = self._generator, self._relay, self._text
        if finish is not None:
            self.rest = text.finish()
        relay.close()
        self._finished = _finished(relay, text, self.rest, finish, self._ttft_ns)
        self._failure = None
        generator.metrics.answered(self._finished, self._finished.parts[-1].tier)
        tracing.current().set(completion_tokens=text.num_tokens, migrations=self._finished.migrations)
        now = asyncio.get_running_loop().time()
        generator.signals.finished(self._finished, now)
        generator.rolling_stats.answered(self._finished, now)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._generator.close(self._relay, self._failure)
        self._generator.metrics.ended(self._failure, self._relay.tier)
        self._log()

    def _log(self) -> None:
        relay = self._relay
        timing = common_pb2.Timing() if self._finished is None else self._finished.timing
        logs.ended(
            "router",
            outcome_of(self._failure),
            request_id=self.accepted.request_id,
            prompt_tokens=self.accepted.prompt_tokens,
            completion_tokens=self._text.num_tokens,
            ttft=timing.ttft_ns / 1e9,
            total=_nanoseconds_since(relay.answer.received) / 1e9,
            prefill_worker=relay.answer.prefill_worker,
            decode_worker=relay.decode_worker,
            migrations=relay.answer.migrations,
            tier=relay.tier,
        )


async def _run(function: Callable[..., T], *args: Any, in_thread: bool) -> T:
    """Calls ``function``, in a thread if it may take so long that other streams would notice."""
    return await asyncio.to_thread(function, *args) if in_thread else function(*args)


def _name(caller: ApiKey | None) -> str:
    return "" if caller is None else caller.name


def _quota(caller: ApiKey) -> KeyQuota:
    return KeyQuota(caller.name, caller.rate, caller.concurrency)


def _priority(asked: int, caller: ApiKey | None) -> int:
    """Returns the request's priority, but not one before that of its key."""
    return asked if caller is None else max(asked, caller.priority)


def choices(checked: GenerationRequest, count: int) -> list[GenerationRequest]:
    """Returns ``count`` requests for different answers to one prompt, with the same seed."""
    requests = [checked]
    for index in range(1, count):
        start = decode_pb2.StartDecode()
        start.CopyFrom(checked.start)
        start.request_id, start.sample_index = f"{start.request_id}-{index}", index
        requests.append(replace(checked, start=start))
    return requests


def _finished(
    relay: Relay, text: AnswerText, rest: AnswerDelta | None, finish: Finish | None, ttft_ns: int | None
) -> inference_pb2.Finished:
    if finish is None:  # a stop string ended the answer before the worker did
        finish = Finish(common_pb2.FINISH_REASON_STOP, relay.usage)
    parts = relay.answer.parts or [inference_pb2.AnswerPart(tier=relay.tier, first_index=len(relay.answer.emitted))]
    if text.stop is not None:
        # The client gets no tokens behind the stop string, so it does not matter which tier wrote them.
        parts = parts[:1] + [part for part in parts[1:] if part.first_index < text.num_tokens]
    reason = finish.reason if text.stop is None else common_pb2.FINISH_REASON_STOP
    if reason == common_pb2.FINISH_REASON_STOP and text.called_tools:
        reason = common_pb2.FINISH_REASON_TOOL_CALLS
    finished = inference_pb2.Finished(
        reason=reason,
        usage=finish.usage,
        timing=relay.answer.timing,
        prefill_worker=relay.answer.prefill_worker,
        decode_worker=relay.decode_worker,
        migrations=relay.answer.migrations,
        stop=text.stop or "",
        rest=None if rest is None else rest.to_proto(),
        trace=finish.trace,
        codec=finish.codec,
        prefill_engine=relay.answer.prefill_engine,
        decode_engine=relay.decode_engine,
        parts=parts,
    )
    finished.usage.completion_tokens = text.num_tokens
    if ttft_ns is not None:
        finished.timing.ttft_ns = ttft_ns
    finished.timing.total_ns = _nanoseconds_since(relay.answer.received)
    return finished


def _nanoseconds_since(then: float) -> int:
    return round((asyncio.get_running_loop().time() - then) * 1e9)
