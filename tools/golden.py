"""Make tests/goldens/*.npz: logits and rope frequencies from transformers, to test the CPU path in double.

    pip install -e . torch transformers && python tools/golden.py

The checkpoints come from tests/tiny.py, so that the tests make the same weights without torch; each golden
carries the digest of its configuration and weights.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path.insert(0, str(TESTS))

from tiny import (  # noqa: E402
    FAMILIES,
    tiny_config,
    tiny_prompt,
    tiny_tensors,
    weights_digest,
    write_checkpoint,
)

KEPT_POSITIONS = 64  # logits are kept for the last so many positions
# Longer than every window and original_max_position_embeddings; two go beyond a KV block of 256 positions.
PROMPT_LENGTH = 64
PROMPT_LENGTHS = {
    "llama3.1": 300,
    "mistral": 296,
    "llama_dynamic": 96,
    "llama_yarn": 96,
    "llama_yarn_mscale": 96,
}

# Rope settings of published models: (config.json, length of the context).
ROPE_CASES: dict[str, tuple[dict[str, Any], int]] = {
    "default": ({"head_dim": 128, "rope_theta": 1e6}, 4096),
    "linear": ({"head_dim": 128, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
    "dynamic": (
        {"head_dim": 80, "max_position_embeddings": 2048, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        7000,
    ),
    "dynamic_short": (
        {"head_dim": 80, "max_position_embeddings": 2048, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        100,
    ),
    "llama3": (
        {
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        4096,
    ),
    "yarn": (
        {
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
            },
        },
        40000,
    ),
    "yarn_attention_factor": (
        {
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 16.0,
                "original_max_position_embeddings": 4096,
                "attention_factor": 1.5,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
            },
        },
        8192,
    ),
    "yarn_mscale": (
        {
            "head_dim": 64,
            "max_position_embeddings": 163840,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 40.0,
                "original_max_position_embeddings": 4096,
                "mscale": 1.0,
                "mscale_all_dim": 0.707,
                "truncate": False,
            },
        },
        8192,
    ),
}


def reference_logits(directory: Path, tokens: np.ndarray) -> np.ndarray:
    """transformers' logits [len(tokens), vocab_size] for the checkpoint in `directory`, in double precision.

    transformers keeps norms, softmax and rope in float32 even then, which is what limits the agreement.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").double()
    with torch.inference_mode():
        return model.eval()(torch.from_numpy(tokens)[None]).logits[0].numpy()


def make_family(family: str, scratch: Path) -> None:
    """Write goldens/<family>.npz: tokens, logits of the last positions, digest of the checkpoint."""
    config = tiny_config(family)
    tokens = tiny_prompt(config, PROMPT_LENGTHS.get(family, PROMPT_LENGTH))
    logits = reference_logits(write_checkpoint(scratch / family, config), tokens)
    np.savez(
        TESTS / "goldens" / f"{family}.npz",
        tokens=tokens.astype(np.int32),
        logits=logits[-KEPT_POSITIONS:].astype(np.float32),
        digest=weights_digest(config, tiny_tensors(config)),
        transformers=transformers.__version__,
    )


def make_rope() -> None:
    """Write goldens/rope.npz: configuration, length, frequencies and attention factor of each case."""
    arrays: dict[str, Any] = {}
    for name, (changes, length) in ROPE_CASES.items():
        raw = tiny_config("llama2", **changes)
        config = transformers.LlamaConfig(**raw)
        rope_type = config.rope_parameters["rope_type"]
        if rope_type == "default":
            frequencies, factor = LlamaRotaryEmbedding(config).inv_freq, 1.0
        else:
            frequencies, factor = ROPE_INIT_FUNCTIONS[rope_type](config, "cpu", seq_len=length)
        arrays |= {
            f"{name}.config": json.dumps(raw),
            f"{name}.length": length,
            f"{name}.frequencies": frequencies.numpy(),
            f"{name}.factor": factor,
        }
    np.savez(TESTS / "goldens" / "rope.npz", **arrays)


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        for family in FAMILIES:
            make_family(family, Path(scratch))
            print(family)
    make_rope()


if __name__ == "__main__":
    main()
