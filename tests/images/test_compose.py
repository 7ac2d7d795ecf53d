"""Tests deploy/compose: starts it as deploy/README.md says, asks, kills, drains, and reads what it says of faults."""

from __future__ import annotations

import json
import os
import re
import signal
import ssl
import stat
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from runtime import PREFIX, ROOT, docker

from overfill.client import Client
from overfill.pair.store import resolve_pair
from overfill.process.home import home
from overfill.request.params import SamplingParams
from overfill.rpc.stack_status import StackStatus
from overfill.rpc.tls import ClientTls
from overfill.version import __version__

pytestmark = [pytest.mark.images, pytest.mark.model, pytest.mark.timeout(900)]

PROJECT = f"{PREFIX}compose"
FILE = ROOT / "deploy" / "compose" / "compose.yaml"
CACHE = f"{PROJECT}_cache"
SERVING = ["router", "prefill", "decode", "decode"]
LONG = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
T = TypeVar("T")


def compose(*arguments: str, check: bool = True) -> str:
    return docker("compose", f"--file={FILE}", *arguments, check=check)


def until(seconds: float, found: Callable[[], T | None]) -> T:
    """Polls for something true, for at most ``seconds``."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.2)
    return value


class ComposeStack:
    """The running stack, and how a user of this machine reaches it."""

    def __init__(self, secrets: Path) -> None:
        self.secrets = secrets

    def inspect(self, service: str) -> list[dict[str, Any]]:
        names = compose("ps", "--all", "--quiet", service).split()
        return [json.loads(docker("inspect", name))[0] for name in names]

    def address(self, service: str, port: int) -> str:
        return compose("port", service, str(port)).strip()

    @property
    def api_key(self) -> str:
        return (self.secrets / "client" / "me.api-key").read_text().strip()

    def client(self) -> Client:
        folder = self.secrets / "client"
        tls = ClientTls(folder / "ca.crt", folder / "tls.crt", folder / "tls.key")
        return Client(self.address("router", 7600), tls=tls, api_key=self.api_key)

    def http(self, body: dict[str, Any], key: str) -> Any:
        request = urllib.request.Request(
            f"https://{self.address('router', 8000)}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
        )
        context = ssl.create_default_context(cafile=self.secrets / "client" / "ca.crt")
        with urllib.request.urlopen(request, timeout=120, context=context) as response:
            return json.load(response)

    def wait_complete(self) -> StackStatus:
        """Waits until the router knows the prefill worker and both decode workers, and all are ready."""
        with self.client() as client:

            def ready() -> StackStatus | None:
                status = client.status()
                return status if [worker.state for worker in status.workers] == ["ready"] * 3 else None

            return until(180, ready)


@pytest.fixture(scope="module")
def project(images: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Names for everything, free ports, and a cache with the default pair. Yields the folder of secrets."""
    pair = resolve_pair("default")
    secrets = tmp_path_factory.mktemp("compose") / "secrets"
    secrets.mkdir()
    prometheus = f"overfill-prometheus:{__version__}"  # built where no registry can be reached
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPOSE_PROJECT_NAME", PROJECT)
        patch.setenv("OVERFILL_IMAGE_PREFIX", images["router"].removesuffix(f"overfill-router:{__version__}"))
        patch.setenv("OVERFILL_SECRETS", str(secrets))
        for port in ("GRPC", "HTTP", "PROMETHEUS"):
            patch.setenv(f"OVERFILL_{port}_PORT", "")
        if prometheus in docker("image", "ls", "--format={{.Repository}}:{{.Tag}}").split():
            patch.setenv("OVERFILL_PROMETHEUS_IMAGE", prometheus)
        try:
            compose("create", "pair")  # and with it the volume
            halves = [folder.relative_to(home()) for folder in (pair, (pair / "full").resolve())]
            in_cache("cd /from && cp --archive --parents " + " ".join(map(str, halves)) + " /to", f"{home()}:/from:ro")
            in_cache("chown -R 10001:10001 /to")
            yield secrets
        finally:
            compose("down", "--volumes", "--timeout=5")


def in_cache(script: str, *volumes: str) -> None:
    """Runs ``script`` as root with the stack's cache in /to."""
    prefix = os.environ["OVERFILL_IMAGE_PREFIX"]
    mounts = [f"--volume={volume}" for volume in (f"{CACHE}:/to", *volumes)]
    root = ["run", "--rm", f"--name={PROJECT}-fill", "--user=0:0", "--network=none", "--entrypoint=sh"]
    docker(*root, *mounts, f"{prefix}overfill-router:{__version__}", "-ec", script)


