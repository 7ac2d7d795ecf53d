"""Tests tools: how the model is told of them, which calls its grammar allows, and how calls are parsed."""

import json
import shutil
from decimal import Decimal
from pathlib import Path

import pytest
from pydantic import UUID4, IPvAnyAddress, SecretStr, create_model

from overfill.api.chat import encode_chat
from overfill.api.chat_template import ChatTemplate
from overfill.api.families.hermes import Hermes
from overfill.api.families.reader import ToolCallReader
from overfill.api.openai import schema, translate
from overfill.api.openai.parse import parse
from overfill.api.stop import StopStrings
from overfill.api.tokenizer import Tokenizer
from overfill.api.tools import ToolDefinition, check_tools
from overfill.api.tools_grammar import chat_grammar, tools_grammar
from overfill.errors import InvalidRequest
from overfill.request.grammar import Grammars
from overfill.request.params import Grammar
from overfill.v1 import inference_pb2

HERMES = Hermes()
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [ToolDefinition("weather", "Tells the weather.", SCHEMA), ToolDefinition("now")]
CALLS = [("weather", '{"city": "Köln }{ \\" ]", "days": 3}'), ("now", "{}")]


def read(text, cut):
    """Pushes ``text`` in pieces of ``cut`` characters; returns the text outside and the calls."""
    reader, outside, calls = ToolCallReader(StopStrings(()), HERMES, TOOLS), [], []
    for start in range(0, len(text), cut):
        said, parts = reader.push(text[start : start + cut])
        outside.append(said)
        for part in parts:
            if part.name:
                assert part.index == len(calls)
                calls.append((part.name, ""))
            name, arguments = calls[part.index]
            calls[part.index] = (name, arguments + part.arguments)
    outside.append(reader.finish())
    return "".join(outside), calls


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("before", ["", "Let me look.", "<tool_call> is no call", "a\n\n"])
def test_calls_are_read_back_however_the_text_is_cut(cut, before):
    text = f"{before}\n{HERMES.write(CALLS)}" if before else HERMES.write(CALLS)
    assert read(text, cut) == (before.rstrip(), CALLS)


@pytest.mark.parametrize("cut", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    "text", ["", " ", "plain  \n", "ends in <tool_ca", "<tool_call>\n{", "a <b> c\n\nd", "<tool_call>{}"]
)
def test_text_without_calls_stays_as_it_is(cut, text):
    assert read(text, cut) == (text, [])


def test_text_is_given_out_as_soon_as_it_is_certain():
    reader = ToolCallReader(StopStrings(()), HERMES, TOOLS)
    assert reader.push("Hello wor")[0] == "Hello wor"
    assert reader.push("ld <tool")[0] == "ld"
    assert reader.push("box>")[0] == " <toolbox>"


def test_arguments_are_given_out_while_they_come():
    reader = ToolCallReader(StopStrings(()), HERMES, TOOLS)
    parts = reader.push('<tool_call>\n{"name": "weather", "arguments": {"city": "K')[1]
    assert [(part.name, part.arguments) for part in parts] == [("weather", ""), ("", '{"city": "K')]
    assert reader.calls == 0, "the call is not complete"


def test_a_call_that_was_cut_short_leaves_no_text():
    assert read('Look: <tool_call>\n{"name": "weather", "arguments": {"ci', 4) == ("Look:", [("weather", '{"ci')])
    assert read('Look: <tool_call>\n{"name": "wea', 4) == ("Look:", [])


@pytest.fixture(scope="module")
def grammars(tiny_pair):
    return Grammars(tiny_pair / "full" / "tokenizer.json", 512, [1])


def accepts(grammars, grammar, text):
    """True if the whole text follows the grammar; token 1 ends an answer."""
    import tokenizers

    matcher = grammars.matcher(Grammar("lark", grammar))
    ids = tokenizers.Tokenizer.from_file(str(grammars._path)).encode(text, add_special_tokens=False).ids
    try:
        matcher.accept([*ids, 1])
    except InvalidRequest:
        return False
    return True


