"""`ffmini bench`: speed next to the speed of memory, never without a check of the numbers; and perplexity."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, sleep
from typing import Any

import numpy as np
import tokenizers
from tqdm import tqdm

from . import __version__, gpu, launch
from .candidates import Candidates, Draw
from .checkpoint import resolve_model
from .config import GenerationDefaults, ModelConfig, load_config, parse_config, read_json
from .cpu import CPUDecoder, held_bytes, held_vector_bytes
from .engine import Decoder, Engine
from .errors import GenerationError, UnsupportedError
from .generation import Run
from .info import add_model_arguments, device_name, driver_version
from .kernel import MAX_ROWS, cached_cubin, has_bulk_copies, max_rows
from .layout import FORMATS, TILE_ROWS, MatrixLayout, VectorLayout
from .memory import available_memory
from .model import (
    DEFAULT_MAX_SEQ_LEN,
    Model,
    bundled_model_path,
    choose_device,
    context_length,
    context_limit,
    load,
    load_packed,
    make_decoder,
)
from .numerics import from_bf16, join_vectors, quantize_vectors, to_bf16
from .options import GenerationOptions
from .packing import (
    LAYER_MATRICES,
    PackedLayer,
    PackedModel,
    make_layouts,
    pack_matrix,
    pack_quantized,
    vectors_length,
)
from .passes import Work
from .quant import Quantized
from .report import ENGINE, Record, Score, records_table, score_line, summary_line, to_json
from .sampler import Sampler, TokenLogprobs
from .shapes import SHAPES
from .tokenizer import Tokenizer

SEED = 1
CHECKED_LAYERS = 2
CHECKED_TOKENS = 265  # more than one block of KV, and a single row at the end
TOLERANCE = 2e-2  # relative error of the checked logits, norm over norm
PEAK_BYTES = 4 << 30  # on a GPU
PEAK_CHUNK, PEAK_THREADS = 16384, 512  # as in cuda/read_peak.cu
CPU_PEAK_BYTES = 512 << 20
PEAK_REPETITIONS = 10
PEAK_SECONDS = 0.2  # of a GPU's reads, at least: one that was idle takes a while to raise its clocks
REST_SECONDS = 0.3  # of a GPU between repetitions
# Of a random matrix; more are made of these. 257 is a prime, so that no two copies agree in two slots.
RANDOM_ROWS = 257 * TILE_ROWS
FILLED_POSITIONS = 4096  # of a cache at a time
QUEUED_PASSES = 200  # on a GPU; the CPU, which nothing is queued for, makes fewer
CPU_PASSES = 128
END_TO_END_TOKENS = 128  # on a GPU
GUESSES = 7  # at a time
SAMPLING = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 1, "ignore_eos": True}
BASELINE = Path(__file__).resolve().parent.parent / "tools" / "transformers_baseline.py"
SCORED_ROWS = 128  # tokens scored at a time, in double


# ---- random weights and caches -------------------------------------------------------------------------


def random_model(config: ModelConfig, format: str, seed: int = SEED) -> PackedModel:
    """A model of the shape `config` with random weights, packed without a checkpoint.

    Weights are sized as in a fresh model, so that activations stay near 1. All layers are one object, rows
    are made of pieces of others, and bf16 embeddings share lm_head's memory: a host with 2 GiB to spare makes
    the 8B shape.
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
    """Packed random weights (uint8 [layout.nbytes]) of standard deviation 1 / sqrt(cols).

    Rows beyond the first RANDOM_ROWS are made of slots of these. With 2 to 257 slots no two rows have more
    than one in common: if many logits were equal it would take a pass longer to sort its candidates.
    """
    packed = np.empty(layout.nbytes, np.uint8)
    rows = min(RANDOM_ROWS, layout.rows)
    block = _pack_random(rows, layout, rng)
    whole = layout.rows // rows * block.size
    tiles = block.reshape(-1, layout.tile_bytes)
    for i, copy in enumerate(packed[:whole].reshape(-1, *tiles.shape)):
        for slot in range(layout.slots):
            place = slice(slot * layout.slot_bytes, (slot + 1) * layout.slot_bytes)  # the last may be shorter
            copy[:, place] = np.roll(tiles[:, place], i * slot, axis=0)
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
    """Fill positions below `positions` of a KV cache with random K and V, all layers and slots alike."""
    config = decoder.config
    layout = VectorLayout(config.head_dim, decoder.kv_dtype)
    rng = np.random.default_rng(seed)
    for cache, scale in (
        (decoder.key_cache, "key_scale"),
        (decoder.value_cache, "value_scale"),
    ):
        for start in range(0, positions, FILLED_POSITIONS):
            count = min(FILLED_POSITIONS, positions - start)
            part = slice(start, start + count)
            vectors = rng.standard_normal((config.num_kv_heads, count, config.head_dim), np.float32)
            if not isinstance(decoder, CPUDecoder):
                with cache.device:
                    cache[:, :, :, part] = gpu.import_cupy().asarray(_cached(vectors, layout))
            elif decoder.kv_dtype == "bf16":
                cache[:, 0, :, part] = from_bf16(to_bf16(vectors))
            else:
                cache[:, 0, :, part], getattr(decoder, scale)[:, 0, :, part] = quantize_vectors(vectors)


