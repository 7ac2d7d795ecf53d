"""Answers an engine that waits for the import of a prompt's KV; in both kinds of workers that prefill."""

from __future__ import annotations

from collections.abc import Callable

from overfill.engine.sequence import AwaitingImport, Imported, PrefillSequence
from overfill.kv.imports import Importer, ImportRequest, Imports
from overfill.v1 import kv_pb2


async def import_prompt(
    importer: Importer | None,
    sequence: PrefillSequence,
    awaiting: AwaitingImport,
    holder: kv_pb2.KvHolder | None,
    request_id: str,
    send: Callable[[object], None],
) -> Imports:
    """Imports what it can of a prompt, and has the engine compute the rest; returns what it has imported.

    When it has ended, also by an error or a cancellation, nothing writes to the prompt's blocks. Only when it returns,
    it has told the engine.

    Raises:
        RankLost: as ``Importer.run``.
    """
    blocks = sequence.prompt_blocks
    assert importer is not None, "only an importer lets a prompt wait for it"
    assert blocks is not None, "the servicer hashes prompts"
    cached = awaiting.cached_tokens
    imports = await importer.run(ImportRequest(request_id, sequence.prompt, blocks, awaiting.blocks, cached, holder))
    send(Imported(sequence.id, imports.tokens))
    return imports
