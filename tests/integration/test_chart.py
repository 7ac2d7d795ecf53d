"""Tests that the Helm chart renders valid and safe objects, which an API server accepts, and refuses unknown values."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import re
import tomllib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import kmock as kmock_package
import kubernetes_validate
import operators
import promql_parser
import pytest
import yaml
from charts import CHART, ROOT, VALUES, helm, of_kind, pods, render, tool
from cryptography import x509

from overfill.cli.pair import pair_group
from overfill.engine.build import MemoryRequirement, memory_needed
from overfill.kv.disk_files import DiskFiles, NotOurFolder
from overfill.kv.spec import DEFAULT_BLOCK_SIZE
from overfill.making.recipe import slow_sizes
from overfill.pair import store
from overfill.rpc.constants import WIRE_VERSION
from overfill.settings.config import SERVICES, ColocatedConfig, DecodeConfig, PrefillConfig, RouterConfig, ServiceConfig
from overfill.settings.config_file import field_name
from overfill.telemetry.metrics import declared

VERSIONS = ("1.29", "1.34")
"""Oldest Kubernetes that the chart supports, and the newest whose schemas are here."""

CUSTOM = {
    "monitoring.coreos.com/v1": ("PodMonitor", "PrometheusRule"),
    "keda.sh/v1alpha1": ("ScaledObject",),
    "cert-manager.io/v1": ("Certificate",),
    "gateway.networking.k8s.io/v1": ("HTTPRoute", "GRPCRoute"),
    "inference.networking.k8s.io/v1": ("InferencePool",),
}
"""API version -> kinds of the operators' objects, which Kubernetes' own schemas do not contain."""

VERBS = ["create", "delete", "get", "list", "patch"]

ALL_ON = (
    "monitoring.podMonitor=true",
    "monitoring.rules=true",
    "monitoring.dashboards=true",
    "router.autoscaling.kind=hpa",
    "prefill.autoscaling.kind=hpa",
    "decode.autoscaling.kind=hpa",
    "router.priority.value=5",
    "cache.create=true",
    "servedModelName=m",
    "apiKeys.secretName=keys",
    "test.apiKeySecretName=test-key",
    "prefill.kvDisk.size=50Gi",
    "decode.adapters.claimName=adapters",
    "gateway.httpRoute.enabled=true",
    "gateway.httpRoute.parentRefs[0].name=public",
    "gateway.httpRoute.parentRefs[0].namespace=gateways",
    "gateway.httpRoute.hostnames={api.example.org}",
    "gateway.grpcRoute.enabled=true",
    "gateway.grpcRoute.parentRefs[0].name=public",
    "gateway.grpcRoute.hostnames={grpc.example.org}",
    "gateway.inferencePool.enabled=true",
    "gateway.inferencePool.picker.service=picker",
)
TIERS = ("default", "fast", "full")
FROM_HUB = ("pair.source=hub", "pair.hub.repository=a/b", "pair.hub.tokenSecretName=t")
TWO_TIERS = ("tiers.a.pair=identity", "tiers.b.pair=fast", "tiers.b.settings.quantize=int8")
CANARY = ("canary.revision=r2", "canary.percent=10", "canary.pair.named.name=fast", "canary.decode.replicas=1")
ROLLOUTS = [("values.yaml", CANARY), ("values.yaml", (*ALL_ON, *CANARY, "revision=r1"))]
ROLLOUTS += [("values-tiers.yaml", (*CANARY, "canary.tiers.fast.pair=identity")), ("values-prod.yaml", CANARY)]
SETS = [*((values, ()) for values in VALUES)]
SETS += [("values.yaml", settings) for settings in (ALL_ON, (*ALL_ON, *TWO_TIERS), FROM_HUB)]


def refused(*settings: str) -> str:
    done = helm("template", "x", str(CHART), *[flag for setting in settings for flag in ("--set", setting)])
    assert done.returncode != 0
    return done.stderr


@pytest.mark.parametrize("values", VALUES)
def test_lint(values: str) -> None:
    done = helm("lint", "--strict", str(CHART), "--values", str(CHART / values))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("values", "settings"), [*SETS, *ROLLOUTS])
def test_every_object_is_strictly_valid(values: str, settings: tuple[str, ...], version: str) -> None:
    objects = render(values, *settings)
    assert len(objects) > 15
    for one in objects:
        if one["apiVersion"] in CUSTOM:
            assert one["kind"] in CUSTOM[one["apiVersion"]]
        else:
            kubernetes_validate.validate(one, version, strict=True)


@operators.needs_definitions
@pytest.mark.parametrize(("values", "settings"), [*SETS, *ROLLOUTS])
def test_every_operators_object_is_strictly_valid(values: str, settings: tuple[str, ...]) -> None:
    for one in render(values, *settings):
        if one["apiVersion"] in CUSTOM:
            operators.validate(one)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("prefil.replicas=2", "prefil"),
        ("prefill.replica=2", "replica"),
        ("prefill.settings.kv-memroy=1GiB", "kv-memroy"),
        ("router.settings.kv-memory=1GiB", "kv-memory"),
        ("decode.settings.host=0.0.0.0", "host"),  # the chart sets it itself
        ("decode.settings.prefix-cache=maybe", "prefix-cache"),
        ("decode.autoscaling.kind=vpa", "autoscaling/kind"),
        ("pair.source=ftp", "pair/source"),
        ("tls.secretName=mine", "secretName"),  # of a chart with one certificate for all pods
        ("pair.source=claim", "which claim has the pair"),
        ("pair.source=hub", "which repository has the pair"),
        ("tls.generate=false", "no certificate"),
        ("apiKeys.generate=false", "no API keys"),
        ("tls.certManager.enabled=true", "several certificates"),
        ("router.settings.share-port=/run/x", "share-port"),
        ("router.settings.tiers=a=p", "tiers"),
        ("decode.settings.tier=a", "tier"),
        ("tiers.a.replicas=2", "pair"),
        ("colocated.stages=prefill", "stages"),
        ("colocated.autoscaling.kind=hpa", "autoscaling"),
        (
            "colocated.replicas=1,decode.autoscaling.kind=hpa",
            "decode: autoscaling.kind hpa conflicts with colocated.replicas",
        ),
        (
            "colocated.replicas=1,tiers.a.pair=x,tiers.b.pair=y,tiers.b.replicas=0",
            "tiers.b.replicas: at least 1",
        ),
        (
            "prefill.settings.tensor-parallel-size=4,prefill.resources.limits.nvidia\\.com/gpu=2",
            "prefill.resources.limits: nvidia.com/gpu is 2, and settings.tensor-parallel-size is 4",
        ),
        (
            "tiers.a.pair=x,tiers.a.settings.tensor-parallel-size=2,decode.resources.limits.nvidia\\.com/gpu=1",
            "tiers.a.resources.limits: nvidia.com/gpu is 1",
        ),
        ("decode.resources.limits.nvidia\\.com/gpu=2", "decode.resources.limits: nvidia.com/gpu is 2"),
        ("prefill.settings.tensor-parallel-size=2", "prefill.resources.limits: there is no GPU"),
        ("colocated.settings.tensor-parallel-size=2", "tensor-parallel-size"),
        ("prefill.settings.kv-disk=/x", "kv-disk"),
        ("prefill.kvDisk.size=50GiB", "kvDisk/size"),
        ("prefill.kvDisk.claimName=c", "prefill.kvDisk.size: how much"),
        ("prefill.kvDisk.size=50Gi,prefill.kvDisk.claimName=c,prefill.kvDisk.storageClassName=s", "keep one of them"),
        ("prefill.kvDisk.size=50Gi,prefill.settings.prefix-cache=false", "remove prefix-cache"),
        (
            "prefill.kvDisk.size=50Gi,prefill.settings.tensor-parallel-size=2,prefill.settings.device=cpu",
            "prefill.kvDisk: with settings.tensor-parallel-size 2, ranks have the KV",
        ),
        ("decode.settings.adapters=/x", "'adapters'"),
        ("tiers.a.pair=x,tiers.a.adapters.path=y", "tiers.a.adapters.claimName: which claim has the folder y"),
        ("prefill.shmSize=2", "shmSize"),
        ("canary.percent=5", "canary.percent: needs canary.revision"),
        ("canary.decode.replicas=2", "canary.decode: needs canary.revision"),
        ("revision=r1,canary.revision=r1", "canary.revision: r1 is the name in `revision` too"),
        ("canary.revision=r2,canary.tiers.a.replicas=2", "canary.tiers.a: there is no tier a in tiers"),
        ("canary.revision=r2,canary.colocated.replicas=1", "colocated"),
        ("canary.revision=r2,canary.decode.replica=1", "replica"),
        ("canary.revision=r2,canary.decode.replicas=0", "decode-r2 would have no worker"),
        ("canary.revision=r2,colocated.replicas=1,prefill.replicas=0", "set replicas in canary.prefill"),
        ("canary.revision=R2", "canary/revision"),
        ("tiers.fast.pair=x,tiers.fast-v2.pair=y,canary.revision=v2", "two pools would have the name decode-fast-v2"),
        ("fullnameOverride=8", "fullnameOverride"),
        (f"fullnameOverride={'a' * 45},revision=r1,decode.autoscaling.kind=keda", "KEDA takes names of at most 54"),
        ("nameOverride=a_b", "nameOverride"),
        ("canary.revision=r2,canary.percent=101", "canary/percent"),
        (
            "pair.source=claim,pair.claim.name=p,pair.claim.path=a/v1,canary.revision=r2,canary.pair.claim.path=v2",
            "Set servedModelName to v1",
        ),
        ("revision=r_1", "revision"),
        ("tiers.A.pair=default", "'A' does not match pattern"),
        ("tiers.a.pair=default,tiers.a.replica=2", "replica"),
        ("tiers.a.pair=default,tiers.a.settings.kv-memroy=1GiB", "kv-memroy"),
        ("tiers.a.pair=default,router.settings.default-tier=b", "there is no tier b in tiers"),
        ("tiers.a.pair=x;y,pair.source=claim,pair.claim.name=c", "neither pair nor settings may have a semicolon"),
    ],
)
def test_a_wrong_value_is_named(setting: str, says: str) -> None:
    assert says in refused(setting)


def free_texts(value: Any, schema: dict[str, Any], text: str, path: str = "") -> Any:
    """Return the values with ``path: text`` instead of each string to which the schema sets no bounds."""
    if isinstance(value, dict):
        parts = schema.get("properties", {})
        return {key: free_texts(one, parts.get(key, {}), text, f"{path}.{key}") for key, one in value.items()}
    return f"{path}{text}" if schema.keys() <= {"type", "description"} and schema.get("type") == "string" else value


def strings(value: Any) -> Iterator[str]:
    """Yield every key and every string within a value."""
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from strings(one)
    elif isinstance(value, str):
        yield value


def test_a_text_of_the_values_stays_one_text(tmp_path: Path) -> None:
    text = "\"'\n- k: {v} ] #8"
    schema = json.loads((CHART / "values.schema.json").read_text())
    texts = free_texts(yaml.safe_load((CHART / "values.yaml").read_text()), schema, text)
    assert texts["keda"]["serverAddress"] == f".keda.serverAddress{text}"
    (tmp_path / "values.json").write_text(json.dumps(texts))
    on = ["monitoring.podMonitor=true", "prefill.kvDisk.size=5Gi", "decode.autoscaling.kind=keda"]
    on += ["gateway.inferencePool.enabled=true"]
    found: set[str] = set()
    own = [
        "cache.claimName=",
        "prefill.kvDisk.claimName=",
        "cache.create=true",
        "tls.secretPrefix=",
        "apiKeys.secretName=",
    ]
    managed = ["tls.certManager.enabled=true", "tls.generate=false", "pair.source=hub"]
    for settings in (
        ["pair.source=claim", "prefill.kvDisk.storageClassName="],
        [*own, *managed],
        ["pair.source=claim", "colocated.replicas=1", "decode.autoscaling.kind=none", "tiers.8.pair=x", *own],
    ):
        flags = [flag for one in [*on, *settings] for flag in ("--set", one)]
        done = helm("template", "8", str(CHART), "-f", str(tmp_path / "values.json"), *flags)
        assert done.returncode == 0, done.stderr
        objects = [one for one in yaml.load_all(done.stdout, yaml.CSafeLoader) if one]
        found |= set(strings(objects))
        for one in objects:
            assert all(isinstance(label, str) for label in one["metadata"]["labels"].values()), one["metadata"]
    everything = list(found)
    lost = [
        one for one in strings(list(texts.values())) if one.endswith(text) and not any(one in s for s in everything)
    ]
    assert not lost


@pytest.mark.parametrize(("values", "settings"), [*SETS, *ROLLOUTS])
def test_pods_have_no_rights(values: str, settings: tuple[str, ...]) -> None:
    objects = render(values, *settings)
    accounts = of_kind(objects, "ServiceAccount")
    for component, pod in pods(objects).items():
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False, "variables of service links would be read as settings"
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        if component != "test":
            assert accounts[pod["serviceAccountName"]]["automountServiceAccountToken"] is False
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted <= {volume["name"] for volume in pod["volumes"]}
            assert container["resources"]["limits"]["memory"]
    assert not {"Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"} & {one["kind"] for one in objects}


def volume_of(pod: dict[str, Any], path: str) -> tuple[dict[str, Any], bool]:
    """Returns the volume that the pod's container mounts at ``path``, without its name, and whether it may write."""
    (container,) = pod["containers"]
    (mount,) = (one for one in container["volumeMounts"] if one["mountPath"] == path)
    (volume,) = (one for one in pod["volumes"] if one["name"] == mount["name"])
    return {key: value for key, value in volume.items() if key != "name"}, not mount.get("readOnly", False)


