"""Rows that compare the first server with each other one under the same load. JSON and table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from rich.table import Table

from overfill.lab.traffic.outcome import Objective, Outcome, figures


@dataclass(frozen=True, slots=True)
class LoadShape:
    """The load that every server received.

    Attributes:
        source: File name of the trace, or the kind of synthetic arrivals.
        rate: Mean requests per second. None means that all requests arrive at once.
        concurrency: Maximum concurrent requests. None means no limit.
        prompt_tokens, output_tokens: Mean lengths.
        objective: The objective, as text.
    """

    source: str
    requests: int
    rate: float | None
    concurrency: int | None
    prompt_tokens: float
    output_tokens: float
    objective: str | None


@dataclass(frozen=True, slots=True)
class ServeRow:
    """A figure of ``target`` beside the same figure of ``peer``, another target. Latencies are in seconds."""

    name: str
    target: str
    value: float | None
    unit: str
    peer: str | None
    peer_value: float | None
    load: LoadShape

    @property
    def peer_ratio(self) -> float | None:
        """The target's value divided by the peer's."""
        return None if self.value is None or not self.peer_value else self.value / self.peer_value

    def to_json(self) -> str:
        """A line of JSON, with numbers rounded to four digits."""
        given = asdict(self)
        given = given.pop("load") | given | {"peer_ratio": self.peer_ratio}
        return json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in given.items()})


def serve_rows(
    outcomes: Mapping[str, Sequence[Outcome]], objective: Objective | None, load: LoadShape
) -> list[ServeRow]:
    """Makes a row for every figure of the first target and every other target."""
    first, *others = outcomes
    found = {name: figures(of_one, objective) for name, of_one in outcomes.items()}
    rows = []
    for index, figure in enumerate(found[first]):
        beside: list[tuple[str | None, float | None]] = [(name, found[name][index].value) for name in others]
        beside = beside or [(None, None)]
        rows += [ServeRow(figure.name, first, figure.value, figure.unit, peer, value, load) for peer, value in beside]
    return rows


def serve_table(rows: Sequence[ServeRow]) -> Table:
    """A table with a line per figure and a column per target."""
    peers = list(dict.fromkeys(row.peer for row in rows if row.peer is not None))
    table = Table()
    table.add_column("")
    for name in (rows[0].target, *peers):
        table.add_column(name, justify="right")
    by_name: dict[str, list[ServeRow]] = {}
    for row in rows:
        by_name.setdefault(row.name, []).append(row)
    for name, of_figure in by_name.items():
        cells = [_cell(of_figure[0].value, of_figure[0].unit)]
        cells += [_cell(row.peer_value, row.unit) for row in of_figure if row.peer is not None]
        table.add_row(f"{name} ({of_figure[0].unit})" if of_figure[0].unit != "s" else f"{name} (ms)", *cells)
    return table


def _cell(value: float | None, unit: str) -> str:
    if value is None:
        return "–"
    return f"{1e3 * value:,.0f}" if unit == "s" else f"{value:,.3g}"
