"""Makes a pair from a full model and a decoder that somebody else made.

Importing has two steps. ``plan_import`` reads configs, tokenizers and the tensors' headers, and refuses halves that do
not fit. ``write_import`` writes the pair's folder, with links to the files, and reads all weights for their digests.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch

from overfill.errors import InvalidPair, OverfillError
from overfill.making.atomic import atomic_folder
from overfill.making.checkpoint import COMPANION_FILES, link_relatively, save_tensors, write_json
from overfill.making.evaluate.costs import DecodeCost
from overfill.making.finite import check_finite
from overfill.making.pair_json import write_manifest
from overfill.making.published import PublishedCheckpoint
from overfill.making.recipe import KeptLayers, kept_layers, slow_sizes
from overfill.making.two_stage_format import (
    check_teacher,
    count_layers,
    has_tied_head,
    is_two_stage,
    stated_strategy,
    student_config,
    student_tensors,
)
from overfill.model.config import ModelConfig
from overfill.model.digest import StoredTensor, checkpoint_digest
from overfill.model.files import HEAD, check_tensors
from overfill.model.loading import count_parameters, expected_shapes
from overfill.model.manifest import (
    EngineName,
    Pair,
    differing_fields,
    engines_that_run,
    layer_map_problem,
)
from overfill.pair.hf_config import loadable_config
from overfill.telemetry.progress import Report, silent

_SHARD_BYTES = 1 << 30  # of a converted checkpoint; while a shard is written, memory holds it about twice
_TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class ImportedHalf:
    """One half of the pair to be written.

    Attributes:
        checkpoint: Its source.
        hf_config: Content of its config.json in the pair.
        tensors: Headers of its tensors, by the name that they get in the pair.
        config: ``hf_config``, parsed.
    """

    checkpoint: PublishedCheckpoint
    hf_config: dict[str, Any]
    tensors: Mapping[str, StoredTensor]
    config: ModelConfig

    @property
    def parameters(self) -> int:
        """Number of weights, however they are stored."""
        return count_parameters(self.config)

    @property
    def engines(self) -> tuple[EngineName, ...]:
        """Names of the engines that can run it."""
        return engines_that_run(self.config)

    @property
    def weights_per_token(self) -> int:
        """Number of weights that a decode step reads."""
        return DecodeCost.of(self.config, "bf16").weights

    @property
    def converted(self) -> bool:
        """True if the weights are written anew, under other names."""
        return any(name != tensor.name for name, tensor in self.tensors.items())


@dataclass(frozen=True, slots=True)
class ImportPlan:
    """Two halves that fit each other.

    Attributes:
        full: Full model.
        decoder: Decoder.
        layer_map: The full-model layer whose KV each decoder layer reads.
        tokenizer: Folder whose tokenizer both halves get.
        warnings: What is allowed, but may not be meant.
    """

    full: ImportedHalf
    decoder: ImportedHalf
    layer_map: tuple[int, ...]
    tokenizer: Path
    warnings: list[str] = field(default_factory=list)

    @property
    def one_checkpoint(self) -> bool:
        """True if both halves are the same folder, which the pair then has once."""
        return self.full.checkpoint.folder.resolve() == self.decoder.checkpoint.folder.resolve()

    @property
    def runs_here(self) -> bool:
        """True if OverFill's own engine runs both halves."""
        return "overfill" in self.full.engines and "overfill" in self.decoder.engines


