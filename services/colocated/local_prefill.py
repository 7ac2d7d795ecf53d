"""Prefills a prompt in the process that writes its answer: a copy between two KV caches instead of a transfer."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from overfill.engine.protocol import ServedHalf
from overfill.engine.sequence import (
    AdapterChanged,
    AwaitingImport,
    DecodeEvent,
    PrefillEvent,
    PrefillHere,
    PrefillScheduled,
    PrefillSequence,
    PromptComputed,
    Release,
    SequenceFailed,
    StepSampled,
)
from overfill.errors import DeadlineExceeded
from overfill.kv.imports import Importer
from overfill.kv.receiver import PullStats
from overfill.telemetry import tracing
from overfill.telemetry.metrics import PrefillMetrics
from overfill.v1 import common_pb2, decode_pb2, kv_pb2
from services.decode.sequence_session import SequenceSession
from services.hosting import EnginePort
from services.importing import import_prompt
from services.messages import first_token_to_proto
from services.prompt_hasher import PromptHasher


class PrefillStage(Protocol):
    """The servicer of this worker's prefill stage."""

    engine: EnginePort
    importer: Importer | None


class LocalPrefills:
    """The prompts that this worker prefills for its own sequences.

    Args:
        full: the full model's half.
        stage: the prefill stage, which has the engine.
        metrics: counts the prompts, as for prompts of other workers.

    Attributes:
        events: events of each prompt that is being computed, by its id.
    """

    def __init__(self, full: ServedHalf, stage: PrefillStage, metrics: PrefillMetrics) -> None:
        self.metrics = metrics
        self.events: dict[str, asyncio.Queue[PrefillEvent | DecodeEvent]] = {}
        self._full = full
        self._stage = stage
        self._hasher = PromptHasher(full.blocks_of)

    def send(self, message: object) -> None:
        """Sends a message to the engine."""
        self._stage.engine.send(message)

    def fits(self, prompt_tokens: int) -> bool:
        """True if a prompt of this length fits the full model's context and KV cache."""
        held = self._stage.engine.load.blocks_total * self._full.store.block_size
        return prompt_tokens <= min(held, self._full.max_model_len)

    @property
    def importer(self) -> Importer | None:
        """Imports KV that the full model's prefix cache lacks; None means that every prompt is computed."""
        return self._stage.importer

    def handoff(self, session: SequenceSession, holder: kv_pb2.KvHolder | None = None) -> LocalPrefill:
        """Returns the prefill of the session's prompt into the blocks that the session holds now.

        Args:
            holder: worker that has more of the prompt's KV than this one; None means none.
        """
        return LocalPrefill(self, session, holder)

    def on_events(self, events: Iterable[PrefillEvent | DecodeEvent]) -> None:
        """Passes engine events to their prompts. Call it on the event loop."""
        for event in events:
            if not isinstance(event, StepSampled | AdapterChanged) and (queue := self.events.get(event.id)):
                queue.put_nowait(event)

    async def sequence(self, session: SequenceSession) -> PrefillSequence:
        """Returns the session's prompt as the prefill engine takes it.

        The full model samples the first token with the session's own processor, before the decoder uses it. Both
        engines are on one thread.
        """
        answer, tenant = session.sequence, session.start.cache_namespace
        prompt, rest = answer.prompt[: answer.num_shared], answer.prompt[answer.num_shared :]
        return PrefillSequence(
            id=secrets.token_hex(8),
            prompt=prompt,
            sampling=answer.sampling,
            sample_index=answer.sample_index,
            sample_first_token=session.wants_first_token,
            processor=answer.processor if session.wants_first_token else None,
            cache_namespace=tenant,
            prompt_blocks=await self._hasher.blocks_of(prompt, tenant),
            scores=self._full.new_scores(answer.sampling) if session.wants_scores else None,
            follower=rest[0] if rest else None,
        )


class LocalPrefill:
    """A ``Handoff`` without a transfer: the engine computes the prompt and copies its KV between two steps.

    When ``run`` has ended, also by an error or a cancellation, the engine touches the session's blocks no more once it
    has handled the messages that were sent until then.
    """

    codec = common_pb2.KV_CODEC_UNSPECIFIED  # no KV travels

    def __init__(self, prefills: LocalPrefills, session: SequenceSession, holder: kv_pb2.KvHolder | None) -> None:
        self.stats = PullStats(held_tokens=session.held_tokens)
        self._prefills = prefills
        self._session = session
        self._holder = holder

    async def run(
        self,
        timeout: float | None,
        on_first_token: Callable[[decode_pb2.Tokens], None],
        on_in_place: Callable[[], None],
    ) -> None:
        """Prefills the prompt; see ``Handoff``.

        Raises:
            DeadlineExceeded: ``timeout`` seconds have passed.
            InvalidRequest, InternalError: the full model cannot compute the prompt.
        """
        with self._prefills.metrics.prompt():
            try:
                async with asyncio.timeout(timeout):
                    await self._run(on_first_token)
            except TimeoutError:
                raise DeadlineExceeded("the deadline passed while the prompt was computed") from None
        on_in_place()

    def release(self) -> bool:
        """Returns False: the whole prompt is computed when its first token is known."""
        return False

    async def _run(self, on_first_token: Callable[[decode_pb2.Tokens], None]) -> None:
        prefills, session = self._prefills, self._session
        sequence = await prefills.sequence(session)
        importer, blocks = prefills.importer, sequence.prompt_blocks
        if importer is not None and blocks is not None:
            sequence.imports = importer.may_import(self._holder, blocks)
        events = prefills.events[sequence.id] = asyncio.Queue()
        computed = False
        try:
            prefills.send(PrefillHere(sequence, session.sequence.id, session.held_tokens))
            queue_ns = scheduled_ns = 0
            while not computed:
                match await events.get():
                    case AwaitingImport() as awaiting:
                        imports = await import_prompt(
                            *(importer, sequence, awaiting, self._holder, session.start.request_id, prefills.send)
                        )
                        self.stats.peer_tokens, self.stats.disk_tokens = imports.peer_tokens, imports.disk_tokens
                    case PrefillScheduled(cached_tokens=cached, time_ns=scheduled_ns):
                        queue_ns = scheduled_ns - self.stats.started_ns
                        self.stats.cached_tokens = cached
                        prefills.metrics.scheduled(queue_ns / 1e9)
                        tracing.current().past("prefill.queue", self.stats.started_ns, scheduled_ns)
                        tracing.current().set(cached_tokens=cached)
                    case PromptComputed(first=first, time_ns=now, scores=scores):
                        computed = True
                        prefills.metrics.computed((now - scheduled_ns) / 1e9)
                        if importer is not None and blocks is not None:
                            importer.note_computed(blocks)
                        tracing.current().past("prefill.compute", scheduled_ns, now)
                        self.stats.first_kv_ns = self.stats.last_kv_ns = now - self.stats.started_ns
                        if first is not None or scores is not None or session.sequence.answer_start is not None:
                            self.stats.first_token_ns = time.monotonic_ns() - self.stats.started_ns
                            token = first_token_to_proto(first, scores, scheduled_ns, now)
                            token.prefill_queue_ns = queue_ns
                            on_first_token(token)
                    case SequenceFailed() as failed:
                        failed.raise_for("prefill")
                    case _:
                        pass
        finally:
            del prefills.events[sequence.id]
            if not computed:
                sequence.cancelled = True  # ends a running step between two layers
                prefills.send(Release(sequence.id))
