"""Speed of modelled workers: three formulas with coefficients from measurements or datasheets.

* Prefill: ``seconds_per_token`` per token, plus ``seconds_per_position`` per token that it attends to.
* Decode: ``StepCost``, base + per_sequence x batch + per_kv_token x tokens attended to.
* KV: bytes per token over a link.

A profile is a JSON file of the fields below, or the output of ``overfill bench decode --json`` and ``prefill --json``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import (
    ConfigDict,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)

from overfill.errors import InvalidRequest
from overfill.routing.capacity import StepCost

_CONFIG = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class PrefillModel:
    """Speed and size of a prefill worker.

    Attributes:
        seconds_per_token: Seconds to compute one prompt token.
        seconds_per_position: Additional seconds per token that it attends to.
        seconds_per_step: Minimum seconds of a step, in which the weights are read once.
        max_num_batched_tokens: Maximum prompt tokens per step.
        kv_tokens: Capacity for KV in tokens, including the prefix cache.
        max_num_seqs: Maximum prompts at the same time, and the number of credits granted.
    """

    __pydantic_config__ = _CONFIG

    seconds_per_token: NonNegativeFloat
    seconds_per_position: NonNegativeFloat = 0.0
    seconds_per_step: NonNegativeFloat = 0.0
    max_num_batched_tokens: PositiveInt = 2048
    kv_tokens: PositiveInt = 65_536
    max_num_seqs: PositiveInt = 64

    def step_seconds(self, chunks: Sequence[tuple[int, int]]) -> float:
        """Returns the seconds of a step. A chunk (start, count) is ``count`` tokens of a prompt from ``start`` on."""
        work = 0.0
        for start, count in chunks:
            work += count * (self.seconds_per_token + self.seconds_per_position * (start + (count + 1) / 2))
        return max(self.seconds_per_step, work)


@dataclass(frozen=True, slots=True)
class DecodeModel:
    """Speed and size of a decode worker.

    Attributes:
        base, per_sequence, per_kv_token: Seconds of a step, as in ``StepCost``.
        replay_per_token: Seconds to recompute the KV of one emitted token after a migration.
        kv_tokens: Capacity for KV in tokens.
        block_size: Tokens per block.
        max_num_seqs: Maximum sequences at the same time.
    """

    __pydantic_config__ = _CONFIG

    base: NonNegativeFloat
    per_sequence: NonNegativeFloat = 0.0
    per_kv_token: NonNegativeFloat = 0.0
    replay_per_token: NonNegativeFloat = 0.0
    kv_tokens: PositiveInt = 65_536
    block_size: PositiveInt = 16
    max_num_seqs: PositiveInt = 64

    @property
    def cost(self) -> StepCost:
        return StepCost(self.base, self.per_sequence, self.per_kv_token)

    def with_weights(self, factor: float) -> DecodeModel:
        """Returns the model of a worker whose decoder has ``factor`` times as many bytes of weights.

        A step reads all weights once and computes with them for each sequence, so both parts grow with the bytes. The
        KV has the same size for every decoder of a full model, so reading it takes as long. The capacity for KV stays.
        """
        return replace(
            self,
            base=self.base * factor,
            per_sequence=self.per_sequence * factor,
            replay_per_token=self.replay_per_token * factor,
        )


@dataclass(frozen=True, slots=True)
class Profile:
    """Both kinds of worker and the network between them.

    Attributes:
        name: Name for titles.
        kv_token_bytes: Bytes of one token's keys and values in all transferred layers.
        layers: Number of layers. KV of all but the last is sent while later layers are computed.
        link_bandwidth: Bytes per second that a worker can send.
        hop: Seconds for a message between two processes.
        startup: Seconds from the decision to start a worker until it is ready.
        grace: Seconds in which a draining worker's sequences may end before they migrate.
        disk_bandwidth: Bytes per second that a prefill worker reads from its disk.
        returns_kv: Whether the decoder is the full model, so that decode workers lend the KV of their answers.
        colocated_kv_tokens: Capacity of each of the two KV pools of a worker with both stages, in tokens. 0 means that
            there is no such worker: the stages need different machines, or both models do not fit into one.
    """

    __pydantic_config__ = _CONFIG

    name: str
    prefill: PrefillModel
    decode: DecodeModel
    kv_token_bytes: NonNegativeInt = 0
    layers: PositiveInt = 32
    link_bandwidth: PositiveFloat = 1e9
    hop: NonNegativeFloat = 0.0005
    startup: NonNegativeFloat = 30.0
    grace: NonNegativeFloat = 30.0
    colocated_kv_tokens: NonNegativeInt = 0
    disk_bandwidth: PositiveFloat = 1e9
    returns_kv: bool = False

    @property
    def import_seconds(self) -> dict[str, float]:
        """Seconds to import the KV of a token, by source: "peer" and "disk"."""
        bandwidths = {"peer": self.link_bandwidth, "disk": self.disk_bandwidth}
        return {source: self.kv_token_bytes / bandwidth for source, bandwidth in bandwidths.items()}

    @property
    def prefill_rate(self) -> float:
        """Tokens per second of a prefill worker with prompts of 2,048 tokens."""
        return 2048 / self.prefill.step_seconds([(0, 2048)])

    def colocated(self) -> Profile:
        """Returns the profile of a worker with both stages, whose machine holds both models and two pools of KV.

        Raises:
            InvalidRequest: The profile has none.
        """
        tokens = self.colocated_kv_tokens
        if not tokens:
            raise InvalidRequest(
                "profile.colocated_kv_tokens",
                f"the profile {self.name} has no worker with both stages: they need different machines, or both "
                "models do not fit into one; use another profile",
            )
        prefill, decode = replace(self.prefill, kv_tokens=tokens), replace(self.decode, kv_tokens=tokens)
        return replace(self, prefill=prefill, decode=decode)


@dataclass(frozen=True, slots=True)
class Accelerator:
    """The parts of a datasheet's figures that we assume to be reached; not measured.

    Attributes:
        rate: Half of the dense bfloat16 FLOP/s.
        read_rate: 0.8 of the memory's bandwidth, in bytes/s.
        memory: 0.9 of the memory, in bytes.
    """

    rate: float
    read_rate: float
    memory: float

    def kv_tokens(self, *models: float) -> int:
        """Returns the tokens of KV that fit beside models with these numbers of parameters; negative if none do."""
        return int((self.memory - 2 * sum(models)) / _KV_TOKEN_BYTES)


H100 = Accelerator(rate=0.5 * 989e12, read_rate=0.8 * 3.35e12, memory=0.9 * 80e9)
L4 = Accelerator(rate=0.5 * 121e12, read_rate=0.8 * 300e9, memory=0.9 * 24e9)

_FULL, _DECODER = 8.03e9, 3.2e9
"""Parameters of Llama-3.1-8B, and of a decoder of the paper's size. Both are in bfloat16."""

