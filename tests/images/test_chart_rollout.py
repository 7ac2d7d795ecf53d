"""Tests that clients of the chart's pods notice nothing of a rollout, its undo, scaling, a drain and new certificates.

The clients ask all the time. Workers are on the mock engine: their KV says to which prompt it belongs, and each
revision writes text of its own. The tests run in this order: each begins where the one before has left the release.
"""

from __future__ import annotations

import copy
import http.client
import itertools
import json
import shutil
import signal
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from charts import CHART, probe, render, tls_secrets
from installations import (
    KEY,
    KEYS,
    PAIRS,
    RELEASE,
    SERVICE,
    STARTUP,
    TLS,
    Installation,
    installation,
    joins,
    prepared_cluster,
)
from kube import Pod
from runtime import need
from stacks import wait_until

from overfill.client import Client, SamplingParams
from overfill.making.tiny import make_tiny_pair
from overfill.model.manifest import Pair
from overfill.rpc import certificates
from overfill.rpc.access import Role
from overfill.rpc.metrics_http import MAX_CONNECTIONS

pytestmark = [pytest.mark.images, pytest.mark.timeout(900)]

TEXTS = {"r1": "first ", "r2": "SECOND "}
REQUESTS = 1000
ROLES = (Role.ROUTER, Role.WORKER, Role.CLIENT)


def mocked(revision: str) -> dict[str, Any]:
    """Settings of a worker on the mock engine, which takes 10 ms for a token and repeats the revision's text."""
    played = {"step": 0.01, "answer": TEXTS[revision], "answer_tokens": 1 << 30}
    return {"engine": "mock", "engine-args": json.dumps(played), "max-model-len": 512, "kv-memory": "16MiB"}


OLD = {
    "servedModelName": "tiny",
    "revision": "r1",
    "pair": {"claim": {"name": PAIRS, "path": "r1"}},
    "tls": {"secretPrefix": TLS},
    "apiKeys": {"secretName": KEYS},
    "test": {"apiKeySecretName": KEY},
    "prefill": {"threads": 1, "settings": mocked("r1")},
    "decode": {"threads": 1, "settings": mocked("r1")},
}
NEW = {
    "revision": "r2",
    "pair": {"claim": {"path": "r2"}},
    "prefill": {"replicas": 1, "settings": {"engine-args": mocked("r2")["engine-args"]}},
    "decode": {"settings": {"engine-args": mocked("r2")["engine-args"]}},
}
"""What differs in the new revision: first the value of `canary`, then values of the release."""


