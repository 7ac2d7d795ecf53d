"""Asks a server for objects with instructor or LangChain, as their users do, and prints what the library returns.

``python client_libraries.py LIBRARY URL MODEL N`` asks with N seeds and prints one object per line. A test runs it with
the libraries in ``.venv/clients``, because instructor needs older releases of openai and rich than the project's tools.
"""

from __future__ import annotations

import sys
from typing import Annotated, Literal

from pydantic import BaseModel, Field

PROMPT = "Ada Lovelace, 36, lives in London."


class Address(BaseModel):
    city: Annotated[str, Field(max_length=8)]
    country: Literal["GB", "FR"]


class Person(BaseModel):
    name: Annotated[str, Field(max_length=8)]
    age: Annotated[int, Field(ge=0, le=120)]
    addresses: Annotated[list[Address], Field(max_length=2)]


def instructor(url: str, model: str, seed: int) -> Person:
    """Returns the last of the partial objects that a stream gives."""
    import instructor
    import openai

    client = instructor.from_openai(openai.OpenAI(base_url=url, api_key="none", max_retries=0))
    *_, last = client.chat.completions.create_partial(
        model=model, response_model=Person, messages=[{"role": "user", "content": PROMPT}], seed=seed, max_tokens=1000
    )
    return Person.model_validate(last.model_dump())


def langchain(url: str, model: str, seed: int) -> Person:
    """Returns the arguments of the tool call for which LangChain asks."""
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=url, api_key="none", model=model, seed=seed, max_tokens=1000, max_retries=0)
    made = chat.with_structured_output(Person, method="function_calling").invoke(PROMPT)
    assert isinstance(made, Person), made
    return made


if __name__ == "__main__":
    library, url, model, count = sys.argv[1:]
    ask = {"instructor": instructor, "langchain": langchain}[library]
    for seed in range(int(count)):
        print(ask(url, model, seed).model_dump_json())
