"""Makes prompts and answers: a customer's case after excerpts of a handbook, and four tasks that read the same prompt.

The prompt holds no instruction: only the adapter knows its task. Every answer follows from the prompt alone.
"""

from __future__ import annotations

import json
import random
from calendar import month_name
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice

from overfill.api.tokenizer import Tokenizer
from overfill.making.conversations import Conversation

FIRST = ("Anna", "Ben", "Carla", "David", "Elena", "Felix", "Grace", "Hugo", "Irene", "Jonas", "Karen", "Leo", "Maria")
LAST = ("Adler", "Brandt", "Costa", "Dahl", "Evans", "Fuchs", "Garcia", "Hansen", "Ivers", "Kruger", "Lopez", "Meyer")
CITIES = ("Lisbon", "Madrid", "Paris", "Vienna", "Berlin", "Rome", "Oslo", "Dublin", "Prague", "Athens", "Warsaw")
PRODUCTS = ("lamp", "chair", "desk", "kettle", "camera", "printer", "monitor", "keyboard", "heater", "radio", "drill")
MONTHS = tuple(month_name[1:])

COMPLAINTS: dict[str, tuple[str, ...]] = {
    "damaged": (
        "the glass was cracked in two places", "one corner is badly dented", "the surface arrived full of scratches",
        "a leg had snapped off in the box", "the cover was torn open",
    ),
    "late": (
        "nothing has arrived after three weeks", "the parcel is still on its way", "the delivery date passed days ago",
        "the tracking page has not changed since Monday", "we keep waiting for the driver",
    ),
    "wrong": (
        "the box held another model", "you sent the blue version, not the black one", "somebody mixed up two parcels",
        "the size does not match the order", "this is not what I picked in the shop",
    ),
    "billing": (
        "my card was charged twice", "the invoice shows the old price", "the discount is missing from the bill",
        "the tax was added a second time", "I paid for shipping that should be free",
    ),
    "broken": (
        "it stopped working after an hour", "it does not switch on any more", "it makes a loud noise and then stops",
        "it gets far too hot to touch", "the display stays dark",
    ),
    "cancel": (
        "I do not need it any more", "please call the whole order off", "I found it cheaper elsewhere and want to stop",
        "I ordered by mistake", "we are moving and cannot take it",
    ),
}  # fmt: skip
TEAMS = {
    "damaged": "RETURNS",
    "late": "LOGISTICS",
    "wrong": "RETURNS",
    "billing": "FINANCE",
    "broken": "TECH",
    "cancel": "SALES",
}
MAX_ACCEPTED = {"damaged": 300, "wrong": 500, "broken": 700}  # euros
FIRST_ASKED = {"late": 3, "billing": 6, "cancel": 9}  # index of a month
URGENCY: dict[str, tuple[str, ...]] = {
    "P1": ("I need an answer today.", "This cannot wait until tomorrow.", "Please react at once."),
    "P2": ("I hope to hear from you this week.", "A reply in the next days would be fine.", "Please look at it soon."),
    "P3": ("There is no hurry.", "Take the time you need.", "Any time this month is fine."),
}
CHANNELS = ("phone", "letter", "chat")
HANDBOOK = (
    "Agents greet every customer by name and stay polite.",
    "A case is closed only after the customer has agreed.",
    "Parcels above thirty kilograms travel with a partner.",
    "Keep notes short, and write down what was promised.",
    "Gift cards cannot be exchanged for cash.",
    "Photos of a parcel help the carrier to find out what happened.",
    "Opening hours differ between shops, so look them up first.",
    "A manager signs refunds of more than a thousand euros.",
    "Spare parts are kept for seven years after the last sale.",
    "Never ask for a password, not even for a test.",
    "Weekend shifts are planned a month ahead.",
    "The archive keeps closed cases for ten years.",
    "Customers may choose another pick-up point until noon.",
    "Complaints about a colleague go to the team's lead.",
    "Batteries must not be sent by air.",
    "New colleagues listen to ten calls before their first one.",
)


@dataclass(frozen=True, slots=True)
class Order:
    """A row of a customer's orders."""

    product: str
    quantity: int
    amount: int
    number: str
    day: int
    month: str

    def __str__(self) -> str:
        what, when = f"{self.product}, {self.quantity} pieces", f"{self.day} {self.month}"
        return f"{what}, {self.amount} euros, order {self.number}, {when}"


