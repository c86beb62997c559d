"""The GPU decoder: weights, KV cache and exchange packets in device memory, one cooperative launch per pass.

CuPy is imported on first use, so this module can be imported anywhere.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from .candidates import MAX_QUERIED, Candidates, Draw, Query
from .config import ModelConfig
from .errors import NON_FINITE_LOGITS, DeviceError, GenerationError, MemoryBudgetError
from .kernel import (
    AWAITED,
    CHUNK_ROWS,
    MAIL_LEAVE,
    MAX_BLOCKS,
    MAX_ROWS,
    MODEL_ARGS,
    NO_DRAW,
    PANEL_ROWS,
    PASS_ARGS,
    chunk_scratch_bound,
    copies_in_flight,
    draw_args,
    has_bulk_copies,
    has_wgmma,
    kernel_defines,
    layer_bytes,
    mail,
    max_rows,
    product_bytes,
)
from .launch import ChunkBuild, OnDevice, PassBuild, import_cupy, pinned_array, why_unusable
from .layout import KEY_ROTATION, VALUE_ROTATION, VectorLayout, ceil_div
from .memory import available_memory
from .packing import PackedModel, vectors_length
from .passes import Work, check_cache, check_draws, check_kv_dtype, check_pass, check_slot, check_works
from .results import HostMemory, RowResults, check_query
from .rope import rope_tables

STAGE_NAMES = (
    *("norm_qkv", "attention", "o_proj", "norm_gate_up", "down_proj", "norm_lm_head"),
    *("token or candidates", "merge"),
)
MEMORY_CLOCK_RATE, GLOBAL_MEMORY_BUS_WIDTH = 36, 37  # CUDA's numbers of device attributes
SPIN_SECONDS = 10.0
AWAITED_TOKEN = np.array([AWAITED])
UNDRAWN = (Draw(uniform=0.0, top_p=1.0, min_p=0.0, top_k=NO_DRAW, end_token_ids=()),) * 2
NO_IDS = np.zeros(0, np.int32)
CHUNK_LEAST = 2  # passes of rows that are no slower than a chunk of them
TOKEN_SECONDS = 0.02  # a pass that was launched ahead waits so long for its token; its blocks can wait longer
ROW_NUMBERS = np.arange(MAX_ROWS, dtype=np.int32)
NOT_READY = 600  # cudaErrorNotReady
LOOK_SECONDS = 0.003  # between looks at CUDA's own state while results are awaited
PASSES_OF_A_TOKEN = 4  # at most: a pass and one ahead of it, both perhaps twice
POLLS = 50  # of results between looks at the pass's status

Build = TypeVar("Build", PassBuild, ChunkBuild)


def free_memory(ordinal: int = 0) -> int:
    """Bytes that can still be allocated on GPU `ordinal`; on unified memory what the system has available."""
    cupy = import_cupy()
    if cupy.cuda.runtime.getDeviceProperties(ordinal)["integrated"]:
        return available_memory()
    with cupy.cuda.Device(ordinal):
        return int(cupy.cuda.runtime.memGetInfo()[0])


def memory_bandwidth(ordinal: int = 0) -> float:
    """Bytes per second of GPU `ordinal`'s memory, by its clock (two transfers in each) and bus."""
    runtime = import_cupy().cuda.runtime
    kilohertz = runtime.deviceGetAttribute(MEMORY_CLOCK_RATE, ordinal)
    bits = runtime.deviceGetAttribute(GLOBAL_MEMORY_BUS_WIDTH, ordinal)
    return 2e3 * kilohertz * bits / 8


def grid_size(multiprocessors: int) -> int:
    """Blocks of a grid on a GPU with so many multiprocessors: one for each, as far as the kernel has room."""
    return min(multiprocessors, MAX_BLOCKS)


def kv_cache_bytes(config: ModelConfig, positions: int, kv_dtype: str = "bf16") -> int:
    """Bytes of K and V, both of kv_dtype, for `positions` positions; scales and padding included."""
    vector = VectorLayout(config.head_dim, kv_dtype).nbytes
    return 2 * config.num_layers * config.num_kv_heads * vector * positions


@dataclass
class _Listing:
    """A pass whose rows leave candidates; if it waits for its token, the one row of `work`."""

    number: int
    work: Work
    inverse_temperature: float
    drawn: int | None = None  # the token that it has got from the pass before it


class _Asked(NamedTuple):
    """One of a pass's rows that leave candidates."""

    row: int
    ids: np.ndarray  # queried, int32 [n]
    inverse_temperature: float
    append: bool  # the row's token is the last of the ids, and the device does not have it yet


@dataclass
class _Begun:
    """What begin() was asked for; see there."""

    works: Sequence[Work]
    last: Sequence[Work]  # what the last pass does for them
    asked: list[_Asked]
    ahead: bool
    draws: tuple[Draw, Draw]
    residual: int = 0  # where the last pass finds its rows after the last layer; 0: it runs the layers itself
    listing: _Listing | None = None  # the last pass


class _Delivered(NamedTuple):
    """A pass that waited, and what it was given; see deliver()."""

    listing: _Listing
    token: int
    query: Query
    asked: _Asked

    def is_for(self, works: Sequence[Work]) -> bool:
        """Whether the pass does what begin() is asked for."""
        if not _is_one_token(works, self.listing.work):
            return False
        (work,) = works
        return work.tokens.item() == self.token and work.queries[0] is self.query


