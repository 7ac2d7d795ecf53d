"""``overfill pair import``: make a pair from a full model and a decoder that somebody else made."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from overfill.cli.options import OutPath
from overfill.making.recipe import KeptLayers

if TYPE_CHECKING:
    from overfill.making.import_pair import ImportPlan

_STRATEGIES = get_args(KeptLayers)


class LayerMapType(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.3 on
    """Parses layer numbers separated by commas to a tuple, and a depth pruning strategy to its name."""

    name = "|".join(("0,2,5,…", *_STRATEGIES))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...] | str:
        if isinstance(value, tuple) or value in _STRATEGIES:
            return value  # type: ignore[no-any-return]
        parts = str(value).split(",")
        if not all(part.strip().isdecimal() for part in parts):
            self.fail(
                f"{value!r} is neither layer numbers such as 0,2,5 nor one of {', '.join(_STRATEGIES)}", param, ctx
            )
        return tuple(int(part) for part in parts)


@click.command("import")
@click.option(
    "--full", required=True, metavar="FOLDER_OR_ID", help="Full model: a folder, or an id on the Hugging Face hub."
)
@click.option(
    "--decoder",
    required=True,
    metavar="FOLDER_OR_ID",
    help="Decoder: a checkpoint, or a two-stage checkpoint with tensors student.….",
)
@click.option(
    "--layer-map",
    type=LayerMapType(),
    help="Full-model layer whose KV each decoder layer reads, or which layers a depth-pruned decoder kept.  "
    "[default: what the checkpoint says, else each layer its own]",
)
@click.option(
    "--tokenizer", metavar="FOLDER_OR_ID", help="Where both halves' tokenizer comes from.  [default: the full model]"
)
@click.option("--copy", is_flag=True, help="Copy the files instead of linking to them.")
@click.option("--dry-run", is_flag=True, help="Only check that the halves fit; write nothing.")
@click.option("--out", type=OutPath("new folder"), help="Folder to write; must not exist.")
def import_command(
    full: str,
    decoder: str,
    layer_map: tuple[int, ...] | Any,
    tokenizer: str | None,
    copy: bool,
    dry_run: bool,
    out: Path | None,
) -> None:
    """Make a pair from a full model and a decoder made elsewhere.

    The decoder must have the full model's KV heads, head_dim, RoPE, vocabulary and tokenizer. Both are safetensors, in
    one file or in shards. Weights in FP8, AWQ, GPTQ or compressed-tensors can be imported; only workers with the engine
    vllm run them.

    A decoder in the format of OverFill's authors needs no config: its sizes come from its tensors, everything else from
    the full model.

    Prints the pair's folder on stdout. Prints progress on stderr, then what was imported and the commands to use next.
    """
    if out is None and not dry_run:
        raise click.UsageError("--out is missing: the folder to write. To only check the halves, add --dry-run")
    from overfill.cli.progress import show_progress
    from overfill.making.full_models import resolve_model
    from overfill.making.import_pair import plan_import, write_import

    with show_progress() as report:
        given = {"full": full, "decoder": decoder} | ({"tokenizer": tokenizer} if tokenizer else {})
        folders = {name: resolve_model(source, report) for name, source in given.items()}
        plan = plan_import(folders["full"], folders["decoder"], layer_map, folders.get("tokenizer"))
        for warning in plan.warnings:
            click.echo(f"overfill: warning: {warning}", err=True)
        if out is not None and not dry_run:
            # Absolute paths of folders, and ids on the hub as they are.
            sources = {name: str(folders[name]) if Path(source).is_dir() else source for name, source in given.items()}
            out = write_import(plan, out, {"method": "imported"} | sources, copy=copy, report=report).folder
    _print_summary(plan, None if dry_run else out)
    if out is not None and not dry_run:
        click.echo(out)


def _engine_options(plan: ImportPlan) -> str:
    """Options of ``overfill up`` for halves that OverFill's own engine does not run."""
    halves = {"prefill": plan.full, "decode": plan.decoder}
    stages = [stage for stage, half in halves.items() if "overfill" not in half.engines]
    return " --engine vllm" if len(stages) == len(halves) else "".join(f" --{stage}-engine vllm" for stage in stages)


def _print_summary(plan: ImportPlan, folder: Path | None) -> None:
    """Prints what was imported on stderr, and the next commands if the pair was written."""
    each_its_own = list(plan.layer_map) == list(range(plan.full.config.num_layers))
    kept = "each its own" if each_its_own else ",".join(map(str, plan.layer_map))
    for name, half in (("full", plan.full), ("decoder", plan.decoder)):
        config = half.config
        sizes = f"hidden {config.hidden_size:,}, MLP {config.intermediate_size:,}, {config.num_layers} layers"
        click.echo(
            f"{name:<9}  {half.parameters:,} parameters, of which a decode step reads {half.weights_per_token:,}; "
            f"{sizes}; {config.weight_format} weights; "
            f"runs on {', '.join(half.engines)}",
            err=True,
        )
    click.echo(f"layer map  {kept}", err=True)
    if folder is None:
        click.echo("The halves fit. Nothing was written.", err=True)
        return
    path = shlex.quote(str(folder))
    commands = {"check it": f"overfill pair show {path}"}
    commands["serve it"] = f"overfill up --pair {path}{_engine_options(plan)}"
    if plan.runs_here:
        commands["judge it"] = f"overfill pair eval {path}"
    for name, words in commands.items():
        click.echo(f"{name:<9}  {words}", err=True)
