"""``overfill demo``: starts a real stack, asks one question, and shows the parts of the time to first token."""

from __future__ import annotations

import dataclasses
import sys
import threading

import click
from rich.console import Console

from overfill.cli.output import answer_details, console, print_json, tokens_per_second
from overfill.cli.ray_stack import RayOptions, RayStack
from overfill.cli.stack import Stack
from overfill.cli.up import AnyStack
from overfill.cli.up_plan import StackRequest, make_plan
from overfill.client import Answer, Client, Message, SamplingParams
from overfill.cluster.connection import check_installed
from overfill.process.extras import require

WARM_UP = """Write one sentence about a lighthouse."""

QUESTION = """Read this passage, then answer the question below it.

The tidal mill at Carrow stands where the river meets the estuary. Twice a day the rising sea pushes through a wooden \
gate and fills a pond of about three hectares behind the mill. When the tide turns, the weight of the trapped water \
swings the gate shut, and the miller waits. Only after the sea outside has fallen by two metres does he open the small \
sluice under the building, and the pond empties through it, turning the wheel for five hours or so. Because high water \
comes some fifty minutes later every day, the miller's working hours wander around the clock: in one week he grinds \
before dawn, in the next after supper. The mill made flour until 1957, when the gate broke in a storm and nobody had \
the money to mend it. A group of neighbours bought the ruin in 1984, rebuilt the gate from oak, and has ground wheat \
there again on summer weekends ever since.

Question: When did the mill stop making flour, and why?"""

_MAX_TOKENS = 96


@click.command("demo")
@click.option(
    "--pair", default="default", show_default=True, help="Pair to serve: default, fast, identity, or a pair's folder."
)
@click.option("--ray/--no-ray", "on_ray", default=True, help="Run on Ray Serve, or as plain processes.  [default: ray]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def demo_command(pair: str, on_ray: bool, as_json: bool) -> int:
    """Start a stack, ask one question, and show the parts of the time to first token.

    The stack has a router, a prefill worker and a decode worker on free local ports. It is stopped at the end.
    """
    require("server", "`overfill demo`", "torch")
    if on_ray:
        check_installed()
    from overfill.pair.store import resolve_pair
    from overfill.telemetry.progress import show_progress

    notes = Console(stderr=True, highlight=False)
    with show_progress() as report:
        folder = resolve_pair(pair, report)
    settings = {"log_level": "error", "grace_period": 5}
    plan = make_plan(StackRequest(folder, settings=settings))

    def show(line: str) -> None:
        notes.print(line, style="dim", markup=False, soft_wrap=True)

    stack: AnyStack
    if on_ray:
        stack = RayStack(plan, RayOptions(), lambda line: None)
    else:
        stack = Stack(plan, lambda name, line: show(f"{name} | {line}"))
    try:
        where = "on Ray" if on_ray else "as plain processes"
        with notes.status(f"Starting a router, a prefill worker and a decode worker {where}"):
            stack.start()
            stack.wait_ready(threading.Event())
        with Client(stack.addresses[0]) as client:
            with notes.status("Warming up: the first request also opens connections"):
                client.generate([Message("user", WARM_UP)], sampling=SamplingParams(temperature=0, max_tokens=8))
            answer = _ask(client, quiet=as_json)
    finally:
        stack.stop()
    if as_json:
        details = dataclasses.asdict(answer)
        print_json({"question": QUESTION, "tokens_per_second": tokens_per_second(answer), "answer": details})
    else:
        out = console()
        out.print(answer_details(answer))
        out.print(
            "\nMeasured on the second request, with open connections. Start your own stack with: overfill up",
            style="dim",
        )
    return 0


def _ask(client: Client, quiet: bool) -> Answer:
    """Asks the question and streams question and answer to stdout, unless ``quiet``."""
    greedy = SamplingParams(temperature=0, max_tokens=_MAX_TOKENS)
    if not quiet:
        click.echo(f"{click.style(QUESTION, dim=True)}\n")
    with client.stream([Message("user", QUESTION)], sampling=greedy) as stream:
        for delta in stream:
            if not quiet:
                click.echo(delta.text, nl=False)
                sys.stdout.flush()
    if not quiet:
        click.echo("\n")
    return stream.answer
