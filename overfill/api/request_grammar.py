"""Has the grammar of a request's answers made from its tools, and tried, in a process of its own."""

from __future__ import annotations

import json

from overfill.api.families.tool_format import ToolFormat
from overfill.request.params import Grammar
from overfill.request.trials import Trials
from overfill.v1 import inference_pb2


async def tried_grammar(
    request: inference_pb2.GenerateRequest, trials: Trials, format: ToolFormat, key: str = ""
) -> Grammar | None:
    """Returns the grammar that the tools of ``request`` need, tried; None if it has no tools to call.

    Tries the request's own grammar too.

    Args:
        format: how the model writes calls.
        key: client, for fairness between clients.

    Raises:
        InvalidRequest: tools or grammar are wrong, not supported or too complex.
        Overloaded: they cannot be tried now.
    """
    sampling = inference_pb2.GenerateRequest().sampling
    if request.sampling.HasField("grammar"):
        sampling.grammar.CopyFrom(request.sampling.grammar)
    if request.chat.tools:
        chat = inference_pb2.Chat(tools=request.chat.tools, single_tool_call=request.chat.single_tool_call)
        if request.chat.HasField("tool_choice"):
            chat.tool_choice.CopyFrom(request.chat.tool_choice)
        message = inference_pb2.GenerateRequest(chat=chat, sampling=sampling).SerializeToString(deterministic=True)
        payload = json.dumps([format.name, format.ids]).encode() + b"\0" + message
        made = await trials.run("overfill.api.tools_grammar:try_tools", payload, "chat.tools", key)
        if made:
            return Grammar("lark", made.decode())
    kind = sampling.grammar.WhichOneof("kind")
    if kind is not None:  # the text is not parsed here, on the event loop
        await trials.try_text(kind, getattr(sampling.grammar, kind), key)
    return None
