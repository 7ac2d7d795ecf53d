"""Imports KV of a prompt's beginning instead of computing it: from another worker's cache, or from disk.

``Importer`` decides by measured times, and bounds them. It knows token ids and blocks, but no engine and no sockets.
Every failure is a miss: what is not imported is computed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from overfill.errors import OverfillError
from overfill.kv.disk import DiskTier
from overfill.kv.keys import PromptBlocks
from overfill.kv.ranks import RankLost
from overfill.rpc.constants import MAX_IMPORT_TIME
from overfill.telemetry.metrics import PrefillMetrics
from overfill.telemetry.outcomes import outcome_of
from overfill.v1 import kv_pb2, prefill_pb2, registry_pb2

MIN_IMPORT_TIME = 1.0
"""Seconds that every import may take. Opening connections to a new holder takes part of a second on a busy machine."""

RETRY_AFTER = 10.0
"""Seconds for which a holder that has failed is not asked again. Routers learn in this time that it has gone."""

RATE_LIFETIME = 60.0
"""Seconds after which a measured rate is forgotten, so that a source that was slow is tried again."""

LOAN_OVERHEAD = 0.005
"""Seconds of a loan that do not depend on its tokens: two round trips and four wake-ups."""

_FADING = 0.8
"""What is left of a measured rate's weight at the next measurement."""

Holder = tuple[str, int]
"""Worker id and incarnation."""

logger = logging.getLogger(__name__)


Borrow = Callable[[kv_pb2.KvHolder, prefill_pb2.StartLend, Sequence[int]], Awaitable[int]]
"""``kv.borrowing.Borrower.borrow``."""


@dataclass(slots=True)
class Imports:
    """The first ``tokens`` tokens of a prompt are in its blocks.

    Attributes:
        peer_tokens, disk_tokens: tokens among them that came from another worker, and from disk.
    """

    tokens: int = 0
    peer_tokens: int = 0
    disk_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ImportRequest:
    """A prompt whose KV is incomplete.

    Attributes:
        prompt_blocks: the full blocks of ``prompt``, with its cache namespace.
        blocks: blocks of the prompt, which hold its first ``cached_tokens`` tokens.
        holder: worker that has more, as the router says; None means none.
    """

    request_id: str
    prompt: Sequence[int]
    prompt_blocks: PromptBlocks
    blocks: Sequence[int]
    cached_tokens: int
    holder: kv_pb2.KvHolder | None


class SourceCost:
    """Seconds per token of a source: an average that weighs imports by their tokens, and fades."""

    def __init__(self) -> None:
        self._seconds = self._tokens = 0.0
        self.measured_at = 0.0  # time.monotonic()

    def note(self, seconds: float, tokens: int) -> None:
        """Adds an import of ``tokens`` tokens, more than 0, that took ``seconds``."""
        self._seconds = _FADING * self._seconds + seconds
        self._tokens = _FADING * self._tokens + tokens
        self.measured_at = time.monotonic()

    @property
    def seconds_per_token(self) -> float:
        """0 means unknown."""
        fresh = self._tokens and time.monotonic() - self.measured_at < RATE_LIFETIME
        return self._seconds / self._tokens if fresh else 0.0


