"""Measures the host's work: what our engine thread and our processes cost beside vLLM's own.

The model costs next to nothing: two layers, 64 wide. What is left is the host's work. Three engines take turns: a
router and two workers; vLLM's synchronous engine; ``AsyncLLM`` with its core in a process of its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from overfill.lab.bench.vllm.engines import EngineRounds, PlainEngine, VllmSettings, stack_engines
from overfill.lab.bench.vllm.plain import InProcessVllm
from overfill.lab.bench.vllm.window import DecodeWindow
from overfill.lab.measurement import Measurement
from overfill.lab.stacks import Log
from overfill.making.tiny import make_tiny_pair
from overfill.model.manifest import Pair
from overfill.telemetry.progress import Report

CONTEXT, MAX_MODEL_LEN = 512, 2048
"""Tokens of the prompts, and of prompt and answer."""

LIMITED = (1, 64, 256)
"""Numbers of rows whose figures have a limit."""

MAX_CPU, MIN_RATE = 1.15, 0.9
"""Limits of CPU time and tokens per second, as multiples of the peer's."""

_IN_PROCESS, _ASYNC = "vLLM in process", "AsyncLLM"
"""Names of the peers."""

_IN_ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""Executor of both peers: the model runs in the process that schedules. By name, because on CPUs vLLM refuses "uni"."""

HostRound = tuple[DecodeWindow, ...]
"""The windows of our stack, of vLLM in process, and of ``AsyncLLM``."""


def measure_host(
    rows: Sequence[int], rounds: int, settings: VllmSettings, report: Report, log: Log
) -> Iterator[Measurement]:
    """Yields each figure when it is known.

    Args:
        rows: Sequences that decode together.
        rounds: Turns of each engine.

    Raises:
        StartFailed, PeerFailed: an engine did not start.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="overfill-bench-")))
        sizes: dict[str, Any] = {"num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
        sizes["head_dim"] = 32  # vLLM's kernels for CPUs want no less
        pair = Pair.load(make_tiny_pair(folder / "pair", identity=True, max_positions=MAX_MODEL_LEN, **sizes))
        report("Starting engines", 0, 3)
        (ours,) = stack.enter_context(stack_engines({"default": pair.folder}, settings, log)).values()
        report("Starting engines", 1, 3)
        alone = replace(settings, engine_args={**settings.engine_args, "distributed_executor_backend": _IN_ONE_PROCESS})
        # Without asynchronous scheduling, which an engine in process has on a GPU.
        steps = replace(alone, engine_args={**alone.engine_args, "async_scheduling": False})
        in_process = PlainEngine(_IN_PROCESS, pair.full_path, steps, folder / "in_process.log", InProcessVllm)
        stack.callback(in_process.close)
        report("Starting engines", 2, 3)
        asynchronous = PlainEngine(_ASYNC, pair.full_path, alone, folder / "async.log")
        stack.callback(asynchronous.close)
        report("Starting engines", 3, 3)
        turns = EngineRounds(rounds, pair.full_config.vocab_size, report)

        def turn(count: int) -> HostRound:
            return turns.decode(count, CONTEXT, MAX_MODEL_LEN - CONTEXT, ours, in_process, asynchronous)

        turn(min(8, max(rows)))  # warms up
        for count in rows:
            yield from host_figures(count, [turn(count) for _ in turns.rounds(f"Decoding {count} rows")])


def host_figures(rows: int, rounds: Sequence[HostRound]) -> list[Measurement]:
    """Figures of one number of rows."""
    ours, in_process, asynchronous = zip(*rounds, strict=True)

    def cpu(name: str, windows: Sequence[DecodeWindow], tokens: int = 1) -> list[float]:
        return [tokens * window.cpu_ms(name) for window in windows]

    of_thread = MAX_CPU if rows > 1 and rows in LIMITED else None
    of_rate = MIN_RATE if rows in LIMITED else None
    thread, peer_thread = cpu("thread", ours, rows), cpu("thread", in_process, rows)
    rate, peer_rate = [window.rate for window in ours], [window.rate for window in asynchronous]
    worker, peer_worker = cpu("worker", ours), cpu("worker", asynchronous)
    return [
        Measurement.beside(f"thread_{rows}", thread, "ms/step", _IN_PROCESS, peer_thread, of_thread),
        Measurement.beside(f"rate_{rows}", rate, "tokens/s", _ASYNC, peer_rate, of_rate, at_least=True),
        Measurement.beside(f"cpu_worker_{rows}", worker, "ms/token", _ASYNC, peer_worker, MAX_CPU),
        Measurement.median(f"cpu_router_{rows}", cpu("router", ours), "ms/token"),
    ]
