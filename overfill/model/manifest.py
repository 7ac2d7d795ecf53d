"""Reads ``pair.json``, the manifest of a pair folder, and the configs of its halves. Reads no weights.

::

    {
      "format": "overfill-pair/1",
      "full":    {"path": "full", "digest": "<hex>", "engines": [...]},
      "decoder": {"path": "decoder", "digest": "<hex>", "engines": [...], "recipe": {...}},
      "kv": {"num_layers", "num_kv_heads", "head_dim", "rope": {...}, "layer_map": [...]},
      "tokenizer_digest": "<hex>",
      "eval": {...}
    }

docs/reference/pair-json.md describes every field.

- ``layer_map[i]`` is the full-model layer whose KV decoder layer i reads. A layer may occur twice or out of order.
- ``engines`` names the engines that can run the half. Without it, they follow from the checkpoint.
- ``recipe`` says how the decoder was made, and ``eval`` how good it is. Both are informative, except for
  ``recipe["quantize"]``: with ``"int8"`` the decoder's matrices are quantised when it is loaded. ``"none"``, or no
  entry, leaves them as they are.
- The digests are those of ``overfill.model.digest``, of the checkpoints, which are never quantised.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar, cast, get_args

from overfill.errors import InvalidPair, UnsupportedModel
from overfill.kv.handshake import KvIdentity
from overfill.kv.spec import DTypeName, KvCacheDtype, Quantization, RopeSpec
from overfill.model.config import ModelConfig, check_link
from overfill.model.config_digest import config_digest
from overfill.rpc.constants import WIRE_VERSION
from overfill.v1 import common_pb2

FORMAT = "overfill-pair/1"
MANIFEST = "pair.json"

Half = Literal["full", "decoder"]
HALVES: tuple[Half, ...] = ("full", "decoder")

EngineName = Literal["overfill", "vllm", "mock"]
"""The mock engine runs every pair, computes nothing and is never named in a manifest."""

T = TypeVar("T")


def engines_that_run(config: ModelConfig, quantize: Quantization = "none") -> tuple[EngineName, ...]:
    """Names the engines that can run a checkpoint.

    OverFill's own engine reads plain weights only. Quantisation on load is its own format.
    """
    if config.weight_format != "plain":
        return ("vllm",) if quantize == "none" else ()
    return ("overfill", "vllm") if quantize == "none" else ("overfill",)


def differing_fields(full: ModelConfig, decoder: ModelConfig) -> list[str]:
    """Describes each field that must be equal for the decoder to read the full model's KV, and is not.

    RoPE is among them, because keys are stored after it, and the vocabulary, because the full model writes the first
    token of the answer.
    """
    found = [
        f"{name} (full model {a!r}, decoder {b!r})"
        for name in ("num_kv_heads", "head_dim", "vocab_size")
        if (a := getattr(full, name)) != (b := getattr(decoder, name))
    ]
    ropes = asdict(full.rope), asdict(decoder.rope)
    return found + [
        f"rope.{name} (full model {ropes[0][name]!r}, decoder {ropes[1][name]!r})"
        for name in ropes[0]
        if ropes[0][name] != ropes[1][name]
    ]


def layer_map_problem(layer_map: Sequence[int], full: ModelConfig, decoder: ModelConfig) -> str | None:
    """Says what is wrong with a layer map; None if nothing is. A layer may occur twice or out of order."""
    if len(layer_map) != decoder.num_layers:
        return f"has {len(layer_map)} entries, but the decoder has {decoder.num_layers} layers"
    if wrong := [layer for layer in layer_map if not 0 <= layer < full.num_layers]:
        return f"names layers {wrong}, but the full model has layers 0..{full.num_layers - 1}"
    return None


@dataclass(frozen=True, slots=True)
class Pair:
    """A full model and the decoder that answers on its KV cache.

    Attributes:
        folder: Absolute path; links are not resolved.
        full_path: Absolute path of the full model's checkpoint.
        decoder_path: Absolute path of the decoder's checkpoint; equal to ``full_path`` if both halves are one.
        full_digest: SHA-256 of the full model's tensors, in lower-case hexadecimal.
        decoder_digest: SHA-256 of the decoder's tensors.
        tokenizer_digest: SHA-256 of tokenizer.json.
        full_config: Geometry of the full model.
        decoder_config: Geometry of the decoder.
        full_engines: Names of the engines that can run the full model.
        decoder_engines: Names of the engines that can run the decoder.
        layer_map: Index of the full-model layer whose KV each decoder layer reads.
        quantize: Format of the decoder's matrices after loading; the full model is never quantised.
        recipe: How the decoder was made; informative, except for ``recipe["quantize"]``.
        eval: How good the decoder is; informative.
        reader: Digest of the weights that compute prompt KV if they are not the full model's, such as ``mock``.
        revision: Name that the operator gives to this state of the weights; ``pair.json`` does not have it.
    """

    folder: Path
    full_path: Path
    decoder_path: Path
    full_digest: str
    decoder_digest: str
    tokenizer_digest: str
    full_config: ModelConfig
    decoder_config: ModelConfig
    full_engines: tuple[str, ...]
    decoder_engines: tuple[str, ...]
    layer_map: tuple[int, ...]
    quantize: Quantization
    recipe: Mapping[str, Any]
    eval: Mapping[str, Any]
    reader: str = ""
    revision: str = ""

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def identity(self) -> bool:
        """True if the decoder computes what the full model does: the same weights, not quantised, on its own KV."""
        same_weights = self.decoder_digest == self.full_digest and self.quantize == "none"
        return same_weights and self.layer_map == tuple(range(self.full_config.num_layers))

    @property
    def config_digest(self) -> str:
        """Digest of the full model's config."""
        return config_digest(self.full_config)

    @property
    def decoder_config_digest(self) -> str:
        """Digest of the decoder's config and of the layer map."""
        return config_digest(self.decoder_config, self.layer_map)

    def model_identity(self, half: Half, kv_cache_dtype: KvCacheDtype = "auto") -> common_pb2.ModelIdentity:
        """What a worker that runs ``half`` says of its model."""
        identity = common_pb2.ModelIdentity(
            name=self.name,
            full_digest=self.full_digest,
            config_digest=self.config_digest,
            reader_digest=self.reader or self.full_digest,
            tokenizer_digest=self.tokenizer_digest,
            kv_cache_dtype="" if kv_cache_dtype == "auto" else kv_cache_dtype,
            revision=self.revision,
        )
        if half == "decoder":
            identity.decoder_digest = self.decoder_digest
            identity.decoder_config_digest = self.decoder_config_digest
            identity.decoder_quantize = "" if self.quantize == "none" else self.quantize
        return identity

    def returns_kv(self, kv_cache_dtype: KvCacheDtype = "auto") -> bool:
        """True if the decoder is the reader, so that its KV of an answer is what the reader would compute of it.

        Weights, quantisation, config and layers must be the same, and the KV must be stored as it travels. With an
        adapter, a decoder is never the reader.
        """
        own = self.model_identity("decoder", kv_cache_dtype)
        same_weights = (own.decoder_digest, own.decoder_quantize) == (own.reader_digest, own.reader_quantize)
        same_config = config_digest(self.decoder_config) == self.config_digest
        every_layer = self.layer_map == tuple(range(self.full_config.num_layers))
        return same_weights and same_config and every_layer and not own.kv_cache_dtype

    def kv_identity(self, dtype: DTypeName) -> KvIdentity:
        """Identity of the full model's KV with elements of ``dtype``."""
        kv = self.full_config.kv_spec(dtype)
        return KvIdentity.from_proto(WIRE_VERSION, self.model_identity("full"), kv.to_proto())

    def config(self, half: Half) -> ModelConfig:
        """Geometry of ``half``."""
        return self.full_config if half == "full" else self.decoder_config

    def path(self, half: Half) -> Path:
        """Absolute path of the checkpoint of ``half``."""
        return self.full_path if half == "full" else self.decoder_path

    def digest(self, half: Half) -> str:
        """SHA-256 of the tensors of ``half``, as ``pair.json`` states it."""
        return self.full_digest if half == "full" else self.decoder_digest

    def engines(self, half: Half) -> tuple[str, ...]:
        """Names of the engines that can run ``half``."""
        return self.full_engines if half == "full" else self.decoder_engines

    def check_engine(self, half: Half, engine: EngineName) -> None:
        """Raises UnsupportedModel if ``engine`` cannot run ``half``; the message names the engines that can."""
        engines = self.engines(half)
        if engine in engines:
            return
        config, path = self.config(half), self.path(half)
        what = "the full model" if half == "full" else "the decoder"
        stored = "" if config.weight_format == "plain" else f", whose weights are stored in {config.weight_format}"
        if half == "decoder" and self.quantize != "none":
            stored += f", quantised to {self.quantize} on load"
        able = f"engines that can: {', '.join(engines)}" if engines else "no engine can"
        raise UnsupportedModel(
            f"{self.folder / MANIFEST}: {half}.engines: the engine {engine} cannot run {what} in {path}{stored}; {able}"
        )

    def with_quantize(self, quantize: Quantization) -> Pair:
        """Returns the pair with another format of the decoder's matrices, and the engines that can run that.

        An engine that the manifest leaves out, although it can run the checkpoint, stays left out.
        """
        excluded = set(engines_that_run(self.decoder_config, self.quantize)) - {*self.decoder_engines}
        engines = engines_that_run(self.decoder_config, quantize)
        return replace(
            self,
            quantize=quantize,
            decoder_engines=tuple(engine for engine in engines if engine not in excluded),
            recipe={**self.recipe, "quantize": quantize},
        )

    @classmethod
    def load(cls, folder: Path) -> Pair:
        """Reads a pair and checks that its halves fit each other. Its weights may be missing: routers read none.

        ``overfill.model.pair_files.load_whole`` also checks the files of weights.

        Raises:
            InvalidPair: the message names the file or field, its value and the expected one.
            UnsupportedModel: the engine does not run one of the halves.
        """
        folder = Path(os.path.abspath(folder))
        manifest = _Section.read(folder / MANIFEST)
        if (found := manifest.get("format", str)) != FORMAT:
            raise manifest.error("format", f"is {found!r}; this version reads {FORMAT!r}")
        full, decoder, kv = manifest.section("full"), manifest.section("decoder"), manifest.section("kv")
        layer_map = kv.get("layer_map", list)
        if not all(type(layer) is int for layer in layer_map):
            raise kv.error("layer_map", f"must be a list of layer numbers, got {layer_map!r}")
        full_path, decoder_path = full.checkpoint(folder), decoder.checkpoint(folder)
        full_config, decoder_config = ModelConfig.load(full_path), ModelConfig.load(decoder_path)
        recipe = decoder.get("recipe", dict)
        quantize = _quantize(recipe, decoder)
        pair = cls(
            folder=folder,
            full_path=full_path,
            decoder_path=decoder_path,
            full_digest=full.digest("digest"),
            decoder_digest=decoder.digest("digest"),
            tokenizer_digest=manifest.digest("tokenizer_digest"),
            full_config=full_config,
            decoder_config=decoder_config,
            full_engines=full.engines(engines_that_run(full_config)),
            decoder_engines=decoder.engines(engines_that_run(decoder_config, quantize)),
            layer_map=tuple(layer_map),
            quantize=quantize,
            recipe=recipe,
            eval=manifest.get("eval", dict),
        )
        kv.expect_rope(pair.full_config.rope)
        for name in ("num_layers", "num_kv_heads", "head_dim"):
            kv.expect(name, getattr(pair.full_config, name))
        _check_halves(pair, manifest)
        return pair


