"""The options of ``overfill up``: its own, and one for each setting of a service, generated from the field."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from overfill.cli.options import Number, TierParam
from overfill.settings.allowed import default_text, fault, placeholder
from overfill.settings.config import (
    ColocatedConfig,
    DecodeConfig,
    PrefillConfig,
    RouterConfig,
    ServiceConfig,
    read_checked,
)
from overfill.settings.config_file import COMMON, BadConfigFile, field_name, flag_name
from overfill.stack.describe import GRPC_PORT, HTTP_PORT
from overfill.stack.spec import SET_BY_STACK

_F = TypeVar("_F", bound=Callable[..., Any])

_MANAGED = SET_BY_STACK - {"revision"} | {"config", "advertise", "shared_cores", "gpu_share"}
"""Settings that ``up`` makes itself, or for which it has an option of its own."""


class SettingParam(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.3 on
    """Checks the text of a service's setting as the service does.

    Attributes:
        field: declaration of the setting.
    """

    def __init__(self, name: str, field: FieldInfo) -> None:
        self.field = field
        self.name = placeholder(name, field)

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return self.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if Path in _types(self.field):
            return click.Path(exists=True, dir_okay=False, path_type=Path).convert(value, param, ctx)
        if wrong := value and fault(self.field, str(value)):
            self.fail(wrong, param, ctx)
        return str(value)


def _types(field: FieldInfo) -> tuple[Any, ...]:
    kind: Any = field.annotation
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def setting_option(
    name: str,
    field: FieldInfo,
    flag: str = "",
    default: Any = None,
    note: str = "",
    shown: str | None = None,
    envvar: str | None = None,
) -> Callable[[Any], Any]:
    """Returns the option of a service's setting. The service applies its default.

    Args:
        flag: the option, if it is not the setting's name.
        default: default of ``up``, if it is not the service's.
        note: end of the help.
        shown: default of ``up`` in words, if ``up`` computes it.
        envvar: variable that ``up`` reads itself, because it has a default of its own.
    """
    about = (field.description or "").removesuffix(".")
    about = f"{about[:1].upper()}{about[1:]}{note}."
    if shown is None and default is not None:
        shown = str(default)
    if shown is None and field.default not in (None, "", ()):
        shown = default_text(field)
    if shown is not None:
        about += f"  [default: {shown}]"
    flag = flag or f"--{flag_name(name)}"
    if field.annotation is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=about)
    literals = [kind for kind in _types(field) if get_origin(kind) is Literal]
    if literals and len(_types(field)) - (type(None) in _types(field)) == 1:
        return click.option(flag, name, type=click.Choice([str(one) for one in get_args(literals[0])]), help=about)
    return click.option(flag, name, type=SettingParam(name, field), default=default, envvar=envvar, help=about)


def settings_fields() -> dict[str, FieldInfo]:
    """Returns the settings of services for which ``up`` has an option, by field."""
    kinds: tuple[type[ServiceConfig], ...] = (RouterConfig, PrefillConfig, DecodeConfig, ColocatedConfig)
    fields = {name: field for kind in reversed(kinds) for name, field in kind.model_fields.items()}
    order = dict.fromkeys(name for kind in kinds for name in kind.model_fields)
    return {name: fields[name] for name in order if name not in _MANAGED}


_SHARED = {name: (COMMON, name) for name in ("pair", "revision")} | {
    name: ("router", name) for name in ("port", "http", "tiers")
}
"""Options of ``up`` with defaults of their own that are also settings: parameter -> section and key in the file."""


def _read_shared(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """Makes what the file says of ``_SHARED`` the defaults. Services read all else in the file themselves."""
    if path is None:
        return None
    try:
        sections = read_checked(path).sections
    except BadConfigFile as error:
        raise click.UsageError(str(error)) from error
    ctx.default_map = {
        name: sections[section][key] for name, (section, key) in _SHARED.items() if key in sections.get(section, {})
    }
    if isinstance(tiers := ctx.default_map.get("tiers"), str):
        ctx.default_map["tiers"] = [tier for tier in tiers.split(";") if tier.strip()]
    return path


def _of_stages() -> Iterator[Callable[[Any], Any]]:
    """Yields the options that set for one stage what another option sets for both."""
    stages: tuple[tuple[str, type[ServiceConfig]], ...] = (("prefill", PrefillConfig), ("decode", DecodeConfig))
    for stage, kind in stages:
        field = kind.model_fields["engine"]
        yield click.option(
            f"--{stage}-engine",
            type=click.Choice([str(one) for one in get_args(field.annotation)]),
            help=f"Engine of the {stage} workers.  [default: --engine]",
        )
    for stage, kind in stages:
        name = "tensor_parallel_size"
        yield click.option(
            f"--{stage}-tensor-parallel-size",
            type=SettingParam(name, kind.model_fields[name]),
            help=f"Number of ranks of each {stage} worker.  [default: --tensor-parallel-size]",
        )


_MODULES = "--lora-modules"


def _read_modules(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> dict[str, Path]:
    modules: dict[str, Path] = {}
    for value in values:
        name, _, path = value.partition("=")
        if not name or not path:
            raise click.BadParameter(f"{value!r}: expected NAME=PATH", ctx, param)
        if name in modules:
            raise click.BadParameter(f"{name!r} is given twice", ctx, param)
        modules[name] = Path(path)
    return modules


class UpCommand(click.Command):
    """``overfill up``. After ``--lora-modules`` it takes several values, as vLLM does."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        repeated: list[str] = []
        among = False  # the values of the flag
        for argument in args:
            is_value = among and "=" in argument and not argument.startswith("-")
            if is_value and repeated[-1] != _MODULES:
                repeated.append(_MODULES)
            repeated.append(argument)
            among = argument == _MODULES or is_value
        return super().parse_args(ctx, repeated)


