"""`ffmini info`: what runs here, and what a model is made of and needs, without loading its weights."""

from __future__ import annotations

import argparse
import platform
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from . import __version__, gpu
from .checkpoint import resolve_model
from .config import ModelConfig, load_config
from .cpu import held_bytes, held_vector_bytes
from .errors import DeviceError
from .layout import FORMATS, KV_DTYPES, MatrixLayout
from .memory import available_memory
from .model import bundled_model_path, check_batch_size, choose_device, context_length, load_packed
from .packing import LAYER_MATRICES, is_packed, make_layouts, vectors_length
from .passes import check_kv_dtype

_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_CPU_FILE = Path("/proc/cpuinfo")


# ---- the machine ---------------------------------------------------------------------------------------


def device_name(device: str) -> str:
    """The name of a processor: `device` is "cpu" or "cuda:N", as a decoder says it."""
    if device == "cpu":
        found = re.search(r"^model name\s*: (.*)$", _CPU_FILE.read_text(encoding="utf-8"), re.MULTILINE)
        return found[1] if found else platform.machine()
    ordinal = int(device.removeprefix("cuda:"))
    return gpu.import_cupy().cuda.runtime.getDeviceProperties(ordinal)["name"].decode()


def driver_version() -> str | None:
    """The version of the NVIDIA kernel driver, such as "580.65.06"; None if none is loaded."""
    if not _DRIVER_FILE.exists():
        return None
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", _DRIVER_FILE.read_text(encoding="utf-8"))
    return found[1] if found else None


def environment_lines() -> list[str]:
    """Versions and devices, a fact per line; a GPU that can't be used comes with the reason."""
    packages = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("numpy", "safetensors", "tokenizers")
    )
    memory = f"{available_memory() / 2**30:.1f} GiB of memory available"
    lines = [
        f"ffmini  {__version__}, Python {platform.python_version()}, {packages}",
        f"CPU     {device_name('cpu')}, {platform.machine()}, {memory}",
    ]
    try:
        cupy = gpu.import_cupy()
    except DeviceError as error:
        return [*lines, f"GPU     not usable: {error}"]
    runtime, nvrtc = cupy.cuda.runtime.runtimeGetVersion(), cupy.cuda.nvrtc.getVersion()
    lines.append(f"CuPy    {cupy.__version__}, CUDA {_cuda_version(runtime)}, NVRTC {nvrtc[0]}.{nvrtc[1]}")
    supported = _cuda_version(cupy.cuda.runtime.driverGetVersion())
    lines.append(f"driver  {driver_version() or 'none'}, CUDA up to {supported}")
    reason = gpu.why_unusable()
    if reason is not None:
        return [*lines, f"GPU     not usable: {reason}"]
    return lines + [_gpu_line(ordinal) for ordinal in range(cupy.cuda.runtime.getDeviceCount())]


def _cuda_version(number: int) -> str:
    """CUDA's 12080 as 12.8; 0 is what there is without a driver."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else "none"


def _gpu_line(ordinal: int) -> str:
    name = f"cuda:{ordinal}  {device_name(f'cuda:{ordinal}')}"
    reason = gpu.why_unusable(ordinal)
    if reason is not None:
        return f"{name}, not usable: {reason}"
    properties = gpu.import_cupy().cuda.runtime.getDeviceProperties(ordinal)
    return (
        f"{name}, sm_{properties['major']}{properties['minor']}, "
        f"{properties['multiProcessorCount']} multiprocessors, "
        f"{gpu.free_memory(ordinal) / 2**30:.1f} of {properties['totalGlobalMem'] / 2**30:.1f} GiB free"
    )


# ---- a model -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One kind of stored weights: all layers together."""

    name: str
    format: str  # of the stored numbers, with the group size where there is one; "tied": part of lm_head
    shape: str  # of one of them
    weights: int
    nbytes: int
    nbytes_on_cpu: int  # as the CPU path holds it


def model_parts(config: ModelConfig, layouts: dict[str, MatrixLayout]) -> list[Part]:
    """What is stored for a model, packed; bytes include scales and padding."""
    parts = []
    for name in (*LAYER_MATRICES, "lm_head"):
        layout, count = layouts[name], 1 if name == "lm_head" else config.num_layers
        format = layout.format if layout.format == "bf16" else f"{layout.format} g{layout.group_size}"
        shape = f"{layout.rows} x {layout.cols}"
        if count > 1:
            shape = f"{count} x {shape}"
        weights = count * layout.rows * layout.cols
        parts.append(Part(name, format, shape, weights, count * layout.nbytes, count * held_bytes(layout)))
    table = config.vocab_size * config.hidden_size
    shape = f"{config.vocab_size} x {config.hidden_size}"
    if config.tie_word_embeddings:
        parts.append(Part("embed_tokens", "tied", shape, 0, 0, 0))
    else:
        parts.append(Part("embed_tokens", "bf16", shape, table, 2 * table, 2 * table))
    vectors = config.num_layers * vectors_length(config) + config.hidden_size
    parts.append(Part("vectors", "float32", str(vectors), vectors, 4 * vectors, 4 * vectors))
    return parts


