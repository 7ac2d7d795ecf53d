"""Streams one answer to stdout, with a default length limit, and reports when a limit cut it."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from overfill.errors import PromptTooLong

if TYPE_CHECKING:
    from overfill.client import Answer, Client, Options, Prompt
    from overfill.request.params import SamplingParams

DEFAULT_MAX_TOKENS = 256
"""Default of --max-tokens: maximum tokens of an answer."""

DEFAULT_TEMPERATURE = 0.7
"""Default of --temperature, unless --greedy is given."""


def stream_answer(
    client: Client, prompt: Prompt, sampling: SamplingParams, options: Options, *, quiet: bool = False
) -> Answer:
    """Streams the answer to stdout and its reasoning to stderr, unless ``quiet``; returns it once it is complete.

    If ``sampling.max_tokens`` is None, the limit is ``DEFAULT_MAX_TOKENS``, or the rest of the context if that is less.

    Args:
        sampling: sampling parameters; they replace those in ``options``.

    Raises:
        OverfillError: the request failed.
    """
    if sampling.max_tokens is None:
        try:
            return _stream(client, prompt, replace(sampling, max_tokens=DEFAULT_MAX_TOKENS), quiet, options)
        except PromptTooLong as error:
            if error.field != "sampling.max_tokens":
                raise
        # The context has fewer free tokens than the default: use all of them.
    return _stream(client, prompt, sampling, quiet, options)


def note_cut(answer: Answer, sampling: SamplingParams) -> None:
    """If a limit cut the answer, says so on stderr, and how to get more.

    Args:
        sampling: the same as for ``stream_answer``.
    """
    if answer.finish_reason != "length":
        return
    count = answer.usage.completion_tokens
    if sampling.max_tokens is None and count < DEFAULT_MAX_TOKENS:
        where = f"after {count} tokens, because the model's context is full; use a shorter prompt"
    else:
        where = f"at the limit of {count} tokens; --max-tokens N sets another limit"
    click.echo(f"overfill: the answer was cut {where}", err=True)


def note_tier(answer: Answer, asked: str) -> None:
    """If another tier than ``asked`` wrote some of the answer, says on stderr which one, and from which token."""
    for part in answer.parts:
        if asked and part.tier != asked:
            why = "is overloaded" if answer.brownout_from == asked else "has no worker"
            click.echo(f"overfill: tier {asked} {why}; {part.tier} wrote from token {part.first_index} on", err=True)


def _stream(client: Client, prompt: Prompt, sampling: SamplingParams, quiet: bool, options: Options) -> Answer:
    asked: Options = {**options, "sampling": sampling}
    thought = False  # since the last text
    with client.stream(prompt, **asked) as stream:
        for delta in stream:
            if not quiet:
                if delta.reasoning:
                    click.secho(delta.reasoning, nl=False, err=True, dim=True)
                    thought = True
                if delta.text and thought:
                    click.echo("\n", err=True)
                    thought = False
                click.echo(delta.text, nl=False)
                sys.stdout.flush()
        return stream.answer