def plan_import(
    full: Path, decoder: Path, layer_map: Sequence[int] | KeptLayers | None = None, tokenizer: Path | None = None
) -> ImportPlan:
    """Reads configs, tokenizers and tensor headers, and checks that the halves fit each other.

    Reads weights of a two-stage checkpoint only: a head that is stored although it is tied, and the norms and biases
    of a teacher.

    Args:
        full: Folder of the full model's checkpoint.
        decoder: Folder of the decoder's checkpoint, which may be in the format of OverFill's authors.
        layer_map: The full-model layer whose KV each decoder layer reads, or the authors' name for it. None takes what
            the checkpoint says, or maps each layer to itself.
        tokenizer: Folder of a tokenizer for both halves. None takes the full model's.

    Raises:
        InvalidPair: a file is missing or damaged, or the halves do not fit; the message names every differing field.
        UnsupportedModel: an architecture, option or format is not supported.
    """
    full_half = _full_half(PublishedCheckpoint(full))
    decoder_half, strategy = _decoder_half(PublishedCheckpoint(decoder), full_half)
    tokenizer = tokenizer or full
    problems = differing_fields(full_half.config, decoder_half.config)
    problems += _tokenizer_problems(tokenizer, (full, decoder), full_half.config.vocab_size)
    if problems:
        raise InvalidPair(
            f"the decoder in {decoder} does not fit the full model in {full}; differing fields: {', '.join(problems)}"
        )
    found = _layer_map(layer_map or strategy, full_half.config, decoder_half.config)
    layers = full_half.config.num_layers, decoder_half.config.num_layers
    stated = found if strategy is None else kept_layers(strategy, *layers)
    if (problem := layer_map_problem(found, full_half.config, decoder_half.config)) is not None:
        raise InvalidPair(f"the layer map {_listed(found)} {problem}")
    for half in (full_half, decoder_half):
        check_tensors(_renamed(half), half.config, expected_shapes(half.config), half.checkpoint.folder)
    plan = ImportPlan(full_half, decoder_half, found, tokenizer)
    plan.warnings.extend(_warnings(plan))
    if found != stated:
        plan.warnings.append(
            f"the layer map {_listed(found)} was given, but depth_prune_strategy {strategy!r} in {decoder} means "
            f"{_listed(stated)}"
        )
    return plan


def write_import(
    plan: ImportPlan, out: Path, recipe: Mapping[str, Any], *, copy: bool = False, report: Report = silent
) -> Pair:
    """Writes the pair's folder and moves it to ``out`` once it is whole. Reads all weights for their digests.

    Weights under ordinary names become links. Others are written anew, and read twice: from the source, and as written.

    Args:
        plan: What ``plan_import`` returned.
        out: Folder of the new pair.
        recipe: Entry of ``pair.json`` that says where the decoder came from.
        copy: True copies the files instead of linking to them.
        report: Called with a description, the bytes read and the bytes in total.

    Raises:
        InvalidPair: a weight is NaN or infinite, a tied head differs from its embedding, or a file changed meanwhile;
            the message names it.
        OverfillError: the folder cannot be written.
    """
    try:
        with atomic_folder(out) as folder:
            full_digest = _write_half(plan.full, folder / "full", plan, copy, report)
            decoder_digest = full_digest
            if not plan.one_checkpoint:
                decoder_digest = _write_half(plan.decoder, folder / "decoder", plan, copy, report)
            write_manifest(
                folder,
                decoder="full" if plan.one_checkpoint else "decoder",
                full_digest=full_digest,
                decoder_digest=decoder_digest,
                layer_map=plan.layer_map,
                recipe=recipe,
            )
    except OSError as error:
        raise OverfillError(f"cannot write the pair {out}: {error}") from error
    return Pair.load(out)


def _full_half(checkpoint: PublishedCheckpoint) -> ImportedHalf:
    if checkpoint.hf_config is None:
        raise InvalidPair(f"{checkpoint.folder / 'config.json'} is missing; the full model needs one")
    if is_two_stage(checkpoint):
        raise InvalidPair(
            f"{checkpoint.folder} is a two-stage checkpoint (tensors student.…): give it as --decoder, not as --full"
        )
    return _ordinary_half(checkpoint, checkpoint.hf_config)


