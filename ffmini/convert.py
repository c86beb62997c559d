"""A Hugging Face checkpoint -> packed weights, on disk (`ffmini convert`) or in memory.

Weights go through in blocks of rows, several at a time on threads (NumPy lets go of the interpreter lock),
and leave in file order. Besides mapped pages, memory holds a few blocks per thread whatever the model's size.
Every block is unpacked again and compared with its source: that is where the error in the summary comes from.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ffmini.checkpoint import Checkpoint, check_tensors, resolve_model
from ffmini.config import ModelConfig, load_config
from ffmini.errors import CheckpointError, FFMiniError
from ffmini.layout import FORMATS, TILE_ROWS, MatrixLayout
from ffmini.numerics import from_bf16
from ffmini.packing import (
    LAYER_MATRICES,
    SMALL_FILES,
    PackedModel,
    PackedWriter,
    assemble_model,
    check_destination,
    checked_bf16,
    interleave_gate_up,
    is_packed,
    make_layouts,
    pack_matrix,
    packed_tensors,
    unpack_tiles,
    vector_offsets,
    vectors_length,
)
from ffmini.quant import GROUP_SIZES

BLOCK_WEIGHTS = 1 << 20  # per block of rows (16 rows at least); up to 64 bytes each while a thread is at it
MAX_THREADS = 16
_DESCRIPTION = "Convert a Hugging Face checkpoint into a directory in the kernel's packed order."


# ---- the summary ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PartSummary:
    """What became of one kind of tensor: number of weights, packed bytes, squared error and squared norm."""

    name: str
    weights: int
    nbytes: int
    squared_error: float
    squared_norm: float
    worst_error: float
    worst_tensor: str

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights

    @property
    def relative_error(self) -> float:
        """Frobenius norm of the error over that of the weights."""
        return _ratio(self.squared_error, self.squared_norm)


@dataclass(frozen=True)
class ConversionSummary:
    """The parts of a conversion: projections, lm_head, embed_tokens (if not tied) and vectors."""

    format: str
    group_size: int
    parts: tuple[PartSummary, ...]

    @property
    def total(self) -> PartSummary:
        worst = max(self.parts, key=lambda part: part.worst_error)
        return PartSummary(
            "total",
            sum(part.weights for part in self.parts),
            sum(part.nbytes for part in self.parts),
            sum(part.squared_error for part in self.parts),
            sum(part.squared_norm for part in self.parts),
            worst.worst_error,
            worst.worst_tensor,
        )

    def table(self) -> str:
        """Lines for people: one per part and the total."""
        head = f"{'part':<13}{'weights':>15}{'MB':>10}{'bits/weight':>13}{'error':>10}{'largest':>10}  in"
        lines = [head]
        for part in (*self.parts, self.total):
            lines.append(
                f"{part.name:<13}{part.weights:>15,}{part.nbytes / 1e6:>10.1f}{part.bits_per_weight:>13.3f}"
                f"{part.relative_error:>10.3%}{part.worst_error:>10.3%}  {part.worst_tensor}"
            )
        return "\n".join(lines)


def _ratio(squared_error: float, squared_norm: float) -> float:
    return (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0


class _Tally:
    """Adds up blocks into tensors and tensors into parts."""

    def __init__(self) -> None:
        self._tensors: dict[str, tuple[float, ...]] = {}

    def add(self, block: _Packed) -> None:
        sums = self._tensors.get(block.name, (0, 0, 0.0, 0.0))
        more = (block.weights, block.data.nbytes, block.squared_error, block.squared_norm)
        self._tensors[block.name] = tuple(a + b for a, b in zip(sums, more, strict=True))

    def summary(self, layouts: dict[str, MatrixLayout]) -> ConversionSummary:
        parts: dict[str, list[str]] = {}
        for name in self._tensors:
            parts.setdefault(name.rpartition(".")[2], []).append(name)
        summaries = []
        for part, names in parts.items():
            sums = [sum(column) for column in zip(*(self._tensors[name] for name in names), strict=True)]
            errors = {name: _ratio(*self._tensors[name][2:]) for name in names}
            worst = max(errors, key=lambda name: errors[name])
            summaries.append(PartSummary(part, *sums, errors[worst], worst))
        layout = layouts["qkv_proj"]
        return ConversionSummary(layout.format, layout.group_size, tuple(summaries))


# ---- blocks of rows: read, pack, measure ---------------------------------------------------------------


@dataclass(frozen=True)
class _Packed:
    """A finished block: the next bytes (or elements) of the packed tensor `name`."""

    name: str
    data: np.ndarray
    weights: int
    squared_error: float
    squared_norm: float


class _Source:
    """The checkpoint as seen from the packed side."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, layouts: dict[str, MatrixLayout]) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._layouts = layouts

    def jobs(self) -> Iterator[Callable[[], _Packed]]:
        """One call per block, in file order (packing.packed_tensors)."""
        config = self._config
        for layer in range(config.num_layers):
            for name in LAYER_MATRICES:
                yield from self._matrix_jobs(f"layers.{layer}.{name}", name, f"model.layers.{layer}.")
            yield partial(self._pack_vectors, layer)
        yield partial(self._pack_norm)
        yield from self._matrix_jobs("lm_head", "lm_head", "")
        if not config.tie_word_embeddings:
            step = max(1, BLOCK_WEIGHTS // config.hidden_size)
            for first in range(0, config.vocab_size, step):
                yield partial(self._pack_embeddings, slice(first, min(first + step, config.vocab_size)))

    def _matrix_jobs(self, name: str, matrix: str, prefix: str) -> Iterator[Callable[[], _Packed]]:
        layout = self._layouts[matrix]
        step = max(1, BLOCK_WEIGHTS // layout.cols // TILE_ROWS) * TILE_ROWS
        for first in range(0, layout.rows, step):
            rows = slice(first, min(first + step, layout.rows))
            yield partial(self._pack_rows, name, matrix, prefix, rows)

    def _pack_rows(self, name: str, matrix: str, prefix: str, rows: slice) -> _Packed:
        w, weights = self._read_rows(matrix, prefix, rows)
        layout = self._layouts[matrix]
        try:
            data = pack_matrix(w, layout)
        except FFMiniError as error:
            raise type(error)(f"{prefix}{error}") from None
        back = unpack_tiles(data.reshape(-1, layout.tile_bytes), layout)[: len(w)]
        return _Packed(name, data, weights, *_squares(w, back))

    def _read_rows(self, matrix: str, prefix: str, rows: slice) -> tuple[np.ndarray, int]:
        """Rows [rows, cols] of a packed matrix, and how many of the weights are not padding."""
        if matrix == "gate_up_proj":
            last = min(rows.stop // 2, self._config.intermediate_size)
            half = slice(rows.start // 2, last)
            gate, up = (self._read(f"{prefix}mlp.{name}_proj.weight", half) for name in ("gate", "up"))
            return interleave_gate_up(gate, up), gate.size + up.size
        pieces, first = [], 0
        for name, count in self._pieces(matrix, prefix):
            start, stop = max(rows.start - first, 0), min(rows.stop - first, count)
            if start < stop:
                pieces.append(self._read(name, slice(start, stop)))
            first += count
        w = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        return w, w.size

    def _pieces(self, matrix: str, prefix: str) -> list[tuple[str, int]]:
        """The tensors, with their numbers of rows, that one below the other make a packed matrix."""
        config = self._config
        if matrix == "qkv_proj":
            heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
            return [(f"{prefix}self_attn.{n}_proj.weight", heads[n] * config.head_dim) for n in heads]
        name = {
            "o_proj": f"{prefix}self_attn.o_proj.weight",
            "down_proj": f"{prefix}mlp.down_proj.weight",
            "lm_head": "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight",
        }[matrix]
        return [(name, self._layouts[matrix].rows)]

    def _read(self, name: str, rows: slice | None = None) -> np.ndarray:
        return self._checkpoint.read(name, rows)

    def _pack_embeddings(self, rows: slice) -> _Packed:
        w = self._read("model.embed_tokens.weight", rows)
        bits = checked_bf16(w, "model.embed_tokens.weight")
        return _Packed("embed_tokens", bits.reshape(-1), w.size, *_squares(w, from_bf16(bits)))

    def _pack_norm(self) -> _Packed:
        norm = self._read("model.norm.weight")
        return _Packed("norm", norm, norm.size, 0.0, _square(norm))

    def _pack_vectors(self, layer: int) -> _Packed:
        """The vectors of a layer, laid out by packing.vector_offsets; kept in float32."""
        prefix = f"model.layers.{layer}."
        readers = {
            "q_norm": "self_attn.q_norm.weight",
            "k_norm": "self_attn.k_norm.weight",
            "o_bias": "self_attn.o_proj.bias",
            "down_bias": "mlp.down_proj.bias",
        }
        vectors = np.zeros(vectors_length(self._config), np.float32)
        for name, (offset, length) in vector_offsets(self._config).items():
            if name == "qkv_bias":
                values = np.concatenate([self._read(f"{prefix}self_attn.{n}_proj.bias") for n in "qkv"])
            elif name == "gate_up_bias":
                gate, up = (self._read(f"{prefix}mlp.{n}_proj.bias") for n in ("gate", "up"))
                values = interleave_gate_up(gate, up)
            else:
                values = self._read(prefix + readers.get(name, f"{name}.weight"))
            vectors[offset : offset + length] = values
        return _Packed(f"layers.{layer}.vectors", vectors, vectors.size, 0.0, _square(vectors))


def _square(x: np.ndarray) -> float:
    """The sum of squares of float32 `x`, in doubles: squares of bf16 weights may overflow a float."""
    return float(np.square(x, dtype=np.float64).sum())


def _squares(w: np.ndarray, back: np.ndarray) -> tuple[float, float]:
    """The squared error and the squared norm of a block."""
    return _square(w - back), _square(w)


# ---- conversions ---------------------------------------------------------------------------------------


def convert(
    src: str | Path,
    dst: str | Path,
    dtype: str,
    group_size: int = 128,
    force: bool = False,
    progress: bool = True,
) -> ConversionSummary:
    """Convert the Hugging Face directory `src` into the packed directory `dst`, made whole or not at all.

    dtype: "bf16", "int8" or "int4"; group_size: 32, 64 or 128 (no matter for bf16); force: replace a packed
    directory. Raises CheckpointError or UnsupportedError, and OSError if the disk fails.
    """
    directory, destination = resolve_model(src), Path(dst).resolve()
    if is_packed(directory):
        raise CheckpointError(f"{directory}: expected a Hugging Face checkpoint, found a packed model")
    check_destination(destination, force)
    config = load_config(directory)
    layouts = make_layouts(config, dtype, group_size)
    specs = packed_tensors(config, layouts)
    needed = sum(spec.stored_bytes for spec in specs.values()) + (1 << 20)
    needed += sum((directory / name).stat().st_size for name in SMALL_FILES if (directory / name).is_file())
    free = shutil.disk_usage(destination.parent).free
    if free < needed:
        raise CheckpointError(
            f"{destination}: expected {needed / 1e9:.3f} GB of free disk space, found {free / 1e9:.3f} GB"
        )
    tally = _Tally()
    with (
        PackedWriter(directory, destination, specs, dtype, layouts["qkv_proj"].group_size) as writer,
        contextlib.closing(_blocks(directory, config, layouts, progress)) as blocks,
    ):
        for block in blocks:
            writer.add(block.name, block.data)
            tally.add(block)
    return tally.summary(layouts)


def pack_checkpoint(directory: Path, dtype: str, group_size: int = 128, progress: bool = True) -> PackedModel:
    """The packed weights of the Hugging Face directory, made in memory; arguments as in convert."""
    config = load_config(directory)
    layouts = make_layouts(config, dtype, group_size)
    specs = packed_tensors(config, layouts)
    tensors: dict[str, np.ndarray] = {}
    filled = dict.fromkeys(specs, 0)
    with contextlib.closing(_blocks(directory, config, layouts, progress)) as blocks:
        for block in blocks:
            if block.name not in tensors:
                tensors[block.name] = np.empty(specs[block.name].count, specs[block.name].dtype)
            first = filled[block.name]
            filled[block.name] += block.data.size
            tensors[block.name][first : filled[block.name]] = block.data
    return assemble_model(config, layouts, tensors, directory)


def _blocks(
    directory: Path, config: ModelConfig, layouts: dict[str, MatrixLayout], progress: bool
) -> Iterator[_Packed]:
    """Pack the checkpoint on threads, two blocks per thread in flight, and yield the blocks in file order."""
    threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    total = sum(spec.nbytes for spec in packed_tensors(config, layouts).values())
    disable = None if progress else True  # None: shown if stderr is a terminal
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="packing", file=sys.stderr, disable=disable)
    with contextlib.closing(Checkpoint(directory)) as checkpoint, bar:
        check_tensors(checkpoint, config)
        jobs = _Source(checkpoint, config, layouts).jobs()
        pool = ThreadPoolExecutor(threads, thread_name_prefix="ffmini-pack")
        try:
            in_flight = deque(pool.submit(job) for job in islice(jobs, 2 * threads))
            while in_flight:
                block = in_flight.popleft().result()
                in_flight.extend(pool.submit(job) for job in islice(jobs, 1))
                bar.update(block.data.nbytes)
                yield block
        finally:
            pool.shutdown(cancel_futures=True)


# ---- the command ---------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ffmini convert`."""
    parser.add_argument("src", metavar="SRC", help="Hugging Face directory, or org/name in the local cache")
    parser.add_argument("dst", metavar="DST", help="packed directory to make")
    parser.add_argument("--dtype", choices=FORMATS, required=True, help="format of the projections")
    parser.add_argument(
        "--group-size", type=int, choices=GROUP_SIZES, default=128, help="columns per scale (default: 128)"
    )
    parser.add_argument("--force", action="store_true", help="replace a packed directory at DST")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `convert` with the parser of `ffmini`; its arguments go to run()."""
    parser = subparsers.add_parser("convert", help="pack a checkpoint", description=_DESCRIPTION)
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert as `args` say and print the summary on stdout; returns 0, errors are raised."""
    summary = convert(args.src, args.dst, args.dtype, args.group_size, force=args.force)
    print(summary.table())
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command by itself (tools/convert.py): errors become one line on stderr and an exit status."""
    parser = argparse.ArgumentParser(prog="convert", description=_DESCRIPTION)
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except (FFMiniError, OSError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("convert: interrupted, nothing was written", file=sys.stderr)
        return 130
