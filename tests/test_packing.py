"""Packing against a naive reading of layout.py's docstring, and the packed directory on disk."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from ffmini.checkpoint import PACKED_FILE
from ffmini.config import ModelConfig, parse_config
from ffmini.errors import CheckpointError, FFMiniError, UnsupportedError
from ffmini.layout import LINE_BYTES, LINE_K, LINES_PER_SLOT, SCALE_BYTES, TILE_ROWS, MatrixLayout
from ffmini.numerics import round_bf16, to_bf16
from ffmini.packing import (
    PackedWriter,
    check_destination,
    interleave_gate_up,
    make_layouts,
    pack_matrix,
    pack_quantized,
    packed_tensors,
    read_packed,
    unpack_matrix,
    unpack_quantized,
    unpack_tiles,
    vector_offsets,
    vectors_length,
)
from ffmini.quant import Quantized, quantize

SHAPES = [(1, 8), (16, 64), (17, 100), (40, 172), (24, 320), (33, 300)]
FORMATS = [
    ("bf16", 128),
    ("int8", 32),
    ("int8", 64),
    ("int8", 128),
    ("int4", 32),
    ("int4", 64),
    ("int4", 128),
]
ALL = [MatrixLayout("w", rows, cols, *format) for rows, cols in SHAPES for format in FORMATS]


def layout_id(layout: MatrixLayout) -> str:
    return f"{layout.rows}x{layout.cols}-{layout.format}-g{layout.group_size}"


def normal(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


# ---- a naive reading of the packed form: one element at a time ------------------------------------------


def place(format: str, r: int, k: int) -> tuple[int, int]:
    """The line of element (r, k) of a tile and the bit of the line where the element begins."""
    t, s = k % 32 // 8, k % 8 // 4
    g, hi = r % 8, r // 8
    lane = 16 * (4 * g + t)
    if format == "bf16":
        return 2 * (k // 32) + s, 8 * (lane + 4 * (2 * (k % 4 // 2) + hi) + 2 * (k % 2))
    if format == "int8":
        return k // 32, 8 * (lane + 4 * (2 * s + hi) + k % 4)
    return k // 64, 8 * (lane + 4 * (2 * (k // 32 % 2) + s) + k % 4) + 4 * hi


def naive_element(tile: bytes, layout: MatrixLayout, r: int, k: int) -> float:
    """The value of one element, read from the bytes of its tile."""
    line, bit = place(layout.format, r, k)
    slot = line // LINES_PER_SLOT
    start = slot * layout.slot_bytes
    at = start + line % LINES_PER_SLOT * LINE_BYTES + bit // 8
    if layout.format == "bf16":
        bits = int.from_bytes(tile[at : at + 2], "little")
        return float(np.array(bits << 16, np.uint32).view(np.float32))
    lines = min(LINES_PER_SLOT, layout.k_pad // LINE_K[layout.format] - slot * LINES_PER_SLOT)
    group = (k - slot * layout.slot_k) // layout.group_size
    at_scale = start + lines * LINE_BYTES + (group * TILE_ROWS + r) * SCALE_BYTES[layout.format]
    parameters = np.frombuffer(tile[at_scale : at_scale + SCALE_BYTES[layout.format]], np.float16)
    parameters = parameters.astype(np.float32)
    if layout.format == "int8":
        return float(parameters[0] * np.float32(int.from_bytes(tile[at : at + 1], "little", signed=True)))
    return float(parameters[0] * (np.float32(tile[at] >> bit % 8 & 15) - parameters[1]))


@pytest.mark.parametrize("layout", ALL, ids=layout_id)
def test_every_element_lies_where_the_layout_says(layout: MatrixLayout) -> None:
    w = normal(layout.rows, layout.cols)
    packed = pack_matrix(w, layout)
    assert packed.dtype == np.uint8 and packed.shape == (layout.nbytes,)
    if layout.format == "bf16":
        expected = round_bf16(w)
    else:
        expected = quantize(w, layout.format, layout.group_size).dequantize(layout.group_size)
    tiles = [tile.tobytes() for tile in packed.reshape(layout.tiles, -1)]
    found = [
        [naive_element(tiles[row // 16], layout, row % 16, k) for k in range(layout.cols)]
        for row in range(layout.rows)
    ]
    np.testing.assert_array_equal(np.array(found, np.float32), expected)
    np.testing.assert_array_equal(unpack_matrix(packed, layout), expected)


@pytest.mark.parametrize(("format", "bits"), [("bf16", 16), ("int8", 8), ("int4", 4)])
def test_places_cover_each_line_once(format: str, bits: int) -> None:
    places = {place(format, r, k) for r in range(16) for k in range(256)}
    lines = 256 // LINE_K[format]
    assert places == {(line, bit) for line in range(lines) for bit in range(0, 8 * LINE_BYTES, bits)}


def test_bf16_lines_are_the_a_operand_of_mma() -> None:
    """The registers of each lane, used as mma.m16n8k16 does, give W x with eight activations a lane."""
    w, x = round_bf16(normal(16, 64)), round_bf16(normal(1, 64, seed=1)[0])
    layout = MatrixLayout("w", 16, 64, "bf16")
    bits = pack_matrix(w, layout).view(np.uint16).reshape(4, 32, 4, 2)  # k-step, lane, register, pair
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    y = np.zeros(16)
    for step in range(4):
        a, b = np.zeros((16, 16)), np.zeros(16)
        for lane in range(32):
            group, thread = divmod(lane, 4)
            activations = x[32 * (step // 2) + 8 * thread :][:8].reshape(2, 2, 2)[step % 2]
            for register in range(4):
                row, column = group + 8 * (register % 2), 2 * thread + 8 * (register // 2)
                a[row, column : column + 2] = values[step, lane, register]
            for half in range(2):
                b[2 * thread + 8 * half :][:2] = activations[half]
        y += a @ b
    np.testing.assert_allclose(y, w.astype(np.float64) @ x, rtol=1e-12)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_quantized_lines_are_the_a_operand_of_mma(format: str) -> None:
    """The registers of each lane, used as mma.m16n8k32 does, give W x with eight activations a lane."""
    rng = np.random.default_rng(4)
    low, high, kind = (-127, 128, np.int8) if format == "int8" else (0, 16, np.uint8)
    codes, x = rng.integers(low, high, (16, 64), kind), rng.integers(-127, 128, 64)
    scale = np.ones((16, 1), np.float16)
    zero = None if format == "int8" else scale
    packed = pack_quantized(Quantized(codes, scale, zero), MatrixLayout("w", 16, 64, format))
    if format == "int8":
        registers = packed[:1024].reshape(2, 32, 4, 4)  # k-step, lane, register, byte
    else:
        words = packed[:512].reshape(32, 2, 2, 4).swapaxes(0, 1)  # k-step, lane, word, byte
        registers = np.stack((words & 15, words >> 4), axis=3).reshape(2, 32, 4, 4)
    y = np.zeros(16, np.int64)
    for step in range(2):
        a, b = np.zeros((16, 32), np.int64), np.zeros(32, np.int64)
        for lane in range(32):
            group, thread = divmod(lane, 4)
            for register in range(4):
                row, column = group + 8 * (register % 2), 4 * thread + 16 * (register // 2)
                a[row, column : column + 4] = registers[step, lane, register].view(kind)
            for half in range(2):
                b[4 * thread + 16 * half :][:4] = x[32 * step + 8 * thread + 4 * half :][:4]
        y += a @ b
    np.testing.assert_array_equal(y, codes.astype(np.int64) @ x)


# ---- matrices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f"{f[0]}-g{f[1]}")
def test_blocks_of_whole_tiles_join_to_the_whole(format: tuple[str, int]) -> None:
    layout = MatrixLayout("w", 75, 300, *format)
    w = normal(75, 300)
    blocks = [pack_matrix(w[first : first + 32], layout) for first in range(0, 75, 32)]
    packed = pack_matrix(w, layout)
    np.testing.assert_array_equal(np.concatenate(blocks), packed)
    whole = unpack_matrix(packed, layout)
    np.testing.assert_array_equal(unpack_matrix(packed, layout, slice(1, 3)), whole[16:48])
    np.testing.assert_array_equal(unpack_matrix(packed, layout, slice(4, 5)), whole[64:])


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f"{f[0]}-g{f[1]}")
def test_padding_rows_are_zero_and_padding_columns_finite(format: tuple[str, int]) -> None:
    layout = MatrixLayout("w", 19, 172, *format)
    buffer = pack_matrix(normal(19, 172) + 3, layout).reshape(2, -1)
    padded = unpack_tiles(buffer, dataclasses.replace(layout, cols=layout.k_pad))
    assert padded.shape == (32, 192)
    assert not padded[19:].any()
    assert np.isfinite(padded[:, 172:]).all()


@pytest.mark.parametrize("layout", [x for x in ALL if x.format != "bf16"], ids=layout_id)
def test_codes_and_scales_come_back_as_they_were(layout: MatrixLayout) -> None:
    quantized = quantize(normal(layout.rows, layout.cols), layout.format, layout.group_size)
    back = unpack_quantized(pack_quantized(quantized, layout).reshape(layout.tiles, -1), layout)
    assert back.codes.dtype == quantized.codes.dtype
    np.testing.assert_array_equal(back.codes[: layout.rows], quantized.codes)
    np.testing.assert_array_equal(back.scale[: layout.rows], quantized.scale)
    assert (back.zero is None) == (layout.format == "int8")
    if quantized.zero is not None:
        np.testing.assert_array_equal(back.zero[: layout.rows], quantized.zero)


def test_codes_of_another_quantiser_are_kept() -> None:
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 16, (32, 256)).astype(np.uint8)
    scale = rng.uniform(0.01, 0.1, (32, 4)).astype(np.float16)
    zero = rng.integers(0, 16, (32, 4)).astype(np.float16)
    layout = MatrixLayout("w", 32, 256, "int4", 64)
    back = unpack_matrix(pack_quantized(Quantized(codes, scale, zero), layout), layout)
    wide = (np.repeat(x.astype(np.float32), 64, axis=1) for x in (scale, zero))
    np.testing.assert_array_equal(back, next(wide) * (codes - next(wide)))


@pytest.mark.parametrize(
    ("format", "value"), [("bf16", 3.4e38), ("bf16", np.nan), ("int8", 1e7), ("int4", 5e5)]
)
def test_weights_that_do_not_fit_are_refused(format: str, value: float) -> None:
    w = normal(16, 64)
    w[3, 5] = value
    with pytest.raises(UnsupportedError, match=f"^down_proj: {format}.*: expected weights up to .*, found"):
        pack_matrix(w, MatrixLayout("down_proj", 16, 64, format))


@pytest.mark.parametrize("shape", [(16, 65), (17, 64), (16,)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="w: expected"):
        pack_matrix(np.zeros(shape, np.float32), MatrixLayout("w", 16, 64, "bf16"))


def test_gate_and_up_alternate_by_eight() -> None:
    gate, up = np.arange(1, 21), np.arange(101, 121)
    rows = interleave_gate_up(gate, up)
    assert rows.shape == (48,)
    np.testing.assert_array_equal(rows[:16], [*range(1, 9), *range(101, 109)])
    np.testing.assert_array_equal(rows[32:], [17, 18, 19, 20, 0, 0, 0, 0, 117, 118, 119, 120, 0, 0, 0, 0])


# ---- models ---------------------------------------------------------------------------------------------


def small_config(**changes: object) -> dict[str, object]:
    raw: dict[str, object] = {
        "model_type": "llama",
        "hidden_size": 48,
        "intermediate_size": 172,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 83,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    return raw | changes


def small_model_config(**changes: object) -> ModelConfig:
    return parse_config(small_config(**changes), "config.json")


def test_layouts_of_a_model() -> None:
    layouts = make_layouts(small_model_config(), "int4", 32)
    assert {name: (x.rows, x.cols, x.format, x.group_size) for name, x in layouts.items()} == {
        "qkv_proj": (128, 48, "int4", 32),
        "o_proj": (48, 64, "int4", 32),
        "gate_up_proj": (352, 48, "int4", 32),
        "down_proj": (48, 172, "int4", 32),
        "lm_head": (83, 48, "int8", 128),
    }
    assert all(name == layout.name for name, layout in layouts.items())
    assert {x.format for x in make_layouts(small_model_config(), "bf16").values()} == {"bf16"}
    assert {x.format for x in make_layouts(small_model_config(), "int8", 64).values()} == {"int8"}


@pytest.mark.parametrize(("format", "group_size"), [("fp8", 128), ("int4", 48), ("int8", 0)])
def test_unknown_formats_are_refused(format: str, group_size: int) -> None:
    with pytest.raises(UnsupportedError, match="expected one of"):
        make_layouts(small_model_config(), format, group_size)


def test_vectors_of_a_model() -> None:
    config = small_model_config()
    assert vector_offsets(config) == {"input_layernorm": (0, 48), "post_attention_layernorm": (48, 48)}
    assert vectors_length(config) == 96
    everything = dataclasses.replace(
        config, hidden_size=50, qk_norm=True, qkv_bias=True, o_bias=True, mlp_bias=True
    )
    assert vector_offsets(everything) == {
        "input_layernorm": (0, 50),
        "post_attention_layernorm": (52, 50),
        "q_norm": (104, 16),
        "k_norm": (120, 16),
        "qkv_bias": (136, 128),
        "o_bias": (264, 50),
        "gate_up_bias": (316, 352),
        "down_bias": (668, 50),
    }
    assert vectors_length(everything) == 720


# ---- the packed directory -------------------------------------------------------------------------------


def write_model(
    directory: Path, destination: Path, *, format: str = "int4", stop: bool = False
) -> dict[str, np.ndarray]:
    """Write a packed directory of random tensors and return them; with `stop` fail in the middle."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(small_config()))
    (directory / "tokenizer.json").write_text("{}")
    config = small_model_config()
    specs = packed_tensors(config, make_layouts(config, format, 64))
    rng = np.random.default_rng(9)
    tensors = {
        name: rng.integers(0, 256, spec.nbytes).astype(np.uint8).view(spec.dtype)
        for name, spec in specs.items()
    }
    with PackedWriter(directory, destination, specs, format, 64) as writer:
        for count, (name, data) in enumerate(tensors.items()):
            if stop and count == 3:
                raise KeyboardInterrupt
            middle = len(data) // 2
            writer.add(name, data[:middle])
            writer.add(name, data[middle:])
    return tensors


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    write_model(tmp_path / "src", tmp_path / "dst")
    return tmp_path / "dst"


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_written_models_are_read_back_where_they_are_mapped(tmp_path: Path, format: str) -> None:
    tensors = write_model(tmp_path / "src", tmp_path / "dst", format=format)
    model = read_packed(tmp_path / "dst", verify=True)
    assert (model.format, model.directory) == (format, tmp_path / "dst")
    assert model.group_size == (128 if format == "bf16" else 64)
    assert model.config == small_model_config()
    found = {"norm": model.norm, "lm_head": model.lm_head, "embed_tokens": model.embed_tokens.reshape(-1)}
    for index, layer in enumerate(model.layers):
        found |= {f"layers.{index}.{name}": array for name, array in vars(layer).items()}
    assert found.keys() == tensors.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array.view(np.uint8), tensors[name].view(np.uint8), err_msg=name)
        assert array.ctypes.data % 128 == 0, name
        assert not array.flags.owndata and not array.flags.writeable, name


