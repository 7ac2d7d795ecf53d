"""What we make of every field of OpenAI's reference: the cases that tests run, and the table that docs show.

``python tests/integration/openai_cases.py`` writes the table into ``docs/openai.md``; a test fails when it is not what
the cases say, or when a case is not what the server does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

DOCS = Path(__file__).parents[2] / "docs" / "openai.md"
BEGIN, END = "<!-- conformance: begin -->", "<!-- conformance: end -->"

Status = Literal["supported", "refused", "ignored"]
Ask = Callable[..., Any]
"""Sends the endpoint's plain request with more fields; the answer, or with ``stream`` the chunks."""


@dataclass(frozen=True)
class Case:
    """One field.

    Attributes:
        value: that a refused field is refused with, and that changes nothing where it is ignored.
        check: raises unless a supported field has its effect.
        note: for the table.
    """

    name: str
    status: Status
    note: str = ""
    value: Any = None
    check: Callable[[Ask], None] | None = None


def text(answer: dict[str, Any]) -> str:
    """Of the first choice."""
    choice = answer["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def differs(**fields: Any) -> Callable[[Ask], None]:
    def check(ask: Ask) -> None:
        assert text(ask(**fields)) != text(ask())

    return check


def _n(ask: Ask) -> None:
    answer = ask(n=3)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert text(answer) == text(ask())


def _max_tokens(ask: Ask) -> None:
    answer = ask(max_tokens=3)
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"


def _max_completion_tokens(ask: Ask) -> None:
    answer = ask(max_tokens=None, max_completion_tokens=3)
    assert answer["usage"]["completion_tokens"] == 3


def _stop(ask: Ask) -> None:
    whole = text(ask())
    word = whole.split()[1]
    for stop in (word, [word, "never"]):
        answer = ask(stop=stop)
        assert text(answer) == whole[: whole.index(word)]
        assert answer["choices"][0]["finish_reason"] == "stop"


def _stream(ask: Ask) -> None:
    chunks = ask(stream=True)
    pieces = [c["choices"][0].get("text") or c["choices"][0].get("delta", {}).get("content") or "" for c in chunks]
    assert "".join(pieces) == text(ask())


def _stream_options(ask: Ask) -> None:
    chunks = ask(stream=True, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == ask()["usage"]["completion_tokens"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def _seed(ask: Ask) -> None:
    assert text(ask(seed=5)) == text(ask(seed=5))
    assert len({text(ask(seed=seed)) for seed in range(-3, 4)}) > 1


def _temperature(ask: Ask) -> None:
    assert text(ask(temperature=0, seed=1)) == text(ask(temperature=0, seed=2))


def _top_p(ask: Ask) -> None:
    assert text(ask(top_p=0, seed=1)) == text(ask(top_p=0, seed=2)) == text(ask(temperature=0))


def _logit_bias(ask: Ask) -> None:
    assert len(set(text(ask(logit_bias={"70": 100})))) == 1


def _accepted(**fields: Any) -> Callable[[Ask], None]:
    """Takes it; that it has its effect on logits is tested with real workers, not with these."""

    def check(ask: Ask) -> None:
        assert ask(**fields)["choices"]

    return check


def _logprobs(ask: Ask) -> None:
    scores = ask(logprobs=True)["choices"][0]["logprobs"]["content"]
    assert "".join(score["token"] for score in scores) == text(ask())


def _top_logprobs(ask: Ask) -> None:
    scores = ask(logprobs=True, top_logprobs=4)["choices"][0]["logprobs"]["content"]
    assert all(len(score["top_logprobs"]) == 4 for score in scores)


def _old_logprobs(ask: Ask) -> None:
    choice = ask(logprobs=3)["choices"][0]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    assert all(1 <= len(top) <= 3 for top in choice["logprobs"]["top_logprobs"])


SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "pick", "parameters": SCHEMA}}


def _response_format(ask: Ask) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    assert json.loads(text(ask(response_format=wanted, max_tokens=60)))["n"] in (1, 2)
    assert text(ask(response_format={"type": "json_object"}, max_tokens=3)).startswith("{")
    assert text(ask(response_format={"type": "text"})) == text(ask())


def _tools(ask: Ask) -> None:
    message = ask(tools=[TOOL], tool_choice="required", max_tokens=200)["choices"][0]["message"]
    assert json.loads(message["tool_calls"][0]["function"]["arguments"])["n"] in (1, 2)


def _tool_choice(ask: Ask) -> None:
    other = {"type": "function", "function": {"name": "other"}}
    named = {"type": "function", "function": {"name": "pick"}}
    message = ask(tools=[other, TOOL], tool_choice=named, max_tokens=200)["choices"][0]["message"]
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["pick"]
    assert "tool_calls" not in ask(tools=[TOOL], tool_choice="none")["choices"][0]["message"]
    assert ask(tools=[TOOL], tool_choice="auto")["choices"]


def _parallel(ask: Ask) -> None:
    fields = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 200, "parallel_tool_calls": False}
    assert len(ask(**fields)["choices"][0]["message"]["tool_calls"]) == 1


def _messages(ask: Ask) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}], "name": "me"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "pick", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "1", "tool_call_id": "c"},
    ]
    assert ask(messages=messages)["usage"]["prompt_tokens"] > ask()["usage"]["prompt_tokens"]


def _prompt(ask: Ask) -> None:
    for prompt, count in (("x", 1), (["x", "y"], 2), ([70, 71], 1), ([[70], [71, 72]], 2)):
        assert len(ask(prompt=prompt)["choices"]) == count


def _echo(ask: Ask) -> None:
    assert text(ask(prompt="Say:", echo=True)) == "Say:" + text(ask(prompt="Say:"))


