"""Comparison of two workers' models and KV, once per connection, before any tensor moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from overfill.errors import Incompatible
from overfill.kv.spec import KvSpec
from overfill.request.messages import shared_fields
from overfill.rpc.constants import MAX_DATA_ADDRESSES, MAX_NAME_LENGTH
from overfill.v1 import common_pb2, kv_pb2

CHOSEN_BY_WORKERS = {"kv.dtype": "kv_dtype", "reader_digest": "reader_digest"}
"""Fields of a ``KvIdentity`` that no pair determines, by their dotted names, with their names in ``AnswerIdentity``.

Workers choose the element type, and what reads prompts: the full model or the mock.
"""


MOCK_READER = "mock"
"""Reader digest of the mock engine, in place of its full model's: no model reads its KV."""


@dataclass(frozen=True, slots=True)
class KvIdentity:
    """Properties that must be equal for one worker to use another's KV. It has nothing of a decoder or an adapter.

    Attributes:
        kv: geometry of the full model's KV.
        config_digest: digest of the full model's config (``model.config_digest``).
        reader_digest: digest of the reader, the weights that compute prompt KV; today the full model's.
        reader_quantize: format to which the reader's weights are rounded on load; empty means none.
        revision: revision of the pair; empty in a stack without revisions.
    """

    wire_version: int
    full_digest: str
    tokenizer_digest: str
    kv: KvSpec
    config_digest: str = ""
    reader_digest: str = ""
    reader_quantize: str = ""
    revision: str = ""

    @classmethod
    def from_proto(cls, wire_version: int, model: common_pb2.ModelIdentity, kv: common_pb2.KvSpec) -> KvIdentity:
        """Returns the identity of the KV of a worker that says this of itself."""
        return cls(wire_version=wire_version, kv=KvSpec.from_proto(kv), **shared_fields(cls, model))

    def flat(self) -> dict[str, object]:
        """Every field by its dotted name."""
        own: dict[str, object] = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "kv"}
        return own | self.kv.flat()

    def of_pair(self) -> dict[str, object]:
        """Returns the fields that the pair determines, by their dotted names."""
        return {name: value for name, value in self.flat().items() if name not in CHOSEN_BY_WORKERS}

    def chosen_by_workers(self) -> dict[str, object]:
        """Returns the other fields, by their names in ``AnswerIdentity``."""
        flat = self.flat()
        return {other: flat[name] for name, other in CHOSEN_BY_WORKERS.items()}

    @property
    def cache_key(self) -> str:
        """What prefix caches and routers' indexes are keyed by, besides cache namespace and tokens."""
        digests = (self.full_digest, self.config_digest, self.reader_digest, self.reader_quantize, self.kv.dtype)
        return "\0".join(digests)


def check_compatible(mine: KvIdentity, theirs: KvIdentity, peer: str) -> None:
    """Raises Incompatible if the identities differ. The message names ``peer`` and every differing field."""
    check_same(mine.flat(), theirs.flat(), f"{peer} serves KV that does not fit this worker")


def check_same(here: Mapping[str, object], there: Mapping[str, object], verdict: str) -> None:
    """Raises Incompatible if fields of ``here`` differ in ``there``: ``verdict``, then each with both values."""
    differing = [name for name in here if here[name] != there[name]]
    if differing:
        lines = ", ".join(f"{name} (here {here[name]!r}, there {there[name]!r})" for name in differing)
        raise Incompatible(f"{verdict}; differing fields: {lines}", differing)


def data_address_fault(addresses: Sequence[kv_pb2.DataAddress], num_kv_heads: int) -> str:
    """Returns what is wrong with data addresses, after their field's name; empty if each KV head is at exactly one."""
    if len(addresses) > (most := min(num_kv_heads, MAX_DATA_ADDRESSES)):
        return f"must be at most {most} for {num_kv_heads} KV heads; got {len(addresses)}"
    for one in addresses:
        host, _, port = one.address.rpartition(":")
        if not host or not port or len(one.address) > MAX_NAME_LENGTH or not one.address.isprintable():
            return f"must be host:port, of at most {MAX_NAME_LENGTH} printable characters; got {one.address[:40]!r}"
    ranges = sorted((one.first_kv_head, one.first_kv_head + one.num_kv_heads) for one in addresses)
    starts, ends = [start for start, _ in ranges], [end for _, end in ranges]
    if [*starts, num_kv_heads] == [0, *ends] and all(start < end for start, end in ranges):
        return ""
    shown = ", ".join(f"[{start}, {end})" for start, end in ranges)
    return f"must serve each of the {num_kv_heads} KV heads exactly once; got the ranges {shown}"
