"""The summary that ``overfill up`` prints once its stack is ready."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from overfill.cli.answering import DEFAULT_MAX_TOKENS, DEFAULT_TEMPERATURE
from overfill.stack.processes import PlannedPool, StackPlan

_BOX_WIDTH = 80  # characters, at most


def welcome(
    out: Console, plan: StackPlan, addresses: Sequence[str], describe_workers: Callable[[PlannedPool], str]
) -> None:
    """Prints addresses, workers and example commands. A command stays on one line, so that it can be copied."""
    first = addresses[0]
    option = "" if first == "127.0.0.1:7600" else f" --address {first}"
    if plan.client_tls is not None:
        # A stack with a CA of its own also requires a client certificate.
        ca = plan.client_tls.ca
        option += " --tls-ca CA.pem" if ca is None else f" --tls-ca {ca} --tls-cert YOURS.pem --tls-key YOURS.key"
        option += f" --tls-name {plan.client_tls.name}" if plan.client_tls.name else ""
    # Not --api-key, because other users of the machine can see flags.
    key = "" if plan.routers[0].api_keys is None else "OVERFILL_API_KEY=YOURS "
    urls = plan.openai_urls(addresses)
    rows = [("gRPC", ", ".join(addresses))]
    if urls:
        rows.append(("OpenAI", ", ".join(urls)))
        rows.append(("page", ", ".join(url.removesuffix("/v1") + "/ui" for url in urls)))
    if not plan.named_tiers:
        rows.append(("pair", plan.routers[0].pair))
    rows += _worker_rows(plan, describe_workers)
    rows.append(("try", f'{key}overfill generate{option} "Why is the sky blue?"'))
    if plan.named_tiers:
        rows.append(("", f'{key}overfill generate{option} --tier {plan.tiers[-1].name} "Why is the sky blue?"'))
    rows.append(("", f"{key}overfill chat{option}"))
    rows.append(("", f"{key}overfill status{option}"))
    if urls and plan.client_tls is None:
        rows.append(("", _curl(plan, urls[0])))
    rows.append(("stop", "ctrl-C"))
    width = min(out.width, _BOX_WIDTH)
    with out:  # writes all lines at once, so that no log line comes in between
        out.print(Rule("OverFill is up", align="left"), width=width)
        for name, words in rows:
            out.print(Text(f"{name:<7}  {words}"), soft_wrap=True)
        out.print(Rule(), width=width)


def _worker_rows(plan: StackPlan, describe: Callable[[PlannedPool], str]) -> list[tuple[str, str]]:
    """Returns a row per pool, or with named tiers a row for prefill workers and one per tier, the default one first."""
    pools = [(pool, f"{describe(pool)} ({_each(pool)})") for pool in plan.pools]
    if not plan.named_tiers:
        return [(pool.kind.name, text) for pool, text in pools]
    rows = [(pool.kind.name, text) for pool, text in pools if pool.tier is None]
    for tier in plan.tiers:
        first = tier is plan.tiers[0]
        workers = ", ".join(text for pool, text in pools if pool.tier == tier.name)
        rows.append(("tier" if first else "", f"{tier.name}{' (default)' if first else ''}: {tier.pair}: {workers}"))
    return rows


def _each(pool: PlannedPool) -> str:
    config = pool.config
    stages = "both stages, " if len(pool.kind.stages) > 1 else ""
    given = "".join(f"{text}, " for text in (config.engine, config.dtype) if text not in (None, "auto"))
    return f"{stages}{given}CPU threads each: {config.threads}"


def _curl(plan: StackPlan, base: str) -> str:
    body = {
        "model": plan.model,
        "messages": [{"role": "user", "content": "Why is the sky blue?"}],
        "max_tokens": DEFAULT_MAX_TOKENS,
        "temperature": DEFAULT_TEMPERATURE,
    }
    # Not -H, because other users of the machine can see it; curl hides this option.
    key = "" if plan.routers[0].api_keys is None else ' --oauth2-bearer "$OVERFILL_API_KEY"'
    return f"curl {base}/chat/completions{key} -H 'content-type: application/json' -d {shlex.quote(json.dumps(body))}"
