"""Options that several client commands share: where the stack is, and how to sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from overfill.cli.answering import DEFAULT_MAX_TOKENS, DEFAULT_TEMPERATURE
from overfill.errors import InvalidRequest

if TYPE_CHECKING:
    from overfill.client import Client
    from overfill.request.params import SamplingParams
    from overfill.rpc.tls import ClientTls

_F = TypeVar("_F", bound=Callable[..., Any])
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


class RenamedFlags(click.Command):
    """A command whose flags' earlier names work with a warning: those of renamed settings, and ``renamed``.

    Args:
        renamed: earlier name -> name, both without dashes, of flags that are no service's settings.
    """

    def __init__(self, *args: Any, renamed: Mapping[str, str] | None = None, **extra: Any) -> None:
        super().__init__(*args, **extra)
        self._renamed = dict(renamed or {})

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        from overfill.settings.config_file import field_name, flag_name
        from overfill.settings.renamed import old_names, rename_flags

        flags = [flag.removeprefix("--") for option in self.params for flag in option.opts]
        settings = {flag_name(old): flag_name(new) for old, new in old_names([field_name(flag) for flag in flags])}
        return super().parse_args(ctx, rename_flags(args, settings | self._renamed))


class _Finite(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.3 on
    """Mixin that refuses NaN and infinity; list it before a click number type."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


class Number(_Finite, click.FloatRange):
    """A finite number in a range."""


class AnyNumber(_Finite, click.types.FloatParamType):
    """A finite number."""


def connection_options(command: _F) -> _F:
    """Adds ``address``, ``api_key`` and what ``tls_options`` adds, which ``connect`` takes."""
    command = tls_options(command)
    for option in (
        click.option(
            "--api-key",
            envvar="OVERFILL_API_KEY",
            show_envvar=True,
            help="Key to show, where the stack wants one; in the variable, other users of this machine do not see it.",
        ),
        click.option(
            "--address",
            default="127.0.0.1:7600",
            envvar="OVERFILL_ADDRESS",
            show_default=True,
            show_envvar=True,
            help="The stack's router, or several separated by commas.",
        ),
    ):
        command = option(command)
    return command


def tls_options(command: _F) -> _F:
    """Adds ``tls_ca``, ``tls_cert``, ``tls_key`` and ``tls_name``."""
    for name, kind, help in (
        ("name", str, "Name that the stack's certificate bears.  [default: the address's host]"),
        ("key", _FILE, "PEM private key of --tls-cert."),
        ("cert", _FILE, "PEM certificate to show, when the stack asks for one."),
        ("ca", _FILE, "PEM certificates to trust; turns TLS on."),
    ):
        variable = f"OVERFILL_TLS_{name.upper()}"
        command = click.option(f"--tls-{name}", type=kind, envvar=variable, show_envvar=True, help=help)(command)
    return command


def sampling_options(command: _F) -> _F:
    """Adds what ``sampling`` takes."""
    for option in (
        click.option("--seed", type=int, help="Draw the same tokens again.  [default: another every time]"),
        click.option("--min-p", type=AnyNumber(), help="Drop tokens below this share of the most likely one."),
        click.option("--top-p", type=AnyNumber(), help="Keep the smallest set of tokens with this much mass."),
        click.option("--top-k", type=int, help="Keep the k most likely tokens."),
        click.option(
            "--temperature",
            type=AnyNumber(),
            help=f"Divide the logits by this; 0 is greedy.  [default: {DEFAULT_TEMPERATURE:g}]",
        ),
        click.option("--greedy", is_flag=True, help="Always take the most likely token."),
        click.option("--max-tokens", type=int, help=f"Longest answer, in tokens.  [default: {DEFAULT_MAX_TOKENS}]"),
    ):
        command = option(command)
    return command


def set_threads(threads: int | None) -> None:
    """Of torch in this process; None leaves it alone."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def dtype_option(command: _F) -> _F:
    """Adds ``dtype``; None is what the device computes in."""
    return click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="Of weights, activations and KV.  [default: what the device computes in]",
    )(command)


def connect(
    address: str,
    tls_ca: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    api_key: str | None,
    tls_name: str | None = None,
) -> Client:
    """A client for the stack at ``address``. Raises click.UsageError when the TLS files or the key do not fit."""
    from overfill.client import Client

    try:
        return Client(address, tls=client_tls(tls_ca, tls_cert, tls_key, tls_name), api_key=api_key or None)
    except ValueError as error:  # a TlsError is one
        raise click.UsageError(str(error)) from error


def client_tls(
    tls_ca: Path | None, tls_cert: Path | None, tls_key: Path | None, tls_name: str | None
) -> ClientTls | None:
    """What ``tls_options`` say; None: no TLS. Raises click.UsageError when they do not fit each other."""
    from overfill.rpc.tls import ClientTls, TlsError

    try:
        return ClientTls(tls_ca, tls_cert, tls_key, tls_name or "") if tls_ca or tls_cert or tls_key else None
    except TlsError as error:
        raise click.UsageError(str(error)) from error


def sampling(
    max_tokens: int | None,
    greedy: bool,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    seed: int | None,
) -> SamplingParams:
    """Sampling parameters from flags; ``max_tokens`` stays None, which ``stream_answer`` makes a number.

    Raises:
        click.UsageError: a flag is out of range or contradicts another.
    """
    from overfill.request.params import SamplingParams

    if greedy and temperature:
        raise click.UsageError("--greedy contradicts --temperature; leave one out")
    if temperature is None:
        temperature = 0.0 if greedy else DEFAULT_TEMPERATURE
    given = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "temperature": temperature}
    try:
        return SamplingParams(
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
            seed=seed,
            max_tokens=max_tokens,
        )
    except InvalidRequest as error:
        name = error.field.removeprefix("sampling.")
        message = str(error).removeprefix(f"{error.field}: ")
        raise click.UsageError(f"--{name.replace('_', '-')}: {message}") from error
