"""Builds the images of the services, and prints their sizes and build times. `make images` calls it.

    python deploy/docker/images.py [--variant cpu|cuda] [--base IMAGE] [--wheels FOLDER] [--target TARGET]…

Without --base, the base is the Dockerfile's if docker has it or a registry gives it within a minute. Otherwise base.py
makes one, and Prometheus for deploy/compose is built on it too. Without --wheels, $PIP_FIND_LINKS is used if it names a
folder. The build also uses $PIP_INDEX_URL and $PIP_EXTRA_INDEX_URL. Images get their names only when all of them are
built.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

from base import CannotMakeBase, make_base

ROOT = Path(__file__).parents[2]
DOCKERFILE = Path(__file__).parent / "Dockerfile"
TARGETS = ("router", "prefill", "decode", "ray")
VLLM = "worker-vllm"  # only for GPUs
PROMETHEUS = "prometheus"
OWN_BASE = f"overfill-base:python{sys.version_info.major}.{sys.version_info.minor}"
PATIENCE = 60  # seconds that a registry may take


class CannotBuild(Exception):
    """The images cannot be built; the message says why and what to do."""


@dataclass(frozen=True)
class Built:
    """An image that has been built: its name, its id, and the seconds that the build took."""

    name: str
    image_id: str
    seconds: float


def build_all(targets: tuple[str, ...], variant: str, base: str, wheels: Path | None) -> list[Built]:
    """Build ``targets`` on ``base`` and name them. Raises CannotBuild; then no image has been named."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    built = []
    for target in targets:
        # Router and Prometheus compute nothing, so they are the same for every device.
        name = f"overfill-{target}:{version}" + ("" if target in ("router", PROMETHEUS) else f"-{variant}")
        print(f"{name} on {base}", flush=True)
        started = time.monotonic()
        image_id = _build(target, variant, base, wheels, version)
        built.append(Built(name, image_id, time.monotonic() - started))
    for image in built:
        docker("tag", image.image_id, image.name)
    return built


def _build(target: str, variant: str, base: str, wheels: Path | None, version: str) -> str:
    revision = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    labels = {"version": version, "revision": revision.stdout.strip(), "base.name": base, "licenses": "Apache-2.0"}
    command = ["docker", "buildx", "build", "--progress=plain", "--file", str(DOCKERFILE), "--target", target]
    command += ["--build-arg", f"BASE={base}", "--build-arg", f"VARIANT={variant}"]
    for label, value in labels.items():
        command += ["--label", f"org.opencontainers.image.{label}={value}"]
    for variable in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        if os.environ.get(variable):
            command += ["--build-arg", variable]  # docker reads the value, which may contain a password
    if wheels is not None:
        command += ["--build-context", f"wheels={wheels}"]
    with tempfile.TemporaryDirectory() as folder:
        image_id = Path(folder) / "id"
        lines = _followed([*command, "--iidfile", str(image_id), str(ROOT)])
        if not image_id.exists():
            raise CannotBuild(_reason(target, lines))
        return image_id.read_text()


def _followed(command: list[str]) -> list[str]:
    """Run a build and return its output. Prints each step that is not in the cache when it begins."""
    steps: dict[str, str] = {}
    lines = []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line.rstrip())
            if begun := re.match(r"#(\d+) \[(\S+) +\d+/\d+\] RUN (?:--\S+ +)*(.*)", line):
                steps[begun[1]] = f"{begun[2]}: {begun[3]}"
            elif (output := re.match(r"#(\d+) [\d.]+ ", line)) and output[1] in steps:
                print(f"  {steps.pop(output[1])}"[:110], flush=True)
    return lines


def _reason(target: str, lines: list[str]) -> str:
    text = "\n".join(lines)
    if "no space left on device" in text.lower() or "Errno 28" in text:
        folder = docker("info", "--format", "{{.DockerRootDir}}").strip()
        return f"{target}: the disk that has {folder} is full. Free some space (docker system prune), and run it again"
    said = [re.sub(r"^#?[\d.]+ +(?:[\d.]+ +)?", "", line) for line in lines if re.match(r"#\d+ [\d.]+ ", line)]
    return f"{target} failed:\n" + "\n".join(f"  {line}" for line in said[-12:] or lines[-12:])


