"""Builds the kernel: the constants of a model become a cubin through NVRTC, kept in a cache on disk.

NVRTC needs no GPU and no driver, so a build for any architecture can be made and inspected anywhere.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .candidates import MAX_QUERIED, Draw
from .config import ModelConfig
from .errors import DeviceError
from .layout import (
    FORMAT_BITS,
    KV_BLOCK,
    KV_SLOT_BYTES,
    PART_SEGMENTS,
    SEGMENT,
    TILE_ROWS,
    MatrixLayout,
    ceil_div,
)
from .packing import vector_offsets, vectors_length
from .resources import resource_dir

MAX_ROWS = 8
WARPS = 16
KERNEL_NAME, CHUNK_KERNEL_NAME = "ffmini_pass", "ffmini_chunk"
CHUNK_ROWS = 512  # of a chunk, at most
MERGE_RUN = 16  # partial softmaxes that are merged before others
PANEL_ROWS = 128  # where chunks are cut: one panel of rows in bf16, two of a quantised model
COPY_SECONDS = 1e-6  # about what a bulk copy takes while the memory is busy (H100, H200)
VECTOR_NAMES = (
    "input_layernorm",
    "post_attention_layernorm",
    "q_norm",
    "k_norm",
    "qkv_bias",
    "o_bias",
    "gate_up_bias",
    "down_bias",
)

AWAITED = -1  # in the place of a token that its pass finds in the mailbox
MAIL_APPEND = 1 << 31  # above a token in the mail: it joins the queried ids
MAIL_LEAVE = MAIL_APPEND - 1  # instead of a token: the pass ends
MAX_ENDS = 4  # of the tokens that end a text, those that a pass does not give to the one behind
NO_DRAW = -1  # in the place of top_k: the pass does not draw its row's token
LISTED = 8  # candidates of a block
MOST_LISTED = 256  # of the grid
MAX_BLOCKS = 192  # of a grid

# The device's structs of the same names (cuda/config.cuh, cuda/exchange.cuh, cuda/chunk.cu).
ROW = np.dtype([("token", "<i4"), ("position", "<i4"), ("slot", "<i4")])
DRAW = np.dtype(
    [("uniform", "<f4"), ("top_p", "<f4"), ("min_p", "<f4"), ("top_k", "<i4"), ("ends", "<i4", (MAX_ENDS,))]
)
STATUS = np.dtype(
    [(name, "<u4") for name in ("stage", "block", "unused", "gave_up", "non_finite", "no_token")]
)
MODEL_ARGS = [
    ("layers", "<u8"),
    ("lm_head", "<u8"),
    ("embed_tokens", "<u8"),
    ("vectors", "<u8"),
    ("norm", "<u8"),
    ("rope_cos", "<u8"),
    ("rope_sin", "<u8"),
    ("key_cache", "<u8"),
    ("value_cache", "<u8"),
    ("status", "<u8"),
    ("gave_up", "<u8"),
    ("spin_limit_ns", "<u8"),
    ("pass", "<u4"),
    ("num_slots", "<i4"),
]
PASS_ARGS = np.dtype(
    [
        *MODEL_ARGS,
        ("exchange", "<u8"),
        ("logits", "<u8"),
        ("residual", "<u8"),
        ("queried_ids", "<u8"),
        ("candidates", "<u8"),
        ("mailbox", "<u8"),
        ("drawn", "<u8"),
        ("stage_times", "<u8"),
        ("token_limit_ns", "<u8"),
        ("num_rows", "<i4"),
        ("logits_rows", "<u4"),
        ("append", "<u4"),
        ("draw", DRAW),
        ("num_queried", "<i4", (MAX_ROWS,)),
        ("inverse_temperature", "<f4", (MAX_ROWS,)),
        ("rows", ROW, (MAX_ROWS,)),
    ],
    align=True,
)
CHUNK_ARGS = np.dtype(
    [
        *MODEL_ARGS,
        ("scratch", "<u8"),
        ("stage_times", "<u8"),
        ("arrived", "<u8"),
        ("slot", "<i4"),
        ("start", "<i4"),
        ("num_rows", "<i4"),
        ("tokens", "<i4", (CHUNK_ROWS,)),
    ],
    align=True,
)
BUILD_INFO = np.dtype(
    [
        ("exchange_packets", "<u8"),
        ("block_packets", "<u4"),
        ("shared_bytes", "<u4"),
        ("threads", "<u4"),
        ("ring_slots", "<u4"),
        ("args_bytes", "<u4"),
        ("marks", "<u4"),
    ],
    align=True,
)
CHUNK_INFO = np.dtype(
    [
        ("scratch_bytes", "<u8"),
        ("shared_bytes", "<u4"),
        ("threads", "<u4"),
        ("ring_slots", "<u4"),
        ("args_bytes", "<u4"),
        ("residual_size", "<u4"),
        ("meetings", "<u4"),
    ],
    align=True,
)


def max_rows(
    config: ModelConfig,
    layouts: dict[str, MatrixLayout],
    max_seq_len: int,
    shared_limit: int,
    blocks: int,
    kv_dtype: str = "bf16",
) -> int:
    """The most rows (1, 2, 4 or 8) that leave room in shared memory for the ring of weights.

    `shared_limit`: bytes that a block may use; `blocks`: the size of the grid.
    """
    sizes = config, layouts, max_seq_len, shared_limit, blocks
    return next((rows for rows in (8, 4, 2) if _fits(*sizes, rows, kv_dtype)), 1)


def splits_parts(
    config: ModelConfig,
    layouts: dict[str, MatrixLayout],
    max_seq_len: int,
    shared_limit: int,
    blocks: int,
    rows: int,
    kv_dtype: str = "bf16",
) -> bool:
    """Whether a block has one part of o_proj's and down_proj's input at a time, not all of it.

    One row has all of it if there is room: handing on the parts' products takes time, and with more rows
    every block's gathering all of them takes more.
    """
    sizes = config, layouts, max_seq_len, shared_limit, blocks, rows
    return rows > 1 or not _fits(*sizes, kv_dtype, whole=True)


def _fits(
    config: ModelConfig,
    layouts: dict[str, MatrixLayout],
    max_seq_len: int,
    shared_limit: int,
    blocks: int,
    rows: int,
    kv_dtype: str,
    whole: bool = False,
) -> bool:
    """Whether activations, `whole` or in parts, leave room for the ring.

    The bounds are upper ones; cuda/block.cuh has the exact figures and refuses what does not fit.
    """

    def widest(layout: MatrixLayout) -> int:
        in_parts = layout.name in ("o_proj", "down_proj") and not whole
        return min(layout.k_pad, layout.part_segments * SEGMENT) if in_parts else layout.k_pad

    held = max(widest(layout) for layout in layouts.values())
    ring = (2 if shared_limit > 128 * 1024 else 1) * _ring_slot_bytes(layouts, kv_dtype)
    needed = _shared_bytes(config, layouts, max_seq_len, shared_limit, blocks, rows, held)
    return needed + ring <= shared_limit


def _shared_bytes(
    config: ModelConfig,
    layouts: dict[str, MatrixLayout],
    max_seq_len: int,
    shared_limit: int,
    blocks: int,
    rows: int,
    widest: int,
) -> int:
    """An upper bound of what a block needs for `rows` rows of up to `widest` activations but for the ring."""
    tiles, head_dim = layouts["o_proj"].tiles, ceil_div(config.head_dim, 32) * 32
    marks = rows * (2 * ceil_div(layouts["lm_head"].tiles, blocks) + 4)
    heads = min(8, config.num_heads // config.num_kv_heads)
    segments = ceil_div(widest, SEGMENT)
    if rows == 1:  # warps may have places of their own: see OwnSegments in cuda/block.cuh
        segments = ceil_div(segments, WARPS) * WARPS
    groups = segments * ceil_div(SEGMENT, layouts["down_proj"].group_size)
    activations = rows * (2 * (segments * SEGMENT + 32) + 4 * (segments + groups))
    attention = 64 * min(512, heads * head_dim) + head_dim * (8 * heads + 12 * rows + 28) + 2048
    own_tiles = ceil_div(tiles, blocks)
    sums = 4096 if shared_limit > 200 * 1024 else 2048  # of a row: see ROUND_UNITS in cuda/block.cuh
    adding = [layouts[name].segments for name in ("o_proj", "down_proj")]
    if rows == 1 and any(segments > WARPS and segments % WARPS for segments in adding):
        sums = 10240  # with what is to spare below, the most that FAIR_ROUNDS takes
    items = (24 * rows + 4) * len(set(config.layer_windows))
    tail = rows * (sums + 4 * tiles + 4 * head_dim) + 64 * (2 * rows + 1) * own_tiles + items + 9216
    splits = ceil_div(max_seq_len, KV_BLOCK)
    merge = 8 * splits + 4 * head_dim * (ceil_div(splits, 16) + 2) + 4
    candidates = 8 * MAX_BLOCKS * LISTED + 8192 + 1280 * rows
    return max(activations, attention, merge, candidates) + tail + marks


def product_bytes(layouts: dict[str, MatrixLayout], rows: int) -> int:
    """Bytes of the packets in which blocks hand on the products of split parts; see cuda/exchange.cuh."""
    split = [layouts[name] for name in ("o_proj", "down_proj")]
    parts = [(layout, ceil_div(layout.segments, layout.part_segments)) for layout in split]
    return sum(96 * rows * count * layout.tiles for layout, count in parts if count > 1)


def chunk_scratch_bound(
    config: ModelConfig, layouts: dict[str, MatrixLayout], max_seq_len: int, rows: int = CHUNK_ROWS
) -> int:
    """An upper bound of the bytes of global memory that chunks of `rows` rows work in; see cuda/chunk.cu."""
    inputs = [layouts[name].segments * SEGMENT for name in ("qkv_proj", "o_proj", "down_proj")]
    heads, splits, tiles = config.num_heads, ceil_div(max_seq_len, KV_BLOCK), layouts["o_proj"].tiles
    row = 4 * tiles * (TILE_ROWS + 1) + 4  # the residual stream, its squares, a norm's scale
    row += 4 * layouts["qkv_proj"].tiles * TILE_ROWS + 2 * heads * config.head_dim
    row += 2 * sum(inputs)
    row += 4 * max(inputs) // SEGMENT + 4 * max(inputs) // 32
    if layouts["qkv_proj"].format != "bf16":
        row += 2 * max(inputs)  # of one of them as integers
    row += 4 * heads * splits
    if splits > MERGE_RUN:
        row += 8 * heads * (config.head_dim + TILE_ROWS)
    return rows * row + 2048


def _ring_slot_bytes(layouts: dict[str, MatrixLayout], kv_dtype: str) -> int:
    """An upper bound of what one place in every warp's ring takes."""
    vectors = KV_SLOT_BYTES[kv_dtype]
    return WARPS * max(vectors, *(layout.slot_bytes for layout in layouts.values()))


