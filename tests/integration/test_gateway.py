"""Tests what the chart gives to a gateway, and that an endpoint picker accepts every router and no worker."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from charts import ROOT, of_kind, pods, render
from picker import ENGINE, ROLE, Load, Refused, load, members, scrape
from stacks import mocked, running_stack, wait_until
from test_chart import refused

from overfill.client import Client, ClientTls, SamplingParams
from overfill.rpc import certificates
from overfill.rpc.access import Role

POOL = ("gateway.inferencePool.enabled=true", "gateway.inferencePool.picker.service=overfill-picker-epp")
HTTP = ("gateway.httpRoute.enabled=true", "gateway.httpRoute.parentRefs[0].name=public")
GRPC = ("gateway.grpcRoute.enabled=true", "gateway.grpcRoute.parentRefs[0].name=public")


def pod_labels(objects: list[dict]) -> dict[str, dict[str, str]]:
    """Return the labels of each Deployment's pods, and of the test's pod."""
    made = {name: one["spec"]["template"]["metadata"]["labels"] for name, one in of_kind(objects, "Deployment").items()}
    return made | {name: one["metadata"]["labels"] for name, one in of_kind(objects, "Pod").items()}


@pytest.mark.parametrize("values", ["values.yaml", "values-tiers.yaml", "values-colocated.yaml"])
def test_the_pool_has_the_routers_of_its_release_only(values: str) -> None:
    objects = render(values, *POOL)
    (pool,) = of_kind(objects, "InferencePool").values()
    own = pod_labels(objects)
    others = {f"other/{name}": labels for name, labels in pod_labels(render(values, *POOL, release="other")).items()}
    assert len(own) >= 3
    assert members(pool, own | others) == {"overfill-router"}
    engine = {name for name, labels in own.items() if ROLE in labels or ENGINE in labels}
    assert engine == {"overfill-router"}, "not even a pool without a selector finds a worker by its role"
    (container,) = pods(objects)["router"]["containers"]
    assert pool["spec"]["targetPorts"] == [
        {"number": port["containerPort"]} for port in container["ports"] if port["name"] == "https"
    ]
    assert pool["spec"]["endpointPickerRef"]["name"] == "overfill-picker-epp"


def test_without_values_there_is_no_object_of_a_gateway() -> None:
    objects = render("values.yaml")
    assert {"InferencePool", "HTTPRoute", "GRPCRoute"}.isdisjoint(one["kind"] for one in objects)


def test_routes_lead_to_ports_of_the_routers_service_or_to_the_pool() -> None:
    objects = render("values.yaml", *HTTP, *GRPC, "gateway.grpcRoute.parentRefs[0].port=8443")
    ports = {port["port"] for port in of_kind(objects, "Service")["overfill"]["spec"]["ports"]}
    backends = {}
    for kind in ("HTTPRoute", "GRPCRoute"):
        (rule,) = of_kind(objects, kind)["overfill"]["spec"]["rules"]
        (backends[kind],) = rule["backendRefs"]
    assert backends == {
        "HTTPRoute": {"name": "overfill", "port": 8000},
        "GRPCRoute": {"name": "overfill", "port": 7600},
    }
    assert {backend["port"] for backend in backends.values()} == ports
    pooled = render("values.yaml", *HTTP, *POOL)
    (rule,) = of_kind(pooled, "HTTPRoute")["overfill"]["spec"]["rules"]
    (backend,) = rule["backendRefs"]
    (pool,) = of_kind(pooled, "InferencePool").values()
    group = pool["apiVersion"].partition("/")[0]
    assert backend == {"group": group, "kind": "InferencePool", "name": pool["metadata"]["name"]}


def test_a_gateway_lets_a_router_end_a_request_itself() -> None:
    def timeout(*settings: str) -> str | None:
        (rule,) = of_kind(render("values.yaml", *HTTP, *settings), "HTTPRoute")["overfill"]["spec"]["rules"]
        return rule.get("timeouts", {}).get("request")

    assert timeout("longestStreamSeconds=90") == "120s"
    assert timeout("gateway.httpRoute.timeout=false") is None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (POOL[:1], "which service is the endpoint picker"),
        (HTTP[:1], "which gateway has the route"),
        (GRPC[:1], "which gateway has the route"),
        ((*HTTP, "router.http.enabled=false"), "need router.http.enabled"),
        ((*HTTP, *GRPC), "httpRoute.hostnames and grpcRoute.hostnames must differ"),
        (
            (*HTTP, *GRPC, "gateway.httpRoute.hostnames={a.example}", "gateway.grpcRoute.hostnames={a.example}"),
            "must differ",
        ),
        (("gateway.inferencePool.failureMode=Open",), "failureMode"),
    ],
)
def test_a_wrong_value_is_named(settings: tuple[str, ...], says: str) -> None:
    assert says in refused(*settings)


def test_two_routes_on_one_listener_have_hosts_of_their_own() -> None:
    hosts = ("gateway.httpRoute.hostnames={a.example}", "gateway.grpcRoute.hostnames={b.example}")
    objects = render("values.yaml", *HTTP, *GRPC, *hosts)
    assert of_kind(objects, "GRPCRoute")["overfill"]["spec"]["hostnames"] == ["b.example"]


def test_the_page_s_values_make_what_it_says(tmp_path: Path) -> None:
    page = (ROOT / "docs/how-to/gateway.md").read_text()
    blocks = re.findall(r'```yaml title="([^"]+)"\n(.*?)```', page, re.DOTALL)
    values: dict[str, dict] = {}
    for title, text in blocks:
        if title.startswith("values of the chart"):
            for key, part in yaml.safe_load(text).items():
                values[key] = values.get(key, {}) | part
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))
    objects = render(str(tmp_path / "values.yaml"))
    assert {"InferencePool", "HTTPRoute", "GRPCRoute"} < {one["kind"] for one in objects}
    (picker,) = (yaml.safe_load(text)["router"] for title, text in blocks if title.startswith("picker.yaml"))
    pool = {"spec": {"selector": {"matchLabels": picker["modelServers"]["matchLabels"]}}}
    assert members(pool, pod_labels(objects)) == {"overfill-router"}
    (config,) = map(yaml.safe_load, picker["epp"]["pluginsCustomConfig"].values())
    (source,) = (one["parameters"] for one in config["plugins"] if one["type"] == "metrics-data-source")
    (container,) = pods(objects)["router"]["containers"]
    assert {"name": "metrics", "containerPort": source["port"]} in container["ports"]
    policy = of_kind(objects, "NetworkPolicy")["overfill-router"]["spec"]["ingress"]
    (scrapers,) = (rule["from"] for rule in policy if [port["port"] for port in rule["ports"]] == [source["port"]])
    assert {"podSelector": {"matchLabels": {"llm-d-router-standalone": "overfill-picker-epp"}}} in scrapers


def certificate(folder: Path, role: Role) -> tuple[Path, Path]:
    files = certificates.role_files(folder, role)
    return files.cert, files.key


def test_a_picker_scrapes_every_router_with_a_certificate_and_gets_no_load_from_a_worker(
    tiny_pair: Path, tmp_path: Path
) -> None:
    certs = tmp_path / "certs"
    certificates.make(certs)
    client = certificates.role_files(certs, Role.CLIENT)
    tls = ClientTls(client.ca, client.cert, client.key, certificates.NAME)
    labels = pod_labels(render("values.yaml"))
    scraper = certificate(certs, Role.SCRAPER)
    with running_stack(tiny_pair, routers=2, tls=certs, shm="off", **mocked(step=0.05)) as (stack, _):
        clients = [Client(address, tls=tls) for address in stack.addresses[:2]]
        statuses = [one.status() for one in clients]
        routers = [status.process.metrics_address for status in statuses]
        workers = [worker.process.metrics_address for worker in statuses[0].workers]
        assert len({*routers, *workers}) == 4

        def loads() -> list[Load]:
            return [load(scrape(router, scraper), labels["overfill-router"]) for router in routers]

        assert loads()[0].num_blocks > 0
        with clients[1].stream([5, 6], sampling=SamplingParams(max_tokens=400, ignore_eos=True)) as stream:
            next(stream)
            assert [(one.waiting, one.running) for one in loads()] == [(0, 0), (0, 1)], "each router's own requests"
            wait_until(
                lambda: all(0 < one.kv_usage < 1 for one in loads()), 10, "both routers tell the workers' blocks"
            )
            stream.cancel()
        wait_until(lambda: [one.running for one in loads()] == [0, 0], 10, "the cancelled request has left")

        for address in workers:
            page = scrape(address, scraper)
            with pytest.raises(Refused, match="there is no vllm:"):
                load(page, labels["overfill-router"])
        for address in routers:
            for shown in (None, certificate(certs, Role.CLIENT)):
                with pytest.raises(Refused):
                    scrape(address, shown)
            with pytest.raises(Refused):
                scrape(address, tls=False)
        for one in clients:
            one.close()
