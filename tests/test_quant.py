"""Group quantisation: the error that the README promises, and groups that break naive quantisers."""

from __future__ import annotations

import numpy as np
import pytest

from ffmini.errors import UnsupportedError
from ffmini.quant import GROUP_SIZES, quantize

FORMATS = ("int8", "int4")


def relative_error(w: np.ndarray, back: np.ndarray) -> float:
    return float(np.linalg.norm(w - back) / np.linalg.norm(w))


def round_trip(w: np.ndarray, format: str, group_size: int) -> np.ndarray:
    return quantize(w, format, group_size).dequantize(group_size)


def plain_rounding(w: np.ndarray, format: str, group_size: int) -> np.ndarray:
    """Scale from the largest magnitude, or scale and zero from the range, rounded to fp16; no search."""
    x = w.reshape(len(w), -1, group_size)
    if format == "int8":
        scale = (np.abs(x).max(-1, keepdims=True) / 127).astype(np.float16).astype(np.float32)
        return (np.clip(np.rint(x / scale), -127, 127) * scale).reshape(w.shape)
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    scale = ((high - low) / 15).astype(np.float16).astype(np.float32)
    zero = (-low / scale).astype(np.float16).astype(np.float32)
    return ((np.clip(np.rint(x / scale + zero), 0, 15) - zero) * scale).reshape(w.shape)


@pytest.mark.parametrize(
    ("format", "group_size", "limit"),
    [
        ("int8", 32, 0.01),
        ("int8", 64, 0.01),
        ("int8", 128, 0.01),
        ("int4", 32, 0.071),
        ("int4", 64, 0.083),
        ("int4", 128, 0.093),
    ],
)
def test_error_on_normal_weights(format: str, group_size: int, limit: float) -> None:
    w = np.random.default_rng(1).standard_normal((64, 4096)).astype(np.float32)
    assert relative_error(w, round_trip(w, format, group_size)) <= limit


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_no_group_is_worse_than_plain_rounding(format: str, group_size: int) -> None:
    w = np.random.default_rng(2).standard_t(3, (32, 1024)).astype(np.float32) * np.float32(0.02)

    def errors(back: np.ndarray) -> np.ndarray:
        return np.square(w - back).reshape(-1, group_size).sum(-1)

    searched, plain = errors(round_trip(w, format, group_size)), errors(plain_rounding(w, format, group_size))
    assert (searched <= plain * (1 + 1e-4)).all()
    assert searched.sum() < plain.sum()


@pytest.mark.parametrize("format", FORMATS)
def test_shapes_types_and_ranges(format: str) -> None:
    w = np.random.default_rng(3).standard_normal((5, 172)).astype(np.float32)
    quantized = quantize(w, format, 64)
    assert quantized.codes.shape == (5, 172)
    assert quantized.scale.shape == (5, 3) and quantized.scale.dtype == np.float16
    if format == "int8":
        assert quantized.codes.dtype == np.int8 and quantized.zero is None
        assert np.abs(quantized.codes.astype(int)).max() == 127
    else:
        assert quantized.codes.dtype == np.uint8 and quantized.zero is not None
        assert quantized.zero.shape == (5, 3) and quantized.zero.dtype == np.float16
        assert quantized.codes.max() == 15
    back = quantized.dequantize(64)
    assert back.dtype == np.float32
    assert relative_error(w[:, 128:], back[:, 128:]) < (0.01 if format == "int8" else 0.083)


@pytest.mark.parametrize("format", FORMATS)
def test_short_last_group_equals_that_group_alone(format: str) -> None:
    w = np.random.default_rng(4).standard_normal((16, 128 + 40)).astype(np.float32)
    together = round_trip(w, format, 128)
    np.testing.assert_array_equal(together[:, :128], round_trip(w[:, :128], format, 128))
    np.testing.assert_array_equal(together[:, 128:], round_trip(w[:, 128:], format, 128))


