"""A trainable Llama-family model: the engine's arithmetic, differentiable, over packed rows.

The decoder and the frozen full model both use it. Parameters are named as in Hugging Face checkpoints, so that loading
and saving are copies. The exceptions are the factors of low-rank training, and a head in two parts
(``overfill.model.head``): training works on the factors of its low-rank part. The module knows no loss and no data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, silu
from torch.utils.checkpoint import checkpoint

from overfill.errors import InvalidPair
from overfill.making.distill.attention import Attention, attention_for
from overfill.making.distill.packed_rows import PackedRows
from overfill.model.config import ModelConfig
from overfill.model.digest import list_tensors
from overfill.model.files import HEAD, is_buffer
from overfill.model.head import low_rank_factors, tokens_in_row_order
from overfill.model.rope import apply_rope, rope_tables

KvHook = Callable[[int, Tensor, Tensor], None]
"""Called with (layer, keys, values); keys (rotated) and values are each [T, kv_heads, D]."""


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.shape, self.weight, self.eps)


class Projection(nn.Linear):
    """A linear projection. ``add_factors`` freezes its weight and trains a low-rank product beside it.

    Attributes:
        up, down: [out, rank] and [rank, in], the factors of the product (LoRA, arXiv 2106.09685). None without one.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, out_features, bias)
        self.register_parameter("up", None)
        self.register_parameter("down", None)

    def add_factors(self, rank: int, generator: torch.Generator) -> None:
        """Freezes the weight and adds factors whose product is zero: ``up`` is zero, ``down`` is uniform as in LoRA."""
        bound = self.in_features**-0.5
        down = torch.empty(rank, self.in_features).uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(down.to(self.weight))
        self.up = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        self.weight.requires_grad_(False)

    @torch.no_grad()
    def continue_factors(self, up: Tensor, down: Tensor) -> None:
        """Moves the product of ``up`` [out, n] and ``down`` [n, in], n ≤ rank, from the weight to the factors."""
        assert self.up is not None
        self.up[:, : up.shape[1]] = up
        self.down[: len(down)] = down
        self.weight -= up.to(self.weight) @ down.to(self.weight)

    @property
    def merged(self) -> Tensor:
        """The weight with the factors' product added, [out, in]."""
        return self.weight if self.up is None else self.weight + self.up @ self.down

    def forward(self, x: Tensor) -> Tensor:
        out = linear(x, self.weight, self.bias)
        return out if self.up is None else out + linear(linear(x, self.down), self.up)


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Projection(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = Projection(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = Projection(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = Projection(q_size, config.hidden_size, bias=config.o_bias)
        self.q_norm = Norm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = Norm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Computes rotated q [T, heads, D] and k [T, kv_heads, D], and v [T, kv_heads, D]."""
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v


class Mlp(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, intermediate = config.hidden_size, config.intermediate_size
        self.gate_proj = Projection(hidden, intermediate, bias=config.mlp_bias)
        self.up_proj = Projection(hidden, intermediate, bias=config.mlp_bias)
        self.down_proj = Projection(intermediate, hidden, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))
        return down


class Layer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Mlp(config)

        self.before, self.after = before_attention, after_attention

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attend: Attention,
        prefix: Tensor | None,
        on_kv: Callable[[Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """Computes one layer. [T, hidden] -> [T, hidden]"""
        q, k, v = self.before(self, x, cos, sin)
        if on_kv is not None:
            on_kv(k, v)
        return self.after(self, x, attend(q, k, v, None if prefix is None else prefix.to(k.dtype)))


def before_attention(layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return layer.self_attn.project(layer.input_layernorm(x), cos, sin)


def after_attention(layer: Layer, x: Tensor, attended: Tensor) -> Tensor:
    x = x + layer.self_attn.o_proj(attended)
    out: Tensor = x + layer.mlp(layer.post_attention_layernorm(x))
    return out


@cache
def _fused(function: Callable[..., Any]) -> Callable[..., Any]:
    # dynamic, because the number of rows differs from pack to pack. All layers share one compilation.
    return torch.compile(function, dynamic=True)


class Body(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)


class PackedModel(nn.Module):
    """A trainable Llama-family model over packed rows; make one with ``load``.

    Attributes:
        save_activations: False recomputes a layer's activations in the backward pass (gradient checkpointing).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.save_activations = True
        self._tables: tuple[Tensor, Tensor] | None = None
        self.model = Body(config)
        if not config.tie_embeddings:
            self.lm_head = Projection(config.hidden_size, config.head_tokens, bias=False)
        if config.tail_rank:
            self.tail_left = nn.Parameter(torch.empty(config.vocab_size - config.head_tokens, config.tail_rank))
            self.tail_right = nn.Parameter(torch.empty(config.tail_rank, config.hidden_size))
            with torch.device("cpu"):  # also when the parameters are made on another device
                self.order = tokens_in_row_order(config.vocab_size, config.head_mask)
            self._places = self.order.argsort()

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype, device: torch.device) -> PackedModel:
        """Loads the checkpoint in ``folder``.

        Raises:
            InvalidPair: a tensor is missing, is unknown or has another shape; the message names it.
            UnsupportedModel: as ``ModelConfig.load``, or the weights are quantised in the files.
        """
        config = ModelConfig.load(folder)
        config.check_plain(folder)
        with torch.device("meta"):
            model = cls(config)
        model.to_empty(device=device).to(dtype)
        read_parameters(model, folder)
        return model

    def sharing_weights(self) -> PackedModel:
        """Returns a second model on the same weights, which neither may train."""
        with torch.device("meta"):
            model = PackedModel(self.config)
        model.load_state_dict(self.state_dict(), assign=True)
        return model.requires_grad_(False)

    def fuse(self) -> None:
        """Lets torch.compile fuse the operations between matrix products. Compiling takes about a minute."""
        for layer in self.model.layers:
            assert isinstance(layer, Layer)
            layer.before, layer.after = _fused(before_attention), _fused(after_attention)

    def train_low_rank(self, rank: int, seed: int) -> None:
        """Freezes every matrix and adds trained factors of ``rank`` to all projections; vectors stay trained.

        The embedding gets no factors, nor does a head that is tied to it, nor the low-rank part of a head in two parts.
        """
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.ndim == 1)
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, Projection):
                module.add_factors(rank, generator)

    def continue_factors(self, products: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Moves products from the weights into the factors, which start from them. The model's function stays the same.

        Args:
            products: ``up`` and ``down`` by the name of the matrix.
        """
        for name, (up, down) in products.items():
            projection = self.get_submodule(name.removesuffix(".weight"))
            assert isinstance(projection, Projection)
            projection.continue_factors(up, down)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    @property
    def head(self) -> Tensor:
        """The head's weights, [vocab, hidden]; a head in two parts is assembled at each access."""
        if self.config.tail_rank:
            stored = torch.cat([self.lm_head.merged, self.tail_left @ self.tail_right])
            return stored[self._places.to(stored.device)]
        tied = self.config.tie_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.merged

    @torch.no_grad()
    def checkpoint(self) -> dict[str, Tensor]:
        """Returns all tensors with the names and shapes of a Hugging Face checkpoint; factors are merged."""
        own = ("tail_left", "tail_right", ".up", ".down")
        tensors = {name: p.detach() for name, p in self.named_parameters() if not name.endswith(own)}
        for name, module in self.named_modules():
            if isinstance(module, Projection):
                tensors[f"{name}.weight"] = module.merged.detach()
        return tensors | ({HEAD: self.head.detach()} if self.config.tail_rank else {})

    def forward(self, rows: PackedRows, prefix: Tensor | None = None, on_kv: KvHook | None = None) -> Tensor:
        """Computes hidden states; ``head`` turns them into logits.

        Args:
            prefix: [layers, 2, sum of prefixes, kv_heads, D], keys (rotated) and values before the rows, per layer.
                None means that ``rows`` start at their transcripts' beginning.
            on_kv: Called with each layer's own keys and values.

        Returns:
            [T, hidden], after the last norm.
        """
        cos, sin = self._rotations(rows)
        attend = attention_for(rows)
        x = self.model.embed_tokens(rows.token_ids)
        for index, layer in enumerate(self.model.layers):
            here = None if prefix is None else prefix[index]
            if on_kv is not None:
                x = layer(x, cos, sin, attend, here, lambda k, v, i=index: on_kv(i, k, v))
            elif self.save_activations or not torch.is_grad_enabled():
                x = layer(x, cos, sin, attend, here)
            else:
                x = checkpoint(layer, x, cos, sin, attend, here, use_reentrant=False)
        normed: Tensor = self.model.norm(x)
        return normed

    def _rotations(self, rows: PackedRows) -> tuple[Tensor, Tensor]:
        """Returns cosine and sine at the rows' positions, each [T, head_dim / 2]; extends the tables if needed."""
        longest = max(n + p for n, p in zip(rows.lengths, rows.prefixes, strict=True))
        if self._tables is None or len(self._tables[0]) < longest:
            self._tables = rope_tables(self.config.rope, self.config.head_dim, longest, rows.token_ids.device)
        return self._tables[0][rows.positions], self._tables[1][rows.positions]


@torch.no_grad()
def read_parameters(model: PackedModel, folder: Path) -> None:
    """Copies the checkpoint in ``folder`` into ``model``; skips a tied head and RoPE's frequencies."""
    parameters = dict(model.named_parameters())
    whole: Tensor | None = None
    if model.config.tail_rank:
        parameters = {name: p for name, p in parameters.items() if not name.startswith("tail_")}
        whole = torch.empty(model.config.vocab_size, model.config.hidden_size)
        parameters[HEAD] = nn.Parameter(whole)
    missing = set(parameters)
    for stored in list_tensors(folder):
        if is_buffer(stored.name) or (stored.name == HEAD and model.config.tie_embeddings):
            continue
        target = parameters.get(stored.name)
        if target is None or tuple(target.shape) != stored.shape:
            expected = "no such tensor" if target is None else f"shape {tuple(target.shape)}"
            raise InvalidPair(f"{stored.file}: {stored.name} has shape {stored.shape}; the config implies {expected}")
        with safe_open(stored.file, framework="pt") as file:
            target.copy_(file.get_tensor(stored.name))
        missing.remove(stored.name)
    if missing:
        raise InvalidPair(f"{folder}: tensor {min(missing)} is missing")
    if whole is not None:
        common, rare = whole[model.order].tensor_split([model.config.head_tokens])
        model.lm_head.weight.copy_(common)
        for parameter, factor in zip(
            (model.tail_left, model.tail_right),
            low_rank_factors(rare, model.config.tail_rank),
            strict=True,
        ):
            parameter.copy_(factor)
