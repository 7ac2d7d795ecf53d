"""The adapters that a stack's decode workers have loaded, by name. No I/O, no clock."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable
from itertools import islice

from overfill.errors import ModelNotFound, OverfillError, Unavailable
from overfill.request.answer_start import MAX_TAIL_TOKENS
from overfill.request.names import ADAPTER_NAME, ADAPTER_NAME_RULE
from overfill.routing.tier import Adapter
from overfill.routing.worker import Worker
from overfill.v1 import common_pb2

logger = logging.getLogger(__name__)

MAX_WORKER_ADAPTERS = 1024
"""Maximum number of adapters of one worker; the router ignores further ones."""

MAX_ADAPTERS = 4096
"""Maximum number of adapters of a stack; the router ignores further ones."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_SHOWN = 3


class Adapters:
    """The adapters of a stack, and which joined decode workers have each.

    The first worker that has a name decides what it means. The router ignores another worker's adapter of that name if
    it is not the same, and logs a warning; that worker serves everything else. When no worker has the first one any
    more, the name means what another worker says.

    An adapter stays known for a while after its last worker has left, because that worker may return. It is forgotten
    at once if that worker has unloaded it.

    Args:
        tiers: names of the stack's tiers, which no adapter may have.

    Attributes:
        changes: grows with each change of who has which adapter.
    """

    def __init__(self, tiers: Collection[str]) -> None:
        self._tiers = frozenset(tiers)
        self._known: dict[str, Adapter] = {}
        self._holders: dict[str, dict[Worker, None]] = {}  # of the known adapters
        self._reported: dict[Worker, dict[str, Adapter]] = {}  # the ignored ones too
        self._lost_since: dict[str, float | None] = {}  # names without a worker; None until the next ``expire``
        self.changes = 0

    def get(self, name: str) -> Adapter | None:
        """Returns the adapter of this name; None if no worker has one."""
        return self._known.get(name)

    def known(self) -> list[Adapter]:
        """Returns all adapters, by name. Callable from any thread."""
        known = list(self._known.values())
        return sorted(known, key=lambda adapter: adapter.name)

    def holders(self, adapter: Adapter) -> Collection[Worker]:
        """Returns the joined workers that have ``adapter``."""
        return self._holders[adapter.name] if self._known.get(adapter.name) == adapter else ()

    def set(self, worker: Worker, adapters: Iterable[common_pb2.Adapter]) -> None:
        """Replaces what a joined worker has by what it says. Ignores, with a warning, what is wrong or not unique."""
        ignored: dict[str, list[str]] = {}
        self._report(worker, self._checked(worker.info.tier, adapters, ignored), ignored)
        for reason, names in ignored.items():
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            shown = ", ".join(repr(name[:80]) for name in names[:_SHOWN])
            logger.warning("worker %s: ignored the adapters %s%s: %s", worker.id, shown, more, reason)

    def add(self, worker: Worker, adapter: common_pb2.Adapter) -> str | None:
        """Notes that a worker has loaded ``adapter``. Returns why it is ignored; None if it is not."""
        if worker not in self._reported:
            return "it has left"
        ignored: dict[str, list[str]] = {}
        added = self._checked(worker.info.tier, [adapter], ignored)
        self._report(worker, self._reported[worker] | added, ignored)
        return next((reason for reason, names in ignored.items() if adapter.name in names), None)

    def remove(self, worker: Worker, name: str) -> None:
        """Notes that a worker has unloaded the adapter ``name``."""
        if self._reported.get(worker, {}).pop(name, None) is not None:
            self._take_away(worker, name, unloaded=True)

    def left(self, worker: Worker) -> None:
        """Forgets a worker that has left its pool."""
        for name in self._reported.pop(worker, {}):
            self._take_away(worker, name, unloaded=False)

    def expire(self, now: float, max_absence: Callable[[str], float]) -> list[Adapter]:
        """Forgets the adapters whose last worker left too long ago, and returns them.

        Args:
            now: seconds, monotonic.
            max_absence: returns the seconds for which a tier's adapters stay known without a worker.
        """
        forgotten = []
        for name, since in list(self._lost_since.items()):
            adapter = self._known[name]
            if since is None:
                self._lost_since[name] = now
            elif now - since >= max_absence(adapter.tier):
                forgotten.append(adapter)
                self._forget(name)
        return forgotten

    def loss(self, adapter: Adapter, expired: Collection[Adapter]) -> OverfillError | None:
        """Returns why ``adapter`` is no longer known; None if it is. ``expired``: what ``expire`` has just returned."""
        if self._known.get(adapter.name) == adapter:
            return None
        if adapter in expired:
            return Unavailable(f"the decode workers with the adapter {adapter.name!r} left, and none has returned")
        return ModelNotFound(f"the adapter {adapter.name!r} was unloaded or replaced while the request waited")

    def _checked(
        self, tier: str, adapters: Iterable[common_pb2.Adapter], ignored: dict[str, list[str]]
    ) -> dict[str, Adapter]:
        reported: dict[str, Adapter] = {}
        found = iter(adapters)
        for one in islice(found, MAX_WORKER_ADAPTERS):
            adapter = Adapter(one.name, one.digest, tier, one.tail_tokens)
            if fault := self._fault(adapter):
                ignored.setdefault(fault, []).append(one.name)
            else:
                reported[one.name] = adapter
        if more := [one.name for one in found]:
            ignored[f"a worker may have at most {MAX_WORKER_ADAPTERS}"] = more
        return reported

    def _fault(self, adapter: Adapter) -> str:
        if not ADAPTER_NAME.fullmatch(adapter.name):
            return f"a name has {ADAPTER_NAME_RULE}"
        if not _DIGEST.fullmatch(adapter.digest):
            return "a digest has 64 lower-case hexadecimal digits"
        if adapter.tail_tokens > MAX_TAIL_TOKENS:
            return f"tail_tokens is at most {MAX_TAIL_TOKENS}"
        if adapter.name in self._tiers:
            return "a tier has this name; give the adapter another"
        return ""

    def _report(self, worker: Worker, reported: dict[str, Adapter], ignored: dict[str, list[str]]) -> None:
        """Replaces what a worker has by ``reported``, and notes in ``ignored`` the names that are not unique."""
        before, self._reported[worker] = self._reported.get(worker, {}), reported
        for name, adapter in before.items():
            if reported.get(name) != adapter:
                self._take_away(worker, name, unloaded=True)
        for name, adapter in reported.items():
            if name not in worker.adapters and (reason := self._add(worker, adapter)):
                ignored.setdefault(reason, []).append(name)

    def _add(self, worker: Worker, adapter: Adapter) -> str:
        """Notes that a worker has ``adapter``. Returns why it is ignored; empty if it is not."""
        name = adapter.name
        known = self._known.get(name)
        if known is None or (known != adapter and name in self._lost_since):
            if known is None and len(self._known) >= MAX_ADAPTERS:
                return f"this router knows {MAX_ADAPTERS} adapters already"
            known = self._known[name] = adapter
            self._holders[name] = {}
        elif known != adapter:
            where = f"has the digest {known.digest[:12]} and the tier {known.tier!r} on other workers"
            return f"the same name {where}; give one of the two another name"
        self._lost_since.pop(name, None)
        self._holders[name][worker] = None
        worker.adapters[name] = known
        self.changes += 1
        return ""

    def _take_away(self, worker: Worker, name: str, *, unloaded: bool) -> None:
        if worker.adapters.pop(name, None) is None:
            return  # it was ignored
        self.changes += 1
        holders = self._holders[name]
        del holders[worker]
        if holders:
            return
        if unloaded:
            self._forget(name)
        else:
            self._lost_since[name] = None
            self._replace(name)

    def _forget(self, name: str) -> None:
        del self._known[name], self._holders[name]
        self._lost_since.pop(name, None)
        self.changes += 1
        self._replace(name)

    def _replace(self, name: str) -> None:
        """Gives the name to an adapter that was ignored."""
        for worker, reported in self._reported.items():
            if name in reported and name not in worker.adapters:
                self._add(worker, reported[name])
