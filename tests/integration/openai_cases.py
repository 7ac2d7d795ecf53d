"""Cases for every field of OpenAI's and vLLM's APIs: tests run them, and the table in the docs is made of them.

``python tests/integration/openai_cases.py`` writes the table into ``docs/reference/openai.md``. A test fails when
the table or the server differs from the cases.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import marked_tables
import pytest

from overfill.api.openai.errors import NOT_SERVED
from overfill.api.openai.schema import ChatRequest, CompletionRequest, RefusedField, Sampling, refusals


class NotAnswered(Exception):
    """The endpoint answered with an error."""

    def __init__(self, status: int, error: dict[str, Any]) -> None:
        super().__init__(status, error)
        self.status, self.error = status, error


Status = Literal["supported", "refused", "ignored"]
Ask = Callable[..., Any]
"""Sends the endpoint's plain request with more fields; the answer, or with ``stream`` the chunks."""


@dataclass(frozen=True)
class Case:
    """One field.

    Attributes:
        value: value with which a refused field is refused, and which has no effect in an ignored field.
        check: function that raises if a supported field lacks its effect.
        note: text for the table; for a refused field, the server's message.
    """

    name: str
    status: Status
    note: str = ""
    value: Any = None
    check: Callable[[Ask], None] | None = None


def text(answer: dict[str, Any]) -> str:
    """Returns the text of the first choice."""
    choice = answer["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def differs(**fields: Any) -> Callable[[Ask], None]:
    def check(ask: Ask) -> None:
        assert text(ask(**fields)) != text(ask())

    return check


def refuses(ask: Ask, param: str, **fields: Any) -> None:
    """Checks that the endpoint answers 400 and names ``param``."""
    with pytest.raises(NotAnswered) as caught:
        ask(**fields)
    assert (caught.value.status, caught.value.error["param"]) == (400, param), caught.value


def _n(ask: Ask) -> None:
    answer = ask(n=3)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert text(answer) == text(ask())


def _max_tokens(ask: Ask) -> None:
    answer = ask(max_tokens=3)
    refuses(ask, "max_tokens", max_tokens=0)
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"


def _max_completion_tokens(ask: Ask) -> None:
    answer = ask(max_tokens=None, max_completion_tokens=3)
    assert answer["usage"]["completion_tokens"] == 3


def _stop(ask: Ask) -> None:
    whole = text(ask())
    word = whole.split()[1]
    for stop in (word, [word, "never"], [*(f"never {n}" for n in range(15)), word]):
        answer = ask(stop=stop)
        assert text(answer) == whole[: whole.index(word)]
        assert answer["choices"][0]["finish_reason"] == "stop"
    refuses(ask, "stop", stop=["x"] * 17)


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
    """Checks that the field is accepted. Tests with real workers check its effect on logits."""

    def check(ask: Ask) -> None:
        assert ask(**fields)["choices"]

    return check


def _logprobs(ask: Ask) -> None:
    scores = ask(logprobs=True)["choices"][0]["logprobs"]["content"]
    assert "".join(score["token"] for score in scores) == text(ask())


def _top_logprobs(ask: Ask) -> None:
    scores = ask(logprobs=True, top_logprobs=4)["choices"][0]["logprobs"]["content"]
    assert all(len(score["top_logprobs"]) == 4 for score in scores)
    for fields in ({}, {"logprobs": False}):
        assert ask(**fields, top_logprobs=0)["choices"][0]["logprobs"] is None


def _old_logprobs(ask: Ask) -> None:
    choice = ask(logprobs=3)["choices"][0]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    assert all(1 <= len(top) <= 3 for top in choice["logprobs"]["top_logprobs"])


def _min_tokens(ask: Ask) -> None:
    whole = text(ask())
    word = whole.split()[1]
    assert ask(stop=word)["usage"]["completion_tokens"] < 20
    answer = ask(stop=word, min_tokens=20)
    assert 20 <= answer["usage"]["completion_tokens"] <= 24
    assert text(answer).startswith(whole[:20])
    refuses(ask, "min_tokens", min_tokens=25, max_tokens=24)


def _truncate(ask: Ask) -> None:
    assert ask(truncate_prompt_tokens=1)["usage"]["prompt_tokens"] == 1
    assert ask(truncate_prompt_tokens=-1)["usage"] == ask()["usage"]
    refuses(ask, "truncate_prompt_tokens", truncate_prompt_tokens=0)


def _stream_interval(ask: Ask) -> None:
    events = ask(stream=True, stream_interval=1000)
    contents = [choice.get("text") or choice.get("delta", {}).get("content") for e in events for choice in e["choices"]]
    contents = [content for content in contents if content]
    assert len(contents) <= 2  # the first token at once, then all others with the end
    assert "".join(contents) == text(ask())
    refuses(ask, "stream_interval", stream_interval=0)


def _request_id(ask: Ask) -> None:
    assert ask(request_id="mine-1")["id"] == "mine-1"
    refuses(ask, "request_id", request_id="a b")


def _session(name: str) -> Callable[[Ask], None]:
    def check(ask: Ask) -> None:
        assert text(ask(**{name: "any name, of any length " * 20})) == text(ask())
        refuses(ask, name, **{name: 1})

    return check


def _tier(ask: Ask) -> None:
    for fields in ({"tier": "default"}, {"fallback": "none"}, {"allow_brownout": True}):
        assert text(ask(**fields)) == text(ask()), fields
    (told,) = ask()["overfill"]["choices"]
    assert (told["tier"], told["brownout_from"]) == ("default", None)
    assert told["parts"] == [{"tier": "default", "first_index": 0}]
    for name, wrong in (("tier", 1), ("fallback", False), ("allow_brownout", "yes")):
        refuses(ask, name, **{name: wrong})


def _structured_outputs(ask: Ask) -> None:
    assert re.fullmatch("[0-9]{4}", text(ask(structured_outputs={"regex": "[0-9]{4}"})))
    choices = ["yes", "no", '"quoted" a|b.\n', ""]
    assert text(ask(structured_outputs={"choice": choices}, max_tokens=60)) in choices
    assert text(ask(structured_outputs={"grammar": 'start: "x" y\ny: "1" | "2"'})) in ("x1", "x2")
    for schema in (SCHEMA, json.dumps(SCHEMA)):
        answer = ask(structured_outputs={"json": schema, "disable_any_whitespace": True}, max_tokens=60)
        assert json.loads(text(answer))["n"] in (1, 2)
    empty = {"type": "object", "properties": {}}
    for closed in ({}, {"disable_additional_properties": True}):
        assert text(ask(structured_outputs={"json": empty} | closed)) == "{}"
    assert text(ask(structured_outputs={"json": empty, "disable_additional_properties": False}, max_tokens=3)) != "{}"
    assert text(ask(structured_outputs={"json_object": True}, max_tokens=3)).startswith("{")
    assert text(ask(structured_outputs={})) == text(ask())
    refuses(ask, "structured_outputs.regex", structured_outputs={"regex": "[a-"})
    refuses(ask, "structured_outputs.grammar", structured_outputs={"grammar": 'root ::= "a"'})
    refuses(ask, "structured_outputs.json", structured_outputs={"json": "{"})
    refuses(ask, "structured_outputs.choice", structured_outputs={"choice": []})
    refuses(ask, "structured_outputs.structural_tag", structured_outputs={"structural_tag": "{}"})
    refuses(
        ask,
        "structured_outputs.whitespace_pattern",
        structured_outputs={"json_object": True, "whitespace_pattern": " "},
    )
    refuses(ask, "structured_outputs.choice", structured_outputs={"regex": "a", "choice": ["a"]})
    refuses(ask, "guided_regex", structured_outputs={"regex": "a"}, guided_regex="a")


def _guided(name: str, value: Any, pattern: str) -> Callable[[Ask], None]:
    def check(ask: Ask) -> None:
        assert re.fullmatch(pattern, text(ask(**{name: value}, max_tokens=60)))
        refuses(ask, name, response_format={"type": "json_object"}, **{name: value})

    return check


def _guided_grammar(ask: Ask) -> None:
    _guided("guided_grammar", 'start: "x" | "y"', "x|y")(ask)
    with pytest.raises(NotAnswered, match="dialect of Lark"):
        ask(guided_grammar='root ::= "a"')


def _old_response_format(ask: Ask) -> None:
    """``response_format`` of ``/v1/completions``."""
    _structural_tag(ask)
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    assert json.loads(text(ask(response_format=wanted, max_tokens=60)))["n"] in (1, 2)


def _structural_tag(ask: Ask) -> None:
    for wanted in ({"format": {}}, {"structures": [], "triggers": []}):
        refuses(ask, "response_format.type", response_format={"type": "structural_tag", **wanted})


def _template_kwargs(ask: Ask) -> None:
    """This template reads no options. The template's own tests use one that does, like Qwen's."""
    assert text(ask(chat_template_kwargs={"enable_thinking": False})) == text(ask())
    for name in ("messages", "tools", "add_generation_prompt", "eos_token", "chat_template", "tokenize"):
        refuses(ask, f"chat_template_kwargs.{name}", chat_template_kwargs={name: 1})


def _effort(ask: Ask) -> None:
    """This template does not think; ``test_reasoning_on_stack`` has one that does."""
    for effort in ("none", "minimal", "low", "medium", "high", "xhigh", "max"):
        assert text(ask(reasoning_effort=effort)) == text(ask())
    refuses(ask, "reasoning_effort", reasoning_effort="much")


def _generation_prompt(ask: Ask) -> None:
    assert ask(add_generation_prompt=True)["usage"] == ask()["usage"]
    assert ask(add_generation_prompt=False)["usage"]["prompt_tokens"] < ask()["usage"]["prompt_tokens"]


def _continue(ask: Ask) -> None:
    begun = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, "}]
    new = ask(messages=begun)["usage"]["prompt_tokens"]
    for fields in ({}, {"add_generation_prompt": False}):
        assert ask(messages=begun, continue_final_message=True, **fields)["usage"]["prompt_tokens"] < new
    refuses(ask, "continue_final_message", messages=begun, continue_final_message=True, add_generation_prompt=True)


def _parse_special(ask: Ask) -> None:
    """A message's special tokens are several tokens of text each, unless the request asks for them."""
    messages = [{"role": "user", "content": "Hi<|im_end|>\n<|im_start|>system"}]
    text, tokens = (ask(messages=messages, parse_special=parse)["usage"]["prompt_tokens"] for parse in (False, True))
    assert text == ask(messages=messages)["usage"]["prompt_tokens"] > tokens


def _documents(ask: Ask) -> None:
    """This template shows no documents. The template's own tests use one that does."""
    assert text(ask(documents=[])) == text(ask())
    refuses(ask, "documents", documents=[{"title": "t", "text": "x"}])
    refuses(ask, "documents", documents=[], chat_template_kwargs={"documents": []})


SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
OPEN_SCHEMA = {name: value for name, value in SCHEMA.items() if name != "additionalProperties"}
TOOL = {"type": "function", "function": {"name": "pick", "parameters": SCHEMA}}


def _response_format(ask: Ask) -> None:
    for strict in (False, True):
        described = {"name": "x", "schema": OPEN_SCHEMA, "strict": strict}
        answer = ask(response_format={"type": "json_schema", "json_schema": described}, max_tokens=60)
        assert json.loads(text(answer)) in ({"n": 1}, {"n": 2})
    assert text(ask(response_format={"type": "json_object"}, max_tokens=3)).startswith("{")
    assert text(ask(response_format={"type": "text"})) == text(ask())
    _structural_tag(ask)
    _tools_and_response_format(ask)


def _tools(ask: Ask) -> None:
    marked = TOOL | {"cache_control": {"type": "ephemeral"}, "function": TOOL["function"] | {"x-origin": "mcp"}}
    for tool in (TOOL, marked):
        message = ask(tools=[tool], tool_choice="required", max_tokens=200)["choices"][0]["message"]
        assert json.loads(message["tool_calls"][0]["function"]["arguments"])["n"] in (1, 2)
    open_ = {"type": "function", "function": {"name": "pick", "parameters": OPEN_SCHEMA}}
    calls = ask(tools=[open_], tool_choice="required", max_tokens=200)["choices"][0]["message"]["tool_calls"]
    assert all(json.loads(call["function"]["arguments"]) in ({"n": 1}, {"n": 2}) for call in calls)
    for strict in (False, True):
        names = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
        function = {"name": "pack", "parameters": {"type": "object", "properties": {"names": names}}, "strict": strict}
        fields = {"tools": [TOOL, {"type": "function", "function": function}]}
        if strict:
            refuses(ask, "tools[1].function.parameters", **fields)
        else:
            assert ask(**fields)["choices"]


def _tool_choice(ask: Ask) -> None:
    other = {"type": "function", "function": {"name": "other"}}
    named = {"type": "function", "function": {"name": "pick"}}
    message = ask(tools=[other, TOOL], tool_choice=named, max_tokens=200)["choices"][0]["message"]
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["pick"]
    assert "tool_calls" not in ask(tools=[TOOL], tool_choice="none")["choices"][0]["message"]
    assert ask(tools=[TOOL], tool_choice="auto")["choices"]
    _allowed_tools(ask, other)


def _allowed_tools(ask: Ask, other: dict[str, Any]) -> None:
    def allowing(mode: str, *tools: dict[str, Any]) -> dict[str, Any]:
        return {
            "tools": [other, TOOL],
            "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}},
        }

    pick = {"type": "function", "function": {"name": "pick"}}
    message = ask(**allowing("required", pick), max_tokens=300)["choices"][0]["message"]
    assert {call["function"]["name"] for call in message["tool_calls"]} == {"pick"}
    for mode in ("auto", "required"):
        alone = ask(tools=[TOOL], tool_choice=mode, max_tokens=300)
        limited = ask(**allowing(mode, pick), max_tokens=300)
        assert limited["usage"] == alone["usage"], "the prompt shows the allowed tools"
    place = "tool_choice.allowed_tools"
    refuses(ask, f"{place}.tools[1].function.name", **allowing("auto", pick, {**pick, "function": {"name": "gone"}}))
    refuses(ask, f"{place}.mode", **allowing("none", pick))
    refuses(ask, f"{place}.tools", **allowing("auto"))


def _tools_and_response_format(ask: Ask) -> None:
    """Without a call, an answer fits the schema; with one, it fits the tool."""
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"const": [17]}}}
    fields = {"response_format": wanted, "tools": [TOOL], "max_tokens": 200}
    assert json.loads(text(ask(**fields, tool_choice="none"))) == [17]
    auto = [ask(**fields, seed=seed)["choices"][0]["message"] for seed in range(8)]
    assert {message["content"] for message in auto} == {None, "[17]"}, "some answers call the tool, some do not"
    named = {"type": "function", "function": {"name": "pick"}}
    for message in [m for m in auto if m["content"] is None] + [
        ask(**fields, tool_choice=choice)["choices"][0]["message"] for choice in ("required", named)
    ]:
        assert all(json.loads(call["function"]["arguments"])["n"] in (1, 2) for call in message["tool_calls"])
    assert ask(response_format={"type": "json_object"}, tools=[TOOL])["choices"]
    broken = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "circle"}}}
    for choice in ("auto", "required", "none"):
        refuses(ask, "response_format", **fields | {"response_format": broken, "tool_choice": choice})
    refuses(ask, "structured_outputs.regex", structured_outputs={"regex": "a"}, tools=[TOOL])


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
    count = ask(messages=messages)["usage"]["prompt_tokens"]
    assert count > ask()["usage"]["prompt_tokens"]
    messages[2] |= {"reasoning": "Hm.", "reasoning_content": "Hm.", "parsed": None, "annotations": [], "refusal": None}
    messages[2]["tool_calls"][0] |= {"index": 0, "extra_content": {}}
    messages[2]["tool_calls"][0]["function"]["parsed_arguments"] = {}
    messages[1] |= {"cache_control": {"type": "ephemeral"}}
    assert ask(messages=messages)["usage"]["prompt_tokens"] == count
    messages[2]["tool_calls"][0]["function"]["arguments"] = '{"n": "cut by max_tok'
    assert ask(messages=messages)["usage"]["prompt_tokens"] > count
    for content in ("", []):
        for role in ("system", "user", "assistant"):
            assert ask(messages=[*messages, {"role": role, "content": content}])["choices"]
    for empty in ({"content": None}, {}):
        assert ask(messages=[*messages, {"role": "assistant"} | empty])["choices"]
        for role in ("system", "developer", "user", "tool"):
            refuses(ask, "messages[4].content", messages=[*messages, {"role": role, "tool_call_id": "c"} | empty])


