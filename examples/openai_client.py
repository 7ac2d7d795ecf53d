"""Use the stack with OpenAI's own Python client: a streamed chat, a JSON schema and a tool call.

Start a stack with `overfill up`, then:

    $ python examples/openai_client.py

OpenAI's variables OPENAI_BASE_URL and OPENAI_API_KEY name another endpoint and its key. The page
docs/reference/openai.md lists the fields that the stack supports.
"""

import os

from openai import OpenAI
from openai.types.chat import ChatCompletionToolParam
from pydantic import BaseModel, Field


class City(BaseModel):
    name: str = Field(max_length=20)
    country: str = Field(max_length=20)


WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city now.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Cairo", "Oslo", "Paris"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def main() -> None:
    client = OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
        api_key=os.environ.get(
            "OPENAI_API_KEY", "none"
        ),  # the client insists on a key; a stack without keys ignores it
    )
    model = client.models.list().data[0].id

    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Why is the sky blue?"}],
        max_completion_tokens=48,
        temperature=0,
        stream=True,
    )
    print("stream:", end=" ")
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)

    parsed = client.chat.completions.parse(
        model=model,
        messages=[{"role": "user", "content": "Name a city and its country."}],
        response_format=City,
        max_completion_tokens=64,
        temperature=0,
    )
    print("\nschema:", repr(parsed.choices[0].message.parsed))

    called = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is the weather in Oslo?"}],
        tools=[WEATHER],
        tool_choice="required",  # a larger model decides by itself, with "auto"
        parallel_tool_calls=False,
        max_completion_tokens=64,
        temperature=0,
    )
    for call in called.choices[0].message.tool_calls or ():
        if call.type == "function":
            print("tool call:", call.function.name, call.function.arguments)


if __name__ == "__main__":
    main()
