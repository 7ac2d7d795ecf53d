"""Options of a load test, and the load that they describe: requests, tiers, and users over time."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Literal, get_args

import click

from overfill.cli.options import FILE, Number, OutPath, option_field
from overfill.errors import InvalidRequest
from overfill.lab.measurement import Measurement
from overfill.lab.traffic.run_objectives import parse_objectives
from overfill.lab.traffic.traces import TraceRequest, read_trace, scale_lengths, set_rate, synthetic
from overfill.rpc.addresses import split_addresses
from overfill.settings.tiers import check_tier_name

Shape = Literal["arrivals", "constant", "ramp", "spike", "soak"]
"""With ``arrivals``, each request is sent at its own time (open loop). With the others, each user sends the next
request after an answer (closed loop):

* ``constant``: all users all the time;
* ``ramp``: from one user to all;
* ``spike``: a tenth of the users, and all of them in the middle fifth;
* ``soak``: all users, for an hour by default.
"""

_DURATIONS: dict[Shape, float] = {"constant": 60.0, "ramp": 120.0, "spike": 120.0, "soak": 3600.0}
_POSITIVE = Number(0, min_open=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """Options of a load test. An ``option_field`` is an option of the command, which checks the value.

    ``target`` is HOST:PORT of a router, or the URL of an OpenAI endpoint. Its key and certificates are not in the plan,
    because the report shows a plan.
    """

    target: str = "127.0.0.1:7600"
    trace: Path | None = option_field(
        None, "Trace to play: Azure's CSV or Mooncake's JSON lines.", FILE, otherwise="synthetic requests"
    )
    requests: int | None = option_field(
        None, "Number of requests; of a trace, the first ones.", click.IntRange(1), otherwise="no limit"
    )
    rate: float | None = option_field(
        None,
        "Mean requests per second; scales a trace's arrival times.",
        _POSITIVE,
        otherwise="the trace's; without one, users send the next request after an answer",
    )
    shape: Shape | None = option_field(
        None,
        "Load over time.",
        click.Choice(get_args(Shape)),
        otherwise="arrivals with --trace or --rate, or else constant",
    )
    users: int = option_field(4, "Maximum number of concurrent users; not for --shape arrivals.", click.IntRange(1))
    duration: float | None = option_field(
        None, "Duration in seconds.", _POSITIVE, otherwise="60; for ramp and spike 120, for soak 3600"
    )
    length_scale: float = option_field(1.0, "Factor for the lengths of a trace's prompts and answers.", _POSITIVE)
    longest: int | None = option_field(
        None, "Maximum tokens of a prompt and its answer; longer prompts are cut.", click.IntRange(2)
    )
    prompt_tokens: int = option_field(512, "Length of a synthetic prompt.", click.IntRange(1))
    output_tokens: int = option_field(128, "Length of a synthetic answer.", click.IntRange(1))
    vocab_size: int = option_field(32_000, "Prompts consist of random token ids below this number.", click.IntRange(2))
    seed: int = option_field(0, "Random seed for synthetic arrivals.", int)
    objective: str = option_field(
        "", "Objectives, such as ttft_p95=2,itl_p99=200ms. Also tpot, e2e, unattributed, errors (0 unless given).", str
    )
    timeout: float = option_field(600.0, "Timeout of one request, seconds.", _POSITIVE)
    tier: tuple[str, ...] = option_field(
        (),
        "Tier of the requests, as NAME or NAME=WEIGHT; repeat it to mix tiers by weight.",
        str,
        otherwise="the server's default tier",
        multiple=True,
    )
    fallback: str = option_field(
        "", "Tier that continues answers whose own tier has no worker left; none waits.", str, otherwise="the tier's"
    )
    allow_brownout: bool = option_field(
        False, "Let the next tier answer when the requested one is overloaded.", bool, is_flag=True
    )
    model: str | None = option_field(
        None, "Model name for an OpenAI endpoint.", str, otherwise="the first that it lists"
    )
    report: Path | None = option_field(None, "Write an HTML report with plots to this file.", OutPath("file"))
    records: Path | None = option_field(
        None, "Write each request's outcome as a JSON line to this file.", OutPath("file")
    )

    def __post_init__(self) -> None:
        """Raises InvalidRequest when options conflict, or a text is not what it should be."""
        if not self.http:
            try:
                split_addresses(self.address)
            except ValueError as error:
                raise InvalidRequest("target", str(error)) from None
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
    def seconds(self) -> float:
        """Seconds after which no request is sent any more; infinite if the last request ends the test."""
        return self.duration if self.duration is not None else _DURATIONS.get(self.kind, math.inf)

    @property
    def http(self) -> bool:
        return self.target.startswith(("http://", "https://"))

    @property
    def address(self) -> str:
        """Address of the target's gRPC port, of which ``grpc://`` may be the first part."""
        return self.target.removeprefix("grpc://")

    @property
    def objectives(self) -> list[Measurement]:
        """The parsed objectives. Raises InvalidRequest."""
        return parse_objectives(self.objective)

    @property
    def tiers(self) -> dict[str, float]:
        """Weights of the tiers that requests name; without ``tier``, all of them name none. Raises InvalidRequest."""
        weights: dict[str, float] = {}
        for part in self.tier:
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

    def load(self) -> list[TraceRequest] | Iterator[TraceRequest]:
        """Returns the requests with their tiers. They are an endless iterator if only the time ends the test.

        Raises:
            InvalidRequest: The trace cannot be read, or one of its answers is longer than the plan allows.
        """
        if self.trace is not None:
            requests = scale_lengths(read_trace(self.trace, self.requests), self.length_scale, self.longest)
            requests = requests if self.rate is None else set_rate(requests, self.rate)
        elif self.rate is not None:
            count = self.requests or int(self.rate * self.seconds * 2) + 100
            requests = synthetic(count, self.rate, self.prompt_tokens, self.output_tokens, self.seed)
        else:
            requests = [TraceRequest(0.0, self.prompt_tokens, self.output_tokens)]
        if self.open_loop:
            return list(self._with_tiers(request for request in requests if request.arrival < self.seconds))
        if self.requests is None:
            return self._with_tiers(cycle(requests))
        return list(self._with_tiers(islice(cycle(requests), self.requests)))

    def _with_tiers(self, requests: Iterator[TraceRequest]) -> Iterator[TraceRequest]:
        chooser = random.Random(f"tiers {self.seed}")
        names, weights = list(self.tiers), list(self.tiers.values())
        return (replace(request, tier=chooser.choices(names, weights)[0]) for request in requests)

    def users_at(self, elapsed: float) -> int:
        """Returns the number of users ``elapsed`` seconds after the start."""
        part = elapsed / self.seconds
        if self.kind == "ramp":
            # Steps of equal length, one user more in each; the last step has all users.
            return min(self.users, 1 + int(part * self.users))
        if self.kind == "spike":
            return self.users if 0.4 <= part < 0.6 else max(1, round(self.users / 10))
        return self.users
