"""The CPU decoder in NumPy: what the kernel is tested against, and what runs where there is no GPU.

Stages have the kernel's names and can be run one by one; `places` are the positions of their rows, which
only decide where BLAS gets to see them (see `multiply`). Two precisions:

- "bf16" rounds where the kernel does (operands of products and probabilities to bf16, K and V to bf16 or to
  int8 codes with a scale each) and accumulates in float32; int8 and int4 codes of weights are multiplied in
  integers, as the kernel does (see `QuantizedMatrix`). A position's result has the same bits however the
  positions are grouped into passes, and whatever other sequences are in them.
- "float64" computes everything in double and rounds nothing: the truth that both are measured against.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from .candidates import NON_FINITE, Candidates, Draw, Query, summarise
from .errors import NON_FINITE_LOGITS, GenerationError, MemoryBudgetError
from .layout import KV_BLOCK, SEGMENT, TILE_ROWS, MatrixLayout, VectorLayout, ceil_div
from .memory import available_memory
from .numerics import (
    align,
    from_bf16,
    join_vectors,
    quantize_vectors,
    round_bf16,
    split_bytes,
    split_vectors,
    to_bf16,
)
from .packing import (
    LAYER_MATRICES,
    PackedLayer,
    PackedModel,
    unpack_matrix,
    unpack_quantized,
    vector_offsets,
)
from .passes import Work, check_cache, check_draws, check_kv_dtype, check_pass, check_slot, check_works
from .rope import rope_tables

ROW_BLOCK = 16  # rows of every matrix product; see `multiply`
MAX_ROWS = 64  # rows that go through the layers together: bounds the scratch memory, changes no bit
UNPACK_TILES = 32  # tiles of 16 rows unpacked at a time: bounds the temporary copies
# Rows of a quantised matrix multiplied at a time: many, because BLAS's threads wait for each other after each
# product; by one row of activations so few that BLAS takes one thread and copies nothing.
PRODUCT_ROWS = 4096
PRODUCT_ROWS_BY_ONE = 512


# Positions of rows: the first one's, the others following it, or each one's, [R].
Places = int | np.ndarray


def multiply(x: np.ndarray, w: np.ndarray, places: Places) -> np.ndarray:
    """x [..., n, k] times w [..., m, k] transposed -> [..., n, m], in blocks of 16 rows padded with zeros.

    A row takes place p % 16 of its block, p being its own of the `places`. BLAS picks its order of sums by
    the shapes and, within them, by a row's place: a row that always has the same place, in blocks of one
    shape, has the same bits, whatever else is in the block.
    """
    *batch, n, k = x.shape
    rows, blocks = _seats(places, n)
    padded = np.zeros((*batch, blocks * ROW_BLOCK, k), x.dtype)
    padded[..., rows, :] = x
    product = padded.reshape(*batch, blocks, ROW_BLOCK, k) @ np.swapaxes(w, -1, -2)[..., None, :, :]
    return product.reshape(*batch, blocks * ROW_BLOCK, w.shape[-2])[..., rows, :]


def _seats(places: Places, n: int) -> tuple[slice | np.ndarray, int]:
    """Where n rows at `places` come to lie in blocks of 16, in the order of the rows, and how many blocks.

    Rows for the same place of a block go to different blocks.
    """
    if not isinstance(places, np.ndarray):
        first = places % ROW_BLOCK
        return slice(first, first + n), ceil_div(first + n, ROW_BLOCK)
    place = places % ROW_BLOCK
    order = place.argsort(kind="stable")
    block = np.empty(n, np.int64)
    block[order] = np.arange(n) - place[order].searchsorted(place[order])
    return block * ROW_BLOCK + place, int(block.max()) + 1


def inverse_rms(x: np.ndarray, eps: float) -> np.ndarray:
    """One over the root mean square of x [..., n] -> [..., 1]."""
    squares = np.square(x).sum(axis=-1, keepdims=True)
    return 1.0 / np.sqrt(squares / x.shape[-1] + eps)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x [..., n] over its root mean square, times weight [n]; in x's dtype, not rounded."""
    return x * inverse_rms(x, eps) * weight


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x); where exp overflows the quotient is 0, as it should be."""
    with np.errstate(over="ignore"):
        return x / (1.0 + np.exp(-x))


# ---- matrices ------------------------------------------------------------------------------------------


class DenseMatrix:
    """A matrix of floats [rows, cols]: bf16 weights, and weights of any format in the float64 precision."""

    def __init__(self, packed: np.ndarray, layout: MatrixLayout, dtype: type) -> None:
        self._w = np.empty((layout.rows, layout.cols), dtype)
        for rows, tiles in _row_blocks(layout):
            self._w[rows] = unpack_matrix(packed, layout, tiles)
        in_part = layout.part_segments * SEGMENT
        self._parts = [slice(k, min(k + in_part, layout.cols)) for k in range(0, layout.cols, in_part)]

    @property
    def nbytes(self) -> int:
        return self._w.nbytes

    def rows(self, which: np.ndarray) -> np.ndarray:
        """The rows `which` [R] -> [R, cols]."""
        return self._w[which]

    def product(self, x: np.ndarray, places: Places) -> np.ndarray:
        """x [R, cols], rows at `places`, times the matrix transposed -> [R, rows]."""
        return multiply(x, self._w, places)

    def add_product(self, y: np.ndarray, x: np.ndarray, places: Places) -> np.ndarray:
        """y [R, rows] plus the product, part by part of the input."""
        for part in self._parts:
            y = y + multiply(x[:, part], self._w[:, part], places)
        return y


class QuantizedMatrix:
    """An int8 or int4 matrix, multiplied as the kernel does: in integers within a group, then in float32.

    Codes lie group by group as float32 [groups, rows, group_size], zeros beyond the matrix, and scales and
    zeros as float32 [groups, rows]. Codes and bytes of activations are integers so small that a group's sum
    stays below 2**24: float32 BLAS adds them without rounding, in whatever order.
    """

    def __init__(self, packed: np.ndarray, layout: MatrixLayout) -> None:
        self._cols, self._group_size = layout.cols, layout.group_size
        self._segments, self._part_segments = layout.segments, layout.part_segments
        groups = ceil_div(layout.cols, layout.group_size)
        self._codes = np.zeros((groups, layout.rows, layout.group_size), np.float32)
        self._scale = np.empty((groups, layout.rows), np.float32)
        self._zero = np.empty_like(self._scale) if layout.format == "int4" else None
        tiles_of = packed.reshape(layout.tiles, layout.tile_bytes)
        for rows, tiles in _row_blocks(layout):
            part = unpack_quantized(tiles_of[tiles], layout)
            count = rows.stop - rows.start
            self._codes[:, rows] = self._in_groups(part.codes[:count])
            self._scale[:, rows] = part.scale[:count].T
            if self._zero is not None:
                self._zero[:, rows] = part.zero[:count].T

    @property
    def nbytes(self) -> int:
        zeros = 0 if self._zero is None else self._zero.nbytes
        return self._codes.nbytes + self._scale.nbytes + zeros

    def rows(self, which: np.ndarray) -> np.ndarray:
        """The rows `which` [R] as float32 weights [R, cols]."""
        w = self._codes[:, which]
        if self._zero is not None:
            w = w - self._zero[:, which, None]
        w = w * self._scale[:, which, None]
        return w.swapaxes(0, 1).reshape(len(which), -1)[:, : self._cols]

    def product(self, x: np.ndarray, places: Places) -> np.ndarray:
        """x [R, cols], bf16 values, times the matrix transposed -> [R, rows]; `places` do not matter.

        The sums of a segment's groups are added in ascending order, times the segment's power of two, and
        the segments in ascending order.
        """
        total = np.zeros((len(x), self._codes.shape[1]), np.float32)
        self._add_parts(total, x, self._segments)
        return total

    def add_product(self, y: np.ndarray, x: np.ndarray, places: Places) -> np.ndarray:
        """y [R, rows] plus the products of the input's parts, in ascending order."""
        total = y.copy()
        self._add_parts(total, x, self._part_segments)
        return total

    def _add_parts(self, total: np.ndarray, x: np.ndarray, part_segments: int) -> None:
        """Adds to total [R, rows] the sums of each `part_segments` segments."""
        q, power = align(x, SEGMENT)
        # High bytes of all rows, then low bytes: [groups, 2 R, group_size].
        split = self._in_groups(np.concatenate(split_bytes(q)).astype(np.float32))
        sums = self._in_groups(q).sum(axis=-1, dtype=np.int32).astype(np.float32)
        in_segment = SEGMENT // self._group_size
        step = PRODUCT_ROWS_BY_ONE if len(x) == 1 else PRODUCT_ROWS
        for first, begin in itertools.product(
            range(0, total.shape[1], step), range(0, power.shape[1], part_segments)
        ):
            rows = slice(first, first + step)
            part = np.zeros_like(total[:, rows])
            for segment in range(begin, min(begin + part_segments, power.shape[1])):
                groups = slice(segment * in_segment, (segment + 1) * in_segment)
                product = self._segment_product(split[groups], sums[groups], groups, rows)
                part += product * power[:, segment, None]
            total[:, rows] += part

    def _segment_product(self, split: np.ndarray, sums: np.ndarray, groups: slice, rows: slice) -> np.ndarray:
        """Bytes of q [groups, 2 R, group_size] and sums of q [groups, R] of one segment -> [R, rows]."""
        high, low = np.split(split @ self._codes[groups, rows].swapaxes(-1, -2), 2, axis=1)
        product = 256 * high + low  # one rounding: high, low and 256 * high are exact
        if self._zero is not None:
            product -= self._zero[groups, None, rows] * sums[:, :, None]
        product *= self._scale[groups, None, rows]
        total = np.zeros_like(product[0])
        for group in product:  # np.sum promises no order
            total += group
        return total

    def _in_groups(self, x: np.ndarray) -> np.ndarray:
        """x [n, cols] -> [groups, n, group_size], zeros beyond cols."""
        groups = len(self._codes)
        padded = np.zeros((groups, len(x), self._group_size), x.dtype)
        whole = self._cols // self._group_size
        end = whole * self._group_size
        padded[:whole] = x[:, :end].reshape(len(x), whole, self._group_size).swapaxes(0, 1)
        if whole < groups:
            padded[whole, :, : self._cols - end] = x[:, end:]
        return padded


