"""Reads decoders in the format of OverFill's authors (arXiv 2508.08446, github.com/friendshipkim/overfill).

They save both stages as one model. The decoder's tensors are called ``student.model.…``, the full model's ``teacher.…``
if they are there at all. No config gives the decoder's sizes, so they are read from the tensors. Everything else is the
full model's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch

from overfill.errors import InvalidPair, UnsupportedModel
from overfill.making.published import PublishedCheckpoint
from overfill.making.recipe import KeptLayers
from overfill.model.config import ModelConfig
from overfill.model.digest import StoredTensor
from overfill.model.files import EMBEDDING, HEAD, is_buffer
from overfill.pair.hf_config import decoder_config

STUDENT, TEACHER = "student.", "teacher."
_PROJECTIONS = "embedding_proj."
_LAYER = "model.layers."


def is_two_stage(checkpoint: PublishedCheckpoint) -> bool:
    """True if the checkpoint holds both stages, or the decoder, under the authors' names."""
    return any(name.startswith(STUDENT) for name in checkpoint.tensors)


def stated_strategy(checkpoint: PublishedCheckpoint, full_layers: int, layers: int) -> KeptLayers | None:
    """Returns the ``depth_prune_strategy`` in the checkpoint's config.json; None if it is not there.

    Raises:
        InvalidPair: it is unknown, or ``depth_prune_ratio`` is no number or gives another number of layers than the
            tensors.
        UnsupportedModel: the decoder needs the full model's KV projected (``kv_proj_layer``).
    """
    options = checkpoint.hf_config or {}
    file = checkpoint.folder / "config.json"
    projections = [name for name in checkpoint.tensors if name.startswith(_PROJECTIONS)]
    if options.get("embedding_transform_strategy") == "kv_proj_layer" or projections:
        found = f"tensor {projections[0]}" if projections else f"embedding_transform_strategy in {file}"
        raise UnsupportedModel(
            f"{checkpoint.folder}: kv_proj_layer is not supported ({found}): the decoder would read projections of the "
            "full model's KV. Supported are kv_identity and kv_prune, which read the KV as it is"
        )
    ratio = options.get("depth_prune_ratio")
    try:
        kept = layers if ratio is None else int((1 - float(ratio)) * full_layers)
    except (TypeError, ValueError, OverflowError):
        raise InvalidPair(f"{file}: depth_prune_ratio is {ratio!r}; it must be a number") from None
    if kept != layers:
        raise InvalidPair(
            f"{file}: depth_prune_ratio {ratio} keeps {kept} of {full_layers} layers, but the tensors have {layers}"
        )
    strategy = options.get("depth_prune_strategy")
    for known in get_args(KeptLayers):
        if strategy == known:
            return known  # type: ignore[no-any-return]
    if strategy is None:
        return None
    raise InvalidPair(f"{file}: depth_prune_strategy is {strategy!r}; known are {', '.join(get_args(KeptLayers))}")


def student_tensors(checkpoint: PublishedCheckpoint) -> dict[str, StoredTensor]:
    """Returns the decoder's tensors by the name that an ordinary checkpoint gives them.

    Raises:
        InvalidPair: a tensor belongs to neither stage.
    """
    others = [n for n in checkpoint.tensors if not n.startswith((STUDENT, TEACHER, _PROJECTIONS))]
    if others:
        raise InvalidPair(
            f"{checkpoint.tensors[others[0]].file}: tensor {others[0]} is neither {STUDENT}… nor {TEACHER}…"
        )
    return {n.removeprefix(STUDENT): t for n, t in checkpoint.tensors.items() if n.startswith(STUDENT)}


