"""The folder of files that the processes of a stack share on this machine. Other users cannot read it."""

from __future__ import annotations

import secrets
import tempfile
from pathlib import Path

from overfill.stack.spec import StackSpec


def shared_folder() -> Path:
    """Returns a folder that does not exist yet."""
    return Path(tempfile.gettempdir()) / f"overfill-{secrets.token_hex(8)}"


def make_shared_folder(folder: Path, spec: StackSpec) -> None:
    """Makes the folder, and in it the secret that ``spec.with_secret`` names. The runner removes it at the end."""
    folder.mkdir(mode=0o700)
    (folder / "routers").mkdir()
    if spec.new_secret:
        (folder / "secret").write_text(secrets.token_hex(32) + "\n", encoding="utf-8")