def _decoder_half(checkpoint: PublishedCheckpoint, full: ImportedHalf) -> tuple[ImportedHalf, KeptLayers | None]:
    if not is_two_stage(checkpoint):
        if checkpoint.hf_config is None:
            raise InvalidPair(
                f"{checkpoint.folder / 'config.json'} is missing, and the tensors are not called student.…, as in a "
                "two-stage checkpoint"
            )
        return _ordinary_half(checkpoint, checkpoint.hf_config), None
    tensors = student_tensors(checkpoint)
    strategy = stated_strategy(checkpoint, full.config.num_layers, count_layers(tensors))
    tied = has_tied_head(checkpoint, tensors)
    if tied:
        tensors.pop(HEAD, None)
    hf_config = student_config(full.hf_config, tensors, tied)
    check_teacher(checkpoint, full.checkpoint, plain=full.config.weight_format == "plain")
    return ImportedHalf(checkpoint, hf_config, tensors, ModelConfig.from_dict(hf_config)), strategy


def _ordinary_half(checkpoint: PublishedCheckpoint, hf_config: dict[str, Any]) -> ImportedHalf:
    try:
        config = ModelConfig.load(checkpoint.folder)
        loadable = loadable_config(hf_config)
    except InvalidPair as error:  # or UnsupportedModel, which is one
        if str(checkpoint.folder) in str(error):
            raise
        raise type(error)(f"{checkpoint.folder}: {error}") from None
    return ImportedHalf(checkpoint, loadable, checkpoint.tensors, config)


def _renamed(half: ImportedHalf) -> list[StoredTensor]:
    return [replace(tensor, name=name) for name, tensor in sorted(half.tensors.items())]


def _layer_map(asked: Sequence[int] | KeptLayers | None, full: ModelConfig, decoder: ModelConfig) -> tuple[int, ...]:
    if isinstance(asked, str):
        if decoder.num_layers > full.num_layers:
            raise InvalidPair(
                f"the decoder has {decoder.num_layers} layers and the full model {full.num_layers}: "
                f"{asked!r} gives no layer map; list the layers"
            )
        return kept_layers(asked, full.num_layers, decoder.num_layers)
    if asked is not None:
        return tuple(asked)
    if decoder.num_layers != full.num_layers:
        raise InvalidPair(
            f"the decoder has {decoder.num_layers} layers and the full model {full.num_layers}: say with --layer-map "
            "which full-model layer each decoder layer came from, as 0,2,5,… or as one of "
            + ", ".join(get_args(KeptLayers))
        )
    return tuple(range(full.num_layers))


def _listed(layer_map: Sequence[int]) -> str:
    return ",".join(map(str, layer_map))


def _tokenizer_problems(tokenizer: Path, halves: Sequence[Path], vocab_size: int) -> list[str]:
    """Describes how the tokenizer of the pair differs from those of its halves, which may have none."""
    tokens = _token_ids(tokenizer / _TOKENIZER)
    if (highest := max(tokens, default=0)) >= vocab_size:
        return [f"tokenizer (highest token id {highest}, vocab_size of the full model {vocab_size})"]
    problems = []
    for half in halves:
        if not (half / _TOKENIZER).exists() or (half / _TOKENIZER).samefile(tokenizer / _TOKENIZER):
            continue
        others = _token_ids(half / _TOKENIZER)
        if differing := sorted(i for i in tokens.keys() | others.keys() if tokens.get(i) != others.get(i)):
            first = differing[0]
            problems.append(
                f"tokenizer ({len(differing)} tokens differ, the first is {first}: "
                f"{tokens.get(first)!r} in {tokenizer}, {others.get(first)!r} in {half})"
            )
    return problems


