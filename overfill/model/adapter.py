"""LoRA adapters of a decoder (arXiv 2106.09685): low-rank products that are added to its projections.

An adapter's folder has PEFT's two files, ``adapter_config.json`` and ``adapter_model.safetensors``, and one of ours::

    overfill-adapter.json
    {
      "format": "overfill-adapter/1",
      "digest": "<hex>",                identifies weights and scales
      "decoder_digest": "<hex>",        of the decoder on which it works
      "rank": 16,                       largest rank of its products
      "tail_tokens": 0,                 prompt tokens that the decoder computes; 0 means the generation prompt
      "own_prefill": false,             whether it was trained with its own prefill
      "base_model": "...",              PEFT's base_model_name_or_path; informative
      "training": {...}                 informative
    }

The digest is SHA-256 over what ``overfill.model.digest`` hashes of each tensor of the safetensors file, in name order,
then over the scale of each product, in the order of its tensors' names, as a little-endian float64. A scale is
alpha ÷ rank, or alpha ÷ √rank with ``use_rslora``. Nothing else in ``adapter_config.json`` changes an answer.

This module imports no torch until it reads weights.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from overfill.errors import InvalidPair
from overfill.model.adapter_files import MAX_JSON_BYTES, InvalidAdapter, parse_object, read_files
from overfill.model.config import ModelConfig
from overfill.model.digest import StoredTensor, digest_head, read_header
from overfill.model.peft_config import MAX_RANK, PeftConfig
from overfill.request.answer_start import MAX_TAIL_TOKENS
from overfill.request.names import ADAPTER_NAME, ADAPTER_NAME_RULE

if TYPE_CHECKING:
    import torch

FORMAT = "overfill-adapter/1"
RECORD = "overfill-adapter.json"
PEFT_CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"

_MAX_HEADER_BYTES = 1 << 20
_BYTES_OF = {"F32": 4, "BF16": 2, "F16": 2}

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

_TENSOR = re.compile(
    r"base_model\.model\.(model\.layers\.(0|[1-9][0-9]{0,4})\."
    r"(?:self_attn\.([qkvo]_proj)|mlp\.(gate_proj|up_proj|down_proj)))\.lora_([AB])\.weight"
)


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """What is known of an adapter without its weights.

    Attributes:
        name: unique among the adapters and tiers of a stack.
        digest: lower-case hexadecimal SHA-256 that identifies weights and config.
        decoder_digest: digest of the decoder on which it works.
        rank: largest rank of its products.
        tail_tokens: number of tokens at the prompt's end that the decoder computes; 0 means the generation prompt.
        own_prefill: whether it was trained with its own prefill instead of the full model's KV.
    """

    name: str
    digest: str
    decoder_digest: str
    rank: int
    tail_tokens: int = 0
    own_prefill: bool = False


@dataclass(frozen=True, slots=True)
class LowRank:
    """One product: the projection's output gains ``up @ (down @ x)``.

    Attributes:
        down: [rank, in], float32, on the CPU.
        up: [out, rank], likewise, multiplied by the product's scale.
    """

    down: torch.Tensor
    up: torch.Tensor


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """An adapter's weights, by layer of the decoder and projection. Projections without a product are left out."""

    record: AdapterRecord
    products: Mapping[tuple[int, Projection], LowRank]


def projection_shapes(config: ModelConfig) -> dict[Projection, tuple[int, int]]:
    """Returns (out, in) of each projection of a layer."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }


def read_record(folder: Path) -> AdapterRecord:
    """Reads the record of the adapter in ``folder``, whose name is the adapter's. Reads no weights.

    Raises:
        InvalidAdapter: it is missing or damaged, or the name is not allowed.
    """
    check_name(folder.name)
    return parse_record(folder, read_files(folder, {RECORD: MAX_JSON_BYTES}), folder.name)


def read_adapter(folder: Path, config: ModelConfig, max_rank: int = MAX_RANK) -> LoraAdapter:
    """Reads the adapter in ``folder``, whose name is the adapter's. Reads PEFT's files once, whole.

    Args:
        config: of the decoder. The caller compares ``record.decoder_digest`` with the decoder's digest.
        max_rank: largest rank of a product.

    Raises:
        InvalidAdapter: a file is missing, damaged or changes meanwhile, its digest is not the record's, or the decoder
            cannot use an adapter of this kind or size; the message names file and field or tensor.
    """
    if (rank := read_record(folder).rank) > max_rank:
        raise InvalidAdapter(_rank_too_large(str(folder), rank, max_rank))
    files = read_files(folder, file_limits(config, max_rank))
    record = parse_record(folder, files, folder.name)
    parsed = parse_peft(folder, files, config, max_rank)
    if parsed.digest != record.digest:
        raise InvalidAdapter(
            f"{folder}: its files have the digest {parsed.digest}, but {RECORD} says {record.digest}: they were "
            "changed after the adapter was added. Remove it and add it again"
        )
    if parsed.rank != record.rank:
        raise InvalidAdapter(
            f"{folder / RECORD}: rank is {record.rank}, but the largest of the products is {parsed.rank}"
        )
    return LoraAdapter(record, parsed.products)


def file_limits(config: ModelConfig, max_rank: int = MAX_RANK) -> dict[str, int]:
    """Returns the largest size in bytes of each file of an adapter's folder, for a decoder with ``config``."""
    elements = config.num_layers * sum(map(sum, projection_shapes(config).values())) * max_rank
    return {
        RECORD: MAX_JSON_BYTES,
        PEFT_CONFIG: MAX_JSON_BYTES,
        WEIGHTS: 8 + _MAX_HEADER_BYTES + elements * max(_BYTES_OF.values()),
    }


