"""Times vLLM's steps in a module: ``python -m overfill.lab.bench.vllm.step_clock FILE MODULE [ARGS...]``.

The thread that steps vLLM's engine core counts its steps and its CPU time in FILE, shared memory that another process
reads. It works in our workers, and in a process with vLLM's synchronous engine. A step lasts from the end of the one
before to its own end, so that whatever the thread does between two steps counts.

The time is also divided by line of work. The time of a line excludes that of the lines within it.
"""

from __future__ import annotations

import functools
import runpy
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

_CALLBACKS = "asyncio.base_events:BaseEventLoop.call_soon_threadsafe"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner."
_OURS = "overfill.engine.vllm."
_OF_VLLM: dict[str, tuple[str, ...]] = {
    "scheduling": ("vllm.v1.core.sched.scheduler:Scheduler.schedule",),
    "outputs": (
        "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
        "vllm.v1.engine.output_processor:OutputProcessor.process_outputs",
    ),
    "inputs": tuple(
        _RUNNER + name
        for name in (
            "_update_states",
            "_prepare_inputs",
            "_determine_batch_execution_and_padding",
            "_get_slot_mappings",
            "_build_attention_metadata",
            "_preprocess",
        )
    ),
    "forward": (_RUNNER + "_model_forward", "vllm.model_executor.layers.logits_processor:LogitsProcessor.forward"),
    "sampling": (_RUNNER + "_sample", _RUNNER + "_bookkeeping_sync"),
    "runner": (_RUNNER + "execute_model", _RUNNER + "sample_tokens"),
    "core": ("vllm.v1.engine.core:EngineCore.step",),
}
_OF_OURS: dict[str, tuple[str, ...]] = {
    "our connector": tuple(
        f"{_OURS}connector:OverfillConnector.{name}"
        for name in (
            "get_num_new_matched_tokens",
            "update_state_after_alloc",
            "build_connector_meta",
            "request_finished",
            "wait_for_layer_load",
        )
    ),
    "our layer events": (f"{_OURS}connector:OverfillConnector.save_kv_layer",),
    "our sampling": (f"{_OURS}sampler:OverfillSampler.apply", f"{_OURS}sampler:OverfillSampler.update_state"),
    "our step": (f"{_OURS}decode:VllmDecodeEngine.step", f"{_OURS}prefill:VllmPrefillEngine.step"),
    "our messages": (f"{_OURS}decode:VllmDecodeEngine.handle", f"{_OURS}prefill:VllmPrefillEngine.handle"),
    "our load": (f"{_OURS}decode:VllmDecodeEngine.load", f"{_OURS}prefill:VllmPrefillEngine.load"),
    "our emit": (_CALLBACKS,),
}
"""Line of work -> functions that do it."""

LINES = (*_OF_VLLM, *_OF_OURS)
_STEPS, _CPU, _WALL, _FIRST = range(4)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """What the thread that steps has counted, since its start or within a window.

    Attributes:
        steps: Steps that computed something.
        cpu, wall: CPU seconds of the thread, and seconds, up to the end of the latest step.
        lines: Line of work -> its calls and CPU seconds.
    """

    steps: int
    cpu: float
    wall: float
    lines: Mapping[str, tuple[int, float]]

    def since(self, before: StepTimes) -> StepTimes:
        """The difference to an earlier count."""
        lines = {
            name: (calls - before.lines[name][0], seconds - before.lines[name][1])
            for name, (calls, seconds) in self.lines.items()
        }
        return StepTimes(self.steps - before.steps, self.cpu - before.cpu, self.wall - before.wall, lines)


def read_times(file: Path) -> StepTimes:
    """What a process has counted in ``file`` so far."""
    values = np.fromfile(file, dtype=np.int64).tolist()
    lines = {name: (values[_FIRST + 2 * at], values[_FIRST + 2 * at + 1] / 1e9) for at, name in enumerate(LINES)}
    return StepTimes(values[_STEPS], values[_CPU] / 1e9, values[_WALL] / 1e9, lines)


def new_file(file: Path) -> Path:
    """Makes the file of a process that is about to start."""
    file.write_bytes(bytes(8 * (_FIRST + 2 * len(LINES))))
    return file


class StepClock:
    """Counts on the thread that calls ``stepped``. Each step that computes brings ``file`` up to date at its end."""

    def __init__(self, file: Path) -> None:
        self._shared = np.memmap(file, dtype=np.int64, mode="r+")
        self._values = [0] * len(self._shared)
        self._thread: int | None = None
        self._within = 0  # time of the calls within the current one

    def stepped(self, step: Callable[..., tuple[Any, bool]]) -> Callable[..., tuple[Any, bool]]:
        """``step``, counted whenever it has computed something."""

        @functools.wraps(step)
        def take_step(*args: Any) -> tuple[Any, bool]:
            self._thread = threading.get_ident()
            found = step(*args)
            if found[1]:
                self._values[_STEPS] += 1
                self._values[_CPU] = time.thread_time_ns()
                self._values[_WALL] = time.monotonic_ns()
                self._shared[:] = self._values
            return found

        return take_step

    def timed(self, line: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, whose time on the thread counts for ``line``."""
        at = _FIRST + 2 * LINES.index(line)
        values = self._values

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return function(*args, **kwargs)
            outside, self._within = self._within, 0
            began = time.thread_time_ns()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.thread_time_ns() - began
                values[at] += 1
                values[at + 1] += took - self._within
                self._within = outside + took

        return call


def install(clock: StepClock, lines: Mapping[str, Iterable[str]]) -> None:
    """Replaces the functions of ``lines`` by timed ones, and counts the steps of vLLM's engine core."""
    for line, places in lines.items():
        for place in places:
            module, _, path = place.partition(":")
            owner, name = path.split(".")
            target = getattr(import_module(module), owner)
            setattr(target, name, clock.timed(line, getattr(target, name)))
    from vllm.v1.engine.core import EngineCore

    EngineCore.step = clock.stepped(EngineCore.step)


def main() -> None:
    file, module = sys.argv[1:3]
    sys.argv = [module, *sys.argv[3:]]
    ours = module.startswith("services.")
    if ours:
        import_module("overfill.engine.vllm.internals")  # it sets vLLM's environment variables before it imports vLLM
    install(StepClock(Path(file)), _OF_VLLM | _OF_OURS if ours else _OF_VLLM)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
