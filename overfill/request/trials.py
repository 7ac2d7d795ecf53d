"""Tries clients' grammars in a helper process before this process compiles them.

A grammar may crash the library that compiles it, or let it allocate without end, and no thread can be stopped. The
helper process (``overfill.request.trial_helper``) gives each trial a process of its own, with limits.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from overfill.errors import InvalidRequest, Overloaded
from overfill.request import trial_frames
from overfill.request.fair_permits import FairPermits
from overfill.request.grammar_limits import GrammarLimits

log = logging.getLogger(__name__)

RUNNING, WAITING = 3, 32
"""Trials that run at once, one per key; and trials of one key that wait."""

_BENCH = "overfill.request.trial:Bench"
_MAX_VERDICT_BYTES = 16 << 20
_VERDICT_BYTES = 300  # without its texts
_MARGIN = 30.0
"""Seconds after the end of a trial's time in which the helper must have replied."""

_INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "SSL_CERT_FILE", "TMPDIR")


@dataclass(frozen=True, slots=True)
class _Verdict:
    """Outcome of a trial, as in ``trial_frames``, and its text."""

    outcome: bytes
    text: bytes

    def result(self, field: str) -> bytes:
        if self.outcome == trial_frames.OK:
            return self.text
        if self.outcome == trial_frames.INVALID:
            raise InvalidRequest(*json.loads(self.text))
        raise InvalidRequest(field, f"is too complex: {self.text.decode()}")


class Trials:
    """The trials of one process, and their verdicts. One event loop at a time uses it.

    The helper process starts at the first trial. It ends with this object, and with this process, however it ends.

    Args:
        tokenizer_json: path of the checkpoint's tokenizer.json.
        vocab_size: number of rows of the model's output head.
        eos_token_ids: token ids that end an answer.
        limits: what a client's grammar may cost.
    """

    def __init__(
        self, tokenizer_json: Path, vocab_size: int, eos_token_ids: Sequence[int], limits: GrammarLimits | None = None
    ) -> None:
        limits = limits or GrammarLimits()
        bench = {
            "tokenizer_json": str(tokenizer_json.resolve()),
            "vocab_size": vocab_size,
            "eos_token_ids": list(eos_token_ids),
        }
        self._bench = json.dumps(bench | asdict(limits))  # arguments of ``overfill.request.trial.Bench``
        self._patience = trial_frames.WALL_FACTOR * limits.seconds + _MARGIN
        self._permits = FairPermits(RUNNING, WAITING)
        self._verdicts: OrderedDict[bytes, _Verdict] = OrderedDict()
        self._bytes = 0
        self._running: set[asyncio.Task[_Verdict]] = set()
        self._helper: _Helper | None = None
        self._sending = ThreadPoolExecutor(1, "trials")

    @property
    def helper_pid(self) -> int | None:
        """Process id of the helper; None while there is none."""
        helper = self._helper
        return helper.pid if helper is not None and helper.alive else None

    async def try_text(self, kind: str, text: str, key: str = "") -> float:
        """Tries a client's grammar, unless it is a fixed one or was tried before.

        Args:
            kind, text: as for ``Grammar``, not checked.
            key: as for ``run``.

        Returns:
            Seconds of CPU time that compiling it takes.

        Raises:
            InvalidRequest: the grammar is wrong, not supported or too complex.
            Overloaded: it cannot be tried now.
        """
        if kind == "json_object":
            return 0
        payload = f"{kind}\0{text}".encode()
        return float(await self.run("overfill.request.trial:try_grammar", payload, f"sampling.grammar.{kind}", key))

    async def run(self, function: str, payload: bytes, field: str, key: str = "") -> bytes:
        """Returns what ``function`` returns for ``payload`` in a process of its own. Remembers the verdict.

        Args:
            function: ``module:name`` of a function that takes ``payload`` and a ``Bench``.
            field: field of the request that an error names if the process dies.
            key: client. Each has one trial at a time, so that none waits long for another.

        Raises:
            InvalidRequest: ``function`` raised it, or the process exceeded its memory, CPU time or stack.
            Overloaded: too many trials of the key wait, or the helper process cannot work now.
        """
        body = function.encode() + b"\0" + payload
        digest = hashlib.blake2b(body, digest_size=24).digest()
        verdict = self._known(digest)
        if verdict is None:
            await self._permits.take(key)
            # A task of its own: a trial goes on when its request is cancelled, and returns its permit at its end.
            task = asyncio.ensure_future(self._try(digest, body, key))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            verdict = await asyncio.shield(task)
        if verdict.outcome == trial_frames.LATE:
            raise Overloaded("this machine is too busy to check a new grammar now", 1.0, "grammars")
        return verdict.result(field)

    def close(self) -> None:
        """Ends the helper process; a later trial starts another."""
        if self._helper is not None:
            self._helper.end()
            self._helper = None

    def _known(self, digest: bytes) -> _Verdict | None:
        if (verdict := self._verdicts.get(digest)) is not None:
            self._verdicts.move_to_end(digest)
        return verdict

    async def _try(self, digest: bytes, body: bytes, key: str) -> _Verdict:
        try:
            # The same key may have tried the same grammar while this trial waited.
            if (verdict := self._known(digest)) is not None:
                return verdict
            reply = await self._ask(body)
        finally:
            self._permits.release(key)
        verdict = _Verdict(reply[:1], reply[1:])
        if verdict.outcome == trial_frames.LATE:
            return verdict
        if verdict.outcome == trial_frames.TOO_COMPLEX:
            log.warning("refused a grammar of %d bytes: %s", len(body), verdict.text.decode())
        if digest not in self._verdicts:
            self._verdicts[digest] = verdict
            self._bytes += _VERDICT_BYTES + len(verdict.text)
            while self._bytes > _MAX_VERDICT_BYTES:
                _, oldest = self._verdicts.popitem(last=False)
                self._bytes -= _VERDICT_BYTES + len(oldest.text)
        return verdict

    async def _ask(self, body: bytes) -> bytes:
        """Returns the helper's reply. If the helper dies, a new one tries once more."""
        loop = asyncio.get_running_loop()
        for _ in range(2):
            helper = None
            try:
                helper, reply = await loop.run_in_executor(self._sending, self._send, body)
                async with asyncio.timeout(self._patience):
                    return await asyncio.wrap_future(reply)
            except TimeoutError:
                log.error("the helper process that tries grammars does not answer; it is ended")
                assert helper is not None
                helper.end()
            except OSError as error:
                log.error("the helper process that tries grammars ended: %s", error)
        raise Overloaded("new grammars cannot be checked now: the helper process ended", 1.0, "grammars")

    def _send(self, body: bytes) -> tuple[_Helper, Future[bytes]]:
        """Sends a request to the helper, and starts one if there is none. Runs on one thread only."""
        if self._helper is None or not self._helper.alive:
            self._helper = _Helper(self._bench)
            weakref.finalize(self, self._helper.end)
        try:
            return self._helper, self._helper.send(body)
        except OSError:
            self.close()  # its end may not have been noticed yet
            raise


