"""Tests ``up --tier``: the processes of several tiers, where tiers may be set, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from described import placed
from json_edits import edit

from overfill.cli import up
from overfill.cli.main import main
from overfill.errors import InvalidPair, UnsupportedModel
from overfill.settings.config import RouterConfig
from overfill.settings.reader import BadSettings
from overfill.settings.tiers import TierSpec
from overfill.stack.describe import RayPlacement, describe
from overfill.stack.pairs import resolve_tiers
from overfill.stack.placed import PlacedStack, place
from overfill.telemetry.progress import silent

TIERS = ("full=identity:1", "default=default:2", "fast=fast:1,quantize=int8,kv-cache-dtype=int8,fallback=default")
FAST = "fast=fast:1,fallback=default,quantize=int8,kv-cache-dtype=int8"


def placed_tiers(*tiers: str, **settings: Any) -> PlacedStack:
    return placed(*(tiers or TIERS), **settings)


def parsed(*texts: str) -> tuple[TierSpec, ...]:
    return tuple(TierSpec.parse(text) for text in texts)


@pytest.fixture
def plans(unchecked: list[PlacedStack], monkeypatch: pytest.MonkeyPatch) -> list[PlacedStack]:
    """Collects the plans that ``up`` would run. Pairs are found at ``/pairs``."""
    monkeypatch.setattr(up, "_absolute", lambda pair: f"/pairs/{pair}")
    return unchecked


def test_each_tier_has_workers_with_its_pair_and_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    made = placed_tiers(prefill=2, kv_memory="64MiB")
    assert [worker.worker_id for worker in made.decode] == [
        "decode-full-0", "decode-default-0", "decode-default-1", "decode-fast-0",
    ]  # fmt: skip
    assert [(worker.tier, worker.pair) for worker in made.decode] == [
        ("full", "identity"), ("default", "default"), ("default", "default"), ("fast", "fast"),
    ]  # fmt: skip
    fast, full = made.decode[-1], made.decode[0]
    assert (fast.quantize, fast.kv_cache_dtype, fast.kv_memory) == ("int8", "int8", 64 << 20)
    assert (full.quantize, full.kv_cache_dtype, full.kv_memory) == (None, "auto", 64 << 20)
    assert {worker.threads for worker in made.decode} == {2}, "the cores are divided among the workers of a stage"
    assert {worker.threads for worker in made.prefill} == {4}


def test_routers_know_the_tiers_and_expect_all_their_workers() -> None:
    made = placed_tiers(routers=2, brownout="full > default > fast")
    for router in made.routers:
        assert (router.expect_decode, router.pair) == (4, "default")
        assert [str(tier) for tier in router.tiers] == [*TIERS[:2], FAST]
        assert router.brownout == ("full", "default", "fast")
        assert RouterConfig.of(router.settings()) == router
    assert {worker.pair for worker in made.prefill} == {"default"}
    assert [tier.name for tier in made.tiers] == ["default", "full", "fast"], "the default tier first"
    assert [worker.id for worker in made.workers if worker.tier == "default"] == [
        "decode-default-0",
        "decode-default-1",
    ]


def test_a_tier_may_have_an_engine_of_its_own() -> None:
    args = '{"enforce_eager": true}'
    made = placed_tiers("a=p", "b=p,engine=overfill", "c=p,engine=vllm", engine_args=args, decode_engine="vllm")
    assert [(worker.engine, worker.engine_args) for worker in made.decode] == [
        ("vllm", args), ("overfill", ""), ("vllm", args),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        (("a=p,quantise=int8",), "--tier a: quantise: a tier has no such setting; did you mean quantize?"),
        (("a=p,worker-id=x",), "--tier a: worker-id: a tier has no such setting"),
        (("a=p,pair=q",), "--tier a: pair: a tier has no such setting"),
    ],
)
def test_a_setting_that_a_tier_cannot_have_is_refused(tiers: tuple[str, ...], message: str) -> None:
    with pytest.raises(BadSettings, match=message.replace("?", r"\?")):
        placed_tiers(*tiers)


def test_a_pairs_folder_may_have_any_name() -> None:
    tier = TierSpec(name="a", pair="/p,q;r")
    (router,) = place(describe(tiers=[tier])).routers
    assert RouterConfig.of(json.loads(json.dumps(router.settings()))) == router
    assert router.tiers[0].pair == "/p,q;r"


def test_flags_the_file_and_variables_set_tiers(
    tmp_path: Path,
    plans: list[PlacedStack],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def tiers(*arguments: str) -> list[str]:
        assert main(["up", "--no-ray", "--grpc", "0", "--http", "off", *arguments]) == 0
        made = plans.pop()
        assert [worker.tier for worker in made.decode] == [tier.name for tier in made.routers[0].tiers]
        return [*(str(tier) for tier in made.tiers), *made.routers[0].brownout]

    flags = ["--tier", "x=p,quantize=int8", "--tier", "y=q"]
    assert tiers(*flags) == ["x=/pairs/p:1,quantize=int8", "y=/pairs/q:1"]
    assert tiers(*flags, "--default-tier", "y", "--brownout", "x > y")[0] == "y=/pairs/q:1"
    file = tmp_path / "stack.yaml"
    file.write_text('router: {tiers: "a=p; b=q,max-num-seqs=4", default-tier: b, brownout: a > b}')
    assert tiers("--config", str(file)) == ["b=/pairs/q:1", "a=/pairs/p:1", "a", "b"]
    assert main(["config", "check", str(file)]) == 0
    capsys.readouterr()
    assert main(["config", "show", "router", "--config", str(file)]) == 0
    assert "a > b" in capsys.readouterr().out
    monkeypatch.setenv("OVERFILL_ROUTER_TIERS", "c=p;d=q")
    monkeypatch.setenv("OVERFILL_ROUTER_BROWNOUT", "c > d")
    monkeypatch.setenv("OVERFILL_ROUTER_DEFAULT_TIER", "d")
    assert tiers() == tiers("--config", str(file)) == ["d=/pairs/q:1", "c=/pairs/p:1", "c", "d"]


@pytest.mark.parametrize("stack", ["--ray", "--no-ray"])
def test_objectives_reach_the_routers_of_every_stack(stack: str, plans: list[PlacedStack], tmp_path: Path) -> None:
    assert main(["up", stack, "--grpc", "0", "--http", "off", "--ttft-objective", "1"]) == 0
    assert (plans[-1].routers[0].ttft_objective, plans[-1].routers[0].itl_objective) == (1, 0.1)
    file = tmp_path / "stack.yaml"
    file.write_text("common: {itl-objective: 0.5}")
    assert main(["up", stack, "--grpc", "0", "--http", "off", "--config", str(file)]) == 0
    assert plans[-1].routers[0].itl_objective == 0.5


def test_a_share_port_that_up_did_not_make_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERFILL_ROUTER_SHARE_PORT", str(tmp_path))
    with pytest.raises(BadSettings, match=r"share-port .* `overfill up` makes the folder itself"):
        placed(port=7600, http=8000)
    monkeypatch.delenv("OVERFILL_ROUTER_SHARE_PORT")
    assert placed(routers=2, share_port=True).routers[0].share_port


def test_pairs_of_different_full_models_are_refused_with_both(fresh: Callable[[], Path], tmp_path: Path) -> None:
    one = fresh()
    two = tmp_path / "two"
    shutil.copytree(one, two, symlinks=True)
    tiers = parsed(f"a={one}", f"b={two}:2,quantize=int8")
    assert resolve_tiers(tiers, silent) == tiers
    edit(two / "pair.json", lambda manifest: manifest["full"].update(digest="0" * 64))
    with pytest.raises(InvalidPair, match=f"different full models: {one} has .*, {two} has 0{{64}}"):
        resolve_tiers(tiers, silent)


def test_the_engine_of_every_tier_is_checked_with_its_quantisation(
    fresh: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = fresh()
    monkeypatch.setattr("overfill.engine.choice.vllm_installed", lambda: True)
    up.check_engines(placed_tiers(f"a={pair}", f"b={pair},quantize=int8", device="cpu").spec)
    for ray in (None, RayPlacement(ray_address="auto")):
        with pytest.raises(UnsupportedModel, match=r"vllm cannot run the decoder in .*, quantised to int8 on load"):
            tiers = (f"a={pair}", f"b={pair},quantize=int8,engine=vllm")
            up.check_engines(placed_tiers(*tiers, device="cpu", ray=ray).spec)
