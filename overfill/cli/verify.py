"""``overfill verify``: compare a running stack's greedy answers with plain transformers.

This command tokenizes the prompts with the checkpoint's own tokenizer, and ``overfill.pair.reference`` judges the
answers. The check thus uses no code of the serving path.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from overfill.cli.options import TIER, ClientConnection, adapters_option, check_replaced, connection_options
from overfill.errors import OverfillError
from overfill.request.answer_start import answer_start
from overfill.routing.tier import DEFAULT_TIER
from overfill.settings.tiers import TierSpec, check_tiers
from overfill.stack.pairs import resolve_tiers, tier_pair

if TYPE_CHECKING:
    from overfill.client import Answer, Client, StackStatus
    from overfill.model.adapter import AdapterRecord
    from overfill.model.manifest import Pair
    from overfill.pair.reference import JudgedAnswer, Summary, TwoStageReference
    from overfill.rpc.stack_status import WorkerStatus
    from overfill.telemetry.progress import Report
    from overfill.v1 import common_pb2

_COUNTS = ("prompt_tokens", "cached_tokens", "peer_tokens", "disk_tokens")
_DIGESTS = ("full_digest", "config_digest", "tokenizer_digest", "decoder_digest", "decoder_config_digest")


class CannotVerify(click.ClickException):
    """The stack's answers cannot be verified; the message says how to start a stack whose answers can."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class AskedWriter:
    """What is asked: a tier, or an adapter on the decoder of a tier.

    Attributes:
        name: the tier's or the adapter's.
        asked: what requests name; empty means the stack's default tier.
        allowed: what may write parts of the answers.
        adapter: the adapter; None means the tier's decoder alone.
    """

    name: str
    asked: str
    allowed: frozenset[str]
    adapter: AdapterRecord | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens of a prompt.

    Attributes:
        generation_prompt: how many at the end are the chat template's generation prompt; 0 if the stack got tokens.
        question, turn: numbers of the question and of the turn, from 1.
    """

    ids: Sequence[int]
    generation_prompt: int
    question: int
    turn: int = 1


@dataclass(frozen=True, slots=True)
class JudgedWriter:
    """The answers to the questions that were asked of one writer.

    Attributes:
        name: of the tier or adapter.
        prompts: one for each judged answer.
        usage: sums of the answers' counts of prompt tokens.
        revisions: number of answers that arrived, by the revision that each names.
    """

    name: str
    prompts: Sequence[Prompt]
    judged: Sequence[JudgedAnswer]
    usage: common_pb2.Usage
    revisions: Counter[str]

    @property
    def summary(self) -> Summary:
        from overfill.pair.reference import summarise

        return summarise(self.judged)


@click.command("verify")
@click.option(
    "--questions",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File of JSON lines with a `prompt`, or with `turns` as in MT-bench; asks the first turn.",
)
@click.option("--max-tokens", required=True, type=click.IntRange(min=1), help="Maximum length of an answer.")
@click.option("--pair", default="default", show_default=True, help="The pair that the stack serves.")
@click.option(
    "--tier",
    "tiers",
    multiple=True,
    type=TIER,
    help="A tier of the stack, as `overfill up --tier` got it. Repeat it for each tier; it replaces --pair.",
)
@click.option("--canary-pair", metavar="PAIR", help="During a rollout, the pair of the stack's new revision.")
@click.option(
    "--canary-tier",
    "canary_tiers",
    multiple=True,
    type=TIER,
    help="With --tier, a tier of the stack's new revision. Repeat it for each tier.",
)
@click.option(
    "--ask",
    "chosen",
    metavar="NAME",
    multiple=True,
    help="Tier or adapter to ask; repeat for several.  [default: every --tier and --adapter, in order]",
)
@click.option(
    "--adapter",
    "adapter_names",
    metavar="NAME",
    multiple=True,
    help="Adapter that the stack has loaded; repeat for several.",
)
@adapters_option
@click.option(
    "--turns",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Turns of each question: a further prompt has the one before, its answer and the file's next question.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Ask only the first N questions.  [default: all]")
@click.option(
    "--concurrency", type=click.IntRange(min=1), default=4, show_default=True, help="Number of questions in flight."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@connection_options
def verify_command(
    questions: Path,
    max_tokens: int,
    pair: str,
    tiers: tuple[TierSpec, ...],
    canary_pair: str | None,
    canary_tiers: tuple[TierSpec, ...],
    chosen: tuple[str, ...],
    adapter_names: tuple[str, ...],
    adapters: Path | None,
    turns: int,
    limit: int | None,
    concurrency: int,
    as_json: bool,
    connection: ClientConnection,
) -> int:
    """Check a running stack's answers against plain transformers, token by token.

    Asks the questions with greedy decoding. An answer is correct if an independent reference chooses the
    same tokens. A token within 0.001 of the largest logit is a tie, which counts as the same. The last line counts
    correct answers.

    With --turns, further turns are asked as token ids, so that a stack can use all KV that it has of the turns before.
    Each answer is judged after all tokens of its prompt, which the reference computes anew.

    With --tier, asks every question in each tier, one tier after the other. A line per tier counts its correct
    answers, and the prompt tokens whose KV the prefix cache had. If another tier goes on with an answer, each part is
    judged by its own tier's decoder.

    With --adapter, asks every question of each tier and each adapter, question by question, so that one batch mixes
    them. PEFT loads the adapters for the reference, from the folder of adapters.

    During a rollout, --canary-pair or --canary-tier names the pairs of the new revision. Each answer is judged by
    the pairs of the revision that it names. An answer that mixes revisions is wrong.

    Exits with 1 if an answer is wrong or missing, or if more than one token in a thousand is a tie. Exits with 2 if the
    stack does not run in float32 with the raw codec: start it with `overfill up --dtype float32`.
    """
    from overfill.cli.output import print_json, sources
    from overfill.cli.progress import show_progress
    from overfill.pair.hf_model import chat_token_ids, generation_prompt_tokens, load_tokenizer
    from overfill.pair.reference import load_references

    if adapters is not None and not adapter_names:
        raise click.UsageError("--adapters needs --adapter, for each adapter to ask")
    several = bool(tiers or adapter_names)
    names_tiers = bool(tiers)
    canary = _check_canary(canary_pair, canary_tiers, tiers, adapter_names)
    tiers = _check_tiers(pair, tiers, chosen, adapter_names)
    texts = read_questions(questions)[:limit]
    with show_progress() as report:
        stacks = [resolve_tiers(some, report) for some in (tiers, canary) if some]
        tiers, all_pairs = stacks[0], [{tier.name: tier_pair(tier) for tier in some} for some in stacks]
        pairs = all_pairs[0]
        folders = _adapter_folders(pairs, adapters, adapter_names)
        writers = [AskedWriter(t.name, t.name if names_tiers else "", frozenset({t.name, t.fallback})) for t in tiers]
        for of_tier in folders.values():
            writers += [AskedWriter(name, name, frozenset({name}), record) for name, (_, record) in of_tier.items()]
        asked = [writer for writer in writers if not chosen or writer.name in chosen]
        tokenizer = load_tokenizer(pairs[tiers[0].name].full_path)
        first = [
            Prompt(chat_token_ids(tokenizer, text), generation_prompt_tokens(tokenizer, text), number)
            for number, text in enumerate(texts, 1)
        ]
        _check_prompts(texts, first, [next(iter(some.values())) for some in all_pairs[1:]])
        with connection.client() as client:
            served = check_stack(client.status(), all_pairs)
            together = [asked] if adapter_names else [[writer] for writer in asked]
            answers = [
                answers
                for group in together
                for answers in ask(client, texts, max_tokens, concurrency, report, [one.asked for one in group])
            ]
            prompts = [[*first] for _ in asked]
            for turn in range(2, turns + 1):
                for writer, of_writer, got in zip(asked, prompts, answers, strict=True):
                    more = next_turn(of_writer, got, first, turn)
                    tokens = [prompt.ids for prompt in more]
                    got += ask(client, tokens, max_tokens, concurrency, report, [writer.asked])[0]
                    of_writer += more
        references = [load_references(some) for some in stacks]
        for tier, of_tier in folders.items():
            adapted = {name: folder for name, (folder, _) in of_tier.items()}
            references[0] |= references[0][tier].with_adapters(adapted)
        revisions = {name: references[index] for name, index in served.items()}
        results = [
            judge_writer(revisions, writer, of_writer, got, max_tokens, report)
            for writer, of_writer, got in zip(asked, prompts, answers, strict=True)
        ]
    passed = all(result.summary.passed for result in results)
    total = JudgedWriter(
        "",
        [prompt for result in results for prompt in result.prompts],
        [answer for result in results for answer in result.judged],
        _total(result.usage for result in results),
        sum((result.revisions for result in results), Counter()),
    )
    rows = [
        ({"tier": result.name} if several else {}) | row
        for result in results
        for row in failures(result, tokenizer.decode)
    ]
    if as_json:
        of_tiers = {"tiers": [{"tier": result.name} | _figures(result) for result in results]} if several else {}
        print_json(_figures(total) | {"passed": passed} | of_tiers | {"failures": rows})
    else:
        if rows:
            _print_table(rows)
        width = max(len(result.name) for result in results)
        for result in results if several or turns > 1 else ():
            usage = result.usage
            cached = (
                f"{usage.cached_tokens} of {usage.prompt_tokens} prompt tokens from the prefix cache{sources(usage)}"
            )
            click.echo(f"{result.name:{width}}  {result.summary}; {cached}")
        if canary:
            click.echo(", ".join(f"revision {name!r}: {n} answers" for name, n in sorted(total.revisions.items())))
        click.echo(str(total.summary))
    return 0 if passed else 1


def _check_tiers(
    pair: str, tiers: tuple[TierSpec, ...], chosen: Iterable[str], adapters: Sequence[str]
) -> tuple[TierSpec, ...]:
    """Returns the tiers: with one pair there is one, called "default". Raises click.UsageError."""
    if tiers:
        check_replaced("pair")
    try:
        check_tiers(tiers)
    except ValueError as error:
        raise click.UsageError(f"--tier: {error}") from error
    for name in chosen:
        if name not in (known := [*(tier.name for tier in tiers), *adapters]):
            kind = "--tier or --adapter; those given" if adapters else "--tier; tiers"
            raise click.UsageError(f"--ask {name}: give it a {kind} are {', '.join(known) or 'none'}")
    return tiers or (TierSpec(name=DEFAULT_TIER, pair=pair),)


def _check_canary(
    pair: str | None, canary: tuple[TierSpec, ...], tiers: tuple[TierSpec, ...], adapters: Sequence[str]
) -> tuple[TierSpec, ...]:
    """Returns the tiers of the new revision; empty without one. Raises click.UsageError."""
    given = canary or ((TierSpec(name=DEFAULT_TIER, pair=pair),) if pair is not None else ())
    if not given:
        return ()
    if adapters:
        raise click.UsageError("--adapter: an adapter belongs to one revision's decoder; give no new revision")
    names = [sorted(tier.name for tier in some) for some in (given, tiers or (TierSpec(name=DEFAULT_TIER, pair=""),))]
    if (canary and pair is not None) or names[0] != names[1]:
        raise click.UsageError("give --canary-pair with --pair, or --canary-tier for each --tier")
    return given


def _check_prompts(texts: Sequence[str], first: Sequence[Prompt], pairs: Sequence[Pair]) -> None:
    """Raises CannotVerify if another of the pairs makes other tokens of a question than ``first``."""
    from overfill.pair.hf_model import chat_token_ids, load_tokenizer

    for pair in pairs:
        tokenizer = load_tokenizer(pair.full_path)
        if any(chat_token_ids(tokenizer, text) != prompt.ids for text, prompt in zip(texts, first, strict=True)):
            raise CannotVerify(
                f"{pair.folder} has another tokenizer or chat template than the first revision; verify one revision "
                "after the other, while the other one has no share"
            )


def _adapter_folders(
    pairs: Mapping[str, Pair], directory: Path | None, names: Sequence[str]
) -> dict[str, dict[str, tuple[Path, AdapterRecord]]]:
    """Returns tier -> adapter -> its folder and record, for the tier whose decoder each adapter is of.

    Raises:
        CannotVerify: no tier has an adapter's decoder.
        InvalidAdapter: an adapter is missing or its record is damaged.
    """
    from overfill.model.adapter import read_record
    from overfill.pair.adapters import default_folder, find_adapter

    tiers = {pair.decoder_digest: name for name, pair in pairs.items()}
    found: dict[str, dict[str, tuple[Path, AdapterRecord]]] = {}
    for name in dict.fromkeys(names):
        folder = find_adapter(directory or default_folder(next(iter(pairs.values()))), name)
        record = read_record(folder)
        if record.decoder_digest not in tiers:
            raise CannotVerify(f"{folder} is an adapter of another decoder than those of {', '.join(pairs)}")
        found.setdefault(tiers[record.decoder_digest], {})[name] = folder, record
    return found


def _figures(result: JudgedWriter) -> dict[str, Any]:
    summary = result.summary
    return {
        "passed": summary.passed,
        "answers": summary.answers,
        "correct": summary.correct,
        "identical": summary.identical,
        "ties": summary.ties,
        "tokens": summary.tokens,
        **{name: getattr(result.usage, name) for name in _COUNTS},
        "revisions": dict(result.revisions),
    }


def read_questions(file: Path) -> list[str]:
    """Reads the prompts of a JSON-lines file.

    Raises:
        click.UsageError: a line is not a question; the message names the line.
    """
    prompts = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt = row["prompt"] if "prompt" in row else row["turns"][0]
        except (ValueError, KeyError, IndexError, TypeError):
            prompt = None
        if not isinstance(prompt, str):
            raise click.UsageError(f"{file}, line {number}: expected a JSON object with a `prompt` or `turns`")
        prompts.append(prompt)
    if not prompts:
        raise click.UsageError(f"{file} has no questions")
    return prompts


def check_stack(status: StackStatus, all_pairs: Sequence[Mapping[str, Pair]]) -> dict[str, int]:
    """Returns, by the name of each revision that workers have, the index of its pairs in ``all_pairs``.

    Args:
        all_pairs: of each revision, tier -> its pair.

    Raises:
        CannotVerify: a worker does not answer. Or the workers of a revision run none of these pairs, or do not compute
            in float32, or its decode workers do not pull raw KV.
    """
    if unreachable := dict.fromkeys(w.id for w in status.workers if w.process is None):
        raise CannotVerify(f"{', '.join(unreachable)} does not answer, so its model is unknown; see `overfill status`")
    workers: dict[str, list[WorkerStatus]] = {}
    for worker in status.workers:
        workers.setdefault(worker.revision, []).append(worker)
    served = {}
    for revision, some in (workers or {"": []}).items():
        faults: dict[str, None] = {}
        for index, pairs in enumerate(all_pairs):
            try:
                _check_revision(some, pairs)
            except CannotVerify as error:
                faults[error.message] = None
            else:
                served[revision] = index
                break
        else:
            raise CannotVerify((f"revision {revision!r}: " if revision else "") + "; ".join(faults))
    return served


def _check_revision(some: Sequence[WorkerStatus], pairs: Mapping[str, Pair]) -> None:
    """Raises CannotVerify unless the workers run their tier's pair in float32 and decode workers pull raw KV."""
    workers = Counter(_tier_of(w) for w in some if w.stage == "decode")
    if not workers:
        raise CannotVerify("the stack has no decode worker that answers; see `overfill status`")
    if others := sorted(workers.keys() - pairs.keys()):
        every = " ".join(f"--tier {tier}=PAIR" for tier in sorted(workers))
        raise CannotVerify(f"the pair of tier {others[0]!r} is unknown: name the pair of every tier, {every}")
    if absent := [tier for tier in pairs if not workers[tier]]:
        raise CannotVerify(f"the stack has no decode worker of tier {absent[0]!r} that answers; see `overfill status`")
    for worker in some:
        _check_worker(worker, pairs)


