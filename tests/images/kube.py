"""Runs the chart's rendered objects on this machine: podman plays the pods, and ``Cluster`` what is around them.

``Cluster`` does the work of the parts of Kubernetes that podman has no counterpart of:

* controllers: one pod for each replica; an upgrade with ``maxSurge`` extra pods; Deployments that come and go.
* kubelet: group ownership of volumes (``fsGroup``), files of secrets that change, the three probes, ``preStop``, the
  grace period.
* DNS: every pod of a Service has the Service's names as aliases on the network. ``endpoints`` lists the ready pods.

``LEFT_OUT`` says which kinds of object nothing here plays, and ``REWRITES`` what it changes in a rendered pod.
"""

from __future__ import annotations

import base64
import copy
import ipaddress
import itertools
import json
import os
import random
import shutil
import signal
import string
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from charts import probe as http_probe
from runtime import IMAGES, PREFIX, docker, podman

NAMESPACE = "serving"
NETWORK = f"{PREFIX}chart"
_BRIDGE = "overfill-test0"  # at most 15 characters

LEFT_OUT = {
    "ServiceAccount": "no API server; the pods mount no token",
    "ConfigMap": "only dashboards for Grafana's sidecar; no pod mounts one",
    "PodDisruptionBudget": "nothing evicts pods",
    "NetworkPolicy": "podman's bridge enforces none",
    "PriorityClass": "no scheduler",
    "HorizontalPodAutoscaler": "no autoscaler",
    "ScaledObject": "no operator",
    "PodMonitor": "no operator",
    "PrometheusRule": "no operator",
    "Certificate": "no operator",
}
"""Kind -> why it is not played. The tests of the chart validate these objects against their definitions."""

REWRITES = {
    "Deployment": "becomes one Pod per replica, because podman ignores `replicas` and makes one",
    "status.podIP": "becomes the address that the pod will have, because podman does not know this field",
    "emptyDir": "becomes a folder of the pod's own (hostPath), because podman shares volumes of one name among pods",
}
"""What is changed in a rendered pod -> why."""


@dataclass
class Pod:
    """A pod that podman runs. ``ready`` is what its readiness probe said last."""

    name: str
    spec: dict[str, Any]
    labels: dict[str, str]
    address: str
    ready: bool = False
    deleted: bool = False
    restarts: int = 0
    probes: list[_Probe] = field(default_factory=list)

    @property
    def container(self) -> str:
        """Podman's name of the container; every pod of the chart has one besides init containers."""
        (container,) = self.spec["containers"]
        return f"{self.name}-{container['name']}"


@dataclass
class _Probe:
    kind: str
    path: str
    port: int
    period: float
    timeout: float
    threshold: int
    grace: int
    next: float = 0.0
    failures: int = 0


