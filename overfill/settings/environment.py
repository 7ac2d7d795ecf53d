"""Environment variables of a stack's processes. Imports nothing, so that it can run before any other import."""

from __future__ import annotations

GRPC_ENVIRONMENT = {
    "GRPC_VERBOSITY": "ERROR",  # no log line for every peer that disconnects; the services log what matters
    "GRPC_ENABLE_FORK_SUPPORT": "0",  # processes fork only to exec
}
"""gRPC's settings for every process; variables of the user take precedence. gRPC reads them when it is imported."""


def thread_pools(threads: int) -> dict[str, str]:
    """Returns variables that set the thread pools of all libraries, which read them when imported."""
    pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    return dict.fromkeys(pools, str(threads))
