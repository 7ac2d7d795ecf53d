"""The forward pass in the native library: computes the same model as ``Transformer``, in bfloat16 on a CPU.

A ``NativeTransformer`` takes over a loaded ``Transformer``: it copies the weights into the kernels' layout and frees
the originals layer by layer. Activations between operations are float32. Operands of products are bfloat16, or int16
with int8 weights. The KV cache is bfloat16 or int8.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from ctypes import byref
from itertools import chain

import torch
from torch import Tensor

from overfill.errors import InternalError
from overfill.kv.cache import KvCache
from overfill.model.adapter import LowRank, Projection
from overfill.model.batch import ForwardBatch
from overfill.model.config import ModelConfig
from overfill.model.head import tokens_in_row_order
from overfill.model.loading import LayerWeights, Weights
from overfill.model.lora import FUSED, LoraSlots
from overfill.model.native import library
from overfill.model.quantize import Int8Matrix, Matrix
from overfill.model.steps import NO_HOOKS, LayerHooks
from overfill.model.transformer import ForwardModel, Transformer, check_cache

log = logging.getLogger(__name__)

_PARTS = ("qkv", "o", "gate_up", "down")  # in the order of `Part` in overfill.cpp; the head and its tail follow
_VECTORS = ("input_norm", "post_norm", "qkv_bias", "q_norm", "k_norm", "o_bias", "gate_up_bias", "down_bias")
_NORM = len(_VECTORS)
_PROJECTIONS = tuple(chain.from_iterable(FUSED.values()))  # as ``PROJECTIONS`` of adapters.h counts them
_MAX_HEADS, _MAX_GROUP = 64, 48


def supported(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """True if the kernels implement this model. ``library.load`` says whether they run on this machine."""
    fits = config.head_dim <= 128 or config.head_dim == 256
    heads = config.num_heads <= _MAX_HEADS and config.num_heads // config.num_kv_heads <= _MAX_GROUP
    return device.type == "cpu" and dtype == torch.bfloat16 and fits and heads


def fastest_model(model: Transformer) -> ForwardModel:
    """Turns ``model`` into the fastest one that runs here: a native one that takes it over, or ``model`` itself."""
    if supported(model.config, model.dtype, model.device) and library.load() is not None:
        weights = "int8" if model.quantize == "int8" else "bfloat16"
        log.info("native kernels, %s weights, %s AMX", weights, "with" if library.has_amx() else "without")
        return NativeTransformer(model)
    return model


class NativeTransformer:
    """A model in the native library. It takes over ``model``, which cannot run any more.

    Several threads may call ``forward``; a lock lets them compute one after the other.

    Args:
        amx: True lets the kernels use AMX tiles if the CPU has them; tests compare both.

    Raises:
        InternalError: the kernels do not run here; ``fastest_model`` checks that first.
        MemoryError: memory does not suffice for the weights.
    """

    def __init__(self, model: Transformer, *, amx: bool = True) -> None:
        library_ = library.load()
        if library_ is None:
            raise InternalError("the native kernels do not run here")
        self._library = library_
        self.config = model.config
        self.max_positions = model.max_positions
        self.dtype = model.dtype
        self.device = model.device
        self.bytes_read = model.bytes_read
        self.quantize = model.quantize
        weights = model.weights
        # A tied bfloat16 head also serves as the embedding.
        tied = weights.head is weights.embedding
        self._embedding = None if tied else weights.embedding.contiguous()
        self._cos, self._sin = model.rope
        config = self.config
        shape = library.Shape(
            vocab=config.vocab_size,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            layers=config.num_layers,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_positions=self.max_positions,
            head_tokens=config.head_tokens,
            tail_rank=config.tail_rank,
            quantised=isinstance(weights.head, Int8Matrix),
            amx=amx,
            norm_eps=config.rms_norm_eps,
        )
        self._order = tokens_in_row_order(config.vocab_size, config.head_mask).int() if config.head_mask else None
        handle = library_.ovf_create(
            byref(shape),
            None if self._embedding is None else self._embedding.data_ptr(),
            None if self._order is None else self._order.data_ptr(),
            self._cos.data_ptr(),
            self._sin.data_ptr(),
        )
        if not handle:
            raise MemoryError("not enough memory for the model's weights")
        self._handle = handle
        weakref.finalize(self, library_.ovf_destroy, handle)
        self._fill(weights, model.release_layers())

    def new_adapter_slots(self, num_slots: int, max_rank: int) -> LoraSlots:
        if not self._library.ovf_allocate_adapters(self._handle, num_slots, max_rank):
            raise MemoryError("not enough memory for the adapters")
        return _NativeLoraSlots(self, self._library, self._handle, num_slots, max_rank)

    def forward(self, batch: ForwardBatch, cache: KvCache, hooks: LayerHooks = NO_HOOKS) -> Tensor:
        """Computes a step as ``Transformer.forward`` does.

        ``hooks.kv_written`` may run while other threads already compute its layer's attention.

        Raises:
            ValueError: the cache does not fit the model, or the batch exceeds the cache, the context or the vocabulary.
        """
        logits = torch.empty(len(batch.logits_indices), self.config.vocab_size, dtype=torch.float32)
        self._run(batch, cache, logits, None, hooks)
        return logits

    def most_likely(self, batch: ForwardBatch, cache: KvCache, hooks: LayerHooks = NO_HOOKS) -> Tensor:
        """Implements ``GreedyModel.most_likely``; among equal tokens it returns the first."""
        best = torch.empty(len(batch.logits_indices), dtype=torch.int64)
        self._run(batch, cache, None, best, hooks)
        return best

    def _run(
        self, batch: ForwardBatch, cache: KvCache, logits: Tensor | None, best: Tensor | None, hooks: LayerHooks
    ) -> None:
        check_cache(cache, self.config, self.dtype)
        tables = batch.block_tables.contiguous()
        query_lens = torch.tensor(batch.query_lens, dtype=torch.int64)
        context_lens = torch.tensor(batch.context_lens, dtype=torch.int64)
        arguments = library.Batch(
            tokens=len(batch.token_ids),
            sequences=len(query_lens),
            tables=tables.shape[0],
            table_width=tables.shape[1],
            num_logits=len(batch.logits_indices),
            block_size=cache.block_size,
            slots_in_cache=cache.num_blocks * cache.block_size,
            threads=torch.get_num_threads(),
            token_ids=batch.token_ids.data_ptr(),
            positions=batch.positions.data_ptr(),
            slots=batch.slots.data_ptr(),
            query_lens=query_lens.data_ptr(),
            context_lens=context_lens.data_ptr(),
            block_tables=tables.data_ptr(),
            table_rows=None if batch.table_rows is None else batch.table_rows.data_ptr(),
            logits_indices=batch.logits_indices.data_ptr(),
            adapters=None if batch.adapters is None else batch.adapters.data_ptr(),
            k_cache=cache.k.data_ptr(),
            v_cache=cache.v.data_ptr(),
            k_scales=None if cache.k_scales is None else cache.k_scales.data_ptr(),
            v_scales=None if cache.v_scales is None else cache.v_scales.data_ptr(),
            logits=None if logits is None else logits.data_ptr(),
            best=None if best is None else best.data_ptr(),
        )
        callback = _HookCallback(hooks)
        hook = library.NO_HOOK if hooks == NO_HOOKS else library.Hook(callback.call)
        fault = self._library.ovf_forward(self._handle, byref(arguments), hook)
        if callback.raised is not None:
            raise callback.raised
        if fault is not None:
            raise ValueError(f"invalid step: {fault.decode()}")

    def _fill(self, weights: Weights[Matrix], layers: list[LayerWeights[Matrix]]) -> None:
        """Copies all weights into the library; empties ``layers`` meanwhile, so that at most one is held twice."""
        self._set_vector(0, _NORM, weights.norm)
        self._set_matrix(0, len(_PARTS), weights.head)
        if weights.tail is not None:
            self._set_matrix(0, len(_PARTS) + 1, weights.tail.right)
            self._set_matrix(0, len(_PARTS) + 2, weights.tail.left)
        for index in range(len(layers)):
            layer = layers.pop(0)
            for part, name in enumerate(_PARTS):
                self._set_matrix(index, part, getattr(layer, name))
            for kind, name in enumerate(_VECTORS):
                vector = getattr(layer, name)
                if vector is not None:
                    self._set_vector(index, kind, vector)

    def _set_matrix(self, index: int, part: int, matrix: Matrix) -> None:
        if isinstance(matrix, Int8Matrix):
            values, scales = matrix.values.contiguous(), matrix.scales.contiguous()
            self._library.ovf_set_matrix(self._handle, index, part, values.data_ptr(), scales.data_ptr())
        else:
            self._library.ovf_set_matrix(self._handle, index, part, matrix.contiguous().data_ptr(), None)

    def _set_vector(self, index: int, kind: int, vector: Tensor) -> None:
        wide = vector.float().contiguous()
        self._library.ovf_set_vector(self._handle, index, kind, wide.data_ptr(), len(wide))


class _NativeLoraSlots(LoraSlots):
    """The slots of a native model, which they keep alive. Copies release the interpreter's lock."""

    def __init__(
        self, model: NativeTransformer, native: ctypes.CDLL, handle: int, num_slots: int, max_rank: int
    ) -> None:
        super().__init__(model.config, num_slots, max_rank, model.dtype)
        self._model = model
        self._library = native
        self._handle = handle

    def _clear(self, slot: int, layer: int) -> None:
        self._library.ovf_clear_adapter(self._handle, slot, layer)

    def _put(self, slot: int, layer: int, projection: Projection, product: LowRank) -> None:
        down, up = (factor.to(self._model.dtype).contiguous() for factor in (product.down, product.up))
        place, (rank, columns) = _PROJECTIONS.index(projection), down.shape
        pointers = down.data_ptr(), up.data_ptr()
        self._library.ovf_set_low_rank(self._handle, slot, layer, place, rank, columns, *pointers)


class _HookCallback:
    """Calls hooks from C. It keeps what a hook raises, because an exception cannot pass through C.

    It has no reference to the C function that calls it. A cycle would keep what the hooks refer to, such as the
    weights, until Python collects garbage.

    Attributes:
        raised: the exception that aborted the step, if one did.
    """

    def __init__(self, hooks: LayerHooks) -> None:
        self.raised: BaseException | None = None
        self._hooks = (hooks.layer_start, hooks.kv_written)

    def call(self, layer: int, written: int) -> int:
        try:
            self._hooks[written](layer)
        except BaseException as error:
            self.raised = error
            return 1
        return 0
