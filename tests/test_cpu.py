"""The CPU path: bits however positions are grouped, each stage against plain formulas, and refusals."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comparison import ask
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config, tiny_prompt, write_checkpoint

import ffmini.cpu
import ffmini.layout
from ffmini.bench import random_model
from ffmini.candidates import Query, summarise
from ffmini.config import parse_config
from ffmini.convert import pack_checkpoint
from ffmini.cpu import (
    CPUDecoder,
    DenseMatrix,
    QuantizedMatrix,
    held_bytes,
    load_matrix,
    multiply,
    rms_norm,
    silu,
)
from ffmini.errors import GenerationError, MemoryBudgetError
from ffmini.layout import FORMATS, SEGMENT, MatrixLayout
from ffmini.numerics import align, from_bf16, round_bf16
from ffmini.packing import PackedModel, pack_matrix, pack_quantized, unpack_matrix, vector_offsets
from ffmini.passes import Work
from ffmini.quant import GROUP_SIZES, Quantized

LENGTH = 280  # goes beyond a KV block of 256 positions
BF16_ULP = 2.0**-8

MakeModel = Callable[..., PackedModel]


@pytest.fixture(scope="module")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    def make(family: str, dtype: str = "bf16", **changes: Any) -> PackedModel:
        directory = tmp_path_factory.mktemp("tiny")
        write_checkpoint(directory, tiny_config(family, **changes))
        return pack_checkpoint(directory, dtype, 32, progress=False)

    return make


def make_decoder(packed: PackedModel, max_seq_len: int = LENGTH, **options: Any) -> CPUDecoder:
    return CPUDecoder(packed, max_seq_len, progress=False, **options)


def run_in_chunks(decoder: CPUDecoder, tokens: np.ndarray, rows: int) -> np.ndarray:
    starts = range(0, len(tokens), rows)
    return np.concatenate([decoder.forward(tokens[at : at + rows], at, "all") for at in starts])


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# ---- bits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dtype", "kv_dtype"),
    [
        ("llama_biases", "bf16", "bf16"),
        ("mistral", "int8", "int8"),
        ("smollm2", "bf16", "bf16"),
        ("smollm2", "bf16", "int8"),
        ("qwen3", "int4", "bf16"),
        ("qwen3", "int4", "int8"),
    ],
)
def test_grouping_changes_no_bit(make_model: MakeModel, family: str, dtype: str, kv_dtype: str) -> None:
    packed = make_model(family, dtype)
    tokens = tiny_prompt(tiny_config(family), LENGTH)
    expected = make_decoder(packed, kv_dtype=kv_dtype).forward(tokens, 0, "all")
    for rows in (1, 3, 16, 100):
        # A longer cache, with something in it, must not matter either.
        decoder = make_decoder(packed, LENGTH + 50 * rows, kv_dtype=kv_dtype)
        decoder.forward(tokens[::-1], 0, "none")
        np.testing.assert_array_equal(run_in_chunks(decoder, tokens, rows), expected)


PIECES = (1, 3, 16, 128, 300)  # tokens


@pytest.fixture(scope="module", params=["bf16", "int8"])
def told(request: pytest.FixtureRequest, make_model: MakeModel) -> tuple[PackedModel, str, np.ndarray, list]:
    """A model, a kv_dtype, tokens of two sequences [2, 330], and the logits of each alone and at once."""
    packed = make_model("qwen2", "int4")
    tokens = np.stack([tiny_prompt(tiny_config("qwen2"), 330, seed) for seed in range(2)])
    logits = [make_decoder(packed, 330, kv_dtype=request.param).forward(row, 0, "all") for row in tokens]
    return packed, request.param, tokens, logits


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_pieces_drafts_and_company_change_no_bit(told: Any, data: st.DataObject) -> None:
    """Pieces of any size, alone or with another sequence, and guesses that are refused in between."""
    packed, kv_dtype, tokens, logits = told
    decoder = make_decoder(packed, 330, num_slots=2, kv_dtype=kv_dtype)
    asked, done = Query(np.zeros(0, np.int32), np.float32(1)), [0, 0]
    while any(at < 330 for at in done):
        slots = [slot for slot in range(2) if done[slot] < 330]
        if data.draw(st.booleans()):
            slots = slots[:1]
        if data.draw(st.booleans()):  # other tokens, whose keys and values are written over
            at = done[slots[0]]
            others = (tokens[slots[0], at : at + 8] + 1) % packed.config.vocab_size
            decoder.forward(others, at, "none", slots[0])
        works = []
        for slot in slots:
            piece = tokens[slot, done[slot] :][: data.draw(st.sampled_from(PIECES))]
            works.append(Work(slot, piece, done[slot], (asked,) * min(len(piece), 32)))
            done[slot] += len(piece)
        decoder.begin(works)
        for work, said in zip(works, decoder.candidates(), strict=True):
            rows = slice(done[work.slot] - len(said), done[work.slot])
            np.testing.assert_array_equal([one.fetch() for one in said], logits[work.slot][rows])


def test_product_depends_on_a_rows_position_only() -> None:
    rng = np.random.default_rng(0)
    for n, k, m in [
        (40, 48, 64),
        (35, 300, 17),
        (18, 1024, 100),
        (50, 64, 259),
        (33, 2048, 8),
        (20, 5000, 16),
    ]:
        x = rng.standard_normal((n, k), np.float32)
        w = rng.standard_normal((m, k), np.float32)
        start = int(rng.integers(1000))
        expected = multiply(x, w, start)
        for rows in (1, 3, 16):
            pieces = [multiply(x[at : at + rows], w, start + at) for at in range(0, n, rows)]
            np.testing.assert_array_equal(np.concatenate(pieces), expected)
        np.testing.assert_allclose(expected, x.astype(np.float64) @ w.T, rtol=0, atol=1e-6 * k)


@pytest.mark.parametrize("kernels", ["Haswell", "Nehalem"])
def test_grouping_changes_no_bit_with_older_kernels(kernels: str) -> None:
    """OpenBLAS's AVX2 kernels give a row other bits in another place of its block."""
    environment = os.environ | {"OPENBLAS_CORETYPE": kernels, "OPENBLAS_NUM_THREADS": "1"}
    names = (
        "test_product_depends_on_a_rows_position_only",
        "test_grouping_changes_no_bit[smollm2-bf16-bf16]",
        "test_grouping_changes_no_bit[qwen3-int4-int8]",
        "test_a_batch_changes_no_bit[bf16-bf16]",
    )
    command = [sys.executable, "-m", "pytest", "-q", *(f"{__file__}::{name}" for name in names)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- products of int8 and int4 -------------------------------------------------------------------------

QUANTIZED = [(format, size) for format in ("int8", "int4") for size in GROUP_SIZES]


def random_codes(layout: MatrixLayout, seed: int) -> Quantized:
    """Codes of the whole range, and scales and zeros that differ from group to group."""
    rng = np.random.default_rng(seed)
    low, high, kind = (-127, 127, np.int8) if layout.format == "int8" else (0, 15, np.uint8)
    groups = (layout.rows, -(-layout.cols // layout.group_size))
    return Quantized(
        rng.integers(low, high, (layout.rows, layout.cols), kind, endpoint=True),
        rng.uniform(0.001, 0.01, groups).astype(np.float16),
        rng.uniform(-3, 18, groups).astype(np.float16) if layout.format == "int4" else None,
    )


def uneven_rows(count: int, columns: int, seed: int) -> np.ndarray:
    """Activations of exponents so different that the small ones lose bits."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, columns)) * 2.0 ** rng.integers(-12, 4, (count, columns))
    return round_bf16(x.astype(np.float32))


def product_in_integers(
    x: np.ndarray, w: Quantized, group_size: int, segments: range | None = None
) -> np.ndarray:
    """What README's section Numbers says, group by group: int64 sums, float32 operations from there on.

    Of all segments or those given.
    """
    q, power = align(x, SEGMENT)
    total = np.zeros((len(x), len(w.codes)), np.float32)
    for segment in segments or range(power.shape[1]):
        part = np.zeros_like(total)
        end = min((segment + 1) * SEGMENT, x.shape[1])
        for at in range(segment * SEGMENT, end, group_size):
            k, group = slice(at, min(at + group_size, end)), at // group_size
            dot = (q[:, k].astype(np.int64) @ w.codes[:, k].T.astype(np.int64)).astype(np.float32)
            if w.zero is not None:
                sums = q[:, k].sum(axis=1, keepdims=True, dtype=np.int64).astype(np.float32)
                dot = dot - w.zero[:, group].astype(np.float32) * sums
            part = part + w.scale[:, group].astype(np.float32) * dot
        total = total + part * power[:, segment, None]
    return total


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(QUANTIZED),
    st.integers(1, 700),
    st.integers(1, 40),
    st.integers(1, 20),
    st.integers(0, 99),
)
def test_products_are_those_of_integers(
    kind: tuple[str, int], cols: int, rows: int, count: int, seed: int
) -> None:
    layout = MatrixLayout("w", rows, cols, *kind)
    codes, x = random_codes(layout, seed), uneven_rows(count, cols, seed)
    found = load_matrix(pack_quantized(codes, layout), layout, "bf16").product(x, 0)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, product_in_integers(x, codes, layout.group_size))


PARTS = {(300, 1): (1, 2), (1400, 1): (1, 6), (1400, 2): (2, 3), (1400, 4): (3, 2), (1400, 16): (6, 1)}


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: f"{kind[0]}-g{kind[1]}")
@pytest.mark.parametrize(("cols", "most"), PARTS)
def test_parts_of_integers_are_added_one_by_one(
    kind: tuple[str, int], cols: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ffmini.layout, "PART_SEGMENTS", dict.fromkeys(FORMATS, most))
    monkeypatch.setattr(ffmini.cpu, "PRODUCT_ROWS", 10)
    in_part, count = PARTS[cols, most]
    layout = MatrixLayout("w", 23, cols, *kind)
    codes, x = random_codes(layout, 8), uneven_rows(5, cols, 9)
    before = np.random.default_rng(10).standard_normal((5, 23), np.float32)
    expected, kept = before, before.copy()
    for first in range(0, layout.segments, in_part):
        segments = range(first, min(first + in_part, layout.segments))
        expected, count = expected + product_in_integers(x, codes, layout.group_size, segments), count - 1
    assert count == 0
    matrix = load_matrix(pack_quantized(codes, layout), layout, "bf16")
    np.testing.assert_array_equal(matrix.add_product(before, x, 3), expected)
    np.testing.assert_array_equal(before, kept)


@pytest.mark.parametrize("precision", ["bf16", "float64"])
@pytest.mark.parametrize(("cols", "most"), PARTS)
def test_parts_are_added_one_by_one(
    precision: str, cols: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ffmini.layout, "PART_SEGMENTS", dict.fromkeys(FORMATS, most))
    in_part, count = PARTS[cols, most]
    layout = MatrixLayout("w", 23, cols, "bf16")
    weights = np.random.default_rng(7).standard_normal((23, cols), np.float32)
    matrix = load_matrix(pack_matrix(weights, layout), layout, precision)
    w = matrix.rows(np.arange(23))
    x = round_bf16(random_rows(8, cols)).astype(w.dtype)
    before = expected = random_rows(9, 23).astype(w.dtype)
    for k in range(0, cols, in_part * SEGMENT):
        columns = slice(k, k + in_part * SEGMENT)
        expected, count = expected + multiply(x[:, columns], w[:, columns], 3), count - 1
    assert count == 0
    found = matrix.add_product(before, x, 3)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == w.dtype and relative_error(found, before + x.astype(np.float64) @ w.T) < 1e-6


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: f"{kind[0]}-g{kind[1]}")
def test_largest_sums_are_exact(kind: tuple[str, int]) -> None:
    """Codes, high bytes and low bytes at the ends of their ranges, all of one sign: no sum is ever larger."""
    layout = MatrixLayout("w", 2, 512, *kind)
    codes = random_codes(layout, 5)
    codes.codes[...] = 127 if kind[0] == "int8" else 15
    matrix = load_matrix(pack_quantized(codes, layout), layout, "bf16")
    # As integers 32512 (high is 127), 129 * 128 (low is -128), and 32512 beside 127 (low is 127).
    for values in ([254], [129], [254, 127 / 128]):
        x = np.resize(np.array(values, np.float32), (1, 512))
        np.testing.assert_array_equal(matrix.product(x, 0), product_in_integers(x, codes, layout.group_size))


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: f"{kind[0]}-g{kind[1]}")
def test_products_of_many_rows(kind: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows of weights than are multiplied at a time; any number of activations gives the same bits."""
    monkeypatch.setattr(ffmini.cpu, "PRODUCT_ROWS", 200)
    layout = MatrixLayout("w", 530, 300, *kind)
    codes, x = random_codes(layout, 1), uneven_rows(100, 300, 2)
    matrix = load_matrix(pack_quantized(codes, layout), layout, "bf16")
    expected = product_in_integers(x, codes, layout.group_size)
    for rows in (1, 3, 16, 64, 100):
        pieces = [matrix.product(x[at : at + rows], 7 + at) for at in range(0, 100, rows)]
        np.testing.assert_array_equal(np.concatenate(pieces), expected)
    # And they are the products: each activation is off by half a unit at most, sums by some roundings.
    w = codes.dequantize(layout.group_size).astype(np.float64)
    half_units = np.repeat(align(x, SEGMENT)[1] / 2, SEGMENT, axis=1)[:, :300]
    roundings = 2.0**-20 * np.abs(x) @ (np.abs(w) + 18 * 0.01).T
    assert (np.abs(expected - x @ w.T) <= half_units @ np.abs(w).T + roundings).all()


def test_products_of_numbers_that_are_not_finite() -> None:
    layout = MatrixLayout("w", 40, 600, "int4", 64)
    matrix = load_matrix(pack_quantized(random_codes(layout, 3), layout), layout, "bf16")
    x = uneven_rows(4, 600, 4)
    expected = matrix.product(x, 0)
    x[1, 599], x[2, 300] = np.nan, -np.inf
    found = matrix.product(x, 0)
    assert not np.isfinite(found[1:3]).any()
    np.testing.assert_array_equal(found[[0, 3]], expected[[0, 3]])


@pytest.mark.parametrize("kind", [("bf16", 128), *QUANTIZED], ids=lambda kind: f"{kind[0]}-g{kind[1]}")
def test_matrices_hold_what_they_say(kind: tuple[str, int]) -> None:
    layout = MatrixLayout("w", 700, 172, *kind)
    w = np.random.default_rng(6).standard_normal((700, 172), np.float32)
    packed = pack_matrix(w, layout)
    rounded, exact = load_matrix(packed, layout, "bf16"), load_matrix(packed, layout, "float64")
    assert isinstance(rounded, DenseMatrix if kind[0] == "bf16" else QuantizedMatrix)
    assert isinstance(exact, DenseMatrix)
    assert (rounded.nbytes, exact.nbytes) == (held_bytes(layout), held_bytes(layout, "float64"))
    which, expected = np.array([699, 0, 13, 512, 13]), unpack_matrix(packed, layout)
    for matrix, dtype in ((rounded, np.float32), (exact, np.float64)):
        for _ in range(2):  # asking changes nothing
            rows = matrix.rows(which)
            assert rows.dtype == dtype
            np.testing.assert_array_equal(rows, expected[which])
    x = round_bf16(random_rows(8, 172))
    np.testing.assert_array_equal(
        exact.product(x.astype(np.float64), 0), multiply(x.astype(np.float64), expected.astype(np.float64), 0)
    )


# ---- stages --------------------------------------------------------------------------------------------


def dense(packed: PackedModel, name: str, layer: int = 1) -> np.ndarray:
    return unpack_matrix(getattr(packed.layers[layer], name), packed.layouts[name]).astype(np.float64)


def vector(packed: PackedModel, name: str, layer: int = 1) -> np.ndarray:
    offset, length = vector_offsets(packed.config)[name]
    return packed.layers[layer].vectors[offset : offset + length].astype(np.float64)


def norm_times(x: np.ndarray, weight: np.ndarray, eps: float, w: np.ndarray) -> np.ndarray:
    """RMSNorm times w transposed, in double: the weighed x is rounded to bf16, its scale comes last."""
    x = x.astype(np.float64)
    weighed = round_bf16((x * weight).astype(np.float32)).astype(np.float64)
    return weighed @ w.T.astype(np.float64) / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)


@pytest.fixture(scope="module")
def biased(make_model: MakeModel) -> PackedModel:
    return make_model("llama_biases", intermediate_size=100)


def random_rows(seed: int, columns: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((5, columns), np.float32)


def test_embed(make_model: MakeModel) -> None:
    tokens = np.array([0, 7, 258, 7])
    untied = make_model("llama2")
    expected = from_bf16(untied.embed_tokens[tokens])
    np.testing.assert_array_equal(make_decoder(untied).embed(tokens), expected)
    for dtype in FORMATS:
        tied = make_model("smollm2", dtype)
        assert tied.embed_tokens is None
        expected = unpack_matrix(tied.lm_head, tied.layouts["lm_head"])[tokens]
        np.testing.assert_array_equal(make_decoder(tied).embed(tokens), expected)


def test_norm_qkv(biased: PackedModel) -> None:
    x = random_rows(1, 64)
    norm, eps = vector(biased, "input_layernorm"), biased.config.rms_norm_eps
    expected = norm_times(x, norm, eps, dense(biased, "qkv_proj")) + vector(biased, "qkv_bias")
    found = make_decoder(biased).norm_qkv(1, x)
    assert found.dtype == np.float32
    assert relative_error(found, expected) < 1e-6


def test_o_proj(biased: PackedModel) -> None:
    attn, x = round_bf16(random_rows(2, 64)), random_rows(3, 64)
    expected = x + attn @ dense(biased, "o_proj").T + vector(biased, "o_bias")
    assert relative_error(make_decoder(biased).o_proj(1, attn, x), expected) < 1e-6


def test_norm_gate_up_and_down_proj(biased: PackedModel) -> None:
    x = random_rows(4, 64)
    norm, eps = vector(biased, "post_attention_layernorm"), biased.config.rms_norm_eps
    both = norm_times(x, norm, eps, dense(biased, "gate_up_proj")) + vector(biased, "gate_up_bias")
    # 100 is no multiple of 8: the last tile has four rows of gate, four of padding, and so for up.
    gate, up = (both.reshape(5, 13, 2, 8)[:, :, part].reshape(5, -1)[:, :100] for part in (0, 1))
    expected = round_bf16((gate / (1 + np.exp(-gate)) * up).astype(np.float32))
    decoder = make_decoder(biased)
    act = decoder.norm_gate_up(1, x)
    assert act.shape == (5, 100)
    np.testing.assert_array_equal(act, round_bf16(act))
    assert relative_error(act, expected) < 1e-3
    expected = x + act @ dense(biased, "down_proj").T + vector(biased, "down_bias")
    assert relative_error(decoder.down_proj(1, act, x), expected) < 1e-6


def test_norm_lm_head(biased: PackedModel) -> None:
    x = random_rows(5, 64)
    w = unpack_matrix(biased.lm_head, biased.layouts["lm_head"])
    expected = norm_times(x, biased.norm, biased.config.rms_norm_eps, w)
    assert relative_error(make_decoder(biased).norm_lm_head(x), expected) < 1e-6


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_stages_with_products_in_integers(make_model: MakeModel, dtype: str) -> None:
    """Against products in double: activations keep 15 bits beside their segment's largest."""
    packed = make_model("llama_biases", dtype, intermediate_size=300)
    decoder, eps = make_decoder(packed), packed.config.rms_norm_eps
    x, attn, act = random_rows(1, 64), round_bf16(random_rows(2, 64)), round_bf16(random_rows(3, 300))

    norm = vector(packed, "input_layernorm")
    expected = norm_times(x, norm, eps, dense(packed, "qkv_proj")) + vector(packed, "qkv_bias")
    assert relative_error(decoder.norm_qkv(1, x, 3), expected) < 1e-4
    expected = attn @ dense(packed, "o_proj").T + vector(packed, "o_bias")
    assert relative_error(decoder.o_proj(1, attn, 0 * x, 3), expected) < 1e-4
    norm = vector(packed, "post_attention_layernorm")
    both = norm_times(x, norm, eps, dense(packed, "gate_up_proj")) + vector(packed, "gate_up_bias")
    gate, up = (both.reshape(5, 38, 2, 8)[:, :, part].reshape(5, -1)[:, :300] for part in (0, 1))
    assert relative_error(decoder.norm_gate_up(1, x, 3), gate / (1 + np.exp(-gate)) * up) < 0.003
    expected = act @ dense(packed, "down_proj").T + vector(packed, "down_bias")
    assert relative_error(decoder.down_proj(1, act, 0 * x, 3), expected) < 1e-4
    head = unpack_matrix(packed.lm_head, packed.layouts["lm_head"])
    expected = norm_times(x, packed.norm, eps, head)
    assert relative_error(decoder.norm_lm_head(x, 3), expected) < 1e-4


Rounding = Callable[[np.ndarray], np.ndarray]


def plain_attention(
    packed: PackedModel, qkv: np.ndarray, window: int, rounding: Rounding, keeping: Rounding
) -> np.ndarray:
    """Row by row and head by head, one softmax over all visible positions, in double.

    After `rounding` of the queries and `keeping` of keys and values.
    """
    config = packed.config
    theta = config.rope.theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    heads = qkv.astype(np.float64).reshape(len(qkv), -1, config.head_dim)

    def turn(x: np.ndarray, name: str) -> np.ndarray:
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.rms_norm_eps) * vector(packed, name)
        pairs = x[..., : config.head_dim // 2] + 1j * x[..., config.head_dim // 2 :]
        pairs = pairs * np.exp(1j * np.arange(len(x))[:, None, None] * theta)
        return np.concatenate((pairs.real, pairs.imag), axis=-1)

    split = (config.num_heads, config.num_heads + config.num_kv_heads)
    q, k, v = np.split(heads, split, axis=1)
    q, k, v = rounding(turn(q, "q_norm")), keeping(turn(k, "k_norm")), keeping(v)
    out = np.empty_like(q)
    for row in range(len(q)):
        first = max(0, row - window + 1) if window else 0
        for head in range(config.num_heads):
            kv_head = head // (config.num_heads // config.num_kv_heads)
            scores = k[first : row + 1, kv_head] @ q[row, head] / np.sqrt(config.head_dim)
            p = np.exp(scores - scores.max())
            out[row, head] = p / p.sum() @ v[first : row + 1, kv_head]
    return out.reshape(len(qkv), -1)


def kept_in_bf16(x: np.ndarray) -> np.ndarray:
    return round_bf16(x.astype(np.float32)).astype(float)


def kept_in_int8(x: np.ndarray) -> np.ndarray:
    scale = np.abs(x).max(axis=-1, keepdims=True) / 127
    return np.rint(x / scale) * scale


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
@pytest.mark.parametrize("window", [0, 24, 270])
def test_attention(make_model: MakeModel, window: int, kv_dtype: str) -> None:
    sliding = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0} if window else {}
    packed = make_model("qwen3", **sliding)
    assert set(packed.config.layer_windows) == {window}
    columns = (packed.config.num_heads + 2 * packed.config.num_kv_heads) * packed.config.head_dim
    qkv = np.random.default_rng(6).standard_normal((LENGTH, columns), np.float32)
    positions = np.arange(LENGTH)
    exact = make_decoder(packed, precision="float64").attention(1, qkv.astype(np.float64), positions)
    assert relative_error(exact, plain_attention(packed, qkv, window, np.array, np.array)) < 1e-12

    decoder = make_decoder(packed, kv_dtype=kv_dtype)
    found = decoder.attention(1, qkv, positions)
    keeping = {"bf16": kept_in_bf16, "int8": kept_in_int8}[kv_dtype]
    rounded = plain_attention(packed, qkv, window, kept_in_bf16, keeping)
    assert 1e-4 < relative_error(found, rounded) < BF16_ULP
    for array in (found, decoder.key_cache, decoder.value_cache):
        np.testing.assert_array_equal(array, round_bf16(array))
    assert not decoder.key_cache[0].any()


def test_rms_norm_and_silu() -> None:
    x = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
    weight = np.array([1.0, -2.0], np.float32)
    np.testing.assert_allclose(
        rms_norm(x, weight, 0.0 + 1e-12)[0], [3 / 12.5**0.5, -8 / 12.5**0.5], rtol=1e-6
    )
    np.testing.assert_array_equal(rms_norm(x, weight, 1e-6)[1], [0.0, 0.0])
    x = np.array([-1000.0, -1.0, 0.0, 1000.0], np.float32)
    np.testing.assert_allclose(silu(x), [0.0, -1 / (1 + np.e), 0.0, 1000.0], rtol=1e-6)


# ---- whole passes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
@pytest.mark.parametrize("dtype", FORMATS)
def test_rounding_costs_little(make_model: MakeModel, dtype: str, kv_dtype: str) -> None:
    packed = make_model("llama3.1", dtype)
    tokens = tiny_prompt(tiny_config("llama3.1"), LENGTH)
    truth = make_decoder(packed, precision="float64", kv_dtype=kv_dtype).forward(tokens, 0, "all")
    found = make_decoder(packed, kv_dtype=kv_dtype).forward(tokens, 0, "all")
    assert (truth.dtype, found.dtype) == (np.float64, np.float32)
    assert 1e-4 < relative_error(found, truth) < 0.03


def test_which_logits(make_model: MakeModel) -> None:
    packed = make_model("llama2")
    tokens = tiny_prompt(tiny_config("llama2"), 150)
    everything = make_decoder(packed).forward(tokens, 0, "all")
    assert everything.shape == (150, 259)
    np.testing.assert_array_equal(make_decoder(packed).forward(tokens, 0), everything[-1:])
    decoder = make_decoder(packed)
    assert decoder.forward(tokens[:-1], 0, "none").shape == (0, 259)
    np.testing.assert_array_equal(decoder.forward(tokens[-1:], 149), everything[-1:])


@pytest.mark.parametrize("precision", ["bf16", "float64"])
def test_candidates_are_of_the_last_row(make_model: MakeModel, precision: str) -> None:
    packed = make_model("llama2")
    tokens = tiny_prompt(tiny_config("llama2"), 12)
    logits = make_decoder(packed, precision=precision).forward(tokens, 0)[0].astype(np.float32)
    queried = np.array([7, 3, 250], np.int32)
    decoder = make_decoder(packed, precision=precision)
    decoder.forward(tokens[:5], 0, "none")
    for ahead in (False, True):
        found = ask(decoder, tokens[5:], 5, Query(queried, np.float32(2)), ahead)
        decoder.settle()
        assert found.queried.tolist() == logits[queried].tolist()
        assert (found.fetch().dtype, found.fetch().tolist()) == (np.float32, logits.tolist())
        order = [i for i in np.argsort(-logits, kind="stable") if i not in queried]
        assert found.ids.tolist() == order and found.complete


# ---- several sequences ---------------------------------------------------------------------------------

SLOTS, LONGEST = 3, 90  # a group of rows has 64


KINDS = [("mistral", "bf16", "bf16"), ("qwen3", "int4", "bf16"), ("mistral", "int4", "int8")]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: "-".join(kind[1:]))
def alone(
    request: pytest.FixtureRequest, make_model: MakeModel
) -> tuple[PackedModel, str, np.ndarray, list[np.ndarray], list[tuple[np.ndarray, np.ndarray]]]:
    """A model, a kv_dtype, tokens [SLOTS, LONGEST], and of each row alone logits and K and V."""
    family, dtype, kv_dtype = request.param
    packed = make_model(family, dtype)
    config = tiny_config(family)
    tokens = np.stack([tiny_prompt(config, LONGEST, seed) for seed in range(SLOTS)])
    logits, caches = [], []
    for row in tokens:
        decoder = make_decoder(packed, LONGEST, kv_dtype=kv_dtype)
        logits.append(decoder.forward(row, 0, "all"))
        caches.append(decoder.read_cache(0, LONGEST))
    return packed, kv_dtype, tokens, logits, caches


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_batch_changes_no_bit(alone: Any, data: st.DataObject) -> None:
    """Rows in any order and company, asked about or not, say what they say alone and leave its K and V."""
    packed, kv_dtype, tokens, logits, caches = alone
    decoder = make_decoder(packed, LONGEST, num_slots=SLOTS, kv_dtype=kv_dtype)
    done = [0] * SLOTS
    ids = np.array([3, 250], np.int32)
    while any(at < LONGEST for at in done):
        slots = data.draw(st.permutations([slot for slot in range(SLOTS) if done[slot] < LONGEST]))
        works, room = [], decoder.max_rows
        for slot in slots[: data.draw(st.integers(1, len(slots)))]:
            count = data.draw(st.integers(1, LONGEST - done[slot]))
            asked = data.draw(st.integers(0, min(count, 20, room)))
            room -= asked
            queries = tuple(Query(ids[: i % 3], np.float32(1 + i)) for i in range(asked))
            works.append(Work(slot, tokens[slot, done[slot] : done[slot] + count], done[slot], queries))
            done[slot] += count
        decoder.begin(works)
        for work, said in zip(works, decoder.candidates(), strict=True):
            assert len(said) == len(work.queries)
            first = done[work.slot] - len(said)
            for row, (found, query) in enumerate(zip(said, work.queries, strict=True), first):
                expected = summarise(logits[work.slot][row], query)
                assert found.finite and found.total == expected.total
                np.testing.assert_array_equal(found.fetch(), logits[work.slot][row])
                np.testing.assert_array_equal(found.queried, expected.queried)
                np.testing.assert_array_equal(found.ids, expected.ids)
    for slot in range(SLOTS):
        for found, expected in zip(decoder.read_cache(slot, LONGEST), caches[slot], strict=True):
            np.testing.assert_array_equal(found, expected)


def test_in_float64_keys_and_values_are_not_int8(alone: Any) -> None:
    """Whatever their dtype: what is read can be written."""
    packed, kv_dtype, tokens, _, _ = alone
    decoder = make_decoder(packed, LONGEST, kv_dtype=kv_dtype, precision="float64")
    decoder.forward(tokens[0, :9], 0, "none")
    keys, values = decoder.read_cache(0, 9)
    assert keys.dtype == values.dtype == np.uint16
    decoder.write_cache(0, keys, values)
    for found, expected in zip(decoder.read_cache(0, 9), (keys, values), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_written_cache_is_as_good_as_a_run_prompt(alone: Any) -> None:
    packed, kv_dtype, tokens, logits, caches = alone
    decoder = make_decoder(packed, 2 * LONGEST, num_slots=2, kv_dtype=kv_dtype)
    decoder.forward(tokens[1], 0, "none", slot=1)
    decoder.write_cache(1, *(bits[:, :, :70] for bits in caches[0]))
    np.testing.assert_array_equal(decoder.forward(tokens[0, 70:], 70, "all", slot=1), logits[0][70:])
    assert not decoder.key_cache[:, 0].any()
    size = {"bf16": "n, 32", "int8": "n, 36"}[kv_dtype]
    with pytest.raises(ValueError, match=rf"int\d+ \[2, 2, {size}\] expected, found uint\d+ \[2, 90, 3\d\]"):
        decoder.write_cache(0, *(bits[:, 0] for bits in caches[0]))
    with pytest.raises(ValueError, match="at most 180 positions expected, found 270"):
        decoder.write_cache(0, *(np.repeat(bits, 3, axis=2) for bits in caches[0]))
    with pytest.raises(ValueError, match="finite numbers expected"):
        decoder.write_cache(0, caches[0][0], caches[0][1] | (0x7F80 if kv_dtype == "bf16" else 0xFF))
    assert not decoder.key_cache[:, 0].any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("bad_slot", [0, 1])
def test_a_sequence_that_is_not_finite_harms_no_other(
    make_model: MakeModel, dtype: str, bad_slot: int
) -> None:
    packed = make_model("llama2", dtype)
    good, asked = np.array([5, 6, 7]), Query(np.zeros(0, np.int32), np.float32(1))
    expected = make_decoder(packed).forward(good, 0, "all")
    packed.embed_tokens[9] = 0x7F80
    decoder = make_decoder(packed, num_slots=2)
    works = [Work(slot, good, 0, (asked,) * 3) for slot in range(2)]
    works[bad_slot] = Work(bad_slot, np.array([5, 9, 7]), 0, (asked,) * 2)
    decoder.begin(works)
    said = decoder.candidates()
    assert [found.finite for found in said[bad_slot]] == [False, False]
    with pytest.raises(ValueError, match="finite"):
        said[bad_slot][0].fetch()
    found = np.stack([row.fetch() for row in said[1 - bad_slot]])
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(decoder.forward(good, 0, "all", bad_slot), expected)


@pytest.mark.parametrize(
    ("works", "ahead", "message"),
    [
        ([], False, r"distinct slots expected, found \[\]"),
        ([(0, 1, 1), (0, 1, 1)], False, r"distinct slots expected, found \[0, 0\]"),
        ([(2, 1, 1)], False, "slot 2 asked for, 0 to 1 exist"),
        ([(0, 1, 2)], False, "2 rows queried, there are 1"),
        ([(0, 40, 40), (1, 40, 25)], False, "at most 64 rows can be queried together, found 65"),
        ([(0, 1, 1), (1, 1, 0)], True, "a pass ahead of one query expected"),
        ([(0, 2, 2)], True, "a pass ahead of one query expected"),
        ([(0, 281, 1)], False, "positions 0 to 280 asked for"),
    ],
)
def test_refused_works(
    biased: PackedModel, works: list[tuple[int, int, int]], ahead: bool, message: str
) -> None:
    asked = Query(np.zeros(0, np.int32), np.float32(1))
    decoder = make_decoder(biased, num_slots=2)
    with pytest.raises(ValueError, match=message):
        decoder.begin([Work(slot, np.zeros(n, int), 0, (asked,) * m) for slot, n, m in works], ahead)
    with pytest.raises(ValueError, match="none were run"):
        decoder.candidates()


def test_a_sequence_can_be_cut_and_continued(make_model: MakeModel) -> None:
    packed = make_model("mistral")
    tokens = tiny_prompt(tiny_config("mistral"), 60)
    decoder = make_decoder(packed)
    decoder.forward(np.concatenate((tokens[:30], tokens[:30])), 0, "none")
    found = decoder.forward(tokens[30:], 30, "all")
    np.testing.assert_array_equal(found, make_decoder(packed).forward(tokens, 0, "all")[30:])


@pytest.mark.parametrize(
    ("tokens", "start", "logits", "message"),
    [
        ([], 0, "last", "R > 0"),
        ([[1, 2]], 0, "last", r"\[1, 2\]"),
        ([1.0], 0, "last", "float64"),
        ([259], 0, "last", r"\[0, 259\)"),
        ([-1], 0, "last", "-1"),
        ([1], -1, "last", "positions -1 to -1 asked for, 0 to 279 exist"),
        ([1, 2], 279, "last", "positions 279 to 280 asked for, 0 to 279 exist"),
        ([1], 0, "first", "'first'"),
    ],
)
def test_refused_arguments(
    biased: PackedModel, tokens: list[Any], start: int, logits: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_decoder(biased).forward(np.array(tokens), start, logits)


def test_refused_precision(biased: PackedModel) -> None:
    with pytest.raises(ValueError, match="float16"):
        make_decoder(biased, precision="float16")


def test_closed(biased: PackedModel) -> None:
    decoder = make_decoder(biased)
    decoder.close()
    decoder.close()
    with pytest.raises(ValueError, match="closed"):
        decoder.forward(np.array([1]), 0)


def test_memory_is_checked_before_it_is_taken(biased: PackedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    # The KV cache: 2 x 2 layers x 2 heads x 2^20 positions x 16 x 4 bytes.
    monkeypatch.setattr(ffmini.cpu, "available_memory", lambda: 300 << 20)
    make_decoder(biased)
    with pytest.raises(MemoryBudgetError, match=r"KV cache 512 MiB \+ .* needed, 300 MiB free"):
        make_decoder(biased, 1 << 20)
    with pytest.raises(MemoryBudgetError, match=r"KV cache 512 MiB \+ .* needed, 300 MiB free"):
        make_decoder(biased, 1 << 16, num_slots=16)
    monkeypatch.setattr(ffmini.cpu, "available_memory", lambda: 1 << 10)
    with pytest.raises(MemoryBudgetError, match="0 MiB free"):
        make_decoder(biased)


@pytest.mark.parametrize(
    "options", [{}, {"kv_dtype": "int8"}, {"precision": "float64"}], ids=lambda x: "".join(x.values())
)
@pytest.mark.parametrize("dtype", FORMATS)
def test_memory_taken_is_what_was_checked(
    dtype: str, options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and cache to within a few percent; the scratch of 64 rows with all their logits in a bound."""
    shape = {"hidden_size": 512, "intermediate_size": 1408, "vocab_size": 20000, "num_hidden_layers": 4}
    packed = random_model(parse_config(tiny_config("llama2", **shape), "test"), dtype)
    with monkeypatch.context() as patch, pytest.raises(MemoryBudgetError) as refusal:
        patch.setattr(ffmini.cpu, "available_memory", lambda: 0)
        make_decoder(packed, 256, **options)
    figures = re.findall(r"(\d+) MiB", str(refusal.value))
    weights, cache, scratch, _ = (int(figure) << 20 for figure in figures)
    with monkeypatch.context() as patch, pytest.raises(MemoryBudgetError):
        patch.setattr(ffmini.cpu, "available_memory", lambda: weights + cache + scratch // 2)
        make_decoder(packed, 256, **options)
    tracemalloc.start()
    try:
        decoder = make_decoder(packed, 256, **options)
        held = tracemalloc.get_traced_memory()[0]
        decoder.forward(np.arange(64), 0, "all")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert held == pytest.approx(weights + cache, rel=0.02)
    assert scratch / 8 < peak - held < scratch


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_numbers_raise_and_leave_the_decoder_usable(
    make_model: MakeModel, value: float, dtype: str
) -> None:
    packed = make_model("llama2", dtype)
    good = np.array([5, 6, 7])
    expected = make_decoder(packed).forward(good, 0, "all")
    packed.embed_tokens[9] = np.float32(value).view(np.uint32) >> 16
    decoder = make_decoder(packed)
    with pytest.raises(GenerationError, match="finite"):
        decoder.forward(np.array([5, 9, 7]), 0)
    np.testing.assert_array_equal(decoder.forward(good, 0, "all"), expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", FORMATS)
def test_non_finite_logits_raise(make_model: MakeModel, dtype: str) -> None:
    packed = make_model("llama2", dtype)
    packed.norm[3] = np.inf
    with pytest.raises(GenerationError, match="logits"):
        make_decoder(packed).forward(np.array([5, 6, 7]), 0)
