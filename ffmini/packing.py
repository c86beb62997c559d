"""Weights in the kernel's order (layout.py): dense <-> packed, and the packed directory on disk.

A packed directory holds `packed.safetensors`, the config.json that it was made from and the tokenizer's
files. Every tensor is one-dimensional and padded with zeros to a multiple of 128 bytes, so that each
starts at a 128-byte boundary of the file and can be used where it is mapped. The file's metadata:

- `ffmini_packing`: the version of this form; another one is refused;
- `format`, `group_size`: what the projections are stored as;
- `config_digest`: BLAKE2b of config.json's bytes, checked whenever the directory is opened;
- `data_digest`: BLAKE2b of everything after the header. It is all zeros until the file is complete, which
  is refused always; it is compared with the data in files of up to 64 MiB, or on demand (about 1 GB/s).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from ffmini.checkpoint import PACKED_FILE, SafetensorsFile
from ffmini.config import ModelConfig, load_config
from ffmini.errors import CheckpointError, UnsupportedError
from ffmini.layout import (
    FORMATS,
    LINE_BYTES,
    LINE_K,
    LINES_PER_SLOT,
    SCALE_BYTES,
    TILE_ROWS,
    MatrixLayout,
    ceil_div,
)
from ffmini.numerics import from_bf16, to_bf16
from ffmini.quant import GROUP_SIZES, Quantized, quantize

PACKING_VERSION = 2
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
LAYER_MATRICES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
ALIGNMENT = 128
VECTOR_ALIGNMENT = 4  # floats: the kernel reads vectors 16 bytes at a time
ALWAYS_VERIFIED_BYTES = 64 << 20
_DIGEST_BYTES = 16
_SAMPLES, _SAMPLE_BYTES = 16, 4096  # of a tensor
_NO_DIGEST = "0" * (2 * _DIGEST_BYTES)
_DTYPE_NAMES = {"u1": "U8", "u2": "BF16", "f4": "F32"}


# ---- which matrices and vectors a model has ------------------------------------------------------------


def make_layouts(config: ModelConfig, format: str, group_size: int = 128) -> dict[str, MatrixLayout]:
    """The packed geometry of each matrix of `config`: LAYER_MATRICES and "lm_head".

    qkv_proj has the rows of q, k and v in this order. Each tile of gate_up_proj has eight rows of gate and
    the same eight of up, so that one tile holds both operands of a product. lm_head is int8 with groups of
    128 in the quantised formats. Raises UnsupportedError for an unknown format or group size.
    """
    if format not in FORMATS:
        raise UnsupportedError(f"dtype: expected one of {', '.join(FORMATS)}, found {format!r}")
    if group_size not in GROUP_SIZES:
        raise UnsupportedError(f"group size: expected one of {GROUP_SIZES}, found {group_size!r}")
    q_rows = config.num_heads * config.head_dim
    kv_rows = config.num_kv_heads * config.head_dim
    shapes = {
        "qkv_proj": (q_rows + 2 * kv_rows, config.hidden_size),
        "o_proj": (config.hidden_size, q_rows),
        "gate_up_proj": (gate_up_rows(config), config.hidden_size),
        "down_proj": (config.hidden_size, config.intermediate_size),
    }
    group_size = 128 if format == "bf16" else group_size
    layouts = {
        name: MatrixLayout(name, rows, cols, format, group_size) for name, (rows, cols) in shapes.items()
    }
    head_format = "bf16" if format == "bf16" else "int8"
    layouts["lm_head"] = MatrixLayout("lm_head", config.vocab_size, config.hidden_size, head_format, 128)
    return layouts


def gate_up_rows(config: ModelConfig) -> int:
    """Rows of the packed gate_up_proj: 16 for every eight (or fewer, at the end) of intermediate_size."""
    return TILE_ROWS * ceil_div(config.intermediate_size, TILE_ROWS // 2)


def interleave_gate_up(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """[n, ...] gate and up -> [2 * ceil(n / 8) * 8, ...]: eight of gate, eight of up, ..., zeros last."""
    half = TILE_ROWS // 2
    chunks = ceil_div(len(gate), half)
    out = np.zeros((chunks, 2, half, *gate.shape[1:]), gate.dtype)
    for index, part in enumerate((gate, up)):
        whole = len(part) // half
        out[:whole, index] = part[: whole * half].reshape(whole, half, *part.shape[1:])
        if whole < chunks:
            out[whole, index, : len(part) - whole * half] = part[whole * half :]
    return out.reshape(chunks * TILE_ROWS, *gate.shape[1:])


def vector_offsets(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Where each vector of a layer lies in PackedLayer.vectors: name -> (offset, length), in floats.

    Only the vectors that the model has are present; gate_up_bias is in the order of the packed rows.
    """
    hidden = config.hidden_size
    qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    lengths = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config.qk_norm:
        lengths |= {"q_norm": config.head_dim, "k_norm": config.head_dim}
    if config.qkv_bias:
        lengths["qkv_bias"] = qkv
    if config.o_bias:
        lengths["o_bias"] = hidden
    if config.mlp_bias:
        lengths |= {"gate_up_bias": gate_up_rows(config), "down_bias": hidden}
    offsets, offset = {}, 0
    for name, length in lengths.items():
        offsets[name] = (offset, length)
        offset += ceil_div(length, VECTOR_ALIGNMENT) * VECTOR_ALIGNMENT
    return offsets


