"""Checkpoints of safetensors files, read without trust: what is odd is refused with one line.

A safetensors file is 8 bytes of header length, a JSON header that says dtype, shape and byte range of
each tensor, and the data. Opening one reads the header only; tensors are then views of the mapped file.
"""

from __future__ import annotations

import math
import mmap
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np

from ffmini.config import (
    LFS_MAGIC,
    ModelConfig,
    parse_json_object,
    read_json,
    refuse_lfs_pointer,
    regular_file_size,
    shorten,
)
from ffmini.errors import CheckpointError, UnsupportedError
from ffmini.numerics import from_bf16

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PACKED_FILE = "packed.safetensors"  # what `ffmini convert` writes
MAX_HEADER_BYTES = 100_000_000
MAX_RANK = 8
MAX_NAME = 256
BLOCK_BYTES = 16 << 20  # how much of a tensor is looked at in one go

# Bytes per element, and what NumPy calls it (bf16 as its bits; None: NumPy has no such type).
_DTYPES: dict[str, tuple[int, str | None]] = {
    "BOOL": (1, "?"),
    "U8": (1, "u1"),
    "I8": (1, "i1"),
    "F8_E4M3": (1, None),
    "F8_E5M2": (1, None),
    "F8_E8M0": (1, None),
    "U16": (2, "<u2"),
    "I16": (2, "<i2"),
    "F16": (2, "<f2"),
    "BF16": (2, "<u2"),
    "U32": (4, "<u4"),
    "I32": (4, "<i4"),
    "F32": (4, "<f4"),
    "U64": (8, "<u8"),
    "I64": (8, "<i8"),
    "F64": (8, "<f8"),
}
WEIGHT_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor; `offset` is the place of its first byte in the file."""

    dtype: str  # as safetensors calls it: "BF16", "F16", "F32", "U8", ...
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _DTYPES[self.dtype][0]


# ---- one safetensors file -------------------------------------------------------------------------------


class SafetensorsFile:
    """A safetensors file with a checked header, mapped read-only.

    `metadata` is the header's __metadata__ (text to text), `tensors` says dtype, shape and place of each
    tensor. Every byte after the header belongs to exactly one tensor.
    """

    def __init__(self, path: Path) -> None:
        """Open `path` and check its header; raises CheckpointError."""
        self.path = Path(path)
        regular_file_size(self.path)  # first, as opening a pipe would wait
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                header, data_start = _read_header(self.path, file, size)
                self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{self.path}: expected a readable file, found: {error.strerror}") from None
        self.metadata = _check_metadata(self.path, header.pop("__metadata__", {}))
        tensors = {name: _check_entry(self.path, name, entry, data_start) for name, entry in header.items()}
        _check_coverage(self.path, tensors, data_start, size)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)

    def view(self, name: str) -> np.ndarray:
        """The tensor as a read-only array on the mapped file, in its own shape; bf16 as uint16 bits.

        Raises CheckpointError if there is no such tensor, UnsupportedError if NumPy lacks its dtype.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path}: {name}: expected a tensor, found none of this name")
        dtype = _DTYPES[info.dtype][1]
        if dtype is None:
            raise UnsupportedError(f"{self.path}: {name}: found dtype {info.dtype}, which is not supported")
        return np.ndarray(info.shape, dtype, buffer=self._map, offset=info.offset)