DEVICES = {"NVIDIA-H100-80GB-HBM3": 81_559, "NVIDIA-L4": 23_034}
"""Value of the node label nvidia.com/gpu.product -> MiB of memory that the driver reports."""

HALVES = {
    ("values-prod.yaml", "prefill"): (32, 15.0),
    ("values-prod.yaml", "decode"): (32, 6.0),
    ("values-llama.yaml", "prefill"): (32, 15.0),
    ("values-llama.yaml", "decode"): (32, 6.0),
    ("values-ranks.yaml", "prefill"): (80, 131.4),
    ("values-ranks.yaml", "decode"): (80, 48.5),
}
"""Layers and GiB of weights in bfloat16: Llama 3.1 8B and its decoder of 3B, Llama 3.3 70B and one of 26B. All have 8
KV heads of 128."""


@pytest.mark.parametrize(("values", "stage"), HALVES)
def test_an_example_s_kv_and_steps_fit_the_named_gpu(values: str, stage: str) -> None:
    pod = pods(render(values))[stage]
    (kind,) = (kind for kind in SERVICES if kind.section == stage)
    config = kind.parse([argument.replace("$(POD_IP)", "10.1.2.3") for argument in pod["containers"][0]["args"]])
    layers, weights = HALVES[values, stage]
    ranks = config.tensor_parallel_size
    token_layer_bytes = 2 * 8 * 128 * 2 // ranks  # keys and values of 8 heads, 2 bytes each
    block_size = config.block_size or DEFAULT_BLOCK_SIZE
    requirement = MemoryRequirement(
        block_bytes=block_size * layers * token_layer_bytes,
        block_size=block_size,
        token_layer_bytes=token_layer_bytes,
        longest=config.max_model_len or 131_072,
        max_num_seqs=config.max_num_seqs,
        step_tokens=getattr(config, "max_num_batched_tokens", config.max_num_seqs),
    )
    needed = sum(memory_needed([requirement], [config.kv_memory // requirement.block_bytes]))
    # 2 GiB remain for CUDA itself and for activations.
    free = DEVICES[pod["nodeSelector"]["nvidia.com/gpu.product"]] * 2**20 - (weights / ranks + 2) * 2**30
    assert needed <= free, f"{needed / 2**30:.1f} of {free / 2**30:.1f} GiB"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_job_makes_the_pair_that_llama_s_pods_serve(version: str) -> None:
    objects = list(yaml.safe_load_all((CHART.parent / "llama-pair.yaml").read_text()))
    for one in objects:
        kubernetes_validate.validate(one, version, strict=True)
    ((name, claim),) = of_kind(objects, "PersistentVolumeClaim").items()
    job = of_kind(objects, "Job")["llama-pair"]["spec"]["template"]["spec"]
    found = pods(render("values-llama.yaml"))
    (maker,), (worker,) = job["containers"], found["prefill"]["containers"]

    assert maker["image"].rpartition("/")[0] == worker["image"].rpartition("/")[0], "one registry to replace"
    *group, subcommand = maker["command"]
    assert group == ["overfill", "pair"]
    options = pair_group.commands[subcommand].make_context(subcommand, list(maker["args"])).params
    hidden, neurons = options["hidden_size"], options["intermediate_size"]
    # Of Llama 3.1 8B: 32 heads and 8 KV heads of 128, 32 layers, 128,256 tokens with a head of their own.
    parameters = 2 * 128_256 * hidden + 32 * (2 * 32 * 128 * hidden + 2 * 8 * 128 * hidden + 3 * hidden * neurons)
    assert 0.9 < parameters * 2 / 2**30 / HALVES["values-llama.yaml", "decode"][1] <= 1
    assert slow_sizes(hidden, neurons) == ""

    volume, writable = volume_of(job, "/pairs")
    assert (volume, writable) == ({"persistentVolumeClaim": {"claimName": name}}, True)
    variables = {one["name"]: one.get("value") for one in maker["env"]}
    assert variables["OVERFILL_HOME"] == "/pairs", "the pair links to the full model, which must be on the claim too"
    for component in ("router", "prefill", "decode"):
        volume, _ = volume_of(found[component], "/pair")
        assert volume == {"persistentVolumeClaim": {"claimName": name, "readOnly": True}}
        assert f"--pair=/pair/{options['out'].relative_to('/pairs')}" in found[component]["containers"][0]["args"]
    # As docs/how-to/build-a-pair.md computes; and both halves, with as much for what the download leaves.
    assert int(maker["resources"]["limits"]["memory"].removesuffix("Gi")) << 30 > 51e9
    assert int(claim["spec"]["resources"]["requests"]["storage"].removesuffix("Gi")) > 2 * (15 + 6)

    assert job["securityContext"] == found["prefill"]["securityContext"], "the pods' user reads what the Job's writes"
    assert maker["securityContext"] == worker["securityContext"]
    assert not job["automountServiceAccountToken"]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_job_makes_the_pair_that_values_cpu_names(version: str) -> None:
    objects = list(yaml.safe_load_all((CHART.parent / "default-pair.yaml").read_text()))
    for one in objects:
        kubernetes_validate.validate(one, version, strict=True)
    job = of_kind(objects, "Job")["default-pair"]["spec"]["template"]["spec"]
    (name,) = of_kind(objects, "PersistentVolumeClaim")
    worker = pods(render("values-cpu.yaml"))["prefill"]
    (maker,), (container,) = job["containers"], worker["containers"]
    assert job["securityContext"] == worker["securityContext"]
    assert maker["securityContext"] == container["securityContext"]
    assert [volume_of(job, "/pairs")[0], volume_of(worker, "/pair")[0]] == [
        {"persistentVolumeClaim": {"claimName": name}},
        {"persistentVolumeClaim": {"claimName": name, "readOnly": True}},
    ]
    assert {"name": "OVERFILL_HOME", "value": "/pairs"} in maker["env"], "pairs/VERSION/NAME is below it"
    assert maker["command"] == ["overfill", "pair", "path"]
    assert f"--pair=/pair/pairs/{store.VERSION}/{maker['args'][0]}" in container["args"]


def test_production_s_gpus_run_vllm_in_the_image_that_has_it() -> None:
    rendered = pods(render("values-prod.yaml"))
    for stage in ("prefill", "decode"):
        (container,) = rendered[stage]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
        assert {"--device=cuda", "--engine=vllm"} <= set(container["args"])
        assert container["image"] == "registry.example.org/overfill/overfill-worker-vllm:0.2.0-cuda"
        assert container["command"] == [f"overfill-{stage}"]
        # The image's caches are in $OVERFILL_HOME of the Dockerfile, so a volume must be there.
        variables = {one["name"]: one.get("value") for one in container["env"]}
        assert variables["OVERFILL_HOME"] == "/var/cache/overfill"
        assert "/var/cache/overfill" in [mount["mountPath"] for mount in container["volumeMounts"]]
    assert rendered["router"]["containers"][0]["image"].endswith("/overfill-router:0.2.0")


def test_init_containers_get_their_pool_s_variables_and_a_revision_has_its_own_folder() -> None:
    variable = {"name": "HTTPS_PROXY", "value": "http://proxy:3128"}
    own = [f"{pool}.extraEnv[0].{key}={value}" for pool in ("router", "decode") for key, value in variable.items()]
    rendered = pods(render("values.yaml", *FROM_HUB, "pair.hub.revision=abc", "pair.resources.limits.memory=9Gi", *own))
    for component in ("router", "prefill", "decode"):
        (container,) = rendered[component]["initContainers"]
        assert (variable in container["env"]) == (component != "prefill")
        assert container["resources"]["limits"]["memory"] == "9Gi"
        _, _, script, _, *arguments = container["command"]
        assert arguments == ["a/b", "abc", "/pair/link"]
        assert 'folder="$OVERFILL_HOME/hub/$1/$2"' in script
        assert ("--include" in script) == (component == "router"), "routers read no weights"


def test_no_router_pulls_the_image_of_gpu_workers_to_download_json_files() -> None:
    gpu = "prefill.image.repository=overfill-worker-vllm"
    for component, pod in pods(render("values.yaml", *FROM_HUB, gpu)).items():
        if component != "test":
            assert pod["initContainers"][0]["image"] == pod["containers"][0]["image"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "huggingface-hub>=0.34" in extras["router"], "the first version with `hf`, which the init container runs"


@pytest.mark.parametrize(("values", "image"), [("values.yaml", "prefill"), ("values-colocated.yaml", "decode")])
def test_a_named_pair_is_prepared_for_routers_by_an_image_with_torch_that_workers_use(values: str, image: str) -> None:
    found = pods(render(values, "pair.source=named"))
    assert found["router"]["initContainers"][0]["image"].partition(":")[0] == f"overfill-{image}"


def test_a_pod_s_own_cache_holds_the_largest_documented_pair() -> None:
    """With room for what vLLM compiles. The pair of ``values-ranks.yaml`` is on a claim of its own."""
    weights = sum(gib for (values, _), (_, gib) in HALVES.items() if values == "values-prod.yaml")
    size = yaml.safe_load((CHART / "values.yaml").read_text())["cache"]["size"]
    assert float(size.removesuffix("Gi")) >= weights + 5


def test_names_may_be_asked_of_another_server() -> None:
    settings = ("networkPolicy.dns.servers[0].ipBlock.cidr=169.254.20.10/32", "networkPolicy.dns.ports={53,5353}")
    policies = of_kind(render("values.yaml", *settings), "NetworkPolicy")
    assert policies
    for policy in policies.values():
        rule = policy["spec"]["egress"][0]
        assert rule["to"] == [{"ipBlock": {"cidr": "169.254.20.10/32"}}]
        assert {port["port"] for port in rule["ports"]} == {53, 5353}


def test_a_process_that_hangs_is_killed_soon() -> None:
    for component, pod in pods(render("values-prod.yaml")).items():
        if component != "test":
            assert pod["containers"][0]["livenessProbe"]["terminationGracePeriodSeconds"] <= 30


@pytest.mark.parametrize("values", VALUES)
def test_no_pod_is_killed_before_its_streams_end(values: str) -> None:
    objects = render(values)
    longest = yaml.safe_load((CHART / values).read_text()).get("longestStreamSeconds", 600)
    for component, pod in pods(objects).items():
        if component != "test":
            (grace,) = [a for a in pod["containers"][0]["args"] if a.startswith("--grace-period=")]
            seconds = pod["terminationGracePeriodSeconds"]
            assert seconds > longest
            before = float(
                pod["containers"][0].get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [0, 0])[1]
            )
            assert seconds >= before + float(grace.partition("=")[2]) + 10
            if component == "router":
                assert float(grace.partition("=")[2]) == longest
                assert f"--max-request-time={longest}" in pod["containers"][0]["args"]


def test_a_router_may_have_another_longest_request() -> None:
    args = pods(render("values.yaml", "router.settings.max-request-time=60"))["router"]["containers"][0]["args"]
    assert [flag for flag in args if flag.startswith("--max-request-time")] == ["--max-request-time=60"]


def settings_of(pod: dict[str, Any], kind: type[ServiceConfig]) -> Any:
    """Returns the settings that a pod's flags make, without what is checked elsewhere: certificates and places."""
    elsewhere = ("host", "tls-", "metrics-", "probe-", "api-keys", "routers", "advertise", "worker-id")
    args = pod["containers"][0]["args"]
    return kind.parse([flag for flag in args if not flag[2:].startswith(elsewhere)])


def peers(policy: dict[str, Any]) -> dict[int, set[str]]:
    """Returns port -> components that may connect to it, of the first rule."""
    rule = policy["spec"]["ingress"][0]
    names = {one["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for one in rule["from"]}
    return {rule["ports"][0]["port"]: names}


def test_workers_with_both_stages_are_a_pool_of_a_fixed_size() -> None:
    objects = render("values-colocated.yaml", "router.settings.itl-objective=0.05")
    assert {*of_kind(objects, "Deployment")} == {"overfill-router", "overfill-colocated"}
    assert {*of_kind(objects, "PodDisruptionBudget")} == {"overfill-router", "overfill-colocated"}
    assert not {"HorizontalPodAutoscaler", "ScaledObject"} & {one["kind"] for one in objects}
    found = pods(objects)
    (container,) = found["colocated"]["containers"]
    assert container["command"] == ["overfill-colocated"]
    worker, router = settings_of(found["colocated"], ColocatedConfig), settings_of(found["router"], RouterConfig)
    assert (worker.itl_objective, worker.kv_memory, worker.tier) == (0.05, 512 << 20, "")
    assert (router.expect_prefill, router.expect_decode) == (2, 2)
    assert of_kind(objects, "Deployment")["overfill-colocated"]["spec"]["replicas"] == 2
    assert peers(of_kind(objects, "NetworkPolicy")["overfill-colocated"]) == {7603: {"router", "colocated"}}
    assert "overfill-colocated" in of_kind(objects, "Service")
    assert "overfill-colocated" not in of_kind(render("values.yaml"), "ServiceAccount")


def test_other_workers_take_part_in_a_stack_of_workers_with_both_stages() -> None:
    own = ("colocated.replicas=2", "tiers.default.replicas=0", "tiers.fast.itlObjective=0.05")
    objects = render("values-tiers.yaml", *own, "colocated.settings.dtype=float32")
    found = pods(objects)
    router = settings_of(found["router"], RouterConfig)
    assert {*found} == {"router", "test", "prefill", "colocated-default", "decode-fast", "decode-full"}
    assert (router.expect_prefill, router.expect_decode) == (4, 4)
    assert {tier.name: tier.replicas for tier in router.tiers} == {"default": 2, "fast": 1, "full": 1}
    worker = settings_of(found["colocated-default"], ColocatedConfig)
    assert (worker.tier, worker.pair, worker.itl_objective) == ("default", "/pair/default", 0.1)
    policies = of_kind(objects, "NetworkPolicy")
    assert peers(policies["overfill-prefill"]) == {7601: {"router", "prefill", "decode", "colocated"}}
    assert peers(policies["overfill-decode"]) == {7602: {"router", "prefill", "colocated"}}
    reached = {name: {p["port"] for p in one["spec"]["egress"][1]["ports"]} for name, one in policies.items()}
    assert reached["overfill-decode"] == {7600, 7601, 7603}
    assert reached["overfill-prefill"] == reached["overfill-colocated"] == {7600, 7601, 7602, 7603}


def test_each_tier_is_a_pool_with_its_own_pair_size_and_settings() -> None:
    own = ("tiers.fast.autoscaling.kind=keda", "tiers.fast.autoscaling.minReplicas=3")
    own += ("tiers.fast.resources.limits.memory=9Gi", "tiers.fast.itlObjective=0.05")
    own += ("tiers.full.strategy.maxSurge=0", "tiers.full.disruptionBudget.maxUnavailable=")
    objects = render("values-tiers.yaml", *own)
    found, deployments = pods(objects), of_kind(objects, "Deployment")
    router, fast = settings_of(found["router"], RouterConfig), settings_of(found["decode-fast"], DecodeConfig)
    assert [tier.name for tier in router.tiers] == ["default", "fast", "full"]
    assert {tier.name: (tier.pair, tier.replicas, tier.fallback) for tier in router.tiers} == {
        "default": ("/pair/default", 2, ""),
        "fast": ("/pair/fast", 3, ""),
        "full": ("/pair/full", 1, "default"),
    }
    assert router.tiers[1].itl_objective == 0.05
    assert router.tiers[1].settings["quantize"] == "int8"
    assert (router.pair, router.expect_decode, router.brownout) == ("/pair/default", 6, ("full", "default", "fast"))
    assert settings_of(found["prefill"], PrefillConfig).pair == "/pair/default"
    assert (fast.tier, fast.pair, fast.quantize, fast.kv_memory) == ("fast", "/pair/fast", "int8", 512 << 20)
    assert found["decode-fast"]["containers"][0]["resources"]["limits"]["memory"] == "9Gi"
    assert found["decode-full"]["containers"][0]["resources"]["limits"]["memory"] == "3Gi"
    assert found["router"]["initContainers"][0]["command"][4:] == [
        "default", "/pair/default", "fast", "/pair/fast", "identity", "/pair/full",
    ]  # fmt: skip
    assert found["decode-full"]["initContainers"][0]["command"][4:] == ["identity", "/pair/full"]
    labels = [deployments[f"overfill-decode-{tier}"]["spec"]["selector"]["matchLabels"] for tier in TIERS]
    assert len({json.dumps(one) for one in labels}) == 3
    # Sprig's own function would not let a tier set these to 0 and "".
    assert deployments["overfill-decode-full"]["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 0
    assert {*of_kind(objects, "PodDisruptionBudget")} == {
        "overfill-router", "overfill-prefill", "overfill-decode-default", "overfill-decode-fast",
    }  # fmt: skip
    assert {*of_kind(objects, "NetworkPolicy")} == {"overfill-router", "overfill-prefill", "overfill-decode"}
    (scaled,) = of_kind(objects, "ScaledObject").values()
    assert scaled["spec"]["scaleTargetRef"]["name"] == "overfill-decode-fast"
    assert scaled_by([scaled])["overfill-decode-fast"]["tier"] == "fast"


def test_routers_are_told_how_workers_load_the_decoder_of_one_pair() -> None:
    found = pods(render("values.yaml", "decode.settings.quantize=int8"))
    assert "--tiers=default=/pair/link:2,quantize=int8" in found["router"]["containers"][0]["args"]
    assert not [flag for flag in found["decode"]["containers"][0]["args"] if flag.startswith("--tier")]


def test_the_default_tiers_pair_is_that_of_prefill_workers_and_routers() -> None:
    chosen = pods(render("values-tiers.yaml", "router.settings.default-tier=full"))
    for component in ("router", "prefill"):
        assert "--pair=/pair/full" in chosen[component]["containers"][0]["args"]
    unnamed = ("tiers.b.pair=fast", "tiers.a.pair=identity")
    assert pods(render("values.yaml", *unnamed))["prefill"]["initContainers"][0]["command"][4:] == [
        "identity",
        "/pair/a",
    ]


def test_tiers_of_a_claim_and_of_the_hub_are_found() -> None:
    claim = ("pair.source=claim", "pair.claim.name=pairs", "tiers.a.pair=x/a", "tiers.b.pair=x/b")
    assert settings_of(pods(render("values.yaml", *claim))["decode-b"], DecodeConfig).pair == "/pair/x/b"
    hub = ("pair.source=hub", "tiers.a.pair=org/a", "tiers.b.pair=org/b", "tiers.b.revision=v1")
    command = pods(render("values.yaml", *hub))["router"]["initContainers"][0]["command"]
    assert command[4:] == ["org/a", "main", "/pair/a", "org/b", "v1", "/pair/b"]


def test_series_have_the_name_of_their_tier_and_of_their_stages() -> None:
    (monitor,) = of_kind(render("values-tiers.yaml", "monitoring.podMonitor=true"), "PodMonitor").values()
    rules = monitor["spec"]["podMetricsEndpoints"][0]["relabelings"]

    def label(name: str, component: str, tier: str = "") -> str | None:
        labels = {"__meta_kubernetes_pod_label_app_kubernetes_io_component": component}
        labels["__meta_kubernetes_pod_label_overfill_io_tier"] = tier
        found = None
        for rule in rules:
            value = ";".join(labels.get(source, "") for source in rule.get("sourceLabels", []))
            if rule.get("targetLabel") == name and (match := re.fullmatch(rule.get("regex", "(.*)"), value)):
                found = rule.get("replacement") or match[1]
        return found

    of_tier = [label("tier", one) for one in ("router", "prefill", "decode", "colocated")]
    assert of_tier == [None, None, "default", "default"]
    assert label("tier", "decode", "fast") == "fast"
    of_stage = [label("stage", one) for one in ("router", "prefill", "decode", "colocated")]
    assert of_stage == ["router", "prefill", "decode", "prefill+decode"]


@pytest.mark.parametrize("values", VALUES)
def test_ports_probes_and_services_agree(values: str) -> None:
    objects = render(values)
    for component, pod in pods(objects).items():
        if component == "test":
            continue
        (container,) = pod["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        flags = dict(argument[2:].split("=", 1) for argument in container["args"])
        assert str(ports["grpc"]) == flags["port"]
        assert str(ports["metrics"]) == flags["metrics-port"]
        assert str(ports.get("https", "")) == flags.get("http", "")
        assert str(ports["probes"]) == flags["probe-port"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            (how,) = container[probe].keys() - {
                "periodSeconds", "timeoutSeconds", "failureThreshold", "terminationGracePeriodSeconds",
            }  # fmt: skip
            # Only readiness may depend on workers, because the other probes restart the container.
            path = {"startupProbe": "/startupz", "readinessProbe": "/readyz", "livenessProbe": "/livez"}[probe]
            assert (how, container[probe][how]) == ("httpGet", {"path": path, "port": "probes", "scheme": "HTTPS"})
        for service in of_kind(objects, "Service").values():
            if service["spec"]["selector"]["app.kubernetes.io/component"] == component.partition("-")[0]:
                assert {port["targetPort"] for port in service["spec"]["ports"]} <= set(ports)
        if component != "router":
            assert flags["routers"] == "dns:///overfill-routers.serving.svc:7600"
    assert "overfill-routers" in of_kind(objects, "Service")


def test_meshes_are_told_that_the_grpc_ports_speak_tls() -> None:
    """Istio takes a port named grpc, or with appProtocol grpc, as plaintext HTTP/2, and would break its connections."""
    for values in ("values.yaml", "values-colocated.yaml"):
        services = of_kind(render(values), "Service")
        assert services
        for service in services.values():
            (port,) = (one for one in service["spec"]["ports"] if one["name"] == "grpc")
            assert port["appProtocol"] == "https"


def test_a_pool_s_runtime_class_is_that_of_its_pods_only() -> None:
    own = ("decode.runtimeClassName=nvidia", "tiers.fast.runtimeClassName=other", "colocated.runtimeClassName=third")
    found = pods(render("values-tiers.yaml", *own, "colocated.replicas=1", "tiers.default.replicas=0"))
    classes = {name: pod.get("runtimeClassName") for name, pod in found.items()}
    assert classes == {
        "router": None, "prefill": None, "test": None,
        "decode-fast": "other", "decode-full": "nvidia", "colocated-default": "third",
    }  # fmt: skip


def test_network_policies_admit_the_stack_and_refuse_others() -> None:
    policies = of_kind(render("values-prod.yaml"), "NetworkPolicy")

    def callers(name: str, port: int) -> set[str]:
        peers = [
            peer
            for rule in policies[name]["spec"]["ingress"]
            if port in [p["port"] for p in rule["ports"]]
            for peer in rule["from"]
        ]
        labels = [next(iter(peer.values()))["matchLabels"] for peer in peers]
        return {label.get("app.kubernetes.io/component") or label["kubernetes.io/metadata.name"] for label in labels}

    assert callers("overfill-router", 7600) == {"prefill", "decode", "test", "gateway"}
    assert callers("overfill-router", 8000) == {"gateway"}
    assert callers("overfill-prefill", 7601) == {"router", "prefill", "decode"}
    assert callers("overfill-decode", 7602) == {"router", "prefill"}, "a decode worker may lend KV"
    assert callers("overfill-decode", 7690) == {"monitoring"}
    assert callers("overfill-decode", 7691) == set(), "a node reaches its own pods without a rule"
    reach = {
        name: {port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]} - {53}
        for name, policy in policies.items()
    }
    assert reach == {
        "overfill-router": {7601, 7602},
        "overfill-prefill": {7600, 7601, 7602},
        "overfill-decode": {7600, 7601},
    }


def test_ranks_have_a_gpu_each_shared_memory_and_ports_that_other_workers_reach() -> None:
    own = ("decode.settings.tensor-parallel-size=2", "decode.resources.limits.nvidia\\.com/gpu=2", "decode.shmSize=1Gi")
    objects = render("values-ranks.yaml", *own)
    found = pods(objects)
    shared = {
        name: [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm"]
        for name, pod in found.items()
    }
    assert shared["prefill"] == [{"medium": "Memory", "sizeLimit": "4Gi"}]
    assert shared["decode"] == [{"medium": "Memory", "sizeLimit": "1Gi"}]
    assert shared["router"] == []
    ports = {}
    for stage in ("prefill", "decode"):
        (container,) = found[stage]["containers"]
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        ports[stage] = {port["name"]: port["containerPort"] for port in container["ports"]}
    served = {f"data-{rank}": 7610 + rank for rank in range(4)}
    assert ports["prefill"] == {"grpc": 7601, "metrics": 7690, "probes": 7691} | served
    assert ports["decode"] == {"grpc": 7602, "metrics": 7690, "probes": 7691}, "ranks that pull KV serve none"
    prefill = settings_of(found["prefill"], PrefillConfig)
    assert (prefill.tensor_parallel_size, prefill.data_port) == (4, 7610)
    policies = of_kind(objects, "NetworkPolicy")
    data = {"protocol": "TCP", "port": 7610, "endPort": 7613}
    rules = [
        (name, way)
        for name, policy in policies.items()
        for way in ("ingress", "egress")
        for rule in policy["spec"][way]
        if data in rule["ports"]
    ]
    assert rules == [("overfill-prefill", "ingress"), ("overfill-prefill", "egress"), ("overfill-decode", "egress")]
    plain = json.dumps(render("values-prod.yaml"))
    assert "7610" not in plain
    assert "/dev/shm" not in plain


def test_a_prefill_pod_keeps_kv_on_a_volume_of_its_own_with_room_for_it() -> None:
    own = ("prefill.kvDisk.size=200Gi", "prefill.kvDisk.storageClassName=nvme", "prefill.kvDisk.bandwidth=300Mi")
    found = pods(render("values.yaml", *own))
    worker = settings_of(found["prefill"], PrefillConfig)
    assert (worker.kv_disk_size, worker.kv_disk_bandwidth) == (200 << 30, 300 << 20)
    volume, writable = volume_of(found["prefill"], str(worker.kv_disk.parent))
    claim = volume["ephemeral"]["volumeClaimTemplate"]
    assert claim["metadata"]["labels"]["app.kubernetes.io/component"] == "prefill"
    assert (claim["spec"]["storageClassName"], claim["spec"]["accessModes"]) == ("nvme", ["ReadWriteOnce"])
    requested = int(claim["spec"]["resources"]["requests"]["storage"].removesuffix("Mi")) << 20
    # A file system takes a few per cent for itself, and workers exceed the size for a moment.
    assert worker.kv_disk_size * 1.08 < requested < worker.kv_disk_size * 1.2
    assert writable
    mounting = [
        container["name"]
        for pod in found.values()
        for container in [*pod.get("initContainers", []), *pod["containers"]]
        if any(mount["mountPath"] == str(worker.kv_disk.parent) for mount in container["volumeMounts"])
    ]
    assert mounting == ["prefill"], "KV is as secret as prompts"


def test_prefill_pods_share_an_existing_claim_for_kv() -> None:
    pod = pods(render("values.yaml", "prefill.kvDisk.size=50Gi", "prefill.kvDisk.claimName=kv"))["prefill"]
    folder = settings_of(pod, PrefillConfig).kv_disk
    assert volume_of(pod, str(folder.parent)) == ({"persistentVolumeClaim": {"claimName": "kv"}}, True)


@contextmanager
def acting_as(user: int, group: int) -> Iterator[None]:
    before = os.getgroups()
    os.setgroups([group])
    os.setegid(group)
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(before)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach; pytest's own are closed to others."""
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="acts as the pod's user and as another one, which needs root")
def test_a_pod_can_write_kv_to_its_volume_and_no_other_user_can_read_it(open_folder: Path) -> None:
    """The kubelet gives a volume's root to the pod's group, which may write there, and so may new folders' group."""
    pod = pods(render("values.yaml", "prefill.kvDisk.size=50Gi"))["prefill"]
    context, folder = pod["securityContext"], settings_of(pod, PrefillConfig).kv_disk
    root = open_folder / "volume"
    root.mkdir()
    os.chown(root, 0, context["fsGroup"])
    root.chmod(0o2775)
    here = root / folder.relative_to("/kv")
    name = f"{0:016x}-{0:064x}"
    with acting_as(context["runAsUser"], context["runAsGroup"]):
        store = DiskFiles(here)
        store.write(name, b"KV")
        store.close()
        again = DiskFiles(here)  # a restarted container
        assert again.read(name, 2) == b"KV"
        with pytest.raises(NotOurFolder, match="name a new folder inside it"):
            DiskFiles(root)
    with acting_as(context["runAsUser"] + 1, context["runAsGroup"]), pytest.raises(PermissionError):
        again.read(name, 2)


def test_decode_pods_of_each_tier_read_adapters_from_its_claim() -> None:
    own = ("decode.adapters.claimName=shared", "decode.adapters.path=lora/all/", "decode.settings.max-adapters=4")
    own += ("tiers.fast.adapters.path=", "tiers.full.adapters.claimName=", "tiers.full.adapters.path=")
    found = pods(render("values-tiers.yaml", *own))
    shared = ({"persistentVolumeClaim": {"claimName": "shared", "readOnly": True}}, False)
    for tier, folder in (("default", Path("/adapters/lora/all")), ("fast", Path("/adapters"))):
        worker = settings_of(found[f"decode-{tier}"], DecodeConfig)
        assert (worker.adapters, worker.max_adapters) == (folder, 4)
        assert volume_of(found[f"decode-{tier}"], "/adapters") == shared
    for name in ("decode-full", "prefill", "router"):
        assert "/adapters" not in json.dumps(found[name])


def test_secrets_are_referred_to() -> None:
    assert of_kind(render("values-prod.yaml"), "Secret") == {}
    pod = pods(render("values-prod.yaml"))["router"]
    assert "--api-keys=/etc/overfill/keys/keys.json" in pod["containers"][0]["args"]
    secrets = {v["name"]: v["secret"]["secretName"] for v in pod["volumes"] if "secret" in v}
    assert secrets == {"tls": "overfill-tls-router", "keys": "overfill-api-keys"}


TRUSTED = {
    "router": ["router", "worker", "scraper", "client"],
    "worker": ["router", "worker", "scraper"],
    "scraper": ["router", "worker"],
    "client": ["router"],
}
"""Role -> roles whose certificates its holder accepts."""


def certificate(secret: dict[str, Any]) -> x509.Certificate:
    return x509.load_pem_x509_certificate(base64.b64decode(secret["data"]["tls.crt"]))


def authorities(secret: dict[str, Any]) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(base64.b64decode(secret["data"]["ca.crt"]))


def names_in(made: x509.Certificate) -> list[str]:
    return made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName)


def names_of(role: str) -> set[str]:
    """Return the role's names by which a client finds a server, without those of hosts."""
    named = (role, "process") if role in ("router", "worker") else (role,)
    return {f"{name}.role.overfill.internal" for name in named}


def test_secrets_that_the_pages_read_are_the_charts() -> None:
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "how-to").glob("*.md"))
    read = set(re.findall(r"get secret ([\w-]+)", pages))
    assert read
    assert read <= of_kind(render("values.yaml"), "Secret").keys()


def test_helm_makes_a_certificate_for_each_role_which_only_its_peers_trust() -> None:
    secrets = of_kind(render("values.yaml"), "Secret")
    made = {role: secrets[f"overfill-tls-{role}"] for role in TRUSTED}
    for role, secret in made.items():
        names = set(names_in(certificate(secret)))
        assert names_of(role) <= names
        assert role == "router" or names == names_of(role), "it cannot pose as a router's host"
        for other in TRUSTED:
            issuers = [ca for ca in authorities(secret) if ca.subject == certificate(made[other]).issuer]
            assert len(issuers) == (other in TRUSTED[role]), (role, other)
            for issuer in issuers:
                certificate(made[other]).verify_directly_issued_by(issuer)
    hosts = {"overfill", "localhost", "overfill.serving.svc"}
    assert hosts <= set(names_in(certificate(made["router"])))


def test_cert_manager_makes_the_same_ones() -> None:
    specs = {
        one["secretName"]: one
        for one in (c["spec"] for c in of_kind(render("values-prod.yaml"), "Certificate").values())
    }
    helm_s = of_kind(render("values.yaml"), "Secret")
    assert specs.keys() == {f"overfill-tls-{role}" for role in TRUSTED}
    for name, spec in specs.items():
        assert spec["dnsNames"] == names_in(certificate(helm_s[name]))
        assert ("server auth" in spec["usages"]) == (name in ("overfill-tls-router", "overfill-tls-worker"))


@pytest.mark.parametrize(
    ("values", "settings", "prefix"),
    [
        ("values.yaml", (), "overfill-tls"),
        ("values-prod.yaml", (), "overfill-tls"),
        ("values-colocated.yaml", (), "overfill-tls"),
        ("values-cpu.yaml", ("tls.secretPrefix=mine",), "mine"),
    ],
)
def test_a_pod_mounts_the_certificate_of_its_own_role_only(values: str, settings: tuple[str, ...], prefix: str) -> None:
    objects = render(values, *settings, "monitoring.podMonitor=true")
    for component, pod in pods(objects).items():
        mounted = [v["secret"]["secretName"] for v in pod["volumes"] if "secret" in v and v["name"] != "keys"]
        role = {"router": "router", "test": "client"}.get(component, "worker")
        assert mounted == [f"{prefix}-{role}"], component
    (monitor,) = of_kind(objects, "PodMonitor").values()
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    tls = endpoint["tlsConfig"]
    named = {tls["keySecret"]["name"], tls["cert"]["secret"]["name"], tls["ca"]["secret"]["name"]}
    assert named == {f"{prefix}-scraper"}
    assert tls["serverName"] in names_of("router") & names_of("worker")


def test_notes_tell_users_to_export_the_client_s_certificate() -> None:
    done = helm("install", "overfill", str(CHART), "--namespace=serving", "--dry-run=client")
    assert done.returncode == 0, done.stderr
    notes = done.stdout.partition("NOTES:")[2]
    assert re.findall(r"get secret (\S+) -o json \\", notes) == ["overfill-tls-client"]
    assert "--tls-cert tls.crt --tls-key tls.key" in notes


@pytest.mark.parametrize(("values", "settings"), SETS)
def test_every_flag_and_variable_is_of_the_code(values: str, settings: tuple[str, ...]) -> None:
    source = "\n".join(
        path.read_text() for path in (CHART.parents[2] / "overfill").rglob("*.py") if "v1" not in path.parts
    )
    for component, pod in pods(render(values, *settings)).items():
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            for variable in container["env"]:
                if variable["name"].startswith("OVERFILL_"):
                    # The code builds OVERFILL_TLS_CA and the like from one pattern.
                    pattern = re.sub(r"_TLS_\w+", "_TLS_{", variable["name"])
                    assert pattern in source, variable["name"]
        kind = next((kind for kind in SERVICES if kind.section == component.partition("-")[0]), None)
        if kind is not None:
            for argument in pod["containers"][0]["args"]:
                assert field_name(argument[2:].partition("=")[0]) in kind.model_fields, argument


def series_labels(objects: list[dict], component: str) -> dict[str, str]:
    """Return the labels that the release's PodMonitor gives to series of a component's pods."""
    (monitor,) = of_kind(objects, "PodMonitor").values()
    (template,) = (
        one["spec"]["template"]
        for one in of_kind(objects, "Deployment").values()
        if one["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"] == component
    )
    pod = {
        f"__meta_kubernetes_pod_label_{re.sub(r'[^a-zA-Z0-9_]', '_', name)}": value
        for name, value in template["metadata"]["labels"].items()
    }
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    made = {"namespace": "serving"}  # added by the operator
    for rule in endpoint["relabelings"]:
        if rule.get("action") != "keep" and "sourceLabels" in rule:
            (source,) = rule["sourceLabels"]
            made[rule["targetLabel"]] = pod.get(source, "")
    return made


SCALED = ("overfill_router_scaling_needed_workers", ("prefill", "decode", "router"))
"""The metric by which all pools scale, and its label ``stage``."""


def scaled_by(objects: list[dict]) -> dict[str, dict[str, str]]:
    """Return the labels of the series by which each Deployment scales; there is one metric, and its target is 1."""
    found = {}
    for one in objects:
        if one["kind"] == "ScaledObject":
            (trigger,) = one["spec"]["triggers"]
            query = promql_parser.parse(trigger["metadata"]["query"])
            assert isinstance(query, promql_parser.AggregateExpr)
            assert str(query.op) == "sum"
            assert isinstance(query.expr, promql_parser.VectorSelector)
            assert trigger["metricType"] == "AverageValue"
            # With KEDA's default, a query without a result is 0, so that a lost scrape scales a pool to its minimum.
            assert trigger["metadata"]["ignoreNullValues"] == "false"
            labels = {matcher.name: matcher.value for matcher in query.expr.matchers.matchers}
            assert labels.pop("namespace") == "serving"  # a metrics adapter adds it, because an HPA has a namespace
            name, target = query.expr.name, trigger["metadata"]["threshold"]
        elif one["kind"] == "HorizontalPodAutoscaler":
            (metric,) = (metric["external"] for metric in one["spec"]["metrics"])
            selector = metric["metric"]["selector"]
            absent = {
                term["key"]: "" for term in selector.get("matchExpressions", []) if term["operator"] == "DoesNotExist"
            }
            labels = selector["matchLabels"] | absent
            name, target = metric["metric"]["name"], metric["target"]["averageValue"]
        else:
            continue
        assert (name, target) == (SCALED[0], "1")
        assert labels["stage"] in SCALED[1]
        found[one["spec"]["scaleTargetRef"]["name"]] = labels
    return found


@pytest.mark.parametrize("kind", ["keda", "hpa"])
@pytest.mark.parametrize("revision", ["", "r1"])
def test_each_pool_scales_by_its_own_series_alone(kind: str, revision: str) -> None:
    """Routers hold back requests for which workers have no place, so that workers' own series do not contain them."""
    (needed,) = (spec for spec in declared() if spec.name == SCALED[0])
    own = [f"{pool}.autoscaling.kind={kind}" for pool in ("router", "prefill", "decode")]
    objects = render("values-tiers.yaml", *own, *CANARY, f"revision={revision}")
    found = scaled_by(objects)
    assert found.keys() == of_kind(objects, "Deployment").keys()
    release = {"app_kubernetes_io_name": "overfill", "app_kubernetes_io_instance": "overfill"}
    suffix = f"-{revision}" if revision else ""
    expected = {"overfill-router": {"stage": "router"}}
    for name, end in ((revision, suffix), ("r2", "-r2")):
        expected[f"overfill-prefill{end}"] = {"stage": "prefill", "revision": name}
        for tier in TIERS:
            expected[f"overfill-decode-{tier}{end}"] = {"stage": "decode", "tier": tier, "revision": name}
    assert found == {name: release | labels for name, labels in expected.items()}
    assert {label for labels in expected.values() for label in labels} - {"revision"} <= {*needed.labels}
    assert set(SCALED[1]) == set(needed.labels["stage"])


@pytest.mark.parametrize(
    ("other_release", "settings"), [("other", ()), ("overfill", ("nameOverride=other",))], ids=["release", "name"]
)
def test_two_releases_in_one_namespace_scale_on_their_own_load(other_release: str, settings: tuple[str, ...]) -> None:
    ours = render("values-prod.yaml")
    theirs = render("values-prod.yaml", *settings, release=other_release)
    own, other = (series_labels(objects, "router") for objects in (ours, theirs))
    asked = scaled_by(ours)
    assert len(asked) == 3
    for labels in asked.values():
        of_routers = {name: value for name, value in labels.items() if name not in ("stage", "tier", "revision")}
        assert {name: own.get(name) for name in of_routers} == of_routers, "it finds the release's own series"
        assert {name: other.get(name) for name in of_routers} != of_routers, "and none of the other release"


MOVED = (
    ("pair.source=claim", "pair.claim.name=pairs", "pair.claim.path=v1", "servedModelName=m", "decode.replicas=4"),
    ("pair.claim.path=v2", "prefill.threads=1", "decode.settings.quantize=int8", "decode.resources.limits.memory=9Gi"),
)
"""Values of the old revision, and those that differ for the new one."""


@pytest.mark.parametrize("revision", ["", "r1"])
@pytest.mark.parametrize(
    ("values", "old", "new"),
    [
        ("values.yaml", *MOVED),
        ("values.yaml", FROM_HUB, ("pair.hub.revision=v2", "pair.hub.tokenSecretName=u", "decode.priority.value=7")),
        ("values.yaml", ("servedModelName=m",), ("pair.source=claim", "pair.claim.name=pairs", "prefill.replicas=3")),
        ("values-tiers.yaml", (), ("tiers.fast.pair=identity", "tiers.full.replicas=2", "decode.threads=4")),
        ("values-prod.yaml", (), ("pair.claim.path=v2/llama-3.1-8b-to-3b",)),
    ],
)
def test_the_upgrade_that_ends_a_rollout_restarts_no_worker_of_the_new_revision(
    values: str, old: tuple[str, ...], new: tuple[str, ...], revision: str
) -> None:
    before = render(values, *old, f"revision={revision}")
    during = render(values, *old, f"revision={revision}", "canary.revision=r2", *[f"canary.{one}" for one in new])
    after = render(values, *old, *new, "revision=r2")
    kept, made = set(), set()
    for kind in ("Deployment", "PodDisruptionBudget", "ScaledObject", "PriorityClass"):
        first, second, third = (of_kind(objects, kind) for objects in (before, during, after))
        for name in second.keys() - {"overfill-router"}:
            if name.endswith("-r2"):
                made.add(kind)
                assert second[name] == third[name], "the new revision's objects stay as they are"
            elif not name.endswith("-router"):
                kept.add(kind)
                assert first[name] == second[name], "the old revision's objects stay until the rollout ends"
                assert name not in third, "and then leave"
    assert kept
    assert {"Deployment", "PodDisruptionBudget"} <= made
    workers = [one for name, one in of_kind(after, "Deployment").items() if name != "overfill-router"]
    assert {one["spec"]["template"]["metadata"]["labels"]["overfill.io/revision"] for one in workers} == {"r2"}


@pytest.mark.parametrize(("values", "settings"), ROLLOUTS)
def test_no_pod_is_selected_twice(values: str, settings: tuple[str, ...]) -> None:
    """Kubernetes neither evicts a pod of two budgets, nor scales a Deployment whose selector finds another's pods."""
    objects = render(values, *settings)
    deployments = of_kind(objects, "Deployment")
    selected = 0
    for kind in ("Deployment", "PodDisruptionBudget"):
        for name, one in of_kind(objects, kind).items():
            labels = one["spec"]["selector"]["matchLabels"].items()
            found = [n for n, d in deployments.items() if labels <= d["spec"]["template"]["metadata"]["labels"].items()]
            assert found == [name]
            selected += 1
    assert selected == 2 * len(deployments)


def test_routers_read_the_pairs_of_both_revisions() -> None:
    args = pods(render("values.yaml", "revision=r1", *MOVED[0], "canary.revision=r2", "canary.percent=2",
                       "canary.pair.claim.name=others", "canary.pair.claim.path=v2"))  # fmt: skip
    router = args["router"]["containers"][0]
    flags = dict(flag[2:].partition("=")[::2] for flag in router["args"])
    assert (flags["revision"], flags["pair"]) == ("r1", "/pair/v1")
    assert {name: flags[name] for name in flags if name.startswith("canary")} == {
        "canary-revision": "r2", "canary-pair": "/canary/v2", "canary-percent": "2",
    }  # fmt: skip
    mounts = {mount["mountPath"]: mount["name"] for mount in router["volumeMounts"]}
    claims = {v["name"]: v.get("persistentVolumeClaim", {}).get("claimName") for v in args["router"]["volumes"]}
    assert (claims[mounts["/pair"]], claims[mounts["/canary"]]) == ("pairs", "others")
    for pool, claim, folder in (("decode-r1", "pairs", "v1"), ("decode-r2", "others", "v2")):
        (own,) = (v["persistentVolumeClaim"]["claimName"] for v in args[pool]["volumes"] if v["name"] == "pair")
        assert own == claim
        assert {f"--pair=/pair/{folder}", f"--revision={pool[-2:]}"} <= set(args[pool]["containers"][0]["args"])
    named = pods(render("values-tiers.yaml", *CANARY, "canary.tiers.fast.pair=identity"))["router"]
    assert [container["command"][4:] for container in named["initContainers"]] == [
        ["default", "/pair/default", "fast", "/pair/fast", "identity", "/pair/full"],
        ["default", "/canary/default", "identity", "/canary/fast", "identity", "/canary/full"],
    ]
    (tiers,) = (flag for flag in named["containers"][0]["args"] if flag.startswith("--canary-tiers="))
    assert [one.partition("=")[0] for one in tiers.partition("=")[2].split(";")] == ["default", "fast", "full"]
    assert "/pair/" not in tiers


class Cluster:
    """helm and kubectl with a stateful stand-in of an API server."""

    def __init__(self, kmock: kmock_package.KubernetesEmulator, folder: Path) -> None:
        self._kmock, self._folder = kmock, folder
        with warnings.catch_warnings():  # kmock reads its data with a function that Python 3.11 deprecates
            warnings.simplefilter("ignore", DeprecationWarning)
            kmock.resources.load_bundled()
        kmock["get /version"] << {"major": "1", "minor": "34", "gitVersion": "v1.34.0"}
        kinds = ("ConfigMap", "PersistentVolumeClaim", "Secret", "Service", "ServiceAccount")
        kmock["get /api/v1"] << {  # kmock 0.8 names this group "/v1", which kubectl does not know
            "kind": "APIResourceList",
            "groupVersion": "v1",
            "resources": [
                {"name": f"{kind.lower()}s", "singularName": kind.lower(), "kind": kind}
                | {"namespaced": True, "verbs": VERBS}
                for kind in kinds
            ],
        }
        for api, kinds in CUSTOM.items():
            group, version = api.split("/")
            for kind in kinds:
                kmock.resources[f"{kind.lower()}s.{version}.{group}"] = kmock_package.ResourceInfo(
                    kind=kind, singular=kind.lower(), namespaced=True, verbs=set(VERBS)
                )

    async def kubectl(self, *arguments: str) -> str:
        return await self._run(
            "kubectl", f"--server={self._kmock.url}", f"--cache-dir={self._folder}/cache", *arguments
        )

    async def apply(self, *objects: dict[str, Any]) -> str:
        manifests = self._folder / "objects.yaml"
        manifests.write_text(yaml.safe_dump_all(objects))
        return await self.kubectl("apply", "--validate=false", "-n", "serving", "-f", str(manifests))

    async def upgraded(self, *settings: str) -> list[dict[str, Any]]:
        """Return the objects that the chart renders while the stand-in answers its look-ups."""
        output = await self._run(
            "helm", "template", "overfill", str(CHART), "--namespace=serving", "--dry-run=server", "--is-upgrade",
            "--disable-openapi-validation", f"--kube-apiserver={self._kmock.url}",
            *[flag for setting in settings for flag in ("--set", setting)],
        )  # fmt: skip
        return [one for one in yaml.load_all(output, yaml.CSafeLoader) if one]

    async def upgrade(self, *settings: str) -> list[dict[str, Any]]:
        """Upgrade the release's Deployments, as Helm 3 does, and return them.

        Helm renders them. kubectl merges the last manifest, this one and the live objects, with the library of Helm 3.
        """
        made = [one for one in await self.upgraded(*settings) if one["kind"] == "Deployment"]
        await self.apply(*made)
        return made

    async def deployments(self) -> dict[str, dict[str, Any]]:
        stored = json.loads(await self.kubectl("get", "--raw", "/apis/apps/v1/namespaces/serving/deployments"))
        return {one["metadata"]["name"]: one for one in stored["items"]}

    async def replicas(self) -> dict[str, int]:
        """Return each Deployment's number of pods; an API server takes 1 where an object has none."""
        return {name: one["spec"].get("replicas", 1) for name, one in (await self.deployments()).items()}

    async def scale(self, replicas: int, *names: str) -> None:
        """Do what an autoscaler does."""
        patch = json.dumps({"spec": {"replicas": replicas}})
        for name in names:
            await self.kubectl("patch", "-n", "serving", "deployment", name, "--type=merge", "-p", patch)

    async def secrets(self) -> dict[str, dict[str, Any]]:
        """Return the secrets after an upgrade."""
        return of_kind(await self.upgraded(), "Secret")

    async def _run(self, name: str, *arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            tool(name), *arguments, env={"HOME": str(self._folder), "KUBECONFIG": str(self._folder / "none")},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        output, _ = await process.communicate()
        assert process.returncode == 0, output.decode()
        return output.decode()


@pytest.fixture
async def cluster(kmock: kmock_package.KubernetesEmulator, tmp_path: Path) -> Cluster:
    return Cluster(kmock, tmp_path)


@pytest.mark.parametrize("values", ["values.yaml", "values-prod.yaml"])
async def test_kubectl_apply(values: str, cluster: Cluster) -> None:
    """A stateful stand-in of an API server accepts all objects, twice; the second time nothing changes."""
    objects = [one for one in render(values) if one["kind"] != "Pod"]
    first = await cluster.apply(*objects)
    assert first.count(" created") == len(objects), first
    second = await cluster.apply(*objects)
    # kubectl replaces a budget's selector as a whole, and the stand-in counts that as a change.
    changed = [line for line in second.splitlines() if not line.endswith(" unchanged")]
    assert all(line.startswith("poddisruptionbudget.policy/") for line in changed), second
    assert len(second.splitlines()) == len(objects)
    stored = await cluster.kubectl("get", "--raw", "/apis/apps/v1/namespaces/serving/deployments")
    assert {item["metadata"]["name"] for item in json.loads(stored)["items"]} == {
        "overfill-router",
        "overfill-prefill",
        "overfill-decode",
    }


WIRE = "overfill.io/wire-version"


async def test_an_upgrade_to_another_wire_version_is_refused(cluster: Cluster) -> None:
    """Half of the processes would refuse the other half; a second release replaces them without a loss."""
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["annotations"] == {WIRE: str(WIRE_VERSION)}
    router = of_kind(render("values.yaml"), "Deployment")["overfill-router"]
    assert router["metadata"]["annotations"][WIRE] == str(WIRE_VERSION)

    async def upgrade(annotations: dict[str, str]) -> None:
        await cluster.apply(router | {"metadata": router["metadata"] | {"annotations": annotations}})
        assert of_kind(await cluster.upgraded(), "Deployment")

    await upgrade({WIRE: str(WIRE_VERSION)})
    with pytest.raises(AssertionError, match=f"runs wire version 1, this chart {WIRE_VERSION}"):
        await upgrade({WIRE: "1"})
    await upgrade({})  # of a chart that did not say its wire version


KEDA = tuple(f"{pool}.autoscaling.kind=keda" for pool in ("router", "prefill", "decode"))


async def test_no_upgrade_or_rollback_changes_the_autoscaler_s_number(cluster: Cluster) -> None:
    """No manifest of a release that had autoscalers from the start has `replicas`."""
    pools = ("overfill-router", "overfill-prefill", "overfill-decode")
    first = await cluster.upgrade(*KEDA)
    assert await cluster.replicas() == dict.fromkeys(pools, 1)
    await cluster.scale(5, *pools)
    await cluster.upgrade(*KEDA, "logLevel=debug")
    assert await cluster.replicas() == dict.fromkeys(pools, 5)
    await cluster.scale(7, *pools)
    await cluster.apply(*first)  # a rollback: Helm applies the manifest that it stored
    assert await cluster.replicas() == dict.fromkeys(pools, 7)
    args = (await cluster.deployments())["overfill-decode"]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert "--log-level=info" in args, "it did roll back"


async def test_a_pool_that_had_a_fixed_number_keeps_the_autoscaler_s_at_each_upgrade(cluster: Cluster) -> None:
    """Kubernetes takes a Deployment whose `replicas` an upgrade removes as one of a single pod."""
    await cluster.upgrade("decode.replicas=4")
    await cluster.upgrade(*KEDA)
    assert (await cluster.replicas())["overfill-decode"] == 4
    await cluster.scale(6, "overfill-decode", "overfill-router")
    await cluster.upgrade(*KEDA, "logLevel=debug")
    assert await cluster.replicas() == {"overfill-router": 6, "overfill-prefill": 1, "overfill-decode": 6}
    await cluster.upgrade(*KEDA, "decode.autoscaling.kind=none", "decode.replicas=3")
    assert (await cluster.replicas())["overfill-decode"] == 3


async def test_an_upgrade_without_a_rollout_to_another_revision_is_refused(cluster: Cluster) -> None:
    """It would remove all workers before the first new one is ready."""
    await cluster.upgrade()
    with pytest.raises(AssertionError, match='revision: the release runs "", and an upgrade to "r2" alone'):
        await cluster.upgraded("revision=r2")
    await cluster.upgrade(*CANARY)
    for settings in ((), ("revision=r2",), ("canary.revision=r3",), (*CANARY, "canary.percent=50")):
        await cluster.upgraded(*settings)  # give up, end, start another one, change it
    with pytest.raises(AssertionError, match='revision: the release runs ",r2", and an upgrade to "r3" alone'):
        await cluster.upgraded("revision=r3")
    await cluster.upgrade("revision=r2")
    with pytest.raises(AssertionError, match="revision: the release runs"):
        await cluster.upgraded()


@pytest.mark.parametrize("deleted", ["overfill-first-key", "overfill-keys"])
async def test_an_upgrade_keeps_the_api_keys(deleted: str, cluster: Cluster) -> None:
    """The file of keys outlives the secret of the first key, and a file that is made again has this key's hash."""
    first = await cluster.secrets()
    await cluster.apply(*first.values())
    assert await cluster.secrets() == first
    await cluster.kubectl("delete", "-n", "serving", "secret", deleted)
    again = await cluster.secrets()
    for role in TRUSTED:
        assert again[f"overfill-tls-{role}"] == first[f"overfill-tls-{role}"]
    kept = {"overfill-first-key": "overfill-keys", "overfill-keys": "overfill-first-key"}[deleted]
    assert again[kept] == first[kept]
    assert again[kept]["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    (entry,) = json.loads(base64.b64decode(again["overfill-keys"]["data"]["keys.json"]))["keys"]
    key = base64.b64decode(first["overfill-first-key"]["data"]["key"])
    assert entry["sha256"] == hashlib.sha256(key).hexdigest()
    assert ("overfill-first-key" in again) == (deleted != "overfill-first-key")


@pytest.mark.parametrize("deleted", TRUSTED)
async def test_an_upgrade_replaces_the_certificate_of_a_deleted_secret_and_keeps_the_others(
    deleted: str, cluster: Cluster
) -> None:
    """A deleted secret revokes what was in it."""
    first = await cluster.secrets()
    await cluster.apply(*first.values())
    await cluster.kubectl("delete", "-n", "serving", "secret", f"overfill-tls-{deleted}")
    again = await cluster.secrets()
    for role, trusted in TRUSTED.items():
        before, now = (secrets[f"overfill-tls-{role}"] for secrets in (first, again))
        kept = [now["data"][file] == before["data"][file] for file in ("tls.crt", "tls.key")]
        assert kept == [role != deleted] * 2
        changed = [old != new for old, new in zip(authorities(before), authorities(now), strict=True)]
        assert changed == [other == deleted for other in trusted], role