def vectors_length(config: ModelConfig) -> int:
    """Floats in PackedLayer.vectors."""
    offset, length = list(vector_offsets(config).values())[-1]
    return ceil_div(offset + length, VECTOR_ALIGNMENT) * VECTOR_ALIGNMENT


# ---- one matrix: dense <-> packed ----------------------------------------------------------------------


def pack_matrix(w: np.ndarray, layout: MatrixLayout) -> np.ndarray:
    """Pack float32 `w` [rows, cols] -> uint8 [tiles of these rows * tile_bytes], rounding or quantising it.

    `w` is the whole matrix or a block of its rows that starts at a multiple of 16 and, unless it ends the
    matrix, ends at one. Raises UnsupportedError if a weight is too large for the format.
    """
    if w.ndim != 2 or w.shape[1] != layout.cols or len(w) > layout.rows:
        raise ValueError(
            f"{layout.name}: expected up to {layout.rows} rows of {layout.cols} columns, found {w.shape}"
        )
    if layout.format != "bf16":
        try:
            return pack_quantized(quantize(w, layout.format, layout.group_size), layout)
        except UnsupportedError as error:
            raise UnsupportedError(f"{layout.name}: {error}") from None
    tiles = _as_tiles(checked_bf16(w, layout.name), layout)
    # [tile, hi, g, j, t, s, half] pairs -> [tile, j, s, g, t, half, hi]
    pairs = tiles.view(np.uint32).reshape(len(tiles), 2, 8, -1, 4, 2, 2)
    lines = np.ascontiguousarray(pairs.transpose(0, 3, 5, 2, 4, 6, 1))
    return lines.view(np.uint8).reshape(-1)


