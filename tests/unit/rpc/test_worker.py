"""What a worker tells others about where it is."""

import pytest

from overfill.rpc.worker import announced


@pytest.mark.parametrize(
    ("bound", "advertise", "address"),
    [
        ("127.0.0.1:7601", "", "127.0.0.1:7601"),
        ("0.0.0.0:7601", "gpu-1.internal", "gpu-1.internal:7601"),
        ("127.0.0.1:7601", "nat.internal:31007", "nat.internal:31007"),
        ("[::]:7601", "[2001:db8::1]:31007", "[2001:db8::1]:31007"),
        ("[::]:7601", "2001:db8::1", "[2001:db8::1]:7601"),
        ("[::]:7601", "[2001:db8::1]", "[2001:db8::1]:7601"),
    ],
)
def test_a_worker_is_announced_where_others_reach_it(bound, advertise, address):
    assert announced(bound, advertise) == address
