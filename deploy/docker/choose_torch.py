"""Prints pip constraints for an image; refuses a torch that is built for another device than the image.

    python choose_torch.py WHEELS VARIANT >constraints.txt

The constraints pin every distribution that the folder WHEELS has for this Python, so that pip takes it even if the
index has a newer one. With VARIANT `cpu`, the program exits 1 if the torch that pip would install needs CUDA's
libraries, which take 5 GB; with `cuda`, if it does not need them, because such a torch finds no GPU. Runs in a new
virtual environment, so it uses the `packaging` inside pip.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.tags import sys_tags
from pip._vendor.packaging.utils import parse_wheel_filename

CUDA_BUILD = """\
The index offers only torch {version}, which is built for CUDA: an image for CPUs would have 6 GB. Do one of these:
  - put torch's CPU wheel for Python {python} into a folder, and name it: make images WHEELS=FOLDER
  - name an index with torch's CPU builds: PIP_EXTRA_INDEX_URL=URL make images
  - build images for GPUs: make images VARIANT=cuda"""

CPU_BUILD = """\
pip would install torch {version}, which is built without CUDA: the image would not use a GPU. Do one of these:
  - remove torch's CPU wheels from the folder WHEELS, and the index with CPU builds from PIP_EXTRA_INDEX_URL
  - build images for CPUs: make images VARIANT=cpu"""


def constraints(wheels: Path) -> list[str]:
    """Return a constraint for every wheel in ``wheels`` that this Python can use."""
    usable = set(sys_tags())
    found = [parse_wheel_filename(file.name) for file in sorted(wheels.glob("*.whl"))]
    return [f"{name}=={version}" for name, version, _, tags in found if usable & tags]


def chosen_torch(wheels: Path, lines: list[str]) -> tuple[str, bool]:
    """Return the version of torch that pip would install, and whether it needs CUDA's libraries."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(lines))
        file.flush()
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet"]
        command += ["--report=-", "--find-links", str(wheels), "--constraint", file.name, "torch"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit("pip finds no torch; its message is above. Is the package index reachable from this build?")
    (torch,) = json.loads(done.stdout)["install"]
    needed = [Requirement(line) for line in torch["metadata"].get("requires_dist", ())]
    applying = [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return torch["metadata"]["version"], any(name.startswith(("nvidia-", "cuda-")) for name in applying)


def main() -> None:
    wheels, variant = Path(sys.argv[1]), sys.argv[2]
    lines = constraints(wheels)
    version, cuda = chosen_torch(wheels, lines)
    if cuda != (variant == "cuda"):
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        sys.exit((CUDA_BUILD if cuda else CPU_BUILD).format(version=version, python=python))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
