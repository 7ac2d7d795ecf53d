"""Runs both halves of a pair in one process: the services' engines without sockets."""

from __future__ import annotations

import operator
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from overfill.api.detokenizer import StreamDetokenizer
from overfill.api.tokenizer import Tokenizer
from overfill.engine.build import MEMORY_FRACTION
from overfill.engine.device import on_device, resolve_device
from overfill.engine.load import load_colocated
from overfill.engine.offline import OfflineRequest, OfflineRun
from overfill.engine.protocol import EngineOptions
from overfill.engine.sequence import DecodeSequence, FinishReason, StopRule
from overfill.errors import InvalidRequest, OverfillError, PromptTooLong
from overfill.kv.spec import DTypeName
from overfill.model.pair_files import load_whole
from overfill.model.processors import new_processor
from overfill.model.steps import SampledToken
from overfill.pair.store import resolve_pair
from overfill.request.params import SamplingParams, check_token_ids

Prompt = str | Sequence[int]

DEFAULT_SAMPLING = SamplingParams(temperature=0.7, max_tokens=256)
"""Sampling parameters that ``LLM`` uses when the caller gives none."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer.

    Attributes:
        text: Text of the answer.
        token_ids: Tokens of the answer, without the stop id that ended it.
        finish_reason: "length" when ``max_tokens`` or the context's end cut the answer; otherwise "stop".
        prompt_tokens: Number of tokens in the prompt.
        logprobs: The same tokens with their log-probabilities; empty unless the sampling parameters ask for them.
        cached_tokens: Prompt tokens whose KV came from the prefix cache. Comparing two completions ignores it.
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
    its new tokens. Not thread-safe.

    Args:
        pair: A named pair ("default", "fast", "identity") or a pair folder. A Path is always a folder.
        dtype: Type of weights, activations and KV: "float32", "bfloat16" or "float16". None means bfloat16.
            On a GPU without bfloat16 instructions None means float16, on such a CPU float32.
        device: Device to compute on: "auto", "cpu", "cuda" or "cuda:N".
        threads: Number of CPU threads. None keeps torch's setting.
        kv_memory: Bytes of each half's KV cache. None divides the free memory (on a CPU at most 1 GiB each).
        memory_fraction: Share of the free memory to use when ``kv_memory`` is None.
        block_size: Tokens per KV block.
        max_model_len: Maximum number of tokens of a prompt with its answer. None means the model's context length.
        max_num_seqs: Maximum number of sequences in one step.
        max_num_batched_tokens: Maximum number of prompt tokens in one prefill step.
        prefix_cache: Keep the KV of prompts for later calls. An interrupted call empties the cache.

    Raises:
        InvalidRequest: An argument is out of range, or ``max_model_len`` exceeds the model's context.
        InvalidPair: There is no such pair, or its files are damaged.
        UnsupportedModel: OverFill's engine does not run one of its halves.
        NotEnoughMemory: The device cannot hold both halves with a KV cache.
        MissingExtra: The extra ``server`` is not installed.

    Examples:
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
        max_num_batched_tokens: int = 2048,
        prefix_cache: bool = True,
    ) -> None:
        if not 0 < memory_fraction <= 1:
            raise InvalidRequest("memory_fraction", f"must be above 0 and at most 1, got {memory_fraction}")
        self._device = resolve_device(device)
        options = EngineOptions(
            self._device,
            dtype=dtype,
            block_size=block_size,
            kv_memory=kv_memory,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            prefix_cache=prefix_cache,
            threads=1 if threads is None else threads,
        )
        if threads is not None:
            torch.set_num_threads(threads)
        loaded_pair = load_whole(resolve_pair(pair), digests=True)
        with on_device(self._device):
            self._loaded = load_colocated(loaded_pair, options, replace(options, prefix_cache=False), memory_fraction)
        self._config = loaded_pair.full_config
        self.max_model_len = self._loaded.max_model_len
        self.tokenizer = Tokenizer.load(loaded_pair.full_path)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        on_token: Callable[[int, SampledToken], None] | None = None,
    ) -> list[Completion]:
        """Answers all ``prompts`` in one batch and returns the answers in the prompts' order.

        Args:
            prompts: Texts, tokenized without a chat template, or token ids.
            sampling: Parameters for all prompts, or one per prompt. None means ``DEFAULT_SAMPLING``: at most 256 tokens
                at temperature 0.7.
            on_token: Called with the prompt's index and each token as soon as it is sampled.

        Raises:
            Overloaded: the KV cache is too small for one of the requests.
            TypeError: a token id is no integer.
            InvalidRequest: a prompt is empty, is too long or has ids outside the vocabulary; or ``sampling`` and
                ``prompts`` differ in length.
        """
        if isinstance(prompts, str):
            raise InvalidRequest("prompts", "is one string; pass a list of prompts")
        each = DEFAULT_SAMPLING if sampling is None else sampling
        choices = [each] * len(prompts) if isinstance(each, SamplingParams) else list(each)
        if len(choices) != len(prompts):
            raise InvalidRequest("sampling", f"has {len(choices)} entries for {len(prompts)} prompts")
        encoded = [self.tokenizer.encode(p) if isinstance(p, str) else list(map(operator.index, p)) for p in prompts]
        requests = [self._request(i, ids, choice) for i, (ids, choice) in enumerate(zip(encoded, choices, strict=True))]
        notify = None if on_token is None else lambda request, token: on_token(request.index, token)
        run = OfflineRun(self._loaded, notify)
        try:
            with on_device(self._device):
                for request in requests:
                    run.add(request)
                while run.num_unfinished:
                    run.step()
        except OverfillError:
            run.close()
            raise
        except BaseException:
            # An interrupt may leave the block bookkeeping half updated, and later calls would find blocks missing.
            self._loaded = self._loaded.with_empty_pools()
            raise
        run.close()
        return [self._completion(prompt, request) for prompt, request in zip(prompts, requests, strict=True)]

    def chat(self, messages: Sequence[Mapping[str, str]], sampling: SamplingParams | None = None) -> Completion:
        """Answers one conversation with the checkpoint's chat template.

        Args:
            messages: Turns so far, each with ``role`` and ``content``.
            sampling: As in ``generate``.

        Raises:
            InvalidRequest: a message has no text as ``role`` or ``content``; or as ``generate``.
            Overloaded: as ``generate``.
        """
        for index, message in enumerate(messages):
            fields = [message.get(n) for n in ("role", "content")] if isinstance(message, Mapping) else [None]
            if not all(isinstance(field, str) for field in fields):
                reason = f"is {message!r:.80}; give a mapping whose 'role' and 'content' are text"
                raise InvalidRequest(f"messages[{index}]", reason)
        return self.generate([self.tokenizer.encode_chat(messages)], sampling)[0]

    def _request(self, index: int, prompt: list[int], sampling: SamplingParams) -> OfflineRequest:
        """Makes a request. Raises as ``generate`` does."""
        if not prompt:
            raise InvalidRequest("prompt", "is empty")
        if len(prompt) >= self.max_model_len:
            raise PromptTooLong(
                "prompt",
                f"has {len(prompt)} tokens, the context {self.max_model_len}",
            )
        check_token_ids("prompt", prompt, self._config.vocab_size)
        sampling.check_vocab(self._config.vocab_size)
        if sampling.prompt_logprobs is not None:
            raise InvalidRequest("sampling.prompt_logprobs", "is for running stacks; LLM does not score prompts")
        if sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(64))
        max_answer, eos_ids = self.max_model_len - len(prompt), self._config.eos_token_ids
        if sampling.min_tokens > max_answer:
            raise PromptTooLong("sampling.min_tokens", f"{sampling.min_tokens} tokens do not fit; {max_answer} do")
        stop = StopRule.of(sampling, eos_ids, max_answer)
        processor = new_processor(sampling, prompt, self._loaded.full.grammars, eos_ids)
        sequence = DecodeSequence(secrets.token_hex(8), prompt, [], sampling, stop, processor=processor)
        return OfflineRequest(index, sequence)

    def _completion(self, prompt: Prompt, request: OfflineRequest) -> Completion:
        continued = request.decode.prompt if isinstance(prompt, str) else ()
        detokenizer = StreamDetokenizer(self.tokenizer, continued)
        ids = [token.token_id for token in request.answer]
        with_logprobs = request.decode.sampling.logprobs is not None
        return Completion(
            text=detokenizer.push(ids) + detokenizer.finish(),
            token_ids=ids,
            finish_reason="stop" if request.finish is FinishReason.STOP else "length",
            prompt_tokens=len(request.decode.prompt),
            logprobs=request.answer if with_logprobs else [],
            cached_tokens=request.cached_tokens or 0,
        )
