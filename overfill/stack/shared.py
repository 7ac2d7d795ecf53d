"""What the processes of a stack share on one machine: a folder of files, the cores, the GPUs."""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Iterable
from itertools import chain, count
from pathlib import Path

from overfill.process.gpus import gpu_count, visible_gpus
from overfill.process.held_folder import remove_abandoned_folders
from overfill.settings.worker_kinds import WorkerSettings
from overfill.stack.child import StartFailed
from overfill.stack.placed import PlacedStack, PlacedWorker
from overfill.stack.spec import StackSpec


def make_shared_folder(folder: Path, new_secret: bool) -> None:
    """Makes the folder, which other users cannot read, and if asked in it the secret that ``with_secret`` names.

    The runner removes the folder at the end, and holds it (``hold_folder``) until then. A stack on a cluster that it
    joined may outlive it, so that it does not hold that stack's folder.
    """
    remove_abandoned_folders()
    folder.mkdir(mode=0o700)
    (folder / "routers").mkdir()
    if new_secret:
        (folder / "secret").write_text(secrets.token_hex(32) + "\n", encoding="utf-8")


def share_cores(placed: PlacedStack) -> PlacedStack:
    """Returns ``placed`` with a shared file in the settings of workers with more threads than there are cores.

    Returns it as it is if the workers compute nothing or have cores of their own.
    """
    if placed.spec.mock or not are_shared(worker.config.threads for worker in placed.workers):
        return placed
    shared = {"shared_cores": new_file(placed.folder)}
    return placed.with_configs(
        lambda worker: worker.config if worker.config.shared_cores else worker.config.model_copy(update=shared)
    )


def are_shared(threads: Iterable[int]) -> bool:
    """True if workers with these numbers of threads need to take turns at this machine's cores."""
    counts = list(threads)
    return len(counts) > 1 and sum(counts) > len(os.sched_getaffinity(0))


def new_file(folder: Path) -> Path:
    """Makes the file through which workers take turns."""
    path = folder / "cores"
    path.touch(0o600)
    return path


def share_gpus(placed: PlacedStack) -> tuple[PlacedStack, dict[str, str]]:
    """Returns ``placed`` with the workers' shares of their GPUs, and their values of ``CUDA_VISIBLE_DEVICES`` by id.

    Workers take the GPUs in turn, one for each rank, and those of one GPU get a share of its memory each. Workers with
    more ranks choose first, so that their GPUs are neighbours. Only workers that choose their GPUs themselves have a
    value: without it, every one of them would take the first GPUs.
    """
    gpus = visible_gpus()
    if placed.spec.mock or not gpus:
        return placed, {}
    turn = count()
    ranks = {w.id: range(w.config.tensor_parallel_size) for w in placed.workers}
    widest = sorted(placed.workers, key=lambda w: -len(ranks[w.id]))
    choosing = {
        w.id: [next(turn) % len(gpus) for _ in ranks[w.id]] for w in widest if w.config.device in ("auto", "cuda")
    }
    named = {
        w.id: [int(w.config.device[5:]) + rank for rank in ranks[w.id]]
        for w in placed.workers
        if w.config.device.startswith("cuda:")
    }
    places = choosing | named
    workers = Counter(chain.from_iterable(places.values()))

    def shared(worker: PlacedWorker) -> WorkerSettings:
        if worker.id not in places or worker.config.gpu_share is not None:
            return worker.config
        return worker.config.model_copy(update={"gpu_share": 1 / max(workers[place] for place in places[worker.id])})

    return placed.with_configs(shared), {id: ",".join(gpus[place] for place in own) for id, own in choosing.items()}


def check_gpus(spec: StackSpec) -> None:
    """Raises StartFailed if a worker that computes on GPUs has more ranks than this machine has GPUs."""
    gpus = gpu_count()
    for name in spec.pools:
        worker = spec.worker_config(name)
        on_gpus = worker.device.startswith("cuda") or (worker.device == "auto" and gpus > 0)
        if on_gpus and 1 < worker.tensor_parallel_size > gpus:
            raise StartFailed(
                f"{name}: --tensor-parallel-size {worker.tensor_parallel_size} needs a GPU for each rank, and this "
                f"machine has {gpus} (CUDA_VISIBLE_DEVICES counts): give a smaller size"
            )
