"""Tests grammars of tools' texts against llguidance's matcher of the original grammar, byte by byte."""

from __future__ import annotations

import json
import random

import llguidance
import pytest

from overfill.api.reasoning_grammar import regex_in_lark
from overfill.api.text_grammar import COMMON, text_before, text_in_json_string
from overfill.errors import InvalidRequest
from overfill.request.params import Grammar

BYTES = llguidance.LLTokenizer("byte")
END = "\n</parameter>\n"
ODD = '"quoted" \\ \t \r \b \f \x00 \x1f \x7f \u2028 é 😀 / <b>'

PATCH = r"""
// What an agent's tool for edits takes.
start: BEGIN file+ FINISH
BEGIN: "*** Begin" NL
FINISH: "*** End" NL?
?file: added | removed | changed
added: "*** Add: " name NL ("+" /(.*)/ NL -> line)+
removed: "*** Delete: " name NL
changed: "*** Update: " name NL moved? [hunk] # or only moved
moved: "*** Move to: " name NL
hunk: (("@@" | "@@ " /(.+)/) NL
    | ("+" | "-" | " ") /(.*)/ NL)+ last?
last: "*** End of File" NL
name: /(.+)/
%import common.LF -> NL
"""
PATCHES = [
    "*** Begin\n*** Delete: a.py\n*** End",
    f"*** Begin\n*** Add: a {ODD.replace(chr(13), '')}\n+\n+{ODD}\n*** End\n",
    f'*** Begin\n*** Update: ö\n*** Move to: "b"\n@@ {ODD}\n \n-\\n\n+\t"\n*** End of File\n*** Delete: c\n*** End',
]
SQL = r"""
%llguidance {}
start: "SELECT"i SP columns SP "FROM" SP NAME [SP "WHERE" SP NAME SP? "=" SP? value] ";"
columns: "*" | NAME ("," SP NAME)~0..2
value: ESCAPED_STRING | SIGNED_NUMBER | "\x27" "a".."f"{1,10} "'"
NAME: /[a-z_]\w{0,9}/i & /[^q]*/
SP: /[ \t\n]/
%import common (ESCAPED_STRING, SIGNED_NUMBER)
"""
CALCULATION = r"""
start: sum
sum: term (SIGN term)* -> sum
term: NUMBER ("*" NUMBER)*
SIGN: "+" | "-"
%import common.NUMBER
%import common.WS
%ignore WS
%ignore /#[^"\n]*\n/
"""
CLASSES = r"(?P<a>(?i)[^\w\s\"x-z[:punct:]&&[^\\]]|\x0a+|(?s:.)|[]\\]{2}|\u0022|\pN|[^[a-c]\x{22}])(?-i)\$(b|\/)?"

CASES = [
    ("lark", PATCH, PATCHES, ["", PATCHES[0][:-1], PATCHES[0].replace("a.py", ""), PATCHES[2].replace('"\n*', '"\n%')]),
    (
        "lark",
        SQL,
        ["SELECT a FROM b;", 'select\n*\tFROM b WHERE c="a\\"\\n";', "SELECT a, A1 FROM b WHERE c = 'fabfabfab';"],
        [
            "SELECT a from b;",
            'SELECT a FROM b WHERE c="a"";',
            "SELECT q FROM b;",
            "SELECT a FROM b WHERE c='g';",
            "SELECT a FROM b WHERE c='abcdeabcdea';",
        ],
    ),
    ("lark", CALCULATION, ["1", "1 +\n2\t*  3 ", "1#!\\ a\n+1"], ["1 2", '1 # "a"\n', "1\f\v+1", "1 # a"]),
    ("regex", CLASSES, ["\n\n$", "\\$", '"$b', "é$/", "\t$", "]\\$", "٣$"], ["", "ab", "$", '""$', "\\\\\\$", "\n$\n"]),
    ("regex", r"[^\n]*", [ODD.replace("\n", ""), ""], ["a\n", "\n"]),
    ("regex", r"(?i)k\n\"(?-i:q)N", ['k\n"qN', 'K\n"qn'], ["k\\N", 'k\n"QN', "k\n'qN"]),
    ("regex", "a\\\n/", ["a\n/"], ["a/", "a\\n/"]),
    ("regex", r"^\d{4}-\d\d$", ["2026-11"], ["2026-1", "2026-111"]),
]


def matcher(lark: str) -> llguidance.LLMatcher:
    made = llguidance.LLMatcher(BYTES, llguidance.LLMatcher.grammar_from_lark(lark), log_level=0)
    assert not made.is_error(), made.get_error()
    return made