def _read_header(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The header of `file`, which has `size` bytes, as a dictionary, and where the data starts."""
    head = file.read(len(LFS_MAGIC))
    refuse_lfs_pointer(path, head)
    if size < 8:
        raise CheckpointError(f"{path}: expected a safetensors file, found only {size} bytes")
    length = int.from_bytes(head[:8], "little")
    file.seek(8)
    limit = min(size - 8, MAX_HEADER_BYTES)
    if not 2 <= length <= limit:
        raise CheckpointError(f"{path}: header length: expected 2 to {limit} bytes, found {length}")
    text = file.read(length)
    if text[:1] != b"{":
        raise CheckpointError(f"{path}: header: expected a JSON object, found {shorten(text[:16])}")
    return parse_json_object(text, f"{path}: header"), 8 + length


def _check_metadata(path: Path, metadata: Any) -> Mapping[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__: expected text to text, found {shorten(metadata)}")
    return MappingProxyType(metadata)


def _check_entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """One tensor of a header, checked as far as it can be without the others."""
    _check_name(str(path), name)
    where = f"{path}: {name}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets, found {shorten(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(f"{where}: dtype: expected one of {', '.join(_DTYPES)}, found {shorten(dtype)}")
    if not _is_integers(shape, 1) or len(shape) > MAX_RANK:
        raise CheckpointError(
            f"{where}: shape: expected at most {MAX_RANK} sizes from 1 to 2**63 - 1, found {shorten(shape)}"
        )
    if not _is_integers(offsets, 0) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets: expected [begin, end], found {shorten(offsets)}")
    nbytes = math.prod(shape) * _DTYPES[dtype][0]
    if nbytes != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{where}: data_offsets: expected {shorten(nbytes)} bytes for {dtype} {shorten(shape)}, "
            f"found {shorten(offsets[1] - offsets[0])}"
        )
    return TensorInfo(dtype, tuple(shape), path, data_start + offsets[0])


def _check_name(where: str, name: str) -> None:
    """Raise CheckpointError for a tensor name that could not stand in a message as it is."""
    if not name.isascii() or not name.isprintable() or not 0 < len(name) <= MAX_NAME:
        raise CheckpointError(
            f"{where}: expected names of 1 to {MAX_NAME} ASCII characters, found {shorten(name)}"
        )


def _is_integers(value: Any, low: int) -> bool:
    return isinstance(value, list) and all(type(item) is int and low <= item < 1 << 63 for item in value)


def _check_coverage(path: Path, tensors: Mapping[str, TensorInfo], data_start: int, size: int) -> None:
    """Raise CheckpointError unless the tensors fill the bytes from `data_start` to `size` exactly."""
    position = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != position:
            flaw = "a hole" if info.offset > position else "an overlap"
            raise CheckpointError(
                f"{path}: {name}: data_offsets: expected to begin at {position - data_start}, "
                f"found {shorten(info.offset - data_start)}: {flaw}"
            )
        position += info.nbytes
        if position > size:
            raise CheckpointError(
                f"{path}: {name}: data_offsets: expected to end at or before {size - data_start}, "
                f"the end of the file, found {shorten(position - data_start)}"
            )
    if position != size:
        raise CheckpointError(f"{path}: expected the file to end after {position} bytes, found {size}")


# ---- a directory of them --------------------------------------------------------------------------------


class Checkpoint:
    """The weights of a Hugging Face directory: model.safetensors, or the shards that its index names.

    All headers are checked when it is opened; data is read tensor by tensor, from any thread. `names` has
    the names of all tensors.
    """

    def __init__(self, directory: Path) -> None:
        """Open the weights in `directory`; raises CheckpointError."""
        self.directory = Path(directory)
        self._files: dict[str, SafetensorsFile] = {}  # tensor name -> the file that has it
        single, index = self.directory / SINGLE_FILE, self.directory / INDEX_FILE
        if os.path.lexists(single):
            file = SafetensorsFile(single)
            self._files = dict.fromkeys(file.tensors, file)
        elif os.path.lexists(index):
            self._open_shards(index)
        else:
            has_pickle = os.path.lexists(self.directory / "pytorch_model.bin")
            found = "pytorch_model.bin, which is not supported" if has_pickle else "neither"
            raise CheckpointError(f"{self.directory}: expected {SINGLE_FILE} or {INDEX_FILE}, found {found}")
        self.names = set(self._files)

    def _open_shards(self, index: Path) -> None:
        """Open the shards of `index`; each tensor must lie where the index says and nowhere else."""
        weight_map = _check_weight_map(index, read_json(index))
        for shard in sorted(set(weight_map.values())):
            file = SafetensorsFile(self.directory / shard)
            for name in file.tensors:
                if name in self._files:
                    other = self._files[name].path.name
                    raise CheckpointError(f"{file.path}: {name}: expected in one shard, found in {other} too")
                if name not in weight_map and not is_ignorable(name):
                    raise CheckpointError(f"{file.path}: {name}: expected it in {INDEX_FILE}, found no entry")
                self._files[name] = file
        for name, shard in weight_map.items():
            file = self._files.get(name)
            if file is None or file.path.name != shard:
                found = "it in no shard" if file is None else f"it in {file.path.name}"
                raise CheckpointError(
                    f"{self.directory / shard}: {name}: expected as in {INDEX_FILE}, found {found}"
                )

    def _file(self, name: str) -> SafetensorsFile:
        file = self._files.get(name)
        if file is None:
            raise CheckpointError(f"{self.directory}: {name}: expected a tensor, found none of this name")
        return file

    def info(self, name: str) -> TensorInfo:
        """dtype, shape and file of a tensor; CheckpointError if there is none of this name."""
        return self._file(name).tensors[name]

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A copy of the tensor, or of some rows (a slice of its first axis), as float32; exact.

        Raises CheckpointError if a value is NaN or infinite, UnsupportedError for a dtype other than bf16,
        fp16 and fp32.
        """
        info = self.info(name)
        if info.dtype not in WEIGHT_DTYPES:
            raise _unsupported_dtype(name, info)
        view = self._file(name).view(name)
        part = view if rows is None else view[rows]
        values = from_bf16(part) if info.dtype == "BF16" else part.astype(np.float32)
        if not np.isfinite(values).all():
            place = [int(i) for i in np.argwhere(~np.isfinite(values))[0]]
            value = values[tuple(place)]
            if rows is not None:
                place[0] = range(*rows.indices(view.shape[0]))[place[0]]
            raise CheckpointError(f"{info.file}: {name}: expected finite values, found {value} at {place}")
        return values

    def close(self) -> None:
        """Let go of the files; each stays mapped only while an array on it lives."""
        self._files = {}


def _unsupported_dtype(name: str, info: TensorInfo) -> UnsupportedError:
    expected = ", ".join(WEIGHT_DTYPES)
    return UnsupportedError(
        f"{info.file}: {name}: dtype: expected one of {expected}, found {info.dtype}, which is not supported"
    )


def _check_weight_map(index: Path, raw: Mapping[str, Any]) -> dict[str, str]:
    """The index's weight_map: tensor name -> bare name of a safetensors file beside it."""
    weight_map = raw.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: weight_map: expected tensor names to file names, found {shorten(weight_map)}"
        )
    for name, shard in weight_map.items():
        _check_name(f"{index}: weight_map", name)
        if not isinstance(shard, str) or not re.fullmatch(r"[\w\-][\w.\-]*\.safetensors", shard, re.ASCII):
            raise CheckpointError(
                f"{index}: weight_map: {name}: expected the bare name of a .safetensors file, "
                f"found {shorten(shard)}"
            )
    return weight_map