def _token_ids(file: Path) -> dict[int, str]:
    """Returns the tokens of a tokenizer.json by id."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, dict):
            tokens = {int(i): token for token, i in vocabulary.items()}
        else:  # a Unigram model: pairs of a token and its score
            tokens = {i: token for i, (token, _) in enumerate(vocabulary)}
        return tokens | {int(added["id"]): added["content"] for added in content.get("added_tokens") or ()}
    except FileNotFoundError:
        raise InvalidPair(
            f"{file} is missing; a fast tokenizer is needed. Give the folder of one as --tokenizer"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidPair(f"{file} is not a fast tokenizer: {error!r}") from None


def _warnings(plan: ImportPlan) -> list[str]:
    found = []
    for name, half in (("full model", plan.full), ("decoder", plan.decoder)):
        if "overfill" not in half.engines:
            found.append(
                f"OverFill's own engine does not run the {name}, whose weights are stored in "
                f"{half.config.weight_format}; engines that do: {', '.join(half.engines)}"
            )
    if plan.decoder.weights_per_token > plan.full.weights_per_token:
        found.append(
            f"the decoder reads {plan.decoder.weights_per_token:,} weights per token, more than the full model's "
            f"{plan.full.weights_per_token:,}: decoding is slower than with the full model alone"
        )
    if len(set(plan.layer_map)) < len(plan.layer_map):
        found.append("the layer map has a layer twice: two decoder layers read the same KV")
    if sorted(plan.layer_map) != list(plan.layer_map):
        found.append("the layer map is not in ascending order")
    if slow := slow_sizes(plan.decoder.config.hidden_size, plan.decoder.config.intermediate_size):
        found.append(f"decoder: {slow}")
    return found


def _write_half(half: ImportedHalf, folder: Path, plan: ImportPlan, copy: bool, report: Report) -> str:
    """Writes the checkpoint of one half and returns its digest."""
    folder.mkdir()
    source = half.checkpoint
    if half.config.tie_embeddings:
        source.check_tied_head()
    if half.converted:
        _convert(half, folder, report)
    else:
        for file in source.files:
            _place(file, folder, copy)
        if source.files != [source.folder / "model.safetensors"]:
            _place(source.folder / "model.safetensors.index.json", folder, copy)
    if half.hf_config == source.hf_config:
        _place(source.folder / "config.json", folder, copy)
    else:
        write_json(folder / "config.json", half.hf_config)
    # Both halves get the same companions, so that they always have one tokenizer and one set of stop tokens.
    for name in COMPANION_FILES:
        generation = name == "generation_config.json"
        file = (plan.full.checkpoint.folder if generation else plan.tokenizer) / name
        if file.exists():
            _place(file, folder, copy)

    def check(tensor: StoredTensor, data: bytes) -> None:
        check_finite(half.tensors[tensor.name], data)  # names the file of the source

    digest = checkpoint_digest(folder, report, None if half.converted else check)
    source.check_unchanged()
    return digest


def _convert(half: ImportedHalf, folder: Path, report: Report) -> None:
    """Writes the half's tensors as safetensors in shards, under their new names, without a tied head."""
    headers = {n: t for n, t in half.tensors.items() if n != HEAD or not half.config.tie_embeddings}
    total, done = sum(t.end - t.start for t in headers.values()), 0
    shards: list[list[str]] = [[]]
    size = 0
    for name, header in sorted(headers.items()):
        size += (bytes_ := header.end - header.start)
        if shards[-1] and size > _SHARD_BYTES:
            shards.append([])
            size = bytes_
        shards[-1].append(name)
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: half.checkpoint.read(headers[name].name) for name in names}
        for name, tensor in tensors.items():
            check_finite(headers[name], tensor.flatten().view(torch.uint8).numpy().data)
        save_tensors(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
        done += sum(headers[n].end - headers[n].start for n in names)
        report("Converting weights", done, total)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(folder / "model.safetensors.index.json", index)


def _place(file: Path, folder: Path, copy: bool) -> None:
    """Puts a file into ``folder``, as a copy or as a relative link to the real file."""
    if copy:
        shutil.copyfile(file, folder / file.name)
    else:
        link_relatively(folder / file.name, file)