class Importer:
    """Imports KV into the blocks of prompts. Use it on the event loop; several imports may run at once.

    Args:
        itself: this worker, which is never asked.
        block_size: tokens per block.
        token_seconds: returns the seconds that computing a token takes; 0 means unknown.
        borrow: takes KV from other workers; None means that the worker does not borrow.
        disk: KV on disk; None means that there is none.
    """

    def __init__(
        self,
        itself: Holder,
        block_size: int,
        token_seconds: Callable[[], float],
        borrow: Borrow | None,
        disk: DiskTier | None,
        metrics: PrefillMetrics,
    ) -> None:
        self._itself = itself
        self._block_size = block_size
        self._token_seconds = token_seconds
        self._borrow = borrow
        self._disk = disk
        self._metrics = metrics
        self._of_peers, self._of_disk = SourceCost(), SourceCost()
        self._rates: dict[Holder, SourceCost] = {}
        self._failed: dict[Holder, float] = {}  # until this time.monotonic()

    def may_import(self, holder: kv_pb2.KvHolder | None, prompt: PromptBlocks) -> bool:
        """Whether a prompt that is assigned with this holder may find KV to import. If not, the engine need not wait.

        Any block on disk counts: those before it may be in memory.
        """
        on_disk = self._disk is not None and any(key in self._disk.keys for key in prompt.keys)
        return on_disk or self._may_ask(holder) is not None

    @property
    def costs(self) -> registry_pb2.KvCosts:
        """What KV of a token costs, computed and imported."""
        sources = self._of_peers.seconds_per_token, self._of_disk.seconds_per_token
        seconds = self._token_seconds(), *sources
        compute, peer, disk = (round(1e9 * each) for each in seconds)
        return registry_pb2.KvCosts(compute_ns=compute, peer_ns=peer, disk_ns=disk)

    def note_computed(self, prompt: PromptBlocks) -> None:
        """Offers the KV of a computed prompt to the disk."""
        if self._disk is not None:
            self._disk.save(prompt)

    async def run(self, request: ImportRequest) -> Imports:
        """Imports as much of the prompt as is sooner there than computed, except for its last token.

        On return, also by a cancellation, nothing writes to the blocks. It takes at most as long as computing the
        tokens twice, but 1 s in any case, and never more than ``MAX_IMPORT_TIME``.

        Raises:
            RankLost: a rank of this worker has gone, and others may still write. Every other failure is a miss.
        """
        done = Imports(request.cached_tokens)
        wanted = (len(request.prompt) - 1) // self._block_size * self._block_size
        deadline = asyncio.get_running_loop().time() + self._time_limit(wanted - done.tokens)
        peer = self._may_ask(request.holder)
        peer_seconds = self._rates[peer].seconds_per_token if peer in self._rates else 0.0
        disk_first = self._of_disk.seconds_per_token <= peer_seconds
        for source in [self._read, self._ask] if disk_first else [self._ask, self._read]:
            if asyncio.get_running_loop().time() < deadline:  # else the second source would count as too slow
                await source(request, done, wanted, deadline)
        return done

    async def _ask(self, request: ImportRequest, done: Imports, wanted: int, deadline: float) -> None:
        """Borrows what the holder has beyond ``done``, if that is sooner."""
        holder, key = request.holder, self._may_ask(request.holder)
        if holder is None or key is None or self._borrow is None:
            return
        rate = self._rates.get(key) or SourceCost()
        hoped = min(wanted, holder.tokens // self._block_size * self._block_size) - done.tokens
        if not self._pays(hoped, rate.seconds_per_token, LOAN_OVERHEAD):
            return
        start = prefill_pb2.StartLend(
            request_id=request.request_id,
            prompt_token_ids=request.prompt,
            cache_namespace=request.prompt_blocks.cache_namespace,
            already_held_tokens=done.tokens,
        )
        began = time.monotonic()
        outcome, tokens = await self._bounded("peer", self._borrow(holder, start, request.blocks), deadline)
        gained, took = max(0, tokens - done.tokens), time.monotonic() - began
        if gained:
            seconds = max(0.0, took - LOAN_OVERHEAD)
            rate.note(seconds, gained)
            self._of_peers.note(seconds, gained)
            self._rates = {other: kept for other, kept in self._rates.items() if kept.seconds_per_token} | {key: rate}
        elif outcome != "ok":
            now = time.monotonic()
            self._failed = {other: until for other, until in self._failed.items() if until > now}
            self._failed[key] = now + RETRY_AFTER
        done.tokens += gained
        done.peer_tokens += gained
        self._metrics.imported("peer", outcome, gained, took)

    async def _read(self, request: ImportRequest, done: Imports, wanted: int, deadline: float) -> None:
        """Reads what the disk has beyond ``done``, if that is sooner."""
        if self._disk is None or self._disk.hangs or done.tokens >= wanted:
            return
        begin, end = done.tokens // self._block_size, wanted // self._block_size
        known = min(end - begin, self._disk.known(request.prompt_blocks, begin))
        hoped = max(1, known) * self._block_size  # looking for one that another worker has written is cheap
        if not self._pays(hoped, self._of_disk.seconds_per_token, 0.0):
            return
        began = time.monotonic()
        left = deadline - asyncio.get_running_loop().time()
        read = self._disk.read(request.prompt_blocks, request.blocks, begin, end, left)
        outcome, blocks = await self._bounded("disk", read, None)  # it keeps what it has read until then
        gained, took = blocks * self._block_size, time.monotonic() - began
        if took >= left and took > hoped * self._of_disk.seconds_per_token:
            self._of_disk = SourceCost()  # reads were quicker before; this one was given up, and would take longer
            self._of_disk.note(took, hoped)
        elif gained:
            self._of_disk.note(took, gained)
        done.tokens += gained
        done.disk_tokens += gained
        if known or gained:
            self._metrics.imported("disk", outcome, gained, took)

    async def _bounded(self, source: str, fetching: Awaitable[int], deadline: float | None) -> tuple[str, int]:
        """Awaits ``fetching``, until ``deadline`` if any. Returns its outcome and its result: 0 if it failed."""
        try:
            async with asyncio.timeout_at(deadline):
                return "ok", await fetching
        except RankLost:
            raise
        except TimeoutError:
            logger.warning("an import from %s took too long; the prompt is computed", source)
            return "deadline", 0
        except OverfillError as error:
            logger.warning("an import from %s failed, and the prompt is computed: %s", source, error)
            return outcome_of(error), 0
        except Exception:
            logger.exception("an import from %s failed, and the prompt is computed", source)
            return "internal", 0

    def _may_ask(self, holder: kv_pb2.KvHolder | None) -> Holder | None:
        """Returns the key of a holder that may be asked now; otherwise None."""
        if holder is None or self._borrow is None:
            return None
        key = holder.worker_id, holder.incarnation
        return None if key == self._itself or self._failed.get(key, 0.0) > time.monotonic() else key

    def _pays(self, tokens: int, seconds_per_token: float, overhead: float) -> bool:
        """Whether to import ``tokens`` tokens instead of computing them. A source with an unknown rate is tried."""
        computing = tokens * self._token_seconds()
        known = computing > 0 and seconds_per_token > 0
        return tokens > 0 and (not known or overhead + tokens * seconds_per_token < computing)

    def _time_limit(self, tokens: int) -> float:
        """Seconds that an import of ``tokens`` tokens may take."""
        return min(MAX_IMPORT_TIME, max(MIN_IMPORT_TIME, 2 * tokens * self._token_seconds()))
