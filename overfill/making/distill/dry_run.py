"""Try a recipe with random weights: its exact widths, two layers, a small vocabulary, two steps.

A dry run checks that such a pair trains, can be saved, and gives the same logits in plain transformers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from overfill.errors import InvalidPair, InvalidRequest
from overfill.making.checkpoint import copy_companions, write_json, write_weights
from overfill.making.conversations import Transcript
from overfill.making.distill.model import PackedModel
from overfill.making.distill.packed_rows import PackedRows
from overfill.making.distill.recipe import Recipe, changed
from overfill.making.distill.train import Run
from overfill.making.manifest import write_manifest
from overfill.making.tiny import make_tiny_pair
from overfill.model.config import ModelConfig
from overfill.model.manifest import Pair
from overfill.pair.hf_config import decoder_config
from overfill.pair.hf_model import load_hf_model
from overfill.telemetry.progress import Report, silent

LAYERS = 2
VOCAB = 512
STEPS = 2
_TOLERANCE = 1e-3  # between logits


@dataclass(frozen=True, slots=True)
class DryRun:
    """The result of a dry run.

    Attributes:
        shapes: Shapes of the matrices in the decoder's first layer, by name.
        parameters: Number of parameters of the trained decoder.
        difference: Largest difference between the logits of transformers and of training, after reloading.
    """

    shapes: dict[str, tuple[int, ...]]
    parameters: int
    difference: float


def dry_run(
    recipe: Recipe, folder: Path, *, layers: int = LAYERS, vocab: int = VOCAB, report: Report = silent
) -> DryRun:
    """Tries ``recipe`` in the empty ``folder``.

    Raises:
        InvalidRequest: the recipe has no sizes.
        InvalidPair: the trained decoder gives other logits in transformers.
    """
    if recipe.full is None or recipe.decoder is None:
        raise InvalidRequest("recipe", "a dry run needs the sizes of both models: [full] and [decoder]")
    source = _random_pair(recipe, folder / "source", layers, vocab)
    training = changed(recipe.training, steps=STEPS, batch_transcripts=4, eval_steps=STEPS)
    transcripts = _random_transcripts(12, vocab)
    pair = Run(source, folder / "out", list(transcripts[:8]), transcripts[8:], training, report=report).train()
    model = PackedModel.load(pair.decoder_path, torch.float32, torch.device("cpu"))
    plain = load_hf_model(pair.decoder_path)
    tokens = transcripts[0]
    with torch.inference_mode():
        expected = model(PackedRows.of_whole([tokens])) @ model.head.T
        found = plain(input_ids=torch.tensor([tokens.token_ids[:-1]])).logits[0]
    difference = float((found - expected).abs().max())
    if not difference < _TOLERANCE:
        raise InvalidPair(f"{pair.decoder_path}: transformers' logits differ by {difference:.3g} from training's")
    shapes = {
        name.removeprefix("model.layers.0."): tuple(p.shape)
        for name, p in model.named_parameters()
        if name.startswith("model.layers.0.") and p.dim() == 2
    }
    return DryRun(shapes, sum(p.numel() for p in model.parameters()), difference)


def _random_pair(recipe: Recipe, folder: Path, layers: int, vocab: int) -> Pair:
    full, sizes = recipe.full, recipe.decoder
    assert full is not None
    assert sizes is not None
    make_tiny_pair(
        folder,
        identity=True,
        hidden_size=full.hidden_size,
        intermediate_size=full.intermediate_size,
        num_layers=layers,
        num_heads=full.num_heads,
        num_kv_heads=full.num_kv_heads,
        head_dim=full.head_dim,
        vocab_size=vocab,
    )
    decoder = folder / "decoder"
    decoder.mkdir()
    config = decoder_config(
        json.loads((folder / "full" / "config.json").read_text(encoding="utf-8")),
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_layers=layers,
        tie_word_embeddings=False,
    )
    write_json(decoder / "config.json", config)
    copy_companions(folder / "full", decoder)
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in PackedModel(ModelConfig.load(decoder)).named_parameters()}
    write_weights(
        decoder,
        {
            name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * shape[1] ** -0.5
            for name, shape in shapes.items()
        },
    )
    return write_manifest(folder, recipe={"method": "random"})


def _random_transcripts(count: int, vocab: int) -> list[Transcript]:
    ids = torch.randint(2, vocab, (count, 48), generator=torch.Generator().manual_seed(1)).tolist()
    return [Transcript(tuple(row), 16) for row in ids]
