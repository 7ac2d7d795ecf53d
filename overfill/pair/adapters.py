"""The folder of adapters (``--adapters``): one folder per adapter, which appears and disappears whole.

It may be on storage that several hosts share. Workers read it; ``overfill pair adapter`` changes it. It is no part of a
pair's folder. ``overfill.model.adapter`` describes an adapter's files.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from overfill.model.adapter import (
    PEFT_CONFIG,
    RECORD,
    WEIGHTS,
    AdapterRecord,
    check_name,
    file_limits,
    parse_peft,
    parse_record,
    record_json,
)
from overfill.model.adapter_files import InvalidAdapter, parse_object, read_files
from overfill.model.manifest import Pair
from overfill.process.home import home
from overfill.request.names import ADAPTER_NAME

_MAX_NAMED = 20  # names in a message


def default_folder(pair: Pair) -> Path:
    """Returns the folder of adapters that pairs with this full model have by default, beside the pairs' cache."""
    return home() / "adapters" / pair.full_digest[:16]


def adapter_names(directory: Path) -> list[str]:
    """Lists the names of the folders in ``directory`` that may be adapters, sorted.

    Raises:
        InvalidAdapter: ``directory`` is missing or cannot be read.
    """
    try:
        with os.scandir(directory) as entries:
            return sorted(e.name for e in entries if ADAPTER_NAME.fullmatch(e.name) and e.is_dir(follow_symlinks=False))
    except OSError as error:
        raise InvalidAdapter(f"{directory}: cannot read the folder of adapters: {error.strerror}") from None


def find_adapter(directory: Path, name: str) -> Path:
    """Returns the folder of the adapter ``name``; raises InvalidAdapter, which names the others, if there is none."""
    if name not in (names := adapter_names(directory)):
        known = f"there are {', '.join(names[:_MAX_NAMED])}{', …' if len(names) > _MAX_NAMED else ''}"
        raise InvalidAdapter(f"{directory} has no adapter {name[:80]!r}; {known if names else 'it has none'}")
    return directory / name


def check_decoder(record: AdapterRecord, pair: Pair) -> None:
    """Raises InvalidAdapter if the adapter is of another decoder than the pair's."""
    if record.decoder_digest != pair.decoder_digest:
        raise InvalidAdapter(
            f"{record.name} is of the decoder {record.decoder_digest}; that of {pair.folder} is {pair.decoder_digest}"
        )


def write_record(
    folder: Path, pair: Pair, *, tail_tokens: int = 0, own_prefill: bool, training: Mapping[str, Any]
) -> AdapterRecord:
    """Writes ``overfill-adapter.json`` beside PEFT's files in ``folder``, for ``add_adapter`` to take over.

    Args:
        pair: pair on whose decoder the adapter was trained.
        training: how it was trained; informative.

    Raises:
        InvalidAdapter: as ``read_adapter``.
    """
    parsed = parse_peft(folder, read_files(folder, file_limits(pair.decoder_config)), pair.decoder_config)
    record = AdapterRecord(folder.name, parsed.digest, pair.decoder_digest, parsed.rank, tail_tokens, own_prefill)
    (folder / RECORD).write_bytes(record_json(record, parsed.base_model, training))
    return record


def add_adapter(
    directory: Path,
    name: str,
    source: Path,
    pair: Pair,
    *,
    tail_tokens: int | None = None,
    own_prefill: bool | None = None,
) -> AdapterRecord:
    """Copies an adapter's files from ``source`` to ``directory / name``, which appears whole.

    Args:
        directory: folder of adapters; created when missing.
        source: folder with PEFT's files. A record beside them must be of these files and of the pair's decoder.
        tail_tokens: prompt tokens that the decoder computes. None means what the record says, or else 0.
        own_prefill: whether it was trained with its own prefill. None means what the record says, or else True.

    Raises:
        InvalidAdapter: the name is taken or not allowed, or as ``read_adapter``.
    """
    record, files = _read_new(directory, name, source, pair, tail_tokens, own_prefill)
    target = directory / name
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{name}.tmp-{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        for file, content in files.items():
            (temporary / file).write_bytes(content)
        try:
            temporary.rename(target)
        except OSError as error:
            if os.path.lexists(target):  # added meanwhile
                raise _taken(target) from None
            raise InvalidAdapter(f"{target}: cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return record


def check_new_adapter(directory: Path, name: str, source: Path, pair: Pair) -> AdapterRecord:
    """Returns what ``add_adapter`` would, and writes nothing. Raises InvalidAdapter as it does."""
    return _read_new(directory, name, source, pair)[0]


def _read_new(
    directory: Path,
    name: str,
    source: Path,
    pair: Pair,
    tail_tokens: int | None = None,
    own_prefill: bool | None = None,
) -> tuple[AdapterRecord, dict[str, bytes]]:
    """Returns the record of an adapter for ``directory / name``, and the files of its folder, by name."""
    check_name(name)
    if os.path.lexists(directory / name):
        raise _taken(directory / name)
    files = read_files(source, file_limits(pair.decoder_config), follow_links=True)
    parsed = parse_peft(source, files, pair.decoder_config)
    record = AdapterRecord(name, parsed.digest, pair.decoder_digest, parsed.rank, own_prefill=True)
    training: Any = {}
    if RECORD in files:
        earlier = parse_record(source, files, name)
        for field in ("digest", "decoder_digest", "rank"):
            if (found := getattr(earlier, field)) != (expected := getattr(record, field)):
                raise InvalidAdapter(
                    f"{source / RECORD}: {field} is {found!r}, but it is {expected!r} of the files beside it and the "
                    f"decoder of {pair.folder}: the adapter belongs to another decoder, or its files were changed"
                )
        record, training = earlier, parse_object(source / RECORD, files[RECORD]).get("training", {})
    if tail_tokens is not None:
        record = replace(record, tail_tokens=tail_tokens)
    if own_prefill is not None:
        record = replace(record, own_prefill=own_prefill)
    written = {file: files[file] for file in (PEFT_CONFIG, WEIGHTS)}
    return record, written | {RECORD: record_json(record, parsed.base_model, training)}


def remove_adapter(directory: Path, name: str) -> None:
    """Removes ``directory / name``, which disappears whole. Workers that have loaded it keep it until they unload it.

    Raises:
        InvalidAdapter: there is no such adapter, or it cannot be removed.
    """
    folder = find_adapter(directory, name)
    hidden = directory / f".{name}.removed-{secrets.token_hex(4)}"
    try:
        folder.rename(hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        raise InvalidAdapter(f"{folder}: cannot be removed: {error.strerror}") from None


def _taken(target: Path) -> InvalidAdapter:
    return InvalidAdapter(f"{target}: there is an adapter {target.name} already; remove it first, or give another name")
