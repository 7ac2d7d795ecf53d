"""Fuzzes clients' grammars against a running router and workers, with a second client beside them.

Grammars are made from a grammar of grammars: chains of references, products of automata, large numbers, nesting, Lark
and regular expressions. One API key sends them; another key sends plain requests and ``json_object`` before and during
the fuzz. The report says what the second key saw, which answers were wrong, which processes died, and their memory::

    python tests/fuzz/fuzz_grammars.py --seconds 600

It exits with 1 if a bound does not hold. A grammar is made from the seed and its number, so that it can be made again.
"""

from __future__ import annotations

import argparse
import collections
import http.client
import itertools
import json
import random
import re
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(root), str(root / "tests" / "integration")]

import jsonschema
import psutil
from stacks import running_stack

from overfill.api import key_file as api_keys

SEED = 11
GROWTH = 64 << 20
"""Bytes by which a process may grow between the first minute and the end."""

SLOWER = 2.0
"""Factor by which the fuzz may raise the other key's 95th percentile."""

_MEDIAN_OF = 50  # samples of memory, of 0.2 s each
FUZZERS = 6  # connections of the key that fuzzes
_TRIAL_BYTES = 2 * (64 << 20)  # what a trial may take in addition to the helper process
_TRIALS = 3  # at once


# --- a grammar of grammars ---------------------------------------------------------------------------------------