def pack_quantized(quantized: Quantized, layout: MatrixLayout) -> np.ndarray:
    """Pack codes, scales and zeros of whole tiles (see pack_matrix) -> uint8 [tiles * tile_bytes]."""
    codes = _as_tiles(quantized.codes.view(np.uint8), layout)
    count = len(codes)
    if layout.format == "int8":
        # [tile, hi, g, j, t, s] words of four k -> [tile, j, g, t, s, hi]
        words = codes.view(np.uint32).reshape(count, 2, 8, -1, 4, 2)
        lines = words.transpose(0, 3, 2, 4, 5, 1)
        parameters = quantized.scale[..., None]
    else:
        # [tile, g, line, j % 2, t, s] words of four k, rows g and g + 8 in each
        # -> [tile, line, g, t, j % 2, s]
        both = codes[:, :8] | codes[:, 8:] << 4
        words = both.view(np.uint32).reshape(count, 8, -1, 2, 4, 2)
        lines = words.transpose(0, 2, 1, 4, 3, 5)
        parameters = np.stack((quantized.scale, quantized.zero), axis=-1)
    lines = np.ascontiguousarray(lines).view(np.uint8).reshape(count, -1, LINE_BYTES)
    rows, groups, width = parameters.shape
    padded = np.zeros((count * TILE_ROWS, layout.groups, width), np.float16)
    padded[:rows, :groups] = parameters
    scales = padded.reshape(count, TILE_ROWS, layout.groups, width).transpose(0, 2, 1, 3)
    scales = np.ascontiguousarray(scales).view(np.uint8).reshape(count, layout.groups, -1)
    out = np.empty((count, layout.tile_bytes), np.uint8)
    for line_view, line_range, scale_view, group_range in _slot_views(out, layout):
        line_view[...] = lines[:, line_range].reshape(line_view.shape)
        scale_view[...] = scales[:, group_range].reshape(scale_view.shape)
    return out.reshape(-1)


def unpack_matrix(packed: np.ndarray, layout: MatrixLayout, tiles: slice | None = None) -> np.ndarray:
    """The float32 weights [rows, cols] of `packed` (uint8 [layout.nbytes]), or of a slice of its tiles."""
    buffer = packed.reshape(layout.tiles, layout.tile_bytes)
    first = 0
    if tiles is not None:
        first = tiles.indices(layout.tiles)[0]
        buffer = buffer[tiles]
    return unpack_tiles(buffer, layout)[: layout.rows - first * TILE_ROWS]


def unpack_tiles(buffer: np.ndarray, layout: MatrixLayout) -> np.ndarray:
    """The float32 weights [tiles * 16, cols] of uint8 [tiles, tile_bytes]; padding rows are 0."""
    count = len(buffer)
    if layout.format == "bf16":
        pairs = np.ascontiguousarray(buffer).view(np.uint32).reshape(count, -1, 2, 8, 4, 2, 2)
        bits = np.ascontiguousarray(pairs.transpose(0, 6, 3, 1, 4, 2, 5)).view(np.uint16)
        return from_bf16(bits.reshape(count * TILE_ROWS, layout.k_pad)[:, : layout.cols])
    quantized = unpack_quantized(buffer, layout)
    return quantized.dequantize(layout.group_size)


