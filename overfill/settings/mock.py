"""Configuration of mock workers: that of the real ones, and how fast they pretend to be."""

from __future__ import annotations

from pydantic import BaseModel, Field
from pydantic_settings import SettingsConfigDict

from overfill.settings.config import DecodeConfig, PrefillConfig

ANSWER = (
    "The full model reads the whole prompt at once, and the smaller decoder writes the answer on its keys and values. "
)


class MockFields(BaseModel):
    """What both kinds of mock worker have besides the real one's settings."""

    mock_answer: str = Field(ANSWER, min_length=1, description="text that answers are made of, over and over")
    mock_answer_tokens: int | None = Field(
        None, ge=0, description="tokens after which an answer ends by itself; by default at max_tokens only"
    )
    mock_kv_blocks: int = Field(4096, ge=1, description="KV blocks of this worker")
    mock_kv_layers: int = Field(1, ge=1, description="layers whose KV travels")


class MockPrefillConfig(MockFields, PrefillConfig):
    """A prefill worker that computes nothing. Flags are also variables: OVERFILL_MOCK_PREFILL_..."""

    model_config = SettingsConfigDict(env_prefix="OVERFILL_MOCK_PREFILL_")
    program = "overfill-mock-prefill"

    mock_base: float = Field(0.0, ge=0, description="seconds that a prompt takes, whatever its length")
    mock_per_token: float = Field(0.0, ge=0, description="seconds that each prompt token takes")


class MockDecodeConfig(MockFields, DecodeConfig):
    """A decode worker that computes nothing. Flags are also variables: OVERFILL_MOCK_DECODE_..."""

    model_config = SettingsConfigDict(env_prefix="OVERFILL_MOCK_DECODE_")
    program = "overfill-mock-decode"

    mock_step: float = Field(0.0, ge=0, description="seconds of a step, which gives every running sequence a token")
    mock_per_sequence: float = Field(0.0, ge=0, description="seconds that each sequence adds to a step")
