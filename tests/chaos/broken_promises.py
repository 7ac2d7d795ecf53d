"""Breaks every promise of docs/explanation/failure.md on purpose, and checks that a test fails.

``python tests/chaos/broken_promises.py`` copies the tree. For each promise it changes an expression or a few statements
of the copy, runs the test of the promise, requires it to fail, and restores the file. It prints the table of
docs/explanation/failure.md. Arguments select promises. This proves that each test can fail.

The code that keeps a promise is described by its syntax, not by file and line, so that it may move.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_COPIED = ("overfill", "services", "tests", "pyproject.toml", "README.md")
_TIMEOUT = 600  # seconds


@dataclass(frozen=True)
class Broken:
    """A promise and what breaks it: the code ``old`` becomes ``new``. Then ``test`` fails.

    ``old`` occurs once in ``overfill`` and ``services``, or once in their functions called ``inside``. It is an
    expression or statements; an ellipsis in it stands for any expression, and at the end of arguments for the rest.
    """

    promise: str
    how: str
    old: str
    new: str
    test: str
    inside: str = ""


# fmt: off
# Each promise and how it is broken; then the code before and after; then its test.
BROKEN = (
    Broken("a request outlives its decode worker", "a lost worker ends the request",
        "RETRIED = ...", "RETRIED = (TransferFailed,)",
        "tests/unit/routing/test_relay.py::test_a_lost_worker_is_followed_by_another_that_knows_the_tokens"),
    Broken("the answer continues without a gap", "a worker may begin behind a gap",
        "first > known", "False",
        "tests/unit/routing/test_relay.py::test_a_gap_or_a_contradiction_ends_the_attempt_not_the_answer"),
    Broken("tokens that the client has are not computed again", "the next worker is not told the tokens so far",
        "start.emitted_token_ids[:] = self.answer.emitted", "pass",
        "tests/unit/routing/test_relay.py::test_a_lost_worker_is_followed_by_another_that_knows_the_tokens"),
    Broken("a request outlives its prefill worker", "a failed handoff ends the request",
        "self._want_prefill(_reason_for(error), ...)", "raise error",
        "tests/integration/test_phases.py::test_a_prefill_worker_that_fails_is_reported_and_another_may_follow"),
    Broken("a request outlives its router", "the SDK asks the same address again",
        "self._addresses.rotate(-1)", "self._addresses.rotate(0)",
        "tests/unit/client/test_client.py::test_an_answer_goes_on_at_the_next_router_when_one_is_lost"),
    Broken("a request outlives a second router too, if the first is back",
        "an accepted request does not reset the count of failures",
        "self._failures = 0", "pass",
        "tests/unit/client/test_client.py::test_a_router_that_is_back_is_asked_again", inside="accepted"),
    Broken("a silent peer is given up after 10 s", "pings may stay unanswered for gRPC's default minute",
        '("grpc.http2.ping_timeout_ms", ...)', '("grpc.http2.ping_timeout_ms", 60_000)',
        "tests/unit/rpc/test_frozen_peer.py::test_calls_to_a_frozen_server_end"),
    Broken("wrong KV never becomes a token", "checksums of encoded KV are not compared",
        "is_damaged(chunk)", "False",
        "tests/unit/kv/test_chunks.py::test_any_changed_byte_of_the_payload_is_detected", inside="check"),
    Broken("wrong KV never becomes a token", "checksums of raw KV are not compared",
        "digest(chunk.header, ...) != chunk.checksum", "False",
        "tests/unit/kv/test_native_kv.py::test_a_flipped_bit_is_noticed_and_chunks_before_it_are_in_place"),
    Broken("KV that arrives twice never becomes a token", "overlapping chunks are accepted",
        "view.any()", "False",
        "tests/unit/kv/test_ranges.py::test_a_duplicate_or_overlap_is_refused_and_changes_nothing"),
    Broken("KV that an adapter wrote answers no other adapter", "blocks behind answer_start count as the full model's",
        "len(self.prompt) if self.answer_start is None else self.answer_start", "len(self.prompt)",
        "tests/unit/engine/test_conformance.py::TestAdapters"
        "::test_turns_of_a_chat_that_different_tasks_answer_find_only_what_the_full_model_wrote"),
    Broken("KV of a prompt is the full model's, whatever wrote the turns before",
        "the blocks of an answer are shared across adapters",
        "self._prefix.release(sequence.id)",
        "if sequence.blocks:\n"
        "    tokens = [*sequence.prompt, *sequence.emitted]\n"
        "    self._prefix._holders[sequence.id].prompt = self._prefix.blocks_of(tokens, sequence.cache_namespace)\n"
        "    self._prefix.publish(sequence.id, sequence.computed)\n"
        "self._prefix.release(sequence.id)",
        "tests/integration/test_tasks_of_one_prompt.py"
        "::test_the_prompts_of_a_chat_of_many_tasks_are_the_full_models_throughout", inside="_free"),
    Broken("a decoder's answer never becomes a prompt's KV", "any decoder publishes its answers",
        "not self._returns_kv", "False",
        "tests/unit/engine/test_decode_engine.py"
        "::test_no_answer_of_another_decoder_an_adapter_or_behind_lossy_kv_is_published", inside="_return_answer"),
    Broken("a decoder's answer never becomes a prompt's KV", "answers of adapters are published",
        "sequence.adapter is not None", "False",
        "tests/unit/engine/test_decode_engine.py"
        "::test_no_answer_of_another_decoder_an_adapter_or_behind_lossy_kv_is_published", inside="_return_answer"),
    Broken("a decoder's answer never becomes a prompt's KV", "answers behind KV of a lossy codec are published",
        "not is_raw(sequence.cache_namespace)", "False",
        "tests/unit/engine/test_decode_engine.py"
        "::test_no_answer_of_another_decoder_an_adapter_or_behind_lossy_kv_is_published", inside="_return_answer"),
    Broken("a decoder's answer never becomes a prompt's KV", "every decoder counts as the reader",
        "same_weights and same_config and every_layer and not own.kv_cache_dtype", "True",
        "tests/unit/engine/test_conformance.py::TestDecode"
        "::test_the_next_turns_of_a_chat_never_find_kv_that_the_decoder_wrote"),
    Broken("missing KV is pulled again", "a broken stream is not restarted",
        "MAX_REPEATS = ...", "MAX_REPEATS = 0",
        "tests/integration/test_bad_kv.py::test_ranges_of_a_wrong_chunk_are_sent_again"),
    Broken("a transfer that stalls is given up", "a stall may last for ever",
        "now - self._last_progress >= ...", "False",
        "tests/unit/kv/test_stall.py::test_a_peer_that_takes_no_part_is_given_up_after_the_stall_timeout"),
    Broken("a very slow transfer does not hold KV for ever", "a transfer may take any time",
        "now - self._all_ready >= ...", "False",
        "tests/unit/kv/test_stall.py::test_a_trickle_ends_after_the_longest_time"),
    Broken("many transfers on one link all finish", "a stall of 2 s ends a transfer",
        "STALL_TIMEOUT: Final = ...", "STALL_TIMEOUT: Final = 2.0",
        "tests/unit/kv/test_stall.py::test_many_transfers_on_one_link_all_finish"),
    Broken("a client that disconnects frees decode blocks", "its sequence continues to run",
        "task.cancel()", "pass",
        "tests/integration/test_phases.py::test_a_router_that_vanishes_frees_both_sides", inside="cancel_all"),
    Broken("a client that disconnects frees prefill blocks", "its lease is not ended",
        "self._end(lease)", "pass",
        "tests/integration/test_phases.py::test_a_deadline_that_passes_frees_both_sides"),
    Broken("no block is freed while it is read", "readers are not waited for",
        "await self.streams.join()", "pass",
        "tests/unit/services/test_prefill_servicer.py::test_blocks_are_released_after_the_last_read"),
    Broken("no block is freed while it is read", "readers in ranks are not waited for",
        "await self.ranks.close(...)", "0, 0",
        "tests/unit/services/test_prefill_servicer.py::test_blocks_are_released_after_no_rank_reads_them"),
    Broken("every rank has its heads before the answer goes on", "the first of several replicas counts",
        "counts == self._replicas", "counts == 1",
        "tests/unit/kv/test_ranks.py::test_a_range_is_reported_when_all_replicas_have_it_and_once"),
    Broken("no block is freed while it is written", "writers are not waited for",
        "await shielded(self._let_go())", "pass",
        "tests/unit/services/test_sequence_session.py::test_cancelled_twice_it_still_waits_for_the_pull_before_the_engine_forgets"),
    Broken("the end of one task does not end the transfer for the others", "the session that leads it does not go on",
        "await self._carry_on()", "pass",
        "tests/unit/services/test_shared_transfers.py::test_the_transfer_goes_on_when_its_leader_has_ended"),
    Broken("a sequence waits only while its prompt is received", "followers do not learn of a failed transfer",
        "follower._notify(TransferLost(transfer, worker_id, error))", "pass",
        "tests/unit/services/test_shared_transfers.py::test_each_asks_again_after_a_failure_and_the_first_that_gets_a_prefill_worker_leads"),
    Broken("no block is freed while a rank reads it", "the rank's readers are not waited for",
        "await transfer.streams.join()", "pass",
        "tests/unit/engine/ranks/test_rank_agents.py::test_a_transfer_is_closed_when_no_rank_reads_it_any_more"),
    Broken("no block is freed while a rank writes it", "the rank's pull is not waited for",
        "await shielded(answer)", "pass",
        "tests/unit/engine/ranks/test_rank_agents.py::test_a_cancelled_pull_ends_when_no_rank_writes_any_more"),
    Broken("a frozen rank ends what waits for it", "its silence is not counted",
        "peer.silent += elapsed", "pass",
        "tests/unit/engine/ranks/test_rank_links.py::test_a_silent_rank_is_lost_while_nobody_waits_for_it"),
    Broken("no rank outlives its worker", "the end of its link is ignored",
        "self._on_orphaned()", "pass",
        "tests/unit/engine/ranks/test_rank_agents.py::test_a_link_that_breaks_orphans_the_rank"),
    Broken("a rank admits whom its worker admits", "its listener has no rules",
        "RpcServer(command.tls, command.max_rpcs, command.access)", "RpcServer(command.tls, command.max_rpcs)",
        "tests/integration/test_rank_listeners.py::test_ranks_want_the_secret_of_the_stack"),
    Broken("a lost block ends the worker", "an idle engine does not check its blocks",
        "self._core.check()\nchecked = True", "checked = True",
        "tests/integration/test_stack.py::test_a_worker_that_loses_a_block_notices_when_idle_and_exits"),
    Broken("clients of a router that drains reach another one behind the same name", "their connections stay open",
        "asyncio.create_task(old.stop(...))", "asyncio.create_task(asyncio.sleep(0))",
        "tests/integration/test_two_routers.py::test_a_router_that_drains_sends_its_clients_to_the_other_behind_the_same_name"),
    Broken("SIGTERM lets answers finish", "a worker does not wait",
        "await self._until_idle()", "pass",
        "tests/integration/test_stack.py::test_sigterm_lets_running_answers_finish_and_exits_0"),
    Broken("an adapter that is unloaded finishes its answers", "its slot is emptied at once",
        "loaded.users or not loaded.unloaded", "not loaded.unloaded",
        "tests/unit/services/test_worker_adapters.py::test_an_unloaded_adapter_leaves_its_slot_with_its_last_user"),
    Broken("a drained process ends with its service", "it waits for every thread",
        "os._exit(code)", "sys.exit(code)",
        "tests/unit/services/test_hosting.py::test_the_process_ends_with_its_service_even_if_threads_still_run",
        inside="exit_now"),
    Broken("a stuck step ends the worker", "the watchdog does nothing",
        "self._on_stuck()", "pass",
        "tests/integration/test_stack.py::test_a_worker_stuck_in_a_step_exits_and_its_requests_continue_elsewhere"),
    Broken("a failed step does not end the worker", "the exception is raised again",
        'log.exception("decode step failed")', "raise",
        "tests/unit/engine/test_decode_engine.py::test_a_failed_step_fails_its_sequences_only"),
    Broken("a preempted sequence resumes with its tokens", "its tokens are cleared",
        "sequence.blocks = ...\nsequence.computed = 0",
        "sequence.blocks = allocation.blocks\nsequence.computed = 0\nsequence.emitted.clear()",
        "tests/unit/engine/test_decode_engine.py::test_when_blocks_run_out_the_youngest_is_preempted_and_resumes_with_its_tokens"),
    Broken("a deadline ends a request everywhere", "the router ignores it",
        "self._loop.call_at(self.request.deadline, ...)", "self._loop.call_at(1e12, self._expire)",
        "tests/unit/routing/test_relay.py::test_the_deadline_ends_a_request_that_waits"),
    Broken("deadlines do not move with wall clocks", "a decode worker measures deadlines by the wall clock",
        "self._sequences[number] = sequence, task",
        "self._sequences[number] = sequence, task\n"
        "wall = __import__('time').time\n"
        "end = wall() + 300\n"
        "\n"
        "async def watch():\n"
        "    while wall() < end:\n"
        "        await asyncio.sleep(0.05)\n"
        "    sequence.fail(DeadlineExceeded('late'), '')\n"
        "\n"
        "watching = asyncio.ensure_future(watch())\n"
        "task.add_done_callback(lambda _: watching.cancel())",
        "tests/chaos/test_trials.py::test_a_wall_clock_that_is_set_costs_no_request"),
    Broken("a restarted worker is another one", "incarnations are not compared",
        "described.incarnation != self.target.incarnation", "False",
        "tests/integration/test_bad_kv.py::test_a_restarted_worker_is_not_the_one_that_was_chosen"),
    Broken("KV of another model is refused", "the handshake compares nothing",
        "differing = ...", "differing = []",
        "tests/integration/test_bad_kv.py::test_another_full_model_is_refused_with_the_differing_fields",
        inside="check_same"),
    Broken("KV of a model with another config is refused", "a peer's config is not read",
        "shared_fields(cls, model)", 'shared_fields(cls, model) | {"config_digest": ""}',
        "tests/unit/kv/test_handshake.py::test_every_field_of_the_kvs_identity_is_read_from_the_message_and_compared",
        inside="from_proto"),
    Broken("a resumed answer keeps its writer and its prompt", "a router does not compare what the answer depends on",
        "check_same(...)", "pass",
        "tests/integration/test_resumed_answers.py::test_a_router_with_another_writer_refuses_and_names_the_fields",
        inside="check_resume"),
    Broken("an adapter's answer is written by that adapter, or not at all",
        "a request goes to a decode worker that lacks its adapter",
        "adapter is None or worker.has(adapter)", "True",
        "tests/unit/routing/test_dispatcher.py::test_a_job_with_an_adapter_goes_only_to_a_worker_that_has_it"),
    Broken("an adapter's answer is written by that adapter, or not at all",
        "the router does not compare what a decode worker says of the writer",
        "wrote != asked", "False",
        "tests/unit/routing/test_relay.py::test_only_the_adapter_that_was_asked_for_writes_the_answer"),
    Broken("an adapter's answer is written by that adapter, or not at all",
        "its digest is no part of what a resumed answer must keep",
        "(identity.answer_start, identity.adapter_digest) = ...", "identity.answer_start = job.start.answer_start",
        "tests/integration/test_adapter_routes.py::test_an_answer_is_resumed_at_another_router_only_by_its_adapter"),
    Broken("a request that waits for an adapter holds up no other", "the first blocked request claims every worker",
        "self._tokens.setdefault(..., job.total_tokens)", "self._tokens.setdefault('', job.total_tokens)",
        "tests/unit/routing/test_dispatcher.py"
        "::test_a_blocked_job_claims_only_workers_that_have_its_adapter_and_each_adapter_claims_its_own"),
    Broken("a request that waits for an adapter which is unloaded ends", "it waits until its deadline",
        "adapters.loss(job.adapter, expired)", "None",
        "tests/unit/routing/test_dispatcher.py"
        "::test_a_job_whose_adapter_is_unloaded_ends_at_once_and_one_whose_workers_left_after_a_while"),
    Broken("a resumed answer keeps its writer and its prompt", "each router truncates the prompt to its own capacity",
        "room = request.resume_identity.prompt_tokens", "pass",
        "tests/integration/test_resumed_answers.py"
        "::test_a_prompt_that_was_truncated_for_a_small_router_stays_so_at_a_large_one"),
    Broken("too much load is refused at once", "queues have no end",
        "queue.admission.check(...)", "pass",
        "tests/integration/test_overload.py"),
    Broken("a slow reader delays no other request", "each token waits for the reader as its own message",
        "last is not None and _continues(...)", "False",
        "tests/unit/rpc/test_sequences.py::test_unread_tokens_merge_into_one_update"),
    Broken("lost shared memory costs speed only", "missing KV is requested through shared memory again",
        "repeats == 0", "True",
        "tests/unit/kv/test_shm.py::test_a_link_that_only_the_server_has_lost_makes_payloads_travel"),
    Broken("a full disk costs speed only", "a failed allocation of shared memory is not handled",
        'logger.warning("cannot share memory with a decode worker, so payloads travel: %s", ...)', "raise",
        "tests/unit/kv/test_shm.py::test_when_no_memory_can_be_set_aside_payloads_travel"),
    Broken("a block from disk is checked", "its checksum is not compared",
        "(written := ...) < len(chunks)", "(written := self._store.write(blocks, self._targets, chunks)) < 0",
        "tests/unit/kv/test_disk.py::test_a_flipped_bit_anywhere_in_a_file_is_a_miss"),
    Broken("a block from disk is checked", "a file may be another block's",
        "chain[:TRANSFER_ID_BYTES]", "bytes(TRANSFER_ID_BYTES)",
        "tests/unit/kv/test_disk.py::test_files_with_swapped_names_are_misses"),
)
# fmt: on


@dataclass(frozen=True)
class Place:
    """The lines and columns (in UTF-8 bytes) of one or several nodes that follow each other in ``file``."""

    file: Path
    first: ast.expr | ast.stmt
    last: ast.expr | ast.stmt

    def replaced_by(self, new: str) -> str:
        """The file's text with ``new`` in this place. Lines after the first are indented as the place is."""
        lines = self.file.read_bytes().splitlines(keepends=True)
        assert self.last.end_lineno is not None
        before = b"".join(lines[: self.first.lineno - 1]) + lines[self.first.lineno - 1][: self.first.col_offset]
        after = lines[self.last.end_lineno - 1][self.last.end_col_offset :] + b"".join(lines[self.last.end_lineno :])
        indented = textwrap.indent(new, " " * self.first.col_offset).lstrip()
        return (before + indented.encode() + after).decode()


