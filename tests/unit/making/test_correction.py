"""Corrections: written from a training run, added to the same fit on any machine, and refused by every other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from overfill.api.tokenizer import Tokenizer
from overfill.errors import InvalidPair, InvalidRequest
from overfill.making import build, correction, renew_correction
from overfill.making.build import build_pair
from overfill.making.checkpoint import save_tensors
from overfill.making.conversations import Conversation, encode
from overfill.making.correction import read_correction, shipped_correction, write_correction
from overfill.making.distill import train
from overfill.making.distill.recipe import Training
from overfill.making.distill.train import Run
from overfill.making.overlap import TextDigests
from overfill.making.recipe import DecoderRecipe
from overfill.making.renew_correction import renew
from overfill.making.tiny import make_tiny_pair
from overfill.model.manifest import Pair

RECIPE = DecoderRecipe(hidden_size=48, intermediate_size=64, head_tokens=300, tail_rank=16, tokens=900)
TRAINING = Training(
    rank=6, steps=12, batch_transcripts=4, learning_rate=2e-3, eval_steps=100, cross_entropy=0, kl=1, cache_gib=0
)
CHATS = [
    Conversation(
        (
            {"role": "user", "content": f"What is {n} + {n}?"},
            {"role": "assistant", "content": f"The answer to your question, {n} + {n}, is {2 * n}. Please write it."},
        )
    )
    for n in range(40)
]

FACTS = {"key": {}, "rank": 6, "answer_tokens": 1}
TRAINED = [
    Conversation(
        (
            {"role": "user", "content": "one two three four five six seven eight"},
            {"role": "assistant", "content": "nine"},
        )
    )
]


@pytest.fixture(autouse=True)
def shipped(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes ``fit`` the only named pair, with scores in the package; returns the folder of corrections."""
    patch(monkeypatch)
    monkeypatch.setattr(renew_correction, "RECIPES", {"fit": RECIPE})
    monkeypatch.setattr(renew_correction, "shipped_conversations", lambda part: CHATS)
    monkeypatch.setattr(correction, "CORRECTIONS", tmp_path / "corrections")
    for module in (build, renew_correction):
        monkeypatch.setattr(module, "SHIPPED_SCORES", made / "fit" / "scores.safetensors")
    return tmp_path / "corrections"


