"""Counts how much of the tree a reader meets: lines, modules, arrows, forms, and the modules that a walk passes.

``python tests/support/tree_size.py [--walks]`` prints one JSON line per figure. A walk counts the project's modules of
which a function runs: from ``overfill up`` to ready, and during one request. It starts a stack of a tiny pair whose
Python processes run under a tracer. With ``--names``, the modules of each figure follow it.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import http.client
import json
import mmap
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("overfill", "services")
ROUTER = ("services.router.main",)
SERVICES = (*ROUTER, "services.prefill.main", "services.decode.main", "services.colocated.main")
MIN_DUPLICATE = 6  # lines

# The classes and messages that carry or describe one thing, on its way through router and workers or from flags to
# processes: `module:Class`, or `v1.Message`. A change that adds or removes one changes this list. A name that is not in
# the tree is not counted and is printed as gone.
FORMS: dict[str, tuple[str, ...]] = {
    "request": (
        "services.router.http.request:Request", "overfill.api.openai.schema:ChatRequest",
        "overfill.api.openai.translate:ApiRequest", "v1.GenerateRequest", "overfill.routing.job:Job",
        "overfill.routing.relay:Relay",
        "overfill.routing.attempt:Attempt", "v1.StartDecode",
        "overfill.rpc.sequences:ServedSequence", "services.decode.sequence_session:SequenceSession",
        "overfill.engine.sequence:DecodeSequence", "v1.StartPrefill", "services.prefill.servicer:Lease",
        "overfill.engine.sequence:PrefillSequence",
    ),
    "token": (
        "overfill.model.steps:SampledToken", "overfill.engine.sequence:StepSampled",
        "overfill.engine.sequence:TokenSampled",
        "overfill.engine.sequence:PromptComputed", "v1.Tokens",
        "v1.SequenceUpdate", "v1.WorkerMessage", "overfill.routing.answer:AnswerDelta", "v1.Delta",
        "v1.GenerateResponse",
    ),
    "chunk of KV": (
        "overfill.kv.ranges:KvRange", "overfill.kv.chunks:Chunk", "v1.KvChunk", "v1.KvRange",
    ),
    "load": (
        "overfill.telemetry.engine_load:EngineLoad", "v1.WorkerLoad",
    ),
    "stack": ("overfill.stack.spec:StackSpec", "overfill.stack.placed:PlacedStack"),
    "pool": ("overfill.settings.tiers:PoolSpec",),
    "tier": (
        "overfill.settings.tiers:TierSpec", "overfill.routing.tier:Tier", "overfill.routing.tier:TierChoice",
    ),
}  # fmt: skip

# What the phases of a walk are called; the byte in the shared file is the index.
PHASES = ("start", "other", "idle", "chat", "grpc")


def lines_of(files: Iterable[Path]) -> int:
    """Returns the number of lines, blank ones and comments included."""
    return sum(file.read_text(encoding="utf-8").count("\n") for file in files)


def module_file(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# ---- What imports what ----


class Imports:
    """The product's modules and the imports between them, those in functions included."""

    def __init__(self) -> None:
        import grimp  # of the tools that check imports; the walks do not need it

        sys.path.insert(0, str(ROOT))
        self._graph = grimp.build_graph(*PRODUCT, cache_dir=None)
        self.modules = self._graph.modules
        self.arrows = self._graph.count_imports()

    def closure(self, starts: Iterable[str]) -> set[str]:
        """Returns the modules that these import, directly or not, with the packages that contain them.

        The imports of a containing package's ``__init__`` are not followed: the one of ``overfill`` names the library.
        """
        found: set[str] = set()
        todo = [start for start in starts if start in self.modules]
        while todo:
            module = todo.pop()
            if module not in found:
                found.add(module)
                todo += self._graph.find_modules_directly_imported_by(module)
        return found | {parent for module in found for parent in _parents(module)}

    def packages(self) -> tuple[int, int]:
        """Returns the number of packages of the map, and of arrows between them."""

        def package(module: str) -> str:
            return module if module_file(module).name == "__init__.py" else module.rpartition(".")[0]

        arrows = {
            (package(module), package(imported))
            for module in self.modules
            for imported in self._graph.find_modules_directly_imported_by(module)
        }
        return len({package(module) for module in self.modules}), sum(one != other for one, other in arrows)


def _parents(module: str) -> Iterator[str]:
    while "." in module:
        module = module.rpartition(".")[0]
        yield module


# ---- Copied lines ----


