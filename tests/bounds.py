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

from ffmini.cpu import silu
from ffmini.layout import SEGMENT, TILE_ROWS, MatrixLayout
from ffmini.packing import PackedModel, unpack_matrix, vector_offsets

UNIT = 2.0**-23
STEP = 20.5 * UNIT  # of a step's largest addend or partial sum
SLACK = 1.01  # the operands here may be a bf16 rounding away from the kernel's


def product_bound(x: np.ndarray, packed: np.ndarray, layout: MatrixLayout) -> np.ndarray:
    """The largest difference [R, rows] between two devices' W x + bias for activations x [R, cols].

    Integers are multiplied exactly; what follows is IEEE arithmetic in the same order on both sides. Of a
    matrix that adds to the residual stream it is the difference of all parts' sums together.
    """
    bound = np.zeros((len(x), layout.rows))
    if layout.format != "bf16":
        return bound
    w, x = unpack_matrix(packed, layout).astype(np.float64), x.astype(np.float64)
    total = np.zeros_like(bound)
    for begin in range(0, layout.cols, SEGMENT):  # an accumulator starts from zero in each
        part = np.zeros_like(bound)
        for at in range(begin, min(begin + SEGMENT, layout.cols), 32):
            block = np.arange(at, min(at + 32, layout.cols))
            for step in range(2):  # layout.py says which k a step takes
                k = block[block % 8 // 4 == step]
                products = x[:, None, k] * w[None, :, k]
                bound += STEP * (np.abs(part) + np.abs(products).sum(axis=2))  # no partial sum is larger
                part += products.sum(axis=2)
        total += np.abs(part)
        bound += 4 * UNIT * total  # the sum of segments and the bias: a rounding each on either side
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

    Products stay within product_bound, element by element, times the norm's scale. The residual stream is
    never fed: what it may be off by adds up over the layers. Activations and the weighed stream are
    roundings: that seldom do two of them fall to different sides. Attention rounds every probability and
    then itself: off by no more than one rounding in each element.
    """
    residual_bound = np.zeros_like(fed[0]["hidden"])
    for layer in range(packed.config.num_layers):
        sent, given, after = found[layer], fed[layer], fed[layer + 1]
        matrix, layout = packed.layers[layer].qkv_proj, packed.layouts["qkv_proj"]
        bound = normed_product_bound(given, "hidden", matrix, layout, packed)
        bias = _vector(packed, layer, "qkv_bias")  # comes after the scale of the norm
        before = np.abs(given["qkv"]) + (0 if bias is None else np.abs(bias))
        _check_floats(sent["qkv"], given["qkv"], bound + 4 * UNIT * before)
        assert error(sent["attention"], given["attention"]) <= FLIP, f"layer {layer}: attention"
        norm = _vector(packed, layer, "post_attention_layernorm")
        residual_bound += _added_bound(given["mid_hidden"] / norm, given["attention"], packed, layer, "o")
        _check_residual(sent, given, "mid_hidden", norm, residual_bound)
        _check_activation(sent["activation"], given, packed, layer)
        last = layer + 1 == packed.config.num_layers
        norm = packed.norm if last else _vector(packed, layer + 1, "input_layernorm")
        residual_bound += _added_bound(after["hidden"] / norm, given["activation"], packed, layer, "down")
        _check_residual(found[layer + 1], after, "hidden", norm, residual_bound)


def check_logits_sent(found: np.ndarray, expected: np.ndarray, last: Stage, packed: PackedModel) -> None:
    """Two devices' logits [R, vocab_size] of the same `last` stage, which holds the last hidden."""
    bound = normed_product_bound(last, "hidden", packed.lm_head, packed.layouts["lm_head"], packed)
    _check_floats(found, expected, bound + 4 * UNIT * np.abs(expected))


def normed_product_bound(
    given: Stage, name: str, matrix: np.ndarray, layout: MatrixLayout, packed: PackedModel
) -> np.ndarray:
    """product_bound of a residual stream as it was sent, times one over its root mean square."""
    return _norm_scale(given, name, packed) * product_bound(given[name], matrix, layout)


def _norm_scale(given: Stage, name: str, packed: PackedModel) -> np.ndarray:
    """One over the root mean square [R, 1] of a residual stream, from its tiles' sums of squares."""
    squares = given[f"{name}_squares"].astype(np.float64).sum(axis=1, keepdims=True)
    return 1 / np.sqrt(squares / packed.config.hidden_size + packed.config.rms_norm_eps)


def _vector(packed: PackedModel, layer: int, name: str) -> np.ndarray | None:
    offset, length = vector_offsets(packed.config).get(name, (0, 0))
    return packed.layers[layer].vectors[offset : offset + length] if length else None


def _added_bound(after: np.ndarray, x: np.ndarray, packed: PackedModel, layer: int, name: str) -> np.ndarray:
    """How far o_proj or down_proj (`name`: "o", "down") takes two residual streams [R, hidden_size] apart.

    A bias and then the parts of W x are added to the stream one after the other: each addition rounds once on
    either side. `after`: the stream behind the last one, to within a bf16 rounding.
    """
    matrix, layout = getattr(packed.layers[layer], f"{name}_proj"), packed.layouts[f"{name}_proj"]
    w, stream = unpack_matrix(matrix, layout).astype(np.float64), after
    bound, in_part = product_bound(x, matrix, layout), layout.part_segments * SEGMENT
    for begin in reversed(range(0, layout.cols, in_part)):
        bound += 2 * UNIT * np.abs(stream)
        stream = stream - x[:, begin : begin + in_part] @ w[:, begin : begin + in_part].T
    return bound if _vector(packed, layer, f"{name}_bias") is None else bound + 2 * UNIT * np.abs(stream)


def _check_floats(found: np.ndarray, expected: np.ndarray, bound: np.ndarray) -> None:
    worst = (np.abs(found.astype(np.float64) - expected) / bound).max()
    assert worst <= 1, f"{worst:.3g} times the bound"


def _check_rounded(found: np.ndarray, expected: np.ndarray, bound: np.ndarray) -> None:
    """bf16 roundings of values within `bound` of each other: seldom to different sides."""
    spacing = bf16_spacing(expected)
    _check_floats(found, expected, bound + spacing)
    different, likely = (found != expected).sum(), np.minimum(1.0, bound / spacing).sum()
    assert different <= likely + 4 * np.sqrt(likely), f"{different} differ, {likely:.1f} are likely"


def _check_residual(
    found: Stage, given: Stage, name: str, norm: np.ndarray, residual_bound: np.ndarray
) -> None:
    """The stream times `norm`, and its tiles' squares."""
    x = given[name] / norm  # to within a bf16 rounding
    _check_rounded(found[name], given[name], (residual_bound + UNIT * np.abs(x)) * np.abs(norm))
    tiles = -(-x.shape[1] // TILE_ROWS)
    slopes = np.zeros((len(x), tiles * TILE_ROWS))
    slopes[:, : x.shape[1]] = 2 * SLACK * np.abs(x) * residual_bound
    squares = given[f"{name}_squares"]
    bound = slopes.reshape(len(x), tiles, TILE_ROWS).sum(axis=2) + 8 * UNIT * squares + 1e-30
    _check_floats(found[f"{name}_squares"], squares, bound)


def _check_activation(found: np.ndarray, given: Stage, packed: PackedModel, layer: int) -> None:
    matrix, layout = packed.layers[layer].gate_up_proj, packed.layouts["gate_up_proj"]
    scale = _norm_scale(given, "mid_hidden", packed)
    gate_up = scale * (given["mid_hidden"] @ unpack_matrix(matrix, layout).T)
    bound = scale * product_bound(given["mid_hidden"], matrix, layout) + 4 * UNIT * np.abs(gate_up)
    bias = _vector(packed, layer, "gate_up_bias")
    if bias is not None:
        gate_up += bias
    bound = activation_bound(gate_up, bound)[:, : found.shape[1]]
    _check_rounded(found, given["activation"], bound)
