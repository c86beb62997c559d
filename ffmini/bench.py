"""`ffmini bench`: speed next to the speed of memory, never without a check of the numbers; and perplexity."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from tqdm import tqdm

from . import __version__, gpu
from .checkpoint import resolve_model
from .config import ModelConfig, load_config, parse_config
from .cpu import CPUDecoder
from .errors import GenerationError, UnsupportedError
from .info import add_model_arguments, device_name, driver_version
from .kernel import cached_cubin, has_bulk_copies
from .layout import TILE_ROWS, MatrixLayout
from .memory import available_memory
from .model import (
    DEFAULT_MAX_SEQ_LEN,
    Decoder,
    Model,
    bundled_model_path,
    choose_device,
    context_length,
    context_limit,
    load,
    load_packed,
    make_decoder,
)
from .numerics import from_bf16, to_bf16
from .packing import (
    LAYER_MATRICES,
    PackedLayer,
    PackedModel,
    make_layouts,
    pack_matrix,
    pack_quantized,
    vectors_length,
)
from .quant import Quantized
from .shapes import SHAPES

SEED = 1
CHECKED_LAYERS = 2
CHECKED_TOKENS = 265  # more than one block of KV, and a single row at the end
TOLERANCE = 2e-2  # relative error of the checked logits, norm over norm
PEAK_BYTES = 4 << 30  # on a GPU
PEAK_CHUNK, PEAK_THREADS = 16384, 512  # as in cuda/read_peak.cu
CPU_PEAK_BYTES = 512 << 20
PEAK_REPETITIONS = 10
RANDOM_ROWS = 257 * TILE_ROWS  # rows of a random matrix that differ; then they repeat
SCORED_ROWS = 128  # tokens scored at a time, in double


# ---- random weights and caches -------------------------------------------------------------------------


def random_model(config: ModelConfig, format: str, seed: int = SEED) -> PackedModel:
    """A model of the shape `config` with random weights, packed without a checkpoint.

    Weights are sized as in a fresh model, so that activations stay near 1. All layers are one object, rows
    repeat, and bf16 embeddings share lm_head's memory: a host with 2 GiB to spare makes the 8B shape.
    Raises ValueError unless intermediate_size is a multiple of 8.
    """
    if config.intermediate_size % 8:
        raise ValueError(f"intermediate_size must be a multiple of 8, not {config.intermediate_size}")
    rng = np.random.default_rng(seed)
    layouts = make_layouts(config, format)
    matrices = [_random_matrix(layouts[name], rng) for name in LAYER_MATRICES]
    layer = PackedLayer(*matrices, vectors=_random_vector(vectors_length(config), rng))
    lm_head = _random_matrix(layouts["lm_head"], rng)
    embed = None
    if not config.tie_word_embeddings:
        count = config.vocab_size * config.hidden_size
        if format == "bf16":
            bits = lm_head.view(np.uint16)
        else:
            bits = np.resize(to_bf16(rng.standard_normal(1_000_003, np.float32)), count)
        embed = bits[:count].reshape(config.vocab_size, config.hidden_size)
    return PackedModel(
        config=config,
        format=format,
        group_size=layouts["qkv_proj"].group_size,
        layouts=layouts,
        layers=[layer] * config.num_layers,
        lm_head=lm_head,
        embed_tokens=embed,
        norm=_random_vector(config.hidden_size, rng),
        directory=None,
    )


def _random_vector(length: int, rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(0.5, 1.5, length).astype(np.float32)


def _random_matrix(layout: MatrixLayout, rng: np.random.Generator) -> np.ndarray:
    """Packed random weights (uint8 [layout.nbytes]) of standard deviation 1 / sqrt(cols)."""
    packed = np.empty(layout.nbytes, np.uint8)
    rows = min(RANDOM_ROWS, layout.rows)
    block = _pack_random(rows, layout, rng)
    whole = layout.rows // rows * block.size
    packed[:whole].reshape(-1, block.size)[:] = block
    if whole < packed.size:
        packed[whole:] = _pack_random(layout.rows % rows, layout, rng)
    return packed


def _pack_random(rows: int, layout: MatrixLayout, rng: np.random.Generator) -> np.ndarray:
    deviation = layout.cols**-0.5
    if layout.format == "bf16":
        return pack_matrix(deviation * rng.standard_normal((rows, layout.cols), np.float32), layout)
    # Codes are uniform; scales (and zeros) differ from group to group, or a wrong one would go unseen.
    groups = (rows, -(-layout.cols // layout.group_size))
    low, high, kind = (-127, 127, np.int8) if layout.format == "int8" else (0, 15, np.uint8)
    codes = rng.integers(low, high, (rows, layout.cols), kind, endpoint=True)
    scale = deviation * math.sqrt(12) / (high - low + 1) * rng.uniform(0.75, 1.25, groups)
    zero = rng.uniform(7.0, 8.0, groups).astype(np.float16) if layout.format == "int4" else None
    return pack_quantized(Quantized(codes, scale.astype(np.float16), zero), layout)


def fill_cache(decoder: Decoder, positions: int, seed: int = SEED) -> None:
    """Fill positions below `positions` of a decoder's KV cache with random K and V, all layers alike."""
    config = decoder.config
    rng = np.random.default_rng(seed)
    shape = (config.num_kv_heads, positions, config.head_dim)
    for cache in (decoder.key_cache, decoder.value_cache):
        bits = to_bf16(rng.standard_normal(shape, np.float32))
        if isinstance(decoder, CPUDecoder):
            cache[:, :, :positions] = from_bf16(bits)
        else:
            cache[:, 0, :, :positions] = gpu.import_cupy().asarray(bits)