def test_a_packed_file_is_valid_safetensors(packed: Path) -> None:
    with safe_open(packed / PACKED_FILE, "numpy") as file:
        assert file.metadata()["format"] == "int4"
        assert file.get_tensor("norm").shape == (64,)  # 48 and zeros up to 256 bytes
        assert not file.get_tensor("norm")[48:].any()


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_model(tmp_path / "src", tmp_path / "dst", stop=True)
    assert os.listdir(tmp_path) == ["src"]


def test_a_file_without_its_digest_is_refused(packed: Path) -> None:
    data = bytearray((packed / PACKED_FILE).read_bytes())
    start = data.index(b'"data_digest":"') + len(b'"data_digest":"')
    data[start : start + 32] = b"0" * 32
    (packed / PACKED_FILE).write_bytes(data)
    with pytest.raises(CheckpointError, match="the conversion was interrupted; convert again: ffmini"):
        read_packed(packed, verify=False)


def test_tensors_out_of_order_or_incomplete_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "src", tmp_path / "old")
    specs = packed_tensors(small_model_config(), make_layouts(small_model_config(), "int4", 64))
    for name, count in (("layers.0.o_proj", 1), ("layers.0.qkv_proj", specs["layers.0.qkv_proj"].nbytes + 1)):
        with (
            pytest.raises(ValueError, match=r"expected up to .* bytes of layers.0.qkv_proj"),
            PackedWriter(tmp_path / "src", tmp_path / "dst", specs, "int4", 64) as writer,
        ):
            writer.add(name, np.zeros(count, np.uint8))
    with (
        pytest.raises(ValueError, match=r"more bytes of layers\.0.qkv_proj, found the end"),
        PackedWriter(tmp_path / "src", tmp_path / "dst", specs, "int4", 64) as writer,
    ):
        writer.add("layers.0.qkv_proj", np.zeros(1, np.uint8))
    assert sorted(os.listdir(tmp_path)) == ["old", "src"]


