"""Handles the requests of both protocols: checks them, and starts an answer for each."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from overfill.api.answer_text import AnswerText
from overfill.api.attribution import drop_attribution
from overfill.api.chat import added_by_template, encode_chat
from overfill.api.detokenizer import StreamDetokenizer
from overfill.api.keys import ApiKey
from overfill.api.reasoning import Reasoning
from overfill.api.request_grammar import tried_grammar
from overfill.api.requests import validate_generate
from overfill.api.sessions import session_name
from overfill.api.tokenizer import Tokenizer
from overfill.errors import InvalidRequest
from overfill.kv.keys import PromptKeys, root_key, token_bytes
from overfill.request.params import check_priority, check_token_ids
from overfill.request.trials import Trials
from overfill.routing.async_dispatcher import AsyncDispatcher
from overfill.routing.job import Job
from overfill.routing.relay import Relay
from overfill.telemetry import logs, tracing
from overfill.v1 import inference_pb2
from services.router.quota_hold import QuotaHold
from services.router.running_answer import RunningAnswer
from services.router.served_tiers import ServedTiers
from services.router.shared import Shared
from services.router.statistics import Statistics

T = TypeVar("T")

LONG_REQUEST = 16 << 10
"""Size in bytes from which on a request is tokenized in a thread, so that it does not delay other streams.

