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


async def record(folder, rate):
    lines = []
    try:
        return await record_timeline(
            Pair.load(folder),
            1500,
            dtype="float32",
            threads=1,
            streams=2,
            rate=rate,
            log=lambda name, line: lines.append(f"{name} | {line}"),
        )
    except BaseException:
        print("\n".join(lines))
        raise


async def test_kv_leaves_before_the_last_layer_starts(wide_pair):
    timeline = await record(wide_pair, rate=None)
    assert timeline.overlaps
    assert len(timeline.layers) == 8
    assert timeline.kv_bytes == 1500 * 8 * 2 * 2 * 16 * 4  # layers, k and v, heads, head_dim, float32


async def test_the_first_token_does_not_wait_for_kv_on_a_slow_link(wide_pair):
    # 3 MB need a few seconds at this rate, which is still fast enough for the stall detector.
    timeline = await record(wide_pair, rate=800_000)
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
    assert document["tokens"] == 1500
    assert document["overlaps"] is True
    assert plot.read_text().lstrip().startswith("<?xml")
