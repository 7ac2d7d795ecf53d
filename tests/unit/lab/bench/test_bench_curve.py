"""Tests ``overfill bench curve``: plan, continued runs, the tools' formats, figures beside others, and the plot."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from overfill.errors import InvalidRequest, OverfillError
from overfill.lab.bench.curve import report, results, run, systems, tools
from overfill.lab.bench.curve.plan import SHAPES, AnswerPace, Point, plan_points
from overfill.lab.bench.curve.results import FormatChanged, PointFigures, figures_of
from overfill.lab.bench.curve.run import Folder, measure_points
from overfill.lab.bench.curve.tools import Endpoint
from overfill.lab.commands.bench import bench_group
from overfill.lab.peers import environment, process
from overfill.lab.peers.process import PeerFailed
from overfill.lab.peers.vllm_server import vllm_server
from overfill.lab.traffic.outcome import Outcome
from overfill.stack.child import Child

SAMPLES = Path(__file__).parent / "samples"
ALL = ("split", "colocated", "identity", "vllm")
USERS = (1, 2, 4, 8, 16)
FIGURES = PointFigures(10, 0, 100.0, 20.0, 1.0, 2.0, 3.0, 0.05, 0.06, 0.07, 0.5, 128.0)


def measured(system, users, tool="guidellm", number=1, shape="a", **figures):
    return Point(shape, system, tool, number, users), replace(FIGURES, **figures)


# The plan


def test_the_whole_curve_has_115_points():
    points = plan_points("abc", ALL, USERS, 3)
    assert len(points) == len({point.name for point in points}) == 115


def test_in_each_round_every_system_has_its_turn():
    assert [(p.shape, p.round, p.system) for p in plan_points("ab", ALL, (1,), 2) if p.tool == "guidellm"] == [
        *[("a", 1, name) for name in (*ALL, "apart")],
        *[("a", 2, name) for name in ALL],
        *[("b", 1, name) for name in ALL],
    ]


def test_one_system_is_measured_by_all_tools_once():
    points = [point for point in plan_points("abc", ALL, (1, 2), 3) if point.tool != "guidellm"]
    assert {(p.shape, p.system, p.tool, p.round) for p in points} == {
        ("a", "apart", "aiperf", 1),
        ("a", "apart", "own", 1),
    }
    assert all(point.system != "apart" for point in plan_points("a", ("split", "vllm"), (1,), 3))


def test_the_tools_have_a_core_of_their_own_where_they_are_compared(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cores))
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, wanted: cores.__setitem__(slice(None), wanted))

    @contextlib.contextmanager
    def served(folder, *, threads, **_):
        started_on.append((list(cores), threads))
        yield SimpleNamespace(url="http://127.0.0.1:1/v1", model="m")

    monkeypatch.setattr(systems, "served", served)
    pair = SimpleNamespace(full_path=tmp_path, folder=tmp_path, full_config=SimpleNamespace(vocab_size=9))
    cores, started_on = [2, 5], []
    with systems.started("apart", SHAPES["a"], {"colocated": pair}, {}, print):
        assert cores == [5]
    assert (cores, started_on) == ([2, 5], [([2], 1)])
    with systems.started("colocated", SHAPES["a"], {"colocated": pair}, {}, print):
        assert cores == [2, 5]
    assert started_on[1] == ([2, 5], 2)


def test_every_user_sends_the_same_number_of_requests():
    pace = AnswerPace(alone=2.0, wave=5.0)
    assert pace.requests(1, 20) == 10
    assert pace.requests(4, 20) == 4 * 4
    assert pace.requests(16, 20) == 2 * 16  # at least two each, though that takes longer
    assert SHAPES["c"].prefix
    assert not SHAPES["a"].prefix


# Continued runs


@pytest.fixture
def fake_run(monkeypatch, tmp_path):
    """Measures points with fakes of systems and tools. ``calls`` holds what happened, ``fails`` what shall fail."""

    class Run:
        calls: list[object] = []  # noqa: RUF012
        fails: dict[object, BaseException] = {}  # noqa: RUF012
        said: list[str] = []  # noqa: RUF012

        def __call__(self, planned, conditions=None):
            self.calls, self.said = [], []
            folder = Folder(tmp_path, conditions or {"seconds": 8})
            return measure_points(planned, folder, 8, {}, {}, self.said.append, lambda name, line: None)

    fake = Run()

    @contextlib.contextmanager
    def started(system, *_):
        fake.calls.append(f"start {system}")
        if system in fake.fails:
            raise fake.fails[system]
        try:
            yield None
        finally:
            fake.calls.append(f"stop {system}")

    def measure(point, shape, endpoint, requests, *_):
        if point in fake.fails:
            raise fake.fails[point]
        fake.calls.append((point, requests))
        return replace(FIGURES, requests=requests)

    monkeypatch.setattr(run, "started", started)
    monkeypatch.setattr(run, "warm_up", lambda *_: AnswerPace(1.0, 1.0 + len(fake.calls)))
    monkeypatch.setattr(run, "measure", measure)
    return fake


def test_a_second_run_measures_what_the_first_did_not(fake_run):
    planned = plan_points("b", ("split", "vllm"), (1, 2), 1)
    last = planned[1]
    fake_run.fails[last] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        fake_run(planned)
    assert fake_run.calls[-1] == "stop split"  # no server is left behind
    del fake_run.fails[last]
    assert fake_run(planned) == []
    assert "1 of 4 points are finished already, and are skipped" in fake_run.said
    assert [call[0] for call in fake_run.calls if isinstance(call, tuple)] == planned[1:]
    fake_run(planned)
    assert fake_run.calls == []


def test_a_point_with_failed_requests_is_measured_again(fake_run, tmp_path):
    planned = plan_points("b", ("split",), (1, 2), 1)
    for point, failed in zip(planned, (0, 1), strict=True):
        Folder(tmp_path, {"seconds": 8}).add(point, replace(FIGURES, failed=failed))
    assert fake_run(planned) == []
    assert [call[0] for call in fake_run.calls if isinstance(call, tuple)] == [planned[1]]


def test_a_failure_leaves_the_other_points_and_is_tried_again(fake_run):
    planned = plan_points("b", ("split", "identity", "vllm"), (1, 2), 1)
    failure = PeerFailed("guidellm exited with status 1")
    failure.add_note("no route")
    fake_run.fails |= {planned[0]: failure, "identity": OverfillError("no memory")}
    assert fake_run(planned) == [planned[0], *planned[2:4]]
    assert any("guidellm exited with status 1\n  no route" in line for line in fake_run.said)
    assert any("no memory" in line for line in fake_run.said)


def test_rounds_and_tools_send_the_same_number_of_requests(fake_run):
    fake_run(plan_points("a", ("colocated",), (2,), 1))
    calls = [call for call in fake_run.calls if isinstance(call, tuple)]
    fake_run(plan_points("a", ("colocated",), (2,), 3))  # its warm-ups find another pace
    calls += [call for call in fake_run.calls if isinstance(call, tuple)]
    assert [(point.system, point.tool) for point, _ in calls] == [
        ("colocated", "guidellm"),
        *[("apart", tool) for tool in ("guidellm", "aiperf", "own")],
        *[("colocated", "guidellm")] * 2,
    ]
    for system in ("colocated", "apart"):
        assert len({requests for point, requests in calls if point.system == system}) == 1


def test_a_folder_of_other_conditions_is_refused(tmp_path):
    Folder(tmp_path, {"seconds": 8, "guidellm": "0.8.1"})
    with pytest.raises(InvalidRequest, match=r"measured with seconds 8, and this run has 40: .*another folder"):
        Folder(tmp_path, {"seconds": 40, "guidellm": "0.8.1"})
    assert Folder(tmp_path, {"seconds": 8, "vllm": "0.31"}).conditions["guidellm"] == "0.8.1"  # a further part


def test_a_point_survives_its_file(tmp_path):
    folder, (point, figures) = Folder(tmp_path, {}), measured("vllm", 4)
    folder.add(point, figures)
    assert folder.read() == {point: figures}


# The tools' formats


def test_guidellm_s_report_is_read():
    found = results.read_guidellm(SAMPLES / "guidellm")
    assert (found.requests, found.failed, found.answer) == (4, 0, 128)
    assert found.tokens_per_s == pytest.approx(4 * 128 / 91.03, rel=1e-3)
    assert found.ttft_p50 == pytest.approx((6.644 + 19.239) / 2, rel=1e-3)
    assert found.per_user == pytest.approx(2 / (0.24665 + 0.25473), rel=1e-3)


def test_aiperf_s_records_are_read(tmp_path):
    found = results.read_aiperf(SAMPLES / "aiperf")
    assert (found.requests, found.failed, found.answer) == (4, 0, 128)
    assert found.tokens_per_s == pytest.approx(4 * 128 / 63.42, rel=1e-3)
    assert found.gap_p50 == pytest.approx(0.18649, rel=1e-3)
    shutil.copytree(SAMPLES / "aiperf", tmp_path, dirs_exist_ok=True)
    with (tmp_path / "profile_export.jsonl").open("a") as records:
        records.write('{"metadata": {}, "metrics": {}, "error": {"code": 503}}\n')
    assert results.read_aiperf(tmp_path).failed == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("inter_token_latency_ms", "itl_ms", r"guidellm's output cannot be read \(KeyError: 'inter_token_latency_ms'"),
        ('"output_tokens": 128', '"output_tokens": null', "TypeError.*NoneType"),
        ('"successful": [', '"completed": [', r"KeyError: 'successful'\)\. .*guidellm>=0\.8"),
        ("}\n", "", "JSONDecodeError"),
    ],
)
def test_another_format_is_an_error_that_names_the_field(tmp_path, old, new, message):
    text = (SAMPLES / "guidellm" / "report.json").read_text()
    assert old in text
    (tmp_path / "report.json").write_text(text.replace(old, new))
    with pytest.raises(FormatChanged, match=message):
        results.read_guidellm(tmp_path)


def test_goodput_counts_requests_that_meet_both_limits():
    good, late, slow = (
        Outcome(0.0, (1.0, 2.0), counted=101),
        Outcome(0.0, (6.0, 7.0), counted=101),
        Outcome(0.0, (1, 2)),
    )
    found = figures_of([good, late, slow, Outcome(0.0, (), "HTTP 503")], 20.4)  # 204 tokens in 10 s
    assert (found.goodput, found.failed) == (pytest.approx(0.1), 1)
    with pytest.raises(OverfillError, match="all 1 requests failed, such as with: HTTP 503"):
        figures_of([Outcome(0.0, (), "HTTP 503")])


def test_our_generator_s_requests_give_the_same_figures():
    found = figures_of([Outcome(0.0, (1.0, 1.5, 2.0)), Outcome(0.0, (2.0, 3.0, 4.0)), Outcome(0.0, (), "HTTP 503")])
    assert (found.requests, found.failed, found.answer) == (2, 1, 3)
    assert (found.tokens_per_s, found.ttft_p50, found.gap_p50) == (1.5, 1.5, 0.75)


@pytest.fixture
def fake_tool(tmp_path, monkeypatch):
    """Measures a point of shape c by a shell script instead of guidellm. ``children`` holds its processes."""
    python = tmp_path / "python"
    at = Endpoint("http://127.0.0.1:9/v1", "model", Path("tokenizer"), 64)

    class Recorded(Child):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            fake.children.append(self)

    class Tool:
        def __init__(self):
            self.children = []

        def __call__(self, script, limit):
            python.write_text(f"#!/bin/sh\n{script}\n")
            python.chmod(0o700)
            return tools.measure(Point("c", "split", "guidellm", 1, 2), SHAPES["c"], at, 4, {"guidellm": python}, limit)

    monkeypatch.setattr(process, "Child", Recorded)
    fake = Tool()
    return fake


def test_guidellm_gets_the_shape_and_makes_its_prompts_before(fake_tool, tmp_path):
    found = fake_tool(f'cp {SAMPLES}/guidellm/report.json "${{5%scenario.json}}report.json" && cp "$5" {tmp_path}', 600)
    assert found.requests == 4
    spec = json.loads((tmp_path / "scenario.json").read_text())["spec"]
    (data,) = spec["data"]
    assert (data["prompt_tokens"], data["output_tokens"]) == (280, 128)
    assert data["prefix_buckets"] == [{"prefix_count": 4, "prefix_tokens": 1000}]
    assert spec["data_loader"]["samples"] == spec["constraints"][0]["count"] == 4
    assert spec["profile"]["streams"] == [2]
    assert spec["backend"]["extras"]["body"]["ignore_eos"] is True


def test_a_tool_that_fails_says_why(fake_tool):
    with pytest.raises(PeerFailed, match="guidellm exited with status 3") as caught:
        fake_tool("echo no such option; exit 3", 600)
    assert caught.value.__notes__ == ["no such option"]


def test_a_tool_that_writes_nothing_or_sends_fewer_requests_fails(fake_tool, tmp_path):
    with pytest.raises(FormatChanged, match=r"guidellm's output cannot be read \(FileNotFoundError: .*report\.json"):
        fake_tool("exit 0", 600)
    fewer = json.loads((SAMPLES / "guidellm" / "report.json").read_text())
    fewer["benchmarks"][0]["requests"]["successful"].pop()
    (tmp_path / "fewer.json").write_text(json.dumps(fewer))
    with pytest.raises(PeerFailed, match="guidellm reports 3 of 4 requests"):
        fake_tool(f'cp {tmp_path}/fewer.json "${{5%scenario.json}}report.json"', 600)


def test_a_tool_that_hangs_is_stopped(fake_tool):
    with pytest.raises(PeerFailed, match="guidellm took more than 0 s"):
        fake_tool("exec sleep 600", 0)
    assert fake_tool.children[0].returncode is not None


# The report


def test_losses_come_first():
    points = [
        measured("colocated", 4, tokens_per_s=90.0, per_user=30.0, ttft_p50=1.0),
        measured("colocated", 4, number=2, tokens_per_s=110.0, per_user=30.0, ttft_p50=1.0),
        measured("identity", 4, tokens_per_s=80.0, per_user=20.0, ttft_p50=2.0),
        measured("vllm", 4, tokens_per_s=200.0, per_user=25.0, ttft_p50=0.8),
    ]
    rows = report.comparison(dict(points))
    assert [(row.name, row.peer, row.peer_value) for row in rows] == [
        ("A colocated at 4: output", "vllm", 200),
        ("A colocated at 4: first token", "vllm", 0.8),
        ("A colocated at 4: per user", "vllm", 25),
    ]
    assert (rows[0].value, rows[0].low, rows[0].high) == (100, 90, 110)
    assert report.losses(rows) == 2


def test_tools_agree_within_5_percent_or_the_rounds_spread():
    points = [
        measured("apart", 1, tokens_per_s=100.0),
        measured("apart", 1, "aiperf", tokens_per_s=104.0, ttft_p50=1.2),
        measured("apart", 2, tokens_per_s=100.0),
        measured("apart", 2, "own", tokens_per_s=115.0),
        measured("colocated", 2, tokens_per_s=90.0),
        measured("colocated", 2, number=2, tokens_per_s=110.0),
    ]
    found = {row.name: row for row in report.checks(dict(points))}
    assert found["A apart at 1: output, aiperf beside guidellm, difference"].value == pytest.approx(0.04)
    assert [row.name for row in found.values() if not row.reached] == [
        "A apart at 1: first token, aiperf beside guidellm, difference"
    ]
    assert found["A apart at 2: output, own beside guidellm, difference"].bound == 0.2


def test_short_and_failed_answers_are_said():
    rows = report.checks(dict([measured("split", 1, failed=2, answer=100.0)]))
    assert [row.reached for row in rows] == [False, False]


def test_the_front_holds_what_nothing_beats():
    assert report.pareto([(1, 5), (2, 4), (2, 3), (1.5, 4), (3, 1), (0.5, 5)]) == [(1, 5), (2, 4), (3, 1)]


def test_the_command_writes_results_of_an_earlier_run(tmp_path, monkeypatch):
    monkeypatch.setenv("OVERFILL_HOME", str(tmp_path / "home"))
    folder = Folder(tmp_path / "out", {})
    for point in plan_points("a", ("split", "vllm"), (1, 2), 1):
        folder.add(point, FIGURES)
    monkeypatch.setattr(environment, "python_of", lambda peer: Path(sys.executable))
    arguments = ["curve", "--out", str(tmp_path / "out"), "--shape=a", "--system=split", "--system=vllm"]
    monkeypatch.setattr("overfill.lab.commands.bench_curve.load_pair", _MockPair)
    result = CliRunner().invoke(
        bench_group, [*arguments, "--concurrency=1,2", "--rounds=1", "--json"], standalone_mode=False
    )
    assert result.exception is None
    assert result.return_value == 0
    assert json.loads(result.stdout.splitlines()[0])["peer"] == "vllm"
    written = json.loads((tmp_path / "out" / "curve.json").read_text())
    assert len(written["points"]) == 4
    assert written["objective"] == "ttft <= 5 s, itl <= 0.1 s"
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")


class _MockPair:
    full_digest = decoder_digest = "digest"

    def __init__(self, name):
        self.name = name


def test_the_command_names_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("OVERFILL_HOME", str(tmp_path))
    result = CliRunner().invoke(bench_group, ["curve", "--out", str(tmp_path / "out"), "--system=split"])
    assert "guidellm is not installed; add --install" in result.output


# vLLM's server


def test_vllm_s_server_gets_the_limits_and_says_why_it_does_not_start(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\nexit 1\n')
    python.chmod(0o700)
    limits = {"max_num_seqs": 7, "max_model_len": 64, "kv_memory": 12345}
    for prefix_cache, flag in ((True, "--enable-prefix-caching"), (False, "--no-enable-prefix-caching")):
        with (
            pytest.raises(PeerFailed, match="during start-up") as caught,
            vllm_server(python, Path("model"), prefix_cache=prefix_cache, **limits),
        ):
            pass
        asked = " ".join(caught.value.__notes__).split()
        assert flag in asked
        for option, value in (("--max-num-seqs", "7"), ("--max-model-len", "64"), ("--kv-cache-memory-bytes", "12345")):
            assert asked[asked.index(option) + 1] == value
