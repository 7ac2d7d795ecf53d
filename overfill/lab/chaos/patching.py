"""Changes functions of a service in memory, and with them the KV that it sends or receives."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from overfill.settings.reader import SETTINGS

Changed = Callable[..., Any]

Flip = Callable[[int], tuple[int, int] | None]
"""Returns the byte to damage in a chunk of so many bytes, and the mask of the bits; None means no damage."""


def around(owner: Any, name: str) -> Callable[[Changed], Changed]:
    """Replaces the function ``name`` of a class or module by the decorated one, which gets the original one first."""
    original = getattr(owner, name)

    def install(changed: Changed) -> Changed:
        def replaced(*args: Any, **kwargs: Any) -> Any:
            return changed(original, *args, **kwargs)

        setattr(owner, name, replaced)
        return changed

    return install


def runs_vllm() -> bool:
    """Returns True if this service's engine is vLLM, by its flags or by the settings that its parent gives it."""
    return "--engine=vllm" in sys.argv or '"engine": "vllm"' in os.environ.get(SETTINGS, "")


def damage_sent(flip: Flip) -> None:
    """Damages chunks that this process sends, after their checksums were computed."""
    import overfill.kv.sender as sender

    def damage(chunks: Any) -> None:
        # Payloads are views into the message, into shared memory or of codes.
        for chunk in chunks:
            if (at := flip(len(chunk.payload))) is not None:
                memoryview(chunk.payload)[at[0]] ^= at[1]

    @around(sender, "join_chunks")
    def damage_and_join(join: Any, chunks: Any) -> Any:
        damage(chunks)
        return join(chunks)

    @around(sender.KvSender, "_read_message")
    def read_and_damage(read: Any, self: Any, chunks: Any) -> Any:
        message = read(self, chunks)
        if self._raw and chunks[0].slot is None:  # the message was not joined
            damage(chunks)
        return message


def damage_received(flip: Flip) -> None:
    """Damages chunks that this process receives, before their checksums are compared."""
    import overfill.kv.puller as puller

    @around(puller, "check_head")
    def damage_and_check(check: Any, spec: Any, chunk: Any) -> Any:
        if (at := flip(len(chunk.payload))) is not None:
            damaged = bytearray(chunk.payload)
            damaged[at[0]] ^= at[1]
            chunk.payload = damaged
        return check(spec, chunk)
