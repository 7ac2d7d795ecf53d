"""Formats the output of commands: timing of an answer, workers of a stack, JSON. Sends no requests."""

from __future__ import annotations

import json
import sys
from typing import Any

import click
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from overfill.client import TTFT_PARTS, Answer, AnswerPart, PoolStatus, StackStatus
from overfill.request.names import DECODER_FIRST_PARTS, CachedTokens, cached_by_source
from overfill.routing.tier import DEFAULT_TIER
from overfill.rpc.stack_status import RouterStatus, WorkerStatus
from overfill.rpc.stack_status_json import pool_json

_BAR_WIDTH = 30
_PIPE_WIDTH = 200
# Eighths of a character cell, so that a bar of 30 cells shows 0.4 % steps.
_EIGHTHS = " ▏▎▍▌▋▊▉"

_SHOWN_ADAPTERS = 4

PART_NAMES = {
    "router_queue": "router queue",
    "decode_reservation": "decode reservation",
    "prefill_queue": "prefill queue",
    "prefill_compute": "prefill compute",
    "handoff": "handoff",
    "first_step": "first decode step",
    "return_path": "return path",
}


def console(stderr: bool = False) -> Console:
    """Returns a console for tables, which wrap to fit a terminal, but not in a pipe or file."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else _PIPE_WIDTH)


def print_json(value: Any) -> None:
    """Prints one JSON document on stdout."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun, such as "1 answer" or "2 answers"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def bar(share: float, width: int = _BAR_WIDTH) -> str:
    """Returns a horizontal bar for ``share`` of 1; a full bar has ``width`` cells."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + (_EIGHTHS[rest] if rest else "")


def answer_details(answer: Answer) -> RenderableType:
    """Returns speed, token counts, workers, and the parts of the time to first token."""
    return Group(_summary(answer), ttft_table(answer))


def tokens_per_second(answer: Answer) -> float | None:
    """Returns the rate of tokens after the first; None without such tokens or without their times."""
    timing, count = answer.timing, answer.usage.completion_tokens - 1
    if timing.total is None or timing.ttft is None or count < 1 or timing.total <= timing.ttft:
        return None
    return count / (timing.total - timing.ttft)


def ttft_table(answer: Answer) -> Table:
    """Returns a table of the parts of the time to first token, with bars; ``unattributed`` is the rest."""
    timing = answer.timing
    total = timing.ttft
    title = "time to first token" if total is None else f"time to first token: {_milliseconds(total)}"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1))
    table.add_column("part")
    table.add_column("ms", justify="right")
    table.add_column("%", justify="right")
    table.add_column("", min_width=_BAR_WIDTH, no_wrap=True)
    names = [name for name in TTFT_PARTS if name not in DECODER_FIRST_PARTS or getattr(timing, name) is not None]
    rows = [(PART_NAMES[name], getattr(timing, name)) for name in names]
    for name, seconds in [*rows, ("unattributed", timing.unattributed)]:
        if seconds is None or not total:
            table.add_row(name, "?" if seconds is None else _milliseconds(seconds, unit=""), "", "")
        else:
            share = seconds / total
            table.add_row(name, _milliseconds(seconds, unit=""), f"{100 * share:.1f}", bar(share))
    return table


def status_tables(status: StackStatus, tls: bool = False, wide: bool = False) -> RenderableType:
    """Returns a table with a line per worker and stage. If several routers share the address, another lists these.

    Args:
        tls: the stack uses TLS.
        wide: also show the address, process id, metrics address and start-up time of each worker.
    """
    routers = [_router_table(status)] if len(status.routers) > 1 else []
    # Not the table's title, which would wrap to its width.
    return Group(*routers, Text(_headline(status, tls), style="italic"), _worker_table(status, wide))


def _headline(status: StackStatus, tls: bool) -> str:
    url = openai_url(status, tls)
    metrics = status.process.metrics_address
    parts = [f"{status.process.address}: {stack_state(status)}"]
    parts += [f"OpenAI API at {url}"] if url else []
    parts += [f"metrics at {metrics}"] if metrics and len(status.routers) < 2 else []
    if status.activity is not None and status.activity.sessions:
        cached = f"{percent(status.activity.cached_share)} of the last minute's prompts cached"
        cached += sources(status.activity, status.activity.prompt_tokens)
        parts.append(f"{counted(status.activity.sessions, 'session')}, {cached}")
    return "; ".join(parts)


def _router_table(status: StackStatus) -> Table:
    title = f"{len(status.routers)} routers share {status.process.address}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
    for column in ("router", "state", "address"):
        table.add_column(column)
    for column in ("pid", "running", "waiting", "tokens/s", "answers/min"):
        table.add_column(column, justify="right")
    table.add_column("metrics")
    for router in status.routers:
        row = _router_json(router)
        numbers = ("?" if row[key] is None else str(row[key]) for key in _ROUTER_NUMBERS)
        table.add_row(router.id, router.state, router.address, *numbers, row["metrics_address"] or "–")
    if status.activity is not None:
        total = status.activity
        sums = (total.running, total.waiting, round(total.tokens_per_second, 2), total.answers)
        table.add_row("together", "", "", "", *map(str, sums), "")
    return table


def _worker_table(status: StackStatus, wide: bool) -> Table:
    table = Table(box=None, padding=(0, 1))
    with_revisions = status.with_revisions
    for column, shown in (
        ("worker", True),
        ("stage", True),
        ("tier", status.several_tiers),
        ("revision", with_revisions),
        ("engine", True),
        ("state", True),
    ):
        if shown:
            table.add_column(column)
    with_disk = any(disk_size(worker) for worker in status.workers)
    for column in (
        "running",
        "waiting",
        "KV used",
        "cached",
        "total",
        "prefix hits",
        *(["on disk"] if with_disk else []),
    ):
        table.add_column(column, justify="right")
    with_adapters = any(worker.adapters for worker in status.workers)
    for column in (*(["adapters"] if with_adapters else []), *(("address", "pid", "metrics", "start") if wide else ())):
        table.add_column(column)
    for worker in status.workers:
        row = _worker_json(worker)
        numbers = ("?" if row[key] is None else str(row[key]) for key in _WORKER_NUMBERS)
        hits = percent(row["prefix_hit_rate"])
        tier = [row["tier"] or "–"] if status.several_tiers else []
        stage = f"{worker.stage}, of both" if worker.colocated else worker.stage
        revision = [worker.revision or "–"] if with_revisions else []
        names = (worker.id, stage, *tier, *revision, row["engine"] or "?", worker.state)
        start = "?" if row["startup_seconds"] is None else f"{row['startup_seconds']:.1f} s"
        place = (worker.address, str(row["pid"] or "?"), row["metrics_address"] or "–", start) if wide else ()
        disk = [disk_size(worker)] if with_disk else []
        table.add_row(*names, *numbers, hits, *disk, *([adapter_names(worker)] if with_adapters else []), *place)
    return table


def disk_size(worker: WorkerStatus) -> str:
    """Returns the size of a worker's KV on disk; empty without any."""
    load = None if worker.process is None else worker.process.load
    return f"{load.kv_disk_bytes / 2**20:,.0f} MiB" if load is not None and load.kv_disk_bytes else ""


