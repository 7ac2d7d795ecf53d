"""Tests the telemetry of a stack with two tiers under load with a real Prometheus.

Every panel and rule has data, those by tier for both, no metric is missing or undocumented, and histograms agree with
clients' measurements.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from monitoring_expressions import dashboard_expressions, rule_expressions
from prometheus_process import running_prometheus
from stacks import running_stack, wait_until

from overfill.client import Client, SamplingParams
from overfill.errors import InvalidRequest
from overfill.settings.tiers import TierSpec

ROOT = Path(__file__).parents[2]
DASHBOARDS, RULES = (ROOT / "deploy/helm/overfill/files" / folder for folder in ("dashboards", "rules"))
INTERVAL = 0.5  # seconds between scrapes
LOAD = 12.0  # seconds of load before the queries
CLIENTS = 4
TIERS = ("full", "fast")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs the program prometheus (Debian's)"),
]


@dataclass
class Measured:
    """Clients' measurements of successful answers; seconds by their own clocks."""

    answers: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    ttft: float = 0.0
    total: float = 0.0
    parts: float = 0.0


@pytest.fixture(scope="module")
def watched(tiny_pair, tmp_path_factory):
    """(Prometheus, clients' measurements), after the load has ended and Prometheus has scraped it."""
    tiers = [TierSpec(name=name, pair=str(tiny_pair)) for name in TIERS]
    with running_stack(None, prefill=2, tiers=tiers, brownout=" > ".join(TIERS), http=0) as (_, address):
        with Client(address) as client:
            status = client.status()
        router, http = status.process.metrics_address, status.http_address
        folder = tmp_path_factory.mktemp("prometheus")
        targets = f"http://{router}/targets"
        with running_prometheus(folder, targets, sorted(RULES.glob("*.yml")), INTERVAL) as prometheus:
            wait_until(lambda: len(prometheus.up()) == 5, 30, "all five processes are scraped")
            measured = load(address, http)
            # The processes are scraped one after another, so each stage's own counter has to have the last answer.
            ended = ('overfill_router_requests_total{outcome="ok"}', 'overfill_decode_sequences_total{outcome="ok"}')
            wait_until(
                lambda: all(total(prometheus, counter) == measured.answers for counter in ended),
                20,
                "the last answer is scraped",
            )
            yield prometheus, measured


