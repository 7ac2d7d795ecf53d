"""Refuses fields of the wire that are made for later versions: this version would ignore what they ask for."""

from __future__ import annotations

from overfill.errors import Incompatible
from overfill.v1 import decode_pb2, prefill_pb2, registry_pb2


def check_hello(hello: registry_pb2.Hello) -> None:
    """Raises Incompatible, which names the fields, if a worker sets a field that this version does not fill."""
    _refuse(
        f"worker {hello.worker_id}",
        {"hello.adapters": bool(hello.adapters), "hello.model.revision": bool(hello.model.revision)},
    )


def check_report(report: registry_pb2.Report) -> None:
    """Raises Incompatible as ``check_hello`` does."""
    if report.HasField("adapters"):
        _refuse("the worker's report", {"report.adapters": True})


def check_start(start: decode_pb2.StartDecode | prefill_pb2.StartPrefill) -> None:
    """Raises Incompatible as ``check_hello`` does.

    ``answer_start`` is refused unless it is the prompt's length, its default: a decoder computes no prompt token yet.
    """
    early = start.HasField("answer_start") and start.answer_start != len(start.prompt_token_ids)
    adapter = isinstance(start, decode_pb2.StartDecode) and start.adapter_digest != ""
    if early or adapter:
        _refuse(f"request {start.request_id}", {"answer_start": early, "adapter_digest": adapter})


def _refuse(what: str, given: dict[str, bool]) -> None:
    names = [name for name, is_set in given.items() if is_set]
    if names:
        raise Incompatible(f"{what} sets {', '.join(names)}, which this version does not support", names)
