"""Conditional disaggregation: prefills a prompt on the worker that writes its answer, or on a worker with prefill only.

A prompt that is computed where its answer is written needs no transfer, but it holds up the answers there. So a worker
with both stages computes the prompts of its own answers that are short, or that would wait longer elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from overfill.routing.affinity import PrefixAffinity
from overfill.routing.policy import PlacementRequest, Policy
from overfill.routing.worker import Worker


class Conditional(Policy):
    """Prefix affinity among the workers with prefill only, and one worker with both stages before or after them.

    That worker is the one that writes the answer, if it is admissible; otherwise the best one with both stages. It
    comes first when

    * it writes the answer, and its uncached part of the prompt is short (``set_short_prompts``), or
    * no worker with prefill only is admissible, or
    * the best worker with prefill only has more tokens ahead of the answer: its queue and its uncached part.

    All other workers with both stages come last. Without workers with both stages, it is ``PrefixAffinity``.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._prefill_only, self._colocated = PrefixAffinity(seed), PrefixAffinity(seed)
        self._by_key: dict[tuple[str, int], Worker] = {}  # the admissible workers with both stages
        self._short: Mapping[str, float] = {}

    def set_short_prompts(self, tokens: Mapping[str, float]) -> None:
        self._short = tokens

    def put(self, worker: Worker) -> None:
        if worker.info.colocated:
            self._by_key[worker.key] = worker
        self._part(worker).put(worker)

    def drop(self, worker: Worker) -> None:
        if worker.info.colocated:
            del self._by_key[worker.key]
        self._part(worker).drop(worker)

    def keys_changed(self, worker: Worker, added: Iterable[int], removed: Iterable[int]) -> None:
        self._part(worker).keys_changed(worker, added, removed)

    def best(self, request: PlacementRequest) -> Iterator[Worker]:
        local = None if request.decode is None else self._by_key.get(request.decode.key)
        candidate = local or next(self._colocated.best(request), None)
        first = candidate is not None and self._goes_first(request, candidate, is_local=local is not None)
        if candidate is not None and first:
            yield candidate
        yield from self._prefill_only.best(request)
        if candidate is not None and not first:
            yield candidate
        yield from (worker for worker in self._colocated.best(request) if worker is not candidate)

    def placed(self, request: PlacementRequest, worker: Worker) -> int:
        return self._part(worker).placed(request, worker)

    def not_computed(self, request: PlacementRequest, worker: Worker) -> None:
        self._part(worker).not_computed(request, worker)

    def left(self, worker: Worker) -> None:
        self._part(worker).left(worker)

    def check(self, workers: Sequence[Worker]) -> None:
        colocated = [worker for worker in workers if worker.info.colocated]
        self._colocated.check(colocated)
        self._prefill_only.check([worker for worker in workers if not worker.info.colocated])
        if self._by_key != {worker.key: worker for worker in colocated}:
            raise AssertionError("conditional: its workers with both stages differ from the admissible ones")

    def _part(self, worker: Worker) -> PrefixAffinity:
        return self._colocated if worker.info.colocated else self._prefill_only

    def _goes_first(self, request: PlacementRequest, worker: Worker, *, is_local: bool) -> bool:
        """True if ``worker``, which has both stages, comes before the workers with prefill only."""
        other = next(self._prefill_only.best(request), None)
        if other is None:
            return True
        uncached = self._colocated.uncached_tokens(request, worker)
        if is_local and request.decode is not None and uncached <= self._short.get(request.decode.info.tier, 0):
            return True
        ahead = other.queued_tokens + self._prefill_only.uncached_tokens(request, other)
        return ahead > worker.queued_tokens + uncached