@pytest.mark.parametrize("mode", ["auto", "required"])
@pytest.mark.parametrize("single", [True, False])
def test_the_grammar_accepts_calls_as_write_calls_writes_them(grammars, mode, single):
    grammar = tools_grammar(TOOLS, mode, single=single)
    one, two = HERMES.write(CALLS[:1]), HERMES.write(CALLS)
    assert accepts(grammars, grammar, one)
    assert accepts(grammars, grammar, two) == (not single)
    assert accepts(grammars, grammar, "Just text.") == (mode == "auto")
    assert accepts(grammars, grammar, f"First text.\n{one}") == (mode == "auto")
    for wrong in ('{"city": 5}', '{"days": 1}', '{"city": "x", "other": 1}', '{"city": "x"'):
        assert not accepts(grammars, grammar, HERMES.write([("weather", wrong)])), wrong
    assert not accepts(grammars, grammar, HERMES.write([("unknown", "{}")]))


def test_the_grammar_of_a_text_holds_inside_the_call(grammars):
    text = Grammar("lark", 'start: "\\"" /[^"]*/ "\\""')
    taking = ToolDefinition("note", parameters={"properties": {"input": {"type": "string"}}}, input=text)
    grammar = tools_grammar([*TOOLS, taking], "auto", single=False)
    for text, right in [('"a\n\\ \u2028"', True), ('""', True), ("a", False), ('"a"b"', False)]:
        call = HERMES.write([("note", json.dumps({"input": text}, ensure_ascii=False)), *CALLS])
        assert accepts(grammars, grammar, f"Text.\n{call}") == right, text
    assert not accepts(grammars, grammar, HERMES.write([("note", '{"other": "x"}')]))


@pytest.mark.parametrize("mode", ["auto", "required"])
@pytest.mark.parametrize("single", [True, False])
def test_an_answer_with_a_schema_is_of_this_schema_or_calls_tools(grammars, mode, single):
    schema = {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"n": {"type": "integer"}}}}}
    grammar = tools_grammar(TOOLS, mode, single=single, answer=schema)
    one, two = HERMES.write(CALLS[:1]), HERMES.write(CALLS)
    assert accepts(grammars, grammar, '{"n": 1}') == (mode == "auto")
    assert accepts(grammars, grammar, one)
    assert accepts(grammars, grammar, two) == (not single)
    for wrong in ("Just text.", '{"n": "x"}', f"First text.\n{one}", f'{{"n": 1}}\n{one}'):
        assert not accepts(grammars, grammar, wrong), wrong


@pytest.mark.parametrize(
    ("field", "tools"),
    [
        ("chat.tools[0].name", [ToolDefinition("")]),
        ("chat.tools[0].name", [ToolDefinition("a b")]),
        ("chat.tools[1].name", [ToolDefinition("a"), ToolDefinition("a")]),
        ("chat.tools[0].parameters", [ToolDefinition("a", "", {"type": "string"})]),
        ("chat.tools", [ToolDefinition(f"t{i}") for i in range(129)]),
    ],
)
def test_bad_tools_are_named(field, tools):
    with pytest.raises(InvalidRequest) as caught:
        check_tools(tools)
    assert caught.value.field == field


def chat(**fields):
    messages = [{"role": "user", "content": "Hi"}]
    return inference_pb2.Chat(**({"messages": messages} | fields))


def test_a_template_that_knows_no_tools_gets_them_in_the_system_message(byte_level_tokenizer):
    tool = inference_pb2.Tool(name="weather", description="Tells.", parameters=json.dumps(SCHEMA))
    text = byte_level_tokenizer.decode(encode_chat(chat(tools=[tool]), byte_level_tokenizer))
    assert HERMES.describe([ToolDefinition("weather", "Tells.", SCHEMA)]) in text
    system = {"role": "system", "content": "Be brief."}
    text = byte_level_tokenizer.decode(
        encode_chat(chat(tools=[tool], messages=[system, {"role": "user", "content": "Hi"}]), byte_level_tokenizer)
    )
    assert text.index("Be brief.") < text.index("<tools>") < text.index("Hi")
    none = inference_pb2.ToolChoice(mode=inference_pb2.ToolChoice.MODE_NONE)
    text = byte_level_tokenizer.decode(encode_chat(chat(tools=[tool], tool_choice=none), byte_level_tokenizer))
    assert "<tools>" not in text