Matrix = DenseMatrix | QuantizedMatrix


def load_matrix(packed: np.ndarray, layout: MatrixLayout, precision: str) -> Matrix:
    """The matrix of `packed` (uint8 [layout.nbytes]) for a decoder of this precision."""
    if precision == "float64":
        return DenseMatrix(packed, layout, np.float64)
    return (
        DenseMatrix(packed, layout, np.float32)
        if layout.format == "bf16"
        else QuantizedMatrix(packed, layout)
    )


def held_bytes(layout: MatrixLayout, precision: str = "bf16") -> int:
    """Bytes of a matrix as a decoder of this precision holds it: nbytes of what load_matrix makes."""
    if precision == "float64":
        return 8 * layout.rows * layout.cols
    if layout.format == "bf16":
        return 4 * layout.rows * layout.cols
    parameters = {"int8": 1, "int4": 2}[layout.format]  # scale; scale and zero
    return 4 * layout.rows * ceil_div(layout.cols, layout.group_size) * (layout.group_size + parameters)


def held_vector_bytes(head_dim: int, kv_dtype: str) -> int:
    """Bytes of a key or a value as a decoder of the bf16 precision holds it: float32, int8's scale too."""
    return 4 * (head_dim + (kv_dtype == "int8"))


def _row_blocks(layout: MatrixLayout) -> Iterator[tuple[slice, slice]]:
    """Rows of the matrix and the tiles that hold them, block by block."""
    for first in range(0, layout.tiles, UNPACK_TILES):
        end = min(first + UNPACK_TILES, layout.tiles)
        yield slice(first * TILE_ROWS, min(end * TILE_ROWS, layout.rows)), slice(first, end)


