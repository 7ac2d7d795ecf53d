"""``overfill bench handoff`` and ``bench chat``: what handing over costs a request, and what prefix caches save."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from overfill.cli.options import RenamedFlags, dtype_option
from overfill.lab.bench.figure import print_figures

if TYPE_CHECKING:
    from overfill.kv.spec import DTypeName
    from overfill.model.manifest import Pair


def _pair(name: str) -> Pair:
    from overfill.model.manifest import Pair
    from overfill.pair.store import resolve_pair
    from overfill.telemetry.progress import show_progress

    with show_progress() as report:
        return Pair.load(resolve_pair(name, report))


def _log(name: str, line: str) -> None:
    click.echo(f"{name} | {line}", err=True)


@click.command("handoff", cls=RenamedFlags)
@click.option("--pair", default="default", show_default=True, help="default, fast, identity, or the folder of a pair.")
@click.option("--tokens", type=click.IntRange(2), default=2048, show_default=True, help="Length of the prompts.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Requests that are counted.")
@dtype_option
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="CPU threads of each worker.")
@click.option("--shm", type=click.Choice(["on", "off"]), default="on", show_default=True)
@click.option("--kv-codec", type=click.Choice(["raw", "int8", "fp8"]), default="raw", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="A JSON line per figure on stdout.")
def handoff_command(
    pair: str,
    tokens: int,
    rounds: int,
    dtype: DTypeName | None,
    threads: int,
    shm: str,
    kv_codec: str,
    as_json: bool,
) -> int:
    """Hold a request's first token against a plain prefill, and see what its second one waits.

    Exit code 1 when a bound is not reached.
    """
    from overfill.engine.device import cpu_settings
    from overfill.lab.bench.handoff import measure_handoff

    with cpu_settings(threads):  # as a worker is
        figures = measure_handoff(
            _pair(pair),
            tokens,
            dtype=dtype,
            threads=threads,
            rounds=rounds,
            shm=shm,
            kv_codec=kv_codec,
            log=_log,
        )
    return print_figures(figures, as_json)


@click.command("chat")
@click.option("--pair", default="default", show_default=True, help="default, fast, identity, or the folder of a pair.")
@click.option("--turns", type=click.IntRange(2), default=8, show_default=True, help="Of each chat.")
@click.option("--chats", type=click.IntRange(1), default=3, show_default=True)
@click.option("--turn-tokens", type=click.IntRange(1), default=100, show_default=True, help="New tokens per turn.")
@click.option("--answer-tokens", type=click.IntRange(1), default=32, show_default=True)
@dtype_option
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="CPU threads of each worker.")
@click.option("--json", "as_json", is_flag=True, help="A JSON line per figure on stdout.")
def chat_command(
    pair: str,
    turns: int,
    chats: int,
    turn_tokens: int,
    answer_tokens: int,
    dtype: DTypeName | None,
    threads: int,
    as_json: bool,
) -> int:
    """Chats of several turns with and without prefix caches: time to first token by turn, and hit rate."""
    from overfill.lab.bench.chat import measure_chats

    figures = measure_chats(
        _pair(pair),
        turns=turns,
        chats=chats,
        turn_tokens=turn_tokens,
        answer_tokens=answer_tokens,
        dtype=dtype,
        threads=threads,
        log=_log,
    )
    return print_figures(figures, as_json)
