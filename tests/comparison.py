"""How far a kernel's numbers may be from the CPU path's: one measure for the GPU and the simulated device."""

from __future__ import annotations

import numpy as np

from ffmini.cpu import CPUDecoder
from ffmini.numerics import from_bf16

# Per stage, fed with the same input, norm over norm. A bf16 rounding of a normed input may fall to the other
# side when the sum of squares is added in another order: FLIP is what one such element is worth.
BF16_TOLERANCE = 4e-3
FP32_TOLERANCE = 1e-5
FLIP = 2.0**-8
WHOLE_MODEL = 1.5  # times the error that the CPU path itself has against float64


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """The norm of the difference over the norm of `expected`; NaN if anything is NaN."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def share_cache(oracle: CPUDecoder, key_cache: np.ndarray, value_cache: np.ndarray, start: int) -> None:
    """Give the oracle a kernel's keys and values below position `start`.

    Both caches are bf16 bits [num_layers, num_kv_heads, positions, head_dim].
    """
    for target, bits in ((oracle.key_cache, key_cache), (oracle.value_cache, value_cache)):
        target[:, :, :start] = from_bf16(bits[:, :, :start])
        target[:, :, start:] = 1e30  # finite, and seen if anything reads it before it is written


def check_stages(
    found: list[dict[str, np.ndarray]], oracle: CPUDecoder, tokens: np.ndarray, start: int
) -> None:
    """Each stage of a pass against the oracle, which is fed with the stage's own input.

    The pass ran `tokens` from position `start` on; `found` is its packets.stages. The oracle's cache must
    hold what the kernel's held before the pass (share_cache); it is advanced.
    """
    config, positions = oracle.config, np.arange(start, start + len(tokens))
    flips = 3 * FLIP / np.sqrt(config.hidden_size)
    assert error(found[0]["hidden"], oracle.embed(tokens)) <= FP32_TOLERANCE, "embed"
    for layer in range(config.num_layers):
        stage, x = found[layer], found[layer]["hidden"]
        expected = {
            "qkv": (oracle.norm_qkv(layer, x), FP32_TOLERANCE + flips),
            "attention": (oracle.attention(layer, stage["qkv"], positions), BF16_TOLERANCE),
            "mid_hidden": (oracle.o_proj(layer, stage["attention"], x), FP32_TOLERANCE),
            "activation": (oracle.norm_gate_up(layer, stage["mid_hidden"]), BF16_TOLERANCE),
        }
        for name, (value, tolerance) in expected.items():
            assert error(stage[name], value) <= tolerance, f"layer {layer}, {name}"
        after = oracle.down_proj(layer, stage["activation"], stage["mid_hidden"])
        assert error(found[layer + 1]["hidden"], after) <= FP32_TOLERANCE, f"layer {layer}, down_proj"


def check_logits(packed_error: float, own_error: float) -> None:
    """The kernel's error against float64 beside the CPU path's own; both are printed."""
    print(f"relative error of the logits: kernel {packed_error:.2e}, CPU path {own_error:.2e}")
    assert packed_error <= WHOLE_MODEL * own_error
