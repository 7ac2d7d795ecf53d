"""Reports a trial as JSON, from which the faults can be replayed, and as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from overfill.lab.chaos.fault_plan import FAULTS, KV_PHASES, PHASES
from overfill.lab.chaos.load import RequestResult
from overfill.lab.chaos.memory import lifetimes
from overfill.lab.chaos.trial import InjectedFault, TrialResult
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
        whole = freed and not result.leaked and not result.unclean_exits
        return (
            self.summary.passed
            and not result.ended("failed")
            and not result.tier_problems
            and whole
            and not self.unused
        )

    def cells(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Returns fault -> phase -> counts of the faults and of the requests held for them."""
        by_id = {one.request: one for one in self.result.results}
        found: dict[str, dict[str, list[InjectedFault]]] = {}
        for one in self.result.injected:
            found.setdefault(one.fault.kind, {}).setdefault(one.fault.phase, []).append(one)
        return {
            fault: {phase: self._cell(found[fault][phase], by_id) for phase in _ALL_PHASES if phase in found[fault]}
            for fault in FAULTS
            if fault in found
        }

    def tiers(self) -> dict[str, dict[str, int]]:
        """Returns tier -> counts of the requests that asked it. Empty if all asked the same one."""
        found: dict[str, list[RequestResult]] = {}
        for one in sorted(self.result.results, key=lambda one: one.tier):
            found.setdefault(one.tier, []).append(one)
        return {tier: self._tier(asked) for tier, asked in found.items()} if len(found) > 1 else {}

    def _tier(self, asked: Sequence[RequestResult]) -> dict[str, int]:
        answered = [one for one in asked if one.ending == "answered"]
        return {
            "requests": len(asked),
            "answers": len(answered),
            "right": sum(one.request not in self.wrong for one in answered),
            "migrations": sum(one.migrations for one in answered),
            "with_fallback": sum(one.fallback != NO_FALLBACK for one in answered),
            "changed_tier": sum(one.changed_tier for one in answered),
            "changed_within": sum(len(one.parts) > 1 for one in answered),
        }

    def _sampled(self) -> dict[str, int]:
        """Returns counts of the sampled answers. Empty if there are none."""
        answered = [one for one in self.result.ended("answered") if not one.sampling.greedy]
        if not answered:
            return {}
        return {
            "answers": len(answered),
            "right": sum(one.request not in self.wrong for one in answered),
            "migrated": sum(one.migrations > 0 for one in answered),
        }

    def as_dict(self) -> dict[str, Any]:
        result, delays = self.result, self.result.delays()
        endings = Counter(one.ending for one in result.results)
        errors = Counter(one.error for one in result.results if one.error)
        return {
            "passed": self.passed,
            "settings": self.settings,
            **{f"{stage}_engine": engine for stage, engine in result.engines.items()},
            "seconds": round(result.seconds, 1),
            "capacity_per_second": result.capacity,
            "requests_per_second": result.rate,
            "requests": len(result.results),
            "endings": dict(endings),
            "answers": self.summary.answers,
            "correct": self.summary.correct,
            "identical": self.summary.identical,
            "ties": self.summary.ties,
            "errors": dict(errors.most_common(20)),
            "faults": len(result.injected),
            "missed": [fault.as_dict() for fault in result.missed],
            "unavailable": result.unavailable,
            "migrations": result.migrations,
            "migrated_answers": len(delays),
            "sampled": self._sampled(),
            "delay_p50": _round(quantile(delays, 0.5)),
            "delay_p95": _round(quantile(delays, 0.95)),
            "delay_max": _round(quantile(delays, 1.0)),
            "blocks_freed_after": _round(result.freed_after),
            "leaked": result.leaked,
            "unclean_exits": result.unclean_exits,
            "cached_shares": _rounded(result.cached_shares()),
            "cached_shares_after_faults": _rounded(result.cached_shares(result.calm_from)),
            "unused_sources": self.unused,
            "revisions": {} if len(found := result.revisions()) < 2 else found,
            "tiers": self.tiers(),
            "tier_problems": result.tier_problems,
            "cells": self.cells(),
            "lives": [asdict(lifetime) for lifetime in lifetimes(result.memory_samples)],
            "strikes": [one.as_dict() for one in result.injected],
        }

    def tables(self) -> list[Table]:
        """Returns tables: totals; tiers (if several); how held requests ended, per fault and phase; memory, if long."""
        return [self._figures(), *self._tier_table(), self._matrix(), *self._memory()]

    def _cell(self, injected: Sequence[InjectedFault], by_id: dict[str, RequestResult]) -> dict[str, Any]:
        held = [by_id[one.request] for one in injected if one.request in by_id]
        usual = self.result.usual_pause()
        delays = sorted(max(0.0, o.longest_pause - usual) for o in held if o.ending == "answered" and not o.slow)
        return {
            "strikes": len(injected),
            "in_phase": len(held),
            "right": sum(o.ending == "answered" and o.request not in self.wrong for o in held),
            "wrong": sum(o.request in self.wrong for o in held),
            "vanished": sum(o.ending == "vanished" for o in held),
            "refused": sum(o.ending in ("refused", "given up") for o in held),
            "failed": sum(o.ending == "failed" for o in held),
            "delay_p50": _round(quantile(delays, 0.5)),
            "delay_max": _round(quantile(delays, 1.0)),
            "victims": dict(Counter(one.fault.target for one in injected)),
        }

    def _figures(self) -> Table:
        table = Table(box=None, show_header=False)
        left_out = ("settings", "cells", "strikes", "lives", "tiers")
        for name, value in self.as_dict().items():
            if name not in left_out and value not in ([], {}, None):
                table.add_row(name.replace("_", " "), str(value))
        return table

    def _matrix(self) -> Table:
        table = Table(title="faults: right/held requests, longest delay in seconds", title_justify="left")
        table.add_column("fault")
        shown = (*PHASES, *(one for one in KV_PHASES if any(one in phases for phases in self.cells().values())))
        for phase in shown:
            table.add_column(phase, justify="right")
        for fault, phases in self.cells().items():
            table.add_row(fault, *(_in_words(phases.get(phase)) for phase in shown))
        return table

    def _tier_table(self) -> list[Table]:
        found = self.tiers()
        if not found:
            return []
        table = Table(title="requests by the tier that they asked", title_justify="left")
        table.add_column("tier")
        for name in next(iter(found.values())):
            table.add_column(name.replace("_", " "), justify="right")
        for tier, counts in found.items():
            table.add_row(tier, *map(str, counts.values()))
        return [table]

    def _memory(self) -> list[Table]:
        found = lifetimes(self.result.memory_samples)
        if not found:
            return []
        table = Table(title="memory of processes, from one minute after their start", title_justify="left")
        for column in ("process", "minutes", "MiB", "growth, MiB", "open files", "growth, files"):
            table.add_column(column, justify="right")
        for lifetime in found:
            table.add_row(
                lifetime.name,
                f"{lifetime.seconds / 60:.1f}",
                f"{lifetime.rss / 2**20:.1f}",
                f"{lifetime.growth / 2**20:+.1f}",
                str(lifetime.files),
                f"{lifetime.more_files:+d}",
            )
        return [table]


def quantile(ordered: Sequence[float], share: float) -> float | None:
    """Returns the ``share`` quantile (0 to 1) of ascending values. None if there are no values."""
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))] if ordered else None


def _rounded(shares: dict[str, float]) -> dict[str, float]:
    return {source: round(share, 3) for source, share in shares.items()}


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _in_words(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    bad = "".join(f", {cell[name]} {name}" for name in ("wrong", "failed", "refused") if cell[name])
    right = f"{cell['right']}/{cell['in_phase'] - cell['vanished']}" if cell["in_phase"] > cell["vanished"] else "–"
    delay = "" if cell["delay_max"] is None else f" {cell['delay_max']:.1f}"
    return f"{cell['strikes']}: {right}{bad}{delay}"