def patch(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert data.count(old) == 1 and len(old) == len(new)
    path.write_bytes(data.replace(old, new))


def test_another_version_is_refused_with_the_command(packed: Path) -> None:
    patch(packed / PACKED_FILE, b'"ffmini_packing":"2"', b'"ffmini_packing":"7"')
    command = "ffmini convert SRC DST --dtype int4 --group-size 64 --force"
    with pytest.raises(
        CheckpointError, match=f"expected packing version 2, found 7; convert again: {command}$"
    ):
        read_packed(packed)


def test_damaged_data_is_refused(packed: Path) -> None:
    path = packed / PACKED_FILE
    data = bytearray(path.read_bytes())
    data[-300] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"expected data of digest [0-9a-f]{32}, found"):
        read_packed(packed)
    read_packed(packed, verify=False)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"format":"int4"', b'"format":"int5"', "format: expected one of bf16, int8, int4, found 'int5'"),
        (b'"format":"int4"', b'"format":"int8"', "layers.0.qkv_proj: expected uint8 "),
        (b'"group_size":"64"', b'"group_size":"65"', "group_size: expected one of 32, 64, 128, found '65'"),
        (b'"config_digest"', b'"config_digesu"', "metadata: expected the key 'config_digest', found none"),
        (b'"layers.1.o_proj"', b'"layers.1.o_prox"', "found no tensor 'layers.1.o_proj'"),
    ],
)
def test_a_header_that_was_tampered_with_is_refused(
    packed: Path, old: bytes, new: bytes, message: str
) -> None:
    patch(packed / PACKED_FILE, old, new)
    with pytest.raises(CheckpointError, match=message):
        read_packed(packed)


