"""The site builds without a warning, loads nothing from other servers, and its reference is complete."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import click
import pytest

from overfill import client
from overfill.cli.main import cli
from overfill.settings.config import SERVICES, ColocatedConfig, DecodeConfig

ROOT = Path(__file__).parents[2]
# What a browser loads by itself: tag -> attributes with an address.
LOADED = {
    "audio": ("src",),
    "embed": ("src",),
    "iframe": ("src",),
    "img": ("src", "srcset"),
    "input": ("src",),
    "link": ("href",),
    "object": ("data",),
    "script": ("src",),
    "source": ("src", "srcset"),
    "video": ("src", "poster"),
}
NOT_LOADED = {"alternate", "canonical", "next", "prev"}  # values of `rel`
PROTOS = ("admin", "common", "decode", "inference", "kv", "prefill", "registry")

pytest.importorskip("mkdocs")


class _Page(HTMLParser):
    """The ids and classes of a page, and the addresses that a browser loads with it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.classes: set[str] = set()
        self.loaded: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids.add(given.get("id", ""))
        self.classes.update(given.get("class", "").split())
        if tag == "link" and given.get("rel") in NOT_LOADED:
            return
        self.loaded += [given[name] for name in LOADED.get(tag, ()) if name in given]
        self.loaded += _urls(given.get("style", ""))


def _urls(css: str) -> list[str]:
    return re.findall(r"""(?:url\(|@import)\s*["']?([^"')\s]+)""", css)


def _is_remote(address: str) -> bool:
    return bool(re.match(r"(https?:|wss?:)?//", address.strip()))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return folder


def _reference(site: Path, name: str) -> _Page:
    return _Page((site / "reference" / f"{name}.html").read_text(encoding="utf-8"))


def _text(site: Path, name: str) -> str:
    return (site / "reference" / f"{name}.html").read_text(encoding="utf-8")


def test_no_page_loads_anything_from_another_server(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    remote = []
    for page in pages:
        found = _Page(page.read_text(encoding="utf-8"))
        remote += [(page.name, address) for address in found.loaded if _is_remote(address)]
        # The theme's script would load Mermaid and MathJax from other servers for these.
        remote += [(page.name, name) for name in ("mermaid", "arithmatex") if name in found.classes]
    for style in (*site.rglob("*.css"), *site.rglob("*.svg")):
        remote += [(style.name, each) for each in _urls(style.read_text(encoding="utf-8")) if _is_remote(each)]
    assert remote == []


def test_every_setting_is_in_the_reference(site: Path) -> None:
    text, ids = _text(site, "settings"), _reference(site, "settings").ids
    missing = []
    for kind in SERVICES:
        for name in kind.model_fields:
            # A worker with both stages also has the settings of a decode worker, which are in that one's table.
            documented_by = (kind, DecodeConfig) if kind is ColocatedConfig else (kind,)
            variables = {f"OVERFILL_*_{name.upper()}", *(each.variable(name) for each in documented_by)}
            places = {f"{each}-{name.replace('_', '-')}" for each in ("all", *(each.program for each in documented_by))}
            if not places & ids or not any(f"<code>{variable}</code>" in text for variable in variables):
                missing.append((kind.program, name))
    assert missing == []


def _commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield f"{path}-{name}", command
        if isinstance(command, click.Group):
            yield from _commands(command, f"{path}-{name}")


def test_every_command_and_option_is_in_the_reference(site: Path) -> None:
    text, ids = _text(site, "cli"), _reference(site, "cli").ids
    commands = dict(_commands(cli, "overfill"))
    assert len(commands) > 30
    assert sorted(commands.keys() - ids) == []
    for path, command in commands.items():
        section = text.partition(f' id="{path}"')[2].partition("<h")[0]
        shown = [each for each in command.params if isinstance(each, click.Option) and not each.hidden]
        options = {name for each in shown for name in each.opts}
        assert sorted(name for name in options if f">{name}<" not in section) == [], path


@pytest.mark.parametrize("page", ["settings", "cli"])
def test_every_option_that_takes_a_value_says_which(site: Path, page: str) -> None:
    options = [each for _, command in _commands(cli, "overfill") for each in command.params]
    flags = {
        name
        for each in options
        if isinstance(each, click.Option) and each.is_flag
        for name in (*each.opts, *each.secondary_opts)
    }
    rows = re.findall(r"<tr>\n<td>(.*)</td>\n<td>(.*)</td>", _text(site, page))
    assert len(rows) > 50
    without = {name for names, value in rows if not value for name in re.findall(r"(?<=>)--[a-z-]+", names)}
    assert sorted(without - flags) == []


def test_every_rpc_message_and_field_is_in_the_reference(site: Path) -> None:
    text, ids = _text(site, "wire"), _reference(site, "wire").ids
    files = [importlib.import_module(f"overfill.v1.{name}_pb2").DESCRIPTOR for name in PROTOS]
    assert sorted(Path(file.name).stem for file in files) == sorted(f.stem for f in (ROOT / "proto").rglob("*.proto"))
    rpcs = {
        f"{each.name}{rpc.name}".lower()
        for file in files
        for each in file.services_by_name.values()
        for rpc in each.methods
    }
    assert len(rpcs) > 10
    assert sorted(rpcs - ids) == []
    messages = [message for file in files for message in file.message_types_by_name.values()]
    for message in messages:
        section = text.partition(f' id="{message.name.lower()}"')[2].partition("<h")[0]
        assert section, message.name
        for field in message.fields:
            assert f"<td>{field.number}</td>\n<td><code>{field.name}</code></td>" in section, (message.name, field.name)
    enums = [enum for file in files for enum in file.enum_types_by_name.values()]
    enums += [enum for message in messages for enum in message.enum_types]
    assert [value.name for enum in enums for value in enum.values if f"<code>{value.name}</code>" not in text] == []


def test_every_metric_and_error_is_in_the_reference(site: Path) -> None:
    names = re.findall(r"^\| `(overfill_\w+)`", (ROOT / "docs/reference/metrics.md").read_text("utf-8"), re.MULTILINE)
    assert len(names) > 50
    assert [name for name in names if f"<code>{name}</code>" not in _text(site, "metrics")] == []
    errors = [name for name, each in vars(client).items() if inspect.isclass(each) and issubclass(each, Exception)]
    assert [name for name in errors if f"sdk.html#{name.lower()}" not in _text(site, "errors")] == []


def test_every_public_name_of_the_sdk_is_in_the_reference(site: Path) -> None:
    ids = _reference(site, "sdk").ids
    assert sorted(name for name in client.__all__ if name.lower() not in ids) == []


@pytest.mark.parametrize("name", sorted(client.__all__))
def test_the_sdk_describes_every_field_and_argument(name: str) -> None:
    public = getattr(client, name)
    described = [(public, _names(public))] if inspect.isclass(public) else []
    if name in ("Client", "AsyncClient"):
        methods = [method for each, method in vars(public).items() if inspect.isfunction(method) and each[0] != "_"]
        described += [(method, [*inspect.signature(method).parameters][1:]) for method in methods]
    for each, names in described:
        found = re.findall(r"^ +\**(\w+): ", inspect.getdoc(each) or "", re.MULTILINE)
        assert sorted(set(names) - set(found)) == [], each.__qualname__


def _names(public: type) -> list[str]:
    if dataclasses.is_dataclass(public):
        return [field.name for field in dataclasses.fields(public)]
    return list(public.__annotations__) if public is client.Options else []
