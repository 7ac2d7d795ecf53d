"""What a mock engine plays and how long it waits: the arguments in ``--engine-args``, by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from overfill.errors import InvalidRequest
from overfill.request.names import ToolCallParser

ANSWER = (
    "The full model reads the whole prompt at once, and the smaller decoder writes the answer on its keys and values. "
)


class ToolCall(BaseModel):
    """A call of a tool in a scripted answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    arguments: dict[str, Any] = {}


class ScriptedAnswer(BaseModel):
    """An answer to the prompts that contain ``when``.

    Attributes:
        when: text that the prompt must contain; empty matches every prompt.
        text: the answer's text. The text of a special token is that token, so that a family's raw output can be given.
        tool_calls: calls of tools after the text, in the format of tool_call_parser.
        tokens: the answer as token ids, in place of ``text`` and ``tool_calls``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    when: str = ""
    text: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tokens: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _check_one_form(self) -> Self:
        if bool(self.tokens) == bool(self.text or self.tool_calls):
            raise ValueError("give either tokens, or text and tool_calls")
        return self


_Seconds = Annotated[float, Field(ge=0, le=3600)]


class MockOptions(BaseModel):
    """Arguments of a mock engine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: _Seconds = Field(0.0, description="seconds of a prefill step, besides its tokens")
    per_token: _Seconds = Field(
        0.0, description="seconds per prompt token that is computed; cached tokens cost nothing"
    )
    step: _Seconds = Field(
        0.0, description="seconds of a decode step, which computes one token of every running sequence"
    )
    per_sequence: _Seconds = Field(0.0, description="seconds per sequence in a decode step, besides step")
    answer: str = Field(ANSWER, min_length=1, description="text that answers without a script repeat")
    answer_tokens: int | None = Field(
        None,
        ge=0,
        description="tokens of such an answer, which then begins where the seed says; by default those of the text, "
        "once",
    )
    tool_call_parser: ToolCallParser = Field(
        "auto",
        description="format in which scripted tool calls are written, by the name of vLLM's parser; auto chooses by "
        "the chat template",
    )
    script: tuple[ScriptedAnswer, ...] = Field(
        (),
        description="answers by prompt, or the path of a JSON file with them; the last one whose when is in the prompt "
        "is played",
    )

    @model_validator(mode="before")
    @classmethod
    def _read_script(cls, values: Any) -> Any:
        script = values.get("script") if isinstance(values, dict) else None
        if not isinstance(script, str):
            return values
        try:
            return values | {"script": json.loads(Path(script).read_text(encoding="utf-8"))}
        except OSError as error:
            raise ValueError(f"script: cannot read {script}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"script: {script} is not JSON: {error}") from None

    @classmethod
    def of(cls, engine_args: Mapping[str, Any]) -> MockOptions:
        """Reads ``--engine-args``. Raises InvalidRequest, which names the argument."""
        try:
            return cls.model_validate(dict(engine_args))
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            known = (
                f"; the mock engine knows {', '.join(cls.model_fields)}" if first["type"] == "extra_forbidden" else ""
            )
            message = first["msg"].removeprefix("Value error, ")
            raise InvalidRequest("engine_args", f"{name}: {message}{known}" if name else message) from None
