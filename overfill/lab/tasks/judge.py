"""Scores adapters on the tasks with plain transformers and PEFT: greedy answers in batches, graded exactly.

An answer counts if its text is the expected one. The pair is an identity pair, so that one model is both halves.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import DynamicCache

from overfill.api.tokenizer import Tokenizer
from overfill.making.conversations import Transcript
from overfill.model.manifest import Pair
from overfill.pair.hf_model import cache_argument, load_hf_model
from overfill.telemetry.progress import Report

MAX_ANSWER = 48
_BATCH = 20


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


def _model(writer: TaskWriter) -> tuple[bool, str]:
    return writer.own_prefill, writer.adapter


class Judge:
    """Writes answers with the full model of ``pair``, and adapters on it.

    Args:
        adapters: Folders of adapters, by name.
    """

    def __init__(self, pair: Pair, adapters: Mapping[str, Path], dtype: torch.dtype = torch.bfloat16) -> None:
        self._tokenizer = Tokenizer.load(pair.full_path)
        self._stop = torch.tensor(sorted(pair.full_config.eos_token_ids))
        base: Any = load_hf_model(pair.full_path)
        base.to(dtype)
        self._cache_argument = cache_argument(base)
        (first, folder), *others = adapters.items()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT reads an attribute that transformers 5 renames
            self._model: Any = PeftModel.from_pretrained(base, folder, adapter_name=first).eval()
            for name, folder in others:
                self._model.load_adapter(folder, adapter_name=name)

    @torch.inference_mode()
    def scores(
        self, writers: Sequence[TaskWriter], transcripts: Mapping[str, Sequence[Transcript]], report: Report, name: str
    ) -> dict[TaskWriter, int]:
        """Returns the number of right answers of each writer.

        Args:
            transcripts: Of each task; those at one index have the same prompt.
            name: Name of the step in reports.
        """
        right = dict.fromkeys(writers, 0)
        first = next(iter(transcripts.values()))
        for start in range(0, len(first), _BATCH):
            report(name, start, len(first))
            batch = first[start : start + _BATCH]
            cache: Any = None
            for (own_prefill, adapter), judged in groupby(sorted(writers, key=_model), key=_model):
                if own_prefill or cache is None:
                    self._use(adapter if own_prefill else "")
                    cache = self._prefill(batch)
                self._use(adapter)
                written = self._answers(batch, cache)
                for writer in judged:
                    expected = transcripts[writer.task][start : start + _BATCH]
                    right[writer] += sum(map(self._is_right, expected, written))
        report(name, len(first), len(first))
        return right

    def _use(self, adapter: str) -> None:
        if adapter:
            self._model.base_model.enable_adapter_layers()
            self._model.set_adapter(adapter)
        else:
            self._model.base_model.disable_adapter_layers()

    def _prefill(self, batch: Sequence[Transcript]) -> Any:
        """Returns the cache of the prompts before ``decoder_start``; they are padded on the left."""
        cache = DynamicCache(config=self._model.config)
        self._forward([t.token_ids[: t.decoder_start] for t in batch], _padding(batch), 0, cache)
        return cache

    def _answers(self, batch: Sequence[Transcript], cache: Any) -> list[list[int]]:
        """Returns the greedy answers on ``cache``, which it leaves as it was."""
        padding, length = _padding(batch), cache.get_seq_length()
        inputs: Sequence[Sequence[int]] = [t.token_ids[t.decoder_start : t.answer_start] for t in batch]
        written: list[torch.Tensor] = []
        ended = torch.zeros(len(batch), dtype=torch.bool)
        position = length
        while len(written) < MAX_ANSWER and not ended.all():
            chosen = self._forward(inputs, padding, position, cache).argmax(-1)
            position += len(inputs[0])
            written.append(chosen)
            ended |= torch.isin(chosen, self._stop)
            inputs = chosen[:, None].tolist()
        cache.crop(length - cache.get_seq_length())
        answers: list[list[int]] = torch.stack(written, 1).tolist()
        return answers

    def _forward(
        self, inputs: Sequence[Sequence[int]], padding: torch.Tensor, position: int, cache: Any
    ) -> torch.Tensor:
        """Returns the logits after the last tokens, [rows, vocab]; rows are padded on the left to the longest."""
        width = max(map(len, inputs))
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in inputs])
        columns = torch.arange(position + width)
        output = self._model(
            input_ids=ids,
            attention_mask=(columns >= padding[:, None]).long(),
            position_ids=(columns[position:] - padding[:, None]).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: cache},
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def _is_right(self, expected: Transcript, written: Sequence[int]) -> bool:
        stop = set(self._stop.tolist())
        ends = next((i for i, token in enumerate(written) if token in stop), len(written))
        answer = [token for token in expected.answer if token not in stop]
        return self._tokenizer.decode(written[:ends]) == self._tokenizer.decode(answer)


def _padding(batch: Sequence[Transcript]) -> torch.Tensor:
    longest = max(t.decoder_start for t in batch)
    return torch.tensor([longest - t.decoder_start for t in batch])


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
    judge = Judge(pair, found)
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
        right = judge.scores(wanted, by_task, report, f"Answering at {tokens} tokens")
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
