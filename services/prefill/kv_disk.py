"""Opens the KV on disk of a worker that runs the full model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from overfill.engine.device import device_executor
from overfill.engine.protocol import ServedHalf
from overfill.kv.disk import DiskLimits, DiskTier, Loan
from overfill.kv.disk_files import DiskFiles
from overfill.kv.keys import PromptBlocks
from overfill.settings.config import PrefillingConfig
from overfill.telemetry.metrics import DiskMetrics

_COPIERS = 1  # threads that copy KV between the cache and memory, from where it goes to disk

logger = logging.getLogger(__name__)


def open_disk(
    config: PrefillingConfig,
    served: ServedHalf,
    lend: Callable[[PromptBlocks], AbstractAsyncContextManager[Loan]],
    counts: DiskMetrics,
) -> DiskTier | None:
    """Opens ``--kv-disk`` and begins to save what ``DiskTier.save`` gets. The caller closes it.

    Args:
        lend, counts: as of ``DiskTier``.

    Returns:
        None if the worker has no such folder, or cannot use it. It then serves without, and says why in the log.
    """
    if config.kv_disk is None:
        return None
    limits = DiskLimits(int(config.kv_disk_size), float(config.kv_disk_bandwidth))
    executor = device_executor(_COPIERS, "kv-disk-copy", served.device)
    try:
        tier = DiskTier(DiskFiles(config.kv_disk), limits, served.kv_identity, served.store, lend, executor, counts)
    except OSError as error:
        counts.failed("folder")
        logger.warning("KV is not kept on disk: %s", error)
        return None
    tier.start()
    return tier
