"""A modelled prefill worker: schedules as ``engine/prefill.py``. A ``PrefillModel`` gives the time.

A step is one event. The worker knows requests only as tickets, and reports to a ``PrefillListener``.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from overfill.kv.keys import PromptBlocks
from overfill.lab.simulate.blocks import CachedBlocks, KeptBlocks, SharedLink
from overfill.lab.simulate.clock import Clock, Event
from overfill.lab.simulate.profiles import Profile


@dataclass(eq=False, slots=True)
class Ticket:
    """One prompt on a prefill worker; corresponds to the lease of its KV.

    Attributes:
        prompt_tokens, cached, computed: Tokens of the prompt; ``computed`` includes the cached ones.
        shared: The trace's numbers of the prompt's blocks.
        owner: Object that the listener uses to identify the prompt.
        local: True if the answer is written on the same worker, so that no KV is sent.
        holder: Worker that the router has named to borrow KV from; empty without one.
        submitted: Time of its arrival.
        started: True once its first chunk has begun.
        sent: Time at which the KV computed so far has been sent.
        imported: The part of ``cached`` that came from a "peer" or "disk".
        prompt: Its blocks on the worker.
        keys: The routers' keys of its full blocks that other prompts may share.
    """

    id: str
    prompt_tokens: int
    shared: Sequence[int]
    owner: Any
    local: bool = False
    holder: str = ""
    cached: int = 0
    computed: int = 0
    submitted: float = 0.0
    started: bool = False
    sent: float = 0.0
    cancelled: bool = False
    imported: Counter[str] = field(default_factory=Counter)
    prompt: PromptBlocks = field(init=False)
    keys: Sequence[int] = ()

    @property
    def left(self) -> int:
        return self.prompt_tokens - self.computed


class PrefillListener(Protocol):
    def prompt_computed(self, ticket: Ticket) -> None:
        """The prompt is computed and the first token sampled."""

    def kv_sent(self, ticket: Ticket) -> None:
        """All KV of the prompt has been sent; its lease ends."""

    def lender(self, name: str) -> SimPrefill | KeptBlocks | None:
        """Returns the KV that a worker lends; None if it has left."""


class SimPrefill:
    """The engine of a modelled prefill worker.

    Attributes:
        busy: Seconds spent in steps.
        computed: Prompt tokens computed.
        link: The link over which it sends and lends KV.
        waiting: Prompts without blocks, in the order of their arrival.
        running: Prompts that hold blocks and are not computed yet, by ticket.
        on_ready: Called when a step may begin. A worker with both stages replaces it, because its stages take turns.
    """

    def __init__(
        self,
        clock: Clock,
        profile: Profile,
        blocks: CachedBlocks,
        listener: PrefillListener,
        load_changed: Callable[[], object],
        disk: KeptBlocks | None = None,
    ) -> None:
        self._clock, self._profile, self._model = clock, profile, profile.prefill
        self._listener, self._load_changed = listener, load_changed
        self.blocks = blocks
        self.busy = 0.0
        self.computed = 0
        self.queued_tokens = 0
        self.waiting: deque[Ticket] = deque()
        self.running: dict[str, Ticket] = {}
        self._admitted: dict[str, Ticket] = {}  # those that hold blocks: imported, running or being sent
        self._step: Event | None = None
        self._disk = disk
        self.link = SharedLink()
        self.on_ready: Callable[[], object] = self.begin_step

    @property
    def stepping(self) -> bool:
        return self._step is not None

    @property
    def oldest(self) -> Ticket | None:
        """The oldest prompt that holds blocks and is not computed yet."""
        return next(iter(self.running.values()), None)

    @property
    def num_admitted(self) -> int:
        return len(self._admitted)

    @property
    def active(self) -> int:
        return len(self.waiting) + self.num_admitted

    def submit(self, ticket: Ticket) -> None:
        ticket.submitted = self._clock.now
        ticket.prompt = self.blocks.prompt(ticket.prompt_tokens, ticket.shared)
        full = ticket.prompt_tokens // self.blocks.block_size
        ticket.keys = ticket.prompt.keys[: min(full, len(ticket.shared))]
        self.waiting.append(ticket)
        self.queued_tokens += ticket.prompt_tokens
        self.on_ready()
        self._load_changed()

    def cancel(self, ticket: Ticket) -> None:
        """Cancels a prompt. If it is in the running step, it leaves when the step ends."""
        if ticket.cancelled:
            return
        ticket.cancelled = True
        if ticket in self.waiting:
            self.waiting.remove(ticket)
            self.queued_tokens -= ticket.left
        elif ticket.id not in self.running or self._step is None:
            self._drop(ticket)
        self.on_ready()
        self._load_changed()

    def tickets(self) -> list[Ticket]:
        """Returns the tickets on the worker."""
        return [*self.waiting, *self._admitted.values()]

    def kill(self) -> None:
        if self._step is not None:
            self._step.cancel()
        for ticket in self.tickets():
            ticket.cancelled = True

    def check(self) -> None:
        """Raises AssertionError unless the counters agree with the tickets."""
        tokens = sum(ticket.left for ticket in self.tickets())
        if tokens != self.queued_tokens:
            raise AssertionError(f"{tokens} tokens are queued, {self.queued_tokens} counted")
        if not 0 <= self.blocks.used <= self.blocks.total:
            raise AssertionError(f"{self.blocks.used} of {self.blocks.total} blocks used")

    def begin_step(self, max_tokens: int | None = None) -> None:
        """Begins a step of at most ``max_tokens``, unless one runs or there is nothing to compute."""
        if self._step is not None or not self.admit():
            return
        chunks = self._schedule(max_tokens or self._model.max_num_batched_tokens)
        now = self._clock.now
        for ticket, _ in chunks:
            if not ticket.started:
                ticket.started = True
                self._send(ticket, ticket.cached, now)
        seconds = self._model.step_seconds([(ticket.computed, count) for ticket, count in chunks])
        self.busy += seconds
        self._step = self._clock.after(seconds, self._stepped, chunks, now)

    def admit(self) -> bool:
        """Gives blocks to waiting prompts. Returns True if a prompt can be computed."""
        while self.waiting and self.num_admitted < self._model.max_num_seqs:
            ticket = self.waiting[0]
            cached = self.blocks.acquire(ticket.id, ticket.prompt)
            if cached is None:
                break
            self.waiting.popleft()
            ticket.cached = ticket.computed = cached
            self.queued_tokens -= cached
            self._admitted[ticket.id] = ticket
            if not self._import(ticket):
                self.running[ticket.id] = ticket
        return bool(self.running)

    def leading(self, keys: Sequence[int], begin: int) -> int:
        return self.blocks.leading(keys, begin)

    def _import(self, ticket: Ticket) -> bool:
        """Begins to import KV that the worker lacks, where this is quicker. Returns False if it imports nothing."""
        size, now = self.blocks.block_size, self._clock.now
        keys = ticket.keys[: (ticket.prompt_tokens - 1) // size]
        begin, ready = ticket.cached // size, now
        sources = {"disk": self._disk, "peer": self._listener.lender(ticket.holder) if ticket.holder else None}
        per_token = self._profile.import_seconds
        for name in sorted(sources, key=per_token.__getitem__):
            if (source := sources[name]) is None:
                continue
            end = source.leading(keys, begin)
            tokens = (end - begin) * size
            seconds = tokens * per_token[name]
            due = source.link.end(ready, seconds)
            if tokens and due - ready < self._model.step_seconds([(begin * size, tokens)]):
                begin, ready = end, source.link.take(ready, seconds)
                ticket.imported[name] += tokens
        if not ticket.imported:
            return False
        self._clock.at(ready, self._end_import, ticket, begin * size)
        return True

    def _end_import(self, ticket: Ticket, tokens: int) -> None:
        if ticket.cancelled:
            return
        self.running[ticket.id] = ticket
        self.blocks.publish(ticket.id, tokens)
        self.queued_tokens -= tokens - ticket.cached
        ticket.cached = ticket.computed = tokens
        self.on_ready()
        self._load_changed()

    def _schedule(self, left: int) -> list[tuple[Ticket, int]]:
        """Schedules as ``PrefillEngine._schedule``: at least half of the budget for the oldest, then shortest first."""
        oldest, *others = self.running.values()
        share = left if not others or oldest.left <= left else max(1, left // 2)
        counts = {oldest.id: min(share, oldest.left)}
        left -= counts[oldest.id]
        for ticket in sorted(others, key=lambda ticket: ticket.left):
            if not left:
                break
            counts[ticket.id] = min(left, ticket.left)
            left -= counts[ticket.id]
        counts[oldest.id] += min(left, oldest.left - counts[oldest.id])
        return [(self.running[id], count) for id, count in counts.items() if count]

    def _stepped(self, chunks: list[tuple[Ticket, int]], began: float) -> None:
        self._step = None
        now = self._clock.now
        finished: list[Ticket] = []
        for ticket, count in chunks:
            ticket.computed += count
            self.computed += count
            self.queued_tokens -= count
            if ticket.cancelled:
                continue
            self.blocks.publish(ticket.id, ticket.computed)
            self._send(ticket, count, began)
            if ticket.left == 0:
                finished.append(ticket)
                if self._disk is not None:
                    self._disk.keep(ticket.keys)
                if ticket.local:
                    self._drop(ticket)
                    continue
                del self.running[ticket.id]
                # The last layer's KV can be sent only now.
                bandwidth, layers = self._profile.link_bandwidth, self._profile.layers
                last = now + count * self._profile.kv_token_bytes / layers / bandwidth
                self._clock.at(max(last, ticket.sent), self._sent, ticket)
        for ticket in [ticket for ticket in self.running.values() if ticket.cancelled]:
            self._drop(ticket)
        for ticket in finished:
            self._listener.prompt_computed(ticket)
        self.on_ready()
        self._load_changed()

    def _send(self, ticket: Ticket, tokens: int, since: float) -> None:
        """Queues KV of ``tokens`` tokens on the link, from time ``since`` on."""
        if ticket.local:
            return
        seconds = tokens * self._profile.kv_token_bytes / self._profile.link_bandwidth
        ticket.sent = self.link.take(since, seconds)

    def _sent(self, ticket: Ticket) -> None:
        if ticket.cancelled:
            return
        self._drop(ticket)
        self._listener.kv_sent(ticket)
        self.on_ready()
        self._load_changed()

    def _drop(self, ticket: Ticket) -> None:
        if self._admitted.pop(ticket.id, None) is not None:
            self.running.pop(ticket.id, None)
            self.queued_tokens -= ticket.left
            self.blocks.release(ticket.id)
