"""Formats one update of ``overfill top``. Sends no requests."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from overfill.cli.output import PART_NAMES, adapter_names, bar, counted, disk_size, percent, sources
from overfill.client import TTFT_PARTS, Activity, StackStatus, WorkerLoad, WorkerStatus
from overfill.request.names import DECODER_FIRST_PARTS

_BAR = 24
_STATES = {"ready": "green", "starting": "yellow", "draining": "yellow", "silent": "red"}


def top_view(status: StackStatus) -> RenderableType:
    """Returns a line about the router, a table per pool, and a table of latencies. Each tier is a pool."""
    activity = status.activity
    shown: list[RenderableType] = [_headline(status)]
    prefill, decode = (
        [worker for worker in status.workers if worker.stage == stage] for stage in ("prefill", "decode")
    )
    shown.append(_pool("prefill", prefill))
    if status.several_tiers:
        for name, tier in status.tiers.items():
            title = f"decode, tier {name}{' in brownout' if tier.brownout else ''}"
            shown.append(_pool(title, [worker for worker in decode if worker.tier == name]))
    else:
        shown.append(_pool("decode", decode))
    if activity is not None:
        shown.append(_times(activity))
        if activity.sessions:
            shown.append(_sessions(activity))
    return Group(*shown)


def _headline(status: StackStatus) -> Text:
    activity = status.activity
    name = status.process.id if len(status.routers) < 2 else f"{len(status.routers)} routers"
    line = Text.assemble((name, "bold"), f" at {status.process.address}")
    if status.process.draining:
        line.append("  draining", "yellow")
    if activity is not None:
        line.append(f"   running {activity.running}   waiting {activity.waiting}")
        line.append(
            f"   {activity.tokens_per_second:.1f} tokens/s   {counted(activity.answers, 'answer')} in the last minute"
        )
        if activity.cached_share is not None:
            shares = sources(activity, activity.prompt_tokens)
            line.append(f"   {percent(activity.cached_share)} of the prompts cached{shares}")
    return line


def _pool(name: str, workers: list[WorkerStatus]) -> Table:
    engines = {worker.process.engine for worker in workers if worker.process is not None and worker.process.engine}
    title = f"{name}: {', '.join(sorted(engines))}" if engines else name
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1))
    table.add_column("worker", min_width=12)
    if with_revisions := any(worker.revision for worker in workers):
        table.add_column("revision")
    table.add_column("state", min_width=8)
    for column in ("running", "waiting", "KV used", "cached", "free"):
        table.add_column(column, justify="right")
    table.add_column("", min_width=_BAR, no_wrap=True)
    if with_disk := any(disk_size(worker) for worker in workers):
        table.add_column("on disk", justify="right")
    if with_adapters := any(worker.adapters for worker in workers):
        table.add_column("adapters")
    for worker in workers:
        names = [f"{worker.id}, both stages" if worker.colocated else worker.id]
        names += [worker.revision or "–"] if with_revisions else []
        state = Text(worker.state, _STATES[worker.state])
        load = worker.process.load if worker.process is not None else None
        if load is None:
            table.add_row(*names, state)
            continue
        free = load.kv_blocks_total - load.kv_blocks_used - load.kv_blocks_cached
        numbers = (load.running, load.waiting, load.kv_blocks_used, load.kv_blocks_cached, free)
        more = [disk_size(worker)] if with_disk else []
        more += [adapter_names(worker)] if with_adapters else []
        table.add_row(*names, state, *map(str, numbers), _kv_bar(load), *more)
    if not workers:
        table.add_row("none", "")
    return table


def _kv_bar(load: WorkerLoad) -> Text:
    """Returns a bar of used, cached and free KV blocks."""
    total = max(1, load.kv_blocks_total)
    used = round(_BAR * load.kv_blocks_used / total)
    cached = min(_BAR - used, round(_BAR * load.kv_blocks_cached / total))
    return Text.assemble(("█" * used, "cyan"), ("▒" * cached, "cyan"), ("·" * (_BAR - used - cached), "dim"))


def _sessions(activity: Activity) -> Table:
    table = Table(
        title=f"{counted(activity.sessions, 'session')} in the last five minutes",
        title_justify="left", title_style="bold", box=None, padding=(0, 1),
    )  # fmt: skip
    table.add_column("busiest", min_width=20)
    for column in ("turns", "cached"):
        table.add_column(column, justify="right", min_width=9)
    for session in activity.busiest_sessions:
        table.add_row(session.id, str(session.turns), percent(session.cached_share))
    return table


def _times(activity: Activity) -> Table:
    table = Table(title="last minute", title_justify="left", title_style="bold", box=None, padding=(0, 1))
    table.add_column("ms", min_width=20)
    for mark in ("p50", "p90", "p99"):
        table.add_column(mark, justify="right", min_width=9)
    table.add_column("p50 of the first token's", min_width=_BAR, no_wrap=True)
    whole = activity.timing.get("ttft")
    names = {"ttft": "first token", **PART_NAMES, "unattributed": "unattributed"}
    names |= {"handoff_exposed": "handoff exposed", "itl": "between tokens", "total": "end to end"}
    for name, label in names.items():
        found = activity.timing.get(name)
        if found is None and name in DECODER_FIRST_PARTS:
            continue
        if found is None:
            table.add_row(label, "–", "–", "–", "")
            continue
        part = name in TTFT_PARTS or name == "unattributed"
        share = found.p50 / whole.p50 if part and whole is not None and whole.p50 else 0.0
        table.add_row(f"  {label}" if part else label, *[f"{1e3 * v:.1f}" for v in (found.p50, found.p90, found.p99)],
                      bar(share, _BAR))  # fmt: skip
    return table
