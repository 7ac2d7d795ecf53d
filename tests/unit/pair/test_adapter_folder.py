"""Tests the folder of adapters: what may be added to it, and that an adapter appears and disappears whole."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from peft_adapters import save_peft

from overfill.making.tiny import make_tiny_pair
from overfill.model.adapter import RECORD, AdapterRecord, read_adapter, read_record
from overfill.model.adapter_files import InvalidAdapter
from overfill.model.manifest import Pair
from overfill.pair.adapters import (
    adapter_names,
    add_adapter,
    default_folder,
    remove_adapter,
    write_record,
)


@pytest.fixture(scope="module")
def pair(tiny_pair: Path) -> Pair:
    return Pair.load(tiny_pair)


@pytest.fixture(scope="module")
def peft(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_peft(pair, tmp_path_factory.mktemp("peft"), target_modules=["q_proj"])


def records(folder: Path) -> list[AdapterRecord]:
    return [read_record(folder / name) for name in adapter_names(folder)]


def test_what_is_added_is_listed_until_it_is_removed(pair: Pair, peft: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "adapters"
    coder = add_adapter(folder, "coder", peft, pair, tail_tokens=2, own_prefill=False)
    planner = add_adapter(folder, "a.planner-2", peft, pair)
    assert records(folder) == [planner, coder]
    assert (planner.own_prefill, planner.tail_tokens, coder.own_prefill, coder.tail_tokens) == (True, 0, False, 2)
    assert read_adapter(folder / "coder", pair.decoder_config).record == coder
    remove_adapter(folder, "coder")
    assert records(folder) == [planner]
    assert [path.name for path in folder.iterdir()] == ["a.planner-2"], "nothing else is left"
    with pytest.raises(InvalidAdapter, match=r"has no adapter 'coder'; there are a\.planner-2"):
        remove_adapter(folder, "coder")


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", ".hidden", "-x", "a" * 65, "é", "a b", "a\n", "a\0"])
def test_a_name_is_no_path(pair: Pair, peft: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "adapters"
    with pytest.raises(InvalidAdapter, match="is no name for an adapter: give 1 to 64"):
        add_adapter(folder, name, peft, pair)
    assert not folder.exists()
    folder.mkdir()
    with pytest.raises(InvalidAdapter, match="has no adapter"):
        remove_adapter(folder, name)
    assert peft.exists()


def test_a_name_that_is_taken_stays_as_it_is(
    pair: Pair, peft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = add_adapter(tmp_path, "planner", peft, pair, tail_tokens=1)
    with pytest.raises(InvalidAdapter, match="there is an adapter planner already; remove it first"):
        add_adapter(tmp_path, "planner", peft, pair)
    # Another process adds it after the check.
    exists = iter([False, True])
    monkeypatch.setattr("overfill.pair.adapters.os.path.lexists", lambda _: next(exists))
    with pytest.raises(InvalidAdapter, match="there is an adapter planner already; remove it first"):
        add_adapter(tmp_path, "planner", peft, pair)
    monkeypatch.undo()
    assert records(tmp_path) == [first]
    assert [path.name for path in tmp_path.iterdir()] == ["planner"], "no temporary folder is left"


def test_an_adapter_that_cannot_be_written_whole_leaves_nothing(
    pair: Pair, peft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.write_bytes

    def full(file: Path, data: bytes) -> int:
        if file.name == RECORD:  # the last file
            raise OSError(errno.ENOSPC, "no space left")
        return real(file, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space left"):
        add_adapter(tmp_path, "planner", peft, pair)
    assert [*tmp_path.iterdir()] == []


def test_what_training_recorded_is_taken_over_and_compared(pair: Pair, tmp_path: Path) -> None:
    trained = save_peft(pair, tmp_path / "trained", target_modules=["v_proj"])
    written = write_record(trained, pair, tail_tokens=7, own_prefill=False, training={"examples": 1000})
    folder = tmp_path / "adapters"
    added = add_adapter(folder, "coder", trained, pair)
    assert (added.digest, added.tail_tokens, added.own_prefill) == (written.digest, 7, False)
    assert json.loads((folder / "coder" / RECORD).read_text())["training"] == {"examples": 1000}
    assert add_adapter(folder, "other", trained, pair, tail_tokens=0, own_prefill=True).own_prefill
    other = Pair.load(make_tiny_pair(tmp_path / "pair", seed=1))
    with pytest.raises(InvalidAdapter, match=r"decoder_digest is .* belongs to another decoder"):
        add_adapter(folder, "third", trained, other)
    save_peft(pair, trained, seed=1, target_modules=["v_proj"])
    with pytest.raises(InvalidAdapter, match=r"digest is .* or its files were changed"):
        add_adapter(folder, "third", trained, pair)


def test_only_folders_that_may_be_adapters_are_listed(tmp_path: Path) -> None:
    for name in ("two", "one", ".three.tmp-0", "a b"):  # a killed process leaves the third
        (tmp_path / name).mkdir()
    (tmp_path / "README").touch()
    (tmp_path / "link").symlink_to(tmp_path / "one")
    assert adapter_names(tmp_path) == ["one", "two"]
    with pytest.raises(InvalidAdapter, match="cannot read the folder of adapters: No such file"):
        adapter_names(tmp_path / "absent")


def test_pairs_of_one_full_model_share_the_default_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_family: dict[str, Path]
) -> None:
    monkeypatch.setenv("OVERFILL_HOME", str(tmp_path))
    (folder,) = {default_folder(Pair.load(folder)) for folder in tiny_family.values()}
    other = default_folder(Pair.load(make_tiny_pair(tmp_path / "pair", seed=1)))
    assert folder != other
    assert folder.parent == other.parent == tmp_path / "adapters"
