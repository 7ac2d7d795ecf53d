"""``overfill pair eval``, ``compare`` and ``lm-eval``: judge pairs. Results on stdout, progress on stderr."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from overfill.cli.options import ClientConnection, OutPath, adapters_option, connection_options, dtype_option

if TYPE_CHECKING:
    from rich.table import Table

    from overfill.making.evaluate.evaluation import Evaluation

_F = TypeVar("_F", bound=Callable[..., Any])

_DATA_HELP = (
    "Conversations to judge on: the `test` set in the package, on which nothing was chosen; the `development` set, on "
    "which the named pairs' sizes were chosen; or a file of JSON lines with `messages`."
)
_MAX_TOKENS_HELP = (
    "Maximum tokens of an answer that a model writes.  [default: the longest given answer and a quarter more]"
)
_WIDTH = 80  # of examples, which are text for people
_EXAMPLES = 3


def _device_options(command: _F) -> _F:
    """Adds ``device``, ``dtype`` and ``threads``."""
    for option in (
        click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: torch's choice]"),
        dtype_option,
        click.option("--device", default="auto", show_default=True, help="Device: cpu, cuda, cuda:1, or auto."),
    ):
        command = option(command)
    return command


def _data_options(command: _F) -> _F:
    """Adds ``data``, ``max_transcripts``, ``free_running`` and ``max_tokens``."""
    for option in (
        click.option("--max-tokens", type=click.IntRange(min=1), help=_MAX_TOKENS_HELP),
        click.option(
            "--no-free-running",
            "free_running",
            flag_value=False,
            default=True,
            help="Do not let the models write answers.",
        ),
        click.option(
            "--max-transcripts",
            type=click.IntRange(min=1),
            help="Judge only the first N conversations.  [default: all]",
        ),
        click.option("--data", default="test", show_default=True, metavar="test|development|FILE", help=_DATA_HELP),
    ):
        command = option(command)
    return command


_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command("eval")
@click.argument("pair")
@click.option("--adapter", metavar="NAME", help="Judge this adapter of the decoder, on --data, instead of the pair.")
@adapters_option
@_data_options
@_device_options
@_json_option
@click.option("--out", type=OutPath("folder"), help="Folder for a report with plots.")
@click.option("--save", is_flag=True, help="Write the main figures into the pair's pair.json.")
@click.option(
    "--strict",
    is_flag=True,
    help="Refuse conversations that share 8 words in a row with text that made the decoder, and all if that text is "
    "not known, as for an imported decoder.",
)
def eval_command(
    pair: str,
    adapter: str | None,
    adapters: Path | None,
    data: str,
    max_transcripts: int | None,
    as_json: bool,
    out: Path | None,
    save: bool,
    strict: bool,
    **how: Any,
) -> None:
    """Judge PAIR on conversations that it has not seen.

    Five variants are judged: the full model; both halves together, with the prompt's KV as it is, in int8 on its way,
    and in an int8 cache; and the decoder alone. On the given answers, the figures are likelihood, KL divergence from
    the full model and agreement with it. The full model and the pair also write greedy answers of their own. The
    figures are perplexity by the full model, share of repeated 4-grams and length, the pair's beside the full model's.
    Three questions are shown with both answers.

    With --adapter, the figures are of answers of the adapter's task, given in --data: their perplexity, the share of
    their tokens that the adapter finds most likely, and the share of its own greedy answers that are the given ones.
    They are shown on the full model's KV, as a stack serves it; with its own prefill; and for the decoder without it.
    """
    if adapter is None and adapters is not None:
        raise click.UsageError("--adapters needs --adapter, the adapter to judge")
    if adapter is not None:
        source = click.get_current_context().get_parameter_source
        if given := [f"--{name}" for name in ("out", "save", "strict") if source(name) is not ParameterSource.DEFAULT]:
            raise click.UsageError(f"--adapter conflicts with {' and '.join(given)}, which judge the pair")
        _judge_adapter(pair, adapter, adapters, data, max_transcripts, as_json, **how)
        return
    from overfill.api.tokenizer import Tokenizer
    from overfill.cli.output import console, print_json
    from overfill.cli.progress import show_progress
    from overfill.making.conversations import encode_judged, judged_conversations
    from overfill.making.evaluate.evaluation import evaluate
    from overfill.making.evaluate.evaluation_report import (
        cost_line,
        forced_rows,
        free_rows,
        kind_rows,
        overlap_line,
        save_summary,
        write_evaluation,
    )
    from overfill.making.overlap import DECODER_TEXT, TextDigests, find_overlaps
    from overfill.model.manifest import Pair
    from overfill.pair.store import resolve_pair

    with show_progress() as report:
        folder = resolve_pair(pair, report)
        loaded = Pair.load(folder)
        judged = encode_judged(judged_conversations(data)[:max_transcripts], Tokenizer.load(loaded.full_path))
        texts = {DECODER_TEXT: TextDigests.load(loaded)}
        overlaps = find_overlaps([conversation for conversation, _ in judged], texts, "data", strict=strict)
        transcripts = [transcript for _, transcript in judged]
        result = evaluate(folder, transcripts, data=data, overlap=overlaps[DECODER_TEXT], report=report, **how)
    if out is not None:
        write_evaluation(out, result)
    if save:
        save_summary(folder, result)
    if as_json:
        print_json(result.to_json())
        return
    console().print(_table(forced_rows(result)))
    if result.free_running:
        console().print("", _table(free_rows(result)))
    if result.kinds:
        console().print("", _table(kind_rows(result)))
    click.echo(f"\n{cost_line(result.full, result.decoder)}\n{overlap_line(result)}")
    if result.free_running:
        _print_examples(result)


def _judge_adapter(
    pair: str, name: str, directory: Path | None, data: str, max_transcripts: int | None, as_json: bool, **how: Any
) -> None:
    from overfill.api.tokenizer import Tokenizer
    from overfill.cli.output import console, print_json
    from overfill.cli.progress import show_progress
    from overfill.making.conversations import encode_judged, judged_conversations
    from overfill.making.evaluate.adapter_evaluation import adapter_rows, evaluate_adapter
    from overfill.model.adapter import read_adapter
    from overfill.model.manifest import Pair
    from overfill.pair.adapters import check_decoder, default_folder, find_adapter
    from overfill.pair.store import resolve_pair

    with show_progress() as report:
        folder = resolve_pair(pair, report)
        loaded = Pair.load(folder)
        adapter = read_adapter(find_adapter(directory or default_folder(loaded), name), loaded.decoder_config)
        check_decoder(adapter.record, loaded)
        conversations = judged_conversations(data)[:max_transcripts]
        judged = encode_judged(conversations, Tokenizer.load(loaded.full_path), tail_tokens=adapter.record.tail_tokens)
        transcripts = [transcript for _, transcript in judged]
        result = evaluate_adapter(folder, adapter, transcripts, data=data, report=report, **how)
    if as_json:
        print_json(result.to_json())
    else:
        console().print(_table(adapter_rows(result)))


def _print_examples(result: Evaluation) -> None:
    """Prints a few questions, each with the full model's and the pair's answer side by side."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from overfill.making.evaluate.evaluation_report import examples
    from overfill.making.evaluate.examples import RULE

    out = Console(highlight=False, width=_WIDTH)
    out.print("", RULE, style="dim", sep="\n")
    for title, question, *answers in examples(result, _EXAMPLES):
        out.print("", Text(title, style="bold"), Text(question, style="dim"), "", sep="\n")
        table = Table(box=None, padding=(0, 2, 0, 0), expand=True)
        for heading in ("full model", result.pair):
            table.add_column(heading, ratio=1)
        table.add_row(*map(Text, answers))
        out.print(table)


