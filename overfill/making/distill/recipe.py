"""Reads training recipes: TOML files with the models, the data and every hyperparameter. Needs no torch.

A name selects a recipe in the package; anything else is a file. Unknown keys are errors.
"""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from overfill.errors import InvalidRequest
from overfill.request.answer_start import MAX_TAIL_TOKENS

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]

FACTOR_RATE = 8.0
"""Learning rate of low-rank factors, as a multiple of the rate for whole matrices. A step of the optimiser changes a
factor's product less than it would change the whole matrix."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Training(_Frozen):
    """Hyperparameters of a run.

    Attributes:
        rank: Train low-rank factors of this rank beside frozen matrices, at ``FACTOR_RATE`` times ``learning_rate``;
            the norms' gains too. The written decoder has the factors merged. None trains everything.
        lora: Train an adapter of this rank instead of the decoder, also at ``FACTOR_RATE`` times ``learning_rate``.
        steps, minutes, epochs: Length of the run; exactly one of them is set. Minutes count training, not evaluation.
            With minutes the schedule follows the clock, so that two such runs are not bit-equal.
        batch_transcripts: Transcripts per step, over all processes.
        pack_rows: Maximum number of tokens per forward pass. A batch runs in as many packs as needed.
        warmup: Share of the run in which the learning rate rises linearly. After that it follows a cosine.
        final_rate: Learning rate at the end, as a share of ``learning_rate``.
        clip: Maximum norm of the gradient.
        cross_entropy, kl, temperature: Weights and temperature of the loss (``overfill.making.distill.loss``).
        top_tokens: Number of the full model's most likely tokens in the KL; all others count as one token. 0 means all.
        sampled_tokens: With ``top_tokens``, number of tokens drawn per pass to represent the rest of the vocabulary. 0
            means the whole vocabulary. Sampling makes the loss an estimate; evaluation stays exact.
        recompute_activations: Gradient checkpointing: less memory, a third more computing.
        fused: Let torch.compile fuse the operations between matrix products. Saves a fifth of the time after a minute
            of compiling. Without a C++ compiler, or on a GPU without gcc and clang, training runs unfused.
        eval_steps: Steps between evaluations on held-out transcripts.
        checkpoint_steps, checkpoint_minutes: Intervals of checkpoints, whichever passes first. None means no interval
            in steps.
        cache_gib: Maximum GiB for the cache of the full model's outputs, which later epochs reuse. 0 turns it off.
    """

    rank: Positive | None = None
    lora: Positive | None = None
    learning_rate: PositiveFloat = 6e-4
    steps: Positive | None = None
    minutes: PositiveFloat | None = None
    epochs: PositiveFloat | None = None
    batch_transcripts: Positive = 16
    pack_rows: Positive = 4096
    warmup: Share = 0.03
    final_rate: Share = 0.0
    weight_decay: NotNegative = 0.0
    beta1: Share = 0.9
    beta2: Share = 0.999
    clip: PositiveFloat = 1.0
    cross_entropy: NotNegative = 0.3
    kl: NotNegative = 0.7
    temperature: PositiveFloat = 1.0
    top_tokens: Annotated[int, Field(ge=0)] = 0
    sampled_tokens: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0)] = 0
    recompute_activations: bool = False
    fused: bool = False
    eval_steps: Positive = 50
    checkpoint_steps: Positive | None = None
    checkpoint_minutes: PositiveFloat = 10.0
    cache_gib: NotNegative = 8.0

    @model_validator(mode="after")
    def _check(self) -> Training:
        if sum(value is not None for value in (self.steps, self.minutes, self.epochs)) != 1:
            raise ValueError("give exactly one of steps, minutes and epochs")
        if self.lora is not None and self.rank is not None:
            raise ValueError("rank trains a decoder and lora an adapter: give one of them")
        if self.cross_entropy + self.kl == 0:
            raise ValueError("cross_entropy and kl must not both be 0")
        if self.top_tokens and (self.temperature != 1 or self.kl == 0):
            raise ValueError("top_tokens needs temperature 1 and a kl above 0")
        if self.sampled_tokens and not self.top_tokens:
            raise ValueError("sampled_tokens needs top_tokens, such as 32")
        return self


class Data(_Frozen):
    """Sources of the conversations.

    Attributes:
        source: ``shipped``, a file of JSON lines, or the id of a data set on the Hugging Face hub: ``owner/name``, or
            ``owner/name:split`` instead of ``split``.
        split, held_out_split: Splits of a hub data set; other sources have none.
        column: Column of a hub data set that holds messages with ``role`` and ``content``, or ``from`` and ``value``.
        held_out: ``development`` (the set in the package) or a file. None means ``held_out_split``.
        max_tokens: Maximum length of a transcript. Longer ones lose the end of their answer.
        max_held_out: Maximum number of transcripts to evaluate.
        held_out_share: For an adapter without ``held_out``, the share of the conversations that is held out.
        tail_tokens: For an adapter, the number of tokens at a prompt's end that the decoder computes; 0 means the
            generation prompt. None means that the full model writes the first token.
    """

    source: str = "shipped"
    split: str = "train"
    held_out_split: str | None = None
    column: str = "messages"
    held_out: str | None = None
    max_tokens: Positive = 1024
    max_held_out: Positive = 100
    held_out_share: Share = 0.1
    tail_tokens: Annotated[int, Field(ge=0, le=MAX_TAIL_TOKENS)] | None = None


class Decoder(_Frozen):
    """The decoder to start from; the keys are the options of ``overfill pair build``."""

    full: str
    hidden_size: Positive
    intermediate_size: Positive
    method: Literal["channel", "rotate"] = "channel"
    fit: Literal["none", "least-squares"] = "none"
    calibration: str = "shipped"


class Recipe(_Frozen):
    """One training run.

    Attributes:
        source: Origin of the hyperparameters.
        decoder: The decoder to start from. None means that the recipe is for any pair.
    """

    source: str
    decoder: Decoder | None = None
    data: Data = Data()
    training: Training


def recipe_names() -> list[str]:
    """Returns the names of the recipes in the package."""
    folder = resources.files("overfill.making") / "recipes"
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def read_recipe(name_or_file: str) -> Recipe:
    """Reads a recipe of the package or a TOML file.

    Raises:
        InvalidRequest: the recipe does not exist, or a key is unknown or has a wrong value; the message names it.
    """
    try:
        if name_or_file in recipe_names():
            text = (resources.files("overfill.making") / "recipes" / f"{name_or_file}.toml").read_text(encoding="utf-8")
        else:
            text = Path(name_or_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        names = ", ".join(recipe_names())
        raise InvalidRequest("recipe", f"{name_or_file} cannot be read ({error}); packaged are {names}") from None
    try:
        return Recipe.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise InvalidRequest("recipe", f"{name_or_file} is not TOML: {error}") from None
    except ValidationError as error:
        raise InvalidRequest("recipe", f"{name_or_file}: {describe(error)}") from None


_Part = TypeVar("_Part", Training, Data)


def changed(part: _Part, **changes: object) -> _Part:
    """Returns a part of a recipe with the changes that are not None; a new length replaces the recipe's.

    Lengths are ``steps``, ``minutes`` and ``epochs``.

    Raises:
        InvalidRequest: a value is out of range.
    """
    values = part.model_dump()
    given = {key: value for key, value in changes.items() if value is not None}
    if given.keys() & {"steps", "minutes", "epochs"}:
        values |= {"steps": None, "minutes": None, "epochs": None}
    try:
        return type(part).model_validate(values | given)
    except ValidationError as error:
        raise InvalidRequest("", describe(error)) from None


def describe(error: ValidationError) -> str:
    """Lists all problems in one line, each with its dotted key and its value."""
    problems = []
    for each in error.errors():
        text = each["msg"].removeprefix("Value error, ")
        if each["type"] == "extra_forbidden":
            text = "no such key"
        elif each["type"] not in ("missing", "value_error"):
            text += f", got {each['input']!r}"
        problems.append(": ".join([*filter(None, [".".join(map(str, each["loc"]))]), text]))
    return "; ".join(problems)
