"""Tests how the tokens of an answer merge into deltas: at once, by the stream interval, and while streams pause."""

import asyncio
from types import SimpleNamespace

import pytest

from overfill.api.answer_text import AnswerText
from overfill.api.detokenizer import StreamDetokenizer
from overfill.api.tokenizer import Tokenizer
from overfill.errors import Unavailable
from overfill.routing.answer import AnswerState
from overfill.routing.job import Job
from overfill.telemetry.router_metrics import RouterMetrics
from overfill.v1 import common_pb2, decode_pb2, inference_pb2
from services.router import pace
from services.router.pace import Pace
from services.router.running_answer import RunningAnswer
from services.router.shared import Shared
from services.router.statistics import Statistics

TEXT = "one two three four five six seven eight nine ten"


class Relay:
    """A relay whose tokens come from the test."""

    def __init__(self, interval):
        self.answer = AnswerState((), 100, 0.0)
        start = decode_pb2.StartDecode()
        self.request = Job(start=start, prompt_token_ids=(1,), stream_interval=interval)
        self.decode_worker, self.decode_engine = "decode-0", "overfill 0.2.0"
        self.closed = False

    def close(self):
        self.closed = True

    def finish_at(self, completion_tokens):
        assert self.closed
        return decode_pb2.DecodeDone(
            reason=common_pb2.FINISH_REASON_STOP, usage=common_pb2.Usage(cached_tokens=10 * completion_tokens)
        )


class Answer:
    """A running answer with ``TEXT``, and the worker that sends its tokens."""

    def __init__(self, folder, interval=1, stops=()):
        tokenizer = Tokenizer.load(folder / "full")
        self.ids = tokenizer.encode(TEXT)
        self.relay, self.pace, self._sent = Relay(interval), Pace(), 0
        signals = SimpleNamespace(finished=lambda *_: None)
        text = AnswerText(StreamDetokenizer(tokenizer), stops)
        self.running = RunningAnswer(
            self.relay,
            text,
            inference_pb2.Accepted(),
            Statistics(Shared(None, RouterMetrics()), signals),
            self.pace,
            on_read=lambda now: None,
            close=lambda relay, error: relay.close(),
        )

    def send(self, count):
        ids = self.ids[self._sent : self._sent + count]
        self.relay.answer.accept(decode_pb2.Tokens(first_index=self._sent, ids=ids), 0.0)
        self._sent += count

    def end(self):
        self.relay.answer.end(decode_pb2.DecodeDone(reason=common_pb2.FINISH_REASON_LENGTH))

    async def next(self):
        """Returns the number of tokens of the next delta; None at the end."""
        delta = await self.running.next()
        return None if delta is None else len(delta.token_ids)

    async def waiting(self):
        """Starts to wait for the next delta and returns the task."""
        task = asyncio.ensure_future(self.next())
        await settled()
        return task


async def settled():
    for _ in range(10):
        await asyncio.sleep(0)


async def test_each_token_is_a_delta_while_the_client_keeps_up(tiny_pair):
    answer = Answer(tiny_pair)
    for _ in range(4):
        task = await answer.waiting()
        answer.send(1)
        assert await task == 1
    answer.send(3)
    assert await answer.next() == 3


async def test_with_an_interval_only_the_first_and_the_last_delta_are_smaller(tiny_pair):
    answer = Answer(tiny_pair, interval=4)
    answer.send(1)
    assert await answer.next() == 1
    task = await answer.waiting()
    for _ in range(3):
        answer.send(1)
        await settled()
        assert not task.done()
    answer.send(1)
    assert await task == 4
    task = await answer.waiting()
    answer.send(2)
    await settled()
    assert not task.done()
    answer.end()
    assert await task == 2
    assert await answer.next() is None


async def test_text_does_not_depend_on_the_interval(tiny_pair):
    texts = set()
    for interval in (1, 3, 100):
        answer, pieces = Answer(tiny_pair, interval), []
        for _ in answer.ids:
            answer.send(1)
        answer.end()
        while (delta := await answer.running.next()) is not None:
            pieces.append(delta.text)
        rest = answer.running.rest
        texts.add("".join(pieces) + (rest.text if rest else ""))
    assert texts == {TEXT}


