"""Corrections of fitted decoders: what low-rank training found, in few bytes, for the named pairs in the package.

A correction is the product of two factors for each projection, and a difference for each gain. It belongs to one fit,
which its key describes by what is equal on all machines. Factors are stored in groups of 32 values of 4 bits, each with
a scale. A correction has files of at most ``MAX_FILE_BYTES`` each: ``NAME-1-of-3.safetensors``, …
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from overfill.errors import InvalidPair
from overfill.making.checkpoint import save_tensors
from overfill.making.overlap import TextDigests
from overfill.model.config import ModelConfig
from overfill.model.files import EMBEDDING, HEAD
from overfill.model.head import tokens_in_row_order
from overfill.model.loading import expected_shapes

CORRECTIONS = Path(__file__).parent / "corrections"
"""Corrections of the named pairs; CONTRIBUTING.md says how to renew them."""

MAX_FILE_BYTES = 2_000_000
_TEXT_DIGESTS = 16_384  # 131 kB
_GROUP = 32
_FILE = re.compile(r"(.+)-\d+-of-\d+\.safetensors")
_METADATA = "correction"  # key of the facts in a file's metadata
_NUMBERS = "rank", "answer_tokens", "files"  # facts beside the key

_PARTS = {"full": "full model", "recipe": "recipe", "scores": "pruning scores", "text": "calibration text"}
"""Parts of a correction's key, by their names for users."""


@dataclass(frozen=True, slots=True)
class Correction:
    """A correction that has been read.

    Attributes:
        facts: ``key`` (what the fit depends on, by the names in ``_PARTS``), ``rank``, ``answer_tokens`` (trained on)
            and ``files``.
        digest: SHA-256 of the files, in hexadecimal.
        factors: [n] float32; for each matrix in the order of names, ``up`` [out, rank] and ``down`` [rank, in].
        gains: [m] float32; differences of all vectors, in the order of names.
        text: A sample of the digests of the training text.
    """

    facts: Mapping[str, Any]
    digest: str
    factors: Tensor
    gains: Tensor
    text: TextDigests

    @property
    def rank(self) -> int:
        return int(self.facts["rank"])

    def differs_in(self, key: Mapping[str, Any]) -> str | None:
        """Names the first part of ``key`` that is not the correction's; None if it is for this fit."""
        return next((name for part, name in _PARTS.items() if self.facts["key"].get(part) != key.get(part)), None)

    def products(self, config: ModelConfig) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns the factors ``up`` [out, rank] and ``down`` [rank, in] by the name of the matrix.

        Args:
            config: Geometry of the decoder.

        Raises:
            InvalidPair: the correction has another number of factors.
        """
        shapes = [(name, shape) for name, shape in corrected_shapes(config).items() if len(shape) == 2]
        sizes = [side * self.rank for _, shape in shapes for side in shape]
        if not 0 <= len(self.factors) - sum(sizes) < _GROUP:  # the last group is padded
            raise InvalidPair(f"the correction has {len(self.factors)} factors; this decoder has {sum(sizes)}")
        parts = iter(self.factors[: sum(sizes)].split(sizes))
        return {name: (next(parts).view(-1, self.rank), next(parts).view(self.rank, -1)) for name, _ in shapes}

    @torch.inference_mode()  # a fit makes inference tensors
    def add_to(self, tensors: Mapping[str, Tensor], config: ModelConfig) -> None:
        """Adds the correction to a decoder's tensors, in place.

        Args:
            tensors: Float32 tensors of the decoder by their Hugging Face names; the head has all rows.

        Raises:
            InvalidPair: the correction is for a decoder of other sizes.
        """
        whole = tokens_in_row_order(config.vocab_size, config.head_mask)[: config.head_tokens]
        for name, (up, down) in self.products(config).items():
            if name == HEAD:
                tensors[name].index_add_(0, whole, up @ down)
            else:
                tensors[name].add_(up @ down)
        vectors = [name for name, shape in corrected_shapes(config).items() if len(shape) == 1]
        sizes = [len(tensors[name]) for name in vectors]
        if sum(sizes) != len(self.gains):
            raise InvalidPair(f"the correction has {len(self.gains)} gains; this decoder has {sum(sizes)}")
        for name, gain in zip(vectors, self.gains.split(sizes), strict=True):
            tensors[name].add_(gain)


def corrected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of what a correction changes, in the order of names: all but the embedding.

    Of a head in two parts, only the whole rows are corrected.
    """
    shapes = {name: tuple(shape) for name, shape in sorted(expected_shapes(config).items()) if name != EMBEDDING}
    return shapes | ({HEAD: (config.head_tokens, config.hidden_size)} if HEAD in shapes else {})