def merged(values: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Write the values ``own`` over ``values``, as Helm does with several files."""
    made = copy.deepcopy(values)
    for key, value in own.items():
        made[key] = merged(made.get(key, {}), value) if isinstance(value, dict) else value
    return made


@dataclass
class Release:
    """The release, the pair of each revision, and its values."""

    installed: Installation
    pairs: dict[str, Pair]
    values: dict[str, Any]

    def upgrade(self, own: dict[str, Any]) -> None:
        """Do what `helm upgrade` does with ``own`` over the values, and wait until every pod is ready."""
        self.values = merged(self.values, own)
        cluster = self.installed.cluster
        cluster.upgrade(rendered(self.installed.folder, self.values))
        cluster.wait_ready(STARTUP)

    def rollout(self, *arguments: str) -> None:
        """Run `overfill rollout` in a router's pod, and wait until all routers have the share that it prints."""
        first, *others = self.installed.cluster.pods("router")
        share = self.share(first, *arguments)
        for pod in others:
            wait_until(lambda pod=pod: self.share(pod) == share, 60, f"{pod.name} has {share}")

    def share(self, pod: Pod, *arguments: str) -> dict[str, float]:
        """Return the revisions' shares in percent, as a router's pod knows them after a command."""
        return {one["name"]: one["percent"] for one in self.status(pod, *arguments)}

    def status(self, pod: Pod, *arguments: str) -> list[dict[str, Any]]:
        command = ["overfill", "rollout", *(arguments or ("status",)), "--json"]
        return json.loads(self.installed.cluster.execute(pod, *command))["revisions"]

    def workers(self, revision: str) -> dict[str, int]:
        """Return the pods of a revision's workers, and how often each was restarted."""
        return {pod.name: pod.restarts for pod in self.pods_of(revision)}

    def pods_of(self, revision: str, component: str = "") -> list[Pod]:
        pods = self.installed.cluster.pods(component)
        return [pod for pod in pods if pod.labels.get("overfill.io/revision") == revision]


def rendered(folder: Path, values: dict[str, Any]) -> list[dict]:
    """Render the chart with values-cpu.yaml and ``values`` over it."""
    text = json.dumps(merged(yaml.safe_load((CHART / "values-cpu.yaml").read_text()), values))
    file = folder / f"values-{abs(hash(text))}.yaml"
    file.write_text(text)
    return render(str(file), release=RELEASE)


class Traffic:
    """Clients on six threads, over gRPC and HTTP, which ask the routers that are ready. Judges each answer.

    Attributes:
        answers: time.monotonic() at which each request was sent, its conversation, and the revision that answered it.
        failures: why requests failed, or why an answer is no answer of one revision.
    """

    def __init__(self, release: Release) -> None:
        self._release = release
        self._numbers = itertools.count()
        self._stopping = threading.Event()
        self.answers: list[tuple[float, str, str]] = []
        self.failures: list[str] = []
        self._continued: list[str] = []
        loops = (self._ask_grpc,) * 4 + (self._ask_http,) * 2
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in loops]
        for thread in self._threads:
            thread.start()

    def _questions(self) -> Iterator[tuple[int, str, int]]:
        while not self._stopping.wait(0.05):
            number = next(self._numbers)
            yield number, f"Conversation {number % 300}", 200 if number % 10 == 0 else 16

    def _ask_grpc(self) -> None:
        client, known = None, []
        for number, text, length in self._questions():
            addresses = self._release.installed.cluster.endpoints(RELEASE)
            if addresses != known:
                if client is not None:
                    client.close()
                client, known = self._release.installed.client(number), addresses
            self._judge(self._grpc, client, text, length)

    def _ask_http(self) -> None:
        for number, text, length in self._questions():
            self._judge(self._http, number, text, length)

    def _judge(self, call, *arguments) -> None:
        sent = time.monotonic()
        try:
            revision, digests, workers, text = call(*arguments)
            pair = self._release.pairs[revision]
            assert digests == (pair.full_digest, pair.decoder_digest), f"{revision} with the digests of another"
            assert all(f"-{revision}-" in worker for worker in workers), f"{revision} by {workers}"
            assert text, f"{revision} says nothing"
            assert text in TEXTS[revision] * 200, f"{revision} says {text!r}"
            self.answers.append((sent, f"{call.__name__} {arguments[1]}", revision))
        except Exception as error:
            self.failures.append(f"{time.strftime('%X')} {call.__name__}: {error!r}")

    def _grpc(self, client: Client, text: str, length: int) -> tuple:
        sampling = SamplingParams(max_tokens=length, temperature=0.0)
        answer = client.generate(text, sampling=sampling, session=text, timeout=60)
        if answer.migrations or answer.routers > 1:
            self._continued.append(answer.request_id)
        identity = answer.identity
        workers = (answer.prefill_worker, answer.decode_worker)
        return identity.revision, (identity.full_digest, identity.decoder_digest), workers, answer.text

    def _http(self, number: int, text: str, length: int) -> tuple:
        body = {"model": "tiny", "prompt": text, "max_tokens": length, "temperature": 0}
        answer = self._release.installed.post("/v1/completions", body, number)
        pair, (report,) = answer["overfill"]["pair"], answer["overfill"]["choices"]
        workers = (report["prefill_worker"], report["decode_worker"])
        text = answer["choices"][0]["text"]
        return pair["revision"], (pair["full_digest"], pair["decoder_digest"]), workers, text

    def wait_for_answers(self, count: int, *revisions: str) -> Counter[str]:
        """Wait until ``count`` requests that are sent from now on are answered, by each of ``revisions`` or by any.

        Returns the number of them by revision. No request may have failed.
        """
        now = time.monotonic()

        def since() -> Counter[str]:
            return Counter(revision for sent, _, revision in self.answers.copy() if sent >= now)

        def enough() -> bool:
            found = since()
            return min(found[one] for one in revisions) >= count if revisions else found.total() >= count

        wait_until(lambda: self.failures or enough(), 240, f"{count} more answers of {revisions or 'any revision'}")
        assert not self.failures
        return since()

    def report(self, what: str) -> None:
        """Print the number of answers until now. No request may have failed."""
        total = Counter(revision for _, _, revision in self.answers.copy())
        continued, failed = len(self._continued), len(self.failures)
        print(
            f"{what}: {total.total()} answers until now {dict(total)}, {continued} continued, {failed} failed or mixed"
        )
        assert not self.failures, self.failures[:5]

    def stop(self) -> None:
        """Let the clients finish their requests."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(90)


@pytest.fixture(scope="module")
def release(images: dict[str, str], folder: Path) -> Iterator[Release]:
    """A release with the revision r1: two routers, two workers per stage."""
    need("podman", "nsenter", "iptables")
    pairs = {name: make_tiny_pair(folder / name, seed=seed) for seed, name in enumerate(TEXTS)}

    with prepared_cluster(folder, lambda volume: fill(volume, pairs)) as cluster:
        installed = installation(cluster, rendered(folder, OLD), folder)
        yield Release(installed, {name: Pair.load(pair) for name, pair in pairs.items()}, OLD)


@pytest.fixture(scope="module")
def traffic(release: Release) -> Iterator[Traffic]:
    started = Traffic(release)
    yield started
    started.stop()


def test_an_upgrade_starts_a_second_revision_and_restarts_no_worker_of_the_first(
    release: Release, traffic: Traffic
) -> None:
    workers = release.workers("r1")
    traffic.wait_for_answers(50)
    release.upgrade({"canary": NEW})
    assert release.workers("r1") == workers
    assert len(release.workers("r2")) == 3
    assert set(traffic.wait_for_answers(50)) == {"r1"}
    traffic.report("first upgrade")


def test_conversations_move_by_percent_and_go_back(release: Release, traffic: Traffic) -> None:
    release.rollout("set", "r2=50")
    found = traffic.wait_for_answers(200)
    print(f"at 50 %: {dict(found)}")
    assert min(found["r1"], found["r2"]) >= 40, "of 300 conversations, with many standard deviations"
    router = release.installed.cluster.pods("router")[0]
    release.status(router, "set", "r2=100", "--over", "10m")
    traffic.wait_for_answers(50, "r2")
    assert release.share(router)["r2"] < 100
    release.rollout("undo")
    assert set(traffic.wait_for_answers(100)) == {"r1"}
    traffic.report("undo half way")
    wait_until(lambda: release.status(router)[1]["running"] == 0, 60, "no request of r2 runs")
    workers = release.workers("r1")
    release.values = OLD
    release.upgrade({})
    assert (release.workers("r1"), release.workers("r2")) == (workers, {})
    assert set(traffic.wait_for_answers(50)) == {"r1"}
    release.upgrade({"canary": NEW})
    assert release.workers("r1") == workers
    traffic.report("the second revision removed, and started again")


def test_routers_scale_up_and_down(release: Release, traffic: Traffic) -> None:
    release.rollout("set", "r2=50")
    began = time.monotonic()
    for replicas in (4, 1, 2):
        release.upgrade({"router": {"replicas": replicas}})
        assert len(release.installed.cluster.endpoints(RELEASE)) == replicas
        traffic.wait_for_answers(40, "r1", "r2")
    for pod in release.installed.cluster.pods("router"):
        assert release.share(pod)["r2"] == 50, "the new routers have learned it"
    asked = {(name, revision) for sent, name, revision in traffic.answers.copy() if sent >= began}
    names = Counter(name for name, _ in asked)
    print(f"{len(names)} conversations, of which {len(asked) - len(names)} changed their revision")
    traffic.report("routers 2, 4, 1, 2")


def test_a_worker_is_drained(release: Release, traffic: Traffic) -> None:
    cluster = release.installed.cluster
    drained = release.pods_of("r2", "decode")[0]
    before = joins(cluster, drained)
    print(cluster.execute(cluster.pods("router")[0], "overfill", "drain", drained.name).strip())
    wait_until(lambda: joins(cluster, drained) == before + 2, 120, "its container starts again, and joins both routers")
    traffic.wait_for_answers(20, "r1", "r2")
    traffic.report("drain")


def test_certificates_and_their_authority_are_replaced(release: Release, traffic: Traffic) -> None:
    cluster, folder = release.installed.cluster, release.installed.folder
    old = {role: role_secret(folder / "overfill", role) for role in ROLES}
    tls_secrets(folder / "renewed", SERVICE)
    new = {role: role_secret(folder / "renewed", role) for role in ROLES}
    both = {role: {"ca.crt": old[role]["ca.crt"] + new[role]["ca.crt"]} for role in ROLES}
    steps = ({role: old[role] | both[role] for role in ROLES}, {role: new[role] | both[role] for role in ROLES}, new)
    for step in steps:
        for role in (Role.ROUTER, Role.WORKER):
            cluster.replace_secret(f"{TLS}-{role}", **step[role])
        replace_client(release.installed, step[Role.CLIENT])
        for pod in cluster.pods():
            role = Role.ROUTER if pod in cluster.pods("router") else Role.WORKER
            wait_until_shown(pod, ssl.PEM_cert_to_DER_cert(step[role]["tls.crt"].decode()))
        traffic.wait_for_answers(20, "r1", "r2")
    for killed in (release.pods_of("r1", "prefill")[0], release.pods_of("r2", "decode")[0]):
        wanted = joins(cluster, killed) + 2
        cluster.signal(killed, signal.SIGKILL)
        wait_until(lambda pod=killed, wanted=wanted: joins(cluster, pod) == wanted, 120, "the new process joins")
    traffic.wait_for_answers(20, "r1", "r2")
    traffic.report("certificates and authorities replaced")


def test_a_blocked_metrics_port_kills_no_pod(release: Release, traffic: Traffic) -> None:
    cluster = release.installed.cluster
    pods = cluster.pods()
    restarts = {pod.name: pod.restarts for pod in pods}
    for pod in pods:
        assert b"overfill_" in scrape(release.installed, pod)
    with ExitStack() as blocked:
        for pod in pods:
            for _ in range(MAX_CONNECTIONS):
                blocked.enter_context(closing(socket.create_connection((pod.address, 7690), timeout=10)))
            blocked.enter_context(cluster.blocked(pod, 7690))
        for pod in pods:
            with pytest.raises(OSError, match="timed out"):
                scrape(release.installed, pod, timeout=1)
        for _ in range(4):  # a pod is restarted at the third failure
            for pod in pods:
                cluster.run_probes(pod)
        assert {pod.name: pod.restarts for pod in cluster.pods()} == restarts
        assert all(pod.ready and not any(probe.failures for probe in pod.probes) for pod in pods)
        traffic.wait_for_answers(20, "r1", "r2")
    traffic.report(f"metrics ports of {len(pods)} pods blocked, no restart")


def test_a_second_upgrade_ends_the_rollout_and_restarts_no_worker_of_the_new_revision(
    release: Release, traffic: Traffic
) -> None:
    cluster = release.installed.cluster
    workers, old = release.workers("r2"), release.workers("r1")
    release.rollout("set", "r2=100")
    assert set(traffic.wait_for_answers(100)) == {"r2"}
    router = cluster.pods("router")[0]
    wait_until(lambda: release.status(router)[0]["running"] == 0, 60, "no request of r1 runs")
    gone = len(cluster.exits)
    release.values = {key: value for key, value in release.values.items() if key != "canary"}
    release.upgrade(NEW)
    assert release.workers("r2") == workers
    assert release.workers("r1") == {}
    assert len(cluster.exits) == gone + len(old) + 2, "the workers of r1, and the routers before"
    assert {code for _, code in cluster.exits} == {0}, "all pods that have left, since the first upgrade"
    assert set(traffic.wait_for_answers(100)) == {"r2"}
    if (missing := REQUESTS - len(traffic.answers)) > 0:
        traffic.wait_for_answers(missing)
    traffic.stop()
    traffic.report("second upgrade")
    assert len(traffic.answers) >= REQUESTS


def test_probes_over_http_cost_less_than_commands(release: Release) -> None:
    """Prints what both cost per pod and minute: the kubelet asks for readiness 6 times, and for liveness 2 times."""
    cluster, times = release.installed.cluster, 100
    for component in ("router", "prefill", "decode"):
        pod = cluster.pods(component)[0]
        ports = {port["name"]: port["containerPort"] for port in pod.spec["containers"][0]["ports"]}
        health = f"overfill health --address 127.0.0.1:{ports['grpc']}"
        command = sum(command_cpu(cluster.execute(pod, "sh", "-c", f"{health}{flag} && times")) * count
                      for flag, count in (("", 6), (" --live", 2)))  # fmt: skip
        before, began = process_cpu(release, pod), time.monotonic()
        for path in ["/readyz"] * (times * 3 // 4) + ["/livez"] * (times // 4):
            assert probe(pod.address, ports["probes"], path)[0] == 200
        used, took = process_cpu(release, pod) - before, time.monotonic() - began
        idle = process_cpu(release, pod)
        time.sleep(took)  # what the process needs without probes
        used -= process_cpu(release, pod) - idle
        over_http = 8 * max(0.0, used) / times
        print(f"{component}: CPU per pod and minute: {command:.2f} s by command, {over_http:.4f} s over HTTP")
        assert over_http < command


def fill(volume: Path, pairs: dict[str, Path]) -> None:
    """Copy the pairs into the claim, so that other users may read them."""
    for name, pair in pairs.items():
        shutil.copytree(pair, volume / name)
    for path in volume.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def role_secret(folder: Path, role: Role) -> dict[str, bytes]:
    """Return the files of a role's secret."""
    files = certificates.role_files(folder, role)
    return {"tls.crt": files.cert.read_bytes(), "tls.key": files.key.read_bytes(), "ca.crt": files.ca.read_bytes()}


