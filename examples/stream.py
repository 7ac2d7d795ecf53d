"""Stream an answer, and print how its time was spent.

Start a stack with `overfill up`, then:

    $ python examples/stream.py "Why is the sky blue?"

The demo model has 135 million parameters: it answers fluently, but is often wrong. A larger model needs no other code.
"""

import os
import sys

from overfill.client import TTFT_PARTS, Client, Message, OverfillError, SamplingParams

ADDRESS = os.environ.get("OVERFILL_ADDRESS", "127.0.0.1:7600")
SAMPLING = SamplingParams(temperature=0.7, max_tokens=80, seed=1)


def main(question: str) -> None:
    with Client(ADDRESS, api_key=os.environ.get("OVERFILL_API_KEY")) as client:
        # Leaving the block early, for instance by ctrl-C, cancels the request.
        with client.stream([Message("user", question)], sampling=SAMPLING) as stream:
            for delta in stream:
                print(delta.text, end="", flush=True)
        answer = stream.answer  # the whole answer, once the last delta has arrived

    usage, timing = answer.usage, answer.timing
    print(f"\n\n{usage.completion_tokens} tokens; ended by {answer.finish_reason!r}; seed {answer.seed}")
    print(f"{usage.prompt_tokens} prompt tokens, of which {usage.cached_tokens} were in a prefix cache")
    if timing.ttft is not None and timing.total is not None:
        print(f"time to first token: {1e3 * timing.ttft:.1f} ms of {1e3 * timing.total:.1f} ms")
        for part in TTFT_PARTS:
            print(f"  {part:<20} {1e3 * (getattr(timing, part) or 0):8.1f} ms")


if __name__ == "__main__":
    try:
        main(" ".join(sys.argv[1:]) or "Why is the sky blue?")
    except OverfillError as error:
        sys.exit(f"{type(error).__name__}: {error}")