def _cached(vectors: np.ndarray, layout: VectorLayout) -> np.ndarray:
    """Random `vectors` [..., positions, head_dim] as a GPU's cache holds them; which way round is all one."""
    if layout.kv_dtype == "bf16":
        return to_bf16(vectors)
    return layout.to_cache(join_vectors(*quantize_vectors(vectors)), 0)


# ---- bytes and the speed of memory ---------------------------------------------------------------------


def pass_bytes(
    packed: PackedModel,
    depth: int,
    unpacked: bool = False,
    rows: int = 1,
    sequences: int = 1,
    kv_dtype: str = "bf16",
) -> int:
    """Bytes that a pass of `rows` rows has to read with `depth` positions of each sequence in the KV cache.

    All layers' matrices and vectors as stored (scales and padding included), the final norm, the lm_head,
    `rows` rows of an embedding table that is not the lm_head, and K and V that the windows of each sequence's
    first row show, which are of `kv_dtype`.
    `unpacked`: as the CPU path holds them, matrices, scales and cache in float32.
    """
    config = packed.config

    def matrix_bytes(name: str) -> int:
        layout = packed.layouts[name]
        return held_bytes(layout) if unpacked else layout.nbytes

    layer = sum(matrix_bytes(name) for name in LAYER_MATRICES) + 4 * vectors_length(config)
    embed_rows = 0 if config.tie_word_embeddings else 2 * config.hidden_size * rows
    seen = sum(min(depth, window - 1) if window else depth for window in config.layer_windows)
    vector = VectorLayout(config.head_dim, kv_dtype).nbytes
    if unpacked:
        vector = held_vector_bytes(config.head_dim, kv_dtype)
    cache = sequences * 2 * config.num_kv_heads * vector * seen
    rest = 4 * config.hidden_size + matrix_bytes("lm_head") + embed_rows
    return config.num_layers * layer + rest + cache


def read_peak(ordinal: int | None) -> float:
    """Bytes per second at which GPU `ordinal`, or the CPU for None, reads memory: the best of many reads."""
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
        shared = int(launch.read_global(cupy, module, "ffmini_read_shared_bytes", np.dtype("<u4")))
        kernel.max_dynamic_shared_size_bytes = shared
        memory, never = cupy.zeros(chunks * PEAK_CHUNK, cupy.uint8), cupy.zeros(16, cupy.uint8)
        times: list[float] = []
        while len(times) < PEAK_REPETITIONS or sum(times) < PEAK_SECONDS:
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


def check_logits(
    packed: PackedModel, ordinal: int | None, rows: Sequence[int] = (), kv_dtype: str = "bf16"
) -> float:
    """The relative error of the logits of the first layers, which must be at most TOLERANCE.

    A GPU is compared with the CPU path, the CPU path with its own float64 mode. The builds of a GPU that are
    checked are those that it chooses itself and those for `rows`. GenerationError if it is off.
    """
    config = packed.config
    count = min(CHECKED_LAYERS, config.num_layers)
    config = config.first_layers(count)
    packed = dataclasses.replace(packed, config=config, layers=packed.layers[:count])
    length = min(CHECKED_TOKENS, context_limit(config))
    tokens = np.random.default_rng(SEED).integers(0, config.vocab_size, length)
    # The very last token goes in a pass of its own: a GPU has another build for that.
    found = [_last_logits(make_decoder(packed, ordinal, length, kv_dtype=kv_dtype), tokens, [8, 1])]
    if rows:
        found.append(_last_logits(_rows_decoder(packed, ordinal, length, rows, kv_dtype), tokens, rows))
    precision = "float64" if ordinal is None else "bf16"
    oracle = CPUDecoder(packed, length, precision=precision, kv_dtype=kv_dtype)
    expected = _last_logits(oracle, tokens, [max(len(part) for part in found)])
    error = float(np.max([_relative_error(part, expected[-len(part) :]) for part in found]))  # NaN stays
    if not error <= TOLERANCE:
        raise GenerationError(
            f"logits after {count} layers: relative error of at most {TOLERANCE:g} expected, found "
            f"{error:.2e}; the speed of wrong numbers is not measured"
        )
    return error