# ---- config against weights -----------------------------------------------------------------------------


def is_ignorable(name: str) -> bool:
    """Whether the tensor is one that old checkpoints carry and nobody needs."""
    return name.endswith(".rotary_emb.inv_freq")


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face's name and the shape of every tensor that a model of `config` has."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    matrices = {
        "self_attn.q_proj": ((q_rows, hidden), config.qkv_bias),
        "self_attn.k_proj": ((kv_rows, hidden), config.qkv_bias),
        "self_attn.v_proj": ((kv_rows, hidden), config.qkv_bias),
        "self_attn.o_proj": ((hidden, q_rows), config.o_bias),
        "mlp.gate_proj": ((intermediate, hidden), config.mlp_bias),
        "mlp.up_proj": ((intermediate, hidden), config.mlp_bias),
        "mlp.down_proj": ((hidden, intermediate), config.mlp_bias),
    }
    vectors = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config.qk_norm:
        vectors |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        for name, (shape, has_bias) in matrices.items():
            shapes[f"{prefix}{name}.weight"] = shape
            if has_bias:
                shapes[f"{prefix}{name}.bias"] = shape[:1]
        for name, length in vectors.items():
            shapes[f"{prefix}{name}.weight"] = (length,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def check_tensors(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Raise an error unless the checkpoint has the tensors of `config`, all of them and no others.

    rotary_emb.inv_freq is ignored, and the lm_head of a tied model if it equals the embedding. Raises
    CheckpointError for a missing, unknown or misshapen tensor, UnsupportedError for a dtype.
    """
    shapes = expected_tensors(config)
    if config.tie_word_embeddings and "lm_head.weight" in checkpoint.names:
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    missing = [name for name in shapes if name not in checkpoint.names]
    if missing:
        raise CheckpointError(
            f"{checkpoint.directory}: {missing[0]}: expected a tensor of shape {list(shapes[missing[0]])}, "
            f"found none ({len(missing)} of {len(shapes)} tensors are missing)"
        )
    for name in sorted(checkpoint.names):
        info = checkpoint.info(name)
        if name not in shapes:
            if is_ignorable(name):
                continue
            raise CheckpointError(
                f"{info.file}: {name}: expected no such tensor in this "
                f"{config.model_type} model, found {info.dtype} {list(info.shape)}"
            )
        if info.shape != shapes[name]:
            raise CheckpointError(
                f"{info.file}: {name}: expected shape {list(shapes[name])}, found {list(info.shape)}"
            )
        if info.dtype not in WEIGHT_DTYPES:
            raise _unsupported_dtype(name, info)
    if config.tie_word_embeddings and "lm_head.weight" in checkpoint.names:
        _check_tied(checkpoint)


def _check_tied(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless lm_head.weight has the values of the embedding."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    for rows in _row_blocks(checkpoint.info(head)):
        differ = checkpoint.read(head, rows) != checkpoint.read(embedding, rows)
        if differ.any():
            row = rows.start + int(np.argwhere(differ)[0][0])
            raise CheckpointError(
                f"{checkpoint.info(head).file}: {head}: expected the values of {embedding}, as "
                f"tie_word_embeddings is true, found others in row {row}"
            )


def _row_blocks(info: TensorInfo) -> Iterator[slice]:
    """Slices of the first axis, each of about BLOCK_BYTES, that cover the tensor."""
    step = max(1, BLOCK_BYTES * info.shape[0] // info.nbytes)
    for start in range(0, info.shape[0], step):
        yield slice(start, min(start + step, info.shape[0]))


# ---- where a model lies ---------------------------------------------------------------------------------


def resolve_model(name_or_path: str | Path) -> Path:
    """The directory of a model: an existing directory, or "org/name" in the local Hugging Face cache.

    Nothing is downloaded. Raises CheckpointError, with the command that downloads the model if the
    argument looks like the name of one.
    """
    if os.path.isdir(name_or_path):
        return Path(name_or_path)
    name = str(name_or_path)
    if os.path.lexists(name):
        raise CheckpointError(f"{name}: expected a model directory, found a file or a broken link")
    part = r"\w[\w.\-]*"
    if not re.fullmatch(f"{part}/{part}", name, re.ASCII):
        raise CheckpointError(f"{shorten(name)}: expected a directory or a name like org/name, found neither")
    cache = _cache_directory()
    snapshot = _cached_snapshot(cache / f"models--{name.replace('/', '--')}")
    if snapshot is None:
        raise CheckpointError(
            f"{name}: expected a directory or a model in {cache}, found neither; "
            f"get it with: hf download {name}"
        )
    return snapshot


def _cache_directory() -> Path:
    """Where Hugging Face's tools keep what they downloaded, by the environment variables that they read."""
    for variable, below in (("HF_HUB_CACHE", ""), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub")):
        if value := os.environ.get(variable):
            return Path(os.path.expanduser(value)) / below
    return Path(os.path.expanduser("~/.cache/huggingface/hub"))


def _cached_snapshot(repository: Path) -> Path | None:
    """The snapshot of the main branch, if its config and weights (or an index of them) are there."""
    ref = repository / "refs" / "main"
    if not ref.is_file():
        return None
    commit = ref.read_bytes()[:100].decode("ascii", "replace").strip()
    if not re.fullmatch(r"\w+", commit, re.ASCII):
        raise CheckpointError(f"{ref}: expected the name of a snapshot, found {shorten(commit)}")
    snapshot = repository / "snapshots" / commit
    has_weights = any((snapshot / name).is_file() for name in (SINGLE_FILE, INDEX_FILE, PACKED_FILE))
    return snapshot if has_weights and (snapshot / "config.json").is_file() else None
