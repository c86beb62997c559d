"""Compiles and loads the .cu files of this directory, which include the kernel's own headers."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from ffmini.errors import FFMiniError
from ffmini.kernel import compile_cubin, device_sources


def compile_tool(source: str, defines: dict[str, str], arch: str) -> tuple[bytes, str]:
    """What compile_cubin gives for `source` of this directory with the headers of cuda/."""
    text = (Path(__file__).parent / source).read_text(encoding="utf-8")
    return compile_cubin(defines, arch, source, dict(device_sources()) | {source: text})


def load_tool(cupy: ModuleType, cubin: bytes, path: Path) -> Any:
    """The CuPy module of `cubin`, written to the new file `path`, which must stay as long as it is used."""
    path.write_bytes(cubin)
    return cupy.RawModule(path=str(path), enable_cooperative_groups=True)


def device_arch(cupy: ModuleType) -> str:
    """The architecture of GPU 0, such as "sm_90"."""
    properties = cupy.cuda.runtime.getDeviceProperties(0)
    return f"sm_{properties['major']}{properties['minor']}"


def expected_errors(cupy: ModuleType) -> tuple[type[Exception], ...]:
    """What a tool reports in one line: what ffmini and the tool raise, and what CUDA complains about."""
    cuda = cupy.cuda
    return FFMiniError, ValueError, cuda.runtime.CUDARuntimeError, cuda.driver.CUDADriverError
