"""Reads the settings of a program from flags, environment variables and a file. Declares no setting. No torch.

Declaring a field in a subclass adds a setting. For instance, ``kv_memory`` of a prefill worker is the flag
``--kv-memory``, the variable ``OVERFILL_PREFILL_KV_MEMORY``, and the key ``kv-memory`` under ``prefill`` or ``common``
in the file that ``--config`` names. The first of these that sets it wins: flag, variable, the service's section,
``common``, default.

All values are checked once, here; messages name the flag, variable or key. Services never read the environment.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from overfill.settings.allowed import describe
from overfill.settings.config_file import BadConfigFile, ConfigFile, all_names, flag_name, nearest
from overfill.settings.flags import read_flags

SEPARATORS = {"decoders": ";", "brownout": " > "}
"""Separators of the settings with several values that are not separated by commas."""

_from_file: ContextVar[Mapping[str, Any] | None] = ContextVar("_from_file", default=None)
"""Values from the file, which ``read`` passes to the class that it instantiates."""


class BadSettings(ValueError):
    """A setting is unknown or has a bad value. The message names its flag, variable or key, and what to change."""


def _flags(settings: Mapping[str, object]) -> list[str]:
    return [f"--{flag_name(name)}={value}" for name, value in settings.items()]


class SettingsReader(BaseSettings):
    """Settings of one program. Instances are frozen.

    A subclass adds the program's name, its section of the file, the prefix of its environment variables, and a field
    ``config`` for the path of the file.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        env_ignore_empty=True,
    )
    program: ClassVar[str]
    section: ClassVar[str]
    """Section of this program in a settings file."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # ``init_settings`` are the flags.
        return init_settings, env_settings, InitSettingsSource(settings_cls, dict(_from_file.get() or {}))

    @classmethod
    def parse(cls, argv: Sequence[str] | None = None) -> Self:
        """Returns the settings of ``read`` from the command line; None means ``sys.argv[1:]``.

        When a flag, variable or key is unknown or has a bad value, prints what to change on stderr and exits with 2.
        """
        try:
            return cls.read(sys.argv[1:] if argv is None else argv)
        except BadSettings as error:
            print(f"{cls.program}: error: {error}", file=sys.stderr)
            raise SystemExit(2) from None

    @classmethod
    def read(cls, argv: Sequence[str]) -> Self:
        """Returns the settings from flags, variables, file and defaults, in this order.

        Raises:
            BadSettings: a variable or key is unknown, or a value is wrong.
            SystemExit: ``argv`` has --help or an unknown flag.
        """
        if unknown := sorted(name for name in os.environ if cls._is_ours(name) and name not in cls.variables()):
            hints = (f"{name}: no such setting; {nearest(name, cls.variables(), cls._all())}" for name in unknown)
            raise BadSettings("; ".join(hints))
        try:
            file = cls.find_file(argv)
            values = cls.file_values(file)
        except BadConfigFile as error:
            raise BadSettings(str(error)) from error
        token = _from_file.set({name: value for name, (_, value) in values.items()})
        try:
            return cls._made(argv, cls._origins_in(file, argv))
        finally:
            _from_file.reset(token)

    @classmethod
    def _made(cls, argv: Sequence[str], origins: Mapping[str, str]) -> Self:
        """Returns the settings from flags, variables and ``_from_file``. Raises BadSettings.

        Args:
            origins: field -> origin of its value, for errors.
        """
        given: dict[str, Any] = dict(
            read_flags(argv, cls.model_fields, cls.program, inspect.getdoc(cls) or "", SEPARATORS)
        )
        try:
            return cls(**given)
        except ValidationError as error:
            raise BadSettings("; ".join(cls.explain(error, origins))) from error

    @classmethod
    def _all(cls) -> str:
        return all_names(cls.section)

    @classmethod
    def variables(cls) -> dict[str, str]:
        """Returns environment variable -> field."""
        return {cls.variable(name): name for name in cls.model_fields}

    @classmethod
    def variable(cls, name: str) -> str:
        """Returns the environment variable of the field ``name``."""
        return f"{cls.model_config['env_prefix']}{name}".upper()

    @classmethod
    def find_file(cls, argv: Sequence[str]) -> ConfigFile | None:
        """Reads the file that ``--config`` or its variable names, and checks its keys. Raises BadConfigFile."""
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        finder.add_argument("--config")
        try:
            path = finder.parse_known_args(argv)[0].config
        except argparse.ArgumentError:
            return None  # --config without a value: the real parser reports it
        path = path or os.environ.get(f"{cls.model_config['env_prefix']}CONFIG")
        return cls.read_file(Path(path)) if path else None

    @classmethod
    @abstractmethod
    def read_file(cls, path: Path) -> ConfigFile:
        """Reads a settings file and checks that all its keys exist. Raises BadConfigFile."""

    @classmethod
    def file_values(cls, file: ConfigFile | None) -> dict[str, tuple[str, Any]]:
        """Returns field -> (``section.key``, value) for the fields of this service that the file sets."""
        return {} if file is None else file.values(cls.section, cls.model_fields)

    @classmethod
    def origins(cls, argv: Sequence[str]) -> dict[str, str]:
        """Returns field -> origin of its value: a flag, a variable, or ``FILE: KEY``; omits fields with defaults.

        Raises:
            BadConfigFile: as ``find_file``.
        """
        return cls._origins_in(cls.find_file(argv), argv)

    @classmethod
    def _origins_in(cls, file: ConfigFile | None, argv: Sequence[str]) -> dict[str, str]:
        found = {name: f"{file.path}: {key}" for name, (key, _) in cls.file_values(file).items()} if file else {}
        found |= {name: variable for variable, name in cls.variables().items() if os.environ.get(variable)}
        given = {argument.partition("=")[0] for argument in argv}
        return found | {name: flag for name in cls.model_fields if (flag := f"--{flag_name(name)}") in given}

    @classmethod
    def _is_ours(cls, variable: str) -> bool:
        return variable.startswith(cls.model_config["env_prefix"])

    def to_argv(self) -> list[str]:
        """Returns flags from which ``parse`` makes equal settings in an empty environment; omits defaults."""
        return _flags(self.settings())

    def settings(self) -> dict[str, str]:
        """Returns field -> value as text, from which ``of`` makes equal settings; omits defaults."""
        changed = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name != "config" and (
                field.is_required() or value != field.default
            ):  # --config is omitted, because its values are included
                changed[name] = (
                    SEPARATORS.get(name, ",").join(map(str, value)) if isinstance(value, tuple) else str(value)
                )
        return changed

    @classmethod
    def of(cls, settings: Mapping[str, object]) -> Self:
        """Returns settings from fields by name; None leaves a field to its environment variable or default.

        Raises:
            BadSettings: a name is unknown or a value is wrong; the message names the flag.
        """
        if unknown := sorted(settings.keys() - (cls.model_fields.keys() - {"config"})):
            raise BadSettings(f"{', '.join(unknown)}: no such setting; {cls.program} --help lists all settings")
        argv = _flags({name: value for name, value in settings.items() if value is not None})
        return cls._made(argv, cls._origins_in(None, argv))

    @classmethod
    def explain(cls, error: ValidationError, origins: Mapping[str, str], where: str = "") -> Iterator[str]:
        """Yields one line per fault. It names the origin of the value, or ``where`` if several settings conflict."""
        seen: set[str] = set()
        for item in error.errors():
            if not item["loc"]:
                yield where + item["msg"].removeprefix("Value error, ")
                continue
            name = str(item["loc"][0])
            if name in seen:
                continue  # pydantic reports each type of a union
            seen.add(name)
            field = cls.model_fields[name]
            flag = f"--{flag_name(name)}"
            variable = cls.variable(name)
            if item["type"] == "missing":
                yield f"{flag} (or {variable}) is required: {field.description}"
                continue
            origin = origins.get(name, flag)
            place = f"{flag} (or {variable})" if origin in (flag, variable) else origin
            yield f"{place}: {describe(field, item['type'], item['msg'], item['input'])}"