def check_family(pairs: Mapping[str, Pair]) -> None:
    """Raises InvalidPair unless all pairs have the same full model and tokenizer, as the tiers of a stack must.

    Args:
        pairs: pair of each tier, by the tier's name.
    """
    (first, one), *others = pairs.items()
    for name, other in others:
        for what, a, b in (
            ("full models", one.full_digest, other.full_digest),
            ("configs of the full model", one.config_digest, other.config_digest),
            ("tokenizers", one.tokenizer_digest, other.tokenizer_digest),
        ):
            if a != b:
                raise InvalidPair(
                    f"the tiers {first} and {name} need the same full model, but their pairs have different {what}: "
                    f"{one.folder} has {a}, {other.folder} has {b}"
                )


class _Section:
    """An object of the manifest whose errors name the file and the dotted field."""

    def __init__(self, file: Path, prefix: str, values: dict[str, Any]) -> None:
        self._file = file
        self._prefix = prefix
        self._values = values

    @classmethod
    def read(cls, file: Path) -> _Section:
        try:
            values = json.loads(file.read_text())
        except FileNotFoundError:
            raise InvalidPair(f"{file}: missing; {file.parent} is not a pair folder") from None
        except (ValueError, OSError) as error:
            raise InvalidPair(f"{file}: cannot be read as JSON: {error}") from None
        if not isinstance(values, dict):
            raise InvalidPair(f"{file}: must hold a JSON object, got {type(values).__name__}")
        return cls(file, "", values)

    def error(self, name: str, problem: str) -> InvalidPair:
        return InvalidPair(f"{self._file}: {self._prefix}{name} {problem}")

    def get(self, name: str, kind: type[T]) -> T:
        value = self._values.get(name)
        if not isinstance(value, kind):
            what = "is missing" if name not in self._values else f"must be {kind.__name__}, got {value!r}"
            raise self.error(name, what)
        return value

    def digest(self, name: str) -> str:
        """A SHA-256. A worker compares those of weights that it does not read with its peers' only."""
        digest = self.get(name, str)
        if re.fullmatch("[0-9a-f]{64}", digest) is None:
            raise self.error(name, f"must have 64 digits of 0-9 and a-f, got {digest[:80]!r}")
        return digest

    def section(self, name: str) -> _Section:
        return _Section(self._file, f"{self._prefix}{name}.", self.get(name, dict))

    def checkpoint(self, folder: Path) -> Path:
        """The checkpoint folder that ``path`` names."""
        relative = PurePosixPath(self.get("path", str))
        if relative.is_absolute() or ".." in relative.parts:
            raise self.error("path", f"must be inside the pair's folder, got {str(relative)!r}")
        path = folder / relative
        check_link(path)
        if not path.is_dir():
            raise self.error("path", f"names {path}, which does not exist")
        return path

    def engines(self, default: tuple[str, ...]) -> tuple[str, ...]:
        """The names in ``engines``, or ``default`` if the manifest does not have the field."""
        if "engines" not in self._values:
            return default
        names = self.get("engines", list)
        if not all(name in get_args(EngineName) for name in names):
            raise self.error("engines", f"must be a list of {', '.join(get_args(EngineName))}, got {names!r}")
        return tuple(names)

    def expect(self, name: str, actual: object) -> None:
        if (stated := self._values.get(name)) != actual:
            raise self.error(name, f"is {stated!r}, but the full model has {actual!r}")

    def expect_rope(self, actual: RopeSpec) -> None:
        rope = self.section("rope")
        for name, value in asdict(actual).items():
            rope.expect(name, value)


