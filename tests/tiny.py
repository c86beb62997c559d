"""Tiny random Hugging Face checkpoints of every family, made with NumPy alone.

Every tensor is random, norms and biases included, and attention is peaked: unit norms, zero biases and flat
attention would hide a wrong norm, bias, window or rope. Each tensor has a random stream of its own, seeded
by its name, so that two configurations share the tensors that they share by name and shape. All values
are exact in bf16, fp16 and fp32 alike, whichever of them the files are written in.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ffmini.numerics import round_bf16, to_bf16

# What the families below change. eps is large beside the embeddings' mean square, to matter.
BASE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 259,
    "max_position_embeddings": 512,
    "rms_norm_eps": 0.003,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}

_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

# Changes to BASE, by family; None removes a key. Both the older and the newer spelling of rope occur.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama2": {"num_key_value_heads": 4},
    "llama3.1": {
        "hidden_size": 96,
        "num_attention_heads": 6,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama_linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama_dynamic": {"max_position_embeddings": 32, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "llama_yarn": {
        "max_position_embeddings": 128,
        "rope_theta": None,
        "rope_parameters": {"rope_theta": 10000.0, **_YARN},
    },
    "llama_yarn_mscale": {
        "max_position_embeddings": 128,
        "rope_scaling": _YARN
        | {"mscale": 2.0, "mscale_all_dim": 0.5, "beta_fast": 2, "beta_slow": 0.1, "truncate": False},
    },
    "llama_biases": {"attention_bias": True, "mlp_bias": True},
    "llama_head_dim": {"head_dim": 48, "num_key_value_heads": 1},
    "smollm2": {
        "hidden_size": 96,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "num_hidden_layers": 3,
        "tie_word_embeddings": True,
    },
    "mistral": {
        "model_type": "mistral",
        "sliding_window": 24,
        "head_dim": 32,
        "rope_theta": 1000000.0,
        "attention_bias": None,
    },
    "qwen2": {
        "model_type": "qwen2",
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 12,
        "max_window_layers": 1,
        "rope_theta": 1000000.0,
        "attention_bias": None,
    },
    "qwen3": {
        "model_type": "qwen3",
        "head_dim": 32,
        "rope_theta": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": True,
    },
}


def tiny_config(family: str, **changes: Any) -> dict[str, Any]:
    """The config.json of `family` with `changes`; None removes a key."""
    return with_changes(BASE | FAMILIES[family], changes)


def with_changes(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with `changes`, without the keys whose value is None."""
    return {key: value for key, value in {**config, **changes}.items() if value is not None}


def tiny_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of `config`, a config.json with every shape key, under transformers' names."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    qkv_bias = config.get("attention_bias", config["model_type"] == "qwen2")
    o_bias = config.get("attention_bias", False)
    mlp_bias = config.get("mlp_bias", False)
    linears = {
        "self_attn.q_proj": ((q, hidden), qkv_bias),
        "self_attn.k_proj": ((kv, hidden), qkv_bias),
        "self_attn.v_proj": ((kv, hidden), qkv_bias),
        "self_attn.o_proj": ((hidden, q), o_bias),
        "mlp.gate_proj": ((inner, hidden), mlp_bias),
        "mlp.up_proj": ((inner, hidden), mlp_bias),
        "mlp.down_proj": ((hidden, inner), mlp_bias),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config["model_type"] == "qwen3":
        norms |= {"self_attn.q_norm": head_dim, "self_attn.k_norm": head_dim}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for prefix in (f"model.layers.{layer}." for layer in range(config["num_hidden_layers"])):
        for name, (shape, bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = shape
            if bias:
                shapes[f"{prefix}{name}.bias"] = shape[:1]
        shapes |= {f"{prefix}{name}.weight": (length,) for name, length in norms.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def tiny_tensors(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights for `config`, exact in bf16 and fp16."""
    tensors = {}
    for name, shape in tiny_shapes(config).items():
        stream = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
        mean, deviation = _distribution(name, shape)
        values = round_bf16((mean + deviation * stream.standard_normal(shape)).astype(np.float32))
        # Below this fp16 has fewer bits than bf16.
        tensors[name] = np.where(np.abs(values) < 2.0**-14, np.float32(0.0), values)
    return tensors


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's elements."""
    if "norm" in name:
        # Of q and k the norm alone sets how peaked attention is.
        return (1.8, 0.5) if "q_norm" in name or "k_norm" in name else (1.0, 0.3)
    if name.endswith("bias"):
        return 0.0, 0.5
    if name == "model.embed_tokens.weight":
        return 0.0, 0.3
    gain = 1.8 if "q_proj" in name or "k_proj" in name else 1.0
    return 0.0, gain / math.sqrt(shape[-1])


def tiny_prompt(config: Mapping[str, Any], length: int, seed: int = 0) -> np.ndarray:
    """`length` random token ids, int64."""
    stream = np.random.Generator(np.random.PCG64([seed, 1]))
    return (stream.random(length) * config["vocab_size"]).astype(np.int64)


def weights_digest(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
    """Identifies a checkpoint: a hash of its configuration and of all weights."""
    digest = hashlib.blake2b(json.dumps(dict(config), sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].astype("<f4").tobytes())
    return digest.hexdigest()


def write_checkpoint(
    directory: Path, config: Mapping[str, Any], seed: int = 0, *, dtype: str = "BF16", shards: int = 1
) -> Path:
    """Make `directory` with config.json and the weights of tiny_tensors, as `dtype` BF16, F16 or F32."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(dict(config), indent=1))
    tensors = tiny_tensors(config, seed)
    if shards == 1:
        write_safetensors(directory / "model.safetensors", tensors, dtype)
        return directory
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[shard::shards]}
        write_safetensors(directory / file, part, dtype)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], dtype: str = "BF16") -> None:
    """Write float32 `tensors` as `dtype` BF16, F16 or F32."""
    encode = {"BF16": to_bf16, "F16": lambda x: x.astype("<f2"), "F32": lambda x: x.astype("<f4")}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs, offset = [], 0
    for name, values in tensors.items():
        blob = encode(values).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(values.shape),
            "data_offsets": [offset, offset + len(blob)],
        }
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))
