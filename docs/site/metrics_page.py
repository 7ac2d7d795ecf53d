"""The metrics that a stack exports, with type, labels and meaning, from their declarations."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from overfill.telemetry.metric_set import BATCH_BUCKETS, LATENCY_BUCKETS, TOKEN_BUCKETS, Spec
from overfill.telemetry.metrics import declared
from overfill.telemetry.outcomes import OUTCOMES
from overfill.telemetry.picker import SPECS

_INTRODUCTION = """# Metrics

Every metric that the processes of a stack export to Prometheus, with its type, labels and meaning.

Every process serves `/metrics` on its own port, which `overfill status` shows. `--metrics-port` sets the port, and
`--metrics-host` the address, which is loopback by default. A router also serves `/targets`: it lists all processes for
Prometheus' `http_sd_configs`, with the labels `stage` and `worker` (`deploy/prometheus`). Each process also exports
`process_*`: CPU, memory, open files.

Seconds are measured on one host's monotonic clock. [Timing](wire.md#timing) explains the parts of the time to first
token. Series with label values that are known in advance start at 0. [Alerts](alerts.md) says which of them to watch.
"""

_PICKER = [
    "Routers export these for a gateway's [endpoint picker](../how-to/gateway.md). No dashboard or rule reads them.",
    "",
]


def metrics_page() -> str:
    """Returns the page as Markdown, with links to pages beside it."""
    named = {LATENCY_BUCKETS: "seconds", BATCH_BUCKETS: "batch", TOKEN_BUCKETS: "tokens"}
    lines = [_INTRODUCTION]

    def table(title: str, specs: Iterable[Spec], introduction: Sequence[str] = ()) -> list[str]:
        rows = [f"## {title}", "", *introduction, "| metric | type | labels | meaning |", "|---|---|---|---|"]
        for spec in specs:
            kind = spec.kind if spec.kind != "histogram" else f"histogram, {named[tuple(spec.buckets)]}"
            labels = "<br>".join(_label(name, values) for name, values in spec.labels.items())
            rows.append(f"| `{spec.name}` | {kind} | {labels} | {spec.help} |")
        return [*rows, ""]

    for stage, specs in itertools.groupby(declared(), lambda spec: spec.name.split("_")[1]):
        title = {"build": "Every process", "router": "Router", "prefill": "Prefill workers", "decode": "Decode workers"}
        lines += table(title[stage], specs)
        if stage == "router":
            lines += table("Router, under vLLM's names", SPECS, _PICKER)
    lines += ["## Outcomes", "", ", ".join(OUTCOMES) + ".", "", "## Buckets", ""]
    lines += [f"* {name}: {', '.join(f'{bound:g}' for bound in bounds)}" for bounds, name in named.items()]
    return "\n".join(lines) + "\n"


def _label(name: str, values: Sequence[str]) -> str:
    if set(values) >= set(OUTCOMES[1:]):
        return f"`{name}`: an [outcome](#outcomes)"
    if name in ("tier", "to"):
        return f"`{name}`: name of a tier{', or empty' if '' in values else ''}"
    if name == "revision":
        return "`revision`: name of a revision; empty without one"
    return f"`{name}`: {', '.join(values)}" if values else f"`{name}`"
