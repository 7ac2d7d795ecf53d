"""Tests that the files of ``deploy`` agree with the code and are valid, as far as possible without containers."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import operators
import pytest
import yaml
from dockerfile_parse import DockerfileParser

from overfill.settings.config import SERVICES, read_checked
from overfill.settings.config_file import flag_name
from overfill.stack.spec import StackSpec

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SETTINGS_FILES = ("overfill.yaml", "compose/overfill.yaml", "systemd/overfill.yaml")


def load(path: str) -> Any:
    return yaml.safe_load((DEPLOY / path).read_text())


def test_generated_files_of_the_chart_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, DEPLOY / "helm" / "generate.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", SETTINGS_FILES)
def test_files_of_settings_are_right(name: str) -> None:
    from overfill.cli.main import main

    assert main(["config", "check", str(DEPLOY / name)]) == 0


# Images


def dockerfile() -> list[dict[str, Any]]:
    parser = DockerfileParser(fileobj=io.BytesIO((DEPLOY / "docker" / "Dockerfile").read_bytes()))
    structure: list[dict[str, Any]] = parser.structure
    return structure


def stages() -> dict[str, list[tuple[str, str]]]:
    """Returns the instructions of each Dockerfile stage, preceded by those of its base stages."""
    found: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for step in dockerfile():
        if step["instruction"] == "FROM":
            base, _, name = step["value"].partition(" AS ")
            current = list(found.get(base.replace("${VARIANT}", "cpu"), []))
            found[name] = current
        elif step["instruction"] not in ("COMMENT",):
            current.append((step["instruction"], step["value"]))
    return found


@pytest.mark.parametrize("target", ["router", "prefill", "decode", "ray", "worker-vllm"])
def test_images_run_without_root_and_have_health_checks(target: str) -> None:
    steps = dict(stages()[target])  # of repeated instructions, Docker uses the last
    assert steps["USER"] == "10001:10001"
    if target in ("ray", "worker-vllm"):
        assert steps["HEALTHCHECK"] == "NONE", "their probes come from KubeRay and the chart"
        return
    assert json.loads(steps["ENTRYPOINT"]) == [f"overfill-{target}"]
    port = {"router": "7600", "prefill": "7601", "decode": "7602"}[target]
    assert port in steps["EXPOSE"].split()
    # A router without workers is alive but not ready, and a restart would not help.
    live = ["--live"] * (target == "router")
    assert steps["HEALTHCHECK"].endswith(
        f"CMD {json.dumps(['overfill', 'health', *live, '--address', f'127.0.0.1:{port}'])}"
    )


def test_bases_are_pinned_and_every_file_is_in_the_context() -> None:
    base = next(step["value"] for step in dockerfile() if step["instruction"] == "ARG")
    assert re.fullmatch(r"BASE=python:\d+\.\d+\.\d+-slim-\w+", base)
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for step in dockerfile():
        if step["instruction"] == "COPY" and "--from=" not in step["value"]:
            for source in step["value"].split()[:-1]:
                assert (ROOT / source).exists()
                assert source in allowed


def test_vllm_s_image_has_a_compiler_and_keeps_what_is_compiled_in_the_cache() -> None:
    """$HOME is /tmp, where the chart's pods have 1 GiB."""
    steps = stages()["worker-vllm"]
    assert any("apt-get install" in text and "g++" in text for name, text in steps if name == "RUN")
    values = dict(word.partition("=")[::2] for name, text in steps if name == "ENV" for word in text.split())
    caches = {name: value for name, value in values.items() if "CACHE" in name or "WORKSPACE" in name}
    assert caches.keys() == {
        "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE",
        "TVM_FFI_CACHE_DIR", "CUDA_CACHE_PATH",
    }  # fmt: skip
    assert len(set(caches.values())) == len(caches)
    assert all(value.startswith("${OVERFILL_HOME}/") for value in caches.values())


