"""What the transports of a load test send about tiers, and what they read of it in the answers."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace

from overfill.lab.loadtest import transports
from overfill.lab.loadtest.plan import LoadPlan
from overfill.lab.loadtest.transports import GrpcTransport, OpenAiTransport

PLAN = {"fallback": "fast", "allow_brownout": True}


def test_over_grpc(monkeypatch):
    sent = []

    class Stream(list):
        answer = SimpleNamespace(timing=None, tier="fast")

    class Client:
        def __init__(self, *_, **__):
            pass

        def stream(self, prompt, **options):
            sent.append((options["tier"], options["fallback"], options["allow_brownout"]))
            return nullcontext(Stream())

    monkeypatch.setattr(transports, "Client", Client)
    assert GrpcTransport(LoadPlan(**PLAN)).ask([1], 4, 60.0, print, "full").tier == "fast"
    assert GrpcTransport(LoadPlan()).ask([1], 4, 60.0, print, "").tier == "fast"
    assert sent == [("full", "fast", True), ("", "", None)]


def test_over_http(monkeypatch):
    sent = []

    def ask(tier, **plan):
        transport = OpenAiTransport(LoadPlan(target="http://127.0.0.1:9/v1", model="m", **plan))
        end = {"choices": [], "overfill": {"choices": [{"timing": {}, "tier": "fast"}]}}
        body = f"data: {json.dumps(end)}\n\ndata: [DONE]\n\n".encode()

        def post(url, json, **_):
            sent.append({name: json[name] for name in ("tier", "fallback", "allow_brownout") if name in json})
            return nullcontext(SimpleNamespace(status_code=200, iter_content=lambda _: [body]))

        monkeypatch.setattr(transport._session, "post", post)
        return transport.ask([1], 4, 60.0, lambda _: None, tier).tier

    assert ask("full", **PLAN) == ask("") == "fast"
    assert sent == [{"tier": "full", "fallback": "fast", "allow_brownout": True}, {}]
