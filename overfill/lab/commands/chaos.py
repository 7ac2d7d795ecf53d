"""``overfill chaos``: injects faults into a stack under load, in every phase of a request, and checks every answer."""

from __future__ import annotations

import asyncio
import itertools
import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from overfill.cli.options import FILE, TIER, Number, OutPath, check_replaced, field_options, option_field
from overfill.cli.output import console
from overfill.lab.chaos.fault_plan import (
    FAULTS,
    KV_PHASES,
    PHASES,
    FaultChoice,
    FaultName,
    Phase,
    PlannedFault,
    Target,
    read_report,
    rolling_restart,
)
from overfill.settings.tiers import TierSpec, check_tiers
from overfill.settings.values import EngineChoice

if TYPE_CHECKING:
    from overfill.model.manifest import Pair
    from overfill.stack.placed import PlacedStack
    from overfill.stack.spec import StackSpec
    from overfill.telemetry.progress import Report

_ROUTERS = 2
_MAX_NUM_SEQS = 4  # sequences per worker; a small number makes requests queue
_LONGEST = 1024  # tokens of a prompt with its answer, unless the workers have a limit
_CONCURRENT_FAULTS = 2
_SOAK_LOAD = 0.7  # rate of a soak's requests, as a share of the capacity
_FALLBACK_SHARE = 0.25  # share of the requests that allow the next tier to go on with their answer
_SAMPLED_SHARE = 0.5  # share of the requests that are sampled
_TINY_ON_VLLM = {
    "block_size": "32",  # few tokens would fill no block of vLLM's default size, 128 on a CPU
    "engine_args": '{"enforce_eager": true}',  # compiling takes longer than a restart may
}
REVISIONS = ("r1", "r2")  # names of the two revisions of a stack with --canary-pair


def _flag(help: str) -> Any:
    return option_field(False, help, bool, is_flag=True)


def _count(help: str, default: int | None, least: int = 1, otherwise: str | None = None) -> Any:
    return option_field(default, help, click.IntRange(least), otherwise)


def _some(choices: Iterable[str], help: str, otherwise: str = "all") -> Any:
    return option_field((), f"{help}; repeat for several.", click.Choice([*choices]), otherwise, multiple=True)


def _engine(stage: str) -> Any:
    # Not auto: by default, every machine breaks the same engine.
    return option_field("overfill", f"Engine of the {stage} workers.", click.Choice(get_args(EngineChoice)))


