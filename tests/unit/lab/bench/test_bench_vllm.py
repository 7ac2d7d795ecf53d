"""Tests ``overfill bench vllm`` without vLLM: the window, the figures with their aims, and the lines of its file."""

import asyncio
import json
import threading
import time

import pytest
from click.testing import CliRunner

from overfill.errors import InternalError
from overfill.lab.bench.vllm.check import agreement
from overfill.lab.bench.vllm.figures import (
    DecodeRound,
    Figure,
    PromptRound,
    decode_figures,
    prompt_figures,
)
from overfill.lab.bench.vllm.host import ROWS_FIGURES, profile, rows_figures
from overfill.lab.bench.vllm.step_clock import LINES, StepClock, StepTimes, new_file, read_times
from overfill.lab.bench.vllm.window import DecodeWindow, decode_window
from overfill.lab.commands import bench_vllm
from overfill.pair.reference import JudgedAnswer, Verdict


class Streams:
    """Streams whose messages come in a given order: ``order`` names the stream of each token."""

    def __init__(self, order, count):
        self.closed = []
        self._order, self._count = order, count
        self.position = 0

    def open(self):
        return [self._stream(index) for index in range(self._count)]

    async def _stream(self, index):
        received = 0
        try:
            while self.position < len(self._order):
                if self._order[self.position] != index:
                    await asyncio.sleep(0)
                    continue
                self.position += 1
                received += 1
                yield received
        finally:
            self.closed.append(index)


async def test_the_window_has_only_tokens_from_while_all_sequences_decode():
    # The first stream gets five tokens before the second one has two. The window opens then, and needs three of each.
    streams = Streams([0, 0, 0, 0, 0, 1, 1, *[0, 1] * 50], 2)
    cpu = iter([2.0, 5.0])
    window = await decode_window(streams.open(), 3, lambda: next(cpu))
    assert window.before == (5, 2)
    assert window.tokens == 6
    assert window.cpu == 3.0
    assert window.seconds > 0
    assert sorted(streams.closed) == [0, 1]
    assert streams.position < 20


async def test_a_sequence_that_ends_too_early_fails_the_window():
    streams = Streams([0, 1, 0, 1, 0, 1], 2)
    with pytest.raises(InternalError, match="ended after 3 tokens, before all had decoded 8 together"):
        await decode_window(streams.open(), 8, lambda: 0.0)
    assert sorted(streams.closed) == [0, 1]


def windows(decoder, full, plain_decoder, plain_full):
    """A round with these rates, at batch 2."""
    return DecodeRound(
        *(DecodeWindow((4, 2), int(rate), 1.0, 0.5) for rate in (decoder, full, plain_decoder, plain_full))
    )


def by_name(figures):
    return {figure.name: figure for figure in figures}


def test_decode_rates_stand_beside_plain_vllm_and_the_machines_limit():
    found = by_name(decode_figures(32, [windows(190, 100, 200, 100), windows(210, 100, 200, 100)], {"decoder": 400.0}))
    decoder = found["decode_decoder_32"]
    assert (decoder.value, decoder.low, decoder.high, decoder.peer_value) == (200, 190, 210, 200)
    assert (decoder.limit, found["decode_full_32"].limit) == (400.0, None)
    assert decoder.peer_cpu_ms == 2.5  # half a second for 200 tokens
    assert found["decode_gain_32"].value == found["decode_gain_32"].peer_value == 2.0
    assert found["decode_gain_difference_32"].value == pytest.approx(0.05)
    assert found["decode_ratio_32"].value == 1.0


@pytest.mark.parametrize(("batch", "decoder", "reached"), [(32, 190, True), (32, 180, False), (8, 180, True)], ids=str)
def test_the_decoder_has_an_aim_at_batch_32(batch, decoder, reached):
    found = by_name(decode_figures(batch, [windows(decoder, 100, 200, 100)], {}))
    assert found[f"decode_ratio_{batch}"].reached is reached


