"""Tests that services accept named pairs as well as folders, as every command does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from mocks import mock_stack

from overfill.client import Client, SamplingParams
from overfill.making.seal import record_checksums
from overfill.pair import store


@pytest.fixture
def cache(tiny_pair, tmp_path, monkeypatch):
    """Sets an empty cache but for a tiny full model in the place of the named pairs' one. Nothing can be downloaded."""
    monkeypatch.setenv("OVERFILL_HOME", str(tmp_path / "home"))
    for variable in ("PIP_NO_INDEX", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(variable, "1")
    shutil.copytree(tiny_pair / "full", store.model_folder("wheel"))
    record_checksums(store.model_folder("wheel"))
    # A folder with the name of a pair is reached as ./identity only.
    (tmp_path / "here" / "identity").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")


def answer(address):
    with Client(address) as client:
        return client.generate(
            [5, 6, 7], sampling=SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        ).token_ids


def test_a_folder_with_the_name_of_a_pair_is_reached_by_its_path(cache, tiny_pair):
    os.rmdir("identity")
    shutil.copytree(tiny_pair, "identity", symlinks=True)
    with mock_stack("./identity") as stack:
        assert answer(stack.grpc)
    assert not store.is_ready("identity", None)


def test_services_prepare_a_named_pair(cache):
    with mock_stack("identity") as stack:
        assert answer(stack.grpc)
    assert store.is_ready("identity", "wheel")


def test_a_router_without_torch_serves_a_prepared_pair_and_says_how_to_prepare_another(cache, tmp_path, monkeypatch):
    store.resolve_pair("identity")
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules['torch'] = sys.modules['transformers'] = None\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    for name, code in (("identity", 0), ("default", 1)):
        done = router_at_once(name)
        assert done.returncode == code, done.stderr
    assert "torch is not installed" in done.stderr
    assert "overfill pair path default" in done.stderr
    assert "Traceback" not in done.stderr


def router_at_once(pair):
    """Ends a router as soon as it serves."""
    code = (
        "import sys\n"
        "assert sys.modules['torch'] is None\n"
        "from services.router import main\n"
        "async def at_once(router): sys.exit(0)\n"
        "main.Router.run = at_once\n"
        f"main.main(['--pair={pair}', '--port=0'])\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