@dataclass
class _Layer:
    """One layer's matrices, rows in packed order, and its vectors by name."""

    qkv_proj: Matrix
    o_proj: Matrix
    gate_up_proj: Matrix
    down_proj: Matrix
    vectors: dict[str, np.ndarray]
    window: int


@dataclass(frozen=True)
class _Part:
    """Tokens of one slot from position `start` on, and of how many of the last ones logits are wanted."""

    slot: int
    tokens: np.ndarray
    start: int
    wanted: int


@dataclass(frozen=True)
class _Span:
    """Tokens `first` to `end` of a part, which go through the layers together with those of others."""

    part: int
    first: int
    end: int
    rows: slice  # where they lie among the others

    def wanted(self, part: _Part) -> np.ndarray:
        """The rows whose logits are wanted."""
        skipped = max(0, len(part.tokens) - part.wanted - self.first)
        return np.arange(self.rows.start + skipped, self.rows.stop)


def _groups(parts: Sequence[_Part]) -> Iterator[list[_Span]]:
    """Cuts the parts into groups of at most MAX_ROWS tokens, in their order."""
    group: list[_Span] = []
    used = 0
    for index, part in enumerate(parts):
        first = 0
        while first < len(part.tokens):
            end = min(len(part.tokens), first + MAX_ROWS - used)
            group.append(_Span(index, first, end, slice(used, used + end - first)))
            used, first = used + end - first, end
            if used == MAX_ROWS:
                yield group
                group, used = [], 0
    if group:
        yield group


