"""Tests that the Helm chart renders valid and safe objects, which an API server accepts, and refuses unknown values."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import subprocess
import tomllib
import warnings
from pathlib import Path
from typing import Any

import kmock as kmock_package
import kubernetes_validate
import operators
import promql_parser
import pytest
import yaml
from charts import CHART, ROOT, VALUES, helm, of_kind, pods, render, tool
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from overfill.engine.build import MemoryRequirement, memory_needed
from overfill.kv.spec import DEFAULT_BLOCK_SIZE
from overfill.rpc.access import Role, roles_of
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
}
"""API version -> kinds of the operators' objects, which Kubernetes' own schemas do not contain."""

VERBS = ["create", "delete", "get", "list", "patch"]

ALL_ON = (
    "monitoring.podMonitor=true",
    "monitoring.rules=true",
    "monitoring.dashboards=true",
    "prefill.autoscaling.kind=hpa",
    "decode.autoscaling.kind=hpa",
    "router.priority.value=5",
    "cache.create=true",
    "servedModelName=m",
    "apiKeys.secretName=keys",
    "test.apiKeySecretName=test-key",
)
TIERS = ("default", "fast", "full")
FROM_HUB = ("pair.source=hub", "pair.hub.repository=a/b", "pair.hub.tokenSecretName=t")
TWO_TIERS = ("tiers.a.pair=identity", "tiers.b.pair=fast", "tiers.b.settings.quantize=int8")
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
@pytest.mark.parametrize(("values", "settings"), SETS)
def test_every_object_is_strictly_valid(values: str, settings: tuple[str, ...], version: str) -> None:
    objects = render(values, *settings)
    assert len(objects) > 15
    for one in objects:
        if one["apiVersion"] in CUSTOM:
            assert one["kind"] in CUSTOM[one["apiVersion"]]
        else:
            kubernetes_validate.validate(one, version, strict=True)


@operators.needs_definitions
@pytest.mark.parametrize(("values", "settings"), SETS)
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
        ("tls.clientSecretName=mine", "only with tls.secretName"),
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
            "decode.autoscaling.kind=hpa,decode.autoscaling.running=59",  # 64 of 59 is within an HPA's tolerance
            "decode.autoscaling.running: 59 is too high for max-num-seqs 64",
        ),
        (
            "decode.autoscaling.kind=hpa,tiers.a.pair=x,tiers.b.pair=y,tiers.b.settings.max-num-seqs=48",
            "tiers.b.autoscaling.running: 48 is too high for max-num-seqs 48",
        ),
        (
            "prefill.settings.tensor-parallel-size=4,prefill.resources.limits.nvidia\\.com/gpu=2",
            "prefill.resources.limits: nvidia.com/gpu is 2, and settings.tensor-parallel-size is 4",
        ),
        (
            "tiers.a.pair=x,tiers.a.settings.tensor-parallel-size=2,decode.resources.limits.nvidia\\.com/gpu=1",
            "tiers.a.resources.limits: nvidia.com/gpu is 1",
        ),
        ("colocated.settings.tensor-parallel-size=2", "tensor-parallel-size"),
        ("prefill.shmSize=2", "shmSize"),
        ("tiers.A.pair=default", "'A' does not match pattern"),
        ("tiers.a.pair=default,tiers.a.replica=2", "replica"),
        ("tiers.a.pair=default,tiers.a.settings.kv-memroy=1GiB", "kv-memroy"),
        ("tiers.a.pair=default,router.settings.default-tier=b", "there is no tier b in tiers"),
        ("tiers.a.pair=x;y,pair.source=claim,pair.claim.name=c", "neither pair nor settings may have a semicolon"),
    ],
)
def test_a_wrong_value_is_named(setting: str, says: str) -> None:
    assert says in refused(setting)


def test_an_hpa_s_target_may_be_just_below_what_a_worker_can_run() -> None:
    own = ("decode.autoscaling.kind=hpa", "decode.autoscaling.running=29", "decode.settings.max-num-seqs=32")
    assert "overfill-decode" in of_kind(render("values.yaml", *own), "HorizontalPodAutoscaler")
    assert DecodeConfig.model_fields["max_num_seqs"].default == 64, "the chart's templates have this default"


@pytest.mark.parametrize(("values", "settings"), SETS)
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


DEVICES = {"NVIDIA-H100-80GB-HBM3": 81_559, "NVIDIA-L4": 23_034}
"""Value of the node label nvidia.com/gpu.product -> MiB of memory that the driver reports."""

HALVES = {
    ("values-prod.yaml", "prefill"): (32, 15.0),
    ("values-prod.yaml", "decode"): (28, 6.0),
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
    queries = [trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"]]
    asked = [one for query in queries for one in selectors(promql_parser.parse(query))]
    assert len(asked) == 3
    assert all(("tier", "fast") in [(m.name, m.value) for m in one.matchers.matchers] for one in asked)


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


def test_secrets_are_referred_to() -> None:
    assert of_kind(render("values-prod.yaml"), "Secret") == {}
    pod = pods(render("values-prod.yaml"))["router"]
    assert "--api-keys=/etc/overfill/keys/keys.json" in pod["containers"][0]["args"]
    secrets = {v["name"]: v["secret"]["secretName"] for v in pod["volumes"] if "secret" in v}
    assert secrets == {"tls": "overfill-tls", "keys": "overfill-api-keys"}


POD_ROLES = {Role.ROUTER, Role.WORKER, Role.SCRAPER}


def certificate(secret: dict[str, Any]) -> x509.Certificate:
    return x509.load_pem_x509_certificate(base64.b64decode(secret["data"]["tls.crt"]))


def authorities(secret: dict[str, Any]) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(base64.b64decode(secret["data"]["ca.crt"]))


def names_in(made: x509.Certificate) -> list[str]:
    return made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName)


def test_helm_makes_a_certificate_for_pods_and_one_for_clients() -> None:
    secrets = of_kind(render("values.yaml"), "Secret")
    pods_secret, client_secret = secrets["overfill-tls"], secrets["overfill-client-tls"]
    assert roles_of(names_in(certificate(pods_secret))) == POD_ROLES
    assert names_in(certificate(client_secret)) == ["client.role.overfill.internal"], "it cannot pose as a server"
    processes, clients = authorities(pods_secret)
    certificate(pods_secret).verify_directly_issued_by(processes)
    certificate(client_secret).verify_directly_issued_by(clients)
    assert authorities(client_secret) == [processes], "what clients trust"


def test_cert_manager_makes_the_same_two() -> None:
    specs = {
        one["secretName"]: one
        for one in (c["spec"] for c in of_kind(render("values-prod.yaml"), "Certificate").values())
    }
    assert specs.keys() == {"overfill-tls", "overfill-client-tls"}
    assert roles_of(specs["overfill-tls"]["dnsNames"]) == POD_ROLES
    assert "overfill" in specs["overfill-tls"]["dnsNames"]
    assert specs["overfill-client-tls"]["dnsNames"] == ["client.role.overfill.internal"]
    assert specs["overfill-client-tls"]["usages"] == ["client auth"]


def test_the_script_makes_the_same_two(tmp_path: Path) -> None:
    subprocess.run([ROOT / "deploy" / "tls" / "make-certificates", tmp_path / "tls"], check=True, capture_output=True)
    roles = {}
    for name in ("tls", "client"):
        made = x509.load_pem_x509_certificate((tmp_path / "tls" / f"{name}.crt").read_bytes())
        made.verify_directly_issued_by(x509.load_pem_x509_certificate((tmp_path / "tls" / "ca.crt").read_bytes()))
        names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        roles[name] = roles_of(names.get_values_for_type(x509.UniformResourceIdentifier))
    assert roles == {"tls": POD_ROLES, "client": {Role.CLIENT}}


@pytest.mark.parametrize(
    ("values", "settings", "client_secret"),
    [
        ("values.yaml", (), "overfill-client-tls"),
        ("values-prod.yaml", (), "overfill-client-tls"),
        ("values-cpu.yaml", (), "overfill-client-tls"),
        ("values-cpu.yaml", ("tls.clientSecretName=mine",), "mine"),
    ],
)
def test_only_the_test_s_pod_has_the_client_s_certificate(
    values: str, settings: tuple[str, ...], client_secret: str
) -> None:
    for component, pod in pods(render(values, *settings)).items():
        (tls,) = (volume["secret"]["secretName"] for volume in pod["volumes"] if volume["name"] == "tls")
        assert tls == (client_secret if component == "test" else "overfill-tls")


def test_notes_tell_users_to_export_the_client_s_certificate() -> None:
    done = helm("install", "overfill", str(CHART), "--namespace=serving", "--dry-run=client")
    assert done.returncode == 0, done.stderr
    notes = done.stdout.partition("NOTES:")[2]
    assert re.findall(r"get secret (\S+) -o json \\", notes) == ["overfill-client-tls"]
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


def test_every_metric_is_exported() -> None:
    exported = {spec.name for spec in declared()}
    scalers = [*render("values-prod.yaml"), *render("values.yaml", *ALL_ON)]
    text = json.dumps([one for one in scalers if one["kind"] in ("ScaledObject", "HorizontalPodAutoscaler")])
    used = set(re.findall(r"overfill_\w+", text))
    assert len(used) == 5
    assert used <= exported


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


def selectors(node: object) -> list[promql_parser.VectorSelector]:
    """Return every selector of a parsed query."""
    if isinstance(node, promql_parser.VectorSelector):
        return [node]
    parts = (getattr(node, name, None) for name in ("expr", "lhs", "rhs"))
    return [one for part in parts if part is not None for one in selectors(part)]


@pytest.mark.parametrize(
    ("other_release", "settings"), [("other", ()), ("overfill", ("nameOverride=other",))], ids=["release", "name"]
)
def test_two_releases_in_one_namespace_scale_on_their_own_load(other_release: str, settings: tuple[str, ...]) -> None:
    ours = render("values-prod.yaml")
    theirs = render("values-prod.yaml", *settings, release=other_release)
    queries = [
        trigger["metadata"]["query"]
        for scaled in of_kind(ours, "ScaledObject").values()
        for trigger in scaled["spec"]["triggers"]
    ]
    asked = [selector for query in queries for selector in selectors(promql_parser.parse(query))]
    assert len(asked) == 5
    for selector in asked:
        component = selector.name.split("_")[1]
        matchers = {matcher.name: matcher.value for matcher in selector.matchers.matchers}
        matchers.pop("stage", None)  # the routers' own label, of the pool that they compute
        own, other = (series_labels(objects, component) for objects in (ours, theirs))
        assert {name: own.get(name) for name in matchers} == matchers, "it finds the release's own series"
        assert {name: other.get(name) for name in matchers} != matchers, "and none of the other release"


def test_keda_removes_no_worker_because_prometheus_has_no_series() -> None:
    """With KEDA's default, a query without a result is 0, so that a lost scrape scales a loaded pool to its minimum."""
    scaled = of_kind(render("values-prod.yaml"), "ScaledObject").values()
    triggers = [trigger["metadata"].get("ignoreNullValues") for one in scaled for trigger in one["spec"]["triggers"]]
    assert set(triggers) == {"false"}


