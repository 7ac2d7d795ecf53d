"""Refuses fields of the wire that are made for later versions: this version would ignore what they ask for."""

from __future__ import annotations

from overfill.errors import Incompatible
from overfill.v1 import registry_pb2


def check_hello(hello: registry_pb2.Hello) -> None:
    """Raises Incompatible, which names the fields, if a worker sets a field that this version does not fill."""
    refuse(f"worker {hello.worker_id}", {"hello.model.revision": bool(hello.model.revision)})


def refuse(what: str, given: dict[str, bool]) -> None:
    """Raises Incompatible if a field of ``given`` is set; the message begins with ``what``."""
    names = [name for name, is_set in given.items() if is_set]
    if names:
        raise Incompatible(f"{what} sets {', '.join(names)}, which this version does not support", names)
