"""``overfill chaos``: injects faults into a stack under load, in every phase of a request, and checks every answer."""

from __future__ import annotations

import asyncio
import itertools
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from overfill.cli.options import FILE, TIER, Number, OutPath, check_replaced
from overfill.cli.output import console, print_json
from overfill.lab.chaos.fault_plan import (
    FAULTS,
    HOST_TARGETS,
    KV_PHASES,
    NO_RANKS,
    PHASES,
    TARGETS,
    FaultName,
    Phase,
    PlannedFault,
    Target,
    draw,
    matrix,
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

_LONGEST = 1024  # tokens of a prompt with its answer, unless the workers have a limit
_TIME_LIMIT = 3600.0  # seconds after which no new fault begins
_CONCURRENT_FAULTS = 2
_SOAK_LOAD = 0.7  # rate of a soak's requests, as a share of the capacity
_FALLBACK_SHARE = 0.25  # share of the requests that allow the next tier to go on with their answer
REVISIONS = ("r1", "r2")  # names of the two revisions of a stack with --canary-pair
_SAMPLED_SHARE = 0.5  # share of the requests that are sampled

# Not auto: by default, every machine breaks the same engine.
_ENGINE = click.Choice(get_args(EngineChoice))


@click.command("chaos")
@click.option(
    "--pair",
    default="tiny",
    show_default=True,
    help="Name of a pair, folder of a pair, or tiny (a small pair with random weights).",
)
@click.option(
    "--tier",
    "tiers",
    multiple=True,
    type=TIER,
    help="A tier, as for `overfill up`. Repeat it for each tier; it replaces --pair and --decode. With the pair tiny, "
    "the first tier's decoder is the full model, and the others answer differently.",
)
@click.option(
    "--fault",
    "faults",
    type=click.Choice(FAULTS),
    multiple=True,
    help="Fault to inject; repeat for several.  [default: all]",
)
@click.option(
    "--phase", "phases", type=click.Choice([*PHASES, *KV_PHASES]), multiple=True,
    help="Phase of a request in which a fault is injected; repeat for several.  [default: all; lending with --turns, "
    "saving with --kv-disk]",
)  # fmt: skip
@click.option(
    "--target", "targets", type=click.Choice(get_args(Target)), multiple=True,
    help="Side on which a fault is injected; repeat for several.  [default: all that the fault can hit]",
)  # fmt: skip
@click.option("--num-faults", type=click.IntRange(0), default=60, show_default=True, help="Number of random faults.")
@click.option(
    "--matrix",
    "times",
    metavar="N",
    type=click.IntRange(1),
    help="Inject every fault in every phase N times, instead of random faults.",
)
@click.option(
    "--soak",
    metavar="MINUTES",
    type=Number(0, min_open=True),
    help="Inject random faults for this many minutes, instead of a fixed number. Requests arrive at 0.7 of the "
    "capacity, which is measured first.",
)
@click.option("--rolling-restart", "rolling", is_flag=True, help="Drain each prefill worker once, one after the other.")
@click.option(
    "--replay",
    type=FILE,
    help="Inject the faults of this JSON report again.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Random seed for faults, phases, targets and times."
)
@click.option("--pause", type=Number(0), default=2.0, show_default=True, help="Mean pause between faults, seconds.")
@click.option(
    "--colocated",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Number of workers with both stages. They decode in the default tier.",
)
@click.option(
    "--prefill", type=click.IntRange(0), help="Number of prefill workers.  [default: 2, or 0 with --colocated]"
)
@click.option(
    "--decode", type=click.IntRange(0), help="Number of decode workers.  [default: 3, or 0 with --colocated]"
)  # fmt: skip
@click.option(
    "--canary-pair",
    metavar="PAIR",
    help="Pair of a new revision, which has as many workers and gets half of the conversations. tiny has other "
    "random weights than --pair.",
)
@click.option(
    "--num-adapters",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Number of adapters with random weights on the first tier's decoder; requests are spread over them too.",
)
@click.option("--router", "routers", type=click.IntRange(2), default=2, show_default=True, help="Number of routers.")
@click.option("--requests", type=click.IntRange(1), default=200, show_default=True, help="Minimum number of requests.")
@click.option(
    "--streams",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Concurrent requests; with --soak only while capacity is measured.",
)
@click.option(
    "--max-tokens", type=click.IntRange(1), default=48, show_default=True, help="Maximum tokens of an answer."
)
@click.option(
    "--turns",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Maximum turns of a chat. With several, prompts are spread over the prefill workers, every import of KV is "
    "tried, and the run fails unless KV came from a peer, or from disk with --kv-disk.",
)
@click.option("--kv-disk", is_flag=True, help="Give the prefill workers a disk tier, in a temporary folder.")
@click.option(
    "--grace-period",
    default=1.0,
    show_default=True,
    help="Seconds that a process has to finish requests after SIGTERM.",
)
@click.option(
    "--max-num-seqs",
    default=4,
    show_default=True,
    help="Maximum sequences per worker; a small number makes requests queue.",
)
@click.option(
    "--kv-memory", help="Size of each worker's KV cache, such as 512MiB.  [default: 8MiB for tiny, else sized to fit]"
)
@click.option(
    "--prefill-engine", type=_ENGINE, default="overfill", show_default=True, help="Engine of the prefill workers."
)
@click.option(
    "--decode-engine", type=_ENGINE, default="overfill", show_default=True, help="Engine of the decode workers."
)
@click.option(
    "--tensor-parallel-size",
    "num_ranks",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Number of ranks of each worker on vLLM. With several, kill and freeze also hit one of them, or all.",
)
@click.option(
    "--engine-args",
    metavar="JSON",
    help="Arguments of vLLM (its EngineArgs) or of the mock engine, as a JSON object by name.  "
    "[default: '{\"enforce_eager\": true}' for tiny on vllm]",
)
@click.option(
    "--hosts",
    is_flag=True,
    help="Run each process on a host of its own: a network namespace with a real link, mutual TLS, no shared memory. "
    "partition, delay, loss and bandwidth then act on the link, and vanish on hosts too.  [needs Linux and root]",
)
@click.option("--report", "report_file", type=OutPath("file"), help="Write a JSON report to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def chaos_command(
    pair: str,
    tiers: tuple[TierSpec, ...],
    faults: tuple[FaultName, ...],
    phases: tuple[Phase, ...],
    targets: tuple[Target, ...],
    num_faults: int,
    times: int | None,
    soak: float | None,
    rolling: bool,
    replay: Path | None,
    seed: int,
    pause: float,
    colocated: int,
    prefill: int | None,
    decode: int | None,
    canary_pair: str | None,
    num_adapters: int,
    routers: int,
    requests: int,
    streams: int,
    max_tokens: int,
    turns: int,
    kv_disk: bool,
    grace_period: float,
    max_num_seqs: int,
    kv_memory: str | None,
    prefill_engine: EngineChoice,
    decode_engine: EngineChoice,
    num_ranks: int,
    engine_args: str | None,
    hosts: bool,
    report_file: Path | None,
    as_json: bool,
) -> int:
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
    from overfill.lab.chaos.trial import Trial, run_trial
    from overfill.lab.chaos.trial_report import TrialReport
    from overfill.pair.reference import load_references
    from overfill.stack.pairs import tier_pair

    settings = {key: value for key, value in click.get_current_context().params.items() if value not in (None, ())}
    if tiers:
        check_replaced("pair", "decode")
        _check_tiers(tiers, colocated)
    if canary_pair is not None and (tiers or colocated or num_adapters):
        raise click.UsageError("--canary-pair: leave out --tier, --colocated and --num-adapters")
    counts = count_workers(colocated, prefill, decode, bool(tiers))
    engines: dict[Target, EngineChoice] = {"prefill": prefill_engine, "decode": decode_engine}
    ranks = {stage: num_ranks for stage, engine in engines.items() if engine == "vllm"} if num_ranks > 1 else NO_RANKS
    if num_ranks > 1 and not ranks:
        raise click.UsageError(f"--tensor-parallel-size {num_ranks}: give --prefill-engine or --decode-engine vllm")
    if rolling and (times is not None or soak is not None or replay is not None):
        raise click.UsageError("--rolling-restart chooses the faults: leave out --matrix, --soak and --replay")
    caused = [phase for phase, does in zip(KV_PHASES, (turns > 1, kv_disk), strict=True) if does]
    among = (faults or FAULTS, phases or (*PHASES, *caused), targets or None)
    chosen = _choose_faults(*among, num_faults, times, soak, replay, seed, pause, hosts, ranks)
    trial_settings = {
        "grace_period": grace_period,
        "kv_memory": kv_memory,
        "max_num_seqs": max_num_seqs,
        "prefill_engine": prefill_engine,
        "decode_engine": decode_engine,
        "engine_args": engine_args,
    } | {f"{stage}_tensor_parallel_size": str(count) for stage, count in ranks.items()}
    if turns > 1:
        trial_settings["prefill_policy"] = "round-robin"
    with ExitStack() as exits:
        report = exits.enter_context(show_progress())
        if kv_disk:
            disk = exits.enter_context(tempfile.TemporaryDirectory(prefix="overfill-kv-"))
            trial_settings["kv_disk"] = disk
        if num_adapters:
            folder = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="overfill-adapters-")))
            trial_settings |= {"adapters": str(folder), "max_adapters": str(num_adapters)}
        plan, prompts = prepare(pair, tiers, counts, routers, exits, report, trial_settings, canary_pair)
        if rolling:
            chosen = rolling_restart([w.id for w in plan.workers if "prefill" in w.kind.stages], pause)
        first = plan.tiers[0]
        adapters = make_adapters(tier_pair(first), folder, num_adapters) if num_adapters else {}
        trial = Trial(
            faults=chosen,
            prompts=prompts,
            requests=requests,
            streams=streams,
            max_tokens=max_tokens,
            load_fraction=_SOAK_LOAD if soak else None,
            seconds=soak * 60 if soak else None,
            concurrent_faults=_CONCURRENT_FAULTS,
            time_limit=max(_TIME_LIMIT, soak * 60 if soak else 0.0),
            seed=seed,
            fallback_share=_FALLBACK_SHARE,
            sampled_share=_SAMPLED_SHARE,
            adapters=tuple(adapters),
            turns=turns,
            longest=plan.workers[0].config.max_model_len or _LONGEST,
        )
        result = asyncio.run(run_trial(plan, trial, report, hosts))
        references = {one.name: load_references(one.tiers) for one in plan.routers[0].revisions}
        for of_revision in references.values():
            of_revision |= of_revision[first.name].with_adapters(adapters)
        summary, wrong = result.judge(references, max_tokens, report)
    needed = [*(("disk",) if kv_disk else ("peer",) if turns > 1 else ()), *(REVISIONS if len(references) > 1 else ())]
    judged = TrialReport(result, summary, wrong, {key: _plain(value) for key, value in settings.items()}, needed)
    if report_file is not None:
        report_file.write_text(json.dumps(judged.as_dict(), indent=1) + "\n", encoding="utf-8")
    if as_json:
        print_json(judged.as_dict())
    else:
        for table in judged.tables():
            console().print(table)
        click.echo(str(summary))
    return 0 if judged.passed else 1