def patch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "plot_runs", lambda runs, out: out.touch())
    monkeypatch.setattr(train, "native_dtype", lambda device: "float32")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a folder with ``full``, the pair ``fit`` of it, and ``trained``, which is ``fit`` after training."""
    folder = tmp_path_factory.mktemp("made")
    make_tiny_pair(folder / "tiny", identity=True, num_layers=2)
    (folder / "full").symlink_to(folder / "tiny" / "full")
    build_pair(folder / "full", folder / "fit", RECIPE, CHATS)
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch(monkeypatch)
        distilled(folder / "fit", folder / "trained")
    return folder


def distilled(pair: Path, out: Path, *, resume: bool = False, **changes: Any) -> Pair:
    loaded = Pair.load(pair)
    transcripts = encode(CHATS, Tokenizer.load(loaded.full_path))
    training = TRAINING.model_copy(update=changes)
    text = TextDigests.of(TRAINED)
    run = Run(loaded, out, list(transcripts), transcripts[:2], training, training_text=text, resume=resume)
    return Pair.load(run.train())


def decoder(pair: Path) -> dict[str, torch.Tensor]:
    return load_file(pair / "decoder" / "model.safetensors")


def distance(one: Path, other: Path) -> float:
    ours, theirs = decoder(one), decoder(other)
    assert ours.keys() == theirs.keys()
    return sum(float((ours[name] - theirs[name]).square().sum()) for name in ours) ** 0.5


def test_a_built_pair_has_what_training_found_and_training_continues_it(
    made: Path, shipped: Path, tmp_path: Path
) -> None:
    files = renew("fit", made / "trained", shipped)
    built = build_pair(made / "full", tmp_path / "corrected", RECIPE, CHATS, correction=shipped / "fit")

    found = read_correction(shipped / "fit")
    assert found is not None
    assert [file.name for file in files] == ["fit-1-of-1.safetensors"]
    assert built.recipe["correction"] == {"digest": found.digest, "answer_tokens": found.facts["answer_tokens"]}
    assert found.facts["answer_tokens"] == Pair.load(made / "trained").recipe["distill"]["tokens"]
    digests = TextDigests.load(built)
    assert digests is not None
    assert digests.overlapping([*TRAINED, CHATS[3]]) == [0, 1]
    moved = distance(made / "fit", made / "trained")
    assert distance(tmp_path / "corrected", made / "trained") < 0.2 * moved  # rounded to 4 bits

    again = distilled(tmp_path / "corrected", tmp_path / "longer", seed=1, rank=8)
    assert again.recipe["distill"]["continues"] == found.digest
    renew("fit", tmp_path / "longer", shipped)
    with pytest.raises(InvalidRequest, match="continues"):  # else the old correction would count twice
        distilled(tmp_path / "corrected", tmp_path / "longer", resume=True, seed=1, rank=8)
    longer = build_pair(made / "full", tmp_path / "built again", RECIPE, CHATS, correction=shipped / "fit")
    tokens = again.recipe["distill"]["tokens"]
    assert longer.recipe["correction"]["answer_tokens"] == found.facts["answer_tokens"] + tokens
    moved = distance(made / "fit", tmp_path / "longer")
    assert distance(tmp_path / "built again", tmp_path / "longer") < 0.2 * moved


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_builds_at_one_thread_and_at_two_accept_one_correction(
    made: Path, shipped: Path, tmp_path: Path, threads: Callable[[int], None]
) -> None:
    renew("fit", made / "trained", shipped)
    for number in (1, 2):
        threads(number)
        pair = build_pair(made / "full", tmp_path / str(number), RECIPE, CHATS, correction=shipped / "fit")
        assert "digest" in pair.recipe["correction"]
    one, two = decoder(tmp_path / "1"), decoder(tmp_path / "2")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-3 * float(tensor.abs().max()))


def test_a_correction_is_left_out_of_every_other_fit(
    made: Path, shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renew("fit", made / "trained", shipped)
    other_model = make_tiny_pair(tmp_path / "other", identity=True, num_layers=2, seed=5) / "full"
    narrower = DecoderRecipe(hidden_size=40, intermediate_size=64, head_tokens=300, tail_rank=16, tokens=900)
    fewer_tokens = DecoderRecipe(hidden_size=48, intermediate_size=64, head_tokens=300, tail_rank=16, tokens=600)
    steps: list[str] = []

    def check(other: str, model: Path, recipe: DecoderRecipe, chats: list[Conversation]) -> None:
        out = tmp_path / f"built {len(steps)}"
        pair = build_pair(
            model, out, recipe, chats, correction=shipped / "fit", report=lambda step, *_: steps.append(step)
        )
        assert pair.recipe["correction"] == {"left_out": f"it was trained with another {other}"}
        assert f"Built without the trained correction: it was trained with another {other}" in steps

    check("full model", other_model, RECIPE, CHATS)
    check("recipe", made / "full", narrower, CHATS)
    check("recipe", made / "full", fewer_tokens, CHATS)
    check("calibration text", made / "full", RECIPE, CHATS[::-1])
    monkeypatch.setattr(build, "SHIPPED_SCORES", tmp_path / "none")
    monkeypatch.setattr(build, "SCORING_TOKENS", 900)
    check("pruning scores", made / "full", RECIPE, CHATS)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def poison(file: Path) -> None:
    with correction.safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    tensors = load_file(file)
    tensors["scales"][3] = torch.nan
    save_tensors(tensors, file, metadata)


def with_facts(**changes: Any) -> Callable[[Path], None]:
    """Returns what changes the facts in the metadata of all files; None removes one."""

    def damage(file: Path) -> None:
        for each in file.parent.iterdir():
            with correction.safe_open(each, "pt") as stored:
                facts = json.loads(stored.metadata()["correction"]) | changes
            facts = {name: value for name, value in facts.items() if value is not None}
            save_tensors(load_file(each), each, {"correction": json.dumps(facts)})

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"fit-2-of-3\.safetensors is damaged"),
        (poison, r"fit-2-of-3\.safetensors is damaged.*not finite"),
        (with_facts(files=None), r"fit-1-of-3\.safetensors is damaged.*'files'"),
        (with_facts(key=7), r"fit-1-of-3\.safetensors is damaged.*iterable"),
        (with_facts(rank="many"), r"fit-1-of-3\.safetensors is damaged.*'many'"),
        (Path.unlink, "are not the files of one correction"),
    ],
)
def test_a_damaged_correction_is_refused(
    damage: Callable[[Path], None],
    message: str,
    made: Path,
    shipped: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(correction, "MAX_FILE_BYTES", 11_000)
    files = renew("fit", made / "trained", shipped)
    assert len(files) == 3
    assert max(file.stat().st_size for file in files) <= 11_000
    damage(files[1])
    with pytest.raises(InvalidPair, match=message):
        build_pair(made / "full", tmp_path / "built", RECIPE, CHATS, correction=shipped / "fit")
    assert not (tmp_path / "built").exists()


def test_without_a_correction_a_pair_says_nothing(made: Path, shipped: Path, tmp_path: Path) -> None:
    built = build_pair(made / "full", tmp_path / "built", RECIPE, CHATS, correction=shipped / "fit")
    assert "correction" not in built.recipe


def test_factors_keep_their_values_within_4_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    up, down = torch.randn(50, 6) * 1e-3, torch.randn(6, 33)
    up[0] = 0
    text = TextDigests([3, 2**64 - 1])
    write_correction(tmp_path / "name", [(up, down)], torch.tensor([0.25, -0.5]), text, FACTS)
    found = read_correction(tmp_path / "name")
    assert found is not None
    values = torch.cat([up.flatten(), down.flatten()])
    groups = torch.nn.functional.pad(values, (0, -len(values) % 32)).view(-1, 32)
    errors = (found.factors.view(-1, 32) - groups).abs().amax(1)
    assert (errors <= groups.abs().amax(1) / 8 + 1e-6).all()
    assert found.gains.tolist() == [0.25, -0.5]
    assert found.text.sample(5) == [3, 2**64 - 1]


def test_many_files_are_read_in_the_order_of_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correction, "MAX_FILE_BYTES", 8_192 + 512)
    torch.manual_seed(0)
    gains = torch.randn(100).half().float()
    products = [(torch.randn(100, 6), torch.randn(6, 100)) for _ in range(8)]
    files = write_correction(tmp_path / "name", products, gains, TextDigests([3]), FACTS)
    assert len(files) > 10
    found = read_correction(tmp_path / "name")
    assert found is not None
    assert torch.equal(found.gains, gains)
    values = torch.cat([factor.flatten() for pair in products for factor in pair])
    assert float((found.factors[: len(values)] - values).abs().max()) < 0.5

    files[-1].rename(tmp_path / "kept")
    with pytest.raises(InvalidPair, match="are not the files of one correction"):
        read_correction(tmp_path / "name")
    (tmp_path / "kept").rename(tmp_path / f"name-{len(files) + 1}-of-{len(files)}.safetensors")
    with pytest.raises(InvalidPair, match="are not the files of one correction"):
        read_correction(tmp_path / "name")


def test_a_correction_is_found_by_its_digest_whatever_its_name(shipped: Path) -> None:
    for number, name in enumerate(("fit", "fit-2x", "fit-2x-1")):
        facts = {**FACTS, "answer_tokens": number}
        write_correction(
            shipped / name, [(torch.ones(2, 6), torch.ones(6, 2))], torch.ones(2), TextDigests([number]), facts
        )
    assert len([*shipped.iterdir()]) == 3
    for number, name in enumerate(("fit", "fit-2x", "fit-2x-1")):
        written = read_correction(shipped / name)
        assert written is not None
        recipe = {"correction": {"digest": written.digest}}
        found = shipped_correction(recipe)
        assert found is not None
        assert (found.digest, found.facts["answer_tokens"]) == (written.digest, number)
        assert shipped_correction({**recipe, "distill": {}}) is None
    assert shipped_correction({"correction": {"digest": "0"}}) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"rank": None}, "was not trained by"), ({"recipe": True}, "was not trained from fit: tail_rank")],
)
def test_other_runs_make_no_correction(
    changes: dict[str, Any], message: str, made: Path, shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if changes.pop("recipe", False):
        recipe = DecoderRecipe(hidden_size=48, intermediate_size=64, head_tokens=300, tail_rank=12, tokens=900)
        monkeypatch.setattr(renew_correction, "RECIPES", {"fit": recipe})
    distilled(made / "fit", tmp_path / "trained", steps=1, **changes)
    with pytest.raises(InvalidRequest, match=message):
        renew("fit", tmp_path / "trained", shipped)
    assert not shipped.exists()


def test_a_run_of_lower_rank_does_not_renew_the_correction(made: Path, shipped: Path, tmp_path: Path) -> None:
    renew("fit", made / "trained", shipped)
    build_pair(made / "full", tmp_path / "corrected", RECIPE, CHATS, correction=shipped / "fit")
    distilled(tmp_path / "corrected", tmp_path / "lower", steps=1, rank=3)
    with pytest.raises(InvalidRequest, match="does not continue the correction of fit"):
        renew("fit", tmp_path / "lower", shipped)
