"""The disk tier of a prefill worker: KV of computed prompts in files, from which later prompts import it.

``kv.disk_files`` has the folder, and ``kv.disk_format`` says what a file is. A file that is damaged, cut off or another
block's is deleted, and its block is computed. Every error is a warning and a miss.

Nothing here runs on the engine's thread. The engine lends the blocks that are saved. They are copied to host memory and
given back before the write.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from overfill.errors import TransferFailed
from overfill.kv.disk_files import DiskFiles, NotAFile, StoredBlock, bytes_on_disk
from overfill.kv.disk_format import BlockFormat, key_of
from overfill.kv.handshake import KvIdentity
from overfill.kv.journal import KeyJournal
from overfill.kv.keys import PromptBlocks
from overfill.kv.shielded import shielded
from overfill.kv.store import DeviceEvent, KvStore
from overfill.telemetry.metrics import DiskMetrics

_GROUP_BYTES = 8 << 20
"""Bytes that are read or written at once, in host memory."""

_MAX_READS = 4
"""Limit on prompts that are read at once. Each takes two groups of host memory, and one thread copies for all."""

_MAX_LOANS = 64
"""Loans for a prompt that is saved. The engine's thread walks its blocks for each, so that a long prompt has larger
groups instead of more loans, of up to ``_MAX_SAVED_BYTES``."""

_MAX_SAVED_BYTES = 8 * _GROUP_BYTES

_MAX_QUEUED_BLOCKS = 1 << 16
"""Limit on blocks of prompts that wait to be saved. Their tokens take 10 MiB."""

_SORTED_AT_ONCE = 4096
"""Files that are sorted before the thread yields to others: 200,000 at once stop them for 0.1 s."""

_RETRY = 30.0
"""Seconds for which nothing is saved after a failed write, such as to a full disk."""

_WARNING_GAP = 60.0
"""Minimum seconds between two warnings of one kind."""

_THREADS = 3
"""A read from a disk that hangs takes one for ever."""

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Loan(Protocol):
    """Blocks that hold the KV of a prompt's first ``tokens`` tokens once ``event`` has passed (``engine.Lent``)."""

    @property
    def blocks(self) -> Sequence[int]: ...

    @property
    def tokens(self) -> int: ...

    @property
    def event(self) -> DeviceEvent | None: ...


@dataclass(frozen=True, slots=True)
class DiskLimits:
    """What the tier may use: bytes of the folder, and bytes per second that it writes."""

    size: int
    bandwidth: float