def duplicates(files: Iterable[Path]) -> list[tuple[str, str, int]]:
    """Returns the places where at least ``MIN_DUPLICATE`` lines stand twice: two places and the number of lines.

    Imports, blank lines, comments and docstrings do not count as lines; generated files are left out.
    """
    places: defaultdict[tuple[str, ...], list[tuple[Path, int]]] = defaultdict(list)
    texts: dict[Path, list[tuple[int, str]]] = {}
    for file in files:
        texts[file] = kept = list(_code_lines(file.read_text(encoding="utf-8")))
        for index in range(len(kept) - MIN_DUPLICATE + 1):
            places[tuple(text for _, text in kept[index : index + MIN_DUPLICATE])].append((file, index))
    found = []
    seen: set[tuple[Path, int, Path, int]] = set()
    for same in places.values():
        for (one, i), (other, j) in pairwise(same):
            if (one, i - 1, other, j - 1) not in seen:
                length = MIN_DUPLICATE
                while (
                    max(i + length - len(texts[one]), j + length - len(texts[other])) < 0
                    and texts[one][i + length][1] == texts[other][j + length][1]
                ):
                    length += 1
                found.append(
                    (f"{module_name(one)}:{texts[one][i][0]}", f"{module_name(other)}:{texts[other][j][0]}", length)
                )
            seen.add((one, i, other, j))
    return found


def _code_lines(source: str) -> Iterator[tuple[int, str]]:
    skipped = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        ):
            skipped |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    for number, line in enumerate(source.splitlines(), 1):
        text = line.strip()
        if number not in skipped and text and not text.startswith("#"):
            yield number, text


# ---- Forms ----


def exists(form: str) -> bool:
    """Says whether the class ``module:Class`` or the message ``v1.Message`` is in the tree."""
    if form.startswith("v1."):
        pattern = re.compile(rf"^\s*message {form.rpartition('.')[2]} ", re.MULTILINE)
        return any(pattern.search(file.read_text(encoding="utf-8")) for file in ROOT.glob("proto/overfill/v1/*.proto"))
    module, _, name = form.partition(":")
    file = module_file(module)
    return (
        file.exists()
        and re.search(rf"^(class {name}\b|{name}\b.* = )", file.read_text(encoding="utf-8"), re.MULTILINE) is not None
    )


def options_by_hand() -> list[str]:
    """Returns the options of ``overfill up`` whose help is text in the modules ``overfill/cli/up*.py``."""
    found = []
    for file in sorted(ROOT.glob("overfill/cli/up*.py")):
        for call in (
            node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
        ):
            written = any(
                word.arg == "help" and isinstance(word.value, (ast.Constant, ast.JoinedStr)) for word in call.keywords
            )
            if written and call.args:
                found.append(ast.unparse(call.args[0]))
    return found


# ---- Walks ----


