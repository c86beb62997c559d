"""How far the sums of two devices may be from each other, derived from what mma.sync is known to do.

One m16n8k16 step adds 16 exact products and the accumulator. A device aligns the 17 addends to the largest,
keeps at least 24 bits of each, cuts the rest, and cuts the sum; sm_80 does so in two halves of 8 products.
So a step is off by at most 17 + 2 + 1 units of 2**-23 of its largest addend or partial sum; the simulator's,
rounded once, by half a unit. Between the steps is IEEE arithmetic in the same order on both sides: it carries
a difference on and adds a rounding on either side.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from comparison import FLIP, error

from ffmini.cpu import rms_norm, silu
from ffmini.layout import SEGMENT, MatrixLayout
from ffmini.numerics import round_bf16
from ffmini.packing import PackedModel, unpack_matrix, unpack_quantized, vector_offsets

UNIT = 2.0**-23
STEP = 20.5 * UNIT  # of a step's largest addend or partial sum
SLACK = 1.01  # the operands here may be a bf16 rounding away from the kernel's


def operands(packed: np.ndarray, layout: MatrixLayout) -> np.ndarray:
    """What mma multiplies by, times the scale that comes after it: float64 [rows, cols].

    For int4 the kernel multiplies by 16 + q and takes 16 + zero out by the sum of the activations.
    """
    if layout.format != "int4":
        return unpack_matrix(packed, layout).astype(np.float64)
    quantized = unpack_quantized(packed.reshape(layout.tiles, layout.tile_bytes), layout)
    scales = np.repeat(quantized.scale.astype(np.float64), layout.group_size, axis=1)
    return ((quantized.codes + 16.0) * scales[:, : layout.cols])[: layout.rows]


def product_bound(x: np.ndarray, packed: np.ndarray, layout: MatrixLayout) -> np.ndarray:
    """The largest difference [R, rows] between two devices' W x + bias for activations x [R, cols]."""
    w, x = operands(packed, layout), x.astype(np.float64)
    run = SEGMENT if layout.format == "bf16" else layout.group_size
    bound = np.zeros((len(x), layout.rows))
    total = np.zeros_like(bound)
    for begin in range(0, layout.cols, run):  # an accumulator starts from zero in each
        part = np.zeros_like(bound)
        for at in range(begin, min(begin + run, layout.cols), 32):
            block = np.arange(at, min(at + 32, layout.cols))
            for step in range(2):  # layout.py says which k a step takes
                k = block[block % 8 // 4 == step]
                products = x[:, None, k] * w[None, :, k]
                bound += STEP * (np.abs(part) + np.abs(products).sum(axis=2))  # no partial sum is larger
                part += products.sum(axis=2)
        total += np.abs(part)
        bound += 4 * UNIT * total  # scale, zero, the sum of segments, bias: a rounding each on either side
    return SLACK * bound


def activation_bound(gate_up: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """The largest difference [R, tiles * 8] of silu(gate) * up, unrounded.

    `gate_up` [R, tiles * 16] in packed order and what it may be off by. 1.1 is silu's steepest slope; the
    exponential is off by 2 units on either side, the quotient and the product by half a unit each.
    """
    (gate, up), (gate_bound, up_bound) = (
        x.reshape(len(x), -1, 2, 8).transpose(2, 0, 1, 3).reshape(2, len(x), -1) for x in (gate_up, bound)
    )
    value = np.abs(silu(gate) * up)
    return 1.1 * gate_bound * np.abs(up) + np.abs(silu(gate)) * up_bound + 8 * UNIT * value


def bf16_spacing(x: np.ndarray) -> np.ndarray:
    """The distance between neighbouring bf16 numbers at x."""
    return 2.0 ** (np.frexp(x)[1] - 8.0)


Stage = Mapping[str, np.ndarray]


def check_sent(found: list[Stage], fed: list[Stage], packed: PackedModel) -> None:
    """What each stage sent (packets.stages) against `fed`: what another device's sent, which it was fed with.

    Products and residuals stay within product_bound, element by element. Activations are roundings of values
    within activation_bound: that seldom do two of them fall to different sides. Attention rounds every
    probability and then itself: off by no more than one rounding in each element.
    """
    residual_bound = np.zeros_like(fed[0]["hidden"])  # the blocks' own residual is never fed again
    for layer in range(packed.config.num_layers):
        sent, given, after = found[layer], fed[layer], fed[layer + 1]["hidden"]
        weights, layouts = packed.layers[layer], packed.layouts
        y = _normed(packed, given["hidden"], layer, "input_layernorm")
        _check_floats(sent["qkv"], given["qkv"], product_bound(y, weights.qkv_proj, layouts["qkv_proj"]))
        assert error(sent["attention"], given["attention"]) <= FLIP, f"layer {layer}: attention"
        residual_bound += product_bound(given["attention"], weights.o_proj, layouts["o_proj"])
        residual_bound += 2 * UNIT * np.abs(given["mid_hidden"])
        _check_floats(sent["mid_hidden"], given["mid_hidden"], residual_bound)
        _check_activation(sent["activation"], given, packed, layer)
        residual_bound += product_bound(given["activation"], weights.down_proj, layouts["down_proj"])
        residual_bound += 2 * UNIT * np.abs(after)
        _check_floats(found[layer + 1]["hidden"], after, residual_bound)


def check_logits_sent(
    found: np.ndarray, expected: np.ndarray, hidden: np.ndarray, packed: PackedModel
) -> None:
    """Two devices' logits [R, vocab_size] of the same last `hidden` [R, hidden_size]."""
    y = round_bf16(rms_norm(hidden, packed.norm, packed.config.rms_norm_eps))
    _check_floats(found, expected, product_bound(y, packed.lm_head, packed.layouts["lm_head"]))


def _vector(packed: PackedModel, layer: int, name: str) -> np.ndarray | None:
    offset, length = vector_offsets(packed.config).get(name, (0, 0))
    return packed.layers[layer].vectors[offset : offset + length] if length else None


def _normed(packed: PackedModel, x: np.ndarray, layer: int, norm: str) -> np.ndarray:
    return round_bf16(rms_norm(x, _vector(packed, layer, norm), packed.config.rms_norm_eps))


def _check_floats(found: np.ndarray, expected: np.ndarray, bound: np.ndarray) -> None:
    worst = (np.abs(found.astype(np.float64) - expected) / bound).max()
    assert worst <= 1, f"{worst:.3g} times the bound"


def _check_activation(found: np.ndarray, given: Stage, packed: PackedModel, layer: int) -> None:
    matrix, layout = packed.layers[layer].gate_up_proj, packed.layouts["gate_up_proj"]
    y = _normed(packed, given["mid_hidden"], layer, "post_attention_layernorm")
    gate_up = y @ unpack_matrix(matrix, layout).T
    bias = _vector(packed, layer, "gate_up_bias")
    if bias is not None:
        gate_up += bias
    bound = activation_bound(gate_up, product_bound(y, matrix, layout))
    expected, bound = given["activation"], bound[:, : found.shape[1]]
    spacing = bf16_spacing(expected)
    _check_floats(found, expected, bound + spacing)
    different, likely = (found != expected).sum(), np.minimum(1.0, bound / spacing).sum()
    assert different <= likely + 4 * np.sqrt(likely), f"{different} differ, {likely:.1f} are likely"
