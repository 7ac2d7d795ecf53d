"""Configuration of the three services: one frozen class each, from flags, environment and a file. No torch.

A flag ``--kv-memory 512MiB`` of the prefill worker is also ``OVERFILL_PREFILL_KV_MEMORY``, and ``kv-memory`` under
``prefill`` or ``common`` in the file that ``--config`` names. The first of these wins that says something: flag,
variable, the service's section of the file, ``common``, default. Declaring a field here is all that it takes.

Everything is checked once, here, with a message that names the place; services read values, never the environment.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from overfill.api.keys import KeyRing
from overfill.kv.spec import DTypeName, KvCacheDtype
from overfill.request.names import CodecName
from overfill.routing.policies import DECODE_DEFAULT, PREFILL_DEFAULT, DecodePolicyName, PolicyName
from overfill.rpc.access import ROUTER_RPCS, AccessPolicy
from overfill.rpc.addresses import is_loopback
from overfill.rpc.constants import MAX_DATA_STREAMS, MAX_TRANSFER_TIME, SPARE_RPCS
from overfill.settings.common import CommonSettings
from overfill.settings.config_file import COMMON, BadConfigFile, ConfigFile, flag_name, nearest, read_config_file
from overfill.settings.renamed import old_names, rename_fields, rename_keys, rename_service_flags, warn
from overfill.settings.values import Addresses, Bytes, Names, Origins, Port, is_wildcard

UP_KEYS = (
    "prefill", "decode", "router", "log-dir", "mock", "ray", "address", "name", "worker-cpus", "worker-gpus",
    "max-prefill", "max-decode", "ttft-objective", "itl-objective",
)  # fmt: skip
"""Settings of ``overfill up`` in a file; everything else is a setting of the services that it starts."""

_from_file: ContextVar[Mapping[str, Any] | None] = ContextVar("_from_file", default=None)
"""Values for the configuration that ``parse`` is about to make; where nothing else says anything."""


def _flags(settings: Mapping[str, object]) -> list[str]:
    return [f"--{flag_name(name)}={value}" for name, value in settings.items()]


class ServiceConfig(CommonSettings):
    """What every service has. A subclass adds its program name and the prefix of its variables."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # Flags come before all of these.
        earlier = InitSettingsSource(settings_cls, cls._earlier_variables())
        return init_settings, env_settings, earlier, InitSettingsSource(settings_cls, dict(_from_file.get() or {}))

    @classmethod
    def parse(cls, argv: Sequence[str] | None = None) -> Self:
        """Reads flags (``sys.argv[1:]`` when None) over environment variables over the file over defaults.

        Prints what to change to stderr and exits 2 when a flag, variable or key is unknown or has a bad value.
        """
        args = rename_service_flags(sys.argv[1:] if argv is None else argv, cls.model_fields)
        unknown = sorted(name for name in os.environ if cls._is_ours(name) and name not in cls.variables())
        if unknown:
            cls._exit("; ".join(f"{name}: no such setting; {nearest(name, cls.variables())}" for name in unknown))
        try:
            file = cls.find_file(args)
            values = cls.file_values(file)
        except BadConfigFile as error:
            cls._exit(str(error))
        token = _from_file.set({name: value for name, (_, value) in values.items()})
        try:
            return cls(_cli_parse_args=args, _cli_prog_name=cls.program)  # type: ignore[call-arg]
        except ValidationError as error:
            cls._exit("; ".join(cls.explain(error, cls.origins(args))))
        finally:
            _from_file.reset(token)

    @classmethod
    def variables(cls) -> dict[str, str]:
        """Environment variable -> field; earlier names come first."""
        names = {**dict(old_names(cls.model_fields)), **{name: name for name in cls.model_fields}}
        return {cls.variable(name): field for name, field in names.items()}

    @classmethod
    def variable(cls, name: str) -> str:
        """Environment variable of the field ``name``."""
        return f"{cls.model_config['env_prefix']}{name}".upper()

    @classmethod
    def _earlier_variables(cls) -> dict[str, Any]:
        """Field -> value of those fields whose environment variable has an earlier name only."""
        values: dict[str, Any] = {}
        for old, new in old_names(cls.model_fields):
            if value := os.environ.get(cls.variable(old)):
                warn(cls.variable(old), cls.variable(new))
                values[new] = value
        return values

    @classmethod
    def find_file(cls, argv: Sequence[str]) -> ConfigFile | None:
        """The file that ``--config`` or its variable names, its keys checked. Raises BadConfigFile."""
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        finder.add_argument("--config")
        try:
            path = finder.parse_known_args(argv)[0].config
        except argparse.ArgumentError:
            return None  # no value: the real parser says so
        path = path or os.environ.get(f"{cls.model_config['env_prefix']}CONFIG")
        return read_checked(Path(path)) if path else None

    @classmethod
    def file_values(cls, file: ConfigFile | None) -> dict[str, tuple[str, Any]]:
        """Field -> (``section.key``, value) of what the file says to this service."""
        return {} if file is None else file.values(cls.section, cls.model_fields)

    @classmethod
    def origins(cls, argv: Sequence[str]) -> dict[str, str]:
        """Field -> where its value comes from: a flag, a variable, or FILE: KEY. Those with defaults are not there.

        Raises:
            BadConfigFile: as ``find_file``.
        """
        file = cls.find_file(argv)
        found = {name: f"{file.path}: {key}" for name, (key, _) in cls.file_values(file).items()} if file else {}
        found |= {name: variable for variable, name in cls.variables().items() if os.environ.get(variable)}
        given = {argument.partition("=")[0] for argument in rename_service_flags(argv, cls.model_fields)}
        return found | {name: flag for name in cls.model_fields if (flag := f"--{flag_name(name)}") in given}

    @classmethod
    def _is_ours(cls, variable: str) -> bool:
        return variable.startswith(cls.model_config["env_prefix"])

    def to_argv(self) -> list[str]:
        """Flags from which ``parse`` makes this configuration when the environment is empty; no defaults."""
        return _flags(self.settings())

    def settings(self) -> dict[str, str]:
        """What ``of`` makes this configuration from: all fields but those that have their default, as text."""
        changed = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name != "config" and (field.is_required() or value != field.default):  # what it said is in here
                changed[name] = ",".join(value) if isinstance(value, tuple) else str(value)
        return changed

    @classmethod
    def of(cls, settings: Mapping[str, object]) -> Self:
        """A configuration from fields by name; None leaves one to its environment variable or default.

        Raises:
            ValueError: a name is unknown, or a value wrong; the message names the flag.
        """
        settings = rename_fields(settings, cls.model_fields)
        if unknown := sorted(settings.keys() - (cls.model_fields.keys() - {"config"})):
            raise ValueError(f"{', '.join(unknown)}: no such setting; see {cls.program} --help for those there are")
        argv = _flags({name: value for name, value in settings.items() if value is not None})
        try:
            return cls(_cli_parse_args=argv, _cli_prog_name=cls.program)  # type: ignore[call-arg]
        except ValidationError as error:
            raise ValueError("; ".join(cls.explain(error, cls.origins(argv)))) from error

    @classmethod
    def explain(cls, error: ValidationError, origins: Mapping[str, str], where: str = "") -> Iterator[str]:
        """One line for each thing that is wrong, naming its origin, or ``where`` if several settings do not fit."""
        for item in error.errors():
            message = item["msg"].removeprefix("Value error, ")
            if not item["loc"]:
                yield where + message
                continue
            name = str(item["loc"][0])
            flag = f"--{flag_name(name)}"
            variable = cls.variable(name)
            if item["type"] == "missing":
                yield f"{flag} (or {variable}) is required: {cls.model_fields[name].description}"
                continue
            origin = origins.get(name, flag)
            place = f"{flag} (or {variable})" if origin in (flag, variable) else origin
            yield f"{place}: {message}, got {item['input']!r}"

    @classmethod
    def _exit(cls, message: str) -> NoReturn:
        print(f"{cls.program}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


class WorkerConfig(ServiceConfig):
    """What both kinds of worker have."""

    routers: Addresses = Field(
        (),
        description="routers to join, separated by commas: HOST:PORT, dns:///NAME:PORT for all addresses of a name, or "
        "ray:///APPLICATION for those of an application on the Ray cluster of this machine",
    )
    worker_id: str = Field("", description="name of this worker; empty makes one")
    advertise: str = Field("", description="HOST or HOST:PORT that others reach this worker at; empty takes --host")
    dtype: DTypeName | None = Field(
        None,
        description="element type of weights, activations and KV as it travels, the same on all workers; by default "
        "what the device computes in: bfloat16, or float32 on a CPU without it",
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    threads: int = Field(1, ge=1, description="CPU threads; all workers of a machine share its cores")
    block_size: int = Field(16, ge=1, description="tokens per KV block")
    kv_memory: Bytes | None = Field(None, description="memory of the KV cache, such as 512MiB; by default sized to fit")
    max_model_len: int | None = Field(
        None, ge=2, description="longest prompt with its answer, in tokens; by default the model's"
    )
    max_num_seqs: int = Field(64, ge=1, description="most sequences in one step")
    shm: Literal["on", "off"] = Field(
        "on", description="whether workers on one host exchange KV through shared memory instead of sockets"
    )
    prefix_cache: Literal["on", "off"] = Field(
        "on", description="whether the KV of prompts is kept, while there is room, for others that begin the same"
    )
    max_transfer_time: float = Field(
        MAX_TRANSFER_TIME,
        gt=0,
        description="seconds that a prompt's KV may take to move once all of it is ready; a transfer that takes longer "
        "is given up, so that a trickle does not hold KV for ever",
    )
    step_timeout: float | None = Field(
        None,
        gt=0,
        description="seconds after which a step counts as stuck and the worker exits, its requests going on elsewhere; "
        "by default 60 on a GPU, and no limit on a CPU",
    )

    @property
    def max_rpcs(self) -> int:
        """Most RPCs that it serves at once: what every sequence can take (one, and one per data stream of its prompt,
        of which the other end decides), so that a full worker still answers probes."""
        return self.max_num_seqs * (1 + MAX_DATA_STREAMS) + SPARE_RPCS

    @model_validator(mode="after")
    def _check_advertise(self) -> Self:
        if is_wildcard(re.sub(r"(?<=[^:]):\d+$", "", self.advertise) or self.host):
            raise ValueError(
                f"{self.advertise or self.host} is no address that others can connect to: "
                "give the host that they reach this worker at with --advertise"
            )
        return self


class PrefillConfig(WorkerConfig):
    """A prefill worker: the full model. Flags are also variables: OVERFILL_PREFILL_KV_MEMORY and so on."""

    model_config = SettingsConfigDict(env_prefix="OVERFILL_PREFILL_")
    program = "overfill-prefill"
    section = "prefill"

    max_num_batched_tokens: int = Field(2048, ge=1, description="most prompt tokens computed in one step")


class DecodeConfig(WorkerConfig):
    """A decode worker: the decoder. Flags are also variables: OVERFILL_DECODE_KV_MEMORY and so on."""

    model_config = SettingsConfigDict(env_prefix="OVERFILL_DECODE_")
    program = "overfill-decode"
    section = "decode"

    kv_codec: CodecName | None = Field(
        None,
        description="how prompts' KV travels, unless a request says; int8 and fp8 halve it and cost some quality; by "
        "default raw, and int8 where it is to be held so",
    )
    kv_cache_dtype: KvCacheDtype = Field(
        "auto",
        description="what KV is held as: auto is --dtype; int8 takes half of bfloat16's memory and bytes per token, "
        "and costs some quality",
    )
    cuda_graphs: Literal["on", "off"] = Field(
        "off", description="whether decode steps on a GPU are recorded and replayed as CUDA graphs"
    )
    data_streams: int = Field(
        2, ge=1, le=MAX_DATA_STREAMS, description="parallel connections that carry a request's KV"
    )

    @property
    def codec(self) -> CodecName:
        """In which KV is asked for, unless a request says."""
        return self.kv_codec or ("int8" if self.kv_cache_dtype == "int8" else "raw")


class RouterConfig(ServiceConfig):
    """The router: text, queue, placement. Flags are also variables: OVERFILL_ROUTER_MAX_QUEUE and so on."""

    model_config = SettingsConfigDict(env_prefix="OVERFILL_ROUTER_")
    program = "overfill-router"
    section = "router"
    rpcs = ROUTER_RPCS

    port: Port = Field(7600, description="port to listen on; 0 picks a free one")
    served_model_name: Names = Field(
        (),
        description="names under which clients ask for the model, separated by commas; answers bear the first; by "
        "default the pair's",
    )
    expect_prefill: int = Field(0, ge=0, description="prefill workers that the stack is started with")
    expect_decode: int = Field(0, ge=0, description="decode workers that the stack is started with")
    prefill_policy: PolicyName = Field(PREFILL_DEFAULT, description="which prefill worker takes a prompt")
    decode_policy: DecodePolicyName = Field(DECODE_DEFAULT, description="which decode worker takes a request")
    max_queue: int = Field(1024, ge=1, description="most waiting requests of one priority; more are refused")
    max_wait: float | None = Field(
        None,
        gt=0,
        description="seconds that a request may be expected to wait for a place; those that would wait longer are "
        "refused at once; by default only those that would miss their deadline",
    )
    absent_after: float | None = Field(
        None,
        gt=0,
        description="seconds without any worker of a stage after which requests that need one fail; by default twice "
        "the longest start-up time of that stage's workers, and 10 at least",
    )
    http: Port | Literal["off"] = Field(
        "off", description="port of the OpenAI endpoint; 0 picks a free one; off: there is none"
    )
    allowed_origins: Origins = Field(
        (),
        description="origins of the web pages that may use the OpenAI endpoint from a browser, separated by commas, "
        "such as https://chat.example.org; * allows every page; by default only its own page at /ui may",
    )
    ttft_objective: float = Field(
        2.0, gt=0, description="seconds to the first token that the scaling metrics are computed for"
    )
    itl_objective: float = Field(
        0.1, gt=0, description="seconds between tokens that the scaling metrics are computed for"
    )
    max_request_bytes: int = Field(4 << 20, ge=1024, le=8 << 20, description="most bytes of one request")
    max_connections: int = Field(4096, ge=1, description="most HTTP connections, and most RPCs, at once")
    max_attempts: int = Field(
        4, ge=1, description="workers lost in a row, without a new token, after which a request fails"
    )
    max_request_time: float = Field(3600.0, gt=0, description="seconds that a request may take at most")

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        if self.api_keys is None and not is_loopback(self.host):
            raise ValueError(
                f"--host {self.host} is open to other machines: give --api-keys, a file that `overfill keys create` "
                "makes, or keep --host 127.0.0.1"
            )
        if self.api_keys is not None and self.stack_secret is None and self.tls_ca is None:
            raise ValueError(
                "with --api-keys workers have to prove that they belong here: give --stack-secret, a file with a "
                "secret (`openssl rand -hex 32`) that all processes of the stack are given, or --tls-cert, --tls-key "
                "and --tls-ca"
            )
        return self

    def access(self) -> AccessPolicy:
        return self.router_access(self.key_ring())

    def router_access(self, keys: KeyRing | None) -> AccessPolicy:
        """In front of RPCs and routes, with keys that are read already."""
        return AccessPolicy(self.rpcs, None if keys is None else keys.find, self._secret())


SERVICES: tuple[type[ServiceConfig], ...] = (RouterConfig, PrefillConfig, DecodeConfig)


def read_checked(path: Path) -> ConfigFile:
    """A file whose keys all exist, with no booleans for services. Raises BadConfigFile."""
    keys = {kind.section: [flag_name(name) for name in kind.model_fields if name != "config"] for kind in SERVICES}
    known = {COMMON: {key for some in keys.values() for key in some}, **keys, "up": UP_KEYS}
    file = _with_new_keys(read_config_file(path), known)
    file.check(known)
    # Of TOML, where `off` is written "off". A number's field would take a boolean for 0 or 1.
    faults = [
        f'{path}: {section}.{key}: expected text or a number, such as "off" or 8000, got {str(value).lower()}'
        for section, settings in file.sections.items()
        for key, value in settings.items()
        if section != "up" and isinstance(value, bool)
    ]
    if faults:
        raise BadConfigFile(faults)
    return file


def _with_new_keys(file: ConfigFile, known: Mapping[str, Collection[str]]) -> ConfigFile:
    """``file`` with earlier keys replaced. Raises BadConfigFile when a setting is there under both names."""
    sections, faults = {}, []
    for section, settings in file.sections.items():
        try:
            sections[section] = rename_keys(section, settings, known.get(section, ()))
        except ValueError as error:
            faults.append(f"{file.path}: {error}")
    if faults:
        raise BadConfigFile(faults)
    return ConfigFile(file.path, sections)
