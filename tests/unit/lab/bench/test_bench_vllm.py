"""Tests ``overfill bench vllm`` without vLLM: the window, the figures with their aims, and the lines of its file."""

import asyncio
import json

import pytest
from click.testing import CliRunner
from plain_vllm import FakeVllm, broken_vllm

from overfill.errors import InternalError
from overfill.lab.bench.vllm.engines import PlainEngine, VllmSettings, completion_counts
from overfill.lab.bench.vllm.host import host_figures
from overfill.lab.bench.vllm.stages import PromptRound, StagesPlan, decode_figures, prompt_figures
from overfill.lab.bench.vllm.window import DecodeWindow, decode_window
from overfill.lab.commands import bench_vllm
from overfill.lab.measurement import Measurement
from overfill.lab.peers.process import PeerFailed
from overfill.lab.traffic.outcome import RequestFailed


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
    window = await decode_window(streams.open(), 3, lambda: {"worker": next(cpu)})
    assert (window.rows, window.before, window.tokens, window.steps) == (2, 3.5, 6, 3)
    assert window.cpu == {"worker": 3.0}
    assert window.cpu_ms("worker") == 500
    assert window.seconds > 0
    assert sorted(streams.closed) == [0, 1]
    assert streams.position < 20


async def test_a_sequence_that_ends_too_early_fails_the_window():
    streams = Streams([0, 1, 0, 1, 0, 1], 2)
    with pytest.raises(InternalError, match="ended after 3 tokens, before all had decoded 8 together"):
        await decode_window(streams.open(), 8, lambda: {})
    assert sorted(streams.closed) == [0, 1]


async def test_a_window_lasts_until_its_time_has_passed_or_the_answers_are_long_enough():
    long = await decode_window(Streams([0, 1] * 50, 2).open(), 3, lambda: {}, seconds=3600, most=20)
    assert (long.before, long.tokens) == (2, 35)  # the first one has 20 tokens


