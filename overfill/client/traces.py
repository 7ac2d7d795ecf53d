"""One trace span per request, for applications that use OpenTelemetry.

This module does not import OpenTelemetry: an application that traces has already imported it.
"""

from __future__ import annotations

import sys
from typing import Any

from overfill.telemetry.tracing import TRACEPARENT

Metadata = tuple[tuple[str, str], ...]


class RequestSpan:
    """The trace span of one request.

    Args:
        trace: The module ``opentelemetry.trace``.

    Attributes:
        metadata: gRPC metadata that makes this span the parent of the router's spans; empty if the span is invalid.
    """

    def __init__(self, trace: Any) -> None:
        self._trace = trace
        self._span = trace.get_tracer("overfill.client").start_span("overfill.request", kind=trace.SpanKind.CLIENT)
        context = self._span.get_span_context()
        self.metadata: Metadata = ()
        if context.is_valid:
            flags = int(context.trace_flags)
            self.metadata = ((TRACEPARENT, f"00-{context.trace_id:032x}-{context.span_id:016x}-{flags:02x}"),)

    def end(self, error: BaseException | None = None) -> None:
        """Ends the span, and records ``error`` if there is one. Later calls do nothing."""
        if self._span.is_recording():
            if error is not None:
                self._span.set_status(self._trace.StatusCode.ERROR, str(error))
                self._span.set_attribute("error.type", type(error).__name__)
            self._span.end()


def start_span() -> RequestSpan | None:
    """A new span inside the application's current span; None if the application has not imported OpenTelemetry."""
    trace = sys.modules.get("opentelemetry.trace")
    return None if trace is None else RequestSpan(trace)


def with_span(metadata: Metadata, span: RequestSpan | None) -> Metadata:
    """``metadata`` of a client, plus that of one request's span."""
    return metadata if span is None else metadata + span.metadata
