"""Reads flags of a service's settings, and prints its --help. Values stay text; the settings class checks them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import NoReturn

from pydantic.fields import FieldInfo

from overfill.settings.allowed import default_text, placeholder
from overfill.settings.config_file import flag_name, nearest


def read_flags(
    argv: Sequence[str], fields: Mapping[str, FieldInfo], program: str, about: str, separators: Mapping[str, str]
) -> dict[str, str | bool]:
    """Returns field -> text of each flag in ``argv``, or a bool; an empty value counts as not set.

    Prints help for --help and exits with 0. Prints what is wrong with a flag on stderr and exits with 2.

    Args:
        about: text of --help above the flags.
        separators: field -> separator of its values, if it is not a comma.
    """
    parser = _Parser(program, about)
    for name, field in fields.items():
        if field.annotation is bool:
            parser.add_argument(
                f"--{flag_name(name)}",
                dest=name,
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=help_of(field).replace("%", "%%"),
            )
            continue
        several = isinstance(field.default, tuple)
        parser.add_argument(
            f"--{flag_name(name)}",
            dest=name,
            action="append" if several else "store",
            default=argparse.SUPPRESS,
            metavar=placeholder(name, field),
            help=help_of(field).replace("%", "%%"),
        )
    given = vars(parser.parse_args(argv))
    texts = {
        name: separators.get(name, ",").join(value) if isinstance(value, list) else value
        for name, value in given.items()
    }
    return {name: text for name, text in texts.items() if text != ""}


def help_of(field: FieldInfo) -> str:
    """Returns a flag's help. A default is shown if the description does not say it."""
    about = field.description or ""
    if field.is_required():
        return f"{about} (required)"
    if field.default in (None, "", ()):
        return about
    return f"{about} (default: {default_text(field)})"


class _Parser(argparse.ArgumentParser):
    """A parser that answers a wrong flag with one line, and that with the nearest flag."""

    def __init__(self, program: str, about: str) -> None:
        super().__init__(
            prog=program, usage=f"{program} [FLAG VALUE]...", description=about, allow_abbrev=False, add_help=True
        )

    def parse_args(self, argv: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]
        switches = {
            option: f"give {' or '.join(action.option_strings)}"
            for action in self._actions
            if isinstance(action, argparse.BooleanOptionalAction)
            for option in action.option_strings
        }
        for flag, equals, _ in (argument.partition("=") for argument in argv):
            if equals and flag in switches:
                self.error(f"{flag} takes no value; {switches[flag]}")
        namespace, unknown = self.parse_known_args(argv)
        if not unknown:
            return namespace
        flag = unknown[0].partition("=")[0]
        if not flag.startswith("-"):
            self.error(f"unexpected {flag!r}; every value follows its flag")
        known = [option for action in self._actions for option in action.option_strings]
        self.error(f"{flag}: no such flag; {nearest(flag, known, f'`{self.prog} --help` lists all flags')}")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")