def accepts(lark: str, text: str) -> bool:
    made = matcher(lark)
    return bool(all(map(made.consume_token, text.encode())) and made.is_accepting())


def original(kind: str, source: str) -> str:
    return source if kind == "lark" else f"start: {regex_in_lark(source)}"


def in_json(kind: str, source: str) -> str:
    return f'start: "{{\\"input\\": \\"" {text_in_json_string(Grammar(kind, source))} "\\"}}"'  # type: ignore[arg-type]


def call(text: str) -> str:
    return json.dumps({"input": text}, ensure_ascii=False)


@pytest.mark.parametrize(("kind", "source", "good", "bad"), CASES)
def test_a_call_s_text_is_of_the_tool_s_grammar(kind, source, good, bad):
    plain, escaped = original(kind, source), in_json(kind, source)
    before = f'start: "<input>" {text_before(END, Grammar(kind, source))} "!"'
    for text, right in [(text, True) for text in good] + [(text, False) for text in bad]:
        assert accepts(plain, text) == right, text
        assert accepts(escaped, call(text)) == right, text
        assert accepts(before, f"<input>{text}{END}!") == right, text


def written(lark: str, generator: random.Random) -> str:
    """A random text of the grammar, most often one with many escapes."""
    made, text = matcher(lark), bytearray()
    while not made.is_stopped():
        mask = made.compute_bitmask()
        allowed = [byte for byte in range(256) if mask[byte >> 3] >> (byte & 7) & 1]
        likely = [byte for byte in allowed if byte in b'"\\' or (len(text) > 200 and byte in b'n*/E;"')]
        byte = generator.choice(likely if likely and generator.random() < 0.5 else allowed)
        assert made.consume_token(byte)
        text.append(byte)
        if made.is_accepting() and generator.random() < 0.5:
            break
    return text.decode()


@pytest.mark.parametrize(("kind", "source"), [case[:2] for case in CASES])
def test_what_a_model_may_write_reads_as_a_text_of_the_grammar(kind, source):
    plain, escaped, generator = original(kind, source), in_json(kind, source), random.Random(1)
    for _ in range(30):
        text = json.loads(written(escaped, generator))["input"]
        assert accepts(plain, text), text


def test_a_text_may_have_the_beginning_of_what_ends_it():
    grammar = f"start: {text_before(END, Grammar('regex', '(?s:.)*'))}"
    assert accepts(grammar, f"<\n</parameter>.\n</parameter\n\n</parameter \\n {END}")
    for text in (f"a{END}b", END, "a\n</parameter>"):
        assert not accepts(grammar, text + END)


@pytest.mark.parametrize("name", COMMON)
def test_common_terminals_are_llguidance_s(name):
    ours, theirs = f"start: /{COMMON[name]}/", f"start: X\n%import common.{name} -> X"
    generator = random.Random(1)
    for _ in range(30):
        assert accepts(theirs, written(ours, generator))
        assert accepts(ours, written(theirs, generator))


@pytest.mark.parametrize(
    ("kind", "source", "reason"),
    [
        ("json_object", "", "give a regex or a Lark grammar"),
        ("regex", "a(", "unclosed group"),
        ("regex", "(?x) a b", "the flag x"),
        ("lark", "begin: /a/", "no start"),
        ("lark", "start: a", 'unknown name: "a"'),
        ("lark", "start: a\na: b?\nb: a", r"a rule that refers to itself \(.*a -> b.*\)"),
        ("lark", 'start: "a" <|im_end|>', "'<|im_end|>'"),
        ("lark", 'start: "a" <[5]>', r"'<\[5\]>'"),
        ("lark", "start: %json {}", "'%json'"),
        ("lark", 'start: %lark {\nstart: "a"\n}', "'%lark'"),
        ("lark", 'start: A\nA: %regex {"substring_chars": "a"}', "'%regex'"),
        ("lark", '%llguidance {"no_forcing": true}\nstart: "a"', "'%llguidance'"),
        ("lark", "start: A\nA: /a*/ & ~/aa/", "'~'"),
        ("lark", "start: a\na[lazy]: /a*b/", r"'\[' after the name 'a'"),
        ("lark", 'start: a::0x0\na::_: "a" %if ne(_, 1) | a::incr(_)', "'::'"),
        ("regex", "a\\\\\\", "ends with a backslash"),
    ],
)
def test_what_cannot_be_rewritten_is_refused_by_name(kind, source, reason):
    with pytest.raises(InvalidRequest, match=reason):
        text_in_json_string(Grammar(kind, source))
