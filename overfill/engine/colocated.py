"""Runs both engines of a pair on one thread, a step of one at a time, and copies KV from one to the other.

- **Two stages.** The prefill engine computes prompts for this worker and for others; the decode engine answers prompts
  that this worker or another one computed. Each has its own pool of blocks.
- **Turns.** ``Turns`` decides which engine steps next and how many prompt tokens a step computes.
- **Handoff.** ``PrefillHere`` computes a prompt and copies its KV into the blocks of a decode sequence. Both engines
  launch their kernels in the thread's current stream, so a copy runs behind the step that wrote the KV.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from overfill.engine.decode import DecodeEngine
from overfill.engine.prefill import PrefillEngine
from overfill.engine.runner import ModelRunner
from overfill.engine.sequence import (
    DecodeEvent,
    EngineLoad,
    PrefillEvent,
    PrefillHere,
    PrefillScheduled,
    PromptComputed,
    Release,
    Reserve,
    SequenceFailed,
    Start,
    Submit,
    Yielded,
)
from overfill.kv.cache import copy_sequence

log = logging.getLogger(__name__)

MIN_CHUNK = 16
"""Minimum number of prompt tokens in a step that is kept short for running answers."""

_FADING = 0.95
"""Weight of all earlier steps against the newest one, in measured durations."""

_MIN_VARIANCE = 0.01
"""Minimum variance of the steps' sizes, relative to their squared mean, that tells a step's cost from its tokens'."""

ColocatedEvent = DecodeEvent | PrefillScheduled | PromptComputed
"""An event for the decode stage's servicer: of the decode engine, or of a prompt that is computed for it."""


@dataclass(frozen=True, slots=True)
class ColocatedLoad:
    """Snapshot of both engines' loads, taken between two steps."""

    prefill: EngineLoad
    decode: EngineLoad

    def freed_capacity_since(self, other: ColocatedLoad) -> bool:
        """True if either stage has freed capacity since the snapshot ``other``."""
        return self.prefill.freed_capacity_since(other.prefill) or self.decode.freed_capacity_since(other.decode)


class _StepCost:
    """Seconds of a step as a linear function of its tokens: a least-squares fit in which earlier steps fade."""

    def __init__(self) -> None:
        self._steps = self._tokens = self._seconds = self._tokens_squared = self._products = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self._steps = _FADING * self._steps + 1
        self._tokens = _FADING * self._tokens + tokens
        self._seconds = _FADING * self._seconds + seconds
        self._tokens_squared = _FADING * self._tokens_squared + tokens * tokens
        self._products = _FADING * self._products + tokens * seconds

    @property
    def known(self) -> bool:
        return self._steps > 0

    def fit(self) -> tuple[float, float]:
        """Seconds of each step, and seconds of each token. Both are 0 or more.

        Where steps of different sizes do not tell the two apart, a step costs nothing besides its tokens.
        """
        variance = self._steps * self._tokens_squared - self._tokens**2
        if variance > _MIN_VARIANCE * self._tokens**2:
            token = (self._steps * self._products - self._tokens * self._seconds) / variance
            step = (self._seconds - token * self._tokens) / self._steps
            if token > 0 and step > 0:
                return step, token
        return 0.0, self._seconds / self._tokens


