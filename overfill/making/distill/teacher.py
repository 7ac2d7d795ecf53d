"""The frozen full model's outputs for training: keys and values of prompts, and predictions on answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from overfill.making.conversations import Transcript, digest_of
from overfill.making.distill.model import PackedModel
from overfill.making.distill.packed_rows import PackedRows
from overfill.making.distill.teacher_cache import Column, TeacherCache

_CHUNK = 128  # rows of logits at a time

LogitsForm = Literal["none", "hidden", "top"]
"""Form of the full model's logits on answers: none, hidden states (which give all logits), or the top tokens."""


@dataclass(frozen=True, slots=True)
class TeacherOutputs:
    """The full model's outputs for some transcripts, in their order. None means not requested.

    Attributes:
        prefix: [decoder layers, 2, prompt tokens, kv_heads, D], keys (rotated) and values of the prompts, without the
            tokens that the decoder computes.
        hidden: [learnt tokens, full hidden]; the product with the full model's head gives its logits.
        top_ids, top_probabilities: [learnt tokens, k] int64 and float32, the most likely tokens.
    """

    prefix: Tensor | None = None
    hidden: Tensor | None = None
    top_ids: Tensor | None = None
    top_probabilities: Tensor | None = None


class Teacher:
    """Computes the full model's outputs, or reads them from a cache.

    Args:
        layer_map: Full-model layer whose keys and values each decoder layer reads.
        with_prompt_kv: Also return the keys and values of the prompts.
        logits_form: Form of the logits on answers.
        top_tokens: Number of most likely tokens, for the form ``top``.
    """

    def __init__(
        self,
        model: PackedModel,
        layer_map: Sequence[int],
        *,
        with_prompt_kv: bool,
        logits_form: LogitsForm,
        top_tokens: int = 0,
    ) -> None:
        self.model = model.requires_grad_(False)
        self._layer_map = tuple(layer_map)
        self._with_prompt_kv = with_prompt_kv
        self._logits_form = logits_form
        self._top_tokens = top_tokens
        self._cache: TeacherCache | None = None

    @property
    def columns(self) -> list[Column]:
        """The outputs to cache."""
        return list(self._columns())

    def _columns(self) -> Iterator[Column]:
        # float16 is more precise than bfloat16, and no output comes near its limit.
        config = self.model.config
        if self._with_prompt_kv:
            shape = (len(self._layer_map), 2, -1, config.num_kv_heads, config.head_dim)
            yield Column("prefix", "prompt", shape, torch.float16)
        if self._logits_form == "hidden":
            yield Column("hidden", "learnt", (-1, config.hidden_size), torch.float16)
        elif self._logits_form == "top":
            yield Column("top_ids", "learnt", (-1, self._top_tokens), torch.int32)
            yield Column("top_probabilities", "learnt", (-1, self._top_tokens), torch.float16)

    def reads(self, transcripts: Sequence[Transcript | None]) -> tuple[str, str]:
        """Identifies the outputs to cache: digest of the tokens that they depend on, and the columns.

        Prompts' keys and values alone do not depend on answers, so that several tasks can share a cache.
        """
        if self._logits_form == "none":
            transcripts = [t and Transcript(t.token_ids[: t.decoder_start], t.decoder_start) for t in transcripts]
        return digest_of(transcripts), repr(self.columns)

    def use_cache(self, cache: TeacherCache) -> None:
        self._cache = cache

    def __call__(self, transcripts: Mapping[int, Transcript]) -> TeacherOutputs:
        """Returns the outputs for ``transcripts``, in their order; the keys are their numbers in the cache."""
        if not self.columns:
            return TeacherOutputs()
        if self._cache is None:
            return self._to_outputs(self._compute(list(transcripts.values())))
        missing = {number: t for number, t in transcripts.items() if number not in self._cache}
        if missing:
            self._cache.write(missing, self._compute(list(missing.values())))
        # Reads back fresh outputs too, so that their rounding does not depend on an interruption.
        return self._to_outputs(self._cache.read(list(transcripts)))

    def _to_outputs(self, computed: Mapping[str, Tensor]) -> TeacherOutputs:
        head = self.model.head
        dtypes = {"top_ids": torch.int64, "top_probabilities": torch.float32}
        return TeacherOutputs(
            **{name: t.to(head.device).to(dtypes.get(name, head.dtype)) for name, t in computed.items()}
        )

    @torch.no_grad()
    def _compute(self, transcripts: Sequence[Transcript]) -> dict[str, Tensor]:
        """Runs the full model; returns one tensor per column."""
        whole = self._logits_form != "none"
        rows = (PackedRows.of_whole(transcripts) if whole else PackedRows.of_prompts(transcripts)).to(
            self.model.head.device
        )
        starts = list(accumulate(rows.lengths, initial=0))[:-1]
        parts = [torch.arange(s, s + t.decoder_start) for s, t in zip(starts, transcripts, strict=True)]
        prompt = torch.cat(parts).to(self.model.head.device)
        kept: dict[int, Tensor] = {}
        layers = set(self._layer_map) if self._with_prompt_kv else set()

        def keep(layer: int, keys: Tensor, values: Tensor) -> None:
            if layer in layers:
                kept[layer] = torch.stack([keys[prompt], values[prompt]])

        hidden = self.model(rows, on_kv=keep)[rows.predicting]
        computed = {"prefix": torch.stack([kept[layer] for layer in self._layer_map])} if layers else {}
        if self._logits_form == "hidden":
            computed["hidden"] = hidden
        elif self._logits_form == "top":
            computed["top_probabilities"], computed["top_ids"] = self._top(hidden)
        return computed

    def _top(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the most likely tokens' probabilities and ids, each [rows, k]."""
        found = []
        for chunk in hidden.split(_CHUNK):
            probabilities = (chunk @ self.model.head.T).float().softmax(-1)
            found.append(probabilities.topk(self._top_tokens, dim=-1))
        return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])
