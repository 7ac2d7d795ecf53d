"""The options of ``overfill up``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import click

from overfill.cli.options import ENGINE, FILE, Number, TierParam, dtype_option, engine_options
from overfill.cli.up_config import config_option
from overfill.cli.up_plan import GRPC_PORT, HTTP_PORT
from overfill.routing.policies import DECODE_DEFAULT, DECODE_POLICIES, POLICIES, PREFILL_DEFAULT
from overfill.settings.allowed import fault, placeholder
from overfill.settings.config import DecodeConfig, PrefillConfig, RouterConfig, ServiceConfig

_F = TypeVar("_F", bound=Callable[..., Any])


class _PortOrOff(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.3 on
    """Parses a port as an int, or ``off``."""

    name = "port|off"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | Literal["off"]:
        if value == "off":
            return "off"
        try:
            return int(click.IntRange(0, 65535).convert(value, param, ctx))
        except click.BadParameter:
            self.fail(f"{value!r} is neither a port, 0 to 65535, nor `off`", param, ctx)


class SettingParam(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.3 on
    """Checks the text of a service's setting as the service does.

    Attributes:
        field: declaration of the setting.
    """

    def __init__(self, kind: type[ServiceConfig], field: str) -> None:
        self.field = kind.model_fields[field]
        self.name = placeholder(field, self.field)

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return self.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if wrong := value and fault(self.field, str(value)):
            self.fail(wrong, param, ctx)
        return str(value)


_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    config_option,
    click.option(
        "--colocated",
        is_flag=False,
        flag_value=1,
        type=click.IntRange(0),
        help="Number of workers with both stages; without a number, 1.  [default: 1 on a machine with at most one GPU, "
        "unless an option or setting is for workers with one stage]",
    ),
    click.option(
        "--prefill",
        "prefill",
        type=click.IntRange(0),
        help="Number of workers that only prefill.  [default: 0 with --colocated, or else 1]",
    ),
    click.option(
        "--decode",
        type=click.IntRange(0),
        help="Number of workers that only decode.  [default: 0 with --colocated, or else 1]",
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
        default="default",
        show_default=True,
        help="Pair to serve: default, fast, identity, or a pair's folder.",
    ),
    click.option(
        "--decoder",
        "tiers",
        multiple=True,
        type=TierParam(least=0),
        help="A tier: its name, its pair, its number of decode workers, and settings of its own, such as "
        "fast=fast:2,quantize=int8. Repeat it for each tier; it replaces --pair and --decode. All pairs must have the "
        "same full model. Workers of --colocated are in the default tier, whose number may then be 0. Settings: "
        "fallback, ttft-objective, itl-objective, max (the maximum number of decode workers, on Ray), and those of "
        "decode workers.",
    ),
    click.option(
        "--default-tier",
        type=SettingParam(RouterConfig, "default_tier"),
        help="Tier of requests that name none.  [default: the tier called default, or else the first]",
    ),
    click.option(
        "--brownout",
        type=SettingParam(RouterConfig, "brownout"),
        help="Tiers from the best to the cheapest, such as 'full > default > fast'. When one cannot meet its "
        "objectives, the next writes the answers of requests that allow it.  [default: none]",
    ),
    dtype_option,
    click.option(
        "--grpc",
        "port",
        type=click.IntRange(0, 65535),
        default=GRPC_PORT,
        show_default=True,
        help="gRPC port of the routers; on Ray, of the first router, and further ones use the next ports. 0 picks free "
        "ports.",
    ),
    click.option(
        "--http",
        "http",
        type=_PortOrOff(),
        default=str(HTTP_PORT),
        show_default=True,
        help="Port of the routers' OpenAI endpoint; on Ray, of the first router's, and further ones use the next "
        "ports. 0 picks free ports; off disables the endpoint.",
    ),
    click.option(
        "--served-model-name",
        type=SettingParam(RouterConfig, "served_model_name"),
        help="Model names that clients may request, separated by commas; answers carry the first.  "
        "[default: the pair's name]",
    ),
    click.option(
        "--allowed-origins",
        type=SettingParam(RouterConfig, "allowed_origins"),
        help="Origins of web pages that may use the OpenAI endpoint, separated by commas, such as "
        "https://chat.example.org; or * for all.  [default: only the router's own page]",
    ),
    click.option(
        "--api-keys",
        type=FILE,
        help="File of API keys, of which clients must send one; see `overfill keys`.  [default: no keys]",
    ),
    click.option(
        "--stack-secret",
        type=FILE,
        help="File with a secret that the processes send each other.  [default: a new secret, if there are API keys "
        "but no certificates]",
    ),
    click.option(
        "--host",
        type=SettingParam(RouterConfig, "host"),
        help="Address to listen on; any other than loopback requires --tls and --api-keys.  [default: 127.0.0.1]",
    ),
    click.option(
        "--engine",
        type=ENGINE,
        help="Engine of the workers; auto is vllm on the first CUDA device, if it is installed and can run the model, "
        "and overfill otherwise; mock computes nothing and plays scripts.  [default: auto]",
    ),
    engine_options(
        None,
        ", such as '{\"enforce_eager\": true}'. A stage for which --prefill-engine or --decode-engine names overfill "
        "does not get them.",
    ),
    click.option(
        "--device",
        type=SettingParam(PrefillConfig, "device"),
        help="Device to compute on: auto, cpu, cuda or cuda:N.  [default: auto]",
    ),
    click.option(
        "--threads",
        type=click.IntRange(1),
        help="CPU threads per worker.  [default: the cores, divided among the workers of a stage]",
    ),
    click.option(
        "--kv-memory",
        type=SettingParam(PrefillConfig, "kv_memory"),
        help="Size of each KV cache, such as 512MiB; a worker with both stages has two.  [default: as much as fits in "
        "memory, but at most 1GiB on a CPU]",
    ),
    click.option(
        "--max-model-len",
        type=SettingParam(PrefillConfig, "max_model_len"),
        help="Maximum tokens of a prompt with its answer.  [default: the model's context length]",
    ),
    click.option(
        "--max-num-seqs",
        type=SettingParam(PrefillConfig, "max_num_seqs"),
        help="Maximum number of sequences in one step of a worker.  [default: 64]",
    ),
    click.option(
        "--max-num-batched-tokens",
        type=SettingParam(PrefillConfig, "max_num_batched_tokens"),
        help="Maximum prompt tokens that a prefill worker computes in one step.  [default: 2048]",
    ),
    click.option(
        "--data-streams",
        type=SettingParam(DecodeConfig, "data_streams"),
        help="Number of parallel connections that transfer a request's KV.  [default: 2]",
    ),
    click.option(
        "--kv-codec",
        type=click.Choice(["raw", "int8", "fp8"]),
        help="Encoding of transferred KV.  [default: raw, or int8 with --kv-cache-dtype int8]",
    ),
    click.option(
        "--kv-cache-dtype",
        type=click.Choice(["auto", "int8"]),
        help="Data type of the decode workers' KV cache; auto means --dtype.  [default: auto]",
    ),
    click.option(
        "--shm",
        type=click.Choice(["on", "off"]),
        help="Exchange KV between workers of one host through shared memory.  [default: on]",
    ),
    click.option(
        "--prefix-cache",
        type=click.Choice(["on", "off"]),
        help="Keep prompts' KV for later prompts with the same beginning.  [default: on]",
    ),
    click.option(
        "--prefill-policy",
        type=click.Choice(list(POLICIES)),
        help=f"Policy that chooses prefill workers.  [default: {PREFILL_DEFAULT}]",
    ),
    click.option(
        "--decode-policy",
        type=click.Choice(DECODE_POLICIES),
        help=f"Policy that chooses decode workers.  [default: {DECODE_DEFAULT}]",
    ),
    click.option(
        "--max-queue",
        type=SettingParam(RouterConfig, "max_queue"),
        help="Maximum number of queued requests per router and priority; further ones are refused.  [default: 1024]",
    ),
    click.option(
        "--max-wait",
        type=SettingParam(RouterConfig, "max_wait"),
        help="Maximum expected seconds in the queue; requests that would wait longer are refused at once.  "
        "[default: each request's deadline]",
    ),
    click.option(
        "--grace-period",
        type=SettingParam(RouterConfig, "grace_period"),
        help="Seconds that running requests have to finish at shutdown.  [default: 30]",
    ),
    click.option(
        "--tls",
        "tls",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="Folder with a certificate per role, as `overfill certs` makes it; replaces the next four options.",
    ),
    click.option("--tls-cert", type=FILE, help="PEM file with the certificate of all processes."),
    click.option("--tls-key", type=FILE, help="PEM file with the private key of --tls-cert."),
    click.option(
        "--tls-ca",
        type=FILE,
        help="PEM file with the CA certificates that must have signed other processes' certificates.",
    ),
    click.option("--tls-name", help="DNS name in the certificates.  [default: the host of each address]"),
    click.option(
        "--metrics-port",
        type=SettingParam(RouterConfig, "metrics_port"),
        help="Port of /metrics of the first router; the other processes use the next ports. 0 picks free ports; off "
        "disables /metrics.  [default: 0]",
    ),
    click.option(
        "--ray/--no-ray", "on_ray", default=True, help="Run on Ray Serve, or as plain processes.  [default: ray]"
    ),
    click.option("--address", help="Ray cluster to join: HOST:PORT, or auto.  [default: start one on this machine]"),
    click.option("--name", default="overfill", show_default=True, help="Name of the application on Ray."),
    click.option(
        "--worker-cpus",
        type=Number(0),
        help="CPUs that Ray reserves per worker.  [default: an equal share of this machine; with --address, --threads]",
    ),
    click.option(
        "--worker-gpus",
        type=Number(0),
        help="GPUs that Ray reserves per worker; with 0 a worker computes on the CPU. A fraction is also its share of "
        "the GPU's memory.  [default: an equal share of this machine; with --address, 0]",
    ),
    click.option(
        "--max-prefill",
        type=click.IntRange(1),
        help="Maximum number of prefill workers, to autoscale from --prefill.  [default: fixed number]",
    ),
    click.option(
        "--max-decode",
        type=click.IntRange(1),
        help="Maximum number of decode workers, to autoscale from --decode.  [default: fixed number]",
    ),
    click.option(
        "--ttft-objective",
        type=Number(0, min_open=True),
        help="Target for the time to first token, in seconds: for chunks of prompt in workers with both stages, "
        "scaling metrics, autoscaling and brownout.  [default: 2]",
    ),
    click.option(
        "--itl-objective",
        type=Number(0, min_open=True),
        help="Target for the mean time between tokens, in seconds: for chunks of prompt in workers with both stages, "
        "scaling metrics, autoscaling and brownout.  [default: 0.1]",
    ),
    click.option(
        "--log-level",
        type=click.Choice(["debug", "info", "warning", "error"]),
        help="Lowest level of messages that are logged.  [default: info]",
    ),
    click.option(
        "--log-dir",
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder for one log file per process.  [default: log to stderr]",
    ),
)
"""In the order of ``overfill up --help``."""


def up_options(command: _F) -> _F:
    """Adds all options to ``command``."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
