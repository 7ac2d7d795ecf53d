"""Tests of the images: their contents and sizes, and what a build says that cannot succeed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from runtime import IMAGES, PREFIX, ROOT, build_images, docker

pytestmark = [pytest.mark.images, pytest.mark.timeout(1200)]

MB_OVER_BASE = {"router": 150, "prefill": 1500, "decode": 1500, "ray": 1800}


def inspect(image: str) -> dict:
    return json.loads(docker("image", "inspect", image))[0]


def in_image(image: str, script: str) -> str:
    hardened = ["--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges"]
    return docker("run", "--rm", f"--name={PREFIX}look", *hardened, "--entrypoint=sh", image, "-ec", script)


@pytest.mark.parametrize("target", IMAGES)
def test_an_image_is_small_runs_without_root_and_lists_its_parts(target: str, images: dict[str, str]) -> None:
    found = inspect(images[target])
    labels = found["Config"]["Labels"]
    base = inspect(labels["org.opencontainers.image.base.name"])
    assert (found["Size"] - base["Size"]) / 1e6 <= MB_OVER_BASE[target]
    assert found["Config"]["User"] == "10001:10001"
    parts = json.loads(in_image(images[target], f"cat {labels['io.overfill.sbom']}"))
    names = {one["name"] for one in parts["components"]}
    assert ("torch" in names, "ray" in names) == (target != "router", target == "ray")
    said = in_image(images[target], "id -u; overfill --version; command -v gcc g++ cc || echo no compiler")
    assert said.splitlines()[0] == "10001"
    assert said.splitlines()[-1] == "no compiler"


def test_a_worker_has_torch_s_cpu_build_and_compiled_kernels(images: dict[str, str]) -> None:
    said = in_image(
        images["decode"],
        "export OVERFILL_HOME=/tmp/none; python -c '"
        "import torch; from overfill.kv.native import library as kv; from overfill.model.native import library as m;"
        "from overfill.process.compiled import compiled_library as c;"
        "print(torch.version.cuda, c(kv.SOURCE, kv.FLAGS), c(m.SOURCE, m.FLAGS))'",
    )
    cuda, *libraries = said.split()
    assert cuda == "None"
    assert all(path.startswith("/opt/overfill/share/overfill/native/") for path in libraries)


def test_a_second_build_runs_no_step(images: dict[str, str]) -> None:
    before = {name: inspect(name)["Id"] for name in images.values()}
    done = build_images()
    assert done.returncode == 0
    assert not [line for line in done.stdout.splitlines() if line.startswith("  ")], done.stdout
    assert {name: inspect(name)["Id"] for name in images.values()} == before


def test_a_base_without_python_is_refused(daemon: None, tmp_path: Path) -> None:
    empty, name = tmp_path / "empty.tar", f"{PREFIX}base"
    subprocess.run(["tar", "-cf", str(empty), "-C", "/", "./bin/sh"], check=False, capture_output=True)
    docker("import", str(empty), name)
    try:
        done = build_images("--base", name, "--target", "router")
    finally:
        docker("rmi", "--force", name)
    assert done.returncode == 1
    assert "images: router failed" in done.stderr


def test_an_index_that_does_not_answer_ends_the_build(images: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = inspect(images["router"])["Id"]
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    done = build_images("--target", "router")
    assert done.returncode == 1
    assert "images: router failed" in done.stderr
    assert "No matching distribution found" in done.stderr
    assert inspect(images["router"])["Id"] == before


def test_a_folder_of_wheels_that_is_none(daemon: None) -> None:
    done = build_images("--wheels", "/nowhere")
    assert done.returncode == 1
    assert done.stderr == "images: --wheels: /nowhere is not a folder\n"


def test_without_docker_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(ROOT / ".venv" / "bin"))
    done = build_images()
    assert (done.returncode, done.stderr) == (1, "images: docker is not installed\n")
    monkeypatch.undo()
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere.sock")
    done = build_images()
    assert done.returncode == 1
    assert "unix:///nowhere.sock" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(not os.environ.get("PIP_FIND_LINKS"), reason="needs an index whose torch is a CUDA build")
def test_torch_s_cuda_build_is_refused_in_an_image_for_cpus(daemon: None, tmp_path: Path) -> None:
    done = build_images("--wheels", str(tmp_path), "--target", "decode")
    assert done.returncode == 1
    assert "built for CUDA" in done.stderr
    assert "make images WHEELS=FOLDER" in done.stderr