class Maker:
    """Makes grammars with sizes over several orders of magnitude."""

    def __init__(self, number: int, seed: int = SEED) -> None:
        self.rng = random.Random(f"{seed}/{number}")
        self.budget = self.size(1, 400)

    def size(self, least: int, most: int) -> int:
        """Draws a number between the two; each order of magnitude is as likely as the others."""
        return min(most, int(least * (most / least) ** self.rng.random()))

    def request(self) -> dict:
        """Fields of an OpenAI request that carry a grammar."""
        kind = self.rng.choice(("schema", "schema", "schema", "tools", "regex", "lark", "guided_json", "choice"))
        match kind:
            case "schema":
                return {"response_format": {"type": "json_schema",
                                            "json_schema": {"name": "x", "schema": self.document()}}}  # fmt: skip
            case "guided_json":
                return {"guided_json": self.document()}
            case "tools":
                tools = [
                    {"type": "function", "function": {
                        "name": f"f{i}", "strict": self.rng.random() < 0.3, "parameters": self.object_document()}}
                    for i in range(self.size(1, 20))
                ]  # fmt: skip
                return {"tools": tools, "tool_choice": self.rng.choice(("auto", "required"))}
            case "regex":
                return {"guided_regex": self.regex(self.size(1, 6))}
            case "choice":
                return {"guided_choice": ["x" * self.size(1, 60) + str(i) for i in range(self.size(1, 2000))]}
            case _:
                return {"guided_grammar": self.lark()}

    def object_document(self) -> dict:
        document = self.document()
        return document if document.get("type") == "object" else {"type": "object", "properties": {"a": document}}

    def document(self) -> dict:
        rng = self.rng
        shape = rng.choice(("tree", "tree", "chain", "product", "number", "wide", "nested", "cycle"))
        match shape:
            case "chain":
                return self.chain(self.size(2, 2000))
            case "product":
                one = self.regex(2)
                parts = [self.product_part(i, one) for i in range(1, self.size(2, 60))]
                return {rng.choice(("allOf", "allOf", "anyOf", "oneOf")): parts}
            case "number":
                return self.number()
            case "wide":
                names = [f"p{i}" for i in range(self.size(2, 1500))]
                document = {"type": "object", "properties": {name: self.leaf() for name in names}}
                return document | ({"required": names} if rng.random() < 0.5 else {})
            case "nested":
                document = self.leaf()
                for level in range(self.size(2, 250)):
                    document = self.wrap(document, level)
                return document
            case "cycle":
                count = self.size(1, 40)
                defs = {f"d{i}": self.node(f"#/$defs/d{rng.randrange(count)}") for i in range(count)}
                return {"$ref": "#/$defs/d0", "$defs": defs}
            case _:
                return self.schema(self.size(1, 6))

    def product_part(self, index: int, one: str) -> dict:
        return {"type": "string", "pattern": self.rng.choice((
            f"a.{{{index}}}b", f"(ab){{{index},{2 * index}}}", f".*x.{{{index}}}y", f"{one}{{{index}}}",
            f"^[a-{chr(97 + index % 26)}]*$",
        ))}  # fmt: skip

    def chain(self, links: int) -> dict:
        defs = {f"d{i}": self.node(f"#/$defs/d{i + 1}") for i in range(links)}
        return {"$ref": "#/$defs/d0", "$defs": {**defs, f"d{links}": self.leaf()}}

    def node(self, target: str) -> dict:
        return self.wrap({"$ref": target}, self.rng.randrange(6))

    def wrap(self, inner: dict, kind: int) -> dict:
        match kind % 6:
            case 0:
                return {"type": "object", "properties": {"a": inner}}
            case 1:
                return {"anyOf": [inner, {"type": "null"}]}
            case 2:
                return {"type": "array", "items": inner}
            case 3:
                return {"allOf": [inner]}
            case 4:
                return {"type": "object", "additionalProperties": inner}
            case _:
                return {"type": "array", "prefixItems": [inner], "items": False}

    def number(self) -> dict:
        rng, schema = self.rng, {"type": self.rng.choice(("integer", "number"))}
        if rng.random() < 0.7:
            schema["multipleOf"] = rng.choice((self.size(1, 10**9), 0.01, 0.5, self.size(1, 10**4) * 2 + 1))
        if rng.random() < 0.5:
            schema["minimum"] = -self.size(1, 10**18)
        if rng.random() < 0.5:
            schema["maximum"] = self.size(1, 10 ** self.size(1, 300))
        return schema

    def leaf(self) -> dict:
        rng = self.rng
        match rng.randrange(7):
            case 0:
                return self.number()
            case 1:
                return {"type": "string", "pattern": self.regex(2)}
            case 2:
                least = self.size(1, 10**6)
                return {"type": "string", "minLength": least, "maxLength": least + self.size(1, 10**6)}
            case 3:
                return {"enum": [f"v{i}" * self.size(1, 20) for i in range(self.size(1, 300))]}
            case 4:
                return {
                    "type": "string",
                    "format": rng.choice(("date-time", "uuid", "email", "ipv6", "uri")),
                }
            case 5:
                return {"const": rng.choice((None, 1, "x", [1, {"a": 2}], {"k": "v"}))}
            case _:
                return {"type": rng.choice(("string", "boolean", "null", "integer"))}

    def schema(self, depth: int) -> dict:
        self.budget -= 1
        if depth <= 0 or self.budget <= 0:
            return self.leaf()
        rng, deeper = self.rng, depth - 1
        match rng.randrange(4):
            case 0:
                properties = {f"k{i}": self.schema(deeper) for i in range(self.size(1, 8))}
                required = [name for name in properties if rng.random() < 0.5]
                return {"type": "object", "properties": properties, "required": required,
                        "additionalProperties": rng.choice((False, True, {"type": "integer"}))}  # fmt: skip
            case 1:
                least = self.size(1, 10**5) - 1
                return {"type": "array", "items": self.schema(deeper), "minItems": least,
                        "maxItems": least + self.size(1, 10**6)}  # fmt: skip
            case 2:
                parts = [self.schema(deeper) for _ in range(self.size(1, 6))]
                return {rng.choice(("anyOf", "oneOf", "allOf")): parts}
            case _:
                return {"type": "object", "patternProperties": {self.regex(1): self.schema(deeper)}}

    def regex(self, depth: int) -> str:
        rng = self.rng
        if depth <= 0:
            return rng.choice(("a", "b", ".", "[a-z]", "[^x]", r"\d", r"\w", r"\s", r"\p{L}", "é", "x{3}", "(a|b)"))
        inner = [self.regex(depth - 1) for _ in range(self.size(1, 4))]
        match rng.randrange(5):
            case 0:
                return "".join(inner)
            case 1:
                return f"({'|'.join(inner)})"
            case 2:
                least = self.size(1, 300) - 1
                return f"({inner[0]}){{{least},{least + self.size(1, 2000)}}}"
            case 3:
                return f"({inner[0]}){rng.choice('*+?')}"
            case _:
                return f"({inner[0]}.*){{{self.size(1, 40)}}}{inner[-1]}"

    def lark(self) -> str:
        rng, count = self.rng, self.size(1, 3000)
        names = [f"r{i}" for i in range(count)]
        shape = rng.choice(("chain", "graph", "ambiguous", "terminals", "nested"))
        match shape:
            case "chain":
                rules = [f'{name}: "a" {follower}' for name, follower in itertools.pairwise([*names, "last"])]
                return "\n".join(["start: r0", *rules, f"last: {rng.choice(('/b+/', chr(34) + 'b' + chr(34)))}"])
            case "graph":
                count = min(count, 200)
                bodies = [" | ".join(self.sequence(count) for _ in range(self.size(1, 5))) for _ in range(count)]
                return "\n".join(["start: r0", *(f"r{i}: {body}" for i, body in enumerate(bodies))])
            case "ambiguous":
                width = self.size(1, 30)
                return "start: s\ns: " + " | ".join(" ".join(["s"] * i) for i in range(2, 2 + width)) + ' | "a" | "b"\n'
            case "terminals":
                count = min(count, 2000)
                rules = [f"T{i}: T{i + 1} {rng.choice(('/a/', '/b?/', '/[ab]+/'))}" for i in range(count)]
                product = " & ".join(f"/(.*a.{{{i}}}b.*)/" for i in range(1, self.size(2, 25)))
                return "\n".join(["start: T0 | P", *rules, f"T{count}: /x/", f"P: {product}"])
            case _:
                depth = self.size(1, 400)
                return f"start: {'(' * depth}{json.dumps(self.regex(0))}{')?' * depth}\n"

    def sequence(self, count: int) -> str:
        rng = self.rng
        parts = [
            rng.choice((f"r{rng.randrange(count)}", '"x"', f"/{self.regex(1)}/".replace("é", "e"),
                        '%json {"type": "integer"}', f"r{rng.randrange(count)}{rng.choice('*+?')}"))
            for _ in range(self.size(1, 4))
        ]  # fmt: skip
        return " ".join(parts)


