"""Runs ``overfill bench vllm --host``: what our engine thread, our processes and our copies cost beside vLLM's own.

The model costs next to nothing: two layers, 64 wide. What is left is the host's work. Three engines are open together
and take turns: a router and two workers; vLLM's synchronous engine; ``AsyncLLM`` with its core in a process of its own.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

from rich.table import Table

from overfill.client import Grammar, SamplingParams
from overfill.lab.cpu_clock import cpu_seconds
from overfill.lab.peers.process import JsonProcess, PeerFailed
from overfill.lab.measurement import Measurement
from overfill.lab.bench.router.load import Load, LoadProcesses
from overfill.lab.bench.router.windows import wait_for_first_tokens
from overfill.lab.bench.vllm.engines import Log, PlainEngine, VllmSettings, plain_environment, stack_plan
from overfill.lab.bench.vllm.step_clock import LINES, StepTimes, new_file, read_times
from overfill.making.tiny import make_tiny_pair
from overfill.model.manifest import Pair
from overfill.stack.ask import router_status
from overfill.stack.ports import free_ports
from overfill.stack.process_runner import ProcessRunner
from overfill.telemetry.progress import Report
from overfill.v1 import inference_pb2

_IN_PROCESS, _ASYNC = "vLLM in process", "AsyncLLM"
"""Names of the peers."""
ROWS_FIGURES: dict[str, tuple[str, str | None, float | None, tuple[int, ...]]] = {
    "thread": ("ms/step", _IN_PROCESS, 1.15, (64, 256)),
    "wall": ("ms/step", _IN_PROCESS, None, ()),
    "rate": ("tokens/s", _ASYNC, 0.9, (1, 64, 256)),
    "cpu_worker": ("ms/token", _ASYNC, 1.15, ()),
    "cpu_router": ("ms/token", None, None, ()),
}
"""Figure of decode steps -> its unit, its peer, its limit as a multiple of the peer's value, and the numbers of rows
that have the limit; none means all. ``rate`` has a lower limit, the others an upper one."""
MAX_MIXED_RATIO = 1.15
"""Upper limit of a step in which an eighth of the rows has a grammar or penalties, as a multiple of a plain step."""
MAX_TTFT_MS = 2.0
"""Upper limit of the milliseconds that router and workers add to the first token of a short prompt."""
MIN_COPY_RATIO = 0.5
"""Lower limit of the speed of one transfer's copies, as a multiple of ``memcpy``."""

CONTEXT = 512
"""Tokens of the prompts of rows that decode."""
SHORT_PROMPT = 64
MAX_MODEL_LEN = 2048
_MIXED_ROWS = 64
_SPECIAL = 8
"""Of so many rows, one has a grammar or penalties in a mixed step."""
_SETTLE = 0.3
_PROMPTS = 10
"""Prompts that a round asks one after another, for the time to first token."""
_PAUSE = 0.05
"""Seconds between two of them."""
_ANSWER = 8
_IN_ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""Executor of ``AsyncLLM``: the model runs in the core's process. By name, because on CPUs vLLM refuses "uni"."""


@dataclass(frozen=True, slots=True)
class HostPlan:
    """What a run measures.

    Attributes:
        rows: Sequences that decode together.
        rounds: Turns of each engine.
        seconds: Duration of a turn of our stack; the peers take as many steps.
    """

    rows: tuple[int, ...]
    rounds: int
    seconds: float = 1.0


@dataclass(frozen=True, slots=True)
class StepProfile:
    """Where the time of a kind of step goes. It has no aim to miss.

    Attributes:
        of: The kind of step.
        ms: Line of work -> milliseconds of a step in our worker, and in the peer.
    """

    of: str
    ms: Mapping[str, tuple[float, float]]
    reached: ClassVar[bool] = True

    def to_json(self) -> str:
        """A line of JSON."""
        return json.dumps({"name": "profile", "of": self.of, "ms": self.ms})


