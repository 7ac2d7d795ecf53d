"""The scaling policy: how many workers each pool needs. Pure code: no Ray, no clock, no I/O.

It predicts from arrival rates, lengths of prompts and answers, and the measured capacity of a worker::

    prefill   queueing: the fewest workers for which the wait, at the chosen quantile, leaves enough of the TTFT
              objective to compute the prompt (M/G/c with Sakasegawa's approximation)
    decode    Little's law: concurrent sequences, plus a margin for random variation, divided by the largest batch
              whose step meets the ITL objective and whose KV fits

Each tier has a decode pool with arrivals, lengths of answers, step cost, objectives and bounds of its own. All tiers
share the prefill pool, which follows the sum of their arrivals and the shortest of their TTFT objectives.

An existing queue counts as load to be worked off within ``catch_up`` seconds. A pool grows at once. It shrinks only to
the maximum need of the last ``stabilise`` seconds, with ``hysteresis`` on top.

The owner of the workers calls ``targets`` every ``INTERVAL`` and starts or drains workers. The result holds every
number that the decision used, under a stable name, for metrics and plots.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import NormalDist

from overfill.routing.arrivals import AnswerLengths, Arrivals
from overfill.routing.capacity import PrefillRate, StepCost, StepTime
from overfill.routing.tier import DEFAULT_TIER

INTERVAL = 1.0
"""Seconds between decisions."""

SHORT_PROMPT_SHARE = 0.25
"""Share of the time that a decode step leaves of the ITL objective in which a short prompt is computed.