def tokenizer_digest(folder: Path) -> str:
    """Computes the SHA-256 of ``folder``'s tokenizer.json, as lower-case hex.

    Raises:
        InvalidPair: the file is missing.
    """
    check_link(folder / "tokenizer.json")
    try:
        return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    except FileNotFoundError:
        raise InvalidPair(f"{folder / 'tokenizer.json'}: missing; a fast tokenizer is needed") from None


def _check_halves(pair: Pair, manifest: _Section) -> None:
    if differing := differing_fields(pair.full_config, pair.decoder_config):
        raise InvalidPair(
            f"{pair.decoder_path} does not fit the full model {pair.full_path}; differing fields: "
            + ", ".join(differing)
        )
    if problem := layer_map_problem(pair.layer_map, pair.full_config, pair.decoder_config):
        raise manifest.error("kv.layer_map", problem)
    for path in {pair.full_path, pair.decoder_path}:
        if (actual := tokenizer_digest(path)) != pair.tokenizer_digest:
            raise manifest.error(
                "tokenizer_digest", f"is {pair.tokenizer_digest}, but {path}/tokenizer.json has {actual}"
            )


def _quantize(recipe: Mapping[str, Any], decoder: _Section) -> Quantization:
    found = recipe.get("quantize", "none")
    for known in get_args(Quantization):
        if found == known:
            return cast(Quantization, known)
    raise decoder.error("recipe.quantize", f"is {found!r}; supported are {', '.join(get_args(Quantization))}")
