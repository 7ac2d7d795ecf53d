"""Runs the training: steps, schedule, evaluation, checkpoints and the finished pair. Knows no arithmetic of models."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from overfill.engine.device import native_dtype
from overfill.errors import InvalidRequest, OverfillError
from overfill.kv.tensors import TORCH_DTYPES
from overfill.making.conversations import Transcript
from overfill.making.correction import shipped_correction
from overfill.making.distill.adapter import BestAdapter, add_adapter, is_factor, peak_bytes, write_adapter
from overfill.making.distill.data import Transcripts, batches, digest
from overfill.making.distill.loss import LossWeights
from overfill.making.distill.metrics import METRICS, Metrics
from overfill.making.distill.model import PackedModel
from overfill.making.distill.packed_rows import in_packs, learnt_tokens
from overfill.making.distill.plot import plot_runs
from overfill.making.distill.recipe import FACTOR_RATE, Training
from overfill.making.distill.run_checkpoints import Checkpoints, TrainingState, write_pair
from overfill.making.distill.run_settings import SETTINGS, open_run_folder
from overfill.making.distill.schedule import learning_rate
from overfill.making.distill.student import HeldOutResult, Student, evaluate
from overfill.making.distill.teacher import LogitsForm, Teacher
from overfill.making.distill.teacher_cache import TeacherCache
from overfill.making.overlap import TextDigests
from overfill.model.manifest import Pair
from overfill.process.compiled import COMPILERS, find_compiler
from overfill.process.extras import needs
from overfill.telemetry.progress import Report, silent

# Settings that a resumed run may change: they do not affect the trained weights.
_MAY_CHANGE_ON_RESUME = {"eval_steps", "checkpoint_steps", "checkpoint_minutes"}

_TRITON_COMPILERS = ("gcc", "clang")  # with one of them Triton compiles what starts its kernels on a GPU

LogLine = Callable[[str], None]


class Diverged(OverfillError):
    """Training produced a number that is not finite; the last good checkpoint is kept."""


def run_folder(out: Path) -> Path:
    """Returns the folder for checkpoints, metrics and caches of the run that makes the pair or adapter ``out``."""
    return out.with_name(f"{out.name}.run")


class Run:
    """One training run of the decoder of ``pair``, or of an adapter for it, on ``transcripts``, judged on ``held_out``.

    Args:
        out: Folder of the pair or the adapter to write. The run's own folder is beside it (``run_folder``).
        training_text: Digests of the text of ``transcripts``, which the written pair keeps if those of ``pair`` are
            known too. None keeps none.
        standalone: Train the decoder to read prompts itself, as a baseline. The written pair is an ordinary pair.
        tail_tokens: Recorded with an adapter, whose ``transcripts`` have such a tail.
        resume: Continue exactly from the last checkpoint of a run with the same settings.
        log_line: Called with a readable line at every evaluation.

    Raises:
        InvalidRequest: the folder holds a run already, or the run to resume has other settings.
    """

    def __init__(
        self,
        pair: Pair,
        out: Path,
        transcripts: Transcripts,
        held_out: list[Transcript],
        training: Training,
        *,
        training_text: TextDigests | None = None,
        standalone: bool = False,
        tail_tokens: int = 0,
        resume: bool = False,
        report: Report = silent,
        log_line: LogLine = lambda line: None,
    ) -> None:
        self._accelerator = accelerator = make_accelerator()
        self._pair, self._out, self._training = pair, out, training
        self._transcripts, self._held_out = transcripts, dict(enumerate(held_out))
        self._training_text, self._tail_tokens = training_text, tail_tokens
        self._report, self._log_line = report, log_line
        correction = None if training.rank is None else shipped_correction(pair.recipe)
        if correction is not None and correction.rank > (training.rank or 0):
            correction = None
        self._continues = None if correction is None else correction.digest
        self.folder = run_folder(out)
        if training.batch_transcripts < accelerator.num_processes:
            raise InvalidRequest("batch_transcripts", f"must be at least {accelerator.num_processes}, one per process")
        native = native_dtype(accelerator.device)
        dtype = TORCH_DTYPES["float32" if native == "float16" else native]  # small gradients would be 0 in float16
        identity = self._identity(standalone, str(dtype))
        if accelerator.is_main_process:
            open_run_folder(self.folder, identity, resume)
        report("Loading models", 0, 2)
        full = PackedModel.load(pair.full_path, dtype, accelerator.device)
        report("Loading models", 1, 2)
        if training.lora is not None and pair.decoder_path == pair.full_path:
            decoder = full.sharing_weights()
        else:
            wide = torch.float32 if training.lora is None else dtype
            decoder = PackedModel.load(pair.decoder_path, wide, accelerator.device)
        decoder.save_activations = not training.recompute_activations
        if training.rank is not None:
            decoder.train_low_rank(training.rank, training.seed)
            if correction is not None:
                decoder.continue_factors(correction.products(decoder.config))
        if training.lora is not None:
            add_adapter(decoder, training.lora, training.seed)
            self._say_memory(decoder, full, standalone)
        report("Loading models", 2, 2)
        if training.fused and self._can_fuse():
            full.fuse()
            decoder.fuse()
        weights = LossWeights(training.cross_entropy, training.kl, training.temperature)
        self._student = Student(decoder, full.head, weights, standalone, dtype)
        logits_form: LogitsForm = "none" if training.kl == 0 else "top" if training.top_tokens else "hidden"
        self._teacher = Teacher(
            full, pair.layer_map, with_prompt_kv=not standalone, logits_form=logits_form, top_tokens=training.top_tokens
        )
        self._eval_teacher = Teacher(full, pair.layer_map, with_prompt_kv=not standalone, logits_form="hidden")
        self._cache_bytes_left = training.cache_gib * 2**30
        self._cache(self._eval_teacher, held_out, "held-out")
        self._cache(self._teacher, transcripts, "training")
        trained = decoder.trained
        factors = [trained.pop(name) for name in list(trained) if is_factor(name)]
        optimizer = torch.optim.AdamW(
            [{"params": list(trained.values()), "scale": 1.0}, {"params": factors, "scale": FACTOR_RATE}],
            lr=training.learning_rate,
            betas=(training.beta1, training.beta2),
            weight_decay=training.weight_decay,
            fused=True,
        )
        self._model, self._optimizer = accelerator.prepare(self._student, optimizer)
        self._checkpoints, self._best = Checkpoints(self.folder / "checkpoints"), BestAdapter(self.folder / "best")
        latest = self._checkpoints.latest() if resume else None
        self._progress = self._checkpoints.load(latest, decoder, optimizer) if latest else TrainingState()
        self._metrics = Metrics(self.folder, self._progress) if accelerator.is_main_process else None

    def train(self) -> Path:
        """Trains to the end, writes the pair or the adapter, and returns its folder.

        Raises:
            Diverged: the loss or its gradient is not finite.
        """
        try:
            self._run()
            result = self._evaluate()
            self._save()
        finally:
            if self._metrics is not None:
                self._metrics.close()
        return self._finish(result)

    def _run(self) -> None:
        training = self._training
        saved_at = time.monotonic()
        if self._progress.step == 0:
            self._evaluate()
        order = batches(len(self._transcripts), training.batch_transcripts, training.seed, self._progress.step)
        while (done := self._share_done()) < 1:
            self._step(next(order), done)
            self._report("Training", round(1000 * min(1.0, self._share_done())), 1000)
            step = self._progress.step
            if step % training.eval_steps == 0:
                self._evaluate()
            overdue = time.monotonic() - saved_at > 60 * training.checkpoint_minutes
            if overdue or (training.checkpoint_steps and step % training.checkpoint_steps == 0):
                self._save()
                saved_at = time.monotonic()

    def _share_done(self) -> float:
        """Returns the share of the run that is done; it is the same on all processes."""
        training, progress = self._training, self._progress
        if training.minutes is not None:
            return progress.seconds / (60 * training.minutes)
        return progress.step / self._steps

    @property
    def _steps(self) -> int:
        training = self._training
        if training.steps is not None:
            return training.steps
        return math.ceil(len(self._transcripts) * (training.epochs or 0) / training.batch_transcripts)

    def _step(self, batch: list[int], done: float) -> None:
        started = time.monotonic()
        accelerator, training = self._accelerator, self._training
        transcripts = {i: t for i in batch if (t := self._transcripts[i]) is not None}
        tokens = sum(map(learnt_tokens, transcripts.values()))
        own = sorted(transcripts)[accelerator.process_index :: accelerator.num_processes]
        idle = not own and bool(transcripts)
        if idle:  # fewer transcripts than processes: this one contributes a gradient of 0, for which others wait
            own = sorted(transcripts)[:1]
        packs = list(in_packs(own, lambda i: len(transcripts[i].token_ids), training.pack_rows))
        # Takes the rate in the middle of the step, so that neither the first nor the last step has a rate of 0.
        half = 0.5 / self._steps if training.minutes is None else 0.0
        rate = learning_rate(training, done + half) or training.learning_rate / 1000
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
        for index, pack in enumerate(packs):
            last = index == len(packs) - 1
            with nullcontext() if last else accelerator.no_sync(self._model):
                sums += self._backward({i: transcripts[i] for i in pack}, tokens, index, weight=0.0 if idle else 1.0)
        sums = accelerator.reduce(sums, "sum") / max(tokens, 1)
        norm = accelerator.clip_grad_norm_(self._model.parameters(), training.clip)
        self._check_finite(float(sums[0]), float(norm))
        self._optimizer.step()
        # Several processes keep their gradients: those of a pass before the exchange would not be views of the buckets.
        self._optimizer.zero_grad(set_to_none=accelerator.num_processes == 1)
        seconds = self._agree(time.monotonic() - started)
        before = self._progress
        self._progress = TrainingState(before.step + 1, before.tokens + tokens, before.seconds + seconds)
        if self._metrics is not None:
            loss, cross_entropy, kl = sums.tolist()
            values = {"loss": loss, "ce": cross_entropy, "kl": kl, "lr": rate, "grad_norm": float(norm)}
            self._metrics.step(self._progress, values | {"tokens_per_second": tokens / seconds})

    def _backward(self, transcripts: Mapping[int, Transcript], tokens: int, pack: int, weight: float) -> Tensor:
        """Adds ``weight`` times a pack's gradients; returns weighted loss, cross-entropy and KL, [3] float64."""
        teacher_outputs = self._teacher(transcripts)
        rows = self._student.rows(list(transcripts.values()))
        draws = np.random.SeedSequence(
            [self._training.seed, self._progress.step, self._accelerator.process_index, pack]
        ).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(draws[0] >> np.uint64(1)))
        sampled = self._student.sample_vocabulary(rows, teacher_outputs, self._training.sampled_tokens, generator)
        loss, cross_entropy, kl = self._model(rows, teacher_outputs, sampled)
        # accelerate averages the gradients over processes; the loss is a mean over the tokens of all processes.
        self._accelerator.backward(loss * (weight * self._accelerator.num_processes / tokens))
        return weight * torch.stack([loss.detach().double(), cross_entropy, kl])

    def _can_fuse(self) -> bool:
        names = COMPILERS if self._accelerator.device.type == "cpu" else _TRITON_COMPILERS
        if find_compiler(names) is not None:
            return True
        self._log_line(f"training runs unfused, which is slower: none of {', '.join(names)} is installed")
        return False

    def _check_finite(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        latest = self._checkpoints.latest()
        kept = f"the last good checkpoint is {latest}" if latest else "no checkpoint exists yet"
        raise Diverged(
            f"step {self._progress.step + 1}: the loss is {loss} and its gradient's norm {norm}; {kept}. Try a lower "
            "learning rate (--learning-rate), or look for damage in the models and the data"
        )

    def _agree(self, seconds: float) -> float:
        """Returns the main process's time on all processes, so that they stop together."""
        from accelerate.utils import broadcast_object_list

        shared = [seconds]
        broadcast_object_list(shared)
        return shared[0]

    def _evaluate(self) -> HeldOutResult | None:
        """Judges the decoder on the main process; returns None on the others."""
        if self._metrics is None:
            self._accelerator.wait_for_everyone()
            return None
        result = evaluate(self._student, self._eval_teacher, self._held_out, self._training.pack_rows)
        progress = self._progress
        if self._training.lora is not None:
            loss = self._training.cross_entropy * result.nll + self._training.kl * result.kl
            self._best.offer(self._student.decoder, result, loss, progress.step)
        if progress.step not in self._metrics.evaluated:
            self._metrics.held_out(progress, result)
            rate = f", {progress.tokens / progress.seconds:.0f} tokens/s" if progress.seconds else ""
            self._log_line(
                f"step {progress.step}, {progress.tokens:,} tokens{rate}: held-out NLL {result.nll:.3f}, "
                f"KL {result.kl:.3f}, agreement {100 * result.agreement:.1f} %"
            )
        self._accelerator.wait_for_everyone()
        return result

    def _save(self) -> None:
        if self._accelerator.is_main_process:
            self._checkpoints.save(self._student.decoder, self._optimizer, self._progress)
        self._accelerator.wait_for_everyone()

    def _finish(self, result: HeldOutResult | None) -> Path:
        if self._metrics is not None and result is not None:
            facts = {
                **self._training.model_dump(exclude_none=True),
                "standalone": self._student.standalone,
                **({"continues": self._continues} if self._continues else {}),
                "steps_done": self._progress.step,
                "tokens": self._progress.tokens,
                "seconds": round(self._progress.seconds, 1),
                "held_out": result.as_dict(),
            }
            plot_runs([(self._out.name, self.folder / METRICS)], self.folder / "curve.png")
            files = [self.folder / name for name in (METRICS, "curve.png", SETTINGS)]
            decoder, text = self._student.decoder, self._training_text
            if self._training.lora is None:
                write_pair(self._out, self._pair, decoder, facts, files, text, self._report)
            else:
                write_adapter(
                    self._out,
                    self._pair,
                    decoder,
                    self._best,
                    facts,
                    tail_tokens=self._tail_tokens,
                    own_prefill=self._student.standalone,
                    extras=files,
                )
        self._accelerator.wait_for_everyone()
        return self._out

    def _say_memory(self, decoder: PackedModel, full: PackedModel, standalone: bool) -> None:
        whole = [t for t in (*self._transcripts, *self._held_out.values()) if t is not None]
        longest = max(len(t.token_ids) - (0 if standalone else t.decoder_start) for t in whole)
        rows = min(self._training.pack_rows, longest * self._training.batch_transcripts)
        memory = peak_bytes(decoder, full, max(rows, longest))
        self._log_line(f"peak memory: about {memory / 2**30:.1f} GiB on {self._accelerator.device}")

    def _identity(self, standalone: bool, dtype: str) -> dict[str, Any]:
        """Returns all settings that determine the results."""
        return {
            **self._training.model_dump(exclude=_MAY_CHANGE_ON_RESUME),
            "standalone": standalone,
            "dtype": dtype,
            "processes": self._accelerator.num_processes,
            "full": self._pair.full_digest,
            "decoder": self._pair.decoder_digest,
            "continues": self._continues,
            "layer_map": list(self._pair.layer_map),
            "data": digest(self._transcripts),
            "held_out": digest(list(self._held_out.values())),
        }

    def _cache(self, teacher: Teacher, transcripts: Transcripts, name: str) -> None:
        """Gives ``teacher`` a cache if it fits in ``cache_gib``. Hub data sets are never cached."""
        if not isinstance(transcripts, list) or not teacher.columns:
            return
        size = sum(column.bytes(transcripts) for column in teacher.columns)
        if size > self._cache_bytes_left:
            self._log_line(
                f"the {name} cache would take {size / 2**30:.1f} GiB, more than --cache-gib leaves; not caching"
            )
            return
        self._cache_bytes_left -= size
        identity = json.dumps([self._pair.full_digest, self._pair.layer_map, teacher.reads(transcripts)])
        with self._accelerator.main_process_first():
            teacher.use_cache(TeacherCache(self.folder / "cache" / name, transcripts, teacher.columns, identity))


def make_accelerator() -> Any:
    """Makes the object that manages devices and processes.

    Raises:
        MissingExtra: the package accelerate is not installed.
    """
    with needs("pairs", "training"):
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

    # Gradients are views of the buckets that processes exchange, which saves 4 bytes per parameter.
    views = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    return Accelerator(mixed_precision="no", kwargs_handlers=[views])
