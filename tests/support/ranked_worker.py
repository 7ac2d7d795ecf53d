"""A prefill worker on the mock engine with two ranks, processes without a model. Takes the worker's arguments.

Prints a line once it serves: its address, the ranks' data addresses, and their process ids, as JSON. Prints another
line once it has served: the number of the ranks' listeners. Then it ends the ranks, as vLLM does.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from dataclasses import replace

from listening import listening
from rank_agents import rank_process

from overfill.engine.protocol import LoadedEngine
from overfill.engine.vllm.ranks.link import RankLinks
from overfill.engine.vllm.ranks.worker import WorkerRanks
from overfill.model.manifest import Half
from overfill.rpc.worker import WorkerHost
from overfill.settings.config import PrefillConfig, WorkerConfig
from services.hosting import OnReady, run_worker_process
from services.prefill import main as prefill

SILENCE = 6.0  # seconds; a machine under load must not make a rank silent

_load = prefill.load_half_of
_pids: list[int] = []
_links: list[RankLinks] = []


async def _with_ranks(config: WorkerConfig, half: Half) -> LoadedEngine:
    loaded = await _load(config, half)
    kv = loaded.served.kv
    _links.append(links := RankLinks(2, _lost, SILENCE))
    middle = kv.num_kv_heads // 2
    for rank, heads in enumerate([(0, middle), (middle, kv.num_kv_heads)]):
        _pids.append(rank_process(links, rank, kv, heads).pid)
    ranks = WorkerRanks(links, await asyncio.to_thread(links.wait, 60), kv)
    return replace(loaded, served=replace(loaded.served, ranks=ranks))


def _lost(rank: int, reason: str) -> None:
    print(reason, file=sys.stderr, flush=True)
    os._exit(1)


def _ready(host: WorkerHost) -> None:
    shares = [share.address for share in host._hello.data_addresses]
    print(json.dumps({"address": host.address, "shares": shares, "pids": _pids}), flush=True)


async def _serve(config: PrefillConfig, on_ready: OnReady) -> int:
    code = await prefill.serve(config, _ready)
    print(len(listening(_pids)), flush=True)
    _links[0].close()
    for pid in _pids:
        os.kill(pid, signal.SIGKILL)
    return code


if __name__ == "__main__":
    prefill.load_half_of = _with_ranks
    config = PrefillConfig.parse(sys.argv[1:])
    run_worker_process(_serve, config)
