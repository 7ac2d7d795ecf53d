"""The extras of the distribution: what is told when one is missing. Imports the standard library only.

``pip install overfill`` brings the SDK and the commands of a client. Everything else belongs to an extra of
``pyproject.toml``, and its modules may be absent.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from overfill.errors import OverfillError

_OURS = ("overfill", "services")
_RENAMED = {
    "grpcio_reflection": "grpc_reflection",
    "opentelemetry_exporter_otlp_proto_grpc": "opentelemetry",
    "opentelemetry_sdk": "opentelemetry",
}
"""Requirements whose module has another name."""

_CHECKOUT = Path(__file__).parents[2]


class MissingExtra(OverfillError, ImportError):
    """A module of an extra is not installed; the message has the line that installs it."""


def install_line(extra: str) -> str:
    """The line that adds ``extra``, which may be several separated by commas, to this installation.

    It names the source of this installation: a checkout, a repository, a file or folder that has gone since, or an
    index when none is known.
    """
    wanted = f"[{extra}]" if extra else ""
    if (_CHECKOUT / "pyproject.toml").exists():
        return _pip("-e ", f"{_path(_CHECKOUT)}{wanted}")
    source = _source()
    url = source.get("url", "")
    if "vcs_info" in source:
        vcs = source["vcs_info"]
        return _pip("", f"overfill{wanted} @ {vcs['vcs']}+{url}@{vcs['commit_id']}")
    if url.startswith("file:"):
        path = Path(url2pathname(urlsplit(url).path))
        if path.exists():
            return _pip("", f"{_path(path)}{wanted}")
        kind = "the wheel" if path.suffix == ".whl" else path.name
        return f"install {kind} again{f' with {wanted}' if wanted else ''}"
    return _pip("", f"overfill{wanted}")


@contextmanager
def needs(extra: str, user: str) -> Iterator[None]:
    """Raises MissingExtra, naming ``extra``, when the body imports a module that is not installed.

    Modules that no extra brings raise what they raise. ``user`` is the message's subject.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package, brought = (error.name or "").partition(".")[0], _modules()
        if package in ("", *_OURS) or (brought and not any(package in modules for modules in brought.values())):
            raise  # a fault of ours, or one of an installation that no extra mends
        raise _missing(extra, user, error.name or "") from error


def require(extra: str, user: str, *modules: str) -> None:
    """Raises MissingExtra unless all ``modules`` are installed. Imports none of them."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise _missing(extra, user, name)


def _missing(extra: str, user: str, module: str) -> MissingExtra:
    modules = _modules()
    wanted = extra.split(",")
    lacking = [one for one in wanted if any(importlib.util.find_spec(name) is None for name in modules.get(one, ()))]
    extra = ",".join(lacking or wanted)
    return MissingExtra(f"{user} needs {module}, which is not installed here: {install_line(extra)}")


def _modules() -> dict[str, set[str]]:
    """Extra -> the packages that its requirements bring; empty when the distribution has no metadata."""
    found: dict[str, set[str]] = {}
    try:
        lines = requires("overfill") or []
    except PackageNotFoundError:
        return {}
    for line in lines:
        match = re.match(r"([\w.-]+).*;.*extra == [\"']([\w-]+)[\"']", line)
        if match and match[2] != "dev":
            name = re.sub(r"[-.]+", "_", match[1]).lower()
            if name not in _OURS:
                found.setdefault(match[2], set()).add(_RENAMED.get(name, name))
    return found


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
