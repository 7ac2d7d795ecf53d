"""Reads conversations from data sets on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from overfill.errors import InvalidRequest
from overfill.making.conversations import Conversation
from overfill.process.extras import needs

_ROLES = {"human": "user", "gpt": "assistant"}
_COLUMNS = ("messages", "conversations")


def is_dataset(source: str) -> bool:
    """True if ``source`` may be the id of a data set: ``owner/name``, or ``owner/name:split``."""
    named = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(:\S+)?", source, re.ASCII) is not None
    return named and not source.endswith((".jsonl", ".json"))


def hub_conversations(dataset: str, count: int) -> list[Conversation]:
    """Returns the first ``count`` conversations of ``dataset``: ``owner/name``, or ``owner/name:split``.

    Without a split, reads ``train``.

    Raises:
        InvalidRequest: as ``load_hub``.
    """
    rows = load_hub(dataset, "train", *_COLUMNS)
    column = next(name for name in _COLUMNS if name in rows.column_names)
    found: list[Conversation] = []
    for row in rows:
        if len(found) == count:
            break
        if (conversation := as_conversation(row[column])) is not None:
            found.append(conversation)
    return found


def as_conversation(messages: Any) -> Conversation | None:
    """Converts a row's messages (``role`` and ``content``, or ``from`` and ``value``), up to the last answer.

    Returns None when the row has no answer, lacks a text or has another form. Large data sets have a few such rows.
    """
    if not isinstance(messages, Sequence):
        return None
    turns = []
    for message in messages:
        if not isinstance(message, Mapping):
            return None
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        turns.append({"role": _ROLES.get(role, role), "content": content})
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    return Conversation(tuple(turns)) if len(turns) > 1 else None


def load_hub(dataset: str, split: str, *columns: str) -> Any:
    """Loads the rows of the data set ``dataset``, which must have one of ``columns``.

    Args:
        split: Split to load when ``dataset`` does not name one (``owner/name:split``).

    Raises:
        InvalidRequest: the data set cannot be loaded or lacks the columns.
        MissingExtra: the package datasets is not installed.
    """
    dataset, _, own_split = dataset.partition(":")
    split = own_split or split
    with needs("pairs", f"reading {dataset} from the hub"):
        import datasets  # type: ignore[import-not-found, import-untyped, unused-ignore]

    try:
        rows = datasets.load_dataset(dataset, split=split)
    except Exception as error:  # the library passes on any exception of its back ends
        raise InvalidRequest("data", f"cannot load {dataset}, split {split}: {str(error).splitlines()[0]}") from error
    if not set(columns) & set(rows.column_names):
        found, expected = ", ".join(rows.column_names), " or ".join(columns)
        raise InvalidRequest("data", f"{dataset} has the columns {found}, not {expected}")
    return rows
