"""KV on disk comes back bit by bit, or not at all."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from overfill.kv import disk, disk_format
from overfill.kv.disk_files import DiskFiles
from overfill.kv.keys import PromptBlocks
from overfill.kv.spec import KvSpec, RopeSpec
from overfill.kv.wire import join_chunks, parse_message
from overfill.rpc.constants import MAX_CHUNK_PAYLOAD
from tests.support.disk_workers import SMALL, DiskWorker, equal_blocks, identity_of, until_known

NewWorker = Callable[..., DiskWorker]
ALL = list(range(8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kv"


@pytest.fixture
async def new_worker(folder: Path) -> AsyncIterator[NewWorker]:
    """Makes workers whose tiers have started; they use one folder unless another is named."""
    workers: list[DiskWorker] = []

    def make(where: Path = folder, **arguments: object) -> DiskWorker:
        workers.append(DiskWorker(where, **arguments))  # type: ignore[arg-type]
        workers[-1].tier.start()
        return workers[-1]

    yield make
    for worker in workers:
        await worker.close()


async def restarted(new_worker: NewWorker, prompt: PromptBlocks, **arguments: object) -> DiskWorker:
    """A worker with other KV in its store, which knows the files of ``prompt``."""
    worker = new_worker(seed=1, **arguments)
    await until_known(worker.tier, prompt, len(prompt.keys))
    return worker


# Round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kv", "block_size"),
    [
        (SMALL, 4),
        (replace(SMALL, dtype="bfloat16"), 16),
        (KvSpec(5, 4, 64, "float32", RopeSpec()), 128),  # several layers in a chunk, several chunks in a file
        (KvSpec(2, 16, 128, "float32", RopeSpec()), 96),  # several chunks in a layer
    ],
)
async def test_a_block_comes_back_bit_by_bit_after_a_restart(
    new_worker: NewWorker, kv: KvSpec, block_size: int
) -> None:
    before = new_worker(identity=identity_of(kv), block_size=block_size)
    prompt = before.prompt()
    await before.save(prompt)
    after = await restarted(new_worker, prompt, identity=identity_of(kv), block_size=block_size)
    assert equal_blocks(before.store, after.store) == []
    assert await after.read(prompt) == 8
    assert equal_blocks(before.store, after.store) == ALL
    largest = max(path.stat().st_size for path in before.paths(prompt))
    assert (largest > MAX_CHUNK_PAYLOAD) == (block_size > 90)


async def test_only_the_blocks_that_are_asked_for_are_written(new_worker: NewWorker) -> None:
    before = new_worker()
    prompt = before.prompt()
    await before.save(prompt)
    after = await restarted(new_worker, prompt)
    assert await after.tier.read(prompt, after.table, 2, 5) == 3
    assert equal_blocks(before.store, after.store) == [2, 3, 4]


async def test_what_the_engine_no_longer_has_is_not_saved_and_each_loan_ends(new_worker: NewWorker) -> None:
    worker = new_worker()
    worker.cached = {worker.prompt().keys[0]: 21, worker.prompt(100).keys[0]: 0}
    await worker.save(worker.prompt(), 5)
    await worker.save(worker.prompt(100), 0)
    await worker.save(worker.prompt(200, 1))
    assert worker.loans == [21, 0, 4]
    assert worker.tier.known(worker.prompt(), 0) == 5
    assert worker.tier.known(worker.prompt(100), 0) == 0


async def test_a_long_prompt_takes_no_more_loans_than_a_shorter_one(
    new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_GROUP_BYTES", 4096)  # a block
    monkeypatch.setattr(disk, "_MAX_SAVED_BYTES", 3 * 4096)
    before = new_worker(num_blocks=256)
    prompt, short, longer = before.prompt(0, 128), before.prompt(5000, 8), before.prompt(9000, 256)
    await before.save(short)
    await before.save(prompt)
    await before.save(longer)
    loans = [list(range(step, tokens + step, step)) for tokens, step in ((32, 4), (512, 8), (1024, 12))]
    loans[-1][-1] = 1024
    assert before.loans == [*itertools.chain(*loans)]  # each of no more blocks than it needs
    after = await restarted(new_worker, prompt, num_blocks=256)
    assert await after.read(prompt) == 128


async def test_blocks_that_are_on_disk_are_not_written_again(new_worker: NewWorker) -> None:
    worker, prompt = new_worker(), None
    prompt = worker.prompt(0, 6)
    await worker.save(prompt)
    await worker.save(worker.prompt(), 2)
    assert worker.counts.number["written"] == 8


async def test_keys_of_what_is_on_disk_are_told_and_those_of_what_is_gone_taken_back(new_worker: NewWorker) -> None:
    before = new_worker()
    prompt = before.prompt()
    await before.save(prompt)
    after = await restarted(new_worker, prompt)
    feed = after.tier.keys.feed()
    delta = feed.take()
    assert delta is not None
    assert set(delta.added) == set(prompt.keys)
    for path in before.paths(prompt)[3:]:
        path.unlink()
    assert after.tier.known(prompt, 0) == 8  # from memory
    assert await after.read(prompt) == 3
    assert after.tier.known(prompt, 0) == 3
    delta = feed.take()
    assert delta is not None
    assert list(delta.removed) == [prompt.keys[3]]
    feed.close()


async def test_a_slow_disk_gets_no_more_than_its_bandwidth(
    new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []

    async def note(seconds: float) -> None:
        waited.append(seconds)

    worker = new_worker(bandwidth=1.0)
    monkeypatch.setattr(disk.asyncio, "sleep", note)
    await worker.save(worker.prompt(0, 2))
    await worker.save(worker.prompt(100, 1))  # after the wait for the first
    num_bytes = sum(path.stat().st_size for path in worker.paths(worker.prompt(0, 2)))
    assert num_bytes - 180 < waited[0] < num_bytes  # less what the test took


async def test_prompts_are_dropped_when_too_many_wait(new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_MAX_QUEUED_BLOCKS", 20)
    worker = new_worker()
    worker.tier.save(worker.prompt())
    worker.tier.save(worker.prompt(100))
    await worker.counts.until(lambda number: number["dropped"] == 8 and number["written"] == 8)
    assert worker.tier.known(worker.prompt(100), 0) == 0
    await worker.save(worker.prompt(200))  # there is room again


async def test_prompts_without_a_full_block_do_not_wait_for_the_disk(new_worker: NewWorker) -> None:
    worker = new_worker()
    for _ in range(100):
        worker.tier.save(PromptBlocks([1, 2, 3], 4, 1, ""))
    assert worker.tier._queue.empty()


async def test_a_prompt_that_waits_to_be_saved_is_not_queued_again(new_worker: NewWorker) -> None:
    worker = new_worker()
    for _ in range(100):
        worker.tier.save(worker.prompt())
    assert worker.tier._queue.qsize() == 1
    await worker.counts.until(lambda number: number["written"] == 8)
    await worker.save(worker.prompt(), 0)


async def test_what_another_worker_has_just_written_is_found(new_worker: NewWorker) -> None:
    writer, reader = new_worker(), new_worker()
    await reader.save(reader.prompt(1000))  # it has read the folder by then, and reads it again much later
    prompt = writer.prompt()
    await writer.save(prompt)
    assert reader.tier.known(prompt, 0) == 0
    assert await reader.read(prompt) == 8
    assert equal_blocks(writer.store, reader.store) == ALL
    await until_known(reader.tier, prompt, 8)


async def test_a_tenant_leaves_half_of_the_queue_to_others(
    new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_MAX_QUEUED_BLOCKS", 40)
    worker = new_worker()
    for first in range(0, 5000, 100):
        worker.tier.save(worker.prompt(first, namespace="floods"))
    theirs = worker.prompt(100, namespace="other")
    worker.tier.save(theirs)
    await worker.counts.until(lambda number: number["written"] == 24)
    assert worker.tier.known(theirs, 0) == 8
    await worker.counts.until(lambda number: number["dropped"] == 48 * 8)
    assert not worker.tier._num_queued


# What is not the KV of its name ----------------------------------------------------------------------------------


async def test_a_flipped_bit_anywhere_in_a_file_is_a_miss(new_worker: NewWorker) -> None:
    before = new_worker()
    prompt = before.prompt(0, 1)
    await before.save(prompt)
    (path,) = before.paths(prompt)
    content = path.read_bytes()
    after = await restarted(new_worker, prompt)
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        assert await after.read(prompt) == 0, position
        assert not path.exists()  # deleted, so that it is computed and saved again
    path.write_bytes(content)
    assert await after.read(prompt) == 1
    await after.counts.until(lambda number: number["damaged failed"] == len(content))


async def test_a_file_that_is_cut_off_or_too_long_is_a_miss(new_worker: NewWorker) -> None:
    before = new_worker()
    prompt = before.prompt(0, 1)
    await before.save(prompt)
    (path,) = before.paths(prompt)
    content = path.read_bytes()
    after = await restarted(new_worker, prompt)
    wrong = [content[:length] for length in range(len(content))]
    for one in [*wrong, content + bytes(1), content * 2, content + bytes(1 << 20)]:
        path.write_bytes(one)
        assert await after.read(prompt) == 0, len(one)
        assert not path.exists()


async def test_a_file_that_lacks_a_chunk_is_a_miss(new_worker: NewWorker) -> None:
    kv = identity_of(KvSpec(5, 4, 64, "float32", RopeSpec()))
    before = new_worker(identity=kv, block_size=128)
    prompt = before.prompt(0, 1)
    await before.save(prompt)
    (path,) = before.paths(prompt)
    content = path.read_bytes()
    first, *others = parse_message(content)
    assert others
    after = await restarted(new_worker, prompt, identity=kv, block_size=128)
    for chunks in ([first], others, [first, *others, first]):
        path.write_bytes(join_chunks(chunks))
        assert await after.read(prompt) == 0
    path.write_bytes(join_chunks([*others, first]))  # their order is free
    assert await after.read(prompt) == 1


async def test_blocks_before_a_damaged_one_are_in_place(
    new_worker: NewWorker, caplog: pytest.LogCaptureFixture
) -> None:
    before = new_worker()
    prompt = before.prompt()
    await before.save(prompt)
    after = await restarted(new_worker, prompt)
    for index in (5, 3):
        path = before.paths(prompt)[index]
        path.write_bytes(path.read_bytes()[:-9] + bytes(9))
        assert await after.read(prompt) == index
        assert set(equal_blocks(before.store, after.store)) >= set(range(index))
    await after.counts.until(lambda number: number["damaged failed"] == 2)
    assert len([line for line in caplog.messages if "is deleted" in line]) == 1  # not one for each


async def test_files_with_swapped_names_are_misses(new_worker: NewWorker) -> None:
    before = new_worker()
    prompt, other = before.prompt(), before.prompt(100)
    await before.save(prompt)
    await before.save(other)
    after = await restarted(new_worker, prompt)
    first, second = before.paths(prompt)[1:3]
    shutil.copy(first, second)
    assert await after.read(prompt) == 2
    assert equal_blocks(before.store, after.store) == [0, 1]
    shutil.copy(before.paths(other)[0], before.paths(prompt)[0])  # the same place in another prompt
    assert await after.read(prompt) == 0


FOREIGN = {
    "text": lambda path: path.write_text("a foreign file"),
    "empty": lambda path: path.write_bytes(b""),
    "link": lambda path: (path.rename(path.parent / "elsewhere"), path.symlink_to(path.parent / "elsewhere")),
    "loop": lambda path: (path.unlink(), path.symlink_to(path)),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("kind", FOREIGN)
async def test_something_else_in_a_files_place_is_a_miss(new_worker: NewWorker, kind: str) -> None:
    before = new_worker()
    prompt = before.prompt()
    await before.save(prompt)
    after = await restarted(new_worker, prompt)
    FOREIGN[kind](before.paths(prompt)[2])
    assert await after.read(prompt) == 2
    await after.counts.until(lambda number: number["damaged failed"] == 1)
    await after.save(prompt, 0 if kind == "folder" else 1)
    third = await restarted(new_worker, before.prompt(0, 2))  # finds the folder as usual
    assert third.counts.number.total() == 0


OTHERS = {
    "model": {"identity": identity_of(full_digest="other")},
    "config": {"identity": identity_of(config_digest="other")},
    "reader": {"identity": identity_of(reader_digest="other", reader_quantize="int8")},
    "layers": {"identity": identity_of(replace(SMALL, num_layers=2))},
    "heads": {"identity": identity_of(replace(SMALL, num_kv_heads=4, head_dim=4))},
    "rope": {"identity": identity_of(replace(SMALL, rope=RopeSpec(theta=5e5)))},
    "dtype": {"identity": identity_of(replace(SMALL, dtype="bfloat16", head_dim=16))},
    "block size": {"block_size": 2},
}


@pytest.mark.parametrize("other", OTHERS)
async def test_a_worker_of_another_kind_finds_nothing_even_under_its_own_names(
    new_worker: NewWorker, other: str
) -> None:
    before = new_worker()
    await before.save(before.prompt())
    after = new_worker(**OTHERS[other], seed=1)
    prompt = after.prompt()
    for key in prompt.keys:
        after.tier.keys.add(key)  # as if the 64-bit keys were equal
    assert await after.read(prompt) == 0
    untouched = after.store.k.clone()
    for path, own in zip(before.paths(before.prompt()), after.paths(prompt), strict=False):
        own.parent.mkdir(exist_ok=True)
        shutil.copy(path, own)
    assert await after.read(prompt) == 0
    await after.counts.until(lambda number: number["damaged failed"] == 1)
    assert after.store.k.equal(untouched)


async def test_files_of_an_older_format_are_not_found_and_evicted_in_their_turn(
    new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_format, "FORMAT_VERSION", 0)
    old = new_worker()
    prompt = old.prompt()
    await old.save(prompt)
    files = old.paths(prompt)
    monkeypatch.undo()
    after = await restarted(new_worker, prompt)  # the routers' keys are equal
    assert await after.read(prompt) == 0
    small = new_worker(size=5 * 4096)
    await small.counts.until(lambda number: number["evicted"] == 4)
    assert sum(path.exists() for path in files) == 4


async def test_tenants_find_their_own_blocks_only(new_worker: NewWorker) -> None:
    before = new_worker()
    mine, theirs = before.prompt(namespace="mine"), before.prompt(namespace="theirs")
    assert mine.tokens == theirs.tokens
    await before.save(mine)
    after = await restarted(new_worker, mine)
    assert after.tier.known(theirs, 0) == 0
    assert await after.read(theirs) == 0
    theirs.keys = mine.keys  # even if all 64-bit keys collide
    assert after.tier.known(theirs, 0) == 8
    assert await after.read(theirs) == 0
    assert await after.read(mine) == 8


async def test_a_prompt_with_the_keys_of_another_gets_nothing_of_it(new_worker: NewWorker) -> None:
    before = new_worker()
    prompt, other = before.prompt(), before.prompt(100)
    await before.save(prompt)
    other.keys = prompt.keys
    after = await restarted(new_worker, prompt)
    assert after.tier.known(other, 0) == 8
    assert await after.read(other) == 0
    assert equal_blocks(before.store, after.store) == []
    await before.save(other)  # both can be kept
    assert await after.read(prompt) == 8
    assert equal_blocks(before.store, after.store) == ALL


# Folders and errors of the disk ----------------------------------------------------------------------------------


def test_the_folder_and_its_files_are_this_users_alone(folder: Path) -> None:
    files = DiskFiles(folder)
    files.write("ab" + "0" * 14 + "-" + "0" * 64, b"content")
    modes = {path.name: path.stat().st_mode & 0o777 for path in [folder, *folder.rglob("*")]}
    assert {mode for name, mode in modes.items() if name in ("kv", "ab")} == {0o700}
    assert {mode for name, mode in modes.items() if name not in ("kv", "ab")} == {0o600}
    files.close()


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o750, 0o755, 0o720, 0o777])
def test_a_folder_that_others_can_use_is_refused(folder: Path, mode: int) -> None:
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(OSError, match=f"mode {mode:04o}; name a new folder inside it"):
        DiskFiles(folder)
    DiskFiles(folder / "inside")


def test_a_folder_of_another_user_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    DiskFiles(folder)
    user = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: user)
    with pytest.raises(OSError, match=f"user {user} must own"):
        DiskFiles(folder)


def test_a_file_in_the_folders_place_is_refused(folder: Path) -> None:
    folder.write_text("")
    with pytest.raises(OSError, match="exists"):
        DiskFiles(folder)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
async def test_when_a_write_fails_nothing_is_saved_for_a_while_and_what_is_there_is_read(
    new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: int
) -> None:
    worker = new_worker()
    await worker.save(worker.prompt(0, 3))
    rename = Path.rename

    def fail(self: Path, target: Path) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(Path, "rename", fail)
    worker.tier.save(worker.prompt(100))
    await worker.counts.until(lambda number: number["write failed"] == 1)
    assert os.strerror(error) in caplog.text
    assert not list(worker.folder.glob("*.part"))  # it would keep the disk full
    worker.tier.save(worker.prompt(200))
    await worker.counts.until(lambda number: number["dropped"] == 8)
    assert await worker.read(worker.prompt(0, 3)) == 3
    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(worker.tier, "_paused_until", 0.0)
    await worker.save(worker.prompt(300))
    assert worker.counts.number["write failed"] == 1


async def test_a_file_that_cannot_be_read_stays_and_is_a_miss(
    new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = new_worker()
    prompt = worker.prompt()
    await worker.save(prompt)
    monkeypatch.setattr(os, "fstat", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    assert await worker.read(prompt) == 0
    await worker.counts.until(lambda number: number["read failed"] == 1)
    monkeypatch.undo()
    assert await worker.read(prompt) == 8


async def test_a_folder_that_is_deleted_is_made_again_and_what_it_had_is_forgotten(
    new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = new_worker()
    prompt = worker.prompt()
    await worker.save(prompt)
    shutil.rmtree(worker.folder)
    worker.tier.save(prompt)
    await worker.counts.until(lambda number: number["write failed"] == 1)
    monkeypatch.setattr(worker.tier, "_paused_until", 0.0)
    monkeypatch.setattr(worker.tier, "_allowance", 0)
    await worker.save(worker.prompt(100))
    assert worker.tier.known(prompt, 0) == 0
    assert worker.folder.stat().st_mode & 0o777 == 0o700
    assert await worker.read(worker.prompt(100)) == 8


async def test_a_file_that_cannot_be_deleted_stays_and_others_go(
    new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = new_worker(size=24 * 4096)  # three prompts
    prompt = worker.prompt()
    await worker.save(prompt)
    names, delete = [path.name for path in worker.paths(prompt)], DiskFiles.delete

    def refuse(files: DiskFiles, name: str) -> None:
        if name in names:
            raise OSError(errno.EPERM, "immutable")
        delete(files, name)

    monkeypatch.setattr(DiskFiles, "delete", refuse)
    for first in range(100, 600, 100):
        await worker.save(worker.prompt(first))
        assert bytes_in(worker.folder) <= 24 * 4096
    assert await worker.read(prompt) == 8
    assert worker.counts.number["write failed"] == 0


async def test_what_cannot_be_deleted_from_a_folder_beyond_its_size_is_read(
    new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = new_worker()
    prompt = before.prompt()
    await before.save(prompt)

    def refuse(files: DiskFiles, name: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(DiskFiles, "delete", refuse)
    after = await restarted(new_worker, prompt, size=4 * 4096)
    assert await after.read(prompt) == 8
    await after.counts.until(lambda number: number["write failed"] == 1)


async def test_a_subfolder_that_cannot_be_read_hides_its_own_files_only(
    new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = new_worker()
    prompt = before.prompt()
    await before.save(prompt)
    broken, scandir = before.paths(prompt)[5].parent, os.scandir

    def refuse(path: object) -> object:
        if os.fspath(path) == str(broken):  # type: ignore[call-overload]
            raise OSError(errno.EIO, "broken")
        return scandir(path)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", refuse)
    after = new_worker(seed=1)
    await after.save(after.prompt(100))
    assert after.tier.known(prompt, 0) == 5
    assert after.counts.number["write failed"] == 0


async def test_a_size_below_one_block_is_refused(folder: Path) -> None:
    with pytest.raises(OSError, match="--kv-disk-size 4095 is less than the 4096 bytes"):
        DiskWorker(folder, size=4095)


class Stuck:
    """Reads of files that hang until ``release``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hangs, self.release, read = threading.Event(), threading.Event(), DiskFiles.read

        def hang(files: DiskFiles, name: str, limit: int) -> bytes | None:
            self.hangs.set()
            self.release.wait()
            return read(files, name, limit)

        monkeypatch.setattr(DiskFiles, "read", hang)


