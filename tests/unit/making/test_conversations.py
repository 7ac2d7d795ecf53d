from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from overfill.api.tokenizer import Tokenizer
from overfill.cli.pair import calibrate_command
from overfill.errors import InvalidRequest
from overfill.making.calibration import calibration_text
from overfill.making.conversations import (
    Conversation,
    ShippedPart,
    append_jsonl,
    encode,
    read_conversations,
    shipped_conversations,
)
from overfill.making.mixed_kinds import KINDS, LONG_TOKENS, mixed_conversations
from overfill.making.overlap import TextDigests
from overfill.making.synthetic_data import QUESTION_SAMPLING, SELF_SEED, generate_conversations
from overfill.pair.llm import Completion
from overfill.request.params import SamplingParams


def chat(question: str, answer: str) -> Conversation:
    return Conversation(({"role": "user", "content": question}, {"role": "assistant", "content": answer}))


def test_conversations_survive_a_file(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    chats = [
        replace(chat("What is 1 + 1?", "2"), finished=False, kind="explain"),
        chat("北京在哪里?", "In China.\nIn the north."),
    ]
    append_jsonl(file, chats[:1])
    append_jsonl(file, chats[1:])
    assert read_conversations(file) == chats


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[]",
        '{"messages": "text"}',
        '{"messages": [{"role": "user", "content": "only a question"}]}',
        '{"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": "a"}]}',
        '{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "q"}]}',
    ],
)
def test_a_line_that_is_no_chat_is_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    append_jsonl(file, [chat("What is 1 + 1?", "2")])
    with file.open("a") as out:
        out.write(line + "\n")
    with pytest.raises(InvalidRequest, match=r"chats\.jsonl:2"):
        read_conversations(file)


def test_a_transcript_is_the_prompt_the_answer_and_its_end(tiny_pair: Path) -> None:
    tokenizer = Tokenizer.load(tiny_pair / "full")
    (transcript,) = encode([chat("How does this work?", "Step by step.")], tokenizer)
    prompt = tokenizer.encode_chat([{"role": "user", "content": "How does this work?"}])
    assert list(transcript.prompt) == prompt
    assert tokenizer.decode(transcript.answer) == "Step by step."
    assert transcript.answer[-1] in tokenizer.eos_token_ids
    cut = encode([chat("How does this work?", "Step by step.")], tokenizer, max_tokens=len(prompt) + 2)
    assert cut[0].token_ids == transcript.token_ids[: len(prompt) + 2]
    assert encode([chat("How does this work?", "Step by step.")], tokenizer, max_tokens=len(prompt)) == []


def test_shipped_parts_share_no_question() -> None:
    calibration, development = (shipped_conversations(part) for part in ("calibration", "development"))
    assert len(development) >= 30
    questions = [c.messages[0]["content"] for c in (*calibration, *development)]
    assert len(set(questions)) == len(questions)


def test_the_test_set_shares_no_run_of_words_with_other_shipped_text() -> None:
    def with_answers(part: ShippedPart) -> list[Conversation]:
        """Conversations in which all messages are users', and so compared as well."""
        return [
            replace(c, messages=tuple({**message, "role": "user"} for message in (*c.messages, c.messages[-1])))
            for c in shipped_conversations(part)
        ]

    others = TextDigests.of([*with_answers("calibration"), *with_answers("development")])
    judged = shipped_conversations("test")
    assert others.overlapping(with_answers("test")) == []
    # Four follow-up questions failed; reported figures are on the set as it is.
    messages = {(kind, 2): 24 for kind in KINDS} | {("dialogue", 4): 20, ("dialogue", 2): 4}
    assert Counter((c.kind, len(c.messages)) for c in judged) == messages


class Author:
    """Replaces the engine; questions and answers depend on the seeds only."""

    def __init__(self, pair: str, **_: object) -> None:
        self.tokenizer = Tokenizer.load(Path(pair) / "full")

    def generate(self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]) -> list[Completion]:
        opening = self.tokenizer.encode_user_opening()
        if sampling and sampling[0] == replace(QUESTION_SAMPLING, seed=sampling[0].seed):
            asked = [self._question if prompt == opening else self._follow_up for prompt in prompts]
            return [question(s.seed or 0) for question, s in zip(asked, sampling, strict=True)]
        return [self._answer(prompt) for prompt in prompts]

    def _follow_up(self, seed: int) -> Completion:
        return Completion(f" And {seed}, then? ", [5] * 20, "length" if seed % 2 else "stop", 1)

    def _question(self, seed: int) -> Completion:
        kinds = (f"What is {seed // 8} + 1?", f"What is {seed // 8} + 1?", "Hm?", f"How does {seed}", "\ufffd" * 20)
        kind = min(seed % 8, 4)
        return Completion(f"{kinds[kind]} ", [5] * 20, "length" if kind == 3 else "stop", 1)

    def _answer(self, prompt: list[int]) -> Completion:
        asked = self.tokenizer.decode(prompt)
        tokens = 3 if "+ 1" in asked and " 1 +" in asked else 20
        return Completion(f" It is this: {len(asked)}. ", [5] * tokens, "length", len(prompt))


