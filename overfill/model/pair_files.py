"""Checks that the files of a pair's weights are whole. Routers, which read no weights, do not import this module."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from overfill.errors import InvalidPair
from overfill.model.digest import checkpoint_digest, checkpoint_files, list_tensors
from overfill.model.manifest import HALVES, MANIFEST, Half, Pair
from overfill.telemetry.progress import Report, silent


def load_whole(
    folder: Path, halves: Collection[Half] = HALVES, *, digests: bool = False, report: Report = silent
) -> Pair:
    """Reads a pair as ``Pair.load`` does, and checks that its files of weights are complete.

    Args:
        folder: folder with ``pair.json``.
        halves: halves whose weights the caller reads. Those of another half may be absent.
        digests: True also calls ``check_digests``.
        report: called with a description, the bytes read and the bytes in total.

    Raises:
        InvalidPair, UnsupportedModel: as ``Pair.load``; or a file of weights is missing, incomplete or damaged.
    """
    pair = Pair.load(folder)
    for half in halves:
        list_tensors(pair.path(half))
    if digests:
        check_digests([pair], halves, report=report)
    return pair


def check_digests(pairs: Sequence[Pair], halves: Collection[Half] = HALVES, *, report: Report = silent) -> None:
    """Reads the checkpoints of ``halves``, about a second per gigabyte, and compares their digests with the manifests.

    Reads files once that several halves or pairs link to.

    Raises:
        InvalidPair: a digest differs, or a file is missing, malformed or damaged.
    """
    found: dict[tuple[Path, ...], str] = {}
    for pair in pairs:
        for half in halves:
            path = pair.path(half)
            files = tuple(file.resolve() for file in checkpoint_files(path))
            if files not in found:
                found[files] = checkpoint_digest(path, report)
            if (actual := found[files]) != pair.digest(half):
                raise InvalidPair(
                    f"{pair.folder / MANIFEST}: {half}.digest is {pair.digest(half)}, but the checkpoint in {path} has "
                    f"{actual}; it is damaged"
                )
