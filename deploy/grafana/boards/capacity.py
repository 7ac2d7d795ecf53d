"""Capacity dashboard: how full KV caches, workers and processes are."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard
from panels import BYTES, BYTES_PER_SECOND, PER_SECOND, SECONDS, SHARE, Panel, bars, board, lines

from boards.queries import WORKER, of_stage, quantile, rate, ratio


def capacity() -> Dashboard:
    used = f"overfill:kv_blocks_used:ratio{{{WORKER}}}"
    cached = rate("overfill_router_cached_prompt_tokens_total", "source")
    chosen = f'{{job="overfill", {WORKER}}}'
    rows: dict[str, list[Panel]] = {
        "KV cache": [
            lines(
                "Used, by worker",
                {"{{stage}} {{worker}}": used},
                SHARE,
                limit=0.95,
            ),
            bars("Used now", {"{{stage}} {{worker}}": used}, SHARE),
            lines(
                "Leaked blocks",
                {stage: f"sum(overfill_{stage}_kv_blocks_leaked{{{WORKER}}})" for stage in ("prefill", "decode")},
                limit=1,
                what="Must be 0.",
            ),
            *(
                lines(
                    f"{stage.capitalize()}: blocks",
                    {
                        kind: f"sum(overfill_{stage}_kv_blocks_{kind}{{{WORKER}}})"
                        for kind in ("used", "cached", "free")
                    },
                    stacked=True,
                    span=12,
                )
                for stage in ("prefill", "decode")
            ),
            lines(
                "Size",
                {stage: f"sum(overfill_{stage}_kv_blocks{{{WORKER}}})" for stage in ("prefill", "decode")},
                what="KV blocks of all workers.",
            ),
            lines(
                "Preemptions",
                {"{{worker}}": rate("overfill_decode_preemptions_total", "worker", WORKER)},
                PER_SECOND,
                what="Sequences that lost their KV blocks to older ones and are recomputed later.",
            ),
            lines(
                "Prompt tokens that decoders computed",
                {"decode": f"sum(overfill_decode_prompt_tokens_computed_total{{{WORKER}}})"},
                limit=1,
                what="Must be 0: a prompt's KV is the full model's.",
            ),
            lines(
                "Tokens run again",
                {"{{worker}}": rate("overfill_decode_replayed_tokens_total", "worker", WORKER)},
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
                {"{{source}}": f"{cached} / on () group_left {rate('overfill_router_prompt_tokens_total')}"},
                SHARE,
                what="By where their KV was: in the prefill worker's memory, at another worker, or on disk.",
                stacked=True,
                span=12,
            ),
            lines(
                "Tokens imported",
                {"{{source}}": rate("overfill_prefill_imported_tokens_total", "source", WORKER)},
                PER_SECOND,
                what="Prompt tokens whose KV prefill workers took from other workers or from disk.",
            ),
            lines(
                "Imports that brought too little",
                {
                    "{{source}}, {{outcome}}": rate(
                        "overfill_prefill_imports_total", "source, outcome", f'outcome!="ok", {WORKER}'
                    )
                },
                PER_SECOND,
            ),
            lines(
                "Duration of an import (p95)",
                {"{{source}}": quantile(0.95, "overfill_prefill_import_seconds", WORKER, "source")},
                SECONDS,
            ),
            lines(
                "Tokens lent",
                {stage: rate(f"overfill_{stage}_lent_tokens_total", where=WORKER) for stage in ("prefill", "decode")},
                PER_SECOND,
            ),
            lines("KV on disk", {"{{worker}}": f"overfill_prefill_kv_disk_used_bytes{{{WORKER}}}"}, BYTES),
            lines(
                "Disk",
                {
                    what: rate(f"overfill_prefill_kv_disk_{what}_bytes_total", where=WORKER)
                    for what in ("read", "written")
                },
                BYTES_PER_SECOND,
            ),
            lines(
                "Blocks that left the disk",
                {
                    "evicted": rate("overfill_prefill_kv_disk_evicted_blocks_total", where=WORKER),
                    "never written": rate("overfill_prefill_kv_disk_dropped_blocks_total", where=WORKER),
                },
                PER_SECOND,
                what="Evicted blocks made room for others. Blocks are not written when too many wait for the disk.",
                span=12,
            ),
            lines(
                "Errors of the disk",
                {"{{kind}}": rate("overfill_prefill_kv_disk_errors_total", "kind", WORKER)},
                PER_SECOND,
                what="Workers compute such KV.",
                span=12,
            ),
        ],
        "Load on workers": [
            lines(
                "Time in steps",
                {"{{stage}} {{worker}}": f"overfill:busy:ratio_rate5m{{{WORKER}}}"},
                SHARE,
                what="Over 5 minutes. At 1, each step begins as soon as the last one ends.",
            ),
            lines(
                "Sequences by worker",
                {f"{stage} {{{{worker}}}}": f"overfill_{stage}_running{{{WORKER}}}" for stage in ("prefill", "decode")},
            ),
            lines(
                "Steps failed",
                {stage: rate(f"overfill_{stage}_step_failures_total", where=WORKER) for stage in ("prefill", "decode")},
                PER_SECOND,
            ),
            lines(
                "Tokens per CPU second",
                {
                    stage: ratio(
                        rate(metric, where=WORKER),
                        rate("process_cpu_seconds_total", where=f"{of_stage(stage)}, {WORKER}"),
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
                {"{{stage}} {{worker}}": f"rate(process_cpu_seconds_total{chosen}[$__rate_interval])"},
            ),
            lines("Memory", {"{{stage}} {{worker}}": f"process_resident_memory_bytes{chosen}"}, BYTES),
            lines("Open files", {"{{stage}} {{worker}}": f"process_open_fds{chosen}"}),
        ],
    }
    return board("capacity", "Capacity", "How full the workers are.", rows, workers=True)