def place_of(broken: Broken) -> Place:
    """The one place in the tree of what ``broken`` replaces; an AssertionError when there is none or several."""
    old, new = ast.parse(broken.old).body, ast.parse(broken.new).body
    expressions = isinstance(old[0], ast.Expr) and isinstance(new[0], ast.Expr)
    wanted = [node.value for node in old if isinstance(node, ast.Expr)] if expressions else old
    words = re.findall(r"\w+", broken.old)
    places = [
        Place(file, nodes[start], nodes[start + len(wanted) - 1])
        for file, text in _texts().items()
        if all(word in text for word in words)
        for function, nodes in _siblings(file)
        for start in range(len(nodes) - len(wanted) + 1)
        if broken.inside in ("", function) and all(map(_matches, wanted, nodes[start:]))
    ]
    found = ", ".join(f"{place.file.relative_to(ROOT)}:{place.first.lineno}" for place in places)
    within = f" in {broken.inside}()" if broken.inside else ""
    assert len(places) == 1, (
        f"The promise {broken.promise!r} is kept by {broken.old!r}, which must stand once{within}; "
        f"found: {found or 'nowhere'}. Name the code that keeps it now in tests/chaos/broken_promises.py"
    )
    return places[0]


@cache
def _texts() -> dict[Path, str]:
    files = [file for package in ("overfill", "services") for file in sorted((ROOT / package).rglob("*.py"))]
    return {
        file: file.read_text(encoding="utf-8") for file in files if not file.is_relative_to(ROOT / "overfill" / "v1")
    }


