"""Grammars for answers: computes which tokens may come next. Wraps llguidance; no torch, no sampling.

A matcher's state follows from the tokens so far, so that any worker can rebuild it from them.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overfill.errors import InvalidRequest
from overfill.request.json_schemas import close_objects
from overfill.request.params import Grammar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

try:
    import llguidance
except ImportError:  # a worker without llguidance still serves answers without grammars
    llguidance = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

_MASK_WORD_BITS = 32

# Fixes the white space of JSON. Otherwise a model may write white space without end, and layouts differ by answer.
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# Ignores keywords and formats that llguidance does not support, and reads oneOf as anyOf.
_LENIENT = {"lenient": True, "coerce_one_of": True}


class GrammarFailed(InvalidRequest):
    """llguidance cannot continue a grammar after the tokens so far, because it became too complex."""


class Grammars:
    """Compiles grammars for one vocabulary. Safe to share between threads.

    Reads the tokenizer on first use, which takes about a second; call ``warm`` to read it earlier.

    Args:
        tokenizer_json: Path of the checkpoint's tokenizer.json.
        vocab_size: Number of rows of the model's output head.
        eos_token_ids: Token ids that end an answer; allowed wherever the grammar allows the end.
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
        """Read the tokenizer. Raises InvalidRequest if llguidance is not installed or the model has no end token."""
        check_available()
        with self._lock:
            if self._tokenizer is None:
                if not self._eos_token_ids:
                    raise InvalidRequest(
                        "sampling.grammar", "needs a model with an end-of-sequence token; this model has none"
                    )
                self._tokenizer = llguidance.LLTokenizer(
                    self._path.read_text(encoding="utf-8"), n_vocab=self._vocab_size, eos_token=self._eos_token_ids
                )

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher at the start of an answer.

        Raises:
            InvalidRequest: the grammar is wrong, too complex or not supported; or llguidance is not installed.
        """
        self.warm()
        matcher = llguidance.LLMatcher(self._tokenizer, _compiled(grammar), log_level=0)
        if matcher.is_error():
            raise InvalidRequest(f"sampling.grammar.{grammar.kind}", _in_one_line(matcher.get_error()))
        return Matcher(matcher)


class Matcher:
    """State of one answer in its grammar. Only one thread at a time may use it."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def accept(self, tokens: Iterable[int]) -> None:
        """Advance past ``tokens``, which the mask allowed. Raises GrammarFailed."""
        for token in tokens:
            if not self._matcher.consume_token(token):
                raise GrammarFailed("sampling.grammar", _in_one_line(self._matcher.get_error()))

    def fill(self, row: NDArray[np.int32]) -> None:
        """Write the mask of allowed next tokens into ``row``. Raises GrammarFailed.

        Bit ``i % 32`` of word ``i // 32`` stands for token i.
        """
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if self._matcher.is_error():
            raise GrammarFailed("sampling.grammar", _in_one_line(self._matcher.get_error()))


def check_available() -> None:
    """Raise InvalidRequest if llguidance is not installed in this process."""
    if llguidance is None:
        raise InvalidRequest(
            "sampling.grammar",
            "this server has no llguidance, which grammars need; run pip install llguidance there",
        )


def check_grammar(grammar: Grammar) -> None:
    """Raise InvalidRequest if ``grammar`` is wrong or unsupported. Without llguidance, leave the check to the workers.

    The check may take a second for very complex grammars; it runs without the interpreter's lock.
    """
    if llguidance is None:
        return
    failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(_compiled(grammar))
    if failed:
        raise InvalidRequest(f"sampling.grammar.{grammar.kind}", _in_one_line(messages[0]))
    for message in messages:
        log.debug("grammar: %s", message)


def compact(schema: dict[str, Any], *, lenient: bool = False) -> dict[str, Any]:
    """``schema`` with closed objects, and with an option that fixes the white space to that of ``json.dumps``.

    Args:
        lenient: Whether the grammar ignores those constraints of the schema that llguidance does not support.
    """
    return {"x-guidance": _COMPACT | (_LENIENT if lenient else {}), **close_objects(schema)}


def _compiled(grammar: Grammar) -> str:
    """``grammar`` in llguidance's format."""
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
    """The first line of llguidance's ``message``. If it ends with a colon, the line with the error follows it."""
    lines = [line.strip() for line in message.strip().splitlines()] or ["the grammar is not supported"]
    reason = next((line for line in lines[1:] if line.startswith("error:")), "") if lines[0].endswith(":") else ""
    return f"{lines[0]} {reason}".strip()[:500]