def adapter_names(worker: WorkerStatus) -> str:
    """Returns the names of a worker's first adapters, and the number of the others."""
    names = list(worker.adapters)
    more = f" +{len(names) - _SHOWN_ADAPTERS}" if len(names) > _SHOWN_ADAPTERS else ""
    return ", ".join(names[:_SHOWN_ADAPTERS]) + more or "–"


def percent(share: float | None) -> str:
    """Returns a share as text; a question mark if it is unknown."""
    return "?" if share is None else f"{100 * share:.1f} %"


def sources(tokens: CachedTokens, of: int | None = None) -> str:
    """Returns how many cached tokens were in memory, at a peer and on disk; empty if all were in memory.

    Args:
        of: number of tokens of which to show the shares; None shows the numbers.
    """
    if not (tokens.peer_tokens or tokens.disk_tokens):
        return ""
    parts = {name: str(n) if of is None else percent(n / of) for name, n in cached_by_source(tokens).items()}
    return f": {', '.join(f'{name} {number}' for name, number in parts.items())}"


def stack_state(status: StackStatus) -> str:
    """Returns the stack's state in words, with the stages or tiers that lack workers, and the overloaded tiers."""
    if status.process.draining:
        return "draining"
    pools: dict[str, PoolStatus] = dict(status.pools.items())
    if status.several_tiers:
        del pools["decode"]
        pools |= {f"decode of tier {tier}": pool for tier, pool in status.tiers.items()}
    notes = [f"{pool.ready} of {pool.expected} {name}" for name, pool in pools.items() if pool.ready < pool.expected]
    notes += [f"brownout of tier {tier}" for tier, pool in status.tiers.items() if pool.brownout]
    state = "complete" if status.complete else "ready" if status.serving else "no request can be answered"
    return f"{state}: {', '.join(notes)}" if notes else state


def openai_url(status: StackStatus, tls: bool) -> str | None:
    """Returns the base URL of the OpenAI API; None without that endpoint. ``tls``: the stack uses TLS."""
    return f"http{'s' if tls else ''}://{status.http_address}/v1" if status.http_address else None


