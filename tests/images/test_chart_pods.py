"""Tests that the chart's pods run as rendered: requests, upgrades, failures, and what a wrong installation says.

The pods run in podman, on one machine; ``kube.py`` says what it does in place of Kubernetes, and what it leaves out.
"""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from charts import of_kind, render, tls_secrets
from installations import KEY, KEYS, PAIRS, RELEASE, STARTUP, TLS, Installation, installation, joins, prepared_cluster
from kube import Cluster, Pod
from runtime import PREFIX, need
from stacks import wait_until

from overfill.cli.main import main
from overfill.client import SamplingParams
from overfill.pair.store import resolve_pair

pytestmark = [pytest.mark.images, pytest.mark.timeout(900)]

ANOTHER = f"{PREFIX}another-tls"
GREEDY = SamplingParams(max_tokens=8, temperature=0.0)
CPU_VALUES = (
    "pair.claim.path=identity",
    f"pair.claim.name={PAIRS}",
    f"tls.secretPrefix={TLS}",
    f"apiKeys.secretName={KEYS}",
    f"test.apiKeySecretName={KEY}",
    "prefill.threads=1",
    "decode.threads=1",
)
"""Names that values-cpu.yaml leaves to its user, a pair that is prepared in seconds, threads for a small machine."""


@pytest.fixture(scope="module")
def prepared(images: dict[str, str], folder: Path) -> Iterator[Cluster]:
    need("podman")
    pair = resolve_pair("identity")
    with prepared_cluster(folder, lambda volume: fill(volume, pair)) as made:
        yield made


def fill(volume: Path, pair: Path) -> None:
    """Copy the pair, and once more into a folder that only root can read."""
    for name, mode in (("identity", 0o755), ("closed", 0o700)):
        # Follows links, because a named pair links to its model.
        copy = ["cp", "--recursive", "--dereference", "--reflink=auto"]
        subprocess.run([*copy, pair, volume / name], check=True)
        (volume / name).chmod(mode)


@pytest.fixture(scope="module")
def installed(prepared: Cluster, folder: Path) -> Installation:
    return installation(prepared, render("values-cpu.yaml", *CPU_VALUES, release=RELEASE), folder)


class Load:
    """Requests over gRPC and HTTP on three threads, each to a router that is ready. None may fail."""

    def __init__(self, installation: Installation) -> None:
        self._installation = installation
        self._stopping = threading.Event()
        self.answers: list[str] = []
        self.failures: list[str] = []
        calls = (self._grpc, self._grpc, self._http)
        self._threads = [threading.Thread(target=self._run, args=[call], daemon=True) for call in calls]
        for thread in self._threads:
            thread.start()

    def _run(self, call) -> None:
        for number in itertools.count():
            if self._stopping.is_set():
                return
            self._stopping.wait(0.5)  # leaves time to the pods that start
            try:
                self.answers.append(call(f"Name {number % 5 + 2} colours of the sky."))
            except Exception as error:
                self.failures.append(repr(error))

    def _grpc(self, prompt: str) -> str:
        with self._installation.client() as client:
            return client.generate(prompt, sampling=SamplingParams(max_tokens=24, temperature=0.0), timeout=60).text

    def _http(self, prompt: str) -> str:
        body = {"model": "identity", "prompt": prompt, "max_tokens": 24, "temperature": 0}
        return self._installation.post("/v1/completions", body)["choices"][0]["text"]

    def wait_for_answers(self, count: int) -> None:
        wanted = len(self.answers) + count
        wait_until(lambda: len(self.answers) >= wanted or self.failures, 120, f"{count} more answers")
        assert not self.failures

    def __enter__(self) -> Load:
        self.wait_for_answers(6)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait_for_answers(6)
        self._stopping.set()
        for thread in self._threads:
            thread.join(90)
        print(f"{len(self.answers)} answers, {len(self.failures)} failed")
        assert kind is not None or not self.failures


def test_the_pods_run_as_rendered_and_answer(installed: Installation) -> None:
    pods = installed.cluster.pods()
    print("\n".join(f"{pod.name} {pod.address} ready, {pod.restarts} restarts" for pod in pods))
    print({kind: len(names) for kind, names in installed.cluster.left_out.items()})
    components = sorted(pod.labels["app.kubernetes.io/component"] for pod in pods)
    assert components == ["decode", "decode", "prefill", "prefill", "router", "router"]
    for pod in pods:
        status = installed.cluster.execute(pod, "cat", "/proc/1/status")
        assert "Uid:\t10001\t10001" in status
        assert "CapBnd:\t0000000000000000" in status
        assert "NoNewPrivs:\t1" in status
        mounts = installed.cluster.execute(pod, "cat", "/proc/mounts").splitlines()
        (root,) = (line.split()[3] for line in mounts if line.split()[1] == "/")
        assert root.startswith("ro,")
        assert pod.restarts == 0
    with installed.client() as client:
        assert len(client.generate("Once upon a time, there was", sampling=GREEDY).token_ids) == 8
        assert len(client.status().workers) == 4
    chat = {"model": "identity", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 8, "temperature": 0}
    assert installed.post("/v1/chat/completions", chat)["usage"]["completion_tokens"] == 8


def test_helm_s_test_succeeds(installed: Installation) -> None:
    code, log = installed.cluster.run_test(installed.objects)
    assert code == 0, log


