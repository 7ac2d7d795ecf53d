"""Earlier names of settings, which work with a warning until ``REMOVED_IN``. No torch.

To rename a setting, rename the field of its service and add a line to ``RENAMED``. The old flag, environment variable,
key in a file, key in the Helm chart's ``settings`` and key in a ``StackSpec`` then set the new field. A command that
has the flag itself is declared with ``cli.options.RenamedFlags``.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import TypeVar

from overfill.settings.config_file import field_name, flag_name

logger = logging.getLogger(__name__)
_V = TypeVar("_V")

REMOVED_IN = "0.3"

RENAMED: dict[str, str] = {
    "otlp_endpoint": "otlp_traces_endpoint",
    "same_host": "shm",
    "token_budget": "max_num_batched_tokens",
}
"""Earlier field name -> field name, both with underscores, for every service that has the new field."""


def old_names(fields: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yields (earlier name, name) of each of ``fields`` that was renamed. A name still in use is not an earlier one."""
    for old, new in RENAMED.items():
        if new in fields and old not in fields:
            yield old, new


def rename_flags(argv: Sequence[str], renamed: Mapping[str, str]) -> list[str]:
    """Replaces earlier flags in ``argv``, up to ``--``, and warns of each. ``renamed`` has names without dashes."""
    flags = {f"--{old}": f"--{new}" for old, new in renamed.items()}
    arguments = list(argv)
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if argument == "--":
            break
        if flag in flags:
            warn(flag, flags[flag])
            arguments[index] = flags[flag] + equals + value
    return arguments


def rename_service_flags(argv: Sequence[str], fields: Collection[str]) -> list[str]:
    """Replaces the earlier flags of a service with these ``fields``."""
    return rename_flags(argv, {flag_name(old): flag_name(new) for old, new in old_names(fields)})


def rename_fields(settings: Mapping[str, _V], fields: Collection[str]) -> dict[str, _V]:
    """Replaces earlier field names among the keys of ``settings`` and warns of each.

    Raises:
        ValueError: a setting is given under both names.
    """
    return _rename(settings, old_names(fields), "", "{old} is the earlier name of {new}: remove {old}")


def rename_keys(section: str, settings: Mapping[str, _V], keys: Collection[str]) -> dict[str, _V]:
    """Replaces earlier keys in a file's ``section``; otherwise as ``rename_fields``, which raises as this does."""
    names = old_names([field_name(key) for key in keys])
    flags = ((flag_name(old), flag_name(new)) for old, new in names)
    both = f"{section}.{{old}}: this is the earlier name of {{new}}: remove {{old}}"
    return _rename(settings, flags, f"{section}.", both)


def _rename(settings: Mapping[str, _V], names: Iterable[tuple[str, str]], prefix: str, both: str) -> dict[str, _V]:
    """Replaces keys by ``names`` and warns of each with ``prefix``. ``both`` is the error of a key under both names."""
    settings = dict(settings)
    for old, new in names:
        if old in settings:
            if new in settings:
                raise ValueError(both.format(old=old, new=new))
            warn(prefix + old, prefix + new)
            settings[new] = settings.pop(old)
    return settings


@cache
def warn(old: str, new: str) -> None:
    """Logs, once per process, that ``old`` is now called ``new``. Before logging is set up, this goes to stderr."""
    logger.warning("%s is now %s; the old name works until version %s", old, new, REMOVED_IN)
