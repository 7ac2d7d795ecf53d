"""Tests which adapters a decode worker loads, who may use them, and when slots are free. The engine is scripted."""

import asyncio
import json
import logging
import threading
from types import SimpleNamespace

import pytest

from overfill.engine.sequence import AdapterChanged, ChangeAdapter
from overfill.errors import (
    DeadlineExceeded,
    Incompatible,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    Unavailable,
)
from overfill.model.adapter import LoraAdapter, read_record
from overfill.v1 import common_pb2, registry_pb2
from services.decode import adapters as worker_adapters
from services.decode.adapters import WorkerAdapters

DECODER, OTHER = "d" * 64, "e" * 64


def digest(name):
    return name.encode().hex().ljust(64, "0")[:64]


def add(folder, name, decoder=DECODER, **changed):
    (folder / name).mkdir()
    record = {
        "format": "overfill-adapter/1", "digest": digest(name), "decoder_digest": decoder, "rank": 8, "tail_tokens": 3,
        "own_prefill": False,
    }  # fmt: skip
    (folder / name / "overfill-adapter.json").write_text(json.dumps(record | changed))


class Slots:
    num_slots, max_rank, slot_bytes = 2, 16, 1 << 20

    def __init__(self):
        self.staged = []

    def stage(self, slot, adapter):
        if adapter.record.rank > self.max_rank:
            raise InvalidRequest("name", f"rank {adapter.record.rank} is larger than {self.max_rank}")
        self.staged.append((slot, adapter.record.name))


class Worker:
    """A worker whose engine changes slots when the test, or ``answers``, lets it."""

    def __init__(self, folder):
        self.slots = Slots()
        self.hello = registry_pb2.Hello(worker_id="w", model=common_pb2.ModelIdentity(decoder_digest=DECODER))
        self.told = []
        self.sent = []
        self.answers = True
        self.error = None
        served = SimpleNamespace(adapters=self.slots, config=None, device=None, engine_version="overfill 1")
        tell = lambda: self.told.append([one.name for one in self.hello.adapters])  # noqa: E731
        self.adapters = WorkerAdapters(folder, served, self.hello, self.send, tell)

    def send(self, message):
        assert isinstance(message, ChangeAdapter)
        self.sent.append((message.slot, None if message.adapter is None else message.adapter.record.name))
        if self.answers:
            asyncio.get_running_loop().call_soon(self.answer, message.slot)

    def answer(self, slot):
        self.adapters.on_changed(AdapterChanged(slot, self.error))


@pytest.fixture
def worker(tmp_path):
    return Worker(tmp_path)


async def test_the_start_loads_what_fits_in_the_order_of_names(tmp_path, worker, caplog):
    caplog.set_level(logging.INFO)
    for name, decoder in (("d", DECODER), ("b", OTHER), ("c", DECODER), ("e", DECODER), ("f", DECODER)):
        add(tmp_path, name, decoder)
    add(tmp_path, "a", rank=17)
    add(tmp_path, "aa", rank="many")
    (tmp_path / "a file").touch()
    await worker.adapters.start()
    assert [(one.name, one.digest, one.tail_tokens) for one in worker.hello.adapters] == [
        ("c", digest("c"), 3), ("d", digest("d"), 3)
    ]  # fmt: skip
    said = [record.getMessage() for record in caplog.records]
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "left out the adapter a: rank 17 is larger than 16" in said
    assert any(line.endswith(f"loaded from {tmp_path}: c, d") and "1.0 MiB" in line for line in said)
    assert "1 adapters are of other decoders than this worker's" in said
    assert [line.split(":")[0] for line in warned] == [
        "left out the adapter a", "left out the adapter aa", "did not look at 2 more folders of adapters"
    ]  # fmt: skip


