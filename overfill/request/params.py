"""Sampling parameters: one definition for the SDK, the router and the engines. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sized
from dataclasses import InitVar, dataclass, field
from typing import Any, Literal, get_args

from overfill.errors import InvalidRequest
from overfill.request.json_text import read_json
from overfill.v1 import common_pb2

REQUEST_ID_CHARACTERS = "[A-Za-z0-9_.:/-]"
"""Characters of request ids, as a regular expression. Line breaks and spaces could forge lines of logs."""

MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STREAM_INTERVAL = 1024
MAX_PRIORITY = 2  # priorities are classes in the queue, from -2 to 2; smaller numbers go first
MAX_PENALTY = 2.0
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0
MAX_LOGIT_BIAS = 100.0
MAX_LOGIT_BIASES = 1024
MAX_STOP_TOKEN_IDS = 1024

GrammarKind = Literal["json_object", "json_schema", "regex", "lark"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """The form of a whole answer.

    Args:
        kind: "json_object" (any JSON object; ``text`` is empty), "json_schema" (``text`` is a schema as JSON text),
            "regex" or "lark" (llguidance's dialect).
        text: The schema, regular expression or Lark grammar.

    Raises:
        InvalidRequest: ``text`` is missing, or is a schema that is not JSON, is nested too deeply or has a lone
            surrogate. ``overfill.request.grammar`` checks the rest when it compiles the grammar.
    """

    kind: GrammarKind
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(GrammarKind):
            raise _invalid("grammar", f"is of kind {self.kind!r}; known are {', '.join(get_args(GrammarKind))}")
        if (self.kind == "json_object") != (not self.text):
            raise _invalid(f"grammar.{self.kind}", "is empty" if not self.text else "has a text; leave it out")
        if self.kind == "json_schema":
            _check_schema("grammar.json_schema", self.text)

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> Grammar:
        """A grammar of the JSON texts that ``schema`` accepts.

        Its objects are closed: those with ``properties`` and without ``additionalProperties`` have no other keys.
        """
        return cls("json_schema", json.dumps(schema))

    def to_proto(self) -> common_pb2.Grammar:
        if self.kind == "json_object":
            return common_pb2.Grammar(json_object=True)
        message = common_pb2.Grammar()
        setattr(message, self.kind, self.text)
        return message

    @classmethod
    def from_proto(cls, message: common_pb2.Grammar) -> Grammar:
        kind = message.WhichOneof("kind")
        if kind is None:
            raise _invalid("grammar", "is empty: give json_object, json_schema, regex or lark")
        if kind == "json_object":
            if not message.json_object:
                raise _invalid(
                    "grammar.json_object", "is false; give true, or leave grammar out for answers without one"
                )
            return cls("json_object")
        return cls(kind, getattr(message, kind))


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Rules for choosing the next token, checked on construction.

    Filters apply in this order: temperature, top-k, top-p, min-p (as in Hugging Face *generate*).

    Args:
        temperature: Divisor of the logits; 0 means greedy.
        top_k: Number of most likely tokens to keep; None keeps all.
        top_p: Probability mass, in (0, 1], of the smallest set of most likely tokens to keep.
        min_p: Share of the most likely token's probability, in [0, 1], below which a token is dropped.
        seed: 64-bit key of the counter-based generator; None means that the router draws one. The same seed draws the
            same token from the same logits. It repeats an answer best effort, because logits differ in their last bits
            between batches, workers and engines.
        max_tokens: Maximum number of tokens in the answer, the first one included; None means all that the context
            allows.
        min_tokens: Minimum number of tokens in the answer. Until then, tokens that would end it cannot be sampled, and
            stop strings do not count. A grammar that allows only the end still ends the answer.
        stop_token_ids: Token ids that end the answer, besides the model's end-of-sequence ids; not part of the text.
            At most 1,024.
        ignore_eos: Whether the answer continues past the model's own end-of-sequence ids.
        logprobs: Number of most likely tokens to report beside the chosen one, 0 to 20; None reports nothing.
        prompt_logprobs: Number of most likely tokens to report beside each token of the prompt, 0 to 20; None does not
            score the prompt. These log-probabilities are of the full model's unchanged logits.
        repetition_penalty: Divisor of positive logits and factor of negative logits, for tokens in the prompt or the
            answer so far (as in Hugging Face *generate*). In [0.01, 100]; 1 has no effect.
        presence_penalty: Value subtracted from the logit of every token in the answer so far, in [-2, 2].
        frequency_penalty: Value subtracted from a token's logit once per occurrence in the answer so far, in [-2, 2].
        logit_bias: Token id to the value added to its logit, in [-100, 100].
        grammar: Form of the whole answer; None means free text.
        stop: Not allowed here. The methods of ``Client`` and ``AsyncClient`` take stop strings.

    Penalties, bias and grammar change the logits before temperature and filters, in the order above.

    Raises:
        InvalidRequest: a value is out of range or conflicts with another; ``field`` names it.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    grammar: Grammar | None = None
    stop: InitVar[object] = None

    def __post_init__(self, stop: object) -> None:
        if stop is not None:
            raise _invalid(
                "stop",
                "is not a sampling parameter: give stop strings to the call, client.generate(prompt, stop=[...]), "
                "and token ids as stop_token_ids",
            )
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
        if self.min_tokens < 0:
            raise _invalid("min_tokens", f"must be at least 0, got {self.min_tokens}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _invalid("min_tokens", f"{self.min_tokens} is more than max_tokens {self.max_tokens}; lower it")
        _check_counts(self.stop_token_ids, self.logit_bias)
        if any(t < 0 for t in self.stop_token_ids):
            raise _invalid("stop_token_ids", f"holds {min(self.stop_token_ids)}; token ids are 0 or more")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and not 0 <= count <= MAX_LOGPROBS:
                raise _invalid(name, f"must be in 0..{MAX_LOGPROBS}, got {count}")
        if self.greedy and (self.top_k not in (None, 1) or self.top_p != 1 or self.min_p != 0):
            raise _invalid("temperature", "0 (greedy) conflicts with top_k, top_p and min_p; leave those out")
        # Larger penalties have no known use, and soon make float32 logits infinite.
        if not MIN_REPETITION_PENALTY <= self.repetition_penalty <= MAX_REPETITION_PENALTY:
            allowed = f"[{MIN_REPETITION_PENALTY:g}, {MAX_REPETITION_PENALTY:g}]"
            raise _invalid("repetition_penalty", f"must be in {allowed}, got {self.repetition_penalty}")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not abs(value) <= MAX_PENALTY:
                raise _invalid(name, f"must be in [-{MAX_PENALTY:g}, {MAX_PENALTY:g}], got {value}")
        for token, bias in self.logit_bias.items():
            if not abs(bias) <= MAX_LOGIT_BIAS:
                raise _invalid("logit_bias", f"must be in [-100, 100], got {bias} for token {token}")
        if self.grammar is not None and self.ignore_eos:
            raise _invalid(
                "grammar", "conflicts with ignore_eos: an answer ends where its grammar ends; leave one of them out"
            )

    @property
    def greedy(self) -> bool:
        """Whether every token is the most likely one."""
        return self.temperature == 0

    @property
    def penalised(self) -> bool:
        """Whether a penalty makes the logits depend on earlier tokens."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def need_processor(self, eos_ids: Iterable[int]) -> bool:
        """True if the logits of an answer may change before sampling. Arguments as of ``end_ids``."""
        too_short = self.min_tokens and self.end_ids(eos_ids)
        return bool(self.grammar or self.penalised or self.logit_bias or too_short)

    def end_ids(self, eos_ids: Iterable[int]) -> frozenset[int]:
        """Token ids that end an answer; ``eos_ids`` are the model's end-of-sequence ids."""
        return frozenset(self.stop_token_ids if self.ignore_eos else (*self.stop_token_ids, *eos_ids))

    def check_vocab(self, vocab_size: int) -> None:
        """Raises InvalidRequest if a stop token id or a biased token id is outside the vocabulary."""
        check_token_ids("sampling.stop_token_ids", self.stop_token_ids, vocab_size)
        check_token_ids("sampling.logit_bias", self.logit_bias, vocab_size)

    def to_proto(self) -> common_pb2.SamplingParams:
        return common_pb2.SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens or None,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            grammar=None if self.grammar is None else self.grammar.to_proto(),
        )

    @classmethod
    def from_proto(cls, message: common_pb2.SamplingParams) -> SamplingParams:
        """The parameters in ``message``. Absent fields get the defaults above; a present zero stays zero."""
        _check_counts(message.stop_token_ids, message.logit_bias)  # before copies of millions of them
        given = {field.name: value for field, value in message.ListFields()}  # present fields, zeros included
        given |= {"stop_token_ids": tuple(message.stop_token_ids), "logit_bias": dict(message.logit_bias)}
        if message.HasField("grammar"):
            given["grammar"] = Grammar.from_proto(message.grammar)
        return cls(**given)


