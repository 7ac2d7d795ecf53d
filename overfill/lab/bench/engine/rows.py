"""Rows of the engine benchmarks: a value, its bound, and vLLM's value. JSON and table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.table import Table


@dataclass(frozen=True, slots=True)
class Row:
    """A figure, its bound, and vLLM's where it was measured in the same run, turn by turn.

    Attributes:
        name: Name of the figure, such as ``decode_full``.
        batch: Sequences in a step, or prompts at once.
        bound: Highest value that this machine allows, computed from ``bandwidth`` and ``matrix_rate``.
        spread, peer_spread: Interquartile range divided by the median.
        context: Mean context of a decode step, or length of a prompt, in tokens.
        dtype: Data type of activations.
        weights: Data type of the model's weights.
        kv_cache: Element type of the KV cache.
        bandwidth, matrix_rate: Bytes and floating-point operations per second of this machine in this run.
        peer, peer_value: "vllm", and its value. None means that it was not measured.
    """

    name: str
    batch: int
    value: float
    unit: str
    bound: float
    spread: float
    pair: str
    context: int
    dtype: str
    weights: str
    kv_cache: str
    threads: int
    device: str
    bandwidth: float
    matrix_rate: float
    peer: str | None = None
    peer_value: float | None = None
    peer_spread: float | None = None

    @property
    def ratio(self) -> float:
        """Share of the bound that was reached."""
        return self.value / self.bound

    @property
    def peer_ratio(self) -> float | None:
        """Our value divided by the peer's."""
        return None if self.peer_value is None else self.value / self.peer_value

    def to_json(self) -> str:
        """A line of JSON, with numbers rounded to four digits."""
        given: dict[str, object] = dict.fromkeys(
            ("name", "batch", "value", "unit", "bound", "ratio", "peer", "peer_value")
        )
        given |= asdict(self) | {"ratio": self.ratio, "peer_ratio": self.peer_ratio}
        return json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in given.items()})


def rows_table(rows: Sequence[Row]) -> Table:
    """A table with a line per figure; the last column has the peer's value, and ours divided by it."""
    peers = list(dict.fromkeys(row.peer for row in rows if row.peer is not None))
    table = Table()
    for column in ("", "batch", "context", "ours", "± %", "bound", "of bound", *peers):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        kv_note = "" if row.kv_cache == row.dtype else f", {row.kv_cache} KV"
        table.add_row(
            f"{row.name}, {row.weights}{kv_note}" if row.unit != "x" else row.name,
            str(row.batch),
            str(row.context),
            _number(row.value, row.unit),
            f"{50 * row.spread:.0f}",
            _number(row.bound, row.unit),
            f"{row.ratio:.2f}",
            *(_beside(row) for _ in peers),
        )
    return table


def _beside(row: Row) -> str:
    if row.peer_value is None or row.peer_ratio is None:
        return "–"
    return f"{_number(row.peer_value, row.unit)} ({row.peer_ratio:.2f}×)"


def _number(value: float, unit: str) -> str:
    return f"{value:.2f}×" if unit == "x" else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