def load(address, http):
    measured, lock, until = Measured(), threading.Lock(), time.monotonic() + LOAD

    def ask(index):
        with Client(address) as client:
            turn = 0
            while time.monotonic() < until:
                turn += 1
                prompt = [5 + (index * 31 + turn * 7 + i) % 200 for i in range(64)] if turn % 3 else [7] * 100
                sampling = SamplingParams(max_tokens=40, ignore_eos=True)
                began, first = time.perf_counter(), None
                with client.stream(prompt, sampling=sampling, tier=TIERS[index % 2]) as stream:
                    for _ in stream:
                        first = first or time.perf_counter()
                    answer = stream.answer
                ended = time.perf_counter()
                with lock:
                    measured.answers += 1
                    measured.prompt_tokens += answer.usage.prompt_tokens
                    measured.tokens += answer.usage.completion_tokens
                    measured.ttft += first - began
                    measured.total += ended - began

    def others():
        with Client(address) as client:
            model = client.models()[0].name
            while time.monotonic() < until:
                asked = {"model": model, "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}
                request = urllib.request.Request(
                    f"http://{http}/v1/completions", json.dumps(asked).encode(), {"content-type": "application/json"}
                )
                began = time.perf_counter()
                with urllib.request.urlopen(request, timeout=30) as response:
                    usage = json.load(response)["usage"]
                ended = time.perf_counter()
                with lock:
                    measured.answers += 1
                    measured.prompt_tokens += usage["prompt_tokens"]
                    measured.tokens += usage["completion_tokens"]
                    measured.total += ended - began
                with pytest.raises(InvalidRequest):
                    client.generate([1 << 20])
                time.sleep(0.2)

    with ThreadPoolExecutor(CLIENTS + 1) as threads:
        for done in [*(threads.submit(ask, index) for index in range(CLIENTS)), threads.submit(others)]:
            done.result()
    return measured


def total(prometheus, expression):
    return sum(series.last for series in prometheus.query(expression))


def test_every_panel_and_every_rule_has_data(watched, capsys):
    prometheus, _ = watched
    shown = list(dashboard_expressions(DASHBOARDS, "10s"))
    ruled = list(rule_expressions(RULES))
    results = {each: prometheus.query(each.text) for each in [*shown, *ruled]}
    empty = [each for each, found in results.items() if not found]
    blank = [each for each, found in results.items() if found and not any(s.has_number for s in found)]
    with capsys.disabled():
        print(f"\n{len(shown)} expressions of dashboards and {len(ruled)} of rules: {len(empty)} empty, "
              f"{len(blank)} without a number")  # fmt: skip
    assert not empty
    assert not blank


def test_every_panel_by_tier_shows_every_tier(watched):
    prometheus, _ = watched
    by_tier = [each for each in dashboard_expressions(DASHBOARDS, "10s") if each.where.startswith("tiers.json")]
    assert len(by_tier) >= 18
    tiers = {each: {series.labels.get("tier") for series in prometheus.query(each.text)} for each in by_tier}
    assert {each: found for each, found in tiers.items() if not found >= set(TIERS)} == {}


def test_no_metric_is_missing_or_undocumented(watched):
    prometheus, _ = watched
    documented = set(
        re.findall(
            r"^\| `(overfill_\w+)`", (ROOT / "docs" / "reference" / "metrics.md").read_text("utf-8"), re.MULTILINE
        )
    )
    exported = {
        re.sub(r"_(bucket|sum|count|created)$", "", name) for name in prometheus.names() if name.startswith("overfill_")
    }
    # A counter's "_created" series lacks the "_total" of its name.
    exported = {name if name in documented else f"{name}_total" for name in exported}
    assert exported == documented


def test_counters_agree_with_what_clients_had(watched):
    prometheus, measured = watched
    assert total(prometheus, "overfill_router_completion_tokens_total") == measured.tokens
    assert total(prometheus, "overfill_router_prompt_tokens_total") == measured.prompt_tokens
    assert total(prometheus, "overfill_router_request_seconds_count") == measured.answers
    assert total(prometheus, "overfill_router_ttft_seconds_count") == measured.answers
    # The full model computes the first token of each answer.
    assert total(prometheus, "overfill_decode_tokens_total") == measured.tokens - measured.answers
    looked_up = total(prometheus, "overfill_prefill_prefix_tokens_total")
    assert looked_up == measured.prompt_tokens
    assert total(prometheus, "overfill_decode_sequences_total{outcome='ok'}") == measured.answers


def test_histogram_sums_agree_with_clients_clocks(watched, capsys):
    """The router misses only the time before it receives a request and after its last write."""
    prometheus, measured = watched
    seen = total(prometheus, "overfill_router_request_seconds_sum")
    with capsys.disabled():
        print(
            f"\n{measured.answers} answers: {seen:.3f} s by the router's histogram, {measured.total:.3f} s by clients"
        )
    assert seen <= measured.total
    assert seen == pytest.approx(measured.total, rel=0.15)


def test_parts_add_up_to_the_time_to_first_token(watched):
    prometheus, _ = watched
    ttft = total(prometheus, "overfill_router_ttft_seconds_sum")
    assert total(prometheus, "overfill_router_ttft_part_seconds_sum") == pytest.approx(ttft, rel=1e-3)
    # The process that causes a part measures it, independently of the others.
    for part, histogram in (
        ("prefill_queue", "overfill_prefill_queue_seconds_sum"),
        ("prefill_compute", "overfill_prefill_compute_seconds_sum"),
        ("decode_reservation", "overfill_decode_reservation_seconds_sum"),
    ):
        of_router = total(prometheus, f'overfill_router_ttft_part_seconds_sum{{part="{part}"}}')
        assert of_router == pytest.approx(total(prometheus, histogram), rel=0.02, abs=0.002), part
