"""The state of one answer: its tokens, checked on arrival, and the delta of unread ones.

Unread tokens merge into one delta, so a slow reader never delays the worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from overfill.errors import InternalError, InvalidRequest, OverfillError
from overfill.routing.tier import DEFAULT_TIER
from overfill.v1 import common_pb2, decode_pb2, inference_pb2

MAX_ENDED_WORKERS = 2
"""Number of workers that a request may end by failed steps. Lost workers that report no failed step do not count."""


@dataclass(slots=True)
class AnswerDelta:
    """The next part of an answer: its tokens, and their text once ``AnswerText.push`` has added it.

    Attributes:
        first_index: index of ``token_ids[0]`` in the answer.
        logprobs: one entry per token id, or empty.
        text: text that became final with these tokens.
        reasoning: such text that the model thinks before it answers; it is not in ``text`` and precedes it.
        tool_calls: new parts of tool calls; their text is not in ``text``.
        parts: parts of the answer that begin with one of the tokens, if the answer changed its tier there.
        prompt_logprobs: log-probabilities of the prompt's tokens, in the first delta if the request asks for them.
    """

    first_index: int
    token_ids: list[int]
    logprobs: list[common_pb2.TokenLogprobs] = field(default_factory=list)
    text: str = ""
    reasoning: str = ""
    tool_calls: Sequence[inference_pb2.ToolCallDelta] = ()
    parts: Sequence[inference_pb2.AnswerPart] = ()
    prompt_logprobs: common_pb2.PromptLogprobs | None = None

    def extend(self, later: AnswerDelta) -> None:
        """Appends the delta that follows this one."""
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.text += later.text
        self.reasoning += later.reasoning
        self.tool_calls = [*self.tool_calls, *later.tool_calls]
        self.parts = [*self.parts, *later.parts]

    def fill(self, message: inference_pb2.Delta) -> None:
        """Fills in the wire's message; keyword arguments and a copy would cost twice as much."""
        message.first_index = self.first_index
        message.token_ids.extend(self.token_ids)
        if self.text:
            message.text = self.text
        if self.reasoning:
            message.reasoning = self.reasoning
        if self.logprobs:
            message.logprobs.extend(self.logprobs)
        if self.tool_calls:
            message.tool_calls.extend(self.tool_calls)
        if self.parts:
            message.parts.extend(self.parts)
        if self.prompt_logprobs is not None:
            message.prompt_logprobs.CopyFrom(self.prompt_logprobs)

    def to_proto(self) -> inference_pb2.Delta:
        """The delta as the wire's message."""
        message = inference_pb2.Delta()
        self.fill(message)
        return message


def joined(parts: Sequence[AnswerDelta]) -> AnswerDelta:
    """Returns all parts of an answer as one, with one part of each call. It has no log-probabilities."""
    in_calls: dict[int, list[inference_pb2.ToolCallDelta]] = {}
    for call in (call for part in parts for call in part.tool_calls):
        in_calls.setdefault(call.index, []).append(call)
    return AnswerDelta(
        0,
        [token for part in parts for token in part.token_ids],
        text="".join([part.text for part in parts]),
        reasoning="".join([part.reasoning for part in parts]),
        tool_calls=[
            inference_pb2.ToolCallDelta(
                index=index, id=calls[0].id, name=calls[0].name, arguments="".join([c.arguments for c in calls])
            )
            for index, calls in in_calls.items()
        ],
    )