def _is_one_token(works: Sequence[Work], awaited: Work) -> bool:
    """Whether `works` are one token with a query, at the place of the `awaited` one."""
    if len(works) != 1:
        return False
    (work,) = works
    is_token = work.tokens.shape == (1,) and work.tokens.dtype.kind in "iu"
    return is_token and len(work.queries) == 1 and work.start == awaited.start and work.slot == awaited.slot


class _List:
    """One of the device's lists of queried ids."""

    def __init__(self) -> None:
        self.query: Query | None = None  # the last one, and
        self.ids = self.held = NO_IDS  # its ids, checked, and those that the device has

    def checked(self, query: Query, vocab_size: int) -> np.ndarray:
        """The query's ids, which are checked once; see check_query."""
        if query is not self.query:
            self.ids, self.query = check_query(query, vocab_size), query
        return self.ids


class GPUDecoder:
    """Runs passes of one model on one GPU.

    The build for the fewest rows is compiled at once, the others when a call first needs them.

    Errors: DeviceError if the device can't run the kernel, MemoryBudgetError (a DeviceError) with the
    numbers if it lacks memory, GenerationError if a pass fails. A call that needs a build for the first time
    may end with either of the first two. The decoder stays usable after all of them.
    """

    def __init__(
        self,
        packed: PackedModel,
        max_seq_len: int,
        ordinal: int = 0,
        *,
        num_slots: int = 1,
        kv_dtype: str = "bf16",
        blocks: int | None = None,
        rows: tuple[int, ...] | None = None,
        chunks: bool = True,
        bulk_copies: bool | None = None,
        wgmma: bool | None = None,
        in_flight: int | None = None,
        test_pauses: bool = False,
        stage_times: bool = False,
        progress: bool = True,
    ) -> None:
        """`num_slots` sequences of up to `max_seq_len` tokens have a KV cache of `kv_dtype`, side by side.

        `blocks` (default: one per multiprocessor), `rows` (default: 1 and as many as fit), `chunks`
        (whether prompts go through in chunks of many rows), `bulk_copies` and `wgmma` (default: if the device
        has them), `in_flight` (default: copies_in_flight) and the rest are for tests and measurements."""
        check_kv_dtype(kv_dtype)
        reason = why_unusable(ordinal)
        if reason is not None:
            raise DeviceError(reason)
        self._cupy = cupy = import_cupy()
        self.config = packed.config
        self.max_seq_len = max_seq_len
        self.num_slots = num_slots
        self.kv_dtype = kv_dtype
        self._vector_layout = VectorLayout(packed.config.head_dim, kv_dtype)
        self.device = f"cuda:{ordinal}"
        self._ordinal = ordinal
        self._stage_times = stage_times
        self._pool = cupy.cuda.MemoryPool()
        self._pass = self._checked = 0  # the last pass launched; up to which one nobody wants their status
        self._begun: _Begun | None = None  # what candidates() is to say
        self._abandoned = False  # whether passes that nobody waits for may be under way after an error
        self._waiting: _Listing | None = None  # the last pass, if its token was not known at the launch
        self._delivered: _Delivered | None = None  # the same once it is known, until begin() asks for it
        self._listed = 0  # the pass whose logits its candidates may fetch
        self._lists = [_List() for _ in range(MAX_ROWS)]  # of queried ids; see queried_list() in cuda/
        self._closed = False
        self._choose_builds(packed, rows, blocks, bulk_copies, in_flight, test_pauses)
        least, self.max_rows = min(self._defines), max(self._defines)
        if wgmma is None:
            wgmma = has_wgmma(self._launch_sizes[0])
        self._chunk_defines = self._defines[least] | {"WGMMA": str(int(wgmma))} if chunks else None
        self._builds: dict[int, PassBuild] = {}
        self._chunk: ChunkBuild | None = None
        with cupy.cuda.Device(ordinal), cupy.cuda.using_allocator(self._pool.malloc):
            cupy.cuda.runtime.setDevice(ordinal)  # a thread that has not used any GPU yet has no context
            self._context: int = cupy.cuda.driver.ctxGetCurrent()
            build = PassBuild(cupy, self._defines[least], *self._launch_sizes)
            self._check_memory(packed, self._scratch_bound(packed, build))
            self._upload(packed, build, progress)
            self._builds[least] = build

    def _choose_builds(
        self,
        packed: PackedModel,
        rows: tuple[int, ...] | None,
        blocks: int | None,
        bulk_copies: bool | None,
        in_flight: int | None,
        test_pauses: bool,
    ) -> None:
        """What the builds for passes are made for, by their rows, and what the device launches them with."""
        properties = self._cupy.cuda.runtime.getDeviceProperties(self._ordinal)
        multiprocessors = properties["multiProcessorCount"]
        blocks = blocks or grid_size(multiprocessors)
        shared_limit = properties["sharedMemPerBlockOptin"]
        arch = f"sm_{properties['major']}{properties['minor']}"
        bandwidth = memory_bandwidth(self._ordinal)
        sizes = self.max_seq_len, shared_limit, blocks, self.kv_dtype
        self._launch_sizes = arch, blocks, multiprocessors
        self._defines = {
            r: kernel_defines(
                packed.config,
                packed.layouts,
                rows=r,
                max_seq_len=self.max_seq_len,
                shared_limit=shared_limit,
                blocks=blocks,
                bulk_copies=has_bulk_copies(arch) if bulk_copies is None else bulk_copies,
                kv_dtype=self.kv_dtype,
                in_flight=in_flight or copies_in_flight(bandwidth, blocks, packed.layouts),
                test_pauses=test_pauses,
                stage_times=self._stage_times,
            )
            for r in sorted(rows or {1, max_rows(packed.config, packed.layouts, *sizes)})
        }

    def _scratch_bound(self, packed: PackedModel, least: PassBuild) -> int:
        """An upper bound of the memory that passes and chunks work in, of builds that are yet to come too."""
        packets = sum(ceil_div(rows, least.rows) for rows in self._defines) * least.scratch_bytes
        split = [rows for rows, defines in self._defines.items() if defines["SPLIT_PARTS"] == "1"]
        packets += sum(product_bytes(packed.layouts, rows) for rows in split)
        chunk = 0
        if self._chunk_defines is not None:
            chunk = chunk_scratch_bound(self.config, packed.layouts, self.max_seq_len)
        return packets + chunk + 2 * 4 * self.config.vocab_size * self.max_rows

    def _check_memory(self, packed: PackedModel, scratch: int) -> None:
        weights = packed.nbytes
        cache = kv_cache_bytes(self.config, self.num_slots * self.max_seq_len, self.kv_dtype)
        free = free_memory(self._ordinal)
        if weights + cache + scratch > free:
            raise MemoryBudgetError(
                f"{self.device}: weights {weights / 2**20:.0f} MiB + KV cache {cache / 2**20:.0f} MiB + "
                f"scratch {scratch / 2**20:.0f} MiB needed, {free / 2**20:.0f} MiB free"
            )

    def _upload(self, packed: PackedModel, build: PassBuild, progress: bool) -> None:
        cupy, config = self._cupy, self.config
        size = layer_bytes(packed.layouts)
        self._layers = cupy.empty(config.num_layers * size, dtype=cupy.uint8)
        self._vectors = cupy.zeros((config.num_layers, vectors_length(config)), dtype=cupy.float32)
        bar = tqdm(packed.layers, desc="to the GPU", unit="layer", disable=None if progress else True)
        for i, layer in enumerate(bar):
            at = i * size
            for part in (layer.qkv_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj):
                self._layers[at : at + part.size].set(part)
                at += part.size
            self._vectors[i, : layer.vectors.size].set(layer.vectors)
        self._lm_head = cupy.asarray(packed.lm_head)
        self._embed = None if packed.embed_tokens is None else cupy.asarray(packed.embed_tokens)
        self._norm = cupy.asarray(packed.norm)
        self._rope = tuple(cupy.asarray(table) for table in rope_tables(config, self.max_seq_len))
        vectors = self._vector_layout
        shape = (config.num_layers, self.num_slots, config.num_kv_heads, self.max_seq_len)
        # Zeros: tiles of positions are fetched whole, those without a token masked out afterwards.
        self.key_cache = cupy.zeros((*shape, vectors.cached_size), dtype=vectors.dtype)
        self.value_cache = cupy.zeros((*shape, vectors.cached_size), dtype=vectors.dtype)
        # Of a pass by the last bit of its number, as its results and its end below.
        shape = (self.max_rows, config.vocab_size)
        self._logits = [cupy.empty(shape, dtype=cupy.float32) for _ in range(2)]
        self._gave_up = cupy.zeros(1, dtype=cupy.uint32)
        self._mail = cupy.zeros(2, dtype=cupy.uint64)  # from pass to pass
        self._device_ids = cupy.zeros((MAX_ROWS, MAX_QUERIED), dtype=cupy.int32)
        memory = pinned_array(cupy, (HostMemory.nbytes(self.max_rows),), np.uint8)
        memory[...] = 0
        self._host = HostMemory(memory, self.max_rows)
        self._fetched = pinned_array(cupy, (config.vocab_size,), np.float32)
        self._copies = cupy.cuda.Stream(non_blocking=True)  # does not wait for passes
        self._ends = [cupy.cuda.Event(disable_timing=True) for _ in range(2)]
        self.ring_slots = build.ring_slots  # of the build for the fewest rows
        shape = (config.num_layers + 1, build.marks, build.blocks if self._stage_times else 0)
        self.stage_times = cupy.zeros(shape, dtype=cupy.uint64)
        build.allocate(cupy)
        self._set_args(self._make_args())

    def _pass_build(self, rows: int) -> PassBuild:
        """The build for `rows` rows, one of self._defines."""
        build = self._builds.get(rows)
        if build is None:
            self._builds[rows] = build = self._load(PassBuild, self._defines[rows])
        return build

    def _chunk_build(self) -> ChunkBuild:
        if self._chunk is None:
            self._chunk = self._load(ChunkBuild, self._chunk_defines)
            for name, _ in MODEL_ARGS:
                self._chunk.args[name] = self._args[name]
        return self._chunk

    def _load(self, kind: type[Build], defines: dict[str, str]) -> Build:
        """A build that a call needs for the first time, compiled unless a cache has it, and its memory.

        DeviceError if it can't be made, MemoryBudgetError without room for it; a later call tries again.
        """
        cupy = self._cupy
        with self._on_device(), cupy.cuda.using_allocator(self._pool.malloc):
            try:
                build = kind(cupy, defines, *self._launch_sizes)
            except (cupy.cuda.runtime.CUDARuntimeError, cupy.cuda.driver.CUDADriverError) as error:
                raise DeviceError(f"{self.device}: a build could not be loaded: {error}") from error
            try:
                build.allocate(cupy)
            except cupy.cuda.memory.OutOfMemoryError as error:
                raise MemoryBudgetError(
                    f"{self.device}: {build.scratch_bytes / 2**20:.0f} MiB of scratch needed, "
                    f"{free_memory(self._ordinal) / 2**20:.0f} MiB free"
                ) from error
        return build

    def _make_args(self) -> np.ndarray:
        args = np.zeros((), dtype=PASS_ARGS)
        pointers = {
            "layers": self._layers,
            "lm_head": self._lm_head,
            "embed_tokens": self._embed,
            "vectors": self._vectors,
            "norm": self._norm,
            "rope_cos": self._rope[0],
            "rope_sin": self._rope[1],
            "key_cache": self.key_cache,
            "value_cache": self.value_cache,
            "queried_ids": self._device_ids,
            "gave_up": self._gave_up,
            "drawn": self._mail,
            "stage_times": self.stage_times,
        }
        for name, array in pointers.items():
            if array is not None and not array.flags.c_contiguous:
                raise DeviceError(f"{name}: a contiguous array expected")
            args[name] = 0 if array is None else array.data.ptr
        args["status"], args["mailbox"] = self._host.status.ctypes.data, self._host.mailbox.ctypes.data
        args["spin_limit_ns"] = int(float(os.environ.get("FFMINI_SPIN_SECONDS", SPIN_SECONDS)) * 1e9)
        args["token_limit_ns"] = min(int(TOKEN_SECONDS * 1e9), int(args["spin_limit_ns"]) // 2)
        args["num_slots"] = self.num_slots
        return args

    def _set_args(self, args: np.ndarray) -> None:
        """Launch every pass with `args`, PASS_ARGS [], whose fields are written through views made once."""
        self._args = args
        self._fields = {name: args[name] for name in PASS_ARGS.names}
        self._row_tokens, self._row_positions = args["rows"]["token"], args["rows"]["position"]
        self._row_slots = args["rows"]["slot"]
        self._kernel_params = np.array([args.ctypes.data], np.uint64)  # of pointers to each argument

    def forward(self, tokens: np.ndarray, start: int, logits: str = "last", slot: int = 0) -> np.ndarray:
        """Run tokens [R] at positions start .. start + R - 1, in passes of as many rows as the builds take.

        `logits`: "last" gives float32 [1, vocab_size], "all" [R, vocab_size], "none" [0, vocab_size].
        GenerationError if a logit is not finite or a wait on the device gave up, DeviceError if a build that
        is needed can't be made.
        """
        tokens = np.asarray(tokens)
        self._check_open()
        check_pass(tokens, start, logits, self.max_seq_len, self.config.vocab_size)
        check_slot(slot, self.num_slots)
        work, pieces = Work(slot, tokens, start, ()), []
        if self._takes_chunks(len(tokens)):
            for part in self._chunks(work):
                self._run_chunk(part)
                count = len(part.tokens)
                ends = part.start + count == start + len(tokens)
                first = 0 if logits == "all" else count - (logits == "last" and ends)
                for at in range(first, count, self.max_rows):
                    rest = self._tail(part, at, min(at + self.max_rows, count))
                    pieces.append(self._finish_rows(rest, self._chunk_build().residual(at)))
                self.finish()
        else:
            for at in range(0, len(tokens), self.max_rows):
                piece = self._tail(work, at, min(at + self.max_rows, len(tokens)))
                count = len(piece.tokens)
                wanted = (1 << count) - 1 if logits == "all" else 0
                if logits == "last" and at + count == len(tokens):
                    wanted = 1 << (count - 1)
                self.launch(self._rows_for(count), piece.tokens, piece.start, wanted, slot)
                pieces.append(self.finish(wanted))
        return np.concatenate([np.zeros((0, self.config.vocab_size), np.float32), *pieces])

    def _finish_rows(self, work: Work, residual: int) -> np.ndarray:
        """The logits of all rows of `work`, whose last layers' results are at `residual`."""
        count = len(work.tokens)
        self.settle()
        self._listed = 0
        self._args["candidates"] = 0
        self._launch(self._next_pass(), self._rows_for(count), (work,), (1 << count) - 1, residual)
        return self.finish((1 << count) - 1)

    @staticmethod
    def _tail(work: Work, first: int, end: int) -> Work:
        """Rows first .. end - 1 of `work`, without its queries."""
        return Work(work.slot, work.tokens[first:end], work.start + first, ())

    def _takes_chunks(self, count: int) -> bool:
        """Whether so many rows of one sequence are faster in chunks than in passes."""
        return self._chunk_defines is not None and count > CHUNK_LEAST * self.max_rows

    def _chunks(self, work: Work) -> Iterator[Work]:
        """The rows of `work` in chunks of about the same number of whole panels."""
        count = len(work.tokens)
        panels, most = ceil_div(count, PANEL_ROWS), CHUNK_ROWS // PANEL_ROWS
        chunks = ceil_div(panels, most)
        ends = [PANEL_ROWS * (panels * (i + 1) // chunks) for i in range(chunks)]
        for first, end in zip([0, *ends], ends, strict=False):
            yield self._tail(work, first, min(end, count))

    def chunk_times(self) -> np.ndarray:
        """When each block came to each meeting of the last chunk: uint64 [meetings, blocks] in nanoseconds.

        Only of a decoder with stage times; see cuda/chunk.cu.
        """
        self.finish()
        with self._on_device():
            return self._chunk_build().stage_times.get()

    def _run_chunk(self, work: Work) -> None:
        """Queue one chunk, without waiting for it."""
        self.settle()
        self._listed = 0
        chunk, number = self._chunk_build(), self._next_pass()
        with self._on_device():
            chunk.run(self._cupy, number, work.slot, work.start, work.tokens)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the decoder is closed")

    def _rows_for(self, count: int) -> int:
        """The smallest build that takes so many rows."""
        return min(r for r in self._defines if r >= count)

    def launch(self, rows: int, tokens: np.ndarray, start: int, wanted: int, slot: int = 0) -> None:
        """Queue one pass of the build for `rows` rows, without waiting for it; see PassArgs for `wanted`."""
        self.launch_works(rows, (Work(slot, tokens, start, ()),), wanted)

    def launch_works(self, rows: int, works: Sequence[Work], wanted: int) -> None:
        """Queue one pass of all rows of `works`, as launch() does; their queries are not asked."""
        self.settle()
        self._listed = 0
        self._args["candidates"] = 0
        self._launch(self._next_pass(), rows, works, wanted)

    def _launch(self, number: int, rows: int, works: Sequence[Work], wanted: int, residual: int = 0) -> None:
        build, fields, at = self._pass_build(rows), self._fields, 0
        for work in works:
            count = len(work.tokens)
            end = at + count
            self._row_tokens[at:end] = work.tokens
            np.add(ROW_NUMBERS[:count], work.start, out=self._row_positions[at:end])
            self._row_slots[at:end] = work.slot
            at = end
        fields["pass"][...] = number
        fields["exchange"][...] = build.exchange.data.ptr
        fields["num_rows"][...] = at
        fields["logits_rows"][...] = wanted
        fields["residual"][...] = residual
        fields["logits"][...] = self._logits_of(number).data.ptr
        self._submit(build)

    def _logits_of(self, number: int) -> Any:
        """Those of a pass, until the next but one, on the device: [max_rows, vocab_size]."""
        return self._logits[number % 2]

    def _submit(self, build: PassBuild) -> None:
        """Launch a pass with the arguments as they are now."""
        with self._on_device():
            build.launch(self._cupy, self._kernel_params)

    def _on_device(self) -> OnDevice:
        return OnDevice(self._cupy, self._ordinal, self._context)

    def _next_pass(self) -> int:
        """A number whose tags no packet carries."""
        self._reserve_passes(1)
        self._pass += 1
        return self._pass

    @functools.cached_property
    def _last_number(self) -> int:
        """The largest number of a pass whose tags fit into their word."""
        return (2**32 - 1 - self.config.num_layers) // (self.config.num_layers + 1)

    def _reserve_passes(self, count: int) -> None:
        """Wipe every packet, once the queued passes have ended, if there are not so many numbers left."""
        if self._pass + count <= self._last_number:
            return
        self._check_status()
        with self._on_device():
            for build in self._builds.values():
                build.exchange.fill(0)
            self._gave_up.fill(0)
            self._mail.fill(0)
        for array in (self._host.status, self._host.mailbox, self._host.results):
            array.view(np.uint8)[...] = 0
        self._pass = self._checked = 0

    def finish(self, wanted: int = 0) -> np.ndarray:
        """Wait for the queued passes, check how they went and fetch the last one's wanted rows of logits."""
        self._check_status()
        with self._on_device():
            rows = [row for row in range(wanted.bit_length()) if wanted >> row & 1]
            logits = self._logits_of(self._pass)
            return logits[rows[0] : rows[-1] + 1].get() if rows else logits[:0].get()

    def begin(
        self, works: Sequence[Work], ahead: bool = False, draws: tuple[Draw, Draw] | None = None
    ) -> None:
        """Start the passes of `works`, of distinct slots; candidates() says what the queried rows say.

        Rows without queries that have no room beside the queried ones go in passes before. With `ahead`, for
        one work of one query, the next pass is launched too, so that it has begun when its token comes: a
        call with that one token, the next position and the same query, to which the token may be added as
        the last id. Any other call, and settle(), make it leave.

        `draws` say how the tokens of this pass and of the next are going to be drawn, for a query without
        ids: the device draws them too where it can, and the pass behind does not wait. If another token
        comes than it has got, that pass is in vain and the right one is launched behind it.
        Errors are those of forward().
        """
        self._check_open()
        check_draws(draws, works, ahead)
        if self._waiting is not None and _is_one_token(works, self._waiting.work):
            self.deliver(works[0].tokens.item(), works[0].queries[0])
        answered = self._delivered is not None and self._delivered.is_for(works)
        last, residual, draws = works, 0, draws or UNDRAWN
        if not answered:
            if self._delivered is not None:
                self.settle()
            last, residual = self._run_all_but_last(works, ahead)
        self._listed = 0
        try:
            if answered:
                (listing, _, _, asked), self._delivered = self._delivered, None
                self._begun = begun = _Begun(works, works, [asked], ahead, draws, listing=listing)
            else:
                self._reserve_passes(PASSES_OF_A_TOKEN)
                self._begun = begun = _Begun(works, last, self._queue_queries(last), ahead, draws, residual)
            if last:
                self._start(begun)
        except BaseException:
            self._abandon()
            raise

    def deliver(self, token: int, query: Query) -> None:
        """What the next begin() will ask of the pass that waits, if one does: it goes on without more ado.

        Whoever has a token calls this first, whatever is left to do before the begin(). If that asks for
        something else after all, the pass was in vain. Errors are those of begin().
        """
        waiting = self._waiting
        if waiting is None or not self._can_answer(waiting, token, query):
            return
        self._listed = 0
        try:
            asked = self._ask(0, 0, query, token)
            if self._waiting is None:  # it had to leave: the device lacked ids
                return
            if waiting.drawn is None:
                self._host.mailbox[0] = mail(waiting.number, token, asked.append)
            self._delivered = _Delivered(waiting, token, query, asked)
            self._waiting = None
        except BaseException:
            self._abandon()
            raise

    def _can_answer(self, waiting: _Listing, token: int, query: Query) -> bool:
        """Whether the pass that waits is still there, and right for this token.

        One that has got a token cannot be told of ids.
        """
        return (
            (waiting.drawn is None or (waiting.drawn == token and not len(query.token_ids)))
            and self._host.no_token != waiting.number
            and query.inverse_temperature == waiting.inverse_temperature
            and 0 <= token < self.config.vocab_size
            and self._checked == waiting.number - 1
            and self._pass + PASSES_OF_A_TOKEN <= self._last_number
        )

    def _run_all_but_last(self, works: Sequence[Work], ahead: bool) -> tuple[Sequence[Work], int]:
        """Check `works` and run what goes in passes before the last one; that one's, and its residual."""
        limits = self.num_slots, self.max_rows, self.max_seq_len, self.config.vocab_size
        rows, queried = check_works(works, ahead, *limits)
        last: Sequence[Work] = works
        residual = 0
        if len(works) == 1 and queried and self._takes_chunks(rows):
            last, residual = self._run_long(works[0])
        elif rows > self.max_rows or queried == 0:
            before, last = self._split(works, queried)
            self._run_unqueried(before)
        if self._checked < self._pass - (self._waiting is not None):
            self.finish()  # passes that nobody asked about
        return last, residual

    def _run_long(self, work: Work) -> tuple[list[Work], int]:
        """All rows of `work` in chunks; what is left for the last pass, and where it finds its rows."""
        for part in self._chunks(work):
            self._run_chunk(part)
        first = len(work.tokens) - len(work.queries)
        rest = self._tail(work, first, len(work.tokens))
        residual = self._chunk_build().residual(len(part.tokens) - len(work.queries))
        return [rest._replace(queries=work.queries)], residual

    def _split(self, works: Sequence[Work], queried: int) -> tuple[list[Work], list[Work]]:
        """What of `works` goes in passes before the last one, and what in that, which has the `queried` rows.

        There is no last one without any. Of the others it takes what would not fill a pass of its own.
        """
        before: list[Work] = []
        last: list[Work] = []
        room = self.max_rows - queried if queried else 0
        for work in works:
            others = len(work.tokens) - len(work.queries)
            rest = others % self.max_rows
            rest = rest if rest <= room else 0
            room -= rest
            cut = others - rest
            if cut:
                before.append(Work(work.slot, work.tokens[:cut], work.start, ()))
            if cut < len(work.tokens):
                last.append(Work(work.slot, work.tokens[cut:], work.start + cut, work.queries))
        return before, last

    def _run_unqueried(self, works: Sequence[Work]) -> None:
        """All rows of `works`: those of long ones in chunks, others as many at a time as a pass takes."""
        short = []
        for work in works:
            if not self._takes_chunks(len(work.tokens)):
                short.append(work)
                continue
            for part in self._chunks(work):
                self._run_chunk(part)
        for part in self._packed(short):
            self.launch_works(self._rows_for(sum(len(work.tokens) for work in part)), part, 0)
        self.finish()

    def _packed(self, works: Sequence[Work]) -> Iterator[list[Work]]:
        part: list[Work] = []
        room = self.max_rows
        for work in works:
            at = 0
            while at < len(work.tokens):
                tokens = work.tokens[at : at + room]
                part.append(Work(work.slot, tokens, work.start + at, ()))
                at += len(tokens)
                room -= len(tokens)
                if room == 0:
                    yield part
                    part, room = [], self.max_rows
        if part:
            yield part

    def candidates(self) -> list[list[Candidates]]:
        """What the passes of begin() say of each work's queries, once they have ended; errors as forward()'s.

        Logits that are not finite are an error of their own row, which says so.
        """
        begun, self._begun = self._begun, None
        if begun is None:
            raise ValueError("candidates of passes that begin() started expected, none was started")
        if begun.listing is None:
            return [[] for _ in begun.works]
        try:
            while not self._await_results(begun):
                begun.listing = None
                self._start(begun)
            listing, asked = begun.listing, iter(begun.asked)
            found = [[self._assemble(listing, next(asked)) for _ in work.queries] for work in begun.works]
            self._checked = listing.number
            if self._waiting is not None:
                self._waiting.drawn = self._row(listing, begun.asked[0]).drawn()
        except BaseException:
            self._abandon()
            raise
        self._listed = listing.number
        return found

    def _assemble(self, listing: _Listing, asked: _Asked) -> Candidates:
        results = self._row(listing, asked)
        return results.assemble(len(asked.ids), lambda: self._fetch(listing, asked.row))

    def _row(self, listing: _Listing, asked: _Asked) -> RowResults:
        return self._host.rows[listing.number % 2][asked.row]

    def _abandon(self) -> None:
        """After an error: nothing waits, and the ids that the device holds are not trusted."""
        self._release_waiting()
        self._begun = self._delivered = None
        self._abandoned = True
        self._forget_ids()

    def _forget_ids(self) -> None:
        """The last id of a list may have come or not."""
        for queried in self._lists:
            queried.held = NO_IDS

    def _start(self, begun: _Begun) -> None:
        """Launch the last pass, unless one that waited has its rows already; and the next one ahead."""
        if begun.listing is None:
            self._release_waiting()
            begun.listing = self._list(begun.last, begun.asked, begun.draws[0], begun.residual)
        if begun.ahead:
            (work,), (asked,) = begun.last, begun.asked
            end = work.start + len(work.tokens)
            if end < self.max_seq_len:
                next_work = Work(work.slot, AWAITED_TOKEN, end, ())
                next_asked = _Asked(0, asked.ids, asked.inverse_temperature, False)
                self._waiting = self._list((next_work,), (next_asked,), begun.draws[1])

    def _queue_queries(self, works: Sequence[Work]) -> list[_Asked]:
        """The rows of `works` that are queried; the device gets the ids that it lacks."""
        asked: list[_Asked] = []
        end = 0
        for work in works:
            end += len(work.tokens)
            for i, query in enumerate(work.queries, -len(work.queries)):
                asked.append(self._ask(len(asked), end + i, query, int(work.tokens[i])))
        return asked

    def _ask(self, place: int, row: int, query: Query, token: int) -> _Asked:
        """The row whose token that is; the device gets the ids that it lacks in list `place`."""
        ids = self._lists[place].checked(query, self.config.vocab_size)
        return _Asked(row, ids, query.inverse_temperature, self._queue_ids(place, ids, token))

    def _queue_ids(self, place: int, ids: np.ndarray, token: int) -> bool:
        """See that the device has the `ids` in that list; True if the pass must append its row's token."""
        queried = self._lists[place]
        held, queried.held = queried.held, ids
        if ids is held or np.array_equal(ids, held):
            return False
        if len(ids) and ids[-1] == token and np.array_equal(ids[:-1], held):
            return True
        self._release_waiting()
        with self._on_device():
            self._device_ids[place, : len(ids)].set(ids)
        return False

    def _list(
        self, works: Sequence[Work], asked: Sequence[_Asked], draw: Draw, residual: int = 0
    ) -> _Listing:
        """Launch a pass whose rows leave the candidates that are asked for, and which draws one of them."""
        fields, wanted, append = self._fields, 0, 0
        listing = _Listing(self._next_pass(), works[0], asked[0].inverse_temperature)
        for one in asked:
            wanted |= 1 << one.row
            append |= one.append << one.row
            fields["num_queried"][one.row] = len(one.ids) - one.append
            fields["inverse_temperature"][one.row] = one.inverse_temperature
        fields["candidates"][...] = self._host.addresses[listing.number % 2]
        fields["draw"][...] = draw_args(draw)
        fields["append"][...] = append
        count = sum(len(work.tokens) for work in works)
        self._launch(listing.number, self._rows_for(count), works, wanted, residual)
        with self._on_device():
            self._ends[listing.number % 2].record()
        return listing

    def _await_results(self, begun: _Begun) -> bool:
        """Wait for all that the last pass says; False if it ended for want of its token."""
        return all(self._await_row(begun.listing, asked) for asked in begun.asked)

    def _await_row(self, listing: _Listing, asked: _Asked) -> bool:
        """The same of one row."""
        results, num_queried = self._row(listing, asked), len(asked.ids)
        began = look = perf_counter()
        ended = False
        while True:
            for _ in range(POLLS):
                if results.are_there(listing.number, num_queried):
                    return True
            self._check_gave_up()
            # The pass behind begins when this one has ended: if that lacked its token, this one did too, or
            # the host has slept since and may as well run it again.
            if self._host.no_token >= listing.number:
                return False
            if (now := perf_counter()) < look + LOOK_SECONDS:
                continue
            look = now
            if ended or now > began + 2 * self._spin_seconds:
                raise DeviceError(f"{self.device}: a pass left no results; load the model again")
            ended = self._has_ended(listing)

    def _has_ended(self, listing: _Listing) -> bool:
        """Whether the pass has left the device; DeviceError if CUDA reports an error there."""
        runtime = self._cupy.cuda.runtime
        with self._on_device():
            state = runtime.eventQuery(self._ends[listing.number % 2].ptr)
            if state not in (0, NOT_READY):
                raise runtime.CUDARuntimeError(state)
        return state == 0

    def _fetch(self, listing: _Listing, row: int) -> np.ndarray:
        """The row's logits, float32 [vocab_size]."""
        if self._closed or self._listed != listing.number:
            raise ValueError("logits of the decoder's last pass expected, those of an earlier one asked for")
        runtime = self._cupy.cuda.runtime
        source, target = self._logits_of(listing.number)[row], self._fetched
        with self._on_device():
            self._ends[listing.number % 2].synchronize()
            runtime.memcpyAsync(
                target.ctypes.data,
                source.data.ptr,
                target.nbytes,
                runtime.memcpyDeviceToHost,
                self._copies.ptr,
            )
            self._copies.synchronize()
        return target.copy()

    def settle(self) -> None:
        """End what was begun: a pass that waits for its token leaves, what others say is not asked for.

        One that has got its token from the pass before goes on; all that is launched later comes behind it.
        """
        self._release_waiting()
        if self._begun is not None or self._delivered is not None or self._abandoned:
            self._begun = self._delivered = None
            self._abandoned = False
            self._forget_ids()
            with self._on_device():
                self._cupy.cuda.get_current_stream().synchronize()
            self._checked = self._pass

    def _release_waiting(self) -> None:
        """Nobody wants the pass that waits, nor its status: it leaves, unless it has got a drawn token."""
        if self._waiting is None:
            return
        number, self._waiting = self._waiting.number, None
        self._host.mailbox[0] = mail(number, MAIL_LEAVE)
        if self._checked == number - 1:
            self._checked = number

    @property
    def _spin_seconds(self) -> float:
        return float(self._args["spin_limit_ns"]) / 1e9

    def _check_status(self) -> None:
        """Wait for the queued passes; GenerationError if one since the last check went wrong."""
        self.settle()
        with self._on_device():
            self._cupy.cuda.get_current_stream().synchronize()
        self._check_gave_up()
        first, self._checked = self._checked, self._pass
        if first < self._host.status["non_finite"][0] <= self._pass:
            raise GenerationError(NON_FINITE_LOGITS)

    def _check_gave_up(self) -> None:
        """GenerationError if a wait of a pass since the last check gave up."""
        if self._checked < self._host.gave_up <= self._pass:
            self._checked, status = self._pass, self._host.status[0]
            layer, stage = divmod(int(status["stage"]), 8)
            raise GenerationError(
                f"a wait on the device gave up after {self._spin_seconds:g} s: layer {layer}, "
                f"{STAGE_NAMES[stage]}, block {status['block']}"
            )

    def read_cache(self, slot: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """K and V of a slot's first `count` positions, once the queued passes have ended.

        Both are plain vectors, [num_layers, num_kv_heads, count, plain_size]; see VectorLayout.
        """
        self._check_cache(slot, count)
        with self._on_device():
            keys, values = self.key_cache[:, slot], self.value_cache[:, slot]
            return self._read(keys, count, KEY_ROTATION), self._read(values, count, VALUE_ROTATION)

    def write_cache(self, slot: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Make `keys` and `values`, as read_cache() gives them, those of the slot's first positions."""
        config = self.config
        sizes = config.num_layers, config.num_kv_heads, self._vector_layout, self.max_seq_len
        check_cache(keys, values, *sizes)
        self._check_cache(slot, keys.shape[2])
        with self._on_device():
            self._write(self.key_cache[:, slot], keys, KEY_ROTATION)
            self._write(self.value_cache[:, slot], values, VALUE_ROTATION)

    def _check_cache(self, slot: int, count: int) -> None:
        """What read_cache() and write_cache() demand; no pass is queued when it returns."""
        self._check_open()
        check_slot(slot, self.num_slots)
        if not 0 <= count <= self.max_seq_len:
            raise ValueError(f"{count} positions asked for, a slot has {self.max_seq_len}")
        self.finish()

    def _read(self, cache: np.ndarray, count: int, rotation: int) -> np.ndarray:
        """The first positions of a slot's `cache` [num_layers, num_kv_heads, max_seq_len, cached_size].

        By plain copies: CuPy would compile a kernel for a part that is not contiguous.
        """
        layers, heads = cache.shape[:2]
        vectors = self._vector_layout
        found = np.empty((layers, heads, count, vectors.plain_size), vectors.dtype)
        for layer in range(layers):
            cached = np.stack([cache[layer, head, :count].get() for head in range(heads)])
            found[layer] = vectors.to_plain(cached, rotation)
        return found

    def _write(self, cache: np.ndarray, vectors: np.ndarray, rotation: int) -> None:
        """The reverse of _read()."""
        for layer, plain in enumerate(vectors):
            for head, cached in enumerate(self._vector_layout.to_cache(plain, rotation)):
                cache[layer, head, : len(cached)].set(np.ascontiguousarray(cached))

    def close(self) -> None:
        """Free all memory of this decoder on the device and pinned for it; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(DeviceError):
            self.settle()
        with contextlib.suppress(DeviceError), self._on_device():
            self._cupy.cuda.get_current_stream().synchronize()  # passes write into pinned memory
        for name in ("_layers", "_vectors", "_lm_head", "_embed", "_norm", "_rope", "_logits", "_device_ids"):
            setattr(self, name, None)
        self._gave_up = self._mail = self.stage_times = self.key_cache = self.value_cache = None
        self._args = self._fields = self._row_tokens = self._row_positions = self._row_slots = None
        self._host = self._fetched = None
        self._builds.clear()
        self._chunk = None
        self._pool.free_all_blocks()
