"""Types of settings' values, with their checks. No torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, PlainSerializer

from overfill.rpc.constants import MAX_NAME_LENGTH

LogLevel = Literal["debug", "info", "warning", "error"]
EngineChoice = Literal["auto", "overfill", "vllm", "mock"]


LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
"""Names of tiers and revisions. Each is also a valid DNS label."""

_NO_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udc7f\udd00-\udfff]")
"""Control characters except line breaks and tabs, and the surrogates that stand for no byte of a file's name."""


def check_text(value: Any) -> Any:
    """Returns the value. Raises ValueError if it is a text with a character that no path and no protocol can have."""
    if isinstance(value, str) and (found := _NO_TEXT.search(value)):
        raise ValueError(f"must be text without {found[0]!r}")
    return value


def _split(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _check_address(address: str) -> str:
    port = address.rpartition(":")[2]
    if address.startswith("unix:") or (":" in address and port.isdecimal() and int(port) < 65536):
        return address
    if re.fullmatch(r"ray:///[\w.-]+", address):
        return address
    raise ValueError("expected HOST:PORT, dns:///NAME:PORT or ray:///APPLICATION, or several separated by commas")


def _check_origin(origin: str) -> str:
    """Returns the origin as browsers write it: lower case, without path and without the scheme's default port."""
    origin = origin.lower()
    if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
        raise ValueError("expected *, or origins such as https://chat.example.org, without a path, separated by commas")
    return re.sub(r"^(http(?=.*:80$)|https(?=.*:443$))(://.+):\d+$", r"\1\2", origin)


def _check_device(device: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ValueError("must be auto, cpu, cuda or cuda:N")
    return device


def _check_name(name: str) -> str:
    if len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise ValueError(f"must be at most {MAX_NAME_LENGTH} printable characters")
    return name


def check_revision(name: str) -> str:
    """Returns the name of a revision, or the empty text. Raises ValueError for another text."""
    if name and not LABEL.fullmatch(name):
        raise ValueError("must be 1 to 32 lower-case letters, digits and hyphens, such as r1 or 2026-11-30")
    return name


def _read_off(value: object) -> object:
    """Reads False, which is ``off`` in YAML, as "off". True is no port either, although Python counts it as 1."""
    if value is True:
        raise ValueError("must be a whole number from 0 to 65535, or off")
    return "off" if value is False else value


def _check_url(url: str) -> str:
    if not re.fullmatch(r"(https?://.+)?", url):
        raise ValueError("must be a URL such as http://127.0.0.1:4317")
    return url


def _check_positive(size: ByteSize) -> ByteSize:
    if size <= 0:
        raise ValueError("must be a size above 0, such as 512MiB or 4GB")
    return size


def _short_size(size: int) -> str | int:
    return int(size) if size % (1 << 20) else f"{size >> 20}MiB"


def _check_engine_args(text: str) -> str:
    """Returns the JSON object with its arguments in order, so that equal settings are equal text; empty without any.

    The values stay as they are: a mock engine plays the arguments of a scripted tool call in their order.
    """
    try:
        values = json.loads(text) if text else {}
    except ValueError as error:
        raise ValueError(f"expected a JSON object such as '{{\"enforce_eager\": true}}': {error}") from None
    if not isinstance(values, dict):
        raise ValueError("expected a JSON object such as '{\"enforce_eager\": true}'")
    return json.dumps(dict(sorted(values.items()))) if values else ""


EngineArgs = Annotated[str, AfterValidator(_check_engine_args)]
Bytes = Annotated[ByteSize, AfterValidator(_check_positive), PlainSerializer(_short_size, when_used="json")]
Device = Annotated[str, AfterValidator(_check_device)]
Name = Annotated[str, AfterValidator(_check_name)]
Revision = Annotated[str, AfterValidator(check_revision)]
Url = Annotated[str, AfterValidator(_check_url)]
Addresses = Annotated[tuple[Annotated[str, AfterValidator(_check_address)], ...], BeforeValidator(_split)]
Names = Annotated[tuple[Name, ...], BeforeValidator(_split)]
Origins = Annotated[tuple[Annotated[str, AfterValidator(_check_origin)], ...], BeforeValidator(_split)]
Folder = Annotated[Path, AfterValidator(Path.absolute)]  # workers on Ray start in another folder
Port = Annotated[int, Field(ge=0, le=65535)]
PortOrOff = Annotated[Port | Literal["off"], BeforeValidator(_read_off)]
# Text, because a Path would turn the folder ./default into the name default.
PairName = Annotated[str, BeforeValidator(lambda value: str(value.absolute()) if isinstance(value, Path) else value)]