@pytest.mark.parametrize("format", FORMATS)
def test_codes_are_the_nearest_for_the_stored_scale_and_zero(format: str) -> None:
    w = np.random.default_rng(5).standard_normal((8, 256)).astype(np.float32)
    quantized = quantize(w, format, 32)
    scale = np.repeat(quantized.scale.astype(np.float64), 32, axis=1)
    zero = 0 if quantized.zero is None else np.repeat(quantized.zero.astype(np.float64), 32, axis=1)
    low, high = (-127, 127) if format == "int8" else (0, 15)
    distance = np.abs(np.clip(w / scale + zero, low, high) - quantized.codes)
    assert distance.max() <= 0.5 + 1e-5


@pytest.mark.parametrize("format", FORMATS)
def test_zero_groups_are_exact(format: str) -> None:
    w = np.zeros((2, 128), np.float32)
    w[1, 64:] = np.linspace(-1, 1, 64)
    back = round_trip(w, format, 64)
    assert not back[0].any() and not back[1, :64].any()
    assert relative_error(w, back) < 0.07


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [1.0, -0.0371, 1234.5, -40000.0])
def test_constant_groups(format: str, value: float) -> None:
    w = np.full((3, 64), value, np.float32)
    back = round_trip(w, format, 32)
    np.testing.assert_allclose(back, w, rtol=2**-11)  # half a unit in the last place of the scale


def test_groups_far_from_zero_keep_their_spread() -> None:
    rng = np.random.default_rng(6)
    for offset in (3.0, -30.0, 300.0):
        w = (offset + rng.standard_normal((16, 128))).astype(np.float32)
        back = round_trip(w, "int4", 128)
        assert np.abs(w - back).max() < max(1.0, abs(offset) / 500)


@pytest.mark.parametrize("format", FORMATS)
def test_an_outlier_costs_its_own_group_only(format: str) -> None:
    w = np.random.default_rng(7).standard_normal((4, 256)).astype(np.float32)
    alone = round_trip(w, format, 64)
    w[0, 3] = 5000.0
    back = round_trip(w, format, 64)
    assert abs(back[0, 3] - 5000) < 5000 * 0.05
    np.testing.assert_array_equal(back[0, 64:], alone[0, 64:])
    np.testing.assert_array_equal(back[1:], alone[1:])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [1e-3, 1e-5, 1e-6, 1e-7, 1e-9, 1e-30, 1e-42])
def test_tiny_weights_use_subnormal_scales(format: str, size: float) -> None:
    w = (np.random.default_rng(8).standard_normal((4, 64)) * size).astype(np.float32)
    quantized = quantize(w, format, 64)
    assert (quantized.scale > 0).all()
    back = quantized.dequantize(64)
    assert np.isfinite(back).all()
    # Steps can't be smaller than the smallest fp16, 2**-24.
    assert np.abs(w - back).max() <= max(2**-24, np.abs(w).max() * (0.02 if format == "int8" else 0.2))


@pytest.mark.parametrize(("format", "largest"), [("int8", 65504.0 * 127), ("int4", 65504.0 * 7.5)])
def test_largest_weights(format: str, largest: float) -> None:
    w = np.linspace(-largest, largest, 64, dtype=np.float32)[None]
    quantized = quantize(w, format, 64)
    assert np.isfinite(quantized.scale).all()
    assert relative_error(w, quantized.dequantize(64)) < (0.01 if format == "int8" else 0.07)
    with pytest.raises(
        UnsupportedError, match=f"{format} with fp16 scales: expected weights up to .*, found"
    ):
        quantize(w * np.float32(1.01), format, 64)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_weights_are_refused(format: str, value: float) -> None:
    w = np.ones((2, 32), np.float32)
    w[1, 5] = value
    with pytest.raises(UnsupportedError, match=r"found (nan|inf)"):
        quantize(w, format, 32)