def test_answers_are_the_reference_s(installed: Installation, capsys: pytest.CaptureFixture[str]) -> None:
    questions = installed.folder / "questions.jsonl"
    asked = [f"Question {i}: what comes after {i * 7} blocks of sixteen tokens?" for i in range(4)]
    questions.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in asked))
    made = installed.folder / "overfill"
    arguments = [f"--questions={questions}", "--max-tokens=16", "--pair=identity", f"--api-key={installed.api_key}"]
    arguments += [
        f"--tls-{name}={made / file}"
        for name, file in (("ca", "peers-ca.crt"), ("cert", "client.crt"), ("key", "client.key"))
    ]
    arguments += ["--tls-name=overfill", f"--address={installed.cluster.endpoints(RELEASE)[0]}:7600"]
    code = main(["verify", *arguments])
    output = capsys.readouterr()
    assert code == 0, output.out + output.err
    assert output.out.splitlines()[-1].startswith("4/4 correct")


def test_a_killed_worker_comes_back_and_no_request_fails(installed: Installation) -> None:
    with Load(installed):
        killed = installed.cluster.pods("decode")[0]
        installed.cluster.signal(killed, signal.SIGKILL)
        wait_until(lambda: joins(installed.cluster, killed) == 4, 120, "the restarted worker joins both routers again")


def test_a_rollout_fails_no_request(installed: Installation) -> None:
    before = {pod.name for pod in installed.cluster.pods()}
    installed.cluster.exits.clear()
    again = [f"{component}.podAnnotations.revision=second" for component in ("router", "prefill", "decode")]
    installed.objects = render("values-cpu.yaml", *CPU_VALUES, *again, release=RELEASE)
    with Load(installed):
        installed.cluster.upgrade(installed.objects)
    after = {pod.name for pod in installed.cluster.pods()}
    assert len(after) == 6
    assert not after & before
    assert [code for _, code in installed.cluster.exits] == [0] * 6


def test_a_process_that_hangs_is_restarted(installed: Installation) -> None:
    hung = installed.cluster.pods("prefill")[0]
    before = joins(installed.cluster, hung)
    installed.cluster.signal(hung, signal.SIGSTOP)
    wait_until(
        lambda: installed.cluster.run_probes(hung, "livenessProbe") or hung.restarts,
        120,
        "the probe fails often enough",
    )
    wait_until(lambda: joins(installed.cluster, hung) == before + 2, 120, "the new process joins both routers")
    assert hung.restarts == 1


@pytest.fixture
def broken(prepared: Cluster) -> Iterator[Callable[..., Pod]]:
    """Starts one more pod, of a release with wrong settings."""
    started = []

    def start(component: str, *settings: str) -> Pod:
        deployments = of_kind(render("values-cpu.yaml", *CPU_VALUES, *settings, release=RELEASE), "Deployment")
        name = f"{RELEASE}-{component}"
        started.append(prepared.start(name, deployments[name]["spec"]["template"]))
        return started[-1]

    yield start
    for pod in started:
        prepared.remove(pod)


WRONG = {
    "a folder without a pair": ("router", "pair.claim.path=none", "there is no /pair/none/pair.json"),
    "a pair that only root can read": (
        "router",
        "pair.claim.path=closed",
        "user 10001 (groups 10001) may not read /pair/closed",
    ),
    "a secret without the file of keys": (
        "router",
        "apiKeys.secretKey=other.json",
        "cannot read the API keys in /etc/overfill/keys/other.json",
    ),
    "too little memory": (
        "decode",
        "decode.settings.kv-memory=4GiB",
        "exceed the",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_log_says_what_is_wrong(case: str, broken: Callable[..., Pod], installed: Installation) -> None:
    component, setting, says = WRONG[case]
    pod = broken(component, setting)
    wait_until(lambda: says in installed.cluster.log(pod), 120, says)
    assert "Traceback" not in installed.cluster.log(pod)
    assert not pod.ready


def test_a_worker_with_a_certificate_of_another_stack_does_not_become_ready(
    broken: Callable[..., Pod], installed: Installation
) -> None:
    installed.cluster.secret(f"{ANOTHER}-worker", **tls_secrets(installed.folder / "another")["worker"])
    pod = broken("decode", f"tls.secretPrefix={ANOTHER}")
    says = "its certificate is not valid for the authorities in --tls-ca"
    wait_until(lambda: says in installed.cluster.log(pod), 120, says)
    assert installed.cluster.ask_ready(pod) == (503, "the worker has joined no router\n")


def test_a_worker_with_a_router_s_certificate_does_not_start(
    broken: Callable[..., Pod], installed: Installation
) -> None:
    installed.cluster.secret(f"{ANOTHER}-worker", **tls_secrets(installed.folder / "another")["router"])
    pod = broken("decode", f"tls.secretPrefix={ANOTHER}")
    wait_until(lambda: "give one of the role worker" in installed.cluster.log(pod), 120, "it says what to do")


@pytest.mark.parametrize("setting", ["tls.secretPrefix=absent", "pair.claim.name=absent"])
def test_a_pod_without_its_secret_or_claim_does_not_start(
    setting: str, broken: Callable[..., Pod], installed: Installation
) -> None:
    with pytest.raises(AssertionError, match=r"no such secret|persistentvolumeclaim 'absent' not found"):
        broken("router", setting)


def test_the_init_container_makes_the_pair_for_the_trial(prepared: Cluster) -> None:
    """values-small.yaml as it is, except for the pair: the first pod makes it, with a read-only root, as user 10001."""
    for pod in prepared.pods():
        prepared.remove(pod)
    objects = render("values-small.yaml", "pair.named.name=identity", release=RELEASE)
    prepared.apply(objects)
    prepared.wait_ready(STARTUP)
    assert [one.labels["app.kubernetes.io/component"] for one in prepared.pods()].count("router") == 1
    code, log = prepared.run_test(objects)
    assert code == 0, log
