"""``overfill bench tasks``: writes the data of four tasks, and scores adapters on them."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import click

from overfill.cli.options import set_threads
from overfill.lab.commands.bench_options import Counts
from overfill.lab.tasks.cases import TASKS, cases, prompt

if TYPE_CHECKING:
    from overfill.api.tokenizer import Tokenizer
    from overfill.making.conversations import Conversation

_HELD_OUT_SEED = 1_000_000  # a seed of training data is smaller


@click.command("tasks", short_help="Quality of adapters on four tasks: on the full model's KV, and with own prefill.")
@click.option("--pair", default="identity", show_default=True, help="An identity pair's name or folder.")
@click.option("--write", type=click.Path(file_okay=False, path_type=Path), help="Write TASK.jsonl files to train on.")
@click.option(
    "--adapters",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Score these: TASK, TASK-own (own prefill), TASK-1, TASK-1-own, …",
)
@click.option("--tokens", type=Counts(), default="200,1000", show_default=True, help="Lengths of prompts to score.")
@click.option("--examples", type=int, default=500, show_default=True, help="Held-out examples of each task.")
@click.option("--threads", type=int, help="CPU threads.")
def tasks_command(
    pair: str, write: Path | None, adapters: Path | None, tokens: tuple[int, ...], examples: int, threads: int | None
) -> None:
    """Write the data of four tasks over the same prompts, or score adapters on held-out data.

    Prints a JSON line per adapter and length. `ratio` is the score on the full model's KV over that of the adapter with
    its own prefill. Train with `overfill pair finetune identity --data TASK.jsonl --out FOLDER/TASK`, and with
    `--own-prefill --epochs 1 --out FOLDER/TASK-own`, which takes as long.
    """
    from overfill.api.tokenizer import Tokenizer
    from overfill.cli.progress import show_progress
    from overfill.making.conversations import append_jsonl, encode
    from overfill.model.manifest import Pair
    from overfill.pair.store import resolve_pair

    if (write is None) == (adapters is None):
        raise click.UsageError("give --write FOLDER or --adapters FOLDER")
    set_threads(threads)
    with show_progress() as report:
        found = Pair.load(resolve_pair(pair, report))
        if not found.identity:
            raise click.UsageError(f"--pair must be an identity pair, whose decoder is its full model; {pair} is not")
        tokenizer = Tokenizer.load(found.full_path)
        if write is not None:
            write.mkdir(parents=True, exist_ok=True)
            for part, count, seed in (("jsonl", 1000, 1), ("held-out.jsonl", 60, 2)):
                for task, conversations in _conversations(tokenizer, 200, count, seed).items():
                    (write / f"{task}.{part}").unlink(missing_ok=True)
                    append_jsonl(write / f"{task}.{part}", conversations)
            return
        from overfill.lab.tasks.judge import rows

        assert adapters is not None
        transcripts = {
            length: {
                task: encode(conversations, tokenizer, tail_tokens=0)
                for task, conversations in _conversations(tokenizer, length, examples, _HELD_OUT_SEED).items()
            }
            for length in tokens
        }
        for row in rows(found, adapters, transcripts, report):
            click.echo(json.dumps(row))


def _conversations(tokenizer: Tokenizer, tokens: int, examples: int, seed: int) -> dict[str, list[Conversation]]:
    """Makes the conversations of each task; prompts have about ``tokens`` tokens, with the chat template's."""
    from overfill.making.conversations import Conversation

    def num_tokens(text: str) -> int:
        return len(tokenizer.encode_continuation(text))

    template = len(tokenizer.encode_chat([{"role": "user", "content": ""}]))
    made: dict[str, list[Conversation]] = {task: [] for task in TASKS}
    for case, rng in islice(cases(seed), examples):
        question = {"role": "user", "content": prompt(case, rng, tokens - template, num_tokens)}
        for task, answer in TASKS.items():
            made[task].append(Conversation((question, {"role": "assistant", "content": answer(case)}), kind=task))
    return made
