"""Distributed tracing: passes W3C trace context from requests to other processes, and records spans if configured.

Knows no service. Only ``configure`` and what it sets up import OpenTelemetry. Without it, the ``traceparent`` of a
request is passed to the workers unchanged, so that logs and errors carry its trace. A request without one costs a
look-up.

A span is current in the task that began it, and in tasks that this task starts afterwards.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterable
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any, Literal, Self

from overfill.errors import OverfillError
from overfill.process.extras import needs

TRACEPARENT = "traceparent"
"""Name of the HTTP header and gRPC metadata entry."""

TRACE_ID = "overfill-trace-id"
"""Entry in the trailing metadata of failed RPCs."""

_FLUSH_TIMEOUT = 3.0
"""Seconds to send the last spans when a process ends."""

_FORM = re.compile(r"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")

Kind = Literal["server", "client", "internal"]
Value = str | int | float | bool


class Span:
    """A span that records nothing and only passes ``traceparent`` on.

    Attributes:
        traceparent: trace context for child spans in other processes; empty outside a trace.
        trace_id: 32 hexadecimal digits; empty outside a trace.
    """

    def __init__(self, traceparent: str = "") -> None:
        self.traceparent = traceparent
        self.trace_id = traceparent[3:35]
        self._token: Token[Span] | None = None

    def set(self, **attributes: Value) -> None:
        """Sets attributes."""

    def event(self, name: str, **attributes: Value) -> None:
        """Records an event at the current time."""

    def past(self, name: str, start_ns: int, end_ns: int, **attributes: Value) -> None:
        """Records a child span that has already ended; times are of ``time.monotonic_ns``."""

    def end(self, error: BaseException | None = None) -> None:
        """Ends the span; ``error`` is None after success. Only the first call has an effect."""

    def __enter__(self) -> Self:
        if self is not OFF:
            self._token = _current.set(self)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._token is not None:
            _current.reset(self._token)
            self._token = None
        self.end(exc)


OFF = Span()
_current: ContextVar[Span] = ContextVar("_current", default=OFF)


class _Recorded(Span):
    """A span recorded by OpenTelemetry."""

    def __init__(self, collector: _Collector, span: Any) -> None:
        context = span.get_span_context()
        super().__init__(f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}")
        self._collector = collector
        self._span = span

    def set(self, **attributes: Value) -> None:
        self._span.set_attributes(_named(attributes))

    def event(self, name: str, **attributes: Value) -> None:
        self._span.add_event(name, _named(attributes))

    def past(self, name: str, start_ns: int, end_ns: int, **attributes: Value) -> None:
        to_wall = time.time_ns() - time.monotonic_ns()
        child = self._collector.start(name, "internal", self, attributes, start_ns + to_wall)
        child._span.end(end_ns + to_wall)

    def end(self, error: BaseException | None = None) -> None:
        if not self._span.is_recording():
            return
        if error is not None:
            if isinstance(error, OverfillError):
                self._span.set_status(self._collector.error, str(error))
                self._span.set_attribute("error.type", type(error).__name__)
            elif isinstance(error, Exception):
                self._span.set_status(self._collector.error)
                self._span.record_exception(error)
            else:
                self._span.set_attribute("overfill.cancelled", True)
        self._span.end()


class _Collector:
    """A configured OpenTelemetry provider. Spans here do not use OpenTelemetry's own current span."""

    def __init__(self, provider: Any) -> None:
        from opentelemetry import trace

        self._trace = trace
        self._kinds = {kind: trace.SpanKind[kind.upper()] for kind in ("server", "client", "internal")}
        self._tracer = provider.get_tracer("overfill")
        self.provider = provider
        self.error = trace.StatusCode.ERROR

    def start(
        self, name: str, kind: Kind, parent: Span, attributes: dict[str, Value], start_ns: int | None = None
    ) -> _Recorded:
        trace = self._trace
        if isinstance(parent, _Recorded):
            context = trace.set_span_in_context(parent._span)
        elif match := _FORM.fullmatch(parent.traceparent):
            trace_id, span_id, flags = (int(part, 16) for part in match.groups())
            remote = trace.SpanContext(trace_id, span_id, is_remote=True, trace_flags=trace.TraceFlags(flags))
            context = trace.set_span_in_context(trace.NonRecordingSpan(remote))
        else:
            context = trace.set_span_in_context(trace.INVALID_SPAN)
        return _Recorded(
            self, self._tracer.start_span(name, context, self._kinds[kind], _named(attributes), start_time=start_ns)
        )


_collector: _Collector | None = None


def configure(service: str, instance: str, version: str, endpoint: str) -> None:
    """Starts to record spans and send them to ``endpoint`` over OTLP/gRPC. Does nothing if ``endpoint`` is empty.

    The environment variables ``OTEL_*`` of OpenTelemetry's SDK set headers, certificates and sampling.

    Args:
        service, instance, version: ``service.name``, ``service.instance.id`` and ``service.version`` of the process.

    Raises:
        MissingExtra: OpenTelemetry is not installed.
    """
    if not endpoint or _collector is not None:
        return
    with needs("tracing", "to send traces (--otlp-traces-endpoint, OTEL_EXPORTER_OTLP_ENDPOINT) this process"):
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    named = {"service.name": service, "service.instance.id": instance, "service.version": version}
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    use(provider)


def use(provider: Any) -> None:
    """Records spans with an OpenTelemetry ``TracerProvider``; None stops recording."""
    global _collector
    _collector = None if provider is None else _Collector(provider)


async def flush() -> None:
    """Sends the remaining spans. Await it at the end of a service, because its process may exit at once afterwards."""
    if _collector is not None and hasattr(_collector.provider, "force_flush"):
        await asyncio.to_thread(_collector.provider.force_flush, round(_FLUSH_TIMEOUT * 1000))


def serve(name: str, headers: Iterable[tuple[str, str | bytes]], **attributes: Value) -> Span:
    """Begins the span of a request with ``headers`` and makes it current until the task ends.

    Call it in the request's own task, and end the span.
    """
    given = next((value for key, value in headers if key == TRACEPARENT), "")
    given = given.decode("latin-1") if isinstance(given, bytes) else given
    parent = Span(given) if _FORM.fullmatch(given) else OFF
    span = parent if _collector is None else _collector.start(name, "server", parent, attributes)
    if span is not OFF:
        _current.set(span)
    return span


def child(name: str, kind: Kind = "internal", parent: Span | None = None, **attributes: Value) -> Span:
    """Begins a child of ``parent``, by default of the current span. As a context manager it is current in its body."""
    if _collector is None:
        return OFF
    return _collector.start(name, kind, parent or _current.get(), attributes)


def current() -> Span:
    """Returns the current span of this task."""
    return _current.get()


def outgoing() -> tuple[tuple[str, str], ...] | None:
    """Returns metadata that makes an RPC part of the current span; None outside a trace."""
    traceparent = _current.get().traceparent
    return ((TRACEPARENT, traceparent),) if traceparent else None


def _named(attributes: dict[str, Value]) -> dict[str, Value]:
    return {f"overfill.{name}": value for name, value in attributes.items()}
