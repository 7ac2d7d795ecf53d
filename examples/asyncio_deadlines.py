"""Send many requests at once with asyncio; some have a deadline, some are cancelled. Their KV cache is freed.

Start a stack with `overfill up`, then:

    $ python examples/asyncio_deadlines.py

A third of the requests may run to their end. A third get a deadline of 1.5 seconds. A third are cancelled after their
first tokens, as when a user closes the page. The last lines show that no request has kept KV blocks.
"""

import asyncio
import os
from collections import Counter

from overfill.client import AsyncClient, DeadlineExceeded, SamplingParams

ADDRESS = os.environ.get("OVERFILL_ADDRESS", "127.0.0.1:7600")
REQUESTS = 24
PROMPT = "Request {}: write a long story about a lighthouse."
# Without ignore_eos, an answer might end before its deadline.
SAMPLING = SamplingParams(max_tokens=128, ignore_eos=True, seed=1)


async def whole(client: AsyncClient, prompt: str) -> str:
    answer = await client.generate(prompt, sampling=SAMPLING)
    return f"finished, {answer.finish_reason}"


async def with_deadline(client: AsyncClient, prompt: str) -> str:
    try:
        await client.generate(prompt, sampling=SAMPLING, timeout=1.5)
    except DeadlineExceeded as error:
        # What arrived before the deadline is not lost.
        return "deadline passed" if error.produced is not None else "deadline passed before the first token"
    return "finished in time"


async def cancelled(client: AsyncClient, prompt: str) -> str:
    tokens = 0
    async with client.stream(prompt, sampling=SAMPLING) as stream:
        async for delta in stream:
            tokens += len(delta.token_ids)
            if tokens >= 8:
                break  # leaving the block cancels the request
    return "cancelled after its first tokens"


async def blocks_in_use(client: AsyncClient) -> int:
    status = await client.status()
    loads = [worker.process.load for worker in status.workers if worker.process is not None]
    return sum(load.kv_blocks_used for load in loads if load is not None)


async def main() -> None:
    async with AsyncClient(ADDRESS, api_key=os.environ.get("OVERFILL_API_KEY")) as client:
        kinds = (whole, with_deadline, cancelled)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(kinds[number % 3](client, PROMPT.format(number))) for number in range(REQUESTS)]
            most = 0
            while not all(task.done() for task in tasks):
                most = max(most, await blocks_in_use(client))
                await asyncio.sleep(0.1)
        for outcome, count in sorted(Counter(task.result() for task in tasks).items()):
            print(f"{count:3} requests  {outcome}")
        await asyncio.sleep(0.5)  # workers hear of a cancelled request within milliseconds
        used = await blocks_in_use(client)
    print(f"KV blocks in use: at most {most} while the requests ran, {used} now")


if __name__ == "__main__":
    asyncio.run(main())
