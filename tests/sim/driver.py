"""Runs the kernel's own source on a simulated device: builds it with g++, owns its buffers, decodes packets.

SimDecoder is to tests/sim what GPUDecoder is to a GPU: the same constants, the same arguments, the same
forward(). README.md beside this file says how to debug a kernel with it.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import functools
import hashlib
import json
import mmap
import os
import re
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from packets import PACKET, packet_counts, stages

from ffmini.candidates import MAX_QUERIED, Candidates, Draw, Query
from ffmini.errors import GenerationError
from ffmini.kernel import (
    AWAITED,
    BUILD_INFO,
    CHUNK_ARGS,
    CHUNK_INFO,
    MODEL_ARGS,
    NO_DRAW,
    PASS_ARGS,
    draw_args,
    kernel_defines,
    layer_bytes,
    mail,
)
from ffmini.layout import TILE_ROWS, VectorLayout, ceil_div
from ffmini.packing import LAYER_MATRICES, PackedModel, vectors_length
from ffmini.passes import Work
from ffmini.resources import resource_dir
from ffmini.results import HostMemory, check_query
from ffmini.rope import rope_tables

SIM_DIR = Path(__file__).resolve().parent
FLAGS = ("-std=c++17", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas")
# The machine is compiled once, kernels for a few runs each: debug information is a quarter of the time.
MACHINE_FLAGS, KERNEL_FLAGS, DEBUG_FLAGS = ("-O2", "-g"), ("-O1",), ("-g",)
SANITIZERS = (
    "-O0",
    "-g",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
)
COVERAGE = ("-O0", "--coverage", "-DSIM_COVERAGE")
SHARED_LIMIT = 99 * 1024  # of the smallest GPUs: rings are short and wrap often

EVENTS = (  # enum Event of machine.hpp
    "one block starved until all others spin",
    "one warp always last",
    "async copies as late as allowed",
    "async copies at once",
    "stores late",
    "stores in any order",
)


LAUNCH = np.dtype(  # sim::Options of machine.hpp
    [
        ("seed", "<u8"),
        ("lost", "<u8"),
        ("before_lost", "<u8"),
        ("blocks", "<u4"),
        ("give_up", "?"),
        ("kept", "<u8"),
        ("kept_bytes", "<u8"),
        ("sent", "<u8"),
    ],
    align=True,
)

MAX_BLOCKS = 8  # whose lists there is room for, or as many as at first
TOKEN_LIMIT_NS = 20 * 10**6


class SimError(Exception):
    """The simulated device stopped a run: a deadlock, or lanes that disagree; one line says who and where."""


@functools.lru_cache(maxsize=1)
def build_root() -> Path:
    """A directory for the builds of this process; FFMINI_SIM_DIR names one whose builds stay."""
    if os.environ.get("FFMINI_SIM_DIR"):
        return Path(os.environ["FFMINI_SIM_DIR"])
    directory = tempfile.mkdtemp(prefix="ffmini-sim-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)


def directory_for(sources: list[Path]) -> Path:
    """A directory among the builds for what is made of `sources`: of their texts, wherever they lie."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    directory = build_root() / digest.hexdigest()
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def is_sanitized() -> bool:
    """Whether this process can load sanitized builds; it then makes no others. See sanitized_environment."""
    return "libasan" in os.environ.get("LD_PRELOAD", "")


def sanitized_environment() -> dict[str, str]:
    """The environment of a process that makes sanitized builds: their runtime is there from its start."""
    command = [find_compiler(), "-print-file-name=libasan.so"]
    runtime = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}  # Python's own leaks


