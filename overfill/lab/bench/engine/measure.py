"""Measures ``decode`` and ``prefill``: our engine, other engines and the limits of this machine, in one run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from overfill.engine.device import native_dtype, resolve_device
from overfill.kv.spec import DTypeName, KvCacheDtype, Quantization
from overfill.kv.tensors import TORCH_DTYPES
from overfill.lab.bench.engine.bounds import decode_step_seconds, prefill_seconds
from overfill.lab.bench.engine.machine import Machine, MachineProbe
from overfill.lab.bench.engine.overfill_engine import EngineWorkload, OverfillEngine, load_engines
from overfill.lab.bench.engine.peers.choose import Missing, PeerSettings, open_peers
from overfill.lab.bench.engine.protocol import BenchEngine
from overfill.lab.bench.engine.rows import Row
from overfill.lab.bench.engine.turns import BenchPlan, Timings, in_turns
from overfill.model.manifest import Pair
from overfill.telemetry.progress import Report, silent

TOKENS_PER_SECOND = "tokens/s"


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Settings of a run.

    Attributes:
        dtype: Data type of weights and activations. None means the device's native one.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, for our engine.
        threads: CPU threads of each engine.
        peers: Names of the peers to measure.
        quantize: Weights of the decoder. None means the pair's recipe.
        kv_cache_dtype: KV cache of the decoder.
        max_num_batched_tokens: Maximum prompt tokens in a step, for our engine and the peers.
    """

    pair: Pair
    dtype: DTypeName | None
    device: str
    threads: int
    peers: tuple[str, ...]
    plan: BenchPlan
    quantize: Quantization | None = None
    kv_cache_dtype: KvCacheDtype = "auto"
    max_num_batched_tokens: int = 2048


@dataclass(frozen=True, slots=True)
class _Result:
    """Timings by engine name, and the machine's speed in the same rounds."""

    timings: dict[str, Timings]
    machine: Machine


@dataclass(frozen=True, slots=True)
class _Loaded:
    """The engines of a run, with their models loaded."""

    settings: EngineSettings
    dtype: DTypeName
    device: torch.device
    full: OverfillEngine
    decoder: OverfillEngine | None
    peers: list[BenchEngine]
    missing: list[Missing]
    probe: MachineProbe

    @property
    def ours(self) -> list[OverfillEngine]:
        return [self.full] if self.decoder is None else [self.full, self.decoder]

    def rows(
        self, name: str, engine: OverfillEngine, batch: int, context: int, tokens: int, bound: float, result: _Result
    ) -> list[Row]:
        """Rows of one figure, one per peer.

        Args:
            tokens: Tokens that one timing covers.
            bound: Minimum seconds that this machine needs for them.
        """
        own = result.timings[engine.name]
        row = Row(
            name=name,
            batch=batch,
            value=tokens / own.median,
            unit=TOKENS_PER_SECOND,
            bound=tokens / bound,
            spread=own.relative_iqr,
            pair=self.settings.pair.name,
            context=context,
            dtype=self.dtype,
            weights=engine.weights,
            kv_cache=engine.kv_cache,
            threads=self.settings.threads,
            device=str(self.device),
            bandwidth=result.machine.bandwidth,
            matrix_rate=result.machine.matrix_rate,
        )
        rows = [
            replace(
                row,
                peer=peer.name,
                peer_value=tokens / result.timings[peer.name].median,
                peer_spread=result.timings[peer.name].relative_iqr,
            )
            for peer in self.peers
        ]
        rows += [replace(row, peer=peer.name, hint=peer.hint) for peer in self.missing]
        return rows or [row]


