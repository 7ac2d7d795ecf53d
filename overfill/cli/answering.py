"""One answer for a person at a terminal or in a pipe: short unless asked otherwise, and it says when it was cut."""

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
"""Most tokens of an answer, unless --max-tokens says otherwise."""

DEFAULT_TEMPERATURE = 0.7
"""Unless --temperature or --greedy says otherwise."""


def stream_answer(
    client: Client, prompt: Prompt, sampling: SamplingParams, options: Options, *, quiet: bool = False
) -> Answer:
    """Streams the answer to stdout, unless ``quiet``; returns it once it is complete.

    ``sampling`` replaces what ``options`` says about it.

    Where ``sampling.max_tokens`` is None, the answer has at most ``DEFAULT_MAX_TOKENS``, and fewer where the prompt
    leaves less of the context.

    Raises:
        OverfillError: any of its kinds.
    """
    if sampling.max_tokens is None:
        try:
            return _stream(client, prompt, replace(sampling, max_tokens=DEFAULT_MAX_TOKENS), quiet, options)
        except PromptTooLong as error:
            if error.field != "sampling.max_tokens":
                raise
        # The context has room for fewer than the default: take what is left.
    return _stream(client, prompt, sampling, quiet, options)


def note_cut(answer: Answer, sampling: SamplingParams) -> None:
    """Says on stderr that a limit ended the answer, if one did, and how to get more.

    ``sampling`` is what ``stream_answer`` got.
    """
    if answer.finish_reason != "length":
        return
    count = answer.usage.completion_tokens
    if sampling.max_tokens is None and count < DEFAULT_MAX_TOKENS:
        told = f"after {count} tokens, because the model's context is full; a shorter prompt leaves more"
    else:
        told = f"at its limit of {count} tokens; --max-tokens N sets another"
    click.echo(f"overfill: the answer was cut {told}", err=True)


def _stream(client: Client, prompt: Prompt, sampling: SamplingParams, quiet: bool, options: Options) -> Answer:
    asked: Options = {**options, "sampling": sampling}
    with client.stream(prompt, **asked) as stream:
        for delta in stream:
            if not quiet:
                click.echo(delta.text, nl=False)
                sys.stdout.flush()
        return stream.answer