class _TimedStack(ProcessRunner):
    """A stack whose workers count their steps in files under ``folder``."""

    def __init__(self, settings: VllmSettings, pair: Path, folder: Path, log: Log) -> None:
        super().__init__(stack_plan(pair, settings, free_ports("127.0.0.1", 1)[0]), log)
        self._clocks = {worker.id: new_file(folder / worker.id) for worker in self.placed.workers}
        self._of_stage = {stage: self.placed.of_stage(stage)[0].id for stage in ("prefill", "decode")}

    def pid(self, stage: str) -> int:
        return self.worker(self._of_stage[stage]).pid

    @property
    def router_pid(self) -> int:
        status = router_status(self.addresses[0], self.placed.credentials)
        assert status is not None
        return status.process.pid

    def times(self, stage: str) -> StepTimes:
        return read_times(self._clocks[self._of_stage[stage]])

    def _program(self, name: str, module: str) -> list[str]:
        timed = ["overfill.lab.bench.vllm.step_clock", str(self._clocks[name])] if name in self._clocks else []
        return [*timed, *module.split()]


class _SyncPeer(JsonProcess):
    """vLLM's synchronous engine in a process of its own, stepped by request."""

    def __init__(self, model: Path, settings: VllmSettings, vocab_size: int, folder: Path) -> None:
        self._clock = new_file(folder / "sync.steps")
        module = "overfill.lab.peers.subprocess_peer"
        command = [sys.executable, "-m", "overfill.lab.bench.vllm.step_clock", str(self._clock), module]
        environment = plain_environment(settings) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        super().__init__(_IN_PROCESS, command, environment, folder / "sync.log")
        try:
            self.ask(
                "load",
                model=str(model),
                vocab_size=vocab_size,
                max_num_seqs=settings.max_num_seqs,
                max_num_batched_tokens=settings.max_num_batched_tokens,
                kv_bytes=settings.kv_memory,
                dtype=settings.dtype,
                context=settings.max_model_len,
                # Without asynchronous scheduling, which an engine in process has on a GPU.
                engine_args={**settings.engine_args, "async_scheduling": False},
            )
        except BaseException:
            self.close()
            raise

    @contextmanager
    def rows(self, count: int, steps: int) -> Iterator[Callable[[int], tuple[StepTimes, float]]]:
        """Sequences that decode. Yields a function that takes some steps, and returns their seconds per step too."""
        self.ask("begin", batch=count, prompt_tokens=CONTEXT, steps=steps)

        def take(some: int) -> tuple[StepTimes, float]:
            before = read_times(self._clock)
            seconds: list[float] = self.ask("steps", count=some)["seconds"]
            return read_times(self._clock).since(before), sum(seconds) / some

        try:
            yield take
        finally:
            self.ask("end")

    def prefill(self, tokens: int) -> StepTimes:
        before = read_times(self._clock)
        self.ask("prefill", lengths=[tokens])
        return read_times(self._clock).since(before)


