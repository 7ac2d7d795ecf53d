"""Router dashboard: arrivals, queues, pool sizes and the scaling policy's inputs."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard
from panels import BYTES, COUNT, PER_SECOND, SECONDS, SHARE, Panel, board, lines

from boards.queries import quantiles, rate


def router() -> Dashboard:
    def input_of(stage: str, *names: str, combine: str = "max") -> dict[str, str]:
        """Combine the routers' inputs: those that count requests add up; the others are estimates of the same thing."""
        tier = {"decode": "{{tier}} "}.get(stage, "")
        by = " by (tier)" if tier else ""
        return {
            f"{tier}{name}": f'{combine}{by} (overfill_router_scaling_input{{stage="{stage}", input="{name}"}})'
            for name in names
        }

    rows: dict[str, list[Panel]] = {
        "Requests": [
            lines(
                "Waiting and running",
                {
                    "waiting": "sum(overfill_router_waiting_requests)",
                    "running": "sum(overfill_router_running_requests)",
                },
            ),
            lines("Requests by API", {"{{api}}": rate("overfill_router_requests_total", "api")}, PER_SECOND),
            lines("Sessions", {"active": "sum(overfill_router_sessions)"}, what="With a request in five minutes."),
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
                what="Answers that continued on another decode worker.",
            ),
            lines(
                "Refused by decode workers",
                {"{{reason}}": rate("overfill_decode_refusals_total", "reason")},
                PER_SECOND,
            ),
        ],
        "Revisions": [
            lines(
                "Share of new conversations",
                {"{{revision}}": "max by (revision) (overfill_router_rollout_percent) / 100"},
                SHARE,
                what="As it is set now. A stack without revisions has one line, without a name.",
            ),
            lines(
                "Requests by revision",
                {"{{revision}} {{outcome}}": rate("overfill_router_revision_requests_total", "revision, outcome")},
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
            lines(
                "Requests by adapter",
                {"{{adapter}}": rate("overfill_router_adapter_requests_total", "adapter")},
                PER_SECOND,
                span=12,
            ),
            lines(
                "Tokens by adapter",
                {"{{adapter}} {{kind}}": rate("overfill_router_adapter_tokens_total", "adapter, kind")},
                PER_SECOND,
                span=12,
            ),
        ],
        "Pools": [
            *(
                lines(
                    f"{stage.capitalize()} workers",
                    {
                        "ready": f'sum(overfill:workers:ready{{stage="{stage}"}})',
                        "target": f'sum(overfill_router_scaling_target_workers{{stage="{stage}"}})',
                        "needed": f'sum(overfill_router_scaling_needed_workers{{stage="{stage}"}})',
                    },
                    what="Ready workers, and the sums of the routers' targets and of their needs before rounding. Each "
                    "router rounds up for its own requests, so the targets may exceed the need by a worker per router.",
                )
                for stage in ("prefill", "decode")
            ),
            lines(
                "Pressure",
                {"{{stage}} {{tier}}": "overfill:pool_pressure:ratio"},
                SHARE,
                limit=1,
                what="Workers needed / workers ready. If one pool is high and another low, move workers.",
            ),
            lines(
                "Prefill backlog",
                {"backlog": "overfill:prefill_backlog:seconds"},
                SECONDS,
                limit=1,
                what="Time that the prefill workers need for the prompts in their queues.",
            ),
            lines(
                "Waiting for decode workers",
                {"{{tier}}": "overfill:decode_waiting:requests"},
                limit=1,
                what="Requests that wait for a decode worker while the prefill pool keeps up: KV or slots are short.",
            ),
            lines(
                "Scaling decisions",
                {
                    "{{stage}} {{tier}} {{direction}}": "max by (stage, tier, direction) "
                    "(increase(overfill_router_scaling_decisions_total[15m]))",
                },
                what="Changes of the target within 15 minutes, in the router with most of them.",
            ),
        ],
        "What scaling goes by": [
            lines("Arrivals", input_of("prefill", "arrivals", combine="sum"), PER_SECOND),
            lines(
                "Prompt tokens to compute",
                input_of("prefill", "tokens", "recent_tokens", combine="sum") | input_of("prefill", "worker_rate"),
                PER_SECOND,
                what="Arrivals over a minute and over 10 s, and a worker's measured rate.",
            ),
            lines("Prefill: waits", input_of("prefill", "service_seconds", "wait_budget_seconds"), SECONDS),
            lines(
                "Decode: sequences",
                input_of("decode", "concurrency", "margin", "running", combine="sum") | input_of("decode", "batch"),
                COUNT,
                what="Predicted concurrency, safety margin, a worker's batch within the objective, running now.",
            ),
            lines("Decode: a step", input_of("decode", "step_seconds", "step_base_seconds"), SECONDS),
            lines(
                "Queues",
                {
                    "{{stage}} {{tier}}": 'sum by (stage, tier) (overfill_router_scaling_input{input="waiting_jobs"})',
                },
            ),
        ],
        "Process": [
            lines("CPU", {"{{worker}}": 'rate(process_cpu_seconds_total{stage="router"}[$__rate_interval])'}),
            lines("Memory", {"{{worker}}": 'process_resident_memory_bytes{stage="router"}'}, BYTES),
            lines("Open files", {"{{worker}}": 'process_open_fds{stage="router"}'}),
        ],
    }
    return board("router", "Router and scaling", "Arrivals, queues, and how large the pools should be.", rows)
