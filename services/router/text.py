"""An answer's text while its tokens arrive: decoded, searched for stop strings, cut exactly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from overfill.api.detokenizer import StreamDetokenizer
from overfill.api.stop import StopStrings
from overfill.routing.answer import TokenBatch
from overfill.v1 import inference_pb2


class AnswerText:
    """Turns token batches into deltas. Where batches are cut makes no difference to what comes out in all.

    Args:
        replayed: tokens whose text the client already has.

    Attributes:
        num_tokens: tokens of the answer, the replayed ones and the last one of a stop string included.
        stop: the stop string that ended the answer; None while none did.
    """

    def __init__(self, detokenizer: StreamDetokenizer, stops: Sequence[str], replayed: Iterable[int] = ()) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops)
        self.num_tokens = 0
        self.stop: str | None = None
        self._take(replayed)

    def push(self, batch: TokenBatch) -> inference_pb2.Delta:
        """The delta for ``batch``; when ``stop`` is set then, tokens behind the stop string are left out."""
        before = self.num_tokens
        text = self._take(batch.ids)
        taken = self.num_tokens - before
        return inference_pb2.Delta(
            first_index=batch.first_index,
            token_ids=batch.ids[:taken],
            text=text,
            logprobs=batch.logprobs[:taken],
        )

    def finish(self) -> str:
        """The text that was held back, often none; it may still hold a stop string."""
        text, self.stop = self._stops.push(self._detokenizer.finish())
        return text if self.stop is not None else text + self._stops.finish()

    def _take(self, ids: Iterable[int]) -> str:
        pieces = []
        for token in ids:
            if self.stop is not None:
                break
            piece, self.stop = self._stops.push(self._detokenizer.push([token]))
            pieces.append(piece)
            self.num_tokens += 1
        return "".join(pieces)