async def test_a_stop_string_ends_the_answer_before_the_interval_is_full(tiny_pair):
    answer = Answer(tiny_pair, interval=100, stops=["three"])
    answer.send(1)
    delta = await answer.running.next()
    text = delta.text
    task = asyncio.ensure_future(answer.running.next())
    for _ in answer.ids[1:]:
        if task.done():
            break
        answer.send(1)
        await settled()
    text += (await task).text
    assert text == "one two "
    assert answer.relay.closed
    assert await answer.running.next() is None
    assert answer.running.finished.stop == "three"
    assert answer.running.finished.usage.cached_tokens == 10 * answer.running.finished.usage.completion_tokens > 0


async def test_an_error_comes_after_the_tokens_before_it(tiny_pair):
    answer = Answer(tiny_pair, interval=100)
    answer.send(1)
    assert await answer.next() == 1
    task = await answer.waiting()
    answer.send(2)
    await settled()
    answer.relay.answer.end(Unavailable("lost"))
    assert await task == 2
    with pytest.raises(Unavailable):
        await answer.next()


async def test_tokens_of_a_pause_leave_together_when_it_ends(tiny_pair, monkeypatch):
    monkeypatch.setattr(pace, "MIN_ROUND", -1.0)  # every round is followed by a pause
    answer = Answer(tiny_pair)
    paused = []
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "call_later", lambda delay, callback, *args: paused.append(callback))
    answer.send(1)
    assert await answer.next() == 1
    await settled()
    (resume,) = paused
    task = await answer.waiting()
    answer.send(1)
    await settled()
    answer.send(2)
    await settled()
    assert not task.done()
    resume()
    assert await task == 3


async def test_the_first_token_does_not_wait_for_the_end_of_a_pause(tiny_pair, monkeypatch):
    monkeypatch.setattr(pace, "MIN_ROUND", -1.0)
    answer = Answer(tiny_pair)
    monkeypatch.setattr(asyncio.get_running_loop(), "call_later", lambda *args: None)
    answer.pace.writing()
    await settled()
    answer.send(1)
    assert await answer.next() == 1


async def test_a_tier_whose_tokens_were_cut_at_a_stop_string_is_no_part_of_the_answer(tiny_pair):
    answer = Answer(tiny_pair, stops=["two"])
    answer.relay.answer.enter_tier("default")
    answer.send(len(answer.ids) // 2)
    answer.relay.answer.enter_tier("fast")
    answer.send(len(answer.ids) - len(answer.ids) // 2)
    while await answer.next() is not None:
        pass
    assert answer.running.finished.stop == "two"
    assert [part.tier for part in answer.running.finished.parts] == ["default"]


@pytest.mark.parametrize("reading", [True, False])
async def test_the_log_has_the_time_to_first_token_of_an_answer_that_its_client_leaves(tiny_pair, caplog, reading):
    """The client leaves while it waits for its second token, or before it has taken the first."""
    answer = Answer(tiny_pair)
    answer.relay.answer.received = asyncio.get_running_loop().time() - 1
    with caplog.at_level("INFO", "overfill.requests"), answer.running:
        answer.send(1)
        assert await answer.next() == 1
        if reading:
            (await answer.waiting()).cancel()
    (record,) = caplog.records
    assert (record.outcome, record.completion_tokens) == ("cancelled", 1)
    assert 1 <= record.ttft <= record.total


async def test_the_log_has_no_time_to_first_token_without_tokens(tiny_pair, caplog):
    answer = Answer(tiny_pair)
    with caplog.at_level("INFO", "overfill.requests"), answer.running:
        (await answer.waiting()).cancel()
    (record,) = caplog.records
    assert (record.completion_tokens, record.ttft) == (0, 0)


async def test_cached_tokens_are_known_with_the_first_token(tiny_pair):
    answer = Answer(tiny_pair)
    assert answer.running.cached_tokens == 0
    so_far = decode_pb2.DecodeDone(usage=common_pb2.Usage(cached_tokens=16))
    answer.relay.answer.accept(decode_pb2.Tokens(first_index=0, ids=answer.ids[:1], so_far=so_far), 0.0)
    assert answer.running.cached_tokens == 16
