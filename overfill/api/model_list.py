"""The served models as JSON, in one form that OpenAI's and Anthropic's clients and Codex read."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from overfill.v1 import inference_pb2

_INSTRUCTIONS = "You are a coding agent. Work in the user's folder with the tools that you have."
"""Codex takes its instructions from the list of models, and would otherwise send none."""


def describe_model(model: inference_pb2.Model, created: int, pair: dict[str, Any]) -> dict[str, Any]:
    """Returns one model, with the fields of OpenAI's and of Anthropic's API, and with those of vLLM for adapters.

    Args:
        created: Unix time from which on the model is served, seconds.
        pair: description of the pair of its tier.
    """
    base, _, adapter = model.name.rpartition(":")
    of_adapter = bool(model.adapter_digest)
    own = {"tier": model.tier, "pair": pair, "dtype": model.dtype or None}
    return {
        "id": model.name,
        "object": "model",
        "type": "model",
        "created": created,
        "created_at": datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "owned_by": "overfill",
        "display_name": model.name,
        "lifecycle": "active",
        "max_model_len": model.max_model_len,
        "max_input_tokens": model.max_model_len,
        "max_tokens": model.max_model_len,
        "root": adapter if of_adapter else model.name,
        "parent": base if of_adapter else None,
        "overfill": own | {"adapter_digest": model.adapter_digest} if of_adapter else own,
    }


def list_models(described: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the list of models that ``describe_model`` described. Codex reads ``models``."""
    return {
        "object": "list",
        "data": described,
        "has_more": False,
        "first_id": described[0]["id"] if described else None,
        "last_id": described[-1]["id"] if described else None,
        "models": [_for_codex(model) for model in described],
    }


def _for_codex(model: dict[str, Any]) -> dict[str, Any]:
    """All fields that Codex needs; it refuses a list that lacks one."""
    return {
        "slug": model["id"],
        "display_name": model["display_name"],
        "base_instructions": _INSTRUCTIONS,
        "context_window": model["max_model_len"],
        "experimental_supported_tools": [],
        "priority": 0,
        "shell_type": "shell_command",
        "support_verbosity": False,
        "supported_in_api": True,
        "supported_reasoning_levels": [],
        "supports_parallel_tool_calls": True,
        "truncation_policy": {"mode": "tokens", "limit": 10_000},
        "visibility": "list",
    }
