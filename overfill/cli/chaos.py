"""``overfill chaos``: break the workers of a stack under load and judge every answer."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from overfill.cli.output import console, print_json

if TYPE_CHECKING:
    from overfill.cli.stack import Plan
    from overfill.pair.progress import Report
    from overfill.pair.reference import Summary
    from overfill.testing.chaos import FaultName, Result

_FAULTS = ("kill", "freeze", "partition", "drain")


@click.command("chaos")
@click.option(
    "--pair", default="tiny", show_default=True, help="A named pair, the folder of one, or tiny: random weights."
)
@click.option("--fault", type=click.Choice(_FAULTS), default="kill", show_default=True, help="What befalls workers.")
@click.option("--prefill", type=click.IntRange(2), default=2, show_default=True, help="Prefill workers.")
@click.option("--decode", type=click.IntRange(2), default=3, show_default=True, help="Decode workers.")
@click.option("--router", "routers", type=click.IntRange(1), default=1, show_default=True, help="Routers.")
@click.option("--requests", type=click.IntRange(1), default=200, show_default=True, help="Answers at least.")
@click.option("--hits", type=click.IntRange(0), default=20, show_default=True, help="Faults on workers at work.")
@click.option("--streams", type=click.IntRange(1), default=32, show_default=True, help="Requests at a time.")
@click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True, help="Longest answer.")
@click.option("--pause", type=click.FloatRange(0), default=3.0, show_default=True, help="Mean seconds between faults.")
@click.option(
    "--down", type=click.FloatRange(0), default=15.0, show_default=True, help="Seconds of a freeze or partition."
)
@click.option("--limit", type=click.FloatRange(0), default=1800.0, show_default=True, help="Seconds to wait for hits.")
@click.option("--grace-period", default=5.0, show_default=True, help="Seconds that a drained worker has.")
@click.option("--kv-memory", help="KV cache per worker, such as 512MiB; by default 8MiB for tiny, else sized to fit.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of victims and moments.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def chaos_command(
    pair: str,
    fault: FaultName,
    prefill: int,
    decode: int,
    routers: int,
    grace_period: float,
    kv_memory: str | None,
    as_json: bool,
    **trial: Any,
) -> int:
    """Start a stack on this machine, keep it busy, break its workers, and judge every answer.

    A fault befalls a random worker whenever both stages have a spare. Exits 1 unless every answer came and is
    right, faults hit as many workers at work as asked for, and every KV block was free within two seconds of the
    last answer.
    """
    from overfill.pair.progress import progress_bars
    from overfill.pair.reference import TwoStageReference
    from overfill.testing.chaos import Trial, run_trial

    with ExitStack() as exits:
        report = exits.enter_context(progress_bars())
        plan, prompts, folder = prepare(
            pair, prefill, decode, routers, exits, report, {"grace_period": grace_period, "kv_memory": kv_memory}
        )
        result = asyncio.run(run_trial(plan, Trial(fault=fault, prompts=prompts, **trial), report))
        summary = result.judge(TwoStageReference(folder), report)
    if as_json:
        print_json(_as_json(result, summary))
    else:
        _print(result, summary)
    struck = result.hits >= result.trial.hits
    freed = result.freed_after is not None and result.freed_after <= 2.0
    return 0 if summary.passed and struck and freed and not result.leaked and not result.unclean_exits else 1


def prepare(
    pair: str, prefill: int, decode: int, routers: int, exits: ExitStack, report: Report, settings: dict[str, Any]
) -> tuple[Plan, list[list[int]], Path]:
    """A float32 stack of ``pair``, what to ask it, and the pair's folder; that of a tiny pair goes with ``exits``."""
    from overfill.cli.up import make_plan
    from overfill.pair.conversations import shipped_conversations
    from overfill.pair.plain import chat_token_ids, load_tokenizer
    from overfill.pair.store import resolve_pair
    from overfill.testing.tiny import make_tiny_pair

    settings = {"dtype": "float32", "log_level": "error"} | settings
    if pair == "tiny":
        parent = exits.enter_context(tempfile.TemporaryDirectory(prefix="overfill-"))
        folder = make_tiny_pair(Path(parent) / "tiny")
        settings["kv_memory"] = settings.get("kv_memory") or "8MiB"
    else:
        folder = resolve_pair(pair, report)
    tokenizer = load_tokenizer(folder / "full")
    plan = make_plan(folder, prefill, decode, routers, 0, 1, settings)
    limit = plan.prefill[0].max_model_len or 512
    questions = [c.messages[0]["content"] for c in shipped_conversations("held_out")]
    return plan, [chat_token_ids(tokenizer, question)[:limit] for question in questions], folder


def _as_json(result: Result, summary: Summary) -> dict[str, Any]:
    delays = result.delays()
    return {
        "fault": result.trial.fault,
        "seconds": round(result.seconds, 1),
        "answers": summary.answers,
        "correct": summary.correct,
        "identical": summary.identical,
        "ties": summary.ties,
        "errors": result.errors[:10],
        "strikes": result.strikes,
        "hits": result.hits,
        "migrations": result.migrations,
        "migrated_answers": len(delays),
        "delay_p50": round(_quantile(delays, 0.5), 3),
        "delay_p95": round(_quantile(delays, 0.95), 3),
        "blocks_freed_after": result.freed_after if result.freed_after is None else round(result.freed_after, 3),
        "leaked": result.leaked,
        "unclean_exits": result.unclean_exits,
    }


def _print(result: Result, summary: Summary) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=False)
    for name, value in _as_json(result, summary).items():
        table.add_row(name.replace("_", " "), str(value))
    console().print(table)
    click.echo(str(summary))


def _quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))] if ordered else 0.0
