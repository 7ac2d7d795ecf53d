"""Tests a router's counters with mock workers: successes, failures, usage by key, lost and drained workers."""

from __future__ import annotations

import json

import pytest
from http_calls import bearer, call
from mocks import mock_stack, mock_worker
from prometheus_client.parser import text_string_to_metric_families
from stacks import wait_until

from overfill.api import key_file as keys
from overfill.client import Client, SamplingParams
from overfill.errors import InvalidRequest, RequestCancelled
from overfill.settings.config import DecodeConfig


def scrape(stack, key=None):
    """Returns samples by name and label values."""
    reply = call(f"http://{stack.router._exporter.address}/metrics", headers=bearer(key) if key else {})
    assert reply.status == 200
    return {
        (sample.name.removeprefix("overfill_router_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(reply.body.decode())
        for sample in family.samples
    }


@pytest.fixture(scope="module")
def stack(tiny_pair):
    with mock_stack(tiny_pair) as running:
        yield running


def test_an_answer_and_its_tokens(stack):
    before = scrape(stack)
    with Client(stack.grpc) as client:
        answer = client.generate([5, 6, 7], sampling=SamplingParams(max_tokens=6, ignore_eos=True))
    after = scrape(stack)

    def grown(*key):
        return after[key] - before.get(key, 0.0)

    assert grown("requests_total", "grpc", "ok", "default") == 1
    assert grown("ttft_seconds_count", "default") == 1
    assert grown("ttft_seconds_sum", "default") == pytest.approx(answer.timing.ttft, abs=1e-6)
    assert grown("request_seconds_sum", "default") == pytest.approx(answer.timing.total, abs=1e-6)
    assert grown("prompt_tokens_total", "grpc") == 3
    assert grown("completion_tokens_total", "grpc", "default") == 6
    assert grown("key_tokens_total", "none", "completion") == 6
    parts = [grown("ttft_part_seconds_sum", part) for part in ("router_queue", "prefill_compute", "unattributed")]
    assert parts[-1] == pytest.approx(max(0.0, answer.timing.unattributed), abs=1e-6)
    assert grown("itl_seconds_count", "default") >= 1


def test_failures_count(stack):
    before = scrape(stack)
    with Client(stack.grpc) as client:
        with pytest.raises(InvalidRequest):
            client.generate([1 << 20])
        with pytest.raises(InvalidRequest):
            client.generate([5], sampling=SamplingParams(max_tokens=1 << 20))
        with client.stream([5, 6], sampling=SamplingParams(max_tokens=2000, ignore_eos=True)) as stream:
            next(stream)
            stream.cancel()
            with pytest.raises(RequestCancelled):
                list(stream)
    wait_until(
        lambda: (
            scrape(stack)["requests_total", "grpc", "cancelled", "default"]
            == before["requests_total", "grpc", "cancelled", "default"] + 1
        ),
        10,
        "the cancelled request is counted",
    )
    after = scrape(stack)
    for outcome in ("invalid", "too_long"):
        assert (
            after["requests_total", "grpc", outcome, "default"]
            == before["requests_total", "grpc", outcome, "default"] + 1
        )
    assert after["requests_total", "grpc", "ok", "default"] == before["requests_total", "grpc", "ok", "default"]


def test_workers_by_state_and_where_their_metrics_are(tiny_pair):
    steps = {"step": 0.01}  # the answers last 20 s
    with mock_stack(tiny_pair, colocated=1, decode_settings=steps) as stack, Client(stack.grpc) as client:
        streams = [client.stream([5, 6], sampling=SamplingParams(max_tokens=2000, ignore_eos=True)) for _ in range(4)]
        for stream in streams:
            next(stream.__enter__())
        now = scrape(stack)
        assert now["workers", "", "prefill", "ready", ""] == now["workers", "", "decode", "ready", "default"] == 2
        groups = json.loads(call(f"http://{stack.router._exporter.address}/targets").body)
        by_stage = {group["labels"]["stage"]: group["targets"][0] for group in groups}
        assert [*by_stage] == ["router", "prefill", "decode", "prefill+decode"]
        assert running_sequences(by_stage["prefill"]).keys() == {"prefill"}
        assert running_sequences(by_stage["prefill+decode"]).keys() == {"prefill", "decode"}
        wait_until(
            lambda: sum(running_sequences(by_stage[s])["decode"] for s in ("decode", "prefill+decode")) == 4,
            10,
            "the workers count the four answers",
        )
        for stream in streams:
            stream.cancel()


def running_sequences(target):
    """Returns the running sequences of each stage of the worker whose metrics ``target`` serves."""
    return {
        family.name.split("_")[1]: family.samples[0].value
        for family in text_string_to_metric_families(call(f"http://{target}/metrics").body.decode())
        if family.name in ("overfill_prefill_running", "overfill_decode_running")
    }


def test_a_worker_that_vanishes_is_counted_and_one_that_drains_is_not(stack, tiny_pair):
    def run(name, *, drained):
        running = mock_worker(DecodeConfig, {"pair": tiny_pair, "routers": stack.grpc, "worker_id": name})
        stack.call(running.__aenter__())
        wait_until(lambda: scrape(stack)["workers", "", "decode", "ready", "default"] == 2, 10, f"{name} has joined")
        if drained:
            with Client(stack.grpc) as client:
                client.drain(name)
        else:
            stack.call(running.__aexit__(None, None, None))
        states = ("ready", "starting", "draining", "silent")
        wait_until(
            lambda: sum(scrape(stack)["workers", "", "decode", s, "default"] for s in states) == 1,
            10,
            f"{name} has left",
        )

    before = scrape(stack)["workers_lost_total", "decode", "default"]
    run("drained", drained=True)
    assert scrape(stack)["workers_lost_total", "decode", "default"] == before
    run("vanished", drained=False)
    assert scrape(stack)["workers_lost_total", "decode", "default"] == before + 1


def test_usage_by_key(tiny_pair, tmp_path):
    file = tmp_path / "keys.json"
    key = keys.create(file, "ci")
    prometheus = keys.create(file, "prometheus", scopes=["metrics"])
    with mock_stack(tiny_pair, api_keys=file) as stack:
        with Client(stack.grpc, api_key=key) as client:
            client.generate([5, 6, 7], sampling=SamplingParams(max_tokens=4, ignore_eos=True))
        body = {"model": "tiny", "prompt": [5, 6], "max_tokens": 3, "ignore_eos": True}
        assert call(f"{stack.url}/v1/completions", body, bearer(key)).status == 200
        assert call(f"http://{stack.router._exporter.address}/metrics").status == 401
        now = scrape(stack, prometheus)
    assert now["key_requests_total", "ci"] == 2
    assert now["key_tokens_total", "ci", "prompt"] == 5
    assert now["key_tokens_total", "ci", "completion"] == 7
