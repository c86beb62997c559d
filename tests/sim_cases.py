"""What the simulated kernel runs: tiny models, random caches, and the cases that a real GPU has run too."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sim.driver import SHARED_LIMIT
from tiny import FAMILIES, tiny_config, tiny_prompt, write_checkpoint

from ffmini.convert import pack_checkpoint
from ffmini.layout import VectorLayout
from ffmini.numerics import join_vectors, quantize_vectors, to_bf16
from ffmini.packing import LAYER_MATRICES, PackedModel

MAX_SEQ_LEN = 600
LARGE_SHARED_LIMIT = 163 * 1024  # of sm_80 and sm_87
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


# The awkward sizes of tests/test_gpu.py at tiny scale, in two factors that go together freely.
HEADS: dict[str, dict[str, Any]] = {
    "own": {},  # the family's: in COVER head_dim 32 and 48
    "head_dim_8": {"head_dim": 8, "num_attention_heads": 6, "num_key_value_heads": 3},
    "head_dim_16_gqa16": {"head_dim": 16, "num_attention_heads": 16, "num_key_value_heads": 1},
    "head_dim_64_gqa7": {"head_dim": 64, "num_attention_heads": 7, "num_key_value_heads": 1},
    "head_dim_80": {"head_dim": 80, "num_attention_heads": 4, "num_key_value_heads": 2},
    "head_dim_96_gqa12": {"head_dim": 96, "num_attention_heads": 12, "num_key_value_heads": 1},
    "head_dim_128": {"head_dim": 128, "num_attention_heads": 4, "num_key_value_heads": 2},
    "head_dim_256": {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1},
}
WIDTHS: dict[str, dict[str, Any]] = {
    "own": {},
    # 3 tokens left over, as 32003 has. Two segments: integers' units of a warp are of the same one.
    "vocab": {"vocab_size": 515, "hidden_size": 424, "tie_word_embeddings": True},
    # More segments and tiles than one round of additions takes in a small grid.
    "wide": {"hidden_size": 528, "intermediate_size": 1100},
}


class Cover(NamedTuple):
    """One build of the pairwise cover and its two runs, each (rows of a pass, blocks of the grid).

    The first run is a prompt, in passes of as many rows as the build takes; the second one pass from DEEP on.
    """

    family: str
    dtype: str
    group: int | None
    heads: str
    widths: str
    prompt: tuple[int, int]
    deep: tuple[int, int]

    @property
    def shared_limit(self) -> int:
        """Bytes of shared memory: those of the smallest GPUs, if eight rows fit."""
        eight_wide_heads = self.prompt[0] == 8 and self.heads in ("head_dim_96_gqa12", "head_dim_128")
        return LARGE_SHARED_LIMIT if self.widths == "wide" or eight_wide_heads else SHARED_LIMIT

    def case(self) -> Case:
        changes = WIDTHS[self.widths] | HEADS[self.heads]
        rows, blocks = self.prompt
        return Case(self.family, self.dtype, self.group or 128, rows=rows, blocks=blocks, changes=changes)


# fmt: off
COVER = [
    Cover("llama2", "bf16", None, "head_dim_64_gqa7", "vocab", (4, 3), (1, 1)),
    Cover("llama3.1", "bf16", None, "head_dim_80", "wide", (4, 2), (4, 3)),
    Cover("llama_biases", "bf16", None, "head_dim_8", "own", (8, 7), (2, 3)),
    Cover("llama_head_dim", "bf16", None, "head_dim_128", "own", (4, 7), (2, 2)),
    Cover("smollm2", "bf16", None, "head_dim_16_gqa16", "vocab", (1, 2), (1, 3)),
    Cover("mistral", "bf16", None, "head_dim_96_gqa12", "vocab", (8, 3), (4, 3)),
    Cover("qwen2", "bf16", None, "head_dim_256", "vocab", (2, 7), (2, 2)),
    Cover("qwen3", "bf16", None, "own", "wide", (4, 7), (1, 1)),
    Cover("llama2", "int8", 128, "head_dim_80", "own", (8, 1), (2, 7)),
    Cover("llama3.1", "int8", 32, "head_dim_128", "vocab", (8, 3), (1, 7)),
    Cover("llama_biases", "int8", 32, "head_dim_16_gqa16", "wide", (4, 1), (1, 7)),
    Cover("llama_head_dim", "int8", 128, "own", "vocab", (4, 3), (1, 2)),
    Cover("smollm2", "int8", 64, "head_dim_8", "wide", (8, 1), (4, 7)),
    Cover("mistral", "int8", 64, "head_dim_256", "own", (1, 7), (1, 2)),
    Cover("qwen2", "int8", 32, "head_dim_96_gqa12", "own", (2, 1), (1, 2)),
    Cover("qwen3", "int8", 64, "head_dim_64_gqa7", "own", (8, 2), (2, 3)),
    Cover("llama2", "int4", 32, "head_dim_96_gqa12", "wide", (1, 7), (1, 2)),
    Cover("llama3.1", "int4", 64, "head_dim_16_gqa16", "own", (8, 3), (2, 1)),
    Cover("llama_biases", "int4", 64, "head_dim_80", "vocab", (4, 2), (1, 7)),
    Cover("llama_head_dim", "int4", 128, "head_dim_256", "wide", (8, 1), (4, 3)),
    Cover("smollm2", "int4", 32, "own", "own", (8, 3), (2, 7)),
    Cover("mistral", "int4", 128, "head_dim_64_gqa7", "wide", (2, 7), (2, 1)),
    Cover("qwen2", "int4", 32, "head_dim_128", "wide", (8, 1), (4, 3)),
    Cover("qwen3", "int4", 128, "head_dim_8", "vocab", (4, 2), (1, 1)),
]
# fmt: on

# They differ from llama2 in the rope tables alone and need no build of their own: see test_ropes.
ROPES = ("llama_linear", "llama_dynamic", "llama_yarn", "llama_yarn_mscale")

# What the cover must hold, by factor; a run's rows are those of its passes, as a build takes fewer rows too.
FACTORS: dict[str, list[Any]] = {
    "family": [family for family in FAMILIES if family not in ROPES],
    "dtype": ["bf16", "int8", "int4"],
    "group": [None, 32, 64, 128],
    "heads": list(HEADS),
    "widths": list(WIDTHS),
    "rows": [1, 2, 4, 8],
    "blocks": [1, 2, 3, 7],
}
# Pairs of factors left out: 64 pairs of family and heads do not fit into 24 builds, nor 24 of either and a
# group into the 16 quantised ones. Awkward heads replace a family's own in any case.
UNPAIRED = [{"family", "heads"}, {"family", "group"}, {"heads", "group"}]
Pair = tuple[tuple[str, Any], tuple[str, Any]]


def wanted_pairs() -> set[Pair]:
    """All pairs of values of FACTORS; bf16 has no groups, and the other formats have nothing else."""
    return {
        ((a, x), (b, y))
        for (a, xs), (b, ys) in itertools.combinations(FACTORS.items(), 2)
        if {a, b} not in UNPAIRED
        for x, y in itertools.product(xs, ys)
        if (a, b) != ("dtype", "group") or (x == "bf16") == (y is None)
    }


def covered_pairs(cover: list[Cover]) -> set[Pair]:
    """All pairs of values that meet in a run of `cover`."""
    runs = [(*build[:-2], *run) for build in cover for run in (build.prompt, build.deep)]
    values = [zip(FACTORS, run, strict=True) for run in runs]
    return {pair for of_run in values for pair in itertools.combinations(of_run, 2)}


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


def make_packer(make_directory: Callable[[], Path]) -> Callable[[Case], PackedModel]:
    """A function that packs a case, once; the checkpoints go into new directories."""
    made: dict[str, PackedModel] = {}

    def pack(case: Case) -> PackedModel:
        key = repr((case.family, case.dtype, case.group_size, case.changes))
        if key not in made:
            made[key] = pack_case(make_directory() / "model", case)
        return made[key]

    return pack


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


def random_cache(shape: tuple[int, ...], start: int, vectors: VectorLayout) -> np.ndarray:
    """A cache of `shape`, [..., positions, cached_size]: random before position `start`, NaN from there on.

    The keys and the values of a case are the same. Padding is as what was never written.
    """
    cache = np.full(shape, np.iinfo(vectors.dtype).max, vectors.dtype)
    stream = np.random.Generator(np.random.PCG64(7))
    values = stream.standard_normal((*shape[:-2], start, vectors.head_dim)).astype(np.float32)
    plain = to_bf16(values) if vectors.kv_dtype == "bf16" else join_vectors(*quantize_vectors(values))
    cache[..., :start, : vectors.plain_size] = plain
    return cache
