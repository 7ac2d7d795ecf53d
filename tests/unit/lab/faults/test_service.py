"""Each fault reaches the code that serves, after its checks; the whole stack is judged in the integration tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from overfill.engine.vllm.store import VllmKvStore
from overfill.kv.cache import KvCache
from overfill.kv.chunks import Chunk
from overfill.kv.ranges import KvRange
from overfill.kv.spec import KvSpec, RopeSpec
from overfill.kv.store import LayerTargets
from overfill.lab.faults import service as faults
from overfill.model.batch import ForwardBatch
from overfill.model.transformer import Transformer
from overfill.settings.config import DecodeConfig

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restores the attributes that faults replace permanently."""
    monkeypatch.setattr(Transformer, "load", Transformer.load)
    monkeypatch.setattr(Transformer, "forward", Transformer.forward)
    monkeypatch.setattr(KvCache, "write", KvCache.write)


def last_logits(folder: Path, before_last_token: Callable[[], None] = lambda: None) -> torch.Tensor:
    """Logits of a 20-token prompt whose last token is computed on its own."""
    model = Transformer.load(folder, torch.float32, CPU)
    cache = KvCache(model.config.kv_spec("float32"), 2, 16, CPU)
    ids = torch.arange(20) + 50

    def batch(start: int, end: int) -> ForwardBatch:
        return ForwardBatch(
            token_ids=ids[start:end],
            positions=torch.arange(start, end),
            slots=torch.arange(start, end),
            query_lens=[end - start],
            context_lens=[end],
            block_tables=torch.tensor([[0, 1]]),
            context_lens_device=torch.tensor([end]),
            logits_indices=torch.tensor([end - start - 1]),
        )

    model.forward(batch(0, 19), cache)
    before_last_token()
    return model.forward(batch(19, 20), cache)


def test_negated_row_changes_the_logits(tiny_pair: Path) -> None:
    before = last_logits(tiny_pair / "full")
    faults.negate_weight_row()
    assert (last_logits(tiny_pair / "full") - before).abs().max() > 0.1


def test_shifted_positions_change_the_logits_of_the_stage_that_has_them(tiny_pair: Path) -> None:
    before = last_logits(tiny_pair / "full")
    assert (last_logits(tiny_pair / "full", before_last_token=faults.shift_positions) - before).abs().max() > 0.1


def test_overwritten_chunk_is_zero_only_at_the_start_of_layer_0() -> None:
    spec = KvSpec(2, 1, 2, "float32", RopeSpec())
    cache = KvCache(spec, 2, 4, CPU)
    cache.k.fill_(9)
    cache.v.fill_(9)
    payload = torch.ones(2, 1, 4, 1, 2).numpy().tobytes()
    faults.overwrite_kv_chunk()
    for layer, tokens in ((0, (0, 4)), (0, (4, 8)), (1, (0, 4))):
        box = KvRange(layer, layer + 1, *tokens, 0, 1)
        cache.write([0, 1], LayerTargets({layer: [layer]}), [Chunk(box, payload)])
    sums = cache.k.sum(dim=(2, 3, 4))
    assert sums.tolist() == [[0, 8], [8, 72]]
    assert torch.equal(cache.v, cache.k)


def test_the_service_runs_with_the_fault_and_its_own_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stub_service.py").write_text("import sys\nif __name__ == '__main__':\n    print(sys.argv[1:])\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.argv", ["faults", "shift-positions", "stub_service", "--port", "0"])
    original = Transformer.forward
    faults.main()
    captured = capsys.readouterr()
    assert captured.out == "['--port', '0']\n"
    assert "shift-positions" in captured.err
    assert Transformer.forward is not original


@pytest.mark.parametrize("arguments", [[], ["negate-weight-row"], ["no-such-fault", "module"]])
def test_bad_usage_exits_2(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["faults", *arguments])
    with pytest.raises(SystemExit) as caught:
        faults.main()
    assert caught.value.code == 2


def test_a_fault_reaches_the_engine_that_the_parent_s_settings_name(monkeypatch: pytest.MonkeyPatch) -> None:
    ((variable, settings),) = DecodeConfig.of({"pair": "p", "engine": "vllm"}).environment().items()
    monkeypatch.setenv(variable, settings)
    write = VllmKvStore.write
    monkeypatch.setattr(VllmKvStore, "write", write)
    faults.overwrite_kv_chunk()
    assert VllmKvStore.write is not write
