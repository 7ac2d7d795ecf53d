"""A fault reaches the engine that a worker runs; the integration tests judge the whole stack."""

from __future__ import annotations

import faulty_service as faults
import pytest

from overfill.engine.vllm.store import VllmKvStore
from overfill.kv.cache import KvCache
from overfill.settings.config import DecodeConfig


def test_a_fault_reaches_the_engine_that_the_parent_s_settings_name(monkeypatch: pytest.MonkeyPatch) -> None:
    ((variable, settings),) = DecodeConfig.of({"pair": "p", "engine": "vllm"}).environment().items()
    monkeypatch.setenv(variable, settings)
    write = VllmKvStore.write
    for store in (VllmKvStore, KvCache):  # monkeypatch restores what the fault replaces
        monkeypatch.setattr(store, "write", store.write)
    faults.overwrite_kv_chunk()
    assert VllmKvStore.write is not write