# --- clients -----------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What the clients saw."""

    statuses: collections.Counter = field(default_factory=collections.Counter)
    wrong: list = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, status: object, what: object = None) -> None:
        with self.lock:
            self.statuses[status] += 1
            if what is not None:
                self.wrong.append(what)


class Caller:
    """A client with one connection and a key."""

    def __init__(self, address: str, key: str) -> None:
        self._address, self._key = address, key
        self._connection = http.client.HTTPConnection(address, timeout=120)

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def ask(self, **fields: object) -> tuple[int, dict]:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "What?"}], **fields}
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
        try:
            self._connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            response = self._connection.getresponse()
            return response.status, json.loads(response.read())
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            return 0, {"error": {"message": repr(error)}}


def fuzz(address: str, key: str, numbers: itertools.count, seed: int, seen: Seen, until: float) -> None:
    with Caller(address, key) as caller:
        while time.monotonic() < until:
            number = next(numbers)
            maker = Maker(number, seed)
            fields = maker.request()
            status, answer = caller.ask(**fields, max_tokens=maker.size(1, 48), temperature=1, seed=number)
            seen.add(status if status != 400 else f"400 {reason(answer)}", fault(number, fields, status, answer))


def reason(answer: dict) -> str:
    message = str(answer.get("error", {}).get("message", ""))
    return "too complex" if "too complex" in message else "other"


