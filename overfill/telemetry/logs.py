"""Log formats of the services: text lines, or one JSON object per line. Both carry the request's id and its trace.

The services never log prompts or answers; ``tests/integration/test_tracing.py`` checks it.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar
from typing import Literal

from overfill.telemetry import tracing

LogFormat = Literal["text", "json"]

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the request that the current task serves."""

_configured: tuple[str, LogFormat] = "warning", "text"
_requests = logging.getLogger("overfill.requests")
_requests.setLevel(logging.WARNING)

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_STANDARD = frozenset(vars(logging.LogRecord("", 0, "", 0, "", None, None))) | {"message", "asctime", "taskName"}


class TextFormatter(logging.Formatter):
    """Formats a record as a text line, followed by the request's and trace's ids."""

    def __init__(self) -> None:
        super().__init__(_TEXT)

    def format(self, record: logging.LogRecord) -> str:
        ids = [f"{name}={value}" for name, value in _ids().items() if value not in record.getMessage()]
        line = super().format(record)
        return f"{line} [{' '.join(ids)}]" if ids else line


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object per line; the keys of ``extra`` become fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_ids(),
        }
        fields |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str, ensure_ascii=False)


def configure(
    level: str, form: LogFormat, handler: logging.Handler | None = None, *, each_request: bool = False
) -> None:
    """Sends all log records to ``handler`` only; without one, to stderr.

    Args:
        level: lowest level to log, such as ``info``.
        form: format of the lines.
        each_request: makes ``ended`` log a line for every request.
    """
    global _configured
    _configured = level, form
    handler = handler or logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    handler.addFilter(_is_news)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    _requests.setLevel(logging.INFO if each_request else logging.WARNING)


def configured() -> tuple[str, LogFormat]:
    """The level and the format of this process's lines, for processes that are to log as it does."""
    return _configured


def _is_news(record: logging.LogRecord) -> bool:
    """Leaves out gRPC's traceback when a client leaves while its status is sent; the request's outcome is recorded."""
    return not (record.name.startswith("grpc.") and record.getMessage().startswith("ExecuteBatchError raised in core"))


def ended(stage: str, outcome: str, **fields: str | float) -> None:
    """Logs the end of a request. ``fields`` must not contain text of the client or of the answer."""
    if _requests.isEnabledFor(logging.INFO):
        said = " ".join(
            f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in fields.items()
        )
        _requests.info("%s: %s %s", stage, outcome, said, extra={"stage": stage, "outcome": outcome, **fields})


def _ids() -> dict[str, str]:
    ids = {"request_id": request_id.get(), "trace_id": tracing.current().trace_id}
    return {name: value for name, value in ids.items() if value}
