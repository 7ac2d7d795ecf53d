"""Tests a thousand malformed requests: each gets a 4xx and none a 5xx, and no request or memory is left behind."""

import concurrent.futures
import gc
import json
import random
import socket
import time

import psutil
import pytest
from mocks import mock_stack

import services.router.http.connection

COUNT = 1000
LIMIT = 64 << 10  # bytes of a body
PATHS = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]
GOOD = {
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
    "/v1/completions": {"model": "tiny", "prompt": "Hi", "max_tokens": 4},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [70, 71]},
}
WRONG = [{"a": {}}, [[[]]], "\u0000", -(1 << 70), 1.5e308, {"$ref": "#"}, [None], "x" * 5000]
TYPED = {
    "/v1/chat/completions": ["messages", "model", "temperature", "n", "stop", "logit_bias", "tools", "response_format"],
    "/v1/completions": ["prompt", "model", "temperature", "n", "seed", "logit_bias", "stop_token_ids"],
    "/tokenize": ["model", "messages"],
    "/detokenize": ["tokens"],
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


def half_a_head(rng, path):
    whole = with_body(path, json.dumps(GOOD[path]).encode())
    return whole[: rng.randrange(1, whole.index(b"\r\n\r\n") + 3)]


def half_a_body(rng, path):
    whole = with_body(path, json.dumps(GOOD[path]).encode())
    return whole[: rng.randrange(whole.index(b"\r\n\r\n") + 4, len(whole) - 1)]


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
    half_a_head,
    half_a_body,
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


@pytest.fixture
def impatient(monkeypatch):
    """Shortens the time that the server waits for the rest of a request."""
    monkeypatch.setattr(services.router.http.connection, "HEAD_TIMEOUT", 0.5)
    monkeypatch.setattr(services.router.http.connection, "BODY_TIMEOUT", 0.5)


def test_a_thousand_hostile_requests(tiny_pair, impatient, caplog):
    with mock_stack(tiny_pair, max_request_bytes=LIMIT, served_model_name="tiny") as stack:
        host, _, port = stack.url.removeprefix("http://").partition(":")
        address = (host, int(port))
        rng = random.Random(8)
        requests = []
        for number in range(COUNT):
            kind, path = KINDS[number % len(KINDS)], rng.choice(PATHS)
            data = kind(rng, path)
            requests.append((kind.__name__, data, len(data) < 4000 and rng.random() < 0.1))

        def send_all(some):
            with concurrent.futures.ThreadPoolExecutor(16) as pool:
                return list(pool.map(lambda r: exchange(address, r[1], r[2]), some))

        statuses = send_all(requests[:200])
        gc.collect()
        before = psutil.Process().memory_info().rss
        statuses += send_all(requests[200:])
        gc.collect()
        grown = psutil.Process().memory_info().rss - before

        answered = {name: set() for name, _, _ in requests}
        for (name, data, _), status in zip(requests, statuses, strict=True):
            answered[name].add(status)
            assert status is None or 400 <= status < 500, (name, status, data[:300])
            # The server may close the connection instead if the client would not read an answer.
            assert status is not None or name in ("huge", "announced_huge", "long_head"), (name, data[:300])
        print(len(statuses), "requests,", grown >> 10, "KiB more:")
        print({name: sorted(map(str, seen)) for name, seen in answered.items()})
        assert answered["half_a_head"] == answered["half_a_body"] == {408}
        assert 413 in answered["huge"]
        assert 431 in answered["long_head"]

        deadline = time.monotonic() + 20
        while len(stack.router._http._state.open) or stack.router.dispatcher.num_jobs:
            assert time.monotonic() < deadline, "a request is still in flight"
            time.sleep(0.01)
        assert grown < 32 << 20, f"{grown >> 20} MiB were not freed"
        assert "incident" not in caplog.text, "the router reports an internal error"
        for path in PATHS:
            assert exchange(address, with_body(path, json.dumps(GOOD[path]).encode()), False) == 200
