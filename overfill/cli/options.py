"""Options that several commands share: address, credentials, sampling, data type, tiers."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import click
from click.core import ParameterSource

from overfill.cli.answering import DEFAULT_MAX_TOKENS, DEFAULT_TEMPERATURE
from overfill.errors import InvalidRequest
from overfill.settings.tiers import TierSpec

if TYPE_CHECKING:
    from overfill.client import Client
    from overfill.request.params import SamplingParams
    from overfill.rpc.tls import ClientTls

_F = TypeVar("_F", bound=Callable[..., Any])
_PICTURES = ".png", ".svg", ".pdf"
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


class OutPath(click.Path):
    """A file or folder that a command writes at its end. Refuses what cannot be written before the work begins.

    Args:
        kind: "file", in a folder that exists; "picture", a file that matplotlib draws; "folder"; or "new folder", which
            must not exist.
    """

    def __init__(self, kind: Literal["file", "picture", "folder", "new folder"]) -> None:
        super().__init__(file_okay=kind != "folder", dir_okay=kind not in ("file", "picture"))
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        out = Path(os.fsdecode(super().convert(value, param, ctx)))
        if self._kind == "picture" and out.suffix not in _PICTURES:
            self.fail(f"{out} must end in {', '.join(_PICTURES)}", param, ctx)
        if self._kind == "new folder" and os.path.lexists(out):
            self.fail(f"{out} already exists; give a new folder", param, ctx)
        place = next(path for path in (out.absolute(), *out.absolute().parents) if os.path.exists(path))
        if not place.is_dir() and place != out.absolute():
            self.fail(f"{out} cannot be made, because {place} is a file", param, ctx)
        if self._kind in ("file", "picture") and place not in (out.absolute(), out.absolute().parent):
            self.fail(f"{out} cannot be made: make the folder {out.parent} first", param, ctx)
        if not os.access(place, os.W_OK | (os.X_OK if place.is_dir() else 0)):
            self.fail(f"{out} cannot be written, because you may not write to {place}", param, ctx)
        return out


class TierParam(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.3 on
    """Parses a tier.

    Args:
        least: minimum number of decode workers.
    """

    name = "name=pair[:n][,setting=value...]"
    envvar_list_splitter = ";"

    def __init__(self, least: int = 1) -> None:
        self._least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> TierSpec:
        try:
            return value if isinstance(value, TierSpec) else TierSpec.parse(value, self._least)
        except ValueError as error:
            self.fail(str(error), param, ctx)


TIER = TierParam()
"""A tier as ``overfill up --tier`` takes it."""


def check_replaced(*names: str) -> None:
    """Raises click.UsageError if an option of the current command is given that --tier replaces."""
    source = click.get_current_context().get_parameter_source
    if given := [f"--{name.replace('_', '-')}" for name in names if source(name) is not ParameterSource.DEFAULT]:
        raise click.UsageError(
            f"--tier conflicts with {' and '.join(given)} (also in the settings file, or as a variable): each --tier "
            "names its own pair and number of decode workers, as NAME=PAIR:N,max=N"
        )


class _Finite(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.3 on
    """Mixin that refuses NaN and infinity. List it before a click number type."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


class Number(_Finite, click.FloatRange):
    """A finite number in a range."""


class AnyNumber(_Finite, click.types.FloatParamType):
    """A finite number."""


def option_field(default: Any, help: str, kind: Any, otherwise: str | None = None, **more: Any) -> Any:
    """Describes a field of a dataclass that is also an option of a command, for ``field_options``.

    Args:
        kind: Type of the option, which checks the value.
        otherwise: What happens without the option, in words.
        more: Further arguments of ``click.option``.
    """
    shown = default not in (None, "", ()) and default is not False
    help += f"  [default: {otherwise}]" if otherwise else ""
    return field(default=default, metadata={"help": help, "type": kind, "show_default": shown} | more)


