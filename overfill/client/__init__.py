"""SDK for a running stack, blocking and asyncio; loads neither torch nor transformers.

::

    from overfill.client import Client, Message

    with Client("127.0.0.1:7600") as client:
        print(client.chat([Message("user", "Hello!")]).text)
        with client.stream("Once upon a time") as stream:
            for delta in stream:
                print(delta.text, end="")

``AsyncClient`` has the same methods as coroutines.
"""

from __future__ import annotations

from overfill.client.aio import AsyncClient, AsyncStream
from overfill.client.answers import (
    Accepted,
    Answer,
    AnswerPart,
    Delta,
    PrefillTrace,
    Timing,
    TokenLogprobs,
    ToolCallDelta,
    Trace,
    Usage,
)
from overfill.client.requests import AnswerIdentity, Message, Options, Prompt, Tool, ToolCall
from overfill.client.sync import Client, Stream
from overfill.errors import (
    DeadlineExceeded,
    Incompatible,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    OverfillError,
    Overloaded,
    PermissionDenied,
    Produced,
    PromptTooLong,
    RequestCancelled,
    TransferFailed,
    Unauthenticated,
    Unavailable,
)
from overfill.request.names import TTFT_PARTS
from overfill.request.params import Grammar, SamplingParams
from overfill.rpc.stack_status import (
    Activity,
    AdapterChange,
    KvShape,
    Model,
    ModelIdentity,
    Percentiles,
    PoolStatus,
    ProcessStatus,
    RevisionStatus,
    RolloutStatus,
    RouterStatus,
    StackStatus,
    WorkerLoad,
    WorkerStatus,
)
from overfill.rpc.tls import ClientTls

__all__ = [
    "TTFT_PARTS",
    "Accepted",
    "Activity",
    "AdapterChange",
    "Answer",
    "AnswerIdentity",
    "AnswerPart",
    "AsyncClient",
    "AsyncStream",
    "Client",
    "ClientTls",
    "DeadlineExceeded",
    "Delta",
    "Grammar",
    "Incompatible",
    "InternalError",
    "InvalidRequest",
    "KvShape",
    "Message",
    "Model",
    "ModelIdentity",
    "ModelNotFound",
    "Options",
    "OverfillError",
    "Overloaded",
    "Percentiles",
    "PermissionDenied",
    "PoolStatus",
    "PrefillTrace",
    "ProcessStatus",
    "Produced",
    "Prompt",
    "PromptTooLong",
    "RequestCancelled",
    "RevisionStatus",
    "RolloutStatus",
    "RouterStatus",
    "SamplingParams",
    "StackStatus",
    "Stream",
    "Timing",
    "TokenLogprobs",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "Trace",
    "TransferFailed",
    "Unauthenticated",
    "Unavailable",
    "Usage",
    "WorkerLoad",
    "WorkerStatus",
]
