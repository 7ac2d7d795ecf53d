"""What a load test is to do. One description of every option, for ``overfill loadtest`` and for locust itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from overfill.errors import InvalidRequest
from overfill.lab.loadtest.shapes import DURATIONS, SHAPES, Shape
from overfill.lab.traffic.run_objectives import RunObjectives

API_KEY = "OVERFILL_API_KEY"
"""Environment variable with the key to show: on a command line, other users of the machine would see it."""

LOCUST_NAMES = {"target": "host", "users": "num_users", "duration": "run_time"}
"""Options that locust has itself, and where its parser puts them. Those of locust win, for its page edits them."""


def _option(default: Any, help: str, kind: type = str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, "kind": kind} | more)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """A load test. The metadata of a field is what ``--help`` says of it, and its type on a command line."""

    target: str = _option(
        "grpc://127.0.0.1:7600", "grpc://HOST:PORT, several separated by commas, or http(s)://HOST:PORT/v1."
    )
    trace: str | None = _option(None, "Azure's CSV or Mooncake's JSON lines.", Path)
    requests: int | None = _option(None, "End after so many; of a trace, the first.", int, minimum=1)
    rate: float | None = _option(
        None, "Mean arrivals per second; a trace is stretched or squeezed.", float, more_than=0
    )
    shape: Shape | None = _option(
        None, "How the load goes over time. By default arrivals with a trace or rate, else constant.", choices=SHAPES
    )
    users: int = _option(4, "Most users of all shapes but arrivals.", int, minimum=1)
    duration: float | None = _option(None, "Seconds. By default 60; ramp and spike 120, soak 3600.", float, more_than=0)
    length_scale: float = _option(1.0, "Prompts and answers of a trace are so many times as long.", float, more_than=0)
    longest: int | None = _option(None, "Most tokens of a prompt with its answer; prompts are cut.", int, minimum=2)
    prompt_tokens: int = _option(512, "Without a trace.", int, minimum=1)
    output_tokens: int = _option(128, "Without a trace.", int, minimum=1)
    vocab_size: int = _option(32_000, "Prompts hold token ids below.", int, minimum=2)
    seed: int = _option(0, "Of arrivals at a rate.", int)
    slo: str = _option(
        "", "Objectives: ttft_p95=2,itl_p99=200ms,errors=0. Also tpot, e2e, unattributed. errors=0 is always one."
    )
    timeout: float = _option(600.0, "Seconds for one request.", float, more_than=0)
    model: str | None = _option(None, "Name to ask for. By default the endpoint's first.")
    tls_ca: str | None = _option(None, "PEM certificates to trust; over gRPC, turns TLS on.", Path)
    tls_cert: str | None = _option(None, "PEM certificate to show.", Path, locust="client_tls_cert")
    tls_key: str | None = _option(None, "PEM private key of the certificate.", Path, locust="client_tls_key")
    tls_name: str = _option("", "What the server's certificate has to be for, over gRPC. By default its host.")
    report: str | None = _option(None, "Write a page with plots to this HTML file.", Path, output=True)
    records: str | None = _option(None, "Write every request as a JSON line to this file.", Path, output=True)

    def __post_init__(self) -> None:
        """Raises InvalidRequest when options contradict each other."""
        if not self.target.startswith(("grpc://", "http://", "https://")):
            raise InvalidRequest("target", f"{self.target!r} is neither grpc://HOST:PORT nor http(s)://HOST:PORT/v1")
        for f in fields(self):
            _check(f, getattr(self, f.name))
        if self.rate is not None and not self.open_loop:
            raise InvalidRequest("rate", f"contradicts shape {self.kind}, in which the answers set the pace")
        if self.shape == "arrivals" and self.trace is None and self.rate is None:
            raise InvalidRequest("shape", "arrivals needs a trace or a rate")
        if self.open_loop and self.trace is None and self.requests is None and self.duration is None:
            raise InvalidRequest("rate", "says no end; give requests or duration too")
        self.objectives  # noqa: B018  # parsed now, so that a mistake is told before the test and not after it

    @property
    def kind(self) -> Shape:
        """The shape in use."""
        return self.shape or ("arrivals" if self.trace or self.rate else "constant")

    @property
    def open_loop(self) -> bool:
        """Whether requests come at times of their own."""
        return self.kind == "arrivals"

    @property
    def seconds(self) -> float | None:
        """When the test ends, whatever else; None for arrivals that end by themselves."""
        return self.duration if self.duration is not None else DURATIONS.get(self.kind)

    @property
    def http(self) -> bool:
        return not self.target.startswith("grpc://")

    @property
    def objectives(self) -> RunObjectives:
        """The objectives. Raises InvalidRequest."""
        return RunObjectives.parse(self.slo)

    @property
    def api_key(self) -> str | None:
        return os.environ.get(API_KEY) or None

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> LoadPlan:
        """From parsed options. Raises InvalidRequest."""
        given: dict[str, Any] = {n: str(value) if isinstance(value, Path) else value for n, value in options.items()}
        return cls(**given)

    @classmethod
    def from_locust(cls, options: Mapping[str, Any]) -> LoadPlan:
        """From locust's parsed options, which hold more than ours. Raises InvalidRequest."""
        given: dict[str, Any] = {}
        for f in fields(cls):
            for name in (LOCUST_NAMES.get(f.name), locust_name(f)):
                if name is not None and f.name not in given and options.get(name) not in (None, ""):
                    given[f.name] = locust_type(f)(options[name])
        return cls.from_options(given)

    def locust_argv(self) -> list[str]:
        """The options that differ from their defaults, for locust."""
        given = {f: getattr(self, f.name) for f in fields(self)}
        return [f"{locust_flag(f)}={value}" for f, value in given.items() if value != f.default]


def locust_name(f: Field[Any]) -> str:
    """How an option is called in locust, which has some names for other things."""
    return str(f.metadata.get("locust", f.name))


def locust_flag(f: Field[Any]) -> str:
    """The same on locust's command line."""
    return f"--{locust_name(f).replace('_', '-')}"


def locust_type(f: Field[Any]) -> Callable[[Any], Any]:
    """Makes a value what the option holds in locust. Paths stay text: the master sends options to the workers."""
    kind: Callable[[Any], Any] = f.metadata["kind"]
    return kind if kind in (int, float) else str


def _check(f: Field[Any], value: Any) -> None:
    if value is None:
        return
    minimum, more_than, choices = (f.metadata.get(name) for name in ("minimum", "more_than", "choices"))
    if minimum is not None and value < minimum:
        raise InvalidRequest(f.name, f"must be at minimum {minimum}, got {value}")
    if more_than is not None and not value > more_than:
        raise InvalidRequest(f.name, f"must be more than {more_than}, got {value}")
    if choices is not None and value not in choices:
        raise InvalidRequest(f.name, f"must be one of {', '.join(choices)}, got {value!r}")