def _prompt(ask: Ask) -> None:
    for prompt, count in (("x", 1), (["x", "y"], 2), ([70, 71], 1), ([[70], [71, 72]], 2)):
        assert len(ask(prompt=prompt)["choices"]) == count


def _echo(ask: Ask) -> None:
    assert text(ask(prompt="Say:", echo=True)) == "Say:" + text(ask(prompt="Say:"))
    refuses(ask, "stream", echo=True, logprobs=1, stream=True)
    refuses(ask, "echo", echo=True, logprobs=1)  # test_prompt_scores.py asks a tier whose decoder is the full model


def _answer_start(ask: Ask) -> None:
    refuses(ask, "answer_start", answer_start=1)
    refuses(ask, "answer_start", answer_start=1 << 20, prompt_logprobs=0)
    refuses(ask, "answer_start", answer_start=1, prompt_logprobs=0, truncate_prompt_tokens=1)
    refuses(ask, "answer_start", answer_start=0, prompt_logprobs=0)


def _prompt_logprobs(ask: Ask) -> None:
    refuses(ask, "stream", prompt_logprobs=1, stream=True)
    refuses(ask, "n", prompt_logprobs=1, n=2)
    refuses(ask, "prompt_logprobs", prompt_logprobs=1, max_tokens=0)


