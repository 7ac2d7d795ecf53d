"""Tests documents with two revisions of a pair: their pools, what workers and routers get, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from described import described

from overfill.settings.reader import BadSettings
from overfill.stack.placed import place
from overfill.stack.ray.application import deployment_options, serve_config
from overfill.stack.spec import StackSpec

ONE_PAIR: dict[str, Any] = {
    "runner": "processes",
    "pair": "/pairs/old",
    "prefill": {"replicas": 2},
    "settings": {"max_num_seqs": 8},
    "canary": {
        "revision": "r2",
        "percent": 12.5,
        "pair": "/pairs/new",
        "decode": {"replicas": 3, "settings": {"max_num_seqs": 16, "quantize": "int8"}},
    },
}

TIERS: dict[str, Any] = {
    "revision": "r1",
    "tiers": {"full": {"pair": "/old/full"}, "fast": {"pair": "/old/fast", "ttft_objective": 1, "max_replicas": 4}},
    "router": {"settings": {"default_tier": "fast"}},
    "canary": {
        "revision": "r2",
        "tiers": {"fast": {"pair": "/new/fast", "replicas": 2, "num_gpus": 1}, "full": {"pair": "/new/full"}},
        "prefill": {"num_gpus": 0.5},
    },
}


def test_the_workers_of_both_revisions_start_each_with_its_own_pair_and_settings() -> None:
    stack = place(StackSpec.read(ONE_PAIR))
    found = {
        worker.id: (worker.config.revision, worker.config.pair, worker.config.max_num_seqs) for worker in stack.workers
    }
    assert found == {
        **{f"prefill-{index}": ("", "/pairs/old", 8) for index in range(2)},
        "decode-0": ("", "/pairs/old", 8),
        "prefill-r2-0": ("r2", "/pairs/new", 8),
        **{f"decode-r2-{index}": ("r2", "/pairs/new", 16) for index in range(3)},
    }
    (router,) = stack.routers
    old, new = router.revisions
    assert (old.name, [str(tier) for tier in old.tiers]) == ("", ["default=/pairs/old:1"])
    assert (new.name, [str(tier) for tier in new.tiers]) == ("r2", ["default=/pairs/new:3,quantize=int8"])
    assert router.canary_percent == 12.5
    assert (router.expect_prefill, router.expect_decode) == (2, 1), "the new revision's count apart"


def test_each_tier_of_each_revision_is_a_pool_of_its_own() -> None:
    made = StackSpec.read(TIERS)
    old = {"prefill-r1": ("/old/fast", None), "decode-full-r1": ("/old/full", "full")}
    old |= {"decode-fast-r1": ("/old/fast", "fast")}
    new = {"prefill-r2": ("/new/fast", None), "decode-fast-r2": ("/new/fast", "fast")}
    new |= {"decode-full-r2": ("/new/full", "full")}
    assert {name: (made.worker_config(name).pair, made.tier_of(name)) for name in made.pools} == old | new
    assert {name: made.worker_config(name).revision for name in made.pools} == (
        dict.fromkeys(old, "r1") | dict.fromkeys(new, "r2")
    )
    assert [[tier.name for tier in one.tiers] for one in made.router_config().revisions] == [["fast", "full"]] * 2
    (application,) = serve_config(made, "chat")["applications"]
    assert StackSpec.model_validate(application["args"]) == made
    assert application["args"]["canary"]["tiers"]["full"] == {"pair": "/new/full"}, "the key is its name"
    assert application["autoscaling_policy"]["policy_kwargs"] == {"tiers": {"fast": {"ttft": 1.0}, "fast-r2": {}}}
    assert deployment_options(made, "prefill-r2")["ray_actor_options"]["num_gpus"] == 0.5
    assert made.worker_config("prefill-r2").gpu_share == 0.5


def test_a_canarys_pools_keep_their_names_when_it_has_become_the_only_revision() -> None:
    canary = TIERS["canary"]
    alone = StackSpec.read({"revision": canary["revision"], "tiers": canary["tiers"], "prefill": canary["prefill"]})
    assert alone.pools.items() <= StackSpec.read(TIERS).pools.items()


def test_colocated_workers_are_of_the_old_revision() -> None:
    made = StackSpec.read(
        {"revision": "r1", "pair": "/old", "colocated": {}, "canary": {"revision": "r2", "pair": "/new"}}
    )
    assert {name: made.worker_config(name).revision for name in made.pools} == {
        "colocated-r1": "r1", "prefill-r2": "r2", "decode-r2": "r2"
    }  # fmt: skip


def test_what_is_asked_for_all_pairs_and_pools_includes_the_canarys() -> None:
    made = StackSpec.read(TIERS)
    assert made.pairs == {"/old/full", "/old/fast", "/new/full", "/new/fast"}
    moved = made.with_pairs(lambda pair: f"/mnt{pair}")
    assert moved.pairs_by_revision == {
        "r1": {"full": "/mnt/old/full", "fast": "/mnt/old/fast"},
        "r2": {"fast": "/mnt/new/fast", "full": "/mnt/new/full"},
    }
    changed = moved.with_pool_settings("decode-fast-r2", {"max_num_seqs": 3})
    seqs = {name: changed.worker_config(name).max_num_seqs for name in changed.pools if name.startswith("decode-fast")}
    assert seqs == {"decode-fast-r1": 64, "decode-fast-r2": 3}
    fixed = StackSpec.read(TIERS | {"tiers": {name: {"pair": "p"} for name in TIERS["tiers"]}})
    assert fixed.on("processes").on("ray").pools["decode-fast-r2"].num_gpus == 0, "only Ray reserves"


def test_a_date_is_a_name_although_yaml_has_a_type_for_it(tmp_path: Path) -> None:
    document = ONE_PAIR | {"canary": ONE_PAIR["canary"] | {"revision": "2026-11-30"}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(document).replace("'2026-11-30'", "2026-11-30"))
    made = StackSpec.load(tmp_path / "a.yaml")
    assert made == StackSpec.read(document)
    assert "decode-2026-11-30" in made.pools


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"revision": "r2"}, "canary.revision: got 'r2', which is the stack's: give the new revision another"),
        ({"revision": "R1"}, "revision: must be 1 to 32 lower-case letters"),
        ({"revision": "a-r2"}, "revision 'r2': the revision 'a-r2' ends in the same way"),
        ({"canary": {"pair": "p"}}, "canary.revision: Field required"),
        ({"canary": {"revision": "", "pair": "p"}}, "canary.revision: String should have at least 1 character"),
        ({"canary": {"revision": "r2"}}, "canary: pair: missing; name the pair of the new revision"),
        ({"canary": {"revision": "r2", "pair": "p", "percent": 101}}, "canary.percent: Input should be less than"),
        ({"canary": {"revision": "r2", "pair": "p", "colocated": {}}}, "canary: colocated: workers of a new revision"),
        ({"canary": {"revision": "r2", "pair": "p", "router": {}}}, "canary.router: no such field"),
        (
            {"canary": {"revision": "r2", "pair": "p", "decode": {"replica": 2}}},
            "decode.replica: no such field; did you",
        ),
        (
            {"canary": {"revision": "r2", "pair": "p", "decode": {"settings": {"kv": 1}}}},
            "canary.decode.settings.kv: no",
        ),
        (
            {"canary": {"revision": "r2", "pair": "p", "decode": {"num_cpus": 1}}},
            "only Ray uses canary.decode.num_cpus",
        ),
        (
            {"canary": {"revision": "r2", "pair": "p", "tiers": {"default": {"pair": "q"}}}},
            "canary.tiers: each has its own pair and replicas: remove pair",
        ),
        (
            {"canary": {"revision": "r2", "tiers": {"default": {"pair": "q", "replicas": 0}}}},
            "canary.tiers.default.replicas: the number of decode workers must be at least 1, got 0",
        ),
        ({"canary": {"revision": "r2", "tiers": {"fast": {"pair": "q"}}}}, "both revisions must have the same tiers"),
        ({"settings": {"revision": "r1"}}, "settings: revision: the stack sets this"),
        ({"router": {"settings": {"canary_percent": 5}}}, "router: canary_percent: the stack sets this"),
        ({"decode": {"settings": {"revision": "r2"}}}, "decode: revision: the stack sets this"),
    ],
)
def test_a_wrong_revision_is_named_before_anything_starts(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadSettings) as caught:
        StackSpec.read(ONE_PAIR | fields)
    assert message in str(caught.value)


@pytest.mark.parametrize(("tier", "revision"), [("r2", "r2"), ("a-r2", "r2"), ("2-r2", "r2")])
def test_a_tier_that_a_pools_name_would_show_as_a_revision_is_refused(tier: str, revision: str) -> None:
    tiers = {tier: {"pair": "p"}}
    for document in (
        {"tiers": tiers, "revision": revision},
        {"tiers": tiers, "canary": {"revision": revision, "tiers": tiers}},
    ):
        with pytest.raises(BadSettings, match=rf"revision '{revision}': the tier '{tier}' ends in the same way"):
            StackSpec.read(document)


def test_the_options_of_up_name_the_revision() -> None:
    assert [*described("full=a", "fast=b", revision="r1").pools] == ["prefill-r1", "decode-full-r1", "decode-fast-r1"]