@pytest.mark.parametrize("gives_up", ["cancel", "timeout"])
async def test_a_read_that_hangs_is_given_up_and_writes_nothing_afterwards(
    new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch, gives_up: str
) -> None:
    worker = new_worker()
    prompt = worker.prompt()
    await worker.save(prompt)
    after = await restarted(new_worker, prompt)
    stuck = Stuck(monkeypatch)
    untouched = after.store.k.clone()
    timeout = 0.01 if gives_up == "timeout" else None
    reading = asyncio.create_task(after.tier.read(prompt, after.table, 0, 8, timeout))
    if gives_up == "timeout":
        assert await reading == 0
        await after.counts.until(lambda number: number["read failed"] == 1)
    else:
        await asyncio.to_thread(stuck.hangs.wait)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
    stuck.release.set()
    after.tier._threads.shutdown()  # until the thread that hung has ended
    assert after.store.k.equal(untouched)


async def test_while_a_read_hangs_no_other_is_begun(new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = new_worker()
    prompt = worker.prompt()
    await worker.save(prompt)
    after = await restarted(new_worker, prompt)
    stuck = Stuck(monkeypatch)
    reading = asyncio.create_task(after.tier.read(prompt, after.table, 0, 8))
    await asyncio.to_thread(stuck.hangs.wait)
    reading.cancel()
    await asyncio.wait([reading])
    assert after.tier.hangs  # a prompt that waited for the disk too would hold a thread, or its queue
    stuck.release.set()
    await asyncio.to_thread(after.tier._threads.shutdown)  # until the thread that hung has ended
    assert not after.tier.hangs


async def test_many_prompts_at_once_are_read_one_after_the_other(
    new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = new_worker()
    prompt = worker.prompt()
    await worker.save(prompt)
    stuck = Stuck(monkeypatch)
    reading = [asyncio.create_task(worker.read(prompt)) for _ in range(50)]
    await asyncio.to_thread(stuck.hangs.wait)
    assert len(worker.tier._jobs) <= 4  # the others hold no memory
    stuck.release.set()
    assert await asyncio.gather(*reading) == [8] * 50


async def test_a_cancelled_read_ends_after_the_write_to_the_store(
    new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = new_worker()
    prompt = worker.prompt()
    await worker.save(prompt)
    writes, go_on = threading.Event(), threading.Event()
    write = worker.store.write

    def wait(*arguments: object) -> int:
        writes.set()
        go_on.wait()
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(worker.store, "write", wait)
    reading = asyncio.create_task(worker.read(prompt))
    await asyncio.to_thread(writes.wait)
    reading.cancel()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not reading.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await reading


async def test_closing_gives_back_the_blocks_on_loan(new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = new_worker()
    reads, go_on = threading.Event(), threading.Event()
    read = worker.store.read

    def wait(*arguments: object) -> None:
        reads.set()
        go_on.wait()
        read(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(worker.store, "read", wait)
    worker.tier.save(worker.prompt())
    await asyncio.to_thread(reads.wait)
    closing = asyncio.create_task(worker.tier.close())
    for _ in range(10):
        await asyncio.sleep(0)
    assert worker.loans == []  # a thread still reads them
    go_on.set()
    await closing
    assert worker.loans == [32]


# Size and eviction -----------------------------------------------------------------------------------------------


def bytes_in(folder: Path) -> int:
    with suppress(FileNotFoundError):  # evicted meanwhile
        return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.glob("??/*"))
    return 0


@pytest.mark.parametrize("sorted_at_once", [3, 4096])
async def test_the_folder_never_exceeds_its_size_and_the_least_recently_used_prompt_goes(
    new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch, sorted_at_once: int
) -> None:
    monkeypatch.setattr(disk, "_SORTED_AT_ONCE", sorted_at_once)
    worker = new_worker(size=40 * 4096)  # five prompts
    prompts = [worker.prompt(first) for first in range(0, 900, 100)]
    for prompt in prompts:
        await worker.save(prompt)
        assert bytes_in(worker.folder) <= 40 * 4096
        assert await worker.read(prompts[0]) == 8  # used all the time
    kept = [worker.tier.known(prompt, 0) for prompt in prompts]
    assert kept[0] == 8
    assert kept[-3:] == [8, 8, 8]
    assert kept[1:4] == [0, 0, 0]
    for prompt, number in zip(prompts, kept, strict=True):
        assert await worker.read(prompt) == number
    assert worker.tier.used_bytes == bytes_in(worker.folder)


async def test_of_a_prompt_the_last_blocks_go_first(new_worker: NewWorker) -> None:
    worker = new_worker(size=10 * 4096)
    prompt = worker.prompt()
    await worker.save(prompt)
    await worker.save(prompt, 0)
    await worker.save(worker.prompt(100, 4))
    assert 0 < worker.tier.known(prompt, 0) < 8
    assert await worker.read(prompt) == worker.tier.known(prompt, 0)


async def test_files_of_the_future_go_first_because_the_clock_was_set_back(new_worker: NewWorker) -> None:
    worker = new_worker(size=40 * 4096)
    old = [worker.prompt(first) for first in range(0, 400, 100)]
    future = (time.time_ns() + 3600 * 10**9,) * 2
    for prompt in old:
        await worker.save(prompt)
        for path in worker.paths(prompt):
            os.utime(path, ns=future)
    new = [worker.prompt(first) for first in range(400, 800, 100)]
    for prompt in new:
        await worker.save(prompt)
    assert [worker.tier.known(prompt, 0) for prompt in new] == [8, 8, 8, 8]
    assert 0 in [worker.tier.known(prompt, 0) for prompt in old]


async def test_other_files_in_the_folder_are_left_alone(new_worker: NewWorker, folder: Path) -> None:
    worker = new_worker(size=10 * 4096)
    others = [folder / "notes", folder / "ab" / "notes", folder / "abc" / ("0" * 16 + "-" + "0" * 64)]
    for other in others:
        other.parent.mkdir(exist_ok=True)
        other.write_bytes(bytes(1 << 20))
    for first in range(0, 500, 100):
        await worker.save(worker.prompt(first))
    assert all(other.stat().st_size == 1 << 20 for other in others)


async def test_workers_that_share_a_folder_use_each_others_blocks_and_keep_its_size(new_worker: NewWorker) -> None:
    size = 60 * 4096
    one, other = new_worker(size=size), new_worker(size=size)
    for first in range(0, 2000, 200):
        await one.save(one.prompt(first))
        await other.save(other.prompt(first), 0)  # it is there
        await other.save(other.prompt(first + 100))
        assert bytes_in(one.folder) <= size * 1.1  # 5 % for each
    last = other.prompt(1900)
    assert await one.read(last) == 8  # although it has not read the folder since
    assert {path.name for path in one.folder.glob("writer-*")} == {"writer-0", "writer-1"}


def test_a_worker_that_starts_takes_over_what_a_killed_one_was_writing(folder: Path) -> None:
    killed = DiskFiles(folder)
    killed.write("ab" + "0" * 14 + "-" + "0" * 64, b"content")
    (folder / "writer-0.part").write_bytes(bytes(100))
    killed.close()  # as the end of its process does
    files = DiskFiles(folder)
    files.write("cd" + "0" * 14 + "-" + "0" * 64, b"content")
    assert {path.name for path in folder.iterdir()} == {"ab", "cd", "writer-0"}
    files.close()