def find_compiler() -> str:
    """The path of g++, or a SimError that names it."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise SimError("g++ not found: the tests of the simulated kernel need g++ 11 or newer")
    return compiler


def build(defines: dict[str, str], cuda: Path | None = None, coverage: bool = False) -> Path:
    """The shared library of one build of `cuda` (default: the project's own), compiled unless it is there.

    Of the pass or, with SIM_CHUNK among the defines, of the chunk.
    """
    own = sorted(path for path in SIM_DIR.iterdir() if path.suffix in (".cpp", ".hpp", ".cuh"))
    device = sorted((cuda or resource_dir("cuda")).glob("*.cu*"))
    common = directory_for(own)
    sanitizers = SANITIZERS if is_sanitized() else ()
    machine = [*FLAGS, *MACHINE_FLAGS, *sanitizers, f"-I{SIM_DIR}", "-c"]
    objects = [
        str(compile_once([*machine, str(SIM_DIR / f"{name}.cpp")], common / f"{name}.o"))
        for name in ("fiber", "machine")
    ]
    tree = directory_for(own + device)
    for path in device:  # the device's sources, but for ptx.cuh its host twin
        place_copy(SIM_DIR / path.name if path.name == "ptx.cuh" else path, tree / path.name)
    flags = [*FLAGS, *KERNEL_FLAGS, *sanitizers, *(COVERAGE if coverage else ()), f"-I{SIM_DIR}"]
    if os.environ.get("FFMINI_SIM_DEBUG"):
        flags += DEBUG_FLAGS
    # What all kernels begin with is compiled first, once.
    prefix = compile_once([*flags, "-x", "c++-header", str(SIM_DIR / "ptx.cuh")], common / "ptx.cuh.gch")
    flags += ["-include", str(prefix.with_suffix("")), f"-I{tree}"]
    constants = [f"-D{name}={value}" for name, value in sorted(defines.items())]
    arguments = [*flags, "-shared", *constants, str(SIM_DIR / "sim.cpp"), *objects]
    return compile_once(arguments, tree / "sim.so")


def place_copy(source: Path, target: Path) -> None:
    """`target` with the text of `source`; other processes find all of it or nothing."""
    if not target.exists():
        partial = target.with_name(f"{target.name}-{os.getpid()}")
        shutil.copyfile(source, partial)
        partial.rename(target)


def compile_once(arguments: list[str], target: Path) -> Path:
    """What g++ makes of `arguments`, `target` with a digest of them before its name; SimError if it fails.

    Another process that wants the same at the same time waits for it.
    """
    compiler = find_compiler()
    digest = hashlib.blake2b(repr(arguments).encode(), digest_size=12).hexdigest()
    finished = target.with_name(f"{digest}-{target.name}")
    if finished.is_file():
        return finished
    with open(finished.with_name(f"{finished.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not finished.is_file():
            partial = finished.with_name(f"{finished.name}-{os.getpid()}")
            command = [compiler, *arguments, "-o", str(partial)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode != 0:
                raise SimError(f"cuda/ does not compile for the simulator:\n{result.stderr[:4000]}")
            partial.rename(finished)
    return finished


def guarded_array(shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
    """A new array that ends, but for the rounding to 16 bytes, at an inaccessible page and starts behind one.

    Every byte is 0xff: NaN as a float and as a bf16, so that what was never written shows. What a child of
    this process writes there is its own.
    """
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    size = ceil_div(nbytes, mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + 2 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (base, base + mmap.PAGESIZE + size):
        if ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), mmap.PAGESIZE, 0) != 0:
            raise OSError("mprotect failed")
    offset = mmap.PAGESIZE + size - ceil_div(nbytes, 16) * 16
    array = np.frombuffer(memory, np.uint8, nbytes, offset)
    array[...] = 0xFF
    return array.view(dtype).reshape(shape)


def guarded_copy(source: np.ndarray) -> np.ndarray:
    array = guarded_array(source.shape, source.dtype)
    array[...] = source
    return array


class NoTokenError(Exception):
    """A pass ended for want of its token."""


class SimKernel:
    """One build of a kernel on a simulated grid.

    It serves any number of `blocks`. `seed` chooses the schedule of every launch, 0 the plain one. A wait
    that cannot end is a SimError unless `give_up` is set, which lets time pass until the kernel itself gives
    up: a GenerationError. All of these may be changed between launches, as may what is to get lost.
    """

    _arrays: dict[str, np.ndarray]

    def __init__(
        self, defines: dict[str, str], blocks: int, seed: int, cuda: Path | None, coverage: bool
    ) -> None:
        self.defines, self.blocks, self.seed, self.give_up = defines, blocks, seed, False
        self._path = build(defines, cuda, coverage)
        self._library = ctypes.CDLL(str(self._path))
        weakref.finalize(self, self._library.sim_close)
        self._library.sim_run.restype = ctypes.c_char_p
        self._library.sim_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self._library.sim_events.restype = ctypes.POINTER(ctypes.c_uint64)

    def _info(self, name: str, dtype: np.dtype, args: np.dtype) -> np.void:
        """What the build says of itself; it must agree about the size of its argument."""
        info = (ctypes.c_char * dtype.itemsize).in_dll(self._library, name)
        value = np.frombuffer(info, dtype=dtype)[0]
        assert value["args_bytes"] == args.itemsize
        return value

    def _launch(self, args: np.ndarray, **options: int) -> None:
        """One launch; SimError if it does not end well. `options`: those of LAUNCH that are not 0."""
        launch = np.zeros((), LAUNCH)
        for name, value in {"seed": self.seed, "blocks": self.blocks, **options}.items():
            launch[name] = value
        launch["give_up"] = self.give_up
        error = self._library.sim_run(args.ctypes.data, launch.ctypes.data)
        if error is not None:
            raise SimError(f"seed {self.seed}, {self.blocks} blocks: {self._name_addresses(error.decode())}")

    def set_word(self, name: str, value: int) -> None:
        """Set the library's own variable `name`, an int."""
        ctypes.c_int.in_dll(self._library, name).value = value

    def coverage(self) -> dict[str, dict[int, int]]:
        """File of cuda/ -> line -> how often it ran; once, and of a build that is made with `coverage`."""
        for old in self._path.parent.glob(f"{self._path.name}*.gcda"):
            old.unlink()
        self._library.sim_write_coverage()
        (data,) = self._path.parent.glob(f"{self._path.name}*.gcda")
        command = ["gcov", "--json-format", "--stdout", str(data)]
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=data.parent)
        counts: dict[str, dict[int, int]] = {}
        for file in json.loads(result.stdout)["files"]:
            path = data.parent / file["file"]
            if path.parent == data.parent and path.name != "ptx.cuh":
                lines = counts.setdefault(path.name, {})
                for line in file["lines"]:
                    number = line["line_number"]
                    lines[number] = max(lines.get(number, 0), line["count"])
        return counts

    def _name_addresses(self, text: str) -> str:
        """`text` with addresses in or near an array replaced by the array's name and an offset in bytes."""

        def name(match: re.Match[str]) -> str:
            address = int(match[0], 16)
            for array_name, array in self._arrays.items():
                offset = address - array.ctypes.data
                if -mmap.PAGESIZE <= offset < array.nbytes + mmap.PAGESIZE:
                    return f"{array_name} ({array.nbytes} bytes) + {offset}"
            return match[0]

        return re.sub(r"0x[0-9a-f]+", name, text)

    def events(self) -> dict[str, int]:
        """How often the last pass's schedule did each of EVENTS."""
        return dict(zip(EVENTS, self._library.sim_events()[: len(EVENTS)], strict=True))

    def close(self) -> None:
        """Free the grid's memory; the next pass takes it again."""
        self._library.sim_close()


