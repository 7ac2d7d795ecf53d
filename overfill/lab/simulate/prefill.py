"""A modelled prefill worker: schedules as ``engine/prefill.py``. A ``PrefillModel`` gives the time.

A step is one event. The worker knows requests only as tickets, and reports to a ``PrefillListener``.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from overfill.kv.keys import PromptBlocks
from overfill.lab.simulate.blocks import CachedBlocks, KeptBlocks, SharedBlocks
from overfill.lab.simulate.clock import Clock, Event
from overfill.lab.simulate.profiles import Profile
from overfill.v1 import decode_pb2


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
    sent: float = 0.0
    cancelled: bool = False
    imported: Counter[str] = field(default_factory=Counter)
    prompt: PromptBlocks = field(init=False)
    keys: Sequence[int] = ()

    @property
    def left(self) -> int:
        return self.prompt_tokens - self.computed


class PrefillListener(Protocol):
    clock: Clock

    def prompt_computed(self, ticket: Ticket) -> None:
        """The prompt is computed and the first token sampled."""

    def kv_sent(self, ticket: Ticket) -> None:
        """All KV of the prompt has been sent; its lease ends."""

    def lender(self, name: str) -> SharedBlocks | None:
        """Returns the KV that a worker lends; None if it has left, or without a name."""


class SimPrefill:
    """The engine of a modelled prefill worker.

    Attributes:
        blocks: Its memory, from which it sends and lends KV.
        busy: Seconds spent in steps.
        computed: Prompt tokens computed.
        waiting: Prompts without blocks, in the order of their arrival.
        admitted: Prompts that hold blocks: those that are imported, running or being sent.
        running: Prompts that hold blocks and can be computed, oldest first.
        on_load: Called when a report of the load would change.
        on_step: Called at the end of a step with its tokens and seconds.
        on_ready: Called when a step may begin. A worker with both stages replaces it, because its stages take turns.
    """

    def __init__(
        self, profile: Profile, blocks: CachedBlocks, listener: PrefillListener, disk: KeptBlocks | None = None
    ) -> None:
        self._clock, self._profile, self._model, self._listener = listener.clock, profile, profile.prefill, listener
        self.blocks = blocks
        self.busy = 0.0
        self.computed = 0
        self.waiting: deque[Ticket] = deque()
        self.admitted: dict[Ticket, None] = {}
        self.running: dict[Ticket, None] = {}
        self._taken = (0, 0.0)
        self._step: Event | None = None
        self._disk = disk
        self.on_load: Callable[[], object] = lambda: None
        self.on_step: Callable[[int, float], object] = lambda tokens, seconds: None
        self.on_ready: Callable[[], object] = self.begin_step

    @property
    def stepping(self) -> bool:
        return self._step is not None

    @property
    def tickets(self) -> list[Ticket]:
        """The tickets on the worker."""
        return [*self.waiting, *self.admitted]

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens that are not computed yet."""
        return sum(ticket.left for ticket in self.tickets)

    def submit(self, ticket: Ticket) -> None:
        ticket.submitted = self._clock.now
        ticket.prompt = self.blocks.prompt(ticket.prompt_tokens, ticket.shared)
        full = ticket.prompt_tokens // self.blocks.block_size
        ticket.keys = ticket.prompt.keys[: min(full, len(ticket.shared))]
        self.waiting.append(ticket)
        self.on_ready()
        self.on_load()

    def cancel(self, ticket: Ticket) -> None:
        """Cancels a prompt. If it is in the running step, it leaves when the step ends."""
        if ticket.cancelled:
            return
        ticket.cancelled = True
        if ticket in self.waiting:
            self.waiting.remove(ticket)
        elif ticket not in self.running or self._step is None:
            self._drop(ticket)
        self.on_ready()
        self.on_load()

    def take_work(self) -> tuple[int, float]:
        """Returns the prompt tokens computed and the seconds spent in steps since the last call."""
        (tokens, seconds), self._taken = self._taken, (self.computed, self.busy)
        return self.computed - tokens, self.busy - seconds

    def load(self) -> decode_pb2.WorkerLoad:
        cache = self.blocks.cache
        return decode_pb2.WorkerLoad(
            kv_blocks_used=cache.num_used,
            kv_blocks_cached=cache.num_cached,
            kv_blocks_total=cache.pool.num_blocks,
            block_size=self.blocks.block_size,
            running=len(self.admitted),
            waiting=len(self.waiting),
            queued_tokens=self.queued_tokens,
        )

    def kill(self) -> None:
        if self._step is not None:
            self._step.cancel()
        for ticket in self.tickets:
            ticket.cancelled = True

    def check(self) -> None:
        """Raises AssertionError if blocks are in use that belong to no prompt."""
        cache = self.blocks.cache
        if cache.num_leaked or (cache.num_used and not self.admitted):
            raise AssertionError(f"{cache.num_used} blocks are used, of which {cache.num_leaked} belong to no prompt")

    def begin_step(self, max_tokens: int | None = None) -> None:
        """Begins a step of at most ``max_tokens``, unless one runs or there is nothing to compute."""
        if self._step is not None or self.admit() is None:
            return
        chunks = self._schedule(max_tokens or self._model.max_num_batched_tokens)
        now = self._clock.now
        for ticket, _ in chunks:
            if ticket.computed == ticket.cached:  # its first step: what is cached can be sent now
                self._send(ticket, ticket.cached, now)
        seconds = self._model.step_seconds([(ticket.computed, count) for ticket, count in chunks])
        self.busy += seconds
        self._step = self._clock.after(seconds, self._stepped, chunks, now, seconds)

    def admit(self) -> Ticket | None:
        """Gives blocks to waiting prompts. Returns the oldest prompt that can be computed; None without any."""
        while self.waiting and len(self.admitted) < self._model.max_num_seqs:
            ticket = self.waiting[0]
            cached = self.blocks.acquire(ticket.id, ticket.prompt)
            if cached is None:
                break
            self.waiting.popleft()
            ticket.cached = ticket.computed = cached
            self.admitted[ticket] = None
            if not self._import(ticket):
                self.running[ticket] = None
        return next(iter(self.running), None)

    def _import(self, ticket: Ticket) -> bool:
        """Begins to import KV that the worker lacks, where this is quicker. Returns False if it imports nothing."""
        size, now = self.blocks.block_size, self._clock.now
        keys = ticket.keys[: (ticket.prompt_tokens - 1) // size]
        begin, ready = ticket.cached // size, now
        sources = {"disk": self._disk, "peer": self._listener.lender(ticket.holder)}
        per_token = self._profile.import_seconds
        for name in sorted(sources, key=per_token.__getitem__):
            if (source := sources[name]) is None:
                continue
            end = source.leading(keys, begin)
            tokens = (end - begin) * size
            seconds = tokens * per_token[name]
            due = source.transfer_end(ready, seconds)
            if tokens and due - ready < self._model.step_seconds([(begin * size, tokens)]):
                begin, ready = end, source.transfer(ready, seconds)
                ticket.imported[name] += tokens
        if not ticket.imported:
            return False
        self._clock.at(ready, self._end_import, ticket, begin * size)
        return True

    def _end_import(self, ticket: Ticket, tokens: int) -> None:
        if ticket.cancelled:
            return
        self.running[ticket] = None
        self.blocks.publish(ticket.id, tokens)
        ticket.cached = ticket.computed = tokens
        self.on_ready()
        self.on_load()

    def _schedule(self, left: int) -> list[tuple[Ticket, int]]:
        """Schedules as ``PrefillEngine._schedule``: at least half of the budget for the oldest, then shortest first."""
        oldest, *others = self.running
        share = left if not others or oldest.left <= left else max(1, left // 2)
        counts = {oldest: min(share, oldest.left)}
        left -= counts[oldest]
        for ticket in sorted(others, key=lambda ticket: ticket.left):
            counts[ticket] = min(left, ticket.left)
            left -= counts[ticket]
        counts[oldest] += min(left, oldest.left - counts[oldest])
        return [(ticket, count) for ticket, count in counts.items() if count]

    def _stepped(self, chunks: list[tuple[Ticket, int]], began: float, seconds: float) -> None:
        self._step = None
        tokens = sum(count for _, count in chunks)
        self.computed += tokens
        self.on_step(tokens, seconds)
        finished: list[Ticket] = []
        for ticket, count in chunks:
            ticket.computed += count
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
                del self.running[ticket]
                # The last layer's KV can be sent only now.
                layer_bytes = count * self._profile.kv_token_bytes / self._profile.layers
                last = self._clock.now + layer_bytes / self._profile.link_bandwidth
                self._clock.at(max(last, ticket.sent), self._sent, ticket)
        for ticket in [ticket for ticket in self.running if ticket.cancelled]:
            self._drop(ticket)
        for ticket in finished:
            self._listener.prompt_computed(ticket)
        self.on_ready()
        self.on_load()

    def _send(self, ticket: Ticket, tokens: int, since: float) -> None:
        """Queues KV of ``tokens`` tokens on the link, from time ``since`` on."""
        if not ticket.local:
            seconds = tokens * self._profile.kv_token_bytes / self._profile.link_bandwidth
            ticket.sent = self.blocks.transfer(since, seconds)

    def _sent(self, ticket: Ticket) -> None:
        if ticket.cancelled:
            return
        self._drop(ticket)
        self._listener.kv_sent(ticket)
        self.on_ready()
        self.on_load()

    def _drop(self, ticket: Ticket) -> None:
        """Takes the blocks of a prompt back, if it holds any."""
        self.admitted.pop(ticket, None)
        self.running.pop(ticket, None)
        self.blocks.cache.release(ticket.id)
