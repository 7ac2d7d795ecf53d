"""Training runs on tiny pairs: their files, resuming, and refusals."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from overfill.errors import InvalidRequest
from overfill.making.conversations import Transcript
from overfill.making.distill import train
from overfill.making.distill.metrics import METRICS, read_metrics
from overfill.making.distill.recipe import Training
from overfill.making.distill.schedule import learning_rate
from overfill.making.distill.train import Diverged, Run, run_folder
from overfill.making.pair_json import write_manifest
from overfill.model.manifest import Pair
from overfill.model.pair_files import load_whole
from overfill.pair.reference import TwoStageReference
from overfill.process.compiled import find_compiler


def make_transcripts(count: int, seed: int) -> list[Transcript]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        ids = torch.randint(2, 512, (14 + i % 5,), generator=generator).tolist()
        made.append(Transcript(tuple(ids), 4 + i % 3))
    return made


TRANSCRIPTS, HELD_OUT = make_transcripts(10, 0), make_transcripts(3, 1)
TRAINING = Training(steps=10, batch_transcripts=4, learning_rate=3e-3, eval_steps=5, checkpoint_steps=5, pack_rows=40)


def run(tiny_pair: Path, out: Path, training: Training = TRAINING, **options: Any) -> Run:
    return Run(Pair.load(tiny_pair), out, TRANSCRIPTS, HELD_OUT, training, **options)


def losses(out: Path) -> list[float]:
    return [entry["loss"] for entry in read_metrics(run_folder(out) / METRICS) if "loss" in entry]


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips drawing, which takes longer than a tiny training run, except in the test of the picture."""
    if "curve" not in request.node.name:
        monkeypatch.setattr(train, "plot_runs", lambda runs, out: out.touch())


class Killed(BaseException):
    pass


def killed_after(
    steps: int, tiny_pair: Path, out: Path, monkeypatch: pytest.MonkeyPatch, training: Training, **options: Any
) -> None:
    """Runs until it is killed before step ``steps + 1`` is recorded."""
    with monkeypatch.context() as patch:
        original = Run._check_finite

        def die(self: Run, loss: float, norm: float) -> None:
            if self._progress.step == steps:
                raise Killed
            original(self, loss, norm)

        patch.setattr(Run, "_check_finite", die)
        with pytest.raises(Killed):
            run(tiny_pair, out, training, **options).train()


def test_training_lowers_the_loss_and_leaves_a_whole_pair_and_its_curve(tiny_pair: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lines: list[str] = []
    training = TRAINING.model_copy(update={"steps": 30, "eval_steps": 10})
    pair = Pair.load(run(tiny_pair, out, training, log_line=lines.append).train())

    first, *_, last = losses(out)
    assert last < 0.7 * first
    assert pair.full_digest == Pair.load(tiny_pair).full_digest
    assert (out / "full").is_symlink()
    load_whole(out, digests=True)
    assert pair.recipe["method"] == "random"
    facts = pair.recipe["distill"]
    assert (facts["steps_done"], facts["learning_rate"], facts["standalone"]) == (30, 3e-3, False)
    entries = read_metrics(run_folder(out) / METRICS)
    assert [e["step"] for e in entries if "held_out" in e] == [0, 10, 20, 30]
    assert facts["held_out"] == entries[-1]["held_out"]
    assert {"loss", "ce", "kl", "lr", "grad_norm", "tokens_per_second", "tokens", "seconds"} <= entries[1].keys()
    assert len(lines) == 4
    assert any((run_folder(out) / "tensorboard").iterdir())
    assert (out / "distill" / "curve.png").stat().st_size > 1000


def test_the_written_decoder_was_evaluated(tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        train, "native_dtype", lambda device: "float32"
    )  # the reference's dtype; in others near-ties differ
    pair = Pair.load(run(tiny_pair, tmp_path / "out").train())
    reference = TwoStageReference(pair.folder)
    agreed = total = 0
    full = TwoStageReference(tiny_pair)._full
    for t in HELD_OUT:
        with torch.inference_mode():
            best = full(torch.tensor([t.token_ids])).logits[0, t.answer_start : -1].argmax(-1).tolist()
        theirs = [v.reference_id for v in reference.score(t.prompt, t.answer)][1:]
        agreed += sum(a == b for a, b in zip(best, theirs, strict=True))
        total += len(best)
    judged = pair.recipe["distill"]["held_out"]
    assert (judged["tokens"], judged["agreement"]) == (total, pytest.approx(agreed / total))


@pytest.mark.parametrize(
    ("changes", "standalone"),
    [
        ({"cache_gib": 0.0}, False),
        ({}, False),
        ({}, True),
        ({"top_tokens": 8, "sampled_tokens": 100}, False),
        ({"rank": 4}, False),
        ({"lora": 4}, False),
        ({"lora": 4, "kl": 0.0}, True),
    ],
)
def test_a_resumed_run_is_bit_equal(
    tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, float], standalone: bool
) -> None:
    training = TRAINING.model_copy(update=changes)
    whole = run(tiny_pair, tmp_path / "whole", training, standalone=standalone).train()
    killed_after(7, tiny_pair, tmp_path / "parts", monkeypatch, training, standalone=standalone)
    assert not (tmp_path / "parts").exists()
    assert len(losses(tmp_path / "parts")) == 7

    resumed = run(tiny_pair, tmp_path / "parts", training, standalone=standalone, resume=True).train()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    (weights,) = (file.relative_to(whole) for file in whole.glob("**/*model.safetensors") if "full" not in file.parts)
    assert (resumed / weights).read_bytes() == (whole / weights).read_bytes()