def _tier_of(worker: WorkerStatus) -> str:
    return worker.tier or DEFAULT_TIER


def _check_worker(worker: WorkerStatus, pairs: Mapping[str, Pair]) -> None:
    process = worker.process
    if process is None or process.kv is None or process.model is None:
        raise CannotVerify(f"{worker.id} does not report its model")
    is_decode = worker.stage == "decode"
    cache_dtype = process.model.kv_cache_dtype
    if process.kv.dtype != "float32" or cache_dtype or (is_decode and process.codec != "raw"):
        codec = f", {process.codec} codec" if is_decode else ""
        cache = f", with a KV cache in {cache_dtype}" if cache_dtype else ""
        raise CannotVerify(
            f"{process.id} runs in {process.kv.dtype}{codec}{cache}; answers can be verified only in float32 with "
            "the raw codec and an unquantised KV cache: start the stack with `overfill up --dtype float32`"
        )
    pair = pairs[_tier_of(worker)] if is_decode else next(iter(pairs.values()))
    expected = {"full model": pair.full_digest, "tokenizer": pair.tokenizer_digest}
    found = {"full model": process.model.full_digest, "tokenizer": process.model.tokenizer_digest}
    if is_decode:
        expected["decoder"], found["decoder"] = pair.decoder_digest, process.model.decoder_digest
        expected["quantisation"], found["quantisation"] = pair.quantize, process.model.decoder_quantize or "none"
    if different := [part for part in expected if expected[part] != found[part]]:
        raise CannotVerify(
            f"{process.id} runs another pair than {pair.folder} ({', '.join(different)} differ); name the pair that "
            "the stack serves with --pair, or that of each tier with --tier; that of a new revision with "
            "--canary-pair or --canary-tier"
        )


