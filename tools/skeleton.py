"""What the kernel's form takes without its arithmetic: streams, rings and packets alone (tools/skeleton.cu).

    PYTHONPATH=. python3 tools/skeleton.py llama-3.1-8b int4 --exchanges 5

Sixteen warps take the real bytes of every matrix, keys and values through the kernel's own rings, read a word
of each slot per lane, and hand on packets as many as the kernel's. Unlike the kernel's, every block gathers
all of q, k and v, and the packets of a block's stage leave together at its end. Needs a GPU; queues 200
passes and takes the median of five times.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
from pathlib import Path
from time import perf_counter
from types import ModuleType

import numpy as np

from ffmini.bench import read_peak
from ffmini.config import ModelConfig, parse_config
from ffmini.gpu import SPIN_SECONDS, STAGE_NAMES, free_memory, kv_cache_bytes, memory_bandwidth
from ffmini.kernel import (
    BUILD_INFO,
    PASS_ARGS,
    STATUS,
    copies_in_flight,
    has_bulk_copies,
    kernel_defines,
    layer_bytes,
)
from ffmini.launch import PACKET_BYTES, import_cupy, read_global, why_unusable
from ffmini.packing import make_layouts
from ffmini.shapes import SHAPES
from tools.device_code import compile_tool, device_arch, expected_errors, load_tool

PASSES = 200
REPETITIONS = 5
# The input of which stage an exchange is; a build with N has the first N.
EXCHANGES = ("norm_qkv", "norm_gate_up", "down_proj", "o_proj", "attention")


@dataclasses.dataclass(frozen=True)
class Form:
    """What is asked: a shape in a format, and how the skeleton is built for it."""

    config: ModelConfig
    dtype: str
    position: int  # of the pass's row: so many keys and values are before it
    exchanges: int  # of a layer
    in_flight: int  # copies under way per ring
    bulk_copies: bool

    def compile(self, arch: str, shared_limit: int, blocks: int) -> tuple[bytes, str]:
        """The cubin and ptxas's report; see kernel_defines for the device's figures."""
        defines = kernel_defines(
            self.config,
            make_layouts(self.config, self.dtype),
            rows=1,
            max_seq_len=self.position + 1,
            shared_limit=shared_limit,
            blocks=blocks,
            bulk_copies=self.bulk_copies,
            in_flight=self.in_flight,
        )
        defines["EXCHANGES"] = str(self.exchanges)
        return compile_tool("skeleton.cu", defines, arch)

    def pass_bytes(self) -> int:
        """Bytes of every layer's four matrices, of the lm_head, and of keys and values before the row."""
        layouts = make_layouts(self.config, self.dtype)
        matrices = self.config.num_layers * layer_bytes(layouts) + layouts["lm_head"].nbytes
        return matrices + kv_cache_bytes(self.config, self.position)


class Skeleton:
    """The builds of a shape and format on GPU 0, and the memory that they stream."""

    def __init__(self, form: Form, directory: Path) -> None:
        """`directory` takes the cubins. DeviceError or ValueError if the device can't run it."""
        self._cupy = cupy = import_cupy()
        self._directory = directory
        properties = cupy.cuda.runtime.getDeviceProperties(0)
        self._blocks = properties["multiProcessorCount"]
        self._shared_limit = properties["sharedMemPerBlockOptin"]
        self._pass = 0
        config, layouts = form.config, make_layouts(form.config, form.dtype)
        sizes = {
            "layers": config.num_layers * layer_bytes(layouts),
            "lm_head": layouts["lm_head"].nbytes,
            "key_cache": kv_cache_bytes(config, form.position + 1) // 2,
            "value_cache": kv_cache_bytes(config, form.position + 1) // 2,
            "status": STATUS.itemsize,
            "gave_up": 4,
        }
        if sum(sizes.values()) > (free := free_memory()):
            raise ValueError(f"{sum(sizes.values()) >> 20} MiB of device memory expected, found {free >> 20}")
        self._arrays = {name: cupy.zeros(size, cupy.uint8) for name, size in sizes.items()}

    def time_passes(self, form: Form) -> tuple[float, int]:
        """Microseconds per pass, the median of REPETITIONS times PASSES queued ones; slots of a ring."""
        cupy = self._cupy
        cubin, _ = form.compile(device_arch(cupy), self._shared_limit, self._blocks)
        module = load_tool(cupy, cubin, self._directory / f"skeleton-{form.exchanges}.cubin")
        info = read_global(cupy, module, "ffmini_build_info", BUILD_INFO)
        kernel = module.get_function("skeleton_pass")
        kernel.max_dynamic_shared_size_bytes = int(info["shared_bytes"])
        exchange = cupy.zeros(int(info["exchange_packets"]) * PACKET_BYTES, cupy.uint8)
        args = self._make_args(form, exchange)
        times = []
        for _ in range(REPETITIONS + 1):
            began = perf_counter()
            for _ in range(PASSES):
                self._pass += 1
                args["pass"] = self._pass
                shared = int(info["shared_bytes"])
                kernel((self._blocks,), (int(info["threads"]),), (args,), shared_mem=shared)
            self._check_status(form)
            times.append(1e6 * (perf_counter() - began) / PASSES)
        return statistics.median(times[1:]), int(info["ring_slots"])

    def _make_args(self, form: Form, exchange: object) -> np.ndarray:
        args = np.zeros((), PASS_ARGS)
        for name, array in (self._arrays | {"exchange": exchange}).items():
            args[name] = array.data.ptr
        args["spin_limit_ns"] = int(float(os.environ.get("FFMINI_SPIN_SECONDS", SPIN_SECONDS)) * 1e9)
        args["num_slots"] = args["num_rows"] = args["logits_rows"] = 1
        args["rows"]["position"][0] = form.position
        return args

    def _check_status(self, form: Form) -> None:
        """Waits for the queued passes. ValueError if one gave up."""
        status = self._arrays["status"].get().view(STATUS)[0]
        if status["gave_up"]:
            layer, stage = divmod(int(status["stage"]), 8)
            raise ValueError(
                f"{form.exchanges} exchanges: a wait gave up: layer {layer}, {STAGE_NAMES[stage]}, "
                f"block {status['block']}"
            )