def _model(ask: Ask) -> None:
    assert ask()["model"]


# fmt: off
SHARED = [
    Case("model", "supported", "another name is 404 `model_not_found`", check=_model),
    Case("frequency_penalty", "supported", "at the first token and at every later one",
        check=_accepted(frequency_penalty=1)),
    Case("logit_bias", "supported", "keys are token ids of the served model; at most 1,024", check=_logit_bias),
    Case("max_tokens", "supported",
        "more than the context leaves is 400 `context_length_exceeded`; 0 only where the prompt is scored",
        check=_max_tokens),
    Case("n", "supported", "up to 128; every choice is an answer of its own under one seed", check=_n),
    Case("presence_penalty", "supported", "as `frequency_penalty`", check=_accepted(presence_penalty=1)),
    Case("seed", "supported", "repeats the answer, best effort", check=_seed),
    Case("stop", "supported", "up to 16 strings; found wherever tokens are cut, but not in tool calls", check=_stop),
    Case("stream", "supported", "server-sent events", check=_stream),
    Case("stream_options", "supported", "`include_usage`; `include_obfuscation` is ignored", check=_stream_options),
    Case("temperature", "supported", "0 to 2; 0 is greedy", check=_temperature),
    Case("top_p", "supported", "", check=_top_p),
    Case("user", "ignored", "", value="someone"),
]