async def test_a_completion_s_token_counts_are_read_from_torn_events():
    requests = []

    async def answer(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        requests.append((head.split(b"\r\n")[0], json.loads(await reader.readexactly(length))))
        events = b"HTTP/1.1 200 OK\r\n\r\n" + b"".join(
            b'41\r\ndata: {"choices":[],"usage":{"completion_tokens":%d,"total_tokens":99}}\n\n\r\n' % count
            for count in range(2, 66, 2)
        )
        for start in range(0, len(events), 11):
            writer.write(events[start : start + 11])
            await asyncio.sleep(0)  # lets the client read
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        counts = [count async for count in completion_counts(f"http://127.0.0.1:{port}/v1", {"prompt": [1]})]
    assert requests == [(b"POST /v1/completions HTTP/1.1", {"prompt": [1]})]
    assert counts[-1] == 64
    assert set(counts) <= set(range(2, 66, 2))
    assert sorted(set(counts)) == counts


async def test_a_completion_that_is_refused_says_why():
    async def refuse(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b'HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n{"error": {"message": "prompt too long"}}')
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(RequestFailed, match="400 Bad Request: prompt too long"):
            _ = [count async for count in completion_counts(f"http://127.0.0.1:{port}/v1", {"prompt": [1]})]


@pytest.fixture
def plain(tmp_path):
    settings = VllmSettings("float32", 1, 2, 64, 1 << 20, {})
    engine = PlainEngine("plain vLLM", tmp_path, settings, tmp_path / "log", FakeVllm)
    yield engine
    engine.close()


def test_plain_vllm_answers_from_a_process_of_its_own(plain, tmp_path):
    assert plain.answer([1], 3) == [0, 2, 4]
    with pytest.raises(PeerFailed, match="plain vLLM failed in 'decode': ValueError: prompt too long") as caught:
        plain.decode([[1]], 3, 2)
    assert "noise on stdout" in caught.value.__notes__
    plain.close()
    assert (tmp_path / "log").read_text().splitlines()[-1] == "closed"


def test_plain_vllm_that_dies_is_not_waited_for(plain):
    plain._process.kill()
    with pytest.raises(PeerFailed, match="the process exited"):
        plain.answer([1], 3)


def test_plain_vllm_that_does_not_start_says_why(tmp_path):
    settings = VllmSettings("float32", 1, 2, 64, 1 << 20, {})
    with pytest.raises(PeerFailed, match="failed in 'broken_vllm': ValueError: no such model"):
        PlainEngine("plain vLLM", tmp_path, settings, tmp_path / "log", broken_vllm)


def window(rate, rows=2, **cpu):
    return DecodeWindow(rows, 3.0, int(rate), 1.0, cpu)


def by_name(figures):
    return {figure.name: figure for figure in figures}


def test_decode_rates_and_gain_stand_beside_plain_vllms():
    found = by_name(decode_figures(32, [(190, 200, 100, 100), (210, 200, 100, 100)]))
    decoder = found["decode_decoder_32"]
    assert (decoder.value, decoder.low, decoder.high, decoder.peer_value) == (200, 190, 210, 200)
    assert found["decode_full_32"].peer_ratio == 1.0
    assert found["decode_gain_32"].value == found["decode_gain_32"].peer_value == 2.0


@pytest.mark.parametrize(("batch", "decoder", "reached"), [(32, 190, True), (32, 180, False), (8, 180, True)], ids=str)
def test_the_decoder_has_an_aim_at_batch_32(batch, decoder, reached):
    found = by_name(decode_figures(batch, [(decoder, 200, 100, 100)]))
    assert found[f"decode_decoder_{batch}"].reached is reached


@pytest.mark.parametrize(("full", "reached"), [(104, True), (96, True), (110, False)])
def test_the_gain_has_an_aim_at_every_batch(full, reached):
    found = by_name(decode_figures(1, [(200, 200, full, 100)]))
    assert found["decode_gain_1"].reached is reached


@pytest.mark.parametrize(
    ("asked", "ttft", "reached"),
    [(512, 1.14, True), (512, 1.16, False), (2048, 1.11, False), (8192, 1.06, False), (64, 3.0, True)],
)
def test_the_first_token_has_an_aim_per_length(asked, ttft, reached):
    measured = PromptRound(ttft=ttft, exposed=0.04, second=0.06, plain_ttft=1.0, plain_step=0.05)
    found = by_name(prompt_figures(asked - 8, asked, [measured]))  # cut to the context
    assert found[f"ttft_{asked - 8}"].reached is reached
    assert found[f"ttft_{asked - 8}"].value == pytest.approx(ttft)
    assert found[f"second_token_{asked - 8}"].peer_ratio == pytest.approx(1.2)


@pytest.mark.parametrize(("exposed", "reached"), [(0.04, True), (0.06, False)])
def test_the_exposed_handoff_has_an_aim(exposed, reached):
    measured = PromptRound(ttft=1.0, exposed=exposed, second=0.06, plain_ttft=1.0, plain_step=0.05)
    assert by_name(prompt_figures(2048, 2048, [measured]))["handoff_exposed_2048"].reached is reached


@pytest.mark.parametrize(
    ("rows", "name", "good", "bad"),
    [(64, "thread", 0.114, 0.116), (256, "rate", 910, 890), (32, "cpu_worker", 0.114, 0.116)],
)
def test_the_hosts_aims_are_multiples_of_the_peers(rows, name, good, bad):
    def figure(value):
        values = {"rate": 1000, "thread": 0.1, "cpu_worker": 0.1} | {name: value}
        spent = {key: values[key] * values["rate"] for key in ("thread", "cpu_worker")}
        ours = window(values["rate"], rows, thread=spent["thread"], worker=spent["cpu_worker"], router=0.1)
        peers = window(1000, rows, thread=100.0), window(1000, rows, worker=100.0)
        return by_name(host_figures(rows, [(ours, *peers)] * 2))[f"{name}_{rows}"]

    assert figure(good).reached
    assert not figure(bad).reached


def test_engines_get_as_long_contexts_and_caches_as_the_plan_needs():
    plan = StagesPlan(batches=(1, 32), prompts=(512, 8192), rounds=1)
    assert plan.lengths(2048) == {512: 512, 8192: 2040}
    assert plan.max_model_len(2048) == 2048
    assert plan.kv_tokens(2048) == 32 * (128 + 1024) * 9 // 8


@pytest.fixture
def command(monkeypatch, tiny_pair):
    """Runs the command with ``figures`` in place of a measurement; an error among them is raised."""

    def run(figures, *arguments):
        def measured(*arguments):
            log = arguments[-1]
            log("decode-0", "something went wrong")
            for figure in figures:
                if isinstance(figure, Exception):
                    raise figure
                yield figure

        monkeypatch.setattr("overfill.lab.bench.vllm.stages.measure_stages", measured)
        monkeypatch.setattr("overfill.lab.bench.vllm.host.measure_host", measured)
        monkeypatch.setattr("overfill.process.extras.require", lambda *names: None)
        if "--host" not in arguments:
            arguments = [f"--pair={tiny_pair}", *arguments]
        return CliRunner().invoke(bench_vllm.vllm_command, list(arguments), standalone_mode=False)

    return run


GOOD = Measurement("decode_decoder_32", 0.97, "tokens/s", 0.95, at_least=True)
BAD = Measurement("ttft_512", 1.3, "ms", 1.15)


def test_the_lines_have_the_run_and_every_figure(command):
    result = command([GOOD, BAD], "--json", "--batch=1,4", "--engine-args", '{"enforce_eager": true}')
    assert result.return_value == 1
    run, good, bad = map(json.loads, result.stdout.splitlines())
    assert (run["name"], run["batches"]) == ("run", [1, 4])
    assert run["engine_args"].items() >= {"enforce_eager": True}.items()
    assert {"vllm", "vllm_tested", "torch", "device", "device_name", "dtype", "threads", "kv_memory"} <= run.keys()
    assert good["reached"]
    assert not bad["reached"]


def test_a_table_shows_what_was_missed_also_of_a_run_that_breaks_off(command):
    assert "missed" in command([GOOD, BAD], "--host").stdout
    assert "missed" in command([GOOD, BAD, InternalError("the worker is gone")], "--host").stdout


@pytest.mark.parametrize("kind", [InternalError, ZeroDivisionError])
@pytest.mark.parametrize("mode", [(), ("--host",)], ids=["stages", "host"])
def test_a_run_that_breaks_off_leaves_its_figures_and_the_reason(command, kind, mode):
    cause = kind("the worker is gone")
    result = command([GOOD, cause], "--json", *mode)
    assert result.exception is cause
    *_, good, error = map(json.loads, result.stdout.splitlines())
    assert good["name"] == "decode_decoder_32"
    assert error["text"] == f"{kind.__name__}: the worker is gone"
    assert error["notes"] == ["decode-0 | something went wrong"]


def test_a_peer_that_fails_has_its_own_lines(command):
    cause = PeerFailed("plain vLLM failed")
    cause.add_note("out of memory")
    *_, error = map(json.loads, command([cause], "--json").stdout.splitlines())
    assert error["notes"] == ["out of memory"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine-args=[]"], "--engine-args []: expected a JSON object"),
        (["--host", "--prompts=64"], "--prompts does not go with --host"),
        (["--host", "--pair=default"], "--pair does not go with --host"),
        (["--host", "--engine-args=[]"], "--engine-args []: expected a JSON object"),
    ],
)
def test_a_wrong_value_names_its_option(command, arguments, message):
    assert message in str(command([], *arguments).exception)