def field_options(*classes: Any) -> Callable[[_F], _F]:
    """Gives a command an option for each ``option_field`` of some dataclasses."""

    def add(command: _F) -> _F:
        for f in reversed([f for one in classes for f in fields(one) if f.metadata]):
            name = f.name.replace("_", "-")
            flags = f"--{name}/--no-{name}" if f.default is True else f"--{name}"
            command = click.option(flags, default=f.default, **f.metadata)(command)
        return command

    return add


@contextlib.contextmanager
def option_errors() -> Iterator[None]:
    """Turns an InvalidRequest about an option of the current command into a click.UsageError that names its flag.

    It is also a decorator of a command's function.
    """
    try:
        yield
    except InvalidRequest as error:
        raise click.UsageError(_named(error)) from error


def _named(error: InvalidRequest) -> str:
    """Returns the message of ``error`` with the flag, or the argument, in place of the field, if there is one."""
    context = click.get_current_context(silent=True)
    params = [] if context is None else context.command.params
    flags = {flag: flag for param in params if isinstance(param, click.Option) for flag in param.opts}
    names = {param.name: flags.get(param.opts[0], param.human_readable_name) for param in params}
    path = error.field.split(".")
    for index, part in enumerate(path):
        if name := flags.get(f"--{part.replace('_', '-')}") or names.get(part):
            message = error.reason
            return ": ".join([name, *filter(None, [".".join(path[index + 1 :])]), message])
    return str(error)


@dataclass(frozen=True, slots=True)
class ClientConnection:
    """Where a stack is, and what a client shows it."""

    address: str
    tls: ClientTls | None
    api_key: str | None

    def client(self) -> Client:
        """Returns a client. Raises click.UsageError for a bad address, key or TLS file."""
        from overfill.client import Client

        try:
            return Client(self.address, tls=self.tls, api_key=self.api_key or None)
        except ValueError as error:  # a TlsError is one
            raise click.UsageError(str(error)) from error


def connection_options(command: Callable[..., Any], address: Callable[[Any], Any] | None = None) -> Callable[..., Any]:
    """Gives ``command`` the argument ``connection``, made of options of its address and credentials.

    Args:
        address: adds another option ``address``; without one, ``connection`` is None.
    """

    @functools.wraps(command)
    def connected(address: str | None, api_key: str | None, **others: Any) -> Any:
        tls = client_tls(*(others.pop(f"tls_{part}") for part in ("ca", "cert", "key", "name")))
        connection = None if address is None else ClientConnection(address, tls, api_key)
        return command(connection=connection, **others)

    connected = click.option(
        "--api-key",
        envvar="OVERFILL_API_KEY",
        show_envvar=True,
        help="API key, if the stack requires one. Prefer the variable: other users of this machine can see flags.",
    )(tls_options(connected))
    address = address or address_option("Address of the stack's router, or of several, separated by commas.")
    return cast("Callable[..., Any]", address(connected))


def address_option(help: str) -> Callable[[_F], _F]:
    """Adds ``address``."""
    return click.option(
        "--address",
        default="127.0.0.1:7600",
        envvar="OVERFILL_ADDRESS",
        show_default=True,
        show_envvar=True,
        help=help,
    )


def tls_options(command: _F) -> _F:
    """Adds ``tls_ca``, ``tls_cert``, ``tls_key`` and ``tls_name``."""
    for name, kind, help in (
        (
            "name",
            str,
            "DNS name in the server's certificate; overfill for its role's.  [default: the address's host]",
        ),
        ("key", FILE, "PEM file with the private key of --tls-cert."),
        ("cert", FILE, "PEM file with the client's certificate, if the stack requires one."),
        ("ca", FILE, "PEM file with the CA certificates to trust; enables TLS."),
    ):
        variable = f"OVERFILL_TLS_{name.upper()}"
        command = click.option(f"--tls-{name}", type=kind, envvar=variable, show_envvar=True, help=help)(command)
    return command


