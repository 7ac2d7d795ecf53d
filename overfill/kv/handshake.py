"""Comparison of two workers' models and KV, once per connection, before any tensor moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from overfill.errors import Incompatible
from overfill.kv.spec import KvSpec
from overfill.v1 import decode_pb2


@dataclass(frozen=True, slots=True)
class KvIdentity:
    """Properties that must be equal for one worker to use another's KV."""

    wire_version: int
    full_digest: str
    tokenizer_digest: str
    kv: KvSpec

    def flat(self) -> dict[str, object]:
        """Every field by its dotted name."""
        return {
            "wire_version": self.wire_version,
            "full_digest": self.full_digest,
            "tokenizer_digest": self.tokenizer_digest,
        } | self.kv.flat()


def check_compatible(mine: KvIdentity, theirs: KvIdentity, peer: str) -> None:
    """Raises Incompatible if the identities differ. The message names ``peer`` and every differing field."""
    check_same(mine.flat(), theirs.flat(), f"{peer} serves KV that does not fit this worker")


def check_same(here: Mapping[str, object], there: Mapping[str, object], verdict: str) -> None:
    """Raises Incompatible if fields of ``here`` differ in ``there``: ``verdict``, then each with both values."""
    differing = [name for name in here if here[name] != there[name]]
    if differing:
        lines = ", ".join(f"{name} (here {here[name]!r}, there {there[name]!r})" for name in differing)
        raise Incompatible(f"{verdict}; differing fields: {lines}", differing)


def data_address(target: decode_pb2.AssignPrefill) -> str:
    """Returns the address from which to pull KV, ``host:port``."""
    return target.data_addresses[0].address if target.data_addresses else target.address


def check_data_addresses(target: decode_pb2.AssignPrefill, kv: KvSpec) -> None:
    """Raises Incompatible unless one address serves all KV heads: heads at other addresses would not be pulled."""
    heads = [range(one.first_kv_head, one.first_kv_head + one.num_kv_heads) for one in target.data_addresses]
    if heads not in ([], [range(kv.num_kv_heads)]):
        ranges = ", ".join(f"[{each.start}, {each.stop})" for each in heads)
        raise Incompatible(
            f"data_addresses: this version pulls from one address, which must serve all {kv.num_kv_heads} KV heads; "
            f"prefill worker {target.worker_id} serves the heads {ranges} at {len(heads)} addresses",
            ["data_addresses"],
        )
