"""A load test with tasks of one's own: users who ask short questions, and users who hold conversations.

Start a stack with `overfill up`, then:

    $ locust -f examples/locustfile.py --headless --users 4 --run-time 10s --stop-timeout 30s --only-summary

`--host` (or LOCUST_HOST) names another router. Each kind of request has its own rows: the time to first token (TTFT),
the time between tokens (ITL) and end to end, in milliseconds. Without `--headless`, locust shows its page on port 8089.
For synthetic load and traces with objectives, `overfill loadtest` needs no file.
"""

from itertools import count

from locust import between, task

from overfill.client import Message, SamplingParams
from overfill.lab.loadtest.users import ClientUser

FRUITS = ("apples", "pears", "plums", "cherries")
_NUMBERS = count()


class Searcher(ClientUser):
    """Three of four users; they wait up to a second between their questions."""

    weight = 3
    wait_time = between(0, 1)

    @task
    def question(self) -> None:
        number = next(_NUMBERS)
        prompt = [Message("user", f"Question {number}: where do {FRUITS[number % len(FRUITS)]} grow?")]
        self.ask("question", prompt, sampling=SamplingParams(max_tokens=16), timeout=30)


class Talker(ClientUser):
    """Each turn of a conversation repeats the turns before it, whose KV the prefix cache has."""

    weight = 1
    wait_time = between(1, 2)

    @task
    def conversation(self) -> None:
        messages = [Message("system", "You are a patient teacher.")]
        for text in ("What is rain?", "Explain it to a child.", "And what is snow?"):
            messages.append(Message("user", text))
            answer = self.ask("turn", messages, sampling=SamplingParams(max_tokens=48, min_tokens=8))
            messages.append(answer.message)
            self.wait()  # as long as wait_time says
