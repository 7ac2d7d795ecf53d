"""One attempt at one sequence: an actor between the router, the engine and a prefill worker.

All events of the sequence arrive in one inbox, and the session handles them in order on the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar, assert_never

from overfill.engine.sequence import (
    DecodeSequence,
    FinishReason,
    Preempted,
    Refused,
    Release,
    Reserve,
    Reserved,
    SequenceEvent,
    SequenceFailed,
    Start,
    TokenSampled,
    Yielded,
)
from overfill.errors import Incompatible, InvalidRequest, OverfillError, Overloaded, StepFailed, Unavailable
from overfill.kv.ranks import RankLost
from overfill.kv.receiver import Handoff
from overfill.kv.shielded import shielded
from overfill.request.names import CODEC_NAMES
from overfill.rpc.sequences import ServedSequence
from overfill.telemetry import logs, tracing
from overfill.telemetry.outcomes import outcome_of
from overfill.v1 import common_pb2, decode_pb2
from services.decode.shared_transfers import Deserted, PromptSharing, SharingWorker, TransferLost
from services.messages import tokens_to_proto

_Need = decode_pb2.NeedPrefill
_Token = TypeVar("_Token")


@dataclass(frozen=True, slots=True)
class PullEnded:
    """The outcome of a pull: the prompt's KV is in place, or ``error`` says why not.

    With KV in place, the pull may still wait for the prefill worker's last word, which takes a round trip.
    """

    pull: int  # number of the pull within the session; the session ignores the end of an abandoned one
    worker_id: str
    error: OverfillError | None


Item = (
    SequenceEvent
    | FinishReason
    | decode_pb2.AssignPrefill
    | decode_pb2.Evict
    | decode_pb2.Tokens
    | PullEnded
    | TransferLost
    | Deserted
    | Exception
)
"""What may happen to a sequence. Tokens is the full model's token; FinishReason ends an answer with queued tokens."""


class SequenceWorker(SharingWorker, Protocol):
    """The decode worker, as a session uses it."""

    def load(self) -> decode_pb2.WorkerLoad:
        """Returns the worker's load, which a refusal reports."""
        ...

    def new_handoff(
        self, target: decode_pb2.AssignPrefill, session: SequenceSession
    ) -> AbstractAsyncContextManager[Handoff]:
        """Connects to the assigned prefill worker and makes the handoff of the prompt's KV to the session's blocks."""
        ...

    def own_assignment(self, prompt_tokens: int) -> decode_pb2.AssignPrefill | None:
        """Returns an assignment of this very worker while it must prefill such a prompt for itself.

        That is a worker with both stages that drains. Otherwise returns None.
        """
        ...


