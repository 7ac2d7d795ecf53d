"""``overfill pair list``: the named pairs and those in the cache. Prepares nothing and reads no weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_command(as_json: bool) -> None:
    """List the named pairs and those in the cache.

    Shows each pair's state, its full model, the weights that its decoder reads per token, and its folder. Pairs in
    folders of your own are not listed. `overfill pair path NAME` prepares a named pair.
    """
    from rich.table import Table

    from overfill.cli.output import console, print_json

    pairs = [_describe(*each) for each in _cached_pairs()]
    if as_json:
        print_json(pairs)
        return
    table = Table(box=None, padding=(0, 1))
    for column in ("pair", "state", "full model", "decoder reads", "folder"):
        table.add_column(column, justify="right" if column == "decoder reads" else "left")
    for pair in pairs:
        full, decoder = pair["full"], pair["decoder"]
        reads = f"{decoder['weights'] / 1e6:.0f} M ({decoder['weights'] / full['weights']:.0%})" if full else ""
        table.add_row(pair["name"], pair["state"], full["name"] if full else "", reads, pair["folder"])
    console().print(table)


def _cached_pairs() -> Iterator[tuple[str, Path, str]]:
    """Yields name, folder and state of the named pairs, then of those in the cache that earlier versions made.

    This version does not use one that is "outdated", whose folder may be deleted.
    """
    from overfill.model.manifest import MANIFEST
    from overfill.pair.store import NAMED, is_ready, pair_folder
    from overfill.process.home import home

    for name in NAMED:
        folder = pair_folder(name)
        yield name, folder, "ready" if is_ready(name, None) else "damaged" if folder.exists() else "not prepared"
    for folder in sorted(manifest.parent for manifest in (home() / "pairs").glob(f"*/*/{MANIFEST}")):
        if folder != pair_folder(folder.name):
            yield folder.name, folder, "outdated"


def _describe(name: str, folder: Path, state: str) -> dict[str, Any]:
    """Describes a pair as plain values. ``full`` and ``decoder`` are None for one that cannot be used as it is."""
    from overfill.making.evaluate.costs import DecodeCost
    from overfill.model.manifest import Pair

    described: dict[str, Any] = {"name": name, "state": state, "folder": str(folder), "full": None, "decoder": None}
    if state != "ready":
        return described
    pair = Pair.load(folder)
    for half, path, config in (
        ("full", pair.full_path, pair.full_config),
        ("decoder", pair.decoder_path, pair.decoder_config),
    ):
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        described[half] = {
            "name": path.resolve().name,
            "path": str(path),
            "bytes": size,
            "weights": DecodeCost.of(config, "bf16").weights,
        }
    return described