What a chat template adds to a chat counts too.
"""


MAX_DETOKENIZED = 262_144
"""Maximum number of token ids that a request to detokenize may have; more would delay other streams."""


_SHARED_PROMPT_STEP = 64
"""``Job.shared_prompt`` is a hash of a multiple of this many tokens. Prompts that differ only behind them share it."""


class RequestHandler:
    """Checks and starts the requests to the tiers of one full model.

    Args:
        tiers: the tiers, and the choice of one for each request.
        trials: tries the grammars of requests.
        drop_attribution: leave Claude Code's attribution line out of prompts; see ``api.attribution``.
        reasoning: how the model marks what it thinks; None if that is not separated from answers.

    Attributes:
        tiers: as the argument.
        tokenizer: the full model's tokenizer.
        statistics: what counts the requests.
        requests: the requests that are not over, of all handlers of the router.
    """

    def __init__(
        self,
        tiers: ServedTiers,
        tokenizer: Tokenizer,
        trials: Trials,
        dispatcher: AsyncDispatcher,
        statistics: Statistics,
        shared: Shared,
        reasoning: Reasoning | None = None,
        *,
        drop_attribution: bool = True,
    ) -> None:
        self.tiers = tiers
        self.tokenizer = tokenizer
        self.statistics = statistics
        self.requests = shared.requests
        self._shared = shared
        self._limits = shared.limits
        self._trials = trials
        self._dispatcher = dispatcher
        self._drop_attribution = drop_attribution
        self._reasoning = reasoning

    async def check(
        self, request: inference_pb2.GenerateRequest, hold: QuotaHold, received: float, time_left: float | None = None
    ) -> Job:
        """Validates ``request`` and returns it ready to start. Checks queues and takes the quota before costly work.

        Args:
            received: arrival time, seconds on the event loop's clock.
            time_left: seconds until the deadline; None without one.

        Raises:
            ShuttingDown, ModelNotFound, PermissionDenied, InvalidRequest, Overloaded: the request is refused.
        """
        self.requests.check_open()
        caller, now = hold.caller, asyncio.get_running_loop().time()
        hold.revision = self.tiers.revision
        choice = self.tiers.requested(request, caller)
        hold.tier = choice.tier
        self.tiers.check_can_score(request, choice, caller)
        size = self._size(request)
        self.shorten(request)
        check_priority(request.priority)
        priority, client_resumes = _priority(request.priority, caller), bool(request.resume_token_ids)
        session = session_name(request.session)

        def admit(tier: str) -> None:
            self._dispatcher.admit(
                tier, priority, _name(caller), time_left, session=session, client_resumes=client_resumes
            )

        choice = self.tiers.admitted(choice, request, caller, admit, now)
        hold.take(now)
        asked, adapter = choice.asked, choice.adapter
        # Parsing a grammar may be slow, also for the grammars of tools.
        with_grammar = request.sampling.HasField("grammar") or bool(request.chat.tools)
        tools = None
        if with_grammar:
            tools = await tried_grammar(request, self._trials, self.tokenizer.tool_format, _name(caller))
        room, vocab_size = self.tiers.max_model_len(asked, adapter), self.tiers.vocab_size
        arguments = (request, self.tokenizer, room, vocab_size, tools, self._reasoning, adapter)
        # In a thread, compute all keys of a long prompt. Elsewhere they are computed as far as a worker has the blocks.
        block_sizes = self.tiers.roster.prefixes.block_sizes if size >= LONG_REQUEST else ()
        prepare = partial(_prepare, self._root_key(caller), block_sizes)
        checked = await self._run(size, prepare, *arguments, in_thread=with_grammar or size >= LONG_REQUEST)
        self.tiers.check_resume(request, choice, checked)
        if choice.tier != asked and checked.total_tokens > self.tiers.max_model_len(choice.tier):
            admit(asked)
            choice = replace(choice, tier=asked, brownout_from="")
        checked.choice, checked.tier, checked.fallback = choice, choice.tier, choice.fallback
        hold.tier = choice.tier
        checked.priority, checked.key, checked.session, checked.api = priority, _name(caller), session, hold.api
        checked.stream_interval = max(self._limits.stream_interval, request.stream_interval)
        deadline = min(received + self._limits.max_time, math.inf if time_left is None else now + time_left)
        checked.received, checked.deadline = received, None if deadline == math.inf else deadline
        if caller is not None:
            checked.start.cache_namespace = caller.cache_namespace
        return checked

    def start(self, request: Job, hold: QuotaHold) -> RunningAnswer:
        """Queues a request and returns its answer. ``hold`` is the one with which the request was checked.

        Raises:
            PromptTooLong, Overloaded, ShuttingDown: the request cannot be queued.
        """
        start = request.start
        logs.request_id.set(request.id)
        tracing.current().set(request_id=request.id, prompt_tokens=request.prompt_tokens)
        relay = Relay(
            request,
            self._dispatcher,
            self._shared.connector,
            max_attempts=self._limits.max_attempts,
            observer=self.statistics.metrics,
            on_close=self.requests.closed,
        )
        digest, format = request.answer_digest, self.tokenizer.tool_format
        text = AnswerText(
            StreamDetokenizer(
                self.tokenizer,
                request.prompt_token_ids if request.continues_text else (),
                None if digest is None else format.shown,
            ),
            request.stop,
            replayed=start.emitted_token_ids,
            tools=None if digest is None else (format, request.tools),
            tool_call_id_seed=f"{digest}/{request.id}/{start.sample_index}",
            min_tokens=start.sampling.min_tokens,
            thinking=request.thinking,
        )
        self.requests.begin(relay, hold)
        self.statistics.accepted(request)
        accepted = inference_pb2.Accepted(
            request_id=request.id,
            prompt_tokens=request.prompt_tokens,
            seed=start.sampling.seed,
            max_tokens=request.max_tokens,
            model=self.tiers.model,
            tier=request.choice.writer,
            brownout_from=request.choice.brownout_from,
        )
        return RunningAnswer(
            relay,
            text,
            accepted,
            self.statistics,
            self._shared.pace,
            on_read=self.requests.read,
            close=self.requests.close,
        )

    async def tokenize(self, request: inference_pb2.TokenizeRequest, hold: QuotaHold) -> list[int]:
        """Returns the token ids of a prompt. Raises the errors of ``check``."""
        self.requests.check_open()
        self.tiers.parse_model(request.model, hold.caller)
        size = self._size(request)
        self.shorten(request)
        kind = request.WhichOneof("prompt")
        if kind is None:
            raise InvalidRequest("prompt", "is missing: give text or chat")
        if kind == "chat":
            # A template may write the JSON of tools with much more white space.
            in_thread = bool(request.chat.tools)
            return await self._charged(size, hold, encode_chat, request.chat, self.tokenizer, in_thread=in_thread)
        encode = self.tokenizer.encode_continuation if request.no_special_tokens else self.tokenizer.encode
        return await self._charged(size, hold, encode, request.text)

    async def detokenize(self, request: inference_pb2.DetokenizeRequest, hold: QuotaHold) -> str:
        """Returns the text of token ids. Raises the errors of ``check``."""
        self.requests.check_open()
        self.tiers.parse_model(request.model, hold.caller)
        size = self._size(request)
        if len(request.ids) > MAX_DETOKENIZED:
            raise InvalidRequest("ids", f"has {len(request.ids)} ids; at most {MAX_DETOKENIZED} are allowed")
        check_token_ids("ids", request.ids, self.tiers.vocab_size)
        return await self._charged(size, hold, self.tokenizer.decode, request.ids)

    def _root_key(self, caller: ApiKey | None) -> int | None:
        """Returns the root of the caller's keys of blocks in prefix caches; None while no prefill worker has joined."""
        worker = next(iter(self.tiers.roster.prefill), None)
        if worker is None:
            return None
        return root_key(worker.info.identity.cache_key, "" if caller is None else caller.cache_namespace)

    async def _charged(
        self,
        size: int,
        hold: QuotaHold,
        function: Callable[..., T],
        *args: object,
        in_thread: bool = False,
    ) -> T:
        """Calls ``function`` as a request of the key. Raises Overloaded if its quota does not admit one."""
        hold.take(asyncio.get_running_loop().time())
        return await self._run(size, function, *args, in_thread=in_thread or size >= LONG_REQUEST)

    async def _run(self, size: int, function: Callable[..., T], *args: object, in_thread: bool) -> T:
        """Calls ``function``, in a thread if it may take so long that other streams would notice."""
        if not in_thread:
            return function(*args)
        executor = self._shared.executor if size >= LONG_REQUEST else self._shared.grammar_executor
        return await executor.run(size, function, *args)

    def shorten(self, request: inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest) -> None:
        """Removes from the prompt what is for others than the model."""
        if self._drop_attribution and request.HasField("chat"):
            drop_attribution(request.chat)

    def _size(
        self, request: inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest | inference_pb2.DetokenizeRequest
    ) -> int:
        """Returns the size of a request in bytes, with what a chat template adds to it. Raises InvalidRequest."""
        size = request.ByteSize()
        if size > self._limits.max_bytes:
            raise InvalidRequest("", f"the request has {size} bytes; the maximum is {self._limits.max_bytes}")
        if not isinstance(request, inference_pb2.DetokenizeRequest) and request.HasField("chat"):
            size += added_by_template(request.chat)
        return int(size)


def _prepare(root: int | None, block_sizes: Iterable[int], *arguments: Any) -> Job:
    """Calls ``validate_generate``, and makes the prompt's keys: those for ``block_sizes`` now, others on first use."""
    checked = validate_generate(*arguments)
    if checked.start.HasField("answer_start"):
        end = checked.start.answer_start
        checked.shared_prompt = hash(token_bytes(checked.prompt_token_ids[: end - end % _SHARED_PROMPT_STEP or end]))
    if root is None:
        return checked
    keys = PromptKeys(root, checked.prompt_token_ids[: checked.cacheable_tokens])
    for size in block_sizes:
        keys.fill(size)
    checked.block_keys = keys
    return checked


def _name(caller: ApiKey | None) -> str:
    return "" if caller is None else caller.name


def _priority(asked: int, caller: ApiKey | None) -> int:
    """Returns the request's priority, but not one before that of its key."""
    return asked if caller is None else max(asked, caller.priority)
