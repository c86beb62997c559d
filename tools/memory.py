"""What a model takes of a GPU's memory, its CUDA context included: the most in use, less what was before.

The figures are nvidia-smi's, of all processes, every 20 ms: nothing else may begin or end on the GPU then.

python tools/memory.py llama-3.1-8b int4 --kv-dtype int8 --positions 32768
"""

from __future__ import annotations

import argparse
import subprocess
import threading
import time
from contextlib import closing

import numpy as np

from ffmini.bench import SEED, random_model
from ffmini.config import parse_config
from ffmini.errors import DeviceError
from ffmini.gpu import GPUDecoder, kv_cache_bytes, why_unusable
from ffmini.launch import import_cupy
from ffmini.layout import FORMATS, KV_DTYPES
from ffmini.shapes import SHAPES

PROMPT, PASSES = 512, 16  # tokens at the end of the context
QUERY = ("--query-gpu=memory.used", "--format=csv,noheader,nounits")


class MemoryWatch:
    """Asks nvidia-smi again and again how much of GPU 0's memory is used; a context manager.

    `idle` is what it said first, `peak` the most so far, both in bytes, to whole MiB. DeviceError if it says
    nothing.
    """

    def __enter__(self) -> MemoryWatch:
        bus = import_cupy().cuda.Device(0).pci_bus_id  # makes no context
        command = ["nvidia-smi", *QUERY, "-i", bus, "-lms", "20"]
        try:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        except OSError as error:
            raise DeviceError(f"nvidia-smi is not usable: {error}") from error
        first = self._process.stdout.readline().strip()
        if not first.isdecimal():
            self._process.kill()
            raise DeviceError(f"nvidia-smi: MiB of used memory expected, found {first!r}")
        self.idle = self.peak = int(first) << 20
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def _read(self) -> None:
        for line in self._process.stdout:
            self.peak = max(self.peak, int(line) << 20)

    def __exit__(self, *_: object) -> None:
        time.sleep(0.1)  # the last figures are on their way
        self._process.kill()
        self._process.wait()
        self._reader.join()


def measure_peak(shape: str, dtype: str, kv_dtype: str, positions: int) -> tuple[int, int]:
    """Bytes of GPU 0 used before anything, and the most with a model of random weights that runs.

    The model has room for `positions` tokens; a prompt at their end goes through, and passes of one token
    and of as many as a pass takes: all builds are there.
    """
    with MemoryWatch() as watch:
        packed = random_model(parse_config(SHAPES[shape], shape), dtype)
        with closing(GPUDecoder(packed, positions, kv_dtype=kv_dtype, progress=False)) as decoder:
            tokens = np.random.default_rng(SEED).integers(0, packed.config.vocab_size, PROMPT + PASSES)
            start = positions - len(tokens)
            decoder.forward(tokens[:PROMPT], start)
            for i in range(PROMPT, len(tokens)):
                decoder.forward(tokens[i : i + 1], start + i)
            decoder.forward(tokens[: decoder.max_rows], start)
            time.sleep(0.5)
    return watch.idle, watch.peak


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of a GPU that a model takes, all included.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("dtype", choices=FORMATS)
    parser.add_argument("--kv-dtype", choices=KV_DTYPES, default="bf16")
    parser.add_argument("--positions", type=int, default=4096)
    args = parser.parse_args()
    if args.positions < PROMPT + PASSES:
        parser.error(f"--positions: at least {PROMPT + PASSES} expected, found {args.positions}")
    if (reason := why_unusable()) is not None:
        raise SystemExit(f"memory: a GPU expected: {reason}")
    idle, peak = measure_peak(args.shape, args.dtype, args.kv_dtype, args.positions)
    config = parse_config(SHAPES[args.shape], args.shape)
    cache = kv_cache_bytes(config, args.positions, args.kv_dtype)
    print(
        f"{args.shape} {args.dtype}, {args.positions} positions of {args.kv_dtype} keys and values "
        f"({cache / 2**30:.3f} GiB): {(peak - idle) / 2**30:.3f} GiB more used than before, "
        f"{peak / 2**30:.3f} after {idle / 2**30:.3f}"
    )


if __name__ == "__main__":
    main()