def replace_client(installed: Installation, secret: dict[str, bytes]) -> None:
    """Replace the files of the clients."""
    for file, key in ((installed.tls.ca, "ca.crt"), (installed.tls.key, "tls.key"), (installed.tls.cert, "tls.crt")):
        new = Path(f"{file}.new")
        new.write_bytes(secret[key])
        new.replace(file)


def wait_until_shown(pod: Pod, certificate: bytes) -> None:
    """Wait until the pod shows a certificate, in DER, at its ports for gRPC and for probes."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2", "http/1.1"])

    def shown(port: int) -> bool:
        # TLS 1.3 lets a client end its handshake before the server refuses it for having no certificate.
        with (
            suppress(OSError),
            socket.create_connection((pod.address, port), timeout=10) as plain,
            context.wrap_socket(plain) as connection,
        ):
            return connection.getpeercert(binary_form=True) == certificate
        return False

    for port in pod.spec["containers"][0]["ports"]:
        if port["name"] in ("grpc", "probes"):
            number = port["containerPort"]
            wait_until(lambda number=number: shown(number), 60, f"{pod.name}:{number} shows the certificate")


def scrape(installed: Installation, pod: Pod, timeout: float = 30) -> bytes:
    """Return the pod's metrics, as Prometheus asks for them. Raises OSError if there is no answer."""
    folder = installed.folder / "renewed"
    context = ssl.create_default_context(cafile=str(folder / "peers-ca.crt"))
    context.load_cert_chain(folder / "scraper.crt", folder / "scraper.key")
    connection = http.client.HTTPConnection(pod.address)
    with closing(connection):
        plain = socket.create_connection((pod.address, 7690), timeout=timeout)
        connection.sock = context.wrap_socket(plain, server_hostname="process.role.overfill.internal")
        connection.request("GET", "/metrics")
        return connection.getresponse().read()


def command_cpu(printed: str) -> float:
    """Return the CPU seconds of a shell's children, from the second line that its `times` prints."""
    parts = printed.splitlines()[-1].split()
    return sum(60 * int(minutes) + float(rest.rstrip("s")) for minutes, rest in (part.split("m") for part in parts))


def process_cpu(release: Release, pod: Pod) -> float:
    """Return the CPU seconds of the pod's process until now."""
    fields = release.installed.cluster.execute(pod, "cat", "/proc/1/stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100  # utime and stime, in ticks
