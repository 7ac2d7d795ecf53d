"""Makes the grammar of a request's answers from its tools, and tries it in a process of its own before its use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from overfill.api.chat import chat_grammar
from overfill.errors import InvalidRequest
from overfill.request.grammar import Grammars, check_grammar
from overfill.request.params import Grammar
from overfill.v1 import inference_pb2

if TYPE_CHECKING:
    from overfill.request.trial import Bench


async def tried_grammar(request: inference_pb2.GenerateRequest, grammars: Grammars, key: str = "") -> Grammar | None:
    """Returns the grammar that the tools of ``request`` need, tried; None if it has no tools to call.

    Tries the request's own grammar too.

    Args:
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
        payload = inference_pb2.GenerateRequest(chat=chat, sampling=sampling).SerializeToString(deterministic=True)
        made = await grammars.run_trial("overfill.api.request_grammar:try_tools", payload, "chat.tools", key)
        if made:
            return Grammar("lark", made.decode())
    kind = sampling.grammar.WhichOneof("kind")
    if kind is not None:  # the text is not parsed here, on the event loop
        await grammars.try_text(kind, getattr(sampling.grammar, kind), key)
    return None


def try_tools(payload: bytes, bench: Bench) -> bytes:
    """Makes the grammar of the tools in ``payload``, a GenerateRequest, and tries it. Runs in a trial.

    Returns:
        The grammar, in Lark; nothing if the tools must not be called.
    """
    request = inference_pb2.GenerateRequest.FromString(payload)
    answer = Grammar.from_proto(request.sampling.grammar) if request.sampling.HasField("grammar") else None
    if answer is not None:
        check_grammar(answer)
    made = chat_grammar(request.chat, answer)
    if made is None:
        return b""
    try:
        bench.try_grammar(made)
    except InvalidRequest as error:
        raise InvalidRequest("chat.tools", str(error).removeprefix(f"{error.field}: ")) from error
    return made.text.encode()