def test_what_a_model_writes_is_filtered_and_repeatable(tiny_pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overfill.making.synthetic_data.LLM", Author)

    def write(seed: int) -> list[Conversation]:
        return list(generate_conversations(tiny_pair / "full", 10, seed=seed))

    chats = write(0)
    # Questions 0 and 2 to 10 remain: each once, neither cut off, short nor garbled, nor answered in 3 tokens.
    assert [c.messages[0]["content"] for c in chats] == [f"What is {n} + 1?" for n in (0, *range(2, 11))]
    assert all(c.messages[-1]["content"].startswith("It is this") for c in chats)
    assert write(0) == chats
    assert write(1) != chats


def test_mixed_kinds_are_questions_about_what_the_model_wrote(tiny_pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overfill.making.synthetic_data.LLM", Author)
    plain = [chat(f"What is {n}?", " ".join([f"Text{n}"] * 90)) for n in range(60)]

    def write(seed: int) -> list[Conversation]:
        return list(mixed_conversations(tiny_pair / "full", plain, 60, part="test", seed=seed))

    chats = write(0)
    assert write(0) == chats
    assert write(1) != chats
    kinds = Counter(c.kind for c in chats)
    assert set(kinds) == set(KINDS)
    assert 60 - len(chats) == kinds["dialogue"] == 5  # every second follow-up question is cut off
    unused = iter([m["content"] for m in own.messages] for own in plain)
    for c in chats:
        *earlier, question, answer = (message["content"] for message in c.messages)
        assert answer.startswith("It is this")
        if c.kind == "long":
            assert question.startswith("Text 1: Text")
            assert len(Tokenizer.load(tiny_pair / "full").encode(question)) <= LONG_TOKENS[1] + 100
            continue
        prompt = c.messages[0]["content"]
        first, text = next(texts for texts in unused if any(t in prompt for t in texts))
        if c.kind == "dialogue":
            assert earlier == [first, text]
            assert question.startswith("And ")
        elif c.kind == "explain":
            assert question == first
        else:
            assert text in question
            assert question != text
    with pytest.raises(InvalidRequest, match="at least 2"):
        list(mixed_conversations(tiny_pair / "full", plain[:1], 2))


def calibrate(tiny_pair: Path, out: Path, *options: str) -> Result:
    arguments = ["--full", str(tiny_pair / "full"), "--count", "10", "--out", str(out), *options]
    return CliRunner().invoke(calibrate_command, arguments)


def test_calibrate_and_self_calibration_draw_different_questions(
    tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise, text that a user holds out with ``calibrate`` is what ``build --calibration self`` fitted on."""
    monkeypatch.setattr("overfill.making.synthetic_data.LLM", Author)
    out = tmp_path / "chats.jsonl"
    assert calibrate(tiny_pair, out).exit_code == 0
    fitted = calibration_text("self", tiny_pair / "full", 1000)
    assert not {c.prompt for c in fitted} & {c.prompt for c in read_conversations(out)}
    refused = calibrate(tiny_pair, out, "--seed", str(SELF_SEED))
    assert refused.exit_code == 2
    assert "4294967295 is not in the range 0<=x<=4294967294" in refused.output


def test_calibrating_again_appends_other_conversations(
    tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overfill.making.synthetic_data.LLM", Author)
    out, mixed = tmp_path / "chats.jsonl", tmp_path / "mixed.jsonl"
    for _ in range(3):
        result = calibrate(tiny_pair, out)
        assert result.exit_code == 0, result.output
    prompts = [c.prompt for c in read_conversations(out)]
    assert len(prompts) == len(set(prompts)) == 30

    assert calibrate(tiny_pair, mixed, "--mix", str(out)).exit_code == 0
    before = mixed.read_text()
    assert calibrate(tiny_pair, mixed, "--mix", str(out)).exit_code == 0
    assert mixed.read_text() == before


def test_a_file_of_something_else_is_not_appended_to(tiny_pair: Path, tmp_path: Path) -> None:
    out = tmp_path / "notes.txt"
    out.write_text("buy milk\n")
    result = calibrate(tiny_pair, out)
    assert isinstance(result.exception, InvalidRequest)
    assert f"out: {out}:1 is not" in str(result.exception)
    assert out.read_text() == "buy milk\n"


def test_an_unknown_source_of_calibration_text_is_refused(tiny_pair: Path) -> None:
    for source in ("nothing", "some/where.jsonl"):
        with pytest.raises(InvalidRequest, match="calibration"):
            calibration_text(source, tiny_pair / "full", 1000)
