"""Tests malformed requests over every RPC and route of a real stack: no crash, hang, memory growth or 5xx.

A case is made from its number, so that it can be made again: ``OVERFILL_FUZZ_SEED=N pytest tests/fuzz``. The valid
messages from which cases are made are in ``corpus/seeds.json``. Cases that once did harm are in ``corpus/found.json``
and are always sent.
"""

from __future__ import annotations

import base64
import collections
import json
import os
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fuzz_http
import fuzz_http2
import grpc
import psutil
import pytest
from fuzz_messages import damage, fill, mutate
from google.protobuf import json_format
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from stacks import children, idle, running_stack, wait_until

from overfill.client import Client, SamplingParams
from overfill.rpc.access import METRICS_ROUTES, ROUTER_RPCS, ROUTES, WORKER_RPCS
from overfill.rpc.channel import open_sync_channel
from overfill.rpc.constants import WIRE_VERSION
from overfill.v1 import admin_pb2, admin_pb2_grpc, decode_pb2, inference_pb2, prefill_pb2, registry_pb2

CORPUS = Path(__file__).parent / "corpus"
SEED = int(os.environ.get("OVERFILL_FUZZ_SEED", "11"))
OURS = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}
"""What no mistake of a client may be answered with."""

DEADLINE = 4.0  # deadline of a call, in seconds
PATIENCE = 60.0  # seconds after which a call counts as hanging, even on a busy machine
GROWTH = 96 << 20  # bytes by which a process may grow

_TYPES = {
    "Inference": inference_pb2,
    "Registry": registry_pb2,
    "Admin": admin_pb2,
    "Prefill": prefill_pb2,
    "Decode": decode_pb2,
    "Health": health_pb2,
    "ServerReflection": reflection_pb2,
}


def request_type(method):
    service, _, name = method.rpartition("/")
    module = _TYPES[service.rpartition(".")[2]]
    described = module.DESCRIPTOR.services_by_name[service.rpartition(".")[2]].methods_by_name[name]
    return getattr(module, described.input_type.name), described.client_streaming


class Cases:
    """Makes requests by number. ``facts`` are valid values, without which a request fails the first check."""

    def __init__(self, facts):
        self._seeds = {}
        for method, bodies in json.loads((CORPUS / "seeds.json").read_text()).items():
            kind, _ = request_type(method)
            self._seeds[method] = [json_format.ParseDict(body, kind()) for body in bodies]
        commands = [each for seed in self._seeds["/overfill.v1.Decode/Serve"] for each in seed.commands]
        of_prefill = [seed for rpc in ("Prefill", "Lend") for seed in self._seeds[f"/overfill.v1.Prefill/{rpc}"]]
        for command in (*commands, *of_prefill):
            kind = command.WhichOneof("message")
            if kind == "start":
                decodes = isinstance(command, decode_pb2.SequenceCommand)
                command.start.expected_incarnation = facts["overfill.v1.Decode" if decodes else "overfill.v1.Prefill"]
            elif kind == "assign_prefill":
                command.assign_prefill.incarnation = facts["overfill.v1.Prefill"]
                command.assign_prefill.address = facts["address"]
                command.assign_prefill.data_addresses.add(
                    address=facts["address"], num_kv_heads=facts["kv"].num_kv_heads
                )
        for seed in self._seeds["/overfill.v1.Prefill/PrefillAtOnce"]:
            seed.expected_incarnation = facts["overfill.v1.Prefill"]
        for seed in self._seeds["/overfill.v1.Registry/Join"]:
            if seed.HasField("hello"):
                seed.hello.model.CopyFrom(facts["model"])
                seed.hello.kv.CopyFrom(facts["kv"])
                seed.hello.wire_version = WIRE_VERSION

    def messages(self, method, number):
        """Returns the messages of a call, as bytes."""
        rng = random.Random(f"{SEED}/{method}/{number}")
        kind, streams = request_type(method)
        seeds = self._seeds[method]
        out = []
        for position in range(rng.choice((1, 1, 2, 4)) if streams else 1):
            seed = seeds[0] if streams and not position and rng.random() < 0.6 else rng.choice(seeds)
            way = rng.random()
            if way < 0.5:
                data = _bytes(mutate(rng, seed))
            elif way < 0.65:
                filled = kind()
                fill(rng, filled)
                data = _bytes(filled)
            elif way < 0.95:
                data = damage(rng, _bytes(mutate(rng, seed) if rng.random() < 0.5 else seed))
            else:
                data = _bytes(seed)
            out.append(data)
        if method.endswith("/Drain"):
            out = [data for data in out if not _drains(data)] or [b"\x0a\xff"]
        return out if rng.random() < 0.98 else []