def check_priority(priority: int) -> None:
    """Raises InvalidRequest if ``priority`` is not an integer in range."""
    if not isinstance(priority, int) or not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise InvalidRequest("priority", f"must be an integer from {-MAX_PRIORITY} to {MAX_PRIORITY}, got {priority!r}")


def check_token_ids(field: str, ids: Collection[int], vocab_size: int) -> None:
    """Raises InvalidRequest that names ``field`` and the first id outside ``[0, vocab_size)``."""
    if not ids or (min(ids) >= 0 and max(ids) < vocab_size):
        return
    index, token = next((i, t) for i, t in enumerate(ids) if not 0 <= t < vocab_size)
    raise InvalidRequest(field, f"token id {token} at index {index} is outside the vocabulary of {vocab_size}")


def _check_schema(field: str, text: str) -> None:
    if not isinstance(read_json(f"sampling.{field}", text), dict):
        raise _invalid(field, "is not a JSON object")


def _check_counts(stop_token_ids: Sized, logit_bias: Sized) -> None:
    """Raises InvalidRequest if there are more of them than a real request needs. Workers read each of them too."""
    if len(stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise _invalid("stop_token_ids", f"has {len(stop_token_ids)} ids; at most {MAX_STOP_TOKEN_IDS} are allowed")
    if len(logit_bias) > MAX_LOGIT_BIASES:
        raise _invalid("logit_bias", f"has {len(logit_bias)} entries; at most {MAX_LOGIT_BIASES} are allowed")


def _check_finite(field: str, value: float) -> None:
    if not math.isfinite(value):
        raise _invalid(field, f"must be a finite number, got {value}")


def _invalid(field: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"sampling.{field}", message)
