"""The prefix cache: blocks that hold the start of a prompt. Sequences share them, and they stay cached afterwards.

It holds only full blocks that the full model computed: of prompts, and of answers where the decoder is the full model.
They form a trie: a block is found below its parent by its tokens. Tokens are compared one by one, so that a hash
collision cannot serve another prompt's KV. Integers only; the tensors are in ``kv.cache``. Routers know a block by its
64-bit key, which depends on all blocks along its path.

Eviction is GreedyDual (Young 1994; Cao and Irani 1997). A block's worth is the cost of computing it again, which grows
with its position, plus a level that rises with every eviction. The leaf with the lowest worth is evicted first; among
equals, the least recently used one.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from overfill.kv.blocks import BlockPool
from overfill.kv.journal import KeyJournal
from overfill.kv.keys import PromptBlocks, root_key

_CACHE = "prefix cache"  # the pool's owner of every block in the trie


@dataclass(slots=True, eq=False)
class _Node:
    """One cached block, or the root of a tenant's trie.

    Attributes:
        refs: number of owners that hold it. Each of them holds its ancestors too.
        forgotten: True once no other owner can find it; the block becomes free when ``refs`` reaches 0.
        worth: priority against eviction.
        stamp: orders nodes of equal worth. An entry of the heap with another stamp is outdated.
    """

    block: int
    tokens: bytes
    parent: _Node | None
    key: int
    depth: int
    children: dict[bytes, _Node] = field(default_factory=dict)
    refs: int = 0
    forgotten: bool = False
    worth: float = 0.0
    stamp: int = 0


@dataclass(slots=True, eq=False)
class _Holder:
    """The blocks of one owner.

    Attributes:
        table: all blocks, in order.
        own: private blocks.
        path: referenced nodes, from the root down. A node's block is not in ``table`` if another owner published the
            same tokens first.
        max_cached: limit on blocks of the prompt that may come from the cache.
        appended: whether ``prompt`` is the holder's own copy, with more behind the prompt.
    """

    prompt: PromptBlocks
    table: list[int]
    own: set[int]
    path: list[_Node]
    max_cached: int
    appended: bool = False

    @property
    def behind_forgotten(self) -> bool:
        """True if no block can be found behind ``path``, because a part of it is forgotten."""
        return bool(self.path) and self.path[-1].forgotten


@dataclass(frozen=True, slots=True)
class BlockAllocation:
    """Blocks for a sequence. They hold the KV of its first ``cached_tokens`` tokens."""

    blocks: list[int]
    cached_tokens: int


class PrefixCache:
    """Hands out the blocks of ``pool``, including those that hold a prompt's prefix already. Not thread-safe.

    Args:
        identity: full-model digest and KV element type; part of every key.
        enabled: False disables sharing: nothing is cached.
        attention_tokens: context length at which attention costs as much as the rest of a token's computation.
        journal: records keys that are added and removed.

    Attributes:
        tokens_looked_up, tokens_found: prompt tokens of all allocations so far, and the cached ones among them.
    """

    def __init__(
        self,
        pool: BlockPool,
        identity: str = "",
        *,
        enabled: bool = True,
        attention_tokens: float = 4096.0,
        journal: KeyJournal | None = None,
    ) -> None:
        self.pool = pool
        self.journal = journal if journal is not None else KeyJournal()
        self.tokens_looked_up = 0
        self.tokens_found = 0
        self._identity = identity
        self._enabled = enabled
        self._attention_tokens = attention_tokens
        self._roots: dict[str, _Node] = {}
        self._holders: dict[str, _Holder] = {}
        self._leaves: list[tuple[float, int, _Node]] = []  # a heap; entries may be outdated
        self._stamps = itertools.count(1)
        self._level = 0.0
        self._num_nodes = 0  # those that are forgotten and held included
        self._num_idle = 0

    @property
    def num_cached(self) -> int:
        """Cached blocks without references. All of them can be evicted."""
        return self._num_idle

    @property
    def num_used(self) -> int:
        """Blocks with references."""
        return self.pool.num_used - self._num_idle

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out now: free or without references."""
        return self.pool.num_free + self._num_idle

    @property
    def num_leaked(self) -> int:
        """Blocks that the pool counts as owned although they are neither cached nor an owner's."""
        return self.pool.num_used - self._num_known

    @property
    def _num_known(self) -> int:
        return sum(len(holder.own) for holder in self._holders.values()) + self._num_nodes

    def blocks_of(self, tokens: Sequence[int], cache_namespace: str = "") -> PromptBlocks:
        """Hashes a prompt for ``acquire``. Callable from any thread; takes 3 us per block.

        Args:
            cache_namespace: the prompt shares prefixes with prompts of the same namespace only.
        """
        root = root_key(self._identity, cache_namespace) if self._enabled else None
        return PromptBlocks(tokens, self.pool.block_size, root, cache_namespace)

    def acquire(
        self, owner: str, prompt: PromptBlocks, num_blocks: int, *, spare: int = 0, whole: bool = False
    ) -> BlockAllocation | None:
        """Gives ``owner`` ``num_blocks`` blocks. The first ones are cached blocks with the start of its ``prompt``.

        Args:
            spare: blocks that must remain available afterwards.
            whole: whether all tokens of the prompt may be cached ones. Otherwise at least one is left to compute.

        Returns:
            None, changing nothing, if not enough blocks are available.
        """
        max_cached = (prompt.num_tokens - (not whole)) // self.pool.block_size
        path = list(self._walk(self._roots.get(prompt.cache_namespace), prompt, 0, max_cached))
        lacking = num_blocks - len(path)
        if lacking + spare > self.num_available - sum(node.refs == 0 for node in path):
            return None
        for node in path:
            self._reference(node)
        own = self._take(owner, lacking)
        blocks = [*(node.block for node in path), *own]
        self._holders[owner] = _Holder(prompt, list(blocks), set(own), path, max_cached)
        cached = len(path) * self.pool.block_size
        self.tokens_looked_up += prompt.num_tokens
        self.tokens_found += cached
        return BlockAllocation(blocks, cached)

    def lend(self, owner: str, prompt: PromptBlocks, *, spare: int = 0) -> BlockAllocation:
        """Gives ``owner`` a reference on the cached blocks with the start of ``prompt``, until ``release``.

        All of the prompt's full blocks may be among them. Nothing is allocated, and the counts of lookups stay.

        Args:
            spare: blocks that remain available afterwards, or as many as before. Blocks in use are lent in any case.
        """
        path: list[_Node] = []
        for node in self._walk(self._roots.get(prompt.cache_namespace), prompt, 0, len(prompt.tokens)):
            if node.refs == 0 and self.num_available <= spare:
                break
            self._reference(node)
            path.append(node)
        self._holders[owner] = _Holder(prompt, [node.block for node in path], set(), path, len(path))
        return self.allocation(owner)

    def extend_cached_prefix(self, owner: str) -> BlockAllocation | None:
        """Replaces blocks of ``owner`` by cached ones if more of its prompt has been published since ``acquire``.

        Call it before ``owner``'s private blocks are written or read.

        Returns:
            The new allocation; None if no more of the prompt is cached.
        """
        holder = self._holders[owner]
        begin = len(holder.path)
        last = holder.path[-1] if holder.path else self._roots.get(holder.prompt.cache_namespace)
        found = list(self._walk(last, holder.prompt, begin, holder.max_cached))
        if not found:
            return None
        replaced = holder.table[begin : begin + len(found)]
        for node in found:
            self._reference(node)
        holder.own.difference_update(replaced)
        self.pool.release(owner, replaced)
        holder.table[begin : begin + len(found)] = [node.block for node in found]
        holder.path += found
        self.tokens_found += len(found) * self.pool.block_size
        return self.allocation(owner)

    def allocation(self, owner: str) -> BlockAllocation:
        """Returns the blocks that ``owner`` has for its prompt, with the tokens that the cache holds."""
        holder = self._holders[owner]
        return BlockAllocation(list(holder.table), len(holder.path) * self.pool.block_size)

    def next_unpublished_key(self, owner: str) -> Hashable:
        """Returns a key for the first unpublished block of ``owner``'s prompt and all blocks before it.

        Two owners have equal keys if they would publish the same block. None means that nothing is left to publish.
        """
        holder = self._holders[owner]
        index = len(holder.path)
        if index >= len(holder.prompt.tokens) or holder.behind_forgotten:
            return None
        parent = holder.path[-1] if holder.path else holder.prompt.cache_namespace
        return parent, holder.prompt.tokens[index]

    def may_share(self, owner: str) -> bool:
        """Whether ``owner`` may use a cached block as its next one."""
        holder = self._holders[owner]
        return len(holder.path) < holder.max_cached

    def extend(self, owner: str, count: int) -> list[int] | None:
        """Gives ``owner`` ``count`` more blocks. Returns None, changing nothing, if not enough are available."""
        if count > self.num_available:
            return None
        blocks = self._take(owner, count)
        holder = self._holders[owner]
        holder.own.update(blocks)
        holder.table += blocks
        return blocks

    def num_publishable(self, owner: str) -> int:
        """Number of tokens in the full blocks of ``owner``'s prompt and of what was appended to it."""
        return len(self._holders[owner].prompt.tokens) * self.pool.block_size

    def append(self, owner: str, tokens: Sequence[int]) -> None:
        """Lets ``publish`` take full blocks of ``tokens``, which follow the first ``num_publishable`` tokens."""
        holder = self._holders[owner]
        if not holder.appended:
            holder.prompt, holder.appended = holder.prompt.copy(), True
        holder.prompt.append(tokens)

    def publish(self, owner: str, num_tokens: int, max_blocks: int | None = None) -> int:
        """Lets other owners share the first ``num_tokens`` tokens of ``owner``, whose KV is complete.

        Args:
            max_blocks: limit on blocks of this call; the next call continues after them. None means no limit.

        Returns:
            Number of blocks that this call published; less than ``max_blocks`` if no more are left.
        """
        holder = self._holders[owner]
        prompt = holder.prompt
        begin, complete = len(holder.path), min(num_tokens // self.pool.block_size, len(prompt.tokens))
        end = complete if max_blocks is None else min(complete, begin + max_blocks)
        if begin >= end or holder.behind_forgotten:
            return 0
        node = holder.path[-1] if holder.path else self._root(prompt.cache_namespace)
        part = slice(begin, end)
        for tokens, key, block in zip(prompt.tokens[part], prompt.keys[part], holder.table[part], strict=True):
            parent, found = node, node.children.get(tokens)
            if found is None:
                self.pool.give(owner, block, _CACHE)
                holder.own.discard(block)
                found = parent.children[tokens] = _Node(block, tokens, parent, key, parent.depth + 1, refs=1)
                self._num_nodes += 1
                self.journal.add(key)
            else:  # two owners computed the block at once: this one stays private, the published one is referenced
                self._reference(found)
            holder.path.append(found)
            node = found
        return end - begin

    def forget(self, owner: str) -> None:
        """Stops sharing the blocks of ``owner``'s prompt, and those behind them. Those in use stay their owners'."""
        path = self._holders[owner].path
        if not path or path[0].forgotten:
            return
        root = path[0].parent
        assert root is not None
        del root.children[path[0].tokens]
        self._drop_if_empty(root)
        stack = [path[0]]
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            node.children.clear()  # their blocks may be reused
            node.forgotten = True
            self.journal.remove(node.key)
            if node.refs == 0:
                node.stamp = 0
                self._num_idle -= 1
                self._free(node)

    def release(self, owner: str) -> None:
        """Takes back all blocks of ``owner``. Published blocks stay cached until they are evicted or forgotten."""
        holder = self._holders.pop(owner, None)
        if holder is None:
            return
        self.pool.release(owner, holder.own)
        for node in reversed(holder.path):
            node.refs -= 1
            if node.refs == 0 and node.forgotten:
                self._free(node)
            elif node.refs == 0:
                self._num_idle += 1
                self._set_worth(node)

    def check_owners(self, owners: Iterable[str]) -> None:
        """Raises AssertionError unless every block is free, cached or owned by one of ``owners``.

        Quick, because it does not walk the trie.
        """
        self.pool.check_integrity()
        _require(self._holders.keys() == set(owners), "the owners of blocks are not the expected ones")
        self._check_count()

    def check_integrity(self) -> None:
        """Raises AssertionError unless counts, references and owners agree."""
        self.pool.check_integrity()
        refs: dict[int, int] = {}
        for name, holder in self._holders.items():
            for block in holder.own:
                _require(self.pool.owner(block) == name, f"block {block} is not {name}'s")
            for node in holder.path:
                refs[node.block] = refs.get(node.block, 0) + 1
        findable = {*self._nodes()}
        _require(not any(node.forgotten for node in findable), "a forgotten block can be found")
        nodes = findable | {node for holder in self._holders.values() for node in holder.path}
        _require(len({node.block for node in nodes}) == len(nodes) == self._num_nodes, "a block is cached twice")
        for node in nodes:
            _require(self.pool.owner(node.block) == _CACHE, f"block {node.block} is cached and not the cache's")
            _require(node.refs == refs.pop(node.block, 0), f"block {node.block} counts {node.refs} references")
            _require(
                node.parent is None or node.parent.refs >= node.refs or not node.parent.tokens,
                "a block has more references than its parent",
            )
        _require(not refs, "an owner references a block that is not cached")
        _require(sum(node.refs == 0 for node in nodes) == self._num_idle, "idle blocks are miscounted")
        self._check_count()

    def _check_count(self) -> None:
        used, known = self.pool.num_used, self._num_known
        _require(used == known, f"{used} blocks are owned in the pool, but owners and cache hold {known}")

    @staticmethod
    def _walk(node: _Node | None, prompt: PromptBlocks, begin: int, end: int) -> Iterator[_Node]:
        """Yields the cached blocks of ``prompt`` below ``node``, from index ``begin`` to the first one not cached."""
        for index in range(begin, end):
            if node is None:
                return
            node = node.children.get(prompt.tokens[index])
            if node is None:
                return
            yield node

    def _root(self, cache_namespace: str) -> _Node:
        root = self._roots.get(cache_namespace)
        if root is None:
            root = self._roots[cache_namespace] = _Node(-1, b"", None, 0, -1)
        return root

    def _reference(self, node: _Node) -> None:
        if node.refs == 0:
            self._num_idle -= 1
        node.refs += 1
        node.stamp = 0  # outdates its entry in the heap

    def _set_worth(self, node: _Node) -> None:
        """Computes the worth of ``node``, which has lost its last reference. A leaf can be evicted from now on."""
        position = (node.depth + 1) * self.pool.block_size
        node.worth = self._level + 1.0 + position / self._attention_tokens
        self._offer(node)

    def _offer(self, node: _Node) -> None:
        if not node.children:
            node.stamp = next(self._stamps)
            heapq.heappush(self._leaves, (node.worth, node.stamp, node))
            if len(self._leaves) > 2 * self._num_nodes + 64:
                self._leaves = [entry for entry in self._leaves if entry[1] == entry[2].stamp]
                heapq.heapify(self._leaves)

    def _take(self, owner: str, count: int) -> list[int]:
        while self.pool.num_free < count:
            self._evict()
        blocks = self.pool.acquire(owner, count)
        assert blocks is not None
        return blocks

    def _evict(self) -> None:
        while True:
            worth, stamp, node = heapq.heappop(self._leaves)
            if stamp == node.stamp:
                break
        self._level = max(self._level, worth)
        parent = node.parent
        assert parent is not None
        del parent.children[node.tokens]
        node.stamp = 0
        self._num_idle -= 1
        self._free(node)
        self.journal.remove(node.key)
        if parent.parent is None:
            self._drop_if_empty(parent)
        elif parent.refs == 0:
            self._offer(parent)

    def _drop_if_empty(self, root: _Node) -> None:
        if not root.children:
            self._roots = {name: kept for name, kept in self._roots.items() if kept is not root}

    def _free(self, node: _Node) -> None:
        """Returns the block of ``node``, which neither an owner nor the trie holds any more, to the pool."""
        self._num_nodes -= 1
        self.pool.release(_CACHE, [node.block])

    def _nodes(self) -> Iterator[_Node]:
        """All nodes that can be found."""
        stack = [child for root in self._roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
