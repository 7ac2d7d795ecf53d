"""Answers that follow a grammar: which tokens may come next. Wraps llguidance; no torch, no sampling.

A matcher holds no more than what the tokens so far say, so that it can be built again from them on any worker.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from overfill.errors import InvalidRequest
from overfill.request.params import Grammar

try:
    import llguidance
except ImportError:  # a worker without it serves everything else
    llguidance = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

_MASK_WORD_BITS = 32

# Without this a model may write white space for ever, and JSON looks different in every answer.
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GrammarFailed(InvalidRequest):
    """A grammar cannot be obeyed any further; it is too complex for the tokens so far."""


class Grammars:
    """Compiles grammars for one vocabulary. Safe to share between threads.

    The tokenizer is read on first use, which takes a second or so; ``warm`` does it ahead of time.

    Args:
        tokenizer_json: path of the checkpoint's tokenizer.json.
        vocab_size: rows of the model's output head.
        eos_token_ids: what ends an answer; allowed wherever the grammar allows the end.
    """

    def __init__(self, tokenizer_json: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._path = tokenizer_json
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._lock = threading.Lock()
        self._tokenizer: Any = None

    @property
    def mask_words(self) -> int:
        """Number of 32-bit words in a row of a mask."""
        return -(-self._vocab_size // _MASK_WORD_BITS)

    def warm(self) -> None:
        """Reads the tokenizer. Raises InvalidRequest when llguidance is not installed."""
        check_available()
        with self._lock:
            if self._tokenizer is None:
                if not self._eos_token_ids:
                    raise InvalidRequest("sampling.grammar", "needs a model with an end-of-sequence token")
                self._tokenizer = llguidance.LLTokenizer(
                    self._path.read_text(encoding="utf-8"), n_vocab=self._vocab_size, eos_token=self._eos_token_ids
                )

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher at the start of an answer.

        Raises:
            InvalidRequest: the grammar is wrong, too complex or uses what is not supported; or there is no llguidance.
        """
        self.warm()
        matcher = llguidance.LLMatcher(self._tokenizer, _compiled(grammar), log_level=0)
        if matcher.is_error():
            raise InvalidRequest(f"sampling.grammar.{grammar.kind}", _in_one_line(matcher.get_error()))
        return Matcher(matcher)


class Matcher:
    """One answer's place in its grammar. Not for two threads at once."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def accept(self, tokens: Iterable[int]) -> None:
        """Goes on behind ``tokens``, which the mask allowed. Raises GrammarFailed."""
        for token in tokens:
            if not self._matcher.consume_token(token):
                raise GrammarFailed("sampling.grammar", _in_one_line(self._matcher.get_error()))

    def fill(self, row: NDArray[np.int32]) -> None:
        """Writes which tokens may come next: bit ``i % 32`` of word ``i // 32`` is token i. Raises GrammarFailed."""
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if self._matcher.is_error():
            raise GrammarFailed("sampling.grammar", _in_one_line(self._matcher.get_error()))


def check_available() -> None:
    """Raises InvalidRequest when llguidance is not installed here."""
    if llguidance is None:
        raise InvalidRequest(
            "sampling.grammar",
            "this process cannot constrain answers: llguidance is not installed; pip install llguidance",
        )


def check_grammar(grammar: Grammar) -> None:
    """Raises InvalidRequest when ``grammar`` is wrong or unsupported; without llguidance, leaves that to the workers.

    May take a second for very complex grammars; the interpreter's lock is free meanwhile.
    """
    if llguidance is None:
        return
    failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(_compiled(grammar))
    if failed:
        raise InvalidRequest(f"sampling.grammar.{grammar.kind}", _in_one_line(messages[0]))
    for message in messages:
        log.debug("grammar: %s", message)


def compact(schema: dict[str, Any]) -> dict[str, Any]:
    """``schema`` with JSON written in one way only, as Python's ``json.dumps`` does."""
    return schema if "x-guidance" in schema else {"x-guidance": _COMPACT, **schema}


def _compiled(grammar: Grammar) -> str:
    """``grammar`` in llguidance's own form."""
    match grammar.kind:
        case "json_object":
            return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(compact({"type": "object"})))
        case "json_schema":
            return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(compact(json.loads(grammar.text))))
        case "regex":
            return llguidance.LLMatcher.grammar_from_regex(grammar.text)
        case "lark":
            return llguidance.LLMatcher.grammar_from_lark(grammar.text)


def _in_one_line(message: str) -> str:
    """The first line, and the line that says what is wrong when the first one announces it."""
    lines = [line.strip() for line in message.strip().splitlines()] or ["the grammar is not supported"]
    reason = next((line for line in lines[1:] if line.startswith("error:")), "") if lines[0].endswith(":") else ""
    return f"{lines[0]} {reason}".strip()[:500]