def count_workers(colocated: int, prefill: int | None, decode: int | None, tiers: bool) -> dict[str, int]:
    """Returns the number of workers of each kind. Raises click.UsageError if a stage has too few for faults."""
    if prefill is None:
        prefill = 0 if colocated else 2
    if decode is None:
        decode = 0 if colocated else 3
    for stage, count in (("prefill", prefill), ("decode", decode)):
        # A worker with both stages may be the only one that prefills: requests wait while a fault takes it.
        least = 1 if stage == "prefill" and colocated else 2
        if count + colocated < least and not (tiers and stage == "decode"):
            raise click.UsageError(
                f"--{stage} {count}: give at least {least - colocated}, because faults take a worker of each stage"
            )
    return {"colocated": colocated, "prefill": prefill, "decode": decode}


def _check_tiers(tiers: Sequence[TierSpec], colocated: int) -> None:
    """Raises click.UsageError if the tiers do not fit each other, or are fewer than two decode workers."""
    try:
        check_tiers(tiers)
    except ValueError as error:
        raise click.UsageError(f"--tier: {error}") from error
    if sum(tier.replicas for tier in tiers) + colocated < 2:
        raise click.UsageError("--tier: give at least two decode workers, as NAME=PAIR:2: faults take one of them")
    if len({tier.pair == "tiny" for tier in tiers}) > 1:
        raise click.UsageError("--tier: all tiers have the pair tiny, or none: they share the full model")