# ---- bytes and the speed of memory ---------------------------------------------------------------------


def pass_bytes(packed: PackedModel, depth: int, unpacked: bool = False) -> int:
    """Bytes that a pass of one row has to read with `depth` positions in the KV cache.

    All layers' matrices and vectors as stored (scales and padding included), the final norm, the lm_head,
    one row of an embedding table that is not the lm_head, and K and V that the windows leave in sight.
    `unpacked`: as the CPU path holds them, matrices and cache in float32.
    """
    config = packed.config

    def matrix_bytes(name: str) -> int:
        layout = packed.layouts[name]
        return 4 * layout.rows * layout.cols if unpacked else layout.nbytes

    layer = sum(matrix_bytes(name) for name in LAYER_MATRICES) + 4 * vectors_length(config)
    embed_row = 0 if config.tie_word_embeddings else 2 * config.hidden_size
    seen = sum(min(depth, window - 1) if window else depth for window in config.layer_windows)
    cache = 2 * (4 if unpacked else 2) * config.num_kv_heads * config.head_dim * seen
    rest = 4 * config.hidden_size + matrix_bytes("lm_head") + embed_row
    return config.num_layers * layer + rest + cache


def read_peak(ordinal: int | None) -> float:
    """Bytes per second at which GPU `ordinal`, or the CPU for None, reads memory; the best of ten reads."""
    return _cpu_read_peak() if ordinal is None else _gpu_read_peak(ordinal)


