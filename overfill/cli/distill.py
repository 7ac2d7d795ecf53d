"""``overfill pair distill`` trains a decoder on its full model; ``distill-plot`` draws learning curves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from overfill.cli.options import AnyNumber, OutPath, set_threads

if TYPE_CHECKING:
    from overfill.making.distill.data import LoadedData
    from overfill.making.distill.recipe import Data, Recipe, Training
    from overfill.model.manifest import Pair
    from overfill.telemetry.progress import Report

DEFAULT_RECIPE = "smollm2-fast"


@click.command("distill")
@click.argument("pair", required=False)
@click.option(
    "--data",
    metavar="SOURCE",
    help="Conversations to train on: `shipped`, a file of JSON lines, or a hub data set.  [default: the recipe's]",
)
@click.option(
    "--held-out",
    metavar="development|FILE",
    help="Conversations to judge on: the `development` set in the package, or a file.  [default: the recipe's]",
)
@click.option("--out", type=OutPath("new folder"), help="Pair folder to write; must not exist.")
@click.option(
    "--recipe",
    "recipe_name",
    metavar="NAME_OR_FILE",
    default=DEFAULT_RECIPE,
    show_default=True,
    help="Models, data and hyperparameters. Other options override the recipe's values.",
)
@click.option("--steps", type=int, help="Length of the run in steps.")
@click.option(
    "--minutes", type=AnyNumber(), help="Length of the run in minutes of training; the learning rate follows the clock."
)
@click.option("--epochs", type=AnyNumber(), help="Length of the run in passes over the data.")
@click.option(
    "--rank",
    type=int,
    help="Train low-rank factors of this rank beside frozen matrices, and merge them at the end.  [default: the "
    "recipe's, or everything is trained]",
)
@click.option("--learning-rate", type=AnyNumber(), help="Peak learning rate; low-rank factors take 8 times that.")
@click.option("--batch-transcripts", type=int, help="Transcripts per step, over all processes.")
@click.option("--cross-entropy", type=AnyNumber(), help="Weight of the answers' own tokens in the loss.")
@click.option("--kl", type=AnyNumber(), help="Weight of the full model's distribution in the loss.")
@click.option("--temperature", type=AnyNumber(), help="Temperature of the KL term.")
@click.option("--top-tokens", type=int, help="Number of the full model's most likely tokens in KL; 0 means all.")
@click.option("--sampled-tokens", type=int, help="Tokens drawn to represent the rest of the vocabulary; 0 means all.")
@click.option("--seed", type=int, help="Seed of the data's order and of the sampled tokens.")
@click.option(
    "--recompute-activations",
    is_flag=True,
    default=None,
    help="Save memory with gradient checkpointing, for a third more computing.",
)
@click.option(
    "--fused/--not-fused", default=None, help="Let torch.compile fuse small operations.  [default: the recipe's]"
)
@click.option(
    "--max-tokens", type=int, help="Maximum length of a transcript; longer ones lose the end of their answer."
)
@click.option("--eval-steps", type=int, help="Steps between evaluations.")
@click.option("--checkpoint-steps", type=int, help="Steps between checkpoints.")
@click.option("--checkpoint-minutes", type=AnyNumber(), help="Minutes between checkpoints.")
@click.option(
    "--cache-gib", type=AnyNumber(), help="Maximum size of the cache of the full model's outputs, for later epochs."
)
@click.option("--standalone", is_flag=True, help="Train a baseline whose decoder reads the prompts itself.")
@click.option(
    "--strict",
    is_flag=True,
    help="Refuse held-out conversations that share 8 words in a row with the training text or with text that made the "
    "decoder, and all if one of these is not known, as for a hub data set.",
)
@click.option("--resume", is_flag=True, help="Continue an interrupted run exactly where it stopped.")
@click.option("--threads", type=int, help="CPU threads.")
def distill_command(
    pair: str | None,
    data: str | None,
    held_out: str | None,
    out: Path | None,
    recipe_name: str,
    max_tokens: int | None,
    standalone: bool,
    strict: bool,
    resume: bool,
    threads: int | None,
    **hyperparameters: Any,
) -> None:
    """Train the decoder of PAIR on its full model.

    PAIR is a named pair or a pair folder.

    The frozen full model reads each prompt; the decoder learns the answer on the full model's KV cache. Training starts
    from PAIR, or without PAIR from the pair that the recipe describes. Give one length: --steps, --minutes or --epochs;
    otherwise the recipe's applies.

    OUT.run holds checkpoints, metrics, TensorBoard events and the learning curve. OUT appears at the end.

    With several GPUs: accelerate launch -m overfill.cli.main pair distill …
    """
    from overfill.making.distill.recipe import changed, read_recipe

    recipe = read_recipe(recipe_name)
    set_threads(threads)
    training = changed(recipe.training, **hyperparameters)
    if out is None:
        raise click.UsageError("--out is missing; name the folder for the trained pair")
    sources = {"source": data, "held_out": held_out, "max_tokens": max_tokens}
    if data is not None and held_out is None:
        sources["held_out"] = recipe.data.held_out or "development"
    _train(
        pair,
        recipe,
        changed(recipe.data, **sources),
        out,
        training,
        strict=strict,
        standalone=standalone,
        resume=resume,
    )


@click.command("distill-plot")
@click.argument("runs", nargs=-1, required=True, metavar="LABEL=FOLDER…")
@click.option("--out", required=True, type=OutPath("picture"), help="Image file to write: .png, .svg or .pdf.")
def distill_plot_command(runs: tuple[str, ...], out: Path) -> None:
    """Draw the learning curves of several runs in one picture.

    FOLDER is a distilled pair or the .run folder beside it.
    """
    from overfill.making.distill.plot import metrics_file, plot_runs

    named = [(label, Path(folder)) for label, _, folder in (run.partition("=") for run in runs)]
    if not all(label and str(folder) != "." for label, folder in named):
        raise click.UsageError("give each run as LABEL=FOLDER")
    plot_runs([(label, metrics_file(folder)) for label, folder in named], out)
    click.echo(out)


def _train(
    name: str | None,
    recipe: Recipe,
    data: Data,
    out: Path,
    training: Training,
    *,
    strict: bool,
    standalone: bool,
    resume: bool,
) -> None:
    from overfill.api.tokenizer import Tokenizer
    from overfill.cli.progress import show_progress
    from overfill.making.distill.data import load_data
    from overfill.model.manifest import Pair
    from overfill.pair.store import resolve_pair

    with show_progress() as report:
        pair = Pair.load(resolve_pair(name, report) if name else _starting_pair(recipe, out, report))
        loaded = load_data(data, Tokenizer.load(pair.full_path))
        _say_overlaps(pair, loaded, strict)
        how = {"training_text": loaded.training_text, "standalone": standalone, "resume": resume}
        run_to_end(pair, out, loaded, training, report, **how)
    click.echo(out)


def run_to_end(pair: Pair, out: Path, loaded: LoadedData, training: Training, report: Report, **how: Any) -> None:
    """Trains and writes ``out``. ``how`` has the other arguments of ``Run``."""
    from overfill.making.distill.train import Run
    from overfill.process.memory import freed_memory_kept

    texts = loaded.training, loaded.held_out
    run = Run(pair, out, *texts, training, report=report, log_line=lambda line: click.echo(line, err=True), **how)
    with freed_memory_kept():
        try:
            run.train()
        except KeyboardInterrupt:
            click.echo("overfill: stopped; give the same options and --resume to continue", err=True)
            raise


def _say_overlaps(pair: Pair, loaded: LoadedData, strict: bool) -> None:
    """Says how many held-out conversations overlap with text that the decoder was made from, or is trained on.

    Raises:
        InvalidRequest: as ``find_overlaps``.
    """
    from overfill.making.distill.train import make_accelerator
    from overfill.making.overlap import DECODER_TEXT, TextDigests, describe_overlap, find_overlaps

    texts = {"the training text": loaded.training_text, DECODER_TEXT: TextDigests.load(pair)}
    overlaps = find_overlaps(loaded.judged, texts, "held_out", strict=strict)
    if make_accelerator().is_main_process:
        for name, shared in overlaps.items():
            click.echo(f"overlap: {describe_overlap(shared, len(loaded.judged), name)}", err=True)


def _starting_pair(recipe: Recipe, out: Path, report: Report) -> Path:
    """Returns the pair that the recipe describes; the main process builds it in the run's folder if needed."""
    from overfill.errors import InvalidRequest
    from overfill.making.build import build_pair
    from overfill.making.calibration import calibration_text
    from overfill.making.distill.train import make_accelerator, run_folder
    from overfill.making.full_models import resolve_model
    from overfill.making.recipe import DecoderRecipe

    if recipe.decoder is None:
        raise InvalidRequest("pair", "this recipe has no starting pair: give one, such as `fast`, or a pair's folder")
    start, sizes = run_folder(out) / "start", recipe.decoder
    with make_accelerator().main_process_first():
        if not start.exists():
            decoder = DecoderRecipe(sizes.hidden_size, sizes.intermediate_size, method=sizes.method, fit=sizes.fit)
            full = resolve_model(sizes.full, report)
            decoder.check(full)
            conversations = calibration_text(sizes.calibration, full, decoder.tokens, report)
            build_pair(full, start, decoder, conversations, calibration=sizes.calibration, report=report)
    return start