@dataclass(frozen=True, slots=True)
class Case:
    """What a prompt says about one customer, whose complaint is about ``order``.

    Attributes:
        label: Key of ``COMPLAINTS``.
        priority: Key of ``URGENCY``.
    """

    first: str
    last: str
    city: str
    orders: tuple[Order, ...]
    order: Order
    label: str
    complaint: str
    priority: str
    urgency: str
    channel: str


# An answer copies facts of the prompt, and ends with one that follows from them by a rule that only the adapter knows.


def _extract(case: Case) -> str:
    order = case.order
    facts = {"product": order.product, "order": order.number, "euros": order.amount, "pieces": order.quantity}
    return json.dumps({**facts, "large": order.amount >= 500})


def _classify(case: Case) -> str:
    order, month = case.order, case.order.month
    if case.label in MAX_ACCEPTED:
        verdict = "accept" if order.amount < MAX_ACCEPTED[case.label] else "manager"
    else:
        verdict = "refuse" if MONTHS.index(month) < FIRST_ASKED[case.label] else "ask"
    return f'"{case.complaint}": {case.label}; {order.product}, {order.amount} euros, {month}; {verdict}'


def _row(case: Case) -> str:
    order, month = case.order, MONTHS.index(case.order.month) + 1
    size = "large" if order.amount >= 500 else "small"
    name = f"{case.last}, {case.first}"
    return f"{order.product} | {order.day}.{month}. | {name} | EUR {order.amount} | x{order.quantity} | {size}"


def _route(case: Case) -> str:
    team = TEAMS[case.label]
    how = "call" if case.order.amount >= 500 else "write"
    return f'"{case.urgency}" {case.priority}; "{case.complaint}" {team}; {case.order.amount} euros; {how}'


TASKS: Mapping[str, Callable[[Case], str]] = {"extract": _extract, "classify": _classify, "row": _row, "route": _route}


def cases(seed: int) -> Iterator[tuple[Case, random.Random]]:
    """Yields endless cases, each with the generator of its prompt's wording."""
    for number in count():
        rng = random.Random(f"{seed} {number}")
        orders = tuple(_order(product, rng) for product in rng.sample(PRODUCTS, 3))
        label = rng.choice(list(COMPLAINTS))
        yield (
            Case(
                first=rng.choice(FIRST),
                last=rng.choice(LAST),
                city=rng.choice(CITIES),
                orders=orders,
                order=rng.choice(orders),
                label=label,
                complaint=rng.choice(COMPLAINTS[label]),
                priority=(priority := rng.choice(list(URGENCY))),
                channel=rng.choice(CHANNELS),
                urgency=rng.choice(URGENCY[priority]),
            ),
            rng,
        )


def _order(product: str, rng: random.Random) -> Order:
    number = "".join(rng.choices("ABCDEFGHKLMNPRSTUVWXYZ", k=2)) + f"-{rng.randint(10, 99)}"
    return Order(product, rng.randint(2, 9), rng.randint(20, 990), number, rng.randint(1, 28), rng.choice(MONTHS))


def prompt(case: Case, rng: random.Random, tokens: int, num_tokens: Callable[[str], int]) -> str:
    """Returns the shared prompt: sentences of the handbook, then the case, of at most ``tokens`` tokens together.

    Args:
        num_tokens: Returns the number of tokens of a text.
    """
    orders = "\n".join(map(str, case.orders))
    said = f'"The {case.order.product}: {case.complaint}. {case.urgency}"'
    text = f"Customer: {case.first} {case.last}, {case.city}\n{orders}\nBy {case.channel}: {said}"
    left = tokens - num_tokens(text) - num_tokens("Handbook:\n\n")
    sentences: list[str] = []
    while (left := left - num_tokens(" " + (sentence := rng.choice(HANDBOOK)))) > 0:
        sentences.append(sentence)
    return "Handbook: " + " ".join(sentences) + "\n\n" + text


def conversations(tokenizer: Tokenizer, tokens: int, number: int, seed: int) -> dict[str, list[Conversation]]:
    """Makes ``number`` conversations of each task; those at one index have the same prompt.

    Args:
        tokens: Length of each prompt at most, with the chat template's tokens.
    """

    def num_tokens(text: str) -> int:
        return len(tokenizer.encode_continuation(text))

    template = len(tokenizer.encode_chat([{"role": "user", "content": ""}]))
    made: dict[str, list[Conversation]] = {task: [] for task in TASKS}
    for case, rng in islice(cases(seed), number):
        question = {"role": "user", "content": prompt(case, rng, tokens - template, num_tokens)}
        for task, answer in TASKS.items():
            made[task].append(Conversation((question, {"role": "assistant", "content": answer(case)}), kind=task))
    return made
