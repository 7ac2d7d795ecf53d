"""A release of the chart in podman: secrets and claim that values-cpu.yaml names, and a client's credentials."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from charts import tls_secrets
from kube import NAMESPACE, Cluster, Pod, cluster
from runtime import PREFIX

from overfill.client import Client, ClientTls

RELEASE = f"{PREFIX}chart"
TLS, KEYS, KEY, PAIRS = (f"{PREFIX}{name}" for name in ("tls", "keys", "key", "pairs"))
SERVICE = f"{RELEASE}.{NAMESPACE}.svc"
STARTUP = 240  # seconds


@dataclass
class Installation:
    """The release of values-cpu.yaml, and a client's credentials."""

    cluster: Cluster
    objects: list[dict]
    tls: ClientTls
    api_key: str
    folder: Path

    def client(self, first: int = 0) -> Client:
        """Return a client of the routers that are ready now; it asks the one with index ``first`` first."""
        addresses = self.cluster.endpoints(RELEASE)
        first %= len(addresses)
        ordered = addresses[first:] + addresses[:first]
        return Client(",".join(f"{one}:7600" for one in ordered), tls=self.tls, api_key=self.api_key)

    def post(self, path: str, body: dict, number: int = 0) -> dict:
        """Send an HTTP request to a router that is ready; ``number`` chooses it."""
        addresses = self.cluster.endpoints(RELEASE)
        address = addresses[number % len(addresses)]
        context = ssl.create_default_context(cafile=str(self.tls.ca))
        headers = {"Authorization": f"Bearer {self.api_key}", "Content-Type": "application/json"}
        connection = http.client.HTTPConnection(address)
        plain = socket.create_connection((address, 8000), timeout=60)
        # The certificate is for the name of the stack, not for a pod's address.
        connection.sock = context.wrap_socket(plain, server_hostname="overfill")
        with closing(connection):
            connection.request("POST", path, json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read().decode()
        assert answer.status == 200, text
        return json.loads(text)


@contextmanager
def prepared_cluster(folder: Path, fill: Callable[[Path], object]) -> Iterator[Cluster]:
    """Run a cluster with the secrets and the claim that values-cpu.yaml names; ``fill`` puts pairs into the claim."""
    with cluster(folder) as made:
        for role, files in tls_secrets(folder / "overfill", SERVICE).items():
            made.secret(f"{TLS}-{role}", **files)
        made.secret(KEYS, **{"keys.json": (folder / "keys.json").read_bytes()})
        made.secret(KEY, key=(folder / "key").read_bytes())
        made.claim(PAIRS, fill)
        yield made


def installation(made: Cluster, objects: list[dict], folder: Path) -> Installation:
    """Install a release in a prepared cluster, and wait until its pods are ready."""
    made.apply(objects)
    made.wait_ready(STARTUP)
    files = folder / "overfill"
    tls = ClientTls(files / "peers-ca.crt", files / "client.crt", files / "client.key", "overfill")
    return Installation(made, objects, tls, (folder / "key").read_text(), folder)


def joins(cluster: Cluster, pod: Pod) -> int:
    """Return how often the pod's worker has joined a router, since the pod exists."""
    return cluster.log(pod).count("joined router")
