"""The extras of the distribution: what is told when one is missing. Imports the standard library only.

``pip install overfill`` brings the SDK and the commands of a client. Everything else belongs to an extra of
``pyproject.toml``, and its modules may be absent.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from overfill.errors import OverfillError

_OURS = ("overfill", "services")
_CHECKOUT = Path(__file__).parents[1]


class MissingExtra(OverfillError, ImportError):
    """A module of an extra is not installed; the message has the line that installs it."""


def install_line(extra: str) -> str:
    """The line that adds ``extra``, which may be several separated by commas, to this installation.

    It names the source of this installation: a checkout, a repository, or an index when neither is known.
    """
    wanted = f"[{extra}]" if extra else ""
    if (_CHECKOUT / "pyproject.toml").exists():
        return _pip("-e ", f"{_path(_CHECKOUT)}{wanted}")
    source = _source()
    url = source.get("url", "")
    if "vcs_info" in source:
        vcs = source["vcs_info"]
        return _pip("", f"overfill{wanted} @ {vcs['vcs']}+{url}@{vcs['commit_id']}")
    if url.startswith("file:") and (path := Path(url2pathname(urlsplit(url).path))).exists():
        return _pip("", f"{_path(path)}{wanted}")
    return _pip("", f"overfill{wanted}")


@contextmanager
def needs(extra: str, user: str) -> Iterator[None]:
    """Within it, a module that is not installed is told as a missing ``extra``. ``user`` is the message's subject.

    Raises:
        MissingExtra: a module of another project is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in _OURS:
            raise  # a fault of ours
        raise _missing(extra, user, error.name) from error


def require(extra: str, user: str, *modules: str) -> None:
    """Raises MissingExtra unless all ``modules`` are installed. Imports none of them."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise _missing(extra, user, name)


def _missing(extra: str, user: str, module: str) -> MissingExtra:
    return MissingExtra(f"{user} needs {module}, which is not installed here: {install_line(extra)}")


def _pip(options: str, target: str) -> str:
    # Always in quotes: some shells take brackets for a pattern.
    return f"pip install {options}{shlex.quote(target)}"


def _path(path: Path) -> str:
    return "." if path == Path.cwd() else str(path)


def _source() -> dict[str, Any]:
    """Where pip took this installation from (PEP 610); empty when it was an index."""
    try:
        found: dict[str, Any] = json.loads(distribution("overfill").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        return {}
    return found