class Turns:
    """Decides which stage steps next, and how many prompt tokens a prefill step computes.

    While both stages have work, their steps alternate. A prefill step then delays every running answer, so it computes
    only as many tokens as fit beside a decode step into the objective for the time between tokens. It computes as many
    tokens as it may in two cases:

    - The oldest prompt would miss its objective with short steps, and keeps it with long ones. A prompt that misses it
      in any case delays no answer.
    - Short steps cannot keep the objective, or would spend more than a third of their time on what each step costs
      besides its tokens. Then both objectives would be missed.

    Args:
        max_num_batched_tokens: maximum number of prompt tokens in one step.
        ttft_objective: seconds from a prompt's arrival in the engine to its first token. None means no objective.
        itl_objective: seconds between two tokens of an answer. None means no objective: steps simply alternate.

    Attributes:
        decode_first: True if the decode stage steps next, unless it has nothing to compute.
    """

    def __init__(
        self, max_num_batched_tokens: int, ttft_objective: float | None = None, itl_objective: float | None = None
    ) -> None:
        self._max_tokens = max_num_batched_tokens
        self._ttft_objective = ttft_objective
        self._itl_objective = itl_objective
        self._decode_steps = _StepCost()
        self._prefill_steps = _StepCost()
        self.decode_first = True

    @property
    def measures(self) -> bool:
        """Whether the durations of steps matter."""
        return self._itl_objective is not None

    def decoded(self, seconds: float) -> None:
        """Notes a decode step."""
        self.decode_first = False
        self._decode_steps.add(1, seconds)

    def prefilled(self, tokens: int, seconds: float) -> None:
        """Notes a prefill step; one that failed has computed 0 tokens."""
        self.decode_first = True
        if tokens:
            self._prefill_steps.add(tokens, seconds)

    def chunk(self, decoding: bool, remaining: int, waited: float) -> int:
        """Maximum number of prompt tokens in the next prefill step.

        Args:
            decoding: whether answers wait for this step.
            remaining: tokens of the oldest prompt that are not computed.
            waited: seconds since that prompt arrived.
        """
        longest = self._max_tokens
        if not decoding or self._itl_objective is None or longest <= MIN_CHUNK:
            return longest
        if not (self._decode_steps.known and self._prefill_steps.known):
            return MIN_CHUNK
        (_, decode), (step, token) = self._decode_steps.fit(), self._prefill_steps.fit()
        tokens = min(longest, int((self._itl_objective - decode - step) / token))
        if tokens < max(MIN_CHUNK, 2 * step / token):
            return longest
        if self._ttft_objective is not None:

            def first_token(chunk: int) -> float:
                return waited + remaining * token + math.ceil(remaining / chunk) * (step + decode)

            if first_token(longest) <= self._ttft_objective < first_token(tokens):
                return longest
        return tokens


