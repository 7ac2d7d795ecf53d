"""Shared by the tests of both engines: greedy sampling, emptying the prefix cache, and the state machines' steps."""

from __future__ import annotations

from counting import CountingRunner
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from overfill.engine.decode import DecodeEngine
from overfill.engine.prefill import PrefillEngine
from overfill.kv.blocks import BlockPool
from overfill.kv.prefix import PrefixCache
from overfill.request.params import SamplingParams

GREEDY = SamplingParams(temperature=0)


def evict_all(prefix: PrefixCache) -> None:
    """Evict all cached blocks, so that the test can compare the pool with its full size."""
    assert prefix.acquire("everything", prefix.blocks_of([63]), prefix.pool.num_blocks) is not None
    prefix.release("everything")


class EngineMachine(RuleBasedStateMachine):
    """An engine on 10 blocks of 4 tokens: steps with and without enough memory, after each of which no block is lost.

    A subclass makes ``engine`` in its ``__init__`` and adds rules for requests.

    Attributes:
        caches: whether the prefix cache is enabled.
        memory_error: error that a step raises when it runs out of memory.
    """

    caches = False
    memory_error: type[Exception] = MemoryError
    engine: DecodeEngine | PrefillEngine

    def __init__(self) -> None:
        super().__init__()
        self.runner = CountingRunner()
        self.prefix = PrefixCache(BlockPool(10, 4), enabled=self.caches)
        self.num_requests = 0

    def new_number(self) -> int:
        """Return the number of the next request, from 1."""
        self.num_requests += 1
        return self.num_requests

    @rule()
    def step(self) -> None:
        self.engine.step()

    @rule()
    def step_without_memory(self) -> None:
        self.runner.fail_next = self.memory_error("no room")
        self.engine.step()
        self.runner.fail_next = None

    @invariant()
    def no_block_is_lost(self) -> None:
        self.engine.check()
        self.prefix.check_integrity()
