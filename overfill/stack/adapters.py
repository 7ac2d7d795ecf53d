"""The adapters of a stack: fills and reads, on the machine that starts it, the folder that decode workers load."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path

from overfill.engine.choice import why_no_adapters
from overfill.model.adapter import AdapterRecord, check_name, file_limits, parse_peft, read_record
from overfill.model.adapter_files import InvalidAdapter, read_files
from overfill.model.manifest import Pair
from overfill.pair.adapters import adapter_names, add_adapter, check_new_adapter, default_folder
from overfill.pair.store import NAMED, is_ready, resolve_pair
from overfill.process.held_folder import temporary_folder
from overfill.settings.config import DecodeConfig
from overfill.settings.reader import BadSettings
from overfill.stack.spec import StackSpec


def with_default_folder(spec: StackSpec, note: Callable[[str], None]) -> StackSpec:
    """Returns the stack with the default folder of adapters, if that has one of the stack's decoders.

    A stack that names a folder keeps it, and so does one with a pair that is not prepared yet. On a joined cluster, the
    default folder may be missing on other machines. Workers whose engine takes no adapters start without them.

    Args:
        note: called with a line about workers that start without the adapters of their decoder.
    """
    if spec.joins_cluster or spec.mock or _folders(spec) or not all(map(_is_here, spec.pairs)):
        return spec
    folder = default_folder(_pair(spec.default_pair))
    found = {record.decoder_digest for record in _records(folder)} if folder.is_dir() else set()
    if not found:
        return spec
    usable, unable = False, []
    for name in spec.pools:
        config = spec.worker_config(name)
        if not isinstance(config, DecodeConfig) or not config.max_adapters:
            continue
        has_some = _pair(config.pair).decoder_digest in found
        if reason := _why_no_adapters(config):
            unable.append(name)
            if has_some:
                note(f"{name} workers start without the adapters of their decoder in {folder}: {reason}")
        else:
            usable = usable or has_some
    if not usable:
        return spec
    for name in unable:
        spec = spec.with_pool_settings(name, {"max_adapters": 0})
    return _with_folder(spec, folder)


@contextmanager
def with_modules(spec: StackSpec, modules: Mapping[str, Path]) -> Iterator[tuple[StackSpec, list[AdapterRecord]]]:
    """Adds adapters to the stack's folder, as ``overfill pair adapter add`` does, once all of them are checked.

    A stack without a folder gets one of its own, which is removed at the end of the context.

    Args:
        modules: folder with PEFT's files of each adapter, by its name.

    Yields:
        The stack, and the adapters that its decode workers will load, in the order of their names. These are none on a
        joined cluster, whose machines may have other folders.

    Raises:
        BadSettings: the stack cannot have all of them, its engine takes none, or an adapter has the name of a tier.
        InvalidAdapter: as ``add_adapter``, a folder cannot be read, or it has another adapter of this name.
    """
    with ExitStack() as opened:
        new: list[AdapterRecord] = []
        if modules:
            spec, directory = _folder_of_modules(spec, opened)
            pair = _pair(next(iter(spec.pairs)))
            new = _check_modules(spec, modules, directory, pair)
        served = _served(spec, new)
        for record in new:
            add_adapter(directory, record.name, modules[record.name], pair)
        yield spec, served


def _served(spec: StackSpec, new: Sequence[AdapterRecord]) -> list[AdapterRecord]:
    """Returns the adapters that the decode workers will load once the folder has ``new`` too. Reads no weights."""
    served: dict[str, AdapterRecord] = {}
    tiers = {tier for pairs in spec.pairs_by_revision.values() for tier in pairs}
    for config in () if spec.joins_cluster else _decoding(spec):
        if config.adapters is None or not config.max_adapters:
            continue
        if reason := _why_no_adapters(config):
            raise BadSettings(f"--adapters: {reason}: leave it out, or choose a decoder with plain weights")
        decoder, largest = _pair(config.pair).decoder_digest, config.max_adapter_rank
        there = () if new and not config.adapters.exists() else _records(config.adapters)
        records = sorted([*there, *new], key=lambda record: record.name)
        fitting = (one for one in records if one.decoder_digest == decoder and one.rank <= largest)
        for record in islice(fitting, config.max_adapters):
            if record.name in tiers:
                raise BadSettings(
                    f"--adapters: {config.adapters / record.name} has the name of a tier, and requests name either in "
                    "the same way: give the adapter another name"
                )
            served[record.name] = record
    return [served[name] for name in sorted(served)]


def _folder_of_modules(spec: StackSpec, opened: ExitStack) -> tuple[StackSpec, Path]:
    """Returns the stack with a folder to which adapters can be added, and the folder, which may not exist yet."""
    if len(spec.pairs) > 1:
        raise BadSettings(
            "--lora-modules says no decoder, and the tiers have several: add each adapter with `overfill pair adapter "
            "add PAIR FOLDER --name NAME`, and give --adapters"
        )
    folders = _folders(spec)
    if len(folders) > 1:
        named = ", ".join(sorted(map(str, folders)))
        raise BadSettings(f"--lora-modules: the decode workers have several folders, {named}; add the adapters to one")
    if folders:
        return spec, folders.pop()
    if spec.joins_cluster:
        raise BadSettings(
            "--lora-modules needs --adapters with --ray-address: a folder that every machine of the cluster can read"
        )
    directory = opened.enter_context(temporary_folder("modules")) / "adapters"
    return _with_folder(spec, directory), directory


def _check_modules(spec: StackSpec, modules: Mapping[str, Path], directory: Path, pair: Pair) -> list[AdapterRecord]:
    """Returns those that the folder does not have yet. Raises as ``with_modules`` does."""
    slots = min(config.max_adapters for config in _decoding(spec))
    if len(modules) > slots:
        raise BadSettings(f"--lora-modules names {len(modules)} adapters, and --max-adapters is {slots}: raise it")
    largest = min(config.max_adapter_rank for config in _decoding(spec))
    new = []
    for name, source in modules.items():
        check_name(name)
        if os.path.lexists(directory / name):  # the stack may have been started before
            record = read_record(directory / name)
            _check_same(record, directory, source, pair)
        else:
            record = check_new_adapter(directory, name, source, pair)
            new.append(record)
        if record.rank > largest:
            raise BadSettings(
                f"--lora-modules {name}: has rank {record.rank}, and --max-adapter-rank is {largest}: raise it"
            )
    return new


def _check_same(there: AdapterRecord, directory: Path, source: Path, pair: Pair) -> None:
    files = read_files(source, file_limits(pair.decoder_config), follow_links=True)
    given = parse_peft(source, files, pair.decoder_config).digest, pair.decoder_digest
    if (there.digest, there.decoder_digest) != given:
        raise InvalidAdapter(
            f"{directory / there.name}: is another adapter than {source}; remove it with `overfill pair adapter "
            "remove`, or give another name"
        )


def _why_no_adapters(config: DecodeConfig) -> str:
    """Returns why the engine of these workers takes no adapters; empty if it does."""
    from overfill.engine.device import resolve_device  # needs torch, which `overfill up --help` does not

    if config.engine == "mock":
        return ""
    return why_no_adapters(_pair(config.pair).decoder_config, lambda: resolve_device(config.device).type == "cpu")


def _records(folder: Path) -> Iterator[AdapterRecord]:
    """Yields the record of each adapter, by name, without those that are damaged: workers warn of them."""
    for name in adapter_names(folder):
        with suppress(InvalidAdapter):
            yield read_record(folder / name)


def _with_folder(spec: StackSpec, folder: Path) -> StackSpec:
    return spec.model_copy(update={"settings": {**spec.settings, "adapters": str(folder)}})


def _folders(spec: StackSpec) -> set[Path]:
    return {config.adapters for config in _decoding(spec) if config.adapters is not None}


def _decoding(spec: StackSpec) -> list[DecodeConfig]:
    """Returns the settings of each pool whose workers decode."""
    configs = [spec.worker_config(name) for name in spec.pools]
    return [config for config in configs if isinstance(config, DecodeConfig)]


def _is_here(pair: str) -> bool:
    return is_ready(pair, None) if pair in NAMED else Path(pair).is_dir()


def _pair(pair: str) -> Pair:
    return Pair.load(resolve_pair(pair))