@dataclass(frozen=True, slots=True)
class ChaosOptions:
    """The options of ``overfill chaos``. Each field is an ``option_field``."""

    pair: str = option_field("tiny", "Name or folder of a pair, or tiny (a small pair with random weights).", str)
    tier: tuple[TierSpec, ...] = option_field(
        (),
        "A tier, as for `overfill up`. Repeat it for each tier; it replaces --pair and --decode. With the pair tiny, "
        "the first tier's decoder is the full model, and the others answer differently.",
        TIER,
        multiple=True,
    )
    fault: tuple[FaultName, ...] = _some(FAULTS, "Fault to inject")
    phase: tuple[Phase, ...] = _some(
        (*PHASES, *KV_PHASES),
        "Phase of a request in which a fault is injected",
        "all; lending with --turns, saving with --kv-disk",
    )
    target: tuple[Target, ...] = _some(
        get_args(Target), "Side on which a fault is injected", "all that the fault can hit"
    )
    num_faults: int = _count("Number of random faults.", 60, least=0)
    matrix: int | None = _count("Inject every fault in every phase this often, in place of random faults.", None)
    soak: float | None = option_field(
        None,
        "Inject random faults for this many minutes, instead of a fixed number. Requests arrive at 0.7 of the "
        "capacity, which is measured first.",
        Number(0, min_open=True),
        metavar="MINUTES",
    )
    rolling_restart: bool = _flag("Drain each prefill worker once, one after the other.")
    replay: Path | None = option_field(None, "Inject the faults of this JSON report again.", FILE)
    seed: int = option_field(0, "Random seed for faults, phases, targets and times.", int)
    pause: float = option_field(2.0, "Mean pause between faults, seconds.", Number(0))
    colocated: int = _count("Number of workers with both stages, in the default tier.", 0, least=0)
    prefill: int | None = _count("Number of prefill workers.", None, 0, "2, or 0 with --colocated")
    decode: int | None = _count("Number of decode workers.", None, 0, "3, or 0 with --colocated")
    canary_pair: str | None = option_field(
        None,
        "Pair of a new revision, which has as many workers and gets half of the conversations. tiny has other random "
        "weights than --pair.",
        str,
        metavar="PAIR",
    )
    num_adapters: int = _count("Number of random adapters that requests are spread over too.", 0, least=0)
    requests: int = _count("Minimum number of requests.", 200)
    streams: int = _count("Concurrent requests; with --soak only while capacity is measured.", 16)
    max_tokens: int = _count("Maximum tokens of an answer.", 48)
    turns: int = _count(
        "Maximum turns of a chat. With several, prompts are spread over the prefill workers, every import of KV is "
        "tried, and the run fails unless KV came from a peer, or from disk with --kv-disk.",
        1,
    )
    kv_disk: bool = _flag("Give the prefill workers a disk tier, in a temporary folder.")
    grace_period: float = option_field(1.0, "Seconds for running requests after SIGTERM.", float)
    kv_memory: str | None = option_field(
        None, "Size of each worker's KV cache, such as 512MiB.", str, "8MiB for tiny, else sized to fit"
    )
    prefill_engine: EngineChoice = _engine("prefill")
    decode_engine: EngineChoice = _engine("decode")
    tensor_parallel_size: int = _count(
        "Ranks of a worker on vLLM. With several, kill and freeze also hit one, or all.", 1
    )
    hosts: bool = _flag(
        "Run each process on a host of its own: a network namespace with a real link, mutual TLS, no shared memory. "
        "partition, delay, loss and bandwidth then act on the link, and vanish on hosts too.  [needs Linux and root]",
    )
    report: Path | None = option_field(None, "Write a JSON report to this file.", OutPath("file"))

    @property
    def num_ranks(self) -> dict[Target, int]:
        """Target -> ranks of each of its workers; empty if none has several."""
        engines: dict[Target, EngineChoice] = {"prefill": self.prefill_engine, "decode": self.decode_engine}
        size = self.tensor_parallel_size
        return {stage: size for stage, engine in engines.items() if engine == "vllm" and size > 1}

    @property
    def workers(self) -> dict[str, Any]:
        """Number of workers of each kind, by argument of ``describe``."""
        prefill, decode = (0, 0) if self.colocated else (2, 3)
        return {
            "colocated": self.colocated,
            "prefill": prefill if self.prefill is None else self.prefill,
            "decode": decode if self.decode is None else self.decode,
        }


