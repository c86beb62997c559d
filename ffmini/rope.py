"""Tables of the rotary embedding (Su et al., RoFormer, arXiv 2104.09864), computed in double precision."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from .config import ModelConfig


def rope_tables(
    config: ModelConfig, max_seq_len: int, dtype: type[np.floating] = np.float32
) -> tuple[np.ndarray, np.ndarray]:
    """(cos, sin), each `dtype` [max_seq_len, head_dim / 2], of the angles by which a head's pairs are turned.

    Row p turns elements (d, d + head_dim / 2) of a query or key at position p by p * frequency[d]. The
    attention factor of the scaling is multiplied in. Only the final rounding to `dtype` is not in double.
    """
    positions = np.arange(max_seq_len, dtype=np.float64)
    angles = positions[:, None] * rope_frequencies(config, max_seq_len)
    factor = attention_factor(config)
    return (factor * np.cos(angles)).astype(dtype), (factor * np.sin(angles)).astype(dtype)


def rope_frequencies(config: ModelConfig, max_seq_len: int) -> np.ndarray:
    """Radians per position of each pair: float64 [head_dim / 2], scaled as config.rope says."""
    return _FREQUENCIES[config.rope.type](config, max_seq_len)


def attention_factor(config: ModelConfig) -> float:
    """What cos and sin are multiplied by: 1, but for YaRN (arXiv 2309.00071, section 3.4).

    YaRN's is 0.1 ln(factor) + 1 unless attention_factor gives it. mscale and mscale_all_dim, if both are
    given, weigh the logarithm; the result is then the quotient of the two.
    """
    if config.rope.type != "yarn":
        return 1.0
    params = config.rope.params
    if params["attention_factor"] is not None:
        return params["attention_factor"]
    logarithm = 0.1 * math.log(params["factor"])
    mscale, mscale_all_dim = params["mscale"], params["mscale_all_dim"]
    if mscale and mscale_all_dim:
        return (mscale * logarithm + 1.0) / (mscale_all_dim * logarithm + 1.0)
    return logarithm + 1.0


def _base_frequencies(theta: float, head_dim: int) -> np.ndarray:
    """theta ** (-2 d / head_dim) for each pair d (arXiv 2104.09864, section 3.2.2)."""
    return theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def _default(config: ModelConfig, max_seq_len: int) -> np.ndarray:
    return _base_frequencies(config.rope.theta, config.head_dim)


def _linear(config: ModelConfig, max_seq_len: int) -> np.ndarray:
    """Position interpolation (Chen et al., arXiv 2306.15595): positions shrink by the factor."""
    return _base_frequencies(config.rope.theta, config.head_dim) / config.rope.params["factor"]


def _dynamic(config: ModelConfig, max_seq_len: int) -> np.ndarray:
    """Dynamic NTK scaling (arXiv 2309.00071, section 3.3): a larger base for longer contexts.

    transformers raises the base as the sequence grows, which would turn keys that are cached already. Here
    it is the base for a sequence of max_seq_len tokens from the first position on.
    """
    factor = config.rope.params["factor"]
    stretch = max(max_seq_len, config.max_position_embeddings) / config.max_position_embeddings
    exponent = config.head_dim / (config.head_dim - 2)
    theta = config.rope.theta * (factor * stretch - (factor - 1.0)) ** exponent
    return _base_frequencies(theta, config.head_dim)


def _llama3(config: ModelConfig, max_seq_len: int) -> np.ndarray:
    """Scaling by parts as in the reference code of Llama 3.1 (its report is arXiv 2407.21783).

    Frequencies that turn less than low_freq_factor times in the original context are divided by the
    factor, those that turn more than high_freq_factor times stay, those between are interpolated.
    """
    params = config.rope.params
    low, high = params["low_freq_factor"], params["high_freq_factor"]
    frequencies = _base_frequencies(config.rope.theta, config.head_dim)
    turns = params["original_max_position_embeddings"] * frequencies / (2.0 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / params["factor"]


def _yarn(config: ModelConfig, max_seq_len: int) -> np.ndarray:
    """YaRN's "NTK-by-parts" (Peng et al., arXiv 2309.00071, section 3.2), with a ramp over pairs, not turns.

    Pairs before the one that turns beta_fast times in the original context stay, pairs after the one that
    turns beta_slow times are divided by the factor; the two bounds are whole numbers if truncate is set.
    """
    params = config.rope.params
    head_dim, theta = config.head_dim, config.rope.theta

    def pair_that_turns(times: float) -> float:
        wavelength = params["original_max_position_embeddings"] / times
        return head_dim * math.log(wavelength / (2.0 * math.pi)) / (2.0 * math.log(theta))

    first, last = pair_that_turns(params["beta_fast"]), pair_that_turns(params["beta_slow"])
    if params["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    # The upper bound is head_dim - 1 although there are half as many pairs: so it was published.
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first or 0.001
    kept = 1.0 - np.clip((np.arange(head_dim // 2) - first) / width, 0.0, 1.0)
    frequencies = _base_frequencies(theta, head_dim)
    return kept * frequencies + (1.0 - kept) * frequencies / params["factor"]


_FREQUENCIES: dict[str, Callable[[ModelConfig, int], np.ndarray]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}