def test_a_resumed_run_must_have_the_same_settings(tiny_pair: Path, tmp_path: Path) -> None:
    run(tiny_pair, tmp_path / "out").train()
    with pytest.raises(InvalidRequest, match="holds a run already; continue it with --resume"):
        run(tiny_pair, tmp_path / "out")
    other = TRAINING.model_copy(update={"learning_rate": 1e-4, "eval_steps": 7})
    with pytest.raises(InvalidRequest, match=r"other settings: learning_rate \(0\.003 before, 0\.0001 now\)$"):
        run(tiny_pair, tmp_path / "out", other, resume=True)


def test_a_cache_and_packing_change_nothing_that_matters(tiny_pair: Path, tmp_path: Path) -> None:
    plain = TRAINING.model_copy(update={"cache_gib": 0.0, "pack_rows": 10_000})
    run(tiny_pair, tmp_path / "plain", plain).train()
    run(tiny_pair, tmp_path / "cached").train()
    cached, computed = losses(tmp_path / "cached"), losses(tmp_path / "plain")
    assert cached[0] == pytest.approx(computed[0], rel=1e-3)  # float16 rounding, which training then amplifies
    assert cached == pytest.approx(computed, rel=2e-2)
    assert list((run_folder(tmp_path / "cached") / "cache").iterdir())
    assert not (run_folder(tmp_path / "plain") / "cache").exists()


def test_recomputing_activations_changes_nothing(tiny_pair: Path, tmp_path: Path) -> None:
    training = TRAINING.model_copy(update={"steps": 3})
    run(tiny_pair, tmp_path / "plain", training).train()
    run(tiny_pair, tmp_path / "recomputed", training.model_copy(update={"recompute_activations": True})).train()
    assert losses(tmp_path / "recomputed") == losses(tmp_path / "plain")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch emits warnings of its own while it compiles
@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("rank", [None, 4])
def test_fusing_changes_nothing_but_rounding(
    rank: int | None, tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "native_dtype", lambda device: "float32")
    training = TRAINING.model_copy(update={"steps": 3, "rank": rank})
    run(tiny_pair, tmp_path / "plain", training).train()
    run(tiny_pair, tmp_path / "fused", training.model_copy(update={"fused": True})).train()
    assert losses(tmp_path / "fused") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


def test_without_a_compiler_training_goes_on_unfused(
    tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "find_compiler", lambda names: None)
    lines: list[str] = []
    training = TRAINING.model_copy(update={"steps": 1, "fused": True})
    run(tiny_pair, tmp_path / "out", training, log_line=lines.append).train()
    assert "unfused" in lines[0]


def test_standalone_sees_the_same_tokens_but_not_the_full_models_cache(tiny_pair: Path, tmp_path: Path) -> None:
    def tokens(out: Path) -> list[int]:
        return [entry["tokens"] for entry in read_metrics(run_folder(out) / METRICS)]

    run(tiny_pair, tmp_path / "two").train()
    run(tiny_pair, tmp_path / "alone", standalone=True).train()
    assert tokens(tmp_path / "two") == tokens(tmp_path / "alone")
    assert losses(tmp_path / "two")[0] != pytest.approx(losses(tmp_path / "alone")[0], rel=1e-3)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    original = Run._backward

    def poisoned(self: Run, *args: Any, **kwargs: Any) -> torch.Tensor:
        return original(self, *args, **kwargs) * (float("nan") if self._progress.step == 6 else 1)

    monkeypatch.setattr(Run, "_backward", poisoned)
    with pytest.raises(Diverged, match=r"step 7: the loss is nan .*step-00000005"):
        run(tiny_pair, out).train()
    assert [f.name for f in (run_folder(out) / "checkpoints").iterdir()] == ["step-00000005"]
    assert not out.exists()