def test_an_image_pins_the_wheels_of_a_folder_that_its_python_can_use(tmp_path: Path) -> None:
    for name in ("torch-2.13.0-cp27-cp27m-any.whl", "numpy-2.0+cpu-py3-none-any.whl", "my_own-1-py3-none-any.whl"):
        (tmp_path / name).touch()
    done = choose_torch(tmp_path, "cuda", ["nvidia-cublas==13.1; platform_system == 'Linux'"])
    assert done.stdout.split() == ["my-own==1", "numpy==2.0+cpu", "torch==2.0"], done.stderr


@pytest.mark.parametrize(
    ("variant", "needs", "refused"),
    [
        ("cpu", ["filelock"], ""),
        ("cpu", ["filelock", "cuda-toolkit"], "built for CUDA"),
        ("cuda", ["filelock", "cuda-toolkit"], ""),
        ("cuda", ["filelock", "cuda-toolkit; platform_system == 'Windows'"], "built without CUDA"),
    ],
)
def test_an_image_has_the_torch_of_its_device(tmp_path: Path, variant: str, needs: list[str], refused: str) -> None:
    done = choose_torch(tmp_path, variant, needs)
    assert (done.returncode, refused in done.stderr) == (bool(refused), True)


def choose_torch(wheels: Path, variant: str, needs: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs ``choose_torch.py`` where pip finds one torch, which requires ``needs``."""
    metadata = ["Metadata-Version: 2.1", "Name: torch", "Version: 2.0", *(f"Requires-Dist: {need}" for need in needs)]
    with zipfile.ZipFile(wheels / "torch-2.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("torch-2.0.dist-info/METADATA", "\n".join(metadata))
        wheel.writestr("torch-2.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any")
        wheel.writestr("torch-2.0.dist-info/RECORD", "")
    command = [sys.executable, DEPLOY / "docker" / "choose_torch.py", wheels, variant]
    environment = os.environ | {"PIP_NO_INDEX": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


# KubeRay


@operators.needs_definitions
def test_the_rayservice_is_strictly_valid() -> None:
    service = rayservice()
    operators.validate(service)
    service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["maxReplica"] = 3
    with pytest.raises(jsonschema.ValidationError):
        operators.validate(service)


def test_the_other_objects_beside_the_rayservice_are_strictly_valid() -> None:
    _, service, *policies = rayservice_objects()
    assert service["spec"]["selector"] == {"overfill.io/component": "router"}
    assert [policy["kind"] for policy in policies] == ["NetworkPolicy", "NetworkPolicy"]
    for one in (service, *policies):
        kubernetes_validate.validate(one, "1.34", strict=True)
    # Istio takes grpc as plaintext HTTP/2, and the ports speak TLS.
    assert {port["appProtocol"] for port in service["spec"]["ports"]} == {"https"}


def rayservice_objects() -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / "ray" / "rayservice.yaml").read_text()))


def rayservice() -> Any:
    return rayservice_objects()[0]


def ray_pods() -> dict[str, Any]:
    """Returns the pod templates by component."""
    cluster = rayservice()["spec"]["rayClusterConfig"]
    templates = [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]
    return {template["metadata"]["labels"]["overfill.io/component"]: template["spec"] for template in templates}


def test_ray_s_pods_are_ready_without_serve_s_proxies() -> None:
    """KubeRay adds a probe that needs a proxy to every container without one, and needs a port named serve."""
    pods = ray_pods()
    for component, pod in pods.items():
        (container,) = pod["containers"]
        assert container["livenessProbe"]["httpGet"] == {"path": "/api/healthz", "port": 52365}
        ready = container["readinessProbe"]
        if component != "router":
            assert ready["httpGet"] == {"path": "/api/healthz", "port": 52365}
            continue
        assert ready["httpGet"] == {"path": "/health", "port": "https", "scheme": "HTTPS"}
        args = yaml.safe_load(rayservice()["spec"]["serveConfigV2"])["applications"][0]["args"]
        https = {port["name"]: port["containerPort"] for port in container["ports"]}["https"]
        assert args["router"]["http_ports"] == [https]
        # With API keys, the endpoint asks for no client certificate, and the kubelet has none.
        assert {"tls_cert", "api_keys"} <= args["settings"].keys() | args["router"]["settings"].keys()
    assert "serve" in [port["name"] for port in pods["head"]["containers"][0]["ports"]]


def test_ray_s_pods_have_only_the_secrets_that_they_need() -> None:
    secrets = {
        component: {volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}
        for component, pod in ray_pods().items()
    }
    workers, router = {"overfill-tls-worker"}, {"overfill-tls-router", "overfill-keys"}
    assert secrets == {"head": set(), "router": router, "prefill": workers, "decode": workers}
    assert rayservice()["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}


def test_only_the_stack_and_the_operator_reach_ray_s_ports() -> None:
    _, _, stack, clients = (one["spec"] for one in rayservice_objects())
    every_pod = {"matchExpressions": [{"key": "overfill.io/component", "operator": "Exists"}]}
    assert stack["podSelector"] == every_pod
    inside, operator, metrics = stack["ingress"]
    assert inside == {"from": [{"podSelector": every_pod}]}
    assert [port["port"] for port in operator["ports"]] == [8265]
    assert [port["port"] for port in metrics["ports"]] == [7690]
    assert clients["podSelector"] == {"matchLabels": {"overfill.io/component": "router"}}
    assert [port["port"] for (rule,) in [clients["ingress"]] for port in rule["ports"]] == [7600, 8000]


@pytest.mark.parametrize(("pool", "gpu", "weights"), [("prefill", 80e9, 16.1e9), ("decode", 24e9, 6.5e9)])
def test_ray_s_workers_fit_on_their_gpus(pool: str, gpu: float, weights: float) -> None:
    """For Llama 3.1 8B with a 3B decoder, in bfloat16: 32 layers, 8 KV heads of 128."""
    from overfill.engine.build import MemoryRequirement  # imports torch, which takes seconds

    args = yaml.safe_load(rayservice()["spec"]["serveConfigV2"])["applications"][0]["args"]
    config: Any = StackSpec(**args).worker_config(pool)
    token = 2 * 8 * 128 * 2
    needs = MemoryRequirement(
        block_bytes=32 * 16 * token,
        block_size=16,
        token_layer_bytes=token,
        longest=config.max_model_len or 131_072,
        max_num_seqs=config.max_num_seqs,
        step_tokens=getattr(config, "max_num_batched_tokens", config.max_num_seqs),
    )
    step = needs.step_bytes(config.kv_memory // needs.block_bytes)
    assert config.kv_memory + step + weights < 0.95 * gpu


def test_ray_s_groups_have_the_resources_that_serve_requests() -> None:
    service = rayservice()
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    groups = {group["groupName"]: group for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]}
    assert service["spec"]["upgradeStrategy"]["type"] == "NewClusterWithIncrementalUpgrade"
    for name, pool in groups.items():
        asked = application["args"][name]
        assert (pool["minReplicas"], pool["maxReplicas"]) == (
            asked["replicas"],
            asked.get("max_replicas", asked["replicas"]),
        )
        assert json.loads(json.loads(pool["rayStartParams"]["resources"])) == asked["resources"] == {name: 1}
        (container,) = pool["template"]["spec"]["containers"]
        assert float(container["resources"]["limits"]["cpu"]) >= asked["num_cpus"]
        assert container["resources"]["limits"].get("nvidia.com/gpu", 0) == asked.get("num_gpus", 0)
        assert (
            pool["template"]["spec"]["terminationGracePeriodSeconds"] > application["args"]["settings"]["grace_period"]
        )
    assert set(groups) == {"router", "prefill", "decode"}


def test_the_application_accepts_the_arguments() -> None:
    (application,) = yaml.safe_load(rayservice()["spec"]["serveConfigV2"])["applications"]
    StackSpec(**application["args"])
    module, _, function = application["import_path"].partition(":")
    assert f"def {function}(" in (ROOT / (module.replace(".", "/") + ".py")).read_text()


# Compose and systemd


def test_compose_uses_existing_flags_ports_and_files() -> None:
    compose = load("compose/compose.yaml")
    settings = read_checked(DEPLOY / "compose" / "overfill.yaml").sections
    targets = stages()
    for name in ("router", "prefill", "decode"):
        service = compose["services"][name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert settings[name]["port"] in dict(targets[name])["EXPOSE"].split()
        assert service["user"] == "10001:10001"
        stop = float(service["stop_grace_period"].removesuffix("s"))
        assert stop > float(settings["common"]["grace-period"])
        words = " ".join(service.get("entrypoint", []) + service.get("command", []))
        kind = next(kind for kind in SERVICES if kind.section == name)
        flags = re.findall(r"--([a-z-]+)", words)
        assert "config" in flags
        assert set(flags) <= {flag_name(field) for field in kind.model_fields}
    for file in (compose, load("compose/grafana.yaml")):
        for service in file["services"].values():
            assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
            for volume in service["volumes"]:
                source = volume.replace("${OVERFILL_SECRETS:-./secrets}", "./secrets").partition(":")[0]
                if source.startswith("./secrets/"):
                    assert f"copy {Path(source).name} " in (DEPLOY / "compose" / "make-secrets").read_text()
                elif source.startswith("."):
                    assert (DEPLOY / "compose" / source).exists(), source
                else:
                    assert source in file["volumes"]


@pytest.mark.parametrize("path", ["prometheus/prometheus.yml", "prometheus/tests/alerts_test.yml"])
def test_prometheus_finds_the_rules(path: str) -> None:
    folder = (DEPLOY / path).parent
    found = {file.resolve() for pattern in load(path)["rule_files"] for file in folder.glob(pattern)}
    assert found == set((DEPLOY / "helm/overfill/files/rules").resolve().iterdir())


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")
def test_prometheus_accepts_its_configurations(tmp_path: Path) -> None:
    # The paths at which compose mounts it.
    shutil.copy(DEPLOY / "compose" / "prometheus.yml", tmp_path)
    shutil.copytree(DEPLOY / "helm/overfill/files/rules", tmp_path / "rules")
    (tmp_path / "secrets").mkdir()
    for name in ("ca.crt", "tls.crt", "tls.key"):
        (tmp_path / "secrets" / name).touch()
    for file in (DEPLOY / "prometheus/prometheus.yml", tmp_path / "prometheus.yml"):
        done = subprocess.run(["promtool", "check", "config", file], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr + done.stdout


def test_every_service_has_a_systemd_unit() -> None:
    units = {path.stem.rstrip("@") for path in (DEPLOY / "systemd").glob("*.service")}
    assert units == {kind.program for kind in SERVICES}


@pytest.mark.parametrize("unit", sorted(path.name for path in (DEPLOY / "systemd").glob("*.service")))
def test_systemd_units(unit: str, tmp_path: Path) -> None:
    text = (DEPLOY / "systemd" / unit).read_text()
    name = unit.removeprefix("overfill-").partition(".")[0].rstrip("@")
    kind = next(kind for kind in SERVICES if kind.section == name)
    command = next(line for line in text.splitlines() if line.startswith("ExecStart="))
    program, *flags = command.removeprefix("ExecStart=/opt/overfill/bin/").split()
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert program in scripts
    assert program == kind.program
    assert {flag[2:].partition("=")[0] for flag in flags} <= {flag_name(field) for field in kind.model_fields}
    stop = int(next(line for line in text.splitlines() if line.startswith("TimeoutStopSec=")).partition("=")[2])
    assert stop > float(read_checked(DEPLOY / "systemd" / "overfill.yaml").sections["common"]["grace-period"])
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze for the rest")
    here = tmp_path / unit
    here.write_text(text.replace(f"/opt/overfill/bin/{program}", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", here], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
