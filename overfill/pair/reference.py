"""Judge served tokens against an independent two-stage reference in plain transformers.

The reference shares no forward pass with the engine. The full model reads the prompt into a ``DynamicCache``. The
decoder reads the answer on that cache: its layer i uses the keys and values of full layer ``layer_map[i]``. All
arithmetic is float32; an int8 decoder has its dequantised weights.

Several decoders of one full model, the tiers of a stack, may write parts of one answer. Each part is then judged by its
own tier's decoder. PEFT loads the adapters; the decoder with its adapter then computes the end of the prompt too.

Answers are greedy or drawn with a seed. Each token is judged after the answer's own tokens before it, so that a tie
does not put the rest of the answer in doubt.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from overfill.errors import InvalidPair
from overfill.kv.spec import Quantization
from overfill.model.manifest import HALVES, Pair
from overfill.model.pair_files import load_whole
from overfill.model.processors import new_processor, process
from overfill.pair.hf_model import cache_argument, load_hf_model, round_to_int8
from overfill.pair.margins import TIE_MARGIN, judge_rows
from overfill.request.names import FinishReason
from overfill.request.params import SamplingParams
from overfill.settings.tiers import TierSpec

if TYPE_CHECKING:
    from peft import PeftModel

GREEDY = SamplingParams(temperature=0)

MAX_TIES_PER_TOKEN = 1e-3
"""Largest share of ties with which a run still passes."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The reference's judgement of one token of an answer.

    Attributes:
        index: Index of the token in the answer; one past the end for the stop token, which workers do not send.
        token_id, reference_id: The judged token, and the reference's token.
        margin: How far the judged token is from being the reference's, in logits (``judge_rows``).
    """

    index: int
    token_id: int
    reference_id: int
    margin: float

    @property
    def kind(self) -> Literal["identical", "tie", "error"]:
        if self.token_id == self.reference_id:
            return "identical"
        return "tie" if self.margin <= TIE_MARGIN else "error"


class TwoStageReference:
    """The two-stage reference of the pair in ``pair_folder``.

    Args:
        quantize: replaces the format of the decoder's matrices; None leaves that of the pair.
        shares: reference of another pair with the same full model, which this one uses too.

    Raises:
        InvalidPair: as ``load_whole``, transformers cannot load a half, or ``shares`` has another full
            model.
    """

    def __init__(
        self, pair_folder: Path, quantize: Quantization | None = None, shares: TwoStageReference | None = None
    ) -> None:
        pair = load_whole(pair_folder, HALVES if shares is None else ["decoder"], digests=True)
        if shares is not None and shares.pair.full_digest != pair.full_digest:
            raise InvalidPair(f"{pair.folder} and {shares.pair.folder} have different full models")
        self.pair: Pair = pair if quantize is None else pair.with_quantize(quantize)
        self._full: PreTrainedModel = load_hf_model(self.pair.full_path) if shares is None else shares._full
        self._decoder = self._full if self.pair.identity else self._load_decoder()
        self._adapted: PeftModel | None = None  # another copy of the decoder, with all adapters
        self._adapter = ""  # name in ``_adapted`` of the adapter that writes

    def with_adapters(self, folders: Mapping[str, Path]) -> dict[str, TwoStageReference]:
        """Returns references with an adapter each, by its name. They share the models.

        Args:
            folders: folder with PEFT's files of each adapter, by name.

        Raises:
            InvalidPair: PEFT cannot load an adapter.
        """
        from peft import PeftModel

        adapted: PeftModel | None = None
        references = {}
        for number, (name, folder) in enumerate(folders.items()):
            one = references[name] = copy.copy(self)
            one._adapter = f"adapter{number}"  # PEFT takes no name with a dot
            how: Any = {"adapter_name": one._adapter, "torch_device": "cpu"}
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)  # of transformers, about what PEFT reads
                    if adapted is None:
                        adapted = PeftModel.from_pretrained(self._load_decoder(), folder, **how)
                    else:
                        adapted.load_adapter(folder, **how)
            except (OSError, ValueError, RuntimeError, KeyError) as error:
                raise InvalidPair(f"{folder}: PEFT cannot load this adapter: {error}") from error
        for one in references.values():
            one._adapted = adapted
        return references

    def _load_decoder(self) -> PreTrainedModel:
        decoder = load_hf_model(self.pair.decoder_path)
        if self.pair.quantize == "int8":
            round_to_int8(decoder)
        return decoder

    @torch.inference_mode()
    def score(
        self,
        prompt_ids: Sequence[int],
        answer_ids: Sequence[int],
        stop_ids: Collection[int] = (),
        sampling: SamplingParams = GREEDY,
        sample_index: int = 0,
        answer_start: int | None = None,
    ) -> list[Verdict]:
        """Judges each token, given the prompt and the tokens before it.

        Args:
            stop_ids: Ids of the stop tokens if an unsent stop token ended the answer; else empty. The one of them with
                the least margin is then judged as the answer's last token.
            sampling: Parameters of the request, without a grammar; they have a seed unless they are greedy.
            sample_index: Number of the answer among the request's answers.
            answer_start: Index of the first prompt token that the decoder computes. None means the prompt's length: the
                full model chooses the first token.
        """
        cache, first = self._prefill(prompt_ids, answer_start)
        inputs = list(answer_ids) if stop_ids else list(answer_ids[:-1])
        logits = torch.cat([first, self._decode(inputs, len(prompt_ids), cache)]) if inputs else first
        processor = new_processor(sampling, prompt_ids, None, self.pair.full_config.eos_token_ids)
        for index in range(len(logits)):
            process(logits[index : index + 1], [processor], [answer_ids[:index]])
        positions = range(len(prompt_ids), len(prompt_ids) + len(logits))
        chosen, margins = judge_rows(logits, sampling, positions, sample_index)
        judged = [*answer_ids]
        if stop_ids:
            candidates = sorted(stop_ids)
            judged.append(candidates[int(margins[-1, candidates].argmin())])
        return [
            Verdict(index, token, int(chosen[index]), float(margins[index, token]))
            for index, token in enumerate(judged)
        ]

    @torch.inference_mode()
    def generate(self, prompt_ids: Sequence[int], max_tokens: int, answer_start: int | None = None) -> list[int]:
        """Writes the greedy answer: at most ``max_tokens`` tokens, without the end-of-sequence token.

        Args:
            answer_start: As for ``score``.
        """
        eos_ids = self.pair.full_config.eos_token_ids
        cache, logits = self._prefill(prompt_ids, answer_start)
        answer: list[int] = []
        while (token := int(logits[-1].argmax())) not in eos_ids:
            answer.append(token)
            if len(answer) == max_tokens:
                break
            logits = self._decode([token], len(prompt_ids) + len(answer) - 1, cache)
        return answer

    def _prefill(self, prompt_ids: Sequence[int], answer_start: int | None = None) -> tuple[DynamicCache, torch.Tensor]:
        """Returns the decoder's cache of the prompt, and the logits after it, [1, vocab].

        The full model writes the cache's part before ``answer_start``, earlier turns of a chat included.
        """
        start = len(prompt_ids) if answer_start is None else answer_start
        shared, tail = list(prompt_ids[:start]), list(prompt_ids[start:])
        full_cache: Any = DynamicCache(config=self._full.config)
        logits = _forward(self._full, shared, 0, full_cache)
        cache = DynamicCache(config=self._decoder.config)
        for layer, source in enumerate(self.pair.layer_map):
            cache.update(full_cache.layers[source].keys, full_cache.layers[source].values, layer)
        if tail:
            logits = self._decode(tail, len(shared), cache)
        return cache, logits[-1:]

    def _decode(self, token_ids: list[int], position: int, cache: DynamicCache) -> torch.Tensor:
        """As ``_forward``, of the decoder with its adapter."""
        if not self._adapter or self._adapted is None:
            return _forward(self._decoder, token_ids, position, cache)
        self._adapted.set_adapter(self._adapter)
        return _forward(cast(PreTrainedModel, self._adapted.get_base_model()), token_ids, position, cache)


def _forward(model: PreTrainedModel, token_ids: list[int], position: int, cache: DynamicCache) -> torch.Tensor:
    """Computes the logits after each token, the first at ``position``, and extends the cache. [tokens, vocab]"""
    output = model(
        input_ids=torch.tensor([token_ids]),
        position_ids=torch.arange(position, position + len(token_ids))[None],
        use_cache=True,
        **{cache_argument(model): cache},
    )
    logits: torch.Tensor = output.logits[0]
    return logits


@dataclass(frozen=True, slots=True)
class JudgedAnswer:
    """The judgement of one answer.

    Attributes:
        verdicts: One per judged token.
        problem: Problem of the answer as a whole, such as that it did not arrive; None means there is none.
    """

    verdicts: tuple[Verdict, ...]
    problem: str | None = None

    @property
    def first_error(self) -> Verdict | None:
        """The first token that is neither the reference's nor a tie."""
        return next((v for v in self.verdicts if v.kind == "error"), None)

    @property
    def correct(self) -> bool:
        return self.problem is None and self.first_error is None

    @property
    def identical(self) -> bool:
        return self.problem is None and all(v.kind == "identical" for v in self.verdicts)