def measure_host(
    plan: HostPlan, settings: VllmSettings, report: Report, log: Log
) -> Iterator[Measurement | StepProfile]:
    """Measures the host's work. Yields each figure and each profile when it is known.

    Raises:
        StartFailed, PeerFailed: an engine did not start.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="overfill-bench-")))
        report("Copying KV", 0, 1)
        yield from _copies(folder, settings, plan.rounds)
        report("Copying KV", 1, 1)
        tiny = make_tiny_pair(
            folder / "pair",
            identity=True,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=32,  # vLLM's kernels for CPUs want no less
            max_positions=MAX_MODEL_LEN,
        )
        pair = Pair.load(tiny)
        report("Starting engines", 0, 3)
        ours = _TimedStack(settings, pair.folder, folder, log)
        stack.callback(ours.stop)
        ours.start()
        ours.wait_ready(threading.Event())
        report("Starting engines", 1, 3)
        sync = stack.enter_context(closing(_SyncPeer(pair.full_path, settings, pair.full_config.vocab_size, folder)))
        report("Starting engines", 2, 3)
        alone = replace(settings, engine_args={**settings.engine_args, "distributed_executor_backend": _IN_ONE_PROCESS})
        plain = stack.enter_context(
            closing(PlainEngine(_ASYNC, pair.full_path, alone, folder / "async.log", whole=True))
        )
        report("Starting engines", 3, 3)
        clients = stack.enter_context(LoadProcesses(1))
        run = _Run(plan, ours, sync, plain, clients, pair.full_config.vocab_size, report)
        run.warm_up()
        for rows in plan.rows:
            yield from run.measure_rows(rows)
        yield from run.measure_mixed()
        yield from run.measure_prompts()


class _Run:
    """The measured part of a run, with all engines open."""

    def __init__(
        self,
        plan: HostPlan,
        ours: _TimedStack,
        sync: _SyncPeer,
        plain: PlainEngine,
        clients: LoadProcesses,
        vocab_size: int,
        report: Report,
    ) -> None:
        self._plan, self._ours, self._sync, self._plain, self._clients = plan, ours, sync, plain, clients
        self._vocab_size, self._report = vocab_size, report
        self._rng = random.Random(0)
        self._router_pid = ours.router_pid

    def warm_up(self) -> None:
        rows = min(8, max(self._plan.rows))
        self._our_rows(self._requests(rows), 0.2)
        self._plain.decode(self._prompts(rows, CONTEXT), 64, 16)

    def measure_rows(self, rows: int) -> Iterator[Measurement | StepProfile]:
        """Decode steps of ``rows`` plain rows in each engine."""
        values, peer_values = list[dict[str, float]](), list[dict[str, float]]()
        ours, sync = list[StepTimes](), list[StepTimes]()
        most = int(self._plan.rounds * self._plan.seconds * 2000)
        most = min(most, MAX_MODEL_LEN - CONTEXT - rows - 16)
        with self._sync.rows(rows, most) as sync_steps:
            for _ in self._rounds(f"Decoding {rows} rows"):
                times, found = self._our_rows(self._requests(rows), self._plan.seconds)
                steps = max(8, min(times.steps, most // self._plan.rounds, MAX_MODEL_LEN - CONTEXT - 2 * rows - 16))
                window = self._plain.decode(self._prompts(rows, CONTEXT), MAX_MODEL_LEN - CONTEXT, steps)
                of_sync, wall = sync_steps(steps)
                ours.append(times)
                sync.append(of_sync)
                values.append(found)
                of_peers = {"thread": _thread_ms(of_sync), "wall": 1e3 * wall}
                peer_values.append(of_peers | {"rate": window.rate, "cpu_worker": window.cpu_ms})
        yield from rows_figures(rows, values, peer_values)
        yield StepProfile(f"decode, {rows} rows", profile(ours, sync))

    def measure_mixed(self) -> Iterator[Measurement | StepProfile]:
        """Steps in which an eighth of the rows has a grammar or penalties, beside plain ones."""
        rows = max((r for r in self._plan.rows if r <= _MIXED_ROWS), default=0)
        if rows < _SPECIAL:
            return
        plain, mixed = list[StepTimes](), list[StepTimes]()
        for _ in self._rounds(f"Decoding {rows} mixed rows"):
            plain.append(self._our_rows(self._requests(rows), self._plan.seconds)[0])
            mixed.append(self._our_rows(self._requests(rows, mixed=True), self._plan.seconds)[0])
        peer = median(map(_thread_ms, plain))
        special = rows // _SPECIAL
        yield Measurement.median(
            f"thread_mixed_{rows - special}+{special}",
            [_thread_ms(times) for times in mixed],
            "ms/step",
            MAX_MIXED_RATIO * peer,
            peer=f"{rows} plain rows",
            peer_value=peer,
        )
        of = f"decode, {rows - special} plain rows and {special} with a grammar or penalties"
        yield StepProfile(of, profile(mixed, plain))

    def measure_prompts(self) -> Iterator[Measurement | StepProfile]:
        """Time to first token, and the prefill engine's thread."""
        for tokens in (SHORT_PROMPT, CONTEXT):
            ours, plain, threads, peers, layers = (list[float]() for _ in range(5))
            prefills, alone = list[StepTimes](), list[StepTimes]()
            for _ in self._rounds(f"Prompts of {tokens} tokens"):
                first, prefill, count = self._first_tokens(tokens)
                ours.append(1e3 * first)
                threads.append(1e3 * prefill.cpu / count)
                prefills.append(prefill)
                plain.append(1e3 * median(self._plain_first(prompt) for prompt in self._prompts(_PROMPTS, tokens)))
                sync = [self._sync_prefill(tokens) for _ in range(_PROMPTS)]
                peers.append(1e3 * sum(times.cpu for times in sync) / _PROMPTS)
                alone += sync
                calls, seconds = prefill.lines["our layer events"]
                layers.append(1e6 * seconds / max(1, calls))
            limit = median(plain) + MAX_TTFT_MS if tokens == SHORT_PROMPT else None
            yield Measurement.median(f"ttft_{tokens}", ours, "ms", limit, peer=_ASYNC, peer_value=median(plain))
            yield Measurement.median(
                f"thread_prompt_{tokens}", threads, "ms/prompt", peer=_IN_PROCESS, peer_value=median(peers)
            )
            yield Measurement.median(f"layer_event_{tokens}", layers, "us")
            yield StepProfile(f"prefill, a prompt of {tokens} tokens", profile(prefills, alone))

    def _rounds(self, name: str) -> Iterator[None]:
        """Yields once per round, and reports the progress."""
        for done in range(self._plan.rounds):
            self._report(name, done, self._plan.rounds)
            yield
        self._report(name, self._plan.rounds, self._plan.rounds)

    def _our_rows(self, requests: tuple[bytes, ...], seconds: float) -> tuple[StepTimes, dict[str, float]]:
        """The steps of a window of ``seconds`` in which all ``requests`` decode, and its values of ``ROWS_FIGURES``."""
        ours = self._ours
        load = Load("grpc", ours.addresses[0], requests, MAX_MODEL_LEN - CONTEXT, streams=len(requests))
        with self._clients.running(load) as counts:
            wait_for_first_tokens(counts, len(requests))
            time.sleep(_SETTLE)
            worker, router = cpu_seconds(ours.pid("decode")), cpu_seconds(self._router_pid)
            tokens, times, began = counts().tokens, ours.times("decode"), time.perf_counter()
            time.sleep(seconds)
            tokens, times = counts().tokens - tokens, ours.times("decode").since(times)
            passed = time.perf_counter() - began
            worker, router = cpu_seconds(ours.pid("decode")) - worker, cpu_seconds(self._router_pid) - router
        time.sleep(_SETTLE)  # the workers notice that the client has gone
        return times, {
            "thread": _thread_ms(times),
            "wall": 1e3 * times.wall / max(1, times.steps),
            "rate": tokens / passed,
            "cpu_worker": 1e3 * worker / max(1, tokens),
            "cpu_router": 1e3 * router / max(1, tokens),
        }

    def _first_tokens(self, tokens: int) -> tuple[float, StepTimes, int]:
        """Sends prompts at fixed times.

        Returns:
            Seconds to the first token, the prefill thread's steps, and the number of prompts.
        """
        requests = tuple(_request(prompt, _ANSWER) for prompt in self._prompts(2 * _PROMPTS, tokens))
        before = self._ours.times("prefill")
        load = Load("grpc", self._ours.addresses[0], requests, _ANSWER, rate=1 / _PAUSE)
        with self._clients.running(load) as counts:
            found = wait_for_first_tokens(counts, _PROMPTS)
        time.sleep(_SETTLE)
        return median(found), self._ours.times("prefill").since(before), len(found)

    def _plain_first(self, prompt: list[int]) -> float:
        time.sleep(_PAUSE)
        return self._plain.answer(prompt, _ANSWER)[0][0]

    def _sync_prefill(self, tokens: int) -> StepTimes:
        time.sleep(_PAUSE)
        return self._sync.prefill(tokens)

    def _requests(self, rows: int, mixed: bool = False) -> tuple[bytes, ...]:
        prompts = self._prompts(rows, CONTEXT)
        special = ({"frequency_penalty": 0.5}, {"grammar": Grammar("regex", "[a-z ]{12000}"), "ignore_eos": False})
        return tuple(
            _request(
                prompt,
                MAX_MODEL_LEN - CONTEXT,
                special[at // _SPECIAL % 2] if mixed and at % _SPECIAL == 0 else {},
            )
            for at, prompt in enumerate(prompts)
        )

    def _prompts(self, count: int, tokens: int) -> list[list[int]]:
        """Random prompts, of which no two share a prefix."""
        return [[self._rng.randrange(2, self._vocab_size) for _ in range(tokens)] for _ in range(count)]


def rows_figures(
    rows: int, ours: Sequence[Mapping[str, float]], peers: Sequence[Mapping[str, float]]
) -> list[Measurement]:
    """``ROWS_FIGURES`` from the values of each round, by figure."""
    found = []
    for name, (unit, peer, ratio, limited) in ROWS_FIGURES.items():
        value = None if peer is None else median(of_round[name] for of_round in peers)
        bound = ratio * value if ratio and value and rows in (limited or (rows,)) else None
        found.append(
            Measurement.median(
                f"{name}_{rows}",
                [of_round[name] for of_round in ours],
                unit,
                bound,
                at_least=name == "rate",
                peer=peer,
                peer_value=value,
            )
        )
    return found


def profile(ours: Sequence[StepTimes], peer: Sequence[StepTimes]) -> dict[str, tuple[float, float]]:
    """Milliseconds of a step by line of work, in our worker and in the peer, with the thread's other work."""
    sides = [_lines(ours), _lines(peer)]
    return {name: (sides[0][name], sides[1][name]) for name in sides[0]}


def profiles_table(profiles: Sequence[StepProfile]) -> Table:
    """A table with a line per line of work, and for each kind of step our time and the peer's."""
    table = Table()
    table.add_column("ms of a step: ours / peer's")
    for one in profiles:
        table.add_column(one.of, justify="right")
    for line in (*LINES, "other", "all"):
        cells = [one.ms[line] for one in profiles]
        table.add_row(line, *("" if not any(cell) else f"{cell[0]:.3f} / {cell[1]:.3f}" for cell in cells))
    return table


def _lines(all_times: Sequence[StepTimes]) -> Mapping[str, float]:
    steps = max(1, sum(times.steps for times in all_times))
    found = {name: 1e3 * sum(times.lines[name][1] for times in all_times) / steps for name in LINES}
    total = 1e3 * sum(times.cpu for times in all_times) / steps
    return found | {"other": total - sum(found.values()), "all": total}


def _thread_ms(times: StepTimes) -> float:
    return 1e3 * times.cpu / max(1, times.steps)


def _request(prompt: list[int], max_tokens: int, sampling: dict[str, Any] | None = None) -> bytes:
    plain: dict[str, Any] = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}
    rules = SamplingParams(**plain | (sampling or {}))
    ids = inference_pb2.TokenIds(ids=prompt)
    return inference_pb2.GenerateRequest(token_ids=ids, sampling=rules.to_proto()).SerializeToString()