def request_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives ``command`` the arguments ``params``, SamplingParams, and ``options``, the other options of a request.

    ``max_tokens`` may stay None; ``stream_answer`` applies the default.
    """

    @functools.wraps(command)
    def requesting(model: str, tier: str, fallback: str, allow_brownout: bool, **others: Any) -> Any:
        params = sampling(**{name: others.pop(name) for name in _SAMPLING})
        named = {"model": model, "tier": tier, "fallback": fallback, "allow_brownout": allow_brownout or None}
        return command(params=params, options=named, **others)

    for option in reversed(_REQUEST_OPTIONS):
        requesting = option(requesting)
    return requesting


_SAMPLING = ("max_tokens", "greedy", "temperature", "top_k", "top_p", "min_p", "seed")

_REQUEST_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--max-tokens", type=int, help=f"Maximum tokens of an answer.  [default: {DEFAULT_MAX_TOKENS}]"),
    click.option("--greedy", is_flag=True, help="Always choose the most likely token; same as --temperature 0."),
    click.option(
        "--temperature",
        type=AnyNumber(),
        help=f"Sampling temperature; 0 means greedy.  [default: {DEFAULT_TEMPERATURE:g}]",
    ),
    click.option("--top-k", type=int, help="Keep only the K most likely tokens.  [default: all]"),
    click.option(
        "--top-p",
        type=AnyNumber(),
        help="Keep the smallest set of tokens with at least this total probability.  [default: off]",
    ),
    click.option(
        "--min-p",
        type=AnyNumber(),
        help="Drop tokens less likely than this fraction of the most likely one.  [default: off]",
    ),
    click.option("--seed", type=int, help="Random seed; it repeats an answer, best effort.  [default: random]"),
    click.option(
        "--model", default="", help="Name of the model, or NAME:TIER or NAME:ADAPTER.  [default: the stack's model]"
    ),
    click.option(
        "--tier", default="", help="Tier or adapter that writes the answer.  [default: the stack's default tier]"
    ),
    click.option(
        "--fallback",
        default="",
        metavar="TIER",
        help="Tier that continues the answer when its own has no worker left; none waits.  [default: the tier's]",
    ),
    click.option(
        "--allow-brownout",
        is_flag=True,
        help="Let the next tier of the router's --brownout answer when the requested tier is overloaded.",
    ),
)


def set_threads(threads: int | None) -> None:
    """Sets torch's number of threads in this process; None keeps the default."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def adapters_option(command: _F) -> _F:
    """Adds ``adapters``, a folder; None means ``overfill.pair.adapters.default_folder``."""
    return click.option(
        "--adapters",
        metavar="DIR",
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder of adapters.  [default: that of the pair's full model, in the cache]",
    )(command)


def dtype_option(command: _F) -> _F:
    """Adds ``dtype``; None means the device's default."""
    return click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="Data type of weights, activations and KV.  [default: bfloat16; without instructions for it "
        "float16 on a GPU, and float32 on a CPU]",
    )(command)


def client_tls(
    tls_ca: Path | None, tls_cert: Path | None, tls_key: Path | None, tls_name: str | None
) -> ClientTls | None:
    """Returns the TLS files of ``tls_options``; None without TLS. Raises click.UsageError for a bad combination."""
    from overfill.rpc.tls import ClientTls, TlsError

    try:
        return ClientTls(tls_ca, tls_cert, tls_key, tls_name or "") if tls_ca or tls_cert or tls_key else None
    except TlsError as error:
        raise click.UsageError(str(error)) from error


def sampling(
    *, greedy: bool, temperature: float | None, max_tokens: int | None, seed: int | None, **given: float | None
) -> SamplingParams:
    """Returns sampling parameters from flags. Raises click.UsageError if one is out of range or conflicts."""
    from overfill.request.params import SamplingParams

    if greedy and temperature:
        raise click.UsageError("--greedy conflicts with --temperature: give only one of them")
    if temperature is None:
        temperature = 0.0 if greedy else DEFAULT_TEMPERATURE
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    with option_errors():
        return SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed, **chosen)
