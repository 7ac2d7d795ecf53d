"""What a router has for one revision of the pair: workers, queues, and the handling of requests."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace

from overfill.api.reasoning import find_reasoning
from overfill.api.tokenizer import Tokenizer
from overfill.model.manifest import Pair, check_family
from overfill.pair.store import resolve_pair
from overfill.request.trials import Trials
from overfill.routing.async_dispatcher import AsyncDispatcher
from overfill.routing.brownout import Brownout, Prediction, predict
from overfill.routing.dispatcher import Dispatcher
from overfill.routing.policies import POLICIES
from overfill.routing.pool import Roster
from overfill.routing.scaling_advisor import ScalingAdvisor
from overfill.routing.signals import Signals
from overfill.routing.tier import Objectives, Tier
from overfill.routing.worker import STAGE_NAMES, Worker
from overfill.settings.config import RouterConfig
from overfill.settings.tiers import RevisionSpec, TierSpec
from overfill.telemetry.metric_set import Sampled
from overfill.telemetry.progress import log_steps
from overfill.telemetry.router_metrics import WORKER_STATES
from overfill.v1 import admin_pb2, inference_pb2
from services.router.request_handler import RequestHandler
from services.router.served_tiers import ServedTiers
from services.router.shared import Shared
from services.router.statistics import Statistics

logger = logging.getLogger(__name__)


class Core:
    """Serves one revision. Cores have no worker, queue or decision in common, only what ``shared`` has.

    Args:
        expect_prefill: number of prefill workers in a complete stack.
        names: names of the model; by default the name of the default tier's pair.

    Attributes:
        revision: name of the revision; empty in a stack without revisions.
        roster: the joined workers.
        dispatcher: the running and waiting requests.
        async_dispatcher: the same, on the event loop.
        signals: input of the scaling policy.
        handler: handles the requests.
        names: as the argument, or its default.

    Raises:
        InvalidPair: a pair's folder is damaged, or a named pair is not prepared and cannot be prepared here.
    """

    def __init__(
        self,
        config: RouterConfig,
        spec: RevisionSpec,
        shared: Shared,
        expect_prefill: int = 0,
        names: Sequence[str] = (),
    ) -> None:
        loaded = {tier.name: Pair.load(resolve_pair(tier.pair, log_steps(logger))) for tier in spec.tiers}
        pairs = {name: replace(pair, revision=spec.name) for name, pair in loaded.items()}
        check_family(pairs)
        pair = pairs[spec.tiers[0].name]
        self.revision = spec.name
        self.names = tuple(names) or (pair.name,)
        self._shared = shared
        self._expect_prefill = max(1, expect_prefill)
        self._expect_decode = {tier.name: tier.replicas for tier in spec.tiers}
        tokenizer = Tokenizer.load(pair.full_path, config.tool_call_parser, config.chat_template)
        reasoning = find_reasoning(config.reasoning_parser, tokenizer)
        reads = "no reasoning" if reasoning is None else f"reasoning as {reasoning.name}"
        logger.info("%sreads tool calls as %s and %s", self._title, tokenizer.tool_format.name, reads)
        self.roster = Roster(
            pair.kv_identity("float32").of_pair(), [_tier(config, tier, pairs[tier.name]) for tier in spec.tiers]
        )
        seed = secrets.randbits(32)  # routers with the same reports should choose differently
        self.roster.use(POLICIES[config.prefill_policy](seed), lambda: POLICIES[config.decode_policy](seed))
        self.dispatcher = Dispatcher(
            self.roster,
            max_queue=config.max_queue,
            max_wait=config.max_wait,
            absent_after=config.absent_after,
        )
        self.async_dispatcher = AsyncDispatcher(self.dispatcher)
        self.signals = Signals(self.roster, self.dispatcher)
        objectives = {name: tier.objectives for name, tier in self.roster.tiers.items()}
        self._scaling_advisor = ScalingAdvisor(self.signals, objectives)
        self._brownout = Brownout(config.brownout, objectives, self._predict) if config.brownout else None
        self._trials = Trials(
            pair.full_path / "tokenizer.json",
            pair.full_config.vocab_size,
            pair.full_config.eos_token_ids,
            config.grammar_limits(),
        )
        self.handler = RequestHandler(
            ServedTiers(
                self.names,
                pairs,
                self.roster,
                self._brownout,
                answer_format=",".join([tokenizer.tool_format.name, *([reasoning.name] if reasoning else [])]),
                complete=self._expect_decode,
            ),
            tokenizer,
            self._trials,
            self.async_dispatcher,
            Statistics(shared, self.signals, self.revision),
            shared,
            reasoning,
            drop_attribution=config.drop_attribution,
        )

    @property
    def _title(self) -> str:
        return f"revision {self.revision}: " if self.revision else ""

    def _predict(self, tier: str) -> Prediction:
        now = asyncio.get_running_loop().time()
        return predict(self.roster, self.dispatcher, tier, now, self._scaling_advisor.expected_itl)

    def advise(self, now: float) -> None:
        """Runs the scaling policy and the brownout. Call it about every ``scaling.INTERVAL``; ``now`` in seconds."""
        self._shared.metrics.scaling(self._scaling_advisor.recommend(now), self.revision)
        short = {tier: self._scaling_advisor.short_prompt(tier) for tier in self.roster.tiers}
        self.roster.prefill.policy.set_short_prompts(short)
        if self._brownout is not None:
            self._brownout.update(now)

    def can_answer(self, request: inference_pb2.GenerateRequest, now: float) -> bool:
        """True if ready workers of both stages have what ``request`` names; ``now`` as in ``advise``."""
        tier = self.handler.tiers.tier_of(request)
        if tier is None:
            return False
        pools = (self.roster.prefill, self.roster.decode[tier])
        for pool in pools:
            pool.expire(now)
        return all(pool.num_ready for pool in pools)

    def unready(self, now: float) -> str:
        """Returns why requests cannot be answered now; empty if they can."""
        unready = self.roster.unready_stages(now)
        stages = " and ".join(f"no {STAGE_NAMES[stage]} worker" for stage in unready)
        return f"{self._title}{stages} is ready" if unready else ""

    def pools(self, now: float) -> list[admin_pb2.PoolStatus]:
        """Returns the pools, ``ready`` by their workers' reports; ``now`` as in ``advise``."""
        expected = [self._expect_prefill, *self._expect_decode.values()]
        names, pools = ["", *self.roster.decode], self.roster.pools()
        for pool in pools:
            pool.expire(now)
        return [
            admin_pb2.PoolStatus(
                stage=pool.stage,
                tier=tier,
                ready=pool.num_ready,
                expected=number,
                brownout=tier in self._in_brownout,
                revision=self.revision,
            )
            for tier, pool, number in zip(names, pools, expected, strict=True)
        ]

    def num_running(self) -> int:
        """Returns the number of requests that the revision answers now: those of this router, and others' on workers.

        What its decode workers report is of all routers, and up to a second old.
        """
        reports = [worker.report for pool in self.roster.decode.values() for worker in pool]
        on_workers = sum(report.load.running + report.load.waiting for report in reports if report is not None)
        return max(self.dispatcher.num_jobs, self.dispatcher.num_waiting + on_workers)

    @property
    def _in_brownout(self) -> frozenset[str]:
        return frozenset() if self._brownout is None else self._brownout.active

    def close(self) -> None:
        """Ends the process that tries grammars."""
        self._trials.close()

    # What gauges read at each scrape, on the thread that serves it.

    def waiting(self) -> Sampled:
        """Returns the numbers of waiting requests by tier and revision."""
        return [((tier, self.revision), count) for tier, count in self.dispatcher.waiting_by_tier().items()]

    def running(self) -> Sampled:
        """Returns the numbers of running requests by tier and revision."""
        return [((tier, self.revision), count) for tier, count in self.dispatcher.running_by_tier().items()]

    def brownouts(self) -> Sampled:
        """Returns 1 for each tier in brownout, else 0, by tier and revision."""
        return [((tier, self.revision), tier in self._in_brownout) for tier in self.roster.tiers]

    def workers(self) -> Sampled:
        """Returns the numbers of joined workers by stage, tier (empty for prefill workers), revision and state."""
        counts: dict[tuple[str, ...], float] = {}
        now = time.monotonic()
        for tier, pool in (("", self.roster.prefill), *self.roster.decode.items()):
            labels = STAGE_NAMES[pool.stage], tier, self.revision
            counts |= {(*labels, state): 0 for state in WORKER_STATES}
            for worker in list(pool):
                counts[*labels, _state(worker, now)] += 1
        return list(counts.items())


