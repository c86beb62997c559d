"""The exceptions of ffmini: each carries one line that says what was expected and what was found."""

from __future__ import annotations


class FFMiniError(Exception):
    """Base of every error that ffmini raises on purpose."""


class CheckpointError(FFMiniError, ValueError):
    """A model file is damaged, incomplete or says something impossible."""


class UnsupportedError(FFMiniError, ValueError):
    """The model is well-formed, but asks for something that ffmini does not do."""


class DeviceError(FFMiniError, RuntimeError):
    """The GPU, its driver or the compiler can't do what was asked."""


class MemoryBudgetError(DeviceError, MemoryError):
    """Weights, KV cache and scratch need more memory than is free."""


NON_FINITE_LOGITS = "non-finite logits: finite numbers expected from every pass"


class GenerationError(FFMiniError, RuntimeError):
    """A pass failed: non-finite logits, or a wait on the device that gave up."""


class BusyError(FFMiniError, RuntimeError):
    """A stream of this model is still open."""
