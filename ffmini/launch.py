"""CuPy's end of the kernels: which GPU can run them, what is loaded of them, how they are launched.

CuPy is imported on first use, so this module can be imported anywhere.
"""

from __future__ import annotations

from types import ModuleType, TracebackType

import numpy as np

from .errors import DeviceError
from .kernel import (
    BUILD_INFO,
    CHUNK_ARGS,
    CHUNK_INFO,
    CHUNK_KERNEL_NAME,
    KERNEL_NAME,
    MAX_BLOCKS,
    PASS_ARGS,
    cached_cubin,
)

PACKET_BYTES = 16


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


class OnDevice:
    """While it is entered a GPU is the current one; what CUDA complains about becomes a DeviceError.

    Most often the GPU is the current one already, which the driver tells by its context, much faster than the
    runtime makes it so. The context says too whether the thread has begun to use the GPU.
    """

    def __init__(self, cupy: ModuleType, ordinal: int, context: int) -> None:
        self._cuda, self._ordinal, self._context = cupy.cuda, ordinal, context
        self._previous: int | None = None

    def __enter__(self) -> None:
        if self._cuda.driver.ctxGetCurrent() != self._context:
            self._previous = self._cuda.runtime.getDevice()
            self._cuda.runtime.setDevice(self._ordinal)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        cuda = self._cuda
        if self._previous is not None:
            cuda.runtime.setDevice(self._previous)
        if isinstance(error, (cuda.runtime.CUDARuntimeError, cuda.driver.CUDADriverError)):
            raise DeviceError(
                f"cuda:{self._ordinal}: a pass failed ({error}); load the model again"
            ) from error


def read_global(cupy: ModuleType, module: object, name: str, dtype: np.dtype) -> np.ndarray:
    """The value of type `dtype` that the loaded `module` calls `name`."""
    value = np.zeros((), dtype=dtype)
    pointer = module.get_global(name)  # type: ignore[attr-defined]
    cupy.cuda.runtime.memcpy(
        value.ctypes.data, pointer.ptr, dtype.itemsize, cupy.cuda.runtime.memcpyDeviceToHost
    )
    return value