_ROUTER = RouterConfig.model_fields

_MADE = {
    "threads": "the cores, divided among the workers of a stage",
    "adapters": "that of `overfill pair adapter`, if it has an adapter of the stack's decoders",
}
"""Settings whose default ``up`` computes, and how."""

_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.argument("target", required=False, metavar="[PAIR|STACK.yaml]"),
    click.option(
        "--config",
        type=click.Path(dir_okay=False, path_type=Path),
        is_eager=True,  # before the options whose defaults it sets
        callback=_read_shared,
        help="YAML or TOML file of the services' settings; flags and variables take precedence.",
    ),
    click.option("--dry-run", is_flag=True, help="Print the document of the stack, as YAML, and start nothing."),
    click.option(
        "--colocated",
        is_flag=False,
        flag_value=1,
        type=click.IntRange(0),
        help="Number of colocated workers, which have both stages; without a number, 1.  [default: 1 on a machine with "
        "at most one GPU, unless an option or setting is for workers with one stage]",
    ),
    *(
        click.option(
            f"--{stage}",
            type=click.IntRange(0),
            help=f"Number of workers that only {stage}.  [default: 0 with --colocated, or else 1]",
        )
        for stage in ("prefill", "decode")
    ),
    click.option(
        "--router",
        "routers",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="Number of router processes. With --no-ray they share one address; on Ray each has its own.",
    ),
    click.option(
        "--pair",
        metavar="PAIR",
        help="Pair to serve: default, fast, identity, or a pair's folder; also the argument of the command.  [default: "
        "default, or mock with --engine mock]",
    ),
    click.option(
        "--tier",
        "tiers",
        multiple=True,
        envvar=RouterConfig.variable("tiers"),
        type=TierParam(least=0),
        help="A tier: its name, its pair, its number of decode workers, and settings of its own, such as "
        "fast=fast:2,quantize=int8. Repeat it for each tier; it replaces --pair and --decode. All pairs must have the "
        "same full model. Colocated workers are in the default tier, whose number may then be 0. Settings: fallback, "
        "ttft-objective, itl-objective, max (the maximum number of decode workers, on Ray), and those of decode "
        "workers.",
    ),
    setting_option(
        "port",
        _ROUTER["port"],
        "--grpc",
        GRPC_PORT,
        ", for gRPC; on Ray, of the first router, and further ones use the next ports",
        envvar=RouterConfig.variable("port"),
    ),
    setting_option(
        "http",
        _ROUTER["http"],
        "--http",
        HTTP_PORT,
        "; on Ray, of the first router's, and further ones use the next ports",
        envvar=RouterConfig.variable("http"),
    ),
    *(setting_option(name, field, shown=_MADE.get(name)) for name, field in settings_fields().items()),
    click.option(
        _MODULES,
        "modules",
        multiple=True,
        metavar="NAME=PATH...",
        callback=_read_modules,
        help="Adapters in PEFT's format that are added to --adapters, as `overfill pair adapter add` does; without "
        "--adapters, to a folder of this stack alone.",
    ),
    *_of_stages(),
    click.option(
        "--tls",
        "tls",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="Folder with a certificate per role, as `overfill certs` makes it; replaces --tls-cert, --tls-key and "
        "--tls-ca.",
    ),
    click.option(
        "--ray/--no-ray", "on_ray", default=True, help="Run on Ray Serve, or as plain processes.  [default: ray]"
    ),
    click.option("--ray-address", help="Ray cluster to join: HOST:PORT, or auto.  [default: start one here]"),
    click.option("--name", default="overfill", show_default=True, help="Name of the application on Ray."),
    click.option(
        "--worker-cpus",
        type=Number(0),
        help="CPUs that Ray reserves per worker.  [default: an equal share of this machine; with --ray-address, "
        "--threads]",
    ),
    click.option(
        "--worker-gpus",
        type=Number(0),
        help="GPUs that Ray reserves per worker; with 0 a worker computes on the CPU. A fraction is also its share of "
        "the GPU's memory. A worker with --tensor-parallel-size N reserves 0 or N.  [default: an equal share of this "
        "machine; with --ray-address, 0]",
    ),
    *(
        click.option(
            f"--max-{stage}",
            type=click.IntRange(1),
            help=f"Maximum number of {stage} workers, to autoscale from --{stage}.  [default: fixed number]",
        )
        for stage in ("prefill", "decode")
    ),
    click.option(
        "--log-dir",
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder for one log file per process.  [default: log to stderr]",
    ),
)
"""In the order of ``overfill up --help``."""


