"""Reads the settings of a program from flags, environment variables and a file, or as one JSON object. No torch.

Declaring a field in a subclass adds a setting. For instance, ``kv_memory`` of a prefill worker is the flag
``--kv-memory``, the variable ``OVERFILL_PREFILL_KV_MEMORY``, and the key ``kv-memory`` under ``prefill`` or ``common``
in the file that ``--config`` names. The first of these that sets it wins: flag, variable, the service's section,
``common``, default.

A process that another program starts gets all its settings in the variable ``SETTINGS``, as a JSON object, and reads
nothing else.

All values are checked once, here; messages name the flag, variable or key. Services never read the environment.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from overfill.settings.allowed import describe
from overfill.settings.config_file import BadConfigFile, ConfigFile, all_names, flag_name, nearest
from overfill.settings.flags import read_flags
from overfill.settings.values import check_text

SEPARATORS = {"tiers": ";", "canary_tiers": ";", "brownout": " > "}
"""Separators of the settings with several values that are not separated by commas."""

SETTINGS = "OVERFILL_SETTINGS"
"""Environment variable with all settings of a process as a JSON object, by field. Defaults are omitted."""


class BadSettings(ValueError):
    """A setting is unknown or has a bad value. The message names its flag, variable or key, and what to change."""


@dataclass(frozen=True, slots=True)
class Given:
    """A value that a flag, a variable or a file gives to a setting.

    Attributes:
        origin: the flag, the variable, or ``FILE: KEY``.
    """

    value: Any
    origin: str


class SettingsReader(BaseModel):
    """Settings of one program. Instances are frozen.

    A subclass adds the program's name, its section of the file, the prefix of its environment variables, and a field
    ``config`` for the path of the file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)
    program: ClassVar[str]
    section: ClassVar[str]
    """Section of this program in a settings file."""
    prefix: ClassVar[str]
    """Beginning of the names of this program's environment variables."""

    _check_text = field_validator("*", mode="before")(check_text)

    @classmethod
    def parse(cls, argv: Sequence[str] | None = None) -> Self:
        """Returns the settings of ``SETTINGS``, or else those of ``read``; None means ``sys.argv[1:]``.

        When a setting is unknown or has a bad value, prints what to change on stderr and exits with 2.
        """
        try:
            if (text := os.environ.get(SETTINGS)) is not None:
                return cls.of(_json_object(text))
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
        return cls.made(cls.given(cls.read_flags(argv)))

    @classmethod
    def read_flags(cls, argv: Sequence[str]) -> dict[str, str | bool]:
        """Returns field -> text of each flag. Exits after --help, and for an unknown flag with 2."""
        return read_flags(argv, cls.model_fields, cls.program, inspect.getdoc(cls) or "", SEPARATORS)

    @classmethod
    def given(cls, flags: Mapping[str, Any]) -> dict[str, Given]:
        """Returns the settings that ``flags``, variables and the file give, by field, unchecked.

        Args:
            flags: field -> value. They win over variables, and name the file as ``config``.

        Raises:
            BadSettings: a variable or key is unknown, or the file cannot be read.
        """
        found = {name: Given(value, f"--{flag_name(name)}") for name, value in flags.items()}
        variables = cls.variables()
        if unknown := sorted(name for name in os.environ if name.startswith(cls.prefix) and name not in variables):
            hints = (f"{name}: no such setting; {nearest(name, variables, all_names(cls.section))}" for name in unknown)
            raise BadSettings("; ".join(hints))
        set_here = {field: variable for variable, field in variables.items() if os.environ.get(variable)}
        found = {name: Given(os.environ[variable], variable) for name, variable in set_here.items()} | found
        if "config" not in found:
            return found
        try:
            file = cls.read_file(Path(found["config"].value))
        except BadConfigFile as error:
            raise BadSettings(str(error)) from error
        return {
            name: Given(value, f"{file.path}: {key}") for name, (key, value) in cls.file_values(file).items()
        } | found

    @classmethod
    def made(cls, given: Mapping[str, Given]) -> Self:
        """Returns the checked settings. Raises BadSettings naming the origin of a wrong value."""
        try:
            return cls.model_validate({name: one.value for name, one in given.items()})
        except ValidationError as error:
            raise BadSettings(
                "; ".join(cls.explain(error, {name: one.origin for name, one in given.items()}))
            ) from error

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """Returns settings from values by field, as ``settings`` returns them or as text.

        Raises:
            BadSettings: a name is unknown or a value is wrong; the message names the flag.
        """
        known = cls.model_fields.keys() - {"config"}
        if unknown := sorted(settings.keys() - known):
            hint = nearest(unknown[0], known, f"{cls.program} --help lists all settings")
            raise BadSettings(f"{', '.join(unknown)}: no such setting; {hint}")
        return cls.made({name: Given(value, f"--{flag_name(name)}") for name, value in settings.items()})

    def settings(self) -> dict[str, Any]:
        """Returns field -> plain JSON value, from which ``of`` makes equal settings; omits defaults."""
        fields = type(self).model_fields
        kept = {
            name
            for name, field in fields.items()
            # --config is omitted, because its values are included.
            if name != "config" and (field.is_required() or getattr(self, name) != field.default)
        }
        return self.model_dump(mode="json", include=kept)

    def environment(self) -> dict[str, str]:
        """Returns the variable from which ``parse`` makes equal settings."""
        return {SETTINGS: json.dumps(self.settings())}

    @classmethod
    def variables(cls) -> dict[str, str]:
        """Returns environment variable -> field."""
        return {cls.variable(name): name for name in cls.model_fields}

    @classmethod
    def variable(cls, name: str) -> str:
        """Returns the environment variable of the field ``name``."""
        return f"{cls.prefix}{name}".upper()

    @classmethod
    @abstractmethod
    def read_file(cls, path: Path) -> ConfigFile:
        """Reads a settings file and checks that all its keys exist. Raises BadConfigFile."""

    @classmethod
    def file_values(cls, file: ConfigFile) -> dict[str, tuple[str, Any]]:
        """Returns field -> (``section.key``, value) for the fields of this service that the file sets."""
        return file.values(cls.section, cls.model_fields)

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


def _json_object(text: str) -> dict[str, Any]:
    """Reads the value of ``SETTINGS``. Raises BadSettings."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSettings(f"{SETTINGS}: expected a JSON object of settings: {error}") from error
    if not isinstance(values, dict):
        raise BadSettings(f"{SETTINGS}: expected a JSON object of settings, got {text[:40]}")
    return values
