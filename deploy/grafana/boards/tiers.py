"""Tiers dashboard: each decoder's requests, objectives and workers, and which requests change their tier."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard
from panels import PER_SECOND, SECONDS, SHARE, Panel, board, lines

from boards.queries import ITL_OBJECTIVE, TIER, TTFT_OBJECTIVE, max_rate, quantile, rate


def tiers() -> Dashboard:
    def by_tier(metric: str) -> dict[str, str]:
        return {"{{tier}}": rate(metric, "tier", TIER)}

    def pool(expression: str, metric: str, *labels: str) -> str:
        where = ", ".join(('stage="decode"', *labels, TIER))
        return expression.format(f"{metric}{{{where}}}")

    ready = pool("{}", "overfill:workers:ready")
    rows: dict[str, list[Panel]] = {
        "Requests": [
            lines("Waiting, by tier", {"{{tier}}": f"sum by (tier) (overfill_router_waiting_requests{{{TIER}}})"}),
            lines("Running, by tier", {"{{tier}}": f"sum by (tier) (overfill_router_running_requests{{{TIER}}})"}),
            lines(
                "Ended, by tier and outcome",
                {"{{tier}} {{outcome}}": rate("overfill_router_requests_total", "tier, outcome", TIER)},
                PER_SECOND,
            ),
            lines("Answer tokens, by tier", by_tier("overfill_router_completion_tokens_total"), PER_SECOND),
            lines(
                "Share of answer tokens",
                by_tier("overfill_router_completion_tokens_total"),
                SHARE,
                shares=True,
                what="Which tier writes how much.",
            ),
            lines(
                "Refused, by tier and reason",
                {"{{tier}} {{reason}}": rate("overfill_router_refusals_total", "tier, reason", TIER)},
                PER_SECOND,
            ),
        ],
        "Objectives": [
            lines(
                "TTFT p95, by tier",
                {"{{tier}}": quantile(0.95, "overfill_router_ttft_seconds", TIER, by="tier")},
                SECONDS,
                limit=TTFT_OBJECTIVE,
            ),
            lines(
                "ITL p99, by tier",
                {"{{tier}}": quantile(0.99, "overfill_router_itl_seconds", TIER, by="tier")},
                SECONDS,
                limit=ITL_OBJECTIVE,
            ),
            lines(
                "Within the objective",
                {"{{tier}}, {{slo}}": f"overfill:tier_attainment:ratio_rate5m{{{TIER}}}"},
                SHARE,
                what="Over 5 minutes, by the objectives of the recording rules.",
            ),
        ],
        "Changes of the tier": [
            lines(
                "In brownout",
                {"{{tier}}": f"max by (tier) (overfill_router_brownout{{{TIER}}})"},
                what="1 while the tier is overloaded, so that requests which allow it go to the next tier.",
            ),
            lines(
                "Brownouts",
                {"{{tier}} to {{to}}": rate("overfill_router_brownouts_total", "tier, to", TIER)},
                PER_SECOND,
                what="Requests that a cheaper tier answers, because the requested one is overloaded.",
            ),
            lines(
                "Fallbacks",
                {"{{tier}} to {{to}}": rate("overfill_router_fallbacks_total", "tier, to", TIER)},
                PER_SECOND,
                what="Answers that went on in another tier, because theirs had no worker left.",
            ),
        ],
        "Decode workers": [
            lines("Ready, by tier", {"{{tier}}": f"sum by (tier) ({ready})"}),
            lines(
                "Needed, by tier",
                {"{{tier}}": pool("sum by (tier) ({})", "overfill_router_scaling_needed_workers")},
                what="By the scaling policy, before rounding. Each router counts its own requests; this is the sum.",
            ),
            lines(
                "Pressure, by tier",
                {"{{tier}}": pool("{}", "overfill:pool_pressure:ratio")},
                SHARE,
                limit=1,
                what="Workers needed / workers ready.",
            ),
            lines(
                "Waiting for decode workers, by tier",
                {"{{tier}}": f"overfill:decode_waiting:requests{{{TIER}}}"},
                limit=1,
                what="Requests that wait for a decode worker while the prefill pool keeps up.",
            ),
            lines(
                "Time of a step, by tier",
                {"{{tier}}": pool("max by (tier) ({})", "overfill_router_scaling_input", 'input="step_seconds"')},
                SECONDS,
                what="Predicted, at the largest batch that meets the objective.",
            ),
            lines(
                "Lost, by tier",
                {"{{tier}}": max_rate("overfill_router_workers_lost_total", "tier", f'stage="decode", {TIER}')},
                PER_SECOND,
                what="Decode workers that disconnected without a drain, as the router that counts most sees it.",
            ),
        ],
    }
    return board("tiers", "Tiers", "Each decoder's requests, objectives and workers.", rows, tiers=True)
