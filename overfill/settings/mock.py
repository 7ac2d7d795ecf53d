"""Settings of mock workers: those of the real workers, and the speed to simulate."""

from __future__ import annotations

from pydantic import BaseModel, Field

from overfill.settings.config import ColocatedConfig, DecodeConfig, PrefillConfig

ANSWER = (
    "The full model reads the whole prompt at once, and the smaller decoder writes the answer on its keys and values. "
)


class MockFields(BaseModel):
    """Settings of every kind of mock worker, in addition to the real worker's."""

    mock_answer: str = Field(ANSWER, min_length=1, description="text that answers repeat")
    mock_answer_tokens: int | None = Field(
        None, ge=0, description="tokens after which an answer ends; by default only at the request's max_tokens"
    )
    mock_kv_blocks: int = Field(4096, ge=1, description="number of KV blocks of this worker")
    mock_kv_layers: int = Field(1, ge=1, description="number of layers whose KV is transferred")


class _Prefilling(BaseModel):
    mock_base: float = Field(0.0, ge=0, description="fixed seconds per prompt")
    mock_per_token: float = Field(0.0, ge=0, description="seconds per prompt token")


class _Decoding(BaseModel):
    mock_step: float = Field(
        0.0, ge=0, description="seconds per step; a step computes one token of every running sequence"
    )
    mock_per_sequence: float = Field(0.0, ge=0, description="seconds per sequence in a step, added to --mock-step")


class MockPrefillConfig(_Prefilling, MockFields, PrefillConfig):
    """A prefill worker that computes nothing. Each flag is also a variable: OVERFILL_MOCK_PREFILL_..."""

    prefix = "OVERFILL_MOCK_PREFILL_"
    program = "overfill-mock-prefill"


class MockDecodeConfig(_Decoding, MockFields, DecodeConfig):
    """A decode worker that computes nothing. Each flag is also a variable: OVERFILL_MOCK_DECODE_..."""

    prefix = "OVERFILL_MOCK_DECODE_"
    program = "overfill-mock-decode"


class MockColocatedConfig(_Prefilling, _Decoding, MockFields, ColocatedConfig):
    """A worker with both stages that computes nothing. Each flag is also a variable: OVERFILL_MOCK_COLOCATED_..."""

    prefix = "OVERFILL_MOCK_COLOCATED_"
    program = "overfill-mock-colocated"
