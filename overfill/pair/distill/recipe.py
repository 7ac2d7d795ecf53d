"""Training recipes: TOML files with the models, the data and every hyperparameter. Needs no torch.

Packaged recipes are found by name; any other is a file. Unknown keys are errors.
"""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from overfill.errors import InvalidRequest

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Training(_Frozen):
    """Hyperparameters.

    Attributes:
        steps, minutes, epochs: how long to train; exactly one of them. Minutes count training, not evaluation; the
            schedule then follows the clock, so that runs of equal minutes are not bit-equal.
        batch_transcripts: transcripts per step, over all processes.
        pack_rows: tokens that one forward pass computes at most; a batch is run in as many packs as it takes.
        warmup: share of the run in which the learning rate rises; then it follows a cosine.
        final_rate: share of the learning rate that is left at the end.
        clip: largest norm of the gradient.
        cross_entropy, kl, temperature: the loss, as in ``overfill.pair.distill.loss``.
        top_tokens: how many of the full model's most likely tokens KL looks at; the rest count as one token. 0: all.
        sampled_tokens: with ``top_tokens``, how many tokens are drawn for each pass to stand for those that are neither
            an answer's nor likely; 0: the whole vocabulary. Only the loss is estimated, evaluation is exact.
        recompute_activations: trades a third more computing for memory (gradient checkpointing).
        fused: torch.compile fuses what is between the matrix products: a fifth less time, after a minute of compiling.
            Without a compiler, training goes on without.
        eval_steps: steps between evaluations on held-out transcripts.
        checkpoint_steps, checkpoint_minutes: a checkpoint is due when either has passed; None: the minutes only.
        cache_gib: room for what the full model computed, so that later epochs need not; 0 turns it off.
    """

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
        if self.cross_entropy + self.kl == 0:
            raise ValueError("cross_entropy and kl must not both be 0")
        if self.top_tokens and (self.temperature != 1 or self.kl == 0):
            raise ValueError("top_tokens needs temperature 1 and a kl above 0")
        if self.sampled_tokens and not self.top_tokens:
            raise ValueError("sampled_tokens needs top_tokens, such as 32")
        return self


class Data(_Frozen):
    """Where conversations come from.

    Attributes:
        source: ``shipped``, a file of JSON lines, or the id of a data set on the Hugging Face hub, where ``:split`` may
            follow in place of ``split``.
        split, held_out_split: of a hub data set; a file and the shipped set need none.
        column: of a hub data set, with messages of ``role`` and ``content`` (or ``from`` and ``value``).
        held_out: ``shipped`` or a file; None takes ``held_out_split``.
        max_tokens: longer transcripts lose the end of their answer.
        max_held_out: transcripts that are evaluated at most.
    """

    source: str = "shipped"
    split: str = "train"
    held_out_split: str | None = None
    column: str = "messages"
    held_out: str | None = None
    max_tokens: Positive = 1024
    max_held_out: Positive = 100


class FullModel(_Frozen):
    """The full model's id, and its widths, so that a dry run need not download it."""

    id: str
    hidden_size: Positive
    intermediate_size: Positive
    num_heads: Positive
    num_kv_heads: Positive
    head_dim: Positive


class Decoder(_Frozen):
    """The decoder to start from, in the words of ``overfill pair build``."""

    hidden_size: Positive
    intermediate_size: Positive
    method: Literal["channel", "rotate"] = "channel"
    fit: Literal["none", "least-squares"] = "none"
    calibration: str = "shipped"


class Recipe(_Frozen):
    """One training run.

    Attributes:
        source: where the figures come from.
        full, decoder: None in recipes for any pair.
    """

    source: str
    full: FullModel | None = None
    decoder: Decoder | None = None
    data: Data = Data()
    training: Training


def recipe_names() -> list[str]:
    """The packaged recipes."""
    folder = resources.files("overfill.pair") / "recipes"
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def read_recipe(name_or_file: str) -> Recipe:
    """A packaged recipe, or a TOML file.

    Raises:
        InvalidRequest: there is no such recipe, or a key is unknown or has a wrong value; it is named.
    """
    try:
        if name_or_file in recipe_names():
            text = (resources.files("overfill.pair") / "recipes" / f"{name_or_file}.toml").read_text(encoding="utf-8")
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
    """A part of a recipe with the changes that are not None; a length (steps, minutes, epochs) replaces any other.

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
    """All problems in one line, each with its dotted key."""
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}".lstrip(": ") for e in error.errors())
