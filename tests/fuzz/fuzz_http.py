"""Makes malformed HTTP requests of many kinds. The router answers each with 4xx, or closes the connection."""

import json
import socket

LIMIT = 64 << 10  # bytes of a body
PATHS = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/v1/messages"]
GOOD = {
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
    "/v1/completions": {"model": "tiny", "prompt": "Hi", "max_tokens": 4},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [70, 71]},
    "/v1/messages": {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
}
WRONG = [{"a": {}}, [[[]]], "\u0000", -(1 << 70), 1.5e308, {"$ref": "#"}, [None], "x" * 5000]
TYPED = {
    "/v1/chat/completions": ["messages", "model", "temperature", "n", "stop", "logit_bias", "tools", "response_format"],
    "/v1/completions": ["prompt", "model", "temperature", "n", "seed", "logit_bias", "stop_token_ids"],
    "/tokenize": ["model", "messages"],
    "/detokenize": ["tokens"],
    "/v1/messages": ["messages", "model", "temperature", "stop_sequences", "tools", "tool_choice", "thinking"],
}


def head(path, length, extra=""):
    kind = "content-type: application/json"
    return f"POST {path} HTTP/1.1\r\nhost: localhost\r\n{kind}\r\ncontent-length: {length}\r\n{extra}\r\n"


def with_body(path, body):
    return head(path, len(body)).encode() + body


def wrong_type(rng, path):
    name = rng.choice(TYPED[path])
    # Any text is a valid prompt, and any short text a valid stop string.
    value = rng.choice([v for v in WRONG if not (name in ("prompt", "stop") and isinstance(v, str))])
    return with_body(path, json.dumps(GOOD[path] | {name: value}).encode())


def unknown_field(rng, path):
    name = "".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(0x400, 0x500)])) for _ in range(9))
    return with_body(path, json.dumps(GOOD[path] | {name: 1}).encode())


def deep(rng, path):
    depth = rng.choice([300, 3000, 30000])
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}"), ('[{"messages":', "}]")])
    return with_body(path, (opening * depth + "0" + closing * depth).encode()[:LIMIT])


def deep_field(rng, path):
    depth = rng.choice([100, 190, 5000])
    text = json.dumps(GOOD[path])[:-1] + ', "metadata_": ' + "[" * depth + "]" * depth + "}"
    return with_body(path, text.encode())


def huge(rng, path):
    body = json.dumps(GOOD[path] | {"x": "y" * rng.randrange(LIMIT, 20 * LIMIT)}).encode()
    return with_body(path, body)


def announced_huge(rng, path):
    return head(path, rng.choice([1 << 40, 1 << 62])).encode() + b"{"


def bad_utf8(rng, path):
    text = bytearray(json.dumps(GOOD[path]).encode())
    place = text.index(b"Hi") if b"Hi" in text else text.index(b"tokens") + 2
    text[place : place + 1] = rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80"])
    return with_body(path, bytes(text))


def surrogate(rng, path):
    return with_body(path, json.dumps(GOOD[path] | {"model": rng.choice(["\ud800", "a\udfffb"])}).encode())


def broken_json(rng, path):
    text = json.dumps(GOOD[path])
    cut = rng.randrange(len(text) - 1)
    return with_body(path, rng.choice([text[:cut], text + "}", text.replace(":", "=", 1), "", "\x00", "nul"]).encode())


def numbers(rng, path):
    number = rng.choice(["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "-0.0.0", "0x10", "1" + "0" * 400])
    text = json.dumps(GOOD[path])[:-1] + f', "{rng.choice(["max_tokens", "seed", "n", "top_k"])}": {number}}}'
    return with_body(path, text.encode())


def bad_http(rng, path):
    return rng.choice(
        [
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(200),
            b"GET\r\n\r\n",
            b"POST /v1/completions HTTP/9.9\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            head(path, -5).encode(),
            head(path, "abc").encode(),
            head(path, 2, "transfer-encoding: chunked\r\n").encode() + b"{}",
            f"POST {path} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n{{}}\r\n".encode(),
            f"POST {path} HTTP/1.1\r\nbad header\r\n\r\n".encode(),
            rng.randbytes(300) + b"\r\n\r\n",
        ]
    )


def long_head(rng, path):
    return head(path, 2, "".join(f"x-{i}: {'y' * 1000}\r\n" for i in range(rng.randrange(70, 120)))).encode()


def strange_path(rng, path):
    return with_body(path + rng.choice(["/", "/../x", "%00", "?a=%ff", "%2e%2e", "\t"]).replace("?a", "/?a"), b"{}")


def wrong_method(rng, path):
    method = rng.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
    return f"{method} {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()


UNKNOWN_FIELDS = {unknown_field, deep_field, huge, numbers}
"""Kinds of requests with fields that do not exist, which the Messages API ignores."""

KINDS = [
    wrong_type,
    unknown_field,
    deep,
    deep_field,
    huge,
    announced_huge,
    bad_utf8,
    surrogate,
    broken_json,
    numbers,
    bad_http,
    long_head,
    strange_path,
    wrong_method,
]


def exchange(address, data, slow):
    """Sends ``data``, in parts of 40 bytes if ``slow``; returns the status of the answer."""
    with socket.create_connection(address, timeout=30) as connection:
        try:
            for start in range(0, len(data), 40 if slow else len(data)):
                connection.sendall(data[start : start + (40 if slow else len(data))])
        except (BrokenPipeError, ConnectionResetError):
            pass  # the answer arrived before all was sent
        answer = b""
        try:
            while b"\r\n" not in answer and (part := connection.recv(65536)):
                answer += part
        except ConnectionResetError:
            return None
    return int(answer.split()[1]) if answer else None
