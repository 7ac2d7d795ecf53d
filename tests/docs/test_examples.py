"""Every example runs as its docstring says, against one stack of real processes, and prints what it promises.

The commands come from the docstrings. Only addresses differ, so that the tests need no fixed port.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from stacks import running_stack, wait_until

from overfill.client import Client
from overfill.pair.store import resolve_pair
from overfill.stack.ports import free_ports

nbformat = pytest.importorskip("nbformat", reason="needs the extra `examples`: make test-docs")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PAGE = ROOT / "docs" / "how-to" / "examples.md"
COMMAND = re.compile(r"^ *\$ (.+)$", re.MULTILINE)
TIMEOUT = 120.0  # of one command, in seconds

pytestmark = [pytest.mark.model, pytest.mark.timeout(1800)]  # the first use makes the pair, in minutes


def commands(name: str) -> list[str]:
    """The commands of an example's docstring, or of a notebook's first cell."""
    if name.endswith(".ipynb"):
        text = nbformat.read(EXAMPLES / name, 4).cells[0].source
    else:
        text = ast.get_docstring(ast.parse((EXAMPLES / name).read_text(encoding="utf-8"))) or ""
    return COMMAND.findall(text)


@pytest.fixture(scope="module")
def stack() -> Iterator[dict[str, str]]:
    """Yields the environment of a user whose stack is not at the default addresses."""
    pair = resolve_pair("default")
    settings = {"dtype": None, "kv_memory": "256MiB", "max_model_len": "2048"}
    with running_stack(pair, 0, 0, colocated=1, http=0, **settings) as (stack, address):
        yield {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "OVERFILL_ADDRESS": address,
            "OPENAI_BASE_URL": stack.spec.openai_urls([address])[0],
            "LOCUST_HOST": f"grpc://{address}",
        }


def run(command: str, environment: dict[str, str]) -> list[str]:
    """Runs a command as a user of the checkout would. Returns the lines that it prints."""
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    print(f"$ {command}\n{done.stdout}{done.stderr}")
    assert done.returncode == 0
    return done.stdout.splitlines()


def test_every_example_is_in_the_table_with_its_command() -> None:
    page = PAGE.read_text(encoding="utf-8")
    files = (path for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb"))
    names = sorted(path.name for path in files if not path.stem.endswith("-run"))  # that is a notebook's output
    rows = re.findall(r"^\| `examples/([\w.]+)` \|.*\| `(.+)` \|$", page, re.MULTILINE)
    assert rows == [(name, commands(name)[0]) for name, _ in rows]
    assert sorted(name for name, _ in rows) == names


def test_stream(stack: dict[str, str]) -> None:
    printed = run(commands("stream.py")[0], stack)
    assert "80 tokens; ended by 'length'; seed 1" in printed
    assert re.fullmatch(r"  return_path +\d+\.\d ms", printed[-1])


def test_asyncio_deadlines(stack: dict[str, str]) -> None:
    printed = run(commands("asyncio_deadlines.py")[0], stack)
    outcomes = {line[14:]: int(line[:3]) for line in printed[:-1]}
    assert sum(outcomes.values()) == 24
    assert outcomes["cancelled after its first tokens"] == outcomes["finished, length"] == 8
    assert re.fullmatch(r"KV blocks in use: at most [1-9]\d* while the requests ran, 0 now", printed[-1])


def test_tools(stack: dict[str, str]) -> None:
    called, answer = run(commands("tools.py")[0], stack)
    assert re.fullmatch(r'weather\(\{"city": "\w+"\}\) -> \{.*\}', called)
    assert re.fullmatch(r"It is -?\d+ degrees and \w+ in \w+\.", answer)


def test_json_schema(stack: dict[str, str]) -> None:
    title, *ingredients = run(commands("json_schema.py")[0], stack)
    assert re.fullmatch(r"[A-Za-z ]+ \((easy|medium|hard)\)", title)
    assert 2 <= len(ingredients) <= 4
    assert all(re.fullmatch(r" +\d+ g [A-Za-z ]+", line) for line in ingredients)


def test_several_answers(stack: dict[str, str]) -> None:
    printed = run(commands("several_answers.py")[0], stack)
    shares = [float(line.partition("%")[0]) for line in printed[:4]]
    assert shares == sorted(shares, reverse=True)
    assert len(set(printed[:4])) == 4
    assert len(printed) == 7


def test_openai_client(stack: dict[str, str]) -> None:
    *_, parsed, called = run(commands("openai_client.py")[0], stack)
    assert re.fullmatch(r"schema: City\(name='.+', country='.+'\)", parsed)
    assert re.fullmatch(r'tool call: weather \{"city": "(Cairo|Oslo|Paris)"\}', called)


def test_agent(stack: dict[str, str]) -> None:
    called, advice, used = run(commands("agent.py")[0], stack)
    assert called.startswith("weather('Oslo') -> -3 degrees")
    assert re.fullmatch(r"Advice\(degrees=-?\d+, sky='\w+', wear='a .+'\)", advice)
    assert used.startswith("2 requests, ")


@contextmanager
def started(command: str, environment: dict[str, str], url: str) -> Iterator[None]:
    """Runs a server until the end of the block, which begins when ``url`` can be reached."""
    with subprocess.Popen(["bash", "-c", f"exec {command}"], cwd=ROOT, env=environment) as process:
        try:
            wait_until(lambda: process.poll() is not None or reachable(url), TIMEOUT, url)
            assert process.poll() is None
            yield
        finally:
            process.terminate()


def reachable(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=10).close()
    except urllib.error.HTTPError as answered:
        answered.close()
    except OSError:
        return False
    return True


def cancelled(address: str) -> float:
    """The number of requests that the router has seen cancelled."""
    with Client(address) as client:
        metrics = client.status().process.metrics_address
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=10) as response:
        families = text_string_to_metric_families(response.read().decode())
    samples = [sample for family in families for sample in family.samples]
    return sum(
        sample.value
        for sample in samples
        if sample.name == "overfill_router_requests_total" and sample.labels["outcome"] == "cancelled"
    )


def test_fastapi_app(stack: dict[str, str]) -> None:
    [port] = free_ports("127.0.0.1", 1)
    start, *asks = (command.replace("8080", str(port)) for command in commands("fastapi_app.py"))
    with started(start, stack, f"http://127.0.0.1:{port}/docs"):
        streamed, answered = (run(ask, stack) for ask in asks)
        assert "".join(streamed).strip()
        assert json.loads(answered[0])["tokens"] > 0

        before = cancelled(stack["OVERFILL_ADDRESS"])
        url = f"http://127.0.0.1:{port}/stream?question=Write+a+long+story."
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            assert response.read(1)
        wait_until(lambda: cancelled(stack["OVERFILL_ADDRESS"]) == before + 1, 30, "the request is cancelled", 0.2)

        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{url[: url.index('?')]}?question={'word+' * 4000}", timeout=TIMEOUT)
        with refused.value as error:
            assert error.code == 400
            assert "prompt" in json.load(error)["error"]


def test_locustfile(stack: dict[str, str]) -> None:
    printed = run(f"{commands('locustfile.py')[0]} 2>&1", stack)  # locust prints its tables on stderr
    rows = {match[1]: int(match[2]) for line in printed if (match := re.match(r"gRPC +(\w.*?) +(\d+) +0\(", line))}
    assert set(rows) == {f"{kind} {what}" for kind in ("question", "turn") for what in ("TTFT", "ITL", "end to end")}
    assert rows["question end to end"] == rows["question TTFT"] > 0


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="the program prometheus is missing")
def test_prometheus_dashboards(stack: dict[str, str]) -> None:
    title, *rows = run(commands("prometheus_dashboards.py")[0], stack)
    assert title == "Overfill / Overview"
    shown = {row[:30].strip(): row[30:] for row in rows}
    assert float(shown["Tokens/s"]) > 0
    assert re.search(r"\bok [\d.]*[1-9]", shown["Requests by outcome"])
    assert not [row for row in rows if "no data" in row]


def test_the_notebook_builds_judges_and_draws_a_pair(tiny_pair: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(EXAMPLES / "pair.ipynb", 4)
    assert not [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")]
    [parameters] = [at for at, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
    given = f"FULL_MODEL, OUT = {str(tiny_pair / 'full')!r}, {str(tmp_path / 'pair')!r}"
    notebook.cells.insert(parameters + 1, nbformat.v4.new_code_cell(given))
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert [output for output in outputs if "image/png" in output.get("data", {})]
    assert "two-stage" in "".join(output.get("text", "") for output in outputs)
    assert (tmp_path / "pair" / "pair.json").is_file()
