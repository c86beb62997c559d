"""The GPU decoder: weights, KV cache and exchange packets in device memory, one cooperative launch per pass.

CuPy is imported on first use, so this module can be imported anywhere.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import ModuleType

import numpy as np
from tqdm import tqdm

from .config import ModelConfig
from .errors import DeviceError, GenerationError, MemoryBudgetError
from .kernel import (
    BUILD_INFO,
    KERNEL_NAME,
    PASS_ARGS,
    STATUS,
    cached_cubin,
    has_bulk_copies,
    kernel_defines,
    layer_bytes,
    max_rows,
)
from .memory import available_memory
from .packing import PackedModel, vectors_length
from .passes import check_pass
from .rope import rope_tables

STAGE_NAMES = ("norm_qkv", "attention", "o_proj", "norm_gate_up", "down_proj", "norm_lm_head", "-", "merge")
PACKET_BYTES = 16
SPIN_SECONDS = 10.0


def import_cupy() -> ModuleType:
    """CuPy, or a DeviceError that says how to install it."""
    try:
        import cupy
    except ImportError as error:
        raise DeviceError(
            f"CuPy is not usable ({error}): pip install 'ffmini[cuda13]' (or 'ffmini[cuda12]')"
        ) from error
    return cupy


def why_unusable(ordinal: int = 0) -> str | None:
    """One line that says why GPU `ordinal` can't run the kernel; None if it can."""
    try:
        cupy = import_cupy()
        count = cupy.cuda.runtime.getDeviceCount()
    except DeviceError as error:
        return str(error)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no usable CUDA driver or device ({error})"
    if ordinal >= count:
        return f"GPU {ordinal} asked for, found {count} GPU(s)"
    properties = cupy.cuda.runtime.getDeviceProperties(ordinal)
    if properties["major"] < 8:
        return f"compute capability 8.0 or newer needed, found {properties['major']}.{properties['minor']}"
    if not properties["cooperativeLaunch"]:
        return "the device does not do cooperative launches"
    return None


def free_memory(ordinal: int = 0) -> int:
    """Bytes that can still be allocated on GPU `ordinal`; on unified memory what the system has available."""
    cupy = import_cupy()
    if cupy.cuda.runtime.getDeviceProperties(ordinal)["integrated"]:
        return available_memory()
    with cupy.cuda.Device(ordinal):
        return int(cupy.cuda.runtime.memGetInfo()[0])


def kv_cache_bytes(config: ModelConfig, positions: int) -> int:
    """Bytes of K and V, both bf16, for `positions` positions."""
    return 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim * positions


class _Build:
    """The kernel compiled for one number of rows, with the packets that its passes exchange."""

    def __init__(
        self, cupy: ModuleType, defines: dict[str, str], arch: str, blocks: int, multiprocessors: int
    ) -> None:
        module = cupy.RawModule(path=str(cached_cubin(defines, arch)), enable_cooperative_groups=True)
        self.kernel = module.get_function(KERNEL_NAME)
        info = read_global(cupy, module, "ffmini_build_info", BUILD_INFO)
        self.rows = int(defines["ROWS"])
        self.blocks = blocks
        self.threads = int(info["threads"])
        self.shared_bytes = int(info["shared_bytes"])
        self.ring_slots = int(info["ring_slots"])
        self.marks = int(info["marks"])
        self.exchange_bytes = int(info["exchange_packets"]) * PACKET_BYTES
        if int(info["args_bytes"]) != PASS_ARGS.itemsize:
            raise DeviceError(
                f"PassArgs: the host has {PASS_ARGS.itemsize} bytes, the kernel {info['args_bytes']}"
            )
        self.kernel.max_dynamic_shared_size_bytes = self.shared_bytes
        resident = multiprocessors * cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(
            self.kernel.kernel.ptr, self.threads, self.shared_bytes
        )
        if blocks > resident:
            raise DeviceError(
                f"{blocks} blocks of {self.threads} threads and {self.shared_bytes} bytes of shared memory "
                f"must be resident together, found room for {resident}"
            )
        self.exchange = None

    def allocate(self, cupy: ModuleType) -> None:
        self.exchange = cupy.zeros(self.exchange_bytes, dtype=cupy.uint8)


def read_global(cupy: ModuleType, module: object, name: str, dtype: np.dtype) -> np.ndarray:
    """The value of type `dtype` that the loaded `module` calls `name`."""
    value = np.zeros((), dtype=dtype)
    pointer = module.get_global(name)  # type: ignore[attr-defined]
    cupy.cuda.runtime.memcpy(
        value.ctypes.data, pointer.ptr, dtype.itemsize, cupy.cuda.runtime.memcpyDeviceToHost
    )
    return value


