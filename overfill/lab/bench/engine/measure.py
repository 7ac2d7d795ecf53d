"""Measures ``decode`` and ``prefill``: our engine and the limits of this machine, in turns within one run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import TypeVar

import torch

from overfill.engine.device import native_dtype, resolve_device
from overfill.engine.protocol import EngineOptions
from overfill.kv.spec import DTypeName, KvCacheDtype, Quantization
from overfill.kv.tensors import TORCH_DTYPES
from overfill.lab.bench.engine.bounds import decode_step_seconds, prefill_seconds
from overfill.lab.bench.engine.machine import Machine, MachineProbe, median_machine
from overfill.lab.bench.engine.overfill_engine import BenchEngine, BenchPrefiller, load, load_decoders
from overfill.lab.measurement import Measurement
from overfill.model.manifest import Pair
from overfill.telemetry.progress import Report

LIMIT = "machine"
"""Peer of all figures: what memory bandwidth and matrix rate allow. The ratio to it is the share that was reached."""

_WARMUP = 4
"""Decode steps before the first turn."""

_PAUSE = 0.25
"""Seconds of pause before a turn. Threads of a pool spin for a while after their work, and would slow the next turn."""

_Engine = TypeVar("_Engine", bound=BenchEngine)


class EngineRun:
    """A run, in which engines and the machine take ``rounds`` turns.

    Args:
        dtype: Data type of weights and activations. None means the device's native one.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: CPU threads. None means one for each core.
    """

    def __init__(
        self, pair: Pair, dtype: DTypeName | None, device: str, threads: int | None, rounds: int, report: Report
    ) -> None:
        threads = threads or len(os.sched_getaffinity(0))
        torch.set_num_threads(threads)
        where = resolve_device(device)
        dtype = dtype or native_dtype(where)
        self._pair, self._rounds, self._report = pair, rounds, report
        self._options = EngineOptions(where, dtype)
        self._probe = MachineProbe(where, TORCH_DTYPES[dtype], threads)
        self._machines: list[Machine] = []
        self._of = {"pair": pair.name, "dtype": dtype, "threads": threads, "device": str(where)}

    def decode(
        self,
        batches: Sequence[int],
        context: int,
        steps: int,
        quantize: Quantization | None,
        kv_cache_dtype: KvCacheDtype,
        adapters: int,
    ) -> Iterator[Measurement]:
        """Measures tokens per second of the full model and the decoder at each batch.

        If the pair has a decoder, ``decode_gain`` compares the ratio of the two speeds with the ratio of their bounds.
        With adapters, ``adapters_step`` compares a step's duration, divided by that of a step without them, with the
        ratio of the bounds, which is the lowest that is possible.

        Args:
            context: Mean tokens that a step attends to.
            steps: Decode steps in a turn.
            quantize: Weights of the decoder. None means the pair's recipe.
            kv_cache_dtype: KV cache of the decoder.
            adapters: Adapters that the decoder's sequences have in turn, in one more measured engine.
        """
        measured = self._rounds * steps
        prompt = max(1, context - _WARMUP - measured // 2)
        # The prompt, the first token, the warm-up, and half of the measured steps.
        mean = prompt + 1 + _WARMUP + (measured - 1) / 2
        pair = self._pair if quantize is None else replace(self._pair, quantize=quantize)
        options = replace(self._options, max_num_seqs=max(batches))
        engines = load_decoders(pair, options, prompt + _WARMUP + measured + 2, kv_cache_dtype, adapters)
        for done, batch in enumerate(batches):
            self._report("Measuring decode", done, len(batches))
            for engine in engines:
                engine.begin(batch, prompt, _WARMUP + measured)
                engine.steps(_WARMUP)
            seconds, machine = self._turns(engines, lambda engine: median(engine.steps(steps)))
            figures = []
            for engine, own in zip(engines, seconds, strict=True):
                engine.end()
                least = decode_step_seconds(engine.cost(batch), machine, batch, mean)
                of = {"batch": batch, "context": round(mean)}
                figures.append(self._rate(f"decode_{engine.name}", engine, of, batch, own, least))
            yield from figures
            plain = figures[:-1] if adapters else figures
            if len(plain) == 2:
                yield _ratio("decode_gain", plain[1], plain[0])
            if adapters:
                yield _ratio("adapters_step", plain[-1], figures[-1])
        self._report("Measuring decode", len(batches), len(batches))
        yield from self._machine()

    def prefill(self, lengths: Sequence[int], batches: Sequence[int]) -> Iterator[Measurement]:
        """Measures prompt tokens per second of the full model: prompts of ``lengths`` tokens, ``batches`` at once."""
        options = replace(self._options, max_num_seqs=max(batches))
        full = BenchPrefiller(load(self._pair, "full", options, max(lengths) + 1))
        cases = [[length] * batch for length in lengths for batch in batches]
        for done, prompts in enumerate(cases):
            self._report("Measuring prefill", done, len(cases))
            full.prefill(prompts)  # warm-up
            (seconds,), machine = self._turns([full], partial(BenchPrefiller.prefill, lengths=prompts))
            least = prefill_seconds(full.cost(1), machine, prompts)
            of = {"batch": len(prompts), "context": prompts[0]}
            yield self._rate("prefill", full, of, sum(prompts), seconds, least)
        self._report("Measuring prefill", len(cases), len(cases))
        yield from self._machine()

    def _turns(self, engines: Sequence[_Engine], turn: Callable[[_Engine], float]) -> tuple[list[list[float]], Machine]:
        """Probes the machine and has each engine take a turn, in every round.

        Returns:
            What the turns of each engine returned, and the machine's median speed in these rounds.
        """
        found: list[list[float]] = [[] for _ in engines]
        machines = []
        for _ in range(self._rounds):
            time.sleep(_PAUSE)
            machines.append(self._probe.measure())
            for engine, own in zip(engines, found, strict=True):
                time.sleep(_PAUSE)
                own.append(turn(engine))
        self._machines += machines
        return found, median_machine(machines)

    def _rate(
        self,
        name: str,
        engine: BenchEngine,
        of: Mapping[str, int],
        tokens: int,
        seconds: Sequence[float],
        least: float,
    ) -> Measurement:
        """Tokens per second. ``tokens`` took ``seconds`` in each round, and this machine needs ``least`` seconds."""
        about = {**of, **engine.formats, **self._of}
        rates = [tokens / each for each in seconds]
        return Measurement.median(name, rates, "tokens/s", peer=LIMIT, peer_value=tokens / least, of=about)

    def _machine(self) -> list[Measurement]:
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
