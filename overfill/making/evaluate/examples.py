"""Choose which of many answers a person reads, by a rule that does not look at their text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from overfill.making.evaluate.free_running import ScoredAnswer

RULE = (
    "Answers of the pair are ordered by their perplexity under the full model. Shown are the least likely one, of the "
    "others the one with the most repeated 4-grams, and of the rest those at evenly spaced ranks (of one: the median)."
)


@dataclass(frozen=True, slots=True)
class Example:
    """An answer that was chosen; ``index`` is its place among all."""

    index: int
    why: str


def choose_examples(answers: Sequence[ScoredAnswer], count: int) -> list[Example]:
    """Returns up to ``count`` examples by ``RULE``, likelier answers first; empty answers count as the least likely."""
    order = sorted(range(len(answers)), key=lambda i: math.inf if math.isnan(answers[i].nll) else answers[i].nll)
    worst = [Example(order.pop(), "least likely")] if count > 1 else []
    if order and count > 2:
        most = max(order, key=lambda i: answers[i].repeated)
        order.remove(most)
        worst.insert(0, Example(most, "most repetitive"))
    spaced = min(count - len(worst), len(order))
    ranks = [(2 * place + 1) * len(order) // (2 * spaced) for place in range(spaced)]
    likelier = [Example(order[rank], "median" if spaced == 1 else f"rank {rank + 1} of {len(order)}") for rank in ranks]
    return [*likelier, *worst]