class GPUDecoder:
    """Runs passes of one model on one GPU.

    Errors: DeviceError if the device can't run the kernel, MemoryBudgetError (a DeviceError) with the
    numbers if it lacks memory, GenerationError if a pass fails; the decoder stays usable after the last.
    """

    def __init__(
        self,
        packed: PackedModel,
        max_seq_len: int,
        ordinal: int = 0,
        *,
        blocks: int | None = None,
        rows: tuple[int, ...] | None = None,
        bulk_copies: bool | None = None,
        test_pauses: bool = False,
        stage_times: bool = False,
        progress: bool = True,
    ) -> None:
        """`blocks` (default: one per multiprocessor), `rows` (default: 1 and as many as fit), `bulk_copies`
        (default: if the device has them) and the rest are for tests and measurements."""
        reason = why_unusable(ordinal)
        if reason is not None:
            raise DeviceError(reason)
        self._cupy = cupy = import_cupy()
        self.config = packed.config
        self.max_seq_len = max_seq_len
        self.device = f"cuda:{ordinal}"
        self._ordinal = ordinal
        self._stage_times = stage_times
        self._pool = cupy.cuda.MemoryPool()
        self._pass = self._checked = 0  # the last pass launched, and the last whose status was read
        self._closed = False
        properties = cupy.cuda.runtime.getDeviceProperties(ordinal)
        multiprocessors = properties["multiProcessorCount"]
        blocks = blocks or multiprocessors
        shared_limit = properties["sharedMemPerBlockOptin"]
        arch = f"sm_{properties['major']}{properties['minor']}"
        if bulk_copies is None:
            bulk_copies = has_bulk_copies(arch)
        with cupy.cuda.Device(ordinal), cupy.cuda.using_allocator(self._pool.malloc):
            self._builds = {
                r: _Build(
                    cupy,
                    kernel_defines(
                        packed.config,
                        packed.layouts,
                        rows=r,
                        max_seq_len=max_seq_len,
                        shared_limit=shared_limit,
                        blocks=blocks,
                        bulk_copies=bulk_copies,
                        test_pauses=test_pauses,
                        stage_times=stage_times,
                    ),
                    arch,
                    blocks,
                    multiprocessors,
                )
                for r in rows or sorted({1, max_rows(packed.config, packed.layouts, shared_limit, blocks)})
            }
            self._check_memory(packed)
            self._upload(packed, progress)

    def _check_memory(self, packed: PackedModel) -> None:
        weights = packed.nbytes
        cache = kv_cache_bytes(self.config, self.max_seq_len)
        scratch = sum(build.exchange_bytes for build in self._builds.values())
        scratch += 4 * self.config.vocab_size * max(self._builds)
        free = free_memory(self._ordinal)
        if weights + cache + scratch > free:
            raise MemoryBudgetError(
                f"{self.device}: weights {weights / 2**20:.0f} MiB + KV cache {cache / 2**20:.0f} MiB + "
                f"scratch {scratch / 2**20:.0f} MiB needed, {free / 2**20:.0f} MiB free"
            )

    def _upload(self, packed: PackedModel, progress: bool) -> None:
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
        shape = (config.num_layers, 1, config.num_kv_heads, self.max_seq_len, config.head_dim)
        # Zeros: tiles of positions are fetched whole, those without a token masked out afterwards.
        self.key_cache = cupy.zeros(shape, dtype=cupy.uint16)
        self.value_cache = cupy.zeros(shape, dtype=cupy.uint16)
        self._logits = cupy.empty((max(self._builds), config.vocab_size), dtype=cupy.float32)
        self._status = cupy.zeros(STATUS.itemsize // 4, dtype=cupy.uint32)
        build = next(iter(self._builds.values()))
        self.ring_slots = build.ring_slots  # of the build for the fewest rows
        shape = (config.num_layers + 1, build.marks, build.blocks if self._stage_times else 0)
        self.stage_times = cupy.zeros(shape, dtype=cupy.uint64)
        for build in self._builds.values():
            build.allocate(cupy)
        self._args = self._make_args()

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
            "logits": self._logits,
            "status": self._status,
            "stage_times": self.stage_times,
        }
        for name, array in pointers.items():
            if array is not None and not array.flags.c_contiguous:
                raise DeviceError(f"{name}: a contiguous array expected")
            args[name] = 0 if array is None else array.data.ptr
        args["spin_limit_ns"] = int(float(os.environ.get("FFMINI_SPIN_SECONDS", SPIN_SECONDS)) * 1e9)
        args["num_slots"] = 1
        return args

    def forward(self, tokens: np.ndarray, start: int, logits: str = "last") -> np.ndarray:
        """Run tokens [R] at positions start .. start + R - 1, in passes of as many rows as the builds take.

        `logits`: "last" gives float32 [1, vocab_size], "all" [R, vocab_size], "none" [0, vocab_size].
        GenerationError if a logit is not finite or a wait on the device gave up.
        """
        tokens = np.asarray(tokens)
        if self._closed:
            raise ValueError("the decoder is closed")
        check_pass(tokens, start, logits, self.max_seq_len, self.config.vocab_size)
        pieces = [np.zeros((0, self.config.vocab_size), dtype=np.float32)]
        at = 0
        while at < len(tokens):
            rows = min((r for r in self._builds if r >= len(tokens) - at), default=max(self._builds))
            piece = tokens[at : at + rows]
            wanted = (1 << len(piece)) - 1 if logits == "all" else 0
            if logits == "last" and at + len(piece) == len(tokens):
                wanted = 1 << (len(piece) - 1)
            self.launch(rows, piece, start + at, wanted)
            pieces.append(self.finish(wanted))
            at += len(piece)
        return np.concatenate(pieces)

    def launch(self, rows: int, tokens: np.ndarray, start: int, wanted: int) -> None:
        """Queue one pass of the build for `rows` rows, without waiting for it; see PassArgs for `wanted`."""
        build, args = self._builds[rows], self._args
        args["pass"] = self._next_pass()
        args["exchange"] = build.exchange.data.ptr
        args["num_rows"] = len(tokens)
        args["logits_rows"] = wanted
        args["rows"]["token"][: len(tokens)] = tokens
        args["rows"]["position"][: len(tokens)] = np.arange(start, start + len(tokens))
        with self._on_device():
            build.kernel((build.blocks,), (build.threads,), (args,), shared_mem=build.shared_bytes)

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        """Makes this decoder's GPU the current one; what CUDA complains about becomes a DeviceError."""
        cuda = self._cupy.cuda
        try:
            with cuda.Device(self._ordinal):
                yield
        except (cuda.runtime.CUDARuntimeError, cuda.driver.CUDADriverError) as error:
            raise DeviceError(f"{self.device}: a pass failed ({error}); load the model again") from error

    def _next_pass(self) -> int:
        """A number whose tags no packet carries; before they run out every packet is wiped."""
        last = (2**32 - 1 - self.config.num_layers) // (self.config.num_layers + 1)
        if self._pass == last:
            self._check_status()
            with self._on_device():
                for build in self._builds.values():
                    build.exchange.fill(0)
                self._status.fill(0)
            self._pass = self._checked = 0
        self._pass += 1
        return self._pass

    def finish(self, wanted: int = 0) -> np.ndarray:
        """Wait for the queued passes, check how they went and fetch the last one's wanted rows of logits."""
        self._check_status()
        with self._on_device():
            rows = [row for row in range(wanted.bit_length()) if wanted >> row & 1]
            return self._logits[rows[0] : rows[-1] + 1].get() if rows else self._logits[:0].get()

    def _check_status(self) -> None:
        """Wait for the queued passes; GenerationError if one since the last check went wrong."""
        with self._on_device():
            status = self._status.get().view(STATUS)[0]
        first, self._checked = self._checked, self._pass
        if first < status["gave_up"] <= self._pass:
            layer, stage = divmod(int(status["stage"]), 8)
            seconds = self._args["spin_limit_ns"] / 1e9
            raise GenerationError(
                f"a wait on the device gave up after {seconds:g} s: layer {layer}, "
                f"{STAGE_NAMES[stage]}, block {status['block']}"
            )
        if first < status["non_finite"] <= self._pass:
            raise GenerationError("non-finite logits: finite numbers expected from every pass")

    def close(self) -> None:
        """Free all device memory of this decoder; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        for name in ("_layers", "_vectors", "_lm_head", "_embed", "_norm", "_rope", "_logits"):
            setattr(self, name, None)
        self._status = self.stage_times = self._args = self.key_cache = self.value_cache = None
        self._builds.clear()
        self._pool.free_all_blocks()
