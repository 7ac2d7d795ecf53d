"""From names on a command line to contenders that are loaded, or to why one is missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from overfill.errors import InvalidRequest
from overfill.lab.bench.contender import Contender
from overfill.lab.bench.ours import Workload
from overfill.lab.bench.peers.environment import RECIPES, install_hint, python_of
from overfill.lab.bench.peers.process import PeerProcess
from overfill.model.manifest import Pair
from overfill.pair.sources import CONVERTED_DIGEST
from overfill.pair.store import default_gguf
from overfill.telemetry.progress import Report, silent

BUILT_IN = ("transformers", "reference")
PEERS = (*BUILT_IN, *RECIPES)


@dataclass(frozen=True, slots=True)
class PeerSetting:
    """What all peers are given, so that they do the same work with the same means.

    Attributes:
        workload: most sequences, and tokens of each.
        kv_bytes: of the KV cache of peers that have one; None: as much as the workload fills.
    """

    pair: Pair
    dtype: torch.dtype
    device: torch.device
    threads: int
    workload: Workload
    token_budget: int
    logs: Path
    kv_bytes: int | None = None

    @property
    def cache_bytes(self) -> int:
        if self.kv_bytes is not None:
            return self.kv_bytes
        halves = self.pair.full_config.kv_spec("bfloat16").token_bytes
        return self.workload.cache_bytes(halves * self.dtype.itemsize // torch.bfloat16.itemsize)


@dataclass(frozen=True, slots=True)
class Missing:
    """A peer that cannot be measured here, and what to do about it."""

    name: str
    hint: str


def parse_peers(text: str) -> tuple[str, ...]:
    """Names from ``a,b``; ``all`` and ``none`` are what they say.

    Raises:
        InvalidRequest: a name is unknown.
    """
    if text in ("all", "none"):
        return PEERS if text == "all" else ()
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if unknown := [name for name in names if name not in PEERS]:
        raise InvalidRequest("peers", f"{', '.join(unknown)} is none of {', '.join(PEERS)}, all, none")
    return names


def open_peers(
    names: Sequence[str], setting: PeerSetting, stack: ExitStack, report: Report = silent
) -> tuple[list[Contender], list[Missing]]:
    """Loads the peers that can be measured; ``stack`` closes them.

    Raises:
        PeerFailed: one that is installed does not start.
    """
    found: list[Contender] = []
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


def open_process(name: str, setting: PeerSetting) -> PeerProcess | Missing:
    """A peer in an environment of its own.

    Raises:
        PeerFailed: it does not start.
    """
    python = python_of(name)
    if python is None:
        return Missing(name, f"not installed: {install_hint(name)}")
    if setting.device.type != "cpu":
        return Missing(name, "is a peer on a CPU only")
    return _OUTSIDE[name](python, setting)


def _open(name: str, setting: PeerSetting) -> Contender | Missing:
    if name in RECIPES:
        return open_process(name, setting)
    # Not at the top: transformers takes seconds to import.
    from overfill.lab.bench.peers.plain import ReferenceLoop, TransformersGenerate

    if name == "reference":
        return ReferenceLoop(setting.pair, setting.dtype, setting.device)
    return TransformersGenerate(setting.pair.full_path, setting.dtype, setting.device)


def _openvino(python: Path, setting: PeerSetting) -> PeerProcess | Missing:
    if setting.pair.full_digest != CONVERTED_DIGEST:
        return Missing("openvino", "reads the GGUF of the named pairs' full model only")
    return _process("openvino", python, setting, model=str(default_gguf()))


def _vllm(python: Path, setting: PeerSetting) -> PeerProcess | Missing:
    return _process(
        "vllm",
        python,
        setting,
        model=str(setting.pair.full_path),
        dtype=str(setting.dtype).removeprefix("torch."),
        context=setting.workload.tokens + 64,
    )


def _process(name: str, python: Path, setting: PeerSetting, **options: object) -> PeerProcess:
    return PeerProcess(
        name,
        python,
        setting.threads,
        setting.logs / f"{name}.log",
        vocab_size=setting.pair.full_config.vocab_size,
        max_num_seqs=setting.workload.batch,
        token_budget=setting.token_budget,
        kv_bytes=setting.cache_bytes,
        **options,
    )


_OUTSIDE: dict[str, Callable[[Path, PeerSetting], PeerProcess | Missing]] = {"openvino": _openvino, "vllm": _vllm}
