"""A trial in numbers: as JSON, from which it can be run again, and as tables. No judgement but ``passed``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from overfill.lab.chaos.load import Outcome
from overfill.lab.chaos.strikes import FAULTS, PHASES
from overfill.lab.chaos.trial import Result, Struck
from overfill.lab.chaos.watch import lives
from overfill.pair.reference import Summary

FREED_WITHIN = 2.0
"""Seconds from the last answer in which every block has to be free."""


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a trial, judged.

    Attributes:
        wrong: requests whose answers are wrong.
        settings: of the command, to run it again.
    """

    result: Result
    summary: Summary
    wrong: set[str]
    settings: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Every request was answered right or refused in so many words, and nothing is left behind."""
        result = self.result
        freed = result.freed_after is not None and result.freed_after <= FREED_WITHIN
        whole = freed and not result.leaked and not result.unclean_exits
        return self.summary.passed and not result.ended("failed") and whole

    def cells(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Fault -> phase -> what came of its strikes."""
        by_id = {outcome.request: outcome for outcome in self.result.outcomes}
        found: dict[str, dict[str, list[Struck]]] = {}
        for one in self.result.struck:
            found.setdefault(one.strike.fault, {}).setdefault(one.strike.phase, []).append(one)
        return {
            fault: {phase: self._cell(found[fault][phase], by_id) for phase in PHASES if phase in found[fault]}
            for fault in FAULTS
            if fault in found
        }

    def as_dict(self) -> dict[str, Any]:
        result, delays = self.result, self.result.delays()
        endings = Counter(outcome.ending for outcome in result.outcomes)
        errors = Counter(outcome.error for outcome in result.outcomes if outcome.error)
        return {
            "passed": self.passed,
            "settings": self.settings,
            "seconds": round(result.seconds, 1),
            "capacity_per_second": result.capacity,
            "requests_per_second": result.rate,
            "requests": len(result.outcomes),
            "endings": dict(endings),
            "answers": self.summary.answers,
            "correct": self.summary.correct,
            "identical": self.summary.identical,
            "ties": self.summary.ties,
            "errors": dict(errors.most_common(20)),
            "faults": len(result.struck),
            "missed": [asdict(strike) for strike in result.missed],
            "unavailable": result.unavailable,
            "migrations": result.migrations,
            "migrated_answers": len(delays),
            "delay_p50": _round(quantile(delays, 0.5)),
            "delay_p95": _round(quantile(delays, 0.95)),
            "delay_max": _round(quantile(delays, 1.0)),
            "blocks_freed_after": _round(result.freed_after),
            "leaked": result.leaked,
            "unclean_exits": result.unclean_exits,
            "cells": self.cells(),
            "lives": [asdict(life) for life in lives(result.samples)],
            "strikes": [one.as_dict() for one in result.struck],
        }

    def tables(self) -> list[Table]:
        """The figures; how the request that was held for a strike ended, per fault and phase; memory."""
        return [self._figures(), self._matrix(), *self._memory()]

    def _cell(self, struck: Sequence[Struck], by_id: dict[str, Outcome]) -> dict[str, Any]:
        held = [by_id[one.request] for one in struck if one.request in by_id]
        usual = self.result.usual_pause()
        delays = sorted(max(0.0, o.longest_pause - usual) for o in held if o.ending == "answered" and not o.slow)
        return {
            "strikes": len(struck),
            "in_phase": len(held),
            "right": sum(o.ending == "answered" and o.request not in self.wrong for o in held),
            "wrong": sum(o.request in self.wrong for o in held),
            "vanished": sum(o.ending == "vanished" for o in held),
            "refused": sum(o.ending in ("refused", "given up") for o in held),
            "failed": sum(o.ending == "failed" for o in held),
            "delay_p50": _round(quantile(delays, 0.5)),
            "delay_max": _round(quantile(delays, 1.0)),
            "victims": dict(Counter(one.victim.partition("-")[0] for one in struck)),
        }

    def _figures(self) -> Table:
        table = Table(box=None, show_header=False)
        left_out = ("settings", "cells", "strikes", "lives")
        for name, value in self.as_dict().items():
            if name not in left_out and value not in ([], {}, None):
                table.add_row(name.replace("_", " "), str(value))
        return table

    def _matrix(self) -> Table:
        table = Table(title="strikes: right/held requests, longest delay in seconds", title_justify="left")
        table.add_column("fault")
        for phase in PHASES:
            table.add_column(phase, justify="right")
        for fault, phases in self.cells().items():
            table.add_row(fault, *(_in_words(phases.get(phase)) for phase in PHASES))
        return table

    def _memory(self) -> list[Table]:
        found = lives(self.result.samples)
        if not found:
            return []
        table = Table(title="memory of processes from a minute after their start", title_justify="left")
        for column in ("process", "minutes", "MiB", "growth, MiB", "open files", "more of them"):
            table.add_column(column, justify="right")
        for life in found:
            table.add_row(
                life.name,
                f"{life.seconds / 60:.1f}",
                f"{life.rss / 2**20:.1f}",
                f"{life.growth / 2**20:+.1f}",
                str(life.files),
                f"{life.more_files:+d}",
            )
        return [table]


def quantile(ordered: Sequence[float], share: float) -> float | None:
    """None of nothing."""
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))] if ordered else None


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _in_words(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    bad = "".join(f", {cell[name]} {name}" for name in ("wrong", "failed", "refused") if cell[name])
    right = f"{cell['right']}/{cell['in_phase'] - cell['vanished']}" if cell["in_phase"] > cell["vanished"] else "–"
    delay = "" if cell["delay_max"] is None else f" {cell['delay_max']:.1f}"
    return f"{cell['strikes']}: {right}{bad}{delay}"
