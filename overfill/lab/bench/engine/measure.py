"""Measures ``decode`` and ``prefill``: our engine, vLLM and the limits of this machine, in one run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from overfill.engine.device import native_dtype, resolve_device
from overfill.errors import InvalidRequest
from overfill.kv.spec import DTypeName, KvCacheDtype, Quantization
from overfill.kv.tensors import TORCH_DTYPES
from overfill.lab.bench.engine.bounds import decode_step_seconds, prefill_seconds
from overfill.lab.bench.engine.machine import Machine, MachineProbe
from overfill.lab.bench.engine.overfill_engine import EngineWorkload, OverfillEngine, load_engines
from overfill.lab.peers.environment import NOT_INSTALLED, python_of
from overfill.lab.peers.process import PeerProcess
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
        vllm: Measure vLLM too.
        quantize: Weights of the decoder. None means the pair's recipe.
        kv_cache_dtype: KV cache of the decoder.
        max_num_batched_tokens: Maximum prompt tokens in a step, for our engine and vLLM.
        adapters: Adapters that the decoder's sequences have in turn, in one more measured engine.
        adapter_rank: Rank of each.
    """

    pair: Pair
    dtype: DTypeName | None
    device: str
    threads: int
    vllm: bool
    plan: BenchPlan
    quantize: Quantization | None = None
    kv_cache_dtype: KvCacheDtype = "auto"
    max_num_batched_tokens: int = 2048
    adapters: int = 0
    adapter_rank: int = 16


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
    ours: list[OverfillEngine]
    vllm: PeerProcess | None
    probe: MachineProbe

    @property
    def peers(self) -> list[BenchEngine]:
        return [] if self.vllm is None else [self.vllm]

    def row(
        self, name: str, engine: OverfillEngine, batch: int, context: int, tokens: int, bound: float, result: _Result
    ) -> Row:
        """The row of one figure.

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
        if self.vllm is None:
            return row
        peer = result.timings[self.vllm.name]
        return replace(row, peer=self.vllm.name, peer_value=tokens / peer.median, peer_spread=peer.relative_iqr)


def bench_decode(
    settings: EngineSettings, batches: Sequence[int], context: int, report: Report = silent
) -> Iterator[Row]:
    """Measures tokens per second of the full model and the decoder at each batch, at a mean context of ``context``.

    If the pair has a decoder, a row ``decode_gain`` compares the ratio of the two speeds with the ratio of their
    bounds. With adapters, a row ``adapters_step`` compares a step's duration, divided by that of a step without them,
    with the ratio of the bounds, which is the lowest that is possible.
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
            rows = []
            for ours in loaded.ours:
                bound = decode_step_seconds(ours.cost(batch), result.machine, batch, mean)
                rows.append(loaded.row(f"decode_{ours.name}", ours, batch, round(mean), batch, bound, result))
            yield from rows
            plain = rows[:-1] if settings.adapters else rows
            if len(plain) == 2:
                yield _ratio("decode_gain", plain[1], plain[0])
            if settings.adapters:
                yield _ratio("adapters_step", plain[-1], rows[-1])
        report("Measuring decode", len(batches), len(batches))


def bench_prefill(settings: EngineSettings, prompts: Sequence[Sequence[int]], report: Report = silent) -> Iterator[Row]:
    """Measures prompt tokens per second of the full model.

    Args:
        prompts: Batches of prompts, each given as the prompts' lengths.
    """
    workload = EngineWorkload(max(map(len, prompts)), max(map(max, prompts)) + 1)
    with _loaded(settings, workload, report) as loaded:
        full = loaded.ours[0]
        engines: list[BenchEngine] = [full, *loaded.peers]
        for done, lengths in enumerate(prompts):
            report("Measuring prefill", done, len(prompts))
            for engine in engines:
                engine.prefill(lengths)  # warm-up
            turns = in_turns(settings.plan, engines, _prefill_turn(lengths), loaded.probe.measure)
            result = _Result(*turns)
            bound = prefill_seconds(full.cost(1), result.machine, lengths)
            tokens = sum(lengths)
            yield loaded.row("prefill", full, len(lengths), tokens // len(lengths), tokens, bound, result)
        report("Measuring prefill", len(prompts), len(prompts))


def _prefill_turn(lengths: Sequence[int]) -> Callable[[BenchEngine], list[float]]:
    return lambda engine: [engine.prefill(lengths)]


def _ratio(name: str, row: Row, other: Row) -> Row:
    """Returns the speed of ``row`` divided by that of ``other``."""
    return replace(
        row,
        name=name,
        value=row.value / other.value,
        bound=row.bound / other.bound,
        unit="x",
        spread=row.spread + other.spread,
        peer=None,
        peer_value=None,
        peer_spread=None,
    )


@contextmanager
def _loaded(settings: EngineSettings, workload: EngineWorkload, report: Report) -> Iterator[_Loaded]:
    device = resolve_device(settings.device)
    dtype = settings.dtype or native_dtype(device)
    torch.set_num_threads(settings.threads)
    python = _vllm_python(device) if settings.vllm else None  # first, so that a missing one is reported at once
    with ExitStack() as stack:
        report("Loading our engine", 0, 1)
        ours = load_engines(
            settings.pair,
            dtype=dtype,
            device=device,
            quantize=settings.quantize,
            kv_cache_dtype=settings.kv_cache_dtype,
            workload=workload,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            adapters=settings.adapters,
            adapter_rank=settings.adapter_rank,
        )
        report("Loading our engine", 1, 1)
        vllm = None
        if python is not None:
            report("Loading vLLM", 0, 1)
            logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="overfill-bench-")))
            vllm = _start_vllm(python, settings, workload, dtype, logs / "vllm.log")
            stack.callback(vllm.close)
            report("Loading vLLM", 1, 1)
        probe = MachineProbe(device, TORCH_DTYPES[dtype], settings.threads)
        yield _Loaded(settings, dtype, device, ours, vllm, probe)


def _vllm_python(device: torch.device) -> Path:
    """Returns vLLM's interpreter. Raises InvalidRequest if it is not installed, or cannot run on ``device``."""
    if device.type != "cpu":
        raise InvalidRequest("vllm", "runs on a CPU only here; choose --device cpu")
    if (python := python_of("vllm")) is None:
        raise InvalidRequest("vllm", NOT_INSTALLED)
    return python


def _start_vllm(
    python: Path, settings: EngineSettings, workload: EngineWorkload, dtype: DTypeName, log: Path
) -> PeerProcess:
    """Starts vLLM with the full model, for the same work with the same resources as ours."""
    config = settings.pair.full_config
    return PeerProcess(
        python,
        settings.threads,
        log,
        model=str(settings.pair.full_path),
        dtype=dtype,
        vocab_size=config.vocab_size,
        context=workload.tokens + 64,
        max_num_seqs=workload.batch,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        kv_bytes=workload.cache_bytes(config.kv_spec(dtype).token_bytes),
    )
