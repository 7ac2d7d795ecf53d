"""A request as the dispatcher counts it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from overfill.routing.worker import Worker


class JobState(enum.Enum):
    NEW = "new"
    WAITING = "waiting for a decode worker"
    PLACED = "on a decode worker, which is reserving blocks"
    WANTS_PREFILL = "blocks reserved, waiting for a prefill slot"
    RUNNING = "on a decode worker, prefill assigned"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Job:
    """One request as the dispatcher sees it. Only the dispatcher changes it, ``emitted`` apart.

    Attributes:
        id: of the request, for messages.
        prompt_tokens, max_tokens: tokens of the prompt, and most tokens of the answer.
        migrated: whether this router has had it on a worker before; then it goes before new work. What a client says
            that another router has begun is new here: anybody could say so.
        emitted: tokens of the answer so far.
        priority: the smaller goes first.
        key: whose share of the stack it takes; "" is one of them.
        deadline: on the caller's clock, or None.
        block_keys: keys of the prompt's blocks, for a block size (``kv.keys.PromptKeys``); None: not known.
        charged: tokens of its key's share that it was charged with.
        waiting_since: when it last began to wait for a decode worker, seconds.
        decode, prefill: the workers on which it counts now.
        avoid: workers that failed it; tried again only when there is no other.
    """

    id: str
    prompt_tokens: int
    max_tokens: int
    migrated: bool = field(default=False, init=False)
    emitted: int = 0
    priority: int = 0
    key: str = ""
    deadline: float | None = None
    block_keys: Callable[[int], Iterator[int]] | None = None
    state: JobState = JobState.NEW
    charged: int = field(default=0, init=False)
    waiting_since: float = 0.0
    placed_at: float | None = None
    decode: Worker | None = None
    prefill: Worker | None = None
    avoid: set[tuple[str, int]] = field(default_factory=set)

    @property
    def total_tokens(self) -> int:
        """What the sequence takes when it is as long as it may get."""
        return self.prompt_tokens + self.max_tokens

    @property
    def reserve_tokens(self) -> int:
        """What a decode worker reserves before it starts."""
        return self.prompt_tokens + self.emitted + 1

    @property
    def share_tokens(self) -> int:
        """What its key is charged with when it comes; what it did not use is given back when it ends."""
        return self.total_tokens

    @property
    def used_tokens(self) -> int:
        """What it used of that so far: nothing before its first token here."""
        return self.prompt_tokens + self.emitted if self.emitted and self.placed_at is not None else 0
