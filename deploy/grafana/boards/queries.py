"""PromQL that several dashboards share."""

from __future__ import annotations

TTFT_OBJECTIVE, ITL_OBJECTIVE = 2.0, 0.1
"""Seconds; equal to the objectives in deploy/helm/overfill/files/rules/recording.yml."""

WORKER = 'worker=~"$worker"'
"""Matcher of the workers that are chosen on the dashboard."""

TIER = 'tier=~"$tier"'
"""Matcher of the tiers that are chosen on the dashboard."""


def of_stage(stage: str) -> str:
    """Return a matcher of the targets that have the stage; those of workers with both are labelled prefill+decode."""
    return f'stage=~".*{stage}.*"'


def rate(metric: str, by: str = "", where: str = "") -> str:
    """Return the rate of ``metric`` per second, summed over all labels except ``by``."""
    grouped = f"sum by ({by})" if by else "sum"
    matched = f"{metric}{{{where}}}" if where else metric
    return f"{grouped} (rate({matched}[$__rate_interval]))"


def max_rate(counter: str, by: str, where: str = "") -> str:
    """Return the rate of ``counter`` per second in the router where it is highest; for events that all count."""
    matched = f"{counter}{{{where}}}" if where else counter
    return f"max by ({by}) (rate({matched}[$__rate_interval]))"


def mean(histogram: str, by: str = "", where: str = "") -> str:
    return ratio(rate(f"{histogram}_sum", by, where), rate(f"{histogram}_count", by, where))


def quantile(share: float, histogram: str, where: str = "", by: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share:g}, {rate(f'{histogram}_bucket', labels, where)})"


def quantiles(histogram: str, where: str = "") -> dict[str, str]:
    return {f"p{share * 100:g}": quantile(share, histogram, where) for share in (0.5, 0.95, 0.99)}


def buckets(histogram: str, where: str = "") -> str:
    """Return a histogram's new observations per bucket, for a heatmap."""
    matched = f"{histogram}_bucket{{{where}}}" if where else f"{histogram}_bucket"
    return f"sum by (le) (increase({matched}[$__rate_interval]))"


def ratio(dividend: str, divisor: str) -> str:
    return f"{dividend} / {divisor}"


def ttft_parts() -> dict[str, str]:
    """Return the mean seconds of each part of the time to first token; the parts add up to its mean."""
    count = rate("overfill_router_ttft_seconds_count")
    return {"{{part}}": f"{rate('overfill_router_ttft_part_seconds_sum', 'part')} / on () group_left {count}"}
