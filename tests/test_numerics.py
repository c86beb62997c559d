"""Activations as integers of a common power of two, against rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffmini.numerics import (
    align,
    from_bf16,
    join_vectors,
    quantize_vectors,
    round_bf16,
    split_bytes,
    split_vectors,
    to_bf16,
)

LARGEST = float(from_bf16(np.array(0x7F7F, np.uint16)))


def bf16(*values: float) -> np.ndarray:
    x = np.array(values, np.float32)
    np.testing.assert_array_equal(x, round_bf16(x))
    return x


@st.composite
def runs(draw: st.DrawFn) -> np.ndarray:
    """Finite bf16 values with exponents near each other, subnormals and zeros among them."""
    top = draw(st.integers(0, 254))
    element = st.tuples(st.integers(0, 1), st.integers(0, 20), st.sampled_from([0, 1, 64, 126, 127]))
    parts = np.array(draw(st.lists(element, min_size=1, max_size=40)))
    exponents = np.maximum(top - parts[:, 1], 0)
    return from_bf16((parts[:, 0] << 15 | exponents << 7 | parts[:, 2]).astype(np.uint16))


def rational_align(x: np.ndarray) -> tuple[list[int], Fraction]:
    """One run's integers and scale: 15 bits below the largest power of two, 14 if they would not do."""
    largest = max(abs(Fraction(float(value))) for value in x)
    exponent = -100
    while largest > Fraction(254, 128) * Fraction(2) ** exponent:
        exponent += 1
    scale = Fraction(2) ** (exponent - 14)
    return [round(Fraction(float(value)) / scale) for value in x], scale


@given(runs(), st.sampled_from([1, 3, 8, 64]))
def test_align_is_rounding_to_the_units_of_each_run(x: np.ndarray, segment: int) -> None:
    q, scale = align(x, segment)
    assert (q.dtype, scale.dtype) == (np.int16, np.float32)
    assert q.shape == x.shape and scale.shape == (-(-len(x) // segment),)
    for run in range(len(scale)):
        part = slice(run * segment, (run + 1) * segment)
        expected, unit = rational_align(x[part])
        assert q[part].tolist() == expected
        assert Fraction(float(scale[run])) == unit


@given(runs())
def test_align_is_as_good_as_it_says(x: np.ndarray) -> None:
    q, scale = align(x, 64)
    assert np.abs(q.astype(int)).max() <= 32512
    largest, unit = float(np.abs(x).max()), float(scale[0])
    assert math.frexp(unit)[0] == 0.5
    back = q * unit
    error = np.abs(back - x.astype(np.float64)).max()
    assert error <= unit / 2
    assert error <= (2.0**-15 * 256 / 255 * largest if largest >= 2.0**-100 else 2.0**-115)
    exact = (np.abs(x) > 2.0**-7 * largest) & (np.abs(x) > 2.0**-107)
    np.testing.assert_array_equal(back[exact], x[exact])
    assert not q[np.abs(x) < 2.0**-126].any()


@given(runs(), runs())
def test_align_takes_rows_one_by_one(x: np.ndarray, y: np.ndarray) -> None:
    count = min(len(x), len(y))
    rows = np.stack((x[:count], y[:count]))
    q, scale = align(rows, 16)
    for row in range(2):
        one, its_scale = align(rows[row], 16)
        np.testing.assert_array_equal(q[row], one)
        np.testing.assert_array_equal(scale[row], its_scale)


@pytest.mark.parametrize(
    ("values", "q", "scale"),
    [
        # Units of 2**-14 beside 1: ties go to the even neighbour, on either side of zero.
        ([1, 0.5 * 2**-14, 1.5 * 2**-14, 2.5 * 2**-14, 3.5 * 2**-14], [16384, 0, 2, 2, 4], 2**-14),
        ([-1, -0.5 * 2**-14, -1.5 * 2**-14, -2.5 * 2**-14], [-16384, 0, -2, -2], 2**-14),
        # A significand of 254 still fits, 255 takes units twice as large.
        ([254 / 128, -254 / 128, 2**-14], [32512, -32512, 1], 2**-14),
        ([255 / 128, -255 / 128, 2**-14], [16320, -16320, 0], 2**-13),
        ([0, -0.0], [0, 0], 2**-114),
        ([LARGEST, -LARGEST, 1], [16320, -16320, 0], 2**114),
        # Units are never below 2**-114; subnormals (here the largest and the smallest) are nothing.
        ([2**-100, 2**-114, 1.5 * 2**-115], [16384, 1, 1], 2**-114),
        ([255 / 256 * 2**-100, 2**-126], [16320, 0], 2**-114),
        ([127 * 2**-133, -(2**-133)], [0, 0], 2**-114),
    ],
)
def test_align_by_example(values: list[float], q: list[int], scale: float) -> None:
    found, found_scale = align(bf16(*values), 256)
    assert found.tolist() == q
    assert found_scale.tolist() == [scale]


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan])
@pytest.mark.filterwarnings("error")
def test_a_run_that_is_not_finite_is_nothing_times_nan(value: float) -> None:
    q, scale = align(np.array([1, 2, 3, value, 5, 6, 7], np.float32), 2)
    assert q.tolist() == [8192, 16384, 0, 0, 5 << 12, 6 << 12, 7 << 12]
    assert np.isnan(scale).tolist() == [False, True, False, False]