Several prompts need that time. In the simulator, goodput was best with a quarter or less.
"""

_MAX_NUM_SEQS = 64  # default of --max-num-seqs; counts until a worker has reported its own


@dataclass(frozen=True, slots=True)
class Bounds:
    """Minimum and maximum size of a pool. With a minimum of 0, the first request after an idle time starts a worker."""

    min: int = 1
    max: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.max or self.max < 1:
            raise ValueError(f"bounds must be 0 <= min <= max and max >= 1; got min {self.min}, max {self.max}")


@dataclass(frozen=True, slots=True)
class ScalingConfig:
    """Objectives, bounds, priors and reaction times of the policy. Times are in seconds.

    Attributes:
        ttft, itl: objectives; ``itl`` is a request's mean gap between tokens.
        quantile: fraction of requests that must meet the objectives.
        prefill, decode: bounds of the pools.
        max_total: maximum number of workers of all pools. When more are needed, all get the same share of their need.
        prefill_rate: prior for the prompt tokens per second that a prefill worker computes.
        step: prior for the cost of a decode step.
        prompt_tokens, answer_tokens: priors for the mean lengths.
        max_batch: maximum number of sequences that a decode worker runs at once. None means what the workers report.
        kv_tokens: tokens of KV that a decode worker holds, if ``PoolState`` does not say. None means no limit.
        short_window, long_window: lengths of the two windows of arrivals.
        significance: standard deviations by which the short window must exceed the long one to replace it.
        itl_share: fraction of ``itl`` that a step may take; the rest is a reserve for uneven batches.
        catch_up: time in which a queue must be worked off.
        stabilise: a pool shrinks no further than to the maximum need of this time.
        hysteresis: fraction by which the need must fall below a smaller pool's size before the pool shrinks to it.
    """

    ttft: float = 2.0
    itl: float = 0.1
    quantile: float = 0.95
    prefill: Bounds = field(default_factory=Bounds)
    decode: Bounds = field(default_factory=Bounds)
    max_total: int | None = None
    prefill_rate: float = 1000.0
    step: StepCost = field(default_factory=lambda: StepCost(0.01, 0.0005, 0.0))
    prompt_tokens: float = 512.0
    answer_tokens: float = 128.0
    max_batch: int | None = None
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
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} must be above 0; got {value}")
        if not 0.5 <= self.quantile < 1:
            raise ValueError(f"quantile must be in [0.5, 1); got {self.quantile}")
        if self.long_window < self.short_window:
            raise ValueError(f"long_window {self.long_window} is shorter than short_window {self.short_window}")


@dataclass(frozen=True, slots=True)
class PoolState:
    """The current state of a pool.

    Attributes:
        ready, starting, draining: numbers of workers in each state.
        waiting_jobs: requests that wait for a worker of this stage, in the router or on the worker.
        waiting_tokens: prompt tokens of waiting requests that are not computed yet.
        running: requests being computed; for decode, sequences that generate tokens.
        kv_tokens: tokens of KV that one worker holds. 0 means unknown.
        max_num_seqs: maximum number of requests that one worker runs at once. 0 means unknown.
        colocated: how many of the ready workers have both stages, so that their number is fixed. Each of several
            routers counts its share.
    """

    ready: int = 0
    starting: int = 0
    draining: int = 0
    waiting_jobs: int = 0
    waiting_tokens: int = 0
    running: int = 0
    kv_tokens: int = 0
    max_num_seqs: int = 0
    colocated: float = 0


@dataclass(frozen=True, slots=True)
class PoolTarget:
    """The recommended size of one pool.

    Attributes:
        workers: number of workers with this stage only, draining ones excluded.
        need: predicted need of such workers, before rounding, hysteresis and bounds. Workers with both stages have met
            their part of the pool's need.
        reason: short explanation of the decision.
        inputs: every number that the decision used, by name.
    """

    workers: int
    need: float
    reason: str
    inputs: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Targets:
    """The recommended sizes of all pools at time ``at``; the decode pools by tier."""

    at: float
    prefill_pool: PoolTarget
    decode_pools: Mapping[str, PoolTarget]

    @property
    def prefill(self) -> int:
        return self.prefill_pool.workers

    @property
    def decode(self) -> int:
        """Number of decode workers of all tiers together."""
        return sum(pool.workers for pool in self.decode_pools.values())

    def pools(self) -> list[tuple[str, str, PoolTarget]]:
        """Returns stage, tier and target of each pool. The prefill pool has the tier ""."""
        decode = [("decode", tier, pool) for tier, pool in self.decode_pools.items()]
        return [("prefill", "", self.prefill_pool), *decode]


class Scaler:
    """The policy. Feed it with ``arrived``, ``finished`` and ``prefilled``; then call ``targets``.

    Args:
        config: settings of the prefill pool, and limits of all pools together.
        tiers: settings of each tier, of which those for decode and ``ttft`` count. None means one tier with ``config``.
    """

    def __init__(self, config: ScalingConfig, tiers: Mapping[str, ScalingConfig] | None = None) -> None:
        tiers = {DEFAULT_TIER: config} if tiers is None else tiers
        self.config = replace(config, ttft=min(tier.ttft for tier in tiers.values()))
        self._arrivals = Arrivals(config.short_window, config.long_window, config.significance)
        self._prefill_rate = PrefillRate(config.prefill_rate)
        self._prefill = _Follower(config.prefill, config)
        self._tiers = {name: _DecodePool(tier) for name, tier in tiers.items()}
        self._shares: list[int] | None = None  # parts of ``max_total``, prefill's first, while the pools share it
        minima = sum(max(1, follower.bounds.min) for follower in self._followers)
        if config.max_total is not None and config.max_total < minima:
            raise ValueError(
                f"max_total {config.max_total} is less than {minima}, the sum of all pools' minima (at least 1 each)"
            )

    @property
    def tiers(self) -> tuple[str, ...]:
        return tuple(self._tiers)

    def arrived(self, tier: str, now: float, prompt_tokens: int, cached_tokens: int = 0) -> None:
        """Counts a request; ``cached_tokens`` of its prompt are expected in a prefix cache."""
        tokens = max(1, prompt_tokens - cached_tokens)
        self._arrivals.add(now, tokens)
        self._tiers[tier].arrivals.add(now, tokens)

    def finished(
        self, tier: str, now: float, prompt_tokens: int, answer_tokens: int, itl: float = 0.0, batch: float = 0
    ) -> None:
        """Counts a finished request.

        Args:
            itl: mean gap between its tokens, seconds; 0 for an answer of one token.
            batch: mean number of sequences on its worker, itself included. 0 means unknown.
        """
        pool = self._tiers[tier]
        pool.answers.add(now, prompt_tokens, answer_tokens)
        pool.step.add(batch, prompt_tokens + answer_tokens / 2, itl)

    def prefilled(self, tokens: float, seconds: float) -> None:
        """Records that a prefill worker computed ``tokens`` in ``seconds``. Count a shared step's seconds only once."""
        self._prefill_rate.add(tokens, seconds)

    def expected_itl(self, tier: str, batch: float) -> float:
        """Predicts the mean gap between tokens of a sequence of ``tier`` in a batch of this size, in seconds."""
        pool = self._tiers[tier]
        return pool.step.cost().seconds(batch, pool.answers.shape().context)

    def short_prompt(self, tier: str, batch: float) -> float:
        """Returns the length of a prompt that a worker computes in a quarter of the time that a decode step leaves.

        The step leaves what is missing to the ITL objective.

        Args:
            batch: number of sequences of ``tier`` in the step.
        """
        spare = self._tiers[tier].itl - self.expected_itl(tier, batch)
        return SHORT_PROMPT_SHARE * max(0.0, spare) * self._prefill_rate.value

    def targets(self, now: float, prefill: PoolState, decode: Mapping[str, PoolState]) -> Targets:
        """Returns the number of workers that each pool should have now.

        Args:
            decode: state of each tier's decode pool.
        """
        if self._backlog(prefill):
            # Decode workers hold their blocks for prompts that wait for prefill, so jobs queue for decode too. More
            # decode workers would not help them: count these jobs as waiting for prefill.
            prefill = replace(
                prefill,
                waiting_jobs=prefill.waiting_jobs + sum(state.waiting_jobs for state in decode.values()),
                waiting_tokens=prefill.waiting_tokens + sum(state.waiting_tokens for state in decode.values()),
            )
            decode = {tier: replace(state, waiting_jobs=0, waiting_tokens=0) for tier, state in decode.items()}
        states = [prefill, *(decode[tier] for tier in self._tiers)]
        needs = [
            self._prefill_need(now, prefill),
            *(pool.need(now, state) for pool, state in zip(self._tiers.values(), states[1:], strict=True)),
        ]
        scaled = [max(0.0, need - state.colocated) for (need, _, _), state in zip(needs, states, strict=True)]
        wanted = [
            follower.follow(now, state, need)
            for follower, state, need in zip(self._followers, states, scaled, strict=True)
        ]
        limit = self.config.max_total
        if limit is not None and sum(workers for workers, _ in wanted) > limit:
            wanted = self._share(limit, scaled)
        else:
            self._shares = None
        first, *others = [
            PoolTarget(workers, need, note or why, inputs)
            for (workers, note), need, (_, why, inputs) in zip(wanted, scaled, needs, strict=True)
        ]
        return Targets(now, first, dict(zip(self._tiers, others, strict=True)))

    @property
    def _followers(self) -> list[_Follower]:
        return [self._prefill, *(pool.follower for pool in self._tiers.values())]

    def _backlog(self, prefill: PoolState) -> float:
        """Returns queued prompt tokens beyond those that the pool computes within half the TTFT objective."""
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

    def _share(self, limit: int, needs: list[float]) -> list[tuple[int, str]]:
        """Divides ``limit`` workers between the pools, within bounds.

        If the needs exceed ``limit``, all pools get the same share of their need. Otherwise each gets its need, and
        the rest is divided by how far each pool's recent maximum exceeds its need.
        """
        current, followers = self._shares, self._followers
        needed = [max(1, math.ceil(need - 1e-9)) for need in needs]
        if sum(needed) <= limit:
            # Keep the current split while it meets all needs: a worker that changes pools serves none for a while.
            if current is None or any(part < least for part, least in zip(current, needed, strict=True)):
                surplus = [max(0, f.recent_max - n) for f, n in zip(followers, needed, strict=True)]
                whole = sum(surplus)
                shares = [part / whole if whole else 1 / len(needed) for part in surplus]
                rest = limit - sum(needed)
                current = _divide(limit, [n + rest * s for n, s in zip(needed, shares, strict=True)], followers)
        else:
            ideal = [limit * need / sum(needs) for need in needs]
            # The last pool gets the rest, so the other pools' parts decide.
            if current is None or any(
                abs(new - old) >= max(0.75, self.config.hysteresis * old)
                for new, old in zip(ideal[:-1], current[:-1], strict=True)
            ):
                current = _divide(limit, ideal, followers)
        self._shares = current
        for follower, workers in zip(followers, current, strict=True):
            follower.target = workers
        return [(workers, f"share of {limit} workers") for workers in current]


