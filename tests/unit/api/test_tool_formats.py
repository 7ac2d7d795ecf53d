"""Tests the formats of tool calls: what each writes, which answers its grammar allows, and how calls are read."""

import json
import random
from functools import cache
from itertools import pairwise

import pytest
import tokenizers

from overfill.api.answer_text import AnswerText
from overfill.api.detokenizer import StreamDetokenizer
from overfill.api.families.choose import choose_format, make_format
from overfill.api.families.parameters import KnownTools
from overfill.api.families.reader import ToolCallReader
from overfill.api.stop import StopStrings
from overfill.api.tokenizer import Tokenizer
from overfill.api.tools import ToolDefinition
from overfill.api.tools_grammar import tools_grammar
from overfill.errors import InvalidRequest
from overfill.making.mock_pair import FOLDER
from overfill.request.grammar import Grammars, Matcher
from overfill.request.params import Grammar
from overfill.routing.answer import AnswerDelta

PARSERS = ("hermes", "llama3_json", "pythonic", "mistral", "mistral_args", "qwen3_coder")
STRING, INTEGER = {"type": "string"}, {"type": "integer"}
QWEN_MODE = "<tool_call>\n<function=write>\n<parameter=mode>\n"
STRINGS = {"type": "array", "items": STRING}


def closed(required=(), definitions=None, **properties):
    made = {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}
    return made | ({"$defs": definitions} if definitions else {})


PLACE = closed(["name"], name=STRING, at={"type": "array", "items": {"type": "number"}})
COLOUR = {"enum": ["red", "bright green"], "type": "string"}
TOOLS = [
    ToolDefinition(
        "write",
        "Writes a file.",
        closed(
            ["path"],
            path=STRING,
            text=STRING,
            mode=INTEGER,
            force={"type": "boolean"},
            tags={"items": STRING, "type": "array"},
        ),
    ),
    ToolDefinition("now"),
    ToolDefinition(
        "place-it",
        parameters=closed(
            definitions={"Place": PLACE, "Colour": COLOUR},
            place={"$ref": "#/$defs/Place"},
            colour={"$ref": "#/$defs/Colour"},
            note={"anyOf": [STRING, {"type": "null"}]},
            level={"type": ["integer", "null"]},
            code={"anyOf": [STRING, INTEGER]},
            big={"type": "number"},
        ),
    ),
    ToolDefinition("open", parameters={"type": "object", "properties": {"a": STRING}, "additionalProperties": True}),
    ToolDefinition("odd", parameters=closed(**{"two words": STRING, "b": INTEGER})),
    ToolDefinition("exact", parameters=closed(["day"], day={"type": "string", "format": "date"}), strict=True),
    ToolDefinition(
        "patch",
        parameters=closed(["input"], input=STRING),
        input=Grammar("lark", 'start: ("+" /.*/ LF)+\n%import common.LF'),
    ),
]
KNOWN = KnownTools(TOOLS)
ANSWER = closed(["n"], n=INTEGER)