def test_bytes_are_those_of_every_integer() -> None:
    q = np.arange(-32512, 32513, dtype=np.int16)
    high, low = split_bytes(q)
    assert high.dtype == low.dtype == np.int8
    assert high.min() == -127 and high.max() == 127
    np.testing.assert_array_equal(256 * high.astype(int) + low, q)


def test_bf16_of_nan_and_infinity() -> None:
    bits = to_bf16(np.array([np.inf, -np.inf, np.nan, LARGEST * 1.001, 3.4e38], np.float32))
    assert bits.tolist() == [0x7F80, 0xFF80, 0x7FC0, 0x7F7F, 0x7F80]


# ---- keys and values as int8 ---------------------------------------------------------------------------


@given(st.lists(st.floats(-(2.0**120), 2.0**120, width=32), min_size=1, max_size=40))
def test_quantized_vectors_are_near(values: list[float]) -> None:
    """Off by half a step at most, and by a few roundings; the largest magnitude has code 127."""
    x = np.array(values, np.float32)
    codes, scale = quantize_vectors(x)
    assert (codes.dtype, scale.dtype, codes.shape, scale.shape) == (np.int8, np.float32, x.shape, ())
    step = float(scale)
    assert (np.abs(codes * step - x.astype(np.float64)) <= 0.5001 * step).all()
    if np.abs(x).max() >= 2.0**-118:
        assert np.abs(codes).max() == 127 and step == pytest.approx(np.abs(x).max() / 127, rel=1e-6)


def test_quantized_vectors_of_known_values() -> None:
    """Ties to even; zeros and vectors too small for a scale become zeros, signs stay."""
    x = np.zeros((4, 5), np.float32)
    x[0] = [127, 0.5, 1.5, -2.5, -126.6]
    x[2] = 2.0**-140
    x[3] = [-(2.0**-118), 2.0**-119, 0, 0, 2.0**-118]
    codes, scale = quantize_vectors(x)
    assert codes.tolist() == [[127, 0, 2, -2, -127], [0] * 5, [0] * 5, [-127, 64, 0, 0, 127]]
    assert scale[0] == 1 and (scale >= 2.0**-126).all()


def test_vectors_in_one_array() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 24), np.float32)
    codes, scale = quantize_vectors(x)
    both = join_vectors(codes, scale)
    assert (both.dtype, both.shape) == (np.uint8, (2, 3, 28))
    for found, expected in zip(split_vectors(both[:, 1:]), (codes[:, 1:], scale[:, 1:]), strict=True):
        np.testing.assert_array_equal(found, expected)