_WORDS_OF_VLLM = {
    "--model": "a stack serves a pair, which is the argument: overfill up PAIR; `overfill pair import --full MODEL "
    "--decoder MODEL --out PAIR` makes one of a model",
    "--port": "give --http PORT for the HTTP endpoint, or --grpc PORT for gRPC",
    "-tp": "give --tensor-parallel-size N",
    "--gpu-memory-utilization": "workers of one GPU share its memory; give --kv-memory SIZE for the KV cache",
    "--quantization": "give --quantize int8 for the decoder; a checkpoint's own format needs no option",
    "--enable-lora": "give --lora-modules NAME=PATH, or --adapters FOLDER",
    "--max-loras": "give --max-adapters N",
    "--max-lora-rank": "give --max-adapter-rank N",
    "--enforce-eager": "give --engine-args '{\"enforce_eager\": true}' to workers with the engine vllm",
}
"""Options that users of vLLM know -> the words of ``up``."""


def _refuse(ctx: click.Context, param: click.Parameter, value: str | bool | None) -> None:
    if value:
        raise click.UsageError(f"{param.opts[0]} is an option of vLLM: {_WORDS_OF_VLLM[param.opts[0]]}")


def up_options(command: _F) -> _F:
    """Adds all options to ``command``."""
    for flag in _WORDS_OF_VLLM:
        alone = flag in ("--enable-lora", "--enforce-eager")  # without a value
        names = (flag, f"vllm_{field_name(flag[2:])}")
        command = click.option(*names, is_flag=alone, hidden=True, expose_value=False, callback=_refuse)(command)
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
