"""``overfill verify``: compare a running stack's greedy answers with plain transformers.

This command tokenizes the prompts with the checkpoint's own tokenizer, and ``overfill.pair.reference`` judges the
answers. The check thus uses no code of the serving path.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from overfill.cli.options import connect, connection_options
from overfill.errors import OverfillError

if TYPE_CHECKING:
    from overfill.client import Answer, Client, StackStatus
    from overfill.model.manifest import Pair
    from overfill.pair.reference import JudgedAnswer, TwoStageReference
    from overfill.telemetry.progress import Report

Tokenize = Callable[[str], list[int]]


class CannotVerify(click.ClickException):
    """The stack's answers cannot be verified; the message says how to start a stack whose answers can."""

    exit_code = 2


@click.command("verify")
@click.option(
    "--questions",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File of JSON lines with a `prompt`, or with `turns` as in MT-bench; asks the first turn.",
)
@click.option("--max-tokens", required=True, type=click.IntRange(min=1), help="Maximum length of an answer.")
@click.option("--pair", default="default", show_default=True, help="The pair that the stack serves.")
@click.option("--limit", type=click.IntRange(min=1), help="Ask only the first N questions.  [default: all]")
@click.option(
    "--concurrency", type=click.IntRange(min=1), default=4, show_default=True, help="Number of questions in flight."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@connection_options
def verify_command(
    questions: Path,
    max_tokens: int,
    pair: str,
    limit: int | None,
    concurrency: int,
    as_json: bool,
    address: str,
    tls_ca: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_name: str | None,
    api_key: str | None,
) -> int:
    """Check a running stack's answers, token by token, against plain transformers.

    Asks the questions with greedy decoding. An answer is correct if an independent reference chooses the
    same tokens. A token within 0.001 of the largest logit is a tie, which counts as the same. The last line counts
    correct answers.

    Exits with 1 if an answer is wrong or missing, or if more than one token in a thousand is a tie. Exits with 2 if the
    stack does not run in float32 with the raw codec: start it with `overfill up --dtype float32`.
    """
    from overfill.cli.output import print_json
    from overfill.model.manifest import Pair
    from overfill.pair.hf_model import chat_token_ids, load_tokenizer
    from overfill.pair.reference import TwoStageReference, summarise
    from overfill.pair.store import resolve_pair
    from overfill.telemetry.progress import show_progress

    prompts = read_questions(questions)[:limit]
    with show_progress() as report:
        folder = resolve_pair(pair, report)
        with connect(address, tls_ca, tls_cert, tls_key, api_key, tls_name) as client:
            check_stack(client.status(), Pair.load(folder))
            answers = ask(client, prompts, max_tokens, concurrency, report)
        reference = TwoStageReference(folder)
        tokenizer = load_tokenizer(reference.pair.full_path)

        def tokenize(prompt: str) -> list[int]:
            return chat_token_ids(tokenizer, prompt)

        judged = []
        for prompt, answer in zip(prompts, answers, strict=True):
            judged.append(judge_answer(reference, tokenize, prompt, answer, max_tokens))
            report("Judging", len(judged), len(answers))
    summary = summarise(judged)
    rows = failures(judged, tokenizer.decode)
    if as_json:
        print_json(
            {
                "passed": summary.passed,
                "answers": summary.answers,
                "correct": summary.correct,
                "identical": summary.identical,
                "ties": summary.ties,
                "tokens": summary.tokens,
                "failures": rows,
            }
        )
    else:
        if rows:
            _print_table(rows)
        click.echo(str(summary))
    return 0 if summary.passed else 1


def read_questions(file: Path) -> list[str]:
    """Reads the prompts of a JSON-lines file.

    Raises:
        click.UsageError: a line is not a question; the message names the line.
    """
    prompts = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt = row["prompt"] if "prompt" in row else row["turns"][0]
        except (ValueError, KeyError, IndexError, TypeError):
            prompt = None
        if not isinstance(prompt, str):
            raise click.UsageError(f"{file}, line {number}: expected a JSON object with a `prompt` or `turns`")
        prompts.append(prompt)
    if not prompts:
        raise click.UsageError(f"{file} has no questions")
    return prompts


def check_stack(status: StackStatus, pair: Pair) -> None:
    """Raises CannotVerify unless all workers run ``pair`` in float32 and decode workers pull raw KV."""
    if unreachable := [w.id for w in status.workers if w.process is None]:
        raise CannotVerify(f"{', '.join(unreachable)} does not answer, so its model is unknown; see `overfill status`")
    processes = [w.process for w in status.workers if w.process is not None]
    if not any(p.stage == "decode" for p in processes):
        raise CannotVerify("the stack has no decode worker that answers; see `overfill status`")
    for process in processes:
        if process.kv is None or process.model is None:
            raise CannotVerify(f"{process.id} does not report its model")
        is_decode = process.stage == "decode"
        cache_dtype = process.model.kv_cache_dtype
        if process.kv.dtype != "float32" or cache_dtype or (is_decode and process.codec != "raw"):
            codec = f", {process.codec} codec" if is_decode else ""
            cache = f", with a KV cache in {cache_dtype}" if cache_dtype else ""
            raise CannotVerify(
                f"{process.id} runs in {process.kv.dtype}{codec}{cache}; answers can be verified only in float32 with "
                "the raw codec and an unquantised KV cache: start the stack with `overfill up --dtype float32`"
            )
        expected = {"full model": pair.full_digest, "tokenizer": pair.tokenizer_digest}
        found = {"full model": process.model.full_digest, "tokenizer": process.model.tokenizer_digest}
        if is_decode:
            expected["decoder"], found["decoder"] = pair.decoder_digest, process.model.decoder_digest
            expected["quantisation"], found["quantisation"] = pair.quantize, process.model.decoder_quantize or "none"
        if different := [part for part in expected if expected[part] != found[part]]:
            raise CannotVerify(
                f"{process.id} runs another pair than {pair.folder} ({', '.join(different)} differ); "
                "name the pair that the stack serves with --pair"
            )


def ask(
    client: Client, prompts: Sequence[str], max_tokens: int, concurrency: int, report: Report
) -> list[Answer | OverfillError]:
    """Asks ``prompts`` and returns, in their order, the greedy answers or the errors."""
    from overfill.client import Message, SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=max_tokens)

    def answer(prompt: str) -> Answer | OverfillError:
        try:
            return client.generate([Message("user", prompt)], sampling=sampling)
        except OverfillError as error:
            return error

    with ThreadPoolExecutor(concurrency) as pool:
        futures = [pool.submit(answer, prompt) for prompt in prompts]
        for done, _ in enumerate(as_completed(futures), 1):
            report("Asking", done, len(prompts))
    return [future.result() for future in futures]


