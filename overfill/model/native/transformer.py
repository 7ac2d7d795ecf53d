"""The forward pass in the native library: the same model as ``Transformer``, in bfloat16 on a CPU.

Takes a loaded ``Transformer`` over: its weights are copied into the kernels' layout and freed as that goes. Between
operations everything is float32; operands of products and the KV cache are bfloat16 (int8 weights: operands are int16).
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from ctypes import byref

import torch
from torch import Tensor

from overfill.errors import InternalError
from overfill.kv.cache import KvCache
from overfill.model.batch import ForwardBatch
from overfill.model.config import ModelConfig
from overfill.model.head import head_order
from overfill.model.loading import LayerWeights, Weights
from overfill.model.native import library
from overfill.model.quantize import Int8Matrix, Matrix
from overfill.model.transformer import LayerHook, Model, Transformer, check_cache

log = logging.getLogger(__name__)

_PARTS = ("qkv", "o", "gate_up", "down")  # the order of `Part` in overfill.cpp; then the head and its tail
_VECTORS = ("input_norm", "post_norm", "qkv_bias", "q_norm", "k_norm", "o_bias", "gate_up_bias", "down_bias")
_NORM = len(_VECTORS)
_MAX_HEADS, _MAX_GROUP = 64, 48


def supported(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels cover such a model; where they do, ``library.load`` says whether they run here."""
    fits = config.head_dim <= 128 or config.head_dim == 256
    heads = config.num_heads <= _MAX_HEADS and config.num_heads // config.num_kv_heads <= _MAX_GROUP
    return device.type == "cpu" and dtype == torch.bfloat16 and fits and heads


def fastest(model: Transformer) -> Model:
    """``model`` itself, or a native one that has taken it over where that is supported and the kernels run."""
    if supported(model.config, model.dtype, model.device) and library.load() is not None:
        weights = "int8" if model.quantize == "int8" else "bfloat16"
        log.info("native kernels, %s weights, %s AMX", weights, "with" if library.has_amx() else "without")
        return NativeTransformer(model)
    return model


class NativeTransformer:
    """Takes ``model`` over, which cannot run any more. Several threads may call ``forward``; one waits for the other.

    Args:
        amx: whether steps of many tokens use AMX tiles where there are any; tests compare both.

    Raises:
        InternalError: the kernels do not run here; ``fastest`` asks first.
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
        # A bfloat16 head that is tied holds the embedding as well.
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
        self._order = head_order(config.vocab_size, config.head_mask).int() if config.head_mask else None
        handle = library_.ovf_create(
            byref(shape),
            None if self._embedding is None else self._embedding.data_ptr(),
            None if self._order is None else self._order.data_ptr(),
            self._cos.data_ptr(),
            self._sin.data_ptr(),
        )
        if not handle:
            raise MemoryError("no memory for the model's weights")
        self._handle = handle
        weakref.finalize(self, library_.ovf_destroy, handle)
        self._fill(weights, model.release_layers())

    def forward(
        self,
        batch: ForwardBatch,
        cache: KvCache,
        on_layer_start: LayerHook | None = None,
        on_kv_written: LayerHook | None = None,
    ) -> Tensor:
        """As ``Transformer.forward``; a hook may run while other threads go on with its layer's attention.

        Raises:
            ValueError: the cache does not fit the model, or the batch reaches outside of it or the vocabulary.
        """
        logits = torch.empty(len(batch.logits_indices), self.config.vocab_size, dtype=torch.float32)
        self._run(batch, cache, logits, None, on_layer_start, on_kv_written)
        return logits

    def most_likely(
        self,
        batch: ForwardBatch,
        cache: KvCache,
        on_layer_start: LayerHook | None = None,
        on_kv_written: LayerHook | None = None,
    ) -> Tensor:
        """As ``GreedyModel.most_likely``; of equal tokens the first."""
        best = torch.empty(len(batch.logits_indices), dtype=torch.int64)
        self._run(batch, cache, None, best, on_layer_start, on_kv_written)
        return best

    def _run(
        self,
        batch: ForwardBatch,
        cache: KvCache,
        logits: Tensor | None,
        best: Tensor | None,
        on_layer_start: LayerHook | None,
        on_kv_written: LayerHook | None,
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
            wanted=len(batch.logits_indices),
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
            wanted_rows=batch.logits_indices.data_ptr(),
            k_cache=cache.k.data_ptr(),
            v_cache=cache.v.data_ptr(),
            k_scales=None if cache.k_scales is None else cache.k_scales.data_ptr(),
            v_scales=None if cache.v_scales is None else cache.v_scales.data_ptr(),
            logits=None if logits is None else logits.data_ptr(),
            best=None if best is None else best.data_ptr(),
        )
        hooks = _Hooks(on_layer_start, on_kv_written)
        fault = self._library.ovf_forward(self._handle, byref(arguments), hooks.pointer)
        if hooks.raised is not None:
            raise hooks.raised
        if fault is not None:
            raise ValueError(f"this step cannot be computed: {fault.decode()}")

    def _fill(self, weights: Weights[Matrix], layers: list[LayerWeights[Matrix]]) -> None:
        """Copies all weights; ``layers`` is emptied on the way, so that little is there twice."""
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


class _Hooks:
    """Two Python hooks as one C function; what they raise is kept, since it cannot pass through C."""

    def __init__(self, on_layer_start: LayerHook | None, on_kv_written: LayerHook | None) -> None:
        self.raised: BaseException | None = None
        self._hooks = (on_layer_start, on_kv_written)
        absent = on_layer_start is None and on_kv_written is None
        self.pointer = library.NO_HOOK if absent else library.Hook(self._call)

    def _call(self, layer: int, written: int) -> int:
        hook: Callable[[int], None] | None = self._hooks[written]
        try:
            if hook is not None:
                hook(layer)
        except BaseException as error:
            self.raised = error
            return 1
        return 0
