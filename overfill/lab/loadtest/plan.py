"""Options of a load test, described once for ``overfill loadtest`` and for locust."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from overfill.errors import InvalidRequest
from overfill.lab.loadtest.shapes import DURATIONS, SHAPES, Shape
from overfill.lab.traffic.run_objectives import RunObjectives
from overfill.rpc.addresses import split_addresses
from overfill.settings.tiers import check_tier_name

API_KEY = "OVERFILL_API_KEY"
"""Environment variable with the API key. On a command line, other users of the machine would see the key."""

LOCUST_NAMES = {"target": "host", "users": "num_users", "duration": "run_time"}
"""Our option -> name of locust's own option for the same. Locust's value wins, because its page can edit it."""


def _option(default: Any, help: str, kind: type = str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, "kind": kind} | more)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """Options of a load test. A field's metadata has its help text, type and limits.

    ``otherwise`` in the metadata says in words what happens without the option.
    """

    target: str = _option(
        "127.0.0.1:7600",
        "Server: HOST:PORT of a router (several separated by commas), or http(s)://HOST:PORT/v1.",
        variable="OVERFILL_ADDRESS",
    )
    trace: str | None = _option(
        None, "Trace to play: Azure's CSV or Mooncake's JSON lines.", Path, otherwise="synthetic requests"
    )
    requests: int | None = _option(
        None, "Number of requests; of a trace, the first ones.", int, minimum=1, otherwise="no limit"
    )
    rate: float | None = _option(
        None,
        "Mean requests per second; scales a trace's arrival times.",
        float,
        more_than=0,
        otherwise="the trace's; without one, users send the next request after an answer",
    )
    shape: Shape | None = _option(
        None, "Load over time.", choices=SHAPES, otherwise="arrivals with --trace or --rate, or else constant"
    )
    users: int = _option(4, "Maximum number of concurrent users; not for --shape arrivals.", int, minimum=1)
    duration: float | None = _option(
        None, "Duration in seconds.", float, more_than=0, otherwise="60; for ramp and spike 120, for soak 3600"
    )
    length_scale: float = _option(1.0, "Factor for the lengths of a trace's prompts and answers.", float, more_than=0)
    longest: int | None = _option(
        None, "Maximum tokens of a prompt and its answer; longer prompts are cut.", int, minimum=2
    )
    prompt_tokens: int = _option(512, "Length of a synthetic prompt.", int, minimum=1)
    output_tokens: int = _option(128, "Length of a synthetic answer.", int, minimum=1)
    vocab_size: int = _option(32_000, "Prompts consist of random token ids below this number.", int, minimum=2)
    seed: int = _option(0, "Random seed for synthetic arrivals.", int)
    objective: str = _option(
        "", "Objectives, such as ttft_p95=2,itl_p99=200ms. Also tpot, e2e, unattributed, errors (0 unless given)."
    )
    timeout: float = _option(600.0, "Timeout of one request, seconds.", float, more_than=0)
    tier: str = _option(
        "",
        "Tier of the requests, as NAME or NAME=WEIGHT; repeat it to mix tiers by weight.",
        separator=",",
        otherwise="the server's default tier",
    )
    fallback: str = _option(
        "", "Tier that continues answers whose own tier has no worker left; none waits.", otherwise="the tier's"
    )
    allow_brownout: bool = _option(False, "Let the next tier answer when the requested one is overloaded.", bool)
    model: str | None = _option(None, "Model name for an OpenAI endpoint.", otherwise="the first that it lists")
    tls_ca: str | None = _option(None, "PEM file with CA certificates to trust. For gRPC it turns TLS on.", Path)
    tls_cert: str | None = _option(None, "PEM file with the client's certificate.", Path, locust="client_tls_cert")
    tls_key: str | None = _option(None, "PEM file with the certificate's private key.", Path, locust="client_tls_key")
    tls_name: str = _option("", "DNS name in the server's certificate, for gRPC.", otherwise="the host of --target")
    report: str | None = _option(None, "Write an HTML report with plots to this file.", Path, output=True)
    records: str | None = _option(None, "Write each request's outcome as a JSON line to this file.", Path, output=True)

    def __post_init__(self) -> None:
        """Raises InvalidRequest when an option is out of range or options conflict."""
        if not self.http:
            try:
                split_addresses(self.address)
            except ValueError as error:
                raise InvalidRequest("target", str(error)) from None
        for f in fields(self):
            _check(f, getattr(self, f.name))
        if self.rate is not None and not self.open_loop:
            raise InvalidRequest(
                "rate", f"cannot be used with shape {self.kind}, in which users send the next request after an answer"
            )
        if self.shape == "arrivals" and self.trace is None and self.rate is None:
            raise InvalidRequest("shape", "arrivals needs a trace or a rate")
        if self.open_loop and self.trace is None and self.requests is None and self.duration is None:
            raise InvalidRequest("rate", "alone never ends; give requests or duration too")
        self.objectives, self.tiers  # noqa: B018  # parsed now, so that a mistake is reported before the test

    @property
    def kind(self) -> Shape:
        """The shape given, or the default one."""
        return self.shape or ("arrivals" if self.trace or self.rate else "constant")

    @property
    def open_loop(self) -> bool:
        """True if requests are sent at their own times, independent of answers."""
        return self.kind == "arrivals"

    @property
    def seconds(self) -> float | None:
        """Seconds after which the test ends. None means that it ends after its last request."""
        return self.duration if self.duration is not None else DURATIONS.get(self.kind)

    @property
    def http(self) -> bool:
        return self.target.startswith(("http://", "https://"))

    @property
    def address(self) -> str:
        """Address of the target's gRPC port, of which ``grpc://`` may be the first part."""
        return self.target.removeprefix("grpc://")

    @property
    def objectives(self) -> RunObjectives:
        """The parsed objectives. Raises InvalidRequest."""
        return RunObjectives.parse(self.objective)

    @property
    def tiers(self) -> dict[str, float]:
        """Weights of the tiers that requests name; without ``tier``, all of them name none. Raises InvalidRequest."""
        weights: dict[str, float] = {}
        for part in filter(None, self.tier.split(",")):
            name, _, given = part.partition("=")
            try:
                weight = float(given or 1)
                check_tier_name(name)
            except ValueError as error:
                raise InvalidRequest("tier", f"{part!r} is not NAME or NAME=WEIGHT: {error}") from None
            if not 0 < weight < math.inf or name in weights:
                raise InvalidRequest("tier", f"{part!r}: give each tier once, with a weight above 0")
            weights[name] = weight
        return weights or {"": 1.0}

    @property
    def api_key(self) -> str | None:
        return os.environ.get(API_KEY) or None

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> LoadPlan:
        """Makes a plan from parsed options. Raises InvalidRequest."""
        given: dict[str, Any] = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in options.items()
            if value is not None
        }
        for f in fields(cls):
            if isinstance(value := given.get(f.name), tuple):
                given[f.name] = f.metadata["separator"].join(value)
        return cls(**given)

    @classmethod
    def from_locust(cls, options: Mapping[str, Any]) -> LoadPlan:
        """Makes a plan from locust's parsed options; ignores locust's others. Raises InvalidRequest."""
        given: dict[str, Any] = {}
        for f in fields(cls):
            for name in (LOCUST_NAMES.get(f.name), locust_name(f)):
                if name is not None and f.name not in given and options.get(name) not in (None, ""):
                    given[f.name] = locust_type(f)(options[name])
        return cls.from_options(given)

    def locust_argv(self) -> list[str]:
        """Returns the options that differ from their defaults, as locust's arguments."""
        given = {f: getattr(self, f.name) for f in fields(self)}
        return [f"{locust_flag(f)}={value}" for f, value in given.items() if value != f.default]


def help_of(f: Field[Any]) -> str:
    """Returns the option's help, with what happens without it if the default does not say so."""
    otherwise = f.metadata.get("otherwise")
    return str(f.metadata["help"]) + (f"  [default: {otherwise}]" if otherwise else "")


def locust_name(f: Field[Any]) -> str:
    """Returns an option's name in locust, where some of our names have another meaning."""
    return str(f.metadata.get("locust", f.name))


def locust_flag(f: Field[Any]) -> str:
    """Returns an option's flag on locust's command line."""
    return f"--{locust_name(f).replace('_', '-')}"


def locust_type(f: Field[Any]) -> Callable[[Any], Any]:
    """Returns the option's type in locust. Paths are text there, because the master sends options to its workers."""
    kind: Callable[[Any], Any] = f.metadata["kind"]
    if kind is bool:
        return lambda value: str(value).lower() in ("true", "1", "on")
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