class Walks:
    """The functions that run in each phase, by process, as tracers of the processes have written them to ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._functions: defaultdict[str, set[tuple[str, str]]] = defaultdict(set)
        self._first: defaultdict[str, set[tuple[str, str]]] = defaultdict(set)
        for file in folder.glob("*.trace"):
            for line in file.read_text(encoding="utf-8").splitlines():
                phase, module, function = line.split(" ", 2)
                self._functions[phase].add((module, function))
                if "cli.main" in file.name:
                    self._first[phase].add((module, function))

    def modules(self, phase: str, *, command_only: bool = False) -> set[str]:
        """Returns the modules of which a function runs in the phase, but not when the stack is idle.

        ``command_only`` leaves out the processes that the command starts.
        """
        functions = (self._first if command_only else self._functions)[phase]
        return {module for module, _ in (functions if phase == "start" else functions - self._functions["idle"])}


def walk(*flags: str, folder: Path) -> Walks:
    """Starts a stack with these flags, sends a streamed chat over HTTP and one request over gRPC, and stops it."""
    from overfill.client import Client, Message, SamplingParams

    with open(folder / "phase", "wb") as file:
        file.write(b"\0")
    grpc, http_port = _free_ports(2)
    argv = ["up", *flags, "--grpc", str(grpc), "--http", str(http_port)]
    stack = subprocess.Popen(
        [sys.executable, __file__, "--under", str(folder), "overfill.cli.main", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert stack.stdout is not None
    lines = []
    try:
        for line in stack.stdout:
            lines.append(line)
            if line.startswith("OverFill is up"):
                break
        else:
            raise SystemExit("the stack did not start:\n" + "".join(lines[-30:]))
        threading.Thread(target=stack.stdout.read, daemon=True).start()
        with Client(f"127.0.0.1:{grpc}") as client:

            def ask() -> None:
                with client.stream([Message("user", "Why?")], sampling=SamplingParams(max_tokens=8)) as stream:
                    for _ in stream:
                        pass

            _enter(folder, "other")
            _chat(http_port)
            ask()
            for phase, act in (("idle", lambda: None), ("chat", lambda: _chat(http_port)), ("grpc", ask)):
                _enter(folder, "other")
                time.sleep(2)  # what follows an answer is over
                _enter(folder, phase)
                act()
                time.sleep(5 if phase == "idle" else 1)
            _enter(folder, "other")
    finally:
        stack.send_signal(signal.SIGINT)
        stack.wait(60)
    return Walks(folder)


def _chat(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"model": "default", "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 8, "stream": True}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    text = response.read()
    assert response.status == 200, text
    connection.close()


def _enter(folder: Path, phase: str) -> None:
    with open(folder / "phase", "r+b") as file:
        file.write(bytes([PHASES.index(phase)]))


def _free_ports(count: int) -> list[int]:
    import socket

    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def run_under_tracer(folder: Path, module: str, argv: Sequence[str]) -> None:
    """Runs ``python -m module argv`` in this process, and writes which functions of the product run in which phase."""
    with open(folder / "phase", "rb") as file:
        phase = mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_READ)
    out = os.open(folder / f"{os.getpid()}-{module}.trace", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    prefixes = tuple(f"{ROOT / top}{os.sep}" for top in PRODUCT)
    seen: list[dict[int, CodeType]] = [{} for _ in PHASES]

    def on_event(frame: FrameType, event: str, arg: object) -> None:
        code = frame.f_code
        if event != "call" or id(code) in seen[phase[0]]:
            return
        seen[phase[0]][id(code)] = code  # kept, so that no other code gets its id
        # Modules and bodies of classes are code without fast locals; they run at import.
        if code.co_filename.startswith(prefixes) and code.co_flags & 1:
            text = f"{PHASES[phase[0]]} {module_name(Path(code.co_filename))} {code.co_qualname}\n"
            os.write(out, text.encode())

    start = subprocess.Popen.__init__

    def start_under_tracer(self: Any, args: Any, *more: Any, **named: Any) -> None:
        if isinstance(args, (list, tuple)) and sys.executable in args:
            at = list(args).index(sys.executable)
            if list(args[at + 1 : at + 2]) == ["-I"]:  # the wrapper that ties a child to its parent
                at = next((i for i, arg in enumerate(args) if i > at and arg == sys.executable), at)
            if list(args[at + 1 : at + 2]) == ["-m"]:
                args = [*args[: at + 1], __file__, "--under", str(folder), *args[at + 2 :]]
        start(self, args, *more, **named)

    subprocess.Popen.__init__ = start_under_tracer  # type: ignore[method-assign]
    sys.argv = [module, *argv]
    sys.path[0] = str(ROOT)
    threading.setprofile(on_event)
    sys.setprofile(on_event)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


# ---- The figures ----


def print_figure(name: str, names: Iterable[object] | None = None, **figures: object) -> None:
    print(json.dumps({"figure": name, **figures}))
    for each in names or ():
        print("  ", each)


def print_sizes(show: bool) -> None:
    imports = Imports()
    for name, starts in (("router", ROUTER), ("services", SERVICES)):
        closure = imports.closure(starts)
        print_figure(
            f"closure of {name}",
            sorted(closure) if show else None,
            lines=lines_of(map(module_file, closure)),
            modules=len(closure),
        )
    product = sorted(file for top in PRODUCT for file in (ROOT / top).rglob("*.py"))
    packages, arrows = imports.packages()
    print_figure(
        "overfill and services", lines=lines_of(product), modules=len(imports.modules), imports=imports.arrows,
        packages=packages, arrows=arrows,
    )  # fmt: skip
    tests = sorted((ROOT / "tests").rglob("*.py"))
    print_figure("tests", lines=lines_of(tests), modules=len(tests))
    written = [file for file in product if "v1" not in file.parts and file.name != "sync.py"]
    copies = duplicates(written)
    print_figure("duplicates", copies if show else None, places=len(copies), lines=sum(length for *_, length in copies))
    for name, forms in FORMS.items():
        there = [form for form in forms if exists(form)]
        print_figure(
            f"forms of {name}", there if show else None, forms=len(there), gone=[f for f in forms if f not in there]
        )
    options = options_by_hand()
    print_figure("options of up written by hand", options if show else None, options=len(options))


def print_walks(show: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        from overfill.making.tiny import make_tiny_pair

        pair = make_tiny_pair(Path(name) / "default")
        for stack, workers in (("split", ("--prefill", "1", "--decode", "1")), ("colocated", ("--colocated", "1"))):
            folder = Path(name) / stack
            folder.mkdir()
            walks = walk("--no-ray", "--pair", str(pair), *workers, folder=folder)
            command = walks.modules("start", command_only=True)
            every = walks.modules("start")
            chat, grpc = walks.modules("chat"), walks.modules("grpc")
            for what, modules in (
                ("up, the command", command), ("up, all processes", every),
                ("chat", chat), ("grpc", grpc), ("chat and grpc", chat | grpc),
            ):  # fmt: skip
                print_figure(f"walk: {stack}, {what}", sorted(modules) if show else None, modules=len(modules))


def main() -> None:
    if sys.argv[1:2] == ["--under"]:
        run_under_tracer(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--walks", action="store_true", help="start stacks and count what runs")
    parser.add_argument("--names", action="store_true", help="print the names of what is counted")
    options = parser.parse_args()
    print_sizes(options.names)
    if options.walks:
        print_walks(options.names)


if __name__ == "__main__":
    main()
