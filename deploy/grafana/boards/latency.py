"""Latency dashboard: how long clients wait, and for which part of the request."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard
from panels import SECONDS, SHARE, Panel, board, cells, lines

from boards.queries import ITL_OBJECTIVE, TTFT_OBJECTIVE, buckets, quantile, quantiles, rate, ratio, ttft_parts


def latency() -> Dashboard:
    ttft, part, itl = "overfill_router_ttft_seconds", "overfill_router_ttft_part_seconds", "overfill_router_itl_seconds"
    tpot, total = "overfill_router_tpot_seconds", "overfill_router_request_seconds"
    rows: dict[str, list[Panel]] = {
        "Time to first token": [
            lines("TTFT", quantiles(ttft), SECONDS, limit=TTFT_OBJECTIVE, span=12),
            cells("TTFT, spread", buckets(ttft)),
            lines(
                "Parts of TTFT", ttft_parts(), SECONDS, stacked=True, span=12, height=10, what="Means, which add up."
            ),
            lines("Parts of TTFT, shares", ttft_parts(), SHARE, shares=True, span=12, height=10),
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
            cells("ITL, spread", buckets(itl)),
            lines("Per token of an answer (TPOT)", quantiles(tpot), SECONDS, span=12),
            cells("TPOT, spread", buckets(tpot)),
        ],
        "Whole answers": [
            lines("Request to end of answer", quantiles(total), SECONDS, span=12),
            cells("Request to end, spread", buckets(total)),
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
