"""The page of the errors: every class with its gRPC status and its HTTP status."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from page_text import cell, sentence, table

from overfill import errors
from overfill.api.openai.errors import from_error
from overfill.errors import InvalidRequest, OverfillError
from overfill.rpc.status import to_status

_INTRODUCTION = """# Errors

Every error that OverFill raises on purpose, with its gRPC status, its HTTP status, and what the command line makes of it.

All of them are classes in `overfill.errors`, below `OverfillError`; [the SDK](sdk.md#errors) and
[`overfill.LLM`](python.md) raise them. Over gRPC the class travels in `grpc-status-details-bin`, as the `reason` of a
`google.rpc.ErrorInfo` with the domain `overfill`. Over HTTP the body is
[OpenAI's](openai.md#errors). An exception of any other class becomes `INTERNAL`, with an incident number that is in the
log of the process.
"""

_LOCAL = """*Local* errors are about this machine. They end a command or the start of a process, and no server sends them.
`TransferFailed`, `Incompatible` and `InvalidPair` occur between processes of a stack; the router tries another worker,
and a client sees them only when none is left.
"""

_EXIT_CODES = """## Exit codes

| code | of `overfill` commands | of services |
|---|---|---|
| 0 | the command did what it should | the process has drained and ended: SIGTERM, SIGINT or `overfill drain` |
| 1 | an error of this page, in one line on stderr; or the answer of a check is no: `health`, `config check`, `pair show`, `verify`, `loadtest`, `chaos`, `bench` | the process could not start, or ended itself: a step hung, a KV block was lost, or, on vLLM, a step failed |
| 2 | an option, a variable or a key is wrong; `verify`, `loadtest`: the check could not be made | an option, a variable or a key is wrong |
| 130 | ctrl-C | |

The help of [each command](cli.md) says when it exits with 1 or 2 for a reason of its own.
"""


_LINE = re.compile(r"^([│├└─ ]*)(\w+) {2,}(.+?) {2,}(\S+)$", re.MULTILINE)


def page() -> str:
    header = ("class", "gRPC status", "HTTP status, `code`", "when")
    return "\n".join([_INTRODUCTION, "## Classes\n", table(header, _rows()), _LOCAL, _EXIT_CODES])


def _rows() -> Iterator[tuple[str, str, str, str]]:
    """Yields a row for each class of the tree in the docstring of ``overfill.errors``, in its order."""
    yield "[`OverfillError`][overfill.errors.OverfillError]", "", "", "Base class of the others."
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
        yield f"{arrow}[`{name}`][overfill.errors.{name}]", f"`{code}`", http, meaning
