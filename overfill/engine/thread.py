"""Runs an engine core on its own thread. Other threads reach the core by messages only."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from overfill.engine.device import use_device, use_threads
from overfill.engine.protocol import EngineCore
from overfill.engine.sequence import Lend

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_ALONE: AbstractContextManager[object] = nullcontext()
FIRST_STEPS = 100
"""Steps of an engine that may take ``first_step_timeout``: each new shape may compile kernels."""
_IDLE = 1.0
"""Seconds without work after which the thread checks its core."""

_LOAD_GAP = 0.02
"""Minimum seconds between two looks at the load of a core that only steps. Counting sequences and blocks costs more
than a step may spare, and no worker reports more often."""


@runtime_checkable
class _LendsInSteps(Protocol):
    """A core that asks for new loans within its steps."""

    new_loans: Callable[[], Sequence[Lend]]


class _Mailbox:
    """Messages to a core, in order. Only the engine's thread takes them."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[object | None] = queue.SimpleQueue()
        self._postponed: deque[object | None] = deque()  # taken within a step, to be delivered after it
        self.put = self._queue.put

    def get(self, *, block: bool = False, timeout: float | None = None) -> object | None:
        """Takes the oldest message. Raises ``queue.Empty`` if none has come within ``timeout`` seconds."""
        return self._postponed.popleft() if self._postponed else self._queue.get(block, timeout)

    def take_loans(self) -> list[Lend]:
        """Takes each ``Lend`` that has arrived during the step."""
        loans = []
        while not self._queue.empty():
            message = self._queue.get()
            if isinstance(message, Lend):
                loans.append(message)
            else:
                self._postponed.append(message)
        return loans


class EngineThread:
    """Delivers messages to a core between its steps, and steps the core while it has work.

    A core may take ``Lend`` within a step too, because a step may last a second.

    After a second without work, and at the end, the thread calls the core's ``check``. A lost block ends the thread,
    and with it the worker, as every broken invariant does.

    Args:
        threads: number of torch's intra-op threads for this engine's steps. None means an engine without torch.
        step_timeout: seconds after which a step counts as stuck in a driver or device. None means no limit.
        first_step_timeout: as ``step_timeout``, for the first ``FIRST_STEPS`` steps; None means ``step_timeout``.
        on_stuck: called once, on another thread. A stuck engine thread can only be ended with the process.
        on_load_change: called on the engine's thread after ``load`` has changed, with True if capacity was freed, for
            which a request may be waiting.
        device: current device of the engine's thread; None means that it needs none.
        cores: entered for each step.

    Attributes:
        load: snapshot after the last messages, or after a step at most ``_LOAD_GAP`` seconds later.
        failure: error that ended the thread, such as a broken invariant or, on vLLM, a failed step; else None.
    """

    def __init__(
        self,
        core: EngineCore,
        name: str,
        threads: int | None,
        step_timeout: float | None = None,
        on_stuck: Callable[[], object] = lambda: None,
        on_load_change: Callable[[bool], object] = lambda freed: None,
        device: torch.device | None = None,
        cores: AbstractContextManager[object] = _ALONE,
        first_step_timeout: float | None = None,
    ) -> None:
        self._device = device
        self._core = core
        self._step_timeout = step_timeout
        self._first_step_timeout = first_step_timeout or step_timeout
        self._num_steps = 0
        self._on_stuck = on_stuck
        self._step_began: float | None = None
        self._mailbox = _Mailbox()
        if isinstance(core, _LendsInSteps):
            core.new_loans = self._mailbox.take_loans
        self._threads = threads
        self._cores = cores
        self._on_load_change = on_load_change
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.load = core.load()
        self._load_due = 0.0  # on the clock of ``time.monotonic``
        self.failure: BaseException | None = None

    def start(self) -> None:
        self._thread.start()
        if self._step_timeout is not None and self._first_step_timeout is not None:
            timeouts = (self._first_step_timeout, self._step_timeout)
            threading.Thread(target=self._watch, args=timeouts, name="watchdog", daemon=True).start()

    def send(self, message: object) -> None:
        """Queues a message for the core; any thread may call it, and it never blocks."""
        self._mailbox.put(message)

    def stop(self) -> None:
        """Ends the thread after the running step and joins it."""
        self._mailbox.put(None)
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _watch(self, first: float, others: float) -> None:
        while self.alive:
            time.sleep(min(1.0, others / 4))
            timeout = first if self._num_steps < FIRST_STEPS else others  # first: a step may end here
            began = self._step_began
            if began is not None and time.monotonic() - began > timeout:
                sequences, tokens = self._core.step_shape
                log.critical(
                    "a step has taken more than %g s: step %d, of %d sequences with %d tokens",
                    timeout,
                    self._num_steps + 1,
                    sequences,
                    tokens,
                )
                self._on_stuck()
                return

    def _run(self) -> None:
        try:
            if self._threads is not None:
                use_threads(self._threads)
            use_device(self._device)
            busy, checked = False, True
            while True:
                delay = self._core.delay if busy else 0.0
                wait = delay if busy else None if checked else _IDLE
                try:
                    message = self._mailbox.get(block=not busy or delay > 0, timeout=wait)
                except queue.Empty:
                    if not busy:
                        self._core.check()
                        checked = True
                        self._publish_load()
                        continue
                    self._step_began = time.monotonic()
                    with self._cores:
                        busy = self._core.step() or self._core.delay > 0
                    self._step_began = None
                    self._num_steps += 1
                    if not busy or time.monotonic() >= self._load_due:
                        self._publish_load()
                    continue
                if not self._handle_all(message):
                    self._core.check()
                    return
                self._publish_load()
                busy, checked = True, False
        except BaseException as error:
            # A broken invariant, or a failed step of vLLM. OverFill's engine handles its failed steps itself.
            log.critical("engine thread died", exc_info=True)
            self.failure = error
        finally:
            self._core.close()

    def _handle_all(self, message: object | None) -> bool:
        """Handles ``message`` and all that have arrived. Returns False at None, which ends the thread."""
        while message is not None:
            self._core.handle(message)
            try:
                message = self._mailbox.get()
            except queue.Empty:
                return True
        return False

    def _publish_load(self) -> None:
        self._load_due = time.monotonic() + _LOAD_GAP
        load = self._core.load()
        if load != self.load:
            before, self.load = self.load, load
            self._on_load_change(load.freed_capacity_since(before))