@pytest.fixture(scope="module")
def stack(project: Path) -> ComposeStack:
    compose("up", "--detach", "--wait", "--scale=decode=2")
    running = ComposeStack(project)
    running.wait_complete()
    return running


def test_every_container_is_healthy_and_confined(stack: ComposeStack) -> None:
    for service in ("router", "prefill", "decode"):
        for container in stack.inspect(service):
            assert container["State"]["Health"]["Status"] == "healthy"
            assert container["Config"]["User"] == "10001:10001"
            script = "id -u; touch /opt/x || touch /var/cache/overfill/x || echo read-only; ls /etc/overfill/secrets"
            said = docker("exec", container["Id"], "sh", "-c", script).split()
            keys = ["keys.json"] * (service == "router")
            assert said == ["10001", "read-only", "ca.crt", *keys, "tls.crt", "tls.key"]
    for service in ("router", "prefill", "decode", "prometheus", "secrets", "pair"):
        for container in stack.inspect(service):
            assert container["HostConfig"]["ReadonlyRootfs"]
            assert container["HostConfig"]["CapDrop"] == ["ALL"]
            assert container["Config"]["User"] != "0:0" or container["HostConfig"]["NetworkMode"] == "none"
            ports = container["HostConfig"]["PortBindings"] or {}
            assert all(one["HostIp"] == "127.0.0.1" for bound in ports.values() for one in bound)


def test_other_users_of_this_machine_read_no_secret(stack: ComposeStack) -> None:
    files = [path for path in stack.secrets.rglob("*") if path.is_file()]
    assert {"authority", "router", "worker", "scraper", "client"} == {file.parent.name for file in files}
    assert [file for file in files if stat.S_IMODE(file.stat().st_mode) & 0o007] == []
    assert {file.stat().st_uid for file in files} == {stack.secrets.stat().st_uid}


def test_requests_over_grpc_and_http(stack: ComposeStack) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    with stack.client() as client:
        answer = client.chat(messages, sampling=SamplingParams(temperature=0, max_tokens=16))
    body = {"model": "default", "messages": messages, "temperature": 0, "max_tokens": 16}
    assert stack.http(body, stack.api_key)["choices"][0]["message"]["content"] == answer.text
    with pytest.raises(urllib.error.HTTPError) as refused:
        stack.http(body, "ofk-none")
    assert refused.value.code == 401
    refused.value.close()


def test_the_readme_s_request_is_answered(stack: ComposeStack) -> None:
    readme = (FILE.parents[1] / "README.md").read_text()
    found = re.search(r"^\$ (curl .*?)\n```", readme, re.DOTALL | re.MULTILINE)
    assert found is not None
    command = found[1].replace("localhost:8000", stack.address("router", 8000))
    done = subprocess.run(command, shell=True, cwd=stack.secrets.parent, capture_output=True, check=True, text=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]


def test_a_further_key_is_made_while_the_stack_runs(stack: ComposeStack) -> None:
    said = compose("run", "--rm", "--no-deps", "secrets", "ci")
    assert said.split() == ["client/ci.api-key", "has", "the", "API", "key", "of", "ci"]
    key = (stack.secrets / "client" / "ci.api-key").read_text().strip()
    body = {"model": "default", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}

    def accepted() -> bool:
        try:
            return bool(stack.http(body, key))
        except urllib.error.HTTPError as error:
            error.close()
            return False

    assert until(30, accepted)
    assert stack.http(body, stack.api_key)  # with the certificates that this run has replaced


def test_prometheus_reads_every_process(stack: ComposeStack) -> None:
    url = f"http://{stack.address('prometheus', 9090)}/api/v1/targets"

    def targets() -> list[dict[str, Any]] | None:
        with urllib.request.urlopen(url, timeout=10) as response:
            found = json.load(response)["data"]["activeTargets"]
        up = [one["labels"]["stage"] for one in found if one["health"] == "up"]
        return found if sorted(up) == sorted(SERVING) else None

    found = until(60, targets)
    assert len({one["scrapeUrl"] for one in found}) == len(SERVING)


def busy_workers(client: Client) -> list[str]:
    """The decode workers that have a running request."""
    processes = {worker.id: worker.process for worker in client.status().workers if worker.stage == "decode"}
    return [name for name, process in processes.items() if process and process.load and process.load.running]