class DiskTier:
    """KV on disk, of one worker; other workers of the machine may use the same folder. Call it on the event loop.

    Args:
        identity, store: as of ``BlockFormat``.
        lend: lends a prompt's cached blocks, which are read until the end of the context.
        executor: threads that copy between ``store`` and host memory.

    Attributes:
        keys: routers' keys of the blocks on disk.
        used_bytes: bytes of the folder, as far as this worker knows.

    Raises:
        OSError: the size is too small for one block.
    """

    def __init__(
        self,
        files: DiskFiles,
        limits: DiskLimits,
        identity: KvIdentity,
        store: KvStore,
        lend: Callable[[PromptBlocks], AbstractAsyncContextManager[Loan]],
        executor: Executor,
        counts: DiskMetrics,
    ) -> None:
        self.keys = KeyJournal()
        self.used_bytes = 0
        self._files = files
        self._limits = limits
        self._format = BlockFormat(identity, store)
        self._lend = lend
        self._executor = executor
        self._counts = counts
        self._block_bytes = bytes_on_disk(self._format.max_bytes)
        if self._block_bytes > limits.size:
            raise OSError(f"--kv-disk-size {limits.size} is less than the {self._block_bytes} bytes of a block")
        self._group = self._blocks_in(_GROUP_BYTES)
        self._allowance = 0  # bytes to be written before the folder is read again
        self._threads = ThreadPoolExecutor(_THREADS, "kv-disk")
        self._queue: asyncio.Queue[PromptBlocks] = asyncio.Queue()
        self._waiting: set[tuple[str, int]] = set()  # cache namespace and last key of the prompts in the queue
        self._num_queued = Counter[str]()  # cache namespace -> blocks in the queue
        self._saving: asyncio.Task[None] | None = None
        self._reads = asyncio.Semaphore(_MAX_READS)
        self._jobs: set[Future[Any]] = set()  # unfinished ones of the threads
        self._hanging: set[Future[Any]] = set()  # those that ran when a read was given up
        self._paused_until = 0.0
        self._warned: dict[str, float] = {}

    def start(self) -> None:
        """Finds what is in the folder, in the background, and then saves prompts."""
        self._saving = asyncio.create_task(self._keep_saving())

    async def close(self) -> None:
        """Stops saving. Prompts that wait are not saved."""
        if self._saving is not None:
            self._saving.cancel()
            await asyncio.wait([self._saving])
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._files.close()

    @property
    def hangs(self) -> bool:
        """True while the disk still owes an answer to a read that was given up: others would wait for it in vain."""
        self._hanging = {job for job in self._hanging if not job.done()}
        return bool(self._hanging)

    def known(self, prompt: PromptBlocks, begin: int) -> int:
        """Number of consecutive blocks, from the one with index ``begin``, that the folder seems to have.

        It may have more: other workers of the machine write too, and this one reads the folder only now and then.
        """
        keys = prompt.keys[begin:]
        return next((index for index, key in enumerate(keys) if key not in self.keys), len(keys))

    async def read(
        self, prompt: PromptBlocks, blocks: Sequence[int], begin: int, end: int, timeout: float | None = None
    ) -> int:
        """Reads the prompt's blocks with the indices ``begin..end`` into ``blocks``, the prompt's block table.

        Stops at the first block that is missing or wrong, and after ``timeout`` seconds. After a return or a cancel
        nothing writes to the blocks, although a thread may still wait for the disk.

        Returns:
            Number of blocks, from ``begin``, that are in place.
        """
        placed, names = 0, list[str]()
        try:
            async with asyncio.timeout(timeout), self._reads:
                names = await self._on_thread(self._format.names, prompt, end)
                async for number in self._read_groups(names, blocks, begin):
                    placed += number
        except (TimeoutError, asyncio.CancelledError) as error:
            self._hanging.update(job for job in tuple(self._jobs) if job.running())
            if not isinstance(error, TimeoutError):
                raise
            self._warn("read", "reads from --kv-disk take too long; prompts are computed")
        if placed:
            self._on_thread(self._mark_used, prompt, names[: begin + placed])
        return placed

    def save(self, prompt: PromptBlocks) -> None:
        """Has the prompt's full blocks saved, if they are not on disk and the engine still has them by then.

        Drops the prompt if too many wait. A tenant's prompts fill half of the queue at most.
        """
        if not prompt.keys:  # the limits, which count blocks, would not hold for such prompts
            return
        tenant, waiting = prompt.cache_namespace, (prompt.cache_namespace, prompt.keys[-1])
        if waiting in self._waiting:
            return
        others = self._num_queued.total() - self._num_queued[tenant]
        own = self._num_queued[tenant] + len(prompt.keys)
        if own > _MAX_QUEUED_BLOCKS // 2 or own + others > _MAX_QUEUED_BLOCKS:
            self._counts.dropped(len(prompt.keys))
            return
        self._num_queued[tenant] = own
        self._waiting.add(waiting)
        self._queue.put_nowait(prompt)

    async def _keep_saving(self) -> None:
        await self._attempt(self._on_thread(self._make_room, 0))
        while True:
            prompt = await self._queue.get()
            self._waiting.discard((prompt.cache_namespace, prompt.keys[-1]))
            self._num_queued -= Counter({prompt.cache_namespace: len(prompt.keys)})  # without tenants that have none
            if time.monotonic() < self._paused_until:
                self._counts.dropped(len(prompt.keys))
            else:
                await self._attempt(self._save(prompt))

    async def _attempt(self, work: Awaitable[None]) -> None:
        try:
            await work
        except Exception as error:
            self._paused_until = time.monotonic() + _RETRY
            self._warn("write", f"cannot save KV in --kv-disk; trying again in {_RETRY:g} s: {error}")

    async def _save(self, prompt: PromptBlocks) -> None:
        names = await self._on_thread(self._format.names, prompt, len(prompt.keys))
        missing = await self._on_thread(self._files.touch, names)
        step = max(self._group, min(-(-len(missing) // _MAX_LOANS), self._blocks_in(_MAX_SAVED_BYTES)))
        for start in range(0, len(missing), step):
            began, group = time.monotonic(), missing[start : start + step]
            async with self._lend(prompt.beginning(group[-1] + 1)) as loan:
                group = [index for index in group if (index + 1) * self._format.block_size <= loan.tokens]
                copies = asyncio.get_running_loop().run_in_executor(self._executor, self._copy, names, group, loan)
                contents = await shielded(copies)
            written = await self._on_thread(self._write, [names[index] for index in group], contents)
            await asyncio.sleep(written / self._limits.bandwidth - (time.monotonic() - began))

    async def _read_groups(self, names: Sequence[str], blocks: Sequence[int], begin: int) -> AsyncIterator[int]:
        """Yields how many more blocks are in place, until one is missing or wrong. Reads a group beside a write."""
        loop = asyncio.get_running_loop()
        reading = self._on_thread(self._contents, names[begin : begin + self._group])
        for first in range(begin, len(names), self._group):
            contents, after = await reading, first + self._group
            reading = self._on_thread(self._contents, names[after : after + self._group])
            placed = await shielded(loop.run_in_executor(self._executor, self._place, names, first, contents, blocks))
            yield placed
            if placed < len(names[first:after]):
                return

    def _blocks_in(self, num_bytes: int) -> int:
        """Blocks of a group that takes ``num_bytes``, or 5 % of the folder if that is less; at least one."""
        return max(1, min(num_bytes, self._limits.size // 20) // self._block_bytes)

    def _on_thread(self, function: Callable[..., T], *args: object) -> asyncio.Future[T]:
        job: Future[Any] = self._threads.submit(function, *args)
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        return asyncio.wrap_future(job)

    # On threads ----------------------------------------------------------------------------------------------------

    def _mark_used(self, prompt: PromptBlocks, names: Sequence[str]) -> None:
        missing = set(self._files.touch(names))
        for index, key in enumerate(prompt.keys[: len(names)]):
            if index not in missing:
                self.keys.add(key)  # another worker may have written it

    def _contents(self, names: Sequence[str]) -> list[bytes]:
        """Contents of files, up to the first that is missing. Nothing else, because the reader may have given up."""
        contents: list[bytes] = []
        for name in names:
            try:
                content = self._files.read(name, self._format.max_bytes)
            except NotAFile as error:
                self._discard(name, error)
                break
            except OSError as error:
                self._warn("read", f"cannot read KV from --kv-disk: {error}")
                break
            if content is None:  # another worker has evicted it, or its key is that of another block
                self.keys.remove(key_of(name))
                break
            contents.append(content)
        return contents

    def _place(self, names: Sequence[str], first: int, contents: Sequence[bytes], blocks: Sequence[int]) -> int:
        """Writes contents to the blocks from index ``first``, up to the first wrong one. Returns the number written."""
        for index, content in enumerate(contents, first):
            try:
                self._format.place(names[index], index, content, blocks)
            except TransferFailed as error:
                self._discard(names[index], error)
                return index - first
            self._counts.read(len(content))
        return len(contents)

    def _copy(self, names: Sequence[str], indices: Sequence[int], loan: Loan) -> list[bytes]:
        return [self._format.content(names[index], index, loan.blocks, loan.event) for index in indices]

    def _write(self, names: Sequence[str], contents: Sequence[bytes]) -> int:
        """Writes files and returns their bytes. Raises OSError."""
        if self._allowance < len(contents) * self._block_bytes:
            self._make_room(len(contents))
        for name, content in zip(names, contents, strict=True):
            self._files.write(name, content)
            self.keys.add(key_of(name))
            self._counts.written(len(content))
            self._allowance -= bytes_on_disk(len(content))
            self.used_bytes += bytes_on_disk(len(content))
        return sum(map(len, contents))

    def _make_room(self, num_blocks: int) -> None:
        """Reads the folder, and deletes least recently used files until ``num_blocks``, and at least 5 %, fit.

        It is read again when the worker has written as much, so that what other workers write and use counts too.
        Raises OSError if too few files can be deleted.
        """
        room = max(num_blocks * self._block_bytes, self._limits.size // 20)
        stored = list(self._files.scan())
        now = time.time_ns()

        def used_at(block: StoredBlock) -> int:
            """Takes a time in the future, given before the clock was set back, for long ago: else the file stays."""
            return block.used_ns if block.used_ns <= now else 0

        starts = range(0, len(stored), _SORTED_AT_ONCE)
        runs = [sorted(stored[start : start + _SORTED_AT_ONCE], key=used_at) for start in starts]
        used, evicted, failure = sum(block.num_bytes for block in stored), set[str](), None
        for name, num_bytes, _ in heapq.merge(*runs, key=used_at):
            if used + room <= self._limits.size:
                break
            try:
                self._files.delete(name)
            except OSError as error:  # others may go
                failure = error
            else:
                used -= num_bytes
                evicted.add(name)
        self.used_bytes = used
        self.keys.become({key_of(block.name) for block in stored if block.name not in evicted})
        if evicted:
            self._counts.evicted(len(evicted))
        if failure is not None and used + room > self._limits.size:
            raise failure
        self._allowance = room

    def _discard(self, name: str, reason: Exception) -> None:
        """Deletes a file that is not the KV of its name."""
        self._warn("damaged", f"a file in --kv-disk is not the KV of its name, and is deleted: {reason}")
        self.keys.remove(key_of(name))
        with suppress(OSError):  # a folder, or a file of a read-only folder
            self._files.delete(name)

    def _warn(self, kind: str, text: str) -> None:
        self._counts.failed(kind)
        now = time.monotonic()
        if now - self._warned.get(kind, -_WARNING_GAP) >= _WARNING_GAP:
            self._warned[kind] = now
            logger.warning("%s", text)
