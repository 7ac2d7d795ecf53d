"""Run a PydanticAI agent on the stack: it calls a function, then answers with a typed object.

Start a stack with `overfill up`, then:

    $ python examples/agent.py "What should I wear in Oslo?"

The agent speaks OpenAI's API, so OPENAI_BASE_URL and OPENAI_API_KEY name another endpoint and its key. Grammars keep
the arguments and the final object valid. The demo model is too small to decide what to do next, so `one_step_each`
names the tool of each step. A larger model needs no such settings; leave them out.
"""

import os
import sys
from typing import Literal

from pydantic import BaseModel, Field
from pydantic_ai import Agent, ModelSettings, RunContext, UsageLimits
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

CITIES = {"Cairo": (34, "sunny"), "Oslo": (-3, "snowy"), "Tokyo": (22, "rainy")}


class Advice(BaseModel):
    degrees: int = Field(ge=-50, le=50)
    sky: Literal["sunny", "snowy", "rainy"]
    wear: Literal["a coat", "a raincoat", "a sun hat"]


def one_step_each(context: RunContext[None]) -> ModelSettings:
    tool = "weather" if context.run_step == 1 else "final_result"
    return ModelSettings(temperature=0, max_tokens=64, parallel_tool_calls=False, tool_choice=[tool])


agent = Agent(
    instructions="Look up the weather, then give advice.",
    output_type=Advice,
    model_settings=one_step_each,
)


@agent.tool_plain
def weather(city: Literal["Cairo", "Oslo", "Tokyo"]) -> str:
    """The weather in a city now."""
    degrees, sky = CITIES[city]
    print(f"weather({city!r}) -> {degrees} degrees, {sky}")
    return f"It is {degrees} degrees and {sky} in {city}."


def main(question: str) -> None:
    provider = OpenAIProvider(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
    )
    model = OpenAIChatModel("default", provider=provider)
    result = agent.run_sync(question, model=model, usage_limits=UsageLimits(request_limit=5))
    print(repr(result.output))
    print(f"{result.usage.requests} requests, {result.usage.output_tokens} tokens")


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "What should I wear in Oslo?")