def read_correction(stem: Path) -> Correction | None:
    """Reads a correction; returns None if there are no files of it.

    Args:
        stem: Path of the correction's files without ``-1-of-N.safetensors``, such as ``CORRECTIONS / "fast"``.

    Raises:
        InvalidPair: a file is missing or damaged, or a number is not finite.
    """
    files = _files(stem)
    if not files:
        return None
    facts: list[dict[str, Any]] = []
    factors: list[Tensor] = []
    gains: list[Tensor] = []
    text: list[int] = []
    digest = _digest(files)
    for file in files:
        try:
            with safe_open(file, "pt") as stored:
                found = json.loads(stored.metadata()[_METADATA])
                facts.append({"key": dict(found["key"]), **{name: int(found[name]) for name in _NUMBERS}})
                factors.append(_dequantised(stored.get_tensor("values"), stored.get_tensor("scales")))
                gains.append(stored.get_tensor("gains").float())
                text += stored.get_tensor("text").numpy().view("<u8").tolist()
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise InvalidPair(f"{file} is damaged; install the package again: {error}") from None
        if not (factors[-1].isfinite().all() and gains[-1].isfinite().all()):
            raise InvalidPair(f"{file} is damaged; install the package again: a number is not finite")
    if any(fact != facts[0] for fact in facts) or facts[0]["files"] != len(files):
        raise InvalidPair(f"{stem}-*.safetensors are not the files of one correction; install the package again")
    return Correction(facts[0], digest, torch.cat(factors), torch.cat(gains), TextDigests(text))


def shipped_correction(recipe: Mapping[str, Any]) -> Correction | None:
    """Returns the correction in the package that a pair's decoder contains.

    Returns None if there is none, as after a renewal, or if training changed the decoder since.

    Args:
        recipe: As in ``pair.json``.

    Raises:
        InvalidPair: a correction in the package is damaged.
    """
    digest = recipe.get("correction", {}).get("digest")
    if digest is None or "distill" in recipe:
        return None
    stems = {file.with_name(name) for file in CORRECTIONS.glob("*.safetensors") if (name := _name(file))}
    return next((read_correction(stem) for stem in sorted(stems) if _digest(_files(stem)) == digest), None)


def write_correction(
    stem: Path,
    products: Iterable[tuple[Tensor, Tensor]],
    gains: Tensor,
    text: TextDigests,
    facts: Mapping[str, Any],
) -> list[Path]:
    """Writes a correction in place of the one there; returns the files.

    Args:
        stem: As in ``read_correction``.
        products: ``up`` and ``down`` of each matrix, in the order of names.
        gains: [m]; differences of all vectors, in the order of names.
        text: Digests of the training text, of which a sample is kept.
        facts: As ``Correction.facts``, without ``files``.
    """
    values, scales = _quantised(torch.cat([factor.flatten() for pair in products for factor in pair]))
    digests = torch.from_numpy(np.array(text.sample(_TEXT_DIGESTS), dtype="<u8").view("<i8"))
    stored_bytes = values.nbytes + scales.nbytes + digests.nbytes + 2 * len(gains)
    count = -(-stored_bytes // (MAX_FILE_BYTES - 8_192))  # a header is shorter than that
    stem.parent.mkdir(exist_ok=True)
    for old in _present(stem):
        old.unlink()
    files = _numbered(stem, count)
    parts = zip(files, *(t.tensor_split(count) for t in (values, scales, gains.half(), digests)), strict=True)
    for file, *tensors in parts:
        contents = dict(zip(("values", "scales", "gains", "text"), (t.contiguous() for t in tensors), strict=True))
        save_tensors(contents, file, {_METADATA: json.dumps({**facts, "files": count}, sort_keys=True)})
    return files


def _name(file: Path) -> str | None:
    """The name of the correction that a file is part of, which may have hyphens; None for other files."""
    found = _FILE.fullmatch(file.name)
    return None if found is None else found[1]


def _present(stem: Path) -> set[Path]:
    return {file for file in stem.parent.glob("*.safetensors") if _name(file) == stem.name}


def _numbered(stem: Path, count: int) -> list[Path]:
    return [stem.with_name(f"{stem.name}-{i + 1}-of-{count}.safetensors") for i in range(count)]


def _files(stem: Path) -> list[Path]:
    """The files of a correction, in their order.

    Raises:
        InvalidPair: some are missing, or there are those of another correction too.
    """
    present = _present(stem)
    files = _numbered(stem, len(present))
    if present != set(files):
        raise InvalidPair(f"{stem}-*.safetensors are not the files of one correction; install the package again")
    return files


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        try:
            digest.update(file.read_bytes())
        except OSError as error:
            raise InvalidPair(f"{file} is damaged; install the package again: {error}") from None
    return digest.hexdigest()


def _quantised(values: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds to 4 bits; returns [groups, 16] uint8, two values in each, and the scales, [groups] float16.

    The value that is largest in magnitude becomes -8 times the scale.
    """
    groups = torch.nn.functional.pad(values.float(), (0, -len(values) % _GROUP)).view(-1, _GROUP)
    scales = (groups.gather(1, groups.abs().argmax(1, keepdim=True)) / -8).half()
    steps = (groups / scales.float()).nan_to_num(0).round().clamp(-8, 7).to(torch.int8)
    low, high = (steps + 8).to(torch.uint8).chunk(2, dim=1)
    return low | high << 4, scales.squeeze(1)


def _dequantised(values: Tensor, scales: Tensor) -> Tensor:
    """Inverts ``_quantised``, but for rounding and the padding. [groups, 16], [groups] -> [32 * groups] float32"""
    steps = torch.cat([values & 15, values >> 4], dim=1).float() - 8
    return (steps * scales.float()[:, None]).flatten()