class _Helper:
    """A helper process, and the thread that reads its replies."""

    def __init__(self, bench: str) -> None:
        self._connection, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "overfill.request.trial_helper", _BENCH, bench],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=_environment(),
                start_new_session=True,
            )
        self.pid = self._process.pid
        self._lock = threading.Lock()
        self._count = 0
        self._waiting: dict[int, Future[bytes]] | None = {}  # None once the process has ended
        threading.Thread(target=self._read, name="trial-replies", daemon=True).start()

    @property
    def alive(self) -> bool:
        return self._waiting is not None

    def send(self, body: bytes) -> Future[bytes]:
        """Returns the future reply. Raises OSError if the process has ended."""
        reply: Future[bytes] = Future()
        with self._lock:
            if self._waiting is None:
                raise BrokenPipeError("it has ended already")
            number = self._count = self._count + 1
            self._waiting[number] = reply
        trial_frames.write_frame(self._connection, number, body)
        return reply

    def end(self) -> None:
        """Ends the process at once, with its trials, even if it is stopped or does not answer."""
        self._process.kill()

    def _read(self) -> None:
        while (frame := trial_frames.read_frame(self._connection)) is not None:
            number, reply = frame
            with self._lock:
                future = None if self._waiting is None else self._waiting.pop(number, None)
            if future is not None and future.set_running_or_notify_cancel():
                future.set_result(reply)
        with self._lock:
            waiting, self._waiting = self._waiting or {}, None
        self._connection.close()
        code = self._process.wait()
        for future in waiting.values():
            if future.set_running_or_notify_cancel():
                future.set_exception(BrokenPipeError(f"it exited with status {code}"))


def _environment() -> dict[str, str]:
    """Returns the helper's environment: no secrets, one thread, and one heap, because limits count reserved memory."""
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    single = dict.fromkeys(("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MALLOC_ARENA_MAX"), "1")
    # Not only this process's PYTHONPATH, because a host such as Ray may have changed the path since the start.
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {**inherited, **single, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}
