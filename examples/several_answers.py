"""Ask for several answers to one prompt, and rank them by the probability that the model gives its own tokens.

Start a stack with `overfill up`, then:

    $ python examples/several_answers.py "Name a fruit." 4

The prompt is prefilled once, because the prefix cache has its KV for the other answers. One seed gives all answers: the
same seed asks for the same ones. Ranking by mean log-probability is best-of-n in its simplest form.
"""

import math
import os
import sys
from statistics import fmean

from overfill.client import Answer, Client, Message, SamplingParams

ADDRESS = os.environ.get("OVERFILL_ADDRESS", "127.0.0.1:7600")


def mean_logprob(answer: Answer) -> float:
    return fmean(token.logprob for token in answer.logprobs or ())


def main(question: str, n: int) -> None:
    # logprobs=2: with the probability of each token, those of the two likeliest in its place.
    sampling = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=24, logprobs=2, seed=7)
    with Client(ADDRESS, api_key=os.environ.get("OVERFILL_API_KEY")) as client:
        answers = client.samples([Message("user", question)], n, sampling=sampling)
        best, *others = sorted(answers, key=mean_logprob, reverse=True)
        for answer in (best, *others):
            print(f"{math.exp(mean_logprob(answer)):6.1%} per token  {answer.text.strip()!r}")
        first = (best.logprobs or ())[0]
        print("The likeliest beginnings:")
        for token_id, logprob in first.top:
            print(f"{math.exp(logprob):6.1%}            {client.detokenize([token_id])!r}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "Name a fruit.", int(sys.argv[2]) if len(sys.argv) > 2 else 4)
