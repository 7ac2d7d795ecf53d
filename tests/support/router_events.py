"""The events of an answer, as a router sends them."""

from __future__ import annotations

from typing import Any

from overfill.v1 import common_pb2, inference_pb2

Response = inference_pb2.GenerateResponse


def accepted(seed: int = 7, **fields: Any) -> Response:
    message = inference_pb2.Accepted(request_id="r1", prompt_tokens=3, seed=seed, model="tiny", max_tokens=40, **fields)
    return Response(accepted=message)


def part(tier: str, first_index: int, **fields: Any) -> inference_pb2.AnswerPart:
    return inference_pb2.AnswerPart(tier=tier, first_index=first_index, **fields)


def delta(first_index: int, ids: list[int], text: str = "", **fields: Any) -> Response:
    return Response(delta=inference_pb2.Delta(first_index=first_index, token_ids=ids, text=text, **fields))


def finished(reason: int = common_pb2.FINISH_REASON_STOP, **fields: Any) -> Response:
    return Response(finished=inference_pb2.Finished(reason=reason, **fields))


GOOD = [accepted(), delta(0, [10], "Hel"), delta(1, [11, 12], "lo"), finished()]