def _bytes(message):
    try:
        return message.SerializeToString()
    except ValueError:
        return b"\xff"


def _drains(data):
    """True if ``data`` is a request of Drain that would end the process under test."""
    try:
        return admin_pb2.DrainRequest.FromString(data).worker_id != "nobody"
    except DecodeError:
        return False


def call(channel, method, messages):
    """Makes a call; returns (status, message).

    The call is blocking, because asyncio calls report INTERNAL when they write to a call that has ended.
    """
    try:
        for _ in channel.stream_stream(method)(iter(messages), timeout=0.5 if method.endswith("/Watch") else DEADLINE):
            pass
        return grpc.StatusCode.OK, ""
    except grpc.RpcError as error:
        return error.code(), error.details()


def send_all(address, cases, wrong, counts, abreast=12):
    """Sends cases of (method, number, messages), several at once over several channels."""
    queue = collections.deque(cases)

    def work():
        with open_sync_channel(address) as channel:
            while queue:
                try:
                    method, number, messages = queue.popleft()
                except IndexError:
                    return
                start = time.monotonic()
                status, said = call(channel, method, messages)
                hangs = time.monotonic() - start > PATIENCE
                counts[method.rpartition(".")[2], status.name] += 1
                if status in OURS or hangs:
                    data = [base64.b64encode(message).decode() for message in messages]
                    got = "hang" if hangs else status.name
                    wrong.append({"method": method, "number": number, "got": got, "said": said, "messages": data})

    with ThreadPoolExecutor(abreast) as pool:
        for done in [pool.submit(work) for _ in range(abreast)]:
            done.result()


class Held:
    """Connections that stay open: half a request, half a handshake, or an answer that is not read."""

    def __init__(self, grpc_addresses, http_addresses):
        self.sockets = []
        rng = random.Random(SEED)
        generate = inference_pb2.GenerateRequest(text="x", sampling=inference_pb2.GenerateRequest().sampling)
        generate.sampling.max_tokens = 400
        generate.sampling.ignore_eos = True
        for address, table in grpc_addresses:
            methods = list(table)
            for number in range(12):
                method = rng.choice(methods)
                self._hold(address, (
                    fuzz_http2.PREFACE[:10],
                    fuzz_http2.PREFACE,
                    b"",
                    fuzz_http2.open_call(method, b"\x0a\x05ab", end=False)[:-4],
                    # The call starts, but its message never arrives.
                    fuzz_http2.PREFACE + fuzz_http2.settings(window=0)
                    + fuzz_http2.frame(fuzz_http2.HEADERS, fuzz_http2.END_HEADERS, 1, fuzz_http2.headers(method)),
                    # The flow-control window is too small for the answer.
                    fuzz_http2.open_call("/overfill.v1.Inference/Generate", generate.SerializeToString()),
                )[number % 6])  # fmt: skip
        body = json.dumps(
            {"model": "tiny", "prompt": "x", "max_tokens": 400, "stream": True, "ignore_eos": True}
        ).encode()
        whole = fuzz_http.with_body("/v1/completions", body)
        for address in http_addresses:
            for number in range(12):
                self._hold(address, (whole[:20], whole[:-3], b"", b"GET /status HT", whole, whole)[number % 6])

    def _hold(self, address, data):
        host, _, port = address.rpartition(":")
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        connection.sendall(data)
        self.sockets.append(connection)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for connection in self.sockets:
            connection.close()


