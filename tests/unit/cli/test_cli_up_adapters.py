"""Tests the adapters of ``overfill up``: vLLM's flag, the default folder, and what is refused before the start."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from imported_pairs import FORMATS, imported, quantise
from peft_adapters import add_tiny_adapter, save_peft

from overfill.cli import up
from overfill.cli.main import main
from overfill.model.adapter import read_record
from overfill.model.manifest import Pair
from overfill.pair.adapters import adapter_names, default_folder, remove_adapter
from overfill.settings.config import DecodeConfig

FLAGS = ["--no-ray", "--device", "cpu", "--grpc", "0", "--http", "off"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What each started stack would serve, by name: its folder, and the adapters in it then."""
    found: list[dict[str, Any]] = []

    def run(stack: Any, stopping: object, adapters: Any) -> int:
        config = stack.spec.worker_config(list(stack.spec.pools)[-1])
        assert isinstance(config, DecodeConfig)
        names = None if config.adapters is None else adapter_names(config.adapters)
        found.append({"folder": config.adapters, "names": names, "served": [one.name for one in adapters]})
        return 0

    monkeypatch.setattr(up, "run", run)
    monkeypatch.setenv("OVERFILL_HOME", str(tmp_path / "home"))
    return found


@pytest.fixture
def peft(tiny_pair: Path, tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, **lora: Any) -> Path:
        return save_peft(Pair.load(tiny_pair), tmp_path / name, target_modules=["q_proj"], **lora)

    return make


