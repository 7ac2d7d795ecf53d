"""Scores adapters on the tasks: greedy answers of the engine's model, graded exactly.

An answer counts if its text is the expected one. The pair is an identity pair, so that one model is both halves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overfill.api.tokenizer import Tokenizer
from overfill.engine.device import native_dtype, resolve_device
from overfill.kv.spec import DTypeName
from overfill.making.conversations import Transcript
from overfill.making.evaluate.adapter_evaluation import is_right
from overfill.making.evaluate.evaluation import load_model, longest_sequence
from overfill.making.evaluate.greedy_answers import write_answers
from overfill.making.evaluate.teacher_forced import Candidate
from overfill.model.adapter import read_adapter
from overfill.model.manifest import Pair
from overfill.telemetry.progress import Report

MAX_ANSWER = 48


@dataclass(frozen=True, slots=True)
class TaskWriter:
    """What writes an answer.

    Attributes:
        task: Task whose answers are expected.
        adapter: Name of the adapter; empty means the model without one.
        own_prefill: Whether the adapter reads the prompt, too, instead of the full model.
    """

    task: str
    adapter: str
    own_prefill: bool


class Judge:
    """Writes answers with the full model of ``pair``, and adapters on it.

    Args:
        adapters: Folders of adapters, by name.
        longest: Longest sequence in tokens.
        dtype: Type of weights and activations. None means the device's native type.
    """

    def __init__(self, pair: Pair, adapters: Mapping[str, Path], longest: int, dtype: DTypeName | None = None) -> None:
        where = resolve_device("auto")
        self._tokenizer = Tokenizer.load(pair.full_path)
        self._layer_map = pair.layer_map
        self._model = load_model(pair, "decoder", dtype or native_dtype(where), where, longest)
        loaded = {name: read_adapter(folder, pair.decoder_config) for name, folder in adapters.items()}
        slots = self._model.new_adapter_slots(len(loaded), max(adapter.record.rank for adapter in loaded.values()))
        for slot, adapter in enumerate(loaded.values()):
            slots.stage(slot, adapter)
        self._slots = {"": None, **{name: slot for slot, name in enumerate(loaded)}}

    def scores(
        self, writers: Sequence[TaskWriter], transcripts: Mapping[str, Sequence[Transcript]], step: str, report: Report
    ) -> dict[TaskWriter, int]:
        """Returns the number of right answers of each writer.

        Args:
            transcripts: Of each task; those at one index have the same prompt, which the full model reads once.
            step: Name of the step in reports.
        """
        num_prompts = len(next(iter(transcripts.values())))
        asked = [(writer, transcripts[writer.task][index]) for index in range(num_prompts) for writer in writers]
        written = write_answers(
            self._model,
            Candidate(self._model, self._layer_map),
            [transcript.prompt for _, transcript in asked],
            MAX_ANSWER,
            starts=[0 if writer.own_prefill else transcript.decoder_start for writer, transcript in asked],
            adapters=[self._slots[writer.adapter] for writer, _ in asked],
            step=step,
            report=report,
        )
        right = dict.fromkeys(writers, 0)
        for (writer, transcript), answer in zip(asked, written, strict=True):
            right[writer] += is_right(self._tokenizer, transcript, answer)
        return right


def rows(
    pair: Pair, folder: Path, transcripts: Mapping[int, Mapping[str, Sequence[Transcript]]], report: Report
) -> Iterator[dict[str, Any]]:
    """Yields a row per task, length of prompt and seed: scores, and the ratio that the project aims at.

    Args:
        folder: Adapters: ``TASK`` was trained on the full model's KV, ``TASK-own`` with its own prefill; more seeds are
            ``TASK-1`` and ``TASK-1-own``.
        transcripts: By length of the prompt in tokens, and by task.
    """
    found = {path.name: path for path in sorted(folder.iterdir()) if (path / "adapter_config.json").exists()}
    longest = max(longest_sequence(each, MAX_ANSWER) for tasks in transcripts.values() for each in tasks.values())
    judge = Judge(pair, found, longest)
    for tokens, by_task in transcripts.items():
        pairs = [(name, f"{name}-own") for name in found if f"{name}-own" in found and name.split("-")[0] in by_task]
        writers = {
            name: [
                TaskWriter(task := name.split("-")[0], name, own_prefill=False),
                TaskWriter(task, own, own_prefill=True),
                TaskWriter(task, own, own_prefill=False),
                TaskWriter(task, "", own_prefill=False),
            ]
            for name, own in pairs
        }
        wanted = list(dict.fromkeys(writer for each in writers.values() for writer in each))
        right = judge.scores(wanted, by_task, f"Answering at {tokens} tokens", report)
        for name, each in writers.items():
            examples = len(by_task[each[0].task])
            scores = [right[writer] / examples for writer in each]
            yield {
                "adapter": name,
                "prompt_tokens": tokens,
                "examples": examples,
                "full_kv": scores[0],
                "own_prefill": scores[1],
                "ratio": round(scores[0] / scores[1], 3) if scores[1] else None,
                "own_prefill_on_full_kv": scores[2],
                "base": scores[3],
            }
