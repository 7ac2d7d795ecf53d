"""The file of settings: YAML or TOML, a section per service, keys that are flags without their dashes. No torch.

::

    common:               # for every service that has the setting
      pair: /pairs/mine
    prefill:
      kv-memory: 8GiB
    up:                   # how many processes `overfill up` starts
      decode: 2

Reads and checks names only. Values are checked by whoever takes them, as if a variable had them: YAML scalars stay text
(``on`` is not a boolean), and an empty one is no setting.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from overfill.errors import OverfillError

COMMON = "common"


class BadConfigFile(OverfillError):
    """A file of settings cannot be read, or names something that does not exist. One line per fault in ``faults``."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = faults


@dataclass(frozen=True)
class ConfigFile:
    """What a file says. Section name -> key (as in the file: kebab-case) -> value."""

    path: Path
    sections: Mapping[str, Mapping[str, Any]]

    def values(self, section: str, fields: Iterable[str]) -> dict[str, tuple[str, Any]]:
        """Field name -> (``section.key``, value) of the ``fields`` that the file sets; the section beats ``common``."""
        found = {}
        for name in (COMMON, section):
            for key, value in self.sections.get(name, {}).items():
                if field_name(key) in fields:
                    found[field_name(key)] = (f"{name}.{key}", value)
        return found

    def check(self, schema: Mapping[str, Iterable[str]]) -> None:
        """Compares names with ``schema``: section -> its keys. Raises BadConfigFile naming each unknown one."""
        known = {section: set(keys) for section, keys in schema.items()}
        faults = []
        for section, keys in self.sections.items():
            if section not in known:
                faults.append(f"{self.path}: {section}: no such section; {nearest(section, known)}")
                continue
            for key in keys:
                if key not in known[section]:
                    faults.append(f"{self.path}: {section}.{key}: no such setting; {self._hint(section, key, known)}")
        if faults:
            raise BadConfigFile(faults)

    @staticmethod
    def _hint(section: str, key: str, known: Mapping[str, set[str]]) -> str:
        elsewhere = [other for other, keys in known.items() if key in keys and other != COMMON]
        if elsewhere:
            return f"{key} belongs to {' and '.join(elsewhere)}"
        return nearest(key, known[section])


def read_config_file(path: Path) -> ConfigFile:
    """Parses a ``.yaml``, ``.yml`` or ``.toml`` file. Raises BadConfigFile; names are not checked yet."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise BadConfigFile([f"{path}: cannot be read: {reason}"]) from error
    try:
        if path.suffix == ".toml":
            data: Any = tomllib.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            data = yaml.load(text, Loader=_TextLoader)  # a SafeLoader's kin: makes no objects
        else:
            raise BadConfigFile([f"{path}: name it .yaml, .yml or .toml"])
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise BadConfigFile([f"{path}: {' '.join(str(error).split())}"]) from error
    return ConfigFile(path, _sections(path, data))


def _sections(path: Path, data: Any) -> dict[str, dict[str, Any]]:
    data = data or {}
    if not isinstance(data, dict):
        raise BadConfigFile([f"{path}: expected sections with settings, such as  router:  and below it  port: 7600"])
    faults = [
        f"{path}: {name}: expected settings below it" for name, s in data.items() if s and not isinstance(s, dict)
    ]
    if faults:
        raise BadConfigFile(faults)
    return {
        str(name): {str(key): value for key, value in (settings or {}).items() if value != ""}
        for name, settings in data.items()
    }


def nearest(name: str, known: Iterable[str]) -> str:
    """``did you mean X?`` with the known name that is most like ``name``."""
    return f"did you mean {difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)[0]}?"


def field_name(key: str) -> str:
    """Of a file's key or a flag's name: ``kv-memory`` is the field ``kv_memory``."""
    return key.replace("-", "_")


def flag_name(field: str) -> str:
    """Of a field, without dashes in front, which is also its key in a file."""
    return field.replace("_", "-")


class _TextLoader(yaml.BaseLoader):
    """Every scalar is text, and a key that is there twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)