class AnswerState:
    """The tokens of one request across its attempts. It has one writer, which never waits, and one reader.

    Args:
        tier: tier of which the client was told that it writes the answer.
        num_scores: number of log-probabilities of the prompt's tokens, and of alternatives to each, that the first
            token must bring; None if it brings none.
        decoder_first: whether the decode worker samples the first token, and not the prefill worker.

    Attributes:
        emitted: all tokens so far, those that the client brought included; at most ``max_tokens``.
        received: time when the router received the request, seconds on the event loop's clock.
        first_token_at: time when its first new tokens arrived, on the same clock; 0 before.
        parts: the parts of the answer that this router's workers write, one per tier, in order; see ``enter_tier``.
        decode_base: index of the first token that the latest decode worker computes itself; ``timing.decode_ns`` covers
            the tokens from there on.
        timing: times known so far, without ``ttft_ns`` and ``total_ns``. ``return_path_ns`` covers the workers only.
        reservations: number of decode workers that have reserved blocks for the request, one after the other.
        prefill_worker: id of the latest prefill worker; empty before the first.
        prefill_engines: engine of each prefill worker that was assigned to the request, by the worker's id.
        prefill_failures: number of prefill failures since the last new token.
        ended: the end of the answer, once all its tokens have arrived; None before, and after a failure. Its ``usage``
            counts all tokens of the answer, replayed ones included.
    """

    def __init__(
        self,
        emitted: Iterable[int],
        max_tokens: int,
        received: float,
        tier: str = DEFAULT_TIER,
        num_scores: tuple[int, int] | None = None,
        *,
        decoder_first: bool = False,
    ) -> None:
        self.emitted = list(emitted)
        self._num_scores = num_scores  # None once they have arrived
        self.received = received
        self.first_token_at = 0.0
        self.parts: list[inference_pb2.AnswerPart] = []
        self._client_tier = tier  # the tier that the client believes to write the answer
        self._num_before = 0 if decoder_first else 1  # tokens that no decode worker samples
        self.decode_base = self._num_before
        self.timing = common_pb2.Timing()
        self.reservations = 0
        self.prefill_worker = ""
        self.prefill_engines: dict[str, str] = {}
        self.prefill_failures = 0
        self._ended_workers: list[str] = []  # by a failed step with the request in it, as they have said themselves
        self._max_tokens = max_tokens
        self._so_far = decode_pb2.DecodeDone()  # the latest that the current decode worker has said
        self._cached: common_pb2.Usage | None = None  # as the first decode worker has said that said any
        self._so_far_at = self._last_token_at = 0.0  # when it came, and the latest tokens; on the event loop's clock
        self._unread: AnswerDelta | None = None
        self._end: decode_pb2.DecodeDone | OverfillError | None = None
        self._waiter: asyncio.Future[None] | None = None  # of the reader, which waits for a change
        self._loop: asyncio.AbstractEventLoop | None = None  # of the reader

    @property
    def full(self) -> bool:
        """True if the answer has ``max_tokens`` tokens."""
        return len(self.emitted) >= self._max_tokens

    @property
    def unread(self) -> bool:
        """True if ``next`` has tokens, so that it returns them at once."""
        return self._unread is not None

    @property
    def complete(self) -> bool:
        """True if the answer has ended well and all its tokens have been returned."""
        return self._unread is None and isinstance(self._end, decode_pb2.DecodeDone)

    @property
    def ended(self) -> decode_pb2.DecodeDone | None:
        return self._end if isinstance(self._end, decode_pb2.DecodeDone) else None

    def done(self, reason: common_pb2.FinishReason) -> decode_pb2.DecodeDone:
        """Returns what the worker would say if the latest token had ended the answer, as far as it is known."""
        done = decode_pb2.DecodeDone()
        done.CopyFrom(self._so_far)
        done.reason = reason
        if done.HasField("decode_ns"):
            done.decode_ns += max(0, round((self._last_token_at - self._so_far_at) * 1e9))
        return done

    @property
    def cached_tokens(self) -> int:
        """Number of prompt tokens that were in a prefix cache; 0 until a worker has said it.

        The first worker's number stays: later attempts find the blocks that the first one left in the cache.
        """
        return self.cached.cached_tokens

    @property
    def cached(self) -> common_pb2.Usage:
        """``cached_tokens`` and its parts, without the other fields."""
        return common_pb2.Usage() if self._cached is None else self._cached

    def note_usage(self, said: decode_pb2.DecodeDone) -> None:
        """Notes what a decode worker says of the prefix cache; see ``cached_tokens``."""
        if self._cached is None and said.HasField("usage"):
            usage = said.usage
            self._cached = common_pb2.Usage(
                cached_tokens=usage.cached_tokens, peer_tokens=usage.peer_tokens, disk_tokens=usage.disk_tokens
            )

    @property
    def progress(self) -> str:
        """The number of tokens produced, as a phrase for messages."""
        count = len(self.emitted)
        return f"{count} token{'' if count == 1 else 's'} had been produced"

    @property
    def prefill_engine(self) -> str:
        """Engine of the latest prefill worker, for people; empty means unknown."""
        return self.prefill_engines.get(self.prefill_worker, "")

    @property
    def migrations(self) -> int:
        """Number of times the sequence moved to another decode worker."""
        return max(0, self.reservations - 1)

    def begin_attempt(self) -> None:
        """Notes that another decode worker continues the answer. Discards what the previous worker has said."""
        self.decode_base = max(self._num_before, len(self.emitted))
        self._so_far = decode_pb2.DecodeDone()

    def note_ended_worker(self, worker: str, reason: str) -> InvalidRequest | None:
        """Notes that a worker of either stage was ended by a failed step with the request in it, as it says itself.

        Returns:
            The refusal of a request that has ended ``MAX_ENDED_WORKERS`` workers: it would end all others. No client
            repeats such a request by itself.
        """
        self._ended_workers.append(worker)
        if len(self._ended_workers) < MAX_ENDED_WORKERS:
            return None
        return InvalidRequest(
            "",
            f"steps with this request in them failed and ended the workers {' and '.join(self._ended_workers)}, so it "
            f"is not tried again; {self.progress}; the last failure: {reason}",
        )

    def enter_tier(self, tier: str) -> None:
        """Notes that ``tier``, or the adapter of this name, writes the next tokens.

        A part begins unless the last one is of this tier.
        """
        if self.parts and self.parts[-1].first_index == len(self.emitted):
            self.parts.pop()  # that tier has written nothing
        if not self.parts or self.parts[-1].tier != tier:
            self.parts.append(inference_pb2.AnswerPart(tier=tier, first_index=len(self.emitted)))

    def accept(self, tokens: decode_pb2.Tokens, now: float) -> bool:
        """Adds a worker's tokens and returns True if any was new. It drops repeats, which must equal the known tokens.

        Raises:
            InternalError: a gap, a repeat that differs, more than ``max_tokens`` tokens, or log-probabilities that do
                not match the ids or the prompt. Nothing is added.
        """
        # Copies the entries: a reference to one keeps its whole WorkerMessage in memory, all sequences' tokens too.
        ids, logprobs = list(tokens.ids), [_copy(entry) for entry in tokens.logprobs]
        known, first = len(self.emitted), tokens.first_index
        if first > known:
            raise InternalError(f"tokens {known}..{first - 1} of the answer are missing")
        if first + len(ids) > self._max_tokens:
            raise InternalError(f"the worker sent more than max_tokens={self._max_tokens} tokens")
        if logprobs and len(logprobs) != len(ids):
            raise InternalError(f"{len(logprobs)} log-probabilities for {len(ids)} tokens")
        if first < known:
            repeated = self.emitted[first : first + len(ids)]
            if repeated != ids[: len(repeated)]:
                raise InternalError(f"tokens from index {first} on differ from those emitted before")
            ids, logprobs = ids[len(repeated) :], logprobs[len(repeated) :]
        scores = self._scores(tokens)
        if tokens.HasField("so_far"):
            self._so_far.CopyFrom(tokens.so_far)  # a reference would keep the whole WorkerMessage
            self._so_far_at = now
            self.note_usage(tokens.so_far)
        if not ids and scores is None:
            return False
        self._last_token_at = now
        if not self.first_token_at:
            self.first_token_at = now
        self.emitted += ids
        if self._unread is None:
            self._unread = AnswerDelta(known, ids, logprobs, prompt_logprobs=scores)
        else:
            self._unread.token_ids += ids
            self._unread.logprobs += logprobs
        if self.parts and self.parts[-1].tier != self._client_tier:
            self._unread.parts = [*self._unread.parts, self.parts[-1]]
            self._client_tier = self.parts[-1].tier
        self._wake()
        return True

    def _scores(self, tokens: decode_pb2.Tokens) -> common_pb2.PromptLogprobs | None:
        """Returns a copy of the prompt's scores when they arrive. Raises InternalError if they do not match it."""
        if self._num_scores is None:
            return None
        scored, alternatives = self._num_scores
        scores = tokens.prompt_logprobs
        found = (len(scores.logprobs), len(scores.ranks), len(scores.top_ids), len(scores.top_logprobs))
        if found != (scored, scored, scored * alternatives, scored * alternatives):
            raise InternalError(f"the worker sent {found} numbers about a prompt with {scored} tokens to score")
        self._num_scores = None
        copy = common_pb2.PromptLogprobs()
        copy.CopyFrom(scores)
        return copy

    def end(self, end: decode_pb2.DecodeDone | OverfillError) -> None:
        """Ends the answer. Only the first call has an effect."""
        if self._end is None:
            self._end = end
            self._wake()

    async def next(self) -> AnswerDelta | decode_pb2.DecodeDone:
        """Waits for unread tokens and returns them; after the last, returns the end on every call.

        Raises:
            OverfillError: the answer failed; all earlier tokens have been returned.
        """
        while self._unread is None and self._end is None:
            if self._loop is None:
                self._loop = asyncio.get_running_loop()  # asks the kernel for the process each time
            self._waiter = self._loop.create_future()
            await self._waiter
        if self._unread is not None:
            delta, self._unread = self._unread, None
            return delta
        if isinstance(self._end, OverfillError):
            raise self._end
        assert self._end is not None
        return self._end

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _copy(entry: common_pb2.TokenLogprobs) -> common_pb2.TokenLogprobs:
    copy = common_pb2.TokenLogprobs()
    copy.CopyFrom(entry)
    return copy