@pytest.mark.parametrize(("full", "reached"), [(104, True), (96, True), (90, False), (110, False)])
def test_a_gain_must_be_near_plain_vllms_on_either_side(full, reached):
    found = by_name(decode_figures(1, [windows(200, full, 200, 100)], {}))
    assert found["decode_gain_difference_1"].reached is reached


def prompt_round(ttft, exposed=0.04):
    return PromptRound(
        ttft=ttft, cpu=0.8, prefill=1.0, exposed=exposed, second=0.06, plain_ttft=1.0, plain_cpu=0.7, plain_step=0.05
    )


@pytest.mark.parametrize(
    ("asked", "ttft", "reached"),
    [(512, 1.14, True), (512, 1.16, False), (2048, 1.11, False), (8192, 1.06, False), (64, 3.0, True)],
)
def test_the_first_token_has_an_aim_per_length(asked, ttft, reached):
    found = by_name(prompt_figures(asked, asked, [prompt_round(ttft)], 0.5))
    assert found[f"ttft_ratio_{asked}"].reached is reached
    assert found[f"ttft_{asked}"].value == pytest.approx(1e3 * ttft)
    assert found[f"ttft_{asked}"].limit == 500
    assert (found[f"ttft_{asked}"].cpu_ms, found[f"ttft_{asked}"].peer_cpu_ms) == (800, 700)


def test_agreement_counts_ties_and_is_zero_without_an_answer():
    verdicts = (Verdict(0, 5, 5, 0.0), Verdict(1, 6, 7, 1e-4), Verdict(2, 8, 9, 1.0), Verdict(3, 9, 9, 0.0))
    assert agreement([JudgedAnswer(verdicts)]).value == 0.75
    assert agreement([JudgedAnswer(verdicts), JudgedAnswer((), "no answer")]).value == 0


@pytest.fixture
def command(monkeypatch, tiny_pair):
    """Runs the command with ``figures`` in place of a measurement; an error among them is raised."""

    def run(figures, *arguments):
        def measured(pair, plan, settings, note, report, log):
            log("decode-0", "something went wrong")
            note("answers were not checked: no time")
            for figure in figures:
                if isinstance(figure, Exception):
                    raise figure
                yield figure

        def measured_host(plan, settings, report, log):
            return measured(None, plan, settings, lambda text: None, report, log)

        monkeypatch.setattr("overfill.lab.bench.vllm.measure.measure_vllm", measured)
        monkeypatch.setattr("overfill.lab.bench.vllm.host.measure_host", measured_host)
        monkeypatch.setattr("overfill.process.extras.require", lambda *names: None)
        if "--host" not in arguments:
            arguments = [f"--pair={tiny_pair}", *arguments]
        arguments = ["--device=cpu", "--threads=1", *arguments]
        return CliRunner().invoke(bench_vllm.vllm_command, arguments, standalone_mode=False)

    return run


GOOD = Figure("decode_ratio_32", 0.97, "of plain vLLM", 0.95, at_least=True, limit=3.0, cpu_ms=1.5)
BAD = Figure("ttft_ratio_512", 1.3, "of plain vLLM", 1.15)


def test_the_file_has_the_run_and_every_figure(command, tmp_path):
    file = tmp_path / "run.jsonl"
    result = command([GOOD, BAD], f"--json={file}", "--batch=1,4", "--engine-args", '{"enforce_eager": true}')
    assert result.return_value == 1
    assert "missed" in result.stdout  # the table
    run, note, good, bad = map(json.loads, file.read_text().splitlines())
    assert (run["name"], run["device"], run["batches"]) == ("run", "cpu", [1, 4])
    assert run["engine_args"] == {"enforce_eager": True}
    assert {"vllm", "vllm_tested", "torch", "device_name", "dtype", "threads", "kv_memory"} <= run.keys()
    assert note == {"name": "note", "text": "answers were not checked: no time"}
    assert (good["reached"], good["limit"], good["cpu_ms"]) == (True, 3.0, 1.5)
    assert not bad["reached"]


