"""The packed geometry: figures that the kernel relies on."""

from __future__ import annotations

import itertools

import pytest

import ffmini.layout
from ffmini.layout import FORMATS, LINE_K, LINES_PER_SLOT, SEGMENT, TILE_ROWS, MatrixLayout, ceil_div

LAYOUTS = [
    MatrixLayout("w", rows, cols, format, group_size)
    for rows, cols, format, group_size in itertools.product(
        (1, 16, 172, 32003), (8, 64, 172, 320, 448, 4096, 14336), FORMATS, (32, 64, 128)
    )
]


def test_ceil_div() -> None:
    assert [ceil_div(a, 4) for a in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"{x.rows}x{x.cols}-{x.format}-g{x.group_size}")
def test_figures_agree(layout: MatrixLayout) -> None:
    assert (layout.tiles - 1) * TILE_ROWS < layout.rows <= layout.tiles * TILE_ROWS
    assert layout.cols <= layout.k_pad < layout.cols + 64 and layout.k_pad % 64 == 0
    assert (layout.segments - 1) * SEGMENT < layout.k_pad <= layout.segments * SEGMENT
    assert layout.k_pad % LINE_K[layout.format] == 0
    assert SEGMENT % layout.slot_k == 0  # a slot never straddles two segments
    assert layout.slot_k % layout.group_size == 0 or layout.format == "bf16"
    tail_k = layout.k_pad - (layout.slots - 1) * layout.slot_k
    assert 0 < tail_k <= layout.slot_k
    assert layout.tail_bytes <= layout.slot_bytes
    assert (layout.tail_bytes == layout.slot_bytes) == (tail_k == layout.slot_k)
    assert layout.tile_bytes == (layout.slots - 1) * layout.slot_bytes + layout.tail_bytes
    assert layout.nbytes == layout.tiles * layout.tile_bytes
    # Bulk copies move multiples of 16 bytes from 16-byte boundaries.
    assert layout.slot_bytes % 16 == 0 and layout.tail_bytes % 16 == 0


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"{x.rows}x{x.cols}-{x.format}-g{x.group_size}")
def test_bytes_are_lines_and_scales(layout: MatrixLayout) -> None:
    weight_bytes = TILE_ROWS * layout.k_pad * {"bf16": 16, "int8": 8, "int4": 4}[layout.format] // 8
    scale_bytes = {"bf16": 0, "int8": 2, "int4": 4}[layout.format] * TILE_ROWS * layout.groups
    assert layout.tile_bytes == weight_bytes + scale_bytes
    assert layout.groups == (0 if layout.format == "bf16" else -(-layout.k_pad // layout.group_size))


@pytest.mark.parametrize(
    ("format", "group_size", "bits"),
    [("bf16", 128, 16.0), ("int8", 128, 8.125), ("int4", 32, 5.0), ("int4", 64, 4.5), ("int4", 128, 4.25)],
)
def test_bits_per_weight(format: str, group_size: int, bits: float) -> None:
    layout = MatrixLayout("w", 4096, 4096, format, group_size)
    assert layout.nbytes * 8 / (4096 * 4096) == bits


def test_full_slot_sizes() -> None:
    assert [MatrixLayout("w", 16, 256, f, 128).slot_k for f in FORMATS] == [64, 128, 256]
    assert [MatrixLayout("w", 16, 256, f, 128).slot_bytes for f in FORMATS] == [2048, 2080, 2176]
    assert LINES_PER_SLOT * 512 == 2048


@pytest.mark.parametrize("most", [1, 2, 3, 5, 16])
def test_parts(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """As few parts as can be, of whole segments; all but the last have the same size, and none is empty."""
    monkeypatch.setattr(ffmini.layout, "PART_SEGMENTS", dict.fromkeys(FORMATS, most))
    for segments in range(1, 130):
        layout = MatrixLayout("w", 16, segments * SEGMENT - 200, "int8")
        in_part, parts = layout.part_segments, ceil_div(segments, layout.part_segments)
        assert layout.segments == segments and 1 <= in_part <= most
        assert parts == ceil_div(segments, most) and (parts - 1) * in_part < segments


def test_parts_of_known_widths() -> None:
    """In the order of sums that all builds share: a part has 4,096 inputs at most."""
    widths = {64: 1, 4096: 16, 4097: 9, 8192: 16, 11008: 15, 14336: 14, 28672: 16}
    assert {k: MatrixLayout("w", 16, k, "bf16").part_segments for k in widths} == widths
