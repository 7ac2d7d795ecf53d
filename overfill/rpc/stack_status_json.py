"""A stack's status as JSON without addresses, as a router and ``overfill top`` give it. No I/O."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from overfill.rpc.stack_status import PoolStatus, StackStatus, WorkerStatus


def stack_json(status: StackStatus) -> dict[str, Any]:
    """The JSON of ``GET /status`` and ``overfill top --json``: no addresses or process ids; times in milliseconds."""
    process, activity = status.process, status.activity
    result: dict[str, Any] = {
        "router": {"id": process.id, "state": "draining" if process.draining else "ready"},
        "serving": status.serving,
        "tiers": {name: pool_json(pool) for name, pool in status.tiers.items()},
        "workers": [_worker_json(worker) for worker in status.workers],
    }
    if activity is not None:
        result |= {
            "running": activity.running,
            "waiting": activity.waiting,
            "tokens_per_second": round(activity.tokens_per_second, 2),
            "answers_last_minute": activity.answers,
            "cached_share": activity.cached_share,
            "cached_shares": activity.cached_shares,
            "sessions": activity.sessions,
            "busiest_sessions": [
                {"id": one.id, "turns": one.turns, "cached_share": one.cached_share}
                for one in activity.busiest_sessions
            ],
            "timing_ms": {
                name: {mark: round(1e3 * seconds, 3) for mark, seconds in asdict(percentiles).items()}
                for name, percentiles in activity.timing.items()
            },
        }
    return result


def pool_json(pool: PoolStatus) -> dict[str, Any]:
    """The worker counts of one tier or stage; of a tier also whether it is overloaded."""
    counts: dict[str, Any] = {"ready": pool.ready, "expected": pool.expected}
    return counts if pool.tier is None else counts | {"brownout": pool.brownout}


def _worker_json(worker: WorkerStatus) -> dict[str, Any]:
    process = worker.process
    load = process.load if process is not None else None
    result: dict[str, Any] = {"id": worker.id, "stage": worker.stage, "colocated": worker.colocated}
    result |= {
        "tier": worker.tier,
        "revision": worker.revision,
        "state": worker.state,
        "adapters": list(worker.adapters),
    }
    result["engine"] = process.engine if process is not None else None
    if load is None:
        return result | dict.fromkeys(
            ("running", "waiting", "queued_tokens", "kv_blocks", "kv_disk_bytes", "prefix_hit_rate")
        )
    free = load.kv_blocks_total - load.kv_blocks_used - load.kv_blocks_cached
    return result | {
        "running": load.running,
        "waiting": load.waiting,
        "queued_tokens": load.queued_tokens,
        "kv_blocks": {
            "used": load.kv_blocks_used,
            "cached": load.kv_blocks_cached,
            "free": free,
            "total": load.kv_blocks_total,
        },
        "kv_disk_bytes": load.kv_disk_bytes,
        "prefix_hit_rate": load.prefix_hit_rate,
    }
