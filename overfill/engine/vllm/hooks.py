"""What the connector and the logits processor, which vLLM makes by itself, tell and ask OverFill's engine. No vLLM."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from overfill.kv.store import KvStore

REQUEST_ID = "overfill_request"
"""Name under which a request's sampling parameters carry its id to the logits processor."""
PLAIN = "overfill_plain"
"""As ``REQUEST_ID``, for whether vLLM chooses the request's tokens by itself."""
ROW_SPEC = "overfill_row"
"""The same for what ranks need to choose its tokens."""


class RunnerHooks:
    """What vLLM's model runner tells and asks in its process: the engine, or the hooks of one rank of several."""

    def layer_started(self, layer: int) -> None:
        pass

    def layer_written(self) -> None:
        """The caches hold the next layer's KV of all tokens of the step, once the device's work so far is done."""

    def row_added(self, id: str, spec: Any, prompt: Sequence[int], output: Sequence[int]) -> None:
        """A request that is not ``plain`` has got a row of logits. vLLM appends to ``output`` after each step.

        Args:
            spec: the request's ``ranks.steps.RowSpec``; None with one rank.
        """

    def sample(self, logits: torch.Tensor, request_ids: Sequence[str], rows: Sequence[int]) -> None:
        """Changes ``rows`` of the logits so that their greatest elements are the tokens to take.

        Args:
            request_ids: the request of each row.
            rows: ascending rows of the requests that are not ``plain``.
        """
        raise NotImplementedError


class Hooks(RunnerHooks):
    """What vLLM asks and tells an engine of OverFill's while it takes a step, on the engine's thread."""

    def tokens_to_load(self, request_id: str, held: int) -> int | None:
        """Tokens behind the first ``held`` ones whose KV comes from outside. None: vLLM asks again in the next step."""
        return 0

    def allocated(self, request_id: str) -> None:
        """vLLM has given blocks to a request that waits for KV."""

    def scheduled(self, num_tokens: Mapping[str, int], preempted: Collection[str]) -> None:
        """The step is planned, with this many tokens of each request, and has not begun.

        Requests in ``preempted`` have lost their blocks to others.
        """

    def step_of_ranks(self) -> Any:
        """The planned step as the ranks are told, a ``ranks.steps.RankStep``. Not called with one rank."""
        raise NotImplementedError

    def sampled_by_ranks(self, extras: Any) -> None:
        """What the ranks say of the step's tokens, a ``ranks.steps.RankExtras``. Not called with one rank."""

    def ending(self, request_id: str) -> bool:
        """A request ends. Returns whether its blocks stay until ``VllmCore.sent``; else they are free afterwards."""
        return False

    def blocks_stored(self, hashes: Iterable[int]) -> None:
        pass

    def blocks_removed(self, hashes: Iterable[int]) -> None:
        pass


@dataclass(slots=True)
class Hub:
    """Leads the objects that vLLM makes by itself to the engine.

    Attributes:
        hooks: the engine; None while vLLM loads and warms up, and in ranks.
        runner: what the model runner of this process calls; None while vLLM loads and warms up.
        caches: each attention layer's cache in this process, by its name in vLLM.
        store: the same caches, for handoffs; None in a process without a model runner.
    """

    hooks: Hooks | None = None
    runner: RunnerHooks | None = None
    caches: dict[str, torch.Tensor] = field(default_factory=dict)
    store: KvStore | None = None


hub = Hub()
"""There is one per process, as vLLM keeps one connector per process."""