def test_calls_and_their_results_go_back_to_the_model(byte_level_tokenizer):
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "tool_calls": [{"id": "c1", "name": "weather", "arguments": '{"city": "Rome"}'}]},
        {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
    ]
    text = byte_level_tokenizer.decode(encode_chat(chat(messages=messages), byte_level_tokenizer))
    assert HERMES.write([("weather", '{"city": "Rome"}')]) in text
    assert "<tool_response>\nsunny\n</tool_response>" in text


def test_a_result_needs_its_call(byte_level_tokenizer):
    call = {"role": "assistant", "tool_calls": [{"id": "c1", "name": "weather"}]}
    result = {"role": "tool", "content": "sunny", "tool_call_id": "c1"}
    for messages, wrong in (([result], 0), ([result, call], 0), ([call, result, result | {"tool_call_id": "c2"}], 2)):
        with pytest.raises(InvalidRequest, match="the id of no tool call in the messages before it") as caught:
            encode_chat(chat(messages=messages), byte_level_tokenizer)
        assert caught.value.field == f"chat.messages[{wrong}].tool_call_id"
    assert encode_chat(chat(messages=[call, result, result]), byte_level_tokenizer)


def calls_of_an_assistant(*arguments):
    calls = [{"id": f"c{n}", "name": "weather", "arguments": text} for n, text in enumerate(arguments)]
    return [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Look:", "tool_calls": calls}]


# Arguments that max_tokens has cut, and others that are no JSON object.
@pytest.mark.parametrize("arguments", ['{"city": "Ro', "{", "[1]", '"x"', "[" * 10_000], ids=lambda text: text[:9])
def test_arguments_that_are_no_object_go_back_to_the_model_as_they_are(byte_level_tokenizer, arguments):
    messages = calls_of_an_assistant('{"city": "Rome"}', arguments)
    said = HERMES.write([("weather", '{"city": "Rome"}'), ("weather", arguments)])
    assert f"Look:\n{said}" in byte_level_tokenizer.decode(encode_chat(chat(messages=messages), byte_level_tokenizer))


def test_a_template_that_knows_tools_gets_calls_as_objects_and_cut_calls_as_text(tmp_path, byte_level_folder):
    shutil.copytree(byte_level_folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "[{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}]{% endfor %}{% endfor %}{{ tools }}"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)

    def shown(*arguments):
        return tokenizer.decode(encode_chat(chat(messages=calls_of_an_assistant(*arguments)), tokenizer))

    cut = '{"city": "Ro'
    assert "Look:[city=Rome][]" in shown('{"city": "Rome"}', "")
    assert "Look:\n" + HERMES.write([("weather", "{}"), ("weather", cut)]) in shown("", cut)
    for unreadable in ('{"city": "\\ud800"}', '{"city": NaN}', '{"a":' * 300 + "1" + "}" * 300):
        assert "Look:\n" + HERMES.write([("weather", unreadable)]) in shown(unreadable)


STRICT_TEMPLATES = {
    "mistral": "{% if (m.tool_call_id or c.id) | length != 9 %}{{ raise_exception('id') }}{% endif %}[TOOL_CALLS] ",
    "llama3_json": '{% if m.tool_calls | length > 1 %}{{ raise_exception("two calls") }}{% endif %}<|python_tag|>',
}


@pytest.mark.parametrize("name", STRICT_TEMPLATES)
def test_calls_and_ids_are_shown_as_a_family_s_template_takes_them(tmp_path, byte_level_folder, name):
    shutil.copytree(byte_level_folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or ([m] if m.tool_call_id else []) %}"
        f"{STRICT_TEMPLATES[name]}{{{{ c.id or m.tool_call_id }}}}{{% endfor %}}{{% endfor %}}{{{{ tools }}}}"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.tool_format.name == name
    calls = calls_of_an_assistant("{}", '{"city": "Rome"}')
    results = [{"role": "tool", "content": "", "tool_call_id": f"c{n}"} for n in range(2)]
    text = tokenizer.decode(encode_chat(chat(messages=[*calls, *results]), tokenizer))
    if name == "mistral":
        ids = [part[:9] for part in text.split("[TOOL_CALLS] ")[1:]]
        assert ids[:2] == ids[2:]
        assert ids[0] != ids[1]
    else:
        assert '{"name": "weather", "parameters": {}}; {"name": "weather", "parameters": {"city": "Rome"}}' in text


def test_a_template_that_knows_tools_gets_them_in_openai_s_form():
    template = ChatTemplate("{% for t in tools %}{{ t.function.name }};{% endfor %}", {})
    assert template.knows_tools
    assert template.render([], [{"type": "function", "function": {"name": "weather"}}]) == "weather;"
    assert not ChatTemplate("{{ messages }}", {}).knows_tools


def chat_of_agent(strict, **parameters):
    """A chat over HTTP with two tools, ``ok`` and ``f``."""
    tools = [{"name": "ok"}, {"name": "f", "parameters": parameters, "strict": strict}]
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
    body["tools"] = [{"type": "function", "function": tool} for tool in tools]
    return translate.chat(parse(schema.ChatRequest, json.dumps(body).encode()), "id").prompts[0].chat


def of_pydantic(kind):
    return create_model("Arguments", a=(kind, ...)).model_json_schema()


def of_property(**keywords):
    return {"type": "object", "properties": {"a": keywords, "days": {"type": "integer"}}, "required": ["a"]}


NOT_ENFORCED = {
    "set": of_pydantic(set[str]),
    "uuid": of_pydantic(UUID4),
    "path": of_pydantic(Path),
    "bytes": of_pydantic(bytes),
    "secret": of_pydantic(SecretStr),
    "address": of_pydantic(IPvAnyAddress),
    "int64": of_property(type="string", format="int64"),
    "property names": of_property(type="object", propertyNames={"minLength": 2}),
    "not": of_property(**{"not": {"type": "null"}}),
    "if": of_property(type="string") | {"if": {"required": ["days"]}, "then": {"required": ["a"]}},
    "dependent": of_property(type="string") | {"dependentRequired": {"a": ["days"]}},
    "contains": of_property(type="array", contains={"type": "string"}),
    "unevaluated": of_property(type="string") | {"unevaluatedProperties": False},
    "one of": of_property(oneOf=[{"type": "string"}, {"enum": ["x"]}]),
    "look-ahead": of_property(type="string", pattern="^(?!.*--)[a-z]+$"),
    "unknown type": of_property(type="any"),
}
ENFORCED = {
    "decimal": of_pydantic(Decimal),
    "int64": of_property(type="integer", format="int64"),
    "null": of_property(type="integer") | {"type": ["object", "null"]},
}


@pytest.mark.parametrize("parameters", [*NOT_ENFORCED.values(), *ENFORCED.values()], ids=[*NOT_ENFORCED, *ENFORCED])
def test_schemas_as_agents_send_them_are_accepted(grammars, parameters):
    made = chat_grammar(chat_of_agent(False, **parameters)).text
    assert accepts(grammars, made, HERMES.write([("ok", "{}")]))
    assert not accepts(grammars, made, HERMES.write([("f", "[]")])), "arguments are an object"


@pytest.mark.parametrize("parameters", NOT_ENFORCED.values(), ids=NOT_ENFORCED)
def test_a_strict_tool_whose_schema_cannot_be_enforced_is_refused_by_name(parameters):
    with pytest.raises(InvalidRequest, match="strict tool 'f' cannot be turned into a grammar") as caught:
        chat_grammar(chat_of_agent(True, **parameters))
    assert caught.value.field == "chat.tools[1].parameters"


@pytest.mark.parametrize("parameters", ENFORCED.values(), ids=ENFORCED)
def test_a_strict_tool_whose_schema_can_be_enforced_is_accepted(parameters):
    assert chat_grammar(chat_of_agent(True, **parameters))


@pytest.mark.parametrize("name", ["look-ahead", "unevaluated"])
def test_what_can_be_enforced_of_a_schema_still_is(grammars, name):
    made = chat_grammar(chat_of_agent(False, **NOT_ENFORCED[name])).text
    for arguments, fits in ('{"a": "B--", "days": 3}', True), ('{"a": 5}', False), ('{"a": "b", "days": "x"}', False):
        assert accepts(grammars, made, HERMES.write([("f", arguments)])) == fits, arguments


def test_a_property_may_be_named_pattern(grammars):
    parameters = {"properties": {"pattern": {"type": "string", "pattern": "(?=a)"}}, "required": ["pattern"]}
    made = chat_grammar(chat_of_agent(False, **parameters)).text
    assert accepts(grammars, made, HERMES.write([("f", '{"pattern": "a"}')]))
    assert not accepts(grammars, made, HERMES.write([("f", "{}")]))


@pytest.mark.parametrize("keyword", ["enum", "const"])
def test_values_that_look_like_schemas_stay_as_they_are(grammars, keyword):
    value = {"pattern": "x", "properties": {"a": {"pattern": "y"}}}
    data = {"enum": [value]} if keyword == "enum" else {"const": value}
    parameters = of_property(**data) | {"propertyNames": {"minLength": 1}}
    parameters["properties"]["days"] = {"type": "string", "pattern": "(?=a)"}
    made = chat_grammar(chat_of_agent(False, **parameters)).text
    assert accepts(grammars, made, HERMES.write([("f", json.dumps({"a": value}))]))
    assert not accepts(grammars, made, HERMES.write([("f", '{"a": {}}')]))


def test_a_property_may_be_named_like_a_keyword_with_values(grammars):
    inner = {"properties": {"enum": {"type": "string", "pattern": "(?=a)"}, "days": {"type": "integer"}}}
    made = chat_grammar(chat_of_agent(False, properties={"default": {"type": "object"} | inner})).text
    assert accepts(grammars, made, HERMES.write([("f", '{"default": {"enum": "b", "days": 3}}')]))
    assert not accepts(grammars, made, HERMES.write([("f", '{"default": {"enum": "b", "days": "x"}}')]))


def test_a_pattern_that_can_be_enforced_is_enforced_beside_one_that_cannot(grammars):
    pattern = {"type": "string", "pattern": "^[a-z]+$"}
    parameters = {"properties": {"good": pattern, "bad": {"type": "string", "pattern": "(?=a)"}}}
    made = chat_grammar(chat_of_agent(False, **parameters)).text
    assert accepts(grammars, made, HERMES.write([("f", '{"good": "a", "bad": "B"}')]))
    assert not accepts(grammars, made, HERMES.write([("f", '{"good": "A", "bad": "B"}')]))


def test_a_pattern_that_contradicts_its_format_leaves_the_rest_of_the_schema(grammars):
    pattern = {"type": "string", "format": "date", "pattern": "^x$"}
    made = chat_grammar(chat_of_agent(False, properties={"a": pattern}, required=["a"])).text
    assert accepts(grammars, made, HERMES.write([("f", '{"a": "2026-01-01"}')]))
    assert not accepts(grammars, made, HERMES.write([("f", '{"a": 5}')]))


def test_a_chat_s_grammar_has_the_schema_of_its_answers():
    kind = inference_pb2.ToolChoice
    tools = [inference_pb2.Tool(name="weather")]
    wanted, anything = Grammar.json_schema({"enum": [17]}), Grammar("json_object")
    assert "17" in chat_grammar(chat(tools=tools), wanted).text
    assert "answer: %json" in chat_grammar(chat(tools=tools), anything).text
    assert "17" not in chat_grammar(chat(tools=tools, tool_choice=kind(mode=kind.MODE_REQUIRED)), wanted).text
    assert chat_grammar(chat(tools=tools, tool_choice=kind(mode=kind.MODE_NONE)), wanted) is None
    for other in (Grammar("regex", "a"), Grammar("lark", 'start: "a"')):
        with pytest.raises(InvalidRequest, match="cannot be combined with tools") as caught:
            chat_grammar(chat(tools=tools), other)
        assert caught.value.field == f"sampling.grammar.{other.kind}"


def test_only_a_chat_with_tools_has_a_grammar():
    kind = inference_pb2.ToolChoice
    tool = inference_pb2.Tool(name="weather")
    assert chat_grammar(chat()) is None
    assert chat_grammar(chat(tools=[tool], tool_choice=kind(mode=kind.MODE_NONE))) is None
    assert "TEXT" in chat_grammar(chat(tools=[tool])).text
    named = kind(mode=kind.MODE_REQUIRED, name="weather")
    other = inference_pb2.Tool(name="other")
    assert "other" not in chat_grammar(chat(tools=[tool, other], tool_choice=named)).text
    for wrong in (kind(mode=kind.MODE_REQUIRED, name="none"), kind(name="weather")):
        with pytest.raises(InvalidRequest, match="tool_choice"):
            chat_grammar(chat(tools=[tool], tool_choice=wrong))
    with pytest.raises(InvalidRequest, match="no tools"):
        chat_grammar(chat(tool_choice=kind(mode=kind.MODE_REQUIRED)))
