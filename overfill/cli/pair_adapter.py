"""``overfill pair adapter``: the folder of adapters that workers load. Starts nothing and asks no stack."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from overfill.cli.options import adapters_option
from overfill.request.answer_start import MAX_TAIL_TOKENS

if TYPE_CHECKING:
    from overfill.model.adapter import AdapterRecord
    from overfill.model.manifest import Pair

_F = TypeVar("_F", bound=Callable[..., Any])

_OWN_PREFILL = (
    "with its own prefill: in training the adapter changed the prompt's KV too, but a stack serves it on the full "
    "model's KV. Its answers may be worse for that; `overfill pair eval --adapter` measures it"
)
_ON_FULL_KV = "on the full model's KV, as it is served"


@click.group("adapter")
def adapter_group() -> None:
    """Keep adapters of PAIR's decoder: LoRA in PEFT's format, each for a task.

    The workers of a stack load adapters from a folder, `--adapters`. Its default is the same for these commands and
    `overfill up`: a folder in $OVERFILL_HOME (~/.cache/overfill) for all pairs with the same full model.
    """


def _in_folder(command: _F) -> _F:
    """Adds the argument PAIR and ``--adapters``, and gives the command a Pair and the folder of adapters."""

    @click.argument("pair")
    @adapters_option
    @functools.wraps(command)
    def wrapped(pair: str, adapters: Path | None, **rest: Any) -> Any:
        from overfill.cli.progress import show_progress
        from overfill.model.manifest import Pair
        from overfill.pair.adapters import default_folder
        from overfill.pair.store import resolve_pair

        with show_progress() as report:
            loaded = Pair.load(resolve_pair(pair, report))
        return command(loaded, adapters or default_folder(loaded), **rest)

    return wrapped  # type: ignore[return-value]


_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@adapter_group.command("add")
@_in_folder
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--name", required=True, help="The adapter's name, which requests say: `model: NAME_OF_PAIR:NAME`.")
@click.option(
    "--tail-tokens",
    type=click.IntRange(0, MAX_TAIL_TOKENS),
    help="Tokens at the prompt's end that the decoder computes; 0 means the generation prompt.  [default: as trained, "
    "or else 0]",
)
@click.option(
    "--own-prefill/--on-full-kv",
    default=None,
    help="How it was trained: reading the prompt itself, or on the full model's KV.  [default: what `overfill pair "
    "finetune` recorded, or else --own-prefill]",
)
def add_command(
    pair: Pair, directory: Path, folder: Path, name: str, tail_tokens: int | None, own_prefill: bool | None
) -> None:
    """Add the adapter in FOLDER, with PEFT's two files, for the decoder of PAIR.

    Copies the files. Refuses an adapter that the decoder cannot use: of other shapes, DoRA, modules_to_save, biases,
    products of the embedding or the head, weights that are not finite, and pickled files. Workers load it when
    they start, or when they are told to.
    """
    from overfill.pair.adapters import add_adapter

    record = add_adapter(directory, name, folder, pair, tail_tokens=tail_tokens, own_prefill=own_prefill)
    for title, words in (
        ("rank", str(record.rank)),
        ("takes over", _tail(record)),
        ("trained", _OWN_PREFILL if record.own_prefill else _ON_FULL_KV),
        ("digest", record.digest),
    ):
        click.echo(f"{title:<10}  {words}", err=True)
    click.echo(directory / name)


@adapter_group.command("list")
@_in_folder
@_json_option
def list_command(pair: Pair, directory: Path, as_json: bool) -> None:
    """List the adapters of PAIR's full model.

    The state is "ready" for PAIR's decoder, "of another decoder", or "damaged". Reads no weights.
    """
    from rich.table import Table

    from overfill.cli.output import console, print_json
    from overfill.pair.adapters import adapter_names

    rows = [_listed(directory / name, pair) for name in (adapter_names(directory) if directory.exists() else ())]
    if as_json:
        print_json({"folder": str(directory), "adapters": rows})
        return
    table = Table(box=None, padding=(0, 1))
    for column in ("adapter", "state", "rank", "takes over", "trained", "digest"):
        table.add_column(column, justify="right" if column == "rank" else "left")
    for row in rows:
        trained = "" if row["own_prefill"] is None else "with its own prefill" if row["own_prefill"] else "on full KV"
        table.add_row(row["name"], row["state"], str(row["rank"] or ""), row["takes_over"], trained, row["digest"][:12])
    console().print(table)
    for row in rows:
        if row["problem"]:
            click.echo(f"overfill: {row['problem']}", err=True)
    click.echo(f"folder  {directory}", err=True)


@adapter_group.command("show")
@_in_folder
@click.argument("name")
@_json_option
def show_command(pair: Pair, directory: Path, name: str, as_json: bool) -> None:
    """Show what the adapter NAME consists of, and check its files.

    Reads all weights. Exits with 1 if they are damaged or do not fit PAIR's decoder, or the adapter is of another
    decoder.
    """
    from overfill.cli.pair_show import show_facts
    from overfill.model.adapter import RECORD, read_adapter
    from overfill.model.adapter_files import MAX_JSON_BYTES, parse_object, read_files
    from overfill.pair.adapters import check_decoder, find_adapter

    folder = find_adapter(directory, name)
    adapter = read_adapter(folder, pair.decoder_config)
    recorded = parse_object(folder / RECORD, read_files(folder, {RECORD: MAX_JSON_BYTES})[RECORD])
    products = adapter.products.items()
    facts = {
        "name": name,
        "folder": str(folder),
        **recorded,
        "layers": len({layer for (layer, _), _ in products}),
        "projections": sorted({projection for (_, projection), _ in products}),
        "weights": sum(product.down.numel() + product.up.numel() for _, product in products),
    }
    show_facts(facts, as_json)
    if not as_json:
        click.echo(f"It was trained {_OWN_PREFILL if adapter.record.own_prefill else _ON_FULL_KV}.")
    check_decoder(adapter.record, pair)


@adapter_group.command("remove")
@_in_folder
@click.argument("name")
def remove_command(pair: Pair, directory: Path, name: str) -> None:
    """Remove the adapter NAME from the folder.

    Workers that have loaded it keep it until they are told to unload it, or end.
    """
    from overfill.pair.adapters import remove_adapter

    remove_adapter(directory, name)
    click.echo(f"removed {directory / name}", err=True)


def _tail(record: AdapterRecord) -> str:
    return f"{record.tail_tokens} tokens before the answer" if record.tail_tokens else "at the generation prompt"


def _listed(folder: Path, pair: Pair) -> dict[str, Any]:
    """Describes an adapter as plain values; all but name, state and problem are empty if its record is damaged."""
    from overfill.model.adapter import read_record
    from overfill.model.adapter_files import InvalidAdapter

    try:
        record = read_record(folder)
    except InvalidAdapter as error:
        nothing = {"rank": None, "takes_over": "", "own_prefill": None, "digest": ""}
        return {"name": folder.name, "state": "damaged", "problem": str(error), **nothing}
    fits = record.decoder_digest == pair.decoder_digest
    return {
        "name": record.name,
        "state": "ready" if fits else "of another decoder",
        "problem": "",
        "rank": record.rank,
        "takes_over": _tail(record),
        "own_prefill": record.own_prefill,
        "digest": record.digest,
    }
