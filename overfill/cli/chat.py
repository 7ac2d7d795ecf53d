"""``overfill chat``: a conversation, typed on a terminal or read from a pipe, one turn per line."""

from __future__ import annotations

import re
import secrets
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from overfill.cli.answering import note_cut, note_tier, stream_answer
from overfill.cli.options import ClientConnection, connection_options, request_options
from overfill.errors import OverfillError

if TYPE_CHECKING:
    from overfill.client import Client, Message, Options
    from overfill.request.params import SamplingParams

_END = ("/exit", "/quit")
_COMMAND = re.compile(r"/[a-z]+")
_HELP = "/new starts a new conversation; /exit or /quit ends; every other line is a turn"


@click.command("chat")
@request_options
@click.option("--system-prompt", "system", help="System prompt: an instruction before the first turn.")
@click.option("-v", "--verbose", is_flag=True, help="Print speed and workers of each answer on stderr.")
@connection_options
def chat_command(
    system: str | None, verbose: bool, params: SamplingParams, options: Options, connection: ClientConnection
) -> int:
    """Chat with the model.

    /new starts a new conversation; ctrl-C stops an answer; ctrl-D, /exit or /quit ends; /help lists the commands.
    Piped input has one turn or command per line; empty lines are skipped. What the model thinks goes to stderr.
    """
    interactive = sys.stdin.isatty()
    with connection.client() as client:
        chat = Chat(client, params, options, system, verbose)
        if interactive:
            client.models()  # fails at once if no stack answers
            click.echo("ctrl-C stops an answer, ctrl-D ends, /help lists commands", err=True)
        for line in _typed_lines() if interactive else sys.stdin:
            turn = line.strip()
            if turn in _END:
                break
            if turn == "/new":
                chat.reset()
            elif _COMMAND.fullmatch(turn):
                if turn != "/help":
                    click.echo(f"overfill: unknown command {turn}; it was not sent", err=True)
                click.echo(_HELP, err=True)
            elif turn:
                try:
                    chat.say(turn)
                except OverfillError as error:
                    if not interactive:
                        raise
                    click.echo(f"overfill: {error}\n(that turn was dropped; /new starts a new conversation)", err=True)
                except KeyboardInterrupt:
                    if not interactive:
                        raise
                    click.echo("\n(stopped; that turn was dropped)", err=True)
    return 0


class Chat:
    """The turns so far. A turn that fails, is interrupted or gets an empty answer is dropped."""

    def __init__(
        self, client: Client, sampling: SamplingParams, options: Options, system: str | None, verbose: bool
    ) -> None:
        self._client = client
        self._sampling = sampling
        self._options = options
        self._system = system
        self._verbose = verbose
        self.reset()

    def reset(self) -> None:
        """Drops all turns except the system prompt, and begins another session."""
        from overfill.client import Message

        self._messages: list[Message] = [Message("system", self._system)] if self._system is not None else []
        self._session = secrets.token_hex(8)

    def say(self, text: str) -> None:
        """Sends a user's turn and streams the answer to stdout, with a line end."""
        from overfill.client import Message

        messages = [*self._messages, Message("user", text)]
        options: Options = {**self._options, "session": self._session}
        answer = stream_answer(self._client, messages, self._sampling, options)
        click.echo()
        note_cut(answer, self._sampling)
        note_tier(answer, self._options.get("tier", ""))
        if answer.text:
            self._messages = [*messages, answer.message]
        if self._verbose:
            from overfill.cli.output import answer_details, console

            console(stderr=True).print(answer_details(answer))


def _typed_lines() -> Iterator[str]:
    import readline  # noqa: F401  (gives input() line editing and history)

    while True:
        try:
            yield input("> ")
        except EOFError:
            click.echo()
            return
