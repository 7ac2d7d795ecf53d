"""Tests ``up --decoder``: the processes of several tiers, where tiers may be set, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from overfill.cli import up
from overfill.cli.main import main
from overfill.errors import InvalidPair, UnsupportedModel
from overfill.settings.config import RouterConfig
from overfill.settings.tiers import TierSpec
from overfill.stack.plan import StackRequest, make_plan
from overfill.stack.plan_tiers import resolve_tiers
from overfill.stack.processes import StackPlan
from overfill.telemetry.progress import silent

TIERS = ("full=identity:1", "default=default:2", "fast=fast:1,quantize=int8,kv-cache-dtype=int8,fallback=default")


def parsed(*texts: str) -> tuple[TierSpec, ...]:
    return tuple(TierSpec.parse(text) for text in texts)


def plan(*tiers: str, **settings: Any) -> StackPlan:
    own = {name: settings.pop(name) for name in list(settings) if name in StackRequest.__dataclass_fields__}
    return make_plan(StackRequest(None, tiers=parsed(*(tiers or TIERS)), settings=settings, **own))


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[StackPlan]:
    """Collects the plans that ``up`` would run. Named pairs are found at ``/pairs``."""
    made: list[StackPlan] = []
    monkeypatch.setattr(up, "run", lambda stack, stopping, console: made.append(stack.plan) or 0)
    monkeypatch.setattr(up, "check_ports", lambda plan, metrics: None)
    monkeypatch.setattr(up, "check_engines", lambda plan, here: None)
    monkeypatch.setattr("overfill.pair.store.resolve_pair", lambda pair, report: Path("/pairs") / pair)
    monkeypatch.setattr(
        up, "resolve_tiers", lambda tiers, report: parsed(*(str(t).replace("=", "=/pairs/", 1) for t in tiers))
    )
    return made


def test_each_tier_has_workers_with_its_pair_and_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    made = plan(prefill=2, kv_memory="64MiB")
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
    made = plan(routers=2, brownout="full > default > fast")
    for router in made.routers:
        assert (router.expect_decode, router.pair) == (4, "default")
        assert [str(tier) for tier in router.decoders] == list(TIERS)
        assert router.brownout == ("full", "default", "fast")
        assert RouterConfig.parse(router.to_argv()) == router
    assert {worker.pair for worker in made.prefill} == {"default"}
    assert [tier.name for tier in made.tiers] == ["default", "full", "fast"], "the default tier first"
    assert [worker.worker_id for worker in made.of_tier("default")] == ["decode-default-0", "decode-default-1"]


def test_the_default_tier_may_be_chosen() -> None:
    made = plan(default_tier="fast")
    assert made.tiers[0].name == "fast"
    assert {config.pair for config in (*made.routers, *made.prefill)} == {"fast"}
    assert made.model == "fast"


def test_a_stack_with_one_pair_has_one_tier_that_its_workers_do_not_name() -> None:
    made = make_plan(StackRequest(Path("/p"), decode=2))
    assert [worker.worker_id for worker in made.decode] == ["decode-0", "decode-1"]
    assert {worker.tier for worker in made.decode} == {""}
    assert [(tier.name, tier.pair, tier.count) for tier in made.tiers] == [("default", "/p", 2)]
    assert made.of_tier("default") == made.decode
    assert not made.routers[0].decoders


def test_routers_are_told_how_workers_load_their_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERFILL_DECODE_QUANTIZE", "int8")
    monkeypatch.setenv("OVERFILL_DECODE_KV_CACHE_DTYPE", "int8")
    made = plan("a=p", "b=q,quantize=none")
    assert [str(tier) for tier in made.routers[0].decoders] == [
        "a=p:1,quantize=int8,kv-cache-dtype=int8", "b=q:1,quantize=none,kv-cache-dtype=int8",
    ]  # fmt: skip
    assert RouterConfig.parse(made.routers[0].to_argv()) == made.routers[0]
    one = make_plan(StackRequest(Path("/p"), decode=2))
    assert [str(tier) for tier in one.tiers] == ["default=/p:2,quantize=int8,kv-cache-dtype=int8"]
    assert not one.named_tiers, "its workers still name none"


def test_a_tier_may_have_an_engine_of_its_own() -> None:
    args = '{"enforce_eager": true}'
    made = plan("a=p", "b=p,engine=overfill", "c=p,engine=vllm", engine_args=args, decode_engine="vllm")
    assert [(worker.engine, worker.engine_args) for worker in made.decode] == [
        ("vllm", args), ("overfill", ""), ("vllm", args),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        (("a=p,quantise=int8",), "--decoder a: quantise: a tier has no such setting; did you mean quantize?"),
        (("a=p,worker-id=x",), "--decoder a: worker-id: a tier has no such setting"),
        (("a=p,pair=q",), "--decoder a: pair: a tier has no such setting"),
        (("a=p,otlp-traces-endpoint=http://h;x",), "no semicolon"),
    ],
)
def test_a_setting_that_a_tier_cannot_have_is_refused(tiers: tuple[str, ...], message: str) -> None:
    with pytest.raises(click.UsageError, match=message.replace("?", r"\?")):
        plan(*tiers)


def test_a_pairs_folder_that_the_text_of_tiers_cannot_name_is_refused() -> None:
    with pytest.raises(click.UsageError, match="neither comma nor semicolon"):
        make_plan(StackRequest(None, tiers=(TierSpec("a", "/p,q"),)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pair", "p"], "--decoder conflicts with --pair (also in the settings file, or as a variable)"),
        (["--decode", "1", "--max-decode", "3"], "--decoder conflicts with --decode and --max-decode"),
        (["--decoder", "a=q"], "two tiers have the name 'a'"),
        (["--default-tier", "b"], "--default-tier: there is no tier 'b'; tiers are a"),
        (["--brownout", "a > b"], "--brownout: there is no tier 'b'"),
        (["--decoder", "b=q:0"], "the number of decode workers must be at least 1"),
        (["--decoder", "b"], "expected NAME=PAIR"),
        (["--no-ray", "--decoder", "b=p:2,max=3"], "--no-ray conflicts with max of --decoder b"),
        (["--decoder", "b=p:2,max=1"], "--decoder b: max must be a number of workers of at least 2, got '1'"),
    ],
)
def test_conflicting_options_are_refused(
    arguments: list[str], message: str, plans: list[StackPlan], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        raise SystemExit(main(["up", "--decoder", "a=p", *arguments]))
    assert caught.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", "").split())
    assert not plans


def test_flags_the_file_and_variables_set_tiers(
    tmp_path: Path,
    plans: list[StackPlan],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def tiers(*arguments: str) -> list[str]:
        assert main(["up", "--no-ray", "--grpc", "0", "--http", "off", *arguments]) == 0
        made = plans.pop()
        assert [worker.tier for worker in made.decode] == [tier.name for tier in made.routers[0].decoders]
        return [*(str(tier) for tier in made.tiers), *made.routers[0].brownout]

    flags = ["--decoder", "x=p,quantize=int8", "--decoder", "y=q"]
    assert tiers(*flags) == ["x=/pairs/p:1,quantize=int8", "y=/pairs/q:1"]
    assert tiers(*flags, "--default-tier", "y", "--brownout", "x > y")[0] == "y=/pairs/q:1"
    file = tmp_path / "stack.yaml"
    file.write_text('up: {decoder: ["a=p", "b=q,max-num-seqs=4"], default-tier: b, brownout: a > b}')
    expected = ["b=/pairs/q:1,max-num-seqs=4", "a=/pairs/p:1", "a", "b"]
    assert tiers("--config", str(file)) == expected
    assert main(["config", "check", str(file)]) == 0
    capsys.readouterr()
    assert main(["config", "show", "up", "--config", str(file)]) == 0
    assert "a=p:1;b=q:1,max-num-seqs=4" in capsys.readouterr().out
    file.write_text('router: {decoders: "a=p; b=q,max-num-seqs=4", default-tier: b, brownout: a > b}')
    assert tiers("--config", str(file)) == expected
    assert main(["config", "show", "router", "--config", str(file)]) == 0
    assert "a > b" in capsys.readouterr().out
    monkeypatch.setenv("OVERFILL_UP_DECODER", "c=p;d=q")
    monkeypatch.setenv("OVERFILL_UP_BROWNOUT", "c > d")
    monkeypatch.setenv("OVERFILL_UP_DEFAULT_TIER", "d")
    assert tiers() == tiers("--config", str(file)) == ["d=/pairs/q:1", "c=/pairs/p:1", "c", "d"]


def test_a_setting_in_two_sections_of_the_file_is_refused(
    tmp_path: Path, plans: list[StackPlan], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "stack.yaml"
    file.write_text("up: {ttft-objective: 1}\nrouter: {ttft-objective: 2}")
    assert main(["up", "--config", str(file)]) == 2
    assert "up.ttft-objective and router.ttft-objective are one setting" in capsys.readouterr().err


@pytest.mark.parametrize("stack", ["--ray", "--no-ray"])
def test_objectives_reach_the_routers_of_every_stack(stack: str, plans: list[StackPlan], tmp_path: Path) -> None:
    assert main(["up", stack, "--grpc", "0", "--http", "off", "--ttft-objective", "1"]) == 0
    assert (plans[-1].routers[0].ttft_objective, plans[-1].routers[0].itl_objective) == (1, 0.1)
    file = tmp_path / "stack.yaml"
    file.write_text("up: {itl-objective: 0.5}")
    assert main(["up", stack, "--grpc", "0", "--http", "off", "--config", str(file)]) == 0
    assert plans[-1].routers[0].itl_objective == 0.5


def test_a_share_port_that_up_did_not_make_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERFILL_ROUTER_SHARE_PORT", str(tmp_path))
    with pytest.raises(click.UsageError, match=r"share-port .* `overfill up` makes the folder itself"):
        make_plan(StackRequest(Path("p"), port=7600, http=8000))
    assert make_plan(StackRequest(Path("p"), routers=2, share_port=tmp_path / "own")).routers[0].share_port


def test_pairs_of_different_full_models_are_refused_with_both(fresh: Callable[[], Path], tmp_path: Path) -> None:
    one = fresh()
    two = tmp_path / "two"
    shutil.copytree(one, two, symlinks=True)
    tiers = parsed(f"a={one}", f"b={two}:2,quantize=int8")
    assert resolve_tiers(tiers, silent) == tiers
    manifest = json.loads((two / "pair.json").read_text())
    manifest["full"]["digest"] = "0" * 64
    (two / "pair.json").write_text(json.dumps(manifest))
    with pytest.raises(InvalidPair, match=f"different full models: {one} has .*, {two} has 0{{64}}"):
        resolve_tiers(tiers, silent)


def test_the_engine_of_every_tier_is_checked_with_its_quantisation(
    fresh: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = fresh()
    monkeypatch.setattr("overfill.engine.choice.vllm_installed", lambda: True)
    up.check_engines(plan(f"a={pair}", f"b={pair},quantize=int8", device="cpu"), here=True)
    for here in (True, False):
        with pytest.raises(UnsupportedModel, match=r"vllm cannot run the decoder in .*, quantised to int8 on load"):
            up.check_engines(plan(f"a={pair}", f"b={pair},quantize=int8,engine=vllm", device="cpu"), here=here)
