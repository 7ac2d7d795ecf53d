"""Figures of several servers under the same load, as rows: the first server beside each other one. JSON and table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from rich.table import Table

from overfill.lab.traffic.outcome import Objective, Outcome, figures


@dataclass(frozen=True, slots=True)
class LoadShape:
    """What all servers were asked.

    Attributes:
        source: a trace's file name, or how arrivals were made.
        rate: requests per second, on average; None where they come as fast as they are answered.
        prompt_tokens, output_tokens: means.
        saturates: the target that this rate saturates, as the lowest one tried, when it was chosen so.
        not_saturated: the target that no rate up to this one saturated, when one was looked for that does.
    """

    source: str
    requests: int
    rate: float | None
    concurrency: int | None
    prompt_tokens: float
    output_tokens: float
    slo: str | None
    saturates: str | None = None
    not_saturated: str | None = None


@dataclass(frozen=True, slots=True)
class ServeRow:
    """A figure of ``target`` beside ``peer``'s. Latencies are seconds; ``failed`` counts requests."""

    name: str
    target: str
    value: float | None
    unit: str
    peer: str | None
    peer_value: float | None
    load: LoadShape

    @property
    def peer_ratio(self) -> float | None:
        """How many times the peer's value ours is."""
        return None if self.value is None or not self.peer_value else self.value / self.peer_value

    def to_json(self) -> str:
        """One line; numbers with four digits."""
        given = asdict(self)
        given = given.pop("load") | given | {"peer_ratio": self.peer_ratio}
        return json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in given.items()})


def serve_rows(
    outcomes: Mapping[str, Sequence[Outcome]], objective: Objective | None, load: LoadShape
) -> list[ServeRow]:
    """Rows for every figure of the first target, one per other target."""
    first, *others = outcomes
    found = {name: figures(of_one, objective) for name, of_one in outcomes.items()}
    rows = []
    for place, figure in enumerate(found[first]):
        beside: list[tuple[str | None, float | None]] = [(name, found[name][place].value) for name in others]
        beside = beside or [(None, None)]
        rows += [ServeRow(figure.name, first, figure.value, figure.unit, peer, value, load) for peer, value in beside]
    return rows


def serve_table(rows: Sequence[ServeRow]) -> Table:
    """A line per figure, a column per target."""
    peers = list(dict.fromkeys(row.peer for row in rows if row.peer is not None))
    table = Table()
    table.add_column("")
    for name in (rows[0].target, *peers):
        table.add_column(name, justify="right")
    figures_: dict[str, list[ServeRow]] = {}
    for row in rows:
        figures_.setdefault(row.name, []).append(row)
    for name, same in figures_.items():
        cells = [_cell(same[0].value, same[0].unit)]
        cells += [_cell(row.peer_value, row.unit) for row in same if row.peer is not None]
        table.add_row(f"{name} ({same[0].unit})" if same[0].unit != "s" else f"{name} (ms)", *cells)
    return table


def _cell(value: float | None, unit: str) -> str:
    if value is None:
        return "–"
    return f"{1e3 * value:,.0f}" if unit == "s" else f"{value:,.3g}"
