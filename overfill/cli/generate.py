"""``overfill generate``: answers one prompt. Stdout gets only the answer, stderr all else."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING

import click

from overfill.cli.answering import note_cut, note_tier, stream_answer
from overfill.cli.options import AnyNumber, ClientConnection, connection_options, request_options

if TYPE_CHECKING:
    from overfill.client import Options
    from overfill.request.params import SamplingParams


@click.command("generate")
@click.argument("prompt")
@request_options
@click.option("--stop", multiple=True, help="String that ends the answer; repeatable.")
@click.option("--system-prompt", "system", help="System prompt: an instruction before the prompt.")
@click.option("--raw", is_flag=True, help="Continue PROMPT as plain text, without the chat template.")
@click.option(
    "--timeout", type=AnyNumber(), help="Maximum seconds for the whole answer.  [default: the router's limit]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of text.")
@click.option("-v", "--verbose", is_flag=True, help="Print speed, time to first token and workers on stderr.")
@connection_options
def generate_command(
    prompt: str,
    stop: tuple[str, ...],
    system: str | None,
    raw: bool,
    timeout: float | None,
    as_json: bool,
    verbose: bool,
    params: SamplingParams,
    options: Options,
    connection: ClientConnection,
) -> int:
    """Answer one prompt; the answer streams to stdout.

    PROMPT is sent as a user's chat turn. `-` reads it from stdin. What the model thinks goes to stderr.
    """
    if raw and system is not None:
        raise click.UsageError("--system-prompt is part of the chat template, which --raw skips: drop one of them")
    from overfill.client import Message

    text = sys.stdin.read() if prompt == "-" else prompt
    turns = [Message("system", system)] if system is not None else []
    with connection.client() as client:
        answer = stream_answer(
            client,
            text if raw else [*turns, Message("user", text)],
            params,
            {**options, "stop": stop, "timeout": timeout},
            quiet=as_json,
        )
    from overfill.cli.output import answer_details, console, print_json

    if as_json:
        print_json(dataclasses.asdict(answer))
    else:
        click.echo()
    note_cut(answer, params)
    note_tier(answer, options["tier"])
    if verbose:
        console(stderr=True).print(answer_details(answer))
    return 0