def test_an_interrupted_checkpoint_leaves_the_one_before(
    tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    original = train.Checkpoints.save

    def torn(self: Any, decoder: Any, optimizer: Any, progress: Any) -> None:
        if progress.step == 10:
            monkeypatch.setattr(
                "overfill.making.distill.run_checkpoints.write_json", lambda *_: (_ for _ in ()).throw(Killed)
            )
        original(self, decoder, optimizer, progress)

    monkeypatch.setattr(train.Checkpoints, "save", torn)
    with pytest.raises(Killed):
        run(tiny_pair, out).train()
    assert train.Checkpoints(run_folder(out) / "checkpoints").latest() == run_folder(out) / "checkpoints/step-00000005"


def test_the_layer_map_is_kept(tiny_pair: Path, tmp_path: Path, fresh: Any) -> None:
    folder = fresh()
    write_manifest(folder, layer_map=[0, 1, 2, 2], recipe={"depth": {}})
    pair = Pair.load(run(folder, tmp_path / "out").train())
    assert pair.layer_map == (0, 1, 2, 2)
    assert set(pair.recipe) == {"depth", "distill"}


def test_minutes_bound_the_run(tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each reading of the clock adds 0.02 s, because real steps take any time on a busy machine.
    clock = itertools.count()
    monkeypatch.setattr("overfill.making.distill.train.time", SimpleNamespace(monotonic=lambda: 0.02 * next(clock)))
    training = TRAINING.model_copy(update={"steps": None, "minutes": 0.01, "eval_steps": 10_000})
    pair = Pair.load(run(tiny_pair, tmp_path / "out", training).train())
    entries = [e for e in read_metrics(run_folder(tmp_path / "out") / METRICS) if "loss" in e]
    assert entries[-1]["seconds"] >= 0.6 > entries[-2]["seconds"]
    assert entries[-1]["lr"] < 0.3 * max(e["lr"] for e in entries)
    assert pair.recipe["distill"]["minutes"] == 0.01


def test_the_learning_rate_rises_then_follows_a_cosine() -> None:
    training = TRAINING.model_copy(update={"learning_rate": 1.0, "warmup": 0.2, "final_rate": 0.1})
    found = [learning_rate(training, done) for done in (0.1, 0.2, 0.6, 1.0)]
    assert found == pytest.approx([0.5, 1.0, 0.55, 0.1])


def test_a_half_written_line_of_metrics_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text(json.dumps({"step": 1}) + '\n{"step": 2, "lo')
    assert read_metrics(tmp_path / METRICS) == [{"step": 1}]


WORKER = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_distill_train import TRAINING, run
from overfill.making.distill.train import Run, make_accelerator

stored = []
backward = Run._backward

def counted(self, *arguments, **options):
    sums = backward(self, *arguments, **options)
    gradients = [p.grad for p in self._student.parameters()]
    stored.append((self._progress.step, len({g.untyped_storage().data_ptr() for g in gradients}), len(gradients)))
    return sums

Run._backward = counted
rank = make_accelerator().process_index
out = Path(sys.argv[3])
run(Path(sys.argv[2]), out, TRAINING.model_copy(update={"steps": 3, "pack_rows": 20})).train()
(out.parent / f"{rank}.json").write_text(json.dumps(stored))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute, unless the machine is busy
def test_gradients_of_several_processes_are_views_of_what_they_exchange(tiny_pair: Path, tmp_path: Path) -> None:
    """A second copy would take 4 bytes per parameter: 12.8 GB where Llama-3.1-8B trains a decoder of 3B."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    arguments = [sys.executable, "-c", WORKER, str(Path(__file__).parent), str(tiny_pair), str(tmp_path / "out")]
    processes = [
        subprocess.Popen(arguments, env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"
    ]
    try:
        assert [process.wait() for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for rank in "01":
        stored = json.loads((tmp_path / f"{rank}.json").read_text())
        assert {step for step, *_ in stored} == {0, 1, 2}
        assert len(stored) > 3, "a step has several passes, of which the last exchanges gradients"
        for step, storages, gradients in stored:
            assert gradients > 30
            assert step == 0 or storages == 1
