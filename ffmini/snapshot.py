"""Files that keep what a slot holds: its tokens, and their keys and values in plain order.

A safetensors file with the tensors tokens (I64 [count]), keys and values, of the decoder's kv_dtype: BF16
[num_layers, num_kv_heads, count, head_dim] or, int8, U8 [num_layers, num_kv_heads, count, head_dim + 4],
codes and the bytes of their fp32 scale. Its metadata says of which form it is, of which kv_dtype and of which
weights; the device does not matter.
"""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .checkpoint import SafetensorsFile
from .config import ModelConfig
from .errors import CheckpointError
from .layout import VectorLayout

VERSION = 2
_TOKENS = ("I64", "<i8")  # as the file and as NumPy call it
_VECTORS = {"bf16": ("BF16", "<u2"), "int8": ("U8", "u1")}


@dataclass(frozen=True)
class Snapshot:
    """Tokens of one sequence, with the keys and values of all of them."""

    tokens: np.ndarray  # int64 [count]
    keys: np.ndarray  # plain vectors [num_layers, num_kv_heads, count, plain_size]; see VectorLayout
    values: np.ndarray  # the same


def _forms(kv_dtype: str) -> dict[str, tuple[str, str]]:
    """Of each tensor what the file calls its dtype, and what NumPy does."""
    return {"tokens": _TOKENS, "keys": _VECTORS[kv_dtype], "values": _VECTORS[kv_dtype]}


def write_snapshot(path: Path, snapshot: Snapshot, weights: str, kv_dtype: str) -> None:
    """Make the file `path`, or put it in the place of an older one: whole, or not at all.

    `weights` is the digest of the weights that the keys and values, of `kv_dtype`, come from. OSError as of
    any file.
    """
    forms = _forms(kv_dtype)
    arrays = {name: getattr(snapshot, name).astype(kind, copy=False) for name, (_, kind) in forms.items()}
    origin = {"ffmini_snapshot": str(VERSION), "weights": weights, "kv_dtype": kv_dtype}
    header: dict[str, object] = {"__metadata__": origin}
    offset = 0
    for name, array in arrays.items():
        end = offset + array.nbytes
        header[name] = {
            "dtype": forms[name][0],
            "shape": list(array.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        with open(partial, "xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for array in arrays.values():
                file.write(memoryview(np.ascontiguousarray(array)).cast("B"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_snapshot(path: Path, weights: str, kv_dtype: str, config: ModelConfig, max_seq_len: int) -> Snapshot:
    """What is in the file; its arrays are views of the mapped file.

    CheckpointError if it is damaged, of another version, of other weights than those of the digest `weights`,
    of another kv_dtype, does not have the shapes of `config`, or is longer than `max_seq_len`.
    """
    file, forms = SafetensorsFile(path), _forms(kv_dtype)
    for key, expected, what in (
        ("ffmini_snapshot", str(VERSION), "a cache of version"),
        ("weights", weights, "a cache of weights"),
        ("kv_dtype", kv_dtype, "a cache of kv_dtype"),
    ):
        found = file.metadata.get(key, "none")
        if found != expected:
            raise CheckpointError(f"{path}: expected {what} {expected}, found {found}")
    if set(file.tensors) != set(forms):
        raise CheckpointError(f"{path}: expected {sorted(forms)}, found {sorted(file.tensors)}")
    shape = file.tensors["tokens"].shape
    count = shape[0] if len(shape) == 1 else 0
    if not 0 < count <= max_seq_len:
        raise CheckpointError(
            f"{path}: expected 1 to {max_seq_len} tokens (max_seq_len), found {list(shape)}"
        )
    vector = VectorLayout(config.head_dim, kv_dtype).plain_size
    cache = (config.num_layers, config.num_kv_heads, count, vector)
    for name, (dtype, _) in forms.items():
        info, wanted = file.tensors[name], (count,) if name == "tokens" else cache
        if (info.dtype, tuple(info.shape)) != (dtype, wanted):
            found = f"{info.dtype} {list(info.shape)}"
            raise CheckpointError(f"{path}: {name}: expected {dtype} {list(wanted)}, found {found}")
    snapshot = Snapshot(**{name: file.view(name) for name in forms})
    if snapshot.tokens.min() < 0 or snapshot.tokens.max() >= config.vocab_size:
        raise CheckpointError(f"{path}: tokens: expected ids below {config.vocab_size}, found others")
    return snapshot
