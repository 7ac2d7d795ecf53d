"""Answers requests in this process, on the engine of a worker with both stages. No sockets, no text."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from overfill.engine.colocated import ColocatedEvent
from overfill.engine.load import LoadedColocated
from overfill.engine.sequence import (
    DecodeSequence,
    FinishReason,
    Preempted,
    PrefillHere,
    PrefillSequence,
    PromptComputed,
    Refused,
    Release,
    Reserve,
    Reserved,
    SequenceFailed,
    Start,
    StepSampled,
    Yielded,
)
from overfill.errors import Overloaded
from overfill.model.steps import SampledToken


@dataclass(slots=True, eq=False)
class OfflineRequest:
    """A request on its way through both engines, with one sequence object in each.

    Attributes:
        cached_tokens: prompt tokens that the first prefill found in the prefix cache. None means it has not ended.
    """

    index: int
    decode: DecodeSequence
    cached_tokens: int | None = None
    prefill: PrefillSequence | None = None
    answer: list[SampledToken] = field(default_factory=list)
    finish: FinishReason | None = None


class OfflineRun:
    """Sends requests to the engines of ``loaded``, and steps them. Requests may arrive at any time.

    Each run makes new engines, because they hold no state besides requests. Only the prefix cache outlives it.

    Args:
        on_token: called with the request and each token of its answer as it is sampled.
    """

    def __init__(
        self,
        loaded: LoadedColocated,
        on_token: Callable[[OfflineRequest, SampledToken], None] | None,
    ) -> None:
        self._on_token = on_token
        self._events: deque[ColocatedEvent] = deque()
        self._engine = loaded.new_core(lambda events: None, self._events.extend)
        self._requests: dict[str, OfflineRequest] = {}  # unfinished, by the id of the decode sequence
        self._prompts: dict[str, OfflineRequest] = {}  # being computed, by the id of the prompt
        self._waiting: deque[OfflineRequest] = deque()

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    def add(self, request: OfflineRequest) -> None:
        """Queues a request, which a later step starts."""
        self._requests[request.decode.id] = request
        self._waiting.append(request)

    def step(self) -> None:
        """Admits as many waiting requests as fit, then steps one of the two engines.

        Raises:
            Overloaded: nothing runs and the oldest request does not fit.
            InvalidRequest, InternalError: a step failed. The requests are lost; the caller may only call ``close``.
        """
        moved = self._admit()
        moved |= self._engine.step()
        moved |= self._answer_events()
        if self._requests and not moved:
            raise Overloaded("the KV cache is too small for a request; give more kv_memory")

    def close(self) -> None:
        """Drops every request and frees its blocks; the KV of computed prompts stays in the prefix cache.

        Raises:
            AssertionError: a block is lost.
        """
        for id in (*self._prompts, *self._requests):
            self._engine.handle(Release(id))
        self._prompts.clear()
        self._requests.clear()
        self._waiting.clear()
        self._engine.check()

    def _admit(self) -> bool:
        """Reserves blocks for waiting requests in order of arrival, without overtaking.

        Returns True if a request got blocks.
        """
        moved = False
        while self._waiting:
            first = self._waiting[0]
            self._engine.handle(Reserve(first.decode))
            self._answer_events()
            if self._waiting and self._waiting[0] is first:
                break
            moved = True
        return moved

    def _answer_events(self) -> bool:
        """Answers the engines' events. Returns True if one made progress."""
        moved = False
        while self._events:
            event = self._events.popleft()
            self._answer(event)
            moved |= not isinstance(event, Refused)
        return moved

    def _answer(self, event: ColocatedEvent) -> None:
        match event:
            case Reserved(id=id, held_tokens=held):
                self._prefill(self._requests[id], held)
            case Preempted(id=id):
                request = self._requests[id]
                if request.prefill is not None:
                    self._drop_prompt(request.prefill)
                self._engine.handle(Yielded(id))
            case PromptComputed(id=id, first=first):
                self._start(self._prompts.pop(id), first)
            case StepSampled():
                for one in event.by_sequence():
                    self._accept(self._requests[one.id], one.token, one.finish)
            case SequenceFailed(id=id):
                event.raise_for("prefill" if id in self._prompts else "decode")
            case _:
                pass

    def _prefill(self, request: OfflineRequest, held_tokens: int) -> None:
        """Computes the prompt of a request that has blocks for its first time, or again after a preemption."""
        if self._waiting and self._waiting[0] is request:
            self._waiting.popleft()
        decode, first = request.decode, not request.answer
        request.prefill = PrefillSequence(
            secrets.token_hex(8),
            decode.prompt,
            decode.sampling,
            sample_first_token=first,
            processor=decode.processor if first else None,
        )
        self._prompts[request.prefill.id] = request
        self._engine.handle(PrefillHere(request.prefill, decode.id, held_tokens))

    def _drop_prompt(self, prompt: PrefillSequence) -> None:
        """Releases a prompt, which may have been computed before."""
        self._prompts.pop(prompt.id, None)
        self._engine.handle(Release(prompt.id))

    def _start(self, request: OfflineRequest, first: SampledToken | None) -> None:
        """Judges the full model's token and starts the decoder on the prompt's KV."""
        decode, prompt = request.decode, request.prefill
        if request.cached_tokens is None and prompt is not None:
            request.cached_tokens = prompt.cached_tokens
        if first is not None:
            emitted, finish = decode.stop.judge(first.token_id, 0)
            self._accept(request, first if emitted else None, finish)
        self._engine.handle(
            Start(decode.id, request.answer[0].token_id) if request.finish is None else Release(decode.id)
        )

    def _accept(self, request: OfflineRequest, token: SampledToken | None, finish: FinishReason | None) -> None:
        if token is not None:
            request.answer.append(token)
            if self._on_token is not None:
                self._on_token(request, token)
        if finish is not None:
            request.finish = finish
            del self._requests[request.decode.id]
