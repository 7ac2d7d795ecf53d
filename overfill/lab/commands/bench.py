"""``overfill bench``: a subcommand per kind of measurement; each prints a table or a JSON line per figure."""

from __future__ import annotations

import click

from overfill.lab.commands.bench_engine import decode_command, prefill_command
from overfill.lab.commands.bench_handoff import handoff_command
from overfill.lab.commands.bench_kv import kv_command
from overfill.lab.commands.bench_links import links_command
from overfill.lab.commands.bench_router import router_command
from overfill.lab.commands.bench_serve import serve_command
from overfill.lab.commands.bench_vllm import vllm_command

_REMOVED = {
    "burst": "use `overfill loadtest --shape spike`, and watch the pools with `overfill top`",
    "chat": "its results are in docs/lab/2026-11-26-chat-prefix-caches.md",
    "http": "use `overfill bench serve` with two targets: grpc=grpc://HOST:PORT and http=http://HOST:PORT/v1",
    "instrumentation": "its results are in docs/lab/2026-11-25-instrumentation.md",
    "memory": "its results are in docs/lab/2026-11-25-memory.md",
    "peers": "use `overfill bench decode --install-peers`",
    "route": "use `overfill bench router --decisions 10,100,1000`",
    "timeline": "use `overfill bench handoff --timeline`",
}
"""Removed subcommands of 0.1 -> replacement, or the note with the results of one that has none."""


class _BenchGroup(click.Group):
    """The ``bench`` group. For a subcommand of 0.1 that was removed, the error names its replacement."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] in _REMOVED:
            ctx.fail(f"`overfill bench {args[0]}` no longer exists; {_REMOVED[args[0]]}")
        return super().resolve_command(ctx, args)


@click.group("bench", cls=_BenchGroup)
def bench_group() -> None:
    """Measure the engine, the handoff, the router, or whole servers on this machine."""


for command in (
    decode_command,
    prefill_command,
    kv_command,
    handoff_command,
    links_command,
    router_command,
    serve_command,
    vllm_command,
):
    bench_group.add_command(command)