def report(form: Form, directory: Path) -> list[str]:
    """Lines of figures: the peak, the passes without exchanges and with them, what an exchange costs."""
    peak = read_peak(0)
    skeleton = Skeleton(form, directory)
    nbytes, layers = form.pass_bytes(), form.config.num_layers
    lines, times = [], {}
    for exchanges in sorted({0, form.exchanges}):
        times[exchanges], slots = skeleton.time_passes(dataclasses.replace(form, exchanges=exchanges))
        rate = nbytes / times[exchanges] * 1e6
        lines.append(
            f"{exchanges} exchanges a layer: {times[exchanges]:.1f} us per pass, {rate / 1e9:.0f} GB/s, "
            f"{rate / peak:.1%} of the read peak"
        )
    if form.exchanges:
        # One more than the layers have: the lm_head waits for the last of them.
        cost = (times[form.exchanges] - times[0]) / (form.exchanges * layers + 1)
        lines.append(f"an exchange: {cost:.2f} us; before {', '.join(EXCHANGES[: form.exchanges])}")
    copies = "bulk copies" if form.bulk_copies else "cp.async"
    head = f"{form.dtype}, {layers} layers: {nbytes:,} bytes, read peak {peak / 1e9:.0f} GB/s, "
    return [head + f"{copies}, ring of {slots} slots", *lines]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The kernel's streams and exchanges without arithmetic.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("dtype", choices=("bf16", "int8", "int4"))
    parser.add_argument("--layers", type=int, help="of the shape's layers (default: all)")
    parser.add_argument(
        "--exchanges",
        type=int,
        choices=range(len(EXCHANGES) + 1),
        default=len(EXCHANGES),
        help=f"a layer, the first of these inputs: {', '.join(EXCHANGES)} (default: all)",
    )
    parser.add_argument("--in-flight", type=int, help="copies under way per ring (default: as the kernel)")
    parser.add_argument(
        "--position", type=int, default=128, help="of the row, keys and values before it (128)"
    )
    parser.add_argument("--cp-async", action="store_true", help="the ring of GPUs without bulk copies")
    args = parser.parse_args()
    for name, least in (("layers", 1), ("in_flight", 1), ("position", 0)):
        if (value := getattr(args, name)) is not None and value < least:
            parser.error(f"--{name.replace('_', '-')}: at least {least} expected, found {value}")
    return args


def make_form(args: argparse.Namespace, cupy: ModuleType) -> Form:
    """What `args` ask for, on GPU 0. ValueError for copies under way where there is no bulk copy."""
    config = parse_config(SHAPES[args.shape], args.shape)
    layers = args.layers or config.num_layers
    if layers > config.num_layers:
        raise ValueError(f"--layers: at most {config.num_layers} expected, found {layers}")
    config = config.first_layers(layers)
    bulk_copies = has_bulk_copies(device_arch(cupy)) and not args.cp_async
    if args.in_flight is not None and not bulk_copies:
        raise ValueError("--in-flight: a ring of bulk copies expected, found one of cp.async")
    blocks = cupy.cuda.runtime.getDeviceProperties(0)["multiProcessorCount"]
    layouts = make_layouts(config, args.dtype)
    in_flight = args.in_flight or copies_in_flight(memory_bandwidth(), blocks, layouts)
    return Form(config, args.dtype, args.position, args.exchanges, in_flight, bulk_copies)


def main() -> None:
    args = parse_arguments()
    if (reason := why_unusable()) is not None:
        raise SystemExit(f"skeleton: a GPU expected: {reason}")
    try:
        with tempfile.TemporaryDirectory() as directory:
            lines = report(make_form(args, import_cupy()), Path(directory))
    except expected_errors(import_cupy()) as error:
        raise SystemExit(f"skeleton: {error}") from error
    print("\n".join([f"{args.shape} {lines[0]}", *lines[1:]]))


if __name__ == "__main__":
    main()
