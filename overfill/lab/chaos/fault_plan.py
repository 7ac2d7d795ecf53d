"""Plans of faults: drawn from a seed, listed for a matrix, or read from the report of an earlier trial."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

FaultName = Literal[
    "kill", "drain", "freeze", "partition", "delay", "loss", "bandwidth", "corrupt", "clock", "disk", "slow", "vanish"
]
Phase = Literal["queued", "reserving", "prefill", "handoff", "decode", "finishing", "lending", "saving"]
Target = Literal["router", "prefill", "decode", "client"]

FAULTS: tuple[FaultName, ...] = get_args(FaultName)
PHASES: dict[Phase, Target] = {
    "queued": "router", "reserving": "decode", "prefill": "prefill", "handoff": "decode", "decode": "decode",
    "finishing": "decode",
}  # fmt: skip
"""Phases of every request -> the stage whose processes report that a request is in it."""

KV_PHASES: dict[Phase, Target] = {"lending": "prefill", "saving": "prefill"}
"""Phases that some requests cause in other processes: a worker lends KV that another pulls, or writes KV to disk. The
process with the loan or the file counts as the one that prefills."""

TARGETS: dict[FaultName, tuple[Target, ...]] = {
    **dict.fromkeys(FAULTS, ("router", "prefill", "decode")),
    "corrupt": ("prefill", "decode"),  # either end of a handoff
    "slow": ("client",),
    "vanish": ("client",),
}
"""Fault -> the targets that it can hit."""

_SECONDS: dict[FaultName, tuple[float, float]] = {
    # The range includes the 10 s after which a silent peer is given up.
    "freeze": (1.0, 13.0),
    "partition": (1.0, 13.0),
    "delay": (1.0, 4.0),
    "loss": (1.0, 4.0),
    "bandwidth": (1.0, 4.0),
    "clock": (1.0, 3.0),
    "disk": (1.0, 4.0),
    "vanish": (1.0, 13.0),  # of a host
}
_FREEZE_OF_RANKS = (1.0, 30.0)  # the same, beyond the time after which a worker must have given up a silent rank
_MAX_JUMP = 3600.0  # seconds


@dataclass(frozen=True, slots=True)
class PlannedFault:
    """One fault to inject.

    Attributes:
        number: Index in the plan.
        phase: Phase of a request that the fault waits for.
        target: Side of that request on which the fault is injected.
        seconds: Duration; 0 for faults that have none.
        jump: Seconds by which the clock is set forward (positive) or back (negative).
        after: Seconds of rest before the fault. 0 means as soon as possible.
        ranks: Ranks of the worker that are hit in place of its own process.
        worker: Name of the process to hit; empty means one that works for the request.
    """

    number: int
    kind: FaultName
    phase: Phase
    target: Target
    seconds: float = 0.0
    jump: float = 0.0
    after: float = 0.0
    ranks: tuple[int, ...] = ()
    worker: str = ""


@dataclass(frozen=True, slots=True)
class FaultChoice:
    """The faults among which a plan chooses.

    Attributes:
        targets: Targets to prefer: a fault that can hit one of these hits no other.
        hosts: Whether each process runs on a host of its own. A host can vanish with its process.
        num_ranks: Target -> ranks of each of its workers, where these have any.
    """

    faults: Sequence[FaultName] = FAULTS
    phases: Sequence[Phase] = tuple(PHASES)
    targets: Sequence[Target] = ()
    hosts: bool = False
    num_ranks: Mapping[Target, int] = field(default_factory=dict)

    def targets_of(self, fault: FaultName) -> tuple[Target, ...]:
        """Returns the targets that the fault may hit."""
        possible = get_args(Target) if self.hosts and fault == "vanish" else TARGETS[fault]
        return tuple(target for target in possible if target in self.targets) or possible

    def draw(self, seed: int, pause: float) -> Iterator[PlannedFault]:
        """Draws random faults without end. Each depends only on the seed and its number.

        Args:
            pause: Mean seconds of rest between two faults.
        """
        for number in itertools.count():
            rng = random.Random(f"{seed}/{number}")
            kind = rng.choice(self.faults)
            fault = self._fault(rng, number, kind, rng.choice(self.phases), rng.choice(self.targets_of(kind)))
            yield replace(fault, after=round(rng.uniform(0.3, 1.7) * pause, 3))

    def matrix(self, seed: int, times: int) -> list[PlannedFault]:
        """Returns every fault in every phase ``times`` times, in random order. Each fault's targets alternate."""
        rng = random.Random(seed)
        cells = [
            (fault, phase, target)
            for fault in self.faults
            for phase in self.phases
            for target in itertools.islice(itertools.cycle(self.targets_of(fault)), times)
        ]
        rng.shuffle(cells)
        return [self._fault(rng, number, *cell) for number, cell in enumerate(cells)]

    def _fault(self, rng: random.Random, number: int, kind: FaultName, phase: Phase, target: Target) -> PlannedFault:
        ranks: tuple[int, ...] = ()
        if kind in ("kill", "freeze") and (count := self.num_ranks.get(target)):
            ranks = rng.choice([(), (rng.randrange(count),), tuple(range(count))])  # the process, a rank, or all
        longest = _FREEZE_OF_RANKS if ranks and kind == "freeze" else _SECONDS.get(kind, (0.0, 0.0))
        seconds = round(rng.uniform(*longest), 2)
        if kind == "vanish" and target == "client":
            seconds = 0.0  # it does not come back
        jump = round(rng.uniform(-_MAX_JUMP, _MAX_JUMP), 1) if kind == "clock" else 0.0
        return PlannedFault(number, kind, phase, target, seconds, jump, ranks=ranks)


def rolling_restart(workers: Sequence[str], pause: float) -> list[PlannedFault]:
    """Drains each prefill worker of ``workers`` once, with ``pause`` seconds of rest after each is back."""
    return [
        PlannedFault(number, "drain", "prefill", "prefill", after=pause, worker=worker)
        for number, worker in enumerate(workers)
    ]


def read_report(report: Path) -> list[PlannedFault]:
    """Returns the faults of a report, in their order. Raises ValueError when the file is not a report."""
    try:
        records: list[dict[str, Any]] = json.loads(report.read_text(encoding="utf-8"))["strikes"]
        names = [one.name for one in fields(PlannedFault)]  # an injected fault has further ones
        return [
            PlannedFault(**{name: record[name] for name in names} | {"ranks": tuple(record["ranks"])})
            for record in records
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{report} is not a report of overfill chaos: {error}") from error