def kernel_defines(
    config: ModelConfig,
    layouts: dict[str, MatrixLayout],
    *,
    rows: int,
    max_seq_len: int,
    shared_limit: int,
    blocks: int,
    bulk_copies: bool,
    in_flight: int,
    kv_dtype: str = "bf16",
    wgmma: bool = False,
    test_pauses: bool = False,
    stage_times: bool = False,
) -> dict[str, str]:
    """The -D constants of one build.

    `rows` is how many rows a pass takes (1 to 8), `shared_limit` the bytes of shared memory that a block
    may use, `blocks` the size of the grid. `bulk_copies`: weights come by bulk copies, which sm_90 and newer
    have; `in_flight` of them are under way per ring (see copies_in_flight). `kv_dtype`: of keys and values in
    the cache, one of KV_DTYPES. `wgmma`: chunks multiply by that, which sm_90 alone has. `test_pauses` makes
    a build that holds packets back at random, `stage_times` one that notes when each block passed each stage.
    """
    values: dict[str, object] = {
        **_model_defines(config, layouts),
        "ROWS": rows,
        "MAX_SEQ_LEN": max_seq_len,
        "KV_BITS": FORMAT_BITS[kv_dtype],
        "SHARED_LIMIT": shared_limit,
        "SPLIT_PARTS": int(splits_parts(config, layouts, max_seq_len, shared_limit, blocks, rows, kv_dtype)),
        "OWN_TILES": ceil_div(layouts["o_proj"].tiles, blocks),
        "OWN_HEAD_TILES": ceil_div(layouts["lm_head"].tiles, blocks),
        "MAX_QUERIED": MAX_QUERIED,
        "BULK_COPIES": int(bulk_copies),
        "COPIES_IN_FLIGHT": in_flight,
        "TEST_PAUSES": int(test_pauses),
        "STAGE_TIMES": int(stage_times),
        "CHUNK_ROWS": CHUNK_ROWS,
        "WGMMA": int(wgmma),
    }
    return {name: str(value) for name, value in values.items()}


