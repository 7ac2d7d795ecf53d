"""Makes prompts and answers: a customer's case after excerpts of a handbook, and four tasks that read the same prompt.

The prompt holds no instruction: only the adapter knows its task. Every answer follows from the prompt alone.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

FIRST = "Anna Ben Carla David Elena Felix Grace Hugo Irene Jonas Karen Leo Maria Nina Oscar Paula Ralf Sara Tom Vera".split()
LAST = "Adler Brandt Costa Dahl Evans Fuchs Garcia Hansen Ivers Jones Kruger Lopez Meyer Novak Olsen Park Rossi Silva".split()
CITIES = "Lisbon Madrid Paris Vienna Berlin Rome Oslo Dublin Prague Athens Warsaw Zurich Hamburg Milan Turin Ghent".split()
PRODUCTS = "lamp chair desk kettle camera printer monitor keyboard backpack heater radio mirror clock tent drill".split()
MONTHS = "January February March April May June July August September October November December".split()

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
        "the box held another model", "you sent the blue version, not the black one", "the size does not match the order",
        "this is not what I picked in the shop", "somebody mixed up two parcels",
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
    "damaged": ("RETURNS", "photo, pickup, replace"),
    "late": ("LOGISTICS", "trace, inform"),
    "wrong": ("RETURNS", "pickup, resend"),
    "billing": ("FINANCE", "check, refund"),
    "broken": ("TECH", "test, repair"),
    "cancel": ("SALES", "confirm, refund"),
}
URGENCY: dict[str, tuple[str, ...]] = {
    "P1": ("I need an answer today.", "This cannot wait until tomorrow.", "Please react at once."),
    "P2": ("I hope to hear from you this week.", "A reply in the next days would be fine.", "Please look at it soon."),
    "P3": ("There is no hurry.", "Take the time you need.", "Any time this month is fine."),
}
CHANNELS = {"phone": "PHONE", "letter": "POST", "chat": "CHAT"}
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
class Case:
    """What a prompt says about one customer; ``label`` is a key of ``COMPLAINTS``, ``priority`` of ``URGENCY``."""

    first: str
    last: str
    city: str
    product: str
    quantity: int
    amount: int
    order: str
    day: int
    month: str
    label: str
    complaint: str
    priority: str
    channel: str


def _extract(case: Case) -> str:
    return json.dumps(
        {"customer": f"{case.first} {case.last}", "city": case.city, "product": case.product, "order": case.order}
    )


def _classify(case: Case) -> str:
    return f'{case.label}, because "{case.complaint}"'


def _row(case: Case) -> str:
    date = f"{case.day}.{MONTHS.index(case.month) + 1}."
    return f"{date} | {case.last}, {case.first} | {case.quantity} x {case.product} | {case.amount} EUR"


def _route(case: Case) -> str:
    team, steps = TEAMS[case.label]
    return f"team {team}; priority {case.priority}; reply by {CHANNELS[case.channel]}; steps: {steps}"


TASKS: Mapping[str, Callable[[Case], str]] = {
    "extract": _extract,
    "classify": _classify,
    "row": _row,
    "route": _route,
}


def cases(seed: int) -> Iterator[tuple[Case, random.Random]]:
    """Yields endless cases, each with the generator of its prompt's wording."""
    for number in range(1 << 40):
        rng = random.Random(f"{seed} {number}")
        label, priority = rng.choice(list(COMPLAINTS)), rng.choice(list(URGENCY))
        yield Case(
            first=rng.choice(FIRST),
            last=rng.choice(LAST),
            city=rng.choice(CITIES),
            product=rng.choice(PRODUCTS),
            quantity=rng.randint(2, 9),
            amount=rng.randint(20, 990),
            order="".join(rng.choices("ABCDEFGHKLMNPRSTUVWXYZ", k=2)) + f"-{rng.randint(1000, 9999)}",
            day=rng.randint(1, 28),
            month=rng.choice(MONTHS),
            label=label,
            complaint=rng.choice(COMPLAINTS[label]),
            priority=priority,
            channel=rng.choice(list(CHANNELS)),
        ), rng


def prompt(case: Case, rng: random.Random, tokens: int, count: Callable[[str], int]) -> str:
    """Returns the shared prompt: sentences of the handbook, then the case, of at most ``tokens`` tokens together.

    Args:
        count: Returns the number of tokens of a text.
    """
    other, earlier = rng.choice(LAST), f"{rng.choice('ABCDEFGH')}{rng.choice('KLMNPRST')}-{rng.randint(1000, 9999)}"
    facts = [
        f"{case.first} {case.last} from {case.city} ordered {case.quantity} pieces of the {case.product} "
        f"for {case.amount} euros.",
        f"The order {case.order} is of {case.month} {case.day}.",
        f"Mrs {other} handled the earlier order {earlier}.",
    ]
    rng.shuffle(facts)
    said = f'The customer wrote by {case.channel}: "{case.complaint}. {rng.choice(URGENCY[case.priority])}"'
    rng.choice((facts.append, lambda text: facts.insert(0, text)))(said)
    text = "Case:\n" + " ".join(facts)
    left = tokens - count(text) - count("Handbook:\n\n")
    sentences: list[str] = []
    while (left := left - count(" " + (sentence := rng.choice(HANDBOOK)))) > 0:
        sentences.append(sentence)
    return "Handbook:\n" + " ".join(sentences) + "\n\n" + text
