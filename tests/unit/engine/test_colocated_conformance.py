"""Runs the conformance tests of both engines on a worker with both stages, which also computes prompts for itself."""

from __future__ import annotations

from typing import Any

import decode_conformance as decode
import prefill_conformance as prefill
import pytest
from engine_conformance import fail_next_step_of
from engine_drivers import LocalDecodeDriver

from overfill.engine.colocated import ColocatedEngine
from overfill.engine.load import load_colocated
from overfill.engine.protocol import EngineCore, EngineOptions, LoadedEngine
from overfill.model.manifest import Half, Pair
from overfill.telemetry.engine_load import EngineLoad


class OneStage:
    """A worker with both stages, of which a driver sees one. The other stage must be empty whenever this one is."""

    def __init__(self, engine: ColocatedEngine, half: Half) -> None:
        self.handle, self.step, self.close = engine.handle, engine.step, engine.close
        self.engine = engine
        self._half = half

    @property
    def step_shape(self) -> tuple[int, int]:
        return self.engine.step_shape

    def load(self) -> EngineLoad:
        load = self.engine.load()
        return load.prefill if self._half == "full" else load

    def check(self) -> None:
        self.engine.check()
        if self.load().blocks_used == 0:
            load = self.engine.load()
            assert load.prefill.blocks_used == load.blocks_used == 0


class Colocated:
    """The hooks of a worker with both stages."""

    @classmethod
    def load(cls, pair: Pair, half: Half, options: EngineOptions) -> LoadedEngine:
        loaded = load_colocated(pair, options, options)

        def new_core(emit: Any, metrics: Any) -> EngineCore:
            def nothing(events: Any) -> None:
                raise AssertionError(f"events of the other stage: {events}")

            if half == "full":
                return OneStage(loaded.new_core(emit, nothing, metrics, None, 2.0, 0.1), half)
            return OneStage(loaded.new_core(nothing, emit, None, metrics, 2.0, 0.1), half)

        return LoadedEngine((loaded.full if half == "full" else loaded.decoder).served, new_core)

    @classmethod
    def fail_next_step(cls, core: EngineCore) -> None:
        assert isinstance(core, OneStage)
        engine = core.engine
        fail_next_step_of((engine._prefill if core._half == "full" else engine._decode)._runner)


class TestDecode(Colocated, decode.DecodeConformance):
    pass


class TestDecodeWithFewBlocks(Colocated, decode.SmallDecodeConformance):
    pass


class TestFailedDecodeStep(Colocated, decode.FailedStepDecodeConformance):
    pass


class TestDecodeOfLocalPrompts(Colocated, decode.DecodeConformance):
    decode_driver = LocalDecodeDriver


class TestDecodeOfLocalPromptsWithDroppedLayers(Colocated, decode.DroppedLayersDecodeConformance):
    decode_driver = LocalDecodeDriver


class TestDecodeOfLocalPromptsWithFewBlocks(Colocated, decode.SmallDecodeConformance):
    decode_driver = LocalDecodeDriver


class TestPrefill(Colocated, prefill.PrefillConformance):
    @pytest.fixture(autouse=True)
    def _announces_each_layer_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The engine would announce the few bytes of a tiny model's layers together, after the step."""
        monkeypatch.setattr("overfill.engine.layers.MIN_NOTIFY_BYTES", 1)


class TestPrefillWithFewBlocks(Colocated, prefill.SmallPrefillConformance):
    pass


class TestFailedPrefillStep(Colocated, prefill.FailedStepPrefillConformance):
    pass
