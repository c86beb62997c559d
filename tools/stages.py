"""Where a pass's time goes: per stage the wait for its input and the work on it, against the bytes it reads.

    PYTHONPATH=. python3 tools/stages.py llama-3.1-8b int4 --layers 8
    PYTHONPATH=. python3 tools/stages.py llama-3.1-8b int4 --layers 2 --chunk 512 --position 0

A build of its own notes the GPU's global timer when thread 0 of each block passes a place. Where warps
receive their input by themselves, other warps than its own may still wait for theirs then. Needs a GPU.
"""

from __future__ import annotations

import argparse
from contextlib import closing
from time import perf_counter

import numpy as np

from ffmini.bench import SEED, fill_cache, random_model
from ffmini.config import parse_config
from ffmini.gpu import GPUDecoder
from ffmini.launch import why_unusable
from ffmini.packing import PackedModel
from ffmini.shapes import SHAPES

STAGES = ("norm_qkv", "attention", "o_proj", "norm_gate_up", "down_proj")
MATRICES = {
    "norm_qkv": "qkv_proj",
    "o_proj": "o_proj",
    "norm_gate_up": "gate_up_proj",
    "down_proj": "down_proj",
    "norm_lm_head": "lm_head",
}
PASSES = 200
# Between two meetings of a chunk's blocks; "align" only where activations become integers.
CHUNK_STAGES = (
    *("norm_qkv scales", "norm_qkv", "rotate", "attention", "o_proj align", "o_proj"),
    *("norm_gate_up scales", "norm_gate_up", "down_proj align", "down_proj"),
)


def stage_bytes(packed: PackedModel, stage: str, position: int) -> int:
    """Bytes of weights, or of keys and values, that a stage of one layer reads."""
    if stage in MATRICES:
        return packed.layouts[MATRICES[stage]].nbytes
    return 4 * packed.config.num_kv_heads * packed.config.head_dim * position


def time_passes(decoder: GPUDecoder, position: int, rows: int) -> float:
    """Microseconds per pass, of PASSES queued ones."""
    tokens = np.random.default_rng(SEED).integers(0, decoder.config.vocab_size, rows)
    for count in (10, PASSES):
        decoder.finish()
        began = perf_counter()
        for _ in range(count):
            decoder.launch(rows, tokens, position, 1)
        decoder.finish()
    return 1e6 * (perf_counter() - began) / PASSES


def stage_table(packed: PackedModel, times: np.ndarray, position: int) -> list[str]:
    """Lines of microseconds, means over the layers but the first.

    `times` [num_layers + 1, 2 marks per stage, blocks] in ns, 0 where a block was not; per stage: from the
    last block's end of the stage before to the mean block's having all input ("exchange"), then to the mean
    and the last block's end ("work", "last").
    """
    times = np.where(times == 0, np.nan, times.astype(np.float64) - times[times > 0].min()) / 1e3
    lines = [f"{'stage':14}{'exchange':>10}{'work':>8}{'last':>8}{'sum':>8}{'KB':>10}{'GB/s':>8}"]
    total = 0.0
    before = np.nanmax(times[:-2, -1], axis=-1)  # the end of the layer before
    for i, stage in enumerate((*STAGES, "norm_lm_head")):
        layers = times[1:-1] if stage in STAGES else times[-1:]
        if stage not in STAGES:
            before = np.nanmax(times[-2:-1, -1], axis=-1)
        begin, end = layers[:, 2 * i % 10], layers[:, 2 * i % 10 + 1]
        arrived, done = np.nanmean(begin, axis=-1), np.nanmax(end, axis=-1)
        exchange, last = float(np.mean(arrived - before)), float(np.mean(done - arrived))
        work = float(np.mean(np.nanmean(end, axis=-1) - arrived))
        nbytes, spent = stage_bytes(packed, stage, position), float(np.mean(done - before))
        lines.append(
            f"{stage:14}{exchange:>10.2f}{work:>8.2f}{last:>8.2f}{spent:>8.2f}{nbytes / 1e3:>10.0f}"
            f"{nbytes / spent / 1e3:>8.0f}"
        )
        total += spent if stage in STAGES else 0.0
        before = done
    return [*lines, f"a layer: {total:.2f} us"]


def chunk_table(times: np.ndarray, layers: int) -> list[str]:
    """Lines of microseconds, means over the layers but the first.

    `times` [meetings, blocks] in ns: when each block came; per stage: from the last block's coming to the
    meeting before to the mean block's coming to the next, and to the last block's.
    """
    times = times.astype(np.float64) / 1e3
    last, mean = times.max(axis=1), times.mean(axis=1)
    work, spent = ((end[1:] - last[:-1]).reshape(layers, -1)[1:].mean(axis=0) for end in (mean, last))
    stages = [name for name in CHUNK_STAGES if len(spent) == len(CHUNK_STAGES) or "align" not in name]
    lines = [f"{'stage':22}{'work':>8}{'last':>8}"]
    lines += [f"{name:22}{w:>8.1f}{s:>8.1f}" for name, w, s in zip(stages, work, spent, strict=True)]
    return [*lines, f"a layer: {spent.sum():.1f} us"]


def time_chunk(packed: PackedModel, rows: int, position: int) -> list[str]:
    """The table of a chunk of `rows` rows from `position` on, the last of three."""
    with closing(GPUDecoder(packed, position + rows, stage_times=True, progress=False)) as decoder:
        fill_cache(decoder, position)
        tokens = np.random.default_rng(SEED).integers(0, packed.config.vocab_size, rows)
        for _ in range(3):
            decoder.forward(tokens, position, "none")
        return chunk_table(decoder.chunk_times(), packed.config.num_layers)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time per stage inside the kernel.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("dtype", choices=("bf16", "int8", "int4"))
    parser.add_argument("--layers", type=int, help="of the shape's layers (default: all)")
    parser.add_argument("--position", type=int, default=128, help="of the pass, the cache before it filled")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--chunk", type=int, help="instead of passes a chunk of a prompt with so many rows")
    parser.add_argument("--cp-async", action="store_true", help="the ring of GPUs without bulk copies")
    args = parser.parse_args()
    if (reason := why_unusable()) is not None:
        raise SystemExit(f"stages: a GPU expected: {reason}")
    config = parse_config(SHAPES[args.shape], args.shape)
    layers = args.layers or config.num_layers
    config = config.first_layers(layers)
    packed = random_model(config, args.dtype)
    if args.chunk:
        print("\n".join(time_chunk(packed, args.chunk, args.position)))
        return
    for stage_times in (False, True):
        decoder = GPUDecoder(
            packed,
            args.position + args.rows,
            rows=(args.rows,),
            bulk_copies=False if args.cp_async else None,
            stage_times=stage_times,
            progress=False,
        )
        fill_cache(decoder, args.position)
        microseconds = time_passes(decoder, args.position, args.rows)
        what = "with notes" if stage_times else f"{args.shape} {args.dtype}, {layers} layers"
        print(f"{what}: {microseconds:.1f} us per pass, ring of {decoder.ring_slots} slots")
        if stage_times:
            print("\n".join(stage_table(packed, decoder.stage_times.get(), args.position)))
        decoder.close()


if __name__ == "__main__":
    main()