def test_a_truncated_file_is_refused(packed: Path) -> None:
    path = packed / PACKED_FILE
    path.write_bytes(path.read_bytes()[:-128])
    with pytest.raises(FFMiniError, match=PACKED_FILE):
        read_packed(packed, verify=False)


def test_a_changed_configuration_is_refused(packed: Path) -> None:
    (packed / "config.json").write_text(json.dumps(small_config(rope_theta=500000.0)))
    with pytest.raises(
        CheckpointError, match=r"config.json: changed since the weights were packed; convert again"
    ):
        read_packed(packed)


def test_destinations(tmp_path: Path, packed: Path) -> None:
    check_destination(tmp_path / "new", force=False)
    (tmp_path / "empty").mkdir()
    check_destination(tmp_path / "empty", force=False)
    check_destination(packed, force=True)
    with pytest.raises(CheckpointError, match="a packed model is there already; --force replaces it"):
        check_destination(packed, force=False)
    with pytest.raises(
        CheckpointError, match=r"expected an empty directory or none, found 'config.json' in it"
    ):
        check_destination(tmp_path / "src", force=True)
    with pytest.raises(CheckpointError, match="expected a directory or nothing, found a file"):
        check_destination(packed / "config.json", force=True)
    with pytest.raises(CheckpointError, match="expected a directory to write into, found none"):
        check_destination(tmp_path / "no" / "where", force=False)
    (packed / "notes.txt").write_text("mine")
    with pytest.raises(
        CheckpointError, match=r"--force would delete 'notes.txt', which ffmini did not write"
    ):
        check_destination(packed, force=True)


def test_a_packed_directory_is_replaced_whole(tmp_path: Path, packed: Path) -> None:
    write_model(tmp_path / "src", packed, format="bf16")
    assert read_packed(packed).format == "bf16"
    assert sorted(os.listdir(tmp_path)) == ["dst", "src"]


def test_bf16_rounding_is_to_nearest_even() -> None:
    w = np.array([[1.00390625, 1.01171875, 1.0039064, -0.0, 1e-40, 3.3895e38]], np.float32)
    layout = MatrixLayout("w", 1, 6, "bf16")
    expected = np.array([1.0, 1.015625, 1.0078125, -0.0, 9.9994e-41, 3.3895e38], np.float32)
    found = unpack_matrix(pack_matrix(w, layout), layout)[0]
    np.testing.assert_array_equal(to_bf16(found), to_bf16(expected))