def _model_defines(config: ModelConfig, layouts: dict[str, MatrixLayout]) -> dict[str, object]:
    """The constants of the model and of its packed weights."""
    offsets = vector_offsets(config)
    qkv, head = layouts["qkv_proj"], layouts["lm_head"]
    return {
        "HIDDEN_SIZE": config.hidden_size,
        "INTERMEDIATE_SIZE": config.intermediate_size,
        "NUM_LAYERS": config.num_layers,
        "NUM_HEADS": config.num_heads,
        "NUM_KV_HEADS": config.num_kv_heads,
        "HEAD_DIM": config.head_dim,
        "VOCAB_SIZE": config.vocab_size,
        "RMS_NORM_EPS": float_literal(config.rms_norm_eps),
        # Scores are in units of log2: the softmax takes powers of two.
        "SCORE_SCALE": float_literal(config.head_dim**-0.5 * math.log2(math.e)),
        "LAYER_WINDOWS": ",".join(str(window) for window in config.layer_windows),
        "TIE_WORD_EMBEDDINGS": int(config.tie_word_embeddings),
        "QKV_BIAS": int(config.qkv_bias),
        "O_BIAS": int(config.o_bias),
        "MLP_BIAS": int(config.mlp_bias),
        "QK_NORM": int(config.qk_norm),
        "WEIGHT_BITS": FORMAT_BITS[qkv.format],
        "GROUP_SIZE": qkv.group_size,
        "LM_HEAD_BITS": FORMAT_BITS[head.format],
        "LM_HEAD_GROUP_SIZE": head.group_size,
        "LAYER_BYTES": f"{layer_bytes(layouts)}ull",
        "LM_HEAD_BYTES": f"{head.nbytes}ull",
        "PART_SEGMENTS": PART_SEGMENTS[qkv.format],
        "VECTORS_SIZE": vectors_length(config),
        **{f"{name.upper()}_OFFSET": offsets.get(name, (0,))[0] for name in VECTOR_NAMES},
    }