def memory(processes):
    return {process.pid: process.memory_info().rss for process in processes}


def exchange(address, data, drops):
    """Makes an HTTP request; returns its status, None if the connection was closed, or "hang" without an answer."""
    try:
        return fuzz_http.exchange(address, data, drops)
    except TimeoutError:
        return "hang"
    except (ConnectionError, ValueError, IndexError):
        return None


def http_case(number):
    """Makes an HTTP case: (kind, bytes, whether they are sent slowly)."""
    rng = random.Random(f"{SEED}/http/{number}")
    if rng.random() < 0.8:
        kind, path = rng.choice(fuzz_http.KINDS), rng.choice(fuzz_http.PATHS)
        if path == "/v1/messages" and kind in fuzz_http.UNKNOWN_FIELDS:
            path = "/v1/completions"
        data = kind(rng, path)
        return kind.__name__, data, len(data) < 3000 and rng.random() < 0.03
    path = rng.choice([route.replace("{model:path}", "x") for route in (*ROUTES, *METRICS_ROUTES, "/nothing", "/v1")])
    method = rng.choice(("PUT", "DELETE", "POST", "PATCH", "GET", "HEAD", "TRACE", "CONNECT", "X" * 20))
    query = rng.choice(("", "?x=%ff", "?" + "a=1&" * 500, "#x", "/..", "%2f", ";x"))
    head = f"{method} {path}{query} HTTP/1.1\r\nhost: {rng.choice(('localhost', '[::1]:1', 'x', '', 'a' * 300))}\r\n"
    head += rng.choice(
        ("", "authorization: Basic !!\r\n", "content-length: 3\r\n\r\n{}x", "cookie: \x01\r\n", "expect: x\r\n")
    )
    return "routes", head.encode("latin-1") + b"\r\n", False


