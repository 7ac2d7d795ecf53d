"""Checks that the files of a pair's weights are whole. Routers, which read no weights, do not import this module."""

from __future__ import annotations

from pathlib import Path

from overfill.errors import InvalidPair
from overfill.model.digest import checkpoint_digest, list_tensors
from overfill.model.manifest import MANIFEST, Pair
from overfill.telemetry.progress import Report, silent


def load_whole(folder: Path, *, digests: bool = False, report: Report = silent) -> Pair:
    """Reads a pair as ``Pair.load`` does, and checks that its files of weights are complete.

    Args:
        folder: folder with ``pair.json``.
        digests: True reads both checkpoints (about a second per gigabyte), and compares their digests.
        report: called with a description, the bytes read and the bytes in total.

    Raises:
        InvalidPair, UnsupportedModel: as ``Pair.load``; or a file of weights is missing, incomplete or damaged.
    """
    pair = Pair.load(folder)
    stated = {pair.decoder_path: ("decoder", pair.decoder_digest)} | {pair.full_path: ("full", pair.full_digest)}
    for path, (half, digest) in stated.items():
        if not digests:
            list_tensors(path)
        elif (actual := checkpoint_digest(path, report)) != digest:
            raise InvalidPair(
                f"{pair.folder / MANIFEST}: {half}.digest is {digest}, but the checkpoint in {path} has {actual}; it "
                "is damaged"
            )
    return pair