def _model(ask: Ask) -> None:
    assert ask()["model"]


SHARED = [
    Case("model", "supported", "another name is 404 `model_not_found`", check=_model),
    Case(
        "frequency_penalty",
        "supported",
        "at the first token and at every later one",
        check=_accepted(frequency_penalty=1),
    ),
    Case("logit_bias", "supported", "keys are token ids of the served model; at most 1,024", check=_logit_bias),
    Case("max_tokens", "supported", "more than the context leaves is 400 `context_length_exceeded`", check=_max_tokens),
    Case("n", "supported", "up to 128; every choice is an answer of its own under one seed", check=_n),
    Case("presence_penalty", "supported", "as `frequency_penalty`", check=_accepted(presence_penalty=1)),
    Case("seed", "supported", "the same seed gives the same answer", check=_seed),
    Case("stop", "supported", "up to 4 strings; found wherever tokens are cut", check=_stop),
    Case("stream", "supported", "server-sent events", check=_stream),
    Case("stream_options", "supported", "`include_usage`; `include_obfuscation` is ignored", check=_stream_options),
    Case("temperature", "supported", "0 to 2; 0 is greedy", check=_temperature),
    Case("top_p", "supported", "", check=_top_p),
    Case("user", "ignored", "", value="someone"),
]

CHAT = [
    *SHARED,
    Case(
        "messages",
        "supported",
        "text only; roles system, developer (as system), user, assistant, tool",
        check=_messages,
    ),
    Case("audio", "refused", "", value={"voice": "x", "format": "wav"}),
    Case("function_call", "refused", "replaced by `tool_choice`", value="auto"),
    Case("functions", "refused", "replaced by `tools`", value=[]),
    Case("logprobs", "supported", "after penalties, bias and grammar, before temperature and filters", check=_logprobs),
    Case("max_completion_tokens", "supported", "as `max_tokens`; give one of them", check=_max_completion_tokens),
    Case("metadata", "ignored", "", value={"a": "b"}),
    Case("modalities", "refused", 'but for `["text"]`', value=["text", "audio"]),
    Case("moderation", "refused", "", value={"model": "x"}),
    Case("parallel_tool_calls", "supported", "", check=_parallel),
    Case("prediction", "refused", "", value={"type": "content", "content": "x"}),
    Case("prompt_cache_key", "ignored", "", value="k"),
    Case("prompt_cache_options", "ignored", "", value={}),
    Case("prompt_cache_retention", "ignored", "", value="24h"),
    Case("reasoning_effort", "refused", "as OpenAI does for models that do not reason", value="low"),
    Case(
        "response_format",
        "supported",
        "`json_object`, `json_schema` (always strict); what the grammar library cannot obey is 400",
        check=_response_format,
    ),
    Case("safety_identifier", "ignored", "", value="x"),
    Case("service_tier", "ignored", "", value="auto"),
    Case("store", "ignored", "nothing is stored", value=True),
    Case("tool_choice", "supported", "`none`, `auto`, `required`, or a function", check=_tool_choice),
    Case("tools", "supported", "functions; calls follow a grammar, so their arguments always fit", check=_tools),
    Case("top_logprobs", "supported", "0 to 20", check=_top_logprobs),
    Case("verbosity", "refused", "as OpenAI does for models that have none", value="low"),
    Case("web_search_options", "refused", "", value={}),
]

COMPLETIONS = [
    *SHARED,
    Case("prompt", "supported", "text, token ids, or an array of either", check=_prompt),
    Case("best_of", "refused", "but for 1 and the value of `n`", value=3),
    Case("echo", "supported", "400 together with `logprobs`: prompts are not scored", check=_echo),
    Case("logprobs", "supported", "0 to 5", check=_old_logprobs),
    Case("suffix", "refused", "", value="x"),
]

EXTENSIONS = [
    Case("top_k", "supported", "0 and -1 are all tokens", check=_accepted(top_k=5)),
    Case("min_p", "supported", "", check=_accepted(min_p=0.1)),
    Case(
        "repetition_penalty",
        "supported",
        "over prompt and answer, as Hugging Face; 0.01 to 100",
        check=_accepted(repetition_penalty=2),
    ),
    Case("ignore_eos", "supported", "", check=_accepted(ignore_eos=True)),
    Case("stop_token_ids", "supported", "", check=_accepted(stop_token_ids=[3])),
]

RESPONSE = {
    "chat": ("id", "object", "created", "model", "system_fingerprint", "choices", "usage"),
    "choice": ("index", "message", "logprobs", "finish_reason"),
    "message": ("role", "content", "refusal"),
}
"""Fields that every answer of ``/v1/chat/completions`` has."""

TABLES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETIONS,
    "Extensions of both, as vLLM names them": EXTENSIONS,
}


def render() -> str:
    """The tables in Markdown."""
    lines = []
    for title, cases in TABLES.items():
        heading = f"`POST {title}`" if title.startswith("/") else title
        lines += [f"### {heading}", "", "| field | | |", "|---|---|---|"]
        lines += [f"| `{case.name}` | {case.status} | {case.note} |" for case in sorted(cases, key=lambda c: c.name)]
        lines.append("")
    counts = {s: sum(c.status == s for c in (*CHAT, *COMPLETIONS)) for s in ("supported", "ignored", "refused")}
    total = ", ".join(f"{count} {status}" for status, count in counts.items())
    return "\n".join([*lines, f"Fields of OpenAI's reference, both endpoints together: {total}."])


def documented() -> str:
    """The tables that docs show."""
    return DOCS.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip()


def main() -> None:
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    DOCS.write_text(f"{before}{BEGIN}\n\n{render()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
