"""The settings file: YAML or TOML, one section per service; keys are flags without the leading dashes. No torch.

::

    common:               # all services that have the setting
      pair: /pairs/mine
    prefill:
      kv-memory: 8GiB
    up:                   # numbers of processes, for `overfill up`
      decode: 2

This module checks only names. Each service checks its values as if they came from a variable: YAML scalars stay text
(``on`` is not a boolean), and an empty value counts as not set.
"""

from __future__ import annotations

import difflib
import itertools
import os.path
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from overfill.errors import OverfillError
from overfill.process.permissions import refusal

COMMON = "common"

_MAX_VALUES = 10_000  # of a YAML file


class BadConfigFile(OverfillError):
    """A settings file is unreadable or has unknown names. ``faults`` has one line per fault."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = faults


@dataclass(frozen=True)
class ConfigFile:
    """Contents of a settings file: section -> key, in kebab-case as in the file -> value."""

    path: Path
    sections: Mapping[str, Mapping[str, Any]]

    def values(self, section: str, fields: Iterable[str]) -> dict[str, tuple[str, Any]]:
        """Returns field -> (``section.key``, value) for those of ``fields`` that the file sets.

        A value in ``section`` takes precedence over one in ``common``.
        """
        found = {}
        for name in (COMMON, section):
            for key, value in self.sections.get(name, {}).items():
                if field_name(key) in fields:
                    found[field_name(key)] = (f"{name}.{key}", value)
        return found

    def check(self, schema: Mapping[str, Iterable[str]]) -> None:
        """Raises BadConfigFile naming each section and key that is not in ``schema`` (section -> keys)."""
        known = {section: set(keys) for section, keys in schema.items()}
        faults = []
        for section, keys in self.sections.items():
            if section not in known:
                faults.append(f"{self.path}: {section}: unknown section; {nearest(section, known, all_names())}")
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
            return f"{key} is a setting of {' and '.join(elsewhere)}"
        return nearest(key, known[section], all_names("" if section == COMMON else section))


def read_config_file(path: Path) -> ConfigFile:
    """Parses a ``.yaml``, ``.yml`` or ``.toml`` file without checking its names. Raises BadConfigFile."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = refusal(path) or error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise BadConfigFile([f"{path}: cannot be read: {reason}"]) from error
    try:
        if path.suffix == ".toml":
            data: Any = tomllib.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            data = yaml.load(text, Loader=_TextLoader)  # as safe as SafeLoader: creates no objects
        else:
            raise BadConfigFile([f"{path}: unknown kind of file; its name must end in .yaml, .yml or .toml"])
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise BadConfigFile([f"{path}: {' '.join(str(error).split())}"]) from error
    return ConfigFile(path, _sections(path, data))


def _sections(path: Path, data: Any) -> dict[str, dict[str, Any]]:
    data = data or {}
    if not isinstance(data, dict):
        raise BadConfigFile(
            [f"{path}: expected sections with settings, such as  router:  followed by an indented  port: 7600"]
        )
    faults = [
        f"{path}: {name}: expected settings in this section"
        for name, s in data.items()
        if s and not isinstance(s, dict)
    ]
    if faults:
        raise BadConfigFile(faults)
    return {
        str(name): {str(key): value for key, value in (settings or {}).items() if value != ""}
        for name, settings in data.items()
    }


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """Returns ``did you mean X?`` with the known name that is similar to ``name``; ``otherwise`` if none is.

    A prefix that all names share, such as OVERFILL_PREFILL_, does not make them similar.
    """
    names = sorted(known)
    prefix = os.path.commonprefix([name, *names])  # noqa: RUF071  # of characters, not of folders
    rest = [each.removeprefix(prefix) for each in names]
    similar = difflib.get_close_matches(name.removeprefix(prefix), rest, n=1, cutoff=0.6)
    return f"did you mean {prefix}{similar[0]}?" if similar else otherwise


def all_names(section: str = "") -> str:
    """Returns how to list all names of settings of a section; empty means of all sections."""
    return f"`{' '.join(('overfill config show', section)).strip()}` lists all names"


def field_name(key: str) -> str:
    """Returns the field of a flag or key: ``kv-memory`` -> ``kv_memory``."""
    return key.replace("-", "_")


def flag_name(field: str) -> str:
    """Returns a field's flag without leading dashes, which is also its key in a file."""
    return field.replace("_", "-")


class StrictConstructor(yaml.constructor.BaseConstructor):
    """Refuses duplicate keys, of which YAML would take the last, and aliases that stand for too much."""

    def construct_document(self, node: Any) -> Any:
        _check_size(node)
        return super().construct_document(node)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        _check_unique_keys(node)
        return super().construct_mapping(node, deep)


class _TextLoader(StrictConstructor, yaml.BaseLoader):
    """Loads every scalar as text."""


def _check_size(document: yaml.Node) -> None:
    """Raises ConstructorError if a YAML document has more than ``_MAX_VALUES`` values, its aliases expanded."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = _MAX_VALUES + 1  # for an alias inside of what it stands for
            inner: Iterable[yaml.Node] = ()
            if isinstance(node, yaml.MappingNode):
                inner = itertools.chain.from_iterable(node.value)
            elif isinstance(node, yaml.SequenceNode):
                inner = node.value
            sizes[id(node)] = 1 + sum(map(size, inner))
        return sizes[id(node)]

    if size(document) > _MAX_VALUES:
        text = f"has more than {_MAX_VALUES} values, with each alias (*NAME) counted as what it stands for"
        raise yaml.constructor.ConstructorError(None, None, text, document.start_mark)


def _check_unique_keys(node: yaml.Node) -> None:
    """Raises ConstructorError if a mapping of a YAML document has a key twice, of which YAML would take the last."""
    seen: set[str] = set()
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        if not isinstance(key, yaml.ScalarNode):
            continue  # YAML refuses it
        if key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} appears twice", key.start_mark)
        seen.add(key.value)
