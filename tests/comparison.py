"""How far a kernel's numbers may be from the CPU path's: one measure for the GPU and the simulated device."""

from __future__ import annotations

import numpy as np

from ffmini.candidates import Candidates, Query
from ffmini.cpu import CPUDecoder
from ffmini.gpu import GPUDecoder
from ffmini.kernel import LISTED
from ffmini.layout import KEY_ROTATION, TILE_ROWS, VALUE_ROTATION, VectorLayout, ceil_div
from ffmini.numerics import from_bf16, split_vectors
from ffmini.passes import Work

# Per stage, fed with the same input, norm over norm. A bf16 rounding of a normed input may fall to the other
# side when the sum of squares is added in another order: FLIP is what one such element is worth.
BF16_TOLERANCE = 4e-3
FP32_TOLERANCE = 1e-5
FLIP = 2.0**-8
WHOLE_MODEL = 1.5  # times the error that the CPU path itself has against float64


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """The norm of the difference over the norm of `expected`; NaN if anything is NaN."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of float32 are the same to the bit."""
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


def share_cache(oracle: CPUDecoder, key_cache: np.ndarray, value_cache: np.ndarray, start: int) -> None:
    """Give the oracle a kernel's keys and values below position `start`.

    Both caches are as the kernel has them, [num_layers, num_kv_heads, positions, cached_size], from position
    0 on, of the oracle's kv_dtype.
    """
    layout = VectorLayout(oracle.config.head_dim, oracle.kv_dtype)
    for target, scale, cached, rotation in (
        (oracle.key_cache, oracle.key_scale, key_cache, KEY_ROTATION),
        (oracle.value_cache, oracle.value_scale, value_cache, VALUE_ROTATION),
    ):
        plain = layout.to_plain(cached[:, :, :start], rotation)
        target[:, 0, :, start:] = 1e30  # finite, and seen if anything reads it before it is written
        if oracle.kv_dtype == "bf16":
            target[:, 0, :, :start] = from_bf16(plain)
        else:
            target[:, 0, :, :start], scale[:, 0, :, :start] = split_vectors(plain)


def values_of(plain: np.ndarray, kv_dtype: str) -> np.ndarray:
    """The numbers, float32 [..., head_dim], that plain vectors stand for."""
    if kv_dtype == "bf16":
        return from_bf16(plain)
    codes, scale = split_vectors(plain)
    return codes * scale[..., None]


def check_stages(
    found: list[dict[str, np.ndarray]], oracle: CPUDecoder, tokens: np.ndarray, start: int
) -> np.ndarray:
    """Each stage of a pass against the oracle, which is fed with the stage's own input.

    The residual stream itself is not exchanged: the oracle adds up its own from the kernel's activations, and
    the last of it, x [R, hidden_size], is returned.

    The pass ran `tokens` from position `start` on; `found` is its packets.stages. The oracle's cache must
    hold what the kernel's held before the pass (share_cache); it is advanced.
    """
    config, positions = oracle.config, np.arange(start, start + len(tokens))
    flips = 3 * FLIP / np.sqrt(config.hidden_size)
    x = oracle.embed(tokens)
    for layer in range(config.num_layers):
        stage, norms = found[layer], oracle._layers[layer].vectors
        check_residual(stage, "hidden", x, norms["input_layernorm"], f"layer {layer}, hidden")
        qkv, attention = oracle.norm_qkv(layer, x), oracle.attention(layer, stage["qkv"], positions)
        assert error(stage["qkv"], qkv) <= FP32_TOLERANCE + flips, f"layer {layer}, qkv"
        assert error(stage["attention"], attention) <= BF16_TOLERANCE, f"layer {layer}, attention"
        x = oracle.o_proj(layer, stage["attention"], x)
        check_residual(stage, "mid_hidden", x, norms["post_attention_layernorm"], f"layer {layer}, o_proj")
        activation = oracle.norm_gate_up(layer, x)
        assert error(stage["activation"], activation) <= BF16_TOLERANCE, f"layer {layer}, activation"
        x = oracle.down_proj(layer, stage["activation"], x)
    check_residual(found[-1], "hidden", x, oracle._norm, "the last hidden")
    return x


def check_residual(
    stage: dict[str, np.ndarray], name: str, x: np.ndarray, norm: np.ndarray, what: str
) -> None:
    """A stage's residual stream, times the norm's weight, and its squares against the oracle's x [R, n]."""
    assert error(stage[name], x * norm) <= BF16_TOLERANCE, what
    padded = np.zeros((len(x), ceil_div(x.shape[1], TILE_ROWS) * TILE_ROWS), x.dtype)
    padded[:, : x.shape[1]] = x
    squares = np.square(padded).reshape(len(x), -1, TILE_ROWS).sum(axis=-1)
    assert error(stage[f"{name}_squares"], squares) <= 2 * FP32_TOLERANCE, what


def ask(
    decoder: CPUDecoder | GPUDecoder, tokens: np.ndarray, start: int, asked: Query, ahead: bool = False
) -> Candidates:
    """What the decoder says of `tokens` [R] at positions start .. start + R - 1."""
    decoder.begin([Work(0, tokens, start, (asked,))], ahead)
    [[said]] = decoder.candidates()
    return said


def check_logits(packed_error: float, own_error: float) -> None:
    """The kernel's error against float64 beside the CPU path's own; both are printed."""
    print(f"relative error of the logits: kernel {packed_error:.2e}, CPU path {own_error:.2e}")
    assert packed_error <= WHOLE_MODEL * own_error


def query(ids: np.ndarray | list[int], temperature: float = 1.0) -> Query:
    """`ids` queried, the others at `temperature`."""
    return Query(np.asarray(ids, np.int32), np.float32(1 / temperature))


def flat(found: Candidates) -> np.ndarray:
    """All that a pass says of a row, as float32 [n]."""
    parts = (found.fetch(), found.queried, found.ids, found.logits, [found.total, found.complete])
    return np.concatenate([np.asarray(part, np.float32) for part in parts])


def check_candidates(found: Candidates, logits: np.ndarray, ids: np.ndarray, temperature: float) -> None:
    """`found` is what NumPy makes of all the row's `logits`, `ids` queried."""
    others = np.setdiff1d(np.arange(len(logits)), ids)
    order, count = others[np.lexsort((others, -logits[others]))], len(found.ids)
    assert count >= min(LISTED, len(others)) and found.complete == (count == len(others))
    assert np.array_equal(found.ids, order[:count])
    assert np.array_equal(found.logits, logits[order[:count]])
    assert np.array_equal(found.queried, logits[ids]) and np.array_equal(found.fetch(), logits)
    if len(others) == 0:
        assert found.total == 0
        return
    exact = np.exp((logits[others].astype(np.float64) - logits[order[0]]) * np.float32(1 / temperature)).sum()
    assert abs(found.total - exact) <= 1e-5 * exact
