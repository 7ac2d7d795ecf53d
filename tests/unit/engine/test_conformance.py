"""Runs the conformance tests of the engine protocol on OverFill's engine."""

from __future__ import annotations

import adapter_conformance as adapters
import decode_conformance as decode
import prefill_conformance as prefill
import pytest
from engine_conformance import fail_next_step_of

from overfill.engine.decode import DecodeEngine
from overfill.engine.load import load_engine
from overfill.engine.prefill import PrefillEngine
from overfill.engine.protocol import EngineCore, EngineOptions, LoadedEngine
from overfill.model.manifest import Half, Pair


class OverFill:
    """The hooks of OverFill's engine."""

    @classmethod
    def load(cls, pair: Pair, half: Half, options: EngineOptions) -> LoadedEngine:
        return load_engine("overfill", pair, half, options)

    @classmethod
    def fail_next_step(cls, core: EngineCore) -> None:
        assert isinstance(core, DecodeEngine | PrefillEngine)
        fail_next_step_of(core._runner)


class TestDecode(OverFill, decode.DecodeConformance):
    pass


class TestDecodeWithDroppedLayers(OverFill, decode.DroppedLayersDecodeConformance):
    pass


class TestDecodeOfTheReader(OverFill, decode.ReturnsDecodeConformance):
    pass


class TestDecodeWithFewBlocks(OverFill, decode.SmallDecodeConformance):
    pass


class TestDecodeOfTheReaderWithFewBlocks(OverFill, decode.SmallReturnsDecodeConformance):
    pass


class TestAdapters(OverFill, adapters.AdapterConformance):
    @classmethod
    def load(cls, pair: Pair, half: Half, options: EngineOptions) -> LoadedEngine:
        return super().load(pair, half, adapters.with_slots(options))


class TestAdaptersWithFewBlocks(OverFill, adapters.SmallAdapterConformance):
    @classmethod
    def load(cls, pair: Pair, half: Half, options: EngineOptions) -> LoadedEngine:
        return super().load(pair, half, adapters.with_slots(options))


class TestFailedDecodeStep(OverFill, decode.FailedStepDecodeConformance):
    pass


class TestPrefill(OverFill, prefill.PrefillConformance):
    @pytest.fixture(autouse=True)
    def _announces_each_layer_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The engine would announce the few bytes of a tiny model's layers together, after the step."""
        monkeypatch.setattr("overfill.engine.layers.MIN_NOTIFY_BYTES", 1)


class TestPrefillWithFewBlocks(OverFill, prefill.SmallPrefillConformance):
    pass


class TestFailedPrefillStep(OverFill, prefill.FailedStepPrefillConformance):
    pass
