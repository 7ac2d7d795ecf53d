"""Tests output and exit code of ``overfill bench handoff --timeline`` for a recorded timeline."""

from dataclasses import replace

import pytest
from click.testing import CliRunner

from overfill.lab.bench.handoff import timeline as bench
from overfill.lab.bench.handoff.timeline import Timeline
from overfill.lab.commands.bench import bench_group

OVERLAPPED = Timeline(
    tokens=2000,
    layers=[(0.0, 0.1), (0.1, 0.2), (0.2, 0.3)],
    first_kv_sent=0.05,
    first_token_sent=0.31,
    last_kv_sent=0.4,
    first_token_received=0.35,
    first_kv_received=0.1,
    last_kv_received=0.45,
    kv_bytes=2_000_000,
    kv_chunks=6,
)
KV_LAST = replace(OVERLAPPED, first_kv_sent=0.25)
TOKEN_LAST = replace(OVERLAPPED, first_token_received=0.5)


def run(monkeypatch, pair, recorded, *flags):
    async def record(*args, **kwargs):
        return recorded

    monkeypatch.setattr(bench, "record_timeline", record)
    return CliRunner().invoke(bench_group, ["handoff", "--timeline", f"--pair={pair}", *flags], standalone_mode=False)


def test_the_table_s_title_is_one_line_and_events_are_in_order(monkeypatch, tiny_pair):
    lines = run(monkeypatch, tiny_pair, OVERLAPPED).stdout.splitlines()
    assert lines[0] == "one prefill of 2000 tokens, 2.0 MB of KV"
    events = [line.split("│")[1].strip() for line in lines if "│" in line and "received" not in line]
    assert events[:2] == ["first layer starts", "first KV leaves"]
    assert events[-1] == "last KV has left"


@pytest.mark.parametrize(
    ("recorded", "flags", "code"),
    [
        (OVERLAPPED, ["--bandwidth=1"], 0),
        (KV_LAST, [], 1),
        (TOKEN_LAST, ["--bandwidth=1"], 1),
        (TOKEN_LAST, [], 0),  # without a limit either may arrive first
    ],
)
def test_the_exit_code_says_whether_the_handoff_overlapped(monkeypatch, tiny_pair, recorded, flags, code):
    assert run(monkeypatch, tiny_pair, recorded, *flags).return_value == code


def test_the_legend_of_the_plot_hides_no_layer(tmp_path, monkeypatch):
    from overfill.lab.bench.handoff import plot

    overlaps = []
    close = plot.plt.close

    def check(figure):
        figure.canvas.draw()
        axes = figure.axes[0]
        box = axes.get_legend().get_window_extent()
        overlaps.extend(bar for bar in axes.patches if box.overlaps(bar.get_window_extent()))
        close(figure)

    monkeypatch.setattr(plot.plt, "close", check)
    layers = [(0.01 * i, 0.01 * (i + 1)) for i in range(30)]
    plot.save_timeline(tmp_path / "t.png", replace(OVERLAPPED, layers=layers))
    assert (tmp_path / "t.png").stat().st_size > 0
    assert overlaps == []
