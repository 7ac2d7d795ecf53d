"""Recipes, the data that they name, and the order of the batches."""

from __future__ import annotations

import json
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

from overfill.api.tokenizer import Tokenizer
from overfill.errors import InvalidRequest, OverfillError
from overfill.making.conversations import Transcript, read_conversations, shipped_conversations
from overfill.making.distill import data as distill_data
from overfill.making.distill.data import HubTranscripts, batches, digest, load_data
from overfill.making.distill.recipe import Data, changed, read_recipe, recipe_names
from overfill.making.distill.teacher_cache import Column, TeacherCache
from overfill.making.hub_data import as_conversation
from overfill.model.config import ModelConfig
from overfill.model.loading import count_parameters

SIZES = {
    "llama-3.2-3b-to-1b": (1689, 4505),
    "llama-3.2-3b-to-1b-aligned": (1664, 4480),
    "llama-3.1-8b-to-3b": (2334, 8171),
    "llama-3.1-8b-to-3b-aligned": (2304, 8192),
}


def write_chats(file: Path, count: int) -> Path:
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"Question {i}?"},
                {"role": "assistant", "content": "Yes. " * (i + 1)},
            ]
        }
        for i in range(count)
    ]
    file.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return file


def test_every_packaged_recipe_is_valid() -> None:
    assert set(recipe_names()) == {*SIZES, "smollm2-fast", "adapter"}
    for name, sizes in SIZES.items():
        decoder = read_recipe(name).decoder
        assert decoder is not None
        assert (decoder.hidden_size, decoder.intermediate_size) == sizes
        assert decoder.hidden_size % 128 == 0 if "aligned" in name else decoder.hidden_size % 128
    assert read_recipe("smollm2-fast").training.learning_rate == 3e-4


LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128_256,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": False,
}
LLAMA_3B = LLAMA_8B | {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("name", SIZES)
def test_the_recipes_state_the_memory_that_their_sizes_need(name: str) -> None:
    full = LLAMA_8B if "8b" in name else LLAMA_3B
    hidden, intermediate = SIZES[name]
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "tie_word_embeddings": False}
    read = 2 * count_parameters(ModelConfig.from_dict(full)) / 1e9
    trained = count_parameters(ModelConfig.from_dict(full | sizes)) / 1e9
    text = (resources.files("overfill.making") / "recipes" / f"{name}.toml").read_text()
    comment = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("# "))
    assert f"{read + 16 * trained:.1f} GB before activations: the full model in bf16, {read:.1f} GB, and 16" in comment
    assert f"decoder's {trained:.2f} B parameters, {16 * trained:.1f} GB" in comment


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("source = 'x'\n[training]\nsteps = 1\nlearning_rat = 1\n", r"toml: training\.learning_rat: no such key$"),
        ("source = 'x'\n[training]\nsteps = 0\n", r"training\.steps: Input should be greater than 0, got 0$"),
        ("source = 'x'\n[training]\n", "training: give exactly one of steps, minutes and epochs"),
        ("[training]\nsteps = 1\n", "source: Field required$"),
        ("source = 'x'\n[training]\nsteps = 1\nsampled_tokens = 9\n", "sampled_tokens needs top_tokens"),
        ("source = 'x'\n[training]\nsteps = 1\ncross_entropy = 0\nkl = 0\n", "must not both be 0"),
        ("source = ", "is not TOML"),
    ],
)
def test_a_mistake_in_a_recipe_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(InvalidRequest, match=message):
        read_recipe(str(tmp_path / "mine.toml"))


def test_an_unknown_recipe_names_the_packaged_ones() -> None:
    with pytest.raises(InvalidRequest, match=r"packaged are .*smollm2-fast"):
        read_recipe("smollm3")


def test_options_override_a_recipe_and_a_length_replaces_the_other() -> None:
    training = changed(read_recipe("smollm2-fast").training, steps=5, kl=None, learning_rate=1e-3)
    assert (training.steps, training.minutes, training.kl, training.learning_rate) == (5, None, 0.7, 1e-3)
    with pytest.raises(InvalidRequest, match=r"learning_rate: Input should be greater than 0, got -1\.0$"):
        changed(training, learning_rate=-1.0)
    with pytest.raises(InvalidRequest, match=r"^give exactly one of steps"):
        changed(training, steps=5, minutes=1.0)


def test_data_is_read_from_a_file(tiny_pair: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny_pair / "full")
    file = str(write_chats(tmp_path / "chats.jsonl", 5))
    held_out = str(write_chats(tmp_path / "held_out.jsonl", 4))
    loaded = load_data(Data(source=file, held_out=held_out, max_held_out=3), tokenizer)
    assert (len(loaded.training), len(loaded.held_out)) == (5, 3)
    assert digest(loaded.training) != digest(loaded.held_out) == digest(loaded.training[:3])
    assert loaded.training_text is not None
    assert loaded.training_text.overlapping(read_conversations(Path(file))) == list(range(5))
    assert loaded.judged == read_conversations(Path(held_out))[:3]


