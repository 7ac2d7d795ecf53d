"""Sampling parameters: one definition for the SDK, the router and the engines. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from overfill.errors import InvalidRequest
from overfill.v1 import common_pb2

MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. Checked on construction.

    Filters apply in this order: temperature, top-k, top-p, min-p (as in Hugging Face *generate*).

    Args:
        temperature: divides the logits; 0 means greedy.
        top_k: keep the k most likely tokens; None keeps all.
        top_p: keep the smallest set of most likely tokens with at least this mass, in (0, 1].
        min_p: drop tokens less likely than this share of the most likely one, in [0, 1].
        seed: 64-bit key of the counter-based generator; None lets the router draw one.
        max_tokens: most tokens in the answer, the first one included; None means what the context leaves.
        stop_token_ids: end the answer, besides the model's end-of-sequence ids; not part of the text.
        ignore_eos: run on past the model's own end-of-sequence ids.
        logprobs: None, or how many most likely tokens to report beside the chosen one (0 to 20).

    Raises:
        InvalidRequest: a value is out of range or contradicts another; ``field`` names it.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _check_finite("temperature", self.temperature)
        if self.temperature < 0:
            raise _invalid("temperature", f"must be 0 (greedy) or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise _invalid("top_k", f"must be at least 1, or absent to keep all tokens; got {self.top_k}")
        _check_finite("top_p", self.top_p)
        if not 0 < self.top_p <= 1:
            raise _invalid("top_p", f"must be in (0, 1], got {self.top_p}")
        _check_finite("min_p", self.min_p)
        if not 0 <= self.min_p <= 1:
            raise _invalid("min_p", f"must be in [0, 1], got {self.min_p}")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise _invalid("seed", f"must be in [0, 2^64), got {self.seed}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise _invalid("max_tokens", f"must be at least 1, got {self.max_tokens}")
        if any(t < 0 for t in self.stop_token_ids):
            raise _invalid("stop_token_ids", "token ids are not negative")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise _invalid("logprobs", f"must be in 0..{MAX_LOGPROBS}, got {self.logprobs}")
        if self.greedy and (self.top_k not in (None, 1) or self.top_p != 1 or self.min_p != 0):
            raise _invalid("temperature", "0 (greedy) contradicts top_k, top_p and min_p; leave those out")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0

    def check_vocab(self, vocab_size: int) -> None:
        """Raises InvalidRequest when a stop token id is outside the vocabulary."""
        check_token_ids("sampling.stop_token_ids", self.stop_token_ids, vocab_size)

    def to_proto(self) -> common_pb2.SamplingParams:
        return common_pb2.SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
            max_tokens=self.max_tokens,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
        )

    @classmethod
    def from_proto(cls, message: common_pb2.SamplingParams) -> SamplingParams:
        """Absent fields take the defaults above; a present zero is a zero."""
        given = {field.name: value for field, value in message.ListFields()}  # those present, zeros included
        return cls(**given | {"stop_token_ids": tuple(message.stop_token_ids)})


def check_token_ids(field: str, ids: Iterable[int], vocab_size: int) -> None:
    """Raises InvalidRequest naming ``field`` and the first id outside ``[0, vocab_size)``."""
    for index, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise InvalidRequest(field, f"token id {token} at index {index} is outside the vocabulary of {vocab_size}")


def _check_finite(field: str, value: float) -> None:
    if not math.isfinite(value):
        raise _invalid(field, f"must be a finite number, got {value}")


def _invalid(field: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"sampling.{field}", message)
