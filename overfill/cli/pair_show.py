"""``overfill pair show``: what a pair consists of, from its files as they are now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from overfill.model.manifest import Half, Pair
    from overfill.telemetry.progress import Report


@click.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show_command(name: str, as_json: bool) -> int:
    """Show what the pair NAME consists of.

    NAME is default, fast, identity or a pair folder. Shows the models, sizes, digests, engines, recipe and evaluation.
    weights_read is the number of weights that one token of an answer reads; the embedding is not among them.

    Reads all weights, about a second per gigabyte. Sizes, digests and engines are those of the files as they are now.
    Exits with 1 if digest or engines differ from pair.json, a tensor does not fit its config, a tied head differs from
    its embedding, or a weight is not finite.
    """
    from overfill.cli.progress import show_progress
    from overfill.model.manifest import Pair
    from overfill.pair.store import resolve_pair

    with show_progress() as report:
        pair = Pair.load(resolve_pair(name, report))
        facts = describe(pair, report)
    show_facts(facts, as_json)
    if not as_json:
        read, of_full = facts["decoder"]["weights_read"], facts["full"]["weights_read"]
        click.echo(f"A token of an answer reads {100 * read / of_full:.0f} % of the full model's weights.")
    problems = [(half, problem) for half in ("full", "decoder") for problem in facts[half].get("problems", ())]
    for half, problem in problems:
        click.echo(f"overfill: {half}: {problem}", err=True)
    return 1 if problems else 0


def describe(pair: Pair, report: Report) -> dict[str, Any]:
    """Describes a pair as plain values, from its files.

    ``manifest_digest`` is present if the manifest has another digest than the files, and ``problems`` if a half is not
    usable.
    """
    full = _half(pair, "full", report)
    same = pair.decoder_path == pair.full_path
    decoder = _half(pair, "decoder", report, full["digest"] if same else None)
    geometry = pair.full_config
    return {
        "name": pair.name,
        "folder": str(pair.folder),
        "full": full,
        "decoder": decoder | {"quantize": pair.quantize, "recipe": dict(pair.recipe)},
        "kv": {
            "num_layers": geometry.num_layers,
            "num_kv_heads": geometry.num_kv_heads,
            "head_dim": geometry.head_dim,
            "layer_map": list(pair.layer_map),
        },
        "tokenizer_digest": pair.tokenizer_digest,
        "eval": dict(pair.eval),
    }


def _half(pair: Pair, half: Half, report: Report, digest: str | None = None) -> dict[str, Any]:
    """Describes one half. Its weights are read and checked unless ``digest`` is given."""
    from overfill.errors import OverfillError
    from overfill.making.evaluate.costs import DecodeCost
    from overfill.making.finite import check_finite
    from overfill.making.published import PublishedCheckpoint
    from overfill.model.digest import StoredTensor, checkpoint_digest, list_tensors
    from overfill.model.files import check_tensors
    from overfill.model.loading import count_parameters, expected_shapes
    from overfill.model.manifest import engines_that_run

    path, config, stated_engines = pair.path(half), pair.config(half), pair.engines(half)
    engines = engines_that_run(config, "none" if half == "full" else pair.quantize)
    tensors = list_tensors(path)
    problems: list[str] = []

    def check(tensor: StoredTensor, data: bytes) -> None:
        try:
            check_finite(tensor, data)
        except OverfillError as error:
            if str(error) not in problems:
                problems.append(str(error))

    try:
        check_tensors(tensors, config, expected_shapes(config), path)
        if config.tie_embeddings:
            PublishedCheckpoint(path).check_tied_head()
    except OverfillError as error:
        problems.append(str(error))
    digests = _digests(digest or checkpoint_digest(path, report, check), pair, half)
    if set(engines) != set(stated_engines):
        problems.append(
            f"engines that can run the weights in {path}: {', '.join(engines) or 'none'}; pair.json says "
            f"{', '.join(stated_engines) or 'none'}"
        )
    if "manifest_digest" in digests:
        problems.append(
            f"the weights in {path} have the digest {digests['digest']}, but pair.json says "
            f"{digests['manifest_digest']}. The weights changed after the pair was made, so services refuse it, and "
            "recipe and eval describe the earlier weights: build or import the pair again."
        )
    return {
        "path": str(path),
        "model_type": config.model_type,
        "parameters": count_parameters(config),
        "weights_read": DecodeCost.of(config, "bf16").weights,
        **{name: getattr(config, name) for name in ("hidden_size", "intermediate_size", "num_layers")},
        "weights": config.weight_format,
        "dtypes": sorted({tensor.dtype for tensor in tensors}),
        "bytes": sum(tensor.end - tensor.start for tensor in tensors),
        "engines": list(engines),
        **digests,
        **({"problems": problems} if problems else {}),
    }


def _digests(found: str, pair: Pair, half: Half) -> dict[str, str]:
    stated = pair.digest(half)
    return {"digest": found} if found == stated else {"digest": found, "manifest_digest": stated}


def show_facts(facts: dict[str, Any], as_json: bool) -> None:
    """Prints plain values as JSON, or in a row each."""
    from overfill.cli.output import print_json

    if as_json:
        print_json(facts)
        return
    rows = _flatten(facts)
    width = max(len(key) for key, _ in rows)
    for key, value in rows:
        click.echo(f"{key:<{width}}  {value}")


def _flatten(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Flattens nested objects to rows of (dotted name, text); an empty object gives no row."""
    rows = []
    for key, value in facts.items():
        if isinstance(value, dict):
            rows += _flatten(value, f"{prefix}{key}.")
        else:
            text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
            rows.append((f"{prefix}{key}", text))
    return rows
