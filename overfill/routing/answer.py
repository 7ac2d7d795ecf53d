"""What is known of an answer: its tokens, checked as they come, and the reader's share of them.

Between a worker and a reader of any speed, tokens that are not read yet merge into one batch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

from overfill.errors import InternalError, OverfillError
from overfill.v1 import common_pb2, decode_pb2, kv_pb2


@dataclass(slots=True)
class TokenBatch:
    """Consecutive tokens of an answer.

    Attributes:
        first_index: index in the answer of ``ids[0]``.
        received_at: when the oldest of them came from the worker, seconds on the event loop's clock.
        logprobs: one per id, or empty.
    """

    first_index: int
    received_at: float
    ids: list[int] = field(default_factory=list)
    logprobs: list[common_pb2.TokenLogprobs] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Finish:
    """How an answer ended; ``usage.completion_tokens`` counts all of it, replayed tokens included."""

    reason: common_pb2.FinishReason
    usage: common_pb2.Usage
    trace: kv_pb2.HandoffTrace | None = None
    codec: common_pb2.KvCodec = common_pb2.KV_CODEC_UNSPECIFIED


class Answer:
    """The tokens of one request across its attempts. One writer that never waits, one reader.

    Attributes:
        emitted: every token so far, those that the client brought included; at most ``max_tokens``.
        received: when the router received the request, seconds on the event loop's clock.
        timing: what is known so far; never ``ttft_ns`` and ``total_ns``; ``return_path_ns`` is the workers'
            part.
        reservations: decode workers that have reserved blocks for it, one after the other.
        prefill_worker: id of the latest one; empty before there is one.
        prefill_failures: times a prefill worker failed it since the last new token.
    """

    def __init__(self, emitted: Iterable[int], max_tokens: int, received: float) -> None:
        self.emitted = list(emitted)
        self.received = received
        self.timing = common_pb2.Timing()
        self.reservations = 0
        self.prefill_worker = ""
        self.prefill_failures = 0
        self._max_tokens = max_tokens
        self._unread: TokenBatch | None = None
        self._end: Finish | OverfillError | None = None
        self._changed = asyncio.Event()

    @property
    def full(self) -> bool:
        """Whether it has all the tokens it may have."""
        return len(self.emitted) >= self._max_tokens

    @property
    def progress(self) -> str:
        """For messages: how far it came."""
        count = len(self.emitted)
        return f"{count} token{'' if count == 1 else 's'} had been produced"

    @property
    def migrations(self) -> int:
        """Times the sequence moved to another decode worker."""
        return max(0, self.reservations - 1)

    def accept(self, tokens: decode_pb2.Tokens, now: float) -> bool:
        """Adds a worker's tokens; those already known are dropped when they are the same. Whether any was new.

        Raises:
            InternalError: a gap, a repeat that differs, more than ``max_tokens``, or log-probabilities that
                do not match the ids. Nothing is added then.
        """
        known = len(self.emitted)
        repeated = self.emitted[tokens.first_index : tokens.first_index + len(tokens.ids)]
        if tokens.first_index > known:
            raise InternalError(f"tokens {known}..{tokens.first_index - 1} of the answer are missing")
        if repeated != list(tokens.ids[: len(repeated)]):
            raise InternalError(f"tokens from {tokens.first_index} on differ from those emitted before")
        if tokens.first_index + len(tokens.ids) > self._max_tokens:
            raise InternalError(f"the worker sent more than {self._max_tokens} tokens")
        if tokens.logprobs and len(tokens.logprobs) != len(tokens.ids):
            raise InternalError(f"{len(tokens.logprobs)} log-probabilities for {len(tokens.ids)} tokens")
        fresh = tokens.ids[len(repeated) :]
        if not fresh:
            return False
        self.emitted.extend(fresh)
        if self._unread is None:
            self._unread = TokenBatch(known, now)
        self._unread.ids.extend(fresh)
        self._unread.logprobs.extend(tokens.logprobs[len(repeated) :])
        self._changed.set()
        return True

    def end(self, end: Finish | OverfillError) -> None:
        """Says how it ended; the first word counts."""
        if self._end is None:
            self._end = end
            self._changed.set()

    async def next(self) -> TokenBatch | Finish:
        """The unread tokens, waiting for some; after the last of them the end, again and again.

        Raises:
            OverfillError: the answer failed; all tokens before were delivered.
        """
        while self._unread is None and self._end is None:
            self._changed.clear()
            await self._changed.wait()
        if self._unread is not None:
            batch, self._unread = self._unread, None
            return batch
        if isinstance(self._end, OverfillError):
            raise self._end
        assert self._end is not None
        return self._end
