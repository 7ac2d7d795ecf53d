"""Gives the workers of one machine its GPUs in turn, and those of one GPU a share of its memory each."""

from __future__ import annotations

from collections import Counter
from itertools import count

from overfill.process.gpus import visible_gpus
from overfill.settings.worker_kinds import WorkerSettings
from overfill.stack.placed import PlacedStack, PlacedWorker


def share_gpus(placed: PlacedStack) -> tuple[PlacedStack, dict[str, str]]:
    """Returns ``placed`` with the workers' shares of their GPUs, and their values of ``CUDA_VISIBLE_DEVICES`` by id.

    Only workers that choose their GPU themselves have a value: without it, every one of them would take the first GPU.
    """
    gpus = visible_gpus()
    if placed.spec.mock or not gpus:
        return placed, {}
    turn = count()
    choosing = {w.id: next(turn) % len(gpus) for w in placed.workers if w.config.device in ("auto", "cuda")}
    named = {w.id: int(w.config.device[5:]) for w in placed.workers if w.config.device.startswith("cuda:")}
    places = choosing | named
    workers = Counter(places.values())

    def shared(worker: PlacedWorker) -> WorkerSettings:
        if worker.id not in places or worker.config.gpu_share is not None:
            return worker.config
        return worker.config.model_copy(update={"gpu_share": 1 / workers[places[worker.id]]})

    return placed.with_configs(shared), {id: gpus[place] for id, place in choosing.items()}
