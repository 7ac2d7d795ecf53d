"""Overview dashboard: is the stack well, and if not, where to look."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard
from panels import PER_SECOND, SECONDS, SHARE, Panel, board, lines, number

from boards.queries import ITL_OBJECTIVE, TTFT_OBJECTIVE, max_rate, quantile, quantiles, rate, ratio, ttft_parts


def overview() -> Dashboard:
    ours = "overloaded|incompatible|transfer_failed|deadline|shutting_down|unavailable|internal"
    failed = rate("overfill_router_requests_total", where=f'outcome=~"{ours}"')
    per_budget = "/ on (slo) group_left () overfill:slo_budget:ratio"
    rows: dict[str, list[Panel]] = {
        "Now": [
            number("Requests/s", rate("overfill_router_requests_total"), PER_SECOND),
            number(
                "Failed",
                ratio(failed, rate("overfill_router_requests_total")),
                SHARE,
                limit=0.001,
                what="Share of requests that failed through a fault of the stack.",
            ),
            number("TTFT p95", quantile(0.95, "overfill_router_ttft_seconds"), SECONDS, limit=TTFT_OBJECTIVE),
            number("ITL p99", quantile(0.99, "overfill_router_itl_seconds"), SECONDS, limit=ITL_OBJECTIVE),
            number("Tokens/s", rate("overfill_router_completion_tokens_total"), PER_SECOND),
            number(
                "Waiting",
                "sum(overfill_router_waiting_requests)",
                limit=100,
                what="Requests that wait in a router's queue.",
            ),
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
                    "{{slo}}, 5 m": f"overfill:slo_errors:ratio_rate5m {per_budget}",
                    "{{slo}}, 1 h": f"overfill:slo_errors:ratio_rate1h {per_budget}",
                },
                limit=14.4,
                what="At 1, the error budget lasts exactly its 30 days; alerts fire above 14.4 and 6.",
            ),
        ],
        "Where the time goes": [
            lines(
                "Time to first token, by part",
                ttft_parts(),
                SECONDS,
                stacked=True,
                span=12,
                what="Means. Each part is measured separately; the rest is unattributed.",
            ),
            lines(
                "Workers",
                {
                    "{{stage}} {{tier}} {{state}}": "sum by (stage, tier, state) "
                    "(max by (stage, tier, state, revision) (overfill_router_workers))",
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
                {"{{stage}} {{tier}}": max_rate("overfill_router_workers_lost_total", "stage, tier")},
                PER_SECOND,
                what="Workers that left without being drained, as the router that counts most sees it.",
            ),
        ],
    }
    return board("overview", "Overview", "Is the stack well, and if not, where to look.", rows)