CHAT = [
    *SHARED,
    Case("messages", "supported",
        "text only; roles system, developer (as system), user, assistant, tool; the content may be empty, and an "
        "assistant's null or missing; arguments of a call that are no JSON object, as when `max_tokens` cut them, are "
        "shown as text; an assistant's `reasoning_content`, or `reasoning`, is shown by templates that know it; other "
        "keys are ignored", check=_messages),
    Case("audio", "refused", value={"voice": "x", "format": "wav"}),
    Case("function_call", "refused", value="auto"),
    Case("functions", "refused", value=[]),
    Case("logprobs", "supported", "after penalties, bias and grammar, before temperature and filters", check=_logprobs),
    Case("max_completion_tokens", "supported", "as `max_tokens`; give one of them", check=_max_completion_tokens),
    Case("metadata", "ignored", "", value={"a": "b"}),
    Case("modalities", "refused", value=["text", "audio"]),
    Case("moderation", "refused", value={"model": "x"}),
    Case("parallel_tool_calls", "supported", "", check=_parallel),
    Case("prediction", "ignored", "it would change no answer", value={"type": "content", "content": "x"}),
    Case("prompt_cache_key", "supported", "names the [session](#sessions)", check=_session("prompt_cache_key")),
    Case("prompt_cache_options", "ignored", "", value={}),
    Case("prompt_cache_retention", "ignored", "", value="24h"),
    Case("reasoning_effort", "supported",
        "`none` switches the thinking off and the others on, where the chat template has a variable for it: it sets "
        "`enable_thinking`, `thinking` and `reasoning_effort`, unless `chat_template_kwargs` does", check=_effort),
    Case("response_format", "supported",
        "`json_object`, `json_schema`; objects have only the keys that the schema names, also without `strict`, unless "
        "it says `additionalProperties`; what the grammar library cannot obey is 400; beside `tools`, the form of "
        "answers without calls", check=_response_format),
    Case("safety_identifier", "ignored", "", value="x"),
    Case("service_tier", "ignored", "", value="auto"),
    Case("store", "ignored", "nothing is stored", value=True),
    Case("tool_choice", "supported",
        "`none`, `auto`, `required`, a function, or `allowed_tools`: the prompt shows only the tools that it names",
        check=_tool_choice),
    Case("tools", "supported",
        "functions; calls follow a grammar, so their arguments always parse; `strict` as in `response_format`; without "
        "it, what the grammar library cannot obey is not enforced; other keys of a tool are ignored", check=_tools),
    Case("top_logprobs", "supported", "0 to 20", check=_top_logprobs),
    Case("verbosity", "ignored", "ask for it in a message", value="low"),
    Case("web_search_options", "refused", value={}),
]

