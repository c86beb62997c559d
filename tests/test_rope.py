"""Rope tables: transformers' frequencies for settings of published models, and the formulas' limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_config

from ffmini.config import ModelConfig, parse_config
from ffmini.rope import attention_factor, rope_frequencies, rope_tables

GOLDEN = np.load(Path(__file__).parent / "goldens" / "rope.npz")
CASES = sorted({name.split(".")[0] for name in GOLDEN.files})


def make_config(**changes: Any) -> ModelConfig:
    return parse_config(tiny_config("llama2", **changes), "config.json")


def yarn_config(**changes: Any) -> ModelConfig:
    scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096}
    return make_config(head_dim=128, rope_scaling=scaling | changes)


def test_there_is_a_golden_for_every_type() -> None:
    assert {name.split("_")[0] for name in CASES} == {"default", "linear", "dynamic", "llama3", "yarn"}


@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_those_of_transformers(name: str) -> None:
    config = parse_config(json.loads(str(GOLDEN[f"{name}.config"])), name)
    length = int(GOLDEN[f"{name}.length"])
    expected = GOLDEN[f"{name}.frequencies"]
    # transformers computes them in float32.
    np.testing.assert_allclose(rope_frequencies(config, length), expected, rtol=2e-6)
    assert attention_factor(config) == pytest.approx(float(GOLDEN[f"{name}.factor"]), rel=1e-12)


def test_tables_are_double_until_the_last_rounding() -> None:
    config = make_config(rope_theta=1e6, max_position_embeddings=1 << 17)
    cos, sin = rope_tables(config, 100_001)
    assert cos.shape == sin.shape == (100_001, 8)
    assert cos.dtype == sin.dtype == np.float32
    exact = 100_000 * 1e6 ** (-np.arange(8) / 8)
    np.testing.assert_array_equal(cos[100_000], np.cos(exact).astype(np.float32))
    np.testing.assert_array_equal(sin[100_000], np.sin(exact).astype(np.float32))
    double = rope_tables(config, 100_001, np.float64)
    np.testing.assert_array_equal(double[0][100_000], np.cos(exact))
    np.testing.assert_array_equal(double[1].astype(np.float32), sin)


def test_position_zero_is_not_turned() -> None:
    cos, sin = rope_tables(make_config(), 4)
    assert (cos[0] == 1.0).all()
    assert (sin[0] == 0.0).all()


def test_linear_shrinks_positions() -> None:
    plain = rope_tables(make_config(), 10, np.float64)
    scaled = rope_tables(make_config(rope_scaling={"type": "linear", "factor": 4.0}), 40, np.float64)
    for a, b in zip(plain, scaled, strict=True):
        np.testing.assert_allclose(a, b[::4], rtol=0, atol=1e-14)


def test_dynamic_depends_on_the_context_once_it_is_longer_than_trained() -> None:
    changes = {"max_position_embeddings": 32, "rope_theta": 10000.0}
    plain = rope_frequencies(make_config(**changes), 64)
    config = make_config(**changes, rope_scaling={"type": "dynamic", "factor": 2.0})
    np.testing.assert_array_equal(rope_frequencies(config, 8), plain)
    np.testing.assert_array_equal(rope_frequencies(config, 32), plain)
    theta = 10000.0 * (2.0 * 64 / 32 - 1.0) ** (16 / 14)
    np.testing.assert_allclose(rope_frequencies(config, 64), theta ** (-np.arange(8) / 8), rtol=1e-14)


def test_llama3_keeps_high_frequencies_and_divides_low_ones() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = make_config(head_dim=128, rope_theta=500000.0, rope_scaling=scaling)
    scaled = rope_frequencies(config, 100)
    plain = rope_frequencies(make_config(head_dim=128, rope_theta=500000.0), 100)
    turns = 8192 * plain / (2 * np.pi)
    np.testing.assert_array_equal(scaled[turns > 4], plain[turns > 4])
    np.testing.assert_array_equal(scaled[turns < 1], plain[turns < 1] / 8)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()
    assert (np.diff(scaled) < 0).all()


def test_yarn_keeps_the_first_pairs_and_divides_the_last() -> None:
    plain = rope_frequencies(make_config(head_dim=128), 100)
    for truncate in (True, False):
        scaled = rope_frequencies(yarn_config(truncate=truncate), 100)
        turns = 4096 * plain / (2 * np.pi)
        assert scaled[0] == plain[0]
        np.testing.assert_allclose(scaled[turns < 0.5], plain[turns < 0.5] / 8, rtol=1e-14)
        assert (np.diff(scaled) < 0).all()
    whole = rope_frequencies(yarn_config(truncate=True), 100)
    assert not np.array_equal(whole, scaled)


def test_yarn_attention_factor() -> None:
    assert attention_factor(yarn_config()) == pytest.approx(0.1 * np.log(8.0) + 1.0)
    assert attention_factor(yarn_config(attention_factor=0.9)) == 0.9
    both = yarn_config(mscale=1.0, mscale_all_dim=0.5)
    assert attention_factor(both) == pytest.approx((0.1 * np.log(8.0) + 1) / (0.05 * np.log(8.0) + 1))
    assert attention_factor(yarn_config(mscale=2.0)) == attention_factor(yarn_config())
    assert attention_factor(yarn_config(factor=1.0)) == 1.0
    assert attention_factor(make_config()) == 1.0
    cos, sin = rope_tables(yarn_config(attention_factor=0.9), 50, np.float64)
    np.testing.assert_allclose(np.hypot(cos, sin), 0.9, rtol=1e-14)
