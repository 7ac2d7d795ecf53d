"""``overfill bench quality``: quality beside speed and cost, for each tier and adapter; and the data of its tasks."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from overfill.cli.options import TIER
from overfill.cli.output import console
from overfill.lab.commands.bench_options import json_option, log_line
from overfill.lab.measurement import print_measurements
from overfill.settings.tiers import TierSpec

if TYPE_CHECKING:
    from overfill.api.tokenizer import Tokenizer
    from overfill.lab.tasks.quality import Exam

_TRAINING = (("jsonl", 1000, 1), ("held-out.jsonl", 60, 2))
"""Ending of each file that --write makes, the number of its conversations, and their seed."""

_JUDGED_SEED, _SHOTS_SEED = 1_000_000, 1_000_001


@click.command("quality", short_help="Right answers beside speed and CPU time, for each tier and adapter.")
@click.option(
    "--tier",
    "tiers",
    type=TIER,
    multiple=True,
    default=["full=identity"],
    show_default=True,
    help="Serve this tier, as `overfill up` does; repeatable, such as full=identity and fast=fast.",
)
@click.option(
    "--adapters",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Serve the adapters of this folder of `overfill pair adapter add` too, named TASK or TASK-SUFFIX.",
)
@click.option(
    "--target",
    metavar="URL",
    help="Ask this OpenAI endpoint instead, such as http://127.0.0.1:8000/v1. "
    "The first --tier then only counts the tokens of a question.",
)
@click.option("--examples", type=click.IntRange(1), default=100, show_default=True, help="Questions of each task.")
@click.option("--tokens", type=click.IntRange(1), default=200, show_default=True, help="Tokens of a question.")
@click.option(
    "--shots",
    type=click.IntRange(0),
    default=3,
    show_default=True,
    help="Worked examples before each question to a tier. Without them, nothing tells it the task.",
)
@click.option("--concurrency", type=click.IntRange(1), default=4, show_default=True, help="Requests at a time.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads of each worker.  [default: a share of the cores]")
@click.option("--write", type=click.Path(file_okay=False, path_type=Path), help="Only write TASK.jsonl to train on.")
@json_option
def quality_command(
    tiers: tuple[TierSpec, ...],
    adapters: Path | None,
    target: str | None,
    examples: int,
    tokens: int,
    shots: int,
    concurrency: int,
    threads: int | None,
    write: Path | None,
    as_json: bool,
) -> int:
    """Measure what tiers and adapters answer right, how fast, and what a right answer costs.

    Four synthetic tasks read the same prompts; an answer is right if its text is exactly the expected one. A tier is
    asked all tasks, an adapter its own. The stack keeps no KV of prompts, so that every writer pays for its own. CPU
    seconds are those of the router, the prefill workers and the tier's decode workers; with --target they are not
    known. Exits with 1 when a request failed.

    With --write, write the tasks' training data, and measure nothing.
    """
    from overfill.api.tokenizer import Tokenizer
    from overfill.cli.progress import show_progress
    from overfill.lab.stacks import served
    from overfill.lab.tasks.quality import measure_quality, quality_table
    from overfill.model.manifest import Pair
    from overfill.pair.store import resolve_pair

    if target and (adapters or threads):
        raise click.UsageError("--target has adapters and threads of its own: leave --adapters and --threads out")
    with ExitStack() as opened:
        report = opened.enter_context(show_progress())
        tiers = tuple(tier.model_copy(update={"pair": str(resolve_pair(tier.pair, report))}) for tier in tiers)
        tokenizer = Tokenizer.load(Pair.load(Path(tiers[0].pair)).full_path)
        if write is not None:
            _write(tokenizer, write)
            return 0
        cpu = None
        if target is None:  # a stack without prefix caches
            settings = {"prefix_cache": False, "adapters": None if adapters is None else str(adapters.resolve())}
            stack = opened.enter_context(
                served(Path(tiers[0].pair), settings=settings, log=log_line, tiers=tiers, threads=threads)
            )
            target, cpu = stack.url, stack.cpu_seconds
        exams = _exams(tokenizer, tokens, examples, shots)
        of = {"prompt_tokens": tokens, "shots": shots, "answers": examples, "concurrency": concurrency}
        found = list(measure_quality(target, exams, of, concurrency=concurrency, cpu=cpu, report=report))
    if as_json:
        print_measurements(found, as_json)
    else:
        console().print(quality_table(found))
    return 0 if all(one.reached for one in found) else 1


def _write(tokenizer: Tokenizer, folder: Path) -> None:
    from overfill.lab.tasks.cases import conversations
    from overfill.making.conversations import append_jsonl

    folder.mkdir(parents=True, exist_ok=True)
    for ending, number, seed in _TRAINING:
        for task, made in conversations(tokenizer, 200, number, seed).items():
            (folder / f"{task}.{ending}").unlink(missing_ok=True)
            append_jsonl(folder / f"{task}.{ending}", made)


def _exams(tokenizer: Tokenizer, tokens: int, examples: int, shots: int) -> dict[str, Exam]:
    from overfill.lab.tasks.cases import conversations
    from overfill.lab.tasks.quality import Exam

    worked = conversations(tokenizer, tokens, shots, _SHOTS_SEED)
    return {
        task: Exam(questions, [message for one in worked[task] for message in one.messages])
        for task, questions in conversations(tokenizer, tokens, examples, _JUDGED_SEED).items()
    }
