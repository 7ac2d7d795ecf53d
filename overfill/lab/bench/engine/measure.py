"""Measures ``decode`` and ``prefill``: our engine and the limits of this machine, in turns within one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from overfill.engine.device import native_dtype, resolve_device
from overfill.kv.spec import DTypeName, KvCacheDtype, Quantization
from overfill.kv.tensors import TORCH_DTYPES
from overfill.lab.bench.engine.bounds import decode_step_seconds, prefill_seconds
from overfill.lab.bench.engine.machine import Machine, MachineProbe, median_machine
from overfill.lab.bench.engine.overfill_engine import OverfillEngine, load_engines
from overfill.lab.measurement import Measurement
from overfill.model.manifest import Pair
from overfill.telemetry.progress import Report, silent

LIMIT = "machine"
"""Peer of all figures: what memory bandwidth and matrix rate allow. The ratio to it is the share that was reached."""

_WARMUP = 4
"""Decode steps before the first turn."""

_PAUSE = 0.25
"""Seconds of pause before a turn. Threads of a pool spin for a while after their work, and would slow the next turn."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Settings of a run.

    Attributes:
        dtype: Data type of weights and activations. None means the device's native one.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: CPU threads.
        rounds: Turns of each engine.
        steps: Decode steps in a turn.
        quantize: Weights of the decoder. None means the pair's recipe.
        kv_cache_dtype: KV cache of the decoder.
        adapters: Adapters that the decoder's sequences have in turn, in one more measured engine.
    """

    pair: Pair
    dtype: DTypeName | None
    device: str
    threads: int
    rounds: int
    steps: int = 16
    quantize: Quantization | None = None
    kv_cache_dtype: KvCacheDtype = "auto"
    adapters: int = 0


def bench_decode(
    settings: EngineSettings, batches: Sequence[int], context: int, report: Report = silent
) -> Iterator[Measurement]:
    """Measures tokens per second of the full model and the decoder at each batch, at a mean context of ``context``.

    If the pair has a decoder, ``decode_gain`` compares the ratio of the two speeds with the ratio of their bounds.
    With adapters, ``adapters_step`` compares a step's duration, divided by that of a step without them, with the ratio
    of the bounds, which is the lowest that is possible.
    """
    steps = _WARMUP + settings.rounds * settings.steps
    prompt = max(1, context - _WARMUP - settings.rounds * settings.steps // 2)
    # Mean context: the prompt, the first token, the warm-up, and half of the measured steps.
    mean = prompt + 1 + _WARMUP + (settings.rounds * settings.steps - 1) / 2
    run = _Run(settings, max(batches), prompt + steps + 2, report)
    for done, batch in enumerate(batches):
        report("Measuring decode", done, len(batches))
        for engine in run.engines:
            engine.begin(batch, prompt, steps)
            engine.steps(_WARMUP)
        seconds, machine = run.rounds(run.engines, lambda engine: median(engine.steps(settings.steps)))
        figures = []
        for engine in run.engines:
            engine.end()
            least = decode_step_seconds(engine.cost(batch), machine, batch, mean)
            of = {"batch": batch, "context": round(mean)}
            figures.append(run.rate(f"decode_{engine.name}", engine, of, batch, seconds[engine.name], least))
        yield from figures
        plain = figures[:-1] if settings.adapters else figures
        if len(plain) == 2:
            yield _ratio("decode_gain", plain[1], plain[0])
        if settings.adapters:
            yield _ratio("adapters_step", plain[-1], figures[-1])
    report("Measuring decode", len(batches), len(batches))
    yield from run.machine()


def bench_prefill(
    settings: EngineSettings, lengths: Sequence[int], batches: Sequence[int], report: Report = silent
) -> Iterator[Measurement]:
    """Measures prompt tokens per second of the full model: ``batches`` prompts of ``lengths`` tokens at once."""
    run = _Run(settings, max(batches), max(lengths) + 1, report)
    full = run.engines[0]
    cases = [(length, batch) for length in lengths for batch in batches]
    for done, (length, batch) in enumerate(cases):
        report("Measuring prefill", done, len(cases))
        prompts = [length] * batch
        full.prefill(prompts)  # warm-up
        seconds, machine = run.rounds([full], partial(OverfillEngine.prefill, lengths=prompts))
        least = prefill_seconds(full.cost(1), machine, prompts)
        of = {"batch": batch, "context": length}
        yield run.rate("prefill", full, of, sum(prompts), seconds[full.name], least)
    report("Measuring prefill", len(cases), len(cases))
    yield from run.machine()


class _Run:
    """The engines of a run, with their models loaded, and what was measured of the machine."""

    def __init__(self, settings: EngineSettings, batch: int, tokens: int, report: Report) -> None:
        device = resolve_device(settings.device)
        dtype = settings.dtype or native_dtype(device)
        torch.set_num_threads(settings.threads)
        report("Loading our engine", 0, 1)
        self.engines = load_engines(
            settings.pair,
            dtype=dtype,
            device=device,
            quantize=settings.quantize,
            kv_cache_dtype=settings.kv_cache_dtype,
            batch=batch,
            tokens=tokens,
            adapters=settings.adapters,
        )
        report("Loading our engine", 1, 1)
        self._rounds = settings.rounds
        self._probe = MachineProbe(device, TORCH_DTYPES[dtype], settings.threads)
        self._machines: list[Machine] = []
        self._of = {
            "pair": settings.pair.name,
            "dtype": dtype,
            "threads": settings.threads,
            "device": str(device),
        }

    def rounds(
        self, engines: Sequence[OverfillEngine], turn: Callable[[OverfillEngine], float]
    ) -> tuple[dict[str, list[float]], Machine]:
        """Measures the machine and has each engine take a turn, in every round.

        Returns:
            What the turns returned, by engine name, and the machine's median speed in these rounds.
        """
        found: dict[str, list[float]] = {engine.name: [] for engine in engines}
        machines = []
        for _ in range(self._rounds):
            time.sleep(_PAUSE)
            machines.append(self._probe.measure())
            for engine in engines:
                time.sleep(_PAUSE)
                found[engine.name].append(turn(engine))
        self._machines += machines
        return found, median_machine(machines)

    def rate(
        self,
        name: str,
        engine: OverfillEngine,
        of: Mapping[str, int],
        tokens: int,
        seconds: Sequence[float],
        least: float,
    ) -> Measurement:
        """Tokens per second of ``tokens`` that took ``seconds`` in each round; this machine needs at ``least`` some."""
        about = {**of, "weights": engine.weights, "kv_cache": engine.kv_cache} | self._of
        rates = [tokens / each for each in seconds]
        return Measurement.median(name, rates, "tokens/s", peer=LIMIT, peer_value=tokens / least, of=about)

    def machine(self) -> list[Measurement]:
        """The machine's speed over the whole run. It is low while other programs use the cores or the memory."""
        return [
            Measurement.median("bandwidth", [m.bandwidth / 1e9 for m in self._machines], "GB/s", of=self._of),
            Measurement.median("matrix_rate", [m.matrix_rate / 1e9 for m in self._machines], "GFLOP/s", of=self._of),
        ]


def _ratio(name: str, one: Measurement, other: Measurement) -> Measurement:
    """Returns the speed of ``one`` divided by that of ``other``, beside the same ratio of their limits."""
    assert one.peer_value is not None
    assert other.peer_value is not None
    limit = one.peer_value / other.peer_value
    return Measurement(name, one.value / other.value, "x", peer=LIMIT, peer_value=limit, of=one.of)
