"""Tests ``overfill bench serve`` against a small OpenAI server, and the arithmetic of its figures."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from pathlib import Path

import pytest
from aiohttp import web
from click.testing import CliRunner

from overfill.errors import InvalidRequest, Unavailable
from overfill.lab.peers import environment
from overfill.lab.peers.process import PeerFailed
from overfill.lab.peers.vllm_server import vllm_server
from overfill.lab.bench.serve.compare import TargetSpec
from overfill.lab.traffic.play import run_load
from overfill.lab.commands.bench import bench_group
from overfill.lab.traffic.outcome import Objective, Outcome, figures
from overfill.lab.traffic.traces import synthetic
from overfill.rpc.tls import ClientTls


class FakeServer:
    """Answers ``/v1/completions`` with ``max_tokens`` tokens, but breaks off answers of 13 tokens.

    Attributes:
        per_message: Tokens in a message.
        texts: Messages per token.
        says_why: Whether a last message without text carries the finish reason.
    """

    def __init__(self):
        self.bodies = []
        self.per_message = self.texts = 1
        self.says_why = False
        self.refuse = False

    async def models(self, request):
        return web.json_response({"data": [{"id": "fake"}]})

    async def completions(self, request):
        body = await request.json()
        self.bodies.append(body)
        if self.refuse:
            return web.json_response({"error": {"message": "too busy"}}, status=503)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        counting = body["stream_options"].get("continuous_usage_stats")
        sent = 0
        while sent < body["max_tokens"]:
            sent = min(body["max_tokens"], sent + self.per_message)
            event = {"choices": [{"text": "x"}]}
            if counting:
                event["usage"] = {"completion_tokens": sent}
            await response.write(self.texts * f"data: {json.dumps(event)}\n\n".encode())
            if body["max_tokens"] == 13:
                return response
        if self.says_why:
            event = {"choices": [{"text": "", "finish_reason": "length"}]}
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
        usage = {"choices": [], "usage": {"completion_tokens": sent}}
        await response.write(f"data: {json.dumps(usage)}\n\ndata: [DONE]\n\n".encode())
        return response


@pytest.fixture
def fake():
    """A running ``FakeServer``; its address is ``url``."""
    server = FakeServer()
    loop = asyncio.new_event_loop()
    ready = threading.Event()
    stop = asyncio.Event()

    async def serve():
        app = web.Application()
        app.router.add_get("/v1/models", server.models)
        app.router.add_post("/v1/completions", server.completions)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        ready.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(30)
    yield server
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


def run(*arguments):
    return CliRunner().invoke(bench_group, ["serve", *arguments], standalone_mode=False)


def rows_of(*arguments):
    result = run(*arguments, "--json")
    if result.exception is not None:
        raise result.exception
    return result, [json.loads(line) for line in result.stdout.splitlines()]


LOAD = ("--requests=5", "--arrivals=burst", "--prompt-tokens=7", "--output-tokens=4")


@pytest.mark.parametrize(("per_message", "texts"), [(1, 1), (3, 1), (1, 2)])
@pytest.mark.parametrize("says_why", [True, False])
@pytest.mark.parametrize("extensions", [True, False])
def test_every_token_is_counted_once(fake, per_message, texts, says_why, extensions):
    fake.per_message, fake.texts, fake.says_why = per_message, texts, says_why
    flags = () if extensions else ("--no-extensions",)
    _, rows = rows_of(f"--target={fake.url}", *LOAD, "--objective=ttft=60,itl=60", *flags)
    found = {row["name"]: row["value"] for row in rows}
    assert found["failed"] == 0
    assert found["output_tokens"] == pytest.approx(4 * found["requests"], rel=1e-3)
    assert found["goodput"] == found["requests"]
    assert found["attainment"] == 1
    assert found["ttft_p50"] <= found["ttft_p99"] <= found["e2e_p99"]
    played = fake.bodies[2:]  # after the warm-up
    assert len(played) == 5
    assert all(len(body["prompt"]) == 7 and body["model"] == "fake" for body in played)
    assert all(body.get("ignore_eos", False) is extensions for body in played)


def test_a_trace_is_played_with_its_lengths(fake, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,40,8\n2023-11-16 18:15:46.7805900,60,12\n2023-11-16 18:15:46.8805900,20,16\n"
    )
    _, rows = rows_of(f"--target={fake.url}", f"--trace={trace}", "--length-scale=0.5", "--requests=2", "--rate=50")
    assert sorted((len(b["prompt"]), b["max_tokens"]) for b in fake.bodies[2:]) == [(20, 4), (30, 6)]
    assert (rows[0]["source"], rows[0]["rate"], rows[0]["prompt_tokens"]) == ("trace.csv", 50, 25)


def test_a_server_that_does_not_start_says_why():
    # An interpreter without vLLM.
    with (
        pytest.raises(PeerFailed, match="during start-up") as caught,
        vllm_server(Path(sys.executable), Path("model"), 64),
    ):
        pass
    assert any("vllm" in note for note in caught.value.__notes__)


def test_a_server_gets_a_place_for_each_adapter(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\nexit 1\n')
    python.chmod(0o700)
    adapters = {"a": Path("/tasks/a"), "b": Path("/tasks/b")}
    with (
        pytest.raises(PeerFailed) as caught,
        vllm_server(python, Path("model"), 64, adapters, prefix_cache=True, kv_memory=12345),
    ):
        pass
    asked = " ".join(caught.value.__notes__)
    assert "--enable-lora --max-loras 2 --lora-modules a=/tasks/a b=/tasks/b" in asked
    assert "--enable-prefix-caching" in asked
    assert "--kv-cache-memory-bytes 12345" in asked


class BarrierTarget:
    """A target that ends its requests as soon as ``size`` of them run at once."""

    def __init__(self, size):
        self.barrier = asyncio.Barrier(size)
        self.concurrent = self.max_concurrent = 0

    async def stream(self, prompt, max_tokens):
        self.concurrent += 1
        self.max_concurrent = max(self.max_concurrent, self.concurrent)
        yield 1
        await self.barrier.wait()
        self.concurrent -= 1
        yield max_tokens


@pytest.mark.parametrize(("concurrency", "together"), [(None, 6), (2, 2), (3, 3)])
async def test_a_closed_loop_has_its_concurrency_and_an_open_one_never_waits(concurrency, together):
    target = BarrierTarget(together)
    requests = synthetic(6, "burst", 1, 8, 5, 0)
    outcomes = await run_load(target, requests, 100, concurrency=concurrency, timeout=60)
    assert target.max_concurrent == together
    assert [len(outcome.times) for outcome in outcomes] == [5] * 6
    assert all(outcome.ok for outcome in outcomes)


async def test_a_request_that_takes_too_long_has_failed():
    (outcome,) = await run_load(BarrierTarget(2), synthetic(1, "burst", 1, 8, 5, 0), 100, timeout=0.05)
    assert not outcome.ok
    assert outcome.error == "not finished after 0.05 s"


def test_broken_answers_are_failures_and_not_latencies(fake):
    result, rows = rows_of(
        f"--target={fake.url}", "--requests=3", "--arrivals=burst", "--output-tokens=13", "--objective=ttft=60"
    )
    found = {row["name"]: row["value"] for row in rows}
    assert found["failed"] == 3
    assert found["ttft_p50"] is None
    assert result.return_value == 1


def test_a_server_that_answers_nothing_ends_the_run(fake):
    fake.refuse = True
    with pytest.raises(Unavailable, match="answers nothing: HTTP 503: too busy"):
        rows_of(f"--target=x={fake.url}", *LOAD)
    with pytest.raises(Unavailable, match="does not answer as an OpenAI endpoint does"):
        rows_of("--target=http://127.0.0.1:9/v1", *LOAD)


@pytest.mark.parametrize(("given", "key"), [(("--api-key=given",), "given"), ((), "the stack's")])
def test_a_stack_over_grpc_is_shown_key_and_certificates(monkeypatch, tmp_path, given, key):
    opened = []

    def client(address, *, tls, api_key):
        opened.append((address, tls, api_key))
        raise ValueError("seen")

    monkeypatch.setattr("overfill.lab.traffic.targets.AsyncClient", client)
    monkeypatch.setenv("OPENAI_API_KEY", "somebody else's")
    monkeypatch.setenv("OVERFILL_API_KEY", "the stack's")
    ca = tmp_path / "ca.pem"
    ca.touch()
    assert "seen" in str(run("--target=grpc://x:1", f"--tls-ca={ca}", *given).exception)
    assert opened == [("x:1", ClientTls(ca), key)]


def test_goodput_counts_requests_that_meet_every_limit():
    outcomes = [
        Outcome(0.0, (1.0, 1.1, 1.2)),
        Outcome(0.0, (3.0, 3.1)),  # first token too late
        Outcome(1.0, (2.0, 3.0)),  # tokens too slow
        Outcome(1.0, (), "HTTP 500"),
        Outcome(2.0, (2.5, 2.6, 4.0), "broke off"),
    ]
    found = {f.name: f.value for f in figures(outcomes, Objective.parse("ttft=1.5, itl=0.5"))}
    span = 3.1
    assert found["goodput"] == pytest.approx(1 / span)
    assert found["attainment"] == pytest.approx(0.2)
    assert found["failed"] == 2
    assert found["requests"] == pytest.approx(3 / span)
    assert found["output_tokens"] == pytest.approx(7 / span)
    assert found["ttft_p50"] == pytest.approx(1.0)
    assert outcomes[0].itl == pytest.approx(0.1)


def test_targets_are_checked():
    assert TargetSpec.parse("a=http://x/v1") == TargetSpec("a", "http://x/v1")
    assert TargetSpec.parse("vllm") == TargetSpec("vllm", "vllm")
    assert TargetSpec.parse("one=vllm:fast") == TargetSpec("one", "vllm:fast")
    with pytest.raises(InvalidRequest, match="is not a target"):
        TargetSpec.parse("localhost:8000")
    same = run("--target=a=http://x/v1", "--target=a=http://y/v1")
    assert "same name" in str(same.exception)


def test_vllm_is_installed_only_on_demand(monkeypatch, tmp_path):
    installed = []
    monkeypatch.setenv("OVERFILL_HOME", str(tmp_path))
    monkeypatch.setattr(environment, "install", lambda name, report: installed.append(name))
    assert "vllm: not installed; add --install-vllm" in str(run("--target=vllm", *LOAD).exception)
    assert installed == []
    run("--target=vllm", "--install-vllm", *LOAD)
    assert installed == ["vllm"]
