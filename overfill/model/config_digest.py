"""Digest of a model's config: what its forward pass takes from no tensor. No tensors, no files.

Two checkpoints with equal tensors compute different KV if RMSNorm's epsilon or the division of matrices into
heads differs. The digest is SHA-256 over the canonical form, a text in ASCII:

- The first line is ``overfill-config/1``.
- Each further line is ``name=value``, for the fields in ``CONFIG_FIELDS``, in that order, then for each field of the
  ``RopeSpec`` as ``rope.name``, in its order, and for a decoder ``layer_map``. Every line ends with a line feed.
- A whole number is decimal; true and false are ``1`` and ``0``; a text is itself; bytes are lower-case hexadecimal. A
  number of type float is what Python's ``float.hex`` returns, which is exact. A layer map is decimal numbers, separated
  by commas.

The form is made from ``ModelConfig``, which reads both spellings of config.json, so it does not depend on the version
of transformers that wrote the file. ``max_positions`` and ``eos_token_ids`` are not in it: no forward pass reads them.
When a field is added to ``ModelConfig`` or moved there, the first line gets another number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import fields

from overfill.model.config import ModelConfig

CONFIG_FIELDS = tuple(f.name for f in fields(ModelConfig) if f.name not in ("rope", "max_positions", "eos_token_ids"))
"""Fields of ``ModelConfig`` in the canonical form, in order. ``rope`` follows them."""


def config_digest(config: ModelConfig, layer_map: Sequence[int] | None = None) -> str:
    """Computes the digest of ``config``, as lower-case hexadecimal.

    Args:
        layer_map: full-model layer whose KV each layer of a decoder reads; None for a full model.
    """
    return hashlib.sha256(canonical_form(config, layer_map).encode("ascii")).hexdigest()


def canonical_form(config: ModelConfig, layer_map: Sequence[int] | None = None) -> str:
    """Returns the text that ``config_digest`` hashes; see the module's docstring."""
    lines = ["overfill-config/1"]
    lines += [f"{name}={_canonical(getattr(config, name))}" for name in CONFIG_FIELDS]
    lines += [f"rope.{f.name}={_canonical(getattr(config.rope, f.name))}" for f in fields(config.rope)]
    if layer_map is not None:
        lines.append("layer_map=" + ",".join(map(str, layer_map)))
    return "".join(f"{line}\n" for line in lines)


def _canonical(value: bool | int | float | str | bytes) -> str:
    if isinstance(value, bytes | float):
        return value.hex()
    return str(int(value) if isinstance(value, bool) else value)