def mail(number: int, token: int, append: bool = False) -> int:
    """The word in the mailbox that gives pass `number` its token, or MAIL_LEAVE."""
    return number | (token | MAIL_APPEND * append) << 32


def draw_args(draw: Draw) -> tuple[float, float, float, int, tuple[int, ...]]:
    """The device's struct, DRAW [], of how a sampler is going to draw a token."""
    ends = (draw.end_token_ids + (-1,) * MAX_ENDS)[:MAX_ENDS]
    return draw.uniform, draw.top_p, draw.min_p, draw.top_k, ends


def has_bulk_copies(arch: str) -> bool:
    """Whether an architecture such as "sm_90" has bulk copies and barriers that count them."""
    return int(arch.removeprefix("sm_")) >= 90


def has_wgmma(arch: str) -> bool:
    """Whether an architecture multiplies by groups of four warps (wgmma), which sm_90 alone does."""
    return arch == "sm_90"


def copies_in_flight(bandwidth: float, blocks: int, layouts: dict[str, MatrixLayout]) -> int:
    """How many copies each ring must have under way to keep a memory of `bandwidth` bytes/s busy.

    By Little's law. Not more: they would fill the queues in which packets wait too.
    """
    together = blocks * WARPS * max(layout.slot_bytes for layout in layouts.values())
    return max(1, math.ceil(bandwidth * COPY_SECONDS / together))


def layer_bytes(layouts: dict[str, MatrixLayout]) -> int:
    """Packed bytes of one layer's four matrices."""
    return sum(layout.nbytes for name, layout in layouts.items() if name != "lm_head")


def float_literal(x: float) -> str:
    """`x` rounded to float32 as a C literal that gives the same bits."""
    return f"{float(np.float32(x)).hex()}f"