def check_name(name: str) -> None:
    """Raises InvalidAdapter unless an adapter may have this name."""
    if ADAPTER_NAME.fullmatch(name) is None:
        raise InvalidAdapter(f"{name[:80]!r} is no name for an adapter: give {ADAPTER_NAME_RULE}")


def parse_record(folder: Path, files: Mapping[str, bytes], name: str) -> AdapterRecord:
    """Parses the content of ``overfill-adapter.json`` among ``files``, by name; raises InvalidAdapter.

    Args:
        folder: for messages.
        name: the adapter's.
    """
    file = folder / RECORD
    if RECORD not in files:
        raise InvalidAdapter(f"{file}: missing; add PEFT's files with `overfill pair adapter add`, which writes it")
    values = parse_object(file, files[RECORD])

    def get(field: str, valid: bool, allowed: str) -> Any:
        if not valid:
            raise InvalidAdapter(f"{file}: {field} is {str(values.get(field))[:80]!r}; it must be {allowed}")
        return values[field]

    def digest(field: str) -> Any:
        value = values.get(field)
        return get(
            field, isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None, "a SHA-256 in hex"
        )

    def count(field: str, least: int, most: int) -> Any:
        value = values.get(field)
        return get(field, type(value) is int and least <= value <= most, f"a whole number from {least} to {most}")

    get("format", values.get("format") == FORMAT, repr(FORMAT))
    return AdapterRecord(
        name=name,
        digest=digest("digest"),
        decoder_digest=digest("decoder_digest"),
        rank=count("rank", 1, MAX_RANK),
        tail_tokens=count("tail_tokens", 0, MAX_TAIL_TOKENS),
        own_prefill=get("own_prefill", isinstance(values.get("own_prefill"), bool), "true or false"),
    )


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """What PEFT's two files hold. ``rank`` is the largest; ``base_model`` is what the config calls the base."""

    digest: str
    rank: int
    products: Mapping[tuple[int, Projection], LowRank]
    base_model: str


