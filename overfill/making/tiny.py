"""Makes tiny pairs with random weights in a second or two, for tests on a CPU.

The weights are scaled so that answers depend on the whole prompt: attention is sharp and its output dominates the
residual stream. A wrong or lost block of KV therefore changes the answer. The text of answers has no meaning.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama import LlamaForCausalLM
from transformers.models.mistral import MistralForCausalLM
from transformers.models.qwen2 import Qwen2ForCausalLM
from transformers.models.qwen3 import Qwen3ForCausalLM

from overfill.making.checkpoint import save_tensors, write_decoder, write_weights
from overfill.making.layerwise import fold_norms
from overfill.making.pair_json import write_manifest
from overfill.making.prune import PruningPlan, slice_weights
from overfill.model.adapter import PEFT_CONFIG, WEIGHTS, LowRank, Projection, peft_content, projection_shapes
from overfill.model.config import ModelConfig
from overfill.model.loading import load_weights
from overfill.settings.tiers import TierSpec

Architecture = Literal["llama", "mistral", "qwen2", "qwen3"]

TINY_TIERS = tuple(TierSpec(name=name, pair="tiny") for name in ("full", "default", "fast"))

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>")

_CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
_TRAINING_TEXT = (
    "The full model reads the whole prompt and the decoder writes the answer.",
    "A block holds the keys and values of sixteen tokens; a sequence owns a table of blocks.",
    "What is the capital of France? The capital of France is Paris.",
    "Write a short story about a river, a bridge and the people who cross it every morning.",
    "user assistant system: please explain how this works, step by step, with an example.",
    "Numbers such as 0, 1, 2, 10, 64, 128 and 2048 appear in many of our questions.",
)


def make_tiny_pair(
    folder: Path,
    *,
    architecture: Architecture = "llama",
    identity: bool = False,
    seed: int = 0,
    hidden_size: int = 64,
    intermediate_size: int = 128,
    decoder_intermediate_size: int = 64,
    decoder_seed: int | None = None,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    vocab_size: int = 512,
    max_positions: int = 2048,
    scale: float = 4.0,
) -> Path:
    """Writes a pair to ``folder`` (created) and returns it. Equal arguments give equal weights and tokenizer.

    Args:
        identity: Make the decoder the full model, without using ``decoder_intermediate_size``.
        decoder_seed: Seed of a decoder with weights of its own. None prunes the full model.
        vocab_size: At least 258: every byte and the special tokens.
        scale: Factor of the output head. Logits and the margins between them grow with it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config_class, model_class = _CLASSES[architecture]
    config = config_class(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        max_position_embeddings=max_positions,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        **({"sliding_window": None} if architecture == "mistral" else {}),
    )
    full = model_class(config).eval()
    _randomise(full, seed, scale)
    tokenizer = _make_tokenizer(vocab_size)
    _save(full, tokenizer, folder / "full")
    if identity:
        write_manifest(folder, decoder="full")
    else:
        # The weights are random, so any choice of neurons is as good as another.
        generator = torch.Generator().manual_seed(seed)
        neurons = torch.randperm(intermediate_size, generator=generator)[:decoder_intermediate_size].sort().values
        plan = PruningPlan(tuple(range(num_layers)), (neurons,) * num_layers, torch.eye(hidden_size))
        full_config = ModelConfig.load(folder / "full")
        source = folder / "full"
        if decoder_seed is not None:
            source = folder / "unrelated"
            _randomise(full, decoder_seed, scale)
            _save(full, tokenizer, source)
        weights = fold_norms(load_weights(source, full_config, torch.float32, torch.device("cpu")))
        (folder / "decoder").mkdir(exist_ok=True)
        write_decoder(folder / "decoder", folder / "full", slice_weights(weights, plan))
        if decoder_seed is not None:
            shutil.rmtree(source)
        write_manifest(folder, recipe={"method": "random", "intermediate_size": decoder_intermediate_size})
    return folder


def random_products(config: ModelConfig, seed: int, rank: int) -> dict[tuple[int, Projection], LowRank]:
    """Returns random products of all projections of a decoder with ``config``, which change nearly all answers."""
    generator = torch.Generator().manual_seed(seed)

    def factor(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / math.sqrt(columns)

    return {
        (layer, projection): LowRank(factor(rank, columns), factor(rows, rank))
        for layer in range(config.num_layers)
        for projection, (rows, columns) in projection_shapes(config).items()
    }


def make_random_adapter(folder: Path, config: ModelConfig, seed: int) -> Path:
    """Writes PEFT's files of an adapter with ``random_products`` of rank 4 to ``folder``, which is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, content = peft_content(random_products(config, seed, 4))
    save_tensors(tensors, folder / WEIGHTS)
    (folder / PEFT_CONFIG).write_text(content, encoding="utf-8")
    return folder


def make_tiny_tiers(
    folder: Path, tiers: Sequence[TierSpec] = TINY_TIERS, *, head_dim: int = 16
) -> tuple[TierSpec, ...]:
    """Writes a tiny pair for each tier to ``folder`` (created), all with one full model. Returns the tiers with them.

    The first tier's decoder is the full model. The other decoders have random weights. So nearly every token of an
    answer differs between the tiers, and a test notices one token of another tier. A pruned decoder would agree with
    its full model on most tokens.
    """
    return tuple(
        tier.model_copy(
            update={
                "pair": str(
                    make_tiny_pair(
                        folder / tier.name, identity=not number, decoder_seed=number or None, head_dim=head_dim
                    )
                )
            }
        )
        for number, tier in enumerate(tiers)
    )


@torch.no_grad()
def _randomise(model: PreTrainedModel, seed: int, scale: float) -> None:
    """Fills the weights with noise. With smaller gains than 2 for q and k, a lost block would not change answers."""
    generator = torch.Generator().manual_seed(seed)

    def gain(name: str) -> float:
        if "q_proj" in name or "k_proj" in name:
            return 2.0
        if "v_proj" in name or "o_proj" in name:
            return 3.0
        return scale if "lm_head" in name else 1.0

    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "q_norm" in name or "k_norm" in name:
            parameter.copy_(2.0 + 0.1 * noise)
        elif "norm" in name:
            parameter.copy_(1.0 + 0.1 * noise)
        elif "bias" in name:
            parameter.copy_(0.1 * noise)
        elif "embed_tokens" in name:
            parameter.copy_(noise)
        else:
            parameter.copy_(noise * gain(name) / parameter.shape[1] ** 0.5)


def _make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE, so that any text round-trips. Ids 0 and 1 are the special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TRAINING_TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL_TOKENS[0],
        eos_token=SPECIAL_TOKENS[1],
        pad_token=SPECIAL_TOKENS[1],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the checkpoint without the model's ``save_pretrained``, which would draw a progress bar."""
    folder.mkdir(exist_ok=True)
    write_weights(folder, model.state_dict())
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    generation = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1)
    generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