def test_keda_sees_requests_that_routers_do_not_give_to_workers_yet() -> None:
    scaled = of_kind(render("values-prod.yaml"), "ScaledObject")
    for stage in ("prefill", "decode"):
        (needed,) = (one for one in scaled[f"overfill-{stage}"]["spec"]["triggers"] if one["name"] == "needed")
        (selector,) = selectors(promql_parser.parse(needed["metadata"]["query"]))
        assert selector.name == "overfill_router_scaling_needed_workers"
        assert {one.name: one.value for one in selector.matchers.matchers}["stage"] == stage
        assert needed["metadata"]["threshold"] == "1"


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
    assert router["metadata"]["annotations"] == {WIRE: str(WIRE_VERSION)}

    async def upgrade(annotations: dict[str, str]) -> None:
        await cluster.apply(router | {"metadata": router["metadata"] | {"annotations": annotations}})
        assert of_kind(await cluster.upgraded(), "Deployment")

    await upgrade({WIRE: str(WIRE_VERSION)})
    with pytest.raises(AssertionError, match=f"runs wire version 1, this chart {WIRE_VERSION}"):
        await upgrade({WIRE: "1"})
    await upgrade({})  # of a chart that did not say its wire version


@pytest.mark.parametrize("kind", ["hpa", "keda"])
async def test_an_upgrade_that_turns_autoscaling_on_keeps_the_number_of_workers(kind: str, cluster: Cluster) -> None:
    """Kubernetes takes a Deployment whose `replicas` an upgrade removes as one of a single pod."""

    async def replicas() -> dict[str, int | None]:
        objects = await cluster.upgraded(f"decode.autoscaling.kind={kind}", "prefill.replicas=3")
        return {name: one["spec"].get("replicas") for name, one in of_kind(objects, "Deployment").items()}

    others = {"overfill-router": 2, "overfill-prefill": 3}
    assert await replicas() == others | {"overfill-decode": None}, "the autoscaler sets it in a new release"
    await cluster.apply(of_kind(render("values.yaml", "decode.replicas=6"), "Deployment")["overfill-decode"])
    assert await replicas() == others | {"overfill-decode": 6}


