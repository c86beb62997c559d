"""bf16 in NumPy, which has no such type: a bf16 array is a uint16 array of its bit patterns.

And the integers that activations become where they are multiplied by int8 and int4 codes.
"""

from __future__ import annotations

import numpy as np

_LEAST_LARGEST = np.float32(2.0**-118)  # of a vector's magnitudes, so that its scale is a normal number
_MIN_EXPONENT = 27  # biased: align()'s units are 2**-114 or larger, and their inverses normal numbers


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Round float32 `x` (any shape) to bf16 bits (uint16, same shape), ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, (bits >> 16) | 0x40, rounded).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """The float32 values (same shape) of bf16 `bits` (uint16); exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_bf16(x: np.ndarray) -> np.ndarray:
    """Float32 `x` rounded to the nearest bf16 value, kept as float32."""
    return from_bf16(to_bf16(x))


def align(x: np.ndarray, segment: int) -> tuple[np.ndarray, np.ndarray]:
    """Bf16 values `x` (float32 [..., k]) as integers that share a power of two in each run of `segment` k.

    Returns int16 q [..., k], |q| <= 32512, and float32 scale [..., runs], powers of two; q is x / scale, ties
    to even. With `largest` the largest magnitude of a run, scale * q is off by half of scale at most: by
    2**-15 * 256 / 255 of `largest`, or by 2**-115 where `largest` is below 2**-100. It is exact where |x| is
    above 2**-7 of `largest` and above 2**-107; bf16 subnormals become 0. A run with infinity or NaN gets
    q = 0 and scale NaN.
    """
    k = x.shape[-1]
    runs = np.zeros((*x.shape[:-1], -(-k // segment), segment), np.float32)
    runs.reshape(*x.shape[:-1], -1)[..., :k] = x
    largest = np.abs(runs).max(axis=-1).view(np.uint32) >> 16  # as bf16 bits; NaN is above infinity
    # The biased exponent of 2**14 units; the next one where the largest significand is 255, so that q fits.
    exponent = np.maximum((largest + 1) >> 7, _MIN_EXPONENT)
    finite = largest < 0x7F80
    scale = np.where(finite, (exponent - 14) << 23, 0x7FC00000).astype(np.uint32).view(np.float32)
    inverse = ((268 - exponent) << 23).view(np.float32)
    q = np.rint(np.where(finite[..., None], runs, 0) * inverse[..., None]).astype(np.int16)
    return q.reshape(*x.shape[:-1], -1)[..., :k], scale


def quantize_vectors(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finite float32 vectors `x` [..., n] as int8 codes [..., n] and a float32 scale [...] for each.

    x is scale * code: the largest magnitude has code 127 or -127, others are rounded, ties to even. A vector
    of magnitudes below about 2**-126 becomes zeros. As HeadVector::quantize() in cuda/arithmetic.cuh, to the
    bit.
    """
    largest = np.maximum(np.abs(x).max(axis=-1), _LEAST_LARGEST)
    codes = np.rint(x * (np.float32(127) / largest)[..., None]).astype(np.int8)
    return codes, largest * np.float32(1 / 127)


def join_vectors(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """What quantize_vectors() gives as uint8 [..., n + 4]: the codes, then the scale's four bytes."""
    scale_bytes = np.ascontiguousarray(scale, "<f4")[..., None].view(np.uint8)
    return np.concatenate((np.ascontiguousarray(codes).view(np.uint8), scale_bytes), axis=-1)


def split_vectors(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The reverse: codes int8 [..., n] and scale float32 [...] of uint8 [..., n + 4]."""
    codes = np.ascontiguousarray(vectors[..., :-4]).view(np.int8)
    return codes, np.ascontiguousarray(vectors[..., -4:]).view("<f4")[..., 0]


def split_bytes(q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Int16 `q` of align() as 256 * high + low: int8 high in -127 .. 127 and low in -128 .. 127."""
    high = (q + 128) >> 8
    return high.astype(np.int8), (q - 256 * high).astype(np.int8)