COMPLETIONS = [
    *SHARED,
    Case("prompt", "supported", "text, token ids, or an array of either", check=_prompt),
    Case("best_of", "refused", value=3),
    Case("echo", "supported",
        "with `logprobs`, the prompt's tokens have theirs, as `prompt_logprobs`, null for the first; `max_tokens` 1 "
        "always adds the scores of one token then, as lm-eval expects; not streamed", check=_echo),
    Case("logprobs", "supported", "0 to 5; `text_offset` counts a character once, at the token that completes it",
        check=_old_logprobs),
    Case("suffix", "refused", value="x"),
]


def _refused(names: Iterable[str], marks: Mapping[str, RefusedField]) -> list[Case]:
    return [Case(name, "refused", value="x") for name in sorted(names) if name in marks]


_BOTH = refusals(Sampling)

EXTENSIONS = [
    Case("top_k", "supported", "0 and -1 are all tokens", check=_accepted(top_k=5)),
    Case("min_p", "supported", "", check=_accepted(min_p=0.1)),
    Case("min_tokens", "supported",
        "until then nothing ends the answer but a grammar that is complete; stop strings are text", check=_min_tokens),
    Case("priority", "supported", "-2 to 2; the smaller goes first", check=_accepted(priority=1)),
    Case("prompt_logprobs", "supported",
        "0 to 20; log-probabilities of the prompt's tokens under the full model, in vLLM's shape; other tiers need "
        "`answer_start`; with `n` 1, not streamed; `max_tokens` may be 0", check=_prompt_logprobs),
    Case("repetition_penalty", "supported", "over prompt and answer, as Hugging Face; 0.01 to 100",
        check=_accepted(repetition_penalty=2)),
    Case("request_id", "supported", "the answer's `id`; the header `x-request-id` goes before it", check=_request_id),
    Case("ignore_eos", "supported", "", check=_accepted(ignore_eos=True)),
    Case("stop_token_ids", "supported", "", check=_accepted(stop_token_ids=[3])),
    Case("structured_outputs", "supported",
        "`json`, `regex`, `choice`, `grammar` (llguidance's dialect of Lark) or `json_object`; "
        "`disable_additional_properties`: false lets objects have keys that their schema does not name",
        check=_structured_outputs),
    Case("guided_choice", "supported", "as in `structured_outputs`", check=_guided("guided_choice", ["a", "b"], "a|b")),
    Case("guided_grammar", "supported", "as in `structured_outputs`", check=_guided_grammar),
    Case("guided_json", "supported", "as in `structured_outputs`",
        check=_guided("guided_json", {"enum": [1, 2]}, "1|2")),
    Case("guided_regex", "supported", "as in `structured_outputs`",
        check=_guided("guided_regex", "[ab]{3}", "[ab]{3}")),
    Case("guided_decoding_backend", "ignored", "llguidance is the only one", value="xgrammar"),
    Case("return_mm_kwargs", "ignored", "vLLM's `render` endpoints alone read it", value=False),
    Case("return_token_offsets", "ignored", "vLLM's `render` endpoints alone read it", value=True),
    Case("session_id", "supported", "as `prompt_cache_key`", check=_session("session_id")),
    Case("stream_interval", "supported",
        "minimum number of tokens in an event, except in the first and the last; the router's `--stream-interval` "
        "counts if it is larger", check=_stream_interval),
    Case("spaces_between_special_tokens", "ignored", "special tokens are never shown", value=False),
    Case("truncate_prompt_tokens", "supported",
        "the prompt's last tokens are kept; -1: as many as `max_tokens` leaves in the context. Give `max_tokens` too: "
        "without it a chat's answer has room for one token", check=_truncate),
    *_refused(_BOTH, _BOTH),
]