def load_references(tiers: Iterable[TierSpec]) -> dict[str, TwoStageReference]:
    """Loads the reference of each tier, by name. They share the full model, which is loaded once.

    Args:
        tiers: each with its pair's folder.

    Raises:
        InvalidPair: as ``TwoStageReference``.
    """
    references: dict[str, TwoStageReference] = {}
    for tier in tiers:
        first = next(iter(references.values()), None)
        references[tier.name] = TwoStageReference(Path(tier.pair), quantize=tier.quantize, shares=first)
    return references


def judge(
    reference: TwoStageReference,
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int],
    finish_reason: FinishReason,
    max_tokens: int,
) -> JudgedAnswer:
    """Judges a served greedy answer, its end included.

    When the answer stopped, the reference must end it there too. When it reached its limit, it must have ``max_tokens``
    tokens.
    """
    return judge_parts({"": reference}, [("", 0)], prompt_ids, answer_ids, finish_reason, max_tokens)


def judge_parts(
    references: Mapping[str, TwoStageReference],
    parts: Sequence[tuple[str, int]],
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int],
    finish_reason: FinishReason,
    max_tokens: int,
    sampling: SamplingParams = GREEDY,
    sample_index: int = 0,
    answer_start: int | None = None,
) -> JudgedAnswer:
    """As ``judge``, for a greedy or drawn answer that several tiers, or an adapter, may have written.

    Each part is judged by its own tier.

    The decoder of a part reads the prompt's KV, which the full model computed, and all earlier tokens of the answer, as
    the worker does that goes on with the answer. Token 0 is the full model's in every tier, unless there is an
    ``answer_start``.

    Args:
        references: tier or adapter -> its reference. All have the same full model.
        parts: tier or adapter and index of the first token of each part, in order; the first index is 0.
        sampling, sample_index, answer_start: as for ``TwoStageReference.score``.
    """
    eos_ids = next(iter(references.values())).pair.full_config.eos_token_ids
    unsent_stop = finish_reason == "stop" and not (answer_ids and answer_ids[-1] in eos_ids)
    if finish_reason == "length" and len(answer_ids) != max_tokens:
        return JudgedAnswer((), f"has {len(answer_ids)} tokens and no stop token, but {max_tokens} were asked for")
    if unsent_stop and not eos_ids:
        return JudgedAnswer((), "was stopped, but the model has no end-of-sequence token")
    starts = [start for _, start in parts]
    if not starts or starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] > len(answer_ids):
        return JudgedAnswer((), f"has parts from {starts}, which do not divide {len(answer_ids)} tokens")
    if unknown := sorted({tier for tier, _ in parts} - references.keys()):
        return JudgedAnswer((), f"was written by the tier {unknown[0]!r}, whose pair was not given")
    verdicts: list[Verdict] = []
    for index, (tier, start) in enumerate(parts):
        last = index == len(parts) - 1
        end = len(answer_ids) if last else starts[index + 1]
        if end > start or (last and unsent_stop):
            stop_ids = eos_ids if last and unsent_stop else ()
            judged = references[tier].score(
                prompt_ids, answer_ids[:end], stop_ids, sampling, sample_index, answer_start
            )
            verdicts += judged[start:]
    return JudgedAnswer(tuple(verdicts))


@dataclass(frozen=True, slots=True)
class Summary:
    """The result of a whole run.

    Attributes:
        answers: Number of answers that were requested.
        correct: Answers without a problem or an error.
        identical: Answers in which every token is the reference's.
        ties, tokens: Totals over all judged answers.
    """

    answers: int
    correct: int
    identical: int
    ties: int
    tokens: int

    @property
    def passed(self) -> bool:
        """True if every answer is correct and at most one token in a thousand is a tie."""
        return self.correct == self.answers > 0 and self.ties <= MAX_TIES_PER_TOKEN * self.tokens

    def __str__(self) -> str:
        return f"{self.correct}/{self.answers} correct ({self.identical} identical, {self.ties} ties)"


def summarise(judged: Sequence[JudgedAnswer]) -> Summary:
    """Sums up all requested answers; an answer that did not arrive has a ``problem``."""
    kinds = [verdict.kind for answer in judged for verdict in answer.verdicts]
    return Summary(
        answers=len(judged),
        correct=sum(answer.correct for answer in judged),
        identical=sum(answer.identical for answer in judged),
        ties=kinds.count("tie"),
        tokens=len(kinds),
    )
