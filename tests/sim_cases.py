"""What the simulated kernel runs: tiny models, random caches, and the cases that a real GPU has run too."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tiny import tiny_config, tiny_prompt, write_checkpoint

from ffmini.convert import pack_checkpoint
from ffmini.numerics import to_bf16
from ffmini.packing import LAYER_MATRICES, PackedModel

MAX_SEQ_LEN = 600
DEEP = 508  # a pass from here on has three blocks of positions, and rows in two of them


@dataclass(frozen=True)
class Case:
    """One build: a family of tests/tiny.py with changes, a format, and what the pass is run with."""

    family: str
    dtype: str = "bf16"
    group_size: int = 128
    rows: int = 8
    blocks: int = 3
    start: int = DEEP
    changes: dict[str, Any] = field(default_factory=dict)


# Run on a GPU by tools/sim_golden.py, one pass of `rows` tokens from position `start` on; tests/goldens/
# sim_<name>.npz holds what it said. From 0 on the first row sees nothing but itself.
GOLDEN_CASES = {
    "bf16_biases": Case("llama_biases", "bf16", rows=8, start=250),
    "bf16_decode": Case("llama3.1", "bf16", rows=1, start=DEEP),
    "int8_windows": Case("qwen2", "int8", 64, rows=8, start=0, changes={"num_hidden_layers": 2}),
    "int8_qk_norm": Case("qwen3", "int8", rows=1, start=300),
    "int4_qk_norm": Case("qwen3", "int4", rows=8, start=DEEP),
    "int4_decode": Case("llama_head_dim", "int4", 32, rows=1, start=257),
}


def pack_case(directory: Path, case: Case) -> PackedModel:
    """The packed model of `case`; its checkpoint is written into `directory`, which must not exist yet."""
    config = tiny_config(case.family, **case.changes | {"max_position_embeddings": 4096})
    source = write_checkpoint(directory, config)
    return pack_checkpoint(source, case.dtype, case.group_size, progress=False)


def packed_digest(packed: PackedModel) -> str:
    """Identifies all of a model's packed weights."""
    digest = hashlib.blake2b(digest_size=16)
    for layer in packed.layers:
        for array in (*(getattr(layer, name) for name in LAYER_MATRICES), layer.vectors):
            digest.update(np.ascontiguousarray(array).tobytes())
    for array in (packed.lm_head, packed.embed_tokens, packed.norm):
        digest.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def case_tokens(packed: PackedModel, length: int) -> np.ndarray:
    """`length` random token ids of the model's vocabulary."""
    return tiny_prompt({"vocab_size": packed.config.vocab_size}, length)


def random_cache(shape: tuple[int, ...], start: int) -> np.ndarray:
    """bf16 bits of `shape`, [..., positions, head_dim]: random before position `start`, NaN from there on.

    The keys and the values of a case are the same.
    """
    cache = np.full(shape, 0xFFFF, np.uint16)
    stream = np.random.Generator(np.random.PCG64(7))
    values = stream.standard_normal((*shape[:-2], start, shape[-1]))
    cache[..., :start, :] = to_bf16(values.astype(np.float32))
    return cache
