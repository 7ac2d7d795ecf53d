"""Breaks every promise of docs/explanation/failure.md on purpose, and checks that a test fails.

``python tests/chaos/broken_promises.py`` copies the tree. For each promise it changes a few lines of the copy, runs the
test of the promise, requires it to fail, and restores the lines. It prints the table of
docs/explanation/failure.md. Arguments select promises. This proves that each test can fail.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_COPIED = ("overfill", "services", "tests", "pyproject.toml", "README.md")
_TIMEOUT = 600  # seconds


@dataclass(frozen=True)
class Broken:
    """A promise and what breaks it: ``old``, which occurs once in ``file``, becomes ``new``. Then ``test`` fails."""

    promise: str
    how: str
    file: str
    old: str
    new: str
    test: str


BROKEN = (
    Broken(
        "a request outlives its decode worker",
        "a lost worker ends the request",
        "overfill/routing/relay.py",
        "RETRIED = (Unavailable, InternalError, TransferFailed, Incompatible, Overloaded)",
        "RETRIED = (TransferFailed,)",
        "tests/unit/routing/test_relay.py::test_a_lost_worker_is_followed_by_another_that_knows_the_tokens",
    ),
    Broken(
        "the answer continues token for token",
        "a worker may begin behind a gap",
        "overfill/routing/answer.py",
        "        if first > known:\n",
        "        if False:\n",
        "tests/unit/routing/test_relay.py::test_a_gap_or_a_contradiction_ends_the_attempt_not_the_answer",
    ),
    Broken(
        "tokens that the client has are not computed again",
        "the next worker is not told the tokens so far",
        "overfill/routing/relay.py",
        "start.emitted_token_ids[:] = self.answer.emitted",
        "pass",
        "tests/unit/routing/test_relay.py::test_a_lost_worker_is_followed_by_another_that_knows_the_tokens",
    ),
    Broken(
        "a request outlives its prefill worker",
        "a failed handoff ends the request",
        "services/decode/sequence_session.py",
        "                self._want_prefill(_reason_for(error), str(error), worker, isinstance(error, StepFailed))",
        "                raise error",
        "tests/integration/test_phases.py::test_a_prefill_worker_that_fails_is_reported_and_another_may_follow",
    ),
    Broken(
        "a request outlives its router",
        "the SDK asks the same address again",
        "overfill/client/failover.py",
        "self._addresses.rotate(-1)",
        "self._addresses.rotate(0)",
        "tests/unit/client/test_client.py::test_an_answer_goes_on_at_the_next_router_when_one_is_lost",
    ),
    Broken(
        "a request outlives a second router too, if the first is back",
        "an accepted request does not reset the count of failures",
        "overfill/client/failover.py",
        'has accepted the request."""\n        self._failures = 0',
        'has accepted the request."""',
        "tests/unit/client/test_client.py::test_a_router_that_is_back_is_asked_again",
    ),
    Broken(
        "a silent peer is given up after 10 s",
        "pings may stay unanswered for gRPC's default minute",
        "overfill/rpc/channel.py",
        '        ("grpc.http2.ping_timeout_ms", _milliseconds(ping_timeout)),\n',
        "",
        "tests/unit/rpc/test_frozen_peer.py::test_calls_to_a_frozen_server_end",
    ),
    Broken(
        "wrong KV never becomes a token",
        "checksums of encoded KV are not compared",
        "overfill/kv/chunks.py",
        "if is_damaged(chunk):",
        "if False:",
        "tests/unit/kv/test_chunks.py::test_any_changed_byte_of_the_payload_is_detected",
    ),
    Broken(
        "wrong KV never becomes a token",
        "checksums of raw KV are not compared",
        "overfill/kv/chunks.py",
        "return bool(chunk.header) and digest(chunk.header, chunk.scales, chunk.payload) != chunk.checksum",
        "return False",
        "tests/unit/kv/test_native_kv.py::test_a_flipped_bit_is_noticed_and_chunks_before_it_are_in_place",
    ),
    Broken(
        "KV that arrives twice never becomes a token",
        "overlapping chunks are accepted",
        "overfill/kv/ranges.py",
        "            if view.any():\n",
        "            if False:\n",
        "tests/unit/kv/test_ranges.py::test_a_duplicate_or_overlap_is_refused_and_changes_nothing",
    ),
    Broken(
        "missing KV is pulled again",
        "a broken stream is not restarted",
        "overfill/kv/receiver.py",
        "MAX_REPEATS = 3",
        "MAX_REPEATS = 0",
        "tests/integration/test_bad_kv.py::test_ranges_of_a_wrong_chunk_are_sent_again",
    ),
    Broken(
        "a transfer that stalls is given up",
        "a stall may last for ever",
        "overfill/kv/stall.py",
        "        if now - self._last_progress >= self._limits.stall:\n",
        "        if False:\n",
        "tests/unit/kv/test_stall.py::test_a_peer_that_takes_no_part_is_given_up_after_the_stall_timeout",
    ),
    Broken(
        "a very slow transfer does not hold KV for ever",
        "a transfer may take any time",
        "overfill/kv/stall.py",
        "        if self._all_ready is not None and now - self._all_ready >= self._limits.whole:\n",
        "        if False:\n",
        "tests/unit/kv/test_stall.py::test_a_trickle_ends_after_the_longest_time",
    ),
    Broken(
        "many transfers on one link all finish",
        "a stall of 2 s ends a transfer",
        "overfill/rpc/constants.py",
        "STALL_TIMEOUT: Final = 30.0",
        "STALL_TIMEOUT: Final = 2.0",
        "tests/unit/kv/test_stall.py::test_many_transfers_on_one_link_all_finish",
    ),
    Broken(
        "a client that disconnects frees decode blocks",
        "its sequence continues to run",
        "overfill/rpc/sequences.py",
        "        for task in running:\n            task.cancel()\n",
        "        running = []\n",
        "tests/integration/test_phases.py::test_a_router_that_vanishes_frees_both_sides",
    ),
    Broken(
        "a client that disconnects frees prefill blocks",
        "its lease is not ended",
        "services/prefill/servicer.py",
        "                self._end(lease)\n",
        "                pass\n",
        "tests/integration/test_phases.py::test_a_deadline_that_passes_frees_both_sides",
    ),
    Broken(
        "no block is freed while it is read",
        "readers are not waited for",
        "services/prefill/servicer.py",
        "        await lease.join_readers()\n        del",
        "        del",
        "tests/unit/services/test_prefill_servicer.py::test_blocks_are_released_after_the_last_read",
    ),
    Broken(
        "no block is freed while it is written",
        "writers are not waited for",
        "services/decode/sequence_session.py",
        "                await shielded(self._join_pull(cancel=self._wants_kv or self._failure is not None))\n",
        "                pass\n",
        "tests/unit/services/test_sequence_session.py::test_cancelled_twice_it_still_waits_for_the_pull_before_the_engine_forgets",
    ),
    Broken(
        "a lost block ends the worker",
        "an idle engine does not check its blocks",
        "overfill/engine/thread.py",
        "                    if not busy:\n                        self._core.check()\n",
        "                    if not busy:\n",
        "tests/integration/test_stack.py::test_a_worker_that_loses_a_block_notices_when_idle_and_exits",
    ),
    Broken(
        "clients of a router that drains reach another one behind the same name",
        "their connections stay open",
        "services/router/app.py",
        "closing = asyncio.create_task(old.stop(self._config.grace_period + STOP_GRACE))",
        "closing = asyncio.create_task(asyncio.sleep(0))",
        "tests/integration/test_two_routers.py::test_a_router_that_drains_sends_its_clients_to_the_other_behind_the_same_name",
    ),
    Broken(
        "SIGTERM lets answers finish",
        "a worker does not wait",
        "overfill/rpc/worker.py",
        "            await self._until_idle()\n",
        "",
        "tests/integration/test_stack.py::test_sigterm_lets_running_answers_finish_and_exits_0",
    ),
    Broken(
        "a drained process ends with its service",
        "it waits for every thread",
        "overfill/process/leaving.py",
        "    os._exit(code)",
        "    sys.exit(code)",
        "tests/unit/services/test_hosting.py::test_the_process_ends_with_its_service_even_if_threads_still_run",
    ),
    Broken(
        "a stuck step ends the worker",
        "the watchdog does nothing",
        "overfill/engine/thread.py",
        "                self._on_stuck()\n",
        "",
        "tests/integration/test_stack.py::test_a_worker_stuck_in_a_step_exits_and_its_requests_continue_elsewhere",
    ),
    Broken(
        "a failed step does not end the worker",
        "the exception is raised again",
        "overfill/engine/decode.py",
        '            log.exception("decode step failed")\n',
        "            raise\n",
        "tests/unit/engine/test_decode_engine.py::test_a_failed_step_fails_its_sequences_only",
    ),
    Broken(
        "a preempted sequence resumes with its tokens",
        "its tokens are cleared",
        "overfill/engine/decode.py",
        "        sequence.blocks = allocation.blocks\n        sequence.computed = 0\n",
        "        sequence.blocks = allocation.blocks\n        sequence.computed = 0\n"
        "        sequence.emitted.clear()\n",
        "tests/unit/engine/test_decode_engine.py::test_when_blocks_run_out_the_youngest_is_preempted_and_resumes_with_its_tokens",
    ),
    Broken(
        "a deadline ends a request everywhere",
        "the router ignores it",
        "overfill/routing/relay.py",
        "self._loop.call_at(self.request.deadline, self._expire)",
        "self._loop.call_at(1e12, self._expire)",
        "tests/unit/routing/test_relay.py::test_the_deadline_ends_a_request_that_waits",
    ),
    Broken(
        "deadlines do not move with wall clocks",
        "a decode worker measures deadlines by the wall clock",
        "overfill/rpc/sequences.py",
        "        self._sequences[number] = sequence, task\n",
        "        self._sequences[number] = sequence, task\n"
        "        wall = __import__('time').time\n"
        "        end = wall() + 300\n\n"
        "        async def watch():\n"
        "            while wall() < end:\n"
        "                await asyncio.sleep(0.05)\n"
        "            sequence.fail(DeadlineExceeded('late'), '')\n\n"
        "        watching = asyncio.ensure_future(watch())\n"
        "        task.add_done_callback(lambda _: watching.cancel())\n",
        "tests/chaos/test_trials.py::test_a_wall_clock_that_is_set_costs_no_request",
    ),
    Broken(
        "a restarted worker is another one",
        "incarnations are not compared",
        "overfill/kv/peers.py",
        "if described.incarnation != self.target.incarnation:",
        "if False:",
        "tests/integration/test_bad_kv.py::test_a_restarted_worker_is_not_the_one_that_was_chosen",
    ),
    Broken(
        "KV of another model is refused",
        "the handshake compares nothing",
        "overfill/kv/handshake.py",
        "    if differing:\n",
        "    if False:\n",
        "tests/integration/test_bad_kv.py::test_another_full_model_is_refused_with_the_differing_fields",
    ),
    Broken(
        "too much load is refused at once",
        "queues have no end",
        "overfill/routing/dispatcher.py",
        "queue.admission.check(waiting, ahead, now, deadline, own, client_resumes=client_resumes)\n",
        "del waiting, ahead, now, deadline, own, client_resumes\n",
        "tests/integration/test_overload.py",
    ),
    Broken(
        "a slow reader delays no other request",
        "each token waits for the reader as its own message",
        "overfill/rpc/sequences.py",
        "        if waiting and _continues(waiting[-1], update):",
        "        if False:",
        "tests/unit/rpc/test_sequences.py::test_unread_tokens_merge_into_one_update",
    ),
    Broken(
        "lost shared memory costs speed only",
        "missing KV is requested through shared memory again",
        "overfill/kv/receiver.py",
        "if repeats == 0 and self._peer.link is not None and self._peer.link.alive else None",
        "if self._peer.link is not None and self._peer.link.alive else None",
        "tests/unit/kv/test_shm.py::test_a_link_that_only_the_server_has_lost_makes_payloads_travel",
    ),
    Broken(
        "a full disk costs speed only",
        "a failed allocation of shared memory is not handled",
        "overfill/kv/shm.py",
        "            except OSError as error:  # no memory",
        "            except ZeroDivisionError as error:  # no memory",
        "tests/unit/kv/test_shm.py::test_when_no_memory_can_be_set_aside_payloads_travel",
    ),
)


