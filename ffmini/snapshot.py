"""Files that keep what a slot holds: its tokens, and their keys and values in plain order.

A safetensors file with the tensors tokens (I64 [count]), keys and values (BF16 [num_layers, num_kv_heads,
count, head_dim]). Its metadata says of which form it is and of which weights; the device does not matter.
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

VERSION = 1
_FORMS = {"tokens": ("I64", "<i8"), "keys": ("BF16", "<u2"), "values": ("BF16", "<u2")}


@dataclass(frozen=True)
class Snapshot:
    """Tokens of one sequence, with the keys and values of all of them."""

    tokens: np.ndarray  # int64 [count]
    keys: np.ndarray  # bf16 bits, uint16 [num_layers, num_kv_heads, count, head_dim]
    values: np.ndarray  # the same


def write_snapshot(path: Path, snapshot: Snapshot, weights: str) -> None:
    """Make the file `path`, or put it in the place of an older one: whole, or not at all.

    `weights` is the digest of the weights that the keys and values come from. OSError as of any file.
    """
    arrays = {name: getattr(snapshot, name).astype(kind, copy=False) for name, (_, kind) in _FORMS.items()}
    header: dict[str, object] = {"__metadata__": {"ffmini_snapshot": str(VERSION), "weights": weights}}
    offset = 0
    for name, array in arrays.items():
        end = offset + array.nbytes
        header[name] = {
            "dtype": _FORMS[name][0],
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


def read_snapshot(path: Path, weights: str, config: ModelConfig, max_seq_len: int) -> Snapshot:
    """What is in the file; its arrays are views of the mapped file.

    CheckpointError if it is damaged, of another version, of other weights than those of the digest `weights`,
    does not have the shapes of `config`, or is longer than `max_seq_len`.
    """
    file = SafetensorsFile(path)
    for key, expected, what in (
        ("ffmini_snapshot", str(VERSION), "a cache of version"),
        ("weights", weights, "a cache of weights"),
    ):
        found = file.metadata.get(key, "none")
        if found != expected:
            raise CheckpointError(f"{path}: expected {what} {expected}, found {found}")
    if set(file.tensors) != set(_FORMS):
        raise CheckpointError(f"{path}: expected {sorted(_FORMS)}, found {sorted(file.tensors)}")
    shape = file.tensors["tokens"].shape
    count = shape[0] if len(shape) == 1 else 0
    if not 0 < count <= max_seq_len:
        raise CheckpointError(
            f"{path}: expected 1 to {max_seq_len} tokens (max_seq_len), found {list(shape)}"
        )
    cache = (config.num_layers, config.num_kv_heads, count, config.head_dim)
    for name, (dtype, _) in _FORMS.items():
        info, wanted = file.tensors[name], (count,) if name == "tokens" else cache
        if (info.dtype, tuple(info.shape)) != (dtype, wanted):
            found = f"{info.dtype} {list(info.shape)}"
            raise CheckpointError(f"{path}: {name}: expected {dtype} {list(wanted)}, found {found}")
    snapshot = Snapshot(**{name: file.view(name) for name in _FORMS})
    if snapshot.tokens.min() < 0 or snapshot.tokens.max() >= config.vocab_size:
        raise CheckpointError(f"{path}: tokens: expected ids below {config.vocab_size}, found others")
    return snapshot
