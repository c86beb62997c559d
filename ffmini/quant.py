"""int8 and int4 quantisation of weight rows in groups along k, without calibration data.

A group of float32 weights x becomes codes q with one fp16 scale (int8: w = scale * q, |q| <= 127) or one fp16
scale and one fp16 zero (int4: w = scale * (q - zero), 0 <= q <= 15; the zero is a real number in units of q).
Scale and zero are searched per group for the least squared error: a grid of clipped ranges, then rounds of
{least squares for the codes at hand, new codes}. Each candidate is judged with its scale and zero as rounded
to fp16, so the result is never worse than plain rounding over the whole range.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ffmini.errors import UnsupportedError
from ffmini.layout import ceil_div

GROUP_SIZES = (32, 64, 128)
_CODES = {"int8": (-127, 127), "int4": (0, 15)}
# Fractions of the range kept: on both sides alike for int8, on each side by itself for int4.
_RATIOS = {"int8": (1.0, 0.98, 0.96, 0.94, 0.92, 0.9), "int4": (1.0, 0.9375, 0.875, 0.8125, 0.75)}
_REFITS = {"int8": 2, "int4": 3}
_FP16_MAX = 65504.0
_FP16_MIN = 2.0**-24
_MAX_ZERO = 256  # a group far from 0 gets coarser steps rather than a zero that fp16 rounds away
_CHUNK = 1 << 16  # weights searched at a time: their few work arrays stay in the L2 cache


@dataclass(frozen=True)
class Quantized:
    """Quantised rows: w = scale * q, or scale * (q - zero) if there is a zero.

    codes: int8 (int8) or uint8 of 0..15 (int4), [rows, cols]; scale, zero: float16 [rows, groups], the last
    group of a row being perhaps shorter than the others; zero is None for int8.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None

    def dequantize(self, group_size: int) -> np.ndarray:
        """The float32 weights [rows, cols], computed in float32."""
        rows, cols = self.codes.shape
        w = self.codes.astype(np.float32)
        for columns, groups, size in _runs(cols, group_size):
            part = w[:, columns].reshape(rows, -1, size)
            if self.zero is not None:
                part = part - self.zero[:, groups, None].astype(np.float32)
            w[:, columns] = (part * self.scale[:, groups, None].astype(np.float32)).reshape(rows, -1)
        return w


