"""Tests `GET /status` and the router's part of Admin.Status, which ask no other process."""

from __future__ import annotations

import json

from http_calls import call
from mocks import mock_stack

from overfill.client import Client, SamplingParams
from overfill.routing.tier import DEFAULT_TIER
from overfill.routing.worker import STALE_AFTER


def status(stack):
    return json.loads(call(f"{stack.url}/status").body)


def test_status_has_the_last_minute_and_both_pools(tiny_pair):
    with mock_stack(tiny_pair, decode=2) as stack, Client(stack.grpc) as client:
        assert status(stack)["timing_ms"] == {}
        for _ in range(3):
            client.generate("Hi", sampling=SamplingParams(max_tokens=5))
        told = status(stack)
        assert told["model"] == client.models()[0].name
        assert [(w["id"], w["stage"], w["state"]) for w in told["workers"]] == [
            ("prefill-0", "prefill", "ready"), ("decode-0", "decode", "ready"), ("decode-1", "decode", "ready"),
        ]  # fmt: skip
        assert {w["engine"] for w in told["workers"]} == {"mock"}
        assert (told["answers_last_minute"], told["running"], told["waiting"]) == (3, 0, 0)
        times = told["timing_ms"]
        assert 0 < times["ttft"]["p50"] <= times["ttft"]["p99"] <= times["total"]["p99"]
        assert {"router_queue", "prefill_compute", "unattributed", "itl"} <= set(times)
        blocks = told["workers"][1]["kv_blocks"]
        assert blocks["used"] + blocks["cached"] + blocks["free"] == blocks["total"]
        assert "127.0.0.1" not in json.dumps(told), "addresses of workers are not shown to clients"
        # Admin.Status over gRPC says the same.
        assert {w.process.engine for w in client.status().workers} == {"mock"}
        activity = client.status().activity
        assert activity.answers == 3
        assert activity.timing["ttft"].p50 > 0


def test_a_worker_that_does_not_report_is_silent(tiny_pair):
    with mock_stack(tiny_pair) as stack:

        async def look_after_silence():
            (worker,) = stack.router.roster.decode[DEFAULT_TIER]
            worker.reported_at -= STALE_AFTER + 1
            return await stack.router._admin.known()

        known = stack.call(look_after_silence())
        told = [(worker.id, worker.HasField("process")) for worker in known.workers]
        assert told == [("prefill-0", True), ("decode-0", False)]
        assert [(pool.ready, pool.expected) for pool in known.pools] == [(1, 1), (0, 1)]


def test_a_worker_that_drains_is_still_expected(tiny_pair):
    """While a worker is replaced, the stack is incomplete until the new worker is ready."""
    with mock_stack(tiny_pair) as stack:

        async def look_while_draining():
            (worker,) = stack.router.roster.decode[DEFAULT_TIER]
            worker.report.draining = True
            worker.set_report(worker.report)
            return await stack.router._admin.known()

        known = stack.call(look_while_draining())
        assert [(pool.ready, pool.expected) for pool in known.pools] == [(1, 1), (0, 1)]
        assert not known.complete