def student_config(full_config: Mapping[str, Any], tensors: Mapping[str, StoredTensor], tied: bool) -> dict[str, Any]:
    """Returns the decoder's config.json: sizes from its tensors, everything else from the full model's.

    Raises:
        InvalidPair: a tensor that gives a size is missing.
        UnsupportedModel: no transformers class runs a decoder of this hidden size.
    """
    full = ModelConfig.from_dict(full_config)
    vocab_size, hidden_size = _shape(tensors, EMBEDDING)
    intermediate_size, _ = _shape(tensors, f"{_LAYER}0.mlp.gate_proj.weight")
    kv_rows, _ = _shape(tensors, f"{_LAYER}0.self_attn.k_proj.weight")
    q_rows, _ = _shape(tensors, f"{_LAYER}0.self_attn.q_proj.weight")
    without = ("quantization_config", "vocab_size", "num_key_value_heads", "num_attention_heads")
    return decoder_config(
        {key: value for key, value in full_config.items() if key not in without}
        | {
            "vocab_size": vocab_size,
            "num_attention_heads": max(1, q_rows // full.head_dim),
            "num_key_value_heads": max(1, kv_rows // full.head_dim),
            "head_dim": full.head_dim,
        },
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=count_layers(tensors),
        tie_word_embeddings=tied,
    )


def count_layers(tensors: Mapping[str, StoredTensor]) -> int:
    """Number of layers of a decoder; layers are numbered from 0 without gaps.

    Raises:
        InvalidPair: there is a gap, or no layer.
    """
    parts = (name.removeprefix(_LAYER).partition(".")[0] for name in tensors if name.startswith(_LAYER))
    numbers = {int(part) for part in parts if part.isdecimal()}
    if numbers != set(range(len(numbers))) or not numbers:
        missing = sorted(set(range(max(numbers, default=0) + 1)) - numbers)
        raise InvalidPair(f"the decoder's layers are not numbered from 0 without gaps; missing are {missing}")
    return len(numbers)


def has_tied_head(checkpoint: PublishedCheckpoint, tensors: Mapping[str, StoredTensor]) -> bool:
    """True if the decoder's head is its embedding: it is not stored, or stored with the same values.

    Reads both if they are equal.

    Raises:
        InvalidPair: the embedding is missing.
    """
    _shape(tensors, EMBEDDING)
    return HEAD not in tensors or checkpoint.has_equal(tensors[HEAD].name, tensors[EMBEDDING].name)


def check_teacher(checkpoint: PublishedCheckpoint, full: PublishedCheckpoint, plain: bool) -> None:
    """Checks that the full model in a two-stage checkpoint, if there is one, has the norms and biases of ``full``.

    Compares names and shapes of all tensors, and the values of norms and biases, which are small. Matrices of equal
    shapes are not read.

    Args:
        plain: False if ``full`` is quantised, so that its matrices may have other names.

    Raises:
        InvalidPair: they differ; the message names the tensor.
    """
    for name, tensor in checkpoint.tensors.items():
        if not name.startswith(TEACHER) or is_buffer(name):
            continue
        other = full.tensors.get(name.removeprefix(TEACHER))
        if other is None:
            if not plain or name.removeprefix(TEACHER) == HEAD:  # a tied head
                continue
            raise InvalidPair(f"{tensor.file}: tensor {name} is not part of the full model in {full.folder}")
        same = tensor.shape == other.shape
        if same and len(tensor.shape) == 1:
            mine, theirs = checkpoint.read(name).float(), full.read(other.name).float()
            same = torch.equal(mine, theirs) or _close(mine, theirs)
        if not same:
            raise InvalidPair(
                f"{tensor.file}: tensor {name} differs from {other.name} of the full model in {full.folder}: "
                "the decoder was trained for another full model"
            )


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """True if two vectors agree as far as bfloat16 and float16 can tell."""
    return bool(torch.allclose(one, other, rtol=2**-7, atol=math.ldexp(1, -20)))


def _shape(tensors: Mapping[str, StoredTensor], name: str) -> Sequence[int]:
    if name not in tensors or len(tensors[name].shape) != 2:
        raise InvalidPair(f"the two-stage checkpoint has no matrix {STUDENT}{name}, which gives a size")
    return tensors[name].shape
