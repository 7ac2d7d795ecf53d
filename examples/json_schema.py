"""Get an answer as a checked Python object: a pydantic model gives the schema, and the answer is parsed with it.

Start a stack with `overfill up`, then:

    $ python examples/json_schema.py "A recipe for pancakes"

A grammar made from the schema allows only tokens that keep the answer valid, so parsing cannot fail unless `max_tokens`
cuts the answer. Limits in the schema keep a small model short. A larger model fills in values that make more sense.
"""

import os
import sys
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from overfill.client import Client, Grammar, Message, SamplingParams

ADDRESS = os.environ.get("OVERFILL_ADDRESS", "127.0.0.1:7600")
Text = Annotated[str, Field(max_length=40, pattern="^[A-Za-z ]+$")]


class Ingredient(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: Text
    grams: Annotated[int, Field(ge=1, le=1000)]


class Recipe(BaseModel):
    model_config = ConfigDict(extra="forbid")
    title: Text
    difficulty: Literal["easy", "medium", "hard"]
    ingredients: Annotated[list[Ingredient], Field(min_length=2, max_length=4)]


def main(wish: str) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=256, grammar=Grammar.json_schema(Recipe.model_json_schema()))
    messages = [Message("system", "Answer with a recipe as JSON."), Message("user", wish)]
    with Client(ADDRESS, api_key=os.environ.get("OVERFILL_API_KEY")) as client:
        answer = client.chat(messages, sampling=sampling)
    if answer.finish_reason == "length":
        sys.exit(f"the answer was cut at {answer.usage.completion_tokens} tokens; raise max_tokens")
    recipe = Recipe.model_validate_json(answer.text)
    print(f"{recipe.title} ({recipe.difficulty})")
    for ingredient in recipe.ingredients:
        print(f"  {ingredient.grams:4} g {ingredient.name}")


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "A recipe for pancakes")
