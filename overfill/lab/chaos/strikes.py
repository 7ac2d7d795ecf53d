"""What befalls whom and when: strikes drawn from a seed, listed for a matrix, or read from a report."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

FaultName = Literal[
    "kill", "drain", "freeze", "partition", "delay", "loss", "bandwidth", "corrupt", "clock", "disk", "slow", "vanish"
]
Phase = Literal["queued", "reserving", "prefill", "handoff", "decode", "finishing"]
Target = Literal["router", "prefill", "decode", "client"]

FAULTS: tuple[FaultName, ...] = get_args(FaultName)
PHASES: tuple[Phase, ...] = get_args(Phase)

TARGETS: dict[FaultName, tuple[Target, ...]] = {
    **dict.fromkeys(FAULTS, ("router", "prefill", "decode")),
    "corrupt": ("prefill", "decode"),  # either end of a handoff
    "slow": ("client",),
    "vanish": ("client",),
}
"""Whom a fault can befall."""

_SECONDS: dict[FaultName, tuple[float, float]] = {
    # On both sides of the 10 s after which a silent peer is given up.
    "freeze": (1.0, 13.0),
    "partition": (1.0, 13.0),
    "delay": (1.0, 4.0),
    "loss": (1.0, 4.0),
    "bandwidth": (1.0, 4.0),
    "clock": (1.0, 3.0),
    "disk": (1.0, 4.0),
}
_LARGEST_JUMP = 3600.0  # seconds


@dataclass(frozen=True, slots=True)
class Strike:
    """One fault.

    Attributes:
        number: in its sequence.
        phase: of the request that it waits for.
        target: on which side of that request it strikes.
        seconds: that it lasts, where it lasts.
        jump: seconds that a clock is set forward, or back.
        after: seconds of rest before it; 0 strikes as soon as it can.
    """

    number: int
    fault: FaultName
    phase: Phase
    target: Target
    seconds: float = 0.0
    jump: float = 0.0
    after: float = 0.0


def draw(
    seed: int,
    pause: float,
    faults: Sequence[FaultName] = FAULTS,
    phases: Sequence[Phase] = PHASES,
    targets: Sequence[Target] | None = None,
    first: int = 0,
) -> Iterator[Strike]:
    """Random strikes without end, from number ``first`` on; each depends on the seed and its number alone.

    Args:
        pause: mean seconds of rest between two.
        targets: None for all that a fault can befall.
    """
    number = first
    while True:
        rng = random.Random(f"{seed}/{number}")
        fault = rng.choice(faults)
        among = [target for target in TARGETS[fault] if targets is None or target in targets]
        strike = _make(rng, number, fault, rng.choice(phases), rng.choice(among or TARGETS[fault]))
        yield Strike(**asdict(strike) | {"after": round(rng.uniform(0.3, 1.7) * pause, 3)})
        number += 1


def matrix(
    seed: int, times: int, faults: Sequence[FaultName] = FAULTS, phases: Sequence[Phase] = PHASES
) -> list[Strike]:
    """Every fault in every phase ``times`` times, its targets in turn, in random order."""
    rng = random.Random(seed)
    cells = [
        (fault, phase, TARGETS[fault][turn % len(TARGETS[fault])])
        for fault in faults
        for phase in phases
        for turn in range(times)
    ]
    rng.shuffle(cells)
    return [_make(rng, number, *cell) for number, cell in enumerate(cells)]


def replayed(report: Path) -> list[Strike]:
    """The strikes of a report, in their order. Raises ValueError when it is no report."""
    try:
        records: list[dict[str, Any]] = json.loads(report.read_text(encoding="utf-8"))["strikes"]
        return [Strike(**{name: record[name] for name in Strike.__slots__}) for record in records]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{report} is no report of overfill chaos: {error}") from error


def _make(rng: random.Random, number: int, fault: FaultName, phase: Phase, target: Target) -> Strike:
    seconds = round(rng.uniform(*_SECONDS.get(fault, (0.0, 0.0))), 2)
    jump = round(rng.uniform(-_LARGEST_JUMP, _LARGEST_JUMP), 1) if fault == "clock" else 0.0
    return Strike(number, fault, phase, target, seconds, jump)
