"""The environment of `make test-vllm`: a tested release of vLLM, whose engine can be imported."""

from __future__ import annotations

from overfill.engine.vllm_release import installed, untested_warning


def test_the_installed_release_is_in_the_tested_range() -> None:
    release = installed()
    assert untested_warning(release) is None
