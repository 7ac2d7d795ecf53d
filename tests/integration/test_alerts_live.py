"""Tests that three typical faults raise their own alert in a real Prometheus, and neither of the other two alerts.

The fault also shows in the panel that the runbook names. The rules are those of the chart, with minutes shortened to
seconds.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from monitoring_expressions import filled, panels
from prometheus_process import running_prometheus
from stacks import running_stack, wait_until

from overfill.client import Client, SamplingParams

ROOT = Path(__file__).parents[2]
FILES = ROOT / "deploy/helm/overfill/files"
WATCHED = {"OverfillHandoffSlow", "OverfillPrefillOverloaded", "OverfillDecodeStarved"}
INTERVAL = 0.5

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(480),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs the program prometheus (Debian's)"),
]


def quick_rules(folder):
    """Write the rules with 2 s of window and 1 s of waiting for each minute; return the files."""
    files = []
    for path in sorted((FILES / "rules").glob("*.yml")):
        text = re.sub(r"\[(\d+)m\]", lambda match: f"[{2 * int(match[1])}s]", path.read_text())
        text = re.sub(r"for: (\d+)m", r"for: \1s", text)
        files.append(folder / path.name)
        files[-1].write_text(text)
    return files


@contextmanager
def load(address, clients, prompt_tokens, answer_tokens):
    """Run ``clients`` that each send one new prompt after the other until the end of the block."""
    stop = threading.Event()

    def ask(index):
        with Client(address) as client:
            turn = 0
            while not stop.is_set():
                turn += 1
                prompt = [5 + (index * 37 + turn * 11 + i * (turn + 1)) % 200 for i in range(prompt_tokens)]
                client.generate(prompt, sampling=SamplingParams(max_tokens=answer_tokens, ignore_eos=True))

    with ThreadPoolExecutor(clients) as threads:
        asking = [threads.submit(ask, index) for index in range(clients)]
        try:
            yield
        finally:
            stop.set()
    for done in asking:
        done.result()


def worst(prometheus, board, title):
    """Return the largest value that the panel would show now, and the panel's threshold."""
    dashboard = json.loads((FILES / f"dashboards/{board}.json").read_text())
    panel = next(panel for panel in panels(dashboard) if panel["title"] == title)
    found = [prometheus.query(filled(target["expr"], "10s")) for target in panel["targets"]]
    limit = panel["fieldConfig"]["defaults"]["thresholds"]["steps"][-1]["value"]
    return max((series.last for each in found for series in each if series.has_number), default=0.0), limit


@pytest.mark.parametrize(
    ("alert", "panel", "faults", "settings", "clients", "prompt_tokens", "answer_tokens"),
    [
        pytest.param(None, None, {}, {}, 2, 32, 16, id="well"),
        pytest.param(
            "OverfillHandoffSlow", ("handoff", "Handoff exposed"), {"decode-0": "slow-kv"}, {}, 2, 32, 16,
            id="slow handoff",
        ),
        pytest.param(
            "OverfillPrefillOverloaded", ("router", "Prefill backlog"), {"prefill-0": "slow-steps"},
            {"max_num_batched_tokens": "64"}, 10, 200, 4, id="overloaded prefill",
        ),
        pytest.param(
            "OverfillDecodeStarved", ("router", "Waiting for decode workers"), {"decode-0": "slow-steps"},
            {"max_num_seqs": "2"}, 8, 16, 40, id="starved decode",
        ),
    ],
)  # fmt: skip
def test_alert(tiny_pair, tmp_path, capsys, alert, panel, faults, settings, clients, prompt_tokens, answer_tokens):
    with running_stack(tiny_pair, faults=faults, **settings) as (_, address):
        with Client(address) as client:
            targets = f"http://{client.status().process.metrics_address}/targets"
        with (
            running_prometheus(tmp_path, targets, quick_rules(tmp_path), INTERVAL) as prometheus,
            load(address, clients, prompt_tokens, answer_tokens),
        ):
            wait_until(lambda: len(prometheus.up()) == 3, 30, "everything is scraped")
            if alert is None:
                count = 'overfill_router_requests_total{outcome="ok"}'
                wait_until(lambda: sum(s.last for s in prometheus.query(count)) > 15, 240, "some answers")
                assert not prometheus.firing() & WATCHED
                return
            seconds = wait_until(lambda: alert in prometheus.firing(), 240, f"{alert} fires")
            assert prometheus.firing() & WATCHED == {alert}
            shown, limit = worst(prometheus, *panel)
            with capsys.disabled():
                print(f"\n{alert} fires {seconds:.0f} s later; {panel[0]} › {panel[1]}: {shown:.3g} (limit {limit:g})")
            assert shown > limit
