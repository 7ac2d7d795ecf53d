"""The SDK's part of a trace: a span per request, where the application itself uses OpenTelemetry.

Nothing is imported here: an application that traces has imported it already.
"""

from __future__ import annotations

import sys
from typing import Any

from overfill.telemetry.tracing import TRACEPARENT

Metadata = tuple[tuple[str, str], ...]


class RequestSpan:
    """One request to a router.

    Attributes:
        metadata: to be sent with it; names the span as the parent of what the router does.
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
        """The request has ended, with ``error`` or well; only the first call counts."""
        if self._span.is_recording():
            if error is not None:
                self._span.set_status(self._trace.StatusCode.ERROR, str(error))
                self._span.set_attribute("error.type", type(error).__name__)
            self._span.end()


def start_span() -> RequestSpan | None:
    """A span that has begun now, in the application's current one; None where the application does not trace."""
    trace = sys.modules.get("opentelemetry.trace")
    return None if trace is None else RequestSpan(trace)


def with_span(metadata: Metadata, span: RequestSpan | None) -> Metadata:
    """What is sent with every request of a client, and what this one's span adds."""
    return metadata if span is None else metadata + span.metadata