@contextmanager
def copied_tree() -> Iterator[Path]:
    """Yields a copy of the files that the tests need."""
    with tempfile.TemporaryDirectory(prefix="overfill-broken-") as parent:
        for name in _COPIED:
            source, copy = ROOT / name, Path(parent) / name
            if source.is_dir():
                shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy)
        yield Path(parent)


def is_noticed(tree: Path, broken: Broken) -> tuple[bool, str]:
    """Breaks a promise in ``tree``. Returns True if its test fails, and the last lines of its output."""
    file = tree / broken.file
    whole = file.read_text(encoding="utf-8")
    assert whole.count(broken.old) == 1, f"{broken.file} must contain this exactly once: {broken.old!r}"
    file.write_text(whole.replace(broken.old, broken.new), encoding="utf-8")
    # Without the promise, a test may wait for ever. The timeout makes it fail.
    patience = 60 if broken.test.startswith("tests/unit") else 240
    pytest = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*pytest, f"--timeout={patience}", broken.test],
            cwd=tree,
            env=os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return False, f"the test did not end within {_TIMEOUT} s"
    finally:
        file.write_text(whole, encoding="utf-8")
    lines = [line for line in done.stdout.splitlines() if line.startswith(("E  ", "FAILED", "ERROR"))]
    # Exit code 1 means that tests failed; 2 to 5 are errors in the call of pytest.
    return done.returncode == 1, " / ".join(lines[-2:]) or done.stdout[-300:]


def main() -> int:
    wanted = sys.argv[1:]
    missed = 0
    print("| promise | broken by | noticed by |\n|---|---|---|")
    with copied_tree() as tree:
        for broken in BROKEN:
            if wanted and broken.promise not in wanted:
                continue
            began = time.monotonic()
            noticed, said = is_noticed(tree, broken)
            missed += not noticed
            name = broken.test.removeprefix("tests/").replace("::", " ")
            print(f"| {broken.promise} | {broken.how} | {'' if noticed else '**NOT** '}`{name}` |", flush=True)
            print(f"{time.monotonic() - began:.0f} s: {said}", file=sys.stderr, flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
