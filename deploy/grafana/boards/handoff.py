"""Handoff dashboard: KV on its way from prefill to decode workers."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard
from panels import BYTES, BYTES_PER_SECOND, PER_SECOND, SECONDS, SHARE, Panel, board, cells, lines

from boards.queries import WORKER, buckets, quantile, quantiles, rate, ratio


def handoff() -> Dashboard:
    exposed, whole, transfer = (
        f"overfill_decode_{what}_seconds" for what in ("handoff_exposed", "handoff", "kv_transfer")
    )
    received = "overfill_decode_kv_received_bytes_total"
    rows: dict[str, list[Panel]] = {
        "What it costs": [
            lines(
                "Handoff exposed",
                quantiles(exposed, WORKER),
                SECONDS,
                limit=0.5,
                what="First token, or computed prompt if the decoder samples that token, until the first decode step.",
            ),
            cells("Handoff exposed, spread", buckets(exposed, WORKER), span=16),
            lines(
                "Whole handoff",
                quantiles(whole, WORKER),
                SECONDS,
                what="Prompt sent to a prefill worker until all its KV has arrived, with queueing and computing.",
            ),
            lines(
                "KV transfer",
                quantiles(transfer, WORKER),
                SECONDS,
                what="Arrival of a prompt's first KV until the last; overlaps with computing.",
            ),
            lines("By codec, p95", {"{{codec}}": quantile(0.95, transfer, WORKER, by="codec")}, SECONDS),
        ],
        "What travels": [
            lines("KV received", {"{{codec}}, {{path}}": rate(received, "codec, path", WORKER)}, BYTES_PER_SECOND),
            lines(
                "KV per handoff",
                {
                    "mean": ratio(rate(received, where=WORKER), rate(f"{whole}_count", where=WORKER)),
                },
                BYTES,
            ),
            lines(
                "Prompts, by where their prefill ran",
                {
                    "on another worker": rate(f"{whole}_count", where=WORKER),
                    "on the worker that answers": rate("overfill_decode_local_prefills_total", where=WORKER),
                },
                PER_SECOND,
            ),
            lines(
                "Shared prompts",
                {"{{from}}": rate("overfill_decode_shared_prompts_total", "from", WORKER)},
                PER_SECOND,
                what="Prompts without a transfer of their own: their KV was cached, or came for another sequence.",
            ),
            lines(
                "Tokens of shared prompts",
                {"tokens": rate("overfill_decode_shared_prompt_tokens_total", where=WORKER)},
                PER_SECOND,
            ),
            lines("KV received by worker", {"{{worker}}": rate(received, "worker", WORKER)}, BYTES_PER_SECOND),
        ],
        "What fails": [
            lines(
                "Handoffs failed",
                {"{{reason}}": rate("overfill_decode_handoff_failures_total", "reason", WORKER)},
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
                {"{{worker}}": rate("overfill_decode_broken_streams_total", "worker", WORKER)},
                PER_SECOND,
                what="Data streams that decode workers reopened; no answer is lost.",
            ),
            lines(
                "KV asked for again",
                {"{{reason}}": rate("overfill_router_prefill_again_total", "reason")},
                PER_SECOND,
                what="Prefills that decode workers asked the router to repeat.",
            ),
            lines(
                "Attempts failed", {"{{reason}}": rate("overfill_router_failed_attempts_total", "reason")}, PER_SECOND
            ),
            lines(
                "Blocks whose KV is on its way",
                {stage: f"sum(overfill_{stage}_kv_blocks_reserved{{{WORKER}}})" for stage in ("prefill", "decode")},
            ),
        ],
    }
    return board("handoff", "Handoff", "KV on its way from prefill to decode workers.", rows, workers=True)
