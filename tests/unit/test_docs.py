"""Every command, option and name in code that the guides name exists, and what is made from the code is up to date.

The notebook is not brought up to date.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from overfill.cli.main import cli
from overfill.settings.config import SERVICES

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs" / "site"))

from generated import filled, pages  # noqa: E402

NOTEBOOK = ROOT / "docs" / "lab"
EXPLANATION = sorted((ROOT / "docs" / "explanation").glob("*.md"))
GUIDES = [page for page in (ROOT / "docs").rglob("*.md") if NOTEBOOK not in page.parents]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *GUIDES, *ROOT.glob("deploy/**/*.md")])
# In "helm install overfill CHART", overfill is a release; in "from overfill import LLM", a package.
COMMAND = re.compile(r"(?<![\w./:-])(?<!install )(?<!from )overfill [^|;&#]*")
_OTHER = "claude|codex|curl|docker|helm|jupyter|kubectl|locust|opencode|prometheus|protoc|ruff|serve|systemctl"
OTHER_PROGRAM = re.compile(rf"(?:^|[ /])({_OTHER}) ")
# Options of locust, docker, Ray, Dynamo and vLLM that the text names without a command.
OTHER_OPTIONS = {
    *("--query-gpu", "--format", "--gpus", "--shm-size", "--num_processes"),  # of nvidia-smi, docker, accelerate
    *("--host", "--run-time", "--stop-timeout", "--class-picker", "--build-arg"),
    *("--migration-limit", "--shutdown-timeout", "--dashboard-host", "--num-cpus"),
    *("--include_path", "--model_args"),  # of lm_eval
}
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
NAME = re.compile(r"[A-Za-z_][\w.]*(\(\))?")
OTHER_NAMES = {"SO_REUSEPORT", "Origin"}  # the system's and HTTP's
# Docstrings, strings with spaces, and comments.
PROSE = re.compile(r'"""(?:.|\n)*?"""|"[^"\n]* [^"\n]*"|(?:#|//).*')


def code(page: Path) -> Iterator[str]:
    """The page's code: blocks, without comments and with continued lines joined, and text between backquotes."""
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield from re.sub(r"\\\n\s*", " ", block).splitlines()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose))


def options(command: click.Command) -> set[str]:
    """Options of a command and of all its subcommands."""
    found = {name for each in command.params for name in (*each.opts, *each.secondary_opts)} | {"--help", "--version"}
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found |= options(command.get_command(context, name) or click.Command(name))
    return found


@functools.cache
def all_options() -> frozenset[str]:
    services = {name for config in SERVICES for name in config.model_fields}
    return frozenset(options(cli) | {f"--{name.replace('_', '-')}" for name in services})


def problem(line: str) -> str | None:
    """Says which command or option of ``line``, which begins with ``overfill``, does not exist. None means all do."""
    command: click.Command = cli
    used, _, of_a_service = line.partition(" -- ")
    for word in used.split()[1:]:
        if not isinstance(command, click.Group) or not re.fullmatch(r"[a-z][\w-]*", word):
            break
        found = command.get_command(click.Context(command), word)
        if found is None:
            return f"{line}: no command {word}"
        command = found
    known = options(command)
    unknown = [name for name in OPTION.findall(used) if name not in known]
    unknown += [name for name in OPTION.findall(of_a_service) if name not in all_options()]
    return f"{line}: no option {unknown[0]}" if unknown else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_exist(page: Path) -> None:
    lines = [match[0] for line in code(page) for match in COMMAND.finditer(line)]
    assert [found for found in map(problem, lines) if found is not None] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_on_their_own_exist(page: Path) -> None:
    names = {name for line in code(page) if not OTHER_PROGRAM.search(line) for name in OPTION.findall(line)}
    assert sorted(names - all_options() - OTHER_OPTIONS) == []


@functools.cache
def names_in_code() -> set[str]:
    """Words of the code and of the paths of its files."""
    files = [file for top in ("overfill", "services", "proto") for file in (ROOT / top).rglob("*.*")]
    sources = [file for file in files if file.suffix in (".py", ".proto")]
    words = {word for file in sources for word in re.findall(r"\w+", PROSE.sub("", file.read_text(encoding="utf-8")))}
    return words | {word for file in files for word in re.findall(r"\w+", file.relative_to(ROOT).as_posix())}


def unknown_names(page: Path) -> list[str]:
    """The names in backquotes on ``page`` that neither the code nor the list of metrics has."""
    metrics = re.findall(r"\w+", (ROOT / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8"))
    known = names_in_code() | set(metrics) | OTHER_NAMES
    named = {name for name in code(page) if NAME.fullmatch(name)}
    return sorted(name for name in named if not known.issuperset(re.findall(r"\w+", name)))


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_what_is_made_from_the_code_is_up_to_date(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == filled(page), "run `make tables`"


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_is_whole_without_the_site(page: Path) -> None:
    """A reader of the repository sees what the site shows: no page has a place that only the site's build fills."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert (
        re.findall(r"^::: .*|^--8<--.*|\]\[\w.*?\]|\{ #.*?\}|<!-- made: .* -->\n+<!-- /made", text, re.MULTILINE) == []
    )


def test_the_errors_page_explains_every_code_of_the_http_endpoint() -> None:
    files = [*(ROOT / "overfill/api/openai").glob("*.py"), *(ROOT / "services/router/http").glob("*.py")]
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    codes = set(re.findall(r'\bcode="(\w+)"', source)) | {
        f"foreign_{h}" for h in re.findall(r'foreign\("(\w+)"', source)
    }
    assert len(codes) > 15
    page = (ROOT / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")
    assert sorted(code for code in codes if f"`{code}`" not in page) == []


@pytest.mark.parametrize("page", EXPLANATION, ids=lambda page: page.name)
def test_names_in_the_explanation_exist(page: Path) -> None:
    assert unknown_names(page) == []


def test_wrong_names_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("`Relay.start` calls `Relay.no_such_step`, and `overfill_no_such_total` counts.", encoding="utf-8")
    assert unknown_names(page) == ["Relay.no_such_step", "overfill_no_such_total"]


def test_wrong_commands_are_found() -> None:
    assert problem("overfill bench peers install openvino") == "overfill bench peers install openvino: no command peers"
    assert problem("overfill up --no-such 3") == "overfill up --no-such 3: no option --no-such"
    assert problem("overfill config show decode -- --threads 4") is None
