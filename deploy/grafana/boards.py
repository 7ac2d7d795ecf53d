"""The dashboards: which numbers an operator looks at, and in which order."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard
from panels import (
    BYTES,
    BYTES_PER_SECOND,
    COUNT,
    PER_SECOND,
    SECONDS,
    SHARE,
    Panel,
    bars,
    board,
    cells,
    lines,
    number,
)

TTFT_OBJECTIVE, ITL_OBJECTIVE = 2.0, 0.1
"""Seconds, as in deploy/prometheus/rules/recording.yml."""

_W = 'worker=~"$worker"'


def rate(metric: str, by: str = "", where: str = "") -> str:
    """Increase per second, added up but for the labels ``by``."""
    grouped = f"sum by ({by})" if by else "sum"
    return (
        f"{grouped} (rate({metric}{{{where}}}[$__rate_interval]))"
        if where
        else (f"{grouped} (rate({metric}[$__rate_interval]))")
    )


def mean(histogram: str, by: str = "", where: str = "") -> str:
    return ratio(rate(f"{histogram}_sum", by, where), rate(f"{histogram}_count", by, where))


def quantile(share: float, histogram: str, where: str = "", by: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share:g}, {rate(f'{histogram}_bucket', labels, where)})"


def quantiles(histogram: str, where: str = "") -> dict[str, str]:
    return {f"p{share * 100:g}": quantile(share, histogram, where) for share in (0.5, 0.95, 0.99)}


def spread(histogram: str, where: str = "") -> str:
    """Observations by bucket, for a heatmap."""
    return f"sum by (le) (increase({histogram}_bucket{{{where}}}[$__rate_interval]))"


def ratio(one: str, other: str) -> str:
    return f"{one} / {other}"


def parts(of: str = "overfill_router_ttft_part_seconds") -> dict[str, str]:
    """Mean seconds of each part of the time to first token; they add up to its mean."""
    count = rate("overfill_router_ttft_seconds_count")
    return {"{{part}}": f"{rate(f'{of}_sum', 'part')} / on () group_left {count}"}


def overview() -> Dashboard:
    ours = "overloaded|incompatible|transfer_failed|deadline|shutting_down|unavailable|internal"
    failed = rate("overfill_router_requests_total", where=f'outcome=~"{ours}"')
    rows: dict[str, list[Panel]] = {
        "Now": [
            number("Requests/s", rate("overfill_router_requests_total"), PER_SECOND),
            number(
                "Failed",
                ratio(failed, rate("overfill_router_requests_total")),
                SHARE,
                limit=0.001,
                what="Share of requests that failed through no fault of the client's.",
            ),
            number("TTFT p95", quantile(0.95, "overfill_router_ttft_seconds"), SECONDS, limit=TTFT_OBJECTIVE),
            number("ITL p99", quantile(0.99, "overfill_router_itl_seconds"), SECONDS, limit=ITL_OBJECTIVE),
            number("Tokens/s", rate("overfill_router_completion_tokens_total"), PER_SECOND),
            number("Waiting", "sum(overfill_router_waiting_requests)", limit=100, what="Requests without a place."),
            number("Prefill workers", 'sum(overfill:workers:ready{stage="prefill"})'),
            number("Decode workers", 'sum(overfill:workers:ready{stage="decode"})'),
        ],
        "Load": [
            lines(
                "Requests by outcome", {"{{outcome}}": rate("overfill_router_requests_total", "outcome")}, PER_SECOND
            ),
            lines(
                "Tokens",
                {
                    "prompt": rate("overfill_router_prompt_tokens_total"),
                    "prompt, cached": rate("overfill_router_cached_prompt_tokens_total"),
                    "answer": rate("overfill_router_completion_tokens_total"),
                },
                PER_SECOND,
            ),
            lines(
                "Requests in the stack",
                {
                    "running": "sum(overfill_router_running_requests)",
                    "waiting": "sum(overfill_router_waiting_requests)",
                },
            ),
        ],
        "Objectives": [
            lines("Time to first token", quantiles("overfill_router_ttft_seconds"), SECONDS, limit=TTFT_OBJECTIVE),
            lines("Between tokens", quantiles("overfill_router_itl_seconds"), SECONDS, limit=ITL_OBJECTIVE),
            lines(
                "Budget burn rate",
                {
                    "{{slo}}, 5 m": "overfill:slo_errors:ratio_rate5m / on (slo) overfill:slo_budget:ratio",
                    "{{slo}}, 1 h": "overfill:slo_errors:ratio_rate1h / on (slo) overfill:slo_budget:ratio",
                },
                limit=14.4,
                what="1 uses the error budget up exactly in the time that it is for; alerts fire at 14.4 and 6.",
            ),
        ],
        "Where the time goes": [
            lines(
                "Time to first token, by part",
                parts(),
                SECONDS,
                stacked=True,
                span=12,
                what="Means. Each part is measured by itself; what they leave is unattributed.",
            ),
            lines(
                "Workers",
                {
                    "{{stage}} {{state}}": "max by (stage, state) (overfill_router_workers)",
                },
                span=6,
            ),
            lines(
                "Alerts firing",
                {
                    "firing": 'count(ALERTS{alertname=~"Overfill.+", alertstate="firing"}) or vector(0)',
                    "pending": 'count(ALERTS{alertname=~"Overfill.+", alertstate="pending"}) or vector(0)',
                },
                span=6,
            ),
        ],
        "Processes": [
            lines("Up", {"{{stage}}": 'sum by (stage) (up{job="overfill"})'}),
            lines("Versions", {"{{version}} {{stage}}": "count by (version, stage) (overfill_build_info)"}),
            lines(
                "Workers lost",
                {"{{stage}}": rate("overfill_router_workers_lost_total", "stage")},
                PER_SECOND,
                what="Workers that left without having been drained.",
            ),
        ],
    }
    return board("overview", "Overview", "Is it well, and if not, where to look.", rows)


def latency() -> Dashboard:
    ttft, part, itl = "overfill_router_ttft_seconds", "overfill_router_ttft_part_seconds", "overfill_router_itl_seconds"
    tpot, total = "overfill_router_tpot_seconds", "overfill_router_request_seconds"
    rows: dict[str, list[Panel]] = {
        "Time to first token": [
            lines("TTFT", quantiles(ttft), SECONDS, limit=TTFT_OBJECTIVE, span=12),
            cells("TTFT, spread", spread(ttft)),
            lines("Parts of TTFT", parts(), SECONDS, stacked=True, span=12, height=10, what="Means, which add up."),
            lines("Parts of TTFT, shares", parts(), SHARE, shares=True, span=12, height=10),
            lines(
                "Parts of TTFT, p95",
                {"{{part}}": quantile(0.95, part, by="part")},
                SECONDS,
                span=12,
                what="Of each part by itself: these do not add up.",
            ),
            lines(
                "Unattributed share",
                {
                    "of the mean": ratio(rate(f"{part}_sum", where='part="unattributed"'), rate(f"{ttft}_sum")),
                },
                SHARE,
                limit=0.05,
                span=12,
                what="Of the time to first token, what no part explains.",
            ),
        ],
        "After the first token": [
            lines("Between tokens (ITL)", quantiles(itl), SECONDS, limit=ITL_OBJECTIVE, span=12),
            cells("ITL, spread", spread(itl)),
            lines("Per token of an answer (TPOT)", quantiles(tpot), SECONDS, span=12),
            cells("TPOT, spread", spread(tpot)),
        ],
        "Whole answers": [
            lines("Request to end of answer", quantiles(total), SECONDS, span=12),
            cells("Request to end, spread", spread(total)),
        ],
        "Objectives": [
            lines(
                "Share outside the objective",
                {"{{slo}}": "overfill:slo_errors:ratio_rate5m"},
                SHARE,
                span=12,
                what="Over 5 minutes.",
            ),
            lines(
                "Recorded percentiles",
                {
                    "TTFT p95": "overfill:ttft_seconds:p95_5m",
                    "ITL p99": "overfill:itl_seconds:p99_5m",
                },
                SECONDS,
                span=12,
                what="Over 5 minutes, as the rules keep them.",
            ),
        ],
    }
    return board("latency", "Latency", "How long clients wait, and for what.", rows)


def stages() -> Dashboard:
    """Prefill left, decode right."""
    names = ("prefill", "decode")

    def both(make) -> list[Panel]:
        return [make(stage) for stage in names]

    def title(stage: str, what: str) -> str:
        return f"{stage.capitalize()}: {what}"

    rows: dict[str, list[Panel]] = {
        "Steps of the model": [
            *both(lambda s: lines(title(s, "a step"), quantiles(f"overfill_{s}_step_seconds", _W), SECONDS, span=12)),
            *both(lambda s: cells(title(s, "steps, spread"), spread(f"overfill_{s}_step_seconds", _W))),
            *both(
                lambda s: lines(
                    title(s, "sequences in a step"),
                    {
                        "mean": mean(f"overfill_{s}_batch_size", where=_W),
                        "p95": quantile(0.95, f"overfill_{s}_batch_size", _W),
                    },
                    span=12,
                )
            ),
            *both(
                lambda s: lines(
                    title(s, "time in steps"),
                    {"{{worker}}": f"rate(overfill_{s}_step_seconds_sum{{{_W}}}[$__rate_interval])"},
                    SHARE,
                    span=12,
                    what="1: a step begins as soon as the last one ends.",
                )
            ),
        ],
        "Work": [
            lines(
                "Prefill: tokens",
                {
                    "computed": rate("overfill_prefill_batch_tokens_sum", where=_W),
                    "queued": f"sum(overfill_prefill_queued_tokens{{{_W}}})",
                },
                COUNT,
                span=12,
                what="Computed per second; queued now.",
            ),
            lines(
                "Decode: tokens",
                {
                    "computed": rate("overfill_decode_tokens_total", where=_W),
                    "run again": rate("overfill_decode_replayed_tokens_total", where=_W),
                },
                PER_SECOND,
                span=12,
            ),
            *both(
                lambda s: lines(
                    title(s, "sequences"),
                    {
                        "running": f"sum(overfill_{s}_running{{{_W}}})",
                        "waiting": f"sum(overfill_{s}_waiting{{{_W}}})",
                    },
                    span=12,
                )
            ),
            lines(
                "Prefill: queue and compute",
                {
                    "queue p50": quantile(0.5, "overfill_prefill_queue_seconds", _W),
                    "queue p95": quantile(0.95, "overfill_prefill_queue_seconds", _W),
                    "compute p50": quantile(0.5, "overfill_prefill_compute_seconds", _W),
                    "compute p95": quantile(0.95, "overfill_prefill_compute_seconds", _W),
                },
                SECONDS,
                span=12,
            ),
            lines("Decode: reservation", quantiles("overfill_decode_reservation_seconds", _W), SECONDS, span=12),
            lines(
                "Prefill: prompt tokens in a step",
                {
                    "mean": mean("overfill_prefill_batch_tokens", where=_W),
                    "p95": quantile(0.95, "overfill_prefill_batch_tokens", _W),
                },
                span=12,
            ),
            lines(
                "Decode: tokens per step",
                {
                    "mean": ratio(
                        rate("overfill_decode_tokens_total", where=_W),
                        rate("overfill_decode_step_seconds_count", where=_W),
                    ),
                },
                span=12,
            ),
            lines(
                "Prefill: prompts by outcome",
                {"{{outcome}}": rate("overfill_prefill_prompts_total", "outcome", _W)},
                PER_SECOND,
                span=12,
            ),
            lines(
                "Decode: attempts by outcome",
                {"{{outcome}}": rate("overfill_decode_sequences_total", "outcome", _W)},
                PER_SECOND,
                span=12,
            ),
        ],
        "KV cache": [
            *both(
                lambda s: lines(
                    title(s, "blocks"),
                    {kind: f"sum(overfill_{s}_kv_blocks_{kind}{{{_W}}})" for kind in ("used", "cached", "free")},
                    stacked=True,
                    span=12,
                )
            ),
            *both(
                lambda s: lines(
                    title(s, "prompt tokens found in the prefix cache"),
                    {
                        "found": ratio(
                            rate(f"overfill_{s}_prefix_tokens_total", where=f'result="hit", {_W}'),
                            rate(f"overfill_{s}_prefix_tokens_total", where=_W),
                        ),
                    },
                    SHARE,
                    span=12,
                )
            ),
        ],
        "Processes": [
            *both(
                lambda s: lines(
                    title(s, "CPU"),
                    {"{{worker}}": f'rate(process_cpu_seconds_total{{stage="{s}", {_W}}}[$__rate_interval])'},
                    span=12,
                )
            ),
            *both(
                lambda s: lines(
                    title(s, "memory"),
                    {"{{worker}}": f'process_resident_memory_bytes{{stage="{s}", {_W}}}'},
                    BYTES,
                    span=12,
                )
            ),
        ],
    }
    return board("stages", "Stages", "Prefill workers on the left, decode workers on the right.", rows, workers=True)


def handoff() -> Dashboard:
    exposed, whole, transfer = (
        f"overfill_decode_{what}_seconds" for what in ("handoff_exposed", "handoff", "kv_transfer")
    )
    received = "overfill_decode_kv_received_bytes_total"
    rows: dict[str, list[Panel]] = {
        "What it costs": [
            lines(
                "Handoff exposed",
                quantiles(exposed, _W),
                SECONDS,
                limit=0.5,
                what="First token known to the first decode step: what the handoff adds to the second token.",
            ),
            cells("Handoff exposed, spread", spread(exposed, _W), span=16),
            lines(
                "Whole handoff",
                quantiles(whole, _W),
                SECONDS,
                what="Prompt sent to a prefill worker to all its KV here; queueing and computing are in it.",
            ),
            lines(
                "KV transfer",
                quantiles(transfer, _W),
                SECONDS,
                what="First KV of a prompt to the last: it overlaps with computing.",
            ),
            lines("By codec, p95", {"{{codec}}": quantile(0.95, transfer, _W, by="codec")}, SECONDS),
        ],
        "What travels": [
            lines("KV received", {"{{codec}}, {{path}}": rate(received, "codec, path", _W)}, BYTES_PER_SECOND),
            lines(
                "KV per handoff",
                {
                    "mean": ratio(rate(received, where=_W), rate(f"{whole}_count", where=_W)),
                },
                BYTES,
            ),
            lines("KV received by worker", {"{{worker}}": rate(received, "worker", _W)}, BYTES_PER_SECOND),
        ],
        "What fails": [
            lines(
                "Handoffs failed",
                {"{{reason}}": rate("overfill_decode_handoff_failures_total", "reason", _W)},
                PER_SECOND,
            ),
            lines(
                "Share failed",
                {"failed": "overfill:handoff_failures:ratio_rate5m"},
                SHARE,
                limit=0.02,
                what="Over 5 minutes.",
            ),
            lines(
                "Streams that broke",
                {"{{worker}}": rate("overfill_decode_broken_streams_total", "worker", _W)},
                PER_SECOND,
                what="Data streams that were begun anew: no answer is lost.",
            ),
            lines(
                "KV asked for again",
                {"{{reason}}": rate("overfill_router_prefill_again_total", "reason")},
                PER_SECOND,
                what="By decode workers, of the router.",
            ),
            lines(
                "Attempts failed", {"{{reason}}": rate("overfill_router_failed_attempts_total", "reason")}, PER_SECOND
            ),
            lines(
                "Blocks whose KV is on its way",
                {stage: f"sum(overfill_{stage}_kv_blocks_reserved{{{_W}}})" for stage in ("prefill", "decode")},
            ),
        ],
    }
    return board("handoff", "Handoff", "KV on its way from prefill to decode workers.", rows, workers=True)


def router() -> Dashboard:
    def input_of(stage: str, *names: str) -> dict[str, str]:
        return {name: f'max(overfill_router_scaling_input{{stage="{stage}", input="{name}"}})' for name in names}

    rows: dict[str, list[Panel]] = {
        "Requests": [
            lines(
                "Waiting and running",
                {
                    "waiting": "sum(overfill_router_waiting_requests)",
                    "running": "sum(overfill_router_running_requests)",
                },
            ),
            lines("Wait in the router", quantiles("overfill_router_ttft_part_seconds", 'part="router_queue"'), SECONDS),
            lines("Not taken, by reason", {"{{reason}}": rate("overfill_router_refusals_total", "reason")}, PER_SECOND),
            lines(
                "HTTP",
                {"{{route}} {{status}}": rate("overfill_router_http_requests_total", "route, status")},
                PER_SECOND,
            ),
            lines(
                "Answers moved",
                {
                    "moved": rate("overfill_router_migrations_total"),
                    "attempts failed": rate("overfill_router_failed_attempts_total"),
                },
                PER_SECOND,
                what="To another decode worker.",
            ),
            lines(
                "Refused by decode workers",
                {"{{reason}}": rate("overfill_decode_refusals_total", "reason")},
                PER_SECOND,
            ),
        ],
        "Keys": [
            lines(
                "Requests by key", {"{{key}}": rate("overfill_router_key_requests_total", "key")}, PER_SECOND, span=12
            ),
            lines(
                "Tokens by key",
                {"{{key}} {{kind}}": rate("overfill_router_key_tokens_total", "key, kind")},
                PER_SECOND,
                span=12,
            ),
        ],
        "Pools": [
            *(
                lines(
                    f"{stage.capitalize()} workers",
                    {
                        "ready": f'overfill:workers:ready{{stage="{stage}"}}',
                        "target": f'sum(overfill_router_scaling_target_workers{{stage="{stage}"}})',
                        "needed": f'sum(overfill_router_scaling_needed_workers{{stage="{stage}"}})',
                    },
                    what="What there is, what the scaling policy makes of the load, and the same before rounding.",
                )
                for stage in ("prefill", "decode")
            ),
            lines(
                "Pressure",
                {"{{stage}}": "overfill:pool_pressure:ratio"},
                SHARE,
                limit=1,
                what="Workers needed over workers ready. One pool high and the other low: move workers.",
            ),
            lines(
                "Prefill backlog",
                {"backlog": "overfill:prefill_backlog:seconds"},
                SECONDS,
                limit=1,
                what="Time that the prefill workers need for the prompts that they have taken.",
            ),
            lines(
                "Waiting for decode workers",
                {"requests": "overfill:decode_waiting:requests"},
                limit=1,
                what="Requests without a decode worker, while the prefill pool keeps up: KV or slots are short.",
            ),
            lines(
                "Scaling decisions",
                {
                    "{{stage}} {{direction}}": "sum by (stage, direction) "
                    "(increase(overfill_router_scaling_decisions_total[15m]))",
                },
                what="In 15 minutes.",
            ),
        ],
        "What scaling goes by": [
            lines("Arrivals", input_of("prefill", "arrivals"), PER_SECOND),
            lines(
                "Prompt tokens to compute",
                input_of("prefill", "tokens", "recent_tokens", "worker_rate"),
                PER_SECOND,
                what="Arriving over a minute and over 10 s, and what a worker was measured to do.",
            ),
            lines("Prefill: waits", input_of("prefill", "service_seconds", "wait_budget_seconds"), SECONDS),
            lines(
                "Decode: sequences",
                input_of("decode", "concurrency", "margin", "batch", "running"),
                COUNT,
                what="Running at once as predicted, a margin for chance, what a worker runs in the objective, and now.",
            ),
            lines("Decode: a step", input_of("decode", "step_seconds", "step_base_seconds"), SECONDS),
            lines(
                "Queues",
                {
                    f"{stage}, {name}": f'max(overfill_router_scaling_input{{stage="{stage}", input="{name}"}})'
                    for stage, name in (("prefill", "waiting_jobs"), ("decode", "waiting_jobs"))
                },
            ),
        ],
        "Process": [
            lines("CPU", {"{{worker}}": 'rate(process_cpu_seconds_total{stage="router"}[$__rate_interval])'}),
            lines("Memory", {"{{worker}}": 'process_resident_memory_bytes{stage="router"}'}, BYTES),
            lines("Open files", {"{{worker}}": 'process_open_fds{stage="router"}'}),
        ],
    }
    return board("router", "Router and scaling", "What comes in, what waits, and how large the pools should be.", rows)


def capacity() -> Dashboard:
    rows: dict[str, list[Panel]] = {
        "KV cache": [
            lines(
                "Used, by worker", {"{{stage}} {{worker}}": f"overfill:kv_blocks_used:ratio{{{_W}}}"}, SHARE, limit=0.95
            ),
            bars("Used now", {"{{stage}} {{worker}}": f"overfill:kv_blocks_used:ratio{{{_W}}}"}, SHARE),
            lines(
                "Leaked blocks",
                {stage: f"sum(overfill_{stage}_kv_blocks_leaked{{{_W}}})" for stage in ("prefill", "decode")},
                limit=1,
                what="Must be 0.",
            ),
            *(
                lines(
                    f"{stage.capitalize()}: blocks",
                    {kind: f"sum(overfill_{stage}_kv_blocks_{kind}{{{_W}}})" for kind in ("used", "cached", "free")},
                    stacked=True,
                    span=12,
                )
                for stage in ("prefill", "decode")
            ),
            lines(
                "Size",
                {stage: f"sum(overfill_{stage}_kv_blocks{{{_W}}})" for stage in ("prefill", "decode")},
                what="Blocks of all workers.",
            ),
            lines(
                "Preemptions",
                {"{{worker}}": rate("overfill_decode_preemptions_total", "worker", _W)},
                PER_SECOND,
                what="Sequences that lost their blocks to older ones, and are computed again.",
            ),
            lines(
                "Tokens run again",
                {"{{worker}}": rate("overfill_decode_replayed_tokens_total", "worker", _W)},
                PER_SECOND,
            ),
        ],
        "Caches": [
            lines(
                "Prompt tokens found in prefix caches",
                {"{{stage}}": "overfill:prefix_hits:ratio_rate5m"},
                SHARE,
                span=12,
            ),
            lines(
                "Prompt tokens not computed",
                {
                    "cached": ratio(
                        rate("overfill_router_cached_prompt_tokens_total"), rate("overfill_router_prompt_tokens_total")
                    ),
                },
                SHARE,
                span=12,
            ),
        ],
        "Load on workers": [
            lines(
                "Time in steps",
                {"{{stage}} {{worker}}": f"overfill:busy:ratio_rate5m{{{_W}}}"},
                SHARE,
                what="Over 5 minutes. 1: a step begins as soon as the last one ends.",
            ),
            lines(
                "Sequences by worker",
                {"{{worker}}": f"overfill_decode_running{{{_W}}} or overfill_prefill_running{{{_W}}}"},
            ),
            lines(
                "Steps failed",
                {stage: rate(f"overfill_{stage}_step_failures_total", where=_W) for stage in ("prefill", "decode")},
                PER_SECOND,
            ),
            lines(
                "Tokens per CPU second",
                {
                    stage: ratio(
                        rate(metric, where=_W), rate("process_cpu_seconds_total", where=f'stage="{stage}", {_W}')
                    )
                    for stage, metric in (
                        ("prefill", "overfill_prefill_batch_tokens_sum"),
                        ("decode", "overfill_decode_tokens_total"),
                    )
                },
            ),
        ],
        "Processes": [
            lines(
                "CPU",
                {"{{stage}} {{worker}}": f'rate(process_cpu_seconds_total{{job="overfill", {_W}}}[$__rate_interval])'},
            ),
            lines("Memory", {"{{stage}} {{worker}}": f'process_resident_memory_bytes{{job="overfill", {_W}}}'}, BYTES),
            lines("Open files", {"{{stage}} {{worker}}": f'process_open_fds{{job="overfill", {_W}}}'}),
        ],
    }
    return board("capacity", "Capacity", "How full the workers are.", rows, workers=True)


BOARDS = {
    "overview": overview,
    "latency": latency,
    "stages": stages,
    "handoff": handoff,
    "router": router,
    "capacity": capacity,
}
"""By name of the file."""
