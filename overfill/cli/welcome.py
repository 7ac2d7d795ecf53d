"""The summary that ``overfill up`` prints once its stack is ready."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence

from overfill.cli.answering import DEFAULT_MAX_TOKENS, DEFAULT_TEMPERATURE
from overfill.model.adapter import AdapterRecord
from overfill.stack.placed import operator_tls
from overfill.stack.spec import StackSpec, kind_of

_RULE = 80  # characters, at most


def welcome(
    spec: StackSpec,
    addresses: Sequence[str],
    describe_workers: Callable[[str], str],
    adapters: Sequence[AdapterRecord] = (),
) -> str:
    """Returns addresses, workers and example commands. A command stays on one line, so that it can be copied."""
    router = spec.router_config()
    tls = operator_tls(spec) or router.client_tls()
    first = addresses[0]
    option = "" if first == "127.0.0.1:7600" else f" --address {first}"
    if tls is not None:
        # A stack with a CA of its own also requires a client certificate.
        ca = tls.ca
        option += " --tls-ca CA.pem" if ca is None else f" --tls-ca {ca} --tls-cert YOURS.pem --tls-key YOURS.key"
        option += f" --tls-name {tls.name}" if tls.name else ""
    # Not --api-key, because other users of the machine can see flags.
    key = "" if router.api_keys is None else "OVERFILL_API_KEY=YOURS "
    urls = spec.openai_urls(addresses)
    rows = [("gRPC", ", ".join(addresses))]
    if urls:
        roots = [url.removesuffix("/v1") for url in urls]
        rows.append(("OpenAI", ", ".join(urls)))
        rows.append(("Anthropic", ", ".join(roots)))
        rows.append(("page", ", ".join(f"{root}/ui" for root in roots)))
    if not spec.tiers:
        rows.append(("pair", spec.pair))
    if spec.canary is not None:
        pairs = ", ".join(spec.pairs_by_revision[spec.canary.revision].values())
        rows.append(("canary", f"{spec.canary.revision}: {pairs}: {spec.canary.percent:g} % of new conversations"))
    rows += _worker_rows(spec, describe_workers)
    if adapters:
        rows.append(("adapters", ", ".join(adapter.name for adapter in adapters)))
    if own := [adapter.name for adapter in adapters if adapter.own_prefill]:
        rows.append(("", f"trained with their own prefill, so measure their quality here: {', '.join(own)}"))
    rows.append(("try", f'{key}overfill generate{option} "Why is the sky blue?"'))
    if spec.tiers:
        rows.append(
            ("", f'{key}overfill generate{option} --tier {router.ordered_tiers[-1].name} "Why is the sky blue?"')
        )
    if adapters:
        rows.append(("", f'{key}overfill generate{option} --tier {adapters[0].name} "Why is the sky blue?"'))
    rows.append(("", f"{key}overfill chat{option}"))
    rows.append(("", f"{key}overfill status{option}"))
    if urls and tls is None:
        rows.append(("", _curl(spec, urls[0])))
    rows.append(("stop", "ctrl-C"))
    width = min(shutil.get_terminal_size().columns, _RULE)
    column = max(len(name) for name, _ in rows)
    lines = [f"{name:<{column}}  {words}" for name, words in rows]
    dash = "─" if (sys.stdout.encoding or "").lower().startswith("utf") else "-"
    return "\n".join(["OverFill is up ".ljust(width, dash), *lines, dash * width])


def _worker_rows(spec: StackSpec, describe: Callable[[str], str]) -> list[tuple[str, str]]:
    """Returns a row per pool, or with named tiers a row for prefill workers and one per tier, the default one first.

    The canary has a row per pool.
    """
    pools = {name: f"{describe(name)} ({_each(spec, name)})" for name in spec.pools}
    if not spec.tiers:
        return [*pools.items()]
    old = {name: text for name, text in pools.items() if spec.revision_of(name) == spec.revision}
    rows = [(name, text) for name, text in old.items() if spec.tier_of(name) is None]
    for tier in spec.router_config().ordered_tiers:
        first = tier.name == spec.default_tier
        workers = ", ".join(text for name, text in old.items() if spec.tier_of(name) == tier.name)
        rows.append(("tier" if first else "", f"{tier.name}{' (default)' if first else ''}: {tier.pair}: {workers}"))
    return rows + [(name, text) for name, text in pools.items() if name not in old]


def _each(spec: StackSpec, pool: str) -> str:
    config = spec.worker_config(pool)
    stages = "both stages, " if len(kind_of(pool).stages) > 1 else ""
    given = "".join(f"{text}, " for text in (config.engine, config.dtype) if text not in (None, "auto"))
    ranks = f"ranks each: {config.tensor_parallel_size}, " if config.tensor_parallel_size > 1 else ""
    return f"{stages}{given}{ranks}CPU threads each: {config.threads}"


def _curl(spec: StackSpec, base: str) -> str:
    body = {
        "model": spec.model,
        "messages": [{"role": "user", "content": "Why is the sky blue?"}],
        "max_tokens": DEFAULT_MAX_TOKENS,
        "temperature": DEFAULT_TEMPERATURE,
    }
    # Not -H, because other users of the machine can see it; curl hides this option.
    key = "" if spec.router_config().api_keys is None else ' --oauth2-bearer "$OVERFILL_API_KEY"'
    return f"curl {base}/chat/completions{key} -H 'content-type: application/json' -d {shlex.quote(json.dumps(body))}"
