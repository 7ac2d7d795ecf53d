"""Tests that the services start with exactly the commands that the chart renders, and that its probes succeed."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import forked
import pytest
from charts import ROOT, VALUES, pods, probe, render, tls_secrets
from stacks import ForkedChild, wait_until

from overfill.api import key_file as keyfile
from overfill.client import Client, ClientTls, PermissionDenied, SamplingParams, Unauthenticated
from overfill.settings.config import SERVICES, RouterConfig
from overfill.stack.child import Child, stop
from overfill.stack.ports import free_ports

PROGRAMS = {
    "overfill-router": ["services.router.main"],
    "overfill-prefill": ["services.prefill.main"],
    "overfill-decode": ["services.decode.main"],
    "overfill": ["overfill.cli.main"],
}
METRICS, PROBES = 7690, 7691
ROLES = {"router": "router", "test": "client"}


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with those of the chart's TLS secrets."""
    folder = tmp_path_factory.mktemp("tls")
    for role, files in tls_secrets(folder / "made").items():
        (folder / f"overfill-tls-{role}").mkdir()
        for name, data in files.items():
            (folder / f"overfill-tls-{role}" / name).write_bytes(data)
    return folder


class LocalCluster:
    """Stands in for a cluster: replaces pods' ports by free ones of this machine, and their paths by the test's."""

    def __init__(self, pair: Path, tls: Path, folder: Path, keys: Path | None = None) -> None:
        self._folder = folder
        self._tls = tls
        self._words = {"/pair/link": str(pair), "/kv/": f"{folder}/", "0.0.0.0": "127.0.0.1"}
        if keys is not None:
            self._words["/etc/overfill/keys/keys.json"] = str(keys)
        self._words["dns:///overfill-routers.serving.svc"] = "localhost"
        self._ports: dict[tuple[str, int], int] = {}
        self.lines: list[str] = []

    def port(self, component: str, port: int) -> int:
        """Return this machine's port for a pod's port. All components find routers and workers under the same ports."""
        owner = component if port in (METRICS, PROBES, 8000) else ""
        if (owner, port) not in self._ports:
            (self._ports[owner, port],) = free_ports("127.0.0.1", 1)
        return self._ports[owner, port]

    def command(self, component: str, container: dict, argv: list[str]) -> tuple[list[str], dict[str, str]]:
        """Return ``argv`` and environment of a container, with this machine's paths and ports."""
        env = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "POD_IP": "127.0.0.1",
            "POD_NAME": f"{component}-x7",
        }
        for variable in container["env"]:
            if "value" in variable:
                env[variable["name"]] = self._here(component, variable["value"])
        env["OVERFILL_HOME"] = str(self._folder)
        # Kubernetes expands $(NAME) in the same way.
        words = [re.sub(r"\$\((\w+)\)", lambda match: env[match[1]], self._here(component, word)) for word in argv]
        return [sys.executable, "-m", *PROGRAMS[words[0]], *words[1:]], env

    def _here(self, component: str, word: str) -> str:
        secret = f"overfill-tls-{ROLES.get(component, 'worker')}"
        word = word.replace("/etc/overfill/tls", str(self._tls / secret))
        for there, here in self._words.items():
            word = word.replace(there, here)
        port = r"\b(760[012]|769[01]|8000)\b"
        return re.sub(port, lambda match: str(self.port(component, int(match[1]))), word)

    def start(self, component: str, pod: dict) -> Child:
        (container,) = pod["containers"]
        command, env = self.command(component, container, [*container["command"], *container["args"]])
        return ForkedChild(component, command, env, lambda name, line: self.lines.append(f"{name} | {line}"))

    def succeeds(self, component: str, pod: dict, kind: str) -> bool:
        """Do a probe as the kubelet does."""
        (container,) = pod["containers"]
        wanted = container[kind]["httpGet"]
        assert (wanted["scheme"], wanted["port"]) == ("HTTPS", "probes")
        try:
            return probe("127.0.0.1", self.port(component, PROBES), wanted["path"])[0] == 200
        except OSError:
            return False


@contextmanager
def running(machine: LocalCluster, specs: dict[str, dict]) -> Iterator[dict[str, Child]]:
    children = {}
    try:
        for component in ("router", "prefill", "decode"):
            children[component] = machine.start(component, specs[component])
        yield children
    except BaseException:
        print("\n".join(machine.lines))
        raise
    finally:
        stop(children.values(), 20)


