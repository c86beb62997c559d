"""The chunk's own source on the simulated device: the bits of the simulated pass, under many schedules."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from comparison import same_bits
from sim.apart import NOT_FOUND, search
from sim.driver import EVENTS, SHARED_LIMIT, SimChunk, SimDecoder, SimError
from sim.mutations import (
    Change,
    Edit,
    barrier_change,
    change,
    count_barriers,
    find_barriers,
    mutable_source,
    place_after,
    sources_of,
    vote_change,
)
from sim_cases import (
    COVER,
    DEEP,
    LARGE_SHARED_LIMIT,
    MAX_SEQ_LEN,
    Case,
    case_tokens,
    make_packer,
    random_cache,
)

from ffmini.errors import GenerationError
from ffmini.kernel import chunk_scratch_bound
from ffmini.numerics import to_bf16
from ffmini.packing import PackedModel

Pack = Callable[[Case], PackedModel]
CHUNK_ROWS = 256  # two panels of columns, or four of a quantised model
SLOT = 1  # of two
# Builds of the cover, whose passes tests/test_sim.py compiles too, and bytes of shared memory for the chunk.
BUILDS = {
    ("llama_biases", "bf16"): SHARED_LIMIT,  # head_dim 8
    ("qwen2", "bf16"): SHARED_LIMIT,  # windows, head_dim 256: pieces of 16 positions; 200 columns
    ("qwen3", "int8"): LARGE_SHARED_LIMIT,  # norms of q and k, 7 heads to a KV head, head_dim 64
    ("llama2", "int8"): SHARED_LIMIT,  # groups of 128, head_dim 80
    ("llama3.1", "int8"): LARGE_SHARED_LIMIT,  # groups of 32, head_dim 128; 200 columns
    ("llama3.1", "int4"): SHARED_LIMIT,  # 16 heads to a KV head: two units
}
WGMMA_LIMIT = 227 * 1024  # of sm_90
MANY_SPLITS = Case(
    "qwen2",
    "int4",
    32,
    changes={
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "head_dim": 48,  # o_proj's input has two segments
        "intermediate_size": 40,
        "vocab_size": 64,
        "sliding_window": 4300,
    },
)
# With one segment to a part: two of o_proj's input, three of down_proj's.
IN_PARTS = Case(
    "llama_biases",
    "int4",
    64,
    changes={"num_hidden_layers": 2, "head_dim": 80, "intermediate_size": 600, "vocab_size": 64},
)
MANY_POSITIONS, FAR = 4700, 4602  # 19 blocks of positions: more than one run of them
SEEDS = range(1, 82)  # all combinations of policies


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return make_packer(lambda: tmp_path_factory.mktemp("checkpoint"))


class Said(NamedTuple):
    """What launches leave."""

    logits: np.ndarray
    keys: np.ndarray
    values: np.ndarray

    def is_same(self, other: Said) -> bool:
        caches = zip(self[1:], other[1:], strict=True)
        return same_bits(self.logits, other.logits) and all(np.array_equal(*pair) for pair in caches)


def balanced_cache(shape: tuple[int, ...], start: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of `shape` that make attention say in which order it adds; NaN from `start` on.

    Two neighbours have the same key and values that are neighbours in bf16, everywhere the same two: the
    weighted mean lies in the middle between them, and the rounding errors of the sums decide to which it is
    rounded. Every query sees some blocks of positions alone: their keys hide the others and what comes after.
    All vectors repeat every eight elements, whichever way they are rotated.
    """
    stream, repeats = np.random.default_rng(8), shape[-1] // 8
    position = np.arange(start)
    sign = stream.choice([-1, 1], start // 256 + 1)[position // 256]
    length = 40 * sign * (1 - 0.03 * stream.random(start)[position // 2])
    key, value = (np.tile(stream.standard_normal(8), repeats) for _ in range(2))
    keys, values = np.full(shape, 0xFFFF, np.uint16), np.full(shape, 0xFFFF, np.uint16)
    keys[..., :start, :] = to_bf16(np.outer(length, key).astype(np.float32))
    values[..., :start, :] = to_bf16(value.astype(np.float32)) + (position % 2)[:, None]
    return keys, values


class Both:
    """The two kernels of a model, which share its weights and its cache."""

    def __init__(
        self,
        packed: PackedModel,
        max_seq_len: int = MAX_SEQ_LEN,
        *,
        limit: int = SHARED_LIMIT,
        wgmma: bool = False,
        cuda: Path | None = None,
        coverage: bool = False,
        **options: Any,
    ) -> None:
        """`limit`: of the chunk's shared memory; `wgmma`: its build for sm_90; `options`: the pass's."""
        self.passes = SimDecoder(packed, max_seq_len, num_slots=2, **options)
        self.chunk = SimChunk(
            self.passes, rows=CHUNK_ROWS, shared_limit=limit, wgmma=wgmma, cuda=cuda, coverage=coverage
        )
        self.tokens = case_tokens(packed, CHUNK_ROWS)
        self.scratch_bound = chunk_scratch_bound(packed.config, packed.layouts, max_seq_len, CHUNK_ROWS)

    def run(
        self, kernel: SimDecoder | SimChunk, start: int, sizes: list[int], balanced: bool = False
    ) -> Said:
        """Launches of `sizes` rows one after the other from `start` on.

        What the cache holds before is random or balanced_cache().
        """
        caches = self.passes.key_cache, self.passes.value_cache
        shape = caches[0][:, SLOT].shape
        before = (random_cache(shape, start, self.passes.vectors),) * 2
        if balanced:
            before = balanced_cache(shape, start)
        for cache, filled in zip(caches, before, strict=True):
            cache.view(np.uint8)[...] = 0xFF
            cache[:, SLOT] = filled
        ends = list(itertools.accumulate(sizes))
        pieces = [
            kernel.forward(self.tokens[end - size : end], start + end - size, "all", SLOT)
            for end, size in zip(ends, sizes, strict=True)
        ]
        return Said(np.concatenate(pieces), *(cache.copy() for cache in caches))

    def check(self, start: int, runs: dict[tuple[int, int], list[int]], balanced: bool = False) -> None:
        """Chunks leave what passes leave; `runs`: (blocks, seed) -> their sizes."""
        assert self.chunk.info["scratch_bytes"] <= self.scratch_bound
        expected = self.run(self.passes, start, [sum(next(iter(runs.values())))], balanced)
        for (self.chunk.blocks, self.chunk.seed), sizes in runs.items():
            found = self.run(self.chunk, start, sizes, balanced)
            assert found.is_same(expected), (start, self.chunk.blocks, self.chunk.seed)


def both_of(
    pack: Pack,
    family: str,
    dtype: str,
    limit: int | None = None,
    wgmma: bool = False,
    cuda: Path | None = None,
    kv_dtype: str = "bf16",
) -> Both:
    """Those of BUILDS; `limit`: unless it is theirs."""
    index, build = next((i, b) for i, b in enumerate(COVER) if b[:2] == (family, dtype))
    return Both(
        pack(build.case()),
        limit=limit or BUILDS[family, dtype],
        wgmma=wgmma,
        cuda=cuda,
        rows=build.prompt[0],
        shared_limit=LARGE_SHARED_LIMIT if kv_dtype == "int8" else build.shared_limit,
        bulk_copies=index % 2 == 0,
        kv_dtype=kv_dtype,
    )


# ---- the numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
@pytest.mark.parametrize(("family", "dtype"), BUILDS)
def test_same_bits_as_passes(pack: Pack, family: str, dtype: str, kv_dtype: str) -> None:
    """Rows that see no cached positions, and up to three blocks of them; fewer rows after more."""
    both = both_of(pack, family, dtype, kv_dtype=kv_dtype)
    both.check(0, {(1, 28): [1, 17, 3]})
    both.check(247, {(3, 0): [11]})
    both.check(DEEP, {(2, 5): [5, 1]})


def test_rows_do_not_know_each_other(pack: Pack, unmutated: Both) -> None:
    """Which rows share a chunk does not matter, nor a panel of columns."""
    runs = {(3, 0): [130], (2, 3): [128, 2], (7, 4): [1, 129]}
    both_of(pack, "llama_biases", "bf16").check(100, runs)
    unmutated.check(100, {(3, 0): [67], (1, 5): [64, 3], (7, 28): [2, 65]})


def test_many_splits(unmutated: Both) -> None:
    """Partial softmaxes are merged in runs; of a window too, which begins in the second block."""
    unmutated.check(FAR, {(3, 5): [7], (1, 0): [3, 4]})
    unmutated.check(FAR, {(2, 0): [5]}, balanced=True)


# ---- schedules -----------------------------------------------------------------------------------------


def test_schedules(pack: Pack) -> None:
    """Lanes in any order, blocks and warps starved, arrivals and copies late."""
    both = both_of(pack, "llama_biases", "bf16")
    expected, seen = both.run(both.passes, DEEP, [5]), dict.fromkeys(EVENTS, 0)
    for both.chunk.seed in SEEDS[::4]:
        both.chunk.blocks = 2 + both.chunk.seed % 2
        assert both.run(both.chunk, DEEP, [5]).is_same(expected), both.chunk.seed
        seen = {name: seen[name] + (count > 0) for name, count in both.chunk.events().items()}
    assert min(seen.values()) >= 5, seen


def meetings(layers: int, integers: bool) -> list[int]:
    """Where each meeting of a chunk stands, as the status says it: 8 * layer + stage."""
    of_layer = [0, 1, 1, 2, 2, 3, 3, 4, 4, 8] if integers else [0, 1, 1, 2, 3, 3, 4, 8]
    return [0, *(8 * layer + stage for layer in range(layers) for stage in of_layer)]


@pytest.mark.parametrize("integers", [False, True])
def test_a_block_that_does_not_come(pack: Pack, unmutated: Both, integers: bool) -> None:
    """A deadlock is reported; where time passes all blocks leave, say where, and the next chunk is right."""
    both = unmutated if integers else both_of(pack, "llama_biases", "bf16")
    expected, chunk = both.run(both.chunk, 3, [5]), both.chunk
    places = meetings(both.passes.config.num_layers, integers)
    for meeting, place in enumerate(places):
        chunk.seed, chunk.blocks = meeting, 2 + meeting % 2
        chunk.lost_arrival = meeting * chunk.blocks + meeting % chunk.blocks
        with pytest.raises(SimError, match=r"deadlock: .*chunk.cu:\d+ for arrived \("):
            chunk.run(both.tokens[:5], 3, SLOT)
        chunk.give_up = True
        with pytest.raises(GenerationError, match="a wait gave up"):
            chunk.run(both.tokens[:5], 3, SLOT)
        assert both.passes.status["stage"] == place
        chunk.lost_arrival, chunk.give_up = None, False
    assert both.run(chunk, 3, [5]).is_same(expected)


# ---- that all this can fail ----------------------------------------------------------------------------


def chunk_edit(old: str, new: str, within: str = "") -> Edit:
    return Edit("chunk.cu", old, new, within)


def panel_edit(old: str, new: str, within: str = "") -> Edit:
    return Edit("panels.cuh", old, new, within)


def ring_edit(old: str, new: str, within: str = "") -> Edit:
    return Edit("panels_mma.cuh", old, new, within)


def attention_edit(old: str, new: str, within: str = "") -> Edit:
    return Edit("chunk_attention.cuh", old, new, within)


def vector_edit(old: str, new: str, within: str = "") -> Edit:
    return Edit("vectors.cuh", old, new, within)


BIAS_FIRST = "BIASED && part == 0"

MUTATIONS: dict[str, Edit] = {
    # Meetings.
    "a meeting awaits one block less": chunk_edit("met", "met - 1", "load_acquire_32(args.arrived) < met"),
    "a meeting awaits the first arrivals": chunk_edit("met += gridDim.x", "met = gridDim.x"),
    "a block arrives twice": chunk_edit("1", "2", "add_release_32(args.arrived, 1)"),
    # The ring.
    "a stage not waited for": ring_edit(
        "copy_async_wait<PANEL_STAGES - 2>()", "copy_async_wait<PANEL_STAGES - 1>()"
    ),
    "no group for a stage that is not there": ring_edit("copy_async_commit()", "void()"),
    "filling wraps a place early": ring_edit("++place_ == PANEL_STAGES", "++place_ == PANEL_STAGES - 1"),
    "filling wraps a place late": ring_edit("++place_ == PANEL_STAGES", "++place_ == PANEL_STAGES + 1"),
    "emptying wraps a place early": ring_edit("++place == PANEL_STAGES", "++place == PANEL_STAGES - 1"),
    "one stage less ahead": ring_edit("PANEL_STAGES - 1", "PANEL_STAGES - 2", "i < PANEL_STAGES - 1"),
    # Panels.
    "tiles that do not exist": ring_edit("M::TILES - 1", "M::TILES + 7"),
    "lines of the tile behind": panel_edit("M::TAIL_K % STAGE_K == 0", "true"),
    "one panel of columns": panel_edit("panel % columns_", "0"),
    "the first group's scales": panel_edit("k / M::GROUP", "0", "M::BITS == 16 ? 0 : k / M::GROUP"),
    "the first group's sum": panel_edit("group * operands.stride", "0"),
    "the first segment's power of two": panel_edit("segment * operands.stride", "0"),
    "segments added at the end": ring_edit("(k + STAGE_K) % SEGMENT == 0", "false"),
    # Rows.
    "another slot": chunk_edit("args.slot", "0", "num_slots + args.slot"),
    "rows from position 0 on": chunk_edit("args.start + row", "row", "position = args.start + row"),
    "values as keys are rotated": vector_edit("VALUE_ROTATION", "KEY_ROTATION", "position, VALUE_ROTATION)"),
    "planes of another row": chunk_edit("row % PANEL_ROWS * 32", "0"),
    "group sums of half a group": chunk_edit("offset < LANES", "offset < LANES / 2"),
    "a row's scale before it is there": chunk_edit(
        "chunk.args.num_rows", "chunk.args.num_rows - 1", "for_warps(chunk.args.num_rows, [&](int row)"
    ),
    "a segment left out": chunk_edit("first + i < M::SEGMENTS", "first + i < M::SEGMENTS - 1"),
    "a vector left out": chunk_edit("ceil_div(units, BATCH)", "units / BATCH"),
    # Attention.
    "keys as values are rotated": vector_edit("KEY_ROTATION", "VALUE_ROTATION", "turn, KEY_ROTATION)"),
    "a piece not waited for": attention_edit(
        "copy_async_wait<VECTOR_PLACES - 3>()", "copy_async_wait<VECTOR_PLACES - 2>()"
    ),
    "one piece more ahead": attention_edit("VECTOR_PLACES - 2", "VECTOR_PLACES - 1", "i < VECTOR_PLACES - 2"),
    "values in the place of keys": attention_edit("order_.is_value()", "true"),
    "what nobody sees counts": attention_edit("2 * t < KV_RUN && position < end_", "true"),
    "another block's maximum": attention_edit("block", "0", "row_head * MAX_SPLITS + block"),
    "no window": attention_edit("position >= first_[set]", "true"),
    "rows see what comes after them": attention_edit("position <= last_[set]", "last_[set] >= 0"),
    "blocks of positions not rescaled": attention_edit("exp2_approx(block_top[set] - top[set])", "1.0f"),
    "sums of all splits in one place": attention_edit("split % 32", "0"),
    "one run": attention_edit("(block + 1) % MERGE_RUN == 0", "false"),
    "a unit begins with the sums of the last": attention_edit(
        "merged_.sum[query][lane()] = 0.0f", "merged_.sum[query][lane()] += 0.0f"
    ),
}
INT8_KV_MUTATIONS: dict[str, Edit] = {  # of int8 keys and values
    "the largest of a lane for all": Edit("arithmetic.cuh", "warp_max(largest)", "largest"),
    "a key without its scale": vector_edit("scale(key) * SCORE_SCALE", "SCORE_SCALE"),
    "another key's scale": vector_edit("4 * column(c)", "column(c)"),
    "one scale for two values": vector_edit("scales[1]", "scales[0]", "* scales[1]"),
    "the first run's scales": attention_edit("(run * KV_RUN + own) * VECTOR_BYTES", "own * VECTOR_BYTES"),
    "the first tile twice": vector_edit("loaded[tile]", "loaded[0]"),
    "even codes twice": vector_edit("codes >> 8", "codes"),
    "pairs of dimensions out of order": vector_edit(
        "4 * (threadIdx.x % 4) + 2 * i", "2 * (threadIdx.x % 4) + 8 * i"
    ),
}
# To be found where inputs have several parts.
PART_MUTATIONS: dict[str, Edit] = {
    "a part ends with the matrix": ring_edit("(part + 1) * PART_K<M>", "M::K_PAD"),
    "a part begins with the matrix": ring_edit("part * PART_K<M>", "0", "int k = part * PART_K<M>"),
    "a part's sum not kept": chunk_edit("*residual(octet, half, which) = x", "x"),
    "bias with each part": chunk_edit(BIAS_FIRST, "BIASED"),
    "bias with the last part": chunk_edit(BIAS_FIRST, "BIASED && part + 1 == M::PARTS"),
    "no bias": chunk_edit(BIAS_FIRST, "false"),
    "the first part is the last": chunk_edit("part + 1 < M::PARTS", "part > 0"),
}
SOURCES = sources_of("chunk.cu")
WGMMA_SOURCES = {"panels_wgmma.cuh": SOURCES.pop("panels_wgmma.cuh")}  # of the build for sm_90 alone
BARRIERS = find_barriers(SOURCES)
# Barriers whose lack no schedule shows: the file, the end of what stands before one, and why.
UNSEEN = [
    # The next thing that the block does is to meet the others.
    ("panels_mma.cuh", "copy_async_wait<0>();\n"),
    # Shuffles or products make the lanes meet there; which memory they order is not simulated.
    ("chunk_attention.cuh", "*output(i) = 0.0f;\n        }\n"),
    ("chunk_attention.cuh", "find_top(ring, block, top);\n"),
    ("chunk_attention.cuh", "void finish(Store store) const {\n"),
]
SEEN = [place for place in BARRIERS if place not in {place_after(SOURCES, *barrier) for barrier in UNSEEN}]
VOTES = [place for place, match in BARRIERS.items() if match["vote"] is not None]
MEETING = re.compile(r"(?<=!)chunk\.meet\(where_of\([^()]*\)\)")
MEETINGS = {
    f"no meeting {i}": [("chunk.cu", *match.span(), "true")]
    for i, match in enumerate(MEETING.finditer(SOURCES["chunk.cu"]))
}
LEAVING = {f"vote {place}": [vote_change(place, BARRIERS[place])] for place in VOTES}
FOUND: dict[str, list[Change]] = {
    **{name: [change(SOURCES, edit)] for name, edit in MUTATIONS.items()},
    **MEETINGS,
    "no meeting of layers": [
        change(SOURCES, chunk_edit("chunk.meet(where_of(layer + 1, STAGE_QKV))", "true"))
    ],
    **{f"no barrier {place}": [barrier_change(place, BARRIERS[place])] for place in SEEN},
}
INT8_KV_FOUND = {f"int8: {name}": [change(SOURCES, edit)] for name, edit in INT8_KV_MUTATIONS.items()}
IN_PARTS_FOUND = {f"parts: {name}": [change(SOURCES, edit)] for name, edit in PART_MUTATIONS.items()}
MISTAKES = FOUND | LEAVING | INT8_KV_FOUND | IN_PARTS_FOUND


def wgmma_edit(old: str, new: str, within: str = "") -> Edit:
    return Edit("panels_wgmma.cuh", old, new, within)


WGMMA_MUTATIONS: dict[str, Edit] = {
    # The ring.
    "a stage not waited for": wgmma_edit("await_copy(state_.full + place_, parity_)", "void()"),
    "a place not waited for": wgmma_edit("await_copy(state_.empty + place_, parity_ ^ 1)", "void()"),
    "a place's other phase": wgmma_edit(
        "await_copy(state_.empty + place_, parity_ ^ 1)", "await_copy(state_.empty + place_, parity_)"
    ),
    "always the first phases": wgmma_edit("parity_ ^= 1", "0"),
    "one place more": wgmma_edit("++place_ == PANEL_STAGES", "++place_ == PANEL_STAGES + 1"),
    "a thread's copies not waited for": wgmma_edit(
        "copy_async_arrive(state_.full + place_)", "mbarrier_arrive(state_.full + place_)"
    ),
    "no arrival of copies": wgmma_edit("copy_async_arrive(state_.full + place_)", "void()"),
    "an arrival less for a stage": wgmma_edit("FETCHING_THREADS + 1", "FETCHING_THREADS"),
    "a warp less for a place": wgmma_edit("PANEL_WARPS", "PANEL_WARPS - 1", "state_.empty + i, PANEL_WARPS"),
    "a place never given back": wgmma_edit("mbarrier_arrive(state_.empty + place_)", "void()"),
    "operands not announced": wgmma_edit(
        "mbarrier_arrive_expect(state_.full + place_, STAGE_OPERANDS)",
        "mbarrier_arrive(state_.full + place_)",
    ),
    "half of the operands": wgmma_edit("STAGE_OPERANDS", "STAGE_OPERANDS / 2", "STAGE_OPERANDS,\n"),
    "the first stage's operands": wgmma_edit("k / STAGE_K * STAGE_OPERANDS", "0"),
    "the first columns' operands": wgmma_edit(
        "panels.column_panel(panel)", "0", "panels.column_panel(panel)) * PANEL_OPERANDS"
    ),
    "all warps fetch the same tiles": wgmma_edit("(threadIdx.x - PANEL_THREADS) / 32 * TILES", "0"),
    "tiles that do not exist": wgmma_edit("M::TILES - 1", "M::TILES + 7"),
    # Products.
    "the descriptor's distances": wgmma_edit(
        "operand_descriptor(stage, CORE_BYTES, 128)", "operand_descriptor(stage, 128, CORE_BYTES)"
    ),
    "columns of another half": wgmma_edit("2 * step * CORE_BYTES", "step * CORE_BYTES"),
    "columns of the first piece": wgmma_edit("piece * PIECE_BYTES", "0"),
    "weights of the first piece": wgmma_edit("piece", "0", "% 32 * 16, piece,"),
    "weights of the first tile": wgmma_edit("place.tile", "0"),
    "products never begin": wgmma_edit("!Share<M>::begins(k + in_stage)", "true"),
    "products always begin": wgmma_edit("!Share<M>::begins(k + in_stage)", "false"),
    "a group's products not waited for": wgmma_edit(
        "wgmma_wait<0>()", "wgmma_wait<1>()", "wgmma_wait<0>();\n                share"
    ),
    "a stage's products not waited for": wgmma_edit(
        "wgmma_wait<0>()", "wgmma_wait<1>()", "wgmma_wait<0>();\n}"
    ),
    "a group's products not closed": wgmma_edit(
        "wgmma_commit()", "void()", "wgmma_commit();\n                if (last)"
    ),
    "no fence before a stage": wgmma_edit("wgmma_fence()", "void()", "wgmma_fence();\n#pragma unroll"),
    "no fence before a group": wgmma_edit(
        "wgmma_fence()", "void()", "return;\n                wgmma_fence()"
    ),
    "the matrix ends with a stage": wgmma_edit("k + piece * PIECE_K >= M::K_PAD", "false"),
    "the first group's scales": wgmma_edit("in_stage", "0", "lines, in_stage)"),
    "the first group's sum": wgmma_edit("(k + in_stage) / M::GROUP", "0"),
    "segments added at the end": wgmma_edit("(k + STAGE_K) % SEGMENT == 0", "false"),
    "all warps have the first tile": wgmma_edit(
        "panels.first_tile(panel) + warp.tile", "panels.first_tile(panel)"
    ),
    # Parts.
    "a part ends with the matrix": wgmma_edit("(part + 1) * PART_K<M>", "M::K_PAD"),
    "a part begins with the matrix": wgmma_edit("part * PART_K<M>", "0", "int k = part * PART_K<M>"),
    # Turns.
    "a turn not taken": wgmma_edit("wait_for_turn()", "void()", "wait_for_turn();\n    wgmma_fence()"),
    "a turn not passed on": wgmma_edit("end_turn()", "void()", "if (last) end_turn()"),
    "a turn passed on to oneself": wgmma_edit("1 - threadIdx.x / 128", "threadIdx.x / 128"),
    "no group begins": wgmma_edit("threadIdx.x >= 128", "false"),
    "the last turn not taken": wgmma_edit("threadIdx.x < 128", "false"),
}
WGMMA_BARRIERS = find_barriers(WGMMA_SOURCES)
WGMMA_UNSEEN = [
    # The blocks meet before the ring is used.
    ("panels_wgmma.cuh", "mbarrier_init_fence();\n        }\n"),
    # All lanes have waited for the place themselves.
    ("panels_wgmma.cuh", "state_.full + place_);\n                }\n"),
]
WGMMA_SEEN = [
    place
    for place in WGMMA_BARRIERS
    if place not in {place_after(WGMMA_SOURCES, *barrier) for barrier in WGMMA_UNSEEN}
]
WGMMA_MISTAKES: dict[str, list[Change]] = {
    **{name: [change(WGMMA_SOURCES, edit)] for name, edit in WGMMA_MUTATIONS.items()},
    **{f"no barrier {place}": [barrier_change(place, WGMMA_BARRIERS[place])] for place in WGMMA_SEEN},
}
# 3: a block starves; 28: some copies land late, 0 and 56: all; 6: a warp is far behind
MUTATION_SEEDS = (3, 0, 28, 56, 6)
WGMMA_SEEDS = (3, 0, 52, 56, 6)  # 52: as 28, and a warp is far behind


Run = tuple[int, list[int], bool]  # what Both.run() takes


class Mutable:
    """A build with switches, what it must compute in some runs and whether it does."""

    def __init__(self, both: Both, mistakes: dict[str, list[Change]], runs: list[Run]) -> None:
        self.both, self.mistakes, self.runs = both, list(mistakes), runs
        self.expected = list(self.results(self.both.passes))

    def results(self, kernel: SimDecoder | SimChunk) -> Iterator[Said]:
        return (self.both.run(kernel, *run) for run in self.runs)

    def start(self, name: str | None, seed: int) -> None:
        chunk = self.both.chunk
        chunk.set_word("sim_mutation", -1 if name is None else self.mistakes.index(name))
        chunk.seed, chunk.blocks = seed, 1 + 2 * (seed % 2)

    def is_wrong(self, name: str | None, seed: int) -> bool:
        """Whether the chunks leave something else or an error."""
        self.start(name, seed)
        try:
            return not all(map(Said.is_same, self.results(self.both.chunk), self.expected))
        except (SimError, GenerationError):
            return True

    def leaves(self, name: str | None) -> bool:
        """Whether all blocks leave when a block does not come to a meeting."""
        self.start(name, 3)
        chunk = self.both.chunk
        chunk.give_up, chunk.lost_arrival = True, 4
        try:
            chunk.run(self.both.tokens[:5], 0)
        except (SimError, GenerationError) as raised:
            return "a wait gave up" in str(raised)
        finally:
            chunk.give_up, chunk.lost_arrival = False, None
        return False


@pytest.fixture(scope="module")
def mutable_cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mutable_source(tmp_path_factory.mktemp("mutable") / "cuda", SOURCES, MISTAKES)


@pytest.fixture(scope="module")
def mutable(pack: Pack, mutable_cuda: Path) -> Mutable:
    both = Both(pack(MANY_SPLITS), MANY_POSITIONS, limit=LARGE_SHARED_LIMIT, cuda=mutable_cuda)
    # Two panels of columns, many partial softmaxes.
    return Mutable(both, MISTAKES, [(0, [66], False), (FAR, [5], True)])


@pytest.fixture(scope="module")
def int8_mutable(pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> Mutable:
    cuda = mutable_source(tmp_path_factory.mktemp("mutable") / "cuda", SOURCES, MISTAKES)
    options = {"limit": LARGE_SHARED_LIMIT, "kv_dtype": "int8", "cuda": cuda}
    return Mutable(Both(pack(MANY_SPLITS), MANY_POSITIONS, **options), MISTAKES, [(FAR, [5], False)])


@pytest.fixture(scope="module")
def in_parts(pack: Pack, mutable_cuda: Path) -> Mutable:
    """The build whose inputs have several parts."""
    both = Both(pack(IN_PARTS), limit=LARGE_SHARED_LIMIT, cuda=mutable_cuda, part_segments=1)
    return Mutable(both, MISTAKES, [(0, [66], False)])


@pytest.fixture(scope="module")
def wgmma_builds(pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> list[Mutable]:
    """Some of the builds as sm_90 has them, each with two panels of columns."""
    cuda = mutable_source(tmp_path_factory.mktemp("mutable") / "cuda", WGMMA_SOURCES, WGMMA_MISTAKES)
    builds = [
        # Groups of 128; o_proj has as many stages as the ring has places, of which the last is cut short.
        (both_of(pack, "llama2", "int8", wgmma=True, cuda=cuda), 66),
        (both_of(pack, "llama_biases", "bf16", WGMMA_LIMIT, wgmma=True, cuda=cuda), 130),
        # Groups of 32; two parts of o_proj's input.
        (
            Both(
                pack(MANY_SPLITS),
                MANY_POSITIONS,
                limit=WGMMA_LIMIT,
                wgmma=True,
                cuda=cuda,
                part_segments=1,
            ),
            66,
        ),
    ]
    return [Mutable(both, WGMMA_MISTAKES, [(0, [rows], False)]) for both, rows in builds]


@pytest.fixture
def unmutated(mutable: Mutable) -> Both:
    mutable.start(None, 0)
    return mutable.both


def test_no_mutation_is_right(mutable: Mutable, in_parts: Mutable) -> None:
    """In a child too, where mistakes are tried."""
    wrong = (build.is_wrong(None, seed) for build in (mutable, in_parts) for seed in MUTATION_SEEDS)
    assert search(lambda: any(wrong)) == NOT_FOUND
    assert mutable.leaves(None)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_int8_keys_and_values_with_wgmma(pack: Pack, dtype: str) -> None:
    family = {"bf16": "llama_biases", "int8": "llama3.1"}[dtype]
    both = both_of(pack, family, dtype, WGMMA_LIMIT, wgmma=True, kv_dtype="int8")
    both.check(247, {(1, 29): [11], (3, 32): [2, 9]})


def test_same_bits_with_wgmma(wgmma_builds: list[Mutable]) -> None:
    """The bits are those of passes; behind cached positions too, and in fewer rows after more or less."""
    for one in wgmma_builds:
        assert not any(one.is_wrong(None, seed) for seed in WGMMA_SEEDS)
        assert one.leaves(None)
        one.both.check(247, {(1, 29): [11], (3, 32): [2, 9], (3, 60): [11]})


@pytest.mark.parametrize("name", FOUND)
def test_mutation_is_found(mutable: Mutable, name: str) -> None:
    """A mistake leaves something else, or an error, under one of a few seeds."""
    wrong = (mutable.is_wrong(name, seed) for seed in MUTATION_SEEDS)
    assert search(lambda: any(wrong)) != NOT_FOUND


def test_int8_keys_and_values(int8_mutable: Mutable) -> None:
    """Many splits; rows in chunks of any size."""
    assert not any(int8_mutable.is_wrong(None, seed) for seed in MUTATION_SEEDS)
    int8_mutable.both.check(FAR, {(3, 5): [7], (1, 0): [3, 4]})


@pytest.mark.parametrize("name", INT8_KV_FOUND)
def test_int8_mutation_is_found(int8_mutable: Mutable, name: str) -> None:
    wrong = (int8_mutable.is_wrong(name, seed) for seed in MUTATION_SEEDS)
    assert search(lambda: any(wrong)) != NOT_FOUND


@pytest.mark.parametrize("name", IN_PARTS_FOUND)
def test_mutation_of_parts_is_found(in_parts: Mutable, name: str) -> None:
    wrong = (in_parts.is_wrong(name, seed) for seed in MUTATION_SEEDS)
    assert search(lambda: any(wrong)) != NOT_FOUND


@pytest.mark.parametrize("name", WGMMA_MISTAKES)
def test_wgmma_mutation_is_found(wgmma_builds: list[Mutable], name: str) -> None:
    """A mistake is found in one of the builds."""
    wrong = (one.is_wrong(name, seed) for seed in WGMMA_SEEDS for one in wgmma_builds)
    assert search(lambda: any(wrong)) != NOT_FOUND


@pytest.mark.parametrize("name", LEAVING)
def test_a_bad_leave_is_found(mutable: Mutable, name: str) -> None:
    assert search(lambda: not mutable.leaves(name)) != NOT_FOUND


def test_all_barriers_and_meetings_are_mutated() -> None:
    assert count_barriers(SOURCES) == len(BARRIERS) == len(SEEN) + len(UNSEEN)
    assert count_barriers(WGMMA_SOURCES) == len(WGMMA_BARRIERS) == len(WGMMA_SEEN) + len(WGMMA_UNSEEN)
    assert SOURCES["chunk.cu"].count("chunk.meet(") == len(MEETINGS) + 1