OWN_EXTENSIONS = [
    Case("allow_brownout", "supported",
        "whether the next tier of `--brownout` may answer when the requested one is overloaded; false by default",
        check=_tier),
    Case("fallback", "supported",
        "tier that continues the answer when its own has no worker left; `none` waits; the tier's setting by default",
        check=_tier),
    Case("tier", "supported",
        "tier that writes the answer, also as `NAME:TIER` in `model`; the stack's default tier by default",
        check=_tier),
]

CHAT_EXTENSIONS = [
    Case("add_generation_prompt", "supported", "true by default, unless `continue_final_message`",
        check=_generation_prompt),
    Case("chat_template_kwargs", "supported",
        'variables of the chat template, such as `{"enable_thinking": false}`; a template does not look at others',
        check=_template_kwargs),
    Case("continue_final_message", "supported", "contradicts `add_generation_prompt`", check=_continue),
    Case("include_reasoning", "supported", "whether the response has `reasoning_content`; true by default",
        check=_accepted(include_reasoning=False)),
    Case("parse_special", "supported",
        "whether the text of a special token, such as `<|im_end|>`, becomes that token in messages, tools and template "
        "variables too, as from vLLM; false by default; llama.cpp's name", check=_parse_special),
    Case("documents", "supported", "400 where the chat template does not show them", check=_documents),
    *_refused(refusals(ChatRequest).keys() - _BOTH.keys() - {case.name for case in CHAT}, refusals(ChatRequest)),
]

