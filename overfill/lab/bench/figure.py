"""A measured number, the goal that it is held against, and what something else does in the same run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import click
from rich.table import Table

from overfill.cli.output import console


@dataclass(frozen=True, slots=True)
class Figure:
    """Attributes:
    name, value, unit: what was measured.
    bound: what it is to stay within: at most so much, or at least where ``at_least``; None: nothing is asked of it.
    peer, peer_value: what was measured beside it.
    low, high: of the rounds whose median ``value`` is: least and most, or as the benchmark says.
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

    @classmethod
    def median(cls, name: str, values: Sequence[float], unit: str, bound: float | None = None, **more: Any) -> Figure:
        """Of one value per round."""
        return cls(name, statistics.median(values), unit, bound, **more, low=min(values), high=max(values))

    @property
    def reached(self) -> bool:
        """Whether the bound is kept; not by NaN."""
        if self.bound is None:
            return True
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def to_json(self) -> str:
        """One line; numbers with four digits, NaN as null."""
        found = asdict(self) | {"reached": self.reached}
        return json.dumps({k: _digits(v) if isinstance(v, float) else v for k, v in found.items()})


def figures_table(figures: Iterable[Figure]) -> Table:
    """A line per figure."""
    table = Table()
    for column in ("", "measured", "", "rounds", "asked", "peer"):
        table.add_column(column, justify="left" if column in ("", "peer") else "right", no_wrap=True)
    for figure in figures:
        asked = "" if figure.bound is None else f"{'≥' if figure.at_least else '≤'} {figure.bound:,g}"
        peer = "" if figure.peer_value is None else f"{figure.peer}: {_number(figure.peer_value)}"
        rounds = "" if figure.low is None or figure.high is None else f"{_number(figure.low)} to {_number(figure.high)}"
        verdict = asked if figure.reached else f"{asked}, missed"
        table.add_row(figure.name, _number(figure.value), figure.unit, rounds, verdict, peer)
    return table


def print_figures(figures: Sequence[Figure], as_json: bool) -> int:
    """A line of JSON for each, or a table of all. Returns the exit code: 1 when one misses its bound."""
    if as_json:
        for figure in figures:
            click.echo(figure.to_json())
    else:
        console().print(figures_table(figures))
    return 0 if all(figure.reached for figure in figures) else 1


def _digits(value: float) -> float | None:
    return None if value != value else float(f"{value:.4g}")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