def _choose_faults(
    faults: tuple[FaultName, ...],
    phases: tuple[Phase, ...],
    targets: tuple[Target, ...] | None,
    count: int,
    times: int | None,
    soak: float | None,
    replay: Path | None,
    seed: int,
    pause: float,
    hosts: bool,
    num_ranks: Mapping[Target, int],
) -> Iterable[PlannedFault]:
    """Returns the faults that the options choose. Raises click.UsageError if they conflict."""
    if sum(option is not None for option in (times, soak, replay)) > 1:
        raise click.UsageError("--matrix, --soak and --replay each choose the faults: give only one of them")
    possible = HOST_TARGETS if hosts else TARGETS
    if replay is not None:
        try:
            read = read_report(replay)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        if any(fault.target not in possible[fault.kind] for fault in read):
            raise click.UsageError(f"{replay} has hosts that vanish: add --hosts")
        if any(max(fault.ranks, default=-1) >= num_ranks.get(fault.target, 0) for fault in read if fault.ranks):
            raise click.UsageError(f"{replay} has faults of ranks: give as many with --tensor-parallel-size")
        return read
    if times is not None:
        if targets is not None:
            possible = {fault: tuple(t for t in each if t in targets) or each for fault, each in possible.items()}
        return matrix(seed, times, faults, phases, possible, num_ranks)
    drawn = draw(seed, pause, faults, phases, targets, possible, num_ranks)
    return drawn if soak is not None else list(itertools.islice(drawn, count))