def _tier(config: RouterConfig, spec: TierSpec, pair: Pair) -> Tier:
    decoder: dict[str, object] = {
        "decoder_digest": pair.decoder_digest,
        "decoder_config_digest": pair.decoder_config_digest,
        "decoder_quantize": spec.settings.get("quantize", pair.quantize),
    }
    if dtype := spec.settings.get("kv_cache_dtype"):
        decoder["kv_cache_dtype"] = dtype
    objectives = Objectives(
        ttft=spec.ttft_objective or config.ttft_objective,
        itl=spec.itl_objective or config.itl_objective,
    )
    return Tier(spec.name, decoder, spec.fallback, objectives)


def _state(worker: Worker, now: float) -> str:
    if worker.draining:
        return "draining"
    return "ready" if worker.alive(now) else "starting" if worker.starting else "silent"


def load_cores(config: RouterConfig, shared: Shared) -> list[Core]:
    """Loads the cores of all revisions, the old one first. All serve the model under the same names.

    Raises:
        InvalidPair: as ``Core``.
    """
    # The library would hand each text to a thread of its own, which costs half as much again as tokenizing it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    old, *new = config.revisions
    core = Core(config, old, shared, config.expect_prefill, config.served_model_name)
    return [core, *(Core(config, spec, shared, names=core.names) for spec in new)]