@functools.lru_cache(maxsize=1)
def device_sources() -> tuple[tuple[str, str], ...]:
    """(file name, text) of everything in cuda/, sorted by name."""
    files = sorted(path for path in resource_dir("cuda").iterdir() if path.suffix in (".cu", ".cuh"))
    return tuple((path.name, path.read_text(encoding="utf-8")) for path in files)


def compile_cubin(
    defines: dict[str, str],
    arch: str,
    source: str = "ffmini.cu",
    sources: Mapping[str, str] | None = None,
) -> tuple[bytes, str]:
    """Compile `source` for `arch` (such as "sm_90"): the cubin and ptxas's report (registers, spills).

    `sources`: file name -> text of it and of what it includes; None for cuda/. DeviceError carries the
    compiler's first error line; so does a missing NVRTC.
    """
    nvrtc = _nvrtc()
    headers = dict(device_sources() if sources is None else sources)
    text = headers.pop(source)
    names = tuple(name.encode() for name in headers)
    program = nvrtc.createProgram(text, source, tuple(header.encode() for header in headers.values()), names)
    try:
        nvrtc.compileProgram(program, compile_options(defines, arch))
        # CuPy takes the last byte for the end of a string and cuts it off: it is one of the padding.
        return nvrtc.getCUBIN(program) + b"\0", nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        lines = nvrtc.getProgramLog(program).splitlines()
        first = next((line for line in lines if "error" in line), lines[0] if lines else str(error))
        raise DeviceError(f"{source} does not compile for {arch}: {first}") from error
    finally:
        nvrtc.destroyProgram(program)


def compile_options(defines: dict[str, str], arch: str) -> tuple[str, ...]:
    """NVRTC's options; the arithmetic ones are part of the canonical order: no contraction, flush to zero."""
    # "a": wgmma and the handing on of registers are for the very architecture.
    own = "1" in (defines.get("WGMMA"), defines.get("BULK_COPIES"))
    fixed = (
        f"-arch={arch}{'a' if own else ''}",
        "-std=c++17",
        "-default-device",
        "-fmad=false",
        "-ftz=true",
        "--ptxas-options=-v",
    )
    return fixed + tuple(f"-D{name}={value}" for name, value in sorted(defines.items()))


def cached_cubin(defines: dict[str, str], arch: str, source: str = "ffmini.cu") -> Path:
    """The cubin's file in the cache, compiled first if it is not there; says on stderr what it does."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (
        *compile_options(defines, arch),
        source,
        repr(_nvrtc().getVersion()),
        repr(device_sources()),
    ):
        digest.update(part.encode() + b"\0")
    directory, name = cache_dir(), f"{Path(source).stem}-{arch}-{digest.hexdigest()}.cubin"
    if (directory / name).is_file():
        return directory / name
    rows = f", {defines['ROWS']} row(s)" if source == "ffmini.cu" else ""
    print(f"ffmini: compiling cuda/{source} for {arch}{rows} ...", file=sys.stderr, flush=True)
    start = time.perf_counter()
    cubin, _ = compile_cubin(defines, arch, source)
    print(f"ffmini: compiled in {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    try:
        return _write_atomically(directory, name, cubin)
    except OSError as error:
        _warn_once(f"ffmini: kernels can't be cached in {directory} ({error.strerror}); set FFMINI_CACHE_DIR")
        return _write_atomically(Path(tempfile.mkdtemp(prefix="ffmini-")), name, cubin)


def cache_dir() -> Path:
    """FFMINI_CACHE_DIR, else ffmini/ in XDG_CACHE_HOME or ~/.cache."""
    if os.environ.get("FFMINI_CACHE_DIR"):
        return Path(os.environ["FFMINI_CACHE_DIR"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ffmini"


def _write_atomically(directory: Path, name: str, data: bytes) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=directory)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, directory / name)
    except BaseException:
        os.unlink(temporary)
        raise
    return directory / name


@functools.cache
def _warn_once(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _nvrtc():  # type: ignore[no-untyped-def]
    try:
        from cupy_backends.cuda.libs import nvrtc

        nvrtc.getVersion()
    except (ImportError, RuntimeError) as error:
        raise DeviceError(
            f"NVRTC is not usable ({error}): pip install 'ffmini[cuda13]' (or 'ffmini[cuda12]')"
        ) from error
    return nvrtc
