"""Compare pruned decoders with plain quantisation of the full model: quality per byte and operation of a decode step.

Every decoder and the full model itself are judged at each of ``PRECISIONS``. Pruning saves bytes and operations and
composes with quantisation; quantisation alone saves bytes. Compare points of equal precision: the default full model
comes from 4-bit weights (``pair.sources``), so that a 4-bit copy of its layers loses nothing, unlike other checkpoints.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from overfill.api.tokenizer import Tokenizer
from overfill.engine.device import native_dtype, resolve_device
from overfill.errors import InvalidRequest
from overfill.kv.spec import DTypeName
from overfill.kv.tensors import TORCH_DTYPES
from overfill.making.conversations import Transcript
from overfill.making.evaluate.costs import PRECISIONS, DecodeCost, Precision
from overfill.making.evaluate.evaluation import check_lengths, longest_sequence
from overfill.making.evaluate.fake_quantization import fake_quantized_model
from overfill.making.evaluate.free_running import Comparison, FreeRunning, answer_limit, judge_free_running
from overfill.making.evaluate.teacher_forced import Candidate, scorable, teacher_forced
from overfill.making.evaluate.token_metrics import Estimate
from overfill.model.config import ModelConfig
from overfill.model.loading import Weights, load_weights
from overfill.model.manifest import Pair
from overfill.model.native.transformer import fastest_model
from overfill.model.pair_files import check_digests, load_whole
from overfill.model.transformer import Transformer
from overfill.telemetry.progress import Report, silent

FULL = "full model"
NOTE = (
    "The named pairs' full model, as the wheel has it, has 4-bit layers, and a head with more bits per weight. int4 "
    "therefore leaves its layers as they are, and only rounding the head costs quality. Other models and pruned "
    "decoders do lose quality at int4: compare pruned and unpruned decoders at equal precision."
)


FREE_RUNNING: tuple[Precision, ...] = ("bf16", "int8", "int4+int8 head")
"""Precisions at which decoders also write answers. A 4-bit head is left out: it costs even the full model quality."""


@dataclass(frozen=True, slots=True)
class TradeoffPoint:
    """One decoder at one precision, judged on the unquantised full model's KV of the prompt.

    Attributes:
        name: The pair's name, or ``full model``.
        free: Figures of the answers that it writes, beside the unquantised full model's. None if it wrote none.
    """

    name: str
    precision: Precision
    cost: DecodeCost
    agreement: Estimate
    nll: Estimate
    kl: Estimate
    free: Comparison | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"free": None if self.free is None else self.free.to_json()}


def compare(
    pair_folders: Sequence[Path],
    transcripts: Sequence[Transcript],
    *,
    free_running: bool = True,
    max_tokens: int | None = None,
    dtype: DTypeName | None = None,
    device: str = "auto",
    threads: int | None = None,
    report: Report = silent,
) -> Iterator[TradeoffPoint]:
    """Judges the full model and each pair's decoder at every precision, one after the other.

    Memory holds the full model, one decoder, and a copy of that at one precision. Ignores the pairs' own quantisation.
    Takes the arguments of ``evaluate`` and raises its errors. Only precisions in ``FREE_RUNNING`` write answers.

    Raises:
        InvalidRequest: the pairs have different full models, or two have the same name.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    where = resolve_device(device)
    torch_dtype = TORCH_DTYPES[dtype or native_dtype(where)]
    kept = scorable(transcripts)
    pairs = [load_whole(folder) for folder in pair_folders]
    _check_comparable(pairs)
    for pair in pairs:
        check_lengths(pair, kept)
    check_digests(pairs, report=report)
    max_tokens = max_tokens or answer_limit(kept)
    positions = longest_sequence(kept, max_tokens)
    tokenizer = Tokenizer.load(pairs[0].full_path)
    config = pairs[0].full_config
    weights = load_weights(pairs[0].full_path, config, torch_dtype, where)
    full = fastest_model(Transformer(config, weights, min(positions, config.max_positions)))
    whole, smaller = Candidate(full, range(config.num_layers)), [p for p in pairs if p.decoder_digest != p.full_digest]
    written = FREE_RUNNING if free_running else ()

    def write(decoder: Candidate, name: str) -> FreeRunning:
        return judge_free_running(full, tokenizer, decoder, kept, max_tokens, title=name, report=report)

    own = write(whole, FULL) if free_running else None

    def judge(name: str, config: ModelConfig, weights: Weights, layer_map: Sequence[int]) -> Iterator[TradeoffPoint]:
        # One precision at a time, because each is a copy of the decoder; the full model reads every transcript again.
        limit = min(positions, config.max_positions)

        def judge_at(precision: Precision) -> TradeoffPoint:
            title = f"{name}, {precision}"
            decoder = Candidate(fastest_model(fake_quantized_model(config, weights, precision, limit)), layer_map)
            _, judged = teacher_forced(full, decoder, kept, step=f"Judging: {title}", report=report)
            free = write(decoder, title).beside(own) if own is not None and precision in written else None
            figures = judged["two_stage"]
            return TradeoffPoint(
                name=name,
                precision=precision,
                cost=DecodeCost.of(config, precision),
                agreement=figures.agreement.overall,
                nll=figures.nll.overall,
                kl=figures.kl.overall,
                free=free,
            )

        yield from map(judge_at, PRECISIONS)

    yield from judge(FULL, config, weights, range(config.num_layers))
    del weights
    for pair in smaller:
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
    name, count = Counter(p.name for p in pairs).most_common(1)[0]
    if count > 1:
        raise InvalidRequest("pairs", f"{count} are named {name}; rename their folders")
