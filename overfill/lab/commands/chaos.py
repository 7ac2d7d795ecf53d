"""``overfill chaos``: break a stack under load, at every phase of a request, and judge every answer."""

from __future__ import annotations

import asyncio
import itertools
import json
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from overfill.cli.options import Number
from overfill.cli.output import console, print_json
from overfill.lab.chaos.strikes import FAULTS, PHASES, FaultName, Phase, Strike, Target, draw, matrix, replayed

if TYPE_CHECKING:
    from overfill.cli.stack import StackPlan
    from overfill.telemetry.progress import Report

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("chaos")
@click.option(
    "--pair", default="tiny", show_default=True, help="A named pair, the folder of one, or tiny: random weights."
)
@click.option(
    "--fault", "faults", type=click.Choice(FAULTS), multiple=True, help="What happens; may be repeated.  [default: all]"
)
@click.option(
    "--phase", "phases", type=click.Choice(PHASES), multiple=True,
    help="Of a request, in which it happens; may be repeated.  [default: all]",
)  # fmt: skip
@click.option(
    "--target", "targets", type=click.Choice(get_args(Target)), multiple=True,
    help="Whom it befalls; may be repeated.  [default: all that the fault can befall]",
)  # fmt: skip
@click.option("--strikes", type=click.IntRange(0), default=60, show_default=True, help="Faults, drawn at random.")
@click.option("--matrix", "times", type=click.IntRange(1), help="Instead: each fault in each phase this often.")
@click.option("--soak", type=Number(0, min_open=True), help="Instead: random faults for so many minutes.")
@click.option(
    "--rate-share", type=Number(0, 1, min_open=True),
    help="Share of what the stack can do at which requests arrive.  [default: 0.7 with --soak, else --streams always]",
)  # fmt: skip
@click.option("--replay", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="The faults of a report.")
@click.option("--from", "first", type=click.IntRange(0), default=0, show_default=True, help="First fault of the seed.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of faults, phases, victims and moments.")
@click.option("--pause", type=Number(0), default=2.0, show_default=True, help="Mean seconds between faults.")
@click.option("--abreast", type=click.IntRange(1), default=2, show_default=True, help="Faults at a time.")
@click.option("--prefill", type=click.IntRange(2), default=2, show_default=True, help="Prefill workers.")
@click.option("--decode", type=click.IntRange(2), default=3, show_default=True, help="Decode workers.")
@click.option("--router", "routers", type=click.IntRange(2), default=2, show_default=True, help="Routers.")
@click.option("--requests", type=click.IntRange(1), default=200, show_default=True, help="At least.")
@click.option("--streams", type=click.IntRange(1), default=16, show_default=True, help="Requests at a time.")
@click.option("--max-tokens", type=click.IntRange(1), default=48, show_default=True, help="Longest answer.")
@click.option("--limit", type=Number(0), default=3600.0, show_default=True, help="Seconds, at most.")
@click.option("--grace-period", default=1.0, show_default=True, help="Seconds that a drained process has.")
@click.option("--max-num-seqs", default=4, show_default=True, help="Sequences of a worker; few make requests wait.")
@click.option("--kv-memory", help="KV cache per worker, such as 512MiB; by default 8MiB for tiny, else sized to fit.")
@click.option("--report", "report_file", type=_FILE, help="Write the JSON report here.")
@click.option("--plot", type=_FILE, help="Draw the memory of every process here.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def chaos_command(
    pair: str,
    faults: tuple[FaultName, ...],
    phases: tuple[Phase, ...],
    targets: tuple[Target, ...],
    strikes: int,
    times: int | None,
    soak: float | None,
    rate_share: float | None,
    replay: Path | None,
    first: int,
    seed: int,
    pause: float,
    abreast: int,
    prefill: int,
    decode: int,
    routers: int,
    requests: int,
    streams: int,
    max_tokens: int,
    limit: float,
    grace_period: float,
    max_num_seqs: int,
    kv_memory: str | None,
    report_file: Path | None,
    plot: Path | None,
    as_json: bool,
) -> int:
    """Start a stack on this machine, keep it busy, break it, and judge every answer.

    A fault waits for a request that is in its phase and befalls a process that serves it, or its client; nothing is
    silenced unless another of its stage is ready. The same seed draws the same faults; --from goes on in the
    middle, and --replay takes them from the report of an earlier run.

    Exits 1 unless every request was answered right, or refused in so many words, every process ended as it should, and
    every KV block was free within two seconds of the last answer.
    """
    from overfill.lab.chaos.report import Report as TrialReport
    from overfill.lab.chaos.trial import Trial, run_trial
    from overfill.lab.chaos.watch import draw as draw_memory
    from overfill.pair.reference import TwoStageReference
    from overfill.telemetry.progress import show_progress

    settings = {key: value for key, value in click.get_current_context().params.items() if value not in (None, ())}
    among = (faults or FAULTS, phases or PHASES, targets or None)
    chosen = _strikes(*among, strikes, times, soak, replay, first, seed, pause)
    trial_settings = {"grace_period": grace_period, "kv_memory": kv_memory, "max_num_seqs": max_num_seqs}
    with ExitStack() as exits:
        report = exits.enter_context(show_progress())
        plan, prompts, folder = prepare(pair, prefill, decode, routers, exits, report, trial_settings)
        trial = Trial(
            strikes=chosen,
            prompts=prompts,
            requests=requests,
            streams=streams,
            max_tokens=max_tokens,
            share=rate_share or (0.7 if soak else None),
            seconds=soak * 60 if soak else None,
            abreast=abreast,
            limit=max(limit, soak * 60 if soak else 0.0),
            seed=seed,
        )
        result = asyncio.run(run_trial(plan, trial, report))
        summary, wrong = result.judge(TwoStageReference(folder), max_tokens, report)
    judged = TrialReport(result, summary, wrong, {key: _plain(value) for key, value in settings.items()})
    if report_file is not None:
        report_file.write_text(json.dumps(judged.as_dict(), indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        title = (
            f"{result.seconds / 60:.0f} minutes, seed {seed}: {len(result.struck)} faults, {summary.answers} answers"
        )
        draw_memory(result.samples, title, plot)
    if as_json:
        print_json(judged.as_dict())
    else:
        for table in judged.tables():
            console().print(table)
        click.echo(str(summary))
    return 0 if judged.passed else 1


def _strikes(
    faults: tuple[FaultName, ...],
    phases: tuple[Phase, ...],
    targets: tuple[Target, ...] | None,
    count: int,
    times: int | None,
    soak: float | None,
    replay: Path | None,
    first: int,
    seed: int,
    pause: float,
) -> Iterable[Strike]:
    """What the options ask for. Raises click.UsageError when they contradict each other."""
    if sum(option is not None for option in (times, soak, replay)) > 1:
        raise click.UsageError("--matrix, --soak and --replay are three ways to choose faults: give one")
    if replay is not None:
        try:
            return replayed(replay)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
    if times is not None:
        return matrix(seed, times, faults, phases)[first:]
    drawn = draw(seed, pause, faults, phases, targets, first)
    return drawn if soak is not None else list(itertools.islice(drawn, count))


def prepare(
    pair: str, prefill: int, decode: int, routers: int, exits: ExitStack, report: Report, settings: dict[str, Any]
) -> tuple[StackPlan, list[list[int]], Path]:
    """A float32 stack of ``pair``, what to ask it, and the pair's folder; that of a tiny pair goes with ``exits``."""
    from overfill.cli.up_plan import make_plan
    from overfill.pair.conversations import shipped_conversations
    from overfill.pair.hf_model import chat_token_ids, load_tokenizer
    from overfill.pair.store import resolve_pair
    from overfill.pair.tiny import make_tiny_pair

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


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value