@click.command("compare")
@click.argument("pairs", nargs=-1, required=True)
@_data_options
@_device_options
@_json_option
@click.option("--out", type=OutPath("folder"), help="Folder to write a report with a plot to.")
def compare_command(
    pairs: tuple[str, ...],
    data: str,
    max_transcripts: int | None,
    as_json: bool,
    out: Path | None,
    **how: Any,
) -> None:
    """Compare PAIRS with plain quantisation.

    PAIRS must share one full model.

    Judges every decoder and the full model with weights of 16, 8 and 4 bits. Shows the bytes that a decode step reads
    and the operations that it computes. With 16 and 8 bits, and with 4-bit layers and an 8-bit head, each also writes
    greedy answers of its own. --json prints a line of JSON per result as soon as it is known.
    """
    from overfill.api.tokenizer import Tokenizer
    from overfill.cli.output import console
    from overfill.cli.progress import show_progress
    from overfill.making.conversations import encode, judged_conversations
    from overfill.making.evaluate.compare import NOTE, compare
    from overfill.making.evaluate.evaluation_report import point_rows, write_comparison
    from overfill.model.manifest import Pair
    from overfill.pair.store import resolve_pair

    points = []
    with show_progress() as report:
        folders = [resolve_pair(pair, report) for pair in pairs]
        tokenizer = Tokenizer.load(Pair.load(folders[0]).full_path)
        transcripts = encode(judged_conversations(data)[:max_transcripts], tokenizer)
        for point in compare(folders, transcripts, report=report, **how):
            points.append(point)
            if as_json:
                click.echo(json.dumps(point.to_json()))
    if out is not None:
        write_comparison(out, points)
    if not as_json:
        console().print(_table(point_rows(points)))
        click.echo(NOTE)