_LAYERS, _HIDDEN = 32, 4096
_KV_TOKEN_BYTES = 2 * _LAYERS * 8 * 128 * 2
"""8 heads of 128 values. A decoder keeps the full model's KV heads, so its KV has the same size."""


def from_datasheets(name: str, prefill: Accelerator, decode: Accelerator, decoder: float = _DECODER) -> Profile:
    """Estimates a profile from datasheets: FLOP / rate for prefill, bytes / bandwidth for decode.

    Args:
        decoder: Number of its parameters.
    """
    return Profile(
        name=name,
        prefill=PrefillModel(
            seconds_per_token=2 * _FULL / prefill.rate,
            seconds_per_position=4.0 * _HIDDEN * _LAYERS / prefill.rate,
            seconds_per_step=2 * _FULL / prefill.read_rate,
            max_num_batched_tokens=8192,
            kv_tokens=prefill.kv_tokens(_FULL),
        ),
        decode=DecodeModel(
            base=2 * decoder / decode.read_rate,
            # Up to a large batch, compute overlaps with reading the weights; attention's reads are added.
            per_sequence=0.0,
            per_kv_token=_KV_TOKEN_BYTES / decode.read_rate,
            replay_per_token=2 * decoder / decode.rate,
            kv_tokens=decode.kv_tokens(decoder),
            max_num_seqs=256,
        ),
        kv_token_bytes=_KV_TOKEN_BYTES,
        layers=_LAYERS,
        link_bandwidth=12.5e9,  # 100 Gbit/s
        disk_bandwidth=5e9,  # an NVMe drive on four lanes of PCIe 4
        startup=60.0,
        colocated_kv_tokens=max(0, prefill.kv_tokens(_FULL, decoder) // 2) if prefill == decode else 0,
        returns_kv=decoder == _FULL,
    )


CPU = Profile(
    name="cpu",
    # 512 tokens at 1,684 tokens/s and 2,048 at 1,340.
    prefill=PrefillModel(5.43e-4, 1.98e-7, kv_tokens=65_536),
    # Batches of 1, 8, 32 and 64 at 256 tokens: 477, 1,703, 1,521 and 1,813 tokens/s. 23 kB of KV a token at 33 GB/s.
    decode=DecodeModel(1.6e-3, 3.5e-4, 7e-7, replay_per_token=2e-4, kv_tokens=65_536),
    kv_token_bytes=23_040,
    layers=30,
    link_bandwidth=1e9,
    startup=8.0,
    colocated_kv_tokens=65_536,
)
"""SmolLM2-135M and its decoder `fast` in int8, on two Zen 4 cores: docs/lab/2026-11-25-engine-zen4.md."""

BUILT_IN: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        CPU,
        from_datasheets("h100-l4", H100, L4),
        from_datasheets("h100-l4-full", H100, L4, _FULL),  # a tier without pruning
        from_datasheets("h100", H100, H100),
        from_datasheets("l4", L4, L4),
    )
}


