"""How many workers each pool needs: one policy for both stages. Pure code: no Ray, no clock, no I/O.

It predicts from what arrives, how long prompts and answers are and what a worker was measured to do::

    prefill   queueing: the fewest workers for which the wait, at the chosen quantile, leaves the prompt enough of
              the TTFT objective to be computed (M/G/c with Sakasegawa's approximation)
    decode    Little's law: sequences running at once, plus a margin for chance, over the batch at which a step
              still meets the ITL objective and whose KV fits

A queue that is there already counts as load to be worked off within ``catch_up`` seconds. Growth is followed at
once; a pool shrinks only to the most that was wanted within ``stabilise`` seconds, with ``hysteresis`` on top.

Whoever owns the workers calls ``targets`` every second or so and starts or drains workers. Every number that a
decision used is in it, under a stable name, for metrics and plots.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import NormalDist

from overfill.routing.arrivals import AnswerLengths, Arrivals
from overfill.routing.capacity import PrefillRate, StepCost, StepTime


@dataclass(frozen=True, slots=True)
class Bounds:
    """Fewest and most workers of a pool. With a minimum of 0 the first request of a quiet time starts one."""

    min: int = 1
    max: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.max or self.max < 1:
            raise ValueError(f"bounds must be 0 <= min <= max and max >= 1, got min {self.min}, max {self.max}")


@dataclass(frozen=True, slots=True)
class ScalingConfig:
    """Objectives, bounds, priors and how fast to follow. Times in seconds.

    Attributes:
        ttft, itl: objectives; ``itl`` is a request's mean gap between tokens.
        quantile: share of requests that is to meet them.
        prefill, decode: bounds of the pools.
        max_total: most workers of both together; when more are needed, both get the same share of their need.
        use_all: keep all ``max_total`` workers and only divide them: they are paid for anyway.
        prefill_rate: prior of prompt tokens/s that a prefill worker computes.
        step: prior of a decode step's cost.
        prompt_tokens, answer_tokens: priors of mean lengths.
        max_batch: most sequences that a decode worker runs at once.
        kv_tokens: tokens of KV that a decode worker holds; None: not a limit, unless ``PoolState`` says it.
        short_window, long_window: of arrivals.
        significance: standard deviations by which the short window must exceed the long one to count.
        itl_share: share of ``itl`` that a step may take; the rest is for uneven batches.
        catch_up: time within which a queue is to be worked off.
        stabilise: a pool shrinks to the most that was wanted in this time.
        hysteresis: share by which the need must be below a smaller pool before it is taken.
    """

    ttft: float = 2.0
    itl: float = 0.1
    quantile: float = 0.95
    prefill: Bounds = field(default_factory=Bounds)
    decode: Bounds = field(default_factory=Bounds)
    max_total: int | None = None
    use_all: bool = False
    prefill_rate: float = 1000.0
    step: StepCost = field(default_factory=lambda: StepCost(0.01, 0.0005, 0.0))
    prompt_tokens: float = 512.0
    answer_tokens: float = 128.0
    max_batch: int = 64
    kv_tokens: int | None = None
    short_window: float = 10.0
    long_window: float = 60.0
    significance: float = 3.0
    itl_share: float = 0.9
    catch_up: float = 10.0
    stabilise: float = 60.0
    hysteresis: float = 0.1

    def __post_init__(self) -> None:
        positive = ("ttft", "itl", "prefill_rate", "prompt_tokens", "answer_tokens", "max_batch", "short_window")
        for name in (*positive, "itl_share", "catch_up"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0.5 <= self.quantile < 1:
            raise ValueError(f"quantile must be in [0.5, 1), got {self.quantile}")
        if self.long_window < self.short_window:
            raise ValueError(f"long_window {self.long_window} is shorter than short_window {self.short_window}")
        if self.use_all and self.max_total is None:
            raise ValueError("use_all needs max_total: all of how many")
        if self.max_total is not None and self.max_total < max(1, self.prefill.min) + max(1, self.decode.min):
            raise ValueError(f"max_total {self.max_total} is less than both pools' minima")


@dataclass(frozen=True, slots=True)
class PoolState:
    """A pool as it is now.

    Attributes:
        ready, starting, draining: workers.
        waiting_jobs: requests that wait for a worker of this stage, in the router or on the worker.
        waiting_tokens: prompt tokens of those that are not computed yet.
        running: requests being computed; sequences generating, for decode.
        kv_tokens: tokens of KV that one worker holds; 0: not known.
    """

    ready: int = 0
    starting: int = 0
    draining: int = 0
    waiting_jobs: int = 0
    waiting_tokens: int = 0
    running: int = 0
    kv_tokens: int = 0


@dataclass(frozen=True, slots=True)
class PoolTarget:
    """What one pool should be.

    Attributes:
        workers: how many, draining ones not counted.
        need: what was predicted, before rounding, hysteresis and bounds.
        reason: why, in words.
        inputs: every number that was used, by name.
    """

    workers: int
    need: float
    reason: str
    inputs: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Targets:
    """Of both pools, as of ``at``."""

    at: float
    prefill_pool: PoolTarget
    decode_pool: PoolTarget

    @property
    def prefill(self) -> int:
        return self.prefill_pool.workers

    @property
    def decode(self) -> int:
        return self.decode_pool.workers

    def numbers(self) -> dict[str, float]:
        """Flat, for metrics: ``prefill_target``, ``prefill_need``, ``prefill_<input>`` and the same for decode."""
        out: dict[str, float] = {}
        for name, pool in (("prefill", self.prefill_pool), ("decode", self.decode_pool)):
            out |= {f"{name}_target": float(pool.workers), f"{name}_need": pool.need}
            out |= {f"{name}_{key}": value for key, value in pool.inputs.items()}
        return out


class Scaler:
    """The policy. Feed it with ``arrived``, ``finished``, ``prefilled`` and ``stepped``; ask ``targets``."""

    def __init__(self, config: ScalingConfig) -> None:
        self.config = config
        self._arrivals = Arrivals(config.short_window, config.long_window, config.significance)
        self._answers = AnswerLengths(config.long_window, config.prompt_tokens, config.answer_tokens)
        self._prefill_rate = PrefillRate(config.prefill_rate)
        self._step = StepTime(config.step)
        self._prefill = _Follower(config.prefill, config)
        self._decode = _Follower(config.decode, config)
        self._shared: int | None = None  # prefill's part of ``max_total`` while that is too little

    def arrived(self, now: float, prompt_tokens: int, cached_tokens: int = 0) -> None:
        """A request came; ``cached_tokens`` of its prompt are expected in a prefix cache."""
        self._arrivals.add(now, max(1, prompt_tokens - cached_tokens))

    def finished(self, now: float, prompt_tokens: int, answer_tokens: int, itl: float = 0.0, batch: float = 0) -> None:
        """A request ended.

        Args:
            itl: mean gap between its tokens; 0 when it has none.
            batch: sequences that ran beside it on its worker, itself included; 0 when that is not known.
        """
        self._answers.add(now, prompt_tokens, answer_tokens)
        self._step.add(batch, prompt_tokens + answer_tokens / 2, itl)

    def prefilled(self, tokens: float, seconds: float) -> None:
        """A prefill worker computed ``tokens`` in ``seconds`` of work (prompts that share steps: counted once)."""
        self._prefill_rate.add(tokens, seconds)

    def stepped(self, batch: float, context: float, seconds: float) -> None:
        """A decode step of ``batch`` sequences of ``context`` tokens each took ``seconds``."""
        self._step.add(batch, context, seconds)

    def targets(self, now: float, prefill: PoolState, decode: PoolState) -> Targets:
        """How many workers each pool should have now."""
        if self._backlog(prefill):
            # They wait for a decode worker, since those hold KV for prompts that wait for a prefill worker. More
            # decode workers would not help them.
            jobs, tokens = decode.waiting_jobs, decode.waiting_tokens
            prefill = replace(
                prefill, waiting_jobs=prefill.waiting_jobs + jobs, waiting_tokens=prefill.waiting_tokens + tokens
            )
            decode = replace(decode, waiting_jobs=0, waiting_tokens=0)
        needs = [self._prefill_need(now, prefill), self._decode_need(now, decode)]
        wanted = [
            follower.follow(now, state, need)
            for follower, state, (need, _, _) in zip(
                (self._prefill, self._decode), (prefill, decode), needs, strict=True
            )
        ]
        config = self.config
        limit = config.max_total
        if limit is not None and (config.use_all or sum(workers for workers, _ in wanted) > limit):
            wanted = self._share(limit, [need for need, _, _ in needs])
        else:
            self._shared = None
        pools = [
            PoolTarget(workers, need, note or why, inputs)
            for (workers, note), (need, why, inputs) in zip(wanted, needs, strict=True)
        ]
        return Targets(now, *pools)

    def _backlog(self, prefill: PoolState) -> float:
        """Queued prompt tokens, but for those that the pool works off within half the objective anyway."""
        soon = max(1, prefill.ready) * self._prefill_rate.value * self.config.ttft / 2
        return max(0.0, prefill.waiting_tokens - soon)

    def _prefill_need(self, now: float, state: PoolState) -> tuple[float, str, dict[str, float]]:
        config, rate = self.config, self._arrivals.rate(now)
        per_worker = self._prefill_rate.value
        backlog = self._backlog(state)
        load = (rate.tokens + backlog / config.catch_up) / per_worker
        service = rate.mean_tokens / per_worker
        budget = max(config.ttft - service, 0.1 * config.ttft)
        need = _servers(load, service, rate.scv, budget, config.quantile) if load > 0 else 0.0
        if state.waiting_jobs and not state.ready + state.starting:
            need = max(need, 1.0)
        why = "nothing arrives" if not need else "queue to work off" if backlog else "load"
        return (
            need,
            "growing load" if rate.rising and not backlog else why,
            {
                "arrivals": rate.arrivals,
                "tokens": rate.tokens,
                "recent_tokens": rate.recent_tokens,
                "mean_tokens": rate.mean_tokens,
                "scv": rate.scv,
                "worker_rate": per_worker,
                "load": load,
                "service_seconds": service,
                "wait_budget_seconds": budget,
                "backlog_tokens": backlog,
                **_state(state),
            },
        )

    def _decode_need(self, now: float, state: PoolState) -> tuple[float, str, dict[str, float]]:
        config, rate, answer = self.config, self._arrivals.rate(now), self._answers.shape()
        cost = self._step.cost()
        kv_tokens = state.kv_tokens or config.kv_tokens or 0
        batch_limit = float(config.max_batch)
        if kv_tokens:
            batch_limit = min(batch_limit, max(1.0, 0.9 * kv_tokens / answer.context))
        batch = cost.batch_within(config.itl * config.itl_share, answer.context, batch_limit)
        step = cost.seconds(batch, answer.context)
        concurrency = rate.arrivals * answer.tokens * step
        margin = _normal_quantile(config.quantile) * math.sqrt(concurrency)
        predicted = (concurrency + margin) / batch
        # Sequences that are there already: answers grow longer before the first long one has finished.
        present = (state.running + state.waiting_jobs) / batch
        need = max(predicted, present)
        if state.waiting_jobs and not state.ready + state.starting:
            need = max(need, 1.0)
        why = "nothing arrives" if not need else "load" if predicted >= present else "sequences present"
        return (
            need,
            "growing load" if rate.rising and predicted >= present else why,
            {
                "arrivals": rate.arrivals,
                "answer_tokens": answer.tokens,
                "context_tokens": answer.context,
                "tokens": rate.arrivals * answer.tokens,
                "step_base_seconds": cost.base,
                "step_per_sequence_seconds": cost.per_sequence,
                "step_per_kv_token_seconds": cost.per_kv_token,
                "batch_limit": batch_limit,
                "batch": batch,
                "step_seconds": step,
                "concurrency": concurrency,
                "margin": margin,
                **_state(state),
            },
        )

    def _share(self, limit: int, needs: list[float]) -> list[tuple[int, str]]:
        """``limit`` workers for both pools, within bounds. What is needed now comes first; if that is too much, both
        get the same share of their need. What is left goes where most was wanted lately."""
        config, current = self.config, self._shared
        low = max(1, config.prefill.min, limit - config.decode.max)
        high = min(config.prefill.max, limit - max(1, config.decode.min))
        now = [max(1, math.ceil(need - 1e-9)) for need in needs]
        if sum(now) <= limit:
            # A split that serves both stays: a worker that goes back and forth serves nobody.
            if current is None or not now[0] <= current <= limit - now[1]:
                lately = [max(0, f.recent_max - n) for f, n in zip((self._prefill, self._decode), now, strict=True)]
                share = lately[0] / sum(lately) if sum(lately) else 0.5
                current = now[0] + round((limit - sum(now)) * share)
        else:
            ideal = limit * needs[0] / sum(needs)
            if current is None or abs(ideal - current) >= max(0.75, config.hysteresis * current):
                current = round(ideal)
        self._shared = current = max(low, min(high, current))
        targets = [current, min(config.decode.max, limit - current)]
        for follower, workers in zip((self._prefill, self._decode), targets, strict=True):
            follower.target = workers
        return [(workers, f"share of {limit} workers") for workers in targets]


class _Follower:
    """Turns a need into a number of workers: up at once, down slowly, within bounds."""

    def __init__(self, bounds: Bounds, config: ScalingConfig) -> None:
        self._bounds, self._config = bounds, config
        self._wanted: deque[tuple[float, int]] = deque()  # falling: only what may still be the maximum
        self.target: int | None = None

    @property
    def recent_max(self) -> int:
        """Most workers that were wanted in the last ``stabilise`` seconds."""
        return self._wanted[0][1]

    def follow(self, now: float, state: PoolState, need: float) -> tuple[int, str]:
        """The target, and a remark when it is not what the need says."""
        bounds, config = self._bounds, self._config
        if self.target is None:
            self.target = min(bounds.max, max(bounds.min, state.ready + state.starting))
            self._wanted.append((now, self.target))  # nothing is known yet that would let it shrink
        up = math.ceil(need - 1e-9)
        down = math.ceil(need * (1 + config.hysteresis) - 1e-9)
        while self._wanted and self._wanted[-1][1] <= down:
            self._wanted.pop()
        self._wanted.append((now, down))
        while self._wanted[0][0] < now - config.stabilise:
            self._wanted.popleft()
        held = min(self.target, self.recent_max)
        wanted = max(up, held)
        self.target = min(bounds.max, max(bounds.min, wanted))
        if wanted > bounds.max:
            return self.target, f"most that is allowed; {wanted} wanted"
        if wanted < bounds.min:
            return self.target, f"fewest that are allowed; {wanted} wanted"
        return self.target, "" if wanted == up else f"no fewer until {up} has been enough for {config.stabilise:g} s"


def _servers(load: float, service: float, scv: float, budget: float, quantile: float) -> float:
    """Fewest servers, as a real number, for which ``quantile`` of the waits are within ``budget`` seconds.

    M/G/c: a wait has probability about rho^(sqrt(2(c+1))-1) (Sakasegawa 1977) and is then about exponential, with mean
    service x (1 + scv) / 2 / (c (1 - rho)).
    """

    def enough(c: float) -> bool:
        rho = load / c
        waits = rho ** (math.sqrt(2 * (c + 1)) - 1)
        mean = service * (1 + scv) / 2 / (c * (1 - rho))
        return waits <= 1 - quantile or mean * math.log(waits / (1 - quantile)) <= budget

    low, high = load, max(1.0, load) * 2
    while not enough(high):
        high *= 2
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if middle > load and enough(middle) else (middle, high)
    return high


def _normal_quantile(share: float) -> float:
    return NormalDist().inv_cdf(share)


def _state(state: PoolState) -> dict[str, float]:
    return {
        "ready": state.ready,
        "starting": state.starting,
        "draining": state.draining,
        "waiting_jobs": state.waiting_jobs,
        "waiting_tokens": state.waiting_tokens,
        "running": state.running,
    }