@click.command("lm-eval")
@click.argument("pair")
@click.option(
    "--tasks", required=True, metavar="TASK[,TASK…]", help="Tasks of the lm-evaluation-harness, separated by commas."
)
@click.option(
    "--include-path",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with more task files.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Maximum number of documents per task.  [default: all]")
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Examples before the question.  [default: the task's]")
@click.option("--chat", is_flag=True, help="Put questions into the checkpoint's chat template.")
@_device_options
@_json_option
@functools.partial(
    connection_options,
    address=click.option(
        "--address",
        metavar="HOST:PORT",
        help="Router of a stack that serves PAIR in one of its tiers, and computes.  [default: compute here]",
    ),
)
def lm_eval_command(
    pair: str,
    tasks: str,
    include_path: Path | None,
    limit: int | None,
    num_fewshot: int | None,
    chat: bool,
    as_json: bool,
    connection: ClientConnection | None,
    **on: Any,
) -> None:
    """Run tasks of the lm-evaluation-harness on PAIR.

    The full model reads each context; the decoder writes or scores the continuation. With --address, a running stack
    computes, and PAIR says how to tokenize and which tier is meant.
    """
    from overfill.cli.output import console, print_json
    from overfill.cli.progress import show_progress
    from overfill.making.evaluate.harness import run_tasks
    from overfill.making.evaluate.lm_eval_adapter import LocalLM, PairLM
    from overfill.making.evaluate.served_lm import ServedLM
    from overfill.model.manifest import Pair
    from overfill.pair.store import resolve_pair

    source = click.get_current_context().get_parameter_source
    given = [f"--{name}" for name in on if source(name) is not ParameterSource.DEFAULT]
    if connection is not None and given:
        raise click.UsageError(f"--address conflicts with {' and '.join(given)}: the stack computes")
    with show_progress() as report:
        folder = resolve_pair(pair, report)
    with contextlib.ExitStack() as clients:
        model: PairLM = (
            LocalLM(folder, **on)
            if connection is None
            else ServedLM(Pair.load(folder), clients.enter_context(connection.client()))
        )
        results = run_tasks(
            model,
            [name.strip() for name in tasks.split(",") if name.strip()],
            include_path=include_path,
            limit=limit,
            num_fewshot=num_fewshot,
            chat=chat,
        )
    if as_json:
        print_json(results)
        return
    rows = [["task", "metric", "value", "± stderr"]]
    for task, figures in results.items():
        for metric, value in figures.items():
            error = "" if value["stderr"] is None else f"{value['stderr']:.4f}"
            rows.append([task, metric, f"{value['value']:.4f}", error])
    console().print(_table(rows))


def _table(rows: list[list[str]]) -> Table:
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for index, title in enumerate(rows[0]):
        table.add_column(title, justify="left" if index == 0 else "right")
    for row in rows[1:]:
        table.add_row(*row)
    return table
