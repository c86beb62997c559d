"""What tests of the simulated pass share: what it is run with, and what may get lost on the way."""

from __future__ import annotations

import numpy as np
from packets import packet_counts
from sim.driver import SimDecoder
from sim_cases import DEEP, random_cache

from ffmini.kernel import LISTED
from ffmini.layout import SEGMENT, TILE_ROWS, ceil_div

# The builds; the last one has the bulk ring.
BULK, COPY, INT8_KV_BUILD = "bulk ring", "copy ring", "int8 keys and values"


def fill_cache(decoder: SimDecoder, start: int = DEEP) -> None:
    for cache in (decoder.key_cache, decoder.value_cache):
        cache[...] = random_cache(cache.shape, start, decoder.vectors)


def deep_logits(decoder: SimDecoder, tokens: np.ndarray, chunk: int) -> np.ndarray:
    """The logits of `tokens` from position DEEP on, in passes of `chunk` rows."""
    fill_cache(decoder)
    pieces = [decoder.forward(tokens[i : i + chunk], DEEP + i, "all") for i in range(0, len(tokens), chunk)]
    return np.concatenate(pieces)


def lost_packets(decoder: SimDecoder) -> dict[str, int]:
    """Indices into the exchange: a packet of each kind of layer 1, the last hidden, a partial softmax.

    Of a build that splits parts also one of the last part of o_proj and of down_proj.
    """
    counts = packet_counts(decoder.config)
    starts = np.cumsum([0, *counts.values()])
    before = decoder.config.num_layers * starts[-1]
    places = {f"layer 1 {name}": starts[-1] + at for name, at in zip(counts, starts, strict=False)}
    places |= {"last hidden": before, "partial": before + counts["hidden"]}
    found = {name: int(decoder.rows * at) for name, at in places.items()}
    found["partial vector"] = found["partial"] + 1  # without the maximum and the sum
    end = int(decoder.build_info["exchange_packets"]) - 1
    for name, parts in reversed(split_parts(decoder).items()):
        of_part = ceil_div(decoder.config.hidden_size, TILE_ROWS) * 6
        end -= decoder.rows * parts * of_part
        found[f"{name} product"] = end + (parts - 1) * of_part
    return found


def split_parts(decoder: SimDecoder) -> dict[str, int]:
    """How many parts o_proj's and down_proj's input has, of those that the build splits."""
    config, most = decoder.config, int(decoder.defines["PART_SEGMENTS"])
    widths = {"o": config.num_heads * config.head_dim, "down": config.intermediate_size}
    parts = {name: ceil_div(ceil_div(width, SEGMENT), most) for name, width in widths.items()}
    splits = int(decoder.defines["SPLIT_PARTS"])
    return {name: count for name, count in parts.items() if splits and count > 1}


def lost_hand_overs(decoder: SimDecoder) -> dict[str, int]:
    """The same of what only a pass with candidates or an awaited token exchanges."""
    end = int(decoder.build_info["exchange_packets"])
    return {"token": end - 1, "list": end, "end of a list": end + LISTED - 1}
