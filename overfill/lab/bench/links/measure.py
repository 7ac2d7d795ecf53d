"""Measures time to first token and how long the second token waits for KV, by the link between the two stages.

Router, prefill and decode worker run on a host each (``overfill.lab.hosts``), with mutual TLS and without shared
memory. The prefill worker's host has the link that is measured, so KV crosses it once. The other links are plain.

Each prompt is sent twice. The first time it is new, and its KV travels while the prefill runs. The second time the
prefill worker has all of it in its prefix cache and the decode worker has nothing, so the whole transfer is waited for.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from overfill.client import Client, SamplingParams
from overfill.errors import InternalError
from overfill.kv.spec import DTypeName
from overfill.lab.bench.measurement import Measurement
from overfill.lab.hosts.network import Host
from overfill.lab.hosts.place import place_on_hosts
from overfill.model.manifest import Pair
from overfill.settings.worker_kinds import WorkerSettings
from overfill.stack.describe import describe
from overfill.stack.placed import PlacedWorker, place
from overfill.stack.process_runner import ProcessRunner

_WARM_TOKENS = 64  # of a request that is not measured, after each change of the link
_TIMEOUT = 900.0  # seconds for one request


@dataclass(frozen=True, slots=True)
class MeasuredLink:
    """A link to measure.

    Attributes:
        delay: Seconds, one way.
        loss: Share of the frames that are lost, in each direction.
        rate: Bytes per second; None means no limit.
        congestion_control: TCP's on all hosts.
    """

    delay: float = 0.0
    loss: float = 0.0
    rate: float | None = None
    congestion_control: str = "cubic"

    @property
    def relayed(self) -> bool:
        """Whether its frames need a relay."""
        return bool(self.delay or self.loss)

    def apply(self, host: Host) -> None:
        """Makes this the link of ``host``."""
        host.rate = self.rate
        if self.relayed:
            host.delay, host.loss = self.delay, self.loss


LINKS = {
    "plain": MeasuredLink(),
    "1gbit": MeasuredLink(rate=1e9 / 8),
    "100mbit": MeasuredLink(rate=1e8 / 8),
    "20ms": MeasuredLink(delay=0.02),
    "bad": MeasuredLink(0.02, 0.01, 1e8 / 8),
    "bad-bbr": MeasuredLink(0.02, 0.01, 1e8 / 8, "bbr"),
}
"""Name -> link. "bad" has a delay of 20 ms, a loss of 1 % and a rate of 100 Mbit/s."""


@dataclass(frozen=True, slots=True)
class LinkResult:
    """Medians of the requests over one link, in one codec and with one kind of prompts. Times are seconds.

    Attributes:
        cached: Whether the prefill worker had the prompts in its prefix cache.
        ttft: Time to first token, as the router measures it.
        prefill: Prefill compute of the worker, part of ``ttft``.
        exposed: Time from the first token's arrival at the decode worker to the start of the first decode step.
        kv_bytes: Bytes of KV and scales that travelled.
        broken_streams: Data streams that broke and were repeated, in all rounds.
    """

    link: str
    codec: str
    tokens: int
    cached: bool
    ttft: float
    prefill: float
    exposed: float
    kv_bytes: int
    broken_streams: int

    @property
    def least_ttft(self) -> float:
        """Physical bound of ``ttft``: the prefill, with a request and a token that cross the link once each."""
        return self.prefill + 2 * LINKS[self.link].delay

    @property
    def transfer(self) -> float:
        """Physical bound of the transfer: bytes / rate + delay."""
        link = LINKS[self.link]
        return (self.kv_bytes / link.rate if link.rate else 0.0) + link.delay

    @property
    def least_exposed(self) -> float:
        """Physical bound of ``exposed``: the part of the transfer for which even the whole prefill leaves no time.

        The first token crosses the link too, so its delay does not add to the wait.
        """
        return max(0.0, self.transfer - LINKS[self.link].delay - self.prefill)

    def measurements(self) -> list[Measurement]:
        """Returns the figures in milliseconds, beside their physical bounds as peers."""
        name = f"{self.link}_{self.codec}_{self.tokens}{'_cached' if self.cached else ''}"
        waits = "bytes / rate - prefill"
        return [
            Measurement(
                f"{name}_ttft", 1e3 * self.ttft, "ms", peer="prefill + delays", peer_value=1e3 * self.least_ttft
            ),
            Measurement(f"{name}_exposed", 1e3 * self.exposed, "ms", peer=waits, peer_value=1e3 * self.least_exposed),
            Measurement(f"{name}_prefill", 1e3 * self.prefill, "ms"),
            Measurement(f"{name}_kv", self.kv_bytes / 1e6, "MB"),
            Measurement(f"{name}_transfer_bound", 1e3 * self.transfer, "ms"),
            Measurement(f"{name}_broken_streams", self.broken_streams, "streams"),
        ]


def measure_links(
    pair: Pair,
    links: Sequence[str],
    codecs: Sequence[str],
    lengths: Sequence[int],
    *,
    dtype: DTypeName | None,
    threads: int,
    rounds: int,
    log: Callable[[str, str], None],
) -> Iterator[LinkResult]:
    """Measures ``rounds`` requests with random prompts of each length, in each codec over each link.

    Args:
        links: Names in ``LINKS``.
        threads: CPU threads of each worker.
        log: Called with a process's name and each line of its output.

    Raises:
        CannotMakeHosts: This machine cannot make hosts.
        StartFailed: The stack did not start.
    """

    def network(link: str) -> tuple[bool, str]:
        return LINKS[link].relayed, LINKS[link].congestion_control

    rng = random.Random(0)
    # One network and one stack serve all links that differ in nothing but what can be changed meanwhile.
    for codec, (kind, alike) in itertools.product(
        codecs, [(kind, list(group)) for kind, group in itertools.groupby(links, network)]
    ):
        settings = {"dtype": dtype, "log_level": "warning", "kv_codec": codec, "grace_period": 2}
        spec = describe(pair.folder, threads=threads, settings=settings)
        with place_on_hosts(place(spec).with_configs(_without_decode_cache), *kind) as (placed, hosts):
            prefixes = {name: host.enter for name, host in hosts.items()}
            stack = ProcessRunner(placed, log, prefixes=prefixes)
            try:
                stack.start()
                stack.wait_ready(threading.Event())
                with Client(placed.addresses[0], tls=placed.client_tls, api_key=placed.api_key) as client:
                    for link in alike:
                        LINKS[link].apply(hosts[placed.prefill[0].worker_id])
                        _ask(client, _random_prompt(rng, pair, _WARM_TOKENS))
                        for tokens in lengths:
                            prompts = [_random_prompt(rng, pair, tokens) for _ in range(rounds)]
                            answers = [[_ask(client, prompt), _ask(client, prompt)] for prompt in prompts]
                            for cached, found in enumerate(zip(*answers, strict=True)):
                                yield _summarise(link, codec, tokens, bool(cached), found)
            finally:
                stack.stop()


def _without_decode_cache(worker: PlacedWorker) -> WorkerSettings:
    off = {"prefix_cache": False}
    return worker.config if worker.tier is None else worker.config.model_copy(update=off)


@dataclass(frozen=True, slots=True)
class _Round:
    ttft: float
    prefill: float
    exposed: float
    kv_bytes: int
    broken_streams: int


def _random_prompt(rng: random.Random, pair: Pair, tokens: int) -> list[int]:
    return [rng.randrange(pair.full_config.vocab_size) for _ in range(tokens)]


def _ask(client: Client, prompt: Sequence[int]) -> _Round:
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    answer = client.generate(prompt, sampling=greedy, trace=True, timeout=_TIMEOUT)
    timing, trace = answer.timing, answer.trace
    if timing.ttft is None or timing.prefill_compute is None or timing.handoff_exposed is None or trace is None:
        raise InternalError("the answer has no timing of its first token, or no trace of its handoff")
    return _Round(timing.ttft, timing.prefill_compute, timing.handoff_exposed, trace.kv_bytes, trace.broken_streams)


def _summarise(link: str, codec: str, tokens: int, cached: bool, rounds: Sequence[_Round]) -> LinkResult:
    return LinkResult(
        link,
        codec,
        tokens,
        cached,
        median(one.ttft for one in rounds),
        median(one.prefill for one in rounds),
        median(one.exposed for one in rounds),
        rounds[0].kv_bytes,
        sum(one.broken_streams for one in rounds),
    )