def ask(
    client: Client,
    prompts: Sequence[str | Sequence[int]],
    max_tokens: int,
    concurrency: int,
    report: Report,
    writers: Sequence[str] = ("",),
) -> list[list[Answer | OverfillError]]:
    """Asks ``prompts`` and returns, by writer and in their order, the greedy answers or the errors.

    Args:
        prompts: texts, each as the only message of a chat, or token ids.
        writers: tiers and adapters; each prompt is asked of all before the next one. Empty means the stack's default.
    """
    from overfill.client import Message, SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=max_tokens)

    def answer(prompt: str | Sequence[int], writer: str) -> Answer | OverfillError:
        asked = [Message("user", prompt)] if isinstance(prompt, str) else prompt
        try:
            return client.generate(asked, sampling=sampling, tier=writer)
        except OverfillError as error:
            return error

    with ThreadPoolExecutor(concurrency) as pool:
        futures = [pool.submit(answer, prompt, writer) for prompt in prompts for writer in writers]
        for done, _ in enumerate(as_completed(futures), 1):
            report(f"Asking {', '.join(filter(None, writers))}".strip(), done, len(futures))
    return [[future.result() for future in futures[number :: len(writers)]] for number in range(len(writers))]


def next_turn(
    prompts: Sequence[Prompt], answers: Sequence[Answer | OverfillError], first: Sequence[Prompt], turn: int
) -> list[Prompt]:
    """Returns the prompts of turn ``turn``: each of the turn before, its answer, and another question of the file.

    A question without an answer has no further turn.

    Args:
        prompts, answers: all before.
        first: the prompts of the first turn, in the order of the questions.
    """
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        if prompt.turn == turn - 1 and not isinstance(answer, OverfillError):
            question = first[(prompt.question + turn - 2) % len(first)]
            ids = [*prompt.ids, *answer.token_ids, *question.ids]
            found.append(Prompt(ids, 0, prompt.question, turn))
    return found