async def test_an_adapter_that_cannot_be_staged_does_not_end_the_start(tmp_path, worker, caplog, monkeypatch):
    stage = worker.slots.stage

    def full(slot, adapter):
        if adapter.record.name == "a":
            raise OSError("no space left on device")
        stage(slot, adapter)

    monkeypatch.setattr(worker.slots, "stage", full)
    for name in ("a", "b", "c"):
        add(tmp_path, name)
    await worker.adapters.start()
    assert worker.told[-1] == ["b", "c"], "no slot was lost"
    assert "left out the adapter a: a: no space left on device" in caplog.text


async def test_the_start_stops_looking_when_its_time_is_over(tmp_path, worker, monkeypatch, caplog):
    monkeypatch.setattr(worker_adapters, "_SCAN_TIME", -1.0)
    for name in ("a", "b", "c"):
        add(tmp_path, name, OTHER)
    await worker.adapters.start()
    assert caplog.messages[-1] == "did not look at 2 more folders of adapters: the time for it is over"


@pytest.mark.parametrize("gone", [True, False])
async def test_a_folder_that_vanishes_or_hangs_does_not_hold_the_start(tmp_path, gone, monkeypatch, caplog):
    worker, hangs = Worker(tmp_path / "gone" if gone else tmp_path), threading.Event()
    add(tmp_path, "a")
    monkeypatch.setattr(worker_adapters, "CHANGE_TIMEOUT", 60 if gone else 0.01)
    monkeypatch.setattr(worker_adapters, "adapter_names", lambda folder, of=worker_adapters.adapter_names: (
        gone or hangs.wait(60), of(folder)
    )[1])  # fmt: skip
    await worker.adapters.start()
    assert not worker.hello.adapters
    assert ("No such file" if gone else "it goes on beside requests") in caplog.text
    if not gone:
        monkeypatch.setattr(worker_adapters, "CHANGE_TIMEOUT", 60)
        hangs.set()
        await worker.adapters.load("a")
        assert worker.told == [["a"]], "it was loaded once"


async def test_an_adapter_is_loaded_once_and_used_by_its_digest(tmp_path, worker):
    add(tmp_path, "a")
    first, second = await asyncio.gather(worker.adapters.load("a"), worker.adapters.load("a"))
    assert first == second == await worker.adapters.load("a") == worker.hello.adapters[0]
    assert worker.sent == [(0, "a")]
    with worker.adapters.use(digest("a")) as slot:
        assert slot == 0
    with pytest.raises(Unavailable, match="w has no adapter with the digest 62"), worker.adapters.use(digest("b")):
        pass


async def test_an_unloaded_adapter_leaves_its_slot_with_its_last_user(tmp_path, worker):
    for name in ("a", "b", "c"):
        add(tmp_path, name)
    await worker.adapters.load("a")
    await worker.adapters.load("b")
    with worker.adapters.use(digest("a")):
        with worker.adapters.use(digest("a")):
            unloaded = await worker.adapters.unload("a")
            assert (unloaded.name, worker.told[-1]) == ("a", ["b"])
            with pytest.raises(Unavailable), worker.adapters.use(digest("a")):
                pass
        for name in ("a", "c"):
            with pytest.raises(Overloaded, match=r"all 2 slots: b, and a, whose 1 answers must end; .*--max-adapters"):
                await worker.adapters.load(name)
        assert worker.sent == [(0, "a"), (1, "b")]
    await worker.adapters.load("c")  # waits for the engine, which empties the slot now
    assert worker.sent[2:] == [(0, None), (0, "c")]
    assert worker.told[-1] == ["b", "c"]
    with pytest.raises(ModelNotFound, match="w has no adapter 'a' loaded; loaded: b, c"):
        await worker.adapters.unload("a")


async def test_a_slot_that_the_engine_has_just_emptied_is_waited_for(tmp_path, worker):
    for name in ("a", "b"):
        add(tmp_path, name)
        await worker.adapters.load(name)
    worker.answers = False
    await worker.adapters.unload("b")
    worker.answer(1)
    assert await worker.adapters._take_slot() == 1