def parts_table(parts: list[Part]) -> list[str]:
    """Lines for people: one per part and the total."""
    rows = [(part.name, part.format, part.shape, part.weights, part.nbytes) for part in parts]
    rows.append(("total", "", "", sum(part.weights for part in parts), sum(part.nbytes for part in parts)))
    lines = [f"{'part':<14}{'format':<11}{'shape':<20}{'weights':>15}{'bytes':>16}"]
    for name, format, shape, weights, nbytes in rows:
        lines.append(f"{name:<14}{format:<11}{shape:<20}{weights:>15,}{nbytes:>16,}")
    return lines


def needed_line(
    config: ModelConfig,
    parts: list[Part],
    max_seq_len: int,
    ordinal: int | None,
    slots: int = 1,
    kv_dtype: str = "bf16",
) -> str:
    """What weights and KV cache would take on GPU `ordinal` (None: the CPU), and what is free there.

    A pass's scratch comes on top: it depends on the build of the kernel, and is small.
    """
    cache = gpu.kv_cache_bytes(config, slots * max_seq_len, kv_dtype)
    weights = sum(part.nbytes for part in parts)
    free = available_memory() if ordinal is None else gpu.free_memory(ordinal)
    where = f"cuda:{ordinal}"
    if ordinal is None:
        # The CPU path unpacks the matrices and keeps K and V in float32; an embedding table stays as it is.
        weights = sum(part.nbytes_on_cpu for part in parts)
        vectors = 2 * config.num_layers * config.num_kv_heads * slots * max_seq_len
        cache, where = vectors * held_vector_bytes(config.head_dim, kv_dtype), "the CPU, in float32"
    sequences = "" if slots == 1 else f"{slots} sequences of "
    verdict = "fits" if weights + cache <= free else "does not fit"
    return (
        f"needs {_mib(weights)} of weights + {_mib(cache)} of KV cache for {sequences}{max_seq_len} tokens "
        f"on {where}; {_mib(free)} free: {verdict}"
    )


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f} MiB"


def model_lines(
    model: str | None,
    dtype: str | None,
    device: str,
    max_seq_len: int | None,
    max_batch_size: int = 1,
    kv_dtype: str = "bf16",
) -> list[str]:
    """Shape, parts and memory of a model, arguments as in `ffmini.load`; nothing large is read."""
    check_batch_size(max_batch_size)
    check_kv_dtype(kv_dtype)
    ordinal = choose_device(device)
    directory = bundled_model_path() if model is None else resolve_model(model)
    config = load_config(directory)
    max_seq_len = context_length(config, max_seq_len)
    packed = is_packed(directory)
    layouts = load_packed(directory, dtype).layouts if packed else make_layouts(config, dtype or "bf16")
    parts = model_parts(config, layouts)
    rope = config.rope.type if config.rope.type != "default" else "unscaled"
    windows = sorted(set(config.layer_windows) - {0})
    return [
        f"{directory}: {'packed' if packed else 'Hugging Face checkpoint'}, {config.model_type}",
        f"layers {config.num_layers}, hidden size {config.hidden_size}, MLP size {config.intermediate_size}, "
        f"vocabulary {config.vocab_size}",
        f"heads {config.num_heads}, KV heads {config.num_kv_heads}, head size {config.head_dim}, "
        f"context {config.max_position_embeddings}, rope theta {config.rope.theta:g} {rope}"
        + (f", sliding window {windows[0]}" if windows else ""),
        "",
        *parts_table(parts),
        "",
        f"KV cache: {gpu.kv_cache_bytes(config, 1, kv_dtype):,} bytes per token in {kv_dtype}",
        needed_line(config, parts, max_seq_len, ordinal, max_batch_size, kv_dtype),
    ]


# ---- the command ---------------------------------------------------------------------------------------


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say how a model is loaded; those of `ffmini.load`, but for the model itself."""
    parser.add_argument("--dtype", choices=FORMATS, help="weights' format (default: bf16, or as packed)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--max-seq-len", type=int, metavar="N", help="context to make room for (default: 4096 or the limit)"
    )
    text = "format of keys and values (default: bf16)"
    parser.add_argument("--kv-dtype", choices=KV_DTYPES, default="bf16", help=text)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `info` with the parser of `ffmini`; its arguments go to run()."""
    description = "Show the device and the libraries; with -m, what a model is made of and needs."
    parser = subparsers.add_parser("info", help="device, libraries, memory", description=description)
    parser.add_argument(
        "-m", "--model", nargs="?", const="", help="model directory or org/name; alone: the bundled model"
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--max-batch-size", type=int, default=1, metavar="N", help="sequences to make room for (default: 1)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what `args` ask for on stdout; returns 0, errors are raised."""
    lines = environment_lines()
    if args.model is not None:
        model, sizes = args.model or None, (args.max_seq_len, args.max_batch_size)
        lines += ["", *model_lines(model, args.dtype, args.device, *sizes, args.kv_dtype)]
    print("\n".join(lines))
    return 0
