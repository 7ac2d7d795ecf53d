"""Tests that keys, secrets and prompts appear in no log, error, metric or process title of a stack."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from http_calls import call
from stacks import children, running_stack

from overfill.api import key_file as keys
from overfill.client import Client, OverfillError, SamplingParams
from overfill.rpc.access import Scope

PROMPT = "Nobody else shall read that the treasure lies under the third oak."


def ask(url, path, key, body=None, scheme="Bearer"):
    """Makes a request; returns the whole response."""
    reply = call(f"{url}{path}", body, {"authorization": f"{scheme} {key}"})
    return str(reply.headers) + reply.body.decode()


def test_secrets_and_prompts_appear_nowhere(tiny_pair, tmp_path):
    file = tmp_path / "keys.json"
    key = keys.create(file, "ci", scopes=list(Scope))
    few = keys.create(file, "few", scopes=["infer"])
    wrong = "ofk-this-is-somebody-s-mistyped-key"
    said = []
    with running_stack(tiny_pair, http=0, api_keys=file, log_level="debug") as (stack, address):
        url = stack.spec.openai_urls(stack.placed.addresses)[0].removesuffix("/v1")
        secret = stack.placed.secret
        good = {"model": "tiny", "prompt": PROMPT, "max_tokens": 3}
        for shown, scheme in (
            (key, "Bearer"),
            (few, "Bearer"),
            (wrong, "Bearer"),
            (key, "Token"),
            (f"{key} x", "Bearer"),
        ):
            for path in ("/status", "/metrics", "/version", "/nothing", f"/v1/models/{'x' * 50}"):
                said.append(ask(url, path, shown, scheme=scheme))
            # Answers contain the model's text only, and errors name the field only; neither repeats the prompt.
            said.append(ask(url, "/v1/completions", shown, good, scheme))
            for bad in (
                {"temperature": 99},
                {"max_tokens": 10**6},
                {"model": "other"},
                {"stop": [PROMPT] * 99},
                {"n": 0},
            ):
                said.append(ask(url, "/v1/completions", shown, good | bad, scheme))
        for shown in (key, few, wrong, secret, None):
            with Client(address, api_key=shown) as client:
                for act in (
                    lambda c: c.generate(PROMPT, sampling=SamplingParams(max_tokens=2)),
                    lambda c: c.generate(PROMPT, sampling=SamplingParams(max_tokens=2), timeout=1e-4),
                    lambda c: c.generate(PROMPT * 50, sampling=SamplingParams(max_tokens=2)),
                    lambda c: c.status(),
                    lambda c: c.drain("nobody"),
                ):
                    try:
                        act(client)
                    except OverfillError as error:
                        said.append(f"{error} {error!r}")
        with Client(address, api_key=key) as client:
            status = client.status()
        for where in [status.process.metrics_address, *(worker.process.metrics_address for worker in status.workers)]:
            for shown in (key, few, wrong):
                said.append(ask(f"http://{where}", "/metrics", shown))
                said.append(ask(f"http://{where}", "/targets", shown))
        titles = []
        for stage in ("router", "prefill", "decode"):
            for child in children(stack, stage):
                titles.append(Path(f"/proc/{child.pid}/cmdline").read_text())
                titles.append(Path(f"/proc/{child.pid}/environ").read_text())
                titles.append(Path(f"/proc/{child.pid}/comm").read_text())
    told = {"log": "\n".join(stack.lines), "answers": "\n".join(said), "titles": "\n".join(titles)}
    assert len(stack.lines) > 10
    assert "overfill_router_requests_total" in told["answers"]
    secrets = {"the key": key, "another": few, "a wrong key": wrong, "the stack's secret": secret, "the prompt": PROMPT,
               "the prompt's words": "treasure"}  # fmt: skip
    hashes = {f"the hash of {entry.name}": entry.sha256 for entry in keys.load(file)}
    found = [
        (where, what) for where, text in told.items() for what, value in (secrets | hashes).items() if value in text
    ]
    assert not found


@pytest.mark.parametrize("name", ["api_keys", "stack_secret"])
def test_a_damaged_file_of_secrets_is_not_quoted(tiny_pair, tmp_path, name, capsys):
    from overfill.errors import OverfillError as Error
    from overfill.settings.config import RouterConfig

    file = tmp_path / "file"
    file.write_text("hunter2\x01")
    config = RouterConfig.parse(
        [f"--pair={tiny_pair}", "--stack-secret", str(tmp_path / "s"), f"--{name.replace('_', '-')}={file}"]
    )
    (tmp_path / "s").write_text("a good secret of the stack")
    with contextlib.redirect_stdout(None), pytest.raises(Error) as error:
        config.access()
    assert "hunter2" not in str(error.value)
