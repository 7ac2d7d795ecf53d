"""Every error class with its gRPC status and its HTTP status, from ``overfill.errors`` and what maps it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from table_text import cell, sentence, table

from overfill import errors
from overfill.api.openai.errors import from_error
from overfill.errors import InvalidRequest, OverfillError
from overfill.rpc.status import to_status

_LINE = re.compile(r"^([│├└─ ]*)(\w+) {2,}(.+?) {2,}(\S+)$", re.MULTILINE)


def errors_table() -> str:
    """Returns a table of the classes."""
    return table(("class", "gRPC status", "HTTP status, `code`", "when"), _rows())


def _rows() -> Iterator[tuple[str, str, str, str]]:
    """Yields a row for each class of the tree in the docstring of ``overfill.errors``, in its order."""
    yield "[`OverfillError`](sdk.md#overfillerror)", "", "", "Base class of the others."
    for prefix, name, short, status in _LINE.findall(errors.__doc__ or ""):
        kind: type[OverfillError] | None = getattr(errors, name, None)
        arrow = "└&nbsp;" if len(prefix) > 8 else ""
        if kind is None:  # raised on this machine only, so it is where it is raised
            yield f"{arrow}`{name}`", "local", "", f"{sentence(cell(short))}."
            continue
        meaning = " ".join(inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0].split()).replace("``", "`")
        error = kind("prompt", "is wrong") if issubclass(kind, InvalidRequest) else kind("it failed")
        answer = from_error(error)
        http = "" if kind is errors.RequestCancelled else f"{answer.status} `{answer.code}`"  # no one is left to get it
        code = to_status(error).code.name
        if code != status:
            raise ValueError(f"the docstring of overfill.errors says {status} for {name}, and its status is {code}")
        yield f"{arrow}[`{name}`](sdk.md#{name.lower()})", f"`{code}`", http, meaning
