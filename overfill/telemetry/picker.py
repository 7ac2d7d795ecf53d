"""Gauges of a router under vLLM's names, for the endpoint picker of a Kubernetes gateway.

llm-d's picker (``core-metrics-extractor``) reads them from pods whose label ``llm-d.ai/engine-type`` is ``vllm``. It
reads only one series of each metric, so each has one, over all tiers. docs/how-to/gateway.md explains their use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from overfill.telemetry.metric_set import Spec

WAITING = Spec("vllm:num_requests_waiting", "gauge", "Requests in the router's queue.", {})
RUNNING = Spec("vllm:num_requests_running", "gauge", "Requests of this router that run on workers.", {})
KV_USAGE = Spec(
    "vllm:kv_cache_usage_perc",
    "gauge",
    "Used share of the KV blocks of all decode workers, 0 to 1. It is the same at every router.",
    {},
)
CACHE_CONFIG = Spec(
    "vllm:cache_config_info",
    "gauge",
    "Tokens per KV block, and number of blocks, of the workers that prefill. Always 1; absent before they report.",
    {"block_size": (), "num_gpu_blocks": ()},
)
SPECS = (WAITING, RUNNING, KV_USAGE, CACHE_CONFIG)


@dataclass(frozen=True, slots=True)
class KvBlocks:
    """KV blocks of a router's workers.

    Attributes:
        used, total: blocks of the decode workers; used ones are referenced by running requests.
        block_size: tokens per block of the workers that prefill; 0 before they report.
        prompt_total: blocks of the workers that prefill, in which prompts are cached.
    """

    used: int
    total: int
    block_size: int
    prompt_total: int


class PickerGauges(Collector):
    """Reads the gauges at each scrape, on the thread that serves it.

    Args:
        waiting, running: number of this router's requests that wait, and that run.
        blocks: the KV blocks of its workers.
    """

    def __init__(
        self, waiting: Callable[[], float], running: Callable[[], float], blocks: Callable[[], KvBlocks]
    ) -> None:
        self._waiting, self._running, self._blocks = waiting, running, blocks

    def describe(self) -> Iterator[Metric]:
        for spec in SPECS:
            yield _family(spec)

    def collect(self) -> Iterator[Metric]:
        blocks = self._blocks()
        yield _family(WAITING, ([], self._waiting()))
        yield _family(RUNNING, ([], self._running()))
        yield _family(KV_USAGE, ([], blocks.used / blocks.total if blocks.total else 0.0))
        if blocks.block_size:
            yield _family(CACHE_CONFIG, ([str(blocks.block_size), str(blocks.prompt_total)], 1))


def _family(spec: Spec, *samples: tuple[list[str], float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(spec.name, spec.help, labels=list(spec.labels))
    for labels, value in samples:
        family.add_metric(labels, value)
    return family