@pytest.mark.parametrize("deleted", ["overfill-first-key", "overfill-keys"])
async def test_an_upgrade_keeps_the_api_keys(deleted: str, cluster: Cluster) -> None:
    """The file of keys outlives the secret of the first key, and a file that is made again has this key's hash."""
    first = await cluster.secrets()
    await cluster.apply(*first.values())
    assert await cluster.secrets() == first
    await cluster.kubectl("delete", "-n", "serving", "secret", deleted)
    again = await cluster.secrets()
    assert again["overfill-tls"] == first["overfill-tls"]
    assert again["overfill-client-tls"] == first["overfill-client-tls"]
    kept = {"overfill-first-key": "overfill-keys", "overfill-keys": "overfill-first-key"}[deleted]
    assert again[kept] == first[kept]
    assert again[kept]["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    (entry,) = json.loads(base64.b64decode(again["overfill-keys"]["data"]["keys.json"]))["keys"]
    key = base64.b64decode(first["overfill-first-key"]["data"]["key"])
    assert entry["sha256"] == hashlib.sha256(key).hexdigest()
    assert ("overfill-first-key" in again) == (deleted != "overfill-first-key")


async def test_an_upgrade_makes_a_missing_client_s_certificate_and_keeps_that_of_the_pods(cluster: Cluster) -> None:
    """A deleted secret revokes what was in it."""
    first = await cluster.secrets()
    (processes, old) = authorities(first["overfill-tls"])
    only_processes = processes.public_bytes(serialization.Encoding.PEM)
    first["overfill-tls"]["data"]["ca.crt"] = base64.b64encode(only_processes).decode()
    for kept in (first, None):  # a secret without the clients' authority; then one with that of deleted clients
        if kept is not None:
            await cluster.apply(kept["overfill-tls"])
        again = await cluster.secrets()
        for file in ("tls.crt", "tls.key"):
            assert again["overfill-tls"]["data"][file] == first["overfill-tls"]["data"][file]
        same, clients = authorities(again["overfill-tls"])
        assert same == processes
        assert clients != old
        certificate(again["overfill-client-tls"]).verify_directly_issued_by(clients)
        assert authorities(again["overfill-client-tls"]) == [processes]
        await cluster.apply(again["overfill-tls"])
        old = clients
