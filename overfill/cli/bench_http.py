"""``overfill bench http``: what the OpenAI endpoint costs beside gRPC."""

from __future__ import annotations

from dataclasses import asdict

import click

from overfill.cli.output import print_json


@click.command("http")
@click.option(
    "--pair", default="default", show_default=True, help="Whose tokenizer and geometry the mock workers have."
)
@click.option("--rounds", type=click.IntRange(2), default=500, show_default=True, help="Requests over each protocol.")
@click.option(
    "--streams", type=click.IntRange(1), default=32, show_default=True, help="Answers at once, for saturation."
)
@click.option("--tokens", type=click.IntRange(2), default=200, show_default=True, help="Length of those answers.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def http_command(pair: str, rounds: int, streams: int, tokens: int, as_json: bool) -> int:
    """Compare HTTP with gRPC on a router with mock workers.

    Exits 1 when HTTP adds more than 2 ms to the median time to first token.
    """
    from overfill.bench.protocols import BOUND_MS, compare
    from overfill.pair.progress import progress_bars
    from overfill.pair.store import resolve_pair

    with progress_bars() as report:
        folder = resolve_pair(pair, report)
    found = compare(folder, rounds, streams, tokens)
    if as_json:
        print_json({**asdict(found), "added_ms": found.added_ms, "bound_ms": BOUND_MS})
    else:
        for name in found.ttft_p50_ms:
            p50, p99 = found.ttft_p50_ms[name], found.ttft_p99_ms[name]
            rate = found.tokens_per_second[name]
            click.echo(f"{name}  first token p50 {p50:.2f} ms, p99 {p99:.2f} ms; {rate:,.0f} tokens/s at saturation")
        click.echo(
            f"HTTP adds {found.added_ms:.2f} ms p50 (bound {BOUND_MS:g} ms; {rounds} requests over each in turn; "
            f"saturation: {streams} answers of {tokens} tokens at once, the client on the same cores)"
        )
    return 0 if found.added_ms <= BOUND_MS else 1
