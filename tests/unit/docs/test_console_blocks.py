"""The commands of a page are found as a reader types them, and their output is compared as a reader compares it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from console_blocks import PAGES, ROOT, SavedFile, Step, read
from console_terminal import Terminal, matches, terminals

PAGE = """
```console title="Terminal 1"
$ server --port 1 \\
    --quiet
ready on port 7600
```

<!-- not run: needs a GPU -->
```console
$ server --device cuda
```

```python title="ask.py"
print("answer")
```

- A step of a list:

    <!-- output varies -->

    ```console title="Terminal 2"
    $ python ask.py
    answer
    ```

```console
^C
stopped
```
"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    return path


def test_steps_files_and_marks_are_found_in_the_order_of_the_page(page: Path) -> None:
    serve, saved, ask, stop = read(page)  # and no block that is marked as not run
    assert isinstance(serve, Step)
    assert isinstance(ask, Step)
    assert isinstance(stop, Step)
    assert (serve.terminal, serve.command) == ("Terminal 1", "server --port 1 \\\n    --quiet")
    assert (serve.output, serve.until_ctrl_c) == (["ready on port 7600"], True)
    assert saved == SavedFile("ask.py", 'print("answer")\n')
    assert (ask.terminal, ask.output, ask.varies, ask.until_ctrl_c) == ("Terminal 2", ["answer"], True, False)
    assert (stop.terminal, stop.command) == ("Terminal 1", "^C")


def test_a_block_that_begins_with_output_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```console\nready\n```\n")
    with pytest.raises(ValueError, match="line 2: a console block begins with"):
        read(page)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```console\n$ overfill up\n…\n```\n", r"'overfill up' needs a \^C later in Terminal 1"),
        ("<!-- not run; needs a GPU -->\n```console\n$ true\n```\n", "line 1: a block's mark is"),
        ("<!-- output varies\n-->\n```console\n$ true\n```\n", "a block's mark is"),
        ("```console\n$ pip install vllm\n```\n", "'pip install vllm' needs a mark"),
        ("```console\n$ cd x && docker compose up\n```\n", "needs a mark"),
        ("<!-- output varies -->\n```console\n$ overfill up\nup\n^C\n```\n", "show the line of 'overfill up'"),
    ],
)
def test_what_cannot_run_safely_is_refused(text: str, said: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match=said):
        read(page)


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        (["ready in 3.1 s"], ["ready in 12 s"], True),
        (["ready in 3.1 s"], ["ready soon"], False),
        (["a", "b"], ["a"], False),
        (["a"], ["a", "b"], False),
        (["a", "…"], ["a", "b", "c"], True),
        (["…", "c"], ["a", "b", "c"], True),
        (["a", "…", "c"], ["a", "c"], True),
        (["a", "…", "d"], ["a", "b", "c"], False),
        (["prefill-fast-uglsbpxa ready"], ["prefill-fast-erhtvqji ready"], True),
        (["worker decode-0a1b2c3d joined"], ["worker decode-99887766 joined"], True),
        (["Because … blue."], ["Because air scatters blue."], True),
        (["a   b"], ["", "a b", ""], True),
        (["6/6 correct, 0 ties"], ["32/32 correct, 0 ties"], True),
        (["6/6 correct, 0 ties"], ["5/6 correct, 0 ties"], False),
        (["answered 24 of 24, 0 failed"], ["answered 30 of 30, 2 failed"], False),
        (["up", "gRPC"], ["up", "(ServeReplica:overfill:worker pid=15512) INFO joined", "gRPC"], True),
    ],
)
def test_output_is_compared_without_numbers_and_with_gaps(shown: list[str], printed: list[str], same: bool) -> None:
    assert matches(shown, printed, whole=True) is same


def test_a_terminal_keeps_its_state_reports_a_status_and_obeys_ctrl_c(tmp_path: Path) -> None:
    with terminals(tmp_path, os.environ) as opened:
        shell = opened["Terminal 1"] = Terminal(tmp_path, os.environ)
        shell.start("export WHO=reader")
        assert shell.wait(20) == 0
        shell.start('printf "half\\rhello %s\\n" $WHO; false')
        assert shell.wait(20) == 1
        assert shell.lines == ["hello reader"]
        shell.start("echo up; sleep 100")
        assert shell.wait_for(["up"], 20)
        assert shell.wait(0) is None
        shell.press_ctrl_c()
        assert shell.wait(20) == 130


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_is_in_a_console_block(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [fence for fence in ("```sh", "```bash", "```shell") if fence in text] == []
    assert read(page) is not None
