"""``overfill pair finetune`` trains an adapter: LoRA factors of a decoder, on the full model's KV of the prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from overfill.cli.options import FILE, AnyNumber, OutPath, set_threads

RECIPE = "adapter"


@click.command("finetune")
@click.argument("pair")
@click.option("--data", required=True, type=FILE, help="Conversations of the task: a file of JSON lines.")
@click.option("--held-out", type=FILE, help="Conversations to judge on.  [default: a tenth of --data]")
@click.option("--out", required=True, type=OutPath("new folder"), help="Adapter folder to write; must not exist.")
@click.option("--lora", type=int, help="Rank of the adapter.  [default: 16]")
@click.option(
    "--distill", is_flag=True, help="Learn the full model's distribution on the answers, instead of their tokens."
)
@click.option(
    "--own-prefill",
    is_flag=True,
    help="Train an ordinary adapter, whose model reads the prompts itself. Served, it still gets the full model's KV.",
)
@click.option(
    "--tail-tokens",
    type=int,
    default=0,
    help="Tokens at the prompt's end that the decoder computes, at most 256.  [default: the generation prompt]",
)
@click.option("--steps", type=int, help="Length of the run in steps.")
@click.option("--minutes", type=AnyNumber(), help="Length of the run in minutes of training.")
@click.option("--epochs", type=AnyNumber(), help="Length of the run in passes over the data.  [default: 4]")
@click.option("--learning-rate", type=AnyNumber(), help="Peak learning rate of the factors.  [default: 0.004]")
@click.option("--batch-transcripts", type=int, help="Conversations per step, over all processes.  [default: 8]")
@click.option("--max-tokens", type=int, help="Maximum length of a conversation; longer ones lose the answer's end.")
@click.option("--recompute-activations", is_flag=True, default=None, help="Save memory, for a third more computing.")
@click.option("--eval-steps", type=int, help="Steps between evaluations; the best one's adapter is written.")
@click.option("--checkpoint-steps", type=int, help="Steps between checkpoints.")
@click.option("--cache-gib", type=AnyNumber(), help="Maximum size of the cache of the full model's outputs.")
@click.option("--seed", type=int, help="Seed of the first factors and of the data's order.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run exactly where it stopped.")
@click.option("--threads", type=int, help="CPU threads.")
def finetune_command(
    pair: str,
    data: Path,
    held_out: Path | None,
    out: Path,
    distill: bool,
    own_prefill: bool,
    tail_tokens: int,
    max_tokens: int | None,
    learning_rate: float | None,
    resume: bool,
    threads: int | None,
    **hyperparameters: Any,
) -> None:
    """Train an adapter for the decoder of PAIR.

    PAIR is a named pair or a pair folder. The frozen full model reads each prompt up to its last tokens; the decoder
    with its adapter computes the rest and learns the answer, the last message of each line's "messages".

    OUT.run holds checkpoints, metrics and TensorBoard events. OUT appears at the end: the adapter of the evaluation
    with the lowest held-out loss, in PEFT's format, with the learning curve in training/curve.png.
    """
    from overfill.api.tokenizer import Tokenizer
    from overfill.cli.distill import run_to_end
    from overfill.cli.progress import show_progress
    from overfill.making.distill.data import load_task
    from overfill.making.distill.recipe import FACTOR_RATE, changed, read_recipe
    from overfill.model.manifest import Pair
    from overfill.pair.store import resolve_pair

    recipe = read_recipe(RECIPE)
    rate = None if learning_rate is None else learning_rate / FACTOR_RATE
    goal = {"cross_entropy": 0.0, "kl": 1.0} if distill else {}
    training = changed(recipe.training, learning_rate=rate, **goal, **hyperparameters)
    sources = {"source": str(data), "held_out": held_out and str(held_out), "max_tokens": max_tokens}
    task = changed(recipe.data, tail_tokens=tail_tokens, **sources)
    set_threads(threads)
    with show_progress() as report:
        found = Pair.load(resolve_pair(pair, report))
        loaded = load_task(task, Tokenizer.load(found.full_path))
        how = {"standalone": own_prefill, "tail_tokens": tail_tokens, "resume": resume}
        run_to_end(found, out, loaded, training, report, **how)
    click.echo(out)
