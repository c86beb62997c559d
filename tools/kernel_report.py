"""What a build of a kernel takes, per architecture, shape, format, dtype of K and V and kind; needs no GPU.

Registers, bytes of spills, bytes of shared memory, places in each ring, seconds to compile.

python tools/kernel_report.py
"""

from __future__ import annotations

import itertools
import re
import struct
import time
from dataclasses import dataclass

import numpy as np

from ffmini.config import ModelConfig, parse_config
from ffmini.kernel import (
    BUILD_INFO,
    CHUNK_INFO,
    compile_cubin,
    has_bulk_copies,
    has_wgmma,
    kernel_defines,
    max_rows,
)
from ffmini.launch import PACKET_BYTES
from ffmini.layout import KV_DTYPES
from ffmini.packing import make_layouts
from ffmini.shapes import SHAPES

KINDS = ("one", "many", "chunk")  # passes of one row and of as many as fit, chunks of prompts
# Bytes of shared memory that a block may use, and multiprocessors of a typical card.
MAX_SEQ_LEN = 4096
DEVICES = {
    "sm_80": (166_912, 108),
    "sm_86": (101_376, 82),
    "sm_87": (166_912, 8),
    "sm_89": (101_376, 128),
    "sm_90": (232_448, 132),
    "sm_100": (232_448, 148),
    "sm_110": (232_448, 20),
    "sm_120": (101_376, 170),
}


@dataclass(frozen=True)
class Report:
    """What ptxas said of one build, and what the build says of itself."""

    registers: int
    spill_bytes: int  # stores and loads
    seconds: float
    shared_bytes: int
    ring_slots: int  # of each warp's ring, or the block's
    threads: int  # of a block
    scratch_bytes: int  # of global memory, but for what a pass has for each block


def report(arch: str, config: ModelConfig, dtype: str, kind: str, kv_dtype: str = "bf16") -> Report:
    """Compile one of KINDS and read the log."""
    limit, blocks = DEVICES[arch]
    layouts = make_layouts(config, dtype)
    most = max_rows(config, layouts, MAX_SEQ_LEN, limit, blocks, kv_dtype)
    rows = most if kind == "many" else 1
    defines = kernel_defines(
        config,
        layouts,
        rows=rows,
        max_seq_len=MAX_SEQ_LEN,
        shared_limit=limit,
        blocks=blocks,
        bulk_copies=has_bulk_copies(arch),
        kv_dtype=kv_dtype,
        wgmma=kind == "chunk" and has_wgmma(arch),
        in_flight=1,
    )
    start = time.perf_counter()
    cubin, log = compile_cubin(defines, arch, "chunk.cu" if kind == "chunk" else "ffmini.cu")
    seconds = time.perf_counter() - start
    info = read_build_info(cubin, kind)
    own = (int(info[name]) for name in ("shared_bytes", "ring_slots", "threads"))
    scratch = int(info["scratch_bytes"] if kind == "chunk" else PACKET_BYTES * info["exchange_packets"])
    return Report(read_registers(log), read_spills(log), seconds, *own, scratch)


def read_build_info(cubin: bytes, kind: str) -> np.ndarray:
    """The BUILD_INFO or CHUNK_INFO that lies in the constants of a cubin, a 64-bit ELF file."""
    symbol, dtype = (b"ffmini_build_info", BUILD_INFO)
    if kind == "chunk":
        symbol, dtype = (b"ffmini_chunk_info", CHUNK_INFO)
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count = struct.unpack_from("<HH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + i * size) for i in range(count)]
    for _, kind, _, _, offset, nbytes, link, _, _, _ in sections:
        if kind != 2:  # the table of symbols
            continue
        for at in range(offset, offset + nbytes, 24):
            name, _, _, section, value, _ = struct.unpack_from("<IBBHQQ", cubin, at)
            start = sections[link][4] + name
            if cubin[start : cubin.index(b"\0", start)] == symbol:
                return np.frombuffer(cubin, dtype, 1, sections[section][4] + value)[0]
    raise ValueError(f"expected the symbol {symbol.decode()} in the cubin, found none")


def read_registers(log: str) -> int:
    """Registers of a thread, from the log of --ptxas-options=-v."""
    return int(re.search(r"Used (\d+) registers", log).group(1))


def read_spills(log: str) -> int:
    """Bytes of spill stores and loads together, from the same log."""
    found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return int(found.group(1)) + int(found.group(2))


def main() -> None:
    print(
        f"{'arch':8} {'shape':14} {'dtype':6} {'KV':5} {'kind':5} {'registers':>9} {'spills':>7} "
        f"{'shared':>8} {'ring':>5} {'seconds':>8}"
    )
    builds = itertools.product(DEVICES, SHAPES, ("bf16", "int8", "int4"), KV_DTYPES, KINDS)
    for arch, name, dtype, kv_dtype, kind in builds:
        found = report(arch, parse_config(SHAPES[name], name), dtype, kind, kv_dtype)
        print(
            f"{arch:8} {name:14} {dtype:6} {kv_dtype:5} {kind:5} {found.registers:9} {found.spill_bytes:7} "
            f"{found.shared_bytes:8} {found.ring_slots:5} {found.seconds:8.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
