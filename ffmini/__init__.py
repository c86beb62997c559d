"""ffmini: language models in safetensors, one cooperative CUDA kernel per token, no PyTorch."""

from .errors import (
    BusyError,
    CheckpointError,
    DeviceError,
    FFMiniError,
    GenerationError,
    MemoryBudgetError,
    UnsupportedError,
)
from .generation import Completion, Timings, Usage
from .model import BatchStream, Model, Stream, generate, load

__version__ = "0.1.0"

__all__ = [
    "BatchStream",
    "BusyError",
    "CheckpointError",
    "Completion",
    "DeviceError",
    "FFMiniError",
    "GenerationError",
    "MemoryBudgetError",
    "Model",
    "Stream",
    "Timings",
    "UnsupportedError",
    "Usage",
    "__version__",
    "generate",
    "load",
]
