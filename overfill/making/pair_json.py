"""Writes ``pair.json``, which ``overfill.model.manifest`` describes and reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from overfill.kv.spec import Quantization
from overfill.model.config import ModelConfig
from overfill.model.digest import checkpoint_digest
from overfill.model.manifest import FORMAT, MANIFEST, Pair, engines_that_run, tokenizer_digest
from overfill.telemetry.progress import Report, silent


def write_manifest(
    folder: Path,
    *,
    full: str = "full",
    decoder: str = "decoder",
    full_digest: str | None = None,
    decoder_digest: str | None = None,
    layer_map: Sequence[int] | None = None,
    recipe: Mapping[str, Any] | None = None,
    report: Report = silent,
) -> Pair:
    """Writes ``pair.json`` for the two checkpoints in ``folder``, and loads the pair.

    Args:
        full, decoder: paths of the checkpoints, relative to ``folder``; equal for an identity pair.
        full_digest, decoder_digest: digests of the halves. None computes them from the checkpoints.
        layer_map: one full-model layer per decoder layer. None maps each layer to itself.
        recipe: entry of the manifest.
        report: called with a description, the bytes read and the bytes in total.

    Raises:
        InvalidPair: a checkpoint is damaged, or the halves do not fit each other.
    """
    full_config, decoder_config = ModelConfig.load(folder / full), ModelConfig.load(folder / decoder)
    full_digest = full_digest or checkpoint_digest(folder / full, report)
    if decoder_digest is None:
        decoder_digest = full_digest if decoder == full else checkpoint_digest(folder / decoder, report)
    quantize: Quantization = "int8" if (recipe or {}).get("quantize") == "int8" else "none"
    manifest = {
        "format": FORMAT,
        "full": {"path": full, "digest": full_digest, "engines": engines_that_run(full_config)},
        "decoder": {
            "path": decoder,
            "digest": decoder_digest,
            "engines": engines_that_run(decoder_config, quantize),
            "recipe": dict(recipe or {}),
        },
        "kv": {
            "num_layers": full_config.num_layers,
            "num_kv_heads": full_config.num_kv_heads,
            "head_dim": full_config.head_dim,
            "rope": asdict(full_config.rope),
            "layer_map": list(range(full_config.num_layers) if layer_map is None else layer_map),
        },
        "tokenizer_digest": tokenizer_digest(folder / full),
        "eval": {},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return Pair.load(folder)
