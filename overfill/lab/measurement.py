"""A measured number, the bound that it is compared with, and a peer's number from the same run. JSON and table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Self

import click
from rich.table import Table

from overfill.cli.output import console


@dataclass(frozen=True, slots=True)
class Measurement:
    """One figure of a benchmark.

    Attributes:
        bound: Upper limit for ``value``, or lower limit if ``at_least``. None means no limit.
        peer, peer_value: Something else that did the same in the same run, and its value.
        low, high: Minimum and maximum over the rounds; ``value`` is then the median.
        of: What was measured, such as the batch, by name. These are fields of the JSON line.
    """

    name: str
    value: float
    unit: str
    bound: float | None = None
    at_least: bool = False
    peer: str | None = None
    peer_value: float | None = None
    low: float | None = None
    high: float | None = None
    of: Mapping[str, str | int] = field(default_factory=dict)

    @classmethod
    def median(cls, name: str, values: Sequence[float], unit: str, bound: float | None = None, **more: Any) -> Self:
        """Makes a measurement from one value per round."""
        return cls(name, statistics.median(values), unit, bound, **more, low=min(values), high=max(values))

    @classmethod
    def beside(
        cls,
        name: str,
        values: Sequence[float],
        unit: str,
        peer: str,
        peer_values: Sequence[float],
        limit: float | None = None,
        *,
        at_least: bool = False,
    ) -> Self:
        """Makes a measurement from one value per round, ours and a peer's; ``limit`` is a multiple of the peer's."""
        value = statistics.median(peer_values)
        bound = None if limit is None else limit * value
        return cls.median(name, values, unit, bound, at_least=at_least, peer=peer, peer_value=value)

    @property
    def reached(self) -> bool:
        """True if ``value`` meets ``bound``; False for NaN."""
        if self.bound is None:
            return True
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    @property
    def peer_ratio(self) -> float | None:
        """``value`` divided by ``peer_value``; None without a peer, or when its value is zero."""
        return self.value / self.peer_value if self.peer_value else None

    def to_json(self) -> str:
        """A line of JSON, with numbers rounded to four digits and NaN as null."""
        found = {"name": self.name, **self.of} | asdict(self)
        found |= {"peer_ratio": self.peer_ratio, "reached": self.reached}
        del found["of"]
        return json.dumps({k: _digits(v) if isinstance(v, float) else v for k, v in found.items()})


def measurements_table(measurements: Iterable[Measurement], more: Mapping[str, str] = MappingProxyType({})) -> Table:
    """A table with a line per measurement, and a column per key of ``of``. What all have alike is in the caption.

    Columns without any content are left out.

    Args:
        more: title of a further column -> attribute that it shows, of the rows that have it.
    """
    shown = list(measurements)
    names = dict.fromkeys(key for one in shown for key in one.of)
    values = {key: {one.of[key] for one in shown if key in one.of} for key in names}
    keys = [key for key, found in values.items() if len(found) > 1]
    alike = ", ".join(f"{key} {found.pop()}" for key, found in values.items() if len(found) == 1)
    rows = []
    for one in shown:
        bound = "" if one.bound is None else f"{'≥' if one.at_least else '≤'} {one.bound:,g}"
        peer = "" if one.peer_value is None else f"{one.peer}: {_number(one.peer_value)}"
        if one.peer_ratio is not None:
            peer += f" ({_number(one.peer_ratio)} x)"
        rounds = "" if one.low is None or one.high is None else f"{_number(one.low)} to {_number(one.high)}"
        verdict = bound if one.reached else f"{bound}, missed"
        about = [str(one.of.get(key, "")) for key in keys]
        cells = [_number(getattr(one, attribute, None)) for attribute in more.values()]
        rows.append((one.name, *about, _number(one.value), one.unit, rounds, verdict, peer, *cells))
    table = Table(caption=alike or None)
    heads = ("", *keys, "measured", "", "rounds", "bound", "peer", *more)
    columns = [(head, cells) for head, *cells in zip(heads, *rows, strict=True) if any(cells)]
    for head, _ in columns:
        table.add_column(head, justify="left" if head in ("", "peer") else "right", no_wrap=True)
    for row in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*row)
    return table


def print_measurements(
    measurements: Sequence[Measurement], as_json: bool, more: Mapping[str, str] = MappingProxyType({})
) -> int:
    """Prints a JSON line per measurement, or a table. Returns the exit code: 1 when one misses its bound.

    ``more`` is as in ``measurements_table``.
    """
    if as_json:
        for one in measurements:
            click.echo(one.to_json())
    else:
        console().print(measurements_table(measurements, more))
    return 0 if all(one.reached for one in measurements) else 1


def value_text(value: float | None, unit: str) -> str:
    """Formats a value or a bound for a message."""
    return "not measured" if value is None or value != value else f"{value:,.4g} {unit}".strip()


def _digits(value: float) -> float | None:
    return None if value != value else float(f"{value:.4g}")


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return "–" if value != value else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