@click.command("chaos")
@field_options(ChaosOptions)
def chaos_command(**values: Any) -> int:
    """Break a stack under load and check every answer. The stack is started on this machine.

    A fault waits for a request in its phase. It hits a process that serves this request, or the client.
    A process is killed, drained, frozen or partitioned only while another one with the target's stage is ready, or if
    the stack has no other one.

    With --tier, the requests are spread over the tiers. Each part of an answer is checked by the decoder of the tier
    that wrote it, and only requests that allow it, a quarter, may change their tier. A tier may lose its last worker.
    With --num-adapters, they are spread over the adapters too; no answer may change its adapter.

    With --canary-pair, each answer is checked by the pair of the revision that it names. An answer that mixes revisions
    is wrong, and both revisions must answer.

    Half of the requests are greedy, the others are sampled. A sampled token is right if it has the greatest key in the
    reference's draw. It is a tie if its key is within 0.001 divided by the temperature of that. A token at the edge of
    top-k, top-p or min-p is a tie too, if a change of the logits by 0.001 would move it across.

    The same seed draws the same faults. --replay injects the faults of an earlier run's report.

    Exit code 0 when every request was answered right or refused with a reason, at most one token in a thousand was a
    tie, every process exited as it should, and every KV block was free within two seconds of the last answer. Exit
    code 1 otherwise.
    """
    from overfill.cli.progress import show_progress
    from overfill.lab.chaos.load import RequestMix
    from overfill.lab.chaos.trial import Trial, run_trial
    from overfill.lab.chaos.trial_report import TrialReport
    from overfill.pair.reference import load_references
    from overfill.stack.pairs import tier_pair

    options = ChaosOptions(**values)
    try:
        _check_stack(options)
        faults = _choose_faults(options)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    with show_progress() as progress, tempfile.TemporaryDirectory(prefix="overfill-") as name:
        folder = Path(name)
        plan, prompts = _prepare(options, folder, progress)
        if options.rolling_restart:
            faults = rolling_restart([worker.id for worker in plan.of_stage("prefill")], options.pause)
        first = plan.tiers[0]
        adapters = make_adapters(tier_pair(first), folder / "adapters", options.num_adapters)
        mix = RequestMix(
            prompts,
            options.max_tokens,
            options.seed,
            tiers=[tier.name for tier in plan.tiers],
            adapters=tuple(adapters),
            fallback_share=_FALLBACK_SHARE,
            sampled_share=_SAMPLED_SHARE,
            turns=options.turns,
            longest=plan.workers[0].config.max_model_len or _LONGEST,
        )
        soak = {"load_fraction": _SOAK_LOAD, "seconds": options.soak * 60} if options.soak else {}
        trial = Trial(faults, mix, options.requests, options.streams, concurrent_faults=_CONCURRENT_FAULTS, **soak)
        result = asyncio.run(run_trial(plan, trial, progress, options.hosts))
        references = {one.name: load_references(one.tiers) for one in plan.routers[0].revisions}
        for of_revision in references.values():
            of_revision |= of_revision[first.name].with_adapters(adapters)
        summary, wrong = result.judge(references, options.max_tokens, progress)
    needed = ["disk"] if options.kv_disk else ["peer"] if options.turns > 1 else []
    needed += REVISIONS if len(references) > 1 else ()
    settings = {name: value for name, value in values.items() if value not in (None, ())}
    report = TrialReport(result, summary, wrong, settings, needed)
    if options.report is not None:
        options.report.write_text(json.dumps(report.as_dict(), indent=1, default=str) + "\n", encoding="utf-8")
    for table in report.tables():
        console().print(table)
    click.echo(str(summary))
    return 0 if report.passed else 1


def _check_stack(options: ChaosOptions) -> None:
    """Raises ValueError if a stage has too few workers for faults, or if options of the stack conflict."""
    tiers = options.tier
    if options.canary_pair is not None and (tiers or options.colocated or options.num_adapters):
        raise ValueError("--canary-pair: leave out --tier, --colocated and --num-adapters")
    if tiers:
        check_replaced("pair", "decode")
        check_tiers(tiers)
        if sum(tier.replicas for tier in tiers) + options.colocated < 2:
            raise ValueError("--tier: give at least two decode workers, as NAME=PAIR:2: faults take one of them")
        if len({tier.pair == "tiny" for tier in tiers}) > 1:
            raise ValueError("--tier: all tiers have the pair tiny, or none: they share the full model")
    for stage in ("prefill",) if tiers else ("prefill", "decode"):
        # A worker with both stages may be the only one that prefills: requests wait while a fault takes it.
        least = (1 if stage == "prefill" and options.colocated else 2) - options.colocated
        if (count := options.workers[stage]) < least:
            raise ValueError(f"--{stage} {count}: give at least {least}, because faults take a worker of each stage")
    if options.tensor_parallel_size > 1 and not options.num_ranks:
        raise ValueError(
            f"--tensor-parallel-size {options.tensor_parallel_size}: give --prefill-engine or --decode-engine vllm"
        )


def _choose_faults(options: ChaosOptions) -> Iterable[PlannedFault]:
    """Returns the faults that the options choose. Raises ValueError if they conflict."""
    choices = (options.matrix, options.soak, options.replay, options.rolling_restart or None)
    if sum(choice is not None for choice in choices) > 1:
        raise ValueError(
            "--matrix, --soak, --replay and --rolling-restart each choose the faults: give only one of them"
        )
    caused = [phase for phase, does in zip(KV_PHASES, (options.turns > 1, options.kv_disk), strict=True) if does]
    phases = options.phase or (*PHASES, *caused)
    among = FaultChoice(options.fault or FAULTS, phases, options.target, options.hosts, options.num_ranks)
    if options.replay is not None:
        faults, possible = read_report(options.replay), FaultChoice(hosts=options.hosts)
        if any(fault.target not in possible.targets_of(fault.kind) for fault in faults):
            raise ValueError(f"{options.replay} has hosts that vanish: add --hosts")
        if any(fault.ranks and max(fault.ranks) >= among.num_ranks.get(fault.target, 0) for fault in faults):
            raise ValueError(f"{options.replay} has faults of ranks: give as many with --tensor-parallel-size")
        return faults
    if options.matrix is not None:
        return among.matrix(options.seed, options.matrix)
    drawn = among.draw(options.seed, options.pause)
    return drawn if options.soak is not None else list(itertools.islice(drawn, options.num_faults))


