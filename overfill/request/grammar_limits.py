"""What a client's grammar may cost. Needs no library that compiles grammars."""

from __future__ import annotations

import resource
from dataclasses import dataclass, field

_UNLIMITED_STACK = 2 << 20  # bytes that glibc gives a thread where the limit of the stack is infinite


def _half_a_stack() -> int:
    """Returns half of the stack that a new thread of this process gets, in bytes."""
    soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return (_UNLIMITED_STACK if soft == resource.RLIM_INFINITY else soft) // 2


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """What a client's grammar may cost when it is tried.

    Args:
        memory: bytes that the compiled grammar may take, after some tokens too. Compiling it may take twice as many.
        seconds: CPU time that the trial may take.
        stack_bytes: stack of the trial. It is half of this process's, so that a grammar that passes fits here too.
    """

    memory: int = 64 << 20
    seconds: int = 2
    stack_bytes: int = field(default_factory=_half_a_stack)

    @property
    def trial_bytes(self) -> int:
        """Bytes of address space that a trial may take in addition to the helper process's."""
        return 2 * self.memory

    @property
    def too_much_memory(self) -> str:
        """The reason why a grammar that exceeds ``memory`` is refused."""
        return f"it needs more than {self.memory >> 20} MiB of memory, the limit on this server"

    @property
    def too_slow(self) -> str:
        """The reason why a grammar that exceeds ``seconds`` is refused."""
        return f"compiling it takes more than {self.seconds} s of CPU time, the limit on this server"
