"""Tests tokenizers and chat templates against transformers, and errors about damaged checkpoints."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import CHAT, TEMPLATES

from overfill.api.chat_template import TemplateOptions
from overfill.api.tokenizer import Tokenizer
from overfill.errors import InvalidPair, InvalidRequest


@pytest.fixture
def folder(byte_level_folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that the test may damage."""
    return Path(shutil.copytree(byte_level_folder, tmp_path / "checkpoint"))


@pytest.fixture
def with_template(folder: Path) -> Callable[[str], Tokenizer]:
    def load(template: str) -> Tokenizer:
        (folder / "chat_template.jinja").write_text(template)
        return Tokenizer.load(folder)

    return load


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


@pytest.mark.parametrize("template", [None, *TEMPLATES])
def test_chats_have_the_same_ids_as_in_transformers(folder: Path, template: str | None) -> None:
    from transformers import PreTrainedTokenizerFast

    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    reference = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = Tokenizer.load(folder).encode_chat(CHAT)
    assert ids == reference.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert ids


def test_special_tokens_are_not_added_twice(byte_level_tokenizer: Tokenizer) -> None:
    ids = byte_level_tokenizer.encode_chat(CHAT)
    assert ids.count(1) == 1
    assert byte_level_tokenizer.encode("Hello").count(1) == 1


def test_a_named_template_list_uses_the_default_one(folder: Path) -> None:
    edit_json(
        folder / "tokenizer_config.json",
        chat_template=[{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}],
    )
    assert Tokenizer.load(folder).render(CHAT) == "d"


def test_the_template_file_wins_over_the_config(with_template: Callable[[str], Tokenizer]) -> None:
    assert with_template("from the file").render(CHAT) == "from the file"


def test_a_checkpoint_without_template_refuses_chats_only(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", chat_template=None)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("Hello")
    with pytest.raises(InvalidRequest, match="no chat template") as caught:
        tokenizer.encode_chat(CHAT)
    assert caught.value.field == "chat"


def test_a_template_that_does_not_compile_is_the_pairs_fault(
    with_template: Callable[[str], Tokenizer],
) -> None:
    with pytest.raises(InvalidPair, match="chat template"):
        with_template("{% for %}")


def test_eos_ids_come_from_the_generation_config_first(folder: Path) -> None:
    assert Tokenizer.load(folder).eos_token_ids == (2,)
    edit_json(folder / "generation_config.json", eos_token_id=[2, 4])
    assert Tokenizer.load(folder).eos_token_ids == (2, 4)


def test_training_time_truncation_does_not_cut_prompts(folder: Path) -> None:
    edit_json(
        folder / "tokenizer.json",
        truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
    )
    assert len(Tokenizer.load(folder).encode("Hello, world! " * 20)) > 20


def test_digest_special_tokens_and_vocabulary_are_read(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.digest == hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.vocab_size == json.loads((folder / "config.json").read_text())["vocab_size"]


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(InvalidPair, match=name):
        Tokenizer.load(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "tokenizer_config.json"])
def test_a_damaged_file_is_named(folder: Path, name: str) -> None:
    (folder / name).write_text("{")
    with pytest.raises(InvalidPair, match=name):
        Tokenizer.load(folder)


def test_a_lone_surrogate_is_named(any_tokenizer: Tokenizer) -> None:
    for encode in (any_tokenizer.encode, any_tokenizer.encode_continuation):
        with pytest.raises(InvalidRequest, match="lone surrogate at character 2"):
            encode("ab\ud800")


@pytest.mark.parametrize(
    ("template", "added"),
    [
        (None, "<|im_start|>assistant\n"),
        ("{{ messages[0].content }}{% if add_generation_prompt %}GO{% endif %}", "GO"),
        # "own" is one token, which begins before the generation prompt.
        ("{{ messages[0].content }} bro{% if add_generation_prompt %}wn fox{% endif %}", "own fox"),
        ("{{ messages[0].content }}", ""),
        ("{{ 'a' if add_generation_prompt else 'b' }}{{ messages[0].content }}", ""),
        (
            "{% if not add_generation_prompt %}{{ raise_exception('no answer') }}{% endif %}{{ messages[0].content }}",
            "",
        ),
    ],
)
@pytest.mark.parametrize("text", ["The quick dog.", "It spells <|im_end|>."])
def test_the_generation_prompt_is_counted_from_a_token_boundary(
    with_template: Callable[[str], Tokenizer],
    byte_level_tokenizer: Tokenizer,
    template: str | None,
    added: str,
    text: str,
) -> None:
    tokenizer = byte_level_tokenizer if template is None else with_template(template)
    chat = [{"role": "user", "content": text}]
    ids, count = tokenizer.encode_with_generation_prompt(chat)
    assert ids == tokenizer.encode_chat(chat)
    shown = b"".join(tokenizer.token_bytes(id) for id in ids[len(ids) - count :])
    assert shown.decode() == added


def test_a_chat_without_a_generation_prompt_has_none_of_its_tokens(byte_level_tokenizer: Tokenizer) -> None:
    options = TemplateOptions(add_generation_prompt=False)
    assert byte_level_tokenizer.encode_with_generation_prompt(CHAT, options=options)[1] == 0
