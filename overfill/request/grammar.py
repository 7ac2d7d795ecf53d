"""Grammars for answers: computes which tokens may come next. Wraps llguidance; no torch, no sampling.

A matcher's state follows from the tokens so far, so that any worker can rebuild it from them. A client's grammar is
tried in another process before this one compiles it; see ``overfill.request.trials``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from overfill.errors import InvalidRequest
from overfill.request.fair_permits import FairPermits
from overfill.request.grammar_limits import GrammarLimits
from overfill.request.json_schemas import compact
from overfill.request.params import Grammar
from overfill.request.trials import Trials

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

try:
    import llguidance
except ImportError:  # a worker without llguidance still serves answers without grammars
    llguidance = None  # type: ignore[assignment]

T = TypeVar("T")

log = logging.getLogger(__name__)

_MASK_WORD_BITS = 32

# Limits of an automaton when it is compiled and at each token, because it grows while an answer is written. Comments
# say what the largest of a hundred realistic grammars needs (tests/support/realistic_grammars.py).
_PARSER_LIMITS: dict[str, Any] = {
    "max_items_in_row": 1_200,  # 599, of 150 optional fields
    "initial_lexer_fuel": 1_000_000,  # 250,000, of 128 tools
    "step_lexer_fuel": 100_000,  # 25,000; this takes 7 ms
    "step_max_items": 10_000,  # 781
    "max_lexer_states": 50_000,  # 3,906; 0.6 kB each, and five for each character of a string with a maxLength
    "max_grammar_size": 250_000,  # 62,500, of 128 tools
}

MATCHER_BYTES = 32 << 20
"""Memory that a matcher may come to use while its answer is written: ``max_lexer_states`` states."""

_CREDIT_PER_TOKEN, _MAX_CREDIT = 0.003, 0.15
"""CPU time that a matcher may take, in seconds: for each token, and in addition at any time.

The limits above do not bound it: of an ambiguous grammar, a step with 500 items in a row takes 20 ms, and one with
1,000 takes 600 ms. Realistic grammars take 0.1 to 0.6 ms per token. A slow one delays all answers of its batch.
"""

_COSTLY = 0.05
"""Seconds of CPU time from which on compiling a grammar is costly."""

_MAX_COSTLY = 1024  # that wait to be compiled, of one client
_FIELD = "sampling.grammar."
_ODD_BACKSLASHES = re.compile(r"(?<!\\)(?:\\\\)*\\\Z")  # llguidance leaves out the last one
_LIMIT_WORDS = re.compile("fuel|[Tt]oo many|too big|too large|exceeds limit|recursion limit|too deeply|; max is")


class GrammarFailed(InvalidRequest):
    """llguidance cannot continue a grammar after the tokens so far, because it became too complex."""


class GrammarStuck(GrammarFailed):
    """A grammar allows no token after those so far, and not the end of the answer either."""


class Grammars:
    """Compiles grammars for one vocabulary. Safe to share between threads.

    Reads the tokenizer on first use, which takes about a second; call ``warm`` to read it earlier.

    Args:
        tokenizer_json: Path of the checkpoint's tokenizer.json.
        vocab_size: Number of rows of the model's output head.
        eos_token_ids: Token ids that end an answer; allowed wherever the grammar allows the end.
        limits: What a client's grammar may cost.
    """

    def __init__(
        self,
        tokenizer_json: Path,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        limits: GrammarLimits | None = None,
    ) -> None:
        self._path = tokenizer_json
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._live: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()
        self._counting = threading.Lock()  # for ``_live``
        # One of the threads at a time compiles a costly grammar, so that the other ones do not wait for it.
        self._compilers = ThreadPoolExecutor(2, "grammar")
        self._costly = FairPermits(1, _MAX_COSTLY)
        self._trials = Trials(tokenizer_json, vocab_size, eos_token_ids, limits)

    @property
    def mask_words(self) -> int:
        """Number of 32-bit words in a row of a mask."""
        return -(-self._vocab_size // _MASK_WORD_BITS)

    @property
    def live(self) -> int:
        """Number of matchers that exist, in other processes too as far as ``count`` knows of them."""
        with self._counting:
            return sum(self._live.values())

    def count(self, holder: object, matchers: int) -> None:
        """Counts ``matchers`` as long as ``holder`` exists, which has them, here or in other processes."""
        with self._counting:
            self._live[holder] = matchers

    def close(self) -> None:
        """Ends the helper process that tries grammars."""
        self._trials.close()

    async def prepare(self, grammar: Grammar, key: str, make: Callable[[], T]) -> T:
        """Tries ``grammar`` (``Trials.try_text``), then calls ``make``, which compiles it, in a thread of its own."""
        seconds = await self._trials.try_text(grammar.kind, grammar.text, key)
        loop = asyncio.get_running_loop()
        if seconds < _COSTLY:
            return await loop.run_in_executor(self._compilers, make)
        await self._costly.take(key)
        call = loop.run_in_executor(self._compilers, make)

        def end(call: asyncio.Future[T]) -> None:
            self._costly.release(key)
            if not call.cancelled():
                call.exception()  # marks it as retrieved, so that asyncio does not log that of a cancelled request

        call.add_done_callback(end)
        return await asyncio.shield(call)  # nothing can stop the thread: it keeps its permit until it ends

    def warm(self) -> None:
        """Reads the tokenizer. Raises InvalidRequest if llguidance is not installed or the model has no end token."""
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
        matcher = llguidance.LLMatcher(self._tokenizer, _compiled(grammar), log_level=0, limits=_limits())
        if matcher.is_error():
            raise InvalidRequest(_FIELD + grammar.kind, _reason(matcher.get_error()))
        made = Matcher(matcher)
        self.count(made, 1)
        return made


class Matcher:
    """State of one answer in its grammar. Only one thread at a time may use it."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher
        self._credit = _MAX_CREDIT  # seconds of CPU time

    def accept(self, tokens: Iterable[int]) -> None:
        """Advance past ``tokens``: those that a step sampled, or all that an earlier attempt emitted.

        Raises:
            GrammarFailed: the grammar became too complex.
            InvalidRequest: the grammar forbids a token. The mask forbids such tokens to steps, so a client resumes
                another answer.
        """
        for index, token in enumerate(tokens):
            self._credit = min(_MAX_CREDIT, self._credit + _CREDIT_PER_TOKEN)
            with self._charged():
                accepted = self._matcher.try_consume_tokens([token])
            if accepted:
                continue
            if self._matcher.is_error():
                raise self._failure()
            # After the last token that the grammar allows, an end token still fits.
            if not (self._matcher.is_stopped() and self._matcher.consume_token(token)):
                raise InvalidRequest(
                    "resume_token_ids",
                    f"token {token} at index {index} does not fit sampling.grammar; give the tokens of an answer in it",
                )

    def fill(self, row: NDArray[np.int32]) -> None:
        """Writes the mask of allowed next tokens into ``row``. Raises GrammarFailed.

        Bit ``i % 32`` of word ``i // 32`` stands for token i.
        """
        with self._charged():
            self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if self._matcher.is_error():
            raise self._failure()

    def advance(self, generator: random.Random) -> bool:
        """Advance past a random token that the grammar allows. Returns False at the end. Raises GrammarFailed."""
        with self._charged():
            mask: bytes = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise self._failure()
        rest = mask[generator.randrange(len(mask)) :].lstrip(b"\0") or mask.lstrip(b"\0")
        if not rest or self._matcher.is_stopped():
            return False
        bits = [bit for bit in range(8) if rest[0] >> bit & 1]
        self.accept([8 * (len(mask) - len(rest)) + generator.choice(bits)])
        return True

    @contextmanager
    def _charged(self) -> Iterator[None]:
        """Takes the CPU time of the body from the credit. Raises GrammarFailed when none is left."""
        before = time.thread_time()
        yield
        self._credit -= time.thread_time() - before
        if self._credit < 0:
            raise GrammarFailed(
                "sampling.grammar",
                f"is too complex: tokens of its answers take more than {_CREDIT_PER_TOKEN * 1000:g} ms of CPU time",
            )

    def _failure(self) -> GrammarFailed:
        reason = _in_one_line(self._matcher.get_error())
        if reason.startswith("NoExtension"):  # the error of llguidance is this word
            return GrammarStuck("sampling.grammar", "allows no token after the beginning of an answer that it allows")
        return GrammarFailed("sampling.grammar", f"is too complex: {reason}")


