"""Let the model call a function: it chooses the arguments, we run the function, and it answers with the result.

Start a stack with `overfill up`, then:

    $ python examples/tools.py "What is the weather in Paris?"

A grammar keeps every call valid: arguments always fit the schema. The demo model is too small to decide by itself when
to call and how to answer, so `tool_choice` requires the call, and a regular expression gives the answer its form. For a
larger model use tool_choice="auto", repeat `chat` as long as answers have tool calls, and leave the expression out.
"""

import json
import os
import sys

from overfill.client import Client, Grammar, Message, SamplingParams, Tool

ADDRESS = os.environ.get("OVERFILL_ADDRESS", "127.0.0.1:7600")
CITIES = {"Cairo": (34, "sunny"), "Oslo": (-3, "snowy"), "Paris": (18, "cloudy"), "Tokyo": (22, "rainy")}
WEATHER = Tool(
    "weather",
    "The weather in a city now.",
    {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": list(CITIES)}},
        "required": ["city"],
        "additionalProperties": False,
    },
)
FORM = Grammar("regex", r"It is -?[0-9]{1,2} degrees and (sunny|snowy|cloudy|rainy) in (Cairo|Oslo|Paris|Tokyo)\.")


def weather(city: str) -> dict[str, object]:
    degrees, sky = CITIES[city]
    return {"city": city, "degrees": degrees, "sky": sky}


FUNCTIONS = {"weather": weather}


def main(question: str) -> None:
    messages = [Message("user", question)]
    with Client(ADDRESS, api_key=os.environ.get("OVERFILL_API_KEY")) as client:
        asked = client.chat(
            messages,
            tools=[WEATHER],
            tool_choice="required",
            single_tool_call=True,
            sampling=SamplingParams(temperature=0, max_tokens=64),
        )
        messages.append(asked.message)
        for call in asked.tool_calls:
            result = FUNCTIONS[call.name](**json.loads(call.arguments))
            print(f"{call.name}({call.arguments}) -> {result}")
            messages.append(Message("tool", json.dumps(result), tool_call_id=call.id))
        # Without tools, because with them a grammar must be a JSON schema.
        answer = client.chat(messages, sampling=SamplingParams(temperature=0, max_tokens=32, grammar=FORM))
    print(answer.text)


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "What is the weather in Paris?")