def judge_answer(
    reference: TwoStageReference, tokenize: Tokenize, prompt: str, answer: Answer | OverfillError, max_tokens: int
) -> JudgedAnswer:
    """Judges one served answer; an error becomes a judged answer with a problem."""
    from overfill.pair.reference import JudgedAnswer, judge

    if isinstance(answer, OverfillError):
        return JudgedAnswer((), f"no answer: {answer}")
    prompt_ids = tokenize(prompt)
    if answer.usage.prompt_tokens != len(prompt_ids):
        counts = f"the stack counts {answer.usage.prompt_tokens} prompt tokens, the reference {len(prompt_ids)}"
        return JudgedAnswer((), f"{counts}: their tokenizers or chat templates differ")
    return judge(reference, prompt_ids, answer.token_ids, answer.finish_reason, max_tokens)


def failures(judged: Sequence[JudgedAnswer], decode: Callable[[list[int]], Any]) -> list[dict[str, Any]]:
    """Returns one row per incorrect answer, with its first wrong token; questions count from 1."""
    rows: list[dict[str, Any]] = []
    for number, answer in enumerate(judged, 1):
        if answer.problem is not None:
            rows.append({"question": number, "problem": answer.problem})
        elif (error := answer.first_error) is not None:
            rows.append(
                {
                    "question": number,
                    "problem": "wrong token",
                    "index": error.index,
                    "token_id": error.token_id,
                    "token": decode([error.token_id]),
                    "reference_id": error.reference_id,
                    "reference": decode([error.reference_id]),
                    "margin": error.margin,
                }
            )
    return rows


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    from overfill.cli.output import console

    table = Table("question", "problem", "index", "token", "reference", "margin", box=None)
    for row in rows:
        cells = [str(row["question"]), row["problem"]]
        if "index" in row:
            cells += [str(row["index"]), f"{row['token_id']} {row['token']!r}"]
            cells += [f"{row['reference_id']} {row['reference']!r}", f"{row['margin']:.4f}"]
        # Text, because rich would read brackets in tokens as markup.
        table.add_row(*map(Text, cells))
    console().print(table)