def _copies(folder: Path, settings: VllmSettings, rounds: int) -> list[Measurement]:
    """Speed of copies of KV out of and into vLLM's blocks."""
    # KV as of a model with 8 billion weights, in half of its layers.
    pair = make_tiny_pair(folder / "kv", identity=True, num_layers=16, num_heads=8, num_kv_heads=8, head_dim=128)
    module = "overfill.lab.bench.vllm.kv_copies"
    command = [sys.executable, "-m", module, str(pair), settings.device, settings.dtype, str(2 * rounds)]
    done = subprocess.run(command, env=plain_environment(settings), capture_output=True, text=True, check=False)
    if done.returncode:
        failure = PeerFailed(f"the copies of KV failed with status {done.returncode}")
        for line in done.stderr.splitlines()[-8:]:
            failure.add_note(line)
        raise failure
    rates = {name: rate / 1e9 for name, rate in json.loads(done.stdout.splitlines()[-1]).items()}
    memcpy = rates.pop("memcpy")
    return [
        Measurement(
            f"kv_{name}",
            rate,
            "GB/s",
            MIN_COPY_RATIO * memcpy if name.endswith("_1") else None,
            at_least=True,
            peer="memcpy",
            peer_value=memcpy,
        )
        for name, rate in rates.items()
    ]
