"""Tests that one trace spans client, router and workers, and that logs and errors have its id but no prompts."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
import pytest
from http_calls import call
from stacks import running_stack, wait_until

from overfill.client import Client, SamplingParams
from overfill.errors import InvalidRequest

proto = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc")
from opentelemetry import trace  # noqa: E402
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2  # noqa: E402
from opentelemetry.sdk.trace import TracerProvider  # noqa: E402
from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter  # noqa: E402

GIVEN = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@dataclass(frozen=True)
class Span:
    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict
    start: int
    end: int
    failed: bool


class Collector(proto.TraceServiceServicer):
    """Stands in for an OTLP collector; records the spans that it receives."""

    def __init__(self):
        self.spans, self._lock = [], threading.Lock()

    def Export(self, request, context):
        with self._lock:
            for resource in request.resource_spans:
                service = {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"]
                for span in (span for scope in resource.scope_spans for span in scope.spans):
                    attributes = {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}
                    ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
                    times = (span.start_time_unix_nano, span.end_time_unix_nano)
                    self.spans.append(Span(service, span.name, *ids, attributes, *times, span.status.code == 2))
        return trace_service_pb2.ExportTraceServiceResponse()

    def of(self, trace_id):
        with self._lock:
            return {span.name: span for span in self.spans if span.trace_id == trace_id}


@pytest.fixture(scope="module")
def collector():
    server = grpc.server(ThreadPoolExecutor(2))
    servicer = Collector()
    proto.add_TraceServiceServicer_to_server(servicer, server)
    servicer.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield servicer
    server.stop(None)


@pytest.fixture(scope="module")
def traced(tiny_pair, collector):
    """A stack with tracing: (gRPC address, HTTP address, output of its processes)."""
    lines = []
    with running_stack(
        tiny_pair,
        http=0,
        otlp_traces_endpoint=collector.endpoint,
        log_format="json",
        log_level="debug",
        log_requests="on",
        lines=lines,
    ) as (_, address):
        with Client(address) as client:
            http = client.status().http_address
        yield address, http, lines


@pytest.fixture
def application(monkeypatch):
    """Spans of a client application that uses OpenTelemetry."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    return exporter, provider.get_tracer("application")


def test_one_trace_from_client_to_prefill(traced, collector, application):
    address, _, _ = traced
    exporter, tracer = application
    with Client(address) as client, tracer.start_as_current_span("application") as outer:
        answer = client.generate("one trace, please", sampling=SamplingParams(max_tokens=5, ignore_eos=True))
    spans = {span.name: span for span in exporter.get_finished_spans()}
    request = spans["overfill.request"]
    assert request.parent.span_id == outer.get_span_context().span_id
    trace_id = f"{request.context.trace_id:032x}"
    names = {"router.request", "router.queue", "router.attempt", "decode.attempt", "decode.reservation",
             "decode.handoff", "decode.steps", "prefill.prompt", "prefill.queue", "prefill.compute"}  # fmt: skip
    wait_until(lambda: collector.of(trace_id).keys() >= names, 20, "all spans have come")
    found = collector.of(trace_id)
    assert found.keys() == names
    parents = {
        name: next((other.name for other in found.values() if other.span_id == span.parent_id), "")
        for name, span in found.items()
    }
    assert parents == {
        "router.request": "",
        "router.queue": "router.request",
        "router.attempt": "router.request",
        "decode.attempt": "router.attempt",
        "decode.reservation": "decode.attempt",
        "decode.handoff": "decode.attempt",
        "decode.steps": "decode.attempt",
        "prefill.prompt": "decode.handoff",
        "prefill.queue": "prefill.prompt",
        "prefill.compute": "prefill.prompt",
    }
    assert found["router.request"].parent_id == f"{request.context.span_id:016x}"
    for name, span in found.items():
        assert span.service == f"overfill-{name.partition('.')[0]}"
        assert span.start <= span.end
        assert not span.failed
    # Durations of spans equal the times in the answer.
    compute = found["prefill.compute"]
    assert (compute.end - compute.start) / 1e9 == pytest.approx(answer.timing.prefill_compute, rel=0.01)
    assert found["router.request"].attributes["overfill.request_id"] == answer.request_id
    assert found["decode.attempt"].attributes["overfill.request_id"] == answer.request_id
    assert found["decode.handoff"].attributes["overfill.kv_bytes"] > 0