class Cluster:
    """The pods of one release. Use ``cluster()``, which removes everything at the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (network,) = json.loads(podman("network", "inspect", NETWORK))
        self._addresses = itertools.islice(ipaddress.ip_network(network["subnets"][0]["subnet"]).hosts(), 10, None)
        self._lock = threading.RLock()
        self._pods: list[Pod] = []
        self._deployments: dict[str, dict[str, Any]] = {}
        self._services: dict[str, dict[str, Any]] = {}
        self._secrets: set[str] = set()
        self._claims: set[str] = set()
        self._stopping = threading.Event()
        self._kubelet = threading.Thread(target=self._probe_all, name="kubelet", daemon=True)
        self._prober = ThreadPoolExecutor(2, "probe")
        self.left_out: dict[str, list[str]] = {}
        self.exits: list[tuple[str, int]] = []
        """Container and exit code of each deleted pod."""

    # Objects

    def claim(self, name: str, fill: Callable[[Path], object] = lambda folder: None) -> None:
        """Make a claim with a volume, as an administrator or a storage class does; ``fill`` puts files into it."""
        podman("volume", "create", name)
        self._claims.add(name)
        # At its first use, podman would give the volume the owner of the image's folder.
        run = ["run", "--rm", "--network=none", "--user=0", f"--volume={name}:/v", "--entrypoint=true"]
        podman(*run, f"localhost/{IMAGES['router']}")
        folder = self._volume(name)
        os.chown(folder, 0, 0)
        folder.chmod(0o755)
        fill(folder)

    def secret(self, name: str, **values: bytes) -> None:
        """Make a secret, as a user does with ``kubectl create secret``."""
        data = {key: base64.b64encode(value).decode() for key, value in values.items()}
        self._play_secret({"metadata": {"name": name}, "data": data})

    def replace_secret(self, name: str, **values: bytes) -> None:
        """Change a secret, also in running pods: the kubelet replaces all files at once, by one link."""
        self.secret(name, **values)  # for pods that start later
        root = self._volume(name)
        version = root / f"..{time.monotonic_ns()}"
        version.mkdir(mode=0o750)
        for key, value in values.items():
            (version / key).write_bytes(value)
            (version / key).chmod(0o440)
        for path in (version, *version.iterdir()):
            os.chown(path, -1, root.stat().st_gid)
        _link(root / "..data", version.name)
        for key in values:
            if not (root / key).is_symlink():
                _link(root / key, f"..data/{key}")

    def apply(self, objects: list[dict[str, Any]]) -> None:
        """Create the objects of a release. Returns when every pod has started; ``wait_ready`` waits for the probes."""
        self.left_out = {}
        for one in objects:
            kind, name = one["kind"], one["metadata"]["name"]
            if kind == "Secret":
                self._play_secret(one)
            elif kind == "PersistentVolumeClaim":
                self.claim(name)
            elif kind == "Service":
                self._services[name] = one["spec"]
            elif kind not in ("Deployment", "Pod"):
                assert kind in LEFT_OUT, f"{kind} is neither played nor listed in LEFT_OUT"
                self.left_out.setdefault(kind, []).append(name)
        if not self._kubelet.is_alive():
            self._kubelet.start()
        self._deployments = {}
        self.upgrade(objects)

    def run_test(self, objects: list[dict[str, Any]]) -> tuple[int, str]:
        """Run the pod of ``helm test``. Returns its exit code and log."""
        (rendered,) = [one for one in objects if one["kind"] == "Pod"]
        pod = self._create(rendered["metadata"]["name"], rendered)
        podman("pod", "start", pod.name)
        code = int(podman("wait", pod.container))
        log = self.log(pod)
        self.remove(pod)
        return code, log

    def upgrade(self, objects: list[dict[str, Any]]) -> None:
        """Do what an upgrade of the release does with Deployments, all of them at the same time.

        Pods whose template has changed are replaced, one after the other. New Deployments start, Deployments that are
        missing in ``objects`` lose their pods, and others get the number of pods that they name.
        """
        before = self._deployments
        self._deployments = {one["metadata"]["name"]: one["spec"] for one in objects if one["kind"] == "Deployment"}
        gone = {name: before[name] | {"replicas": 0} for name in before.keys() - self._deployments.keys()}

        def change(name: str, spec: dict[str, Any]) -> None:
            if name in before and before[name]["template"] != spec["template"]:
                self._roll(name, spec)
            self._scale(name, spec)

        wanted = self._deployments | gone
        with ThreadPoolExecutor(len(wanted)) as changing:
            list(changing.map(change, wanted, wanted.values()))

    # Pods

    def pods(self, component: str = "") -> list[Pod]:
        """Return the pods that are not being deleted, of one component or of all."""
        with self._lock:
            return [
                pod
                for pod in self._pods
                if not pod.deleted and component in ("", pod.labels["app.kubernetes.io/component"])
            ]

    def endpoints(self, service: str) -> list[str]:
        """Return the addresses to which a Service sends connections: those of its ready pods."""
        return [pod.address for pod in self.pods() if pod.ready and _selects(self._services[service], pod)]

    def wait_ready(self, timeout: float) -> None:
        """Wait until every pod is ready."""
        until = time.monotonic() + timeout
        while not all(pod.ready for pod in self.pods()):
            late = [pod for pod in self.pods() if not pod.ready]
            logs = "\n".join(f"--- {pod.name}, {pod.restarts} restarts\n{self.log(pod)[-3000:]}" for pod in late)
            assert time.monotonic() < until, f"not ready within {timeout} s:\n{logs}"
            time.sleep(0.5)

    def log(self, pod: Pod, container: str = "") -> str:
        """Return what a container has written, to stdout and stderr."""
        path = podman("inspect", "--format={{.HostConfig.LogConfig.Path}}", container or pod.container).strip()
        # Each line is: time, stream, F or P (a part of a line), text.
        parts = [line.split(" ", 3) for line in Path(path).read_text().splitlines()]
        return "".join(part[3] + "\n" * (part[2] == "F") for part in parts if len(part) == 4)

    def execute(self, pod: Pod, *command: str) -> str:
        """Run a command in the pod's container and return what it prints."""
        return podman("exec", pod.container, *command)

    def signal(self, pod: Pod, number: signal.Signals) -> None:
        """Send a signal to the container's process. If it ends, podman starts it again, as the kubelet does."""
        # After `podman kill`, podman would not start it again.
        os.kill(int(podman("inspect", "--format={{.State.Pid}}", pod.container)), number)

    @contextmanager
    def blocked(self, pod: Pod, port: int) -> Iterator[None]:
        """Drop all packets to a port of the pod."""
        rule = ["INPUT", "-p", "tcp", "--dport", str(port), "-j", "DROP"]
        inside = ["nsenter", f"--target={podman('inspect', '--format={{.State.Pid}}', pod.container).strip()}", "--net"]
        subprocess.run([*inside, "iptables", "-A", *rule], check=True)
        try:
            yield
        finally:
            subprocess.run([*inside, "iptables", "-D", *rule], check=True)

    def delete(self, pod: Pod) -> None:
        """Delete a pod: it leaves its Services, runs ``preStop``, and gets SIGTERM; after its grace, SIGKILL."""
        with self._lock:
            pod.deleted, pod.ready = True, False
        hook = pod.spec["containers"][0].get("lifecycle", {}).get("preStop", {}).get("exec")
        if hook:
            podman("exec", pod.container, *hook["command"])
        # `podman pod stop` would take the pod's network away first, so that running requests would hang.
        podman("stop", f"--time={pod.spec['terminationGracePeriodSeconds']}", pod.container, timeout=1200)
        self.exits.append((pod.container, int(podman("inspect", "--format={{.State.ExitCode}}", pod.container))))
        self.remove(pod)

    def close(self) -> None:
        """Remove pods, volumes and secrets."""
        self._stopping.set()
        if self._kubelet.is_alive():
            self._kubelet.join()
        self._prober.shutdown()
        for pod in list(self._pods):
            self.remove(pod)
        for name in self._secrets:
            podman("secret", "rm", name, check=False)
        for name in self._claims | self._secrets:  # podman makes a volume of each secret that a pod mounts
            podman("volume", "rm", "--force", name, check=False)

    def _play_secret(self, secret: dict[str, Any]) -> None:
        # Without a network, podman would make one of its own.
        self._play({"apiVersion": "v1", "kind": "Secret", **secret}, f"--network={NETWORK}")
        self._secrets.add(secret["metadata"]["name"])

    def _play(self, document: dict[str, Any], *arguments: str) -> None:
        path = self._folder / f"{document['kind']}-{document['metadata']['name']}.yaml".lower()
        path.write_text(yaml.safe_dump(document))
        podman("kube", "play", *arguments, str(path))

    def start(self, deployment: str, template: dict[str, Any]) -> Pod:
        """Start one more pod of a Deployment; returns when its init containers have ended."""
        ending = "".join(random.choices(string.ascii_lowercase, k=5))
        pod = self._create(f"{deployment}-{ending}", template)
        podman("pod", "start", pod.name, timeout=1200)  # runs the init containers to their end
        pod.probes = _probes(pod.spec["containers"][0])
        return pod

    def _create(self, name: str, template: dict[str, Any]) -> Pod:
        spec = copy.deepcopy(template["spec"])
        pod = Pod(name, spec, template["metadata"]["labels"], str(next(self._addresses)))
        for container in spec["containers"]:
            for variable in container["env"]:
                if variable.get("valueFrom", {}).get("fieldRef") == {"fieldPath": "status.podIP"}:
                    del variable["valueFrom"]
                    variable["value"] = pod.address
        for volume in spec["volumes"]:
            if "emptyDir" in volume:
                folder = self._folder / "pods" / name / volume["name"]
                folder.mkdir(parents=True)
                del volume["emptyDir"]
                volume["hostPath"] = {"path": str(folder), "type": "Directory"}
            elif claim := volume.get("persistentVolumeClaim"):
                # Podman would make an empty volume.
                assert claim["claimName"] in self._claims, f"persistentvolumeclaim {claim['claimName']!r} not found"
        with self._lock:
            self._pods.append(pod)
        metadata = {"name": name, "labels": pod.labels, "annotations": template["metadata"].get("annotations", {})}
        document = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
        names = [
            alias
            for service, wanted in self._services.items()
            if _selects(wanted, pod)
            for alias in (service, f"{service}.{NAMESPACE}", f"{service}.{NAMESPACE}.svc")
        ]
        options = ",".join([f"ip={pod.address}", *(f"alias={alias}" for alias in names)])
        self._play(document, f"--network={NETWORK}:{options}", "--start=false")
        self._set_groups(pod)
        return pod

    def _set_groups(self, pod: Pod) -> None:
        """Apply ``fsGroup``, as the kubelet does: to all volumes except claims that are mounted read-only."""
        group = pod.spec["securityContext"]["fsGroup"]
        for volume in pod.spec["volumes"]:
            if "hostPath" in volume:
                root, write = Path(volume["hostPath"]["path"]), 0o2777
            elif "secret" in volume:
                root, write = self._volume(volume["secret"]["secretName"]), 0o2750
            elif not volume["persistentVolumeClaim"].get("readOnly"):
                root, write = self._volume(volume["persistentVolumeClaim"]["claimName"]), 0o2775
            else:
                continue
            if root.stat().st_gid != group:
                for path in [root, *root.rglob("*")]:
                    os.chown(path, -1, group, follow_symlinks=False)
            root.chmod(write)

    def _volume(self, name: str) -> Path:
        return Path(podman("volume", "inspect", "--format={{.Mountpoint}}", name).strip())

    def remove(self, pod: Pod) -> None:
        """Remove a pod at once."""
        pod.deleted = True
        podman("pod", "rm", "--force", "--time=0", pod.name, check=False)
        shutil.rmtree(self._folder / "pods" / pod.name, ignore_errors=True)
        with self._lock:
            self._pods.remove(pod)

    def _roll(self, name: str, spec: dict[str, Any]) -> None:
        assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}, "others are not implemented"
        olds = self._pods_of(name)
        with ThreadPoolExecutor(len(olds)) as deleting:
            gone = []
            for old in olds:
                new = self.start(name, spec["template"])
                until = time.monotonic() + spec.get("progressDeadlineSeconds", 600)
                while not new.ready:
                    assert time.monotonic() < until, f"{new.name} does not become ready:\n{self.log(new)}"
                    time.sleep(0.5)
                gone.append(deleting.submit(self.delete, old))
            for one in gone:
                one.result()

    def _scale(self, name: str, spec: dict[str, Any]) -> None:
        pods = self._pods_of(name)
        missing, surplus = spec["replicas"] - len(pods), pods[spec["replicas"] :]
        with ThreadPoolExecutor(max(missing, len(surplus), 1)) as changing:
            changes = [changing.submit(self.start, name, spec["template"]) for _ in range(missing)]
            for one in changes + [changing.submit(self.delete, pod) for pod in surplus]:
                one.result()

    def _pods_of(self, deployment: str) -> list[Pod]:
        return [pod for pod in self.pods() if pod.name.rpartition("-")[0] == deployment]

    # Probes

    def _probe_all(self) -> None:
        while not self._stopping.wait(0.2):
            now = time.monotonic()
            due = [(pod, probe) for pod in self.pods() for probe in _due(pod, now)]
            for _ in self._prober.map(lambda one: self._probe(*one), due):
                pass

    def ask_ready(self, pod: Pod) -> tuple[int, str]:
        """Return status and body of the readiness probe's response."""
        (probe,) = (probe for probe in _probes(pod.spec["containers"][0]) if probe.kind == "readinessProbe")
        return http_probe(pod.address, probe.port, probe.path)

    def run_probes(self, pod: Pod, *kinds: str) -> None:
        """Run the pod's probes now, all of them or those of some kinds, instead of at their next time."""
        for probe in pod.probes:
            if not kinds or probe.kind in kinds:
                self._probe(pod, probe)

    def _probe(self, pod: Pod, probe: _Probe) -> None:
        probe.next = time.monotonic() + probe.period
        succeeded = False
        with suppress(OSError):
            succeeded = http_probe(pod.address, probe.port, probe.path, probe.timeout)[0] < 400
        probe.failures = 0 if succeeded else probe.failures + 1
        failed = probe.failures >= probe.threshold
        with self._lock:
            if pod.deleted:
                return
            if probe.kind == "startupProbe" and succeeded:
                pod.probes = [one for one in pod.probes if one is not probe]
            elif probe.kind == "readinessProbe" and (succeeded or failed):
                pod.ready = succeeded
        if failed and probe.kind != "readinessProbe":
            pod.restarts += 1
            pod.ready = False
            podman("restart", f"--time={probe.grace}", pod.container, check=False)
            pod.probes = _probes(pod.spec["containers"][0])


