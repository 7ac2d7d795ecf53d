"""Conditional disaggregation: prefills a prompt on the worker that writes its answer, or on a worker with prefill only.

A prompt that is computed where its answer is written needs no transfer, but it holds up the answers there. So a worker
with both stages computes the prompts of its own answers that are short, or that would wait longer elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

from overfill.routing.affinity import PrefixAffinity
from overfill.routing.job import Job
from overfill.routing.policy import Policy
from overfill.routing.prefix_index import PrefixIndex
from overfill.routing.worker import Worker


class Conditional(Policy):
    """Prefix affinity among the workers with prefill only, and one worker with both stages before or after them.

    It compares workers by the tokens ahead of the answer: those queued there, and what the prompt costs there
    (``PrefixIndex.costs``). The prompt stays on the worker that writes the answer, if that one is admissible and

    * the tokens ahead there are no more than a short prompt's (``set_short_prompts``), or
    * the best worker with prefill only has more tokens ahead, or
    * no worker with prefill only is admissible, and the best one with both stages saves no more than a short prompt.

    Otherwise the workers with prefill only come first, and the best with both stages if none is admissible. The latter
    also comes first for an answer that is written elsewhere, if all workers with prefill only have more tokens ahead.
    Without workers with both stages, the policy is ``PrefixAffinity``.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._prefill_only, self._colocated = PrefixAffinity(seed), PrefixAffinity(seed)
        self.use_prefixes(PrefixIndex())
        self._by_process: dict[tuple[str, int], Worker] = {}  # the admissible workers with both stages
        self._short: Mapping[str, float] = {}

    def use_prefixes(self, prefixes: PrefixIndex) -> None:
        self._prefixes = prefixes
        self._prefill_only.use_prefixes(prefixes)
        self._colocated.use_prefixes(prefixes)

    def set_short_prompts(self, tokens: Mapping[str, float]) -> None:
        self._short = tokens

    def put(self, worker: Worker) -> None:
        if worker.info.colocated:
            self._by_process[worker.process] = worker
        self._part(worker).put(worker)

    def drop(self, worker: Worker) -> None:
        if worker.info.colocated:
            del self._by_process[worker.process]
        self._part(worker).drop(worker)

    def best(self, job: Job) -> Iterator[Worker]:
        prefill_only = self._prefill_only.best(job)
        if not self._by_process:
            yield from prefill_only
            return
        colocated = self._colocated.best(job)
        first = next(colocated)
        other = next(prefill_only, None)
        candidate, goes_first = self._candidate(job, first, other)
        if goes_first:
            yield candidate
        if other is not None:
            yield other
            yield from prefill_only
        if not goes_first:
            yield candidate
        yield from (worker for worker in chain([first], colocated) if worker is not candidate)

    def placed(self, job: Job, worker: Worker) -> None:
        self._part(worker).placed(job, worker)

    def left(self, worker: Worker) -> None:
        self._part(worker).left(worker)

    def _part(self, worker: Worker) -> PrefixAffinity:
        return self._colocated if worker.info.colocated else self._prefill_only

    def _candidate(self, job: Job, best: Worker, other: Worker | None) -> tuple[Worker, bool]:
        """Returns the worker with both stages to try before others of its kind, and whether it goes first of all.

        Args:
            best: the best worker with both stages.
            other: the best worker with prefill only.
        """
        local = None if job.decode is None else self._by_process.get(job.decode.process)
        short = 0.0 if job.decode is None else self._short.get(job.decode.info.tier, 0.0)
        if other is None:
            stays = local is not None and self._ahead(job, local) <= self._ahead(job, best) + short
            return local if local is not None and stays else best, True
        candidate = local or best
        ahead = self._ahead(job, candidate)
        return candidate, ahead < self._ahead(job, other) or (candidate is local and ahead <= short)

    def _ahead(self, job: Job, worker: Worker) -> int:
        """Returns the prompt tokens that ``worker`` computes before the first token of the answer."""
        return worker.queued_tokens + self._prefixes.costs(job, [worker])[worker]
