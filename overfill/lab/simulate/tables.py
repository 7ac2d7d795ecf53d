"""Formats simulated runs as tables, and the sizes of a search as a table or JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from overfill.lab.simulate.options import SimulationOptions
from overfill.lab.simulate.result import SimulationResult
from overfill.lab.simulate.sizing import Size
from overfill.lab.traffic.outcome import Objective
from overfill.request.names import KV_SOURCES


def title(result: SimulationResult) -> str:
    """Describes a run in one line."""
    options = result.options
    decode = " + ".join(f"{tier.workers} {tier.name}" for tier in options.tiers) or str(options.decode)
    size = _size(options, decode)
    if options.scaling is not None:
        total = options.scaling.max_total
        size = "scaled pools" + (f" of {total} workers" if total is not None else "")
    return f"{len(result.requests):,} requests, {size}, profile {result.profile.name}, {options.policy}"


def run_table(result: SimulationResult, objective: Objective) -> Table:
    """Returns a table of latencies, then of all other figures, one per row."""
    figures = result.figures(objective)
    table = Table(title=title(result), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("", "p50", "p90", "p95", "p99"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, label in (
        ("ttft", "time to first token"),
        ("itl", "gap between tokens"),
        ("request_itl", "mean gap of a request"),
        ("e2e", "whole answer"),
    ):
        table.add_row(label, *(_seconds(figures[f"{name}_p{p}"]) for p in (50, 90, 95, 99)))
    table.add_section()
    lines: list[tuple[str, str]] = [
        (f"met {objective}", _share(figures["attainment"])),
        ("goodput", f"{figures['goodput'] or 0:.2f} requests/s"),
        ("output", f"{figures['output_tokens'] or 0:,.0f} tokens/s"),
        ("prompt tokens cached", _share(figures["cached"])),
        ("from memory, peers, disk", " / ".join(_share(figures[f"cached_{source}"]) for source in KV_SOURCES)),
        ("prompt tokens computed per new one", f"{figures['computed_per_new'] or 0:.2f}"),
        ("prompts computed where their answer is written", _share(figures["local"])),
        ("prefill workers busy", _share(figures["prefill_utilisation"])),
        ("decode workers busy", _share(figures["decode_utilisation"])),
        ("worker hours", f"{figures['worker_hours']:.2f}"),
        ("failed", f"{figures['failed']:.0f}"),
        ("refused by a worker, preempted, migrated", " / ".join(f"{figures[n]:.0f}" for n in _EVENTS)),
        (
            "CPU time per placement, per report",
            f"{figures['decision_us'] or 0:.0f} us, {figures['report_us'] or 0:.0f} us",
        ),
        ("speed", f"{figures['requests_per_cpu_minute'] or 0:,.0f} requests per CPU minute"),
    ]
    if result.counters.checks:
        lines.append(("counters and waiting rule checked", f"after each of {result.counters.checks:,} events"))
    for label, value in lines:
        table.add_row(label, value)
    return table


def tier_table(result: SimulationResult, objective: Objective) -> Table:
    """Returns a table with a row per tier: its requests, and the answers that it wrote."""
    order = " > ".join(result.options.brownout)
    table = Table(title=f"Tiers, brownout {order or 'off'}", title_justify="left")
    columns = ("tier", "requests", "met", "refused", "failed", "browned out", "answers", "share", "TTFT p95", "ITL p95")
    for column in columns:
        table.add_column(column, justify="right" if column != "tier" else "left")
    for name, figures in result.tier_figures(objective).items():
        counts = {
            key: f"{figures[key] or 0:,.0f}" for key in ("requests", "refused", "failed", "browned_out", "answers")
        }
        table.add_row(
            name,
            counts["requests"],
            _share(figures["attainment"]),
            counts["refused"],
            counts["failed"],
            counts["browned_out"],
            counts["answers"],
            _share(figures["answer_share"]),
            _seconds(figures["ttft_p95"]),
            _seconds(figures["request_itl_p95"]),
        )
    return table


_EVENTS = ("refusals", "preemptions", "migrations")


def errors_text(result: SimulationResult) -> str:
    """Counts the failed requests by error, in one line. Empty if none failed."""
    errors = Counter(request.error for request in result.requests if request.error)
    return ", ".join(f"{count} x {error}" for error, count in errors.most_common())


def policy_table(results: Sequence[SimulationResult], objective: Objective) -> Table:
    """Returns a table with a row per policy."""
    first = results[0]
    table = Table(
        title=f"{len(first.requests):,} requests, {_size(first.options, str(first.options.decode))}, "
        f"profile {first.profile.name}",
        title_justify="left",
    )
    latencies = ("TTFT p50", "p90", "p99", "ITL p99")
    for column in ("policy", *latencies, f"met {objective}", "cached", "local", "prefill busy"):
        table.add_column(column, justify="right" if column != "policy" else "left")
    for result in results:
        figures = result.figures(objective)
        table.add_row(
            result.options.policy,
            *(_seconds(figures[name]) for name in ("ttft_p50", "ttft_p90", "ttft_p99", "request_itl_p99")),
            *(_share(figures[name]) for name in ("attainment", "cached", "local", "prefill_utilisation")),
        )
    return table


def size_table(sizes: Sequence[Size], objective: Objective, share: float, runs: int) -> Table:
    """Returns a table of the sizes that a search found. The cheapest is marked."""
    table = Table(
        title=f"Fewest workers for {share:.0%} of requests at {objective} ({runs} runs)", title_justify="left"
    )
    for column in (
        "prefill",
        "decode",
        "workers",
        "cost",
        "met",
        "TTFT p99",
        "ITL p99",
        "prefill busy",
        "decode busy",
        "",
    ):
        table.add_column(column, justify="right")
    cheapest = min(sizes, key=lambda size: size.cost)
    for size in sizes:
        figures = size.result.figures(objective)
        table.add_row(
            str(size.prefill),
            str(size.decode),
            str(size.prefill + size.decode),
            f"{size.cost:g}",
            _share(figures["attainment"]),
            _seconds(figures["ttft_p99"]),
            _seconds(figures["request_itl_p99"]),
            _share(figures["prefill_utilisation"]),
            _share(figures["decode_utilisation"]),
            "<- cheapest" if size is cheapest else "",
        )
    return table


def size_json(sizes: Sequence[Size], objective: Objective, share: float, runs: int) -> dict[str, Any]:
    cheapest = min(sizes, key=lambda size: size.cost)
    return {
        "objective": str(objective),
        "share": share,
        "runs": runs,
        "cheapest": {"prefill": cheapest.prefill, "decode": cheapest.decode, "cost": cheapest.cost},
        "sizes": [
            {
                "prefill": size.prefill,
                "decode": size.decode,
                "cost": size.cost,
                "figures": size.result.figures(objective),
            }
            for size in sizes
        ],
    }


def _size(options: SimulationOptions, decode: str) -> str:
    """Describes the workers. ``decode`` has those with decode only."""
    separate = f"{options.prefill} + {decode} workers" if options.prefill or decode != "0" else ""
    both = f"{options.colocated} with both stages" if options.colocated else ""
    return ", ".join(filter(None, (separate, both)))


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{1000 * value:.1f} ms" if value < 1 else f"{value:.2f} s"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
