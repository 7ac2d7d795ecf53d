"""One trial of a grammar: compiles it, walks through an answer, and measures. The grammar may end the process."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path

from overfill.errors import InvalidRequest
from overfill.request.grammar import GrammarFailed, Grammars, GrammarStuck, available
from overfill.request.grammar_limits import GrammarLimits
from overfill.request.params import Grammar

_TOKENS = 64
_WALK_SHARE = 0.1
"""Share of the CPU time of a trial after which the walk ends."""


class Bench:
    """What trials share: the tokenizer and the limits.

    Args:
        tokenizer_json, vocab_size, eos_token_ids: as for ``Grammars``.
        memory, seconds, stack_bytes: as for ``GrammarLimits``.
    """

    def __init__(
        self,
        tokenizer_json: str,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        memory: int,
        seconds: int,
        stack_bytes: int,
    ) -> None:
        self.limits = GrammarLimits(memory, seconds, stack_bytes)
        self._grammars = Grammars(Path(tokenizer_json), vocab_size, eos_token_ids, self.limits)
        if available() and eos_token_ids:
            self._grammars.warm()

    def try_grammar(self, grammar: Grammar) -> float:
        """Compiles ``grammar`` and walks through an answer. Does nothing without llguidance.

        Returns:
            Seconds of CPU time that compiling it took.

        Raises:
            InvalidRequest: the grammar is wrong, or exceeds a limit.
        """
        if not available():
            return 0
        field = f"sampling.grammar.{grammar.kind}"
        before, began = _status("VmRSS"), time.process_time()
        matcher = self._grammars.matcher(grammar)
        generator = random.Random(0)
        compiled = time.process_time()
        until = compiled + _WALK_SHARE * self.limits.seconds
        seconds = compiled - began
        for token in range(_TOKENS):
            try:
                if time.process_time() > until or not matcher.advance(generator):
                    break
            except GrammarFailed as error:
                if token and isinstance(error, GrammarStuck):  # a model may choose other tokens
                    break
                raise InvalidRequest(field, error.reason) from error
        if _status("VmRSS") - before > self.limits.memory:
            raise InvalidRequest(field, f"is too complex: {self.limits.too_much_memory}")
        return seconds

    @staticmethod
    def virtual_bytes() -> int:
        """Size of this process's address space."""
        return _status("VmSize")


def try_grammar(payload: bytes, bench: Bench) -> bytes:
    """Tries the grammar in ``payload``, its kind and its text. Returns and raises what ``Bench.try_grammar`` does."""
    kind, _, text = payload.decode().partition("\0")
    return repr(bench.try_grammar(Grammar(kind, text))).encode()  # type: ignore[arg-type]  # checked by Grammar


def _status(name: str) -> int:
    """Returns a size of this process in bytes."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))