def quantize(w: np.ndarray, format: str, group_size: int) -> Quantized:
    """Quantise float32 `w` [rows, cols] to `format` "int8" or "int4" in groups of `group_size` columns.

    Each group is treated by itself, so rows may come in blocks. Raises UnsupportedError if a weight is not
    finite or too large for an fp16 scale.
    """
    low, high = _CODES[format]
    limit = _FP16_MAX * (high - low) / 2
    largest = float(np.abs(w).max(initial=0.0))
    if not largest <= limit:
        raise UnsupportedError(
            f"{format} with fp16 scales: expected weights up to {limit:g}, found {largest:g}"
        )
    rows, cols = w.shape
    groups = ceil_div(cols, group_size)
    codes = np.empty((rows, cols), np.int8 if format == "int8" else np.uint8)
    scale = np.empty((rows, groups), np.float16)
    zero = None if format == "int8" else np.empty((rows, groups), np.float16)
    search = _search_int8 if format == "int8" else _search_int4
    step = max(1, _CHUNK // cols)
    for columns, group_range, size in _runs(cols, group_size):
        for first in range(0, rows, step):
            block = slice(first, first + step)
            x = np.ascontiguousarray(w[block, columns].reshape(-1, size).T, dtype=np.float32)
            candidates = search(x)
            count = len(w[block])
            codes[block, columns] = candidates.codes().T.reshape(count, -1)
            scale[block, group_range] = candidates.scale.reshape(count, -1)
            if zero is not None:
                zero[block, group_range] = candidates.zero.reshape(count, -1)
    return Quantized(codes, scale, zero)


def _runs(cols: int, group_size: int) -> Iterator[tuple[slice, slice, int]]:
    """Columns, groups and group length of the whole groups of a row, then of the shorter last one."""
    whole = cols // group_size
    if whole:
        yield slice(0, whole * group_size), slice(0, whole), group_size
    if cols % group_size:
        yield slice(whole * group_size, cols), slice(whole, whole + 1), cols % group_size


class _Candidates:
    """The best scale and zero so far of each group, one group per column of `x` [size, groups]."""

    def __init__(self, x: np.ndarray, format: str) -> None:
        self.x = x
        self.low, self.high = _CODES[format]
        groups = x.shape[1]
        self.scale = np.zeros(groups, np.float32)
        self.zero = np.zeros(groups, np.float32)
        self.error = np.full(groups, np.inf, np.float32)
        self._in_codes = np.empty_like(x)
        self._rounded = np.empty_like(x)

    def offer(self, scale: np.ndarray, zero: np.ndarray | None) -> None:
        """Keep the scale (fp16 values) and zero (rounded here), float32 [groups], where the error is less."""
        zero = np.zeros_like(scale) if zero is None else _fp16(np.clip(zero, -_MAX_ZERO, _MAX_ZERO))
        q = self._encode(scale, zero)
        np.subtract(q, self._in_codes, out=q)
        np.multiply(q, q, out=q)
        error = q.sum(axis=0) * (scale * scale)
        better = error < self.error
        self.scale = np.where(better, scale, self.scale)
        self.zero = np.where(better, zero, self.zero)
        self.error = np.where(better, error, self.error)

    def codes(self) -> np.ndarray:
        """The codes of the best candidates, float32 [size, groups]; overwritten by the next call."""
        return self._encode(self.scale, self.zero)

    def _encode(self, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
        np.multiply(self.x, inverse, out=self._in_codes)
        np.add(self._in_codes, zero, out=self._in_codes)
        np.rint(self._in_codes, out=self._rounded)
        return np.clip(self._rounded, self.low, self.high, out=self._rounded)


def _search_int8(x: np.ndarray) -> _Candidates:
    """Symmetric: scales from the largest magnitude, then sum(x q) / sum(q q)."""
    best = _Candidates(x, "int8")
    step = np.abs(x).max(axis=0) / np.float32(best.high)
    best.offer(_fp16_above(step), None)
    for ratio in _RATIOS["int8"]:
        best.offer(_fp16_scale(step * np.float32(ratio)), None)
    for _ in range(_REFITS["int8"]):
        q = best.codes()
        squares = (q * q).sum(axis=0)
        fitted = np.divide((q * x).sum(axis=0), squares, out=best.scale.copy(), where=squares > 0)
        best.offer(_fp16_scale(fitted), None)
    return best


def _search_int4(x: np.ndarray) -> _Candidates:
    """Asymmetric: both ends of the range clipped by themselves, then the regression of x on its codes."""
    best = _Candidates(x, "int4")
    low, high = x.min(axis=0), x.max(axis=0)
    middle, half = (low + high) / 2, (high - low) / 2
    coarsest = np.maximum(-low, high) / np.float32(_MAX_ZERO)
    scale = _fp16_above((np.maximum(high, 0) - np.minimum(low, 0)) / np.float32(best.high))
    best.offer(scale, _divide(-np.minimum(low, 0), scale))
    for kept_low in _RATIOS["int4"]:
        bottom = middle - half * np.float32(kept_low)
        for kept_high in _RATIOS["int4"]:
            top = middle + half * np.float32(kept_high)
            scale = _fp16_scale(np.maximum((top - bottom) / np.float32(best.high), coarsest))
            best.offer(scale, _divide(-bottom, scale))
    mean_x = x.mean(axis=0)
    for _ in range(_REFITS["int4"]):
        q = best.codes()
        mean_q = q.mean(axis=0)
        q -= mean_q
        slope = _divide((q * x).sum(axis=0), (q * q).sum(axis=0))
        scale = _fp16_scale(np.where(slope > 0, np.maximum(slope, coarsest), best.scale))
        best.offer(scale, mean_q - _divide(mean_x, scale))
    return best


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros_like(a), where=b != 0)


def _fp16_scale(x: np.ndarray) -> np.ndarray:
    """Positive `x` rounded to the nearest positive finite fp16 value; 0 stays 0."""
    return np.where(x > 0, _fp16(np.clip(x, _FP16_MIN, _FP16_MAX)), np.float32(0))


def _fp16_above(x: np.ndarray) -> np.ndarray:
    """The smallest fp16 value from `x` up, or the largest of all: a step that covers the whole range."""
    near = np.minimum(x, np.float32(_FP16_MAX)).astype(np.float16)
    return np.where(near < x, np.nextafter(near, np.float16(_FP16_MAX)), near).astype(np.float32)


def _fp16(x: np.ndarray) -> np.ndarray:
    """Float32 `x` rounded to the nearest fp16 value, kept as float32."""
    return x.astype(np.float16).astype(np.float32)
