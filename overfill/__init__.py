"""Two-stage language model serving: a full model prefills, a pruned decoder answers on its KV cache.

``overfill.LLM`` runs both halves in one process; ``overfill.client`` talks to a running stack.
Importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from overfill.process import startup  # noqa: F401  # records the start time on import
from overfill.version import __version__

if TYPE_CHECKING:
    from overfill.pair.llm import LLM

__all__ = ["LLM", "__version__"]


def __getattr__(name: str) -> Any:
    # Imported on first use, so that the SDK and the router start without torch.
    if name == "LLM":
        from overfill.process.extras import needs

        with needs("server", "overfill.LLM"):
            from overfill.pair.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
