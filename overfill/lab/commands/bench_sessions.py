"""``overfill bench sessions``: what chats compute a second time, with KV from peers and disk, and without."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import click

from overfill.cli.options import FILE
from overfill.errors import InvalidRequest
from overfill.lab.bench.measurement import print_measurements
from overfill.lab.commands.bench_options import install_option, json_option, load_pair, log_line

_ROWS = ("before", "peers", "disk", "restart", "identity", "vllm")


@click.command("sessions", short_help="Chats that memory cannot hold: KV from peers, from disk and from decoders.")
@click.option("--pair", default="default", show_default=True, help="The pair of all rows but identity.")
@click.option("--identity", default="identity", show_default=True, help="The identity pair of the row identity.")
@click.option(
    "--row",
    "rows",
    type=click.Choice(_ROWS),
    multiple=True,
    help="Row to measure; repeat for several. Ratios need the row before.  [default: all; with --trace, not identity]",
)
@click.option("--sessions", type=click.IntRange(1), default=48, show_default=True, help="Number of chats.")
@click.option("--turns", type=click.IntRange(1), default=8, show_default=True, help="Turns of each chat.")
@click.option(
    "--system-tokens", type=click.IntRange(0), default=1500, show_default=True, help="Tokens that all chats begin with."
)
@click.option(
    "--message-tokens", type=click.IntRange(1), default=600, show_default=True, help="New tokens of the user per turn."
)
@click.option("--answer-tokens", type=click.IntRange(1), default=16, show_default=True, help="Length of an answer.")
@click.option(
    "--identity-answer-tokens",
    type=click.IntRange(1),
    default=160,
    show_default=True,
    help="The same in the row identity, which is about the KV of answers.",
)
@click.option("--concurrency", type=click.IntRange(1), default=4, show_default=True, help="Turns at a time.")
@click.option("--trace", type=FILE, help="Play Mooncake's JSON lines in place of the chats, a request after the other.")
@click.option(
    "--requests", type=click.IntRange(2), default=384, show_default=True, help="Requests of the trace to play."
)
@click.option(
    "--length-scale",
    type=click.FloatRange(0, min_open=True),
    default=0.1,
    show_default=True,
    help="Factor on the lengths of the trace.",
)
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder for disk tiers, which are removed at the end.  [default: the system's for temporary files]",
)
@install_option
@json_option
def sessions_command(
    pair: str,
    identity: str,
    rows: tuple[str, ...],
    sessions: int,
    turns: int,
    system_tokens: int,
    message_tokens: int,
    answer_tokens: int,
    identity_answer_tokens: int,
    concurrency: int,
    trace: Path | None,
    requests: int,
    length_scale: float,
    folder: Path | None,
    install_vllm: bool,
    as_json: bool,
) -> int:
    """Measure how much of long chats is computed again.

    The turns of many chats alternate on two prefill workers, whose memory holds a quarter of the chats' KV. Each row
    is one system with the same load: our stack without KV from elsewhere, with KV from other workers, with a disk tier
    too, the same with a restart of both prefill workers after half of the turns, a decoder that is the full model and
    lends its answers' KV, and vLLM's server with as much memory. Prints each row when it ends. Exits with 1 when an
    aim is missed.
    """
    from overfill.cli.progress import show_progress
    from overfill.lab.bench.engine.peers.environment import NOT_INSTALLED, install, python_of
    from overfill.lab.bench.engine.peers.vllm_server import vllm_server
    from overfill.lab.bench.sessions import (
        DTYPE,
        SessionMemory,
        chat_turns,
        longest_chat,
        measure_rates,
        measurements_of,
        play_on_stack,
        play_on_vllm,
        session_stack,
        trace_turns,
    )
    from overfill.lab.traffic.traces import read_trace, scale_lengths

    chosen = rows or tuple(row for row in _ROWS if trace is None or row != "identity")
    if trace is not None and "identity" in chosen:
        raise click.UsageError("--row identity: a trace has no answers in its prompts; leave out --trace or the row")
    found = load_pair(pair)
    config = found.full_config
    if trace is None:
        new_chats = partial(chat_turns, sessions, turns, system_tokens, message_tokens, vocab_size=config.vocab_size)
        load, own = new_chats(answer_tokens), new_chats(identity_answer_tokens)
    else:
        longest = config.max_positions - 16
        load = trace_turns(scale_lengths(read_trace(trace, requests), length_scale, longest), config.vocab_size)
        own = load
    token_bytes = config.kv_spec(DTYPE).token_bytes
    before, rates, code = None, None, 0
    with ExitStack() as exits:
        report = exits.enter_context(show_progress())
        disks = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="overfill-sessions-", dir=folder)))
        if install_vllm:
            install("vllm", report)
        python = python_of("vllm") if "vllm" in chosen else None
        if "vllm" in chosen and python is None:
            raise InvalidRequest("vllm", f"vLLM is {NOT_INSTALLED}, or name the other rows with --row")
        for name in chosen:
            progress = partial(report, f"Turns, {name}")
            played = own if name == "identity" else load
            memory = SessionMemory.of(played, token_bytes)
            if name == "vllm":
                assert python is not None
                longest = longest_chat(load) + 16
                with vllm_server(
                    python, found.full_path, longest, prefix_cache=True, kv_memory=2 * memory.prefill
                ) as url:
                    row = play_on_vllm(url, load, concurrency, progress)
            else:
                served = load_pair(identity) if name == "identity" else found
                with session_stack(name, served.folder, played, memory, disks / name, log_line) as stack:
                    if rates is None:
                        rates = measure_rates(stack.addresses[0], load, token_bytes, config.vocab_size, disks)
                    row = play_on_stack(name, stack, played, concurrency, progress)
            before = row if name == "before" else before
            compared = before if played is load else None
            code |= print_measurements(measurements_of(row, compared, rates), as_json)
    return code
