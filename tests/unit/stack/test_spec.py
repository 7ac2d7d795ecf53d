"""Tests a stack's description for Ray and the Serve config made of it, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from shipped_config import SHIPPED, for_several_machines

from overfill.rpc import certificates
from overfill.rpc.access import NAME
from overfill.settings.config import ColocatedConfig, DecodeConfig
from overfill.settings.reader import BadSettings
from overfill.settings.tiers import PoolSpec
from overfill.stack.child import StartFailed
from overfill.stack.ports import check_ports
from overfill.stack.ray.application import deployment_options, environment, serve_config
from overfill.stack.spec import DECODE, PREFILL, ROUTER, RouterSpec, StackSpec, WorkerPlace

HERE = WorkerPlace("decode-x1", "ray:///overfill", "10.0.0.7")


def spec(**fields: Any) -> StackSpec:
    return StackSpec.model_validate({"pair": "pair"} | fields)


def test_shared_settings_reach_deployments_that_have_them_and_a_pools_own_win() -> None:
    made = spec(
        settings={"dtype": "float32", "max_num_batched_tokens": 256, "log_level": "error"},
        prefill={"settings": {"max_num_batched_tokens": 512}},
        decode={"settings": {"data_streams": 3}},
    )
    assert made.worker_config("prefill").max_num_batched_tokens == 512
    assert (made.worker_config("decode").dtype, made.worker_config("decode").data_streams) == ("float32", 3)
    assert made.router_config().log_level == "error"


def test_a_worker_joins_through_the_directory_under_its_own_name() -> None:
    config = spec().worker_config("decode", HERE)
    assert (config.worker_id, config.routers, config.advertise) == ("decode-x1", ("ray:///overfill",), "")


def test_a_worker_that_listens_everywhere_announces_its_machine(tmp_path: Path) -> None:
    for name in ("cert", "key", "ca"):
        (tmp_path / name).touch()
    tls = {f"tls_{name}": str(tmp_path / name) for name in ("cert", "key", "ca")}
    tls["api_keys"] = str(tmp_path / "keys.json")
    assert spec(settings=tls | {"host": "0.0.0.0"}).worker_config("decode", HERE).advertise == "10.0.0.7"
    own = tls | {"host": "0.0.0.0", "advertise": "worker.internal"}
    assert spec(settings=own).worker_config("decode", HERE).advertise == "worker.internal"


def test_prometheus_can_connect_to_the_metrics_of_every_machine() -> None:
    files = {f"tls_{name}": name for name in ("cert", "key", "ca")}
    made = spec(settings=files | {"metrics_host": "0.0.0.0"})
    configs = [
        made.worker_config("decode", HERE),
        made.worker_config("prefill", HERE),
        made.router_config(0, HERE.node_ip),
    ]
    assert [config.metrics_host for config in configs] == [HERE.node_ip] * 3
    assert spec().router_config(0, HERE.node_ip).metrics_host == "127.0.0.1"


def test_routers_of_one_machine_have_ports_in_pairs() -> None:
    made = spec(router={"replicas": 2, "ports": [7600, 7601], "http_ports": [8000, 0]}, prefill={"replicas": 2})
    assert [(c.port, c.http) for c in map(made.router_config, (0, 1))] == [(7600, 8000), (7601, 0)]
    assert (made.router_config().expect_prefill, made.router_config().expect_decode) == (2, 1)
    assert spec().router_config().http == "off"


TIERS: dict[str, Any] = {
    "tiers": {
        "full": {"pair": "identity", "fallback": "fast", "num_gpus": 1},
        "fast": {
            "pair": "fast",
            "replicas": 2,
            "max_replicas": 4,
            "settings": {"quantize": "int8"},
            "ttft_objective": 1,
        },
    },
    "settings": {"max_num_seqs": 8},
}


def test_each_tier_is_a_deployment_with_its_pair_and_its_settings() -> None:
    made = StackSpec.model_validate(TIERS | {"router": {"settings": {"brownout": "full > fast"}}})
    assert [*made.pools] == [PREFILL, "decode-full", "decode-fast"]
    fast = made.worker_config("decode-fast", HERE)
    assert isinstance(fast, DecodeConfig)
    assert (fast.tier, fast.pair, fast.quantize, fast.max_num_seqs) == ("fast", "fast", "int8", 8)
    assert made.worker_config("decode-full", HERE).pair == made.worker_config("prefill").pair == "identity"
    router = made.router_config()
    assert (router.pair, router.expect_decode, router.brownout) == ("identity", 3, ("full", "fast"))
    assert [str(tier) for tier in router.ordered_tiers] == [
        "full=identity:1,fallback=fast",
        "fast=fast:2,ttft-objective=1.0,quantize=int8",
    ]
    assert deployment_options(made, "decode-full")["ray_actor_options"]["num_gpus"] == 1
    assert deployment_options(made, "decode-fast")["autoscaling_config"]["max_replicas"] == 4
    (application,) = serve_config(made, "chat")["applications"]
    assert StackSpec.model_validate(application["args"]) == made
    assert application["autoscaling_policy"]["policy_kwargs"] == {"tiers": {"fast": {"ttft": 1.0}}}


def test_prefill_workers_and_routers_read_the_default_tiers_pair() -> None:
    made = StackSpec.model_validate(TIERS | {"router": {"settings": {"default_tier": "fast"}}})
    assert {made.worker_config("prefill").pair, made.router_config().pair, made.default_pair} == {"fast"}
    assert made.router_config().ordered_tiers[0].name == "fast"


def test_routers_are_told_how_workers_load_their_decoders() -> None:
    made = StackSpec.model_validate(TIERS | {"settings": {"quantize": "int8"}})
    assert [tier.settings["quantize"] for tier in made.router_config().ordered_tiers] == ["int8", "int8"]
    one = spec(decode={"replicas": 2, "settings": {"quantize": "int8"}})
    assert [str(tier) for tier in one.router_config().ordered_tiers] == ["default=pair:2,quantize=int8"]
    assert one.worker_config("decode").tier == ""
    assert not spec().router_config().tiers


BOTH: dict[str, Any] = {"colocated": {"replicas": 2, "settings": {"itl_objective": 0.05}}}


def test_workers_with_both_stages_are_one_deployment_of_a_fixed_size() -> None:
    made = spec(**BOTH, settings={"max_num_batched_tokens": 256, "ttft_objective": 1})
    assert [*made.pools] == ["colocated"]
    worker = made.worker_config("colocated", HERE)
    assert isinstance(worker, ColocatedConfig)
    assert (worker.pair, worker.tier, worker.max_num_batched_tokens) == ("pair", "", 256)
    assert (worker.ttft_objective, worker.itl_objective) == (1, 0.05)
    router = made.router_config()
    assert (router.expect_prefill, router.expect_decode, router.itl_objective) == (2, 2, 0.1)
    (application,) = serve_config(made, "chat")["applications"]
    assert "autoscaling_policy" not in application
    assert StackSpec.model_validate(application["args"]) == made
    assert deployment_options(made, "colocated")["num_replicas"] == 2


def test_workers_with_both_stages_decode_in_the_default_tier() -> None:
    tiers = {"full": {"pair": "identity"}, "fast": {"pair": "fast", "replicas": 0, "itl_objective": 0.2}}
    made = StackSpec.model_validate({"tiers": tiers, **BOTH, "router": {"settings": {"default_tier": "fast"}}})
    assert [*made.pools] == ["colocated", "decode-full"]
    worker = made.worker_config("colocated", HERE)
    assert (worker.pair, worker.tier, worker.itl_objective) == ("fast", "fast", 0.2)  # type: ignore[union-attr]
    assert [(tier.name, tier.replicas) for tier in made.router_config().ordered_tiers] == [("fast", 2), ("full", 1)]
    with pytest.raises(ValidationError, match=r"tiers.fast.replicas: the number of decode workers must be at least 1"):
        StackSpec.model_validate({"tiers": tiers, **BOTH})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"colocated": {"max_replicas": 3}}, r"fixed number of replicas: remove max_replicas of colocated"),
        ({"decode": {"max_replicas": 3}}, r"fixed number of replicas: remove max_replicas of decode"),
        ({"colocated": {"stages": "prefill"}}, "colocated.stages"),
        ({"settings": {"engine": "vllm"}}, "for vLLM start a worker for each stage"),
        ({"colocated": None, "decode": None}, "decode: no worker has this stage; give the section, or `colocated`"),
    ],
)
def test_what_workers_with_both_stages_cannot_have_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        spec(**BOTH | fields)


def test_a_machine_names_the_folders_of_all_pairs() -> None:
    there = StackSpec.model_validate(TIERS).with_pairs(lambda pair: f"/pairs/{pair}")
    assert [tier.pair for tier in there.router_config().tiers] == ["/pairs/identity", "/pairs/fast"]
    assert there.worker_config("decode-fast").pair == "/pairs/fast"
    assert spec().with_pairs(lambda pair: f"/pairs/{pair}").worker_config("decode").pair == "/pairs/pair"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"pair": "p", "decode": {"replicas": 2}},
            "tiers: each has its own pair and replicas: remove decode and pair",
        ),
        ({"tiers": {"Fast": {"pair": "p"}}}, "'Fast' cannot name a tier"),
        ({"tiers": {"a": {"pair": "p", "fallback": "b"}}}, "there is no tier 'b'"),
        ({"tiers": {"a": {"pair": "p", "settings": {"quantise": "int8"}}}}, "quantise: no such setting"),
        ({"tiers": {"a": {}}}, "tiers.a.pair"),
        ({"router": {"settings": {"default_tier": "b"}}}, "--default-tier: there is no tier 'b'"),
    ],
)
def test_wrong_tiers_are_named_before_anything_is_deployed(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StackSpec.model_validate(TIERS | fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"settings": {"kv_memroy": "1GiB"}}, "kv_memroy: no process of this stack has such a setting"),
        (
            {"prefill": {"settings": {"data_streams": 2}}},
            "data_streams: no such setting; overfill-prefill --help lists",
        ),
        ({"decode": {"settings": {"kv_memory": "much"}}}, "--kv-memory"),
        ({"settings": {"host": "0.0.0.0"}}, "--tls-cert"),
        ({"decode": {"replicas": 3, "max_replicas": 2}}, "max_replicas 2 is less than replicas 3"),
        ({"router": {"max_replicas": 2}}, "number of routers is fixed"),
        ({"router": {"replicas": 1001}}, "router: got 1001 replicas; a pool has at most 1000"),
        ({"decode": {"max_replicas": 1001}}, "decode: got 1001 replicas; a pool has at most 1000"),
        ({"router": {"http_ports": [8000, 8001]}}, "one for each of the 1 ports, or none"),
        ({"router": {"ports": []}}, "give at least one"),
        ({"prefill": {"settings": {"kv_memroy": "1GiB"}}}, r"prefill.settings.kv_memroy: .* did you mean kv_memory\?"),
        (
            {"settings": {"engine": "mock"}, "prefill": {"settings": {"engine": "auto"}}},
            "auto for prefill, mock for decode",
        ),
    ],
)
def test_wrong_settings_are_named_before_anything_is_deployed(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        spec(**fields)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"dekode": {}}, "dekode: no such field; did you mean decode?"),
        ({"prefill": {"replica": 2}}, "prefill.replica: no such field; did you mean replicas?"),
        ({"router": {"prots": [1]}}, "router.prots: no such field; did you mean ports?"),
        ({"tiers": {"a": {"pair": "p", "fall_back": "b"}}}, "tiers.a.fall_back: no such field; did you mean fallback?"),
        ({"tiers": {"a": {"pair": "p", "name": "b"}}}, "tiers.a.name: got 'b'; the key is the tier's name"),
        ({"colour": "red"}, "colour: no such field; the fields are canary, colocated, decode, "),
    ],
)
def test_an_unknown_field_is_named_with_the_nearest_one(document: dict[str, Any], message: str) -> None:
    with pytest.raises(BadSettings) as caught:
        StackSpec.read(document)
    assert message in str(caught.value)


LEVELS = (f"a{level + 1}: &a{level + 1} [{', '.join([f'*a{level}'] * 10)}]" for level in range(6))
LAUGHS = ", ".join(("a0: &a0 [x]", *LEVELS))
"""A million values, made of aliases."""


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "decode: {settings: {kv_memry: 1}}", "kv_memry: no such setting; did you mean kv_memory?"),
        ("a.yaml", "settings: {port: 5}", "settings: port: the stack sets this for each process itself"),
        ("a.yaml", "settings: {probe_port: 5}", "settings: probe_port: the stack sets this for each process itself"),
        ("a.yaml", "router: {settings: {share_port: /run/x}}", "router: share_port: the stack sets this"),
        ("a.yaml", "decode: {settings: {pair: p, routers: 'a:1'}}", "decode: pair, routers: the stack sets this"),
        ("a.yaml", "decode: {replicas: 1}\ndecode: {replicas: 2}", "the key decode appears twice"),
        ("a.json", '{"name": "a", "name": "b"}', "the key name appears twice"),
        ("a.yaml", "? [a]\n: b", "found unhashable key"),
        ("a.yaml", "!!map [a]", "expected a mapping node"),
        ("a.yaml", "[]", "expected the fields of a stack"),
        ("a.json", "7", "expected the fields of a stack"),
        ("a.json", "[" * 100_000, "is nested too deeply"),
        ("a.yaml", "[" * 10_000, "is nested too deeply"),
        ("a.yaml", "settings: {engine: mock, " + LAUGHS + "}", "has more than 10000 values, with each alias"),
        ("a.yaml", "settings: &a {engine: mock, dtype: *a}", "has more than 10000 values, with each alias"),
        ("a.yaml", "[" + "1, " * 10_000 + "]", "has more than 10000 values"),
        ("a.yaml", "health_check_period: .inf", "health_check_period: Input should be a finite number"),
        ("a.yaml", "health_check_timeout: .inf", "health_check_timeout: Input should be a finite number"),
        ("a.yaml", "decode: {num_cpus: .inf, num_gpus: .inf}", "decode.num_gpus: Input should be a finite number"),
        ("a.yaml", "decode: {resources: {a: .nan}}", "decode.resources.a: Input should be a finite number"),
        ("a.yaml", "settings: {grace_period: .inf}", "GRACE_PERIOD): must be a number of at least 0, got inf"),
        ("a.json", r'{"log_dir": "/a\u0000b"}', r"log_dir: must be text without '\x00'"),
        ("a.json", r'{"name": "a\nb"}', "name: must be at most 256 printable characters"),
        ("a.json", r'{"tiers": {"a": {"pair": "p\ud800"}}}', r"tiers.a.pair: must be text without '\ud800'"),
        ("a.json", r'{"settings": {"tls_ca": "a\u0000b"}}', r"TLS_CA): must be text without '\x00', got 'a\x00b'"),
        ("a.json", r'{"settings": {"served_model_name": "\ud800"}}', r"NAME): must be text without '\ud800'"),
        ("a.json", r'{"settings": {"served_model_name": ["a\u0000b"]}}', "NAME): must be at most 256 printable"),
        ("a.yaml", "settings: {metrics_port: on}", "must be a whole number from 0 to 65535, or off, got True"),
    ],
)
def test_what_is_wrong_with_a_document_is_named(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(BadSettings) as caught:
        StackSpec.load(tmp_path / name)
    assert message in str(caught.value)
    assert name in str(caught.value)


def test_a_fixed_pool_has_its_replicas_and_no_autoscaling() -> None:
    options = deployment_options(spec(decode={"replicas": 3, "num_cpus": 0.25, "num_gpus": 0.5}), DECODE)
    assert options["num_replicas"] == 3
    assert "autoscaling_config" not in options
    actor = options["ray_actor_options"]
    assert (actor["num_cpus"], actor["num_gpus"]) == (0.25, 0.5)


def test_if_one_pool_scales_every_deployment_has_bounds() -> None:
    made = spec(decode={"replicas": 2, "max_replicas": 5}, router={"replicas": 2})
    bounds = {name: deployment_options(made, name)["autoscaling_config"] for name in (ROUTER, PREFILL, DECODE)}
    limits = {name: (config["min_replicas"], config["max_replicas"]) for name, config in bounds.items()}
    assert limits == {ROUTER: (2, 2), PREFILL: (1, 1), DECODE: (2, 5)}
    assert all("num_replicas" not in deployment_options(made, name) for name in limits)


def test_serve_waits_longer_than_a_drain_takes() -> None:
    made = spec(settings={"grace_period": 45}, decode={"settings": {"grace_period": 90}})
    for name in (ROUTER, PREFILL, DECODE):
        assert deployment_options(made, name)["graceful_shutdown_timeout_s"] > 90


def test_every_replica_has_its_number_of_threads() -> None:
    made = spec(settings={"threads": 3})
    assert environment(made, DECODE)["OMP_NUM_THREADS"] == environment(made, PREFILL)["MKL_NUM_THREADS"] == "3"
    assert environment(made, ROUTER)["OMP_NUM_THREADS"] == "1"


def test_a_replica_that_reserves_no_gpu_sees_none() -> None:
    made = spec(decode={"num_gpus": 0.5})
    assert environment(made, PREFILL)["CUDA_VISIBLE_DEVICES"] == environment(made, ROUTER)["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in environment(made, DECODE), "Ray sets it"


def test_a_replica_has_the_share_of_the_memory_that_it_has_of_the_gpu() -> None:
    made = spec(prefill={"num_gpus": 0.25}, decode={"num_gpus": 1})
    assert (made.worker_config(PREFILL).gpu_share, made.worker_config(DECODE).gpu_share) == (0.25, None)
    made = spec(prefill={"num_gpus": 0.25, "settings": {"gpu_share": 0.4}}, settings={"gpu_share": 0.5})
    assert (made.worker_config(PREFILL).gpu_share, made.worker_config(DECODE).gpu_share) == (0.4, 0.5)


def test_a_replica_reserves_a_whole_gpu_for_each_rank() -> None:
    ranks = {"settings": {"tensor_parallel_size": 2}}
    made = spec(prefill={"num_gpus": 2} | ranks, decode={"num_gpus": 0} | ranks)
    assert deployment_options(made, PREFILL)["ray_actor_options"]["num_gpus"] == 2
    assert environment(made, DECODE)["CUDA_VISIBLE_DEVICES"] == "", "its ranks compute on CPUs"
    for number in (0.5, 1, 3):
        with pytest.raises(
            ValidationError, match=rf"prefill.num_gpus: got {number:g} with tensor_parallel_size 2: give 2"
        ):
            spec(prefill={"num_gpus": number} | ranks)


def test_the_config_gives_back_the_spec_and_names_a_policy_only_when_there_is_something_to_decide() -> None:
    made = spec(decode={"replicas": 2, "max_replicas": 4})
    (application,) = serve_config(made, "chat", {"ttft": 1.0})["applications"]
    assert StackSpec.model_validate(application["args"]) == made
    assert application["name"] == "chat"
    assert application["autoscaling_policy"]["policy_kwargs"] == {"ttft": 1.0}
    (fixed,) = serve_config(spec(), "chat")["applications"]
    assert "autoscaling_policy" not in fixed


def test_a_wrong_objective_is_refused_before_deployment() -> None:
    with pytest.raises(ValueError, match="tfft: no such setting of the scaling policy"):
        serve_config(spec(decode={"max_replicas": 4}), "chat", {"tfft": 1.0})


def test_the_shipped_config_s_advice_for_several_machines_is_complete(tmp_path: Path) -> None:
    (application,) = for_several_machines()["applications"]
    args = application["args"]
    assert args["tls"]
    certificates.make(tmp_path)
    made = StackSpec(**{**args, "tls": str(tmp_path)})
    assert made.router_config().host == "0.0.0.0"
    assert {given["name"] for given in application["deployments"]} == made.deployments.keys()
    # Certificates name the stack, and processes connect to addresses.
    tls = made.worker_config("decode", HERE).client_tls()
    assert tls is not None
    assert tls.name == NAME


@pytest.mark.parametrize("name", ["serve.yaml", "serve-tiers.yaml", "serve-colocated.yaml"])
def test_the_shipped_config_is_valid(name: str) -> None:
    config = yaml.safe_load(SHIPPED.with_name(name).read_text(encoding="utf-8"))
    (application,) = config["applications"]
    made = StackSpec.model_validate(application["args"])
    policy = application.get("autoscaling_policy", {})
    assert made.scales == bool(policy) == (name != "serve-colocated.yaml")
    rendered = serve_config(made, application["name"], policy.get("policy_kwargs"))
    assert rendered["applications"][0]["import_path"] == application["import_path"]
    assert rendered["applications"][0].get("autoscaling_policy", {}) == policy
    assert config["proxy_location"] == rendered["proxy_location"]
    reserved = RouterSpec().num_cpus + 2 * PoolSpec().num_cpus + 3 * PoolSpec().num_cpus
    assert reserved <= 2, "a router, two prefill and three decode workers fit two cores by default"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prefill": {"settings": {"metrics_port": 9600}}, "decode": {"settings": {"metrics_port": 9600}}}, "9600"),
        ({"prefill": {"replicas": 2, "settings": {"metrics_port": 9600}}, "settings": {"metrics_port": 9601}}, "9601"),
        ({"prefill": {"settings": {"metrics_port": 7600}}}, r"port 7600 .*--grpc.*metrics_port of prefill"),
        ({"router": {"ports": [7600, 7600], "replicas": 2}}, "port 7600"),
    ],
)
def test_two_servers_of_one_machine_have_different_ports(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        spec(**({"runner": "processes"} | fields))


def test_processes_of_a_cluster_may_have_the_same_metrics_port_but_not_those_of_one_machine() -> None:
    made = spec(prefill={"replicas": 2, "settings": {"metrics_port": 9600}})
    assert made.metrics_ports["prefill"] == [9600, 9600]
    with pytest.raises(StartFailed, match="on Ray, every process of a pool has the same metrics_port"):
        check_ports(made)


@pytest.mark.parametrize("text", ["{metrics_port: off}", "{metrics_port: 'off'}"])
def test_off_means_no_metrics_on_ray_and_for_plain_processes(text: str) -> None:
    made = spec(settings=yaml.safe_load(text), decode={"settings": {"metrics_port": " 9600"}})
    assert made.metrics_ports == {"router": ["off"], "prefill": ["off"], "decode": [9600]}
    assert (made.router_config().metrics_port, made.worker_config("decode").metrics_port) == ("off", 9600)


def test_an_alias_repeats_a_part_of_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("prefill: &pool {settings: {threads: 2}}\ndecode: {<<: *pool, replicas: 2}")
    made = StackSpec.load(tmp_path / "a.yaml")
    assert (made.pools["decode"].replicas, made.worker_config("decode").threads) == (2, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "mine", "health_check_period": 1}, "only Ray uses health_check_period, name: remove this"),
        ({"router": {"num_cpus": 1}, "decode": {"num_gpus": 1}}, r"only Ray uses router\.num_cpus, decode\.num_gpus"),
        ({"tiers": {"a": {"pair": "p", "resources": {"x": 1}}}}, r"only Ray uses tiers\.a\.resources"),
        (
            {"tiers": {"a": {"pair": "p", "replicas": 0, "settings": {"quantize": "int8"}}}, "colocated": {}},
            "tiers.a: settings: the tier has no workers of its own",
        ),
    ],
)
def test_a_document_has_no_field_that_its_runner_does_not_use(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadSettings, match=message):
        StackSpec.read({"runner": "processes"} | fields)


def test_plain_processes_run_a_document_for_a_cluster_without_the_fields_of_ray() -> None:
    pool = {"num_gpus": 1, "replicas": 2}
    made = StackSpec.read({"ray_address": "auto", "name": "x", "tiers": {"name": {"pair": "p", **pool}}})
    expected = {"runner": "processes", "tiers": {"name": {"pair": "p", "replicas": 2}}}
    assert made.on("processes") == StackSpec.read(expected)
    assert made.on("ray") == made
