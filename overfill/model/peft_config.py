"""Reads ``adapter_config.json`` of PEFT (github.com/huggingface/peft): the rank and scale of each product.

Which modules have a product is told by the tensors, so ``target_modules`` and ``layers_to_transform`` are not read.
Fields that change more than low-rank products do are refused by name; so are unknown fields that are set.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from overfill.model.adapter_files import InvalidAdapter, parse_object

_READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "init_lora_weights",
    "base_model_name_or_path",
}

# What training alone reads, what the tensors say too, and options of fields that are refused when set.
_IGNORED = {
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "lora_dropout"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config", "ensure_weight_tying"),
    *("megatron_core", "qalora_group_size"),
}

_REASONS = {
    "use_dora": "DoRA scales the decoder's own matrices",
    "modules_to_save": "whole modules are not replaced",
    "trainable_token_indices": "the embedding is the full model's too",
    "alora_invocation_tokens": "the decoder takes over at the end of the prompt instead",
    "layer_replication": "the decoder's layers are fixed",
    "lora_bias": "products have no bias",
    "target_parameters": "only the decoder's projections have products",
}

# Other ways to initialise change the base's weights, so that the adapter fits those only.
_INITIALISED = (True, False, None, "gaussian", "eva", "orthogonal")

MAX_RANK = 512
"""Largest rank of a product that any engine may be told to take."""

_MAX_BASE_MODEL = 1024
_NAME = re.compile(r"[A-Za-z0-9_.]+")


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """What ``adapter_config.json`` says of the products.

    Attributes:
        file: the file, for messages.
        rank: ``r``, of modules that no pattern names.
        alpha: ``lora_alpha``, likewise.
        ranks, alphas: ``rank_pattern`` and ``alpha_pattern``, as ends of ``^.`` and a module's name; the first that
            fits counts.
        base_model: ``base_model_name_or_path``; informative.
        use_rslora: whether a scale is alpha ÷ √rank (arXiv 2312.03732) instead of alpha ÷ rank.
    """

    file: Path
    rank: int
    alpha: float
    ranks: Sequence[tuple[str, int]]
    alphas: Sequence[tuple[str, float]]
    use_rslora: bool
    base_model: str

    def rank_of(self, module: str) -> int:
        """Returns the rank of a module, such as ``model.layers.0.mlp.up_proj``."""
        return next((rank for end, rank in self.ranks if f"^.{module}".endswith(end)), self.rank)

    def scale_of(self, module: str) -> float:
        """Returns the number by which a module's product is multiplied."""
        alpha = next((alpha for end, alpha in self.alphas if f"^.{module}".endswith(end)), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @classmethod
    def parse(cls, file: Path, data: bytes) -> PeftConfig:
        """Reads the file's content.

        Raises:
            InvalidAdapter: a field is missing, has another type or is not supported; the message names it.
        """
        values = parse_object(file, data)

        def refuse(name: str, allowed: str) -> NoReturn:
            raise InvalidAdapter(f"{file}: {name}={str(values.get(name))[:80]!s} is not supported: {allowed}")

        if values.get("peft_type") != "LORA":
            refuse("peft_type", "only LORA is; train a LoRA")
        for name, value in values.items():
            if name not in _READ | _IGNORED and value:
                reason = _REASONS.get(name, "it is not known to leave plain LoRA as it is")
                refuse(name, f"{reason}. Only low-rank products are; train without it")
        if values.get("bias", "none") != "none":
            refuse("bias", "only 'none' is; train without biases")
        init = values.get("init_lora_weights", True)
        if not (isinstance(init, str | bool | None) and init in _INITIALISED):
            refuse(
                "init_lora_weights",
                "it changes the decoder's own weights. Convert the adapter to plain LoRA with "
                "save_pretrained(path_initial_model_for_weight_conversion=…)",
            )
        if not _is_rank(values.get("r")):
            refuse("r", f"a whole number from 1 to {MAX_RANK} is needed")
        if not _is_number(values.get("lora_alpha")):
            refuse("lora_alpha", "a finite number is needed")
        if not isinstance(values.get("use_rslora", False), bool):
            refuse("use_rslora", "true or false is needed")
        ends: dict[str, list[tuple[str, Any]]] = {}
        for name, valid in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
            given = values.get(name) or {}
            if not isinstance(given, Mapping) or not all(map(valid, given.values())):
                refuse(name, "an object of module names and numbers is needed")
            ends[name] = [(_end_of(key), value) for key, value in given.items()]
            if not all(end for end, _ in ends[name]):
                refuse(name, "regular expressions are not evaluated; write the name of each module, or its end")
        return cls(
            file=file,
            rank=values["r"],
            alpha=float(values["lora_alpha"]),
            ranks=ends["rank_pattern"],
            alphas=ends["alpha_pattern"],
            use_rslora=values.get("use_rslora", False),
            base_model=str(values.get("base_model_name_or_path") or "")[:_MAX_BASE_MODEL],
        )


def _end_of(key: str) -> str:
    """Returns the end of a module's name that ``key`` matches in PEFT; empty for a regular expression.

    PEFT matches a key as a regular expression, with any parts of the name in front. One that a stranger wrote may take
    hours to match.
    """
    name = key.removeprefix("^").removeprefix(r".*\.").removesuffix("$").replace(r"\.", ".")
    start = "^." if key.startswith("^") and not key.startswith("^.*") else "."
    return f"{start}{name}" if _NAME.fullmatch(name) else ""


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_RANK


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 1 << 53
