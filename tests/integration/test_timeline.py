"""Tests that KV is sent layer by layer while later layers run, and that the first token overtakes it on a slow link."""

import json
import subprocess
import sys

import pytest

from overfill.lab.bench.handoff.timeline import record_timeline
from overfill.making.tiny import make_tiny_pair
from overfill.model.manifest import Pair


@pytest.fixture(scope="module")
def wide_pair(tmp_path_factory):
    """A pair whose layers take long enough for KV to be sent before the last one, even on shared cores."""
    return make_tiny_pair(tmp_path_factory.mktemp("pairs") / "wide", num_layers=8, intermediate_size=2048)


async def test_the_first_token_does_not_wait_for_kv_on_a_slow_link(wide_pair):
    # 3 MB need a few seconds at this rate, which is still fast enough for the stall detector.
    settings = {"dtype": "float32", "threads": 1, "streams": 2, "log": lambda name, line: print(f"{name} | {line}")}
    timeline = await record_timeline(Pair.load(wide_pair), 1500, rate=800_000, **settings)
    assert timeline.overlaps
    assert timeline.token_before_kv


def test_the_command_prints_one_json_document_and_draws(wide_pair, tmp_path):
    plot = tmp_path / "timeline.svg"
    command = [sys.executable, "-m", "overfill.cli.main", "bench", "handoff", "--timeline"]
    done = subprocess.run(
        [*command, f"--pair={wide_pair}", "--tokens=1500", "--json", f"--plot={plot}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["tokens"], document["overlaps"]) == (1500, True), "KV leaves before the last layer starts"
    assert plot.read_text().lstrip().startswith("<?xml")