def pinned_array(cupy: ModuleType, shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
    """Memory of the host that the device may use at the same address, as CUDA maps all pinned memory.

    It is freed with the last array that lies there.
    """
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = cupy.cuda.PinnedMemoryPointer(
        cupy.cuda.PinnedMemory(nbytes, cupy.cuda.runtime.hostAllocMapped), 0
    )
    return np.frombuffer(memory, np.uint8, nbytes).view(dtype).reshape(shape)


class _Kernel:
    """One kernel of one build, loaded. `defines`: see kernel_defines; `blocks`: the size of its grid."""

    def __init__(
        self, cupy: ModuleType, defines: dict[str, str], arch: str, source: str, name: str, blocks: int
    ) -> None:
        self.module = cupy.RawModule(
            path=str(cached_cubin(defines, arch, source)), enable_cooperative_groups=True
        )
        self._kernel = self.module.get_function(name)
        self._function: int = self._kernel.kernel.ptr  # the driver's
        self.blocks = blocks
        self.threads = self.shared_bytes = 0

    def fit(self, cupy: ModuleType, info: np.ndarray, args: np.dtype, multiprocessors: int) -> None:
        """Take the launch's sizes from the build's `info`; DeviceError if it can't be launched like that."""
        self.threads, self.shared_bytes = int(info["threads"]), int(info["shared_bytes"])
        if int(info["args_bytes"]) != args.itemsize:
            raise DeviceError(
                f"kernel arguments: the host has {args.itemsize} bytes, the kernel {info['args_bytes']}"
            )
        self._kernel.max_dynamic_shared_size_bytes = self.shared_bytes
        resident = multiprocessors * cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(
            self._function, self.threads, self.shared_bytes
        )
        if self.blocks > resident:
            raise DeviceError(
                f"{self.blocks} blocks of {self.threads} threads and {self.shared_bytes} bytes of shared "
                f"memory must be resident together, found room for {resident}"
            )
        if self.blocks > MAX_BLOCKS:
            raise DeviceError(f"a grid of at most {MAX_BLOCKS} blocks expected, found {self.blocks}")

    def launch(self, cupy: ModuleType, params: np.ndarray) -> None:
        """Queue a launch; `params` uint64 [1] points to its argument. By the driver: CuPy's way is slower."""
        cuda = cupy.cuda
        cuda.driver.launchCooperativeKernel(
            self._function,
            *(self.blocks, 1, 1),
            *(self.threads, 1, 1),
            self.shared_bytes,
            cuda.get_current_stream().ptr,
            params.ctypes.data,
        )


class PassBuild(_Kernel):
    """The pass compiled for one number of rows, with the packets that its blocks exchange."""

    def __init__(
        self, cupy: ModuleType, defines: dict[str, str], arch: str, blocks: int, multiprocessors: int
    ) -> None:
        super().__init__(cupy, defines, arch, "ffmini.cu", KERNEL_NAME, blocks)
        info = read_global(cupy, self.module, "ffmini_build_info", BUILD_INFO)
        self.rows = int(defines["ROWS"])
        self.ring_slots = int(info["ring_slots"])
        self.marks = int(info["marks"])
        packets = int(info["exchange_packets"]) + blocks * int(info["block_packets"])
        self.scratch_bytes = packets * PACKET_BYTES
        self.exchange = None
        self.fit(cupy, info, PASS_ARGS, multiprocessors)

    def allocate(self, cupy: ModuleType) -> None:
        self.exchange = cupy.zeros(self.scratch_bytes, dtype=cupy.uint8)


class ChunkBuild(_Kernel):
    """The kernel of many rows, with its scratch memory and the argument of its launches."""

    def __init__(
        self, cupy: ModuleType, defines: dict[str, str], arch: str, blocks: int, multiprocessors: int
    ) -> None:
        super().__init__(cupy, defines, arch, "chunk.cu", CHUNK_KERNEL_NAME, blocks)
        info = read_global(cupy, self.module, "ffmini_chunk_info", CHUNK_INFO)
        self.scratch_bytes = int(info["scratch_bytes"])
        self._row_bytes = 4 * int(info["residual_size"])
        self._meetings = int(info["meetings"]) if defines["STAGE_TIMES"] == "1" else 0
        self.args = np.zeros((), CHUNK_ARGS)
        self._params = np.array([self.args.ctypes.data], np.uint64)
        self.fit(cupy, info, CHUNK_ARGS, multiprocessors)

    def allocate(self, cupy: ModuleType) -> None:
        self._scratch = cupy.zeros(self.scratch_bytes, dtype=cupy.uint8)
        self._arrived = cupy.zeros(1, dtype=cupy.uint32)
        self.stage_times = cupy.zeros((self._meetings, self.blocks), dtype=cupy.uint64)
        self.args["scratch"], self.args["arrived"] = self._scratch.data.ptr, self._arrived.data.ptr
        self.args["stage_times"] = self.stage_times.data.ptr

    def residual(self, row: int) -> int:
        """The address of what the last launch leaves of `row` after the last layer."""
        return int(self._scratch.data.ptr) + row * self._row_bytes

    def run(self, cupy: ModuleType, number: int, slot: int, start: int, tokens: np.ndarray) -> None:
        """Queue a launch as pass `number` for `tokens` [n], n <= CHUNK_ROWS, at positions from `start` on."""
        args = self.args
        args["pass"], args["slot"], args["start"], args["num_rows"] = number, slot, start, len(tokens)
        args["tokens"][: len(tokens)] = tokens
        runtime = cupy.cuda.runtime
        runtime.memsetAsync(self._arrived.data.ptr, 0, 4, cupy.cuda.get_current_stream().ptr)
        self.launch(cupy, self._params)