def judge_writer(
    revisions: Mapping[str, Mapping[str, TwoStageReference]],
    writer: AskedWriter,
    prompts: Sequence[Prompt],
    answers: Sequence[Answer | OverfillError],
    max_tokens: int,
    report: Report,
) -> JudgedWriter:
    """Judges the answers to ``prompts`` that were asked of ``writer``, each by the revision that it names.

    Only a tier's fallback may go on with an answer.

    Args:
        revisions: revision that is served -> tier or adapter -> its reference.
    """
    judged: list[JudgedAnswer] = []
    named: Counter[str] = Counter()
    for prompt, answer in zip(prompts, answers, strict=True):
        start, problem = None, ""
        if writer.adapter is not None:
            start = answer_start(len(prompt.ids), writer.adapter.tail_tokens, prompt.generation_prompt)
            problem = _problem(answer, writer.adapter, start)
        references = next(iter(revisions.values()))
        if not isinstance(answer, OverfillError):
            name = answer.identity.revision
            named[name] += 1
            references = revisions.get(name, references)
            problem = problem or _mixture(answer, revisions)
        one = judge_answer(references, prompt.ids, answer, max_tokens, writer.allowed, start)
        judged.append(replace(one, problem=one.problem or problem or None))
        report(f"Judging {writer.name}", len(judged), len(answers))
    usages = (answer.usage for answer in answers if not isinstance(answer, OverfillError))
    return JudgedWriter(writer.name, prompts, judged, _total(usages), named)


