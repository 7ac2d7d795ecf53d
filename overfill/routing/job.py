"""A request in the router, from the check of its fields to its end."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from overfill.request.thinking import ThinkingTokens
from overfill.routing.tier import DEFAULT_TIER, Adapter, TierChoice
from overfill.routing.worker import Worker
from overfill.v1 import common_pb2, decode_pb2


class JobState(enum.Enum):
    NEW = "new"
    WAITING = "waiting for a decode worker"
    PLACED = "on a decode worker, which is reserving blocks; a prefill slot may be held for a short time"
    WANTS_PREFILL = "blocks reserved, waiting for a prefill slot"
    RUNNING = "on a decode worker, prefill assigned"
    FINISHED = "finished"


class NumScores(NamedTuple):
    """Number of prompt tokens that the workers score, and of alternatives to each."""

    tokens: int
    alternatives: int

    @property
    def logprobs(self) -> int:
        """Number of log-probabilities: each token has its own and those of its alternatives."""
        return self.tokens * (1 + self.alternatives)


class ExpectedKv(NamedTuple):
    """Where the router expects a prefill worker to have, or to get, the KV of a prompt's beginning.

    Attributes:
        memory: leading prompt tokens in the worker's own memory.
        peer, disk: tokens after those that the worker may import from ``holder``, and from its own disk.
        cost: tokens to compute that take as long as importing these and computing the rest; at least 1.
        holder: worker from which to borrow; None if the worker needs none.
        holder_tokens: leading prompt tokens that ``holder`` has.
    """

    memory: int = 0
    peer: int = 0
    disk: int = 0
    cost: int = 1
    holder: Worker | None = None
    holder_tokens: int = 0


@dataclass(eq=False, slots=True, kw_only=True)
class Job:
    """One request in the router. ``validate_generate`` makes it; ``RequestHandler`` adds what that cannot know.

    Once it is submitted, only the dispatcher changes it, except ``emitted``, which the relay sets.

    Attributes:
        start: the request as decode workers get it. It has a prompt of at least one token, the request's id or a
            random one, the model's end-of-sequence ids, and ``sampling`` with ``seed`` and ``max_tokens``. Prompt and
            ``max_tokens`` together fit the context. ``emitted_token_ids`` are the tokens of the answer that the client
            has, at most ``max_tokens``. If it has that many, the answer is complete and only its end message was lost.
            Each attempt sends a copy, in which it sets the fields of the attempt.
        prompt_token_ids: the prompt of ``start``, in a form that Python reads four times as fast.
        stop: non-empty stop strings.
        continues_text: whether the answer continues the prompt's text, so that its first word keeps its space.
        tools: definitions of the tools (``api.tools.ToolDefinition``) that the answer may call.
        answer_digest: digest of what determines the answer, if it may contain tool calls; else None. Two turns of a
            conversation may have one request id, but not one digest. A request that resumes has its first attempt's.
        thinking: how the answer thinks before it answers; None if it only answers.
        stream_interval: minimum number of tokens in a message to the client.
        received: time when the router received the request, seconds on the event loop's clock.
        choice: the tier with which the request was accepted, and why. ``tier`` may have changed since.
        tier: name of the tier whose decode workers write the answer. The dispatcher changes it only to ``fallback``.
        adapter: adapter that writes the answer; only workers that have it are used. None means the decoder alone.
        fallback: name of the tier to which the job goes when its tier has no worker left; empty means none.
        priority: smaller values go first.
        key: API key to whose share the job is charged; "" stands for requests without a key.
        session: session of the client, within the key, to which the job belongs; empty means none.
        api: API of the request, one of ``telemetry.router_metrics.APIS``.
        deadline: seconds on the caller's clock, or None.
        block_keys: returns the keys of the prompt's blocks for a block size (``kv.keys.PromptKeys``). None means
            unknown.
        shared_prompt: hash of the prompt up to ``answer_start``, in whole steps of 64 tokens, so that tasks of one
            prompt have one. None if the full model computes the whole prompt.
        id, prompt_tokens, max_tokens: as in ``start``.
        compiles: True if a decode worker compiles the request's grammar before it reserves blocks.
        emitted: number of answer tokens so far.
        migrated: True once this router has moved the job to another worker or prefills it again; it then goes before
            new work. An answer that a client resumes after losing its router is new here: the router cannot check the
            client's claim.
        charged: tokens charged to the key's share.
        prefilled: True once a decode worker with blocks has a prefill worker for the job: the prompt is computed then.
        waiting_since: time when the job last began to wait for a decode worker, seconds.
        placed_at: time when the job was last placed on a decode worker, seconds; None before.
        decode, prefill: workers on which the job is counted now.
        expected: where ``prefill`` has or gets the prompt's KV; empty while there is no ``prefill``.
        late_prefill: prefill worker whose slot the job gave back, because its decode worker took too long to reserve
            blocks. The decode worker turns to it as soon as it has the blocks.
        avoid: ``Worker.seat`` of the workers that failed the job. The dispatcher tries them again only when no other is
            alive.
    """

    start: decode_pb2.StartDecode
    prompt_token_ids: Sequence[int]
    stop: tuple[str, ...] = ()
    continues_text: bool = False
    tools: Sequence[Any] = ()
    answer_digest: str | None = None
    thinking: ThinkingTokens | None = None
    stream_interval: int = 1
    received: float = 0.0
    choice: TierChoice = field(default_factory=TierChoice)
    tier: str = DEFAULT_TIER
    adapter: Adapter | None = None
    fallback: str = ""
    priority: int = 0
    key: str = ""
    session: str = ""
    api: str = "grpc"
    deadline: float | None = None
    block_keys: Callable[[int], Iterator[int]] | None = None
    shared_prompt: int | None = None
    id: str = field(init=False)
    prompt_tokens: int = field(init=False)
    max_tokens: int = field(init=False)
    compiles: bool = field(init=False)
    emitted: int = field(init=False)
    state: JobState = field(default=JobState.NEW, init=False)
    migrated: bool = field(default=False, init=False)
    charged: int = field(default=0, init=False)
    prefilled: bool = field(default=False, init=False)
    waiting_since: float = field(default=0.0, init=False)
    placed_at: float | None = field(default=None, init=False)
    decode: Worker | None = field(default=None, init=False)
    prefill: Worker | None = field(default=None, init=False)
    expected: ExpectedKv = field(default=ExpectedKv(), init=False)
    late_prefill: Worker | None = field(default=None, init=False)
    avoid: set[tuple[str, int, common_pb2.Stage]] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        start = self.start
        self.id = start.request_id
        self.prompt_tokens = len(self.prompt_token_ids)
        self.max_tokens = start.sampling.max_tokens
        self.compiles = start.sampling.HasField("grammar")
        self.emitted = len(start.emitted_token_ids)

    @property
    def writer(self) -> str:
        """Name of what writes the answer: the adapter or the tier."""
        return self.tier if self.adapter is None else self.adapter.name

    @property
    def total_tokens(self) -> int:
        """Tokens of the sequence at its maximum length.

        They are charged to the key's share on arrival. The unused ones are refunded at the end.
        """
        return self.prompt_tokens + self.max_tokens

    @property
    def reserve_tokens(self) -> int:
        """Tokens for which a decode worker reserves blocks at the start."""
        return self.prompt_tokens + self.emitted + 1

    @property
    def used_tokens(self) -> int:
        """Tokens of ``total_tokens`` used so far. The prompt counts from its first prefill on, answered or not."""
        return self.prompt_tokens + self.emitted if self.prefilled else 0

    @property
    def client_resumed(self) -> bool:
        """True if the client brought the first tokens of the answer with its request."""
        return bool(self.start.emitted_token_ids)

    @property
    def num_scores(self) -> NumScores | None:
        """What the workers score of the prompt; None if they score nothing."""
        if not self.start.sampling.HasField("prompt_logprobs") or self.client_resumed:
            return None
        first = self.start.answer_start if self.start.HasField("answer_start") else 1
        return NumScores(self.prompt_tokens - first, self.start.sampling.prompt_logprobs)

    @property
    def cacheable_tokens(self) -> int:
        """Number of leading prompt tokens that prefill workers take from their prefix cache and put into it."""
        if self.start.HasField("answer_start"):
            return self.start.answer_start
        return self.prompt_tokens if self.num_scores is None else 0

    @property
    def importable_tokens(self) -> int:
        """Number of leading prompt tokens that a prefill worker may import: at least one is left to a model."""
        return min(self.cacheable_tokens, self.prompt_tokens - (not self.start.HasField("answer_start")))

    def sample(self, index: int) -> Job:
        """Returns a copy, made before the start, for answer ``index`` among several to the prompt, with one seed."""
        start = decode_pb2.StartDecode()
        start.CopyFrom(self.start)
        if index:
            start.request_id, start.sample_index = f"{self.id}-{index}", index
        return replace(self, start=start)