def choose_base() -> str:
    """Return the Dockerfile's base if it can be had, else one that is made here. Raises CannotBuild."""
    found = re.search(r"^ARG BASE=(\S+)", DOCKERFILE.read_text(), re.MULTILINE)
    assert found is not None
    pinned = found[1]
    if _has(pinned):
        return pinned
    print(f"asking the registry for {pinned}", flush=True)
    try:
        done = subprocess.run(
            ["docker", "pull", "--quiet", pinned], capture_output=True, text=True, check=False, timeout=PATIENCE
        )
        why = (done.stderr.strip().splitlines() or [""])[-1]
        if done.returncode == 0:
            return pinned
    except subprocess.TimeoutExpired:
        why = f"no answer within {PATIENCE} s"
    if not _has(OWN_BASE):
        print(f"the registry does not give it ({why}); making {OWN_BASE} with debootstrap", flush=True)
        try:
            make_base(OWN_BASE)
        except CannotMakeBase as error:
            raise CannotBuild(
                f"no base image: the registry does not give {pinned} ({why}), and none can be made here: {error}. "
                "Name an image with Python 3.11 or newer: make images BASE=IMAGE"
            ) from error
    return OWN_BASE


def choose_targets(variant: str, asked: list[str] | None, base: str) -> tuple[str, ...]:
    """Return the targets to build: those that were asked, else all of ``variant``. Raises CannotBuild."""
    if variant != "cuda" and VLLM in (asked or ()):
        raise CannotBuild(f"{VLLM} is an image for GPUs: make images VARIANT=cuda")
    if asked:
        return tuple(asked)
    # A registry that does not give the base does not give Prometheus either.
    return (*TARGETS, *([VLLM] if variant == "cuda" else []), *([PROMETHEUS] if base == OWN_BASE else []))


def _has(image: str) -> bool:
    return subprocess.run(["docker", "image", "inspect", image], capture_output=True, check=False).returncode == 0


def docker(*arguments: str) -> str:
    """Run docker and return what it prints. Raises CannotBuild with its last line."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotBuild(f"docker {arguments[0]}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return done.stdout


def check_docker() -> None:
    """Raise CannotBuild unless docker, its buildx and its daemon are there."""
    if shutil.which("docker") is None:
        raise CannotBuild("docker is not installed")
    docker("version", "--format", "{{.Server.Version}}")
    if subprocess.run(["docker", "buildx", "version"], capture_output=True, check=False).returncode:
        raise CannotBuild("docker has no buildx, which builds these images; Debian's package is docker-buildx")


def _wheels(given: str) -> Path | None:
    folder = given or os.environ.get("PIP_FIND_LINKS", "")
    if given and not Path(given).is_dir():
        raise CannotBuild(f"--wheels: {given} is not a folder")
    return Path(folder) if folder and Path(folder).is_dir() else None


def show(built: list[Built], base: str) -> None:
    """Print a table of the images."""
    below = int(docker("image", "inspect", "--format", "{{.Size}}", base))
    print(f"\n{'image':<32} {'MB':>6} {'over base':>10} {'seconds':>8}")
    for image in built:
        size = int(docker("image", "inspect", "--format", "{{.Size}}", image.name))
        print(f"{image.name:<32} {size / 1e6:>6.0f} {(size - below) / 1e6:>10.0f} {image.seconds:>8.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the images of the services.")
    parser.add_argument("--variant", choices=("cpu", "cuda"), default="cpu", help="device of the workers")
    parser.add_argument("--base", default="", help="base image, with Python 3.11 or newer")
    parser.add_argument("--wheels", default="", help="folder with wheels that pip takes first")
    parser.add_argument("--target", action="append", choices=(*TARGETS, VLLM, PROMETHEUS), help="image to build")
    arguments = parser.parse_args()
    try:
        check_docker()
        wheels = _wheels(arguments.wheels)
        base = arguments.base or choose_base()
        targets = choose_targets(arguments.variant, arguments.target, base)
        built = build_all(targets, arguments.variant, base, wheels)
        show(built, base)
        if targets[-1] == PROMETHEUS:
            print(f"\nFor deploy/compose: export OVERFILL_PROMETHEUS_IMAGE={built[-1].name}")
    except CannotBuild as error:
        sys.exit(f"images: {error}")


if __name__ == "__main__":
    main()
