"""Tests a router under ten times the load that its workers can take."""

import asyncio
import time

from mocks import mock_stack

from overfill.client import AsyncClient, SamplingParams
from overfill.errors import Overloaded

SEATS, STEP, TOKENS = 4, 0.05, 8
CAPACITY = SEATS / (STEP * TOKENS)  # requests per second
SECONDS = 3.0


async def ask(client):
    """Returns the error of a refusal; None for an answer."""
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    try:
        answer = await client.generate(list(range(10, 74)), sampling=sampling)
    except Overloaded as error:
        return error
    assert len(answer.token_ids) == TOKENS
    return None


async def offer(address, rate):
    """Sends requests at fixed times, without waiting for earlier ones."""
    async with AsyncClient(address) as client, asyncio.TaskGroup() as group:
        start = time.perf_counter()
        asked = []
        for index in range(int(rate * SECONDS)):
            await asyncio.sleep(max(0.0, start + index / rate - time.perf_counter()))
            asked.append(group.create_task(ask(client)))
    return [task.result() for task in asked]


def test_under_ten_times_the_load_admitted_requests_are_answered_and_others_get_a_time_to_retry(tiny_pair):
    workers = {"max_num_seqs": SEATS, "step": STEP}
    with mock_stack(tiny_pair, workers=workers, max_wait=1.0) as stack:
        refusals = asyncio.run(offer(stack.grpc, 10 * CAPACITY))
    refused = [error for error in refusals if error is not None]
    assert 0 < len(refusals) - len(refused) < len(refused), "most requests are refused, and some answered"
    assert all(error.retry_after is not None for error in refused)
