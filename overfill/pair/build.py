"""From a full model to a pair folder: calibrate, score, slice, and write the manifest, all or nothing."""

from __future__ import annotations

import os
from pathlib import Path

from overfill.model.config import ModelConfig
from overfill.pair.atomic import atomic_folder
from overfill.pair.calibrate import packaged_prompts, write_answers
from overfill.pair.manifest import Pair, write_manifest
from overfill.pair.progress import Report, silent
from overfill.pair.prune import Scores, check_size, score_mlp, slice_mlp

SCORES_FILE = "scores.safetensors"


def score(full: Path, report: Report = silent) -> Scores:
    """Importance of the MLP neurons of ``full``, on its own answers to the packaged prompts."""
    return score_mlp(full, write_answers(full, packaged_prompts(), report=report), report)


def build_pair(full: Path, out: Path, intermediate_size: int, report: Report = silent) -> Pair:
    """Makes the folder ``out`` a pair, as ``fill_pair`` does, all or nothing; replaces what is there."""
    with atomic_folder(out) as folder:
        fill_pair(folder, full, intermediate_size, report=report)
    return Pair.load(out)


def fill_pair(
    folder: Path,
    full: Path,
    intermediate_size: int,
    *,
    scores: Scores | None = None,
    report: Report = silent,
) -> None:
    """Fills the empty ``folder`` with a pair of the checkpoint in ``full`` and a decoder with smaller MLPs.

    ``full/`` is a relative link to ``full``; the scores are kept in ``scores.safetensors``. A decoder as
    large as the full model is the full model: an identity pair.

    Args:
        intermediate_size: neurons that each MLP of the decoder keeps.
        scores: those of ``full``; None computes them, which takes most of the time.

    Raises:
        InvalidPair: ``full`` is not a usable checkpoint, or the size is out of range.
        UnsupportedModel: the engine does not run ``full``.
    """
    config = ModelConfig.load(full)
    check_size(config, intermediate_size)
    # realpath: a link is resolved against the real place of the folder that holds it.
    (folder / "full").symlink_to(os.path.relpath(os.path.realpath(full), os.path.realpath(folder)))
    if intermediate_size == config.intermediate_size:
        write_manifest(folder, decoder="full", report=report)
        return
    scores = score(full, report) if scores is None else scores
    scores.save(folder / SCORES_FILE)
    (folder / "decoder").mkdir()
    slice_mlp(full, scores, intermediate_size, folder / "decoder")
    recipe = {
        "mlp": {
            "method": "activation-importance",
            "intermediate_size": intermediate_size,
            "full_intermediate_size": config.intermediate_size,
            "calibration": "answers of the full model to the packaged prompts",
        }
    }
    write_manifest(folder, recipe=recipe, report=report)