# Settings for the tiny pair and a machine without a GPU; all others stay as rendered.
HERE = tuple(
    f"{stage}.settings.{setting}"
    for stage in ("prefill", "decode")
    for setting in ("dtype=float32", "kv-memory=8MiB", "max-model-len=512")
)


def test_the_rendered_commands_make_a_stack(tiny_pair: Path, tls: Path, tmp_path: Path) -> None:
    specs = pods(render("values-small.yaml", *HERE, "apiKeys.secretName=keys", "prefill.kvDisk.size=1Gi"))
    keys = tmp_path / "keys.json"
    api_key = keyfile.create(keys, "test")
    machine = LocalCluster(tiny_pair, tls, tmp_path, keys)
    with running(machine, specs) as children:

        def alive_and(kind: str) -> bool:
            assert all(child.returncode is None for child in children.values()), "\n".join(machine.lines)
            return all(machine.succeeds(component, specs[component], kind) for component in children)

        wait_until(lambda: alive_and("startupProbe"), 120, "startup probes succeed", pause=0.5)
        wait_until(
            lambda: alive_and("readinessProbe"), 60, "readiness probes succeed, once the workers have joined", pause=0.5
        )
        assert alive_and("livenessProbe")
        address = f"127.0.0.1:{machine.port('', 7600)}"
        of_pods, of_clients = (
            ClientTls(folder / "ca.crt", folder / "tls.crt", folder / "tls.key", "overfill")
            for folder in (tls / "overfill-tls-router", tls / "overfill-tls-client")
        )
        with Client(address, tls=of_pods) as pod:
            assert pod.status().process is not None, "as the notes tell operators to ask"
            with pytest.raises(PermissionDenied, match="client or operator"):
                pod.generate([20, 21, 22])
        with Client(address, tls=of_clients) as stranger, pytest.raises(Unauthenticated, match="API key"):
            stranger.generate([20, 21, 22])
        with Client(address, tls=of_clients, api_key=api_key) as client:
            with pytest.raises(PermissionDenied, match="operator or router"):
                client.drain("decode-x7")
            wait_until(lambda: {w.id for w in client.status().workers} == {"prefill-x7", "decode-x7"}, 60, "both join")
            prompt = [20, 21, 22] * 12
            answer = client.generate(prompt, sampling=SamplingParams(max_tokens=4, temperature=0.0), timeout=60)
        assert len(answer.token_ids) == 4
        wait_until(lambda: [*tmp_path.glob("overfill/*/*-*")], 60, "the prefill worker saves the prompt's KV")
        # The command of `helm test` without its prompt, because the tiny pair has no tokenizer.
        (container,) = specs["test"]["containers"]
        first = container["command"][2].partition(";")[0]
        command, env = machine.command("test", container, shlex.split(first))
        env["OVERFILL_ADDRESS"] = f"localhost:{machine.port('', 7600)}"
        env["OVERFILL_API_KEY"] = api_key
        status, output = forked.run(*command[2:], env=env)
        assert status == 0, output
        for child in children.values():
            os.kill(child.pid, 15)
        wait_until(lambda: all(child.returncode == 0 for child in children.values()), 30, "all drain and exit 0")


@pytest.mark.parametrize("values", VALUES)
def test_the_services_take_every_rendered_flag(values: str) -> None:
    kinds = {kind.section: kind for kind in SERVICES}
    for component, pod in pods(render(values)).items():
        if component in kinds:
            argv = [argument.replace("$(POD_IP)", "10.1.2.3") for argument in pod["containers"][0]["args"]]
            config = kinds[component].parse(argv)
            assert config.host == "0.0.0.0"
            assert len(argv) == len({word.partition("=")[0] for word in argv}), "a flag is repeated"


def test_the_variables_of_kubernetes_services_would_be_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """This is why pods have no service links: the variables of the service ``overfill-router`` break routers."""
    monkeypatch.setenv("OVERFILL_ROUTER_PORT_7600_TCP", "tcp://10.0.0.1:7600")
    with pytest.raises(SystemExit):
        RouterConfig.parse(["--pair", "p"])
    assert "OVERFILL_ROUTER_PORT_7600_TCP: no such setting" in capsys.readouterr().err
