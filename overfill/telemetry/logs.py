"""What the services log: lines for people, or one JSON object per line. Both carry the request and its trace.

Prompts and answers are in no message of ours; ``tests/integration/test_tracing.py`` holds us to it.
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
"""The request that this task works for."""

_requests = logging.getLogger("overfill.requests")
_requests.setLevel(logging.WARNING)

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_STANDARD = frozenset(vars(logging.LogRecord("", 0, "", 0, "", None, None))) | {"message", "asctime", "taskName"}


class TextFormatter(logging.Formatter):
    """A line for people."""

    def __init__(self) -> None:
        super().__init__(_TEXT)

    def format(self, record: logging.LogRecord) -> str:
        ids = [f"{name}={value}" for name, value in _ids().items() if value not in record.getMessage()]
        line = super().format(record)
        return f"{line} [{' '.join(ids)}]" if ids else line


class JsonFormatter(logging.Formatter):
    """One object per line; what is given as ``extra`` becomes fields."""

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
    """Logs to ``handler``, by default to stderr, from now on, and to nothing else.

    Args:
        each_request: whether ``ended`` says something.
    """
    handler = handler or logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    _requests.setLevel(logging.INFO if each_request else logging.WARNING)


def ended(stage: str, outcome: str, **fields: str | float) -> None:
    """A request has ended here. Nothing that its client wrote or got is to be among the fields."""
    if _requests.isEnabledFor(logging.INFO):
        said = " ".join(
            f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in fields.items()
        )
        _requests.info("%s: %s %s", stage, outcome, said, extra={"stage": stage, "outcome": outcome, **fields})


def _ids() -> dict[str, str]:
    ids = {"request_id": request_id.get(), "trace_id": tracing.current().trace_id}
    return {name: value for name, value in ids.items() if value}