def test_http_takes_a_trace_and_errors_name_it(traced, collector):
    _, http, _ = traced
    model = json.loads(call(f"http://{http}/v1/models").body)["data"][0]["id"]

    def ask(max_tokens):
        body = {"model": model, "prompt": "hello", "max_tokens": max_tokens}
        return call(f"http://{http}/v1/completions", body, {"traceparent": GIVEN})

    assert ask(3).status == 200
    trace_id, parent = GIVEN.split("-")[1:3]
    wait_until(lambda: collector.of(trace_id).keys() >= {"prefill.prompt", "router.request"}, 20, "the spans have come")
    assert collector.of(trace_id)["router.request"].parent_id == parent
    refused = ask(100_000)
    assert (refused.status, refused.headers["x-trace-id"]) == (400, trace_id)
    wait_until(lambda: collector.of(trace_id)["router.request"].failed, 20, "the failed one has come")


def test_errors_carry_the_trace(traced, application):
    address, _, _ = traced
    exporter, _ = application
    with Client(address) as client, pytest.raises(InvalidRequest) as refused:
        client.generate("x", sampling=SamplingParams(max_tokens=1 << 20))
    (span,) = exporter.get_finished_spans()
    assert refused.value.trace_id == f"{span.context.trace_id:032x}"
    assert span.status.status_code is trace.StatusCode.ERROR


def test_logs_have_ids_and_no_prompts(traced, application):
    address, _, lines = traced
    exporter, _ = application
    secret = "xylophone-zebra-quartz"
    with Client(address) as client:
        answer = client.generate(secret, sampling=SamplingParams(max_tokens=4, ignore_eos=True))
        with pytest.raises(InvalidRequest):
            client.generate(secret, sampling=SamplingParams(max_tokens=1 << 20))
        with pytest.raises(InvalidRequest):
            client.generate(secret, sampling=SamplingParams(temperature=0), stop=[""])
    trace_id = f"{exporter.get_finished_spans()[0].context.trace_id:032x}"

    def entries():
        return [json.loads(text) for text in (line.partition(" | ")[2] for line in list(lines)) if text.startswith("{")]

    def of_request():
        return {entry.get("stage") for entry in entries() if entry.get("request_id") == answer.request_id} - {None}

    wait_until(lambda: of_request() == {"router", "decode", "prefill"}, 10, "every process has logged the request")
    ended = [entry for entry in entries() if entry.get("request_id") == answer.request_id and "stage" in entry]
    assert {entry["trace_id"] for entry in ended} == {trace_id}
    (whole,) = [entry for entry in ended if entry["stage"] == "router"]
    assert whole["outcome"] == "ok"
    assert whole["completion_tokens"] == 4
    assert whole["ttft"] > 0
    said = "\n".join(lines)
    assert secret not in said
    assert "xylophone" not in said


def test_spans_leave_before_a_process_ends(tiny_pair, collector):
    with running_stack(tiny_pair, otlp_traces_endpoint=collector.endpoint) as (_, address), Client(address) as client:
        before = len(collector.spans)
        client.generate([5, 6, 7], sampling=SamplingParams(max_tokens=3, ignore_eos=True))
    # Batches are sent every five seconds, but the stack stopped at once.
    names = {span.name for span in collector.spans[before:]}
    assert names >= {"router.request", "decode.attempt", "prefill.prompt"}


def test_without_tracing_opentelemetry_is_not_imported(tmp_path):
    code = (
        "import sys, services.router.app, services.decode.main, services.prefill.main, overfill.client\n"
        "from overfill.telemetry import tracing\n"
        "tracing.configure('x', 'y', '1', '')\n"
        "assert tracing.child('a') is tracing.OFF is tracing.serve('b', [])\n"
        "assert tracing.outgoing() is None\n"
        "print(sorted(name for name in sys.modules if name.startswith('opentelemetry')))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