def load_profile(name: str) -> Profile:
    """Returns a built-in profile, or one from a file.

    Raises:
        InvalidRequest: The name is neither, or a field of the file is wrong. The message names it.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    path = Path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(BUILT_IN)
        raise InvalidRequest("profile", f"must be one of {known}, or a file; {name} cannot be read: {error}") from None
    try:
        return TypeAdapter(Profile).validate_json(text)
    except ValidationError as error:
        wrong = min(error.errors(), key=lambda item: item["type"] == "missing")  # a wrong field before one that lacks
        if wrong["type"] == "json_invalid":  # not one object
            return _from_bench(path, text)
        got = "" if wrong["type"] == "missing" else f", got {wrong['input']!r}"
        raise InvalidRequest(".".join(["profile", *map(str, wrong["loc"])]), f"{wrong['msg']}{got}") from None


def _from_bench(path: Path, text: str) -> Profile:
    """Fits the formulas to lines of ``overfill bench decode|prefill --json``; the rest is as in ``cpu``."""
    prefill: list[tuple[float, float]] = []  # (tokens of a prompt, seconds)
    decode: list[tuple[float, float, float]] = []  # (batch, context, seconds)
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if row["unit"] != "tokens/s":
                continue
            name, batch, context, value = row["name"], row["batch"], row["context"], row["value"]
            if name == "prefill":
                prefill.append((float(context), context / value))
            elif name == "decode_decoder":
                decode.append((float(batch), float(context), batch / value))
        except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
            raise InvalidRequest(
                "profile", f"{path}, line {number} is no line of `overfill bench`: {error!r}"
            ) from None
    if len({n for n, _ in prefill}) < 2 or len({b for b, _, _ in decode}) < 2:
        raise InvalidRequest(
            "profile",
            f"{path} has {len(prefill)} prefill and {len(decode)} decode_decoder figures; two sizes of each "
            "are needed: the output of `overfill bench prefill --json` and `… decode --json`, one after the other",
        )
    per_token, per_position = _fit([(n, n * (n + 1) / 2) for n, _ in prefill], [seconds for *_, seconds in prefill])
    varies = len({context for _, context, _ in decode}) > 1  # otherwise the batch alone explains the time
    base, per_sequence, per_kv_token = _fit(
        [(1.0, batch, batch * context * varies) for batch, context, _ in decode], [seconds for *_, seconds in decode]
    )
    return replace(
        CPU,
        name=path.stem,
        prefill=replace(CPU.prefill, seconds_per_token=per_token, seconds_per_position=per_position),
        decode=replace(CPU.decode, base=base, per_sequence=per_sequence, per_kv_token=per_kv_token),
    )


def _fit(features: Sequence[tuple[float, ...]], seconds: Sequence[float]) -> list[float]:
    """Fits coefficients of at least 0 by least squares of relative errors."""
    import numpy as np  # imported here: reading the command's options must not need it

    relative = np.array(features) / np.array(seconds)[:, None]
    weights = np.zeros(relative.shape[1])
    active = relative.any(axis=0)
    while active.any():
        weights[:] = 0.0
        weights[active] = np.linalg.lstsq(relative[:, active], np.ones(len(seconds)), rcond=None)[0]
        if (weights >= 0).all():
            break
        active &= weights >= 0
    return [max(0.0, float(weight)) for weight in weights]
