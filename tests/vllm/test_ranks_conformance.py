"""Runs the conformance tests of the engine protocol on vLLM with two ranks, whose KV the driver reaches by calls."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import decode_conformance as decode
import prefill_conformance as prefill
import pytest
from engine_conformance import BLOCK_SIZE, prompt, sampling
from rank_store import RankStore, add_unwilling_processor, break_processor, draw_other_noise
from sampled_reference import Request

from overfill.engine.load import load_engine
from overfill.engine.protocol import EngineCore, EngineOptions, LoadedEngine
from overfill.engine.vllm.engine import VllmEngine
from overfill.engine.vllm.ranks import executor as executor_module
from overfill.engine.vllm.ranks.group import RankProcessor
from overfill.errors import InternalError
from overfill.model.manifest import Half, Pair
from overfill.request.params import SamplingParams

# Importing and loading vLLM warns of deprecated uses of torch, which are not ours.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]


class OnRanks:
    """The hooks of the engine on vLLM with two ranks."""

    kv_tolerance = 1e-4

    @classmethod
    def load(cls, pair: Pair, half: Half, options: EngineOptions) -> LoadedEngine:
        config = pair.full_config if half == "full" else pair.decoder_config
        share = config.kv_spec("float32").token_bytes // 2
        kv_memory = (options.kv_memory or 0) // 2 + BLOCK_SIZE * share  # and vLLM's null block
        options = replace(options, kv_memory=kv_memory, tensor_parallel_size=2, engine_args={"enforce_eager": True})
        loaded = load_engine("vllm", pair, half, options)

        def new_core(*arguments: Any) -> EngineCore:
            core = loaded.new_core(*arguments)
            assert isinstance(core, VllmEngine)
            store.append(RankStore(core._vllm.executor, BLOCK_SIZE, config.num_kv_heads, config.head_dim))
            return core

        store: list[RankStore] = []
        return LoadedEngine(replace(loaded.served, store=_Late(store)), new_core)


class _Late:
    """The store of a core that is made later."""

    def __init__(self, stores: list[RankStore]) -> None:
        self._stores = stores
        self.block_size = BLOCK_SIZE

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stores[0], name)


class TestRanksDecode(OnRanks, decode.DecodeConformance):
    def break_sampling(self, driver: Any, processor: Any, part: str) -> None:
        driver.core._vllm.executor.collective_rpc(break_processor, args=(processor.key, part))


class TestRanksDecodeWithFewBlocks(OnRanks, decode.SmallDecodeConformance):
    pass


class TestRanksPrefill(OnRanks, prefill.PrefillConformance):
    def unwilling(self, driver: Any, params: SamplingParams) -> RankProcessor:
        driver.core._vllm.executor.collective_rpc(add_unwilling_processor, args=("unwilling", params))
        return RankProcessor("unwilling")


class TestLostRanks(OnRanks, decode.DecodeEngineConformance):
    def test_ranks_that_disagree_and_a_rank_that_ends_end_the_engine(
        self, driver: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        (running,) = driver.begin(Request(prompt(20), sampling("temperature", 9)))
        driver.step()
        executor = driver.core._vllm.executor
        executor.collective_rpc(draw_other_noise, args=(1,))
        with pytest.raises(InternalError, match=r"rank 0 chose token \[\d+\] for a sequence, and rank 1 \[\d+\]"):
            driver.run()
        assert running.ended_engine

        ended = threading.Event()
        monkeypatch.setattr(executor, "end_process", ended.set)
        monkeypatch.setattr(executor_module, "_GRACE", 0.0)
        first, second = (handle.proc for handle in executor.workers)
        os.kill(first.pid, signal.SIGSTOP)  # a stopped process hears no other signal than SIGKILL
        os.kill(second.pid, signal.SIGKILL)
        assert ended.wait(30)
        assert f"rank 1 (process {second.pid}) was ended by SIGKILL" in caplog.text
        first.join(30)
        assert first.exitcode == -signal.SIGKILL
        with pytest.raises(InternalError, match="rank 1"):
            driver.core._vllm.step()


def test_a_rank_that_ends_before_its_queue_is_known_ends_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM begins to watch the ranks a moment before it lists their queues, and then waits for them without end."""
    monkeypatch.setattr(executor_module, "_GRACE", 0.0)
    executor, ended = executor_module.RankExecutor.__new__(executor_module.RankExecutor), threading.Event()
    executor.failure, executor._failing, executor.end_process = None, threading.Lock(), ended.set
    rank = multiprocessing.get_context("spawn").Process(name="rank-1", target=os._exit, args=(3,))
    rank.start()
    executor.workers = [SimpleNamespace(proc=rank)]
    executor._watch()
    assert ended.wait(30)
    assert executor.failure == f"rank 1 (process {rank.pid}) exited with code 3"