def unpack_quantized(buffer: np.ndarray, layout: MatrixLayout) -> Quantized:
    """Codes [tiles * 16, cols], scales and zeros [tiles * 16, groups] of uint8 [tiles, tile_bytes]."""
    count = len(buffer)
    lines = np.empty((count, layout.k_pad // LINE_K[layout.format], LINE_BYTES), np.uint8)
    scales = np.empty((count, layout.groups, TILE_ROWS * SCALE_BYTES[layout.format]), np.uint8)
    for line_view, line_range, scale_view, group_range in _slot_views(buffer, layout):
        lines[:, line_range] = line_view.reshape(count, -1, LINE_BYTES)
        scales[:, group_range] = scale_view.reshape(count, -1, scales.shape[-1])
    if layout.format == "int8":
        words = lines.view(np.uint32).reshape(count, -1, 8, 4, 2, 2).transpose(0, 5, 2, 1, 3, 4)
        codes = np.ascontiguousarray(words).view(np.uint8)
    else:
        words = lines.view(np.uint32).reshape(count, -1, 8, 4, 2, 2).transpose(0, 2, 1, 4, 3, 5)
        both = np.ascontiguousarray(words).view(np.uint8).reshape(count, 8, -1)
        codes = np.stack((both & 15, both >> 4), axis=1)
    codes = codes.reshape(count * TILE_ROWS, layout.k_pad)[:, : layout.cols]
    parameters = scales.view(np.float16).reshape(count, layout.groups, TILE_ROWS, -1).transpose(3, 0, 2, 1)
    parameters = parameters.reshape(-1, count * TILE_ROWS, layout.groups)
    parameters = parameters[..., : ceil_div(layout.cols, layout.group_size)]
    if layout.format == "int8":
        return Quantized(codes.view(np.int8), parameters[0], None)
    return Quantized(codes, parameters[0], parameters[1])


def checked_bf16(w: np.ndarray, name: str) -> np.ndarray:
    """Float32 `w` as bf16 bits (uint16); raises UnsupportedError if a weight does not stay finite."""
    bits = to_bf16(w)
    if (bits & 0x7F80 == 0x7F80).any():
        raise UnsupportedError(f"{name}: bf16: expected weights up to 3.39e+38, found {np.abs(w).max():g}")
    return bits


def _as_tiles(x: np.ndarray, layout: MatrixLayout) -> np.ndarray:
    """[rows, cols] -> [tiles, 16, k_pad] with zeros as padding; no copy if nothing is to be padded."""
    rows, cols = x.shape
    tiles = ceil_div(rows, TILE_ROWS)
    if (rows, cols) != (tiles * TILE_ROWS, layout.k_pad):
        padded = np.zeros((tiles * TILE_ROWS, layout.k_pad), x.dtype)
        padded[:rows, :cols] = x
        x = padded
    return np.ascontiguousarray(x).reshape(tiles, TILE_ROWS, layout.k_pad)


def _slot_views(
    buffer: np.ndarray, layout: MatrixLayout
) -> Iterator[tuple[np.ndarray, slice, np.ndarray, slice]]:
    """Views of the lines and the scales in packed tiles [tiles, tile_bytes], for full slots and for the tail.

    Yields (lines [tiles, slots, bytes], which lines these are, scales [tiles, slots, bytes], which groups).
    """
    full = layout.slots - 1  # every slot before the last
    lines, groups = full * LINES_PER_SLOT, full * layout.slot_k // layout.group_size
    split, at = full * layout.slot_bytes, LINES_PER_SLOT * LINE_BYTES
    if full:
        slots = buffer[:, :split].reshape(len(buffer), full, layout.slot_bytes)
        yield slots[..., :at], slice(0, lines), slots[..., at:], slice(0, groups)
    all_lines = layout.k_pad // LINE_K[layout.format]
    tail, at = buffer[:, None, split:], (all_lines - lines) * LINE_BYTES
    yield tail[..., :at], slice(lines, all_lines), tail[..., at:], slice(groups, layout.groups)


# ---- a whole model -------------------------------------------------------------------------------------


@dataclass
class PackedLayer:
    """One layer: uint8 [layout.nbytes] per matrix, and float32 vectors laid out by vector_offsets."""

    qkv_proj: np.ndarray
    o_proj: np.ndarray
    gate_up_proj: np.ndarray
    down_proj: np.ndarray
    vectors: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices and vectors."""
        return self.vectors.nbytes + sum(getattr(self, name).nbytes for name in LAYER_MATRICES)


@dataclass
class PackedModel:
    """All weights in the kernel's order, in memory or mapped from a packed directory.

    lm_head: uint8 [layout.nbytes]; embed_tokens: bf16 bits, uint16 [vocab_size, hidden_size], or None when
    tied (its rows are then those of lm_head); norm: float32 [hidden_size]; directory: where the configuration
    and the tokenizer lie.
    """

    config: ModelConfig
    format: str
    group_size: int
    layouts: dict[str, MatrixLayout]
    layers: list[PackedLayer]
    lm_head: np.ndarray
    embed_tokens: np.ndarray | None
    norm: np.ndarray
    directory: Path | None

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        embed = 0 if self.embed_tokens is None else self.embed_tokens.nbytes
        return sum(layer.nbytes for layer in self.layers) + self.lm_head.nbytes + embed + self.norm.nbytes


def weights_digest(packed: PackedModel) -> str:
    """Tells a model's weights from others, in memory or on disk: 32 hexadecimal digits.

    Of the configuration, the vectors, and _SAMPLES pieces of every other tensor: milliseconds for any model.
    """
    facts = dataclasses.asdict(packed.config) | {"format": packed.format, "group_size": packed.group_size}
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=_DIGEST_BYTES)
    for layer in packed.layers:
        digest.update(np.ascontiguousarray(layer.vectors))
    digest.update(np.ascontiguousarray(packed.norm))
    tensors = [getattr(layer, name) for layer in packed.layers for name in LAYER_MATRICES]
    tensors += [packed.lm_head] + ([] if packed.embed_tokens is None else [packed.embed_tokens])
    for tensor in tensors:
        data = tensor.reshape(-1).view(np.uint8)
        last = max(0, data.size - _SAMPLE_BYTES)
        for i in range(_SAMPLES):
            at = last * i // (_SAMPLES - 1)
            digest.update(np.ascontiguousarray(data[at : at + _SAMPLE_BYTES]))
    return digest.hexdigest()


@dataclass(frozen=True)
class TensorSpec:
    """A one-dimensional tensor of a packed file: `count` elements, zeros up to the next 128 bytes."""

    dtype: np.dtype
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize

    @property
    def stored_bytes(self) -> int:
        return ceil_div(self.nbytes, ALIGNMENT) * ALIGNMENT

    @property
    def stored_count(self) -> int:
        return self.stored_bytes // self.dtype.itemsize


def packed_tensors(config: ModelConfig, layouts: Mapping[str, MatrixLayout]) -> dict[str, TensorSpec]:
    """The tensors of a packed model by name, in file order: layers.N.{LAYER_MATRICES, vectors}, the rest."""
    byte, bf16, single = np.dtype("u1"), np.dtype("<u2"), np.dtype("<f4")
    specs = {}
    for layer in range(config.num_layers):
        for name in LAYER_MATRICES:
            specs[f"layers.{layer}.{name}"] = TensorSpec(byte, layouts[name].nbytes)
        specs[f"layers.{layer}.vectors"] = TensorSpec(single, vectors_length(config))
    specs["norm"] = TensorSpec(single, config.hidden_size)
    specs["lm_head"] = TensorSpec(byte, layouts["lm_head"].nbytes)
    if not config.tie_word_embeddings:
        specs["embed_tokens"] = TensorSpec(bf16, config.vocab_size * config.hidden_size)
    return specs


def assemble_model(
    config: ModelConfig,
    layouts: dict[str, MatrixLayout],
    tensors: Mapping[str, np.ndarray],
    directory: Path | None,
) -> PackedModel:
    """The PackedModel of one-dimensional `tensors`, named and typed as packed_tensors says."""
    layers = [
        PackedLayer(*(tensors[f"layers.{layer}.{name}"] for name in (*LAYER_MATRICES, "vectors")))
        for layer in range(config.num_layers)
    ]
    embed = tensors.get("embed_tokens")
    return PackedModel(
        config=config,
        format=layouts["qkv_proj"].format,
        group_size=layouts["qkv_proj"].group_size,
        layouts=layouts,
        layers=layers,
        lm_head=tensors["lm_head"],
        embed_tokens=None if embed is None else embed.reshape(config.vocab_size, config.hidden_size),
        norm=tensors["norm"],
        directory=directory,
    )


# ---- the packed directory ------------------------------------------------------------------------------


def is_packed(directory: Path) -> bool:
    """Whether `directory` is a finished conversion by its look; read_packed says whether it is a good one."""
    return (Path(directory) / PACKED_FILE).is_file()


def read_packed(directory: Path, verify: bool | None = None) -> PackedModel:
    """Map the packed model in `directory`; the arrays are read-only views of the file, nothing is copied.

    `verify` compares the data with its digest; None does so for files of up to 64 MiB. Raises CheckpointError
    if the file is damaged, incomplete, of another version or not made from the config.json beside it.
    """
    directory = Path(directory)
    path = directory / PACKED_FILE
    file = SafetensorsFile(path)
    metadata = file.metadata
    format, group_size = _check_metadata(path, metadata)
    config = load_config(directory)
    layouts = make_layouts(config, format, group_size)
    if metadata["config_digest"] != _digest_of((directory / "config.json").read_bytes()):
        changed = directory / "config.json"
        raise CheckpointError(f"{changed}: changed since the weights were packed; {_again(metadata)}")
    specs = packed_tensors(config, layouts)
    if set(file.tensors) != set(specs):
        odd = min(set(file.tensors) ^ set(specs))
        what = "an unknown tensor" if odd in file.tensors else "no tensor"
        raise CheckpointError(
            f"{path}: expected the {len(specs)} tensors of this config, found {what} {odd!r}"
        )
    tensors = {}
    for name, spec in specs.items():
        view = file.view(name)
        found = (view.dtype, view.shape)
        if found != (spec.dtype, (spec.stored_count,)):
            expected = f"{spec.dtype} [{spec.stored_count}]"
            raise CheckpointError(
                f"{path}: {name}: expected {expected}, found {view.dtype} {list(view.shape)}"
            )
        tensors[name] = view[: spec.count]
    if verify or (verify is None and path.stat().st_size <= ALWAYS_VERIFIED_BYTES):
        _check_data(path, metadata["data_digest"])
    return assemble_model(config, layouts, tensors, directory)


def _check_metadata(path: Path, metadata: Mapping[str, str]) -> tuple[str, int]:
    """Format and group size, after the version and the completeness of the file have been checked."""
    version = metadata.get("ffmini_packing")
    if version != str(PACKING_VERSION):
        raise CheckpointError(
            f"{path}: expected packing version {PACKING_VERSION}, found {version}; {_again(metadata)}"
        )
    for key in ("format", "group_size", "config_digest", "data_digest"):
        if key not in metadata:
            raise CheckpointError(f"{path}: metadata: expected the key {key!r}, found none")
    if metadata["data_digest"] == _NO_DIGEST:
        raise CheckpointError(f"{path}: the conversion was interrupted; {_again(metadata)}")
    for key, choices in (("format", FORMATS), ("group_size", [str(size) for size in GROUP_SIZES])):
        if metadata[key] not in choices:
            one_of = ", ".join(choices)
            raise CheckpointError(f"{path}: {key}: expected one of {one_of}, found {metadata[key]!r}")
    return metadata["format"], int(metadata["group_size"])


def _again(metadata: Mapping[str, str]) -> str:
    """What to type to get a good packed directory."""
    dtype, group = metadata.get("format", "bf16"), metadata.get("group_size", "128")
    options = f"--dtype {dtype}" + ("" if dtype == "bf16" else f" --group-size {group}")
    return f"convert again: ffmini convert SRC DST {options} --force"


def _check_data(path: Path, expected: str) -> None:
    """Raise CheckpointError unless everything after the header has the digest `expected`."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise CheckpointError(f"{path}: expected data of digest {expected}, found {digest.hexdigest()}")


def _digest_of(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).hexdigest()


def _packed_header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The safetensors header, length included, padded with spaces to a multiple of 128 bytes."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, spec in specs.items():
        end = offset + spec.stored_bytes
        header[name] = {
            "dtype": _DTYPE_NAMES[spec.dtype.str[1:]],
            "shape": [spec.stored_count],
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def check_destination(destination: Path, force: bool) -> None:
    """Raise CheckpointError unless `destination` can become a packed directory.

    It may be absent or empty; with `force` also a packed directory that holds only what a conversion writes.
    """
    if not destination.parent.is_dir():
        raise CheckpointError(f"{destination.parent}: expected a directory to write into, found none")
    if not destination.exists():
        return
    if not destination.is_dir():
        raise CheckpointError(f"{destination}: expected a directory or nothing, found a file")
    names = {entry.name for entry in destination.iterdir()}
    if not names:
        return
    if PACKED_FILE not in names:
        raise CheckpointError(
            f"{destination}: expected an empty directory or none, found {min(names)!r} in it"
        )
    if not force:
        raise CheckpointError(f"{destination}: a packed model is there already; --force replaces it")
    if foreign := sorted(names - {PACKED_FILE, *SMALL_FILES}):
        raise CheckpointError(
            f"{destination}: --force would delete {foreign[0]!r}, which ffmini did not write"
        )


class PackedWriter:
    """Writes a packed directory: all of it appears under its name at the end, or nothing does.

    A context manager. Data goes to a hidden temporary directory beside the destination, under a name that
    is_packed does not know; leaving the block without an error completes it and renames it into place.
    """

    def __init__(
        self, source: Path, destination: Path, specs: Mapping[str, TensorSpec], format: str, group_size: int
    ) -> None:
        """Copy the small files from `source`; `specs` says what add() will be given, in this order."""
        self._destination = destination
        self._specs = specs
        lengths = [(name, spec.nbytes, spec.stored_bytes - spec.nbytes) for name, spec in specs.items()]
        self._left = lengths[::-1]
        self._metadata = {
            "ffmini_packing": str(PACKING_VERSION),
            "format": format,
            "group_size": str(group_size),
            "config_digest": _digest_of((source / "config.json").read_bytes()),
            "data_digest": _NO_DIGEST,
        }
        self._digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        self._directory = self._beside("partial")
        self._directory.mkdir()
        try:
            for name in SMALL_FILES:
                if (source / name).is_file():
                    shutil.copyfile(source / name, self._directory / name)
            self._file = open(self._directory / f"{PACKED_FILE}.partial", "wb")  # noqa: SIM115
            self._file.write(_packed_header(specs, self._metadata))
        except BaseException:
            shutil.rmtree(self._directory, ignore_errors=True)
            raise

    def __enter__(self) -> PackedWriter:
        return self

    def add(self, name: str, data: np.ndarray) -> None:
        """Append the next bytes of the tensor `name`; tensors come whole and in the order of the specs."""
        expected, left, padding = self._left.pop()
        if name != expected or data.nbytes > left:
            raise ValueError(f"expected up to {left} bytes of {expected}, found {data.nbytes} of {name}")
        self._write(np.ascontiguousarray(data))
        if data.nbytes < left:
            self._left.append((name, left - data.nbytes, padding))
        elif padding:
            self._write(np.zeros(padding, np.uint8))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._file:
                if kind is None:
                    self._complete()
            if kind is None:
                self._publish()
        finally:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _beside(self, what: str) -> Path:
        """A new hidden name in the directory that holds the destination."""
        return self._destination.with_name(f".{self._destination.name}.{what}-{secrets.token_hex(4)}")

    def _write(self, data: np.ndarray) -> None:
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self._file.write(view)

    def _complete(self) -> None:
        """Put the digest into the header, which keeps its length, and see the file on the disk."""
        if self._left:
            raise ValueError(f"expected {self._left[-1][1]} more bytes of {self._left[-1][0]}, found the end")
        self._metadata["data_digest"] = self._digest.hexdigest()
        self._file.seek(0)
        self._file.write(_packed_header(self._specs, self._metadata))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _publish(self) -> None:
        """Rename the finished directory into place; a packed one that was there is deleted afterwards."""
        os.rename(self._directory / f"{PACKED_FILE}.partial", self._directory / PACKED_FILE)
        for name in SMALL_FILES:
            if (self._directory / name).exists():
                _sync(self._directory / name)
        _sync(self._directory)
        if is_packed(self._destination):
            old = self._beside("old")
            os.rename(self._destination, old)
            try:
                os.rename(self._directory, self._destination)
            except OSError:
                os.rename(old, self._destination)
                raise
            shutil.rmtree(old)
        else:
            os.rename(self._directory, self._destination)
        _sync(self._destination.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
