"""A failed call as the client of gRPC receives it."""

from __future__ import annotations

import grpc


class FakeRpcError(grpc.RpcError):
    """A status; by default that of a peer that does not listen."""

    def __init__(
        self,
        code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE,
        details: str = "connection refused",
        trailers: object = (),
    ) -> None:
        self._parts = code, details, trailers

    def code(self) -> grpc.StatusCode:
        return self._parts[0]

    def details(self) -> str:
        return self._parts[1]

    def trailing_metadata(self) -> object:
        return self._parts[2]