def _prepare(options: ChaosOptions, folder: Path, progress: Report) -> tuple[PlacedStack, list[list[int]]]:
    """Returns the processes of a float32 stack, and prompts. ``folder`` gets tiny pairs, and has the disk tier."""
    from overfill.making.conversations import shipped_conversations
    from overfill.making.tiny import make_tiny_pair, make_tiny_tiers
    from overfill.pair.hf_model import chat_token_ids, load_tokenizer
    from overfill.stack.describe import describe
    from overfill.stack.pairs import check_engines, resolve_pairs
    from overfill.stack.placed import place

    copied = ("grace_period", "kv_memory", "prefill_engine", "decode_engine")
    settings: dict[str, Any] = {name: getattr(options, name) for name in copied}
    settings |= {"dtype": "float32", "log_level": "error", "max_num_seqs": _MAX_NUM_SEQS}
    settings |= {f"{stage}_tensor_parallel_size": str(count) for stage, count in options.num_ranks.items()}
    if options.turns > 1:
        settings["prefill_policy"] = "round-robin"
    if options.kv_disk:
        settings["kv_disk"] = str(folder / "kv")
    if options.num_adapters:
        (adapters := folder / "adapters").mkdir()
        settings |= {"adapters": str(adapters), "max_adapters": str(options.num_adapters)}
    pair, tiers, canary = options.pair, options.tier, options.canary_pair
    if (tiers[0].pair if tiers else pair) == "tiny":
        on_vllm = "vllm" in (options.prefill_engine, options.decode_engine)
        # vLLM's kernels for CPUs have no smaller heads than 32.
        head_dim = 32 if on_vllm else 16
        if tiers:
            tiers = make_tiny_tiers(folder / "tiers", tiers, head_dim=head_dim)
        else:
            pair = str(make_tiny_pair(folder / "tiny", head_dim=head_dim))
        if canary == "tiny":
            canary = str(make_tiny_pair(folder / "canary", head_dim=head_dim, seed=1))
        settings |= {"kv_memory": options.kv_memory or "8MiB"} | (_TINY_ON_VLLM if on_vllm else {})
    spec = describe(pair, routers=_ROUTERS, threads=1, settings=settings, tiers=tiers, **options.workers)
    spec = resolve_pairs(spec if canary is None else _with_canary(spec, canary), progress)
    plan = place(spec)
    tokenizer = load_tokenizer(Path(plan.routers[0].pair) / "full")
    check_engines(spec)
    limit = plan.workers[0].config.max_model_len or 512
    questions = [c.messages[0]["content"] for c in shipped_conversations("development")]
    return plan, [chat_token_ids(tokenizer, question)[:limit] for question in questions]


def _with_canary(spec: StackSpec, pair: str) -> StackSpec:
    """Returns the stack with a new revision, which has as many workers and gets half of the conversations."""
    old, new = REVISIONS
    document = spec.document()
    pools = {name: document.get(name, {}) for name in ("prefill", "decode")}
    return spec.read({**document, "revision": old, "canary": {"revision": new, "percent": 50, "pair": pair, **pools}})


def make_adapters(pair: Pair, folder: Path, count: int) -> dict[str, Path]:
    """Adds random adapters of the pair's decoder to ``folder``; returns their folders by name."""
    from overfill.making.tiny import make_random_adapter
    from overfill.pair.adapters import add_adapter

    names = [f"task-{number}" for number in range(count)]
    with tempfile.TemporaryDirectory() as parent:
        for number, name in enumerate(names):
            source = make_random_adapter(Path(parent) / name, pair.decoder_config, number)
            # The decoder computes one token of the prompt, or several.
            add_adapter(folder, name, source, pair, tail_tokens=1 + number % 2 * 4, own_prefill=False)
    return {name: folder / name for name in names}