@pytest.mark.parametrize(
    ("kind", "text"),
    [(InternalError, "the worker is gone"), (ZeroDivisionError, "ZeroDivisionError: the worker is gone")],
)
@pytest.mark.parametrize("mode", [(), ("--host",)], ids=["stages", "host"])
def test_a_run_that_breaks_off_leaves_its_figures_and_the_reason(command, tmp_path, kind, text, mode):
    file, cause = tmp_path / "run.jsonl", kind("the worker is gone")
    result = command([GOOD, cause], f"--json={file}", *mode)
    assert result.exception is cause
    *_, good, error = map(json.loads, file.read_text().splitlines())
    assert good["name"] == "decode_ratio_32"
    assert error["text"] == text
    assert error["notes"] == ["decode-0 | something went wrong"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine-args=[]"], "--engine-args []: expected a JSON object"),
        (["--kv-memory=lots"], "--kv-memory lots: "),
        (["--host", "--prompts=64"], "--prompts does not go with --host"),
        (["--host", "--pair=default"], "--pair does not go with --host"),
        (["--host", "--engine-args=[]"], "--engine-args []: expected a JSON object"),
        (["--profile"], "--profile needs --host"),
    ],
)
def test_a_wrong_value_names_its_option(command, arguments, message):
    assert message in str(command([], *arguments).exception)


def step_times(steps, cpu, **lines):
    return StepTimes(steps, cpu, cpu, dict.fromkeys(LINES, (0, 0.0)) | lines)


def figures_of(rows, **ours):
    """The figures when every value is 100, except for some of ours."""
    equal = dict.fromkeys(ROWS_FIGURES, 100.0)
    return by_name(rows_figures(rows, [equal | ours] * 2, [equal] * 2))


@pytest.mark.parametrize(
    ("rows", "name", "good", "bad"),
    [
        (64, "thread", 114, 116),
        (256, "rate", 91, 89),
        (32, "cpu_worker", 114, 116),
    ],
)
def test_the_host_s_aims_are_multiples_of_the_peers(rows, name, good, bad):
    assert figures_of(rows, **{name: good})[f"{name}_{rows}"].reached
    assert not figures_of(rows, **{name: bad})[f"{name}_{rows}"].reached
    without_aim = figures_of(32, thread=1e4, rate=1.0)
    assert without_aim["thread_32"].reached
    assert without_aim["thread_32"].value == 1e4
    assert without_aim["rate_32"].reached


def test_a_profile_divides_the_thread_s_time_by_line():
    ours = [step_times(10, 0.1, forward=(20, 0.06)), step_times(30, 0.3, forward=(60, 0.18))]
    found = profile(ours, [step_times(1, 0.005, forward=(2, 0.001))])
    assert found["forward"] == pytest.approx((6.0, 1.0))
    assert found["all"] == pytest.approx((10.0, 5.0))
    assert found["other"] == pytest.approx((4.0, 4.0))


def test_the_clock_counts_a_line_without_the_lines_within_it(tmp_path):
    file = new_file(tmp_path / "steps")
    clock = StepClock(file)

    def burn(seconds):
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    inner = clock.timed("forward", lambda: burn(0.02))
    outer = clock.timed("runner", lambda: (burn(0.01), inner()))
    step = clock.stepped(lambda computes: (outer(), computes))
    inner()  # before a thread has stepped
    before = read_times(file)
    assert before.steps == before.lines["forward"][0] == 0
    step(False)
    other = threading.Thread(target=outer)
    other.start()
    other.join()
    assert read_times(file).since(before).lines["runner"][0] == 0  # not before the end of a step that computes
    step(True)
    found = read_times(file).since(before)
    assert found.steps == 1
    assert found.lines["forward"][0] == found.lines["runner"][0] == 2
    assert found.lines["forward"][1] > found.lines["runner"][1] > 0.02
