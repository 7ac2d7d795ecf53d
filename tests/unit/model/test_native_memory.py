"""Tests that a step without enough memory fails, and that later steps succeed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

from overfill.model.native import library

pytestmark = pytest.mark.skipif(
    library.unavailable_reason() is not None, reason=f"no native kernels: {library.unavailable_reason()}"
)

# A memory limit applies to a process, so a child process runs out of memory.
SCRIPT = """
import resource, sys
from pathlib import Path
import torch
from overfill.engine.runner import ModelRunner
from overfill.engine.work import Work
from overfill.kv.cache import KvCache
from overfill.model.native.transformer import NativeTransformer, fastest_model
from overfill.model.transformer import Transformer

torch.set_num_threads(1)
cpu = torch.device("cpu")
model = fastest_model(Transformer.load(Path(sys.argv[1]), torch.bfloat16, cpu))
assert isinstance(model, NativeTransformer)
runner = ModelRunner(model, KvCache(model.config.kv_spec("bfloat16"), 2048, 16, cpu))
few = [Work(list(range(8)), 0, [0], wants_logits=True)]
many = [Work([1] * 16, 0, [block], wants_logits=True) for block in range(2048)]
before = runner.run(few)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
unlimited = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), unlimited[1]))
for _ in range(2):
    try:
        runner.run(many)
    except Exception as error:
        assert "memory" in str(error), error
    else:
        sys.exit("there was memory after all")
    assert torch.equal(runner.run(few), before)
resource.setrlimit(resource.RLIMIT_AS, unlimited)
runner.run(many)
assert torch.equal(runner.run(few), before)
"""


def test_a_step_without_memory_leaves_the_model_whole(save_model, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    save_model(config)
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