def _probes(container: dict[str, Any]) -> list[_Probe]:
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    made = []
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        given = container[kind]
        wanted = given["httpGet"]
        assert wanted["scheme"] == "HTTPS", "others are not implemented"
        limits = (given["periodSeconds"], given["timeoutSeconds"], given["failureThreshold"])
        grace = given.get("terminationGracePeriodSeconds", 0)
        made.append(_Probe(kind, wanted["path"], ports[wanted["port"]], *limits, grace))
    return made


def _due(pod: Pod, now: float) -> list[_Probe]:
    """Return the probes of a pod whose time has come. Until the startup probe has succeeded, no other runs."""
    starting = [probe for probe in pod.probes if probe.kind == "startupProbe"]
    return [probe for probe in starting or pod.probes if probe.next <= now]


def _link(path: Path, target: str) -> None:
    """Make ``path`` a symbolic link, in place of what it is, in one step."""
    new = path.with_name(f"..{path.name}-new")
    new.symlink_to(target)
    new.rename(path)


def _selects(service: dict[str, Any], pod: Pod) -> bool:
    return all(pod.labels.get(key) == value for key, value in service["selector"].items())


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Run a ``Cluster`` on a network of its own, with the images of docker's store; remove all of it at the end.

    Args:
        folder: a new folder, for manifests and the pods' volumes. User 10001 must be able to reach it.
    """
    _load(*(IMAGES[target] for target in ("router", "prefill", "decode")))
    podman("network", "create", f"--interface-name={_BRIDGE}", NETWORK)
    # Docker drops what it does not forward itself, so that pods could not download anything.
    docker_drops = subprocess.run(["iptables", "-S", "DOCKER-USER"], capture_output=True, check=False).returncode == 0
    rules = [["DOCKER-USER", way, _BRIDGE, "-j", "ACCEPT"] for way in ("-i", "-o")] if docker_drops else []
    running = Cluster(folder)
    try:
        for rule in rules:
            subprocess.run(["iptables", "-I", *rule], check=True)
        yield running
    finally:
        running.close()
        for rule in rules:
            subprocess.run(["iptables", "-D", *rule], check=False)
        podman("network", "rm", NETWORK)


def _load(*images: str) -> None:
    """Copy images from docker's store to podman's, unless they are there."""
    found = {image: docker("images", "--quiet", "--no-trunc", image).strip() for image in images}
    there = podman("images", "--quiet", "--no-trunc", *(f"--filter=reference=localhost/{image}" for image in images))
    if set(there.split()) != set(found.values()):
        with TemporaryDirectory() as folder:
            docker("save", "--output", f"{folder}/images.tar", *images)
            podman("load", "--input", f"{folder}/images.tar")
        for image, id in found.items():
            podman("tag", id, f"localhost/{image}")
