"""Generates ``sync.py`` from ``aio.py``: the blocking client is the asyncio client without ``async`` and ``await``.

``concurrency.py`` holds, for each of the two clients, the parts that differ in more than these words. ``make sdk`` runs
this script.
"""

from __future__ import annotations

import re
from pathlib import Path

_FOLDER = Path(__file__).parent

_HEADER = "# Generated from aio.py by generate_sync.py. Change aio.py, then run `make sdk`.\n"

_PHRASES = {
    "The SDK for asyncio.": "The SDK for threads.",
    "import AsyncIterator, Callable,": "import Callable, Iterator,",
    "AsyncChannels, AsyncResponses, CallCancelled": "CallCancelled, Channels, Responses",  # as ruff sorts them
    "AsyncChannels(tls)": "Channels(self._addresses, tls)",
    "for one event loop": "safe to share between threads",
    "an async context manager": "a context manager",
}
"""Replacement of each phrase in ``aio.py``; the generator applies them before ``_WORDS``."""

_WORDS = {
    r"async (?=def|for|with)": "",
    r"await ": "",
    r"__a(?=enter__|exit__|next__)": "__",
    r"Async(?=Channels|Client|Iterator|Responses|Stream)": "",
    r"StopAsyncIteration": "StopIteration",
    r"async_response": "response",
    r"run_as_tasks": "run_in_threads",
}
"""Replacement of each regular expression."""


def blocking(source: str) -> str:
    """Blocking code for ``source``. Raises ValueError if ``source`` lacks a phrase, or an asyncio word remains."""
    for phrase, replacement in _PHRASES.items():
        if phrase not in source:
            raise ValueError(f"aio.py lacks {phrase!r}; change _PHRASES too")
        source = source.replace(phrase, replacement)
    for word, replacement in _WORDS.items():
        source = re.sub(word, replacement, source)
    if left := re.search(r".*(async|await).*", source, re.IGNORECASE):
        raise ValueError(f"no rule turns this line into blocking code: {left[0].strip()!r}")
    return _HEADER + source


def main() -> None:
    """Write ``sync.py``."""
    (_FOLDER / "sync.py").write_text(blocking((_FOLDER / "aio.py").read_text()))


if __name__ == "__main__":
    main()