async def test_a_slot_that_the_engine_does_not_empty_is_not_used_again(tmp_path, worker, caplog):
    for name in ("a", "b"):
        add(tmp_path, name)
        await worker.adapters.load(name)
    worker.error = InternalError("1 sequences use it")
    await worker.adapters.unload("b")
    with pytest.raises(Overloaded, match="all 2 slots: a; unload one"):
        await worker.adapters.load("b")
    assert "slot 1 of b stays unused: 1 sequences use it" in caplog.messages


async def test_what_cannot_be_loaded_is_refused_by_its_reason(tmp_path, worker):
    add(tmp_path, "other", OTHER)
    add(tmp_path, "damaged", digest="x")
    add(tmp_path, "large", rank=17)
    (tmp_path / "link").symlink_to(tmp_path / "other")
    add(tmp_path, "a")
    for name, error, reason in (
        ("missing", ModelNotFound, "no adapter 'missing': w finds no such folder"),
        ("../x", InvalidRequest, "^name: '../x' is no name"),
        ("", InvalidRequest, "^name: '' is no name"),
        ("other", Incompatible, "is of the decoder eeee"),
        ("damaged", InvalidRequest, "^name: .*overfill-adapter.json: digest is 'x'"),
        ("large", InvalidRequest, "^name: rank 17 is larger than 16"),
        ("link", InvalidRequest, "^name: .* is a link"),
    ):
        with pytest.raises(error, match=reason):
            await worker.adapters.load(name)
    worker.error = RuntimeError("no memory")
    with pytest.raises(InternalError, match="a: no memory"):
        await worker.adapters.load("a")
    worker.error = None
    assert worker.told == []
    for name in ("a", "b"):  # no slot was lost
        (tmp_path / name).exists() or add(tmp_path, name)
        await worker.adapters.load(name)
    record = tmp_path / "a" / "overfill-adapter.json"
    before = record.read_text()
    for old, new in ((digest("a"), digest("A")), ('"tail_tokens": 3', '"tail_tokens": 4')):
        record.write_text(before.replace(old, new))
        with pytest.raises(Incompatible, match=r"another adapter 'a', 61.* with tail_tokens 3, .*: unload it first"):
            await worker.adapters.load("a")


async def test_a_folder_that_changes_between_record_and_weights_is_refused(tmp_path, worker, monkeypatch):
    add(tmp_path, "a")

    def changing(folder):
        record = read_record(folder)
        file = folder / "overfill-adapter.json"
        file.write_text(file.read_text().replace('"rank": 8', '"rank": 9'))
        return record

    worker.adapters._device = "cpu"
    monkeypatch.setattr(worker_adapters, "use_device", lambda device: None)
    monkeypatch.setattr(worker_adapters, "read_record", changing)
    monkeypatch.setattr(
        worker_adapters, "read_adapter", lambda folder, config, ranks: LoraAdapter(read_record(folder), {})
    )
    with pytest.raises(InvalidRequest, match="changed while it was read"):
        await worker.adapters.load("a")
    assert (worker.slots.staged, worker.sent) == ([], [])


async def test_a_slow_load_goes_on_when_its_caller_gives_up(tmp_path, worker, monkeypatch):
    add(tmp_path, "a")
    worker.answers = False
    monkeypatch.setattr(worker_adapters, "CHANGE_TIMEOUT", 0.01)
    with pytest.raises(DeadlineExceeded, match=r"w still loads the adapter 'a' after 0\.01 s"):
        await worker.adapters.load("a")
    with pytest.raises(DeadlineExceeded, match="unload it when it is loaded"):
        await worker.adapters.unload("a")
    monkeypatch.setattr(worker_adapters, "CHANGE_TIMEOUT", 60)
    again = asyncio.ensure_future(worker.adapters.load("a"))
    while not worker.sent:
        await asyncio.sleep(0)
    worker.answer(0)
    assert (await again).name == "a"
    assert worker.sent == [(0, "a")]
