"""Tests that every block has one owner at a time and that none is lost."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from overfill.kv.blocks import BlockPool


def test_releasing_blocks_of_another_owner_is_refused_and_changes_nothing():
    pool = BlockPool(4, 16)
    mine = pool.acquire("a", 2)
    theirs = pool.acquire("b", 1)
    with pytest.raises(ValueError, match="does not own"):
        pool.release("a", [*mine, *theirs])
    assert pool.num_used == 3
    pool.check_integrity()


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 1), (16, 1), (17, 2), (32, 2)])
def test_blocks_for_a_number_of_tokens(tokens, blocks):
    assert BlockPool(4, 16).blocks_for(tokens) == blocks


class PoolMachine(RuleBasedStateMachine):
    """Acquires and releases blocks in any order."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(8, 4)
        self.held: dict[str, list[int]] = {}
        self.names = 0

    @rule(count=st.integers(1, 9))
    def acquire(self, count):
        self.names += 1
        blocks = self.pool.acquire(str(self.names), count)
        assert (blocks is None) == (count > 8 - sum(map(len, self.held.values())))
        if blocks is not None:
            self.held[str(self.names)] = blocks

    @rule(data=st.data())
    def release(self, data):
        if self.held:
            owner = data.draw(st.sampled_from(sorted(self.held)))
            self.pool.release(owner, self.held.pop(owner))

    @invariant()
    def every_block_is_free_or_owned_once(self):
        self.pool.check_integrity()
        owned = [b for blocks in self.held.values() for b in blocks]
        assert len(owned) == len(set(owned)) == self.pool.num_used


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=50, deadline=None)