@pytest.fixture
def quantised(tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """A pair whose decoder only vLLM runs, and takes no adapters for on CPUs. For ``up``, vLLM is installed."""
    monkeypatch.setattr("overfill.engine.choice.vllm_installed", lambda: True)
    decoder = tmp_path / "fp8"
    shutil.copytree(tiny_pair / "decoder", decoder)
    quantise(decoder, "fp8", FORMATS["fp8"])
    return imported(tiny_pair, tmp_path / "quantised", decoder)


def test_modules_get_a_folder_of_the_stacks_own_while_it_runs(
    started: list[dict[str, Any]], tiny_pair: Path, peft: Callable[..., Path]
) -> None:
    a, b = peft("a"), peft("b", seed=1)
    modules = ["--lora-modules", f"a={a}", f"b={b}"]
    assert main(["up", str(tiny_pair), *FLAGS, *modules]) == 0
    assert main(["up", *modules, *FLAGS, "--pair", str(tiny_pair), "--max-adapters", "2"]) == 0
    for one in started:
        assert one["names"] == one["served"] == ["a", "b"]
        assert not one["folder"].exists()


def test_modules_are_added_to_the_folder_once(
    started: list[dict[str, Any]], tiny_pair: Path, peft: Callable[..., Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "adapters"
    add_tiny_adapter(Pair.load(tiny_pair), folder, "there", seed=7)
    line = ["up", str(tiny_pair), *FLAGS, "--adapters", str(folder), "--lora-modules"]
    for _ in range(2):
        assert main([*line, f"a={peft('a')}"]) == 0
    assert [one["served"] for one in started] == [["a", "there"]] * 2
    assert read_record(folder / "a").own_prefill
    assert main([*line, f"a={peft('b', seed=1)}"]) == 1
    assert "is another adapter than" in capsys.readouterr().err
    assert len(started) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora-modules", "a"], "'a': expected NAME=PATH"),
        (["--lora-modules", "a={a}", "a={a}"], "'a' is given twice"),
        (["--lora-modules", "a={a}", "--dry-run"], "--dry-run conflicts with --lora-modules"),
        (["--lora-modules", "a/b={a}"], "a/b"),
        (["--lora-modules", "a={a}/none"], "none"),
        (["--lora-modules", "a={a}", "b={a}", "--max-adapters", "1"], "names 2 adapters, and --max-adapters is 1"),
        (["--lora-modules", "a={a}", "--max-adapter-rank", "3"], "a: has rank 4, and --max-adapter-rank is 3"),
        (["--lora-modules", "default={a}"], "has the name of a tier"),
        (["--adapters", "{a}/none"], "cannot read the folder of adapters"),
        (["--enable-lora"], "--enable-lora is an option of vLLM: give --lora-modules NAME=PATH"),
    ],
)
def test_what_cannot_be_is_refused_before_the_start(
    flags: list[str], message: str, started: list[dict[str, Any]], tiny_pair: Path, peft: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = str(peft("a"))
    assert main(["up", str(tiny_pair), *FLAGS, *(flag.replace("{a}", folder) for flag in flags)]) != 0
    assert message in " ".join(capsys.readouterr().err.split())
    assert not started


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["a={a}", "b={b}", "--max-adapter-rank", "4"], "b: has rank 8, and --max-adapter-rank is 4"),
        (["a={a}", "b={a}/none"], "none"),
        (["a={a}", "there={a}"], "is another adapter than"),
        (["a={a}", "default={b}"], "has the name of a tier"),
        (["a={a}", "../adapters/there={a}"], "is no name for an adapter"),
        (["a={a}", "--log-dir", "{a}/adapter_config.json/logs"], "cannot be made"),
    ],
)
def test_modules_are_added_only_once_all_are_checked(
    modules: list[str], message: str, started: list[dict[str, Any]], tiny_pair: Path, peft: Callable[..., Path],
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folders = {"{a}": peft("a"), "{b}": peft("b", r=8)}
    folder = tmp_path / "adapters"
    add_tiny_adapter(Pair.load(tiny_pair), folder, "there", seed=7)
    line = ["up", str(tiny_pair), *FLAGS, "--adapters", str(folder), "--lora-modules"]
    for text in modules:
        for name, path in folders.items():
            text = text.replace(name, str(path))
        line.append(text)
    assert main(line) != 0
    assert message in " ".join(capsys.readouterr().err.split())
    assert adapter_names(folder) == ["there"]
    assert not started


def test_modules_of_several_tiers_are_refused(
    started: list[dict[str, Any]], tiny_family: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    tiers = [f"--tier={name}={pair}" for name, pair in tiny_family.items()]
    assert main(["up", *tiers, *FLAGS, "--lora-modules", "a=b"]) == 2
    assert "--lora-modules says no decoder, and the tiers have several" in " ".join(capsys.readouterr().err.split())


def test_the_default_folder_is_served_if_it_has_an_adapter_of_the_decoder(
    started: list[dict[str, Any]], tiny_pair: Path, tiny_family: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pair, line = Pair.load(tiny_pair), ["up", str(tiny_pair), *FLAGS]
    folder = default_folder(pair)
    folder.mkdir(parents=True)
    add_tiny_adapter(Pair.load(tiny_family["fast"]), folder, "fast", seed=1)
    assert main(line) == 0
    add_tiny_adapter(pair, folder, "mine")
    assert main(line) == 0
    capsys.readouterr()
    assert main([*line, "--dry-run"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["settings"]["adapters"] == str(folder)
    assert main([*line, "--max-adapters", "0"]) == 0
    remove_adapter(folder, "mine")
    assert main(line) == 0
    served = [(one["folder"], one["served"]) for one in started]
    assert served == [(None, []), (folder, ["mine"]), (None, []), (None, [])]


def test_workers_that_take_no_adapters_start_without_those_of_the_default_folder(
    started: list[dict[str, Any]], quantised: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = default_folder(quantised)
    add_tiny_adapter(quantised, folder, "lost")
    line = ["up", str(quantised.folder), *FLAGS, "--prefill-engine", "overfill", "--decode-engine", "vllm"]
    line += ["--prefill", "1", "--decode", "1"]
    assert main(line) == 0
    assert started[0] == {"folder": None, "names": None, "served": []}
    lines = [line for line in capsys.readouterr().err.splitlines() if "adapters" in line]
    assert lines == [
        f"overfill: decode workers start without the adapters of their decoder in {folder}: vLLM on CPUs takes none "
        "for weights in fp8, as the decoder's are"
    ]
    assert main([*line, "--adapters", str(folder)]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "--adapters: vLLM on CPUs takes none for weights in fp8, as the decoder's are: leave it out" in message
    assert main([*line, "--adapters", str(folder), "--max-adapters", "0"]) == 0
    assert started[1] == {"folder": folder, "names": ["lost"], "served": []}


def test_one_tier_without_adapters_leaves_them_to_another(
    started: list[dict[str, Any]], tiny_pair: Path, quantised: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = Pair.load(tiny_pair)
    add_tiny_adapter(pair, default_folder(pair), "mine")
    tiers = [f"--tier=plain={tiny_pair}", f"--tier=small={quantised.folder},engine=vllm"]
    assert main(["up", *tiers, *FLAGS, "--prefill-engine", "overfill", "--dry-run"]) == 0
    document = yaml.safe_load(capsys.readouterr().out)
    assert document["settings"]["adapters"] == str(default_folder(pair))
    assert document["tiers"]["small"]["settings"]["max_adapters"] == 0
    assert "max_adapters" not in document["tiers"]["plain"].get("settings", {})
