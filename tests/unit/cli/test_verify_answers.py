"""``overfill verify`` without a stack: a fake client answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner
from peft_adapters import add_tiny_adapter

from overfill.cli import verify
from overfill.client import AnswerIdentity, AnswerPart
from overfill.errors import Unavailable
from overfill.making.tiny import make_tiny_pair
from overfill.model.adapter import read_record
from overfill.pair.hf_model import chat_token_ids, load_tokenizer
from overfill.pair.reference import TwoStageReference, load_references
from overfill.settings.tiers import TierSpec

QUESTIONS = ["What is a bridge?", "Explain rivers.", "Count to 10."]
MAX_TOKENS = 6


class Stack:
    """Answers as the reference does, unless ``tamper`` changes an answer. It has one tier, unless ``tiers`` says."""

    def __init__(self, folder: Path) -> None:
        self.reference = TwoStageReference(folder)
        self.tiers = {"": self.reference}
        self.revisions = {"": self.reference}  # with several, the questions take turns
        self.tokenizer = load_tokenizer(folder / "full")
        self.starts: dict[str, Callable[[list[int]], int]] = {}  # of adapters: where the decoder takes over
        self.digests: dict[str, str] = {}
        self.asked: list[str] = []
        self.further: list[list[int]] = []  # prompts after the first turn
        self.tamper: Callable[[int, SimpleNamespace], SimpleNamespace] = lambda index, answer: answer
        self.processes = [self.process("prefill", None), self.process("decode", "raw")]

    def process(self, stage: str, codec: str | None, reference: TwoStageReference | None = None) -> SimpleNamespace:
        pair = (reference or self.reference).pair
        model = SimpleNamespace(
            full_digest=pair.full_digest,
            tokenizer_digest=pair.tokenizer_digest,
            decoder_digest=pair.decoder_digest if stage == "decode" else "",
            decoder_quantize="",
            kv_cache_dtype="",
        )
        kv = SimpleNamespace(dtype="float32")
        return SimpleNamespace(id=f"{stage}-0", stage=stage, kv=kv, model=model, codec=codec)

    def status(self) -> SimpleNamespace:
        tiers = [None, *self.tiers]  # the first process is the prefill worker
        workers = [
            SimpleNamespace(id=p.id, stage=p.stage, process=p, tier=t or None, revision="")
            for p, t in zip(self.processes, tiers, strict=False)
        ]
        if len(self.revisions) > 1:
            workers = [
                SimpleNamespace(id=p.id, stage=p.stage, process=p, tier=None, revision=name)
                for name, reference in self.revisions.items()
                for p in (self.process("prefill", None, reference), self.process("decode", "raw", reference))
            ]
        return SimpleNamespace(workers=workers)

    def generate(self, prompt: list[Any], sampling: Any, tier: str) -> SimpleNamespace:
        assert sampling.greedy
        self.asked.append(tier)
        question = None if isinstance(prompt[0], int) else QUESTIONS.index(prompt[0].content)
        ids = prompt if question is None else chat_token_ids(self.tokenizer, prompt[0].content)
        start = self.starts[tier](ids) if tier in self.starts else None
        revision = [*self.revisions][(question or 0) % len(self.revisions)]
        writer = self.revisions[revision] if revision else self.tiers[tier]
        token_ids = writer.generate(ids, sampling.max_tokens, start)
        pair = writer.pair
        answer = SimpleNamespace(
            parts=(AnswerPart(tier or "default", 0),),
            token_ids=tuple(token_ids),
            finish_reason="length" if len(token_ids) == sampling.max_tokens else "stop",
            identity=AnswerIdentity(
                full_digest=pair.full_digest,
                config_digest=pair.config_digest,
                tokenizer_digest=pair.tokenizer_digest,
                decoder_digest=pair.decoder_digest,
                decoder_config_digest=pair.decoder_config_digest,
                adapter_digest=self.digests.get(tier, ""),
                revision=revision,
                answer_start=start or 0,
            ),
            usage=SimpleNamespace(
                prompt_tokens=len(ids),
                cached_tokens=16 if tier == "fast" else 8 if tier == "full" else 0,
                peer_tokens=12 if tier == "fast" else 0,
                disk_tokens=1 if tier == "fast" else 0,
            ),
        )
        if question is None:
            self.further.append(ids)
        return self.tamper(len(QUESTIONS) if question is None else question, answer)


@pytest.fixture
def stack(tiny_pair: Path, monkeypatch: pytest.MonkeyPatch) -> Stack:
    stack = Stack(tiny_pair)

    @contextmanager
    def connect(*args: object) -> Iterator[Stack]:
        yield stack

    monkeypatch.setattr("overfill.cli.options.ClientConnection.client", connect)
    return stack


@pytest.fixture
def run(stack: Stack, tiny_pair: Path, tmp_path: Path) -> Callable[..., Any]:
    file = tmp_path / "questions.jsonl"
    rows = [{"prompt": QUESTIONS[0]}, {"question_id": 81, "turns": [QUESTIONS[1], "More."]}, {"prompt": QUESTIONS[2]}]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")

    def run(*arguments: str) -> Any:
        command = ["--questions", str(file), "--max-tokens", str(MAX_TOKENS), *arguments]
        command += [] if any("--tier" in argument for argument in arguments) else ["--pair", str(tiny_pair)]
        return CliRunner().invoke(verify.verify_command, command, standalone_mode=False)

    return run


def last_line(result: Any) -> str:
    return str(result.stdout.splitlines()[-1])


def test_right_answers_pass(run: Callable[..., Any]) -> None:
    result = run()
    assert result.return_value == 0, result.output
    assert result.stdout == "3/3 correct (3 identical, 0 ties)\n"
    assert last_line(run("--limit", "2", "--concurrency", "1")) == "2/2 correct (2 identical, 0 ties)"


def changed_token(index: int, answer: SimpleNamespace) -> SimpleNamespace:
    if index == 1:
        answer.token_ids = (*answer.token_ids[:2], (answer.token_ids[2] + 1) % 512, *answer.token_ids[3:])
    return answer


def test_a_changed_token_fails_and_is_shown(stack: Stack, run: Callable[..., Any]) -> None:
    stack.tamper = changed_token
    result = run()
    assert result.return_value == 1
    assert last_line(result) == "2/3 correct (2 identical, 0 ties)"
    assert "wrong token" in result.stdout
    report = json.loads(run("--json").stdout)
    assert (report["passed"], report["correct"]) == (False, 2)
    (failure,) = report["failures"]
    assert (failure["question"], failure["index"]) == (2, 2)
    assert failure["margin"] > 1e-3


def lost(index: int, answer: SimpleNamespace) -> SimpleNamespace:
    if index == 0:
        raise Unavailable("the router is gone")
    return answer


def cut_short(index: int, answer: SimpleNamespace) -> SimpleNamespace:
    if index == 0:
        answer.token_ids = answer.token_ids[:-1]
    return answer


def other_prompt(index: int, answer: SimpleNamespace) -> SimpleNamespace:
    if index == 0:
        answer.usage.prompt_tokens += 1
    return answer


@pytest.mark.parametrize("tamper", [lost, cut_short, other_prompt])
def test_an_answer_that_is_missing_or_not_to_this_prompt_fails(
    tamper: Callable[..., Any], stack: Stack, run: Callable[..., Any]
) -> None:
    stack.tamper = tamper
    result = run()
    assert result.return_value == 1
    assert last_line(result) == "2/3 correct (2 identical, 0 ties)"


def test_further_turns_go_on_with_the_served_tokens_and_are_judged(stack: Stack, run: Callable[..., Any]) -> None:
    first = [chat_token_ids(stack.tokenizer, question) for question in QUESTIONS]
    answers = [stack.reference.generate(ids, MAX_TOKENS) for ids in first]
    result = run("--turns", "3", "--concurrency", "1")
    assert result.return_value == 0, result.output
    assert last_line(result) == "9/9 correct (9 identical, 0 ties)"
    assert stack.further[:3] == [[*first[i], *answers[i], *first[(i + 1) % 3]] for i in range(3)]
    for before, after in zip(stack.further[:3], stack.further[3:], strict=True):
        assert after[: len(before)] == before

    def changed_later(index: int, answer: SimpleNamespace) -> SimpleNamespace:
        if index == len(QUESTIONS) and len(stack.further) == 5:  # the third turn of the second question
            answer.token_ids = ((answer.token_ids[0] + 1) % 512, *answer.token_ids[1:])
        return answer

    stack.tamper = changed_later
    stack.further.clear()
    report = json.loads(run("--turns", "3", "--concurrency", "1", "--json").stdout)
    assert [(row["question"], row["turn"], row["index"]) for row in report["failures"]] == [(2, 3, 0)]


def test_a_lost_answer_has_no_further_turn(stack: Stack, run: Callable[..., Any]) -> None:
    stack.tamper = lost
    result = run("--turns", "2")
    assert result.return_value == 1
    assert last_line(result) == "4/5 correct (4 identical, 0 ties)"


@pytest.fixture
def tiered(stack: Stack, tiny_tiers: tuple[TierSpec, ...]) -> list[str]:
    """Makes a stack with three tiers of it; returns the options that name them."""
    stack.tiers = load_references(tiny_tiers)
    stack.reference = stack.tiers["full"]
    stack.processes = [
        stack.process("prefill", None),
        *(stack.process("decode", "raw", r) for r in stack.tiers.values()),
    ]
    return [f"--tier={tier}" for tier in tiny_tiers]


def test_an_answer_of_another_tier_is_wrong_or_was_not_asked_for(
    stack: Stack, tiered: list[str], run: Callable[..., Any]
) -> None:
    """A worker of the tier fast that runs the decoder of default, and one that says so."""
    stack.tiers["fast"] = stack.tiers["default"]
    report = json.loads(run(*tiered, "--json").stdout)
    assert [(tier["tier"], tier["passed"], tier["correct"]) for tier in report["tiers"]] == [
        ("full", True, 3), ("default", True, 3), ("fast", False, 0),
    ]  # fmt: skip
    assert (report["passed"], report["correct"], report["prompt_tokens"]) == (False, 6, 159)
    assert {(row["tier"], row["problem"], row["index"]) for row in report["failures"]} == {("fast", "wrong token", 1)}
    cached = [report[name] for name in ("cached_tokens", "peer_tokens", "disk_tokens")]
    assert cached == [72, 36, 3]
    full, default, fast, _ = run(*tiered).stdout.splitlines()[-4:]
    assert full.endswith("24 of 53 prompt tokens from the prefix cache")
    assert default.endswith("0 of 53 prompt tokens from the prefix cache")
    assert fast.endswith("48 of 53 prompt tokens from the prefix cache: memory 9, peer 36, disk 3")

    def continued(index: int, answer: SimpleNamespace) -> SimpleNamespace:
        answer.parts = (AnswerPart("fast", 0), AnswerPart("default", 1))
        return answer

    stack.tamper = continued
    (row,) = json.loads(run(*tiered, "--ask=fast", "--limit=1", "--json").stdout)["failures"]
    assert row["problem"] == "tier 'default' wrote the tokens from 1 on, which was not asked for"
    assert run(*tiered[:2], f"{tiered[2]},fallback=default", "--ask=fast").return_value == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tier=a=x", "--pair=x"], "--tier conflicts with --pair (also"),
        (["--tier=a=x", "--tier=a=y"], "two tiers have the name 'a'"),
        (["--adapters=."], "--adapters needs --adapter"),
        (["--tier=a=x", "--ask=b"], "--ask b: give it a --tier; tiers are a"),
        (["--tier=a=x", "--canary-pair=y"], "--canary-tier for each --tier"),
        (["--canary-tier=a=x"], "--canary-tier for each --tier"),
        (["--canary-pair=y", "--adapter=a"], "--adapter: an adapter belongs to one revision"),
    ],
)
def test_tiers_that_contradict_each_other_are_bad_usage(options: list[str], says: str, tmp_path: Path) -> None:
    file = tmp_path / "q"
    file.write_text('{"prompt": "a"}')
    command = ["--questions", str(file), "--max-tokens", "2", *options]
    result = CliRunner().invoke(verify.verify_command, command, standalone_mode=False)
    assert isinstance(result.exception, click.UsageError)
    assert says in str(result.exception)


@pytest.mark.parametrize("content", ["", "[]\n", "{}\n", '{"prompt": 3}\n', '{"turns": []}\n', "not json\n"])
def test_a_file_without_questions_is_bad_usage(content: str, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(content)
    with pytest.raises(click.UsageError, match="questions"):
        verify.read_questions(file)


@pytest.fixture
def rolling(stack: Stack, tmp_path: Path) -> str:
    """Makes a stack with two revisions of it, which share no weights; returns the option that names the new pair."""
    new = make_tiny_pair(tmp_path / "new", seed=1)
    stack.revisions = {"r1": stack.reference, "r2": TwoStageReference(new)}
    return f"--canary-pair={new}"


def test_each_answer_is_judged_by_the_pair_of_the_revision_that_it_names(
    stack: Stack, rolling: str, run: Callable[..., Any]
) -> None:
    report = json.loads(run(rolling, "--json").stdout)
    assert (report["identical"], report["revisions"]) == (3, {"r1": 2, "r2": 1})
    assert isinstance(run().exception, verify.CannotVerify), "the pair of r2 is unknown"


def of_the_other_weights(stack: Stack, answer: SimpleNamespace) -> None:
    answer.token_ids = tuple(stack.reference.generate(chat_token_ids(stack.tokenizer, QUESTIONS[1]), MAX_TOKENS))


def of_another_pair(stack: Stack, answer: SimpleNamespace) -> None:
    pair = stack.reference.pair
    answer.identity = replace(answer.identity, full_digest=pair.full_digest, decoder_digest=pair.decoder_digest)


def of_no_revision(stack: Stack, answer: SimpleNamespace) -> None:
    answer.identity = replace(answer.identity, revision="r3")


@pytest.mark.parametrize(
    ("mixed", "says"),
    [
        (of_the_other_weights, "wrong token"),
        (of_another_pair, "names the revision 'r2', whose pair has another full_digest and decoder_digest"),
        (of_no_revision, "names the revision 'r3'; the stack's workers have 'r1', 'r2'"),
    ],
)
def test_an_answer_that_mixes_revisions_is_wrong(
    mixed: Callable[..., None], says: str, stack: Stack, rolling: str, run: Callable[..., Any]
) -> None:
    def tamper(index: int, answer: SimpleNamespace) -> SimpleNamespace:
        if index == 1:
            mixed(stack, answer)
        return answer

    stack.tamper = tamper
    result = run(rolling, "--json")
    assert result.return_value == 1
    (row,) = json.loads(result.stdout)["failures"]
    assert (row["question"], row["problem"]) == (2, says)


@pytest.fixture
def adapted(stack: Stack, tiny_pair: Path, tmp_path: Path) -> list[str]:
    """Makes a stack with two adapters, the second with a tail of its own; returns the options that name them."""
    pair, folder = stack.reference.pair, tmp_path / "adapters"
    folders = {
        name: add_tiny_adapter(pair, folder, name, seed=tail, tail_tokens=tail)
        for name, tail in (("planner", 0), ("coder", 7))
    }
    stack.tiers |= stack.reference.with_adapters(folders)
    stack.digests = {name: read_record(path).digest for name, path in folders.items()}
    # "<|im_start|>assistant\n" begins with a special token.
    opening = stack.tokenizer.convert_tokens_to_ids("<|im_start|>")
    stack.starts = {"planner": lambda ids: len(ids) - 1 - ids[::-1].index(opening), "coder": lambda ids: len(ids) - 7}
    # One at a time, because the references of both adapters share one model.
    return [f"--adapters={folder}", "--adapter=planner", "--adapter=coder", "--concurrency=1"]


def test_adapters_are_asked_in_one_batch_and_judged_with_their_own_start(
    stack: Stack, adapted: list[str], run: Callable[..., Any]
) -> None:
    report = json.loads(run(*adapted, "--json").stdout)
    assert [(tier["tier"], tier["identical"]) for tier in report["tiers"]] == [
        ("default", 3), ("planner", 3), ("coder", 3),
    ]  # fmt: skip
    assert stack.asked == ["", "planner", "coder"] * 3
    assert run(*adapted, "--ask=coder").stdout.splitlines()[-1] == "3/3 correct (3 identical, 0 ties)"


@pytest.mark.parametrize("fault", ["weights", "digest", "start"])
def test_an_answer_of_another_adapter_or_start_is_wrong(
    fault: str, stack: Stack, adapted: list[str], run: Callable[..., Any]
) -> None:
    if fault == "weights":
        stack.tiers["coder"] = stack.tiers["planner"]
    elif fault == "digest":
        stack.digests["coder"] = stack.digests["planner"]
    else:
        stack.starts["coder"] = lambda ids: len(ids) - 6
    result = run(*adapted, "--json")
    report = json.loads(result.stdout)
    assert [tier["correct"] for tier in report["tiers"]] == [3, 3, 0]
    problems = {row["problem"] for row in report["failures"]}
    assert result.return_value == 1
    if fault == "weights":
        assert problems == {"wrong token"}
    else:
        assert all("the adapter's record implies" in problem for problem in problems)


def test_adapters_that_no_tier_can_use_are_not_asked(
    stack: Stack, adapted: list[str], run: Callable[..., Any], tmp_path: Path
) -> None:
    other = make_tiny_pair(tmp_path / "other", decoder_seed=1)
    result = run(*adapted, f"--tier=a={other}")
    assert isinstance(result.exception, verify.CannotVerify)
    assert "planner is an adapter of another decoder than those of a" in str(result.exception)
    assert "has no adapter 'x'; there are coder, planner" in str(run(*adapted, "--adapter=x").exception)
    assert "--ask x: give it a --tier or --adapter; those given are planner, coder" in str(
        run(*adapted, "--ask=x").exception
    )
    assert stack.asked == []
