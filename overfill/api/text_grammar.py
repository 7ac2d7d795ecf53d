"""Grammars of the text that a tool takes: rewrites them into a part of the Lark grammar of an answer.

Most formats of calls have this text inside a JSON string, as in ``{"input": "…"}``. There, each quote, backslash and
control character is an escape of two or six characters. llguidance ends a terminal by looking one byte ahead, and an
escape needs more. Therefore all rules become one terminal, a regular expression. Recursive rules cannot.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter

from overfill.api.reasoning_grammar import regex_in_lark
from overfill.errors import InvalidRequest
from overfill.request.grammar import check_available, check_grammar, first_bytes
from overfill.request.params import Grammar

_ESCAPED = '"\\' + "".join(map(chr, range(0x20)))
"""Characters that JSON strings have as escapes only."""

_PLAIN = r'[^"\\\x00-\x1f]'
_START, _IGNORED = "RULE-START", "IGNORED-BETWEEN-TERMINALS"

# The terminals of llguidance's `common` that have characters of _ESCAPED; it imports the others itself.
COMMON = {
    "ESCAPED_STRING": r'"([^"\\]|\\.)*"',
    "WS_INLINE": r"[ \t]+",
    "WS": r"[ \t\f\r\n]+",
    "CR": r"\r",
    "LF": r"\n",
    "NEWLINE": r"(\r?\n)+",
    "SH_COMMENT": r"#[^\n]*",
    "CPP_COMMENT": r"\/\/[^\n]*",
    "C_COMMENT": r"\/\*[^*]*\*+(?:[^\/*][^*]*\*+)*\/",
    "SQL_COMMENT": r"--[^\n]*",
}

_STRING = r'"(?:\\.|[^"\\\n])*"'
_TOKEN = re.compile(
    rf"""(?P<space>\s++(?=\|)|[ \t\r]+|(?:\#|//)[^\n]*|->\s*[_a-z][_a-z0-9-]*|%llguidance\s*\{{\s*\}})
    |(?P<line>\n\s*)
    |%import\s+common\s*(?:\.\s*(?P<imported>\w+)(?:\s*->\s*(?P<local>[\w-]+))?|\((?P<several>[^)]*)\))
    |(?P<ignore>%ignore\b)
    |(?P<unsupported>%\w+|<[^<>\s]+>|@[\w-]+|::|=)
    |(?P<range>{_STRING}\s*\.\.\s*{_STRING})
    |(?P<string>{_STRING}i?)
    |(?P<regex>/(?:\\.|[^/\\])+/[imslux]*)
    |(?P<times>~\s*\d+(?:\s*\.\.\s*\d+)?|\{{[\d,\s]*\}})
    |(?P<name>!?[_?]?[a-z][_a-z0-9-]*|_?[A-Z][_A-Z0-9-]*)
    |(?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
_REGEX_PART = re.compile(
    r"""\\(?:[pP](?:\{[^}]*\}|.)|[xuU]\{[^}]*\}|x..|u.{4}|U.{8}|.)  # an escape
    |\(\?(?:P?<[^>]*>|(?P<flags>[a-zA-Z-]*)[:)])
    |.""",
    re.VERBOSE | re.DOTALL,
)


def text_in_json_string(grammar: Grammar) -> str:
    """A Lark expression of the texts in ``grammar``, escaped as in a JSON string, without the quotes around it.

    Raises:
        InvalidRequest: the grammar is wrong, is not of kind "regex" or "lark", or has what cannot be rewritten.
    """
    return f"%lark {{\nstart: {_START}\n{_terminals(grammar, in_json=True)}\n}}"


def text_before(end: str, grammar: Grammar) -> str:
    """A Lark expression of the texts in ``grammar``, each followed by ``end``, which occurs nowhere else.

    Raises:
        InvalidRequest: as ``text_in_json_string``.
    """
    last = "".join(map(_quoted, end))
    text = f"({_START} /{last}/) & ~/(?s:.*){last}(?s:.+)/"
    return f"%lark {{\nstart: TEXT-BEFORE-END\nTEXT-BEFORE-END: {text}\n{_terminals(grammar, in_json=False)}\n}}"


def _terminals(grammar: Grammar, *, in_json: bool) -> str:
    """Definitions of terminals, in lines. That of the texts in ``grammar`` is _START."""
    check_available()
    if grammar.kind not in ("regex", "lark"):
        raise _refused(grammar, "cannot describe a text for a tool; give a regex or a Lark grammar")
    check_grammar(grammar)
    source = grammar.text
    if grammar.kind == "regex":
        source = f"start: {regex_in_lark(source)}"
    return "\n".join(_Rewriter(grammar, in_json).lines(source))


class _Rewriter:
    """Turns each rule and terminal of a Lark grammar that llguidance accepts into one terminal."""

    def __init__(self, grammar: Grammar, in_json: bool) -> None:
        self._grammar = grammar
        self._in_json = in_json

    def lines(self, source: str) -> Iterator[str]:
        statements = list(_statements(source))
        ignored = [self._body(body) for head, *body in statements if head["ignore"]]
        if ignored:
            yield f"{_IGNORED}: ({' | '.join(ignored)})*"
        used: dict[str, set[str]] = {}
        for head, *body in statements:
            if head["imported"] or head["several"]:
                yield from self._imports(head)
            elif head["unsupported"]:
                raise self._cannot(repr(head[0]))
            elif name := head["name"]:
                if body[0][0] != ":":
                    raise self._cannot(f"{body[0][0]!r} after the name {name!r}")
                name = name.lstrip("!?")
                used[name] = {token["name"] for token in body if token["name"]}
                yield f"{_terminal(name)}: {self._body(body[1:], f' {_IGNORED}' if ignored and name.islower() else '')}"
        try:
            TopologicalSorter(used).prepare()
        except CycleError as error:
            raise self._cannot(f"a rule that refers to itself ({' -> '.join(error.args[1])[:200]})") from error

    def _imports(self, statement: re.Match[str]) -> Iterator[str]:
        for name in map(str.strip, (statement["several"] or statement["imported"]).split(",")):
            local = _terminal(statement["local"] or name)
            if name in COMMON:
                yield f"{local}: {self._regex(f'/{COMMON[name]}/')}"
            else:
                yield f"%import common.{name} -> {local}"

    def _body(self, tokens: list[re.Match[str]], after: str = "") -> str:
        """The right side of a definition. ``after`` follows each terminal in it."""
        parts = []
        for token in tokens:
            kind, text = token.lastgroup, token[0]
            if kind == "unsupported" or text == "~":
                raise self._cannot(repr(text[:80]))
            terminal = kind in ("string", "range", "regex") or (kind == "name" and not text.islower())
            if kind == "name":
                text = _terminal(text)
            elif kind == "string" and self._in_json:
                text = self._string(text)
            elif kind == "range" and self._in_json:
                text = self._range(text)
            elif kind == "regex":
                text = self._regex(text)
            parts.append(f"({text}{after})" if terminal and after else text)
        return " ".join(parts)

    def _string(self, text: str) -> str:
        string = text.removesuffix("i")
        return f"/{_literal(_text(string))}/{text[len(string) :]}" if len(string) > 2 else string

    def _range(self, text: str) -> str:
        first, last = (f"\\x{{{ord(_text(end)):x}}}" for end in re.findall(_STRING, text))
        return self._regex(f"/[{first}-{last}]/")

    def _regex(self, text: str) -> str:
        if not self._in_json:
            return text
        regex, _, flags = text[1:].rpartition("/")
        out: list[str] = []
        active, outer = frozenset(flags), list[frozenset[str]]()
        position = 0
        while position < len(regex):
            match = _REGEX_PART.match(regex, position)
            assert match is not None
            part = regex[position : _class_end(regex, position)] if match[0] == "[" else match[0]
            position += len(part)
            if part == ")":
                active = outer.pop()
            elif part[0] == "(":
                if not part.endswith(")"):
                    outer.append(active)
                on, _, off = (match["flags"] or "").partition("-")
                active = (active | frozenset(on)) - frozenset(off)
            elif part[0] in "\\[." or part in _ESCAPED:
                part = _characters(part, "".join(sorted(active)))
            if "x" in active:
                raise self._cannot("the flag x of regular expressions")
            out.append(part)
        return f"/{''.join(out)}/{flags}"

    def _cannot(self, what: str) -> InvalidRequest:
        return _refused(self._grammar, f"has {what}, which the grammar of a tool's text cannot have")


def _statements(source: str) -> Iterator[list[re.Match[str]]]:
    """The tokens of each statement."""
    statement: list[re.Match[str]] = []
    for token in _TOKEN.finditer(f"{source}\n"):
        if token["line"] and statement:
            yield statement
            statement = []
        elif token.lastgroup not in ("line", "space"):
            statement.append(token)


def _terminal(name: str) -> str:
    """Name of the terminal that the rule or terminal ``name`` becomes."""
    return f"RULE-{name.upper()}" if name.islower() else name


def _text(string: str) -> str:
    """The text of a string in Lark."""
    text: str = json.loads(re.sub(r"(\\[^x])|\\x", lambda match: match[1] or r"\u00", string))
    return text


def _literal(text: str) -> str:
    """A regular expression of what ``text`` becomes in a JSON string; with the flag i, its letters in either case."""
    return "".join(_escapes(c) if c in _ESCAPED else _quoted(c) for c in text)


def _quoted(character: str) -> str:
    """A regular expression of ``character``."""
    return character if character.isalnum() or character == " " else f"\\x{{{ord(character):x}}}"


@lru_cache(maxsize=1024)
def _characters(part: str, flags: str) -> str:
    """A regular expression of the characters, as in JSON strings, that ``part`` matches where ``flags`` are set."""
    first = first_bytes(f"/(?{flags}){part}/" if flags else f"/{part}/")
    escaped = [character for character in _ESCAPED if ord(character) in first]
    if not escaped:
        return part
    if len(escaped) == len(first):
        return _escapes(escaped)
    return f"(?:{_escapes(escaped)}|{_PLAIN if part == '.' else f'[{part}&&{_PLAIN}]'})"


def _escapes(characters: Iterable[str]) -> str:
    """A regular expression of the escapes of ``characters``. No flag changes what it matches."""
    escapes = [json.dumps(character)[2:-1] for character in characters]  # without the backslash
    letters = "".join(re.escape(escape) for escape in escapes if len(escape) == 1)
    choices = [f"[{letters}]"] if letters else []
    for digit in "01":
        if last := "".join(escape[4] for escape in escapes if escape[3:4] == digit):
            choices.append(f"u00{digit}[{last}]")
    return rf"(?-i:\\(?:{'|'.join(choices)}))"


def _class_end(regex: str, position: int) -> int:
    """Index behind the character class that begins at ``position``."""
    depth = 0
    while True:
        match regex[position]:
            case "\\":
                position += 1
            case "[":
                depth += 1
                position += regex.startswith("^", position + 1)
                position += regex.startswith("]", position + 1)  # stands for itself
            case "]":
                depth -= 1
        position += 1
        if not depth:
            return position


def _refused(grammar: Grammar, reason: str) -> InvalidRequest:
    return InvalidRequest(f"sampling.grammar.{grammar.kind}", reason)
