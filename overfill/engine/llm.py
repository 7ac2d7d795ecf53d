"""Both halves of a pair in one process: the same engines as the services, without sockets."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from overfill.api.detokenizer import StreamDetokenizer
from overfill.api.tokenizer import Tokenizer
from overfill.engine.build import MEMORY_FRACTION, EngineParts, Half, LoadedHalf, load_half, resolve_device, size_pools
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
    StopRule,
    Submit,
    TokenSampled,
    Yielded,
)
from overfill.errors import InternalError, InvalidRequest, Overloaded, PromptTooLong
from overfill.kv.cache import copy_sequence
from overfill.kv.spec import DTypeName
from overfill.model.processors import new_processor
from overfill.model.sampling import SampledToken
from overfill.pair.manifest import Pair
from overfill.pair.store import resolve_pair
from overfill.params import SamplingParams, check_token_ids

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer. ``token_ids`` and ``text`` leave out the stop id that ended it."""

    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    logprobs: list[SampledToken] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Request:
    """A prompt on its way through both engines. One sequence object in each; ``blocks`` are the decode engine's."""

    index: int
    decode: DecodeSequence
    blocks: list[int] = field(default_factory=list)
    prefill: PrefillSequence | None = None
    answer: list[SampledToken] = field(default_factory=list)
    finish: FinishReason | None = None


class LLM:
    """A pair, loaded and ready to answer.

    Args:
        pair: folder of a pair, or one of the named pairs ("default", "fast", "identity").
        dtype: of weights, activations and KV; None takes bfloat16, or float32 on a CPU that does not compute in it.
        threads: CPU threads; None leaves torch's setting.
        kv_memory: bytes of each half's KV cache; None shares what the device leaves (on a CPU at most 1 GiB each).
        memory_fraction: share of the free memory that is taken when ``kv_memory`` is None.
        token_budget: most prompt tokens in one prefill step.
        cuda_graphs: record decode steps and replay them, on a CUDA device.

    Example:
        >>> llm = LLM("default")  # doctest: +SKIP
        >>> llm.chat([{"role": "user", "content": "What is a KV cache?"}]).text  # doctest: +SKIP
    """

    def __init__(
        self,
        pair: str | Path = "default",
        *,
        dtype: DTypeName | None = None,
        device: str = "auto",
        threads: int | None = None,
        kv_memory: int | None = None,
        memory_fraction: float = MEMORY_FRACTION,
        block_size: int = 16,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        token_budget: int = 2048,
        cuda_graphs: bool = False,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        loaded = Pair.load(resolve_pair(str(pair)), check_digests=True)

        where = resolve_device(device)

        def load(half: Half) -> LoadedHalf:
            return load_half(
                loaded,
                half,
                dtype=dtype,
                device=where,
                block_size=block_size,
                max_model_len=max_model_len,
                warm_tokens=token_budget,
                max_num_seqs=max_num_seqs,
            )

        # Both halves first: what they leave is shared.
        halves = [load("full"), load("decoder")]
        self._full, self._decoder = size_pools(halves, kv_memory, max_model_len, memory_fraction, cuda_graphs)
        self.max_model_len = min(self._full.max_model_len, self._decoder.max_model_len)
        self.tokenizer = Tokenizer.load(loaded.full_path)
        self._token_budget = token_budget
        self._max_num_seqs = max_num_seqs

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        on_token: Callable[[int, SampledToken], None] | None = None,
    ) -> list[Completion]:
        """Answers all ``prompts``, batched; in their order.

        Args:
            prompts: text, tokenized as it is, or token ids.
            sampling: one for all prompts, or one for each.
            on_token: called with the prompt's index and each token as it is sampled.

        Raises:
            InvalidRequest: a prompt is empty, too long or holds ids outside the vocabulary, or ``sampling`` has
                another length than ``prompts``.
        """
        if isinstance(prompts, str):
            raise InvalidRequest("prompts", "is one string; pass a list of prompts")
        each = sampling or SamplingParams()
        choices = [each] * len(prompts) if isinstance(each, SamplingParams) else list(each)
        if len(choices) != len(prompts):
            raise InvalidRequest("sampling", f"has {len(choices)} entries for {len(prompts)} prompts")
        encoded = [self.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompts]
        requests = [self._request(i, ids, choice) for i, (ids, choice) in enumerate(zip(encoded, choices, strict=True))]
        _Run(self._full, self._decoder, self._token_budget, self._max_num_seqs, on_token).finish(requests)
        return [self._completion(request) for request in requests]

    def chat(self, messages: Sequence[dict[str, str]], sampling: SamplingParams | None = None) -> Completion:
        """Answers one conversation, rendered with the checkpoint's chat template."""
        return self.generate([self.tokenizer.encode_chat(messages)], sampling)[0]

    def _request(self, index: int, prompt: list[int], sampling: SamplingParams) -> _Request:
        if not prompt:
            raise InvalidRequest("prompt", "is empty")
        if len(prompt) >= self.max_model_len:
            raise PromptTooLong("prompt", f"has {len(prompt)} tokens, the context {self.max_model_len}")
        check_token_ids("prompt", prompt, self._full.config.vocab_size)
        sampling.check_vocab(self._full.config.vocab_size)
        if sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(64))
        stop = StopRule.of(sampling, self._full.config.eos_token_ids, self.max_model_len - len(prompt))
        processor = new_processor(sampling, prompt, self._full.grammars)
        sequence = DecodeSequence(secrets.token_hex(8), prompt, [], sampling, stop, processor=processor)
        return _Request(index, sequence)

    def _completion(self, request: _Request) -> Completion:
        detokenizer = StreamDetokenizer(self.tokenizer)
        ids = [token.token_id for token in request.answer]
        wanted = request.decode.sampling.logprobs is not None
        return Completion(
            text=detokenizer.push(ids) + detokenizer.finish(),
            token_ids=ids,
            finish_reason="stop" if request.finish is FinishReason.STOP else "length",
            prompt_tokens=len(request.decode.prompt),
            logprobs=request.answer if wanted else [],
        )


