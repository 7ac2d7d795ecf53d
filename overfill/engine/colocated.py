"""Runs both engines of a pair in one process, in turn; requests may arrive at any time. No sockets, no text."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from overfill.engine.build import EngineParts
from overfill.engine.decode import DecodeEngine
from overfill.engine.prefill import PrefillEngine
from overfill.engine.sequence import (
    DecodeEvent,
    DecodeSequence,
    FinishReason,
    Preempted,
    PrefillEvent,
    PrefillSequence,
    PromptComputed,
    Refused,
    Release,
    Reserve,
    Reserved,
    SequenceFailed,
    Start,
    Submit,
    TokenSampled,
    Yielded,
)
from overfill.errors import InternalError, InvalidRequest, Overloaded
from overfill.kv.cache import copy_sequence
from overfill.kv.prefix import PrefixCache
from overfill.model.processors import new_processor
from overfill.model.sampling import SampledToken


@dataclass(slots=True, eq=False)
class ColocatedRequest:
    """A request on its way through both engines, with one sequence object in each.

    Attributes:
        cached_tokens: prompt tokens that the first prefill found in the prefix cache. None means it has not ended.
        blocks: the sequence's blocks in the decode engine.
    """

    index: int
    decode: DecodeSequence
    cached_tokens: int | None = None
    blocks: list[int] = field(default_factory=list)
    prefill: PrefillSequence | None = None
    answer: list[SampledToken] = field(default_factory=list)
    finish: FinishReason | None = None


class Colocated:
    """Drives both engines of a pair in turn: one step of the prefill engine, then one of the decode engine.

    Each ``Colocated`` makes new engines, because they hold no state besides requests. Only ``prefix`` outlives it: KV
    of prompts, computed by the full model. It holds nothing that the decoder wrote.

    Args:
        prefix: prefix cache on the full model's pool.
        max_num_batched_tokens: maximum number of prompt tokens, or replayed tokens, in one step.
        max_num_seqs: maximum number of sequences in each engine.
        on_token: called with the request and each token of its answer as it is sampled.
    """

    def __init__(
        self,
        full: EngineParts,
        decoder: EngineParts,
        prefix: PrefixCache,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        on_token: Callable[[ColocatedRequest, SampledToken], None] | None,
    ) -> None:
        self._full_cache = full.runner.cache
        self._decoder_cache = decoder.runner.cache
        self._layer_map = decoder.pair.layer_map
        self._grammars = full.grammars
        self._eos_ids = full.config.eos_token_ids
        self._on_token = on_token
        self._prefill_events: deque[PrefillEvent] = deque()
        self._decode_events: deque[DecodeEvent] = deque()
        self._prefill = PrefillEngine(
            full.runner, full.pool, max_num_batched_tokens, max_num_seqs, self._prefill_events.extend, prefix
        )
        self._decode = DecodeEngine(
            decoder.runner, decoder.pool, max_num_seqs, max_num_batched_tokens, self._decode_events.extend
        )
        self._requests: dict[str, ColocatedRequest] = {}
        self._waiting: deque[ColocatedRequest] = deque()

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    def add(self, request: ColocatedRequest) -> None:
        """Queues a request, which a later step starts."""
        self._requests[request.decode.id] = request
        self._waiting.append(request)

    def step(self) -> None:
        """Admits as many waiting requests as fit, then steps each engine once.

        Raises:
            Overloaded: nothing runs and the oldest request does not fit.
            InvalidRequest, InternalError: a step failed. The requests are lost; the caller may only call ``close``.
        """
        moved = self._admit()
        for engine in (self._prefill, self._decode):
            moved |= engine.step()
            moved |= self._deliver_events()
        if self._requests and not moved:
            raise Overloaded("the KV cache is too small for a request; give more kv_memory")

    def close(self) -> None:
        """Drops every request and frees its blocks; the KV of computed prompts stays in the prefix cache.

        Raises:
            AssertionError: a block is lost.
        """
        for id in self._requests:
            self._prefill.handle(Release(id))
            self._decode.handle(Release(id))
        self._requests.clear()
        self._waiting.clear()
        self._prefill.check()
        self._decode.check()

    def _admit(self) -> bool:
        """Reserves blocks for waiting requests in order of arrival, without overtaking.

        Returns True if a request got blocks.
        """
        moved = False
        while self._waiting:
            first = self._waiting[0]
            self._decode.handle(Reserve(first.decode))
            self._deliver_events()
            if self._waiting and self._waiting[0] is first:
                break
            moved = True
        return moved

    def _deliver_events(self) -> bool:
        """Passes events between the engines until none is left. Returns True if one made progress."""
        moved = False
        while self._prefill_events or self._decode_events:
            while self._prefill_events:
                self._on_prefill(self._prefill_events.popleft())
                moved = True
            if self._decode_events:
                event = self._decode_events.popleft()
                self._on_decode(event)
                moved |= not isinstance(event, Refused)
        return moved

    def _on_prefill(self, event: PrefillEvent) -> None:
        match event:
            case PromptComputed(id=id, first=first):
                self._hand_over(self._requests[id], first)
            case SequenceFailed(error=InvalidRequest() as error):
                raise error
            case SequenceFailed(error=error):
                raise InternalError(f"prefill failed: {error}") from error
            case _:
                pass

    def _on_decode(self, event: DecodeEvent) -> None:
        request = self._requests[event.id]
        match event:
            case Reserved(blocks=blocks):
                if self._waiting and self._waiting[0] is request:
                    self._waiting.popleft()
                decode = request.decode
                request.blocks = blocks
                first = not request.answer
                processor = (
                    new_processor(decode.sampling, decode.prompt, self._grammars, self._eos_ids) if first else None
                )
                request.prefill = PrefillSequence(
                    decode.id,
                    decode.prompt,
                    decode.sampling,
                    sample_first_token=first,
                    processor=processor,
                )
                self._prefill.handle(Submit(request.prefill))
            case Preempted(id=id):
                self._prefill.handle(Release(id))
                self._decode.handle(Yielded(id))
            case TokenSampled(token=token, finish=finish):
                self._accept(request, token, finish)
            case SequenceFailed(error=InvalidRequest() as error):
                raise error
            case SequenceFailed(error=error):
                raise InternalError(f"decode failed: {error}") from error
            case Refused():
                pass

    def _hand_over(self, request: ColocatedRequest, first: SampledToken | None) -> None:
        """Hands a computed prompt over: judges the full model's token, copies the KV and starts the decoder."""
        decode, prefill = request.decode, request.prefill
        if prefill is None or not prefill.blocks:  # preempted since; it will be submitted again
            return
        if request.cached_tokens is None:
            request.cached_tokens = prefill.cached_tokens
        if first is not None:
            emitted, finish = decode.stop.judge(first.token_id, 0)
            self._accept(request, first if emitted else None, finish)
        if request.finish is None:
            copy_sequence(
                self._full_cache,
                prefill.blocks,
                self._decoder_cache,
                request.blocks,
                self._layer_map,
                len(decode.prompt),
            )
            self._decode.handle(Start(decode.id, request.answer[0].token_id))
        else:
            self._decode.handle(Release(decode.id))
        self._prefill.handle(Release(decode.id))

    def _accept(self, request: ColocatedRequest, token: SampledToken | None, finish: FinishReason | None) -> None:
        if token is not None:
            request.answer.append(token)
            if self._on_token is not None:
                self._on_token(request, token)
        if finish is not None:
            request.finish = finish
            del self._requests[request.decode.id]
