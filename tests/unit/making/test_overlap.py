"""Digests of the text that made a decoder, and the commands that compare judged text with them."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from overfill.cli import distill
from overfill.cli.distill import distill_command
from overfill.cli.evaluate import eval_command
from overfill.errors import InvalidPair, InvalidRequest
from overfill.making import overlap
from overfill.making.build import build_pair
from overfill.making.conversations import Conversation, append_jsonl
from overfill.making.overlap import DIGESTS_FILE, TextDigests
from overfill.making.recipe import DecoderRecipe
from overfill.making.tiny import make_tiny_pair
from overfill.model.manifest import Pair


def chat(question: str, answer: str = "It is a river, a bridge and the people who cross it.") -> Conversation:
    return Conversation(({"role": "user", "content": question}, {"role": "assistant", "content": answer}))


FITTED = [chat(f"What is {n} and {n + 1} and {n + 2}, if you please?") for n in range(30)]
OTHERS = [chat(f"How does the number {n} follow {n - 1} in our questions?") for n in range(100, 104)]


@pytest.fixture
def built(tiny_pair: Path, tmp_path: Path) -> Pair:
    recipe = DecoderRecipe(intermediate_size=64, fit="none")
    return build_pair(tiny_pair / "full", tmp_path / "built", recipe, FITTED, calibration="chats.jsonl")


def write(file: Path, conversations: list[Conversation]) -> str:
    append_jsonl(file, conversations)
    return str(file)


@pytest.mark.parametrize(
    ("question", "found"),
    [
        ("One, two three four five six seven eight nine?", [1]),
        ("Zero: two three four five six seven eight NINE", [1]),
        ("one two three four five six seven", []),
        ("Short question?", [1]),
        ("A short question?", []),
    ],
)
def test_a_run_of_eight_words_in_a_question_is_an_overlap(question: str, found: list[int]) -> None:
    digests = TextDigests.of([chat("one two three four five six seven eight nine"), chat("Short question")])
    assert digests.overlapping([chat("Something else?"), chat(question)]) == found


def test_only_what_users_wrote_is_compared() -> None:
    earlier, question = (
        chat("Short question", "one two three four five six seven eight"),
        chat("What else?", "Nothing."),
    )
    system = {"role": "system", "content": "nine ten eleven twelve one two three four"}
    dialogue = Conversation((system, *earlier.messages, *question.messages))
    digests = TextDigests.of([dialogue])
    judged = [chat(message["content"]) for message in dialogue.messages]
    assert digests.overlapping(judged) == [1, 3]
    assert TextDigests.of(judged).overlapping([dialogue]) == [0]
    assert TextDigests.of([judged[0], judged[2], judged[4]]).overlapping([dialogue]) == []


def test_a_pair_keeps_the_digests_of_all_text(built: Pair) -> None:
    (TextDigests.of(OTHERS[:1]) | TextDigests.of(FITTED[:2])).save(built.folder)
    stored = TextDigests.load(built)
    assert stored is not None
    assert stored.overlapping([*OTHERS, *FITTED]) == [0, 4, 5]


def test_of_much_text_a_pair_keeps_a_sample_of_bounded_size(built: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "MAX_DIGESTS", 500)
    texts = [chat(" ".join(f"word{n}x{i}" for i in range(200))) for n in range(50)]  # 9,650 runs
    TextDigests.of(texts).save(built.folder)
    assert (built.folder / DIGESTS_FILE).stat().st_size == 500 * 8
    stored = TextDigests.load(built)
    assert stored is not None
    found = stored.overlapping([*texts, *OTHERS])
    assert len(found) > 45
    assert max(found) < 50


def test_a_pair_that_was_made_elsewhere_is_not_known_and_an_identity_pair_has_seen_nothing(
    tiny_pair: Path, built: Pair, tmp_path: Path
) -> None:
    assert TextDigests.load(Pair.load(tiny_pair)) is None
    unfitted = TextDigests.load(Pair.load(make_tiny_pair(tmp_path / "identity", identity=True)))
    assert unfitted is not None
    assert unfitted.overlapping(FITTED) == []


@pytest.mark.parametrize("size", [9, 1 << 40])
def test_a_file_of_digests_of_a_wrong_size_is_damaged(built: Pair, size: int) -> None:
    """A larger one would take the memory for all of it. The file of a terabyte has no blocks."""
    os.truncate(built.folder / DIGESTS_FILE, size)
    with pytest.raises(InvalidPair, match=rf"text_digests\.bin has {size} bytes; .* multiple of 8, at most 1048576"):
        TextDigests.load(built)


def judge(pair: Path, data: str, *options: str) -> Result:
    arguments = [str(pair), "--data", data, "--no-free-running", "--dtype", "float32", *options]
    return CliRunner().invoke(eval_command, arguments)


def test_eval_says_which_conversations_the_decoder_has_seen(built: Pair, tmp_path: Path) -> None:
    mixed = write(tmp_path / "mixed.jsonl", [*OTHERS[:2], FITTED[7]])
    clean = write(tmp_path / "clean.jsonl", OTHERS)
    result = judge(built.folder, mixed)
    assert "Overlap: 1 of 3 judged conversations (numbers 3) share 8 words in a row with the text that" in result.stdout
    assert json.loads(judge(built.folder, mixed, "--json").stdout)["overlap"] == [2]
    refused = judge(built.folder, mixed, "--strict")
    assert isinstance(refused.exception, InvalidRequest)
    assert str(refused.exception).startswith("data: overlap: 1 of 3 judged conversations (numbers 3)")

    result = judge(built.folder, clean, "--strict", "--save")
    assert "Overlap: 0 of 4 judged conversations share 8 words" in result.stdout
    assert Pair.load(built.folder).eval["overlapping"] == 0


def test_a_conversation_that_is_not_judged_does_not_count_as_an_overlap(built: Pair, tmp_path: Path) -> None:
    question = FITTED[3].messages[0]["content"]
    unjudged = [replace(chat(question, ""), finished=False), chat(question, "")]  # answers of no token, and of one
    mixed = write(tmp_path / "mixed.jsonl", [*unjudged, OTHERS[0], FITTED[7]])
    assert "Overlap: 1 of 2 judged conversations (numbers 2)" in judge(built.folder, mixed).stdout
    found = json.loads(judge(built.folder, mixed, "--json").stdout)
    assert (found["transcripts"], found["overlap"]) == (2, [1])
    clean = write(tmp_path / "clean.jsonl", [*unjudged, OTHERS[0]])
    assert judge(built.folder, clean, "--strict").exit_code == 0


def test_an_overlap_that_cannot_be_known_is_refused_when_strict(tiny_pair: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", OTHERS)
    result = judge(tiny_pair, data)
    assert "Overlap: not known for the text that made the decoder" in result.stdout
    assert json.loads(judge(tiny_pair, data, "--json").stdout)["overlap"] is None
    assert isinstance(judge(tiny_pair, data, "--strict").exception, InvalidRequest)


def train(pair: Path, out: Path, data: str, held_out: str, *options: str) -> Result:
    arguments = [str(pair), "--out", str(out), "--data", data, "--held-out", held_out, "--steps", "1", "--not-fused"]
    return CliRunner().invoke(distill_command, [*arguments, *options])


def test_distill_compares_held_out_text_with_all_that_makes_the_decoder(
    built: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill, "set_threads", lambda threads: None)
    data = write(tmp_path / "data.jsonl", OTHERS[1:])
    held_out = write(tmp_path / "held_out.jsonl", [OTHERS[0], OTHERS[2], FITTED[0], FITTED[1]])
    clean = write(tmp_path / "clean.jsonl", [chat("Where does the river go when nobody looks at the bridge?")])

    refused = train(built.folder, tmp_path / "trained", data, held_out, "--strict")
    assert isinstance(refused.exception, InvalidRequest)
    what = "of 4 judged conversations (numbers {}) share 8 words in a row with the {}"
    overlaps = (
        f"overlap: 1 {what.format('2', 'training text')}",
        f"overlap: 2 {what.format('3, 4', 'text that made the decoder')}",
    )
    assert str(refused.exception) == f"held_out: {'; '.join(overlaps)}"
    assert not (tmp_path / "trained.run").exists()

    trained = train(built.folder, tmp_path / "trained", data, held_out)
    assert trained.exit_code == 0, trained.output
    assert set(overlaps) < {*trained.stderr.splitlines()}
    assert train(built.folder, tmp_path / "again", data, clean, "--strict").exit_code == 0

    # The trained pair has seen the text of both.
    seen = TextDigests.load(Pair.load(tmp_path / "trained"))
    assert seen is not None
    assert seen.overlapping([OTHERS[0], OTHERS[2], FITTED[0]]) == [1, 2]


def test_a_pair_keeps_no_digests_if_a_part_of_its_text_is_not_known(
    tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the other part would pass for all of the text."""
    monkeypatch.setattr(distill, "set_threads", lambda threads: None)
    data = write(tmp_path / "data.jsonl", OTHERS[1:])
    trained = train(tiny_pair, tmp_path / "trained", data, data)
    assert trained.exit_code == 0, trained.output
    assert TextDigests.load(Pair.load(tmp_path / "trained")) is None
    refused = train(tiny_pair, tmp_path / "strict", data, write(tmp_path / "other.jsonl", OTHERS[:1]), "--strict")
    assert isinstance(refused.exception, InvalidRequest)
    assert "not known for the text that made the decoder" in str(refused.exception)
