"""The adapters of a decode worker: loads them from its folder into the engine's slots, and counts their sequences.

The folder is the source of truth when a worker starts. Later, routers ask for single adapters by name.

- **Off the loop.** A thread reads the files and prepares the slot, one adapter at a time. A caller waits at most
  ``CHANGE_TIMEOUT``. The work then goes on, and another call returns its result.
- **Unloading.** New requests for the adapter are refused at once. Its slot is emptied when its last sequence has left
  the engine.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from overfill.engine.device import use_device
from overfill.engine.protocol import AdapterSlots, ServedHalf
from overfill.engine.sequence import AdapterChanged, ChangeAdapter
from overfill.errors import (
    DeadlineExceeded,
    Incompatible,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    OverfillError,
    Overloaded,
    Unavailable,
)
from overfill.model.adapter import AdapterRecord, LoraAdapter, check_name, read_adapter, read_record
from overfill.model.adapter_files import InvalidAdapter
from overfill.pair.adapters import adapter_names
from overfill.v1 import common_pb2, registry_pb2

logger = logging.getLogger(__name__)

CHANGE_TIMEOUT = 60.0
"""Maximum seconds for which a call waits until an adapter is loaded, and the start until all are."""

_SCAN_TIME = 10.0
"""Maximum seconds in which the records of the folder are read at the start."""

_MAX_WARNINGS = 10
"""Maximum number of invalid folders that the start names."""

_T = TypeVar("_T")


@dataclass(eq=False, slots=True)
class _Loaded:
    """An adapter in a slot.

    Attributes:
        users: number of sequences that the engine may still compute with it.
        unloaded: whether new sequences are refused.
        emptied: done when the engine has emptied the slot; None before it was asked.
    """

    record: AdapterRecord
    slot: int
    users: int = 0
    unloaded: bool = False
    emptied: asyncio.Future[Exception | None] | None = None


@dataclass(slots=True)
class _Scan:
    """What the start knows of the folders.

    Attributes:
        names: those that it has not looked at.
        spent: seconds in which it has read records.
        others: number of adapters of other decoders.
        faults: what is wrong with further ones.
    """

    names: Iterator[str]
    spent: float = 0.0
    others: int = 0
    faults: list[str] = field(default_factory=list)


class WorkerAdapters:
    """Loads adapters into the engine's slots and takes them out. All methods are called on the event loop.

    Args:
        folder: has a folder for each adapter, named after it.
        served: the decoder, with slots.
        hello: the worker's description. Its ``adapters`` are kept as those that requests may use.
        send: sends a message to the engine.
        changed: called after each change of ``hello.adapters``.

    Raises:
        InvalidRequest: the engine takes no adapters.
    """

    def __init__(
        self,
        folder: Path,
        served: ServedHalf,
        hello: registry_pb2.Hello,
        send: Callable[[object], None],
        changed: Callable[[], None],
    ) -> None:
        if served.adapters is None:
            raise InvalidRequest("--adapters", f"{served.engine_version} takes no adapters here; remove the setting")
        self._slots: AdapterSlots = served.adapters
        self._folder = folder
        self._config = served.config
        self._device = served.device
        self._hello = hello
        self._send = send
        self._changed = changed
        self._free = list(range(self._slots.num_slots))
        self._loaded: dict[str, _Loaded] = {}  # by name
        self._leaving: set[_Loaded] = set()
        self._changing: dict[int, asyncio.Future[Exception | None]] = {}  # slots that the engine changes now
        self._loading: dict[str, asyncio.Task[common_pb2.Adapter]] = {}  # by name
        self._load_lock = asyncio.Lock()  # one adapter is loaded at a time

    async def start(self) -> None:
        """Loads the folder's adapters that fit, in the order of their names, until the slots are full.

        Waits ``CHANGE_TIMEOUT`` at most; slower ones become known later.
        """
        loading = asyncio.ensure_future(self._load_all())
        done, _ = await asyncio.wait([loading], timeout=CHANGE_TIMEOUT)
        if done:
            loading.result()
        else:
            logger.warning(
                "%s: loading takes longer than %g s; it goes on beside requests", self._folder, CHANGE_TIMEOUT
            )

    async def load(self, name: str) -> common_pb2.Adapter:
        """Loads the adapter ``name``, unless it is loaded, and returns it.

        Raises:
            InvalidRequest: the name is not allowed, or the adapter is damaged or does not fit the slots.
            ModelNotFound: there is no such folder.
            Incompatible: the adapter is another decoder's, or the loaded one of this name has another digest.
            Overloaded: no slot is free.
            DeadlineExceeded: loading takes too long; it goes on.
        """
        try:
            check_name(name)
            if (task := self._loading.get(name)) is None:
                task = self._loading[name] = asyncio.ensure_future(self._load(name))
                task.add_done_callback(lambda task: self._forget(name, task))
            done, _ = await asyncio.wait([task], timeout=CHANGE_TIMEOUT)
            if not done:
                raise DeadlineExceeded(
                    f"{self._who} still loads the adapter {name!r} after {CHANGE_TIMEOUT:g} s; ask again later"
                )
            return task.result()
        except InvalidAdapter as error:
            raise InvalidRequest("name", str(error)) from error

    async def unload(self, name: str) -> common_pb2.Adapter:
        """Refuses new requests for the adapter ``name``, and returns it. The running ones are finished.

        Raises:
            ModelNotFound: no such adapter is loaded.
            DeadlineExceeded: it is being loaded, which takes too long.
        """
        if (task := self._loading.get(name)) is not None:
            done, _ = await asyncio.wait([task], timeout=CHANGE_TIMEOUT)
            if not done:
                raise DeadlineExceeded(f"{self._who} still loads the adapter {name!r}; unload it when it is loaded")
        if (loaded := self._loaded.pop(name, None)) is None:
            names = ", ".join(sorted(self._loaded)) or "none"
            raise ModelNotFound(f"{self._who} has no adapter {name!r} loaded; loaded: {names}")
        loaded.unloaded = True
        self._leaving.add(loaded)
        self._announce()
        logger.info("unloaded the adapter %s; %d sequences use it still", name, loaded.users)
        self._empty_unused(loaded)
        return _to_proto(loaded.record)

    @contextmanager
    def use(self, digest: str) -> Iterator[int]:
        """Yields the slot of the adapter with ``digest``, which keeps it until the end of the context.

        By then the engine must have got the ``Release`` of each sequence that uses it.

        Raises:
            Unavailable: no such adapter is loaded.
        """
        loaded = next((one for one in self._loaded.values() if one.record.digest == digest), None)
        if loaded is None:
            raise Unavailable(f"{self._who} has no adapter with the digest {digest[:16]} loaded")
        loaded.users += 1
        try:
            yield loaded.slot
        finally:
            loaded.users -= 1
            self._empty_unused(loaded)

    def on_changed(self, event: AdapterChanged) -> None:
        """Takes the engine's answer to ``ChangeAdapter``."""
        self._changing.pop(event.slot).set_result(event.error)

    @property
    def _who(self) -> str:
        return self._hello.worker_id

    def _forget(self, name: str, task: asyncio.Task[common_pb2.Adapter]) -> None:
        del self._loading[name]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.warning("the adapter %s is not loaded: %s", name, error)

    async def _load(self, name: str) -> common_pb2.Adapter:
        async with self._load_lock:
            record = await self._in_thread(lambda: self._record(name))
            if (loaded := self._loaded.get(name)) is not None:
                if _to_proto(loaded.record) == _to_proto(record):
                    return _to_proto(record)
                ours, theirs = (
                    f"{one.digest[:16]} with tail_tokens {one.tail_tokens}" for one in (loaded.record, record)
                )
                raise Incompatible(
                    f"{self._who} has loaded another adapter {name!r}, {ours}, than the folder's, {theirs}: "
                    "unload it first",
                    ["name"],
                )
            if record.decoder_digest != self._hello.model.decoder_digest:
                raise Incompatible(
                    f"the adapter {name!r} is of the decoder {record.decoder_digest[:16]}; {self._who} runs "
                    f"{self._hello.model.decoder_digest[:16]}",
                    ["decoder_digest"],
                )
            await self._put(record)
            return _to_proto(record)

    def _record(self, name: str) -> AdapterRecord:
        folder = self._folder / name
        if not os.path.lexists(folder):
            raise ModelNotFound(f"no adapter {name!r}: {self._who} finds no such folder in {self._folder}")
        return read_record(folder)

    async def _put(self, record: AdapterRecord) -> None:
        """Loads the adapter of ``record`` into a free slot of the engine."""
        name, slot = record.name, await self._take_slot()
        try:
            adapter = await self._in_thread(lambda: self._stage(slot, record))
            if (error := await self._change(slot, adapter)) is not None:
                raise error
        except BaseException as error:
            self._free.append(slot)
            if isinstance(error, OverfillError) or not isinstance(error, Exception):
                raise
            raise InternalError(f"{name}: {error}") from error
        self._loaded[name] = _Loaded(record, slot)
        self._announce()
        logger.info("loaded the adapter %s, %s, in slot %d", name, record.digest[:16], slot)

    def _stage(self, slot: int, record: AdapterRecord) -> LoraAdapter:
        folder = self._folder / record.name
        if self._device is None:  # the mock engine has no weights
            adapter = LoraAdapter(record, {})
        else:
            adapter = read_adapter(folder, self._config, self._slots.max_rank)
        if adapter.record != record:
            raise InvalidAdapter(f"{folder}: changed while it was read; load it again")
        self._slots.stage(slot, adapter)
        return adapter

    async def _take_slot(self) -> int:
        while not self._free and (soon := [one.emptied for one in self._leaving if one.emptied is not None]):
            await asyncio.wait(soon, return_when=asyncio.FIRST_COMPLETED)
        if self._free:
            self._free.sort()
            return self._free.pop(0)
        names = ", ".join(sorted(self._loaded))
        left = "".join(f", and {one.record.name}, whose {one.users} answers must end" for one in self._leaving)
        raise Overloaded(
            f"{self._who} has adapters in all {self._slots.num_slots} slots: {names}{left}; unload one, or raise "
            "--max-adapters",
            reason="adapters",
        )

    def _empty_unused(self, loaded: _Loaded) -> None:
        if loaded.users or not loaded.unloaded:
            return

        def emptied(answer: asyncio.Future[Exception | None]) -> None:
            self._leaving.discard(loaded)
            if (error := answer.result()) is None:
                self._free.append(loaded.slot)
            else:  # it may be in use
                logger.error("slot %d of %s stays unused: %s", loaded.slot, loaded.record.name, error)

        loaded.emptied = self._change(loaded.slot, None)
        loaded.emptied.add_done_callback(emptied)

    def _change(self, slot: int, adapter: LoraAdapter | None) -> asyncio.Future[Exception | None]:
        """Asks the engine to change a slot. The result is why it is empty, if that is an error."""
        answer = self._changing[slot] = asyncio.get_running_loop().create_future()
        self._send(ChangeAdapter(slot, adapter))
        return answer

    def _announce(self) -> None:
        """Updates ``hello`` and tells the routers."""
        del self._hello.adapters[:]
        self._hello.adapters.extend(_to_proto(self._loaded[name].record) for name in sorted(self._loaded))
        self._changed()

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        # A thread that lived on would keep a team of OpenMP's beside that of the engine's thread.
        thread = ThreadPoolExecutor(1, "adapters", use_device, (self._device,))
        try:
            return await asyncio.get_running_loop().run_in_executor(thread, work)
        finally:
            thread.shutdown(wait=False)

    async def _load_all(self) -> None:
        async with self._load_lock:
            try:
                names = await self._in_thread(lambda: adapter_names(self._folder))
            except InvalidAdapter as error:
                logger.warning("%s", error)
                return
            scan = _Scan(iter(names))
            while self._free and (record := await self._in_thread(lambda: self._next_fitting(scan))) is not None:
                try:
                    await self._put(record)
                except OverfillError as error:
                    reason = error.reason if isinstance(error, InvalidRequest) else error
                    scan.faults.append(f"{record.name}: {reason}")
        self._log_start(scan)

    def _next_fitting(self, scan: _Scan) -> AdapterRecord | None:
        """Returns the record of the next adapter of this worker's decoder; None without one, or when time is over."""
        began = time.monotonic() - scan.spent
        for name in scan.names:
            try:
                record = read_record(self._folder / name)
            except InvalidAdapter as error:
                scan.faults.append(f"{name}: {error}")
                record = None
            scan.spent = time.monotonic() - began
            if record is not None and record.decoder_digest == self._hello.model.decoder_digest:
                return record
            scan.others += record is not None
            if scan.spent > _SCAN_TIME:
                break
        return None

    def _log_start(self, scan: _Scan) -> None:
        slots, loaded = self._slots, ", ".join(sorted(self._loaded)) or "none"
        logger.info(
            "%d slots for adapters take %.1f MiB each; loaded from %s: %s",
            slots.num_slots,
            slots.slot_bytes / (1 << 20),
            self._folder,
            loaded,
        )
        if scan.others:
            logger.info("%d adapters are of other decoders than this worker's", scan.others)
        for fault in scan.faults[:_MAX_WARNINGS]:
            logger.warning("left out the adapter %s", fault)
        if (more := len(scan.faults) - _MAX_WARNINGS) > 0:
            logger.warning("left out %d more adapters that are not valid", more)
        if left := sum(1 for _ in scan.names):
            why = "the time for it is over" if self._free else "all slots are taken; --max-adapters has their number"
            logger.warning("did not look at %d more folders of adapters: %s", left, why)


def _to_proto(record: AdapterRecord) -> common_pb2.Adapter:
    return common_pb2.Adapter(name=record.name, digest=record.digest, tail_tokens=record.tail_tokens)