@cache
def _siblings(file: Path) -> list[tuple[str, list[Any]]]:
    """The file's bodies of statements, each whole, and its expressions, each alone, with the function around them."""
    found: list[tuple[str, list[Any]]] = []

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        bodies = [value for _, value in ast.iter_fields(node) if isinstance(value, list)]
        found.extend((function, body) for body in bodies if body and isinstance(body[0], ast.stmt))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                found.append((function, [child]))
            visit(child, function)

    visit(ast.parse(_texts()[file]), "")
    return found


def _matches(wanted: object, there: object) -> bool:
    if _is_any(wanted):
        return True
    if isinstance(wanted, list) and isinstance(there, list):
        if wanted and _is_any(wanted[-1]):
            return len(there) >= len(wanted) - 1 and all(map(_matches, wanted[:-1], there))
        return len(wanted) == len(there) and all(map(_matches, wanted, there))
    if not isinstance(wanted, ast.AST) or type(wanted) is not type(there):
        return wanted == there
    rest = isinstance(wanted, ast.Call) and bool(wanted.args) and _is_any(wanted.args[-1])
    fields = (field for field in ast.iter_fields(wanted) if not (rest and field[0] == "keywords"))
    return all(_matches(value, getattr(there, name)) for name, value in fields)


def _is_any(node: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...


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
    place = place_of(broken)
    file = tree / place.file.relative_to(ROOT)
    whole = file.read_text(encoding="utf-8")
    file.write_text(place.replaced_by(broken.new), encoding="utf-8")
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
