"""Variables that the processes of a stack are given, or kept from. Imports nothing, so it may come before anything."""

from __future__ import annotations

GRPC_ENVIRONMENT = {
    "GRPC_VERBOSITY": "ERROR",  # not a line for every peer that goes away; our own log says what matters
    "GRPC_ENABLE_FORK_SUPPORT": "0",  # we fork only to exec
}
"""Environment of every process of ours, unless the user's says otherwise. gRPC reads it when it is imported."""

SETTINGS = ("OVERFILL_ROUTER_", "OVERFILL_PREFILL_", "OVERFILL_DECODE_", "OVERFILL_MOCK_")
"""How variables begin that are settings of a service. Who plans a stack reads them; a planned process does not."""


def thread_pools(threads: int) -> dict[str, str]:
    """Every library's thread pool at ``threads``. They are read when the libraries are imported."""
    pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    return dict.fromkeys(pools, str(threads))
