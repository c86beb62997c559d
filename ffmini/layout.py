"""Where each weight lies in the packed form: the one truth that packing, the CPU path and the kernel share.
At the end: where elements lie in the kernel's KV cache.

A matrix [rows, cols] is cut into tiles of 16 rows. A tile is a run of slots in ascending k; a slot is
what one warp fetches at a time: up to four lines of 512 bytes, 16 for each of 32 lanes, then the scales of
the groups that the slot covers. A line's registers are those of an A operand: of mma.m16n8k16 on bf16, of
mma.m16n8k32 on 8-bit integers for int8 and int4, whose codes are multiplied as they are stored.

Element (r, k) of a tile, with t = k % 32 // 8, s = k % 8 // 4, g = r % 8, hi = r // 8 (so that a lane
finds its eight activations of a 32-block of k side by side), belongs to lane 4 * g + t and lies in

- bf16: line 2 * (k // 32) + s, register 2 * (k % 4 // 2) + hi, bytes 2 * (k % 2) of the register's 4;
- int8: line k // 32, register 2 * s + hi, byte k % 4 (two's complement);
- int4: line k // 64, 32-bit word 2 * (k // 32 % 2) + s, byte k % 4, low nibble for hi = 0 and high nibble
  for hi = 1 (unsigned): the kernel takes the word as it is for register 2 * s and with the
  low nibbles gone, 16 times the codes, for register 2 * s + 1.

Scales follow a slot's lines as [group][16 rows] of fp16 scale (int8) or of fp16 scale, fp16 zero
(int4): w = scale * q for int8 and scale * (q - zero) for int4. Rows and columns beyond the matrix are
padding: scale 0 in rows, and any finite weight in columns, where activations are zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TILE_ROWS = 16
SEGMENT = 256  # the canonical order of sums: each run of 256 k starts from zero (README, Numbers)
# Of a part, at most: matrices that add to the residual stream (o_proj, down_proj) add one part of their input
# after the other to it. Of activations that become integers a block does better with fewer.
PART_SEGMENTS = {"bf16": 16, "int8": 8, "int4": 8}
KV_BLOCK = 256  # absolute positions per partial softmax
LINE_BYTES = 512
LINES_PER_SLOT = 4
K_ALIGN = 64
FORMAT_BITS = {"bf16": 16, "int8": 8, "int4": 4}  # of an element
FORMATS = tuple(FORMAT_BITS)
LINE_K = {"bf16": 16, "int8": 32, "int4": 64}
SCALE_BYTES = {"bf16": 0, "int8": 2, "int4": 4}  # for one row of one group
KV_DTYPES = ("bf16", "int8")  # of keys and values
KEY_ROTATION, VALUE_ROTATION = 4, 1  # pieces per position, see in_order()
SCALE_ITEMSIZE = 4  # of an int8 vector's fp32 scale
KV_SLOT_BYTES = {"bf16": 2048, "int8": 2304}  # at most, of what a warp fetches at a time of keys or values


def ceil_div(a: int, b: int) -> int:
    """The smallest integer that is at least a / b."""
    return -(-a // b)


@dataclass(frozen=True)
class MatrixLayout:
    """Geometry of one packed matrix: every figure that packers and kernel need follows from these five."""

    name: str
    rows: int
    cols: int
    format: str
    group_size: int = 128

    @property
    def tiles(self) -> int:
        return ceil_div(self.rows, TILE_ROWS)

    @property
    def k_pad(self) -> int:
        return ceil_div(self.cols, K_ALIGN) * K_ALIGN

    @property
    def segments(self) -> int:
        return ceil_div(self.k_pad, SEGMENT)

    @property
    def part_segments(self) -> int:
        """Segments of each part of the input but, perhaps, the last."""
        return ceil_div(self.segments, ceil_div(self.segments, PART_SEGMENTS[self.format]))

    @property
    def slot_k(self) -> int:
        """How many k a full slot covers: 64, 128 or 256."""
        return LINES_PER_SLOT * LINE_K[self.format]

    @property
    def slots(self) -> int:
        """Slots of one tile; all are full but, perhaps, the last."""
        return ceil_div(self.k_pad, self.slot_k)

    @property
    def slot_bytes(self) -> int:
        return self._bytes_of(self.slot_k)

    @property
    def tail_bytes(self) -> int:
        """Bytes of a tile's last slot."""
        return self._bytes_of(self.k_pad - (self.slots - 1) * self.slot_k)

    @property
    def tile_bytes(self) -> int:
        return (self.slots - 1) * self.slot_bytes + self.tail_bytes

    @property
    def nbytes(self) -> int:
        return self.tiles * self.tile_bytes

    @property
    def groups(self) -> int:
        """Scale groups along k, the last one perhaps partly padding."""
        return 0 if self.format == "bf16" else ceil_div(self.k_pad, self.group_size)

    def _bytes_of(self, k: int) -> int:
        lines = k // LINE_K[self.format] * LINE_BYTES
        if self.format == "bf16":
            return lines
        return lines + ceil_div(k, self.group_size) * TILE_ROWS * SCALE_BYTES[self.format]


@dataclass(frozen=True)
class VectorLayout:
    """What a key or a value is outside of the kernel, its plain form, and in the kernel's cache.

    bf16: head_dim bit patterns (uint16), in the cache rotated. int8: head_dim codes and the four bytes of
    their fp32 scale (uint8), in the cache padded to a multiple of 16 (cuda/vectors.cuh).
    """

    head_dim: int
    kv_dtype: str

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        return np.uint16 if self.kv_dtype == "bf16" else np.uint8

    @property
    def plain_size(self) -> int:
        """Elements of a plain vector."""
        return self.head_dim if self.kv_dtype == "bf16" else self.head_dim + SCALE_ITEMSIZE

    @property
    def cached_size(self) -> int:
        """Elements of a vector in the cache."""
        return self.head_dim if self.kv_dtype == "bf16" else ceil_div(self.plain_size, 16) * 16

    @property
    def nbytes(self) -> int:
        """Bytes of a vector in the cache."""
        return self.cached_size * np.dtype(self.dtype).itemsize

    def to_plain(self, cached: np.ndarray, rotation: int, first: int = 0) -> np.ndarray:
        """Vectors [..., positions, cached_size] of the cache, the first at `first`, in their plain form.

        `rotation`: KEY_ROTATION or VALUE_ROTATION.
        """
        return (
            in_order(cached, rotation, first) if self.kv_dtype == "bf16" else cached[..., : self.plain_size]
        )

    def to_cache(self, plain: np.ndarray, rotation: int) -> np.ndarray:
        """The reverse, of vectors from position 0 on; padding is zeros."""
        if self.kv_dtype == "bf16":
            return in_order(plain, -rotation)
        cached = np.zeros((*plain.shape[:-1], self.cached_size), np.uint8)
        cached[..., : self.plain_size] = plain
        return cached


def in_order(bits: np.ndarray, rotation: int, first: int = 0) -> np.ndarray:
    """The kernel's keys or values [..., positions, head_dim] with every vector's elements in their order.

    In its cache of bf16 pieces of eight are rotated by `rotation` times the position (cuda/vectors.cuh);
    bits[..., 0, :] is at `first`. A negative rotation takes elements in their order back to the cache's.
    """
    positions, head_dim = bits.shape[-2:]
    pieces = np.arange(head_dim // 8) + rotation * np.arange(first, first + positions)[:, None]
    split = bits.reshape(*bits.shape[:-1], head_dim // 8, 8)
    return split[..., np.arange(positions)[:, None], pieces % (head_dim // 8), :].reshape(bits.shape)