def run(pair, http_count, rpc_count, frame_count):
    wrong, counts = [], collections.Counter()
    with running_stack(pair, http=0, shm="on") as (stack, address):
        with Client(address) as client:
            status = client.status()
        by_id = {worker.id: worker for worker in status.workers}
        prefill, decode = by_id["prefill-0"], by_id["decode-0"]
        http_address = stack.spec.openai_urls(stack.placed.addresses)[0].split("/")[2]
        raw = _raw_status(address)
        cases = Cases(
            {
                "overfill.v1.Decode": decode.process.incarnation,
                "overfill.v1.Prefill": prefill.process.incarnation,
                "address": prefill.address,
                "model": raw.workers[0].process.model,
                "kv": raw.workers[0].process.kv,
            }
        )
        homes = {address: ROUTER_RPCS}
        for worker, own in ((prefill, "Prefill"), (decode, "Decode")):
            other = "Decode" if own == "Prefill" else "Prefill"
            homes[worker.address] = {m: rule for m, rule in WORKER_RPCS.items() if f".{other}/" not in m}
        processes = [
            psutil.Process(child.pid) for stage in ("router", "prefill", "decode") for child in children(stack, stage)
        ]
        metrics = [status.process.metrics_address, *(worker.process.metrics_address for worker in status.workers)]
        methods = [(where, method) for where, table in homes.items() for method in table]
        each = -(-rpc_count // len(methods))

        def rpcs(share):
            for where, table in homes.items():
                # Made-up workers must not be chosen for the requests of others.
                for group in (lambda m: "Join" not in m, lambda m: "Join" in m):
                    batch = [
                        (method, number, cases.messages(method, number))
                        for number in range(*share)
                        for method in table
                        if group(method)
                    ]
                    send_all(where, batch, wrong, counts)

        def https(share):
            host, _, port = http_address.rpartition(":")
            with ThreadPoolExecutor(12) as pool:
                made = [http_case(number) for number in range(*share)]
                for (kind, data, _), got in zip(
                    made, pool.map(lambda c: exchange((host, int(port)), c[1], c[2]), made), strict=True
                ):
                    counts[f"http {kind}", str(got)] += 1
                    allowed = range(200 if kind == "routes" else 400, 500)
                    if got == "hang" or (isinstance(got, int) and got not in allowed):
                        wrong.append({"http": kind, "got": got, "data": base64.b64encode(data[:3000]).decode()})

        def frames(share):
            for number in range(*share):
                rng = random.Random(f"{SEED}/frames/{number}")
                where, method = rng.choice(methods)
                where = rng.choice(metrics) if rng.random() < 0.2 else where
                host, _, port = where.rpartition(":")
                try:
                    with socket.create_connection((host, int(port)), 20) as connection:
                        connection.sendall(fuzz_http2.broken(rng, method))
                        connection.settimeout(0.05)
                        answer = connection.recv(65536)
                except OSError:
                    answer = b""
                counts["frames", "answered" if answer else "silent"] += 1
                if answer.startswith((b"HTTP/1.0 5", b"HTTP/1.1 5")):
                    wrong.append({"frames": number, "got": answer[:100].decode()})

        found = [(case["method"], -1, [base64.b64decode(m) for m in case["messages"]]) for case in _found()]
        for where, table in homes.items():
            send_all(where, [case for case in found if case[0] in table], wrong, counts)
        # A tenth of the cases first, because a process keeps the memory that it allocates once.
        https((0, http_count // 10))
        rpcs((0, each // 10))
        frames((0, frame_count // 10))
        wait_until(lambda: idle(address), 60, "everything has ended")
        before, files = memory(processes), [p.num_fds() for p in processes]
        with Held([*homes.items()], [http_address, *metrics]):
            reading = threading.Thread(target=https, args=((http_count // 10, http_count),))
            reading.start()
            rpcs((each // 10, each))
            frames((frame_count // 10, frame_count))
            reading.join()
            with Client(address) as client:  # while all connections are still open
                answer = client.generate([20, 21], sampling=SamplingParams(max_tokens=3, ignore_eos=True), timeout=60)
                assert len(answer.token_ids) == 3
        wait_until(lambda: idle(address), 90, "everything has ended")
        wait_until(lambda: all(p.num_fds() <= n + 24 for p, n in zip(processes, files, strict=True)), 60, "descriptors")
        after = memory(processes)
        grown = {child.pid: after[child.pid] - before[child.pid] for child in processes}
        with Client(address) as client:
            assert client.status().complete
            assert len(client.generate([20, 21], sampling=SamplingParams(max_tokens=3, ignore_eos=True)).token_ids) == 3
            assert {w.id: w.process.incarnation for w in client.status().workers} == {
                "prefill-0": prefill.process.incarnation,
                "decode-0": decode.process.incarnation,
            }, "a process was restarted"
        lines = list(stack.lines)
    total = sum(counts.values())
    print(f"{total} requests; grown by {[size >> 10 for size in grown.values()]} KiB (router, prefill, decode)")
    for (what, got), count in sorted(counts.items()):
        print(f"  {what:40} {got:22} {count}")
    faults = [line for line in lines if "incident" in line or "Traceback" in line]
    if wrong or faults:
        print(json.dumps(wrong[:20], indent=1))
        print("\n".join([line for line in lines if " | " in line][-60:] if faults else []))
    assert not wrong
    assert not faults
    assert all(size < GROWTH for size in grown.values()), grown
    return total


def _raw_status(address):
    with open_sync_channel(address) as channel:
        return admin_pb2_grpc.AdminStub(channel).Status(admin_pb2.StatusRequest())


def _found():
    return json.loads((CORPUS / "found.json").read_text())


def test_seeds_cover_every_rpc():
    assert json.loads((CORPUS / "seeds.json").read_text()).keys() == ROUTER_RPCS.keys() | WORKER_RPCS.keys()


@pytest.mark.timeout(170)
def test_malformed_requests_in_short(tiny_pair):
    run(tiny_pair, 200, 450, 40)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_thousand_malformed_requests(tiny_pair):
    start = time.monotonic()
    total = run(tiny_pair, 6_000, 13_000, 1_200)
    print(f"{total} requests in {time.monotonic() - start:.0f} s, seed {SEED}")
    assert total >= 20_000
