from __future__ import annotations

from pathlib import Path

import pytest

from overfill.errors import InvalidPair
from overfill.making.full_models import resolve_model
from overfill.making.sources import SourceUnavailable


def test_a_full_model_is_a_folder_or_an_id(tiny_pair: Path) -> None:
    assert resolve_model(str(tiny_pair / "full")) == tiny_pair / "full"
    for wrong in ("nothing", "../escape", "a/b/c", "./x"):
        with pytest.raises(SourceUnavailable, match="neither a folder"):
            resolve_model(wrong)


def test_a_mistyped_folder_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("overfill.making.full_models.fetch_from_hub", lambda model_id, *rest: asked.append(model_id))
    (tmp_path / "my-pair").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceUnavailable, match="no folder my-pair/ful, although there is my-pair"):
        resolve_model("my-pair/ful")
    assert not asked


def test_a_pair_is_no_model(tiny_pair: Path) -> None:
    with pytest.raises(InvalidPair, match=rf"is a pair: give one of its models, such as {tiny_pair}/full"):
        resolve_model(str(tiny_pair))