def _total(usages: Iterable[Any]) -> common_pb2.Usage:
    """Returns the sums of the answers' ``_COUNTS``."""
    from overfill.v1 import common_pb2

    total = common_pb2.Usage()
    for usage in usages:
        for name in _COUNTS:
            setattr(total, name, getattr(total, name) + getattr(usage, name))
    return total


def _mixture(answer: Answer, revisions: Mapping[str, Mapping[str, TwoStageReference]]) -> str:
    """Says what is wrong if the answer's identity is not that of the revision that it names; empty if nothing is."""
    identity, known = answer.identity, ", ".join(map(repr, revisions))
    if (references := revisions.get(identity.revision)) is None:
        return f"names the revision {identity.revision!r}; the stack's workers have {known}"
    if not identity.full_digest:
        return ""  # of a router that says nothing of its pairs
    pairs = [reference.pair for reference in references.values()]
    if different := [name for name in _DIGESTS if getattr(identity, name) not in {getattr(p, name) for p in pairs}]:
        return f"names the revision {identity.revision!r}, whose pair has another {' and '.join(different)}"
    return ""


def _problem(answer: Answer | OverfillError, adapter: AdapterRecord, start: int) -> str:
    """Says what is wrong if another adapter wrote the answer, or the decoder began elsewhere; empty if nothing is."""
    if isinstance(answer, OverfillError):
        return ""
    found = (answer.identity.adapter_digest, answer.identity.answer_start) if answer.identity else ("", 0)
    if found == (adapter.digest, start):
        return ""
    return "was written by adapter {!r} from prompt token {} on; the adapter's record implies {!r} and {}".format(
        *found, adapter.digest, start
    )