class _DecodePool:
    """What the policy knows of one tier's decode pool. ``itl`` is the tier's objective."""

    def __init__(self, config: ScalingConfig) -> None:
        self._config = config
        self.itl = config.itl
        self.arrivals = Arrivals(config.short_window, config.long_window, config.significance)
        self.answers = AnswerLengths(config.long_window, config.prompt_tokens, config.answer_tokens)
        self.step = StepTime(config.step)
        self.follower = _Follower(config.decode, config)
        self._max_num_seqs = _MAX_NUM_SEQS  # as last reported, also while the pool is empty

    def need(self, now: float, state: PoolState) -> tuple[float, str, dict[str, float]]:
        """Returns the number of workers that the pool needs, the reason, and the numbers used."""
        config, rate, answer = self._config, self.arrivals.rate(now), self.answers.shape()
        cost = self.step.cost()
        kv_tokens = state.kv_tokens or config.kv_tokens or 0
        self._max_num_seqs = state.max_num_seqs or self._max_num_seqs
        batch_limit = float(config.max_batch or self._max_num_seqs)
        if kv_tokens:
            batch_limit = min(batch_limit, max(1.0, 0.9 * kv_tokens / answer.context))
        batch = cost.batch_within(config.itl * config.itl_share, answer.context, batch_limit)
        step = cost.seconds(batch, answer.context)
        concurrency = rate.arrivals * answer.tokens * step
        margin = _normal_quantile(config.quantile) * math.sqrt(concurrency)
        predicted = (concurrency + margin) / batch
        # Count the sequences that exist now as well: when answers get longer, the prediction lags until they finish.
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