def status_json(status: StackStatus, tls: bool = False) -> dict[str, Any]:
    """Returns the stack as ``overfill status --json`` prints it; values of a silent worker are null."""
    return {
        "grpc": status.process.address,
        "openai_url": openai_url(status, tls),
        "metrics_address": status.process.metrics_address,
        "serving": status.serving,
        "complete": status.complete,
        "pools": {stage: pool_json(pool) for stage, pool in status.pools.items()},
        "tiers": {tier: pool_json(pool) for tier, pool in status.tiers.items()},
        "routers": [_router_json(router) for router in status.routers],
        "workers": [_worker_json(worker) for worker in status.workers],
    }


def _fields(part: object | None, *names: str) -> dict[str, Any]:
    """Returns these attributes of a part that a silent process does not report; then they are null."""
    return {name: getattr(part, name, None) for name in names}


def _worker_json(worker: WorkerStatus) -> dict[str, Any]:
    """One entry of a worker, with address and process id."""
    load = None if worker.process is None else worker.process.load
    return {
        "id": worker.id,
        "stage": worker.stage,
        "colocated": worker.colocated,
        "tier": worker.tier,
        "revision": worker.revision,
        "adapters": dict(worker.adapters),
        **_fields(worker.process, "engine", "pid"),
        "address": worker.address,
        **_fields(worker.process, "metrics_address", "startup_seconds"),
        **_fields(load, "kv_blocks_used", "kv_blocks_cached", "kv_blocks_total", "running", "waiting"),
        **_fields(load, "prefix_tokens_looked_up", "prefix_tokens_found", "prefix_hit_rate", "kv_disk_bytes"),
    }


def _router_json(router: RouterStatus) -> dict[str, Any]:
    """One router process with its own activity."""
    activity = router.activity
    return {
        "id": router.id,
        **_fields(router.process, "pid"),
        "state": router.state,
        "address": router.address,
        **_fields(router.process, "metrics_address"),
        **_fields(activity, "running", "waiting"),
        "tokens_per_second": None if activity is None else round(activity.tokens_per_second, 2),
        "answers_last_minute": None if activity is None else activity.answers,
        **_fields(activity, "sessions", "cached_share", "cached_shares"),
    }


_ROUTER_NUMBERS = ("pid", "running", "waiting", "tokens_per_second", "answers_last_minute")
_WORKER_NUMBERS = ("running", "waiting", "kv_blocks_used", "kv_blocks_cached", "kv_blocks_total")


def _summary(answer: Answer) -> Table:
    usage, timing = answer.usage, answer.timing
    table = Table.grid(padding=(0, 2))
    rate = tokens_per_second(answer)
    table.add_row("speed", "?" if rate is None else f"{rate:.1f} tokens/s after the first token")
    cached = f" ({usage.cached_tokens} from the prefix cache{sources(usage)})" if usage.cached_tokens else ""
    table.add_row("tokens", f"{usage.prompt_tokens} in{cached}, {usage.completion_tokens} out")
    table.add_row("ended by", f"{answer.finish_reason}{f' string {answer.stop!r}' if answer.stop else ''}")
    table.add_row("total", _milliseconds(timing.total))
    if timing.handoff is None:
        table.add_row("second token", f"waited {_milliseconds(timing.handoff_exposed)} for the handoff")
    table.add_row("seen here", f"first token after {_milliseconds(answer.client_ttft)}")
    moved = f", moved {counted(answer.migrations, 'time')}" if answer.migrations else ""
    read, wrote = (f" ({engine})" if engine else "" for engine in (answer.prefill_engine, answer.decode_engine))
    table.add_row("workers", f"{answer.prefill_worker}{read} → {answer.decode_worker}{wrote}{moved}")
    if written := _tiers(answer):
        table.add_row("tier", written)
    table.add_row("request", f"{answer.request_id}, seed {answer.seed}")
    return table


def _tiers(answer: Answer) -> str:
    """Returns the tiers that wrote the answer, and why; empty if it was only the one called "default"."""
    first, *others = answer.parts or (AnswerPart(answer.tier, 0),)
    text = ", then ".join([first.tier, *(f"{part.tier} from token {part.first_index}" for part in others)])
    if answer.brownout_from is not None:
        return f"{text}, because {answer.brownout_from} is overloaded"
    return "" if text == DEFAULT_TIER else text


def _milliseconds(seconds: float | None, unit: str = " ms") -> str:
    return "?" if seconds is None else f"{1000 * seconds:.2f}{unit}"