def _last_logits(decoder: Decoder, tokens: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Logits [sum of sizes, vocab_size] of the last of `tokens`, in passes of `sizes`; closes `decoder`."""
    at = max(0, len(tokens) - sum(sizes))
    with closing(decoder):
        logits = [decoder.forward(tokens[:at], 0, "none")] if at else []
        for size in sizes:
            if at < len(tokens):
                logits.append(decoder.forward(tokens[at : at + size], at, "all"))
            at += size
    return np.concatenate(logits)


def _relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _rows_decoder(
    packed: PackedModel, ordinal: int | None, max_seq_len: int, rows: Sequence[int], kv_dtype: str
) -> Decoder:
    """A decoder whose builds are for exactly `rows` rows; the CPU takes any number."""
    if ordinal is None:
        return make_decoder(packed, None, max_seq_len, kv_dtype=kv_dtype)
    return gpu.GPUDecoder(packed, max_seq_len, ordinal, rows=tuple(rows), kv_dtype=kv_dtype)


# ---- timing --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What to measure: each test at each depth; the one from end to end begins with an empty cache."""

    prompts: list[int]  # tokens
    generations: list[int]  # tokens, a pass each
    depths: list[int]
    repetitions: int
    rows: list[int] = field(default_factory=list)  # of a pass, for passes of many
    end_to_end: int = 0  # tokens; 0: not measured
    batch: list[int] = field(default_factory=list)  # sequences, a row of each pass for each
    guesses: int = 0  # tokens of texts that are replayed with guesses; 0: not measured
    kv_dtype: str = "bf16"
    rest: float = 0.0  # seconds, see _repeat

    @property
    def passes(self) -> int:
        """How many passes of many rows or sequences are made."""
        return max(self.generations, default=QUEUED_PASSES)

    @property
    def positions(self) -> int:
        """The context that the longest test needs."""
        spans = [1, *self.prompts, *self.generations, *(self.passes - 1 + rows for rows in self.rows)]
        spans += [self.passes for _ in self.batch]
        return max(max(self.depths) + max(spans), self.end_to_end + 1, 2 * self.guesses)


def time_prompt(decoder: Decoder, tokens: np.ndarray, depth: int) -> float:
    """Seconds for the passes of a prompt `tokens` from position `depth` on."""
    began = perf_counter()
    decoder.forward(tokens, depth)
    return perf_counter() - began


def time_passes(decoder: Decoder, tokens: np.ndarray, depth: int) -> float:
    """Seconds for a pass per row of `tokens` [passes, rows], each a position further on than the one before.

    The first begins at position `depth`. A GPU's passes are queued and waited for once. Nothing is sampled.
    """
    passes, rows = tokens.shape
    began = perf_counter()
    if isinstance(decoder, CPUDecoder):
        for i in range(passes):
            decoder.forward(tokens[i], depth + i, "all")
    else:
        for i in range(passes):
            decoder.launch(rows, tokens[i], depth + i, (1 << rows) - 1)
        decoder.finish()
    return perf_counter() - began


def time_batch(decoder: gpu.GPUDecoder, tokens: np.ndarray, depth: int) -> float:
    """The same where each column of `tokens` [passes, sequences] is a sequence in a slot of its own."""
    count = tokens.shape[1]
    began = perf_counter()
    for i, row in enumerate(tokens):
        works = [Work(slot, row[slot : slot + 1], depth + i, ()) for slot in range(count)]
        decoder.launch_works(count, works, (1 << count) - 1)
    decoder.finish()
    return perf_counter() - began


def time_end_to_end(model: Model, tokens: int) -> float:
    """Seconds for `tokens` new tokens but the first: passes, sampling and text, one after the other."""
    return model.generate([0], max_new_tokens=tokens, **SAMPLING).timings.generation_seconds


class _Replay(Sampler):
    """Samples as ever, and then says what it was given."""

    def __init__(
        self, options: GenerationOptions, prompt: np.ndarray, config: ModelConfig, text: Sequence[int]
    ) -> None:
        super().__init__(options, prompt, config.eos_token_ids, config.vocab_size)
        self._text = iter(text)

    def draws(self) -> tuple[Draw, Draw] | None:
        return None  # the tokens come from the text

    def sample(self, candidates: Candidates) -> tuple[int, TokenLogprobs | None]:
        _, logprobs = super().sample(candidates)
        return next(self._text), logprobs


def time_replay(
    decoder: Decoder, tokenizer: Tokenizer, prompt: np.ndarray, text: np.ndarray, guesses: int
) -> float:
    """Seconds for the tokens of `text` but the first as if they were sampled, guessed `guesses` at a time."""
    options = GenerationOptions(max_new_tokens=len(text), prompt_lookup_num_tokens=guesses, **SAMPLING)
    sampler = _Replay(options, prompt, decoder.config, text.tolist())
    run = Run(prompt, options, decoder.config, tokenizer, decoder.max_seq_len, sampler)
    engine = Engine(decoder)
    engine.start([run], ahead=True)
    while engine.busy:
        engine.step()
    if run.error is not None:
        raise run.error
    return run.generation_seconds


def _tokenizer(packed: PackedModel) -> Tokenizer:
    """The model's own, or for random weights one with the words t0, t1 and so on."""
    if packed.directory is not None:
        return Tokenizer(packed.directory)
    vocabulary = {f"t{i}": i for i in range(packed.config.vocab_size)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t0"))
    with TemporaryDirectory() as directory:
        words.save(str(Path(directory, "tokenizer.json")))
        return Tokenizer(Path(directory))


def measure(
    packed: PackedModel, shape: str, plan: Plan, max_seq_len: int, ordinal: int | None
) -> Iterator[Record]:
    """Check the numbers, then time the tests of `plan`; a record is there as soon as its test is over."""
    # First what can be missing: a directory need not have a tokenizer.
    tokenizer = _tokenizer(packed) if plan.end_to_end or plan.guesses else None
    rows = _rows_that_fit(packed, shape, plan.rows, max_seq_len, ordinal, plan.kv_dtype)
    batch = _rows_that_fit(packed, shape, plan.batch, max_seq_len, ordinal, plan.kv_dtype)
    single = plan.prompts or plan.generations or plan.end_to_end or plan.guesses
    if not single and not rows and not batch:
        return
    common = {
        "shape": shape,
        "dtype": packed.format,
        "kv_dtype": plan.kv_dtype,
        "engine": ENGINE,
        "logits_error": check_logits(packed, ordinal, sorted({*rows, *batch}), plan.kv_dtype),
        "peak_bytes_per_s": read_peak(ordinal),
        "repetitions": plan.repetitions,
        "rest": plan.rest,
        "device": device_name("cpu" if ordinal is None else f"cuda:{ordinal}"),
        "driver": None if ordinal is None else driver_version(),
        "commit": build_version(),
        "versions": None,
        "over_queued": None,
        "over_unguessed": None,
    }
    if single:
        with closing(make_decoder(packed, ordinal, max_seq_len, kv_dtype=plan.kv_dtype)) as decoder:
            for depth in plan.depths:
                fill_cache(decoder, depth)
                for length in plan.prompts:
                    seconds = _repeat(plan, time_prompt, decoder, _tokens(decoder, length), depth)
                    what = {"test": f"pp{length}", "depth": depth, "rows": None}
                    yield _record(common | what, seconds, length)
                for length in plan.generations:
                    what = {"test": f"tg{length}", "depth": depth}
                    yield _time_passes(packed, decoder, plan, length, 1, common | what)
            if plan.end_to_end:
                yield _end_to_end(packed, decoder, tokenizer, plan, common)
            if plan.guesses:
                yield from _replays(decoder, tokenizer, plan, common)
    if rows:
        with closing(_rows_decoder(packed, ordinal, max_seq_len, rows, plan.kv_dtype)) as decoder:
            for depth in plan.depths:
                fill_cache(decoder, depth)
                for count in rows:
                    what = {"test": f"rows{count}", "depth": depth}
                    yield _time_passes(packed, decoder, plan, plan.passes, count, common | what)
    if batch:
        options = {"rows": tuple(batch), "num_slots": max(batch), "kv_dtype": plan.kv_dtype}
        with closing(gpu.GPUDecoder(packed, max_seq_len, ordinal, **options)) as decoder:
            for depth in plan.depths:
                fill_cache(decoder, depth)
                for count in batch:
                    what = {"test": f"batch{count}", "depth": depth}
                    yield _time_batch(packed, decoder, plan, count, common | what)


def _rows_that_fit(
    packed: PackedModel,
    shape: str,
    asked: list[int],
    max_seq_len: int,
    ordinal: int | None,
    kv_dtype: str = "bf16",
) -> list[int]:
    """Those of `asked` that a pass on GPU `ordinal` has the shared memory for; the others are named."""
    if ordinal is None or not asked:
        return asked
    properties = gpu.import_cupy().cuda.runtime.getDeviceProperties(ordinal)
    limit, blocks = properties["sharedMemPerBlockOptin"], gpu.grid_size(properties["multiProcessorCount"])
    most = max_rows(packed.config, packed.layouts, max_seq_len, limit, blocks, kv_dtype)
    left_out = ", ".join(str(count) for count in asked if count > most)
    if left_out:
        _say(f"{shape} {packed.format}: a pass has room for {most} rows, not measured: {left_out}")
    return [count for count in asked if count <= most]


def _tokens(decoder: Decoder, *shape: int) -> np.ndarray:
    return np.random.default_rng(SEED).integers(0, decoder.config.vocab_size, shape)


def _repeat(plan: Plan, run: Callable[..., float], *args: Any) -> list[float]:
    """Seconds of each repetition of `run`, after one that does not count.

    After each the device rests for as long as it took, plan.rest seconds at most: a card at its power limit
    lowers its clock, and repetitions differ without a pattern.
    """
    seconds: list[float] = []
    for _ in range(plan.repetitions + 1):
        seconds.append(run(*args))
        sleep(min(plan.rest, seconds[-1]))
    return seconds[1:]


def _time_passes(
    packed: PackedModel, decoder: Decoder, plan: Plan, passes: int, rows: int, common: dict[str, Any]
) -> Record:
    """The record of `passes` passes of `rows` rows from the depth in `common` on."""
    depth = common["depth"]
    seconds = _repeat(plan, time_passes, decoder, _tokens(decoder, passes, rows), depth)
    nbytes = _mean_bytes(packed, decoder, range(depth, depth + passes), rows)
    return _record(common | {"rows": rows}, seconds, passes * rows, passes, nbytes)


def _time_batch(
    packed: PackedModel, decoder: gpu.GPUDecoder, plan: Plan, count: int, common: dict[str, Any]
) -> Record:
    """The record of passes of a token of each of `count` sequences, from the depth in `common` on."""
    depth, passes = common["depth"], plan.passes
    seconds = _repeat(plan, time_batch, decoder, _tokens(decoder, passes, count), depth)
    nbytes = _mean_bytes(packed, decoder, range(depth, depth + passes), count, sequences=count)
    return _record(common | {"rows": count}, seconds, passes * count, passes, nbytes)


def _end_to_end(
    packed: PackedModel, decoder: Decoder, tokenizer: Tokenizer, plan: Plan, common: dict[str, Any]
) -> Record:
    """The record of generations after a prompt of one token, beside queued passes at the same positions."""
    passes = plan.end_to_end - 1
    model = Model(decoder, tokenizer, GenerationDefaults(), packed.format)
    seconds = _repeat(plan, time_end_to_end, model, plan.end_to_end)
    queued = _repeat(plan, time_passes, decoder, _tokens(decoder, passes, 1), 1)
    nbytes = _mean_bytes(packed, decoder, range(1, plan.end_to_end), 1)
    over_queued = statistics.median(seconds) / statistics.median(queued)
    what = {"test": f"e2e{plan.end_to_end}", "depth": 0, "rows": 1, "over_queued": over_queued}
    return _record(common | what, seconds, passes, passes, nbytes)


def _replays(decoder: Decoder, tokenizer: Tokenizer, plan: Plan, common: dict[str, Any]) -> Iterator[Record]:
    """Records of a text that is its prompt with one word changed, and of one that repeats nothing."""
    prompt, new = (
        np.random.default_rng(SEED).permutation(decoder.config.vocab_size)[: 2 * plan.guesses].reshape(2, -1)
    )
    edit = prompt.copy()
    edit[len(edit) // 2] = new[0]
    for name, text in (("edit", edit), ("new", new)):
        plain = _repeat(plan, time_replay, decoder, tokenizer, prompt, text, 0)
        seconds = _repeat(plan, time_replay, decoder, tokenizer, prompt, text, GUESSES)
        ratio = statistics.median(seconds) / statistics.median(plain)
        what = {"test": f"{name}{plan.guesses}", "depth": 0, "rows": None, "over_unguessed": ratio}
        yield _record(common | what, seconds, plan.guesses - 1)


def _mean_bytes(packed: PackedModel, decoder: Decoder, depths: range, rows: int, sequences: int = 1) -> int:
    options = isinstance(decoder, CPUDecoder), rows, sequences, decoder.kv_dtype
    return sum(pass_bytes(packed, depth, *options) for depth in depths) // len(depths)


def _record(
    common: dict[str, Any],
    seconds: list[float],
    tokens: int,
    passes: int | None = None,
    nbytes: int | None = None,
) -> Record:
    """The figures of repetitions of `seconds` each for `tokens` tokens in `passes` passes of `nbytes` each.

    `common` holds the other fields; of a prompt neither passes nor bytes are known.
    """
    median = statistics.median(seconds)
    rates = [tokens / second for second in seconds]
    fraction = None
    if passes is not None and nbytes is not None:
        fraction = nbytes * passes / median / common["peak_bytes_per_s"]
    return Record(
        tokens_per_s=tokens / median,
        tokens_per_s_deviation=statistics.stdev(rates) if len(rates) > 1 else 0.0,
        us_per_token=1e6 * median / tokens,
        us_per_pass=None if passes is None else 1e6 * median / passes,
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


# ---- what a user would pick instead --------------------------------------------------------------------


def compare(
    raw: dict[str, Any], plan: Plan, ordinal: int | None, measured: Sequence[Record]
) -> Iterator[Record]:
    """Records of transformers in bf16 on the model that `raw`, a config.json, describes, with random weights.

    PyTorch runs in a process of its own, from a script that only a checkout has. What is missing or fails is
    one line on stderr. `measured` are ffmini's records of the shape; without any there is nothing to do.
    """
    if not measured:
        return
    shape = measured[0].shape
    if ordinal is None or not BASELINE.exists():
        needed = "a GPU" if ordinal is None else f"a checkout of ffmini with {BASELINE}"
        _say(f"{shape}: nothing compared with transformers: needs {needed}")
        return
    depth, passes = min(plan.depths), plan.passes
    command = [sys.executable, str(BASELINE), "--device", f"cuda:{ordinal}", "--depth", str(depth)]
    command += ["--passes", str(passes), "--repetitions", str(plan.repetitions), "--rest", str(plan.rest)]
    command += ["--prompts", *map(str, plan.prompts)]
    done = subprocess.run(command, input=json.dumps(raw), capture_output=True, text=True)
    what = {"dtype": "bf16", "kv_dtype": "bf16", "test": f"tg{passes}", "depth": depth, "rows": 1}
    same = (record for record in measured if all(getattr(record, key) == what[key] for key in what))
    nbytes = next((record.bytes for record in same), None)
    shared = ("shape", "peak_bytes_per_s", "repetitions", "rest", "device", "driver", "commit")
    common = {key: getattr(measured[0], key) for key in shared} | what
    common |= {"over_queued": None, "over_unguessed": None, "logits_error": None}
    for line in done.stdout.splitlines():
        found = json.loads(line)
        other = common | {key: found[key] for key in ("engine", "versions")}
        if found["test"] == what["test"]:
            yield _record(other, found["seconds"], passes, passes, nbytes)
        else:
            length = int(found["test"].removeprefix("pp"))
            yield _record(other | {"test": found["test"], "rows": None}, found["seconds"], length)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        _say(f"{shape}: comparison with transformers failed: {reason[0]}")


def _say(text: str) -> None:
    print(f"ffmini: {text}", file=sys.stderr, flush=True)


# ---- perplexity ----------------------------------------------------------------------------------------


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
        kv_dtype=model.kv_dtype,
        file=file.name,
        tokens=len(model.encode(text, add_special_tokens=False)),
        bytes=len(data),
        context=model.max_seq_len,
        perplexity=per_token,
        bits_per_byte=bits_per_byte,
        device=device_name(model.device),
        commit=build_version(),
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


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected seconds, 0 or more, found {text!r}")
    return seconds


def _shapes(text: str) -> list[str]:
    return _names(text, list(SHAPES)) if text != "all" else list(SHAPES)


def _dtypes(text: str) -> list[str]:
    return _names(text, FORMATS)


def _names(text: str, known: Sequence[str]) -> list[str]:
    """The names of a list such as "bf16,int4", each one of `known`."""
    names = text.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected {', '.join(known)}, found {unknown[0]!r}")
    return names


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `bench` with the parser of `ffmini`; its arguments go to run()."""
    description = "Measure prompt and generation speed beside the speed of memory, or perplexity."
    # "resolve": --dtype takes a list here.
    parser = subparsers.add_parser(
        "bench", help="speed, perplexity", description=description, conflict_handler="resolve"
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument("-m", "--model", help="model directory or org/name (default: the bundled model)")
    known = f"random weights: all, or of {', '.join(SHAPES)}"
    model.add_argument("--random", type=_shapes, metavar="SHAPE,..", help=known)
    add_model_arguments(parser)
    known = f"of {', '.join(FORMATS)} (default: bf16, or as packed)"
    parser.add_argument("--dtype", type=_dtypes, default=[None], metavar="DTYPE,..", help=known)
    _add_test_arguments(parser)
    parser.add_argument("--perplexity", type=Path, metavar="FILE", help="score a text instead")
    parser.add_argument("--json", action="store_true", help="print a list of records")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="write the list of records, after each of them"
    )
    parser.set_defaults(run=run)


def _add_test_arguments(parser: argparse.ArgumentParser) -> None:
    """What to time; defaults that depend on the device are None."""
    parser.add_argument(
        "-p", "--prompt", type=_counts, default=[512], metavar="N,..", help="prompt tokens (512; 0: none)"
    )
    text = f"new tokens, a pass each ({QUEUED_PASSES} on a GPU, {CPU_PASSES} on the CPU; 0: none)"
    parser.add_argument("-n", "--generate", type=_counts, metavar="N,..", help=text)
    text = f"passes of N rows, 1 to {MAX_ROWS}, as many as -n has tokens"
    parser.add_argument("--rows", type=_counts, default=[], metavar="N,..", help=text)
    text = f"passes of a token of each of N sequences, 1 to {MAX_ROWS}, as many; on a GPU"
    parser.add_argument("--batch", type=_counts, default=[], metavar="N,..", help=text)
    parser.add_argument(
        "-d", "--depth", type=_counts, default=[0], metavar="N,..", help="random positions before them (0)"
    )
    text = f"new tokens with sampling and text ({END_TO_END_TOKENS} on a GPU, none on the CPU; 0: none)"
    parser.add_argument("--end-to-end", type=int, metavar="N", help=text)
    text = f"tokens of a prompt, and of texts replayed after it with guesses of {GUESSES} (0: none)"
    parser.add_argument("--guesses", type=int, default=0, metavar="N", help=text)
    parser.add_argument("-r", "--repetitions", type=_positive, default=5, metavar="N", help="of a test (5)")
    text = f"after each: as long as it took, SECONDS at most ({REST_SECONDS} on a GPU, 0 on the CPU)"
    parser.add_argument("--rest", type=_seconds, metavar="SECONDS", help=text)
    text = "time transformers on each shape too, eager and compiled (needs torch, a GPU and a checkout)"
    parser.add_argument("--compare", action="store_true", help=text)


def run(args: argparse.Namespace) -> int:
    """Measure what `args` say and print it on stdout; returns 0, errors are raised."""
    if args.output is not None:
        args.output.open("a").close()  # a file that can't be written is better known before the measurement
    results: list[Any] = []
    for result in _measure(args) if args.perplexity is None else _score(args):
        results.append(result)
        if args.output is not None:
            args.output.write_text(to_json(results) + "\n", encoding="utf-8")
    if args.json:
        print(to_json(results))
    elif args.perplexity is None:
        print(f"\n{records_table(results)}")
    else:
        print("\n".join(map(score_line, results)))
    return 0


def _measure(args: argparse.Namespace) -> Iterator[Record]:
    """Records of every shape and dtype, then those of other engines; a line for each shape and dtype."""
    ordinal = choose_device(args.device)
    plan = _plan(args, ordinal)
    if args.random:
        targets = [(name, None, parse_config(SHAPES[name], name)) for name in args.random]
    else:
        directory = _model_directory(args.model)
        targets = [(directory.name, directory, load_config(directory))]
    lengths = [_context(config, args.max_seq_len, plan.positions) for _, _, config in targets]
    measured: list[Record] = []
    for (name, directory, config), max_seq_len in zip(targets, lengths, strict=True):
        for dtype in args.dtype:
            found: list[Record] = []
            # The weights are freed before the next ones are made: nothing here refers to them.
            for record in measure(_weights(directory, config, dtype), name, plan, max_seq_len, ordinal):
                found.append(record)
                yield record
            measured += found
            if found:
                print(summary_line(found), file=sys.stderr if args.json else sys.stdout, flush=True)
    if not measured:
        raise ValueError("nothing measured: no shape has room for the rows asked for")
    if args.compare:
        for name, directory, _ in targets:
            raw = SHAPES[name] if directory is None else read_json(directory / "config.json")
            yield from compare(raw, plan, ordinal, [record for record in measured if record.shape == name])


def _plan(args: argparse.Namespace, ordinal: int | None) -> Plan:
    """The tests that `args` ask for on GPU `ordinal`, or on the CPU for None."""
    on_gpu = ordinal is not None
    generations = args.generate or [QUEUED_PASSES if on_gpu else CPU_PASSES]
    end_to_end = args.end_to_end
    if end_to_end is None:
        end_to_end = END_TO_END_TOKENS if on_gpu else 0
    plan = Plan(
        [count for count in args.prompt if count],
        [count for count in generations if count],
        args.depth,
        args.repetitions,
        sorted({count for count in args.rows if count}),
        end_to_end,
        sorted({count for count in args.batch if count}),
        args.guesses,
        args.kv_dtype,
        args.rest if args.rest is not None else (REST_SECONDS if on_gpu else 0.0),
    )
    tests = plan.prompts, plan.generations, plan.rows, plan.end_to_end, plan.batch, plan.guesses
    if not any(tests):
        raise ValueError("nothing to measure: expected tokens from -p or -n, found none")
    for option, counts in (("--rows", plan.rows), ("--batch", plan.batch)):
        if max(counts, default=1) > MAX_ROWS:
            raise ValueError(f"{option}: a pass has 1 to {MAX_ROWS} rows, found {counts[-1]}")
    if plan.batch and not on_gpu:
        raise ValueError("--batch: a GPU expected, found the CPU, which runs its slots one after the other")
    if plan.guesses < 0 or plan.guesses == 1:
        raise ValueError(f"--guesses: expected 2 tokens or more, or 0 for none, found {plan.guesses}")
    if end_to_end < 0 or end_to_end == 1:
        raise ValueError(f"--end-to-end: expected 2 tokens or more, or 0 for none, found {end_to_end}")
    return plan


def _context(config: ModelConfig, asked: int | None, positions: int) -> int:
    """Tokens of context to make room for: `asked`, or load's default, or more if the tests need it."""
    if asked is None:
        asked = min(max(DEFAULT_MAX_SEQ_LEN, positions), context_limit(config))
    max_seq_len = context_length(config, asked)
    if positions > max_seq_len:
        raise ValueError(f"the tests need {positions} positions, the context has {max_seq_len}")
    return max_seq_len


def _weights(directory: Path | None, config: ModelConfig, dtype: str | None) -> PackedModel:
    return load_packed(directory, dtype) if directory else random_model(config, dtype or "bf16")


def _score(args: argparse.Namespace) -> Iterator[Score]:
    if args.random:
        raise ValueError("--perplexity needs a model: random weights predict nothing")
    for dtype in args.dtype:
        with load(args.model, args.device, dtype, args.max_seq_len, kv_dtype=args.kv_dtype) as model:
            yield score_text(model, _model_directory(args.model).name, args.perplexity)


def _model_directory(model: str | None) -> Path:
    return bundled_model_path() if model is None else resolve_model(model)
