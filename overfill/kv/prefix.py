"""The prefix cache: blocks that hold the start of some prompt, shared while in use and kept afterwards.

Only full blocks of a prompt, computed by the full model, are in it. They form a trie: a block is found under its
parent by its tokens, compared one by one, so that no collision of hashes can ever serve another prompt's KV. Integers
only; the tensors are in ``kv.cache``. The 64-bit keys that chain along a path serve as names for the router.

Eviction is GreedyDual (Young 1994; Cao and Irani 1997): a block is worth what computing it again costs, which grows
with its position, on top of a level that rises with every eviction; the least worthy leaf goes first, among equals the
least recently used one.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from overfill.kv.blocks import BlockPool
from overfill.kv.journal import KeyJournal
from overfill.kv.keys import PromptBlocks, root_key

_CACHE = "prefix cache"  # owner, in the pool, of every block that is in the trie


@dataclass(slots=True, eq=False)
class _Node:
    """One cached block, or the root of a tenant's trie.

    Attributes:
        refs: owners that hold it; all of them hold its ancestors too.
        worth: what eviction goes by; ``stamp`` orders equals, and tells outdated entries of the heap.
    """

    block: int
    tokens: bytes
    parent: _Node | None
    key: int
    depth: int
    children: dict[bytes, _Node] = field(default_factory=dict)
    refs: int = 0
    worth: float = 0.0
    stamp: int = 0


@dataclass(slots=True, eq=False)
class _Holder:
    """What one owner has.

    Attributes:
        table: the blocks of its prompt, in order.
        own: blocks that nobody else may read.
        path: nodes that it holds, from the root down; not all need be in ``table``, since another owner may have
            published the same tokens first.
    """

    prompt: PromptBlocks
    table: list[int]
    own: set[int]
    path: list[_Node]


@dataclass(frozen=True, slots=True)
class BlockAllocation:
    """Blocks for a sequence; the KV of its first ``cached_tokens`` tokens is in them."""

    blocks: list[int]
    cached_tokens: int


class PrefixCache:
    """Hands out the blocks of ``pool``, those that hold a prompt's prefix first. Not thread-safe, as the pool.

    Args:
        identity: full-model digest and KV element type; part of every key.
        enabled: False finds and keeps nothing.
        attention_tokens: context at which attention costs as much as all else that is computed for a token.
        journal: told the keys that come and go.

    Attributes:
        tokens_looked_up, tokens_found: prompt tokens of all grants so far, and those that were cached.
    """

    def __init__(
        self,
        pool: BlockPool,
        identity: tuple[str, str] = ("", ""),
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
        self._leaves: list[tuple[float, int, _Node]] = []  # heap; entries may be outdated
        self._stamps = itertools.count(1)
        self._level = 0.0
        self._num_nodes = 0
        self._num_idle = 0

    @property
    def num_cached(self) -> int:
        """Blocks that hold prefixes and that nobody references; all of them can be evicted."""
        return self._num_idle

    @property
    def num_used(self) -> int:
        """Blocks that somebody references."""
        return self.pool.num_used - self._num_idle

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out now."""
        return self.pool.num_free + self._num_idle

    @property
    def num_leaked(self) -> int:
        """Blocks that are owned, and neither cached nor a holder's."""
        return self.pool.num_used - self._num_known

    @property
    def _num_known(self) -> int:
        return sum(len(holder.own) for holder in self._holders.values()) + self._num_nodes

    def blocks_of(self, tokens: Sequence[int], cache_namespace: str = "") -> PromptBlocks:
        """What ``acquire`` takes for a prompt of ``tokens``. Callable from any thread; takes 3 us for each block.

        Args:
            cache_namespace: tenant whose prefixes the prompt may share.
        """
        root = root_key(*self._identity, cache_namespace) if self._enabled else None
        return PromptBlocks(tokens, self.pool.block_size, root, cache_namespace)

    def acquire(self, owner: str, prompt: PromptBlocks, num_blocks: int, *, spare: int = 0) -> BlockAllocation | None:
        """``num_blocks`` blocks for ``owner``, the first of them those that hold the start of its ``prompt``.

        At least one token of the prompt is never taken from the cache, so that there is something to compute.

        Returns:
            None, changing nothing, when there are not that many blocks and ``spare`` more.
        """
        path = list(self._walk(self._roots.get(prompt.cache_namespace), prompt, 0))
        lacking = num_blocks - len(path)
        if lacking + spare > self.num_available - sum(node.refs == 0 for node in path):
            return None
        for node in path:
            self._reference(node)
        own = self._take(owner, lacking)
        blocks = [*(node.block for node in path), *own]
        self._holders[owner] = _Holder(prompt, list(blocks), set(own), path)
        cached = len(path) * self.pool.block_size
        self.tokens_looked_up += prompt.num_tokens
        self.tokens_found += cached
        return BlockAllocation(blocks, cached)

    def look_again(self, owner: str) -> BlockAllocation | None:
        """What ``owner`` has now that more of its prompt may have been published; None when nothing has.

        Nothing may have been written to its blocks yet, nor read from those that were not cached.
        """
        holder = self._holders[owner]
        begin = len(holder.path)
        last = holder.path[-1] if holder.path else self._roots.get(holder.prompt.cache_namespace)
        found = list(self._walk(last, holder.prompt, begin))
        if not found:
            return None
        unwanted = holder.table[begin : begin + len(found)]
        for node in found:
            self._reference(node)
        holder.own.difference_update(unwanted)
        self.pool.release(owner, unwanted)
        holder.table[begin : begin + len(found)] = [node.block for node in found]
        holder.path += found
        self.tokens_found += len(found) * self.pool.block_size
        return BlockAllocation(list(holder.table), len(holder.path) * self.pool.block_size)

    def next_block(self, owner: str) -> Hashable:
        """Stands for the first block of ``owner``'s prompt that is not published, and all before it: equal for those
        that would publish the same one. None when it would publish none."""
        holder = self._holders[owner]
        index = len(holder.path)
        if index >= len(holder.prompt.tokens):
            return None
        parent = holder.path[-1] if holder.path else holder.prompt.cache_namespace
        return parent, holder.prompt.tokens[index]

    def may_share(self, owner: str) -> bool:
        """Whether ``owner`` would take its next block from the cache, were it there."""
        holder = self._holders[owner]
        return len(holder.path) < self._most(holder.prompt)

    def extend(self, owner: str, count: int) -> list[int] | None:
        """``count`` more blocks for ``owner``, or None, changing nothing, when there are not that many."""
        if count > self.num_available:
            return None
        blocks = self._take(owner, count)
        self._holders[owner].own.update(blocks)
        return blocks

    def publish(self, owner: str, num_tokens: int, most: int | None = None) -> int:
        """The KV of the first ``num_tokens`` tokens of ``owner``'s prompt is complete: others may share it.

        Args:
            most: blocks that are shared now, at most; the next call goes on behind them. None: all.

        Returns:
            How many blocks this call shared: fewer than ``most`` when none is left.
        """
        holder = self._holders[owner]
        prompt = holder.prompt
        begin, complete = len(holder.path), min(num_tokens // self.pool.block_size, len(prompt.tokens))
        end = complete if most is None else min(complete, begin + most)
        if begin >= end:
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
            else:  # computed by two at once; this one stays private, and its owner vouches for the other's ancestors
                self._reference(found)
            holder.path.append(found)
            node = found
        return end - begin

    def release(self, owner: str) -> None:
        """Takes everything back that ``owner`` has; what is published stays, until its room is wanted."""
        holder = self._holders.pop(owner, None)
        if holder is None:
            return
        self.pool.release(owner, holder.own)
        for node in reversed(holder.path):
            node.refs -= 1
            if node.refs == 0:
                self._num_idle += 1
                self._rest(node)

    def check_owners(self, owners: Iterable[str]) -> None:
        """Raises AssertionError unless every block is free, cached or one of ``owners``' own. Quick: walks no trie."""
        self.pool.check_integrity()
        _require(self._holders.keys() == set(owners), "blocks are held for another than those that have some")
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
        nodes = list(self._nodes())
        _require(len({node.block for node in nodes}) == len(nodes) == self._num_nodes, "a block is cached twice")
        for node in nodes:
            _require(self.pool.owner(node.block) == _CACHE, f"block {node.block} is cached and not the cache's")
            _require(node.refs == refs.pop(node.block, 0), f"block {node.block} counts {node.refs} references")
            _require(node.parent is None or node.parent.refs >= node.refs or not node.parent.tokens, "lonely child")
        _require(not refs, "a holder references what is not cached")
        _require(sum(node.refs == 0 for node in nodes) == self._num_idle, "idle blocks are miscounted")
        self._check_count()

    def _check_count(self) -> None:
        used, known = self.pool.num_used, self._num_known
        _require(used == known, f"{used} blocks are owned, and their owners and the cache know of {known}")

    def _most(self, prompt: PromptBlocks) -> int:
        """Blocks that may be taken from the cache: something is left to compute."""
        return (prompt.num_tokens - 1) // self.pool.block_size

    def _walk(self, node: _Node | None, prompt: PromptBlocks, begin: int) -> Iterator[_Node]:
        """Cached blocks of ``prompt`` from ``begin`` on, below ``node``, as far as they are there and may be taken."""
        for index in range(begin, self._most(prompt)):
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
        node.stamp = 0  # its entry in the heap, if any, is outdated

    def _rest(self, node: _Node) -> None:
        """Nobody references ``node`` any more; a leaf may be evicted from now on."""
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
        self._num_nodes -= 1
        self._num_idle -= 1
        self.pool.release(_CACHE, [node.block])
        self.journal.remove(node.key)
        if parent.parent is not None:
            if parent.refs == 0:
                self._offer(parent)
        elif not parent.children:
            self._roots = {cache_namespace: root for cache_namespace, root in self._roots.items() if root is not parent}

    def _nodes(self) -> Iterator[_Node]:
        stack = [child for root in self._roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
