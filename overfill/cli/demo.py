"""``overfill demo``: starts a real stack, asks one question in each tier, and shows answers, speed and TTFT."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator

import click
from rich.console import Console
from rich.live import Live

from overfill.cli.demo_tiers import answers_view, ask_tiers, default_tiers, figures_table
from overfill.cli.options import TIER
from overfill.cli.output import answer_details, console, print_json
from overfill.cli.progress import show_progress
from overfill.client import Client, Message, SamplingParams
from overfill.process.extras import require
from overfill.settings.tiers import TierSpec
from overfill.stack.describe import RayPlacement, describe
from overfill.stack.pairs import resolve_pairs, tier_pair
from overfill.stack.placed import place
from overfill.stack.process_runner import ProcessRunner
from overfill.stack.ray.connection import check_installed
from overfill.stack.ray.runner import RayRunner
from overfill.stack.spec import StackSpec

WARM_UP = """Write one sentence about a lighthouse."""

QUESTION = """Read this passage, then answer the question below it.

The night train leaves Vienna at ten in the evening and arrives in Rome at nine in the morning. It has eight sleeping \
cars and a small restaurant. Passengers who book early pay 49 euros for a bed. Breakfast is included: coffee or tea, \
bread, butter and jam. Dogs may travel with their owners, but bicycles are not allowed. The conductor wakes the \
passengers half an hour before they arrive. In summer, when many families travel to the sea, the train has two more \
cars, and it stops in Florence at seven in the morning. The line opened in 2009 after a pause of eleven years. Since \
then, more than two million people have travelled on it.

Question: When does the night train leave Vienna, and when does it arrive in Rome?"""
# Both models answer this rightly, here and in a shorter and a longer passage. They did so for about ten of the 143
# questions that were tried: both are small.

_SAMPLING = SamplingParams(temperature=0, max_tokens=96)
_NOTES = Console(stderr=True, highlight=False)


@click.command("demo")
@click.option(
    "--tier",
    "tiers",
    multiple=True,
    type=TIER,
    help="A tier, as for `overfill up`; repeat it for each.  [default: full=identity and default=default; the latter "
    "has int8 weights and KV on CPUs with native kernels]",
)
@click.option("--ray/--no-ray", "on_ray", default=True, help="Run on Ray Serve, or as plain processes.  [default: ray]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def demo_command(tiers: tuple[TierSpec, ...], on_ray: bool, as_json: bool) -> int:
    """Start a stack, ask one question in each tier, show answers, speed and TTFT.

    The stack has a router, a prefill worker and a decode worker per tier on free local ports. It is stopped at the end.
    """
    require("server", "`overfill demo`", "torch")
    if on_ray:
        check_installed()
    chosen = tiers or default_tiers()
    spec = describe(
        tiers=chosen,
        threads=len(os.sched_getaffinity(0)),  # only one worker computes at a time, so that each may use all cores
        settings={"log_level": "error", "grace_period": 5},
        ray=RayPlacement() if on_ray else None,
    )
    with show_progress() as report:
        spec = resolve_pairs(spec, report)
    pairs = {name: tier_pair(tier) for name, tier in spec.tiers.items()}
    with _running(spec) as client:
        if not as_json:
            click.echo(f"{click.style(QUESTION, dim=True)}\n")
        with _live(as_json) as show:
            answers = ask_tiers(client, pairs, QUESTION, _SAMPLING, show)
    if as_json:
        print_json({"question": QUESTION, "tiers": [one.to_json() for one in answers]})
        return 0
    out = console()
    out.print(answers_view({one.tier: one.answer.text for one in answers}, out.width), "")
    out.print(figures_table(answers), "")
    out.print(answer_details(answers[0].answer))
    command = " ".join(["overfill up", *map(_option, chosen)])
    out.print(
        f"\nMeasured on the second request, with open connections. Start your own stack with: {command}", style="dim"
    )
    return 0


@contextlib.contextmanager
def _running(spec: StackSpec) -> Iterator[Client]:
    """Yields a client of a new stack, each of whose tiers has answered once: that opens the connections."""
    stack: ProcessRunner | RayRunner
    if spec.runner == "ray":
        stack = RayRunner(spec, lambda line: None)
    else:
        stack = ProcessRunner(place(spec), lambda name, line: _note(f"{name} | {line}"))
    try:
        where = "on Ray" if spec.runner == "ray" else "as plain processes"
        count = spec.members("decode")
        number = "a decode worker" if count == 1 else f"{count} decode workers"
        with _NOTES.status(f"Starting a router, a prefill worker and {number} {where}"):
            stack.start()
            stack.wait_ready(threading.Event())
        with Client(stack.addresses[0]) as client:
            with _NOTES.status("Warming up: the first request also opens connections"):
                few = SamplingParams(temperature=0, max_tokens=8)
                for tier in spec.router_config().ordered_tiers:
                    client.generate([Message("user", WARM_UP)], sampling=few, tier=tier.name)
            yield client
    finally:
        stack.stop()


@contextlib.contextmanager
def _live(quiet: bool) -> Iterator[Callable[[str, str], None]]:
    """Yields a function that shows the text of a tier so far, in a terminal; it is removed at the end."""
    out = console()
    texts: dict[str, str] = {}
    if quiet or not out.is_terminal:
        yield lambda tier, text: None
        return
    with Live(console=out, transient=True, auto_refresh=False) as live:

        def show(tier: str, text: str) -> None:
            texts[tier] = text
            live.update(answers_view(texts, out.width), refresh=True)

        yield show


def _option(tier: TierSpec) -> str:
    """Returns the option that names a tier, without a number of workers of 1."""
    count = "" if tier.replicas == 1 else f":{tier.replicas}"
    start = f"{tier.name}={tier.pair}"
    return f"--tier {start}{count}{str(tier).removeprefix(f'{start}:{tier.replicas}')}"


def _note(line: str) -> None:
    _NOTES.print(line, style="dim", markup=False, soft_wrap=True)