def parse_peft(folder: Path, files: Mapping[str, bytes], config: ModelConfig, max_rank: int = MAX_RANK) -> PeftAdapter:
    """Parses the content of PEFT's files, by name.

    Args:
        folder: for messages.
        config, max_rank: as for ``read_adapter``, which has the errors too.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    for name in (PEFT_CONFIG, WEIGHTS):
        if name not in files:
            pickled = name == WEIGHTS and (folder / PICKLED).exists()
            hint = f". {PICKLED} is not read: loading it could run code. Save it with safe_serialization=True"
            raise InvalidAdapter(
                f"{folder / name}: missing{hint if pickled else '; it is one of the two that PEFT writes'}"
            )
    file, data = folder / WEIGHTS, files[WEIGHTS]
    peft = PeftConfig.parse(folder / PEFT_CONFIG, files[PEFT_CONFIG])
    try:
        stored = read_header(file, io.BytesIO(data), len(data), _MAX_HEADER_BYTES)
        modules = _check_tensors(stored, peft, config, max_rank)
        tensors = load(data)
    except (InvalidPair, SafetensorError) as error:
        raise InvalidAdapter(f"{error}" if isinstance(error, InvalidPair) else f"{file}: {error}") from None
    products: dict[tuple[int, Projection], LowRank] = {}
    for key, module in modules.items():
        down, up = (tensors[f"base_model.model.{module}.lora_{part}.weight"].float() for part in "AB")
        up = up * peft.scale_of(module)
        for part, factor in (("A", down), ("B", up)):
            if not bool(torch.isfinite(factor).all()):
                raise InvalidAdapter(
                    f"{file}: tensor base_model.model.{module}.lora_{part}.weight has NaN or infinite elements, or "
                    "has them when scaled; the training has failed"
                )
        products[key] = LowRank(down.contiguous(), up.contiguous())
    digest = hashlib.sha256()
    view = memoryview(data)
    for tensor in sorted(stored, key=lambda tensor: tensor.name.encode()):
        digest.update(digest_head(tensor))
        digest.update(view[tensor.start : tensor.end])
    for module in sorted(modules.values(), key=str.encode):
        digest.update(struct.pack("<d", peft.scale_of(module)))
    rank = max(product.down.shape[0] for product in products.values())
    return PeftAdapter(digest.hexdigest(), rank, products, peft.base_model)


def _check_tensors(
    stored: list[StoredTensor], peft: PeftConfig, config: ModelConfig, max_rank: int
) -> dict[tuple[int, Projection], str]:
    """Checks names, dtypes and shapes of an adapter's tensors; returns the module of each product."""
    shapes = projection_shapes(config)
    modules: dict[tuple[int, Projection], str] = {}
    halves: dict[str, set[str]] = {}
    for tensor in stored:
        what = f"{tensor.file}: tensor {tensor.name[:200]}"
        found = _TENSOR.fullmatch(tensor.name)
        if found is None:
            raise InvalidAdapter(f"{what} is not supported: {_reason(tensor.name)}")
        module, number, half = found[1], int(found[2]), found[5]
        projection = cast(Projection, found[3] or found[4])
        if number >= config.num_layers:
            raise InvalidAdapter(f"{what} is of layer {number}; the decoder has layers 0 to {config.num_layers - 1}")
        if tensor.dtype not in _BYTES_OF:
            raise InvalidAdapter(f"{what} is {str(tensor.dtype)[:80]}; supported are {', '.join(_BYTES_OF)}")
        rank, (rows, columns) = peft.rank_of(module), shapes[projection]
        if rank > max_rank:
            raise InvalidAdapter(_rank_too_large(what, rank, max_rank))
        expected = (rank, columns) if half == "A" else (rows, rank)
        if tensor.shape != expected:
            raise InvalidAdapter(
                f"{what} has the shape {str(tensor.shape)[:80]}; rank {rank} in {PEFT_CONFIG} and the decoder imply "
                f"{expected}: the adapter is of another decoder, or its files are of two adapters"
            )
        modules[number, projection] = module
        halves.setdefault(module, set()).add(half)
    for module, present in halves.items():
        if present != {"A", "B"}:
            absent = "A" if "A" not in present else "B"
            raise InvalidAdapter(
                f"{peft.file.parent / WEIGHTS}: tensor base_model.model.{module}.lora_{absent}.weight is missing"
            )
    if not modules:
        raise InvalidAdapter(f"{peft.file.parent / WEIGHTS}: has no tensors")
    return modules


def _rank_too_large(what: str, rank: int, max_rank: int) -> str:
    return f"{what} has rank {rank}; at most {max_rank} is allowed here, which --max-adapter-rank of workers sets"


def _reason(tensor: str) -> str:
    """Says why a tensor with this name cannot be part of an adapter."""
    for part, reason in (
        ("lora_magnitude_vector", "DoRA scales the decoder's own matrices"),
        ("lora_embedding_", "the embedding has no products"),
        ("embed_tokens", "the embedding has no products"),
        ("lm_head", "the head has no products"),
        (".bias", "products have no bias"),
        ("modules_to_save", "whole modules are not replaced"),
        ("token_adapter", "the embedding is the full model's too"),
    ):
        if part in tensor:
            return f"{reason}. Train without it"
    return (
        f"supported are products of {', '.join(get_args(Projection))} of a causal language model, with names such as "
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    )


def record_json(record: AdapterRecord, base_model: str, training: Mapping[str, Any]) -> bytes:
    """Returns the content of ``overfill-adapter.json``."""
    values = {
        "format": FORMAT,
        "digest": record.digest,
        "decoder_digest": record.decoder_digest,
        "rank": record.rank,
        "tail_tokens": record.tail_tokens,
        "own_prefill": record.own_prefill,
        "base_model": base_model,
        "training": dict(training),
    }
    return json.dumps(values, indent=2).encode() + b"\n"


def peft_content(products: Mapping[tuple[int, Projection], LowRank]) -> tuple[dict[str, torch.Tensor], str]:
    """Returns what PEFT's two files hold: the tensors by name, and the text of ``adapter_config.json``."""
    tensors = {}
    for (layer, projection), product in products.items():
        block = "self_attn" if projection in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
        module = f"base_model.model.model.layers.{layer}.{block}.{projection}"
        tensors[f"{module}.lora_A.weight"] = product.down.contiguous()
        tensors[f"{module}.lora_B.weight"] = product.up.contiguous()
    rank = max(product.down.shape[0] for product in products.values())
    # The products are scaled already.
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(get_args(Projection))}
    return tensors, json.dumps(config)