COMPLETIONS_EXTENSIONS = [
    Case("answer_start", "supported",
        "our own: index of the first prompt token that the tier's decoder computes, where the prompt is scored; the "
        "full model scores this token, the decoder those after it, and tokens before it get null",
        check=_answer_start),
    Case("response_format", "supported", "as for chats", check=_old_response_format),
    *_refused(
        refusals(CompletionRequest).keys() - _BOTH.keys() - {case.name for case in COMPLETIONS},
        refusals(CompletionRequest),
    ),
]
# fmt: on

RESPONSE = {
    "chat": ("id", "object", "created", "model", "system_fingerprint", "choices", "usage"),
    "choice": ("index", "message", "logprobs", "finish_reason"),
    "message": ("role", "content", "refusal"),
}
"""Fields that every answer of ``/v1/chat/completions`` has."""

TABLES: dict[str, tuple[type[Sampling], list[Case]]] = {
    "/v1/chat/completions": (ChatRequest, CHAT),
    "/v1/completions": (CompletionRequest, COMPLETIONS),
    "Extensions of both, as vLLM names them": (Sampling, EXTENSIONS),
    "Extensions of both, our own": (Sampling, OWN_EXTENSIONS),
    "Extensions of `POST /v1/chat/completions`": (ChatRequest, CHAT_EXTENSIONS),
    "Extensions of `POST /v1/completions`": (CompletionRequest, COMPLETIONS_EXTENSIONS),
}


def _note(kind: type[Sampling], case: Case) -> str:
    if case.status != "refused":
        return case.note
    mark = refusals(kind)[case.name]
    neutral = "".join(f"; `{json.dumps(value)}` is taken" for value in mark.neutral)
    return mark.reason.replace("'", "`") + neutral


def render() -> str:
    """Returns the tables in Markdown."""
    lines = []
    for title, (kind, cases) in TABLES.items():
        heading = f"`POST {title}`" if title.startswith("/") else title
        lines += [f"### {heading}", "", "| field | support | notes |", "|---|---|---|"]
        lines += [
            f"| `{case.name}` | {case.status} | {_note(kind, case)} |" for case in sorted(cases, key=lambda c: c.name)
        ]
        lines.append("")
    counts = {s: sum(c.status == s for c in (*CHAT, *COMPLETIONS)) for s in ("supported", "ignored", "refused")}
    total = ", ".join(f"{count} {status}" for status, count in counts.items())
    lines += [f"Fields of OpenAI's reference, both endpoints together: {total}.", ""]
    lines += ["### Routes of other servers", "", "These get 404 `unknown_url`, with this message.", ""]
    lines += ["| routes | message |", "|---|---|"]
    lines += [f"| {', '.join(f'`{route}`' for route in routes)} | {hint} |" for hint, routes in NOT_SERVED.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    marked_tables.write("openai.md", render())
