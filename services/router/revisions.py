"""The revisions that a router serves: one, or during a rollout two, and which of them answers a request."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Sequence

from overfill.api.keys import ApiKey
from overfill.errors import Incompatible, InvalidRequest
from overfill.routing.rollout import RolloutState, conversation, place
from overfill.rpc.membership import is_newer, next_generation
from overfill.telemetry.metric_set import Sampled
from overfill.v1 import admin_pb2, inference_pb2, registry_pb2
from services.router.core import Core
from services.router.request_handler import RequestHandler

logger = logging.getLogger(__name__)

WARN_GAP = 60.0
"""Minimum seconds between two warnings of states that are ignored."""


class Revisions:
    """Chooses the core of each request by the share of the new revision, which it learns and changes.

    With one revision, there is nothing to choose and no share.

    Args:
        cores: one or two, the old revision's first.
        percent: share of the new revision until a change is made or learned, 0 to 100.

    Attributes:
        cores: as the argument.
    """

    def __init__(self, cores: Sequence[Core], percent: float = 0.0) -> None:
        self.cores = tuple(cores)
        self._by_name = {core.revision: core for core in cores}
        self._old, self._new = self.cores[0], self.cores[1] if len(self.cores) > 1 else None
        new = "" if self._new is None else self._new.revision
        self._state = RolloutState(revision=new, from_percent=percent, to_percent=percent)
        # The newest that any worker has reported, or this router has set; of any revision.
        self._seen: RolloutState | registry_pb2.Rollout = self._state
        self._warned_at = -math.inf
        self._changed = asyncio.Event()

    @property
    def several(self) -> bool:
        """True if the router serves two revisions."""
        return self._new is not None

    @property
    def names(self) -> str:
        """Names of the revisions, for messages."""
        return " and ".join(repr(name) for name in self._by_name)

    def get(self, revision: str) -> Core | None:
        """Returns the core of a revision; None if the router does not serve it."""
        return self._by_name.get(revision)

    @property
    def main(self) -> RequestHandler:
        """What handles requests that belong to no conversation: the old revision's, or the new one's at 100 percent."""
        if self._new is None or self._state.share(time.time()) < 100:
            return self._old.handler
        return self._new.handler

    def choose(self, request: inference_pb2.GenerateRequest, caller: ApiKey | None) -> RequestHandler:
        """Returns what handles ``request``.

        An answer goes on in its own revision. A new one is written by the revision of its conversation's place, or by
        the other one if only that has ready workers for what the request names.

        Raises:
            Incompatible: the client resumes an answer of a revision that is not here.
        """
        if self._new is None:
            return self._old.handler
        if request.HasField("resume_identity"):
            core = self._by_name.get(revision := request.resume_identity.revision)
            if core is None:
                raise Incompatible(
                    f"the answer began with the revision {revision[:80]!r}; this router serves {self.names}",
                    ["resume_identity.revision"],
                )
            return core.handler
        share = self._state.share(time.time())
        self._old.handler.shorten(request)  # what differs between the turns must not be of the conversation's name
        in_new = place("" if caller is None else caller.id, conversation(request)) < share
        order = (self._new, self._old) if in_new else (self._old, self._new)
        now = asyncio.get_running_loop().time()
        chosen = next((core for core in order if core.can_answer(request, now)), None)
        if chosen is None:
            # The request waits for workers, or gets the error of the revision that knows what it names.
            chosen = next((core for core in order if core.handler.tiers.tier_of(request) is not None), order[0])
        return chosen.handler

    @property
    def state(self) -> RolloutState:
        """The share of the new revision. Generation 0 is the settings' share, of which other routers need not learn."""
        return self._state

    async def changed_since(self, state: RolloutState) -> RolloutState:
        """Returns the state once it is another one than ``state``."""
        while self._state is state:
            self._changed.clear()
            await self._changed.wait()
        return self._state

    def learn(self, message: registry_pb2.Rollout) -> None:
        """Adopts the state that a worker reports if it is newer. Logs and ignores one that cannot be of this stack."""
        state = self._state
        if message.generation == state.generation and message.tie_break == state.tie_break:
            return
        if is_newer(message, self._seen):  # also one that is ignored: workers keep it until there is a newer one
            self._seen = message
        try:
            told = RolloutState.from_proto(message)
            if told.revision != state.revision:
                what = f"is {told.revision[:80]!r}; this router's new revision is {state.revision!r}"
                raise InvalidRequest("rollout.revision", what)
        except InvalidRequest as error:
            if (now := asyncio.get_running_loop().time()) - self._warned_at >= WARN_GAP:
                self._warned_at = now
                logger.warning("ignored the rollout that a worker reports: %s", error)
            return
        if told.newer_than(state):
            self._set(told)

    def change(self, request: admin_pb2.ChangeRolloutRequest) -> None:
        """Changes the share as ``request`` asks; does nothing if it asks for no change.

        Raises:
            Incompatible: the router serves one revision.
            InvalidRequest: there is no such revision, or a value is out of bounds.
        """
        kind = request.WhichOneof("change")
        if kind is None:
            return
        if self._new is None:
            raise Incompatible(
                f"this router serves one revision, {self.names}: start routers with --canary-revision", ["revision"]
            )
        state, now = self._state, time.time()
        newest = self._seen if is_newer(self._seen, state) else state
        generation, tie_break = next_generation(newest.generation), secrets.randbits(64)
        if kind == "set":
            asked = request.set
            if asked.revision not in self._by_name:
                raise InvalidRequest("set.revision", f"is {asked.revision[:80]!r}; this router serves {self.names}")
            percent = asked.percent if asked.revision == state.revision else 100 - asked.percent
            self._set(state.set(percent, asked.over_seconds, now, generation, tie_break))
        elif not getattr(request, kind):
            raise InvalidRequest(kind, "must be true")
        elif kind == "pause":
            self._set(state.pause(now, generation, tie_break))
        else:
            self._set(state.set(0.0, 0.0, now, generation, tie_break))

    def _set(self, state: RolloutState) -> None:
        if state is self._state:
            return
        self._state = state
        self._changed.set()
        logger.info(
            "revision %r gets %g percent of new conversations%s",
            state.revision,
            state.from_percent if state.paused else state.to_percent,
            f", in {state.duration_ms / 1000:g} s" if state.duration_ms and not state.paused else "",
        )

    def status(self) -> admin_pb2.RolloutStatus:
        """Returns the revisions with their shares, pools and running requests."""
        state, now, shares = self._state, time.time(), dict(self._shares())
        return admin_pb2.RolloutStatus(
            revisions=[self._status(core, shares[core.revision]) for core in self.cores],
            target_percent=state.to_percent if self.several else 100.0,
            remaining_seconds=state.remaining(now),
            paused=state.paused,
        )

    def _status(self, core: Core, percent: float) -> admin_pb2.RevisionStatus:
        now = asyncio.get_running_loop().time()
        return admin_pb2.RevisionStatus(
            name=core.revision,
            percent=percent,
            ready=not core.unready(now),
            pools=core.pools(now),
            running=core.num_running(),
        )

    def _shares(self) -> list[tuple[str, float]]:
        share = 0.0 if self._new is None else self._state.share(time.time())
        return list(zip(self._by_name, (100 - share, share), strict=False))

    def sampled_shares(self) -> Sampled:
        """Returns the shares by revision. Callable from any thread."""
        return [((name,), percent) for name, percent in self._shares()]
