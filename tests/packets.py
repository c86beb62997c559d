"""Reads what the blocks of a pass told each other (cuda/exchange.cuh) back into arrays, stage by stage."""

from __future__ import annotations

import numpy as np

from ffmini.config import ModelConfig
from ffmini.layout import TILE_ROWS, ceil_div
from ffmini.numerics import from_bf16

PACKET = np.dtype([("words", "<u4", (3,)), ("tag", "<u4")])


def packet_counts(config: ModelConfig) -> dict[str, int]:
    """Packets of one row, by stage, in the order in which a layer's stages lie."""
    hidden = ceil_div(config.hidden_size, TILE_ROWS) * 3
    qkv_size = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return {
        "hidden": hidden,
        "qkv": ceil_div(qkv_size, TILE_ROWS) * 6,
        "attention": config.num_heads * ceil_div(config.head_dim, 6),
        "mid_hidden": hidden,
        "activation": ceil_div(config.intermediate_size, 8) * 2,
    }


def kept_packets(config: ModelConfig, rows: int) -> int:
    """Packets of a build for `rows` rows that no later layer overwrites: no partial results."""
    counts = packet_counts(config)
    return rows * (config.num_layers * sum(counts.values()) + counts["hidden"])


def stages(
    exchange: np.ndarray, config: ModelConfig, rows: int, num_rows: int
) -> list[dict[str, np.ndarray]]:
    """Per layer: name -> float32 [num_rows, size]; one more entry holds the last hidden.

    hidden and mid_hidden are the residual stream times the norm's weight, with the sums of the stream's
    squares per tile of 16 in hidden_squares and mid_hidden_squares.

    `exchange`: the packets of a build for `rows` rows (PACKET) after a pass of `num_rows` rows.
    """
    layers, at = [], 0
    for layer in range(config.num_layers + 1):
        stage = {}
        for name, count in packet_counts(config).items():
            if layer == config.num_layers and name != "hidden":
                break
            packets = exchange[at : at + rows * count].reshape(rows, count)[:num_rows]
            if name.endswith("hidden"):
                stage[name], stage[f"{name}_squares"] = _decode_hidden(packets, config)
            else:
                stage[name] = _decode(packets, name, config)
            at += rows * count
        layers.append(stage)
    return layers


def _decode_hidden(packets: np.ndarray, config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Sixteen bf16 and a float in three packets: float32 [rows, hidden_size] and [rows, tiles]."""
    words = np.ascontiguousarray(packets["words"]).reshape(len(packets), -1, 9)
    values = from_bf16(np.ascontiguousarray(words[:, :, :8]).view(np.uint16)).reshape(len(packets), -1)
    return values[:, : config.hidden_size], np.ascontiguousarray(words[:, :, 8]).view(np.float32)


def _decode(packets: np.ndarray, name: str, config: ModelConfig) -> np.ndarray:
    words = np.ascontiguousarray(packets["words"])
    rows = len(packets)
    if name == "attention":  # six bf16 to a packet
        values = from_bf16(words.view(np.uint16)).reshape(rows, config.num_heads, -1)
        return values[:, :, : config.head_dim].reshape(rows, -1)
    if name == "activation":  # four bf16 to a packet
        values = from_bf16(words.view(np.uint16))[:, :, :4].reshape(rows, -1)
        return values[:, : config.intermediate_size]
    # qkv: eight floats in three packets
    size = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return words.view(np.float32).reshape(rows, -1, 9)[:, :, :8].reshape(rows, -1)[:, :size]