def decode_container(stack: ComposeStack, client: Client) -> dict[str, Any]:
    """The container of the decode worker that answers the one running request."""
    (worker,) = until(30, lambda: busy_workers(client))
    (found,) = (one for one in stack.inspect("decode") if one["Config"]["Hostname"] in worker)
    return found


def test_a_killed_container_comes_back_and_its_request_goes_on_elsewhere(stack: ComposeStack) -> None:
    with stack.client() as client, client.stream("Once upon a time", sampling=LONG) as stream:
        first = next(stream)
        killed = decode_container(stack, client)
        # `docker kill` would count as stopped by hand, after which docker restarts nothing.
        os.kill(killed["State"]["Pid"], signal.SIGKILL)
        tokens = [*first.token_ids, *(token for delta in stream for token in delta.token_ids)]
        assert (stream.answer.migrations, len(tokens)) == (1, 300)
        assert killed["Config"]["Hostname"] not in stream.answer.decode_worker
    stack.wait_complete()
    (again,) = (one for one in stack.inspect("decode") if one["Id"] == killed["Id"])
    assert (again["RestartCount"], again["State"]["Running"]) == (1, True)


def test_sigterm_lets_running_requests_finish(stack: ComposeStack) -> None:
    with stack.client() as client, client.stream("Once upon a time", sampling=LONG) as stream:
        first = next(stream)
        command = ["docker", "compose", f"--file={FILE}", "stop"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as stopping:
            until(30, lambda: client.status().process.draining and busy_workers(client))
            tokens = [*first.token_ids, *(token for delta in stream for token in delta.token_ids)]
            assert (stream.answer.migrations, len(tokens)) == (0, 300)
            stopping.communicate(timeout=120)
    for service in {*SERVING, "prometheus"}:
        assert {container["State"]["ExitCode"] for container in stack.inspect(service)} == {0}


# What is wrong is tried with one container of a service, on its own.


def fault(service: str) -> str:
    """Runs a container of ``service``, which must fail within a minute, and returns the last line of its log."""
    command = ["docker", "compose", f"--file={FILE}", "run", "--rm", "--no-deps", "--no-TTY"]
    command += [f"--name={PROJECT}-fault", service]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    return [line for line in done.stderr.splitlines() if line.strip()][-1]


@pytest.fixture
def secrets(project: Path) -> Path:
    """Secrets that a test may damage: they are made anew for each."""
    compose("run", "--rm", "--no-deps", "secrets")
    return project


@pytest.mark.parametrize("service", ["router", "prefill", "decode"])
def test_a_missing_certificate_is_named(secrets: Path, service: str) -> None:
    (secrets / ("router" if service == "router" else "worker") / "tls.crt").unlink()
    said = fault(service)
    assert "/etc/overfill/secrets/tls.crt: No such file or directory; `overfill certs` makes certificates" in said


def test_a_secret_that_the_user_may_not_read(secrets: Path) -> None:
    (secrets / "router" / "tls.key").chmod(0o600)
    assert "user 10001 (groups 10001) may not read /etc/overfill/secrets/tls.key, whose owner is" in fault("router")


def test_without_a_file_of_api_keys(secrets: Path) -> None:
    (secrets / "router" / "keys.json").unlink()
    said = fault("router")
    assert "make them with `overfill keys create NAME --file /etc/overfill/secrets/keys.json`" in said


@pytest.mark.parametrize("service", ["router", "decode"])
def test_a_pair_that_the_user_may_not_read(project: Path, service: str) -> None:
    in_cache("chown 0:0 /to/pairs && chmod 700 /to/pairs")
    try:
        said = fault(service)
    finally:
        in_cache("chown 10001:10001 /to/pairs && chmod 755 /to/pairs")
    assert "user 10001 (groups 10001) may not read /var/cache/overfill/pairs, whose owner is 0:0" in said


@pytest.mark.parametrize("service", ["router", "decode"])
def test_a_volume_without_a_pair(project: Path, service: str) -> None:
    in_cache("mv /to/pairs /to/elsewhere")
    try:
        said = fault(service)
    finally:
        in_cache("mv /to/elsewhere /to/pairs")
    assert "run `overfill pair path default` where /var/cache/overfill can be written" in said


def test_a_certificate_of_another_role(secrets: Path) -> None:
    for kind in ("crt", "key"):
        (secrets / "router" / f"tls.{kind}").write_bytes((secrets / "worker" / f"tls.{kind}").read_bytes())
    assert "give one of the role router, as `overfill certs` makes it" in fault("router")