def bench_decode(
    settings: EngineSettings, batches: Sequence[int], context: int, report: Report = silent
) -> Iterator[Row]:
    """Measures tokens per second of the full model and the decoder at each batch, at a mean context of ``context``.

    If the pair has a decoder, a row ``decode_gain`` compares the ratio of the two speeds with the ratio of their
    bounds.
    """
    plan = settings.plan
    prompt = max(1, context - plan.warmup - plan.rounds * plan.steps // 2)
    workload = EngineWorkload(max(batches), prompt + plan.total_steps + 2)
    with _loaded(settings, workload, report) as loaded:
        engines: list[BenchEngine] = [*loaded.ours, *loaded.peers]
        for done, batch in enumerate(batches):
            report("Measuring decode", done, len(batches))
            for engine in engines:
                engine.begin(batch, prompt, plan.total_steps)
                engine.steps(plan.warmup)
            turns = in_turns(plan, engines, lambda e: e.steps(plan.steps), loaded.probe.measure)
            for engine in engines:
                engine.end()
            result = _Result(*turns)
            # Mean context: the prompt, the first token, the warm-up, and half of the measured steps.
            mean = prompt + 1 + plan.warmup + (plan.rounds * plan.steps - 1) / 2
            first_rows = []
            for ours in loaded.ours:
                bound = decode_step_seconds(ours.cost, result.machine, batch, mean)
                rows = loaded.rows(f"decode_{ours.name}", ours, batch, round(mean), batch, bound, result)
                first_rows.append(rows[0])
                yield from rows
            if len(first_rows) == 2:
                yield _gain(*first_rows)
        report("Measuring decode", len(batches), len(batches))


def bench_prefill(settings: EngineSettings, prompts: Sequence[Sequence[int]], report: Report = silent) -> Iterator[Row]:
    """Measures prompt tokens per second of the full model.

    Args:
        prompts: Batches of prompts, each given as the prompts' lengths.
    """
    workload = EngineWorkload(max(map(len, prompts)), max(map(max, prompts)) + 1)
    with _loaded(settings, workload, report) as loaded:
        engines: list[BenchEngine] = [loaded.full, *loaded.peers]
        for done, lengths in enumerate(prompts):
            report("Measuring prefill", done, len(prompts))
            for engine in engines:
                engine.prefill(lengths)  # warm-up
            turns = in_turns(settings.plan, engines, _prefill_turn(lengths), loaded.probe.measure)
            result = _Result(*turns)
            bound = prefill_seconds(loaded.full.cost, result.machine, lengths)
            tokens = sum(lengths)
            yield from loaded.rows("prefill", loaded.full, len(lengths), tokens // len(lengths), tokens, bound, result)
        report("Measuring prefill", len(prompts), len(prompts))


def _prefill_turn(lengths: Sequence[int]) -> Callable[[BenchEngine], list[float]]:
    return lambda engine: [engine.prefill(lengths)]


def _gain(full: Row, decoder: Row) -> Row:
    return replace(
        decoder,
        name="decode_gain",
        value=decoder.value / full.value,
        bound=decoder.bound / full.bound,
        unit="x",
        spread=full.spread + decoder.spread,
        peer=None,
        peer_value=None,
        peer_spread=None,
        hint=None,
    )


@contextmanager
def _loaded(settings: EngineSettings, workload: EngineWorkload, report: Report) -> Iterator[_Loaded]:
    device = resolve_device(settings.device)
    dtype = settings.dtype or native_dtype(device)
    torch.set_num_threads(settings.threads)
    with ExitStack() as stack:
        report("Loading our engine", 0, 1)
        full, decoder = load_engines(
            settings.pair,
            dtype=dtype,
            device=device,
            quantize=settings.quantize,
            kv_cache_dtype=settings.kv_cache_dtype,
            workload=workload,
            max_num_batched_tokens=settings.max_num_batched_tokens,
        )
        report("Loading our engine", 1, 1)
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="overfill-bench-")))
        for_peers = PeerSettings(
            settings.pair,
            TORCH_DTYPES[dtype],
            device,
            settings.threads,
            workload,
            settings.max_num_batched_tokens,
            logs,
        )
        peers, missing = open_peers(settings.peers, for_peers, stack, report)
        probe = MachineProbe(device, TORCH_DTYPES[dtype], settings.threads)
        yield _Loaded(settings, dtype, device, full, decoder, peers, missing, probe)
