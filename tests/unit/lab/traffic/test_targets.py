"""Servers under load: every token is counted once, failures say why, and the figures of many answers."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from aiohttp import web

from overfill.errors import Overloaded
from overfill.lab.traffic.figures import figures
from overfill.lab.traffic.outcome import Objective, Outcome, RequestFailed
from overfill.lab.traffic.play import run_load
from overfill.lab.traffic.targets import GrpcTarget, OpenAiTarget
from overfill.lab.traffic.traces import TraceRequest
from overfill.rpc import certificates
from overfill.rpc.access import Role
from overfill.rpc.tls import ClientTls, ServerTls


class FakeServer:
    """Answers ``/v1/completions`` with ``max_tokens`` tokens, but breaks off answers of 13 tokens.

    Attributes:
        per_message: Tokens in a message.
        texts: Messages per token.
        says_why: Whether a last message without text carries the finish reason.
    """

    def __init__(self):
        self.bodies, self.keys = [], []
        self.per_message = self.texts = 1
        self.says_why = False
        self.refuse = False

    async def models(self, request):
        if self.refuse:
            return web.json_response({"error": {"message": "too busy"}}, status=503)
        return web.json_response({"data": [{"id": "fake"}]})

    async def completions(self, request):
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("Authorization"))
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
        if "tier" in body:
            usage["overfill"] = {"choices": [{"timing": {"ttft_ms": 250.0, "total_ms": None}, "tier": "cheap"}]}
        await response.write(f"data: {json.dumps(usage)}\n\ndata: [DONE]\n\n".encode())
        return response


@contextmanager
def running(tls=None):
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
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        server.url = f"{'https' if tls else 'http'}://127.0.0.1:{runner.addresses[0][1]}/v1"
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


@pytest.fixture
def fake():
    with running() as server:
        yield server


LOAD = [TraceRequest(0.0, 7, 4)] * 5


@pytest.mark.parametrize(("per_message", "texts"), [(1, 1), (3, 1), (1, 2)])
@pytest.mark.parametrize("says_why", [True, False])
@pytest.mark.parametrize("extensions", [True, False])
async def test_every_token_is_counted_once(fake, per_message, texts, says_why, extensions):
    fake.per_message, fake.texts, fake.says_why = per_message, texts, says_why
    async with OpenAiTarget(fake.url, extensions=extensions) as target:
        outcomes = await run_load(target, LOAD, 100)
    assert [(outcome.ok, outcome.tokens) for outcome in outcomes] == [(True, 4)] * 5
    assert all(len(body["prompt"]) == 7 and body["model"] == "fake" for body in fake.bodies)
    assert all(body.get("ignore_eos", False) is extensions for body in fake.bodies)
    assert not any(name in body for body in fake.bodies for name in ("tier", "fallback", "allow_brownout"))


async def test_our_endpoint_is_told_tiers_and_key_and_tells_its_time(fake):
    own = {"fallback": "none", "allow_brownout": True}
    async with OpenAiTarget(fake.url, "m", "secret", **own) as target:
        (outcome,) = await run_load(target, [TraceRequest(0.0, 7, 4, tier="full")], 100)
    assert fake.bodies[0].items() >= {"model": "m", "tier": "full", **own}.items()
    assert fake.keys == ["Bearer secret"]
    assert (outcome.tier, outcome.written_by) == ("full", "cheap")
    assert (outcome.timing.ttft, outcome.timing.total) == (0.25, None)


async def test_broken_answers_are_failures_and_not_latencies(fake):
    async with OpenAiTarget(fake.url) as target:
        outcomes = await run_load(target, [TraceRequest(0.0, 7, 13)] * 3, 100)
    found = {one.name: one.value for one in figures(outcomes)}
    assert [outcome.error for outcome in outcomes] == ["the stream broke off"] * 3
    assert found["failed"] == 3
    assert "ttft" not in found


async def test_a_server_that_answers_nothing_says_why(fake):
    fake.refuse = True
    with pytest.raises(RequestFailed, match="HTTP 503: too busy"):
        await OpenAiTarget(fake.url).__aenter__()
    async with OpenAiTarget(fake.url, "fake") as target:
        outcomes = await run_load(target, LOAD, 100)
    assert {outcome.error for outcome in outcomes} == {"HTTP 503: too busy"}
    with pytest.raises(RequestFailed, match="does not answer as an OpenAI endpoint does"):
        await OpenAiTarget("http://127.0.0.1:9/v1").__aenter__()
    with pytest.raises(RequestFailed, match="cannot be used"):
        await OpenAiTarget(fake.url, tls=ClientTls(__file__)).__aenter__()


async def test_an_endpoint_is_shown_a_certificate_and_its_own_is_checked(tmp_path):
    certificates.make(tmp_path / "certs")
    files, router = (certificates.role_files(tmp_path / "certs", role) for role in (Role.CLIENT, Role.ROUTER))
    with running(ServerTls(router.cert, router.key, router.ca).contexts().value) as server:
        async with OpenAiTarget(server.url, tls=ClientTls(files.ca, files.cert, files.key)) as target:
            outcomes = await run_load(target, LOAD, 100)
        assert all(outcome.ok for outcome in outcomes)
        for wrong in (None, ClientTls(files.ca)):
            with pytest.raises(RequestFailed, match="does not answer as an OpenAI endpoint does"):
                await OpenAiTarget(server.url, tls=wrong).__aenter__()


class FakeClient:
    """A client of a stack whose answers have two tokens and then one; but it refuses the tier ``busy``."""

    def __init__(self, address, *, tls, api_key):
        self.opened, self.asked = (address, tls, api_key), []

    async def close(self):
        pass

    def stream(self, prompt, **options):
        self.asked.append((prompt, options))
        return FakeStream(options["tier"])


class FakeStream:
    def __init__(self, tier):
        self.tier = tier
        self.answer = SimpleNamespace(timing="its timing", tier="cheap")

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc):
        pass

    async def __aiter__(self):
        yield SimpleNamespace(token_ids=(1, 2))
        if self.tier == "busy":
            raise Overloaded("no place")
        yield SimpleNamespace(token_ids=(3,))


async def test_a_stack_over_grpc_is_shown_key_certificates_and_tiers(monkeypatch, tmp_path):
    monkeypatch.setattr("overfill.lab.traffic.targets.AsyncClient", FakeClient)
    tls = ClientTls(tmp_path / "ca.pem")
    requests = [TraceRequest(0.0, 7, 3, tier=tier) for tier in ("full", "busy")]
    async with GrpcTarget("x:1", tls, "secret", fallback="none", allow_brownout=True) as target:
        answered, refused = await run_load(target, requests, 100)
        client = target._client
    assert client.opened == ("x:1", tls, "secret")
    prompt, options = client.asked[0]
    assert len(prompt) == 7
    assert options.pop("sampling").max_tokens == 3
    assert options == {"tier": "full", "fallback": "none", "allow_brownout": True}
    assert (answered.tokens, answered.times[0] == answered.times[1] < answered.times[2]) == (3, True)
    assert (answered.timing, answered.written_by) == ("its timing", "cheap")
    assert refused.error == "Overloaded: no place"


def test_goodput_counts_requests_that_meet_every_limit():
    outcomes = [
        Outcome(0.0, (1.0, 1.1, 1.2)),
        Outcome(0.0, (3.0, 3.1)),  # first token too late
        Outcome(1.0, (2.0, 3.0)),  # tokens too slow
        Outcome(1.0, (), "HTTP 500"),
        Outcome(2.0, (2.5, 2.6, 4.0), "broke off"),
    ]
    found = {one.name: one.value for one in figures(outcomes, Objective.parse("ttft=1.5, itl=500ms"))}
    span = 3.1
    assert found["goodput"] == pytest.approx(1 / span)
    assert found["attainment"] == pytest.approx(0.2)
    assert found["failed"] == 2
    assert found["request_rate"] == pytest.approx(3 / span)
    assert found["output_tokens"] == pytest.approx(7 / span)
    assert found["ttft"] == pytest.approx(1.0)
    assert outcomes[0].itl == pytest.approx(0.1)
