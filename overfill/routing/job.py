"""What the dispatcher knows of a request."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from overfill.routing.tier import DEFAULT_TIER
from overfill.routing.worker import Worker
from overfill.v1 import common_pb2


class JobState(enum.Enum):
    NEW = "new"
    WAITING = "waiting for a decode worker"
    PLACED = "on a decode worker, which is reserving blocks; a prefill slot may be held for a short time"
    WANTS_PREFILL = "blocks reserved, waiting for a prefill slot"
    RUNNING = "on a decode worker, prefill assigned"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Job:
    """One request in the dispatcher. Only the dispatcher changes it, except ``emitted``, which the relay sets.

    Attributes:
        id: request id, for messages.
        prompt_tokens, max_tokens: number of prompt tokens, and maximum number of answer tokens.
        tier: name of the tier that writes the answer. The dispatcher changes it only to ``fallback``.
        fallback: name of the tier to which the job goes when its tier has no worker left; empty means none.
        migrated: True once this router has moved the job to another worker or prefills it again; it then goes before
            new work. An answer that a client resumes after losing its router is new here: the router cannot check the
            client's claim.
        emitted: number of answer tokens so far.
        priority: smaller values go first.
        key: API key to whose share the job is charged; "" stands for requests without a key.
        deadline: seconds on the caller's clock, or None.
        compiles: True if a decode worker compiles the request's grammar before it reserves blocks.
        block_keys: returns the keys of the prompt's blocks for a block size (``kv.keys.PromptKeys``). None means
            unknown.
        charged: tokens charged to the key's share.
        prefilled: True once a decode worker with blocks has a prefill worker for the job: the prompt is computed then.
        waiting_since: time when the job last began to wait for a decode worker, seconds.
        placed_at: time when the job was last placed on a decode worker, seconds; None before.
        decode, prefill: workers on which the job is counted now.
        late_prefill: prefill worker whose slot the job gave back, because its decode worker took too long to reserve
            blocks. The decode worker turns to it as soon as it has the blocks.
        avoid: ``Worker.seat`` of the workers that failed the job. The dispatcher tries them again only when no other is
            alive.
    """

    id: str
    prompt_tokens: int
    max_tokens: int
    tier: str = DEFAULT_TIER
    fallback: str = ""
    migrated: bool = field(default=False, init=False)
    emitted: int = 0
    priority: int = 0
    key: str = ""
    deadline: float | None = None
    compiles: bool = False
    block_keys: Callable[[int], Iterator[int]] | None = None
    state: JobState = JobState.NEW
    charged: int = field(default=0, init=False)
    prefilled: bool = field(default=False, init=False)
    waiting_since: float = 0.0
    placed_at: float | None = None
    decode: Worker | None = None
    prefill: Worker | None = None
    late_prefill: Worker | None = field(default=None, init=False)
    avoid: set[tuple[str, int, common_pb2.Stage]] = field(default_factory=set, init=False)

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
