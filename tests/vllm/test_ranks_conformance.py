"""Runs the conformance tests of the engine protocol on vLLM with two ranks, whose KV the driver reaches by calls."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import decode_conformance as decode
import prefill_conformance as prefill
import pytest
from engine_conformance import prompt, sampling
from rank_store import add_unwilling_processor, break_processor, draw_other_noise
from sampled_reference import Request
from vllm_engines import OnRanks

from overfill.engine.vllm.ranks import executor as executor_module
from overfill.engine.vllm.ranks.group import RankProcessor
from overfill.errors import InternalError
from overfill.request.params import SamplingParams

# Importing and loading vLLM warns of deprecated uses of torch, which are not ours.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]


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
        until = time.monotonic() + 30
        while first.exitcode is None and time.monotonic() < until:  # the executor joins too: one of both gets the code
            time.sleep(0.01)
        assert first.exitcode == -signal.SIGKILL
        with pytest.raises(InternalError, match="rank 1"):
            driver.core._vllm.step()


def test_a_worker_killed_while_ranks_load_leaves_a_folder_that_the_next_one_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is held is removed once its process has ended (``unit/stack/test_shared_folder.py``)."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found: list[set[str]] = []

    def load(executor: Any) -> None:
        folder = Path(os.environ["VLLM_RPC_BASE_PATH"])
        found.append({file.name for file in folder.iterdir()})
        assert folder.parent == tmp_path
        assert folder.stat().st_mode & 0o77 == 0

    monkeypatch.setattr(executor_module.MultiprocExecutor, "_init_executor", load)
    monkeypatch.setattr(executor_module.RankExecutor, "_unname", lambda executor: None)
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", "")
    executor_module.RankExecutor.__new__(executor_module.RankExecutor)._init_executor()
    assert found == [{"held"}]
    assert not [*tmp_path.iterdir()]


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