class SequenceSession:
    """Runs one attempt at one sequence.

    Args:
        served: the sequence's side of the router's stream. Everything that happens to the sequence goes into its queue
            of commands.
        sequence: the request as the engine takes it.

    Attributes:
        start: the router's request.
        inbox: the queue of commands and events.
        blocks: blocks as last reserved.
        held_tokens: number of leading prompt tokens whose KV is in ``blocks`` already.
    """

    def __init__(self, served: ServedSequence, sequence: DecodeSequence, worker: SequenceWorker) -> None:
        self.start = served.start
        self.sequence = sequence
        self.inbox: asyncio.Queue[Item] = served.commands
        self.blocks: list[int] = []
        self.held_tokens = 0
        self._served = served
        self._worker = worker
        self._metrics = worker.metrics
        self._span = tracing.current()
        self._received_ns = time.monotonic_ns()
        self._emitted = len(sequence.emitted)
        self._first_token: int | None = None
        # What came where the first token would: the full model's part of the prompt's scores, and the prefill's times.
        self._of_prompt = decode_pb2.Tokens()
        self._pull: asyncio.Task[None] | None = None
        self._pulls = 0
        self._sharing = PromptSharing(sequence, worker, self.inbox.put_nowait)
        self._prefill_worker = ""
        self._handoff: Handoff | None = None
        self._cached: common_pb2.Usage | None = None  # tokens that the first prefill did not compute; None before it
        self._codec = common_pb2.KV_CODEC_UNSPECIFIED  # encoding in which the current KV was sent
        self._handoff_unreported = False  # True from a handoff until a token of a decode step has told the router of it
        self._reserved = self._refused = False
        self._failure: BaseException | None = None
        self._wants_kv = False
        self._waiting = False  # True while the session's task waits for an item and handles none
        self._first_known_ns: int | None = None
        # When the session knew that the prompt was computed; without a prefill of its own, when it first had blocks.
        self._prompt_known_ns = self._received_ns
        self._in_place_ns = self._received_ns
        self._first_step_ns: int | None = None

    @property
    def wants_first_token(self) -> bool:
        """True while the full model must sample the answer's first token."""
        return self._emitted == 0 and self.sequence.num_shared == len(self.sequence.prompt)

    @property
    def wants_scores(self) -> bool:
        """True while the full model must score tokens of the prompt: the first token brings the scores."""
        return self._emitted == 0 and self.sequence.sampling.prompt_logprobs is not None

    async def run(self) -> None:
        """Handles events until the attempt ends. Then joins the pull and has the engine release the sequence.

        Raises:
            OverfillError: the attempt failed.
        """
        self._sharing.join()  # before the engine is asked: the transfer may be in place when it has answered
        self._worker.send(Reserve(self.sequence))
        try:
            while not await self._handle(await self._next_item()):
                pass
            if not self._refused:  # the engine counts refusals
                self._metrics.ended(None)
        except (Exception, asyncio.CancelledError) as error:
            self._failure = error
            self._metrics.ended(error)
            raise
        finally:
            try:
                await shielded(self._let_go())
            finally:
                self._worker.send(Release(self.sequence.id))
                self._log()
                # Its traceback has this session: in a cycle, a processor would stay until the garbage is collected.
                self._failure = None

    def take(self, event: SequenceEvent) -> None:
        """Takes an event of the engine. Call it on the event loop; it does not raise.

        A token is told to the router at once, because waking the session's task costs more than the token. When other
        items wait before it, or the task handles one, the token waits its turn.
        """
        if isinstance(event, TokenSampled) and self._is_next:
            self._at_once(self._tell, event)
        else:
            self.inbox.put_nowait(event)

    def take_plain(self, index: int, token: int) -> bool:
        """Takes a token of the engine that is neither the first nor the last, without log-probabilities.

        Returns:
            False if the session must ``take`` it instead. Most tokens take this way, which is the shortest.
        """
        if not (self._waiting and self.inbox.empty()) or self._handoff_unreported or self._first_step_ns is None:
            return False
        self._emitted = index + 1
        try:
            self._served.put_token(index, token)
        except Exception as error:  # a defect of one sequence must not keep the step's tokens from the others
            self.inbox.put_nowait(error)
        return True

    def take_first(self, tokens: decode_pb2.Tokens) -> None:
        """Takes the full model's token, as ``take`` takes those of the engine."""
        if self._is_next:
            self._at_once(self._tell_first, tokens)
        else:
            self.inbox.put_nowait(tokens)

    @property
    def _is_next(self) -> bool:
        """Whether nothing comes before an item that arrives now."""
        return self._waiting and self.inbox.empty()

    def _at_once(self, tell: Callable[[_Token], FinishReason | None], token: _Token) -> None:
        try:
            finish = tell(token)
        except Exception as error:  # as in ``take_plain``
            self.inbox.put_nowait(error)
            return
        if finish is not None:
            self.inbox.put_nowait(finish)

    async def _next_item(self) -> Item:
        self._waiting = True
        try:
            return await self.inbox.get()
        finally:
            self._waiting = False

    def _log(self) -> None:
        outcome = "refused" if self._refused else outcome_of(self._failure)
        logs.ended(
            "decode",
            outcome,
            prompt_tokens=len(self.sequence.prompt),
            completion_tokens=self._emitted,
            attempt=self.start.attempt,
            prefill_worker=self._prefill_worker,
        )

    async def _handle(self, item: Item) -> bool:
        """Handles one event. Returns True when the session is over."""
        match item:
            case Reserved(blocks=blocks, held_tokens=held):
                # vLLM preempts without Preempted. The old blocks' pull may still await the prefill worker's last word.
                self._sharing.leave()
                await self._join_pull(cancel=self._wants_kv)
                self.blocks, self.held_tokens = blocks, held
                self._wants_kv = True
                await self._announce_reservation()
            case Refused(reason=reason) if self._reserved:
                raise Overloaded(reason)  # vLLM had no room when it was to give cached blocks for the sequence's own
            case Refused(reason=reason):
                refused = decode_pb2.Refused(load=self._worker.load(), reason=reason)
                self._served.put(decode_pb2.SequenceUpdate(refused=refused))
                self._refused = True
                return True
            case decode_pb2.AssignPrefill():
                self._begin_pull(item)
            case decode_pb2.Tokens():
                if (finish := self._tell_first(item)) is not None:
                    await self._finish(finish)
                    return True
            case PullEnded() if item.pull != self._pulls or self._pull is None:
                pass
            case PullEnded(worker_id=worker, error=None):
                await self._receive(worker)
                self._begin()
            case PullEnded(worker_id=worker, error=error):
                self._pull = None
                assert error is not None
                self._sharing.fail(worker, error)
                self._ask_again(error, worker)
            case TransferLost():
                if self._sharing.lacks(item.transfer):
                    self._ask_again(item.error, item.worker_id)
            case Deserted():
                pass  # the transfer goes on, because this sequence wants it
            case Preempted():
                self._wants_kv = False
                self._sharing.leave()
                await self._join_pull(cancel=True)
                self._sharing.join()
                self._worker.send(Yielded(self.sequence.id))
            case TokenSampled():
                if (finish := self._tell(item)) is not None:
                    await self._finish(finish)
                    return True
            case FinishReason():
                await self._finish(item)
                return True
            case SequenceFailed():
                if not isinstance(item.error, InvalidRequest):  # as the engine forgets the prompt's full blocks
                    self._sharing.forget()
                item.raise_for("decode")
            case decode_pb2.Evict():
                raise Unavailable(f"evicted by the router: {item.reason}")
            case Exception():
                raise item
            case _:
                assert_never(item)
        return False

    async def _announce_reservation(self) -> None:
        """Takes the prompt's KV if it is here, and tells the router of the new blocks."""
        in_place = await self._sharing.take(self.blocks, self.held_tokens)
        has_prompt = in_place or self._sharing.follows
        if not self._reserved:
            self._tell_reserved(has_prompt)
        elif not has_prompt and self._sharing.received is None:
            self._want_prefill(_Need.REASON_PREEMPTED, "the sequence lost its blocks to an older sequence", "")
        elif not has_prompt:
            self._want_prefill(_Need.REASON_REST, "another sequence's transfer brought less than the prompt", "")
        if in_place:
            self._note_taken()
            self._begin()

    def _tell_reserved(self, has_prompt: bool) -> None:
        self._reserved = True
        self._prompt_known_ns = time.monotonic_ns()
        reservation_ns = self._prompt_known_ns - self._received_ns
        self._metrics.reserved(reservation_ns / 1e9)
        tracing.current().past("decode.reservation", self._received_ns, self._received_ns + reservation_ns)
        # The pull begins first, because the first token waits for it and for nothing else.
        assigned = self.start.assign_prefill if self.start.HasField("assign_prefill") else None
        target = assigned or self._worker.own_assignment(len(self.sequence.prompt))
        if target is not None and not has_prompt:
            self._begin_pull(target)
        reserved = decode_pb2.Reserved(blocks=len(self.blocks), reservation_ns=reservation_ns, has_prompt=has_prompt)
        self._served.put(decode_pb2.SequenceUpdate(reserved=reserved))

    def _begin_pull(self, target: decode_pb2.AssignPrefill) -> None:
        # Ignores an assignment that arrives after the sequence lost its blocks: it will ask again.
        if self._wants_kv and self._pull is None and not self._sharing.follows:
            self._pulls += 1
            self._sharing.lead()
            self._pull = asyncio.ensure_future(self._fetch(target, self._pulls))

    def _ask_again(self, error: OverfillError, worker: str) -> None:
        """Asks for a prefill worker after the handoff from ``worker`` has failed."""
        self._want_prefill(_reason_for(error), str(error), worker, isinstance(error, StepFailed))

    def _want_prefill(
        self, reason: decode_pb2.NeedPrefill.Reason, detail: str, worker: str, step_failed: bool = False
    ) -> None:
        """Asks the router for a prefill worker; while it would assign none, this worker takes the prompt itself."""
        own = self._worker.own_assignment(len(self.sequence.prompt))
        if own is not None and own.worker_id != worker:
            self._begin_pull(own)
            return
        need = decode_pb2.NeedPrefill(reason=reason, detail=detail, worker_id=worker, step_failed=step_failed)
        self._served.put(decode_pb2.SequenceUpdate(need_prefill=need))

    async def _fetch(self, target: decode_pb2.AssignPrefill, pull: int) -> None:
        """Has ``target`` prefill the prompt, and writes its KV into ``blocks``. Puts the outcome into the inbox."""
        in_place = False

        def on_in_place() -> None:
            nonlocal in_place
            in_place = True
            self.inbox.put_nowait(PullEnded(pull, target.worker_id, None))

        try:
            with tracing.child("decode.handoff", "client", worker=target.worker_id) as span:
                async with self._worker.new_handoff(target, self) as handoff:
                    self._handoff = handoff
                    try:
                        # A transfer that others may come to share does not end with this request.
                        timeout = None if self._sharing.is_member else self._served.time_left()
                        await handoff.run(timeout, self.take_first, on_in_place)
                        if not handoff.codec:
                            self._metrics.prefilled_here()
                        elif in_place:
                            self._metrics.handed_over(handoff.codec, handoff.stats)
                    finally:
                        self._note_cached_tokens(handoff)
                        if handoff.codec:
                            self._metrics.received(handoff.codec, handoff.stats)
                            span.set(kv_bytes=handoff.stats.kv_bytes, codec=CODEC_NAMES[handoff.codec])
        except RankLost as failure:  # no other prefill worker can help
            self.inbox.put_nowait(failure)
        except OverfillError as failure:
            self._metrics.handoff_failed(failure)
            if not in_place:  # otherwise the sequence has all that it needs
                self.inbox.put_nowait(PullEnded(pull, target.worker_id, failure))
        except Exception as failure:
            self._metrics.handoff_failed(failure)
            self.inbox.put_nowait(failure)

    def _note_taken(self) -> None:
        """Keeps where the prompt's KV, which was here, has come from, and how long the sequence waited for it."""
        self._wants_kv = False
        if self._cached is None:
            self._cached = common_pb2.Usage(cached_tokens=self.sequence.num_shared)
        if (received := self._sharing.received) is not None:
            self._prefill_worker, self._codec = received.worker_id, received.codec
            waited_ns = max(0, received.known_ns - self._prompt_known_ns)
            self._of_prompt = decode_pb2.Tokens(prefill_compute_ns=waited_ns)
            self._prompt_known_ns += waited_ns

    async def _receive(self, worker: str) -> None:
        """Notes that the pull from ``worker`` has put the prompt's KV in place, and shares the KV."""
        self._note_handoff()
        self._prefill_worker = worker
        self._wants_kv = False
        await self._sharing.give(self.blocks, worker, self._codec, self._prompt_known_ns)

    def _begin(self) -> None:
        """Has the engine run the sequence, whose prompt's KV is in place."""
        self._in_place_ns = time.monotonic_ns()
        self._handoff_unreported = True
        self._worker.send(Start(self.sequence.id, self._first_token))

    async def _let_go(self) -> None:
        """Ends what uses the blocks. A transfer for which others wait ends first."""
        try:
            await self._carry_on()
        finally:
            self._sharing.leave()
            # A pull whose KV is in place ends by itself, so that the prefill worker does not count it as cancelled.
            await self._join_pull(cancel=self._wants_kv or self._failure is not None)

    async def _carry_on(self) -> None:
        """Receives the prompt for the sequences that wait for it, although this one has ended, until none waits."""
        while self._sharing.is_awaited and self._pull is not None and not (self._pull.done() and self.inbox.empty()):
            match await self.inbox.get():
                case PullEnded() as item if item.pull != self._pulls:
                    pass
                case PullEnded(worker_id=worker, error=None):
                    await self._receive(worker)
                case PullEnded(worker_id=worker, error=OverfillError() as error):
                    self._sharing.fail(worker, error)
                    return
                case Preempted() | SequenceFailed() | Exception():
                    return

    async def _join_pull(self, *, cancel: bool) -> None:
        if self._pull is not None:
            if cancel:
                self._pull.cancel()
            await asyncio.wait([self._pull])
            self._pull = None

    def _note_handoff(self) -> None:
        """Keeps the codec of the latest handoff, and its cached tokens if it is the first."""
        if self._handoff is not None:
            self._codec = self._handoff.codec
            self._note_cached_tokens(self._handoff)

    def _note_cached_tokens(self, handoff: Handoff) -> None:
        """Keeps the cached tokens of the first prefill that began: a later one finds the blocks that the first left."""
        stats = handoff.stats
        if self._cached is None and stats.cached_tokens is not None:
            self._cached = common_pb2.Usage(
                cached_tokens=stats.cached_tokens, peer_tokens=stats.peer_tokens, disk_tokens=stats.disk_tokens
            )

    def _tell_first(self, tokens: decode_pb2.Tokens) -> FinishReason | None:
        """Tells the router of the full model's token. Returns the reason if the answer ends with it."""
        if self._emitted or self._handoff is None:  # an earlier prefill of this session has sent it
            return None
        self._note_handoff()
        stats = self._handoff.stats
        known_ns = stats.started_ns + stats.first_token_ns
        if not tokens.ids:  # the decoder samples the first token
            self._of_prompt, self._prompt_known_ns = tokens, known_ns
            return None
        emitted, finish = self.sequence.stop.judge(tokens.ids[0], 0)
        self._first_known_ns = known_ns
        self._span.event("first token")
        self._first_token = tokens.ids[0]
        if emitted:
            self._emitted = 1
        else:
            del tokens.ids[:], tokens.logprobs[:]
        if emitted or tokens.HasField("prompt_logprobs"):
            tokens.return_ns += time.monotonic_ns() - known_ns
            tokens.so_far.CopyFrom(self._so_far())
            self._served.put(decode_pb2.SequenceUpdate(tokens=tokens))
        if finish is not None:
            self._wants_kv = not self._handoff.release()
        return finish

    def _tell(self, event: TokenSampled) -> FinishReason | None:
        """Tells the router of a token of a decode step. Returns the reason if the answer ends with it."""
        if self._first_step_ns is None:
            self._first_step_ns = event.step_started_ns
            known_ns = self._first_known_ns if event.index else self._prompt_known_ns
            if known_ns is not None:
                self._metrics.exposed((self._first_step_ns - known_ns) / 1e9)
        token, scores = event.token, event.scores
        if token is not None:
            self._emitted = event.index + 1
            if event.index and token.logprob is None and not self._handoff_unreported:
                self._served.put_token(event.index, token.token_id)
                return event.finish
        elif scores is None:
            return event.finish
        tokens = decode_pb2.Tokens() if token is None else tokens_to_proto(token, event.index)
        if not event.index:  # the decoder has sampled the first token
            tokens.MergeFrom(self._of_prompt)
            tokens.handoff_ns = max(0, self._in_place_ns - self._prompt_known_ns)
            tokens.first_step_ns = time.monotonic_ns() - self._in_place_ns
            if scores is not None:
                tokens.prompt_logprobs.MergeFrom(scores)
        if self._handoff_unreported or not event.index:
            self._handoff_unreported = False
            tokens.so_far.CopyFrom(self._so_far())
        self._served.put(decode_pb2.SequenceUpdate(tokens=tokens))
        return event.finish

    def _so_far(self) -> decode_pb2.DecodeDone:
        """Returns what ``DecodeDone`` would say now, without a reason."""
        so_far = decode_pb2.DecodeDone(
            usage=common_pb2.Usage(
                prompt_tokens=len(self.sequence.prompt),
                completion_tokens=self._emitted,
            ),
            prefill_worker_id=self._prefill_worker,
            codec=self._codec,
            adapter_digest=self.start.adapter_digest,
        )
        if self._cached is not None:
            so_far.usage.MergeFrom(self._cached)
        if self._first_step_ns is not None:
            so_far.decode_ns = time.monotonic_ns() - self._first_step_ns
            if self._first_known_ns is not None:
                so_far.handoff_exposed_ns = self._first_step_ns - self._first_known_ns
        if self.start.trace and self._handoff is not None:
            so_far.trace.CopyFrom(self._handoff.stats.to_proto())
        return so_far

    async def _finish(self, reason: FinishReason) -> None:
        done = self._so_far()
        done.reason = reason.value
        if self._first_step_ns is not None:
            tracing.current().past("decode.steps", self._first_step_ns, time.monotonic_ns(), tokens=self._emitted)
        if self.start.trace and self._handoff is not None and self._pull is not None and not self._wants_kv:
            await asyncio.wait([self._pull])  # the prefill worker's last word has its half of the trace
            done.trace.CopyFrom(self._handoff.stats.to_proto())
        self._served.put(decode_pb2.SequenceUpdate(done=done))


def _reason_for(error: OverfillError) -> decode_pb2.NeedPrefill.Reason:
    match error:
        case InvalidRequest():
            raise error  # every prefill worker would refuse the request
        case Incompatible():
            return _Need.REASON_INCOMPATIBLE
        case Overloaded():
            return _Need.REASON_PREFILL_REFUSED
        case _:
            return _Need.REASON_PREFILL_FAILED