class _Run:
    """One batch of prompts through both engines, which it drives in turn."""

    def __init__(
        self,
        full: EngineParts,
        decoder: EngineParts,
        token_budget: int,
        max_num_seqs: int,
        on_token: Callable[[int, SampledToken], None] | None,
    ) -> None:
        self._full_cache = full.runner.cache
        self._decoder_cache = decoder.runner.cache
        self._layer_map = decoder.pair.layer_map
        self._grammars = full.grammars
        self._on_token = on_token
        self._prefill_events: deque[PrefillEvent] = deque()
        self._decode_events: deque[DecodeEvent] = deque()
        self._prefill = PrefillEngine(full.runner, full.pool, token_budget, max_num_seqs, self._prefill_events.append)
        self._decode = DecodeEngine(
            decoder.runner, decoder.pool, max_num_seqs, token_budget, self._decode_events.extend
        )
        self._requests: dict[str, _Request] = {}
        self._waiting: deque[_Request] = deque()

    def finish(self, requests: Sequence[_Request]) -> None:
        """Runs until every request has ended; frees all blocks, also on failure."""
        self._requests = {r.decode.id: r for r in requests}
        self._waiting = deque(requests)
        try:
            while any(r.finish is None for r in requests):
                if self._waiting:
                    self._decode.handle(Reserve(self._waiting[0].decode))
                progressed = self._settle()
                for engine in (self._prefill, self._decode):
                    progressed |= engine.step()
                    progressed |= self._settle()
                if not progressed:
                    raise Overloaded("the KV cache is too small for a request; give more kv_memory")
        finally:
            for id in self._requests:
                self._prefill.handle(Release(id))
                self._decode.handle(Release(id))

    def _settle(self) -> bool:
        """Passes events between the engines until none is left. Whether anything moved."""
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
                request.prefill = PrefillSequence(
                    decode.id,
                    decode.prompt,
                    decode.sampling,
                    sample_first_token=first,
                    processor=new_processor(decode.sampling, decode.prompt, self._grammars) if first else None,
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

    def _hand_over(self, request: _Request, first: SampledToken | None) -> None:
        """The prompt is computed: judges the full model's token, copies the KV, starts the decoder."""
        decode, prefill = request.decode, request.prefill
        if prefill is None or not prefill.blocks:  # preempted in the meantime; it will be submitted again
            return
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

    def _accept(self, request: _Request, token: SampledToken | None, finish: FinishReason | None) -> None:
        if token is not None:
            request.answer.append(token)
            if self._on_token is not None:
                self._on_token(request.index, token)
        request.finish = finish
