"""Hooks of the conformance tests for the engine on vLLM, with one rank and with two."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engine_conformance import BLOCK_SIZE
from rank_store import RankStore

from overfill.engine.load import load_engine
from overfill.engine.protocol import EngineCore, EngineOptions, LoadedEngine
from overfill.engine.vllm.engine import VllmEngine
from overfill.model.manifest import Half, Pair


class OnVllm:
    """The hooks of the engine on vLLM."""

    # Its kernels add in another order than transformers: up to 4e-5 in the last layer.
    kv_tolerance = 1e-4

    @classmethod
    def load(cls, pair: Pair, half: Half, options: EngineOptions) -> LoadedEngine:
        config = pair.full_config if half == "full" else pair.decoder_config
        null_block = BLOCK_SIZE * config.kv_spec("float32").token_bytes
        options = replace(options, kv_memory=(options.kv_memory or 0) + null_block, engine_args={"enforce_eager": True})
        return load_engine("vllm", pair, half, options)

    @classmethod
    def fail_next_step(cls, core: EngineCore) -> None:
        assert isinstance(core, VllmEngine)
        executor: Any = core._vllm._core.model_executor

        def fail(*arguments: object, **options: object) -> None:
            del executor.execute_model
            raise RuntimeError("the model failed")

        executor.execute_model = fail


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