def fault(number: int, fields: dict, status: int, answer: dict) -> object:
    """What is wrong with an answer; None if it is right."""
    if status not in (200, 400, 429):
        return number, status, answer
    if status != 200:
        return None
    choice = answer["choices"][0]
    if choice["finish_reason"] not in ("stop", "tool_calls"):
        return None
    text = choice["message"]["content"] or ""
    try:
        if "response_format" in fields or "guided_json" in fields:
            schema = fields.get("guided_json") or fields["response_format"]["json_schema"]["schema"]
            value = json.loads(text)
            if not re.search(r'"pattern|"format|"\$ref', json.dumps(schema)):  # Python's automata differ, and recurse
                jsonschema.validate(value, schema)
        elif "guided_choice" in fields:
            assert text in fields["guided_choice"], "is no choice"
        else:
            for call in choice["message"].get("tool_calls") or ():
                json.loads(call["function"]["arguments"])
    except (ValueError, AssertionError, jsonschema.ValidationError) as error:
        return number, status, text[:200], str(error)[:200]
    return None


def measure(address: str, key: str, seen: Seen, until: float) -> dict[str, list[float]]:
    """Latencies of the other key's requests, in seconds, by kind."""
    times = collections.defaultdict(list)
    kinds = {"plain": {}, "json_object": {"response_format": {"type": "json_object"}}}
    with Caller(address, key) as caller:
        for turn in itertools.count():
            if time.monotonic() > until:
                break
            for kind, fields in kinds.items():
                began = time.monotonic()
                status, answer = caller.ask(**fields, max_tokens=16, temperature=1, seed=turn)
                times[kind].append(time.monotonic() - began)
                bad = status != 200
                if not bad and fields and answer["choices"][0]["finish_reason"] == "stop":
                    bad = not isinstance(json.loads(answer["choices"][0]["message"]["content"]), dict)
                seen.add(f"other key: {kind} {status}", (kind, status, answer) if bad else None)
    return times


def p95(times: list[float]) -> float:
    return statistics.quantiles(times, n=20)[-1] if len(times) > 1 else times[0]


# --- processes ---------------------------------------------------------------------------------------------------