def test_shipped_text_is_trained_on_and_the_development_set_judged(tiny_pair: Path) -> None:
    tokenizer = Tokenizer.load(tiny_pair / "full")
    for data in (Data(), Data(held_out="development")):
        assert load_data(data, tokenizer).judged == shipped_conversations("development")
    with pytest.raises(InvalidRequest, match="shipped is neither `development`, nor a file"):
        load_data(Data(held_out="shipped"), tokenizer)


@pytest.mark.parametrize(
    ("source", "message"),
    [("nowhere.jsonl", "neither `shipped`, nor a file"), ("someone/chats", r"needs datasets, .*\[pairs\]")],
)
def test_data_that_cannot_be_had_is_named(
    source: str, message: str, tiny_pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(OverfillError, match=message):
        load_data(Data(source=source), Tokenizer.load(tiny_pair / "full"))


def test_conversations_of_both_spellings_are_read_up_to_their_last_answer() -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}]
    found = as_conversation(turns)
    assert found is not None
    assert found.messages == ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    assert as_conversation(turns[:1]) is None
    assert as_conversation([{"role": "user", "content": None}, *turns[1:]]) is None
    assert as_conversation(None) is None
    assert as_conversation([None]) is None


def test_a_hub_data_set_is_judged_on_its_first_usable_rows(tiny_pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its training text is too large to compare with the held-out text, so that nothing is known of an overlap."""
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is a bridge."}]
    rows = [{"messages": None}, *({"messages": turns} for _ in range(3))]
    asked: list[str] = []

    def load_hub(source: str, split: str, column: str) -> list[Any]:
        asked.append(f"{source} {split} {column}")
        return rows

    monkeypatch.setattr(distill_data, "load_hub", load_hub)
    data = Data(source="owner/name", held_out_split="test", max_held_out=2)
    loaded = load_data(data, Tokenizer.load(tiny_pair / "full"))
    assert asked == ["owner/name train messages", "owner/name test messages"]
    assert [transcript is None for transcript in loaded.training] == [True, False, False, False]
    assert loaded.held_out == [loaded.training[1]] * 2
    assert loaded.training_text is None
    assert [conversation.messages for conversation in loaded.judged] == [tuple(turns)] * 2


def test_a_hub_row_that_the_chat_template_refuses_is_skipped(tiny_pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"b c {i}"}]} for i in "12"
    ]
    tokenizer = Tokenizer.load(tiny_pair / "full")
    encode_chat = tokenizer.encode_with_generation_prompt

    def refuse(messages: Any, count: bool) -> tuple[list[int], int]:
        if not refused:
            refused.append(messages)
            raise InvalidRequest("messages", "roles must alternate")
        return encode_chat(messages, count=count)

    refused: list[Any] = []
    monkeypatch.setattr(tokenizer, "encode_with_generation_prompt", refuse)
    transcripts = HubTranscripts(rows, Data(source="owner/name"), tokenizer)
    assert transcripts[0] is None
    assert transcripts[1] is not None


def test_batches_take_every_transcript_once_an_epoch_and_can_start_anywhere() -> None:
    source = batches(10, 4, seed=3, first_step=0)
    taken = [next(source) for _ in range(10)]
    flat = [index for batch in taken for index in batch]
    assert all(sorted(flat[start : start + 10]) == list(range(10)) for start in range(0, 40, 10))
    assert flat[:10] != flat[10:20]
    later = batches(10, 4, seed=3, first_step=6)
    assert [next(later) for _ in range(4)] == taken[6:]
    assert next(batches(10, 4, seed=4, first_step=0)) != taken[0]


def test_the_cache_gives_back_what_it_was_given_and_forgets_when_something_changed(tmp_path: Path) -> None:
    transcripts = [Transcript(tuple(range(n)), 2 + n % 2) for n in (5, 6, 7)]
    columns = [Column("prefix", "prompt", (2, -1, 3), torch.float16), Column("top_ids", "learnt", (-1, 2), torch.int32)]
    cache = TeacherCache(tmp_path, transcripts, columns, "one")
    assert 2 not in cache
    chosen = {2: transcripts[2], 0: transcripts[0]}
    prompt, learnt = 3 + 3, 3 + 1
    computed = {
        "prefix": torch.arange(2.0 * prompt * 3).view(2, prompt, 3),
        "top_ids": torch.arange(learnt * 2).view(-1, 2),
    }
    cache.write(chosen, computed)

    again = TeacherCache(tmp_path, transcripts, columns, "one")
    assert [number in again for number in range(3)] == [True, False, True]
    assert torch.equal(again.read([2, 0])["prefix"].float(), computed["prefix"])
    assert again.read([2])["top_ids"].tolist() == computed["top_ids"][:3].tolist()
    assert 2 not in TeacherCache(tmp_path, transcripts, columns, "another")
