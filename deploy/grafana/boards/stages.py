"""Stages dashboard: prefill workers on the left, decode workers on the right."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard
from panels import BYTES, COUNT, PER_SECOND, SECONDS, SHARE, Panel, board, cells, lines

from boards.queries import WORKER, buckets, mean, of_stage, quantile, quantiles, rate, ratio


def stages() -> Dashboard:
    names = ("prefill", "decode")

    def both(make) -> list[Panel]:
        return [make(stage) for stage in names]

    def title(stage: str, what: str) -> str:
        return f"{stage.capitalize()}: {what}"

    rows: dict[str, list[Panel]] = {
        "Steps of the model": [
            *both(
                lambda s: lines(title(s, "a step"), quantiles(f"overfill_{s}_step_seconds", WORKER), SECONDS, span=12)
            ),
            *both(lambda s: cells(title(s, "steps, spread"), buckets(f"overfill_{s}_step_seconds", WORKER))),
            *both(
                lambda s: lines(
                    title(s, "sequences in a step"),
                    {
                        "mean": mean(f"overfill_{s}_batch_size", where=WORKER),
                        "p95": quantile(0.95, f"overfill_{s}_batch_size", WORKER),
                    },
                    span=12,
                )
            ),
            *both(
                lambda s: lines(
                    title(s, "time in steps"),
                    {"{{worker}}": f"rate(overfill_{s}_step_seconds_sum{{{WORKER}}}[$__rate_interval])"},
                    SHARE,
                    span=12,
                    what="At 1, each step begins as soon as the last one ends.",
                )
            ),
        ],
        "Work": [
            lines(
                "Prefill: tokens",
                {
                    "computed": rate("overfill_prefill_batch_tokens_sum", where=WORKER),
                    "queued": f"sum(overfill_prefill_queued_tokens{{{WORKER}}})",
                },
                COUNT,
                span=12,
                what="Computed: tokens per second. Queued: tokens now.",
            ),
            lines(
                "Decode: tokens",
                {
                    "computed": rate("overfill_decode_tokens_total", where=WORKER),
                    "run again": rate("overfill_decode_replayed_tokens_total", where=WORKER),
                },
                PER_SECOND,
                span=12,
            ),
            *both(
                lambda s: lines(
                    title(s, "sequences"),
                    {
                        "running": f"sum(overfill_{s}_running{{{WORKER}}})",
                        "waiting": f"sum(overfill_{s}_waiting{{{WORKER}}})",
                    },
                    span=12,
                )
            ),
            lines(
                "Prefill: queue and compute",
                {
                    "queue p50": quantile(0.5, "overfill_prefill_queue_seconds", WORKER),
                    "queue p95": quantile(0.95, "overfill_prefill_queue_seconds", WORKER),
                    "compute p50": quantile(0.5, "overfill_prefill_compute_seconds", WORKER),
                    "compute p95": quantile(0.95, "overfill_prefill_compute_seconds", WORKER),
                },
                SECONDS,
                span=12,
            ),
            lines("Decode: reservation", quantiles("overfill_decode_reservation_seconds", WORKER), SECONDS, span=12),
            lines(
                "Prefill: prompt tokens in a step",
                {
                    "mean": mean("overfill_prefill_batch_tokens", where=WORKER),
                    "p95": quantile(0.95, "overfill_prefill_batch_tokens", WORKER),
                },
                span=12,
            ),
            lines(
                "Decode: tokens per step",
                {
                    "mean": ratio(
                        rate("overfill_decode_tokens_total", where=WORKER),
                        rate("overfill_decode_step_seconds_count", where=WORKER),
                    ),
                },
                span=12,
            ),
            lines(
                "Prefill: prompts by outcome",
                {"{{outcome}}": rate("overfill_prefill_prompts_total", "outcome", WORKER)},
                PER_SECOND,
                span=12,
            ),
            lines(
                "Decode: attempts by outcome",
                {"{{outcome}}": rate("overfill_decode_sequences_total", "outcome", WORKER)},
                PER_SECOND,
                span=12,
            ),
        ],
        "KV cache": [
            *both(
                lambda s: lines(
                    title(s, "blocks"),
                    {kind: f"sum(overfill_{s}_kv_blocks_{kind}{{{WORKER}}})" for kind in ("used", "cached", "free")},
                    stacked=True,
                    span=12,
                )
            ),
            *both(
                lambda s: lines(
                    title(s, "prompt tokens found in the prefix cache"),
                    {
                        "found": ratio(
                            rate(f"overfill_{s}_prefix_tokens_total", where=f'result="hit", {WORKER}'),
                            rate(f"overfill_{s}_prefix_tokens_total", where=WORKER),
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
                    {"{{worker}}": f"rate(process_cpu_seconds_total{{{of_stage(s)}, {WORKER}}}[$__rate_interval])"},
                    span=12,
                )
            ),
            *both(
                lambda s: lines(
                    title(s, "memory"),
                    {"{{worker}}": f"process_resident_memory_bytes{{{of_stage(s)}, {WORKER}}}"},
                    BYTES,
                    span=12,
                )
            ),
        ],
    }
    return board("stages", "Stages", "Prefill workers on the left, decode workers on the right.", rows, workers=True)