def judge_answer(
    references: Mapping[str, TwoStageReference],
    prompt_ids: Sequence[int],
    answer: Answer | OverfillError,
    max_tokens: int,
    allowed: Iterable[str] = (DEFAULT_TIER,),
    answer_start: int | None = None,
) -> JudgedAnswer:
    """Judges one served answer; an error becomes a judged answer with a problem.

    Args:
        references: tier or adapter -> its reference.
        prompt_ids: the prompt's tokens, as plain transformers reads it.
        allowed: tiers or adapters that may write the answer.
        answer_start: index of the first prompt token that the decoder computes; None means the prompt's length.
    """
    from overfill.pair.reference import JudgedAnswer, judge_parts

    if isinstance(answer, OverfillError):
        return JudgedAnswer((), f"no answer: {answer}")
    if answer.usage.prompt_tokens != len(prompt_ids):
        counts = f"the stack counts {answer.usage.prompt_tokens} prompt tokens, the reference {len(prompt_ids)}"
        return JudgedAnswer((), f"{counts}: their tokenizers or chat templates differ")
    parts = [(part.tier, part.first_index) for part in answer.parts]
    if unasked := [(tier, index) for tier, index in parts if tier not in allowed]:
        return JudgedAnswer((), "tier {!r} wrote the tokens from {} on, which was not asked for".format(*unasked[0]))
    reason = answer.finish_reason
    return judge_parts(references, parts, prompt_ids, answer.token_ids, reason, max_tokens, answer_start=answer_start)


def failures(result: JudgedWriter, decode: Callable[[list[int]], Any]) -> list[dict[str, Any]]:
    """Returns one row per incorrect answer, with its first wrong token; questions and turns count from 1."""
    rows: list[dict[str, Any]] = []
    for prompt, answer in zip(result.prompts, result.judged, strict=True):
        where = {"question": prompt.question, "turn": prompt.turn}
        if answer.problem is not None:
            rows.append(where | {"problem": answer.problem})
        elif (error := answer.first_error) is not None:
            rows.append(
                where
                | {
                    "problem": "wrong token",
                    "index": error.index,
                    "token_id": error.token_id,
                    "token": decode([error.token_id]),
                    "reference_id": error.reference_id,
                    "reference": decode([error.reference_id]),
                    "margin": error.margin,
                }
            )
    return rows


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    from overfill.cli.output import console

    tier = ["tier"] if "tier" in rows[0] else []
    table = Table(*tier, "question", "turn", "problem", "index", "token", "reference", "margin", box=None)
    for row in rows:
        cells = [*(row[name] for name in tier), str(row["question"]), str(row["turn"]), row["problem"]]
        if "index" in row:
            cells += [str(row["index"]), f"{row['token_id']} {row['token']!r}"]
            cells += [f"{row['reference_id']} {row['reference']!r}", f"{row['margin']:.4f}"]
        # Text, because rich would read brackets in tokens as markup.
        table.add_row(*map(Text, cells))
    console().print(table)