CALLS = {
    "one": [("write", {"path": "a.py", "text": "x = 1\n"})],
    "none": [("now", {})],
    "several": [("write", {"path": "a"}), ("now", {}), ("write", {"path": "b", "mode": -7, "force": True})],
    "unicode and quotes": [
        ("write", {"path": "Köln 世界 👩‍👩‍👧", "text": "\"'\\ }{ ][ )(, </tool_call>\n\n<b>; =\t\u2028"})
    ],
    "empty values": [("write", {"path": "", "text": "", "tags": []})],
    "lists": [("write", {"path": "p", "mode": 0, "force": False, "tags": ["a]", "b, \"c\"", ")"]})],
    "nested": [("place-it", {"place": {"name": "}", "at": [1.5, -2e3]}, "colour": "bright green"})],
    "null": [("place-it", {"note": None, "level": None}), ("place-it", {"note": "nullify", "level": 3})],
    "text like JSON": [("write", {"path": "null", "text": '{"a": [1, true]}'}), ("write", {"path": "12"})],
    "text with tags": [("write", {"path": "</parameter>", "text": "\n<parameter=x>\n</parameter> \n</function>\n"})],
    "other fields": [("open", {"a": "b", "c": {"d": [None]}})],
    "text of a grammar": [("patch", {"input": "+\n+\t\"\\ 世界\u2028 </parameter>\n+</tool_call>\n"}), ("now", {})],
    "odd names": [("odd", {"two words": "x", "b": 2})],
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(FOLDER / "model")


@pytest.fixture(scope="module")
def grammars(tokenizer):
    config = json.loads((FOLDER / "model" / "config.json").read_text())
    return Grammars(FOLDER / "model" / "tokenizer.json", config["vocab_size"], config["eos_token_id"])


@pytest.fixture(scope="module")
def format_of(tokenizer):
    """Makes a format with the special tokens of the mock pair's tokenizer, or without any."""
    special = {tokenizer.token_bytes(id).decode(): id for id in range(6000, 6060)}

    @cache
    def make(name, with_tokens=True):
        bare = make_format(name, ())
        return make_format(name, [special.get(text) if with_tokens else None for text in bare.special])

    return make


def as_json(calls):
    return [(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls]


def marked(format, text):
    """``text`` as the detokenizer writes it."""
    for name, marker in zip(format.special, format._markers, strict=True):
        text = text.replace(name, marker.shown)
    return text


def read(format, pieces, tools=TOOLS):
    """Returns the text and the calls of an answer, and whether all calls are complete."""
    reader, outside, calls = ToolCallReader(StopStrings(()), format, tools), [], []
    for piece in pieces:
        said, parts = reader.push(piece)
        outside.append(said)
        for part in parts:
            if part.name:
                assert part.index == len(calls)
                calls.append([part.name, ""])
            calls[part.index][1] += part.arguments
    outside.append(reader.finish())
    return "".join(outside), [tuple(call) for call in calls], reader.calls == len(calls)


def divisions(text):
    """All ways to cut a short text once, 40 ways to cut a longer one, single characters, and a few random ones."""
    yield [text]
    yield list(text)
    chooser = random.Random(7)
    cuts = range(1, len(text)) if len(text) < 80 else chooser.sample(range(1, len(text)), 40)
    yield from ([text[:cut], text[cut:]] for cut in cuts)
    for _ in range(10):
        cuts = sorted(chooser.sample(range(1, len(text)), min(len(text) - 1, 9)))
        yield [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]


@cache
def grammar_of(format, mode, *, single, answer=False):
    """The grammar of TOOLS, with ``answer`` also of the answer ANSWER."""
    return tools_grammar(TOOLS, mode, single=single, answer=ANSWER if answer else None, format=format)


@cache
def compiled(grammars, grammar):
    return grammars.matcher(Grammar("lark", grammar))._matcher


def accepts(grammars, tokenizer, grammar, text):
    matcher = Matcher(compiled(grammars, grammar).deep_copy())
    try:
        matcher.accept([*tokenizer.encode_continuation(text), tokenizer.end_of_answer])
    except InvalidRequest:
        return False
    return True


@pytest.mark.parametrize("with_tokens", [True, False], ids=["tokens", "texts"])
@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("name", PARSERS)
def test_calls_are_read_back_however_the_text_is_cut(format_of, name, calls, with_tokens):
    format = format_of(name, with_tokens)
    for before in ("", "Let me [look] at <it> {now}.\n"):
        text = marked(format, before + format.write(as_json(calls), KNOWN))
        for pieces in divisions(text):
            said, got, complete = read(format, pieces)
            assert (said, complete) == (before.rstrip(), True)
            assert [(name, json.loads(arguments)) for name, arguments in got] == calls
            assert got == as_json(calls)


@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("name", PARSERS)
def test_the_grammar_accepts_what_the_format_writes(format_of, grammars, tokenizer, name, calls):
    format, text = format_of(name), format_of(name).write(as_json(calls), KNOWN)
    for mode in ("auto", "required"):
        for single in (True, False):
            grammar = grammar_of(format, mode, single=single)
            fits = len(calls) == 1 or not single
            assert accepts(grammars, tokenizer, grammar, text) == fits
            assert accepts(grammars, tokenizer, grammar, f"First this.\n{text}") == (fits and mode == "auto")
            assert accepts(grammars, tokenizer, grammar, "Only text.") == (mode == "auto")
            assert not accepts(grammars, tokenizer, grammar, f"{text} more")
            assert not accepts(grammars, tokenizer, grammar, text[:-1])
    answers = grammar_of(format, "auto", single=False, answer=True)
    assert accepts(grammars, tokenizer, answers, text)
    assert accepts(grammars, tokenizer, answers, '{"n": 1}')
    assert not accepts(grammars, tokenizer, answers, f'{{"n": 1}}{text}')


@pytest.mark.parametrize(
    "wrong",
    [
        ("unknown", {}),
        ("write", {}),
        ("write", {"path": "a", "other": 1}),
        ("write", {"path": "a", "mode": "x"}),
        ("write", {"path": "a", "force": "yes"}),
        ("write", {"path": "a", "tags": [1]}),
        ("now", {"a": 1}),
        ("place-it", {"colour": "blue"}),
        ("place-it", {"place": {"at": []}}),
        ("exact", {"day": "today"}),
        ("patch", {"input": "+a\n-b\n"}),
        ("patch", {"input": "+a"}),
    ],
)
@pytest.mark.parametrize("name", PARSERS)
def test_the_grammar_refuses_other_calls(format_of, grammars, tokenizer, name, wrong):
    format = format_of(name)
    grammar = grammar_of(format, "required", single=False)
    assert not accepts(grammars, tokenizer, grammar, format.write(as_json([wrong]), KNOWN))


@pytest.mark.parametrize("name", PARSERS)
def test_any_answer_of_the_grammar_is_read(format_of, grammars, tokenizer, name):
    format, generator = format_of(name), random.Random(3)
    ended = 0
    for tool in TOOLS:
        grammar = Grammar("lark", tools_grammar([tool], "required", single=True, format=format))
        matcher, ids = grammars.matcher(grammar), []
        accept = matcher.accept
        matcher.accept = lambda tokens, ids=ids, accept=accept: (accept(tokens), ids.extend(tokens))
        for _ in range(300):
            if not matcher.advance(generator):
                break
        text = AnswerText(StreamDetokenizer(tokenizer, shown=format.shown), (), (), (format, TOOLS))
        delta = text.push(AnswerDelta(0, ids))
        arguments = "".join(part.arguments for part in delta.tool_calls)
        assert delta.text == ""
        if text.called_tools:
            ended += 1
            assert isinstance(json.loads(arguments), dict)
    assert ended, "some answer is complete"


@pytest.mark.parametrize("name", PARSERS)
def test_a_cut_leaves_the_beginning_of_the_call(format_of, name):
    format = format_of(name)
    text = marked(format, format.write(as_json(CALLS["several"]), KNOWN))
    whole = read(format, [text])[1]
    for cut in range(1, len(text)):
        said, calls, complete = read(format, [text[:cut]])
        assert not complete or len(calls) < 3 or calls == whole
        for (name_, arguments), (full_name, full) in zip(calls, whole, strict=False):
            assert name_ == full_name
            assert full.startswith(arguments)
        assert not calls or not said


@pytest.mark.parametrize("name", PARSERS)
def test_another_router_goes_on_inside_any_call(format_of, tokenizer, name):
    format, calls = format_of(name), [*CALLS["several"], *CALLS["nested"], *CALLS["unicode and quotes"]]
    ids = tokenizer.encode_continuation(f"Look.\n{format.write(as_json(calls), KNOWN)}")

    def answer(replayed):
        return AnswerText(StreamDetokenizer(tokenizer, (), format.shown), ["STOP"], replayed, (format, TOOLS), "seed")

    def shown(deltas):
        made = [["", "", ""] for _ in calls]
        for part in (part for delta in deltas for part in delta.tool_calls):
            new = (part.id, part.name, part.arguments)
            made[part.index] = [old + more for old, more in zip(made[part.index], new, strict=True)]
        return "".join(delta.text for delta in deltas), made

    whole = shown([answer(()).push(AnswerDelta(0, list(ids)))])
    assert [(name, arguments) for _, name, arguments in whole[1]] == as_json(calls)
    for cut in range(1, len(ids)):
        before = answer(()).push(AnswerDelta(0, ids[:cut]))
        assert shown([before, answer(ids[:cut]).push(AnswerDelta(cut, ids[cut:]))]) == whole


@pytest.mark.parametrize("name", PARSERS)
@pytest.mark.parametrize("stop", ["\n", "}", "write", "[", "<", "a.py"])
def test_stop_strings_count_only_before_calls(format_of, name, stop):
    format = format_of(name)
    text = marked(format, format.write(as_json(CALLS["one"]), KNOWN))
    for before, expected in (("", ""), ("See: STOP no ", "See: ")):
        for pieces in divisions(before + text):
            reader = ToolCallReader(StopStrings([stop, "STOP"]), format, TOOLS)
            said, calls = "", ""
            for piece in pieces:
                if reader.stop is None:
                    shown, parts = reader.push(piece)
                    said, calls = said + shown, calls + "".join(part.arguments for part in parts)
            said += reader.finish() if reader.stop is None else ""
            assert (said, reader.stop) == (expected, "STOP" if before else None)
            assert bool(calls) == (not before)


@pytest.mark.parametrize("name", ["llama3_json", "pythonic"])
def test_calls_without_a_marker_begin_a_line(format_of, grammars, tokenizer, name):
    format = format_of(name, with_tokens=False)
    written = format.write(as_json(CALLS["one"]), KNOWN)
    grammar = grammar_of(format, "auto", single=False)
    for before in ("", " ", "\n\t ", "Now:\n"):
        for pieces in divisions(before + written):
            assert read(format, pieces) == (before.strip(), as_json(CALLS["one"]), True)
        assert accepts(grammars, tokenizer, grammar, before + written)
        assert not accepts(grammars, tokenizer, grammar, f"{before}{written} more")
    for text in (f"So: {written}", written[:-1].replace("write", "rewrite"), '[1] and {"name": "Bob"}\n[wr', "{", "[x"):
        for pieces in divisions(text):
            assert read(format, pieces) == (text, [], True)
        assert accepts(grammars, tokenizer, grammar, text)


@pytest.mark.parametrize("name", PARSERS)
def test_no_text_of_a_client_that_resumes_breaks_a_reader(format_of, name):
    format, chooser = format_of(name), random.Random(5)
    written = marked(format, format.write(as_json(CALLS["several"]), KNOWN))
    pieces = [*written, "write", "other", *next(iter(format.openings(TOOLS))), *(m.shown for m in format._markers)]
    for _ in range(300):
        noise = chooser.choices(pieces, k=40)
        at = chooser.randrange(len(written))
        for text in ([*next(iter(format.openings(TOOLS))), *noise], [written[:at], *noise[:3], written[at:]]):
            reader = ToolCallReader(StopStrings(()), format, TOOLS)
            for piece in text:
                said, _ = reader.push(piece)
                said.encode()
            reader.finish().encode()


@pytest.mark.parametrize("name", PARSERS)
def test_json_that_spells_a_marker_stays_text(format_of, name):
    format = format_of(name, with_tokens=False)
    spelled = json.dumps({"n": format.write(as_json(CALLS["one"]), KNOWN), "m": [*format.special, "write("]})
    for pieces in divisions(spelled):
        assert read(format, pieces) == (spelled, [], True)


def many_choices(count):
    """A schema with ``count`` definitions, each of which is one of all of them, or text."""
    choices = [{"$ref": f"#/$defs/{n}"} for n in range(count)]
    definitions = {str(n): {"anyOf": [*choices, STRING]} for n in range(count)}
    return closed(definitions=definitions, **{f"p{n}": {"$ref": f"#/$defs/{n}"} for n in range(count)})


@pytest.mark.parametrize("parameters", [
    many_choices(200),
    {"properties": {"a": {"type": [{}, 5]}}, "required": [["a"], {}]},
    {"properties": {"a": {"anyOf": 5, "enum": "x"}, "b": True}},
    {"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"$ref": "#/$defs/a"}}},
    {"properties": {"a": {"$ref": "#/$defs/a/b"}, "b": {"$ref": 5}}, "$defs": []},
    {"properties": []},
])  # fmt: skip
@pytest.mark.parametrize("name", ["pythonic", "qwen3_coder"])
def test_a_strange_schema_neither_breaks_nor_delays_the_router(format_of, name, parameters):
    format, tool = format_of(name), ToolDefinition("f", parameters=parameters)
    text = marked(format, format.write([("f", '{"a": "x"}')], KnownTools([tool])))
    assert read(format, list(text), [tool]) == ("", [("f", '{"a": "x"}')], True)


def test_special_tokens_are_no_text(format_of, tokenizer):
    format = format_of("mistral")
    ids = tokenizer.encode_continuation("It is [TOOL_CALLS")
    ids += tokenizer.encode_continuation("] here")
    spelled = AnswerText(StreamDetokenizer(tokenizer, shown=format.shown), (), (), (format, TOOLS))
    assert spelled.push(AnswerDelta(0, ids)).text == "It is [TOOL_CALLS] here"
    ids = tokenizer.encode_continuation("It is [TOOL_CALLS] here")
    assert StreamDetokenizer(tokenizer, shown=format.shown).push(ids) == "It is \udc00 here"
    euro = tokenizer.encode_continuation("€")
    cut = StreamDetokenizer(tokenizer, shown=format.shown)
    assert (
        cut.push([euro[0], *tokenizer.encode_continuation("[TOOL_CALLS]")])
        == ("€" if len(euro) == 1 else "\ufffd") + "\udc00"
    )


def test_llama_s_tag_begins_calls_anywhere(format_of, grammars, tokenizer):
    format = format_of("llama3_json")
    text = "Look: <|python_tag|>" + format.write(as_json(CALLS["several"]), KNOWN)
    assert accepts(grammars, tokenizer, grammar_of(format, "auto", single=False), text)
    for pieces in divisions(marked(format, text)):
        assert read(format, pieces) == ("Look:", as_json(CALLS["several"]), True)


def test_pythonic_takes_python_s_words(format_of, grammars, tokenizer):
    format = format_of("pythonic")
    text = '[write(path="a", force=False), place-it(level=None)]'
    calls = as_json([("write", {"path": "a", "force": False}), ("place-it", {"level": None})])
    assert text == format.write(calls, KNOWN)
    for said in (text, text.replace("False", "false").replace("None", "null")):
        assert accepts(grammars, tokenizer, grammar_of(format, "auto", single=False), said)
        assert read(format, list(said))[1] == calls


def test_mistral_may_write_ids(format_of, grammars, tokenizer):
    format = format_of("mistral")
    text = '[TOOL_CALLS] [{"name": "now", "arguments": {}, "id": "a1B2c3D4e"}, {"name": "now", "arguments": {}}]'
    assert accepts(grammars, tokenizer, grammar_of(format, "auto", single=False), text)
    assert not accepts(grammars, tokenizer, grammar_of(format, "auto", single=False), text.replace("a1B2c3D4e", "x"))
    assert read(format, [marked(format, text)]) == ("", [("now", "{}")] * 2, True)
    assert format.template_id("call_0123456789") == format.template_id("call_0123456789") != format.template_id("b")
    assert len(format.template_id("call_0123456789")) == 9
    assert format.template_id("a1B2c3D4e") == "a1B2c3D4e"


def test_qwen3_coder_quotes_text_only_where_a_strict_tool_constrains_it(format_of, grammars, tokenizer):
    format = format_of("qwen3_coder")
    grammar = grammar_of(format, "required", single=True)

    def call(name, parameters):
        tags = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters.items())
        return f"<tool_call>\n<function={name}>\n{tags}</function>\n</tool_call>"

    for name, parameters, arguments in (
        ("write", {"path": "it's 5", "text": "12"}, {"path": "it's 5", "text": "12"}),
        ("place-it", {"note": "null", "code": '"5"'}, {"note": None, "code": "5"}),
        ("place-it", {"code": "5", "big": "1.50"}, {"code": 5, "big": 1.5}),
        ("exact", {"day": '"2026-02-03"'}, {"day": "2026-02-03"}),
        ("write", {"path": "True", "force": "True"}, {"path": "True", "force": True}),
        ("place-it", {"level": "None"}, {"level": None}),
    ):
        text = call(name, parameters)
        assert accepts(grammars, tokenizer, grammar, text)
        ((_, got),) = read(format, list(text))[1]
        assert json.loads(got) == arguments
    assert not accepts(grammars, tokenizer, grammar, call("exact", {"day": "2026-02-03"}))


@pytest.mark.parametrize(
    ("template", "special", "expected"),
    [
        ("", {}, "hermes"),
        ("{{ messages }}", {}, "hermes"),
        ("{{ '<tool_call>\\n' }}{{ call | tojson }}", {}, "hermes"),
        ("{{ '<tool_call>\\n<function=' ~ name }}{{ '<parameter=' ~ key }}", {}, "qwen3_coder"),
        ("{{ '[TOOL_CALLS] [' }}{{ calls | tojson }}", {"[ARGS]": 5}, "mistral"),
        ("{{ '[TOOL_CALLS]' ~ call.name ~ '[ARGS]' }}", {}, "mistral_args"),
        ("Answer with [func_name1(params_name1=params_value1), func_name2(params)]", {}, "pythonic"),
        ('Respond with {"name": function name, "parameters": dictionary of argument name}', {}, "llama3_json"),
        ("{{ '<|python_tag|>' }}", {}, "llama3_json"),
    ],
)  # fmt: skip
def test_a_known_template_has_its_format(template, special, expected):
    assert choose_format("auto", template, special).name == expected


def test_a_parser_that_is_named_is_taken():
    assert choose_format("pythonic", "<tool_call>", {}).name == "pythonic"
    assert choose_format("mistral", "", {}).name == "mistral"
    assert choose_format("mistral", "", {"[TOOL_CALLS]": 3, "[ARGS]": 5}).shown == {3: "\udc00", 5: "\udc01"}


def test_a_tag_that_is_a_shown_token_is_this_token_in_answers(tmp_path):
    for file in (FOLDER / "model").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.add_tokens([tokenizers.AddedToken(tag, special=False) for tag in ("<tool_call>", "</tool_call>")])
    backend.save(str(tmp_path / "tokenizer.json"))  # as Qwen's
    tokenizer = Tokenizer.load(tmp_path)
    format, calls = tokenizer.tool_format, as_json(CALLS["several"])
    ids = tokenizer.encode_continuation(f"So: {format.write(calls)}")
    grammars = Grammars(tmp_path / "tokenizer.json", 6144, tokenizer.eos_token_ids)
    matcher = grammars.matcher(Grammar("lark", grammar_of(format, "auto", single=False)))
    matcher.accept([*ids, tokenizer.end_of_answer])
    text = AnswerText(StreamDetokenizer(tokenizer, (), format.shown), (), (), (format, TOOLS))
    delta = text.push(AnswerDelta(0, ids))
    assert [part.name for part in delta.tool_calls if part.name] == [name for name, _ in calls]
    assert (delta.text, text.called_tools) == ("So:", True)


@pytest.mark.parametrize(
    ("name", "begun", "piece"),
    [("hermes", "x", "    "), ("pythonic", "\n[write(mode=", "1234"), ("qwen3_coder", QWEN_MODE, "1234")],
)
def test_a_reader_of_endless_pieces_does_not_look_at_all_of_them_again(format_of, name, begun, piece):
    """With time in the square of the text, this test runs into its time limit."""
    piece, count = piece * 128, 100_000
    reader = ToolCallReader(StopStrings([]), format_of(name), TOOLS)
    shown = [reader.push(begun)[0]] + [reader.push(piece)[0] for _ in range(count)]
    assert "".join(shown).strip() == begun.strip() * (name == "hermes")
    if name == "hermes":
        assert reader.finish() == piece * count