def _cpu_read_peak() -> float:
    """By a matrix-vector product of 512 MiB, or a quarter of what is free: it uses the cores a pass uses."""
    columns = 4096
    rows = min(CPU_PEAK_BYTES, available_memory() // 4) // (4 * columns)
    matrix, vector = np.ones((rows, columns), np.float32), np.ones(columns, np.float32)
    times = []
    for _ in range(PEAK_REPETITIONS):
        began = perf_counter()
        matrix @ vector
        times.append(perf_counter() - began)
    return matrix.nbytes / min(times)


def _gpu_read_peak(ordinal: int) -> float:
    """By cuda/read_peak.cu over 4 GiB, or over half of what is free; with bulk copies if there are any."""
    cupy = gpu.import_cupy()
    properties = cupy.cuda.runtime.getDeviceProperties(ordinal)
    arch = f"sm_{properties['major']}{properties['minor']}"
    bulk = has_bulk_copies(arch)
    blocks = properties["multiProcessorCount"] * (1 if bulk else 4)
    chunks = min(PEAK_BYTES, gpu.free_memory(ordinal) // 2) // PEAK_CHUNK
    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.Device(ordinal), cupy.cuda.using_allocator(pool.malloc):
        cubin = cached_cubin({"BULK_COPIES": str(int(bulk))}, arch, "read_peak.cu")
        module = cupy.RawModule(path=str(cubin))
        kernel = module.get_function("ffmini_read")
        shared = int(gpu.read_global(cupy, module, "ffmini_read_shared_bytes", np.dtype("<u4")))
        kernel.max_dynamic_shared_size_bytes = shared
        memory, never = cupy.zeros(chunks * PEAK_CHUNK, cupy.uint8), cupy.zeros(16, cupy.uint8)
        times = []
        for _ in range(PEAK_REPETITIONS):
            began, ended = cupy.cuda.Event(), cupy.cuda.Event()
            began.record()
            kernel((blocks,), (PEAK_THREADS,), (memory, np.uint64(chunks), never), shared_mem=shared)
            ended.record()
            ended.synchronize()
            times.append(cupy.cuda.get_elapsed_time(began, ended) / 1e3)
        del memory, never
    pool.free_all_blocks()
    return chunks * PEAK_CHUNK / min(times)


# ---- the check -----------------------------------------------------------------------------------------


def check_logits(packed: PackedModel, ordinal: int | None) -> float:
    """The relative error of the logits of the first layers, which must be at most TOLERANCE.

    A GPU is compared with the CPU path, the CPU path with its own float64 mode. GenerationError if it is off.
    """
    config = packed.config
    count = min(CHECKED_LAYERS, config.num_layers)
    config = dataclasses.replace(config, num_layers=count, layer_windows=config.layer_windows[:count])
    packed = dataclasses.replace(packed, config=config, layers=packed.layers[:count])
    length = min(CHECKED_TOKENS, context_limit(config))
    tokens = np.random.default_rng(SEED).integers(0, config.vocab_size, length)
    found = _checked_logits(make_decoder(packed, ordinal, length), tokens)
    precision = "float64" if ordinal is None else "bf16"
    expected = _checked_logits(CPUDecoder(packed, length, precision=precision), tokens)
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    if not error <= TOLERANCE:
        raise GenerationError(
            f"logits after {count} layers: relative error of at most {TOLERANCE:g} expected, found "
            f"{error:.2e}; the speed of wrong numbers is not measured"
        )
    return error


def _checked_logits(decoder: Decoder, tokens: np.ndarray) -> np.ndarray:
    """Logits [up to 9, vocab_size] of the last of `tokens`, the very last one in a pass of its own."""
    last, block = len(tokens) - 1, max(0, len(tokens) - 9)
    try:
        if block:
            decoder.forward(tokens[:block], 0, "none")
        rows = [decoder.forward(tokens[block:last], block, "all")] if last else []
        return np.concatenate([*rows, decoder.forward(tokens[last:], last)])
    finally:
        decoder.close()


# ---- timing --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """One measurement; a prompt has no bytes, as its passes read the weights once for many tokens."""

    shape: str
    dtype: str
    test: str  # pp<tokens> or tg<tokens>, as llama-bench calls them
    depth: int  # positions in the cache before the test
    tokens_per_s: float  # the mean of the repetitions
    tokens_per_s_deviation: float
    us_per_token: float
    bytes: int | None  # that a token reads, see pass_bytes
    peak_bytes_per_s: float
    fraction: float | None  # of the peak
    logits_error: float  # see check_logits
    repetitions: int
    device: str
    driver: str | None
    commit: str


@dataclass(frozen=True)
class Plan:
    """What to measure: prompt lengths, numbers of generated tokens and depths, each with each."""

    prompts: list[int]
    generations: list[int]
    depths: list[int]
    repetitions: int

    @property
    def positions(self) -> int:
        """The context that the longest test needs."""
        return max(self.depths) + max(1, *self.prompts, *self.generations)


def time_prompt(decoder: Decoder, tokens: np.ndarray, depth: int) -> float:
    """Seconds for the passes of a prompt `tokens` from position `depth` on."""
    began = perf_counter()
    decoder.forward(tokens, depth)
    return perf_counter() - began


def time_generation(decoder: Decoder, tokens: np.ndarray, depth: int) -> float:
    """Seconds for one pass per token from position `depth` on, without sampling.

    A GPU's passes are queued and waited for once.
    """
    began = perf_counter()
    if isinstance(decoder, CPUDecoder):
        for i in range(len(tokens)):
            decoder.forward(tokens[i : i + 1], depth + i)
    else:
        for i in range(len(tokens)):
            decoder.launch(1, tokens[i : i + 1], depth + i, 1)
        decoder.finish()
    return perf_counter() - began


def measure(
    packed: PackedModel, shape: str, plan: Plan, max_seq_len: int, ordinal: int | None
) -> list[Record]:
    """Check the numbers, then time every test of `plan`."""
    error = check_logits(packed, ordinal)
    decoder = make_decoder(packed, ordinal, max_seq_len)
    try:
        common = {
            "shape": shape,
            "dtype": packed.format,
            "peak_bytes_per_s": read_peak(ordinal),
            "logits_error": error,
            "repetitions": plan.repetitions,
            "device": device_name(decoder.device),
            "driver": None if ordinal is None else driver_version(),
            "commit": build_version(),
        }
        records = []
        for depth in plan.depths:
            fill_cache(decoder, depth)
            for prefix, lengths in (("pp", plan.prompts), ("tg", plan.generations)):
                for length in lengths:
                    seconds = _repeat(decoder, prefix, length, depth, plan.repetitions)
                    records.append(_record(packed, prefix, depth, length, seconds, ordinal is None, common))
        return records
    finally:
        decoder.close()


def _repeat(decoder: Decoder, prefix: str, length: int, depth: int, repetitions: int) -> list[float]:
    """Seconds of each repetition of a test, after one that does not count."""
    run = time_prompt if prefix == "pp" else time_generation
    tokens = np.random.default_rng(SEED).integers(0, decoder.config.vocab_size, length)
    return [run(decoder, tokens, depth) for _ in range(repetitions + 1)][1:]


def _record(
    packed: PackedModel,
    prefix: str,
    depth: int,
    length: int,
    seconds: list[float],
    unpacked: bool,
    common: dict[str, Any],
) -> Record:
    """The figures of one test; `common` holds the fields that all of them share."""
    rates = [length / second for second in seconds]
    us_per_token = 1e6 * statistics.mean(seconds) / length
    nbytes = fraction = None
    if prefix == "tg":
        nbytes = sum(pass_bytes(packed, depth + i, unpacked) for i in range(length)) // length
        fraction = nbytes / (us_per_token / 1e6) / common["peak_bytes_per_s"]
    return Record(
        test=f"{prefix}{length}",
        depth=depth,
        tokens_per_s=statistics.mean(rates),
        tokens_per_s_deviation=statistics.stdev(rates) if len(rates) > 1 else 0.0,
        us_per_token=us_per_token,
        bytes=nbytes,
        fraction=fraction,
        **common,
    )


def build_version() -> str:
    """`git describe` in a checkout, else the package's version."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return __version__
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return __version__


def records_table(records: list[Record]) -> str:
    """A Markdown table for people, and what all rows have in common."""
    lines = [
        "| shape | dtype | test | tokens/s | us/token | MB/token | GB/s | of the peak |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for record in records:
        test = record.test + (f" @ d{record.depth}" if record.depth else "")
        reads = "- | - | -"
        if record.bytes is not None and record.fraction is not None:
            speed = record.bytes / record.us_per_token / 1e3
            reads = f"{record.bytes / 1e6:.1f} | {speed:.1f} | {record.fraction:.1%}"
        rate = f"{record.tokens_per_s:.1f} ± {record.tokens_per_s_deviation:.1f}"
        lines.append(
            f"| {record.shape} | {record.dtype} | {test} | {rate} | {record.us_per_token:.1f} | {reads} |"
        )
    last = records[-1]
    lines += [
        "",
        f"{last.device}, driver {last.driver or 'none'}, ffmini {last.commit}; read peak "
        f"{last.peak_bytes_per_s / 1e9:.1f} GB/s; relative error of the logits {last.logits_error:.1e}",
    ]
    return "\n".join(lines)


# ---- perplexity ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text."""

    shape: str
    dtype: str
    file: str
    tokens: int
    bytes: int
    context: int
    perplexity: float  # per token
    bits_per_byte: float
    device: str
    commit: str


def perplexity(model: Model, text: str) -> tuple[float, float]:
    """Perplexity per token and bits per byte of `text`.

    Windows of the model's context, each after BOS, advance by half of it. A token counts once, in the first
    window that has at least half a context before it. ValueError if there are no tokens, UnsupportedError if
    the model has no BOS token.
    """
    bos = model.tokenizer.bos_token_id
    bos = model.config.bos_token_id if bos is None else bos
    if bos is None:
        raise UnsupportedError("perplexity needs a BOS token to begin with; this model has none")
    ids = np.array(model.encode(text, add_special_tokens=False), np.int64)
    half = model.max_seq_len // 2
    if len(ids) == 0 or half == 0:
        raise ValueError(
            f"perplexity needs a text and a context of 2, found {len(ids)} tokens and {2 * half}"
        )
    nats = 0.0
    starts = range(0, max(len(ids) - half, 1), half)
    for start in tqdm(starts, desc="scoring", unit="window", file=sys.stderr, disable=None):
        window = ids[start : start + 2 * half]
        logits = model.logits(np.concatenate(([bos], window[:-1])))
        for at in range(half if start else 0, len(window), SCORED_ROWS):
            rows = slice(at, at + SCORED_ROWS)
            nats -= float(_log_probabilities(logits[rows], window[rows]).sum())
    return math.exp(nats / len(ids)), nats / math.log(2) / len(text.encode())


def _log_probabilities(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """ln p (float64 [n]) of `tokens` [n] under `logits` [n, vocab_size]."""
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits[np.arange(len(tokens)), tokens] - np.log(np.exp(logits).sum(axis=-1))


def score_text(model: Model, name: str, file: Path) -> Score:
    """The Score of the UTF-8 text in `file` under `model`, which is called `name`."""
    data = file.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected UTF-8, found byte 0x{data[error.start]:02x}") from None
    per_token, bits_per_byte = perplexity(model, text)
    return Score(
        shape=name,
        dtype=model.dtype,
        file=file.name,
        tokens=len(model.encode(text, add_special_tokens=False)),
        bytes=len(data),
        context=model.max_seq_len,
        perplexity=per_token,
        bits_per_byte=bits_per_byte,
        device=device_name(model.device),
        commit=build_version(),
    )


def score_line(score: Score) -> str:
    """A Score for people."""
    return (
        f"{score.shape} ({score.dtype}), {score.file}: {score.tokens} tokens, {score.bytes} bytes, "
        f"context {score.context}: perplexity {score.perplexity:.3f} per token, "
        f"{score.bits_per_byte:.4f} bits per byte"
    )


# ---- the command ---------------------------------------------------------------------------------------


def _counts(text: str) -> list[int]:
    """The numbers of a list such as "0,4096"."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [-1]
    if min(counts) < 0:
        raise argparse.ArgumentTypeError(f"expected numbers such as 512 or 0,4096, found {text!r}")
    return counts


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, found {text!r}")
    return int(text)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `bench` with the parser of `ffmini`; its arguments go to run()."""
    description = "Measure prompt and generation speed beside the speed of memory, or perplexity."
    parser = subparsers.add_parser("bench", help="speed, perplexity", description=description)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("-m", "--model", help="model directory or org/name (default: the bundled model)")
    model.add_argument("--random", choices=SHAPES, metavar="SHAPE", help=f"random: {', '.join(SHAPES)}")
    add_model_arguments(parser)
    parser.add_argument(
        "-p", "--prompt", type=_counts, default=[512], metavar="N,..", help="prompt tokens (512; 0: none)"
    )
    parser.add_argument(
        "-n", "--generate", type=_counts, default=[128], metavar="N,..", help="new tokens (128; 0: none)"
    )
    parser.add_argument(
        "-d", "--depth", type=_counts, default=[0], metavar="N,..", help="random positions before them (0)"
    )
    parser.add_argument("-r", "--repetitions", type=_positive, default=5, metavar="N", help="of a test (5)")
    parser.add_argument("--perplexity", type=Path, metavar="FILE", help="score a text instead")
    parser.add_argument("--json", action="store_true", help="print a list of records")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure what `args` say and print it on stdout; returns 0, errors are raised."""
    if args.perplexity is None:
        records = _measure(args)
        print(_json(records) if args.json else records_table(records))
    else:
        score = _score(args)
        print(_json([score]) if args.json else score_line(score))
    return 0


def _measure(args: argparse.Namespace) -> list[Record]:
    plan = Plan(
        [count for count in args.prompt if count],
        [count for count in args.generate if count],
        args.depth,
        args.repetitions,
    )
    if not plan.prompts and not plan.generations:
        raise ValueError("nothing to measure: expected tokens from -p or -n, found none")
    ordinal = choose_device(args.device)
    directory = None if args.random else _model_directory(args.model)
    config = parse_config(SHAPES[args.random], args.random) if args.random else load_config(directory)
    max_seq_len = args.max_seq_len
    if max_seq_len is None:
        max_seq_len = min(max(DEFAULT_MAX_SEQ_LEN, plan.positions), context_limit(config))
    max_seq_len = context_length(config, max_seq_len)
    if plan.positions > max_seq_len:
        raise ValueError(f"the tests need {plan.positions} positions, the context has {max_seq_len}")
    packed = load_packed(directory, args.dtype) if directory else random_model(config, args.dtype or "bf16")
    return measure(packed, args.random or directory.name, plan, max_seq_len, ordinal)


def _score(args: argparse.Namespace) -> Score:
    if args.random:
        raise ValueError("--perplexity needs a model: random weights predict nothing")
    with load(args.model, args.device, args.dtype, args.max_seq_len) as model:
        return score_text(model, _model_directory(args.model).name, args.perplexity)


def _model_directory(model: str | None) -> Path:
    return bundled_model_path() if model is None else resolve_model(model)


def _json(results: Sequence[Record | Score]) -> str:
    return json.dumps([asdict(result) for result in results], indent=1)
