"""A FastAPI application that answers with the stack: whole or streamed, with one client for all requests.

Start a stack with `overfill up`, then:

    $ uvicorn examples.fastapi_app:app --port 8080

Ask it from another terminal:

    $ curl -N 'http://127.0.0.1:8080/stream?question=Why+is+the+sky+blue%3F'
    $ curl http://127.0.0.1:8080/answer -H 'content-type: application/json' -d '{"question": "Name a fruit."}'

When a reader closes a stream, the request is cancelled and its KV cache is freed.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field

from overfill.client import (
    AsyncClient,
    AsyncStream,
    DeadlineExceeded,
    Delta,
    InvalidRequest,
    Message,
    OverfillError,
    Overloaded,
    SamplingParams,
)

ADDRESS = os.environ.get("OVERFILL_ADDRESS", "127.0.0.1:7600")
SAMPLING = SamplingParams(temperature=0.7, max_tokens=512)
STATUS = {InvalidRequest: 400, Overloaded: 429, DeadlineExceeded: 504}


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, AsyncClient]]:
    # A client keeps its connections, so all requests of the application share one.
    async with AsyncClient(ADDRESS, api_key=os.environ.get("OVERFILL_API_KEY")) as client:
        yield {"client": client}


app = FastAPI(lifespan=lifespan)


def shared_client(request: Request) -> AsyncClient:
    client: AsyncClient = request.state.client
    return client


SharedClient = Annotated[AsyncClient, Depends(shared_client)]


class Question(BaseModel):
    question: str = Field(min_length=1)
    max_tokens: int = Field(default=64, ge=1, le=1024)


@app.exception_handler(OverfillError)
async def failed(request: Request, error: OverfillError) -> JSONResponse:
    status = next((code for kind, code in STATUS.items() if isinstance(error, kind)), 503)
    retry = getattr(error, "retry_after", None)
    headers = {"retry-after": f"{retry:.0f}"} if retry else None
    return JSONResponse({"error": str(error)}, status, headers)


@app.post("/answer")
async def answer(body: Question, client: SharedClient) -> dict[str, object]:
    sampling = SamplingParams(temperature=0.7, max_tokens=body.max_tokens)
    found = await client.chat([Message("user", body.question)], sampling=sampling, timeout=60)
    return {"answer": found.text, "tokens": found.usage.completion_tokens, "seed": found.seed}


@app.get("/stream")
async def stream(question: str, client: SharedClient) -> StreamingResponse:
    answer = client.stream([Message("user", question)], sampling=SAMPLING)
    # A refusal becomes an HTTP status only before the response has begun, so the first delta is awaited here.
    first = await anext(answer, None)
    return StreamingResponse(text(first, answer), media_type="text/plain; charset=utf-8")


async def text(first: Delta | None, answer: AsyncStream) -> AsyncIterator[str]:
    # Starlette cancels this generator when the reader disconnects; leaving the block then cancels the request.
    async with answer:
        yield first.text if first else ""
        async for delta in answer:
            yield delta.text
