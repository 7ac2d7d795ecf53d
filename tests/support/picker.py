"""A stand-in for the endpoint picker of llm-d's router (v0.10): which pods it takes, how it scrapes, what it reads.

The rules are those of its pod reconciler, role filters, ``metrics-data-source`` and ``core-metrics-extractor``. One
thing differs: an endpoint that lacks a metric is refused. The picker counts an error and keeps the old value.
"""

from __future__ import annotations

import http.client
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

ROLE, ENGINE = "llm-d.ai/role", "llm-d.ai/engine-type"
PREFILLS = {"prefill", "encode-prefill", "prefill-decode", "both", "encode-prefill-decode"}
DECODES = {None, "decode", "prefill-decode", "both", "encode-prefill-decode"}  # None: a pod without a role decodes
TIMEOUT = 30.0  # seconds for a scrape; the picker's is 1 s, too short on a busy machine


class Refused(Exception):
    """The picker gets no load from an endpoint."""


@dataclass(frozen=True)
class Load:
    """What the picker knows of an endpoint."""

    waiting: int
    running: int
    kv_usage: float
    block_size: int
    num_blocks: int


def members(pool: Mapping[str, Any], pods: Mapping[str, Mapping[str, str]]) -> set[str]:
    """Return the names of the pods, given their labels, that an InferencePool's picker may choose for both stages."""
    wanted = pool["spec"]["selector"]["matchLabels"].items()
    return {
        name
        for name, labels in pods.items()
        if wanted <= labels.items() and labels.get(ROLE) in PREFILLS and labels.get(ROLE) in DECODES
    }


def scrape(address: str, certificate: tuple[Path, Path] | None = None, tls: bool = True) -> str:
    """Return an endpoint's page of metrics.

    Args:
        address: host:port.
        certificate: the picker's certificate and key, in PEM.

    Raises:
        Refused: no connection, or an answer other than 200.
    """
    connection: http.client.HTTPConnection
    if tls:
        context = ssl.create_default_context()
        # The picker's default. It connects to pods' addresses, which no certificate names.
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if certificate is not None:
            context.load_cert_chain(*certificate)
        connection = http.client.HTTPSConnection(address, timeout=TIMEOUT, context=context)
    else:
        connection = http.client.HTTPConnection(address, timeout=TIMEOUT)
    try:
        connection.request("GET", "/metrics")  # without Accept, as Go's client
        response = connection.getresponse()
        page = response.read().decode()
    except (OSError, http.client.HTTPException) as error:
        raise Refused(f"{address}: {error}") from error
    finally:
        connection.close()
    if response.status != 200:
        raise Refused(f"{address}: status {response.status}: {page}")
    return page


def load(page: str, labels: Mapping[str, str]) -> Load:
    """Return the load that a page of metrics says.

    Args:
        labels: the pod's labels, which name its engine.

    Raises:
        Refused: a metric is missing, or the stand-in does not know the engine.
    """
    if labels.get(ENGINE, "vllm") != "vllm":
        raise Refused(f"engine {labels[ENGINE]}")
    families: dict[str, Any] = {}
    for family in text_string_to_metric_families(page):
        if family.name in families:
            raise Refused(f"{family.name} is there twice")
        families[family.name] = family

    def first(name: str) -> Any:
        # Of series without timestamps the picker takes the first, whatever its labels.
        found = families.get(f"vllm:{name}")
        if found is None or not found.samples:
            raise Refused(f"there is no vllm:{name}")
        assert len(found.samples) == 1, f"the picker would ignore all but the first series of {name}"
        return found.samples[0]

    blocks = first("cache_config_info").labels
    return Load(
        waiting=int(first("num_requests_waiting").value),
        running=int(first("num_requests_running").value),
        kv_usage=first("kv_cache_usage_perc").value,
        block_size=int(blocks["block_size"]),
        num_blocks=int(blocks["num_gpu_blocks"]),
    )
