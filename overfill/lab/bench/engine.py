"""``decode`` and ``prefill``: our engine against this machine's limits and against other engines, in one run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from overfill.engine.build import native_dtype, resolve_device
from overfill.kv.spec import DTypeName, KvCacheDtype
from overfill.kv.tensors import TORCH_DTYPES
from overfill.lab.bench.bounds import decode_step_seconds, prefill_seconds
from overfill.lab.bench.contender import Contender
from overfill.lab.bench.machine import Machine, MachineProbe
from overfill.lab.bench.ours import OurEngine, Workload, load_engines
from overfill.lab.bench.peers.choose import Missing, PeerSetting, open_peers
from overfill.lab.bench.rounds import Plan, Sample, in_turns
from overfill.lab.bench.rows import Row
from overfill.model.config import Quantization
from overfill.model.manifest import Pair
from overfill.telemetry.progress import Report, silent

TOKENS_PER_SECOND = "tokens/s"


@dataclass(frozen=True, slots=True)
class Setting:
    """What is measured, and with what.

    Attributes:
        dtype: None takes what the device computes in.
        quantize: of the decoder's matrices; None: as the pair says.
        kv_cache_dtype: how the decoder holds KV.
        cuda_graphs: whether our decode steps are replayed; on a CUDA device only.
        token_budget: most prompt tokens in a step, ours and the peers'.
    """

    pair: Pair
    dtype: DTypeName | None
    quantize: Quantization | None
    device: str
    threads: int
    peers: tuple[str, ...]
    plan: Plan
    kv_cache_dtype: KvCacheDtype = "auto"
    cuda_graphs: bool = False
    token_budget: int = 2048


@dataclass(frozen=True, slots=True)
class _Bench:
    """Everything loaded."""

    setting: Setting
    dtype: DTypeName
    device: torch.device
    full: OurEngine
    decoder: OurEngine | None
    peers: list[Contender]
    missing: list[Missing]
    probe: MachineProbe

    @property
    def ours(self) -> list[OurEngine]:
        return [self.full] if self.decoder is None else [self.full, self.decoder]

    def rows(
        self, name: str, engine: OurEngine, batch: int, context: int, tokens: int, bound: float, result: _Result
    ) -> list[Row]:
        """A row per peer. ``tokens`` are what one measured time is for; ``bound`` is the least such time."""
        own = result.samples[engine.name]
        row = Row(
            name=name,
            batch=batch,
            value=tokens / own.median,
            unit=TOKENS_PER_SECOND,
            bound=tokens / bound,
            spread=own.spread,
            pair=self.setting.pair.name,
            context=context,
            dtype=self.dtype,
            weights=engine.weights,
            kv_cache=engine.kv_cache,
            threads=self.setting.threads,
            device=str(self.device),
            bandwidth=result.machine.bandwidth,
            matrix_rate=result.machine.matrix_rate,
        )
        rows = [
            replace(
                row,
                peer=peer.name,
                peer_value=tokens / result.samples[peer.name].median,
                peer_spread=result.samples[peer.name].spread,
            )
            for peer in self.peers
        ]
        rows += [replace(row, peer=peer.name, hint=peer.hint) for peer in self.missing]
        return rows or [row]


@dataclass(frozen=True, slots=True)
class _Result:
    samples: dict[str, Sample]
    machine: Machine


def bench_decode(setting: Setting, batches: Sequence[int], context: int, report: Report = silent) -> Iterator[Row]:
    """Tokens per second at each batch, of the full model and the decoder, around a mean context of ``context``.

    With a decoder, ``decode_gain`` is the ratio of the two speeds, held against the ratio of their bounds.
    """
    plan = setting.plan
    prompt = max(1, context - plan.warmup - plan.rounds * plan.steps // 2)
    workload = Workload(max(batches), prompt + plan.total_steps + 2)
    with _loaded(setting, workload, report) as bench:
        contenders: list[Contender] = [*bench.ours, *bench.peers]
        for done, batch in enumerate(batches):
            report("Measuring decode", done, len(batches))
            for contender in contenders:
                contender.begin(batch, prompt, plan.total_steps)
                contender.steps(plan.warmup)
            turns = in_turns(plan, contenders, lambda c: c.steps(plan.steps), bench.probe.measure)
            for contender in contenders:
                contender.end()
            result = _Result(*turns)
            # The prompt, the first token, the warm-up, and half of what was measured.
            mean = prompt + 1 + plan.warmup + (plan.rounds * plan.steps - 1) / 2
            leading = []
            for engine in bench.ours:
                bound = decode_step_seconds(engine.cost, result.machine, batch, mean)
                rows = bench.rows(f"decode_{engine.name}", engine, batch, round(mean), batch, bound, result)
                leading.append(rows[0])
                yield from rows
            if len(leading) == 2:
                yield _gain(*leading)
        report("Measuring decode", len(batches), len(batches))


def bench_prefill(setting: Setting, prompts: Sequence[Sequence[int]], report: Report = silent) -> Iterator[Row]:
    """Prompt tokens per second of the full model; an entry of ``prompts`` has the lengths read at once."""
    workload = Workload(max(map(len, prompts)), max(map(max, prompts)) + 1)
    plan = setting.plan
    with _loaded(setting, workload, report) as bench:
        contenders: list[Contender] = [bench.full, *bench.peers]
        for done, lengths in enumerate(prompts):
            report("Measuring prefill", done, len(prompts))
            for contender in contenders:
                contender.prefill(lengths)  # warm-up
            turns = in_turns(plan, contenders, _reader(lengths), bench.probe.measure)
            result = _Result(*turns)
            bound = prefill_seconds(bench.full.cost, result.machine, lengths)
            tokens = sum(lengths)
            yield from bench.rows("prefill", bench.full, len(lengths), tokens // len(lengths), tokens, bound, result)
        report("Measuring prefill", len(prompts), len(prompts))


def _reader(lengths: Sequence[int]) -> Callable[[Contender], list[float]]:
    return lambda contender: [contender.prefill(lengths)]


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
def _loaded(setting: Setting, workload: Workload, report: Report) -> Iterator[_Bench]:
    device = resolve_device(setting.device)
    dtype = setting.dtype or native_dtype(device)
    torch.set_num_threads(setting.threads)
    with ExitStack() as stack:
        report("Loading our engine", 0, 1)
        full, decoder = load_engines(
            setting.pair,
            dtype=dtype,
            device=device,
            quantize=setting.quantize,
            kv_cache_dtype=setting.kv_cache_dtype,
            cuda_graphs=setting.cuda_graphs,
            workload=workload,
            token_budget=setting.token_budget,
        )
        report("Loading our engine", 1, 1)
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="overfill-bench-")))
        given = PeerSetting(
            setting.pair, TORCH_DTYPES[dtype], device, setting.threads, workload, setting.token_budget, logs
        )
        peers, missing = open_peers(setting.peers, given, stack, report)
        probe = MachineProbe(device, TORCH_DTYPES[dtype], setting.threads)
        yield _Bench(setting, dtype, device, full, decoder, peers, missing, probe)
