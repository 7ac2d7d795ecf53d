"""Reports a trial as JSON, from which the faults can be replayed, and as tables."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from overfill.lab.chaos.fault_plan import FAULTS, KV_PHASES, PHASES
from overfill.lab.chaos.load import RequestResult
from overfill.lab.chaos.memory import growth
from overfill.lab.chaos.trial import TrialResult
from overfill.pair.reference import Summary
from overfill.routing.tier import NO_FALLBACK

FREED_WITHIN = 2.0
"""Maximum seconds from the last answer until every block is free."""

_ALL_PHASES = (*PHASES, *KV_PHASES)


@dataclass(frozen=True, slots=True)
class TrialReport:
    """A judged trial.

    Attributes:
        summary: Comparison of all answers with the reference.
        wrong: Requests whose answers are wrong.
        settings: Options of the command.
        needed: Sources of KV, "peer" and "disk", and revisions, without which the trial proves nothing.
    """

    result: TrialResult
    summary: Summary
    wrong: set[str]
    settings: dict[str, Any]
    needed: Sequence[str] = ()

    @property
    def unused(self) -> list[str]:
        """The needed sources from which no token came, and the needed revisions without an answer."""
        used = self.result.cached_shares() | self.result.revisions()
        return [source for source in self.needed if not used.get(source)]

    @property
    def passed(self) -> bool:
        """True if every request was answered right or refused with a reason, and the stack ended clean.

        No answer may have changed its tier unasked. Clean means: all blocks were free within 2 s, no worker leaked or
        is missing, every process exited as it should. KV came from all needed sources, and answers from all needed
        revisions.
        """
        result = self.result
        freed = result.freed_after is not None and result.freed_after <= FREED_WITHIN
        problems = [result.leaked, result.unclean_exits, result.ended("failed"), result.tier_problems, self.unused]
        return self.summary.passed and freed and not any(problems)

    def cells(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Returns fault -> phase -> counts of the faults and of the requests held for them."""
        by_id = {one.request: one for one in self.result.results}
        cells: dict[str, dict[str, dict[str, Any]]] = {}
        for kind, phase in itertools.product(FAULTS, _ALL_PHASES):
            if injected := [one for one in self.result.injected if (one.kind, one.phase) == (kind, phase)]:
                held = [by_id[one.request] for one in injected if one.request in by_id]
                cells.setdefault(kind, {})[phase] = {"strikes": len(injected), **self._cell(held)}
        return cells

    def tiers(self) -> dict[str, dict[str, int]]:
        """Returns tier -> counts of the requests that asked it. Empty if all asked the same one."""
        tiers = sorted({one.tier for one in self.result.results})
        each = {tier: [one for one in self.result.results if one.tier == tier] for tier in tiers}
        return {tier: self._tier(asked) for tier, asked in each.items()} if len(each) > 1 else {}

    def _tier(self, asked: Sequence[RequestResult]) -> dict[str, int]:
        answered = [one for one in asked if one.ending == "answered"]
        return {
            "requests": len(asked),
            "answers": len(answered),
            "right": self._count_right(answered),
            "migrations": sum(one.answer.migrations for one in answered),
            "with_fallback": sum(one.fallback != NO_FALLBACK for one in answered),
            "changed_tier": sum(one.changed_tier for one in answered),
            "changed_within": sum(len(one.answer.parts) > 1 for one in answered),
        }

    def _count_right(self, answered: Iterable[RequestResult]) -> int:
        return sum(one.request not in self.wrong for one in answered)

    def as_dict(self) -> dict[str, Any]:
        result, pauses = self.result, self.result.pauses(migrated=True)
        endings = Counter(one.ending for one in result.results)
        errors = Counter(one.error for one in result.results if one.error)
        sampled = [one for one in result.ended("answered") if not one.sampling.greedy]
        moved = sum(one.answer.migrations > 0 for one in sampled)
        return {
            "passed": self.passed,
            "settings": self.settings,
            **{f"{stage}_engine": result.engines(stage) for stage in ("prefill", "decode")},
            "seconds": round(result.seconds, 1),
            "capacity_per_second": result.capacity,
            "requests_per_second": result.rate,
            "requests": len(result.results),
            "endings": dict(endings),
            **asdict(self.summary),
            "errors": dict(errors.most_common(20)),
            "faults": len(result.injected),
            "missed": [asdict(fault) for fault in result.missed],
            "migrations": result.migrations,
            "migrated_answers": len(pauses),
            "sampled": {"answers": len(sampled), "right": self._count_right(sampled), "migrated": moved},
            "pause_p50": _quantile(pauses, 0.5),
            "pause_p95": _quantile(pauses, 0.95),
            "pause_max": _quantile(pauses, 1.0),
            "usual_pause": _quantile(result.pauses(migrated=False), 0.5),
            "blocks_freed_after": None if result.freed_after is None else round(result.freed_after, 3),
            "leaked": result.leaked,
            "unclean_exits": result.unclean_exits,
            "cached_shares": _rounded(result.cached_shares()),
            "cached_shares_after_faults": _rounded(result.cached_shares(result.calm_from)),
            "unused_sources": self.unused,
            "revisions": {} if len(found := result.revisions()) < 2 else found,
            "tiers": self.tiers(),
            "tier_problems": result.tier_problems,
            "cells": self.cells(),
            "lives": growth(result.memory_samples),
            "strikes": [asdict(one) for one in result.injected],
        }

    def tables(self) -> list[Table]:
        """Returns tables: totals; tiers (if several); how held requests ended, per fault and phase; memory, if long."""
        report = self.as_dict()
        cells, tiers = report["cells"], report["tiers"]
        left_out = ("settings", "cells", "strikes", "lives", "tiers")
        figures = Table(box=None, show_header=False)
        for name, value in report.items():
            if name not in left_out and value not in ([], {}, None):
                figures.add_row(name.replace("_", " "), str(value))
        phases = [one for one in _ALL_PHASES if one in PHASES or any(one in of_fault for of_fault in cells.values())]
        return [
            figures,
            *_table("requests by the tier that they asked", [{"tier": tier, **tiers[tier]} for tier in tiers]),
            *_table(
                "faults: right/held requests, longest pause in seconds",
                [{"fault": one, **{p: _in_words(cells[one].get(p)) for p in phases}} for one in cells],
            ),
            *_table("memory and open files of processes, from one minute after their start", report["lives"]),
        ]

    def _cell(self, held: Sequence[RequestResult]) -> dict[str, Any]:
        endings = Counter(one.ending for one in held)
        answered = [one for one in held if one.ending == "answered"]
        return {
            "in_phase": len(held),
            "right": self._count_right(answered),
            "wrong": sum(one.request in self.wrong for one in held),
            "vanished": endings["vanished"],
            "refused": endings["refused"] + endings["given up"],
            "failed": endings["failed"],
            "pause_max": _quantile([one.longest_pause for one in answered if not one.slow], 1.0),
        }


def _table(title: str, rows: Sequence[Mapping[str, object]]) -> list[Table]:
    """Returns a table with a column per key, of which the first names the row; nothing for no rows."""
    if not rows:
        return []
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(rows[0]):
        table.add_column(column.replace("_", " "), justify="right" if number else "left")
    for row in rows:
        table.add_row(*map(str, row.values()))
    return [table]


def _quantile(pauses: Sequence[float], share: float) -> float | None:
    """Returns the ``share`` quantile (0 to 1) of ``pauses``; None if there are none."""
    ordered = sorted(pauses)
    return round(ordered[round(share * (len(ordered) - 1))], 3) if ordered else None


def _rounded(shares: dict[str, float]) -> dict[str, float]:
    return {source: round(share, 3) for source, share in shares.items()}


def _in_words(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    bad = "".join(f", {cell[name]} {name}" for name in ("wrong", "failed", "refused") if cell[name])
    right = f"{cell['right']}/{cell['in_phase'] - cell['vanished']}" if cell["in_phase"] > cell["vanished"] else "–"
    pause = "" if cell["pause_max"] is None else f" {cell['pause_max']:.1f}"
    return f"{cell['strikes']}: {right}{bad}{pause}"
