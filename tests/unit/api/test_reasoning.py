"""Tests what of an answer is reasoning: each division of its tokens, cuts, stop strings, resumed answers, grammars."""

from __future__ import annotations

import itertools
import json
import random

import pytest

from overfill.api.answer_text import AnswerText
from overfill.api.detokenizer import StreamDetokenizer
from overfill.api.families.choose import make_format
from overfill.api.families.hermes import Hermes
from overfill.api.reasoning import Reasoning, find_reasoning, thinking_variables
from overfill.api.reasoning_grammar import after_thinking
from overfill.api.requests import validate_generate
from overfill.api.tokenizer import Tokenizer
from overfill.api.tools import ToolDefinition
from overfill.api.tools_grammar import tools_grammar
from overfill.errors import InvalidPair, InvalidRequest
from overfill.pair.store import resolve_pair
from overfill.request.grammar import Grammars
from overfill.request.params import Grammar
from overfill.request.thinking import ThinkingTokens
from overfill.routing.answer import AnswerDelta
from overfill.v1 import inference_pb2

HERMES = Hermes()
MODEL = resolve_pair("mock") / "model"

OPENS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
"""A template with the reasoning formats' switch, as Qwen 3.5's."""

TEMPLATES = {
    "qwen3": OPENS + "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}",
    "qwen3.5": OPENS + "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}",
    "mistral": OPENS + "{# [THINK] … [/THINK] #}",
    "plain": OPENS,
}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(MODEL)


def with_template(folder, source):
    file = folder / "template.jinja"
    file.write_text(source)
    return Tokenizer.load(MODEL, chat_template=file)


def tags(tokenizer, opened, begin="<think>", end="</think>"):
    return ThinkingTokens(tokenizer.added_id(begin), tokenizer.added_id(end), opened)


def read(tokenizer, ids, cuts, thinking, stops=(), replayed=(), format=None):
    """Returns reasoning, text, calls and the state of an answer whose ``ids`` come in parts that end at ``cuts``."""
    shown = None if format is None else format.shown
    tools = None if format is None else (format, ())
    text = AnswerText(StreamDetokenizer(tokenizer, (), shown), stops, replayed, tools, thinking=thinking)
    parts = []
    for start, end in itertools.pairwise([0, *cuts, len(ids)]):
        if text.stop is None:
            parts.append(text.push(AnswerDelta(len(replayed) + start, list(ids[start:end]))))
    if text.stop is None and (rest := text.finish()) is not None:
        parts.append(rest)
    calls = "".join(f"{part.name}{part.arguments}" for delta in parts for part in delta.tool_calls)
    return "".join(d.reasoning for d in parts), "".join(d.text for d in parts), calls, text


