"""The kinds of worker: the stages, the settings and the module of each; and the variables of every service."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from overfill.settings.config import ColocatedConfig, DecodeConfig, PrefillConfig, RouterConfig

WorkerStage = Literal["prefill", "decode"]
WorkerSettings = PrefillConfig | DecodeConfig


@dataclass(frozen=True, slots=True)
class WorkerKind:
    """A kind of worker.

    Attributes:
        name: first part of its workers' ids, and its section in the settings file.
        stages: the stages of each of its workers.
        settings: class of its settings.
        module: what follows ``python -m`` to start one.
    """

    name: str
    stages: tuple[WorkerStage, ...]
    settings: type[PrefillConfig] | type[DecodeConfig]
    module: str


PREFILL = WorkerKind("prefill", ("prefill",), PrefillConfig, "services.prefill.main")
DECODE = WorkerKind("decode", ("decode",), DecodeConfig, "services.decode.main")
COLOCATED = WorkerKind("colocated", ("prefill", "decode"), ColocatedConfig, "services.colocated.main")

KINDS = {kind.name: kind for kind in (PREFILL, DECODE, COLOCATED)}

VARIABLE_PREFIXES = tuple(settings.prefix for settings in (RouterConfig, *(kind.settings for kind in KINDS.values())))
"""Prefixes of variables that set a service. The planner of a stack reads them and passes flags to its processes."""
