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
from .model import Completion, Model, Stream, generate, load

__version__ = "0.1.0"

__all__ = [
    "BusyError",
    "CheckpointError",
    "Completion",
    "DeviceError",
    "FFMiniError",
    "GenerationError",
    "MemoryBudgetError",
    "Model",
    "Stream",
    "UnsupportedError",
    "__version__",
    "generate",
    "load",
]
