from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import NoReturn

import pytest

from overfill.cli.main import main
from overfill.errors import InvalidPair
from overfill.making import named
from overfill.making.atomic import atomic_folder
from overfill.making.recipe import DecoderRecipe
from overfill.making.sources import SourceUnavailable
from overfill.model.pair_files import load_whole
from overfill.pair import store
from overfill.pair.checksums import CHECKSUMS_FILE, checksums_match
from overfill.process.home import home
from overfill.telemetry.progress import silent

RECIPES = {
    "default": DecoderRecipe(intermediate_size=64, fit="none", tokens=512),
    "fast": DecoderRecipe(intermediate_size=32, fit="none", tokens=512),
    "identity": DecoderRecipe(),
}


class Downloads:
    """Replaces and counts the downloads of the full model."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.sources: list[str] = []
        self.error: BaseException | None = None

    def fetch(self, source: str, out: Path, report: object) -> None:
        self.sources.append(source)
        shutil.copytree(self.model, out, dirs_exist_ok=True)
        if self.error is not None:
            raise self.error


@pytest.fixture
def downloads(tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Downloads:
    downloads = Downloads(tiny_pair / "full")
    monkeypatch.setenv("OVERFILL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("overfill.making.sources.fetch_default", downloads.fetch)
    monkeypatch.setattr(named, "RECIPES", RECIPES)
    # In this process, where the download is replaced.
    monkeypatch.setattr(store, "_prepare_elsewhere", named.prepare)
    return downloads


def test_named_pairs_are_prepared_once_and_share_the_full_model(downloads: Downloads) -> None:
    pairs = {name: load_whole(store.resolve_pair(name), digests=True) for name in ("default", "fast", "identity")}
    assert [p.decoder_config.intermediate_size for p in pairs.values()] == [64, 32, 128]
    assert pairs["identity"].identity
    assert pairs["default"].name == "default"
    assert len({(p.folder / "full").resolve() for p in pairs.values()}) == 1
    assert not os.path.isabs(os.readlink(pairs["default"].folder / "full"))
    assert store.resolve_pair("default") == pairs["default"].folder
    assert downloads.sources == ["wheel"]


def test_the_list_says_which_pairs_are_ready(downloads: Downloads, capsys: pytest.CaptureFixture[str]) -> None:
    ready, outdated = store.resolve_pair("default"), home() / "pairs" / "v0" / "old"
    shutil.copytree(ready, outdated)
    (ready.parent / "fast").mkdir()
    assert main(["pair", "list", "--json"]) == 0
    pairs = json.loads(capsys.readouterr().out)
    assert [(pair["name"], pair["state"], pair["folder"]) for pair in pairs] == [
        ("default", "ready", str(ready)),
        ("fast", "damaged", str(ready.parent / "fast")),
        ("identity", "not prepared", str(ready.parent / "identity")),
        ("old", "outdated", str(outdated)),
    ]
    assert pairs[0]["decoder"]["weights"] < pairs[0]["full"]["weights"]
    assert main(["pair", "list"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in table[1:3]] == [["default", "ready"], ["fast", "damaged"]]
    assert len(downloads.sources) == 1, "the list prepares nothing"


def test_the_cache_can_be_moved(downloads: Downloads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.resolve_pair("default")
    (tmp_path / "home").rename(tmp_path / "elsewhere")
    monkeypatch.setenv("OVERFILL_HOME", str(tmp_path / "elsewhere"))
    load_whole(store.resolve_pair("default"), digests=True)
    assert downloads.sources == ["wheel"]


@pytest.mark.parametrize("error", [SourceUnavailable("no network"), KeyboardInterrupt()])
def test_an_interrupted_download_leaves_nothing_that_looks_ready(
    error: BaseException, downloads: Downloads, tmp_path: Path
) -> None:
    downloads.error = error
    with pytest.raises(type(error)):
        store.resolve_pair("default")
    assert list((tmp_path / "home" / "models").iterdir()) == []
    downloads.error = None
    load_whole(store.resolve_pair("default"), digests=True)


def test_leftovers_of_a_killed_process_are_cleared(downloads: Downloads, tmp_path: Path) -> None:
    leftovers = [
        tmp_path / "home" / "pairs" / store.VERSION / ".default.tmp-00000000",
        tmp_path / "home" / "models" / f".{store.MODEL}-wheel.tmp-00000000",
    ]
    for leftover in leftovers:
        leftover.mkdir(parents=True)
        (leftover / "model.safetensors").write_bytes(b"half")
    store.resolve_pair("default")
    assert not any(leftover.exists() for leftover in leftovers)


@pytest.mark.parametrize("half", ["full", "decoder"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_file_is_made_again(half: str, damage: str, downloads: Downloads) -> None:
    file = store.resolve_pair("default") / half / "model.safetensors"
    good = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(good[:-4] if damage == "truncated" else good[:-4] + b"\0\0\0\0")
        os.utime(file, ns=(0, 0))
    load_whole(store.resolve_pair("default"), digests=True)
    assert file.read_bytes() == good
    assert len(downloads.sources) == (2 if half == "full" else 1)


def test_a_copy_that_was_interrupted_at_any_byte_is_noticed(downloads: Downloads) -> None:
    folder = store.resolve_pair("default")
    rng = random.Random(0)
    for half in (folder, folder / "full"):
        for file in [file for file in half.rglob("*") if file.is_file() and half.resolve() in file.resolve().parents]:
            whole, times = file.read_bytes(), file.stat()
            # The checksums guard the other files by their size.
            lengths = {*rng.sample(range(len(whole)), min(10, len(whole)))}
            if file.name == CHECKSUMS_FILE:
                ends = [match.end() for match in re.finditer(b"\n", whole)]
                lengths |= {0, *range(0, len(whole), 7), *(end - 1 for end in ends), *ends} - {len(whole)}
            for length in lengths:
                os.truncate(file, length)
                # A checksums file without its last newline still holds every entry.
                assert checksums_match(half) == (file.name == CHECKSUMS_FILE and length == len(whole) - 1), (
                    f"{file} at byte {length}"
                )
                file.write_bytes(whole)
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
            assert checksums_match(half)


def test_asking_for_another_source_makes_the_pair_again(downloads: Downloads) -> None:
    store.resolve_pair("default")
    store.resolve_pair("default", source="hub")
    store.resolve_pair("default")
    assert downloads.sources == ["wheel", "hub"]
    assert (store.resolve_pair("default") / "full").resolve().name.endswith("-hub")


def test_two_processes_do_not_prepare_at_once(downloads: Downloads) -> None:
    waiting = threading.Event()
    results: list[Path] = []
    steps: list[str] = []

    def report(step: str, done: int, total: int) -> None:
        steps.append(step)
        waiting.set()

    second = threading.Thread(target=lambda: results.append(store.resolve_pair("default", report)))
    with named.locked(silent):
        second.start()
        assert waiting.wait(60)
        named._prepare("default", "wheel", silent)
    second.join(60)
    assert results == [store.resolve_pair("default")]
    # The second process only waited.
    assert {step.split()[0] for step in steps} == {"Waiting"}
    assert downloads.sources == ["wheel"]


@pytest.mark.parametrize(("number", "hint"), [(errno.EROFS, True), (errno.EACCES, True), (errno.ENOSPC, False)])
def test_a_folder_that_cannot_be_written_needs_another_process(
    downloads: Downloads, monkeypatch: pytest.MonkeyPatch, number: int, hint: bool
) -> None:
    def fails(*arguments: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(named, "locked", fails)
    with pytest.raises(InvalidPair, match=f"cannot prepare the pair default: .*{os.strerror(number)}") as error:
        store.resolve_pair("default")
    assert (f"run `overfill pair path default` where {home()} can be written" in str(error.value)) == hint


def test_an_atomic_folder_replaces_the_old_one_only_on_success(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").touch()

    def fail_halfway() -> None:
        with atomic_folder(target) as folder:
            (folder / "new").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert [f.name for f in target.iterdir()] == ["old"]
    with atomic_folder(target) as folder:
        (folder / "new").touch()
        assert [f.name for f in target.iterdir()] == ["old"]
    assert [f.name for f in target.iterdir()] == ["new"]
    assert [f.name for f in tmp_path.iterdir()] == ["target"]


def test_what_a_library_prints_does_not_reach_the_process_that_asked() -> None:
    code = (
        "import sys; from overfill.making import named\n"
        "def prepare(name, source, report): print('noise'); report('a step', 1, 2)\n"
        "named.prepare = prepare\n"
        "sys.exit(named.main('identity'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ('["a step", 1, 2]\n', "noise\n")
