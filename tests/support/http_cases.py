"""Malformed, smuggled and unusual HTTP/1.1, as a table: what a client sends, and what the port must answer.

The cases are those that are public: the tests of h11 and llhttp, and the known lists of request smuggling. They are
written anew. RFC 9112 is HTTP/1.1, RFC 9110 is HTTP's semantics.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Case:
    """What a client sends on a new connection, and what it must get.

    Attributes:
        section: the RFC's number and section that says so.
        data: the bytes that the client sends.
        answers: the answers in order. A string is the method, path and body of a request that the application got; a
            number is the status of an answer that the server gave by itself.
        open: True if the connection must serve another request afterwards. False if the server must close it. None
            if the request is incomplete, so that the server must wait.
        differs: what the RFC asks, and why this server answers otherwise; empty if it does as the RFC asks.
    """

    name: str
    section: str
    data: bytes
    answers: tuple[str | int, ...]
    open: bool | None
    differs: str = ""


CASES: list[Case] = []


def _serves(name: str, section: str, data: bytes, *answers: str | int, differs: str = "") -> None:
    CASES.append(Case(name, section, data, answers, True, differs))


def _closes(name: str, section: str, data: bytes, *answers: str | int, differs: str = "") -> None:
    CASES.append(Case(name, section, data, answers, False, differs))


def _waits(name: str, section: str, data: bytes, *answers: str | int, differs: str = "") -> None:
    CASES.append(Case(name, section, data, answers, None, differs))


def _get(*lines: bytes, first: bytes = b"GET /a HTTP/1.1") -> bytes:
    return b"\r\n".join((first, b"Host: a", *lines, b"", b""))


def _post(*lines: bytes, body: bytes = b"", first: bytes = b"POST /a HTTP/1.1") -> bytes:
    return _get(*lines, first=first) + body


def _chunked(body: bytes, *lines: bytes) -> bytes:
    return _post(b"Transfer-Encoding: chunked", *lines, body=body)


SMUGGLED = _get(first=b"GET /smuggled HTTP/1.1")
"""A request that an attacker hides. Where it must not be answered, ``/smuggled`` is in no answer."""

_CHUNKED = b"Transfer-Encoding: chunked"
_HIDDEN = b"0\r\n\r\n" + SMUGGLED

# fmt: off
# The request line

_serves("a plain request", "9112 3", _get(), "GET /a ")
_serves("the method HEAD", "9110 9.3.2", _get(first=b"HEAD /a HTTP/1.1"), "HEAD /a ")
_serves("a method of WebDAV", "9110 9.1", _get(first=b"REPORT /a HTTP/1.1"), "REPORT /a ")
_serves("a method with a hyphen", "9110 9.1", _get(first=b"M-SEARCH /a HTTP/1.1"), "M-SEARCH /a ")
_serves("the method QUERY with a body", "9110 9.1", _post(b"Content-Length: 2", body=b"ab", first=b"QUERY /a HTTP/1.1"),
    "QUERY /a ab")
_serves("one empty line before the request", "9112 2.2", b"\r\n" + _get(), "GET /a ")
_serves("several empty lines before the request", "9112 2.2", b"\r\n\r\n\r\n" + _get(), "GET /a ")
_serves("empty lines between requests", "9112 2.2", _post(b"Content-Length: 1", body=b"x\r\n") + _get(), "POST /a x",
    "GET /a ")
_501 = "501 is asked for an unknown method; the parser does not tell it from bytes that are no HTTP"
_closes("an unknown method", "9110 9.1", _get(first=b"MKCOLA /a HTTP/1.1"), 400, differs=_501)
_closes("a very long method", "9112 3", _get(first=b"A" * 5000 + b" /a HTTP/1.1"), 400, differs=_501)
_closes("a method in lower case", "9110 9.1", _get(first=b"get /a HTTP/1.1"), 400, differs=_501)
_closes("a method that is no token", "9112 3.1", _get(first=b"G(T /a HTTP/1.1"), 400)
_closes("a method with a NUL", "9112 3.1", _get(first=b"GET\0 /a HTTP/1.1"), 400)
_closes("a space before the method", "9112 3", _get(first=b" GET /a HTTP/1.1"), 400)
_closes("no method", "9112 3", _get(first=b"/a HTTP/1.1"), 400)
_spaces = "400 is safer; section 3 allows several spaces, and httptools does not show them"
_serves("two spaces before the target", "9112 3", _get(first=b"GET  /a HTTP/1.1"), "GET /a ", differs=_spaces)
_closes("a tab instead of a space", "9112 3", _get(first=b"GET\t/a HTTP/1.1"), 400)
_serves("two spaces before the version", "9112 3", _get(first=b"GET /a  HTTP/1.1"), "GET /a ", differs=_spaces)
_closes("a space behind the version", "9112 3", _get(first=b"GET /a HTTP/1.1 "), 400)
_closes("something behind the version", "9112 3", _get(first=b"GET /a HTTP/1.1 x"), 400)
_closes("a bare CR in the request line", "9112 2.2", b"GET /a HTTP/1.1\rHost: a\r\n\r\n", 400)
_closes("a bare LF behind the request line", "9112 2.2", b"GET /a HTTP/1.1\nHost: a\r\n\r\n", 400)
_closes("only bare LFs", "9112 2.2", b"GET /a HTTP/1.1\nHost: a\n\n", 400)
_closes("a line of spaces before the request", "9112 2.2", b"  \r\n" + _get(), 400)
_closes("a TLS handshake", "9112 3", b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03", 400)
_closes("a response instead of a request", "9112 3", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 400)

# The version

_serves("HTTP/1.0 with keep-alive", "9112 9.3", b"GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", "GET /a ")
_closes("HTTP/1.0", "9112 9.3", b"GET /a HTTP/1.0\r\n\r\n", "GET /a ")
_closes("HTTP/1.0, and another request", "9112 9.3", b"GET /a HTTP/1.0\r\n\r\n" + SMUGGLED, "GET /a ")
_closes("HTTP/1.0 with a body", "9112 6.3", b"POST /a HTTP/1.0\r\ncontent-length: 5\r\n\r\nhello", "POST /a hello")
_closes("HTTP/0.9", "9110 15.6.6", b"GET /a\r\n\r\n", 505)
_closes("HTTP/0.9 as a version", "9110 15.6.6", _get(first=b"GET /a HTTP/0.9"), 505)
_closes("HTTP/1.2", "9110 2.5", _get(first=b"GET /a HTTP/1.2"), 400,
    differs="a higher minor version is served as 1.1; no client sends one, and the parser refuses it")
_closes("HTTP/2.0", "9110 15.6.6", _get(first=b"GET /a HTTP/2.0"), 505)
_closes("HTTP/5.6", "9110 15.6.6", _get(first=b"GET /a HTTP/5.6"), 400,
    differs="505 is asked; the parser refuses the version first")
_closes("a version with two digits", "9112 2.3", _get(first=b"GET /a HTTP/1.10"), 400)
_closes("a version without a minor", "9112 2.3", _get(first=b"GET /a HTTP/1"), 400)
_closes("a version in lower case", "9112 2.3", _get(first=b"GET /a http/1.1"), 400)
_closes("another protocol", "9112 2.3", _get(first=b"GET /a IHTTP/1.1"), 400)
_closes("RTSP", "9112 2.3", _get(first=b"PUT /a RTSP/1.0"), 400)
_closes("ICE", "9112 2.3", _get(first=b"GET /a ICE/1.0"), 400)
_closes("HTTP/2 with prior knowledge", "9113 3.4", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", 400)
_closes("HTTP/2's method in HTTP/1.1", "9113 3.4", _get(first=b"PRI * HTTP/1.1") + b"SM\r\n\r\n", 400)

# The target

_serves("a query", "9112 3.2.1", _get(first=b"GET /a?b=c?d HTTP/1.1"), "GET /a ")
_serves("an escaped path", "9110 4.2.3", _get(first=b"GET /%61 HTTP/1.1"), "GET /a ")
_serves("an absolute target", "9112 3.2.2", _get(first=b"GET http://a/b?c HTTP/1.1"), "GET /b ")
_serves("an absolute target without a path", "9112 3.2.2", _get(first=b"GET http://a HTTP/1.1"), "GET / ")
_serves("an absolute target without a path, with a query", "9112 3.2.2", _get(first=b"GET http://a?b HTTP/1.1"),
    "GET / ")
_serves("an absolute target with a port", "9112 3.2.2", _get(first=b"GET http://a:1234/b HTTP/1.1"), "GET /b ")
_serves("an absolute target with another host than Host", "9112 3.2.2", _get(first=b"GET http://b/c HTTP/1.1"),
    "GET /c ")
_serves("an absolute target with an address of IPv6", "9112 3.2.2", _get(first=b"GET http://[1:2::3]:67/b HTTP/1.1"),
    "GET /b ")
_serves("an asterisk", "9112 3.2.4", _get(first=b"OPTIONS * HTTP/1.1"), "OPTIONS * ")
_closes("an asterisk without OPTIONS", "9112 3.2.4", _get(first=b"GET * HTTP/1.1"), 400)
_closes("an asterisk and more", "9112 3.2", _get(first=b"OPTIONS *a HTTP/1.1"), 400)
_closes("an absolute target with a user", "9110 4.2.4", _get(first=b"GET http://u:p@a/b HTTP/1.1"), 400)
_closes("an absolute target without a host", "9110 4.2.1", _get(first=b"GET http:///b HTTP/1.1"), 400)
_closes("an absolute target of another scheme", "9110 7.4", _get(first=b"GET ftp://a/b HTTP/1.1"), 400)
_closes("an absolute target with a wrong port", "9112 3.2.2", _get(first=b"GET http://a:b/c HTTP/1.1"), 400)
_closes("an absolute target with a port that is too large", "9112 3.2.2", _get(first=b"GET http://a:99999/c HTTP/1.1"),
    400)
_closes("an absolute target and no Host", "9112 3.2", b"GET http://a/b HTTP/1.1\r\n\r\n", 400)
_closes("CONNECT", "9110 9.3.6", _get(first=b"CONNECT a:443 HTTP/1.1"), 405)
_closes("CONNECT, and what would go into the tunnel", "9110 9.3.6", _get(first=b"CONNECT a:443 HTTP/1.1") + SMUGGLED,
    405)
_closes("CONNECT with a body", "9110 9.3.6",
    _post(b"Content-Length: 5", body=b"hello", first=b"CONNECT a:443 HTTP/1.1"), 405)
_closes("CONNECT to a path", "9110 9.3.6", _get(first=b"CONNECT /a HTTP/1.1"), 405)
_closes("an authority without CONNECT", "9112 3.2.3", _get(first=b"GET a:80 HTTP/1.1"), 400)
_closes("a relative target", "9112 3.2.1", _get(first=b"GET a HTTP/1.1"), 400)
_closes("a target of a query only", "9112 3.2.1", _get(first=b"GET ?a HTTP/1.1"), 400)
_closes("a fragment", "9112 3.2.1", _get(first=b"GET /a#b HTTP/1.1"), 400)
_closes("a fragment behind a query", "9112 3.2.1", _get(first=b"GET /a?b#c HTTP/1.1"), 400)
_closes("a space in the target", "9112 3.2", _get(first=b"GET /a b HTTP/1.1"), 400)
_closes("a tab in the target", "9112 3.2", _get(first=b"GET /a\tb HTTP/1.1"), 400)
_closes("a form feed in the target", "9112 3.2", _get(first=b"GET /a\fb HTTP/1.1"), 400)
_closes("a NUL in the target", "9112 3.2", _get(first=b"GET /a\0b HTTP/1.1"), 400)
_closes("DEL in the target", "9112 3.2", _get(first=b"GET /a\x7fb HTTP/1.1"), 400)
_closes("UTF-8 in the target", "9112 3.2", _get(first="GET /é HTTP/1.1".encode()), 400)
_closes("Latin-1 in the target", "9112 3.2", _get(first=b"GET /\xee HTTP/1.1"), 400)
_closes("UTF-8 in the query", "9112 3.2", _get(first="GET /a?é HTTP/1.1".encode()), 400)
_serves("quotes and bars in the target", "9112 3.2", _get(first=b'GET /"a"|b HTTP/1.1'), 'GET /"a"|b ',
    differs="400 is allowed; old clients send them, and no route has them")
_serves("a long target", "9112 3", _get(first=b"GET /a?" + b"b" * 8000 + b" HTTP/1.1"), "GET /a ")
_closes("a target that is too long", "9110 15.5.15", _get(first=b"GET /" + b"b" * 70_000 + b" HTTP/1.1"), 414)

# Host

_serves("an empty Host", "9110 7.2", b"GET /a HTTP/1.1\r\nHost:\r\n\r\n", "GET /a ")
_serves("Host with a port", "9110 7.2", b"GET /a HTTP/1.1\r\nHost: a:80\r\n\r\n", "GET /a ")
_serves("Host in IPv6", "9110 7.2", b"GET /a HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", "GET /a ")
_serves("Host with an equals sign", "9110 7.2", b"GET /a HTTP/1.1\r\nHost: 0.0.0.0=5000\r\n\r\n", "GET /a ")
_serves("Host with tabs around it", "9112 5.1", b"GET /a HTTP/1.1\r\nHost:\t a \t\r\n\r\n", "GET /a ")
_closes("no Host", "9112 3.2", b"GET /a HTTP/1.1\r\n\r\n", 400)
_closes("two Hosts", "9112 3.2", _get(b"Host: b"), 400)
_closes("the same Host twice", "9112 3.2", _get(b"host: a"), 400)
_closes("two Hosts in HTTP/1.0", "9112 3.2", b"GET /a HTTP/1.0\r\nHost: a\r\nHost: a\r\n\r\n", 400)
for _value in (b"u@a", b"a b", b"a/b", b"a:b", b"a:1:2", b"[::1", b"http://a", b"a?b", b"a#b", b"a\\b", b"%zz",
               b"\xe9", b"<a>"):
    _closes(f"Host {_value!r}", "9112 3.2", b"GET /a HTTP/1.1\r\nHost: %b\r\n\r\n" % _value, 400)
_closes("two Origins", "6454 7.3", _get(b"Origin: http://a", b"Origin: http://b"), 400)
_closes("two Authorizations", "9110 11.6.2", _get(b"Authorization: Bearer a", b"Authorization: Bearer b"), 400)

# Header lines

_serves("no space behind the colon", "9112 5.1", _get(b"a:b"), "GET /a ")
_serves("an empty value", "9112 5.1", _get(b"a:"), "GET /a ")
_serves("a value of spaces", "9112 5.1", _get(b"a: \t "), "GET /a ")
_serves("a value with several words", "9112 5.1", _get(b"a: b c  d "), "GET /a ")
_serves("a name of all token characters", "9110 5.6.2", _get(b"!#$%&'*+-.^_`|~09azAZ: b"), "GET /a ")
_serves("UTF-8 in a value", "9110 5.5", _get("a: é".encode()), "GET /a ")
_serves("Latin-1 in a value", "9110 5.5", _get(b"a: \xff"), "GET /a ")
_serves("a tab in a value", "9110 5.5", _get(b"a: b\tc"), "GET /a ")
_serves("a colon in a value", "9112 5.1", _get(b"a: b:c"), "GET /a ")
_serves("many headers", "9110 5.4", _get(*[b"a: b"] * 200), "GET /a ")
_closes("too many headers", "6585 5", _get(*[b"a: b"] * 300), 431)
_closes("a name that is too long", "6585 5", _get(b"a" * 70_000 + b": b"), 431)
_closes("a value that is too long", "6585 5", _get(b"a: " + b"b" * 70_000), 431)
_closes("headers that are too long together", "6585 5", _get(*[b"a: " + b"b" * 10_000] * 7), 431)
_closes("a space before the colon", "9112 5.1", _get(b"a : b"), 400)
_closes("a tab before the colon", "9112 5.1", _get(b"a\t: b"), 400)
_closes("a space in a name", "9112 5.1", _get(b"a b: c"), 400)
_closes("a space before the first header", "9112 2.2", b"GET /a HTTP/1.1\r\n Host: a\r\n\r\n", 400)
_closes("a line fold", "9112 5.2", _get(b"a: b", b" c"), 400)
_closes("a line fold with a tab", "9112 5.2", _get(b"a: b", b"\tc"), 400)
_closes("a line fold behind an empty value", "9112 5.2", _get(b"a:", b" b"), 400)
_closes("a folded line of spaces", "9112 5.2", _get(b"a: b", b"  "), 400)
_closes("a folded name", "9112 5.2", _get(b"a", b" : b"), 400)
_closes("a header without a colon", "9112 5", _get(b"a"), 400)
_closes("an empty name", "9112 5", _get(b": b"), 400)
for _byte in b'\0\1\x0b\x1f\x7f\xff@()/[]{}",;<=>?\\':
    _closes(f"byte {_byte:#x} in a name", "9110 5.6.2", _get(b"a%cb: c" % _byte), 400)
for _byte in b"\0\1\x08\x0b\f\x1f\x7f":
    _closes(f"byte {_byte:#x} in a value", "9110 5.5", _get(b"a: b%cc" % _byte), 400)
_closes("a bare CR in a value", "9112 2.2", _get(b"a: b\rc: d"), 400)
_closes("a bare CR in an empty value", "9112 2.2", _get(b"a:\rTransfer-Encoding: chunked") + _HIDDEN, 400)
_closes("a bare LF in a value", "9112 2.2", _get(b"a: b\nc: d"), 400)
_closes("a bare LF that hides a header", "9112 2.2", _get(b"a: b\nTransfer-Encoding: chunked") + _HIDDEN, 400)
_closes("a bare LF that hides a length", "9112 2.2", _get(b"a: b\nContent-Length: %d" % len(SMUGGLED)) + SMUGGLED, 400)
_closes("a bare LF in an empty value", "9112 2.2", _get(b"a:\nTransfer-Encoding: chunked") + _HIDDEN, 400)
_closes("a bare CR in a name", "9112 2.2", _get(b"Content\rLength: 3") + b"abc", 400)
_closes("a bare CR at the end of a head", "9112 2.2",
    b"GET /a HTTP/1.1\r\nHost: a\r\n\rGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n", 400)
_closes("a bare LF at the end of a head", "9112 2.2", b"GET /a HTTP/1.1\r\nHost: a\r\n\n", 400)
_closes("CR CR LF behind a value", "9112 2.2", _get(b"a: b\r"), 400)

# Content-Length

_serves("a length", "9112 6.2", _post(b"Content-Length: 5", body=b"hello"), "POST /a hello")
_serves("a body of GET", "9110 9.3.1", _get(b"Content-Length: 5") + b"hello", "GET /a hello")
_serves("length 0", "9112 6.2", _post(b"Content-Length: 0"), "POST /a ")
_serves("length 0, and another request", "9112 6.3", _post(b"Content-Length: 0") + _get(), "POST /a ", "GET /a ")
_serves("no length", "9112 6.3", _post(), "POST /a ")
_serves("leading zeros", "9110 8.6", _post(b"Content-Length: 005", body=b"hello"), "POST /a hello")
_serves("spaces around a length", "9112 5.1", _post(b"Content-Length:  5 ", body=b"hello"), "POST /a hello")
_serves("tabs around a length", "9112 5.1", _post(b"Content-Length:\t5\t", body=b"hello"), "POST /a hello")
_serves("a body that looks like a request", "9112 6.3", _post(b"Content-Length: %d" % len(SMUGGLED), body=SMUGGLED),
    "POST /a " + SMUGGLED.decode())
_serves("GET with a body that looks like a request", "9112 6.3", _get(b"Content-Length: %d" % len(SMUGGLED)) + SMUGGLED,
    "GET /a " + SMUGGLED.decode())
_closes("a body of which only a part is announced", "9112 6.3", _post(b"Content-Length: 1", body=b"x=1\r\n"),
    "POST /a x", 400)
_waits("a body that ends early", "9112 8", _post(b"Content-Length: 5", body=b"hell"))
for _value in (
    b"+5", b"-5", b"-0", b"0x5", b"5a", b"a", b"5.0", b"5e0", b"5_0", b"5;", b'"5"', b"5 5", b"4 2", b"5, 5", b"5,6",
    b",5", b"5,", b"", b" ", b"1000000000000000000000", b"18446744073709551616", b"18446744073709551621",
    b"\xd9\xa5", b"5\x0b", b"\x0b5", b"5\0", b"5\xa0",
):
    _name = f"length {_value!r}"
    _differs = "a list of equal lengths may be taken as one; an error is safer" if _value == b"5, 5" else ""
    _closes(_name, "9110 8.6", _post(b"Content-Length: " + _value, body=b"hello" + SMUGGLED), 400, differs=_differs)
_closes("two lengths", "9112 6.3", _post(b"Content-Length: 5", b"Content-Length: 6", body=b"hello" + SMUGGLED), 400)
_closes("the same length twice", "9110 8.6", _post(b"Content-Length: 5", b"Content-Length: 5", body=b"hello"), 400)
_closes("lengths 0 and 5", "9112 6.3", _post(b"Content-Length: 0", b"Content-Length: 5", body=b"hello"), 400)
_closes("a length with a space before the colon", "9112 5.1", _post(b"Content-Length : 5", body=b"hello"), 400)
_closes("a length in a folded line", "9112 5.2", _post(b"a: b", b" Content-Length: 5", body=b"hello"), 400)
_closes("a folded length", "9112 5.2", _post(b"Content-Length:", b" 5", body=b"hello"), 400)
_serves("a length with an underscore in its name", "9112 6.3", _post(b"Content_Length: 5") + _get(), "POST /a ",
    "GET /a ")
_waits("the largest length", "9110 15.5.14", _post(b"Content-Length: 18446744073709551615", body=b"hello"), 413)

# Transfer-Encoding

_serves("chunks", "9112 7.1", _chunked(b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"), "POST /a hello world")
_serves("no chunk", "9112 7.1", _chunked(b"0\r\n\r\n"), "POST /a ")
_serves("chunked in capitals", "9112 7", _post(b"TRANSFER-ENCODING: CHUNKED", body=b"1\r\nx\r\n0\r\n\r\n"), "POST /a x")
_serves("spaces around chunked", "9112 5.1", _post(b"Transfer-Encoding: \t chunked  ", body=b"1\r\nx\r\n0\r\n\r\n"),
    "POST /a x")
_tab = "tabs around a value do not count; the parser refuses this one, which is a known disguise"
_closes("a tab behind chunked", "9112 5.1", _post(b"Transfer-Encoding: chunked\t", body=_HIDDEN), 400, differs=_tab)
_serves("GET with chunks", "9112 6.3", _get(_CHUNKED) + b"1\r\nx\r\n0\r\n\r\n", "GET /a x")
_serves("chunks, and another request", "9112 6.3", _chunked(b"0\r\n\r\n") + _get(), "POST /a ", "GET /a ")
_closes("chunked and a length", "9112 6.3", _post(_CHUNKED, b"Content-Length: 6", body=b"0\r\n\r\nG" + SMUGGLED), 400)
_closes("a length and chunked", "9112 6.3", _post(b"Content-Length: 6", _CHUNKED, body=b"0\r\n\r\nG" + SMUGGLED), 400)
_closes("chunked and length 0", "9112 6.3", _post(_CHUNKED, b"Content-Length: 0", body=_HIDDEN), 400)
_closes("identity and a length", "9112 6.1", _post(b"Transfer-Encoding: identity", b"Content-Length: 5", body=b"hello"),
    400)
_closes("a length and identity", "9112 6.1", _post(b"Content-Length: 5", b"Transfer-Encoding: identity", body=b"hello"),
    400)
_closes("empty encodings and a length", "9112 6.1",
    _post(b"Content-Length: 10", *[b"Transfer-Encoding:"] * 3, body=b"2\r\nAA\r\n0\r\n\r\n"), 400)
_closes("gzip and a length", "9112 6.3", _post(b"Transfer-Encoding: gzip", b"Content-Length: 5", body=b"hello"), 400)
_closes("HTTP/1.0 with chunks", "9112 6.1", b"POST /a HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n" + _HIDDEN, 400)
_closes("HTTP/1.0 with chunks and keep-alive", "9112 6.1",
    b"POST /a HTTP/1.0\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n" + _HIDDEN, 400)
_closes("HTTP/1.0 with chunks and a length", "9112 6.1",
    b"POST /a HTTP/1.0\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n" + _HIDDEN, 400)
for _value in (b"gzip, chunked", b"deflate,chunked", b"identity, chunked"):
    _closes(f"transfer-encoding {_value!r}", "9112 6.1", _post(b"Transfer-Encoding: " + _value, body=_HIDDEN), 501)
for _value in (
    b"", b"identity", b"pigeons", b"gzip", b"chunked, gzip", b"chunked, identity", b"xchunked", b"chunkedx",
    b"chunkedchunked", b"x chunked", b"chunked x", b"'chunked'", b'"chunked"', b"chunked;q=1", b"chunked\x0b",
    b"\x0bchunked", b"chunked\0", b"chunke\xe4", b"ch\xc5\xabnked", b"chun\tked", b"chunked\f", b"\xa0chunked",
    b"chunked\xa0", b"chunk", b"cow", b"chunked, cow", b"[chunked]", b"chunked-", b"\x00chunked",
):
    _closes(f"transfer-encoding {_value!r}", "9112 6.3", _post(b"Transfer-Encoding: " + _value, body=_HIDDEN), 400)
for _value in (b"chunked, chunked", b"chunked,", b"chunked, "):
    _closes(f"transfer-encoding {_value!r}", "9112 6.1", _post(b"Transfer-Encoding: " + _value, body=_HIDDEN), 400)
for _value in (b",chunked", b", chunked"):
    _empty = "an empty element of a list may be ignored; an error is safer"
    _closes(f"transfer-encoding {_value!r}", "9110 5.6.1", _post(b"Transfer-Encoding: " + _value, body=_HIDDEN), 501,
        differs=_empty)
_closes("chunked twice", "9112 6.1", _post(_CHUNKED, _CHUNKED, body=_HIDDEN), 400)
_closes("chunked, then identity", "9112 6.3", _post(_CHUNKED, b"Transfer-Encoding: identity", body=_HIDDEN), 400)
_closes("identity, then chunked", "9112 6.1", _post(b"Transfer-Encoding: identity", _CHUNKED, body=_HIDDEN), 501)
_closes("chunked, then an unknown encoding", "9112 6.3", _post(_CHUNKED, b"transfer-encoding: cow", body=_HIDDEN), 400)
_closes("an unknown encoding, then chunked", "9112 6.1", _post(b"Transfer-Encoding: cow", _CHUNKED, body=_HIDDEN), 501)
_closes("an empty encoding, then chunked", "9112 6.1", _post(b"Transfer-Encoding:", _CHUNKED, body=_HIDDEN), 400)
_closes("chunked with a space before the colon", "9112 5.1", _post(b"Transfer-Encoding : chunked", body=_HIDDEN), 400)
_closes("chunked in a folded line", "9112 5.2", _post(b"Transfer-Encoding:", b" chunked", body=_HIDDEN), 400)
_closes("chunked and a folded line", "9112 5.2", _post(_CHUNKED, b"  abc", body=_HIDDEN), 400)
_closes("chunked behind a space", "9112 5.2", _post(b"a: b", b" Transfer-Encoding: chunked", body=_HIDDEN), 400)
_serves("chunked with an underscore in its name", "9112 6.3",
    _post(b"Transfer_Encoding: chunked", b"Content-Length: 2", body=b"ab"), "POST /a ab")

# Chunks

_serves("a chunk's size in lower case", "9112 7.1", _chunked(b"a\r\n0123456789\r\n0\r\n\r\n"), "POST /a 0123456789")
_serves("a chunk's size in capitals", "9112 7.1", _chunked(b"A\r\n0123456789\r\n0\r\n\r\n"), "POST /a 0123456789")
_serves("zeros before a chunk's size", "9112 7.1", _chunked(b"005\r\nhello\r\n000\r\n\r\n"), "POST /a hello")
_serves("a chunk with CRLF in it", "9112 7.1", _chunked(b"7\r\n0\r\n\r\nab\r\n0\r\n\r\n"), "POST /a 0\r\n\r\nab")
_serves("a chunk's extensions", "9112 7.1.1", _chunked(b"5;a=b;c\r\nhello\r\n0;d\r\n\r\n"), "POST /a hello")
_serves("a chunk's quoted extension", "9112 7.1.1", _chunked(b'5;a="b \\"c\\"; d"\r\nhello\r\n0\r\n\r\n'),
    "POST /a hello")
_closes("spaces in a chunk's extension", "9112 7.1.1", _chunked(b"5; a=b\r\nhello\r\n0\r\n\r\n"), 400,
    differs="RFC 9112 7.1.1 allows such spaces for old clients; the parser refuses them")
_closes("spaces behind a chunk's size", "9112 7.1", _chunked(b"5 \r\nhello\r\n0\r\n\r\n"), 400)
_closes("a chunk's extension without a semicolon", "9112 7.1.1", _chunked(b"2 erf\r\naa\r\n0\r\n\r\n"), 400)
_closes("a chunk's semicolon without an extension", "9112 7.1.1", _chunked(b"2;\r\naa\r\n0\r\n\r\n"), 400)
_closes("a chunk's open quote", "9112 7.1.1", _chunked(b'5;a="b;c\r\nhello\r\n0\r\n\r\n'), 400)
_closes("a bare LF in a chunk's extension", "9112 7.1.1", _chunked(b"5;a\nhello\r\n0\r\n\r\n" + SMUGGLED), 400)
_closes("a bare LF that ends an extension", "9112 7.1.1", _chunked(b"2;\nxx\r\n4\r\nabcd\r\n0\r\n\r\n"), 400)
_closes("a bare CR in a chunk's extension", "9112 7.1.1", _chunked(b"5;a\rb\r\nhello\r\n0\r\n\r\n"), 400)
_closes("a NUL in a chunk's extension", "9112 7.1.1", _chunked(b"5;a\0\r\nhello\r\n0\r\n\r\n"), 400)
_closes("a bare LF behind a chunk's size", "9112 7.1", _chunked(b"5\nhello\r\n0\r\n\r\n"), 400)
_closes("a bare CR behind a chunk's size", "9112 7.1", _chunked(b"5\r\r;ABCD\r\n34\r\nE\r\n0\r\n\r\n" + SMUGGLED), 400)
_closes("a bare LF behind a chunk", "9112 7.1", _chunked(b"5\r\nhello\n0\r\n\r\n"), 400)
_closes("a bare CR behind a chunk", "9112 7.1", _chunked(b"3\r\nxxx\r_1a\r\n"), 400)
_closes("no CRLF behind a chunk", "9112 7.1", _chunked(b"5\r\nhello0\r\n\r\n"), 400)
_closes("a chunk that is longer than its size", "9112 7.1", _chunked(b"3\r\nxxx__1a\r\n0\r\n\r\n"), 400)
_closes("a chunk that is shorter than its size", "9112 7.1", _chunked(b"7\r\nhello\r\n0\r\n\r\n"), 400)
for _value in (
    b"0x5", b"0X5", b"x5", b"-5", b"+5", b"5_0", b"5h", b" 5", b"\t5", b"g", b"", b"5\0", b"5.0", b"5,",
    b"ffffffffffffffffff", b"10000000000000005", b"9" * 100, b"\xb5", b"5\t", b"5\x0b", b"-0",
):
    _name = f"chunk size {_value[:20]!r}"
    _closes(_name, "9112 7.1", _chunked(_value + b"\r\nhello\r\n0\r\n\r\n" + SMUGGLED), 400)
_waits("no last chunk", "9112 8", _chunked(b"5\r\nhello\r\n"))
_waits("no end of the trailers", "9112 8", _chunked(b"5\r\nhello\r\n0\r\n"))
_waits("half a chunk", "9112 8", _chunked(b"5\r\nhel"))
_closes("no end of the trailers, and another request", "9112 7.1.2", _chunked(b"0\r\n" + SMUGGLED), 400)
_closes("a bare LF behind the last chunk", "9112 7.1", _chunked(b"0\n\n" + SMUGGLED), 400)
_closes("a bare CR behind the last chunk", "9112 7.1", _chunked(b"0\r\n\rx" + SMUGGLED), 400)

# Trailers

_serves("trailers", "9112 7.1.2", _chunked(b"1\r\nx\r\n0\r\na: b\r\nc: d\r\n\r\n") + _get(), "POST /a x", "GET /a ")
for _line in (b"Host: b", b"Authorization: Bearer b", b"Content-Type: b", b"Expect: 100-continue", b"Trailer: a"):
    _name = f"a trailer {_line.split(b':')[0].decode()}"
    _serves(_name, "9110 6.5.1", _chunked(b"1\r\nx\r\n0\r\n" + _line + b"\r\n\r\n") + _get(), "POST /a x", "GET /a ")
_close = "a trailer Connection is to be ignored; httptools obeys it, after an answer that does not say so"
_closes("a trailer Connection", "9110 6.5.1", _chunked(b"1\r\nx\r\n0\r\nConnection: close\r\n\r\n") + SMUGGLED,
    "POST /a x", 400, differs=_close)
_closes("a trailer Content-Length", "9110 6.5.1", _chunked(b"1\r\nx\r\n0\r\nContent-Length: 5\r\n\r\n" + SMUGGLED), 400)
_closes("a trailer Transfer-Encoding", "9110 6.5.1",
    _chunked(b"1\r\nx\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n" + _HIDDEN), 400)
_serves("a trailer Upgrade", "9110 6.5.1",
    _chunked(b"1\r\nx\r\n0\r\nConnection: upgrade\r\nUpgrade: a\r\n\r\n") + _get(), "POST /a x", "GET /a ")
_closes("a trailer with a space before its colon", "9112 5.1", _chunked(b"0\r\na : b\r\n\r\n"), 400)
_closes("a folded trailer", "9112 5.2", _chunked(b"0\r\na: b\r\n c\r\n\r\n"), 400)
_closes("a bare LF in a trailer", "9112 2.2", _chunked(b"0\r\na: b\n\r\n"), 400)
_closes("a NUL in a trailer", "9110 5.5", _chunked(b"0\r\na: \0\r\n\r\n"), 400)
_closes("a trailer without a colon", "9112 5", _chunked(b"0\r\nabc\r\n\r\n"), 400)
_closes("too many trailers", "6585 5", _chunked(b"0\r\n" + b"a: b\r\n" * 300 + b"\r\n"), 431)
_closes("a trailer that is too long", "6585 5", _chunked(b"0\r\na: " + b"b" * 70_000 + b"\r\n\r\n"), 431)
_closes("a chunk's extension that is too long", "9112 7.1.1", _chunked(b"1;" + b"b" * 400_000 + b"\r\nx\r\n0\r\n\r\n"),
    431)

# Connection and Upgrade

_closes("close", "9112 9.6", _get(b"Connection: close"), "GET /a ")
_closes("close, and another request", "9112 9.6", _get(b"Connection: close") + SMUGGLED, "GET /a ")
_closes("close behind a tab", "9112 9.6", _get(b"Connection: close\t") + SMUGGLED, "GET /a ")
_closes("close in capitals", "9112 9.6", _get(b"CONNECTION: CLOSE") + SMUGGLED, "GET /a ")
_closes("close in a list", "9112 9.6", _get(b"Connection: a, close, b") + SMUGGLED, "GET /a ")
_closes("close in a second header", "9112 9.6", _get(b"Connection: a", b"Connection: close") + SMUGGLED, "GET /a ")
_closes("keep-alive and close", "9112 9.3", _get(b"Connection: keep-alive, close") + SMUGGLED, "GET /a ")
_closes("close with a body, and another request", "9112 9.6",
    _post(b"Connection: close", b"Content-Length: 1", body=b"x") + SMUGGLED, "POST /a x")
_closes("close and empty lines", "9112 9.6",
    _post(b"Connection: close", b"Content-Length: 4", body=b"q=42\r\n\r\n") + SMUGGLED, "POST /a q=42")
_serves("keep-alive", "9112 9.3", _get(b"Connection: keep-alive") * 2, "GET /a ", "GET /a ")
_serves("unknown options", "9110 7.6.1", _get(b"Connection: a, , b") * 2, "GET /a ", "GET /a ")
_serves("Connection names a header", "9110 7.6.1", _get(b"Connection: host"), "GET /a ")
_closes("a bare CR in Connection", "9112 2.2", _get(b"Connection: keep\ralive"), 400)
_closes("Connection without a colon", "9112 5", _get(b"Connection\r\x1b5\xd5eep-Alive"), 400)
_closes("Connection with a space before its colon", "9112 5.1",
    _post(b"Connection : upgrade", b"Content-Length: 4", b"Upgrade: ws", body=b"abcdefgh"), 400)

_WEBSOCKET = (
    b"Connection: Upgrade",
    b"Upgrade: websocket",
    b"Sec-WebSocket-Version: 13",
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
)
_H2C = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA")
_serves("websocket", "9110 7.8", _get(*_WEBSOCKET), "GET /a ")
_serves("websocket, and another request", "9110 7.8", _get(*_WEBSOCKET) + _get(), "GET /a ", "GET /a ")
_closes("websocket, and its frames", "9110 7.8", _get(*_WEBSOCKET) + b"\x81\x05hello", "GET /a ", 400)
_serves("h2c", "9110 7.8", _get(*_H2C), "GET /a ")
_closes("h2c, and its preface", "9110 7.8", _get(*_H2C) + b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "GET /a ", 400)
_serves("h2c with a body", "9110 7.8", _post(*_H2C, b"Content-Length: 5", body=b"hello"), "POST /a hello")
_serves("h2c with a body that is a request", "9110 7.8",
    _post(*_H2C, b"Content-Length: %d" % len(SMUGGLED), body=SMUGGLED), "POST /a " + SMUGGLED.decode())
_serves("h2c with length 0", "9110 7.8", _post(*_H2C, b"Content-Length: 0") + _get(), "POST /a ", "GET /a ")
_serves("h2c with chunks", "9110 7.8", _post(*_H2C, _CHUNKED, body=b"5\r\nhello\r\n0\r\na: b\r\n\r\n") + _get(),
    "POST /a hello", "GET /a ")
_serves("h2c with chunks of nothing", "9110 7.8", _post(*_H2C, _CHUNKED, body=b"0\r\n\r\n") + _get(), "POST /a ",
    "GET /a ")
_closes("h2c with bad chunks", "9110 7.8", _post(*_H2C, _CHUNKED, body=b"5\r\nhello0\r\n\r\n"), 400)
_closes("h2c and close", "9112 9.6",
    _post(b"Connection: Upgrade, close", b"Upgrade: h2c", b"Content-Length: 1", body=b"x") + SMUGGLED, "POST /a x")
_closes("an upgrade in HTTP/1.0", "9110 7.8",
    b"POST /a HTTP/1.0\r\nConnection: upgrade\r\nUpgrade: a\r\nContent-Length: 1\r\n\r\nx" + SMUGGLED, "POST /a x")
_serves("an upgrade three times", "9110 7.8", _post(*_H2C, b"Content-Length: 1", body=b"x") * 3, *["POST /a x"] * 3)
_serves("Upgrade without Connection", "9110 7.8", _post(b"Upgrade: h2c", b"Content-Length: 1", body=b"x") + _get(),
    "POST /a x", "GET /a ")
_closes("h2c with two lengths", "9112 6.3", _post(*_H2C, b"Content-Length: 1", b"Content-Length: 2", body=b"xy"), 400)
_closes("h2c with chunks and a length", "9112 6.3", _post(*_H2C, _CHUNKED, b"Content-Length: 1", body=_HIDDEN), 400)
_closes("h2c with an empty length", "9110 8.6", _post(*_H2C, b"Content-Length:", body=b"x"), 400)

# Expect

_serves("Expect, with the body", "9110 10.1.1", _post(b"Expect: 100-continue", b"Content-Length: 2", body=b"ab"),
    "POST /a ab")
_serves("Expect in capitals", "9110 10.1.1", _post(b"EXPECT: 100-CONTINUE", b"Content-Length: 2", body=b"ab"),
    "POST /a ab")
_serves("Expect without a body", "9110 10.1.1", _post(b"Expect: 100-continue", b"Content-Length: 0"), "POST /a ")
_waits("Expect, and no body yet", "9110 10.1.1", _post(b"Expect: 100-continue", b"Content-Length: 2"), 100)
_waits("Expect in HTTP/1.0", "9110 10.1.1", b"POST /a HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
_serves("another expectation", "9110 10.1.1", _get(b"Expect: tea"), "GET /a ")

# Pipelines

_serves("three requests", "9112 9.3.2",
    _post(b"Content-Length: 3", body=b"AAA") + _chunked(b"1\r\nB\r\n0\r\n\r\n") + _get(), "POST /a AAA", "POST /a B",
    "GET /a ")
_serves("HEAD, and another request", "9112 6.3", _get(first=b"HEAD /a HTTP/1.1") + _get(), "HEAD /a ", "GET /a ")
_closes("a good request, and a bad one", "9112 9.3.2", _get() + _post(b"Content-Length: x"), "GET /a ", 400)
_closes("a good request, and one without Host", "9112 9.3.2", _get() + b"GET /a HTTP/1.1\r\n\r\n", "GET /a ", 400)
_closes("a bad request, and a good one", "9112 9.3.2", _post(b"Content-Length: x") + SMUGGLED, 400)
_closes("a good, a bad and a good request", "9112 9.3.2", _get() + b"GET /b c HTTP/1.1\r\n\r\n" + SMUGGLED, "GET /a ",
    400)
_closes("a good request, and one with bad chunks", "9112 9.3.2", _get() + _chunked(b"x\r\n") + SMUGGLED, "GET /a ", 400)
_closes("a good request, and another protocol", "9112 9.3.2", _get() + b"\x16\x03\x01", "GET /a ", 400)
_closes("eleven requests at once", "9112 9.3.2", _get() * 11, *["GET /a "] * 9, 400,
    differs="all may be pipelined; the server bounds what waits, and closes behind the ninth answer")
_serves("nothing but an empty line", "9112 2.2", b"\r\n")
_waits("half a request line", "9112 8", b"GET /a HT")
_waits("half a head", "9112 8", b"GET /a HTTP/1.1\r\nHost: a\r\nConte")
_waits("a head without its last line", "9112 8", b"GET /a HTTP/1.1\r\nHost: a\r\n")
_waits("a head without its last LF", "9112 8", b"GET /a HTTP/1.1\r\nHost: a\r\n\r")
# fmt: on
