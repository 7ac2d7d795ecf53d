"""Tests that every RPC and route of running processes requires the credentials that the access table lists."""

from __future__ import annotations

from contextlib import contextmanager

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from http_calls import bearer, call
from mocks import mock_stack
from stacks import running_stack

from overfill.api import key_file as keys
from overfill.client import Client, PermissionDenied, SamplingParams
from overfill.rpc.access import METRICS_ROUTES, ROUTER_RPCS, ROUTES, WORKER_RPCS, Scope
from overfill.rpc.channel import open_sync_channel
from overfill.rpc.tls import Credentials

HEALTH = {"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"}
REFUSED = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}


def methods(channel):
    """Returns the full names of all RPCs that the server lists by reflection."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)

    def ask(**request):
        (answer,) = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(**request)]), timeout=10)
        return answer

    names = set()
    for service in ask(list_services="").list_services_response.service:
        for data in ask(file_containing_symbol=service.name).file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(data)
            for described in file.service:
                if f"{file.package}.{described.name}" == service.name:
                    names |= {f"/{service.name}/{method.name}" for method in described.method}
    return names


def code(channel, method):
    """Returns the status of a call with an empty message. On the wire every RPC is a stream in both directions."""
    try:
        for _ in channel.stream_stream(method)(iter([b""]), timeout=10):
            return grpc.StatusCode.OK
        return grpc.StatusCode.OK
    except grpc.RpcError as error:
        return error.code()


def http(url, headers=None, method="GET"):
    return call(url, {} if method == "POST" else None, headers, method).status


@contextmanager
def channel_to(address, *, secret="", key=None, tls=None):
    with open_sync_channel(address, Credentials(tls, secret or key or "")) as channel:
        yield channel


def test_every_rpc_of_running_processes_refuses_without_credentials(tiny_pair, tmp_path):
    file = tmp_path / "keys.json"
    good = keys.create(file, "all", scopes=list(Scope))
    infer = keys.create(file, "infer", scopes=["infer"])
    metrics = keys.create(file, "metrics", scopes=["metrics"])
    with running_stack(tiny_pair, http=0, api_keys=file) as (stack, address):
        secret = stack.placed.secret
        with Client(address, api_key=secret) as client:
            status = client.status()
        processes = {address: ROUTER_RPCS} | {worker.address: WORKER_RPCS for worker in status.workers}
        assert len(processes) == 3
        seen = set()
        for where, table in processes.items():
            with channel_to(where, secret=secret) as channel:
                running = methods(channel)
            # Unlisted RPCs are refused anyway; this notices an RPC that the table has forgotten.
            assert running - {"/grpc.health.v1.Health/List"} <= table.keys(), running - table.keys()
            seen |= running
            for method in running:
                wanted = table.get(method)
                for shown in ("", "wrong", infer, metrics):
                    with channel_to(where, key=shown) as channel:
                        answer = code(channel, method)
                    may = method in HEALTH or (shown == infer and wanted is not None and wanted.scope is Scope.INFER)
                    assert (answer in REFUSED) != may, (where, method, shown and "a key", answer)
                with channel_to(where, key=good) as channel:
                    answer = code(channel, method) if not method.endswith("/Drain") else None
                if table is WORKER_RPCS and method not in HEALTH:
                    assert answer in REFUSED | {None}, (method, "workers accept no keys")
                elif method in table and table[method].scope is not None:
                    assert answer not in REFUSED, method
            with channel_to(where) as channel:
                assert code(channel, "/overfill.v1.Nothing/There") is grpc.StatusCode.UNIMPLEMENTED
        assert seen - {"/grpc.health.v1.Health/List"} == ROUTER_RPCS.keys() | WORKER_RPCS.keys(), "each RPC was tried"
        print(len(seen), "RPCs in", len(processes), "processes")

        ports = [status.process.metrics_address, *(w.process.metrics_address for w in status.workers)]
        assert all(ports)
        for where in ports:
            for route in METRICS_ROUTES:
                assert http(f"http://{where}{route}") == 401, (where, route)
                assert http(f"http://{where}{route}", bearer(infer)) == 403, (where, route)
            assert http(f"http://{where}/metrics", bearer(metrics)) == 200
            assert http(f"http://{where}/nothing") == 401
        base = stack.spec.openai_urls(stack.placed.addresses)[0].removesuffix("/v1")
        assert {route for route, rule in ROUTES.items() if rule.open} == {"/health", "/ui", "/", "/api/hello"}
        for route, rule in ROUTES.items():
            path = route.replace("{model:path}", "x")
            for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
                expected = {200, 307, 405} if rule.open else {401}
                assert http(f"{base}{path}", method=method) in expected, (method, path)
        with Client(address, api_key=infer) as client:
            assert client.generate("x", sampling=SamplingParams(max_tokens=2)).token_ids


def test_routes_are_those_of_the_table_and_scopes_tell_them_apart(tiny_pair, tmp_path):
    file = tmp_path / "keys.json"
    by_scope = {scope: keys.create(file, f"only-{scope}", scopes=[scope]) for scope in Scope}
    with mock_stack(tiny_pair, api_keys=file) as stack:
        assert set(stack.router._http_api.routes) == ROUTES.keys()
        for route, rule in ROUTES.items():
            path = route.replace("{model:path}", "x")
            assert (http(f"{stack.url}{path}") == 401) != rule.open, path
            for scope, key in by_scope.items():
                answer = http(f"{stack.url}{path}", bearer(key))
                assert (answer == 403) == (not rule.open and scope is not rule.scope), (path, scope, answer)
        assert http(f"{stack.url}/nothing", bearer(by_scope[Scope.INFER])) == 404
        for scope, key in by_scope.items():
            with Client(stack.grpc, api_key=key) as client:
                if scope is Scope.STATUS:
                    assert client.status().workers
                else:
                    with pytest.raises(PermissionDenied, match="scope status"):
                        client.status()
                if scope is not Scope.ADMIN:
                    with pytest.raises(PermissionDenied, match="scope admin"):
                        client.drain("decode-0")


def test_a_route_that_the_table_does_not_know_is_refused(tiny_pair, monkeypatch):
    monkeypatch.delitem(ROUTES, "/version")
    with mock_stack(tiny_pair) as stack:
        assert http(f"{stack.url}/version") == 404
        assert http(f"{stack.url}/status") == 200


def test_an_rpc_that_the_table_does_not_know_is_refused(tiny_pair, monkeypatch):
    monkeypatch.delitem(ROUTER_RPCS, "/overfill.v1.Inference/Tokenize")
    with mock_stack(tiny_pair) as stack, Client(stack.grpc) as client:
        assert client.models()
        with pytest.raises(PermissionDenied, match="has no access rule"):
            client.tokenize("x")


def test_a_plain_stack_on_loopback_is_open(tiny_pair):
    with mock_stack(tiny_pair) as stack:
        assert {route: http(f"{stack.url}{route}") for route in ("/status", "/metrics", "/ui", "/v1/models")} == {
            "/status": 200, "/metrics": 200, "/ui": 200, "/v1/models": 200,
        }  # fmt: skip
        with Client(stack.grpc) as client:
            assert client.status().complete
