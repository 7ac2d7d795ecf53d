"""The shape and the prompt of the small random models that tests compare with transformers."""

import torch

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
PROMPT = torch.randint(0, 96, (41,), generator=torch.Generator().manual_seed(7)).tolist()
