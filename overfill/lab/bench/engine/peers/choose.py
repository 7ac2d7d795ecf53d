"""Loads the peers that a command names, and says why a peer is missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from overfill.errors import InvalidRequest
from overfill.lab.bench.engine.overfill_engine import EngineWorkload
from overfill.lab.bench.engine.peers.environment import ENVIRONMENTS, NOT_INSTALLED, python_of
from overfill.lab.bench.engine.peers.process import PeerProcess
from overfill.lab.bench.engine.protocol import BenchEngine
from overfill.making.full_models import default_gguf
from overfill.making.sources import CONVERTED_DIGEST
from overfill.model.manifest import Pair
from overfill.telemetry.progress import Report, silent

BUILT_IN = ("transformers", "reference")
PEERS = (*BUILT_IN, *ENVIRONMENTS)


@dataclass(frozen=True, slots=True)
class PeerSettings:
    """Settings that all peers of a run share, so that they do the same work with the same resources.

    Attributes:
        workload: The largest batch and the longest sequence.
        max_num_batched_tokens: Maximum prompt tokens in a step.
        logs: Folder for the output of peer processes.
        kv_bytes: Size of a peer's KV cache, if it has one. None means as much as the workload fills.
    """

    pair: Pair
    dtype: torch.dtype
    device: torch.device
    threads: int
    workload: EngineWorkload
    max_num_batched_tokens: int
    logs: Path
    kv_bytes: int | None = None

    @property
    def cache_bytes(self) -> int:
        if self.kv_bytes is not None:
            return self.kv_bytes
        token_bytes = self.pair.full_config.kv_spec("bfloat16").token_bytes
        return self.workload.cache_bytes(token_bytes * self.dtype.itemsize // torch.bfloat16.itemsize)


@dataclass(frozen=True, slots=True)
class Missing:
    """A peer that cannot be measured here.

    Attributes:
        hint: The reason, and what to do about it.
    """

    name: str
    hint: str


def parse_peers(text: str) -> tuple[str, ...]:
    """Parses ``a,b``, ``all`` or ``none`` into names of peers.

    Raises:
        InvalidRequest: A name is unknown.
    """
    if text in ("all", "none"):
        return PEERS if text == "all" else ()
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if unknown := [name for name in names if name not in PEERS]:
        raise InvalidRequest("peers", f"unknown: {', '.join(unknown)}; choose from {', '.join(PEERS)}, all, none")
    return names


def open_peers(
    names: Sequence[str], setting: PeerSettings, stack: ExitStack, report: Report = silent
) -> tuple[list[BenchEngine], list[Missing]]:
    """Loads the named peers, and registers them with ``stack`` to be closed.

    Returns:
        The peers that are loaded, and those that cannot be measured here.

    Raises:
        PeerFailed: An installed peer does not start.
    """
    found: list[BenchEngine] = []
    missing: list[Missing] = []
    for done, name in enumerate(names):
        report("Loading peers", done, len(names))
        opened = _open(name, setting)
        if isinstance(opened, Missing):
            missing.append(opened)
        else:
            stack.callback(opened.close)
            found.append(opened)
    if names:
        report("Loading peers", len(names), len(names))
    return found, missing


def open_process(name: str, setting: PeerSettings) -> PeerProcess | Missing:
    """Starts a peer that has an environment of its own.

    Raises:
        PeerFailed: The peer does not start.
    """
    python = python_of(name)
    if python is None:
        return Missing(name, NOT_INSTALLED)
    if setting.device.type != "cpu":
        return Missing(name, "runs on a CPU only; choose --device cpu")
    return _PROCESSES[name](python, setting)


def _open(name: str, setting: PeerSettings) -> BenchEngine | Missing:
    if name in ENVIRONMENTS:
        return open_process(name, setting)
    # Imported here, because transformers takes seconds to import.
    from overfill.lab.bench.engine.peers.hf_baseline import ReferenceLoop, TransformersGenerate

    if name == "reference":
        return ReferenceLoop(setting.pair, setting.dtype, setting.device)
    return TransformersGenerate(setting.pair.full_path, setting.dtype, setting.device)


def _openvino(python: Path, setting: PeerSettings) -> PeerProcess | Missing:
    if setting.pair.full_digest != CONVERTED_DIGEST:
        return Missing(
            "openvino",
            "supports only the full model of the pairs default, fast and identity (it reads their GGUF file)",
        )
    return _start("openvino", python, setting, model=str(default_gguf()))


def _vllm(python: Path, setting: PeerSettings) -> PeerProcess | Missing:
    return _start(
        "vllm",
        python,
        setting,
        model=str(setting.pair.full_path),
        dtype=str(setting.dtype).removeprefix("torch."),
        context=setting.workload.tokens + 64,
    )


def _start(name: str, python: Path, setting: PeerSettings, **options: object) -> PeerProcess:
    return PeerProcess(
        name,
        python,
        setting.threads,
        setting.logs / f"{name}.log",
        vocab_size=setting.pair.full_config.vocab_size,
        max_num_seqs=setting.workload.batch,
        max_num_batched_tokens=setting.max_num_batched_tokens,
        kv_bytes=setting.cache_bytes,
        **options,
    )


_PROCESSES: dict[str, Callable[[Path, PeerSettings], PeerProcess | Missing]] = {"openvino": _openvino, "vllm": _vllm}