class _Follower:
    """Turns a need into a number of workers within bounds. It grows at once and shrinks slowly."""

    def __init__(self, bounds: Bounds, config: ScalingConfig) -> None:
        self.bounds, self._config = bounds, config
        self._wanted: deque[tuple[float, int]] = (
            deque()
        )  # decreasing; holds only values that can still become the maximum
        self.target: int | None = None

    @property
    def recent_max(self) -> int:
        """Maximum number of workers needed in the last ``stabilise`` seconds."""
        return self._wanted[0][1]

    def follow(self, now: float, state: PoolState, need: float) -> tuple[int, str]:
        """Returns the target, and the reason if it differs from the need."""
        bounds, config = self.bounds, self._config
        least = max(0, bounds.min - math.ceil(state.colocated))  # workers with both stages count towards the minimum
        if self.target is None:
            scaled = round(state.ready - state.colocated) + state.starting
            self.target = min(bounds.max, max(least, scaled))
            self._wanted.append((now, self.target))  # keeps the initial size for ``stabilise`` seconds
        up = math.ceil(need - 1e-9)
        down = math.ceil(need * (1 + config.hysteresis) - 1e-9)
        while self._wanted and self._wanted[-1][1] <= down:
            self._wanted.pop()
        self._wanted.append((now, down))
        while self._wanted[0][0] < now - config.stabilise:
            self._wanted.popleft()
        held = min(self.target, self.recent_max)
        wanted = max(up, held)
        self.target = min(bounds.max, max(least, wanted))
        if wanted > bounds.max:
            return self.target, f"maximum of the pool; {wanted} needed"
        if wanted < least:
            return self.target, f"minimum of the pool; {wanted} needed"
        return self.target, "" if wanted == up else f"kept until {up} has been enough for {config.stabilise:g} s"


def _divide(limit: int, ideal: list[float], pools: list[_Follower]) -> list[int]:
    """Divides ``limit`` workers in proportion to ``ideal``, within the pools' bounds; each pool gets at least one."""
    low, high = [max(1, pool.bounds.min) for pool in pools], [pool.bounds.max for pool in pools]
    parts: list[int] = []
    for index, share in enumerate(ideal):
        rest, later = limit - sum(parts), slice(index + 1, None)
        least = max(low[index], rest - sum(high[later]))
        most = min(high[index], rest - sum(low[later]))
        part = max(least, min(most, round(rest * share / (sum(ideal[index:]) or 1.0))))
        parts.append(min(part, high[index]))
    return parts


def _servers(load: float, service: float, scv: float, budget: float, quantile: float) -> float:
    """Returns the fewest servers, as a real number, for which ``quantile`` of the waits are within ``budget`` seconds.

    M/G/c: the probability of a wait is about rho^(sqrt(2(c+1))-1) (Sakasegawa 1977). The wait is then about exponential
    with mean service x (1 + scv) / 2 / (c (1 - rho)).
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
        "colocated": state.colocated,
    }
