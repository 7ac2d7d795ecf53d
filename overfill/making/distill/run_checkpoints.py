"""Writes a run's checkpoints and its finished pair, each atomically."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from overfill.making.atomic import atomic_folder, remove_leftovers
from overfill.making.checkpoint import (
    copy_companions,
    link_relatively,
    save_tensors,
    stored_dtype,
    write_json,
    write_weights,
)
from overfill.making.distill.model import PackedModel
from overfill.making.overlap import TextDigests
from overfill.making.pair_json import write_manifest
from overfill.model.files import HEAD
from overfill.model.manifest import Pair
from overfill.telemetry.progress import Report, silent


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Progress of a run: steps done, answer tokens learnt, and seconds of training without evaluation and saving."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Checkpoints:
    """``step-<number>/`` folders with the trained parameters in float32, the optimiser's moments and the progress.

    A resumed run continues exactly from these, because the position in the data, the learning rate and all random seeds
    follow from the progress.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def latest(self) -> Path | None:
        """Returns the folder of the last checkpoint, or None."""
        return max(self._folder.glob("step-*"), default=None)

    def save(self, decoder: PackedModel, optimizer: torch.optim.Optimizer, progress: TrainingState) -> None:
        """Writes a checkpoint, then deletes older ones."""
        target = self._folder / f"step-{progress.step:08d}"
        if target.exists():
            return
        remove_leftovers(target)
        with atomic_folder(target) as folder:
            trained = {name: p.detach().cpu().contiguous() for name, p in decoder.trained.items()}
            save_tensors(trained, folder / "decoder.safetensors")
            save_tensors(_moments(optimizer), folder / "optimizer.safetensors")
            write_json(folder / "progress.json", asdict(progress))
        for old in self._folder.glob("step-*"):
            if old != target:
                shutil.rmtree(old)

    @torch.no_grad()
    def load(self, folder: Path, decoder: PackedModel, optimizer: torch.optim.Optimizer) -> TrainingState:
        """Restores the checkpoint in ``folder`` into ``decoder`` and ``optimizer``."""
        stored = load_file(folder / "decoder.safetensors")
        for name, parameter in decoder.trained.items():
            parameter.copy_(stored[name])
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in load_file(folder / "optimizer.safetensors").items():
            key, _, index = name.rpartition(".")
            state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return TrainingState(**json.loads((folder / "progress.json").read_text()))


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Flattens the optimiser's state to tensors named ``<state>.<index of the parameter>``."""
    state = optimizer.state_dict()["state"]
    return {f"{key}.{index}": value.cpu() for index, values in state.items() for key, value in values.items()}


def write_pair(
    out: Path,
    source: Pair,
    decoder: PackedModel,
    distilled: Mapping[str, Any],
    extras: Sequence[Path],
    text: TextDigests | None,
    report: Report = silent,
) -> Pair:
    """Writes the pair ``out``: a link to the full model of ``source``, and ``decoder`` in the dtype of its decoder.

    Args:
        distilled: Facts of the training, recorded in the manifest's recipe under ``distill``.
        extras: Files to copy to ``distill/``.
        text: Digests of the training text, which the pair keeps beside those of ``source``. None if they are not known.
            If either is not known, the pair keeps none, because a part would pass for all of the text.
    """
    dtype = stored_dtype(source.decoder_path)
    recipe = dict(source.recipe)
    if "distill" in recipe:
        distilled = {**distilled, "after": recipe["distill"]}
    with atomic_folder(out) as folder:
        link_relatively(folder / "full", source.full_path)
        (folder / "decoder").mkdir()
        # A head in two parts stays in float32, because rounding would raise the rank of its low-rank part.
        wide = {HEAD} if decoder.config.tail_rank else set()
        tensors = {n: t.to("cpu", torch.float32 if n in wide else dtype) for n, t in decoder.checkpoint().items()}
        write_weights(folder / "decoder", tensors)
        shutil.copyfile(source.decoder_path / "config.json", folder / "decoder" / "config.json")
        copy_companions(source.decoder_path, folder / "decoder")
        (folder / "distill").mkdir()
        before = TextDigests.load(source)
        if text is not None and before is not None:
            (text | before).save(folder)
        for file in extras:
            shutil.copyfile(file, folder / "distill" / file.name)
        write_manifest(folder, layer_map=source.layer_map, recipe={**recipe, "distill": dict(distilled)}, report=report)
    return Pair.load(out)
