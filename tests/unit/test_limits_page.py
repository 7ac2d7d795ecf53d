"""``docs/reference/limits.md`` states the values that settings and constants have."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from overfill.settings.config import RouterConfig

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "limits.md"
UNITS = {"KiB": 2**10, "MiB": 2**20, "min": 60}
NUMBER = re.compile(r"([\d,]+(?:\.\d+)?)(?: (KiB|MiB|min)\b)?")
SOURCES = [file for top in ("overfill", "services") for file in (ROOT / top).rglob("*.py")]


def rows() -> list[list[str]]:
    lines = re.findall(r"^\| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    return [row for row in cells if row[0] != "limit"]


def numbers(cell: str) -> list[float]:
    return [float(number.replace(",", "")) * UNITS.get(unit, 1) for number, unit in NUMBER.findall(cell)]


def values(name: str) -> Iterator[float]:
    """Yields the value of each constant of this name; two modules may have one each."""
    for file in SOURCES:
        text = file.read_text(encoding="utf-8")
        for value in re.findall(
            rf"^(?:\w+, )?{name}(?:, \w+)?(?:: Final)? = ([\d_.,< ]+?)(?: *#.*)?$", text, re.MULTILINE
        ):
            yield from (float(eval(each)) for each in value.split(", "))  # digits and operators only


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_a_limit_is_what_the_code_says(row: list[str]) -> None:
    assert len(row) == 5, "limit, default, set by, beyond it, status"
    _, default, set_by, _, _ = row
    for name in re.findall(r"`([A-Z_]{4,})`", set_by):
        found = set(values(name))
        assert found, f"no module has a constant {name}"
        assert found & set(numbers(default)), f"{name} is {found}"
    for flag in re.findall(r"`--([a-z-]+)`(?! of workers)", set_by):
        field = RouterConfig.model_fields.get(flag.replace("-", "_"))
        if field is not None and field.default is not None and numbers(default):
            assert field.default in numbers(default), f"--{flag} is {field.default} by default"


def test_every_limit_of_a_router_s_settings_is_listed() -> None:
    text = PAGE.read_text(encoding="utf-8")
    limits = [name for name in RouterConfig.model_fields if name.startswith("max_")]
    assert len(limits) > 5
    assert [name for name in limits if f"`--{name.replace('_', '-')}`" not in text] == []
