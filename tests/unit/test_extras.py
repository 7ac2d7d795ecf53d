"""The line that installs an extra, by where an installation came from; what is told as missing and what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from overfill import extras
from overfill.extras import MissingExtra, install_line, needs, require


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets where pip says that it took the distribution from."""

    class Distribution:
        source: dict[str, Any] | None = None

        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return None if self.source is None else json.dumps(self.source)

    found = Distribution()
    monkeypatch.setattr(extras, "_CHECKOUT", tmp_path / "site-packages")
    monkeypatch.setattr(extras, "distribution", lambda name: found)
    return found


def test_a_checkout_is_named_as_it_can_be_typed_where_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_repository_is_named_with_its_commit(installed: Any) -> None:
    installed.source = {"url": "https://host/overfill.git", "vcs_info": {"vcs": "git", "commit_id": "0123abc"}}
    assert install_line("server") == "pip install 'overfill[server] @ git+https://host/overfill.git@0123abc'"


@pytest.mark.parametrize("source", [None, {"url": "file:///no/such/wheel.whl", "archive_info": {}}])
def test_else_the_name_is_all_there_is(source: dict[str, Any] | None, installed: Any) -> None:
    installed.source = source
    assert install_line("server") == "pip install 'overfill[server]'"
    assert install_line("") == "pip install overfill"


def test_a_module_of_others_is_a_missing_extra() -> None:
    with pytest.raises(MissingExtra, match=r"`overfill up` needs no_such\.module, .* pip install .*\[server\]"):  # noqa: SIM117
        with needs("server", "`overfill up`"):
            raise ModuleNotFoundError("No module named 'no_such.module'", name="no_such.module")
    with pytest.raises(MissingExtra, match="no_such"):
        require("server", "`overfill up`", "json", "no_such")


def test_a_module_of_ours_is_a_fault() -> None:
    with pytest.raises(ModuleNotFoundError), needs("server", "`overfill up`"):
        import overfill.no_such_module  # type: ignore[import-not-found]  # noqa: F401
