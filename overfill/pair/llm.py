"""Both halves of a pair in one process: the same engines as the services, without sockets."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from overfill.api.detokenizer import StreamDetokenizer
from overfill.api.tokenizer import Tokenizer
from overfill.engine.build import MEMORY_FRACTION, Half, LoadedHalf, load_half, resolve_device, size_pools
from overfill.engine.colocated import Colocated, Request
from overfill.engine.device import on_device
from overfill.engine.sequence import DecodeSequence, FinishReason, StopRule
from overfill.errors import InvalidRequest, OverfillError, PromptTooLong
from overfill.kv.blocks import BlockPool
from overfill.kv.spec import DTypeName
from overfill.model.manifest import Pair
from overfill.model.processors import new_processor
from overfill.model.sampling import SampledToken
from overfill.pair.store import resolve_pair
from overfill.request.params import SamplingParams, check_token_ids

Prompt = str | Sequence[int]

DEFAULT_SAMPLING = SamplingParams(temperature=0.7, max_tokens=256)
"""Sampling parameters that ``LLM`` uses when the caller gives none."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer. ``token_ids`` and ``text`` leave out the stop id that ended it.

    Attributes:
        finish_reason: "length" when ``max_tokens`` or the context cut the answer.
        cached_tokens: prompt tokens whose KV came from the prefix cache. Two answers that differ in nothing else are
            equal.
    """

    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    logprobs: list[SampledToken] = field(default_factory=list)
    cached_tokens: int = field(default=0, compare=False)


class LLM:
    """A pair, loaded and ready to answer.

    The full model's KV of prompts stays in a prefix cache between calls, so that the next turn of a chat computes only
    what is new. Not for two threads at once.

    Args:
        pair: a named pair ("default", "fast", "identity") or the folder of one; a Path is always a folder.
        dtype: of weights, activations and KV; None takes bfloat16, or float32 on a CPU that does not compute in it.
        threads: CPU threads; None leaves torch's setting.
        kv_memory: bytes of each half's KV cache; None shares what the device leaves (on a CPU at most 1 GiB each).
        memory_fraction: share of the free memory that is taken when ``kv_memory`` is None.
        token_budget: most prompt tokens in one prefill step.
        prefix_cache: keep prompts for later calls; False computes every prompt anew. An interrupted call forgets them.

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
        prefix_cache: bool = True,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        loaded = Pair.load(resolve_pair(pair), check_digests=True)

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

        with on_device(where):
            # Both halves first: what they leave is shared.
            halves = [load("full"), load("decoder")]
            self._full, self._decoder = size_pools(halves, kv_memory, max_model_len, memory_fraction)
        self.max_model_len = min(self._full.max_model_len, self._decoder.max_model_len)
        self.tokenizer = Tokenizer.load(loaded.full_path)
        self._device = where
        self._prefix_cache = prefix_cache
        self._prefix = self._full.prefix_cache(prefix_cache)
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
            sampling: one for all prompts, or one for each, taken as they are; None means ``DEFAULT_SAMPLING``: at most
                256 tokens at temperature 0.7.
            on_token: called with the prompt's index and each token as it is sampled.

        Raises:
            InvalidRequest: a prompt is empty, too long or holds ids outside the vocabulary, or ``sampling`` has
                another length than ``prompts``.
        """
        if isinstance(prompts, str):
            raise InvalidRequest("prompts", "is one string; pass a list of prompts")
        each = DEFAULT_SAMPLING if sampling is None else sampling
        choices = [each] * len(prompts) if isinstance(each, SamplingParams) else list(each)
        if len(choices) != len(prompts):
            raise InvalidRequest("sampling", f"has {len(choices)} entries for {len(prompts)} prompts")
        encoded = [self.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompts]
        requests = [self.request(i, ids, choice) for i, (ids, choice) in enumerate(zip(encoded, choices, strict=True))]
        told = None if on_token is None else lambda request, token: on_token(request.index, token)
        engines = self.colocated(told)
        try:
            with on_device(self._device):
                for request in requests:
                    engines.add(request)
                while engines.num_unfinished:
                    engines.step()
        except OverfillError:
            engines.close()
            raise
        except BaseException:
            self._renew_pools()
            raise
        engines.close()
        return [self._completion(prompt, request) for prompt, request in zip(prompts, requests, strict=True)]

    def colocated(self, on_token: Callable[[Request, SampledToken], None] | None = None) -> Colocated:
        """The engines themselves, for requests that come one by one; one at a time may be open, and must be closed."""
        return Colocated(self._full, self._decoder, self._prefix, self._token_budget, self._max_num_seqs, on_token)

    def _renew_pools(self) -> None:
        """Forgets who owns which block, and all cached prompts.

        For an interrupt, which may come in the middle of bookkeeping: later calls would find blocks lost.
        """
        for parts in (self._full, self._decoder):
            parts.runner.synchronize()
        self._full, self._decoder = (
            replace(parts, pool=BlockPool(parts.pool.num_blocks, parts.pool.block_size))
            for parts in (self._full, self._decoder)
        )
        self._prefix = self._full.prefix_cache(self._prefix_cache)

    def chat(self, messages: Sequence[dict[str, str]], sampling: SamplingParams | None = None) -> Completion:
        """Answers one conversation, rendered with the checkpoint's chat template; ``sampling`` as in ``generate``."""
        return self.generate([self.tokenizer.encode_chat(messages)], sampling)[0]

    def request(self, index: int, prompt: list[int], sampling: SamplingParams) -> Request:
        """What ``Colocated.add`` takes; ``index`` is the caller's own. Raises as ``generate`` does."""
        if not prompt:
            raise InvalidRequest("prompt", "is empty")
        if len(prompt) >= self.max_model_len:
            raise PromptTooLong("prompt", f"has {len(prompt)} tokens, the context {self.max_model_len}")
        check_token_ids("prompt", prompt, self._full.config.vocab_size)
        sampling.check_vocab(self._full.config.vocab_size)
        if sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(64))
        room, eos_ids = self.max_model_len - len(prompt), self._full.config.eos_token_ids
        if sampling.min_tokens > room:
            raise PromptTooLong("sampling.min_tokens", f"{sampling.min_tokens} tokens do not fit; {room} do")
        stop = StopRule.of(sampling, eos_ids, room)
        processor = new_processor(sampling, prompt, self._full.grammars, eos_ids)
        sequence = DecodeSequence(secrets.token_hex(8), prompt, [], sampling, stop, processor=processor)
        return Request(index, sequence)

    def _completion(self, prompt: Prompt, request: Request) -> Completion:
        continued = request.decode.prompt if isinstance(prompt, str) else ()
        detokenizer = StreamDetokenizer(self.tokenizer, continued)
        ids = [token.token_id for token in request.answer]
        wanted = request.decode.sampling.logprobs is not None
        return Completion(
            text=detokenizer.push(ids) + detokenizer.finish(),
            token_ids=ids,
            finish_reason="stop" if request.finish is FinishReason.STOP else "length",
            prompt_tokens=len(request.decode.prompt),
            logprobs=request.answer if wanted else [],
            cached_tokens=request.cached_tokens or 0,
        )