def _say(found: np.ndarray | GenerationError, queries: Sequence[Query]) -> list[Candidates]:
    """What logits [n, vocab_size] say to n queries, a row each."""
    if isinstance(found, GenerationError):
        return [NON_FINITE] * len(queries)
    rows = found.astype(np.float32)
    return [
        summarise(row, query) if np.isfinite(row).all() else NON_FINITE
        for row, query in zip(rows, queries, strict=True)
    ]


class CPUDecoder:
    """Runs passes of `num_slots` sequences of one model on the CPU.

    key_cache and value_cache are [num_layers, num_slots, num_kv_heads, positions, head_dim]: max_seq_len
    positions, and zeros up to a multiple of 256. They hold finite numbers only; in the bf16 precision rounded
    to bf16 or, if kv_dtype is "int8", codes as floats, whose scales are in key_scale and value_scale, [...,
    positions].
    """

    max_rows = MAX_ROWS  # that one begin() may query

    def __init__(
        self,
        packed: PackedModel,
        max_seq_len: int,
        num_slots: int = 1,
        *,
        precision: str = "bf16",
        kv_dtype: str = "bf16",
        progress: bool = True,
    ) -> None:
        """Unpack the weights; raises MemoryBudgetError if they, the KV cache and the scratch do not fit.

        `kv_dtype`: how K and V are kept, one of KV_DTYPES; the float64 precision keeps them as they are.
        """
        if precision not in ("bf16", "float64"):
            raise ValueError(f'precision must be "bf16" or "float64", not {precision!r}')
        check_kv_dtype(kv_dtype)
        self.config = packed.config
        self.max_seq_len = max_seq_len
        self.num_slots = num_slots
        self.device = "cpu"
        self.precision = precision
        self.kv_dtype = kv_dtype
        self._quantizes = kv_dtype == "int8" and precision == "bf16"
        self._vector_layout = VectorLayout(packed.config.head_dim, "int8" if self._quantizes else "bf16")
        self._dtype = np.float32 if precision == "bf16" else np.float64
        self._round: Callable[[np.ndarray], np.ndarray] = round_bf16 if precision == "bf16" else _keep
        self._check_memory(packed)
        disable = None if progress else True  # None: shown if stderr is a terminal
        layers = tqdm(packed.layers, desc="unpacking", unit="layer", file=sys.stderr, disable=disable)
        self._layers = [self._unpack_layer(packed, i, layer) for i, layer in enumerate(layers)]
        self._lm_head = load_matrix(packed.lm_head, packed.layouts["lm_head"], precision)
        self._embed_bits = packed.embed_tokens
        self._norm = packed.norm.astype(self._dtype)
        self._cos, self._sin = rope_tables(self.config, max_seq_len, self._dtype)
        shape = self._cache_shape()
        self.key_cache, self.value_cache = np.zeros(shape, self._dtype), np.zeros(shape, self._dtype)
        scales = shape[:-1] if self._quantizes else (0,)
        self.key_scale, self.value_scale = np.zeros(scales, np.float32), np.zeros(scales, np.float32)
        self._said: list[list[Candidates]] | None = None  # what candidates() is to say

    # ---- loading ----

    def _cache_shape(self) -> tuple[int, int, int, int, int]:
        config = self.config
        positions = ceil_div(self.max_seq_len, KV_BLOCK) * KV_BLOCK
        return config.num_layers, self.num_slots, config.num_kv_heads, positions, config.head_dim

    def _check_memory(self, packed: PackedModel) -> None:
        """Compare weights, KV cache and a pass's scratch with the memory that is free."""
        config, layouts = self.config, packed.layouts
        itemsize = np.dtype(self._dtype).itemsize
        held = {name: held_bytes(layout, self.precision) for name, layout in layouts.items()}
        weights = config.num_layers * sum(held[name] for name in LAYER_MATRICES) + held["lm_head"]
        vector = config.head_dim + self._quantizes  # and a scale
        cache = 2 * int(np.prod(self._cache_shape()[:-1])) * vector * itemsize
        heads = config.num_heads
        # Per row: activations; logits; an operand, a block of its products and the scores of a block of
        # positions, each in a few forms; every block's partial result.
        per_row = 4 * sum(layouts[name].rows for name in LAYER_MATRICES) + 3 * config.vocab_size
        per_row += 8 * max(layout.cols for layout in layouts.values()) + 6 * heads * KV_BLOCK
        most_rows = max(layout.rows for layout in layouts.values())
        per_row += 6 * min(PRODUCT_ROWS, most_rows) * (SEGMENT // packed.group_size)
        per_row += ceil_div(self.max_seq_len, KV_BLOCK) * heads * (config.head_dim + 2)
        scratch = MAX_ROWS * per_row * itemsize
        needed, free = weights + cache + scratch, available_memory()
        if needed > free:
            raise MemoryBudgetError(
                f"cpu: weights {weights / 2**20:.0f} MiB + KV cache {cache / 2**20:.0f} MiB + scratch "
                f"{scratch / 2**20:.0f} MiB needed, {free / 2**20:.0f} MiB free"
            )

    def _unpack_layer(self, packed: PackedModel, index: int, layer: PackedLayer) -> _Layer:
        matrices = {
            name: load_matrix(getattr(layer, name), packed.layouts[name], self.precision)
            for name in LAYER_MATRICES
        }
        vectors = {
            name: layer.vectors[offset : offset + length].astype(self._dtype)
            for name, (offset, length) in vector_offsets(self.config).items()
        }
        return _Layer(**matrices, vectors=vectors, window=self.config.layer_windows[index])

    def close(self) -> None:
        """Free weights and cache; a second call does nothing."""
        for name in ("_layers", "_lm_head", "_embed_bits"):
            setattr(self, name, None)
        self.key_cache = self.value_cache = self.key_scale = self.value_scale = None

    # ---- the forward pass ----

    def forward(self, tokens: np.ndarray, start: int, logits: str = "last", slot: int = 0) -> np.ndarray:
        """Run tokens [R] of a slot at positions start .. start + R - 1; those before must have been run.

        `logits`: "last" gives [1, vocab_size], "all" [R, vocab_size], "none" [0, vocab_size]; float32, or
        float64 in that precision. GenerationError if a logit, a key or a value is not finite.
        """
        tokens = np.asarray(tokens)
        self._require_open()
        check_pass(tokens, start, logits, self.max_seq_len, self.config.vocab_size)
        check_slot(slot, self.num_slots)
        wanted = {"last": 1, "all": len(tokens), "none": 0}[logits]
        [found] = self._run([_Part(slot, tokens, start, wanted)])
        if isinstance(found, GenerationError):
            raise found
        if not np.isfinite(found).all():
            raise GenerationError(NON_FINITE_LOGITS)
        return found

    def begin(
        self, works: Sequence[Work], ahead: bool = False, draws: tuple[Draw, Draw] | None = None
    ) -> None:
        """Run the rows of all `works`, of distinct slots and with at most max_rows queries in all.

        candidates() says of each one's last rows what its queries ask. `ahead`, for one work with one query,
        and `draws` hint that another token may follow at once; on the CPU nothing can be done in advance.
        """
        self._require_open()
        limits = self.num_slots, self.max_rows, self.max_seq_len, self.config.vocab_size
        check_draws(draws, works, ahead)
        check_works(works, ahead, *limits)
        parts = [_Part(w.slot, np.asarray(w.tokens), w.start, len(w.queries)) for w in works]
        self._said = [_say(found, work.queries) for found, work in zip(self._run(parts), works, strict=True)]

    def deliver(self, token: int, query: Query) -> None:
        """Nothing: no pass waits for its token here."""

    def candidates(self) -> list[list[Candidates]]:
        """What the rows of begin() say, per work and query; once, ValueError without them.

        Of a row whose logits, or whose sequence's keys or values, are not finite it is NON_FINITE.
        """
        said, self._said = self._said, None
        if said is None:
            raise ValueError("candidates of rows that begin() ran expected, none were run")
        return said

    def settle(self) -> None:
        """Forget what was begun."""
        self._said = None

    def read_cache(self, slot: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of a slot's first `count` positions (at most max_seq_len).

        Each is plain vectors, [num_layers, num_kv_heads, count, plain_size]; see VectorLayout.
        """
        self._require_open()
        check_slot(slot, self.num_slots)
        part = np.s_[:, slot, :, :count]
        keys, values = self.key_cache[part], self.value_cache[part]
        if not self._quantizes:
            return to_bf16(keys), to_bf16(values)
        scales = self.key_scale[part], self.value_scale[part]
        return join_vectors(keys.astype(np.int8), scales[0]), join_vectors(values.astype(np.int8), scales[1])

    def write_cache(self, slot: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Put keys and values, as read_cache gives them, at a slot's first positions."""
        self._require_open()
        check_slot(slot, self.num_slots)
        sizes = self.config.num_layers, self.config.num_kv_heads, self._vector_layout, self.max_seq_len
        check_cache(keys, values, *sizes)
        part = np.s_[:, slot, :, : keys.shape[2]]
        if not self._quantizes:
            self.key_cache[part], self.value_cache[part] = from_bf16(keys), from_bf16(values)
            return
        self.key_cache[part], self.key_scale[part] = split_vectors(keys)
        self.value_cache[part], self.value_scale[part] = split_vectors(values)

    def _require_open(self) -> None:
        if self._layers is None:
            raise ValueError("the decoder is closed")

    def _run(self, parts: Sequence[_Part]) -> list[np.ndarray | GenerationError]:
        """The wanted logits of each part, [wanted, vocab_size], or what went wrong with its K and V."""
        found = [[np.empty((0, self.config.vocab_size), self._dtype)] for _ in parts]
        errors: dict[int, GenerationError] = {}
        for group in _groups(parts):
            tokens = np.concatenate([parts[s.part].tokens[s.first : s.end] for s in group])
            positions = np.concatenate([parts[s.part].start + np.arange(s.first, s.end) for s in group])
            x = self._run_layers(parts, group, tokens, positions, errors)
            wanted = [span.wanted(parts[span.part]) for span in group]
            rows = np.concatenate(wanted)
            if len(rows):
                logits = self.norm_lm_head(x[rows], positions[rows])
                ends = np.cumsum([len(part) for part in wanted])
                for span, piece in zip(group, np.split(logits, ends[:-1]), strict=True):
                    found[span.part].append(piece)
        return [errors.get(i) or np.concatenate(pieces) for i, pieces in enumerate(found)]

    def _run_layers(
        self,
        parts: Sequence[_Part],
        group: Sequence[_Span],
        tokens: np.ndarray,
        positions: np.ndarray,
        errors: dict[int, GenerationError],
    ) -> np.ndarray:
        """Run `tokens` [R] at `positions` [R], the rows of a group -> the last layer's x [R, hidden_size].

        A part whose keys or values are not finite gets into `errors`, and NaN as its attention's output.
        """
        places = int(positions[0]) if len(group) == 1 else positions
        x = self.embed(tokens)
        for layer in range(self.config.num_layers):
            qkv = self.norm_qkv(layer, x, places)
            attn = np.full((len(x), self.config.num_heads * self.config.head_dim), np.nan, self._dtype)
            for span in group:
                try:
                    part = self.attention(layer, qkv[span.rows], positions[span.rows], parts[span.part].slot)
                    attn[span.rows] = part
                except GenerationError as error:
                    errors.setdefault(span.part, error)
            x = self.o_proj(layer, attn, x, places)
            act = self.norm_gate_up(layer, x, places)
            x = self.down_proj(layer, act, x, places)
        return x

    # ---- the stages ----

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        """Token ids [R] -> the residual stream x [R, hidden_size]."""
        if self._embed_bits is None:
            return self._lm_head.rows(tokens)
        return from_bf16(self._embed_bits[tokens]).astype(self._dtype)

    def norm_qkv(self, layer: int, x: np.ndarray, places: Places = 0) -> np.ndarray:
        """x [R, hidden_size] -> q, k, v [R, (num_heads + 2 num_kv_heads) head_dim] before norm and rope."""
        weights = self._layers[layer]
        qkv = self._norm_multiply(x, weights.vectors["input_layernorm"], weights.qkv_proj, places)
        return _add_bias(qkv, weights.vectors, "qkv_bias")

    def attention(self, layer: int, qkv: np.ndarray, positions: np.ndarray, slot: int = 0) -> np.ndarray:
        """q, k, v of R rows at consecutive `positions` [R] -> attention's output [R, num_heads head_dim].

        Norms and rotates q and k, writes k and v to the cache, then attends to the cache: K and V of all
        earlier positions must be there, or among these rows.
        """
        config = self.config
        groups = config.num_heads // config.num_kv_heads
        heads = qkv.reshape(len(qkv), -1, config.head_dim)
        split = (config.num_heads, config.num_heads + config.num_kv_heads)
        q, k, v = np.split(heads, split, axis=1)
        q = self._round(self._norm_and_rotate(layer, "q_norm", q, positions))
        k = self._norm_and_rotate(layer, "k_norm", k, positions)
        self._append(layer, slot, positions, k, v)
        # The query heads of one KV head become rows beside each other: [num_kv_heads, R * groups, head_dim].
        q = q.reshape(len(q), config.num_kv_heads, groups, config.head_dim)
        q = q.transpose(1, 0, 2, 3).reshape(config.num_kv_heads, -1, config.head_dim)
        out = self._round(self._attend(layer, slot, q, np.repeat(positions, groups)))
        out = out.reshape(config.num_kv_heads, len(qkv), groups * config.head_dim)
        return out.transpose(1, 0, 2).reshape(len(qkv), -1)

    def o_proj(self, layer: int, attn: np.ndarray, x: np.ndarray, places: Places = 0) -> np.ndarray:
        """Attention's output [R, num_heads head_dim] and x [R, hidden_size] -> the new x."""
        weights = self._layers[layer]
        return weights.o_proj.add_product(_add_bias(x, weights.vectors, "o_bias"), attn, places)

    def norm_gate_up(self, layer: int, x: np.ndarray, places: Places = 0) -> np.ndarray:
        """x [R, hidden_size] -> silu(gate) * up, rounded, [R, intermediate_size]."""
        weights = self._layers[layer]
        norm = weights.vectors["post_attention_layernorm"]
        gate_up = self._norm_multiply(x, norm, weights.gate_up_proj, places)
        gate_up = _add_bias(gate_up, weights.vectors, "gate_up_bias")
        gate_up = gate_up.reshape(len(x), -1, 2, 8)  # eight of gate, the same eight of up, and so on
        act = self._round(silu(gate_up[:, :, 0]) * gate_up[:, :, 1])
        return act.reshape(len(x), -1)[:, : self.config.intermediate_size]

    def down_proj(self, layer: int, act: np.ndarray, x: np.ndarray, places: Places = 0) -> np.ndarray:
        """silu(gate) * up [R, intermediate_size] and x [R, hidden_size] -> the new x."""
        weights = self._layers[layer]
        return weights.down_proj.add_product(_add_bias(x, weights.vectors, "down_bias"), act, places)

    def norm_lm_head(self, x: np.ndarray, places: Places = 0) -> np.ndarray:
        """x [R, hidden_size] -> logits [R, vocab_size]."""
        return self._norm_multiply(x, self._norm, self._lm_head, places)

    # ---- parts of stages ----

    def _norm_multiply(self, x: np.ndarray, norm: np.ndarray, w: Matrix, places: Places) -> np.ndarray:
        """RMSNorm(x) times w [rows, cols] transposed -> [R, rows].

        One over the root mean square comes after the product: blocks that publish x need not know it.
        """
        product = w.product(self._round(x * norm), places)
        return product * inverse_rms(x, self.config.rms_norm_eps)

    def _norm_and_rotate(self, layer: int, norm: str, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Heads x [R, heads, head_dim]: RMSNorm of each if the model has QK norm, rope."""
        if self.config.qk_norm:
            x = rms_norm(x, self._layers[layer].vectors[norm], self.config.rms_norm_eps)
        cos, sin = self._cos[positions][:, None], self._sin[positions][:, None]
        low, high = np.split(x, 2, axis=-1)
        return np.concatenate((low * cos - high * sin, high * cos + low * sin), axis=-1)

    def _append(self, layer: int, slot: int, positions: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        """Round or quantise k and v [R, num_kv_heads, head_dim] and write them at `positions` [R].

        Positions that a row does not see are multiplied by 0, so nothing that is not finite may get in.
        """
        if not self._quantizes:
            k, v = self._round(k), self._round(v)
        if not (np.isfinite(k).all() and np.isfinite(v).all()):
            raise GenerationError(f"layer {layer}: non-finite keys or values: finite numbers expected")
        if self._quantizes:
            k, key_scale = quantize_vectors(k)
            v, value_scale = quantize_vectors(v)
            self.key_scale[layer, slot][:, positions] = key_scale.T
            self.value_scale[layer, slot][:, positions] = value_scale.T
        self.key_cache[layer, slot][:, positions] = k.swapaxes(0, 1)
        self.value_cache[layer, slot][:, positions] = v.swapaxes(0, 1)

    def _attend(self, layer: int, slot: int, q: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Queries [num_kv_heads, n, head_dim] at `positions` [n] over the cache -> the same shape, unrounded.

        Each block of 256 absolute positions has a softmax of its own; they are merged in ascending order.
        """
        window = self._layers[layer].window
        first = max(0, int(positions.min()) - window + 1) if window else 0
        blocks = range(first // KV_BLOCK, int(positions.max()) // KV_BLOCK + 1)
        parts = [self._attend_block(layer, slot, q, positions, block) for block in blocks]
        top = np.max([block_top for block_top, _, _ in parts], axis=0)
        total, out = np.zeros_like(top), np.zeros_like(q)
        for block_top, block_total, block_out in parts:
            weight = np.exp(block_top - top)
            total += weight * block_total
            out += weight * block_out
        return out / total

    def _attend_block(
        self, layer: int, slot: int, q: np.ndarray, positions: np.ndarray, block: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A block's largest score [num_kv_heads, n, 1], sum of exponentials (the same) and sum of values.

        A row that sees nothing of the block gets -infinity, 0 and 0, which add nothing when merged.
        """
        span = slice(block * KV_BLOCK, (block + 1) * KV_BLOCK)
        keys, values = self.key_cache[layer, slot][:, span], self.value_cache[layer, slot][:, span]
        window = self._layers[layer].window
        place = int(positions[0]) * self.config.num_heads // self.config.num_kv_heads
        column, row = np.arange(span.start, span.stop), positions[:, None]
        visible = column <= row
        if window:
            visible &= column > row - window
        scores = multiply(q, keys, place) * self.config.head_dim**-0.5
        if self._quantizes:
            scores *= self.key_scale[layer, slot][:, None, span]
        scores = np.where(visible, scores, -np.inf)
        top = scores.max(axis=-1, keepdims=True)
        p = self._round(np.exp(scores - np.where(visible.any(axis=-1, keepdims=True), top, 0.0)))
        total = p.sum(axis=-1, keepdims=True)
        if self._quantizes:
            p = self._round(p * self.value_scale[layer, slot][:, None, span])
        return top, total, multiply(p, values.swapaxes(-1, -2), place)


def _add_bias(y: np.ndarray, vectors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """y [R, n] plus the vector `name` [n] if the layer has it."""
    return y + vectors[name] if name in vectors else y


def _keep(x: np.ndarray) -> np.ndarray:
    """The rounding of the float64 precision: none."""
    return x
