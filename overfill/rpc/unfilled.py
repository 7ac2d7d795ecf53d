"""Refuses fields of the wire that are made for later versions: this version would ignore what they ask for."""

from __future__ import annotations

from overfill.errors import Incompatible
from overfill.v1 import registry_pb2


def check_hello(hello: registry_pb2.Hello) -> None:
    """Raises Incompatible, which names the field, if a worker sets a field that this version does not fill."""
    if hello.model.revision:
        field = "hello.model.revision"
        raise Incompatible(f"worker {hello.worker_id} sets {field}, which this version does not support", [field])
