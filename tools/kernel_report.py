"""Registers, spills and compile time of the kernel per architecture, shape, format and rows; needs no GPU.

python tools/kernel_report.py
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

from ffmini.config import ModelConfig, parse_config
from ffmini.kernel import compile_cubin, kernel_defines, max_rows
from ffmini.packing import make_layouts
from ffmini.shapes import SHAPES

# Bytes of shared memory that a block may use, and multiprocessors of a typical card.
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
    """What ptxas said of one build."""

    registers: int
    spill_bytes: int  # stores and loads
    seconds: float


def report(arch: str, config: ModelConfig, dtype: str, many_rows: bool) -> Report:
    """Compile for one row, or for as many as fit, and read the log."""
    limit, blocks = DEVICES[arch]
    layouts = make_layouts(config, dtype)
    rows = max_rows(config, layouts, limit, blocks) if many_rows else 1
    defines = kernel_defines(config, layouts, rows=rows, max_seq_len=4096, shared_limit=limit, blocks=blocks)
    start = time.perf_counter()
    _, log = compile_cubin(defines, arch)
    seconds = time.perf_counter() - start
    return Report(read_registers(log), read_spills(log), seconds)


def read_registers(log: str) -> int:
    """Registers of a thread, from the log of --ptxas-options=-v."""
    return int(re.search(r"Used (\d+) registers", log).group(1))


def read_spills(log: str) -> int:
    """Bytes of spill stores and loads together, from the same log."""
    found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return int(found.group(1)) + int(found.group(2))


def main() -> None:
    print(f"{'arch':8} {'shape':14} {'dtype':6} {'rows':5} {'registers':>9} {'spills':>7} {'seconds':>8}")
    for arch in DEVICES:
        for name, raw in SHAPES.items():
            for dtype in ("bf16", "int8", "int4"):
                for many in (False, True):
                    found = report(arch, parse_config(raw, name), dtype, many)
                    print(
                        f"{arch:8} {name:14} {dtype:6} {'many' if many else 'one':5} {found.registers:9} "
                        f"{found.spill_bytes:7} {found.seconds:8.1f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
