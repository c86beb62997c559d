"""The CPU path in double against logits of transformers, for tiny random checkpoints of every family.

Each ingredient of a family is then taken away or changed, which must be seen: a golden that tolerates a
missing bias or window tests nothing. tools/golden.py makes the goldens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import FAMILIES, tiny_config, tiny_tensors, weights_digest, with_changes, write_checkpoint

from ffmini.convert import pack_checkpoint
from ffmini.cpu import CPUDecoder
from ffmini.packing import PackedModel, vector_offsets

GOLDENS = Path(__file__).parent / "goldens"
TOLERANCE = 1e-5  # norm over norm; transformers keeps rope, norms and softmax in float32
BF16_TOLERANCE = 0.03  # measured: 0.005 to 0.018

# What is left when an ingredient is taken away: (family, ingredient) -> changes to its config.json. Where the
# family itself implies the ingredient, the model becomes one of another family that differs in nothing else.
REMOVALS: dict[tuple[str, str], dict[str, Any]] = {
    ("llama2", "eps"): {"rms_norm_eps": 0.0025},
    ("llama2", "theta"): {"rope_theta": 9000.0},
    ("llama3.1", "scaling"): {"rope_scaling": None},
    ("llama_linear", "scaling"): {"rope_scaling": None},
    ("llama_dynamic", "scaling"): {"rope_scaling": None},
    ("llama_yarn", "scaling"): {"rope_parameters": None, "rope_theta": 10000.0},
    ("llama_yarn", "attention factor"): {
        "rope_parameters": FAMILIES["llama_yarn"]["rope_parameters"] | {"attention_factor": 1.0}
    },
    ("llama_yarn_mscale", "mscale"): {
        "rope_scaling": FAMILIES["llama_yarn_mscale"]["rope_scaling"] | {"mscale": None}
    },
    ("llama_yarn_mscale", "betas"): {
        "rope_scaling": FAMILIES["llama_yarn_mscale"]["rope_scaling"] | {"beta_fast": None, "beta_slow": None}
    },
    ("llama_yarn_mscale", "truncate"): {
        "rope_scaling": FAMILIES["llama_yarn_mscale"]["rope_scaling"] | {"truncate": True}
    },
    ("llama_biases", "biases of q, k, v and o"): {"attention_bias": False},
    ("llama_biases", "biases of gate, up and down"): {"mlp_bias": False},
    ("mistral", "window"): {"sliding_window": 1 << 20},
    ("mistral", "one position of the window"): {"sliding_window": 25},
    ("qwen2", "window"): {"use_sliding_window": False},
    ("qwen2", "full attention in the first layer"): {"max_window_layers": 0},
    ("qwen3", "QK norm"): {"model_type": "llama"},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


def load_golden(family: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / f"{family}.npz") as file:
        return dict(file)


def pack(directory: Path, config: Mapping[str, Any], **storage: Any) -> PackedModel:
    return pack_checkpoint(write_checkpoint(directory, config, **storage), "bf16", progress=False)


def run(packed: PackedModel, golden: Mapping[str, np.ndarray], precision: str = "float64") -> np.ndarray:
    """Logits at the golden's positions; the context is exactly as long as the prompt."""
    tokens = golden["tokens"]
    decoder = CPUDecoder(packed, len(tokens), precision=precision, progress=False)
    return decoder.forward(tokens, 0, "all")[-len(golden["logits"]) :]


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_goldens_and_families_are_the_same() -> None:
    names = {path.stem for path in GOLDENS.glob("*.npz")}
    assert {name for name in names if not name.startswith("sim_")} == {*FAMILIES, "rope"}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str, checkpoints: Path) -> None:
    golden, config = load_golden(family), tiny_config(family)
    assert weights_digest(config, tiny_tensors(config)) == golden["digest"], "tests/tiny.py has changed"
    packed = pack(checkpoints / family, config)
    truth = run(packed, golden)
    assert truth.dtype == np.float64
    assert relative_error(truth, golden["logits"]) < TOLERANCE
    rounded = relative_error(run(packed, golden, "bf16"), truth)
    assert 1e-4 < rounded < BF16_TOLERANCE


@pytest.mark.parametrize(("family", "ingredient"), REMOVALS)
def test_a_missing_ingredient_is_seen(family: str, ingredient: str, checkpoints: Path) -> None:
    golden = load_golden(family)
    config = with_changes(tiny_config(family), REMOVALS[family, ingredient])
    packed = pack(checkpoints / f"{family} without {ingredient}", config)
    assert relative_error(run(packed, golden), golden["logits"]) > 10 * TOLERANCE


@pytest.mark.parametrize("family", ["llama_biases", "qwen2", "qwen3"])
def test_every_vector_is_seen(family: str, checkpoints: Path) -> None:
    golden, config = load_golden(family), tiny_config(family)
    packed = pack(checkpoints / f"{family} vectors", config)
    layer = packed.layers[-1]
    for name, (offset, length) in vector_offsets(packed.config).items():
        vector = layer.vectors[offset : offset + length]
        kept = vector.copy()
        vector[:] = 1.0 if "norm" in name else 0.0
        assert relative_error(run(packed, golden), golden["logits"]) > 10 * TOLERANCE, name
        vector[:] = kept


@pytest.mark.parametrize(("dtype", "shards"), [("F16", 1), ("F32", 3)])
def test_storage_does_not_matter(dtype: str, shards: int, checkpoints: Path) -> None:
    golden, config = load_golden("llama_biases"), tiny_config("llama_biases")
    packed = pack(checkpoints / dtype, config, dtype=dtype, shards=shards)
    assert relative_error(run(packed, golden), golden["logits"]) < TOLERANCE


def test_prompts_are_longer_than_what_they_test() -> None:
    for family in FAMILIES:
        config, length = tiny_config(family), len(load_golden(family)["tokens"])
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        trained = rope.get("original_max_position_embeddings", 0)
        if rope.get("type") == "dynamic":
            trained = config["max_position_embeddings"]
        assert length > max(trained, config.get("sliding_window", 0))
