"""Present pairs as models to the lm-evaluation-harness: the full model reads the context, the decoder continues it.

Tokenizing, truncating and cutting follow the harness's own ``hf`` model. An identity pair therefore scores what its
full model scores there. Needs the extra ``pairs``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from overfill.engine.device import native_dtype, resolve_device
from overfill.errors import InvalidRequest
from overfill.kv.spec import DTypeName
from overfill.making.conversations import Transcript
from overfill.making.evaluate.evaluation import load_model
from overfill.making.evaluate.forward import BatchModel, batches, cache_tokens, target_tokens
from overfill.model.manifest import Pair
from overfill.model.pair_files import load_whole
from overfill.model.transformer import ForwardModel
from overfill.pair.hf_model import load_tokenizer
from overfill.pair.llm import LLM
from overfill.request.params import SamplingParams

MAX_TOKENS = 256  # maximum length of a generated answer; a task can set its own
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING_NAMES = ("temperature", "top_p", "top_k", "min_p", "seed")
_ENGINE_MEMORY = 0.5  # share of the free memory; the rest is for the scoring models


class PairLM(TemplateLM):  # type: ignore[misc]
    """A pair as a model of the harness; subclasses say where it computes.

    The full model predicts the first token of every continuation. The decoder predicts the others, on the full model's
    KV of the context.

    Args:
        max_length: Maximum number of tokens of a context and its continuation, without the last one.
    """

    def __init__(self, pair: Pair, max_length: int) -> None:
        super().__init__()
        self.pair = pair
        self.tokenizer: Any = load_tokenizer(pair.full_path)
        self.max_length = max_length

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Token that replaces an empty context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return self.pair.tokenizer_digest

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokenizes text. None adds the tokenizer's special tokens unless the text starts with its prefix token."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Computes the log likelihood of whole texts, in context-sized windows that share no predicted token."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            (text,) = request.args
            rolling = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            for context, continuation in map(make_disjoint_window, rolling):
                windows.append((None, context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Returns, for each (key, context, continuation), the log likelihood and whether greedy decoding gives it."""
        transcripts = [self._transcript(context, continuation) for _, context, continuation in requests]
        results = list(self._scores(transcripts))
        for (key, _context, _continuation), result in zip(requests, results, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, result)
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues contexts to the answer's end or limit, then cuts each answer at its first stop string.

        Raises:
            InvalidRequest: the task asks for a generation option that is not supported.
        """
        if not requests:
            return []
        prompts, choices, stops = [], [], []
        for request in requests:
            context, options = request.args
            sampling, until = _generation(options)
            if (max_context := self.max_length - (sampling.max_tokens or 0)) <= 0:
                raise InvalidRequest("max_gen_toks", f"must be less than the context of {self.max_length} tokens")
            prompts.append(self.tok_encode(context)[-max_context:])
            choices.append(sampling)
            stops.append(until)
        answers = [
            cut(self.tokenizer.decode(ids, skip_special_tokens=True), until)
            for ids, until in zip(self._answers(prompts, choices), stops, strict=True)
        ]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def _transcript(self, context: list[int], continuation: list[int]) -> Transcript:
        """Keeps the last ``max_length + 1`` tokens; the model predicts the last one but does not read it."""
        if not 0 < len(continuation) <= self.max_length or not context:
            raise InvalidRequest(
                "task", f"has a continuation of {len(continuation)} tokens; the context is {self.max_length}"
            )
        tokens = (*context, *continuation)[-(self.max_length + 1) :]
        return Transcript(tokens, len(tokens) - len(continuation))

    @abstractmethod
    def _scores(self, transcripts: Sequence[Transcript]) -> Sequence[tuple[float, bool]]:
        """Returns the log likelihood of each answer, and whether greedy decoding gives it."""

    @abstractmethod
    def _answers(self, prompts: Sequence[list[int]], choices: Sequence[SamplingParams]) -> Iterable[Sequence[int]]:
        """Returns the answer to each prompt."""


class LocalLM(PairLM):
    """The pair in ``pair_folder``, which computes in this process.

    Args:
        dtype: Type of weights and activations. None means the device's native type.
        threads: Number of CPU threads. None keeps torch's setting.

    Raises:
        InvalidPair: as ``load_whole``.
    """

    def __init__(
        self,
        pair_folder: Path,
        *,
        dtype: DTypeName | None = None,
        device: str = "auto",
        threads: int | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        pair = load_whole(pair_folder, digests=True)
        super().__init__(pair, min(pair.full_config.max_positions, pair.decoder_config.max_positions))
        self._device = resolve_device(device)
        self._dtype: DTypeName = dtype or native_dtype(self._device)

    def _scores(self, transcripts: Sequence[Transcript]) -> Sequence[tuple[float, bool]]:
        order = sorted(range(len(transcripts)), key=lambda i: len(transcripts[i].token_ids), reverse=True)
        longest_first = [transcripts[i] for i in order]
        results: list[tuple[float, bool]] = [(0.0, True)] * len(transcripts)
        max_tokens = cache_tokens(longest_first)
        full, decoder = (BatchModel(model, max_tokens) for model in self._models)
        places = iter(order)
        for batch in batches(longest_first):
            first = _judge(full.read_prompts(batch), torch.tensor([t.answer[0] for t in batch]))
            rest = _judge(decoder.read_answers(batch, full, self.pair.layer_map), target_tokens(batch, 1))
            start = 0
            for row, transcript in enumerate(batch):
                rows = slice(start, start + len(transcript.answer) - 1)
                value = float(first[0][row] + rest[0][rows].sum())
                results[next(places)] = value, bool(first[1][row] and rest[1][rows].all())
                start = rows.stop
        return results

    def _answers(self, prompts: Sequence[list[int]], choices: Sequence[SamplingParams]) -> Iterable[Sequence[int]]:
        return (completion.token_ids for completion in self._engine.generate(prompts, choices))

    @cached_property
    def _models(self) -> tuple[ForwardModel, ForwardModel]:
        """The full model and the decoder, for scoring."""
        return (
            load_model(self.pair, "full", self._dtype, self._device, self.max_length),
            load_model(self.pair, "decoder", self._dtype, self._device, self.max_length),
        )

    @cached_property
    def _engine(self) -> LLM:
        """Both models in an engine of their own, for generating."""
        return LLM(self.pair.folder, dtype=self._dtype, device=str(self._device), memory_fraction=_ENGINE_MEMORY)


def cut(text: str, until: Sequence[str]) -> str:
    """Cuts ``text`` at the first stop string."""
    for stop in until:
        if stop:
            text = text.split(stop)[0]
    return text


def _generation(options: Mapping[str, Any]) -> tuple[SamplingParams, list[str]]:
    """Converts a request's options to sampling parameters and stop strings; the default is greedy."""
    known = {"until", "do_sample", *_LENGTH_NAMES, *_SAMPLING_NAMES}
    if other := sorted(set(options) - known):
        raise InvalidRequest("generation_kwargs", f"{', '.join(other)} is not supported; supported: {sorted(known)}")
    until = options.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    limit = next((int(options[name]) for name in _LENGTH_NAMES if options.get(name) is not None), MAX_TOKENS)
    temperature = float(options.get("temperature") or 0.0)
    if not options.get("do_sample", temperature > 0) or temperature == 0:
        return SamplingParams(temperature=0.0, max_tokens=limit), stops
    chosen = {name: options[name] for name in _SAMPLING_NAMES if options.get(name) is not None}
    return SamplingParams(**chosen, max_tokens=limit), stops


def _judge(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns, on the CPU, the targets' log likelihoods under [N, vocab] logits and whether each is the argmax."""
    targets = targets.to(logits.device)
    values = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return values.cpu(), (logits.argmax(-1) == targets).cpu()
