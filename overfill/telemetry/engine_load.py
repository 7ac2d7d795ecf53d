"""The load of an engine: the numbers that a worker exports as metrics and reports to its routers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """Snapshot of an engine's load, taken between two steps.

    Attributes:
        blocks_used: blocks that live sequences reference, or that the engine has promised them.
        running, waiting: number of sequences; each engine's ``load`` defines the two.
        queued_tokens: prompt tokens that are not computed yet.
        blocks_cached: unreferenced blocks that hold cached prefixes.
        prefix_tokens_looked_up, prefix_tokens_found: prompt tokens looked up in the prefix cache so far, and found.
        blocks_reserved: used blocks that wait for their prompt's KV.
        token_seconds: seconds that computing a prompt token takes, as measured lately; 0 means unknown.
        blocks_leaked: blocks that are neither free nor owned. This is a fault, after which the worker exits.
        prefill: in a worker with both stages, the load of the prefill stage; the other numbers are the decode stage's.
    """

    blocks_used: int
    blocks_total: int
    running: int
    waiting: int
    queued_tokens: int = 0
    blocks_cached: int = 0
    prefix_tokens_looked_up: int = 0
    prefix_tokens_found: int = 0
    blocks_reserved: int = 0
    blocks_leaked: int = 0
    prefill: EngineLoad | None = None
    token_seconds: float = field(default=0.0, compare=False)

    def freed_capacity_since(self, other: EngineLoad) -> bool:
        """True if a sequence has ended or blocks were freed since the snapshot ``other``, in either stage."""
        ended = self.running + self.waiting < other.running + other.waiting
        if ended or self.blocks_used < other.blocks_used:
            return True
        return (
            self.prefill is not None and other.prefill is not None and self.prefill.freed_capacity_since(other.prefill)
        )