_TINY_ON_VLLM = {
    "block_size": "32",  # few tokens would fill no block of vLLM's default size, 128 on a CPU
    "engine_args": '{"enforce_eager": true}',  # compiling takes longer than a restart may
}


def prepare(
    pair: str,
    tiers: Sequence[TierSpec],
    counts: Mapping[str, Any],
    routers: int,
    exits: ExitStack,
    report: Report,
    settings: dict[str, Any],
    canary_pair: str | None = None,
) -> tuple[PlacedStack, list[list[int]]]:
    """Returns the processes of a float32 stack, and prompts. ``exits`` removes the folder of tiny pairs.

    Args:
        tiers: tiers, which replace ``pair`` and the number of decode workers. Empty means one pair.
        counts: numbers of workers, by argument of ``describe``.
        canary_pair: pair of a new revision; None means that there is none.
    """
    from overfill.making.conversations import shipped_conversations
    from overfill.making.tiny import make_tiny_pair, make_tiny_tiers
    from overfill.pair.hf_model import chat_token_ids, load_tokenizer
    from overfill.stack.describe import describe
    from overfill.stack.pairs import check_engines, resolve_pairs
    from overfill.stack.placed import place

    settings = {"dtype": "float32", "log_level": "error"} | settings
    folder: Path | str = pair
    if (tiers[0].pair if tiers else pair) == "tiny":
        parent = exits.enter_context(tempfile.TemporaryDirectory(prefix="overfill-"))
        on_vllm = "vllm" in (settings.get("prefill_engine"), settings.get("decode_engine"))
        # vLLM's kernels for CPUs have no smaller heads than 32.
        head_dim = 32 if on_vllm else 16
        if tiers:
            tiers = make_tiny_tiers(Path(parent), tiers, head_dim=head_dim)
        else:
            folder = make_tiny_pair(Path(parent) / "tiny", head_dim=head_dim)
            if canary_pair == "tiny":
                canary_pair = str(make_tiny_pair(Path(parent) / "canary", head_dim=head_dim, seed=1))
        defaults = {"kv_memory": "8MiB"} | (_TINY_ON_VLLM if on_vllm else {})
        settings |= {name: value for name, value in defaults.items() if settings.get(name) is None}
    spec = describe(folder, routers=routers, threads=1, settings=settings, tiers=tiers, **counts)
    if canary_pair is not None:
        spec = _with_canary(spec, canary_pair)
    spec = resolve_pairs(spec, report)
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


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path | TierSpec) else value


def make_adapters(pair: Pair, folder: Path, count: int) -> dict[str, Path]:
    """Adds random adapters of the pair's decoder to ``folder``; returns their folders by name."""
    from overfill.making.tiny import make_random_adapter
    from overfill.pair.adapters import add_adapter

    found = {}
    for number in range(count):
        name = f"task-{number}"
        with tempfile.TemporaryDirectory() as parent:
            source = make_random_adapter(Path(parent) / name, pair.decoder_config, number)
            # The decoder computes one token of the prompt, or several.
            add_adapter(folder, name, source, pair, tail_tokens=1 + number % 2 * 4, own_prefill=False)
        found[name] = folder / name
    return found
