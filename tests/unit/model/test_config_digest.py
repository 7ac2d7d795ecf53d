"""Tests of the digest of a model's config: known answers, and everything that changes a forward pass changes it."""

import hashlib
from dataclasses import replace

import pytest

from overfill.model.config import ModelConfig
from overfill.model.config_digest import CONFIG_FIELDS, canonical_form, config_digest

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}
SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
OLD = LLAMA | {"rope_theta": 500000.0, "rope_scaling": SCALING}
NEW = LLAMA | {"rope_parameters": SCALING | {"rope_theta": 500000.0}, "head_dim": 128}
CONFIG = ModelConfig.from_dict(OLD)

FORM = """\
overfill-config/1
model_type=llama
vocab_size=128256
hidden_size=4096
intermediate_size=14336
num_layers=32
num_heads=32
num_kv_heads=8
head_dim=128
rms_norm_eps=0x1.4f8b588e368f1p-17
tie_embeddings=0
qkv_bias=0
o_bias=0
mlp_bias=0
qk_norm=0
head_tokens=128256
tail_rank=0
head_mask=
weight_format=plain
rope.type=llama3
rope.theta=0x1.e848000000000p+18
rope.factor=0x1.0000000000000p+3
rope.low_freq_factor=0x1.0000000000000p+0
rope.high_freq_factor=0x1.0000000000000p+2
rope.original_max_positions=8192
rope.beta_fast=0x0.0p+0
rope.beta_slow=0x0.0p+0
rope.attention_factor=0x1.0000000000000p+0
rope.truncate=0
"""


def test_known_answers():
    assert canonical_form(CONFIG) == FORM
    assert config_digest(CONFIG) == hashlib.sha256(FORM.encode()).hexdigest()
    assert config_digest(CONFIG) == "294bfa951c44da0cb8572739653198f0767145dae87b2bf64def73ebd1301f2b"
    assert canonical_form(CONFIG, (0, 2, 31)) == FORM + "layer_map=0,2,31\n"
    assert config_digest(CONFIG, (0, 2, 31)) == "6f7d13b535bf550043e8ecab4457a7baa045a6cbaf197ccccfde8fbb59503d2b"


def test_both_spellings_of_a_config_have_one_digest():
    assert config_digest(ModelConfig.from_dict(NEW)) == config_digest(CONFIG)
    integers = OLD | {"rope_theta": 500000, "rope_scaling": SCALING | {"factor": 8}}
    assert config_digest(ModelConfig.from_dict(integers)) == config_digest(CONFIG)


OTHER = {str: "other", int: 7, float: 0.5, bytes: b"\xff"}


@pytest.mark.parametrize("name", CONFIG_FIELDS)
def test_every_field_changes_the_digest(name):
    value = getattr(CONFIG, name)
    other = not value if isinstance(value, bool) else OTHER[type(value)]
    assert config_digest(replace(CONFIG, **{name: other})) != config_digest(CONFIG)


def test_rope_and_layer_map_change_the_digest():
    others = [
        config_digest(replace(CONFIG, rope=replace(CONFIG.rope, theta=1.0))),
        config_digest(CONFIG, (0, 1)),
        config_digest(CONFIG, (1, 0)),
        config_digest(CONFIG, (1, 0, 0)),
        config_digest(CONFIG),
    ]
    assert len(set(others)) == len(others)
