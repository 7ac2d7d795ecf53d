"""Tests that the prefix cache finds KV of exactly the same tokens, and that no block is lost or evicted in use."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from overfill.kv import keys
from overfill.kv.blocks import BlockPool
from overfill.kv.journal import KeyJournal
from overfill.kv.keys import PromptKeys, block_key, root_key, token_bytes
from overfill.kv.prefix import PrefixCache

BLOCK = 4


def new_cache(num_blocks=8, **options):
    return PrefixCache(BlockPool(num_blocks, BLOCK), "digest", **options)


def compute(cache, owner, tokens, namespace="", num_blocks=None, whole=False):
    """Computes and releases a whole prompt; returns the number of tokens that were cached."""
    num_blocks = num_blocks or cache.pool.blocks_for(len(tokens))
    allocation = cache.acquire(owner, cache.blocks_of(tokens, namespace), num_blocks, whole=whole)
    cache.publish(owner, len(tokens))
    cache.release(owner)
    cache.check_integrity()
    return allocation.cached_tokens


def test_a_prompt_that_begins_the_same_gets_the_same_blocks():
    cache = new_cache()
    first = cache.acquire("a", cache.blocks_of(range(10)), 3)
    cache.publish("a", 10)
    second = cache.acquire("b", cache.blocks_of([*range(8), 99]), 3)
    assert second.cached_tokens == 8
    assert second.blocks[:2] == first.blocks[:2]
    assert second.blocks[2] not in first.blocks
    cache.release("a")
    cache.release("b")
    assert (cache.num_used, cache.num_cached) == (0, 2)


@pytest.mark.parametrize(
    ("prompt", "found", "found_whole"),
    [
        (list(range(9)), 8, 8),
        (list(range(8)), 4, 8),  # one token is left to compute, unless the whole prompt may be cached
        (list(range(7)), 4, 4),
        ([0, 1, 2, 3, 4, 5, 6, 99, 8], 4, 4),
        ([99, 1, 2, 3, 4, 5, 6, 7, 8], 0, 0),
        ([4, 5, 6, 7, 8], 0, 0),  # the same tokens after another block
    ],
)
def test_only_whole_blocks_after_the_same_tokens_are_found(prompt, found, found_whole):
    for whole, expected in ((False, found), (True, found_whole)):
        cache = new_cache()
        compute(cache, "a", list(range(12)))
        assert compute(cache, "b", prompt, whole=whole) == expected


def test_tenants_share_nothing():
    cache = new_cache()
    compute(cache, "a", list(range(9)), namespace="one")
    assert compute(cache, "b", list(range(9)), namespace="two") == 0
    assert compute(cache, "c", list(range(9)), namespace="") == 0
    assert compute(cache, "d", list(range(9)), namespace="one") == 8


def test_equal_keys_of_different_tokens_do_no_harm(monkeypatch):
    monkeypatch.setattr(keys, "_hash64", lambda data: 1)
    cache = new_cache()
    compute(cache, "a", list(range(9)))
    assert compute(cache, "b", [7] * 9) == 0
    assert compute(cache, "c", list(range(9))) == 8


def test_of_equal_blocks_computed_twice_one_is_kept_and_both_owners_continue():
    cache = new_cache(num_blocks=8)
    one = cache.acquire("a", cache.blocks_of([*range(8), 50, 51, 52, 53]), 3)
    other = cache.acquire("b", cache.blocks_of([*range(8), 60, 61, 62, 63]), 3)
    assert not set(one.blocks) & set(other.blocks)
    cache.publish("a", 12)
    cache.publish("b", 12)
    cache.check_integrity()
    cache.release("a")
    cache.check_integrity()
    cache.release("b")
    assert cache.num_cached == 4  # two shared blocks, and one of each owner
    assert compute(cache, "c", [*range(8), 60, 61, 62, 63, 1]) == 12


def test_the_least_recently_used_of_equals_goes_first():
    cache = new_cache(num_blocks=3)
    for owner, token in (("a", 1), ("b", 2), ("c", 3)):
        compute(cache, owner, [token] * 4 + [9], num_blocks=2 if cache.num_cached < 2 else None)
        compute(cache, owner, [1] * 4 + [9])  # a block that is used repeatedly
    assert compute(cache, "d", [1] * 4 + [9]) == 4
    assert compute(cache, "e", [2] * 4 + [9]) == 0


def test_a_block_that_costs_more_to_compute_again_stays_longer():
    cache = new_cache(num_blocks=8, attention_tokens=1)  # attention is the whole cost
    compute(cache, "long", list(range(16)))
    compute(cache, "short", [77] * 4 + [78])
    cache.acquire("big", cache.blocks_of([55] * 16), 4)  # one more block than are free
    cache.release("big")
    assert compute(cache, "again", [*range(16), 1]) == 16
    assert compute(cache, "other", [77] * 4 + [78]) == 0


def test_a_cache_that_is_off_keeps_nothing():
    cache = new_cache(enabled=False)
    compute(cache, "a", list(range(9)))
    assert compute(cache, "b", list(range(9))) == 0
    assert cache.num_cached == 0


def test_a_prompts_keys_are_those_that_the_cache_reports():
    journal = KeyJournal()
    cache = new_cache(num_blocks=4, journal=journal)
    compute(cache, "a", list(range(10)))
    told = PromptKeys(root_key("digest", ""), list(range(10)))
    assert sorted(told(4)) == sorted(journal.feed().take().added)
    assert list(told(2))[1:2] != list(told(4))[:1], "keys depend on the block size"
    assert len(list(told(4))) == 2


def test_a_long_prompt_can_be_published_in_parts():
    cache = new_cache()
    cache.acquire("a", cache.blocks_of(range(18)), 5)
    assert cache.publish("a", 18, max_blocks=3) == 3
    assert cache.publish("a", 12) == 0
    assert cache.acquire("b", cache.blocks_of(range(18)), 5).cached_tokens == 12
    assert cache.publish("a", 18, max_blocks=3) == 1
    assert cache.acquire("c", cache.blocks_of(range(18)), 5).cached_tokens == 16
    cache.check_integrity()


def test_a_prompt_of_many_groups_has_the_keys_of_its_blocks(monkeypatch):
    monkeypatch.setattr(keys, "_BLOCKS_AT_ONCE", 3)
    made = new_cache().blocks_of(range(35))
    assert made.keys == list(PromptKeys(root_key("digest", ""), range(35))(BLOCK))
    assert len(set(made.tokens)) == len(made.keys) == 8


def test_forgotten_blocks_are_found_no_more_and_freed_with_their_last_owner():
    journal = KeyJournal()
    cache = new_cache(12, journal=journal)
    feed = journal.feed()
    prompt = [*range(8), *[9] * 9]
    compute(cache, "idle", [*range(8), *[7] * 5])
    for owner in ("a", "b"):
        cache.acquire(owner, cache.blocks_of(prompt), 5)
    cache.publish("a", 12)
    assert cache.num_cached == 1
    cache.forget("a")
    cache.check_integrity()
    assert cache.num_cached == 0, "the idle block behind a forgotten one is free"
    assert cache.next_unpublished_key("b") is None
    assert cache.publish("b", 17) == 0
    assert cache.extend_cached_prefix("b") is None
    cache.release("a")
    cache.check_integrity()
    assert cache.num_used == 5, "b keeps what it had"
    cache.release("b")
    assert cache.num_available == cache.pool.num_free == 12
    assert not feed.take().added
    assert compute(cache, "again", prompt) == 0
    assert compute(cache, "again", prompt) == 16


def test_what_is_appended_to_a_prompt_is_published_without_hashing_the_prompt_again(monkeypatch):
    cache = new_cache()
    prompt = cache.blocks_of(range(10))
    cache.acquire("a", prompt, 3)
    hashed = []
    monkeypatch.setattr(keys, "block_key", lambda parent, block: hashed.append(block) or block_key(parent, block))
    assert cache.num_publishable("a") == 8
    cache.append("a", range(8, 15))
    cache.extend("a", 1)
    cache.append("a", range(12, 16))
    assert hashed == [token_bytes(range(8, 12)), token_bytes(range(12, 16))]
    assert cache.publish("a", 16) == 4
    assert len(prompt.keys) == 2, "other threads have it"
    feed = cache.journal.feed()
    cache.release("a")
    assert compute(cache, "b", list(range(17))) == 16
    assert set(feed.take().added) == set(PromptKeys(root_key("digest", ""), range(16))(4))
    cache.check_integrity()


def test_lent_blocks_are_neither_evicted_nor_counted_as_looked_up():
    cache = new_cache(num_blocks=4)
    compute(cache, "a", list(range(9)))
    loan = cache.lend("loan", cache.blocks_of(range(12)))
    assert loan.cached_tokens == 8
    assert cache.lend("none", cache.blocks_of([9] * 8)).blocks == []
    assert cache.lend("whole", cache.blocks_of(range(8))).blocks == loan.blocks, "no token is left to compute"
    assert (cache.num_used, cache.num_available, cache.tokens_looked_up) == (2, 2, 9)
    assert cache.acquire("b", cache.blocks_of([7] * 12), 3) is None
    assert not set(cache.acquire("c", cache.blocks_of([7] * 8), 2).blocks) & set(loan.blocks)
    cache.check_integrity()
    for owner in ("loan", "none", "whole"):
        cache.check_owners({"c", "loan", "none", "whole"} if owner == "loan" else cache._holders)
        cache.release(owner)
    cache.check_owners({"c"})
    assert cache.acquire("d", cache.blocks_of([7] * 8), 2) is not None
    cache.check_integrity()


def test_forgotten_blocks_stay_with_the_loan_that_has_them():
    cache = new_cache()
    cache.acquire("a", cache.blocks_of(range(9)), 3)
    cache.publish("a", 9)
    loan = cache.lend("loan", cache.blocks_of(range(9)))
    cache.forget("a")
    cache.release("a")
    cache.check_integrity()
    assert cache.num_used == len(loan.blocks) == 2
    assert cache.lend("later", cache.blocks_of(range(9))).blocks == []
    cache.release("loan")
    cache.release("later")
    assert cache.num_available == cache.pool.num_free == 8


def test_every_reader_of_the_journal_gets_the_whole_state_and_then_changes():
    journal = KeyJournal()
    cache = new_cache(num_blocks=2, journal=journal)
    compute(cache, "a", list(range(8)))
    early = journal.feed()
    told = early.take()
    assert told.replaces
    key = block_key(root_key("digest", ""), token_bytes([0, 1, 2, 3]))
    assert key in told.added
    assert len(told.added) == 2
    assert early.take() is None
    compute(cache, "b", [9] * 8)  # evicts both blocks
    change = early.take()
    assert not change.replaces
    assert set(change.removed) == set(told.added)
    assert len(change.added) == 2
    late = journal.feed().take()
    assert late.replaces
    assert set(late.added) == set(change.added)
    early.close()
    compute(cache, "c", [8] * 8)
    assert early.take() is None


class Machine(RuleBasedStateMachine):
    """Sequences arrive, are computed in part or whole, grow, lend and end. The model of a block is its tokens."""

    def __init__(self):
        super().__init__()
        self.cache = new_cache(num_blocks=10, attention_tokens=8)
        self.written = {}  # block -> (namespace, every token up to its end)
        self.live = {}  # owner -> [namespace, tokens, computed, blocks]
        self.number = 0

    # Few tokens and lengths, so that prompts often share prefixes.
    @rule(
        tokens=st.lists(st.sampled_from([1, 2]), min_size=1, max_size=20),
        namespace=st.sampled_from(["", "t"]),
        more=st.integers(0, 2),
        whole=st.booleans(),
    )
    def acquire(self, tokens, namespace, more, whole):
        self.number += 1
        owner = str(self.number)
        wanted = self.cache.pool.blocks_for(len(tokens)) + more
        before = self.cache.num_available
        allocation = self.cache.acquire(owner, self.cache.blocks_of(tokens, namespace), wanted, whole=whole)
        if allocation is None:
            assert wanted > before
            return
        assert len(allocation.blocks) == len(set(allocation.blocks)) == wanted
        assert allocation.cached_tokens < len(tokens) + whole
        for index in range(allocation.cached_tokens // BLOCK):
            assert self.written[allocation.blocks[index]] == (namespace, tuple(tokens[: (index + 1) * BLOCK]))
        fresh = allocation.blocks[allocation.cached_tokens // BLOCK :]
        for _, _, _, blocks in self.live.values():
            assert not set(fresh) & set(blocks), "a block that is in use was handed out"
        for block in fresh:
            self.written.pop(block, None)
        self.live[owner] = [namespace, tokens, allocation.cached_tokens, allocation.blocks]

    @rule(tokens=st.lists(st.sampled_from([1, 2]), max_size=20), namespace=st.sampled_from(["", "t"]))
    def lend(self, tokens, namespace):
        self.number += 1
        owner, before = str(self.number), self.cache.pool.num_free
        loan = self.cache.lend(owner, self.cache.blocks_of(tokens, namespace))
        assert self.cache.pool.num_free == before
        for index, block in enumerate(loan.blocks):
            assert self.written[block] == (namespace, tuple(tokens[: (index + 1) * BLOCK]))
        self.live[owner] = [namespace, tokens[: loan.cached_tokens], loan.cached_tokens, loan.blocks]

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def compute(self, data):
        owner = data.draw(st.sampled_from(sorted(self.live)))
        namespace, tokens, computed, blocks = self.live[owner]
        end = data.draw(st.integers(computed, len(tokens)))
        for index in range(computed // BLOCK, end // BLOCK):
            self.written[blocks[index]] = (namespace, tuple(tokens[: (index + 1) * BLOCK]))
        self.live[owner][2] = end
        self.cache.publish(owner, end)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def extend(self, data):
        owner = data.draw(st.sampled_from(sorted(self.live)))
        blocks = self.cache.extend(owner, 1)
        if blocks is not None:
            assert not any(set(blocks) & set(v[3]) for v in self.live.values())
            self.written.pop(blocks[0], None)
            self.live[owner][3].extend(blocks)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data):
        owner = data.draw(st.sampled_from(sorted(self.live)))
        del self.live[owner]
        self.cache.release(owner)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def forget(self, data):
        owner = data.draw(st.sampled_from(sorted(self.live)))
        self.cache.forget(owner)
        _, _, computed, blocks = self.live[owner]
        for block in blocks[: computed // BLOCK]:
            self.written[block] = "forgotten"

    @invariant()
    def nothing_is_lost(self):
        self.cache.check_integrity()
        assert self.cache.num_used >= len({b for v in self.live.values() for b in v[3]})
        if not self.live:
            assert self.cache.num_used == 0
            assert self.cache.num_available == 10


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
