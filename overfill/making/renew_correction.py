"""Writes the correction of a named pair from a low-rank training run: ``python -m overfill.making.renew_correction``.

For maintainers; CONTRIBUTING.md has the steps.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from overfill.errors import InvalidRequest
from overfill.making.build import SHIPPED_SCORES, encode_calibration, fit_key
from overfill.making.conversations import shipped_conversations
from overfill.making.correction import CORRECTIONS, corrected_shapes, write_correction
from overfill.making.distill.run_checkpoints import Checkpoints
from overfill.making.distill.train import run_folder
from overfill.making.named import RECIPES
from overfill.making.overlap import TextDigests
from overfill.making.prune import Scores
from overfill.model.manifest import Pair


def renew(name: str, trained: Path, corrections: Path = CORRECTIONS) -> list[Path]:
    """Writes the correction of the named pair ``name``; returns its files.

    Args:
        trained: Pair that ``overfill pair distill NAME --rank N`` wrote, with the run's folder beside it.

    Raises:
        InvalidRequest: the run trained another pair, or not by factors.
    """
    pair = Pair.load(trained)
    run, before = pair.recipe.get("distill", {}), pair.recipe.get("correction", {})
    expected = RECIPES[name].as_json(
        **RECIPES[name].sizes(pair.full_config), calibration="shipped", fitted_on_answer_tokens=RECIPES[name].tokens
    )
    if other := sorted(key for key, value in expected.items() if pair.recipe.get(key) != value):
        raise InvalidRequest("trained", f"{trained} was not trained from {name}: {', '.join(other)} differ")
    if "rank" not in run or "after" in run:
        raise InvalidRequest("trained", f"{trained} was not trained by `overfill pair distill {name} --rank N` alone")
    if run.get("continues") != before.get("digest"):
        raise InvalidRequest(
            "trained", f"{trained} does not continue the correction of {name}; give a rank that is not smaller than its"
        )
    scores = Scores.load(SHIPPED_SCORES, pair.full_digest)
    folder = Checkpoints(run_folder(trained) / "checkpoints").latest()
    if scores is None or folder is None:
        missing = SHIPPED_SCORES if scores is None else run_folder(trained) / "checkpoints"
        raise InvalidRequest("trained", f"{missing} has nothing for {trained}")
    text = TextDigests.load(pair)
    if text is None:
        raise InvalidRequest(
            "trained", f"{trained} keeps no digests of its training text; write them with TextDigests.of(…).save"
        )
    stored = load_file(folder / "decoder.safetensors")
    shapes = corrected_shapes(pair.decoder_config)
    matrices = [key.removesuffix("weight") for key, shape in shapes.items() if len(shape) == 2]
    gains = [stored[key] - 1 for key, shape in shapes.items() if len(shape) == 1]  # those of a fitted decoder are 1
    transcripts = encode_calibration(pair.full_path, pair.full_config, shipped_conversations("calibration"))
    facts = {
        "key": fit_key(pair.full_digest, pair.full_config, RECIPES[name], scores, transcripts),
        "rank": run["rank"],
        "answer_tokens": run["tokens"] + before.get("answer_tokens", 0),
    }
    products = [(stored[f"{matrix}up"], stored[f"{matrix}down"]) for matrix in matrices]
    return write_correction(corrections / name, products, torch.cat(gains), text, facts)


if __name__ == "__main__":
    for file in renew(sys.argv[1], Path(sys.argv[2])):
        print(f"{file}: {file.stat().st_size} bytes")