class SimDecoder(SimKernel):
    """Passes of one model of up to `rows` rows; the interface of CPUDecoder and GPUDecoder.

    What is stored at `lost_packet`, an index into `exchange`, never arrives.
    """

    def __init__(
        self,
        packed: PackedModel,
        max_seq_len: int,
        *,
        rows: int = 8,
        num_slots: int = 1,
        kv_dtype: str = "bf16",
        blocks: int = 3,
        seed: int = 0,
        shared_limit: int = SHARED_LIMIT,
        bulk_copies: bool = True,
        in_flight: int = 2,
        test_pauses: bool = False,
        stage_times: bool = False,
        part_segments: int | None = None,
        split_parts: bool = False,
        built_for: int = 1,
        cuda: Path | None = None,
        coverage: bool = False,
    ) -> None:
        """`part_segments`: of a part of o_proj's and down_proj's input, at most, instead of PART_SEGMENTS.

        It decides the order of sums: builds that differ in it have different bits. `split_parts`: a block
        has one part at a time, though there is room for all of them. The build serves grids of `built_for`
        blocks and more: those of one have room for every tile. The rest as kernel_defines says.
        """
        self.config, self.max_seq_len, self.device = packed.config, max_seq_len, "sim"
        self.rows, self.num_slots, self.kv_dtype = rows, num_slots, kv_dtype
        self.vectors = VectorLayout(packed.config.head_dim, kv_dtype)
        self.lost_packet: int | None = None
        self._sent: np.ndarray | None = None
        defines = kernel_defines(
            packed.config,
            packed.layouts,
            rows=rows,
            max_seq_len=max_seq_len,
            shared_limit=shared_limit,
            blocks=built_for,
            bulk_copies=bulk_copies,
            kv_dtype=kv_dtype,
            in_flight=in_flight,
            test_pauses=test_pauses,
            stage_times=stage_times,
        )
        if part_segments is not None:
            defines["PART_SEGMENTS"] = str(part_segments)
        if split_parts:
            defines["SPLIT_PARTS"] = "1"
        super().__init__(defines, blocks, seed, cuda, coverage)
        self.build_info = self._info("ffmini_build_info", BUILD_INFO, PASS_ARGS)
        self._upload(packed)

    def _upload(self, packed: PackedModel) -> None:
        config = self.config
        self._layers = guarded_array((config.num_layers, layer_bytes(packed.layouts)), np.uint8)
        self._vectors = guarded_array((config.num_layers, vectors_length(config)), np.float32)
        for i, layer in enumerate(packed.layers):
            self._layers[i] = np.concatenate([getattr(layer, name) for name in LAYER_MATRICES])
            self._vectors[i, : layer.vectors.size] = layer.vectors
        shape = (config.num_layers, self.num_slots, config.num_kv_heads, self.max_seq_len)
        shape += (self.vectors.cached_size,)
        self.key_cache = guarded_array(shape, self.vectors.dtype)
        self.value_cache = guarded_array(shape, self.vectors.dtype)
        packets = int(self.build_info["exchange_packets"])
        packets += max(self.blocks, MAX_BLOCKS) * int(self.build_info["block_packets"])
        self.exchange = guarded_array((packets,), PACKET)
        self._logits = guarded_array((self.rows, config.vocab_size), np.float32)
        self._gave_up = guarded_array((1,), np.uint32)
        self._mail = guarded_array((2,), np.uint64)
        self._queried_ids = guarded_array((self.rows, MAX_QUERIED), np.int32)
        self._host = guarded_array((HostMemory.nbytes(self.rows),), np.uint8)
        self.host = HostMemory(self._host, self.rows)
        shape = (config.num_layers + 1, int(self.build_info["marks"]), self.blocks)
        self.stage_times = guarded_array(shape, np.uint64)  # for no more blocks; see PassArgs
        self.reset()
        cos, sin = rope_tables(config, self.max_seq_len)
        arrays = {
            "layers": self._layers,
            "lm_head": guarded_copy(packed.lm_head),
            "vectors": self._vectors,
            "norm": guarded_copy(packed.norm),
            "rope_cos": guarded_copy(cos),
            "rope_sin": guarded_copy(sin),
            "key_cache": self.key_cache,
            "value_cache": self.value_cache,
            "exchange": self.exchange,
            "logits": self._logits,
            "queried_ids": self._queried_ids,
            "gave_up": self._gave_up,
            "drawn": self._mail,
            "stage_times": self.stage_times,
        }
        if packed.embed_tokens is not None:
            arrays["embed_tokens"] = guarded_copy(packed.embed_tokens)
        self._arrays = arrays
        self._args = np.zeros((), PASS_ARGS)
        for name, array in arrays.items():
            self._args[name] = array.ctypes.data
        self._args["status"] = self.host.status.ctypes.data
        self._args["mailbox"] = self.host.mailbox.ctypes.data
        self._arrays["host memory"] = self._host
        self._args["num_slots"] = self.num_slots
        self._args["draw"]["top_k"] = NO_DRAW
        self._args["spin_limit_ns"] = 10**9
        self._args["token_limit_ns"] = TOKEN_LIMIT_NS

    def reset(self) -> None:
        """As if no pass had been made: no packets, and pass numbers from the start."""
        for array in (self.exchange, self._host, self._gave_up, self._mail):
            array.view(np.uint8)[...] = 0
        self._queried_ids[...] = -1
        self._pass = 0

    def next_mail(self, token: int, append: bool = False) -> int:
        """What the mailbox must hold if the next pass is to find `token` there."""
        return mail(self._pass + 1, token, append)

    def forward(self, tokens: np.ndarray, start: int, logits: str = "last", slot: int = 0) -> np.ndarray:
        """Run tokens [R] at positions start .. start + R - 1 of a slot in passes of up to `rows` rows.

        `logits`: "last" gives float32 [1, vocab_size], "all" [R, vocab_size], "none" [0, vocab_size].
        """
        tokens = np.asarray(tokens, np.int32)
        pieces = [np.zeros((0, self.config.vocab_size), np.float32)]
        for at in range(0, len(tokens), self.rows):
            piece = tokens[at : at + self.rows]
            wanted = list(range(len(piece))) if logits == "all" else []
            if logits == "last" and at + len(piece) == len(tokens):
                wanted = [len(piece) - 1]
            pieces.append(self.launch([Work(slot, piece, start + at, ())], wanted))
        return np.concatenate(pieces)

    def launch(self, works: Sequence[Work], wanted: list[int]) -> np.ndarray:
        """One pass of all works' rows; the logits [len(wanted), vocab_size] of those in `wanted`."""
        self._run(works, wanted)
        return self._logits[wanted].copy()

    def finish_rows(self, rows: np.ndarray) -> np.ndarray:
        """The logits of all `rows` [R, hidden_size], what other passes left after the last layer."""
        residual = guarded_array((len(rows), ceil_div(rows.shape[1], TILE_ROWS) * TILE_ROWS), np.float32)
        residual[:, : rows.shape[1]] = rows
        self._args["residual"] = residual.ctypes.data
        try:
            tokens = np.full(len(rows), self.config.vocab_size)  # of which there is no embedding
            return self.launch([Work(0, tokens, 0, ())], list(range(len(rows))))
        finally:
            self._args["residual"] = 0

    def candidates(self, tokens: np.ndarray, start: int, query: Query) -> Candidates:
        """What the last of `tokens`, run from position `start` on, says; see ffmini/candidates.py."""
        first = (len(tokens) - 1) // self.rows * self.rows
        self.forward(tokens[:first], start, "none")
        return self.ask([Work(0, tokens[first:], start + first, (query,))])[0][0]

    def listed(
        self,
        tokens: np.ndarray,
        start: int,
        ids: np.ndarray,
        inverse_temperatures: dict[int, float],
        append: bool = False,
        mailbox: int | None = None,
        draw: Draw | None = None,
    ) -> dict[int, Candidates]:
        """One pass: what it says of each of the rows that have an inverse temperature, all asked for `ids`.

        With `append` each is asked for its own token too, which joins its ids on the device. With `mailbox`,
        what the mailbox holds from before the launch on, the pass awaits its one token. With `draw` it draws
        the next one; see drawn().
        """
        if mailbox is not None:
            self.host.mailbox[0] = mailbox
            tokens = np.array([AWAITED])
        queries = {row: Query(ids, x) for row, x in inverse_temperatures.items()}
        appended = list(queries) if append else []
        if draw is not None:
            self._args["draw"] = draw_args(draw)
        try:
            return self.ask_rows([Work(0, tokens, start, ())], queries, appended)
        finally:
            self._args["draw"]["top_k"] = NO_DRAW

    def drawn(self, row: int = 0) -> int | None:
        """The token that the last pass has drawn for the one behind."""
        return self.host.rows[self._pass % 2][row].drawn()

    def ask(self, works: Sequence[Work]) -> list[list[Candidates]]:
        """One pass of all works' rows: what it says of each work's queries."""
        ends = np.cumsum([len(work.tokens) for work in works])
        rows = [range(end - len(work.queries), end) for work, end in zip(works, ends, strict=True)]
        pairs = zip(rows, works, strict=True)
        queries = {row: query for r, w in pairs for row, query in zip(r, w.queries, strict=True)}
        found = self.ask_rows(works, queries)
        return [[found[row] for row in of_work] for of_work in rows]

    def ask_rows(
        self, works: Sequence[Work], queries: dict[int, Query], appended: Sequence[int] = ()
    ) -> dict[int, Candidates]:
        """One pass: what it says of the rows that have a query; those `appended` have their token too."""
        args, counts = self._args, {}
        args["append"] = sum(1 << row for row in appended)
        args["num_queried"] = -1
        for place, row in enumerate(sorted(queries)):
            ids = check_query(queries[row], self.config.vocab_size)
            self._queried_ids[place, : len(ids)] = ids
            args["num_queried"][row] = counts[row] = len(ids)
            args["inverse_temperature"][row] = queries[row].inverse_temperature
        args["candidates"] = self.host.addresses[(self._pass + 1) % 2]
        try:
            self._run(works, list(queries))
        finally:
            args["candidates"] = 0
        awaited = works[0].tokens[0] == AWAITED and int(self.host.mailbox[0]) >> 63
        return {
            row: self.assemble(row, count + bool(row in appended or awaited)) for row, count in counts.items()
        }

    def assemble(self, row: int, num_queried: int) -> Candidates:
        """What the last pass says of a row; SimError if a packet of it is missing."""
        results, fetched = self.host.rows[self._pass % 2][row], self._logits[row].copy()
        if not results.are_there(self._pass, num_queried):
            raise SimError(f"row {row}: results are missing")
        return results.assemble(num_queried, fetched.copy)

    def _run(self, works: Sequence[Work], wanted: list[int]) -> None:
        self._pass += 1
        args = self._args
        args["pass"] = self._pass
        args["num_rows"] = count = sum(len(work.tokens) for work in works)
        args["logits_rows"] = sum(1 << row for row in wanted)
        args["rows"] = 0
        rows = args["rows"][:count]
        rows["token"] = np.concatenate([work.tokens for work in works])
        rows["position"] = np.concatenate([work.start + np.arange(len(work.tokens)) for work in works])
        rows["slot"] = np.repeat([work.slot for work in works], [len(work.tokens) for work in works])
        self._logits[...] = np.nan
        options = {}
        if self.lost_packet is not None:
            options["lost"] = self.exchange[self.lost_packet :].ctypes.data
        if self._sent is not None:
            options |= {"kept": self.exchange.ctypes.data, "kept_bytes": self._sent.nbytes}
            options["sent"] = self._sent.ctypes.data
        self._launch(args, **options)
        self._check_status()

    def _check_status(self) -> None:
        """GenerationError or NoTokenError if the last launch left word of one."""
        self.status = self.host.status[0].copy()
        if self.status["gave_up"] == self._pass:
            raise GenerationError(f"a wait gave up: {self.status}")
        if self.status["non_finite"] == self._pass:
            raise GenerationError("non-finite logits")
        if self.status["no_token"] == self._pass:
            raise NoTokenError("no token came")

    def replay(
        self, tokens: np.ndarray, start: int, words: np.ndarray
    ) -> tuple[list[dict[str, np.ndarray]], np.ndarray]:
        """One pass whose stages receive `words`, another pass's payload [packets.kept_packets, 3].

        With one block only: nothing waits, so others would overwrite a layer's partial softmaxes too soon.
        Returns what they sent themselves (see packets.stages), and the logits of all rows.
        """
        assert self.blocks == 1
        counts = packet_counts(self.config)
        layers = np.arange(self.config.num_layers + 1, dtype=np.uint32)
        layer_of_packet = np.repeat(layers, self.rows * sum(counts.values()))[: len(words)]
        packets = self.exchange[: len(words)]
        packets["words"] = words
        packets["tag"] = (self._pass + 1) * len(layers) + layer_of_packet
        self._sent = guarded_array((len(words),), PACKET)
        try:
            logits = self.launch([Work(0, tokens, start, ())], list(range(len(tokens))))
            return stages(self._sent, self.config, self.rows, len(tokens)), logits
        finally:
            self._sent = None

    def stages(self) -> list[dict[str, np.ndarray]]:
        """What the blocks told each other in the last pass; see packets.stages."""
        return stages(self.exchange, self.config, self.rows, int(self._args["num_rows"]))