class ColocatedEngine:
    """Single-threaded core of a worker with both stages: ``handle`` takes the messages of both, ``step`` computes.

    Ids of prompts and of decode sequences are distinct. A prompt of ``PrefillHere`` ends with ``PromptComputed`` or
    ``SequenceFailed``, and the engine frees its blocks itself; a later ``Release`` does nothing.

    Args:
        new_prefill: makes the prefill engine from the function that takes its events.
        full, decoder: the engines' runners.
        layer_map: as in ``copy_sequence``.
        emit_prefill: takes the events of prompts that other workers asked for.
        emit_decode: takes the events of decode sequences, and of prompts that are computed for them: when one is
            scheduled, when its KV is copied, and when it failed.
    """

    def __init__(
        self,
        new_prefill: Callable[[Callable[[list[PrefillEvent]], None]], PrefillEngine],
        decode: DecodeEngine,
        full: ModelRunner,
        decoder: ModelRunner,
        layer_map: Sequence[int],
        turns: Turns,
        emit_prefill: Callable[[list[PrefillEvent]], None],
        emit_decode: Callable[[Sequence[ColocatedEvent]], None],
    ) -> None:
        self._prefill = new_prefill(self._take_prefill_events)
        self._decode = decode
        self._full = full
        self._decoder = decoder
        self._layer_map = layer_map
        self._turns = turns
        self._emit_prefill = emit_prefill
        self._emit_decode = emit_decode
        self._here: dict[str, _Here] = {}  # by the prompt's id
        self._ended: list[PromptComputed | SequenceFailed] = []  # in the running step, of prompts in ``_here``

    def load(self) -> ColocatedLoad:
        return ColocatedLoad(self._prefill.load(), self._decode.load())

    def check(self) -> None:
        """Raises AssertionError when a block of either pool is lost or owned twice."""
        self._prefill.check()
        self._decode.check()

    def close(self) -> None:
        self._prefill.close()
        self._decode.close()

    def handle(self, message: Submit | PrefillHere | Reserve | Start | Yielded | Release) -> None:
        match message:
            case PrefillHere(sequence=sequence, into=into):
                target = self._decode.receiving(into)
                if target is not None:  # else the sequence was preempted before the message arrived
                    self._here[sequence.id] = _Here(message, target.blocks)
                    self._prefill.handle(Submit(sequence))
            case Submit():
                self._prefill.handle(message)
            case Release(id):
                self._here.pop(id, None)
                self._prefill.handle(message)
                self._decode.handle(message)
            case _:
                self._decode.handle(message)

    def step(self) -> bool:
        """Steps one of the two engines. Returns False when neither has anything to compute."""
        if self._turns.decode_first:
            return self._step_decode() or self._step_prefill()
        return self._step_prefill() or self._step_decode()

    def _step_decode(self) -> bool:
        started = time.monotonic()
        if not self._decode.step():
            return False
        self._turns.decoded(time.monotonic() - started)
        return True

    def _step_prefill(self) -> bool:
        started = time.monotonic()
        oldest = next(self._prefill.queue(), None)
        remaining, waited = (0, 0.0) if oldest is None else (oldest.remaining, started - oldest.submitted)
        before = self._prefill.tokens_computed
        if not self._prefill.step(self._turns.chunk(self._decode.num_running > 0, remaining, waited)):
            return False
        if self._turns.measures:
            self._full.synchronize()  # a step that samples nothing returns before the device has computed it
        self._turns.prefilled(self._prefill.tokens_computed - before, time.monotonic() - started)
        for event in self._ended:
            self._end(event)
        self._ended.clear()
        return True

    def _take_prefill_events(self, events: list[PrefillEvent]) -> None:
        """Passes on what the prefill engine emits, inside a step."""
        for_others: list[PrefillEvent] = []
        for event in events:
            if event.id not in self._here:
                for_others.append(event)
            elif isinstance(event, PrefillScheduled):
                self._emit_decode([event])
            elif isinstance(event, PromptComputed | SequenceFailed):
                self._ended.append(event)
        if for_others:
            self._emit_prefill(for_others)

    def _end(self, event: PromptComputed | SequenceFailed) -> None:
        """Ends a prompt of this worker: copies its KV and frees its blocks."""
        here = self._here.pop(event.id)
        target = self._decode.receiving(here.message.into)
        # A sequence that was preempted and resumed meanwhile has another list of blocks.
        wanted = target is not None and target.blocks is here.blocks
        if wanted and isinstance(event, PromptComputed):
            event = self._copy(here, event)
        self._prefill.handle(Release(event.id))
        if wanted:
            self._emit_decode([event])

    def _copy(self, here: _Here, computed: PromptComputed) -> PromptComputed | SequenceFailed:
        """Copies the KV of a computed prompt into its decode sequence. Returns the event that ends the prompt."""
        prompt = here.message.sequence
        source, target = self._full.cache, self._decoder.cache
        try:
            copy_sequence(
                *(source, prompt.blocks, target, here.blocks, self._layer_map),
                num_tokens=len(prompt.prompt),
                start=here.message.held_tokens,
            )
            # Once released, the blocks of the target may be written in another stream: by the receiver.
            self._decoder.synchronize()
        except Exception as error:
            log.exception("copying KV failed")
            self._decoder.clean_up(error)
            return SequenceFailed(computed.id, error)
        return replace(computed, time_ns=time.monotonic_ns())


@dataclass(frozen=True, slots=True)
class _Here:
    """A prompt of ``PrefillHere``; ``blocks`` is the list of the decode sequence's blocks when the message arrived."""

    message: PrefillHere
    blocks: list[int]