def available() -> bool:
    """True if llguidance is installed in this process."""
    return llguidance is not None


def check_available() -> None:
    """Raises InvalidRequest if llguidance is not installed in this process."""
    if llguidance is None:
        raise InvalidRequest(
            "sampling.grammar",
            "this server has no llguidance, which grammars need; run pip install llguidance there",
        )


def check_grammar(grammar: Grammar) -> None:
    """Raises InvalidRequest if ``grammar`` is wrong or unsupported. Without llguidance, leaves that to the workers.

    Call it in a trial only, because a grammar may crash the process.
    """
    if llguidance is None:
        return
    if grammar.kind == "regex" and _ODD_BACKSLASHES.search(grammar.text):
        raise InvalidRequest(f"{_FIELD}regex", "ends with a backslash that has nothing to escape; write two, or none")
    failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(_compiled(grammar), limits=_limits())
    if failed:
        raise InvalidRequest(_FIELD + grammar.kind, _reason(messages[0]))
    for message in messages:
        log.debug("grammar: %s", message)


def first_bytes(lark: str) -> frozenset[int]:
    """The bytes with which a text of the expression ``lark``, in UTF-8, may begin. Call it in a trial only."""
    matcher = llguidance.LLMatcher(_bytes(), llguidance.LLMatcher.grammar_from_lark(f"start: {lark}"), log_level=0)
    mask: bytes = matcher.compute_bitmask()
    return frozenset(byte for byte in range(256) if mask[byte >> 3] >> (byte & 7) & 1)


@cache
def _bytes() -> Any:
    """A tokenizer whose tokens are bytes."""
    return llguidance.LLTokenizer("byte")


def _limits() -> Any:
    return llguidance.LLParserLimits(**_PARSER_LIMITS, verbose_errors=False)


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


def _reason(error: str) -> str:
    """Why llguidance refuses a grammar. It has no other sign than its words for a limit that was reached."""
    reason = _in_one_line(error)
    return f"is too complex: {reason}" if _LIMIT_WORDS.search(reason) else reason


def _in_one_line(message: str) -> str:
    """The first line of llguidance's ``message``. If it ends with a colon, the line with the error follows it."""
    message = message.replace("<non-verbose/>", "").strip()
    lines = [line.strip() for line in message.splitlines()] or ["the grammar is not supported"]
    reason = next((line for line in lines[1:] if line.startswith("error:")), "") if lines[0].endswith(":") else ""
    return f"{lines[0]} {reason}".strip()[:500]