class SimChunk(SimKernel):
    """Chunks of up to `rows` rows of prompts of a SimDecoder's model, with its cache; as the GPU runs them.

    With `wgmma` it is the build for sm_90. With `lost_arrival` the blocks' arrivals at their meetings are
    lost but for so many of the first.
    """

    def __init__(
        self,
        decoder: SimDecoder,
        *,
        rows: int = 128,
        blocks: int = 3,
        seed: int = 0,
        shared_limit: int = SHARED_LIMIT,
        wgmma: bool = False,
        cuda: Path | None = None,
        coverage: bool = False,
    ) -> None:
        self.decoder, self.rows = decoder, rows
        self.lost_arrival: int | None = None
        changes = {"CHUNK_ROWS": str(rows), "SHARED_LIMIT": str(shared_limit), "SIM_CHUNK": "1"}
        changes["WGMMA"] = str(int(wgmma))
        super().__init__(decoder.defines | changes, blocks, seed, cuda, coverage)
        fields = {name: CHUNK_ARGS[name] for name in CHUNK_ARGS.names} | {"tokens": ("<i4", (rows,))}
        self._args = np.zeros((), np.dtype(list(fields.items()), align=True))
        self.info = self._info("ffmini_chunk_info", CHUNK_INFO, self._args.dtype)
        for name, _ in MODEL_ARGS:
            self._args[name] = decoder._args[name]
        self._scratch = guarded_array((int(self.info["scratch_bytes"]),), np.uint8)
        self._scratch[...] = 0
        self._arrived = guarded_array((1,), np.uint32)
        self._args["scratch"], self._args["arrived"] = self._scratch.ctypes.data, self._arrived.ctypes.data
        self._arrays = decoder._arrays | {"scratch": self._scratch, "arrived": self._arrived}

    def run(self, tokens: np.ndarray, start: int, slot: int = 0) -> None:
        """One launch for `tokens` at positions start .. of a slot."""
        decoder, args = self.decoder, self._args
        decoder._pass += 1
        args["pass"], args["slot"], args["start"], args["num_rows"] = decoder._pass, slot, start, len(tokens)
        args["tokens"] = -1
        args["tokens"][: len(tokens)] = tokens
        self._arrived[0] = 0
        options = {}
        if self.lost_arrival is not None:
            options = {"lost": self._arrived.ctypes.data, "before_lost": self.lost_arrival}
        self._launch(args, **options)
        decoder._check_status()

    def forward(self, tokens: np.ndarray, start: int, logits: str = "last", slot: int = 0) -> np.ndarray:
        """As SimDecoder.forward, in chunks of up to `rows` rows and passes for their logits."""
        pieces = [np.zeros((0, self.decoder.config.vocab_size), np.float32)]
        for at in range(0, len(tokens), self.rows):
            piece = tokens[at : at + self.rows]
            self.run(piece, start + at, slot)
            first = {"all": 0, "last": len(tokens) - 1 - at, "none": len(piece)}[logits]
            rows = self.residual()[first : len(piece)]
            step = self.decoder.rows
            pieces += [self.decoder.finish_rows(rows[i : i + step]) for i in range(0, len(rows), step)]
        return np.concatenate(pieces)

    def residual(self) -> np.ndarray:
        """What the chunks have left of each of their rows after the last layer, [rows, hidden_size]."""
        size = int(self.info["residual_size"])
        rows = self._scratch[: 4 * self.rows * size].view(np.float32).reshape(self.rows, size)
        return rows[:, : self.decoder.config.hidden_size]