def divisions(count):
    """All divisions of a short answer; of a long one, tokens one by one and at random places."""
    if count <= 8:
        return [cuts for n in range(count) for cuts in itertools.combinations(range(1, count), n)]
    draw = random.Random(count)
    return [(), range(1, count)] + [sorted(draw.sample(range(1, count), count // 3)) for _ in range(20)]


# What the model writes, whether the prompt has opened the thinking; its reasoning, text, and tokens of reasoning up to
# and with the closing one.
CASES = {
    "opened": ("Hm, 世\n</think>\n\nYes.", True, "Hm, 世", "Yes.", "</think>"),
    "opens itself": ("<think>\nHm\n\nso\n</think>\n\nYes.", False, "Hm\n\nso", "Yes.", "</think>"),
    "white space before": (" \n<think>Hm</think>Yes", False, "Hm", "Yes", "</think>"),
    "opened twice": ("\n<think>\nHm</think>Yes", True, "Hm", "Yes", "</think>"),
    "nothing thought": ("<think>\n\n</think>\n\nYes\n", False, "", "Yes\n", "</think>"),
    "closed at once": ("</think>Yes", True, "", "Yes", "</think>"),
    "only thought": ("<think>Hm</think>", False, "Hm", "", "</think>"),
    "cut in thought": ("Hm, so \n", True, "Hm, so \n", "", None),
    "does not think": ("\n Yes <think>no</think>", False, "", "\n Yes <think>no</think>", ""),
    "white space only": (" \n", False, "", " \n", ""),
    "tags in the answer": (
        "Hm</think>Write <think> and </think>.",
        True,
        "Hm",
        "Write <think> and </think>.",
        "</think>",
    ),
    "tag in thought": ("Hm <think> so</think>Yes", True, "Hm <think> so", "Yes", "</think>"),
}


@pytest.mark.parametrize(("written", "opened", "reasoning", "text", "until"), CASES.values(), ids=CASES.keys())
def test_reasoning_and_text_do_not_depend_on_how_tokens_are_divided(tokenizer, written, opened, reasoning, text, until):
    ids, thinking = tokenizer.encode_continuation(written), tags(tokenizer, opened)
    thought = len(ids) if until is None else 1 + ids.index(tokenizer.added_id(until)) if until else 0
    for cuts in divisions(len(ids)):
        found = read(tokenizer, ids, cuts, thinking)
        assert found[:3] == (reasoning, text, "")
        assert (found[3].reasoning_tokens, found[3].num_tokens) == (thought, len(ids))


def test_half_a_character_before_the_closing_tag_stays_in_the_reasoning(tokenizer):
    half = next(i for i in tokenizer.encode_continuation("世") if tokenizer.piece(i) is None)
    ids = [half, tokenizer.added_id("</think>"), *tokenizer.encode_continuation("Yes")]
    for cuts in divisions(len(ids)):
        assert read(tokenizer, ids, cuts, tags(tokenizer, True))[:2] == ("\ufffd", "Yes")


def test_special_tokens_separate_reasoning_and_are_not_shown(tokenizer):
    ids, thinking = tokenizer.encode_continuation("[THINK]Hm[/THINK]Yes"), tags(tokenizer, False, "[THINK]", "[/THINK]")
    for cuts in divisions(len(ids)):
        assert read(tokenizer, ids, cuts, thinking)[:2] == ("Hm", "Yes")


@pytest.mark.parametrize("stop", ["Hm", "\n", "think", "</think>", "END"])
def test_stop_strings_count_in_the_answer_only(tokenizer, stop):
    ids = tokenizer.encode_continuation("Hm END\n</think>\n\nYes, HmEND\nthink </think>, more")
    shown, end = "Yes, HmEND\nthink </think>, more", "Yes, HmEND\nthink </think>, more".index(stop)
    found = []
    for cuts in divisions(len(ids)):
        reasoning, text, _, state = read(tokenizer, ids, cuts, tags(tokenizer, True), [stop])
        assert (reasoning, text, state.stop) == ("Hm END", shown[:end], stop)
        found.append((state.num_tokens, state.reasoning_tokens))
    assert len(set(found)) == 1, "the same tokens count"


def test_calls_come_from_the_answer_and_not_from_the_reasoning(tokenizer):
    call, other = HERMES.write([("now", '{"a": 1}')]), HERMES.write([("other", "{}")])
    ids = tokenizer.encode_continuation(f"I may write {other} now.\n</think>\n\n{call}")
    for cuts in divisions(len(ids)):
        reasoning, text, calls, _ = read(tokenizer, ids, cuts, tags(tokenizer, True), format=HERMES)
        assert (reasoning, text, calls) == (f"I may write {other} now.", "", 'now{"a": 1}')


def test_a_token_that_begins_calls_is_no_text_of_the_reasoning(tokenizer):
    format = make_format("mistral", [tokenizer.added_id("[TOOL_CALLS]")])
    written = f"[THINK]I may write [TOOL_CALLS].[/THINK]{format.write([('now', '{}')])}"
    ids, thinking = tokenizer.encode_continuation(written), tags(tokenizer, False, "[THINK]", "[/THINK]")
    for cuts in divisions(len(ids)):
        reasoning, text, calls, _ = read(tokenizer, ids, cuts, thinking, format=format)
        assert (reasoning, text, calls) == ("I may write .", "", "now{}")


@pytest.mark.parametrize("name", ["opened", "opens itself", "nothing thought", "does not think", "tag in thought"])
def test_a_resumed_answer_goes_on_where_the_first_part_ended(tokenizer, name):
    written, opened, reasoning, text, _ = CASES[name]
    ids, thinking = tokenizer.encode_continuation(written), tags(tokenizer, opened)
    whole = read(tokenizer, ids, (), thinking)[3]
    for known in range(len(ids) + 1):
        first = AnswerText(StreamDetokenizer(tokenizer), (), thinking=thinking)
        part = first.push(AnswerDelta(0, ids[:known]))  # and no end, as when a router is lost
        rest = read(tokenizer, ids[known:], (), thinking, replayed=ids[:known])
        assert (part.reasoning + rest[0], part.text + rest[1]) == (reasoning, text)
        assert (rest[3].reasoning_tokens, rest[3].num_tokens) == (whole.reasoning_tokens, whole.num_tokens)


def chat(variables=None, **fields):
    request = inference_pb2.GenerateRequest(chat=inference_pb2.Chat(**fields))
    request.chat.messages.add(role="user", content="What does <think> mean?")
    request.chat.chat_template_kwargs = json.dumps(variables or {})
    return request


def job(tokenizer, request, parser="auto"):
    return validate_generate(request, tokenizer, 4096, 6144, reasoning=find_reasoning(parser, tokenizer))


@pytest.mark.parametrize(
    ("template", "parser", "variables", "opened"),
    [
        ("qwen3", "auto", thinking_variables("high"), False),
        ("qwen3", "auto", thinking_variables("none"), None),
        ("qwen3", "qwen3", {}, False),
        ("qwen3", "none", {}, None),
        ("qwen3", "deepseek_r1", {}, True),
        ("qwen3", "deepseek_r1", thinking_variables(enabled=False), None),
        ("qwen3.5", "auto", {}, True),
        ("qwen3.5", "auto", {"enable_thinking": False}, None),
        ("mistral", "auto", {}, False),
        ("plain", "auto", {}, None),
        ("plain", "qwen3", {}, False),
    ],
)
def test_the_prompt_says_whether_an_answer_thinks(tmp_path, template, parser, variables, opened):
    tokenizer = with_template(tmp_path, TEMPLATES[template])
    thinking = job(tokenizer, chat(variables), parser).thinking
    assert (None if thinking is None else thinking.opened) == opened
    if thinking is not None and template == "mistral":
        assert thinking == tags(tokenizer, False, "[THINK]", "[/THINK]")


@pytest.mark.parametrize(("begun", "opened"), [("<think>\nHm", True), ("<think>Hm</think>Yes", None), ("Yes", None)])
def test_a_continued_message_thinks_if_it_has_begun_to(tmp_path, begun, opened):
    tokenizer = with_template(tmp_path, OPENS.removesuffix("<|im_start|>assistant\n") + "{# </think> #}")
    request = chat(continue_final_message=True)
    request.chat.messages.add(role="assistant", content=begun)
    thinking = job(tokenizer, request).thinking
    assert (None if thinking is None else thinking.opened) == opened


def test_only_chats_have_reasoning(tmp_path):
    tokenizer = with_template(tmp_path, TEMPLATES["qwen3.5"])
    assert job(tokenizer, inference_pb2.GenerateRequest(text="Hm <think>")).thinking is None


def test_a_format_whose_tokens_the_model_lacks_is_refused(byte_level_tokenizer):
    assert find_reasoning("auto", byte_level_tokenizer) is None
    with pytest.raises(InvalidPair, match="--reasoning-parser mistral needs the tokens '\\[THINK\\]'"):
        find_reasoning("mistral", byte_level_tokenizer)


def test_reasoning_is_sent_back_to_templates_that_show_it(tmp_path):
    source = OPENS.replace("{{ m.content }}", "{{ m.reasoning_content or '' }}|{{ m.content }}")
    tokenizer, request = with_template(tmp_path, source), chat()
    request.chat.messages.add(role="assistant", content="Yes.", reasoning="Hm.")
    request.chat.messages.add(role="user", content="Why?")
    assert "assistant\nHm.|Yes." in tokenizer.decode(job(tokenizer, request).prompt_token_ids)
    request.chat.messages[0].reasoning = "Hm."
    with pytest.raises(InvalidRequest, match=r"chat.messages\[0\].reasoning: is set in a message of role 'user'"):
        job(tokenizer, request)


def test_reasoning_is_a_block_of_the_content_for_templates_of_mistral(tmp_path):
    blocks = (
        "{% if m.content is string %}{{ m.content }}{% else %}{% for b in m.content %}{% if b.type == 'thinking' %}"
        "[THINK]{{ b['thinking'] }}[/THINK]{% else %}{{ b.text }}{% endif %}{% endfor %}{% endif %}"
    )
    tokenizer, request = with_template(tmp_path, OPENS.replace("{{ m.content }}", blocks)), chat()
    request.chat.messages.add(role="assistant", content="Yes.", reasoning="Hm.")
    request.chat.messages.add(role="assistant", reasoning="So.")
    request.chat.messages.add(role="assistant", content="No.")
    ids = job(tokenizer, request).prompt_token_ids
    for shown in ("[THINK]Hm.[/THINK]Yes.<|im_end|>", "[THINK]So.[/THINK]<|im_end|>", "\nNo.<|im_end|>"):
        wanted = tokenizer.encode_continuation(shown)
        assert any(list(ids[i : i + len(wanted)]) == wanted for i in range(len(ids))), shown


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = ToolDefinition("now", parameters=SCHEMA)
CALL = HERMES.write([("now", '{"a": 1}')])

# A grammar, answers in it, and others.
GRAMMARS = {
    "json_object": (Grammar("json_object"), ['{"a": 1}'], ["Yes"]),
    "json_schema": (Grammar.json_schema(SCHEMA), ['{"a": 1}'], ['{"b": 1}', "Yes"]),
    "regex": (Grammar("regex", "a/b\n\\\\/[c\\/]\\d"), ["a/b\n\\/c1"], ["a/b\n\\c1"]),
    "lark": (Grammar("lark", '%import common.INT\nstart: "}" INT // a brace {\n'), ["}12"], ["12"]),
    "required tool": (Grammar("lark", tools_grammar([TOOL], "required", single=False)), [CALL], ["Yes"]),
    "tools": (Grammar("lark", tools_grammar([TOOL], "auto", single=False)), ["Yes", f"So: {CALL}"], [CALL[:-1]]),
}


@pytest.fixture(scope="module")
def grammars(tokenizer):
    made = Grammars(MODEL / "tokenizer.json", 6144, tokenizer.eos_token_ids)
    yield made
    made.close()


@pytest.mark.parametrize(("grammar", "fitting", "others"), GRAMMARS.values(), ids=GRAMMARS.keys())
@pytest.mark.parametrize("opened", [True, False])
def test_a_model_thinks_before_an_answer_in_a_grammar(tokenizer, grammars, grammar, fitting, others, opened):
    thinking = tags(tokenizer, opened)

    def fits(text):
        matcher = grammars.matcher(after_thinking(grammar, thinking))
        try:
            matcher.accept([*tokenizer.encode_continuation(text), tokenizer.end_of_answer])
        except InvalidRequest:
            return False
        return True

    begin = "" if opened else "<think>"
    for answer in fitting:
        assert fits(f"{begin}\nI may write {CALL} or {{}}.\n</think>\n\n{answer}")
        assert fits(f"{begin}</think>{answer}")
        assert not fits(f"{begin}{answer}"), "the thinking has an end"
        assert fits(answer) == (not opened), "a model need not think"
    for answer in others:
        assert not fits(f"{begin}Hm</think>{answer}")


def test_the_grammar_of_a_request_leaves_room_for_thinking(tmp_path):
    tokenizer = with_template(tmp_path, TEMPLATES["qwen3.5"])
    for variables, kind in (({}, "lark"), ({"enable_thinking": False}, "regex")):
        request = chat(variables)
        request.sampling.grammar.regex = "yes|no"
        made = job(tokenizer, request)
        assert made.start.sampling.grammar.WhichOneof("kind") == kind
        assert isinstance(find_reasoning("auto", tokenizer), Reasoning)