class Memory:
    """Resident memory of the stack's processes, and the most that each helper took with its trials, in bytes.

    A process's memory goes up and down with the requests that it parses, so ``read`` returns medians of some seconds.
    """

    def __init__(self, processes: dict[str, psutil.Process]) -> None:
        self.processes = processes
        self._samples: collections.defaultdict[str, collections.deque[int]] = collections.defaultdict(
            lambda: collections.deque(maxlen=_MEDIAN_OF)
        )
        self.helpers: dict[str, tuple[int, int]] = {}  # name -> most of the helper, and of its trials together
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def read(self) -> dict[str, int]:
        return {name: int(statistics.median(sizes)) for name, sizes in sorted(self._samples.items())}

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            for name, process in self.processes.items():
                try:
                    self._samples[name].append(process.memory_info().rss)
                    for helper in process.children():
                        if "overfill.request.trial_helper" not in helper.cmdline():
                            continue  # it has not left its parent's memory yet
                        own = helper.memory_info().rss
                        self._samples[f"{name}'s helper"].append(own)
                        trials = sum(max(0, trial.memory_info().rss - own) for trial in helper.children())
                        most, most_trials = self.helpers.get(name, (0, 0))
                        self.helpers[name] = max(most, own), max(most_trials, trials)
                except psutil.Error:
                    continue  # a trial has ended

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def run(pair: Path, seconds: float, seed: int = SEED, warm: float = 60.0, *, judge_times: bool = True) -> list[str]:
    """Runs the fuzz for ``seconds`` and prints the report. Returns the bounds that do not hold.

    Args:
        warm: seconds of fuzz after which memory is read first.
        judge_times: whether the bound of the other key's latencies counts.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys.json"
        keys = {name: api_keys.create(file, name, scopes=["infer"]) for name in ("fuzz", "other")}
        settings = {"api_keys": file}
        with running_stack(pair, http=0, **settings) as (stack, _):
            address = stack.spec.openai_urls(stack.placed.addresses)[0].split("/")[2]
            return _run(stack, address, keys, seconds, seed, warm, judge_times)


def _run(stack, address, keys, seconds, seed, warm, judge_times) -> list[str]:
    processes = {child.name: psutil.Process(child.pid) for child in [*stack._routers, *stack._workers]}
    seen, numbers = Seen(), itertools.count(1)
    with Caller(address, keys["other"]) as caller:
        for _ in range(5):  # loads what the first requests load
            caller.ask(response_format={"type": "json_object"}, max_tokens=4)
    alone = measure(address, keys["other"], seen, time.monotonic() + min(60.0, max(5.0, seconds / 4)))
    with Memory(processes) as memory:
        began = time.monotonic()
        until = began + seconds
        threads = [
            threading.Thread(target=fuzz, args=(address, keys["fuzz"], numbers, seed, seen, until))
            for _ in range(FUZZERS)
        ]
        for thread in threads:
            thread.start()
        beside = measure(address, keys["other"], seen, min(until, began + warm))
        first = memory.read()
        for kind, times in measure(address, keys["other"], seen, until).items():
            beside[kind] += times
        for thread in threads:
            thread.join()
        last = memory.read()
    print(f"{next(numbers) - 1} grammars in {seconds:.0f} s")
    slower = _report_times(alone, beside)
    broken = _report(first, last, memory.helpers, seen) + (slower if judge_times else [])
    dead = [name for name, process in processes.items() if not process.is_running()]
    faults = [line for line in stack.lines if "Traceback" in line or "incident" in line]
    broken += [f"{name} died" for name in dead] + faults
    print("holds" if not broken else "\n".join(["does not hold:", *broken]))
    return broken


def _report_times(alone, beside) -> list[str]:
    broken = []
    for kind, times in alone.items():
        without, with_fuzz = p95(times), p95(beside[kind])
        print(f"other key, {kind}: p95 {without * 1000:.0f} ms alone, {with_fuzz * 1000:.0f} ms beside the fuzz "
              f"({with_fuzz / without:.2f} times; {len(beside[kind])} requests)")  # fmt: skip
        if with_fuzz > SLOWER * without:
            broken.append(f"p95 of {kind} is more than {SLOWER:g} times that without the fuzz")
    return broken


def _report(first, last, helpers, seen) -> list[str]:
    broken = []
    for status, number in sorted(seen.statuses.items(), key=str):
        print(f"  {status!s:32} {number}")
    for name, size in last.items():
        before = first.get(name, size)
        print(f"{name}: {before >> 20} MiB after the first minute, {size >> 20} MiB at the end")
        if size - before > GROWTH:
            broken.append(f"{name} grew by {(size - before) >> 20} MiB")
    for name, (own, trials) in helpers.items():
        print(f"{name}'s helper: at most {own >> 20} MiB, and {trials >> 20} MiB in trials")
        if trials > _TRIALS * _TRIAL_BYTES:
            broken.append(f"the trials of {name} took {trials >> 20} MiB")
    for what in seen.wrong[:10]:
        print("wrong:", str(what)[:600])
    return broken + ([f"{len(seen.wrong)} wrong answers"] if seen.wrong else [])


def main() -> None:
    import torch

    from overfill.making.tiny import make_tiny_pair

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="duration of the fuzz")
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        broken = run(make_tiny_pair(Path(folder) / "tiny"), options.seconds, options.seed)
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
