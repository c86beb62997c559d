"""The kernel's own source on the simulated device (tests/sim) against the CPU path."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bounds import check_logits_sent, check_sent
from comparison import (
    BF16_TOLERANCE,
    check_candidates,
    check_logits,
    check_stages,
    error,
    flat,
    query,
    same_bits,
    share_cache,
    values_of,
)
from sim.driver import SimChunk, SimDecoder, SimError, sanitized_environment
from sim_cases import (
    COVER,
    DEEP,
    GOLDEN_CASES,
    LARGE_SHARED_LIMIT,
    MAX_SEQ_LEN,
    ROPES,
    Case,
    case_tokens,
    covered_pairs,
    make_packer,
    packed_digest,
    random_cache,
    wanted_pairs,
)
from sim_passes import BULK, COPY, deep_logits, fill_cache

import ffmini.kernel
import ffmini.layout
from ffmini.candidates import Candidates, Draw
from ffmini.cpu import CPUDecoder, QuantizedMatrix
from ffmini.errors import GenerationError
from ffmini.kernel import LISTED, MOST_LISTED
from ffmini.layout import FORMATS, KEY_ROTATION, TILE_ROWS, VALUE_ROTATION
from ffmini.options import GenerationOptions
from ffmini.packing import PackedModel, vector_offsets
from ffmini.passes import Work
from ffmini.sampler import draw, rank, survivors

BUILDS = {f"{build.family}-{build.dtype}": build for build in COVER}
INT8_KV = (  # builds that run with int8 keys and values too: those of test_sim_chunk.py, and windows
    *("llama_biases-bf16", "qwen2-bf16", "qwen3-int8", "llama2-int8", "llama3.1-int8", "llama3.1-int4"),
    "mistral-bf16",
)
SANITIZED = ("llama_biases-int4-bf16", "llama_biases-bf16-bf16", "llama_biases-bf16-int8")
NO_IDS = np.zeros(0, np.int32)
SMALL = Case("llama2", "bf16", rows=8)


def windowed(dtype: str) -> Case:
    """A model whose layers see different numbers of positions, for the tests that need no other."""
    return Case("qwen2", dtype, changes={"vocab_size": 200})


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], PackedModel]:
    return make_packer(lambda: tmp_path_factory.mktemp("checkpoint"))


# ---- the numbers ---------------------------------------------------------------------------------------


def test_the_cover_is_pairwise() -> None:
    """At most 24 builds hold all pairs of FACTORS but those of UNPAIRED."""
    assert wanted_pairs() - covered_pairs(COVER) == set()
    assert len(BUILDS) == len(COVER) <= 24
    assert all(build.deep[0] <= build.prompt[0] for build in COVER)


def check_prompt(packed: PackedModel, decoder: SimDecoder, oracle: CPUDecoder) -> None:
    """The whole model from position 0, in passes of all rows and one of fewer."""
    prompt = case_tokens(packed, 2 * decoder.rows + 3)
    exact = CPUDecoder(packed, MAX_SEQ_LEN, precision="float64", progress=False)
    reference = exact.forward(prompt, 0, "all")
    own_error = error(oracle.forward(prompt, 0, "all"), reference)
    check_logits(error(decoder.forward(prompt, 0, "all"), reference), own_error)


def check_deep_pass(decoder: SimDecoder, oracle: CPUDecoder, tokens: np.ndarray) -> None:
    """Every stage of a pass deep in the context, its logits, and what it appends to the cache."""
    fill_cache(decoder)
    share_cache(oracle, decoder.key_cache[:, 0], decoder.value_cache[:, 0], DEEP)
    logits = decoder.forward(tokens, DEEP, "all")
    x = check_stages(decoder.stages(), oracle, tokens, DEEP)
    assert error(logits, oracle.norm_lm_head(x)) <= BF16_TOLERANCE
    after = slice(DEEP, DEEP + len(tokens))
    vectors, last = decoder.vectors, slice(after.stop - 1, after.stop)
    for found, kept, rotation in (
        (decoder.key_cache, oracle.read_cache(0, after.stop)[0], KEY_ROTATION),
        (decoder.value_cache, oracle.read_cache(0, after.stop)[1], VALUE_ROTATION),
    ):
        appended = values_of(vectors.to_plain(found[:, 0, :, after], rotation, DEEP), decoder.kv_dtype)
        assert error(appended, values_of(kept[:, :, after], decoder.kv_dtype)) < 4e-3
        unwritten = found[:, :, :, after.stop :], found[:, :, :, last, vectors.plain_size :]
        assert all((part == np.iinfo(vectors.dtype).max).all() for part in unwritten)


@pytest.mark.parametrize(
    ("name", "kv_dtype"), [*((n, "bf16") for n in BUILDS), *((n, "int8") for n in INT8_KV)]
)
def test_matches_cpu(pack: Callable[[Case], PackedModel], name: str, kv_dtype: str) -> None:
    """Both runs of a build of the cover."""
    build = BUILDS[name]
    packed = pack(build.case())
    rows, blocks = build.prompt
    large = kv_dtype == "int8"  # the ring's places are larger
    limit = LARGE_SHARED_LIMIT if large else build.shared_limit
    decoder = SimDecoder(
        packed,
        MAX_SEQ_LEN,
        rows=rows,
        blocks=blocks,
        seed=1,
        shared_limit=limit,
        bulk_copies=list(BUILDS).index(name) % 2 == 0,
        kv_dtype=kv_dtype,
    )
    oracle = CPUDecoder(packed, MAX_SEQ_LEN, kv_dtype=kv_dtype, progress=False)
    check_prompt(packed, decoder, oracle)
    rows, decoder.blocks = build.deep
    check_deep_pass(decoder, oracle, case_tokens(packed, rows))


@pytest.mark.parametrize("family", ROPES)
def test_ropes(pack: Callable[[Case], PackedModel], family: str) -> None:
    """The families outside the cover: another table for a build of it."""
    build = BUILDS["llama2-bf16"]
    packed = pack(build._replace(family=family).case())
    decoder = SimDecoder(packed, MAX_SEQ_LEN, rows=build.prompt[0], seed=1)
    assert decoder.defines == SimDecoder(pack(build.case()), MAX_SEQ_LEN, rows=build.prompt[0]).defines
    check_prompt(packed, decoder, CPUDecoder(packed, MAX_SEQ_LEN, progress=False))


KINDS = [("bf16", "bf16"), ("int8", "bf16"), ("int4", "bf16"), ("bf16", "int8"), ("int4", "int8")]


@pytest.mark.parametrize(("dtype", "kv_dtype"), KINDS)
def test_same_bits(pack: Callable[[Case], PackedModel], dtype: str, kv_dtype: str) -> None:
    """However the rows are grouped, however many blocks there are, whatever the schedule is."""
    packed = pack(windowed(dtype))
    tokens = case_tokens(packed, 9)
    many = SimDecoder(packed, MAX_SEQ_LEN, rows=8, blocks=1, kv_dtype=kv_dtype)
    deeper_ring = {"shared_limit": 227 * 1024, "kv_dtype": kv_dtype}
    one = SimDecoder(packed, MAX_SEQ_LEN, rows=1, **deeper_ring)
    expected = deep_logits(many, tokens, 8)
    for decoder, chunk, blocks, seed in (
        (many, 8, 2, 0),
        (many, 3, 7, 11),
        (many, 5, 3, 12),
        (one, 1, 3, 13),
    ):
        decoder.blocks, decoder.seed = blocks, seed
        assert same_bits(deep_logits(decoder, tokens, chunk), expected), (chunk, blocks, seed)


def fused_segment_product(
    self: QuantizedMatrix, split: np.ndarray, sums: np.ndarray, groups: slice, rows: slice
) -> np.ndarray:
    """As QuantizedMatrix has it, but rounded as the kernel's fused operations are."""
    high, low = np.split(split @ self._codes[groups, rows].swapaxes(-1, -2), 2, axis=1)
    product = (256 * high + low).astype(np.float64)
    if self._zero is not None:
        zeros = self._zero[groups, None, rows].astype(np.float64)
        product = (product - zeros * sums[:, :, None]).astype(np.float32)
    total = np.zeros_like(high[0])
    for group, scale in zip(product, self._scale[groups, None, rows].astype(np.float64), strict=True):
        total = (total + group * scale).astype(np.float32)
    return total


def tile_squares(x: np.ndarray) -> np.ndarray:
    """The sums of squares [R, tiles] of a residual stream [R, tiles * 16], added as lanes add them."""
    squares = np.square(x).reshape(len(x), -1, TILE_ROWS)
    while squares.shape[2] > 1:
        squares = np.add(*np.split(squares, 2, axis=2))
    return squares[:, :, 0]


def check_residual_bits(decoder: SimDecoder, oracle: CPUDecoder, tokens: np.ndarray) -> None:
    """The last pass's residual stream is the oracle's to the bit, from what its blocks have sent."""
    sent, x = decoder.stages(), oracle.embed(tokens)
    for layer in range(decoder.config.num_layers):
        x = oracle.o_proj(layer, sent[layer]["attention"], x)
        assert same_bits(tile_squares(x), sent[layer]["mid_hidden_squares"]), f"layer {layer}, o_proj"
        x = oracle.down_proj(layer, sent[layer]["activation"], x)
        assert same_bits(tile_squares(x), sent[layer + 1]["hidden_squares"]), f"layer {layer}, down_proj"


# Of down_proj's input of five and a half segments and o_proj's of two and a half, whose parts end within
# heads: six parts and three, three and two, two and one. The hidden state has three segments.
IN_PARTS = {"hidden_size": 528, "intermediate_size": 1400, "head_dim": 80, "num_attention_heads": 8}
DTYPES = ("bf16", "int8", "int4")


@pytest.mark.parametrize(
    ("dtype", "part_segments"),
    [("bf16", 2), ("bf16", 4), ("int8", 1), ("int8", 2), ("int4", 2), ("int4", 4)],
)
def test_input_in_parts(
    pack: Callable[[Case], PackedModel], monkeypatch: pytest.MonkeyPatch, dtype: str, part_segments: int
) -> None:
    """The same bits by a row whose blocks hold all of an input, by rows whose blocks share it out, by chunks.

    Of integers the residual stream has the CPU path's. Every format in both turns: which rows have which
    ring, and which chunk is compared.
    """
    monkeypatch.setattr(ffmini.layout, "PART_SEGMENTS", dict.fromkeys(FORMATS, part_segments))
    monkeypatch.setattr(ffmini.kernel, "PART_SEGMENTS", dict.fromkeys(FORMATS, part_segments))
    packed = pack(Case("llama_biases", dtype, 64, changes=IN_PARTS))
    tokens, turn = case_tokens(packed, 9), DTYPES.index(dtype) + part_segments // 2
    oracle = CPUDecoder(packed, MAX_SEQ_LEN, progress=False)
    one = SimDecoder(packed, MAX_SEQ_LEN, rows=1, blocks=2, shared_limit=227 * 1024)
    many, few = (
        SimDecoder(packed, MAX_SEQ_LEN, rows=rows, bulk_copies=bulk, shared_limit=LARGE_SHARED_LIMIT)
        for rows, bulk in ((8, turn % 2 == 0), (2 + turn % 2 * 2, turn % 2 == 1))
    )
    splits = [int(decoder.defines["SPLIT_PARTS"]) for decoder in (one, few, many)]
    assert splits == [0, 1, 1] and many.defines["PART_SEGMENTS"] == str(part_segments)
    check_deep_pass(many, oracle, tokens[:8])
    if dtype != "bf16":
        monkeypatch.setattr(QuantizedMatrix, "_segment_product", fused_segment_product)
        check_residual_bits(many, CPUDecoder(packed, MAX_SEQ_LEN, progress=False), tokens[:8])
    expected = deep_logits(one, tokens, 1)
    runs = [(many, blocks, seed, 8) for blocks, seed in ((1, 0), (2, 3), (3, 28), (7, 56))]
    runs += [
        (many, 5, 7, 3),
        (few, 1, 2, 4),
        (few, 3, 6, 4),
        (few, 7, 13, 4),
        (one, 1, 6, 1),
        (one, 7, 28, 1),
    ]
    for decoder, decoder.blocks, decoder.seed, rows in runs:
        assert same_bits(deep_logits(decoder, tokens, rows), expected), (decoder.rows, decoder.blocks, rows)
    chunk = SimChunk(many, wgmma=turn % 2 == 0, shared_limit=227 * 1024)
    for chunk.blocks, chunk.seed in ((1, 0), (3, 28)):
        fill_cache(many)
        assert same_bits(chunk.forward(tokens, DEEP, "all"), expected), chunk.blocks


@pytest.mark.parametrize(("dtype", "hidden", "most"), [("int8", 2048, 8), ("int4", 4096, 5)])
def test_warps_that_keep_to_a_segment(
    pack: Callable[[Case], PackedModel], dtype: str, hidden: int, most: int
) -> None:
    """Eight segments of two warps each, sixteen of one: the CPU path's numbers, the same bits in all builds.

    The lm_head's units take more than one round.
    """
    changes = {"hidden_size": hidden, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    changes |= {"intermediate_size": 72, "vocab_size": 200, "num_hidden_layers": 1}
    packed = pack(Case("llama2", dtype, 64, changes=changes))
    tokens, options = case_tokens(packed, 9), {"shared_limit": 227 * 1024}
    one, some, many = (SimDecoder(packed, MAX_SEQ_LEN, rows=rows, **options) for rows in (1, 3, most))
    check_deep_pass(many, CPUDecoder(packed, MAX_SEQ_LEN, progress=False), tokens[:most])
    expected = deep_logits(one, tokens, 1)
    for decoder, decoder.blocks, decoder.seed in ((many, 1, 0), (many, 3, 28), (some, 2, 3), (one, 1, 56)):
        found = deep_logits(decoder, tokens, decoder.rows)
        assert same_bits(found, expected), (decoder.rows, decoder.blocks)


# What warps receive by themselves (OwnSegments in cuda/block.cuh), and the blocks that it is built for. The
# last segments are not whole.
OWN: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {"hidden_size": 4024, "head_dim": 32, "num_attention_heads": 2, "intermediate_size": 72}),
    "a rest of two warps": (2, {"hidden_size": 64, "head_dim": 64, "intermediate_size": 10200}),
    "turns": (4, {"hidden_size": 64, "head_dim": 128, "num_attention_heads": 6, "intermediate_size": 8152}),
    "turns and a rest": (4, {"hidden_size": 64, "head_dim": 128, "intermediate_size": 5080}),
    "a rest": (4, {"hidden_size": 64, "head_dim": 256, "num_attention_heads": 3, "intermediate_size": 3000}),
}


OWN_KINDS = [(name, "int4") for name in OWN]
OWN_KINDS += [("one", "bf16"), ("one", "int8"), ("turns and a rest", "bf16"), ("a rest", "int8")]


@pytest.mark.parametrize(("name", "dtype"), OWN_KINDS)
def test_warps_that_receive_their_own(pack: Callable[[Case], PackedModel], dtype: str, name: str) -> None:
    """The CPU path's numbers; the same bits as where all warps receive all of it together."""
    blocks, changes = OWN[name]
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    packed = pack(
        Case("llama2", dtype, 64, changes=heads | changes | {"vocab_size": 200, "num_hidden_layers": 2})
    )
    tokens, options = case_tokens(packed, 4), {"shared_limit": 227 * 1024}
    bulk, copy = (
        SimDecoder(packed, MAX_SEQ_LEN, rows=1, built_for=blocks, bulk_copies=bulk, **options)
        for bulk in (True, False)
    )
    together = SimDecoder(packed, MAX_SEQ_LEN, rows=3, **options)
    some = SimDecoder(packed, MAX_SEQ_LEN, rows=4, **options)
    bulk.blocks = blocks
    check_deep_pass(bulk, CPUDecoder(packed, MAX_SEQ_LEN, progress=False), tokens[:1])
    expected = deep_logits(together, tokens, 3)
    runs = [
        (bulk, blocks, 0),
        (bulk, blocks + 3, 28),
        (copy, blocks, 56),
        (copy, blocks + 1, 3),
        (some, 2, 13),
    ]
    for decoder, decoder.blocks, decoder.seed in runs:
        found = deep_logits(decoder, tokens, decoder.rows)
        assert same_bits(found, expected), (decoder.rows, decoder.blocks)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_one_row_with_a_part_at_a_time(pack: Callable[[Case], PackedModel], dtype: str) -> None:
    """The same bits as where a block has all of the input: whole tiles, and slots that are taken ahead."""
    heads = {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 64}
    packed = pack(Case("llama2", dtype, changes=heads | {"hidden_size": 696, "intermediate_size": 900}))
    tokens = case_tokens(packed, 1)
    whole, split = (
        SimDecoder(packed, MAX_SEQ_LEN, rows=1, part_segments=2, split_parts=split) for split in (False, True)
    )
    expected = deep_logits(whole, tokens, 1)
    for split.blocks, split.seed in ((1, 0), (3, 28)):
        assert same_bits(deep_logits(split, tokens, 1), expected), split.blocks


def test_logits_as_asked(pack: Callable[[Case], PackedModel]) -> None:
    packed = pack(SMALL)
    decoder = SimDecoder(packed, MAX_SEQ_LEN, rows=8)
    tokens = case_tokens(packed, 10)
    every = decoder.forward(tokens, 0, "all")
    assert same_bits(decoder.forward(tokens, 0, "last"), every[-1:])
    assert decoder.forward(tokens, 0, "none").shape == (0, packed.config.vocab_size)
    assert same_bits(decoder.launch([Work(0, tokens[:8], 0, ())], [1, 6]), every[[1, 6]])


@pytest.mark.parametrize("name", ["qwen3-bf16", "llama2-int8", "llama_biases-int4"])
def test_rows_that_have_been_through_the_layers(pack: Callable[[Case], PackedModel], name: str) -> None:
    """A pass that begins with what others left after the last layer is the norm and the lm_head alone."""
    packed = pack(BUILDS[name].case())
    decoder = SimDecoder(packed, MAX_SEQ_LEN, rows=BUILDS[name].prompt[0], seed=2)
    rows = np.random.default_rng(3).standard_normal((decoder.rows, packed.config.hidden_size), np.float32)
    caches = decoder.key_cache.copy(), decoder.value_cache.copy()
    logits = decoder.finish_rows(rows)
    assert error(logits, CPUDecoder(packed, MAX_SEQ_LEN, progress=False).norm_lm_head(rows)) <= BF16_TOLERANCE
    assert all(map(np.array_equal, caches, (decoder.key_cache, decoder.value_cache)))
    for decoder.seed, decoder.blocks in ((5, 1), (28, 3), (56, 7)):
        assert same_bits(decoder.finish_rows(rows[:-1]), logits[: len(rows) - 1])


GOLDENS = Path(__file__).parent / "goldens"


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_same_as_on_a_gpu(pack: Callable[[Case], PackedModel], name: str) -> None:
    """Each stage, fed with what a real GPU's blocks told each other, sends what they sent.

    The same bits: the embedding, K and V as norm and rope leave them, attention to a single position. The
    rest goes through mma or a power of two: within the bounds that tests/bounds.py derives.
    """
    case, golden = GOLDEN_CASES[name], np.load(GOLDENS / f"sim_{name}.npz")
    packed = pack(case)
    assert packed_digest(packed) == golden["digest"], "other weights than the golden's"
    decoder = SimDecoder(packed, MAX_SEQ_LEN, rows=case.rows, blocks=1, seed=1)
    fill_cache(decoder, case.start)
    found, logits = decoder.replay(golden["tokens"], case.start, golden["words"])
    fed = decoder.stages()
    appended = slice(case.start, case.start + case.rows)
    assert np.array_equal(decoder.key_cache[:, 0, :, appended], golden["keys"])
    assert np.array_equal(decoder.value_cache[:, 0, :, appended], golden["values"])
    assert same_bits(found[0]["hidden"], fed[0]["hidden"])
    if case.start == 0:
        for sent, given in zip(found[:-1], fed[:-1], strict=True):
            assert same_bits(sent["attention"][0], given["attention"][0])
    check_sent(found, fed, packed)
    check_logits_sent(logits, golden["logits"], fed[-1], packed)


def test_non_finite_logits(pack: Callable[[Case], PackedModel]) -> None:
    packed = pack(SMALL)
    packed = dataclasses.replace(packed, norm=np.full_like(packed.norm, 3e38))
    with pytest.raises(GenerationError, match="non-finite"):
        SimDecoder(packed, MAX_SEQ_LEN).forward(case_tokens(packed, 3), 0)
    # A host that does not wait for the end of the pass learns it from the candidates.
    decoder = SimDecoder(packed, MAX_SEQ_LEN, rows=1)
    with pytest.raises(GenerationError, match="non-finite"):
        decoder.candidates(case_tokens(packed, 1), 0, query([5]))
    assert np.isnan(decoder.assemble(0, 1).total)


# ---- slots ---------------------------------------------------------------------------------------------

# Of one pass: slot, position, tokens. Contexts of none to three blocks of positions, rows that cross from one
# block into the next, and one at the very end of its slot.
MIXTURES = {
    "five": [(3, 508, 2), (0, 0, 1), (5, 255, 2), (1, 30, 1), (7, MAX_SEQ_LEN - 2, 2)],
    "eight": [(slot, position, 1) for slot, position in enumerate((511, 0, 256, 255, 599, 1, 512, 40))],
    "two": [(6, 510, 5), (2, 3, 3)],
    "the deep one last": [(4, 3, 6), (5, 560, 1)],
}


def mixed_works(packed: PackedModel, name: str) -> list[Work]:
    """Every row of them is asked for something else."""
    works, tokens = [], case_tokens(packed, 8)
    vocab = packed.config.vocab_size
    for slot, position, count in MIXTURES[name]:
        rows = range(8 - len(tokens), 8 - len(tokens) + count)
        asked = tuple(query(np.arange(row, vocab, 9 - row)[: 20 * row], 0.5 + row) for row in rows)
        works.append(Work(slot, tokens[:count], position, asked))
        tokens = tokens[count:]
    return works


def fill_slots(decoder: SimDecoder, works: list[Work]) -> None:
    """Random K and V in the slots of `works` before their positions, NaN elsewhere."""
    for cache in (decoder.key_cache, decoder.value_cache):
        filled = random_cache(cache.shape, MAX_SEQ_LEN, decoder.vectors)
        cache.view(np.uint8)[...] = 0xFF
        for work in works:
            cache[:, work.slot, :, : work.start] = filled[:, work.slot, :, : work.start]


@pytest.mark.parametrize(
    ("case", "mixture"),
    [
        (Case("llama3.1", "bf16"), "five"),
        (windowed("int8"), "eight"),
        (Case("mistral", "int4"), "two"),
        (Case("qwen3", "int8", changes={"num_attention_heads": 12, "num_key_value_heads": 1}), "five"),
    ],
)
def test_slots_match_cpu(pack: Callable[[Case], PackedModel], case: Case, mixture: str) -> None:
    """Every stage of a pass over several slots, as of passes of one slot each."""
    packed = pack(case)
    works = mixed_works(packed, mixture)
    decoder = SimDecoder(packed, MAX_SEQ_LEN, num_slots=8, seed=3)
    fill_slots(decoder, works)
    before = decoder.key_cache.copy(), decoder.value_cache.copy()
    logits = decoder.launch(works, list(range(sum(len(work.tokens) for work in works))))
    oracle, at = CPUDecoder(packed, MAX_SEQ_LEN, progress=False), 0
    for work in works:
        rows = slice(at, at := at + len(work.tokens))
        share_cache(oracle, *(cache[:, work.slot] for cache in before), work.start)
        found = [{name: values[rows] for name, values in layer.items()} for layer in decoder.stages()]
        x = check_stages(found, oracle, work.tokens, work.start)
        assert error(logits[rows], oracle.norm_lm_head(x)) <= BF16_TOLERANCE


@pytest.mark.parametrize(("dtype", "kv_dtype"), KINDS[:4])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_rows_do_not_know_each_other(
    pack: Callable[[Case], PackedModel], dtype: str, kv_dtype: str, mixture: str
) -> None:
    """A row says the same bits, and leaves the same K and V, as in a pass of its own; under any schedule."""
    packed = pack(windowed(dtype))
    works = mixed_works(packed, mixture)
    deeper_ring = {"shared_limit": 227 * 1024, "kv_dtype": kv_dtype}
    one = SimDecoder(packed, MAX_SEQ_LEN, rows=1, num_slots=8, **deeper_ring)
    fill_slots(one, works)
    expected = [
        flat(one.ask([Work(work.slot, work.tokens[i : i + 1], work.start + i, (asked,))])[0][0])
        for work in works
        for i, asked in enumerate(work.queries)
    ]
    for bulk_copies in (True, False):
        many = SimDecoder(packed, MAX_SEQ_LEN, num_slots=8, bulk_copies=bulk_copies, kv_dtype=kv_dtype)
        for many.seed in (0, 5, 28, 56):
            fill_slots(many, works)
            found = [flat(said) for of_work in many.ask(works) for said in of_work]
            assert all(map(same_bits, found, expected)), many.seed
            assert np.array_equal(many.key_cache, one.key_cache)
            assert np.array_equal(many.value_cache, one.value_cache)
        many.blocks = 7
        fill_slots(many, works)
        found = [said.fetch() for of_work in many.ask(works[::-1])[::-1] for said in of_work]
        assert all(same_bits(row, all[: len(row)]) for row, all in zip(found, expected, strict=True))


@pytest.mark.parametrize("where", ["a value", "an int8 key's scale", "an int8 value's scale"])
def test_a_row_that_is_not_finite(pack: Callable[[Case], PackedModel], where: str) -> None:
    """The others say what they say without it."""
    packed = pack(windowed("int8"))
    works = mixed_works(packed, "eight")
    kv_dtype = "int8" if "int8" in where else "bf16"
    decoder = SimDecoder(packed, MAX_SEQ_LEN, num_slots=8, kv_dtype=kv_dtype)
    fill_slots(decoder, works)
    expected = [said for (said,) in decoder.ask(works)]
    fill_slots(decoder, works)
    cache = decoder.key_cache if "key" in where else decoder.value_cache
    if kv_dtype == "bf16":
        cache[:, 4, :, 590] = 0x7FC0
    else:
        scale = slice(decoder.vectors.head_dim, decoder.vectors.plain_size)
        cache[:, 4, :, 590, scale] = np.array([np.nan], "<f4").view(np.uint8)
    with pytest.raises(GenerationError, match="non-finite"):
        decoder.ask(works)
    for row, said in enumerate(expected):
        found = decoder.assemble(row, len(said.queried))
        assert said.finite and found.finite == (row != 4)
        assert row == 4 or same_bits(flat(found), flat(said))


@pytest.mark.parametrize("vector", ["key", "value"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_int8_vectors_that_are_not_finite(
    pack: Callable[[Case], PackedModel], vector: str, value: float
) -> None:
    """One element of every key or value that a pass makes itself: it is not lost among codes."""
    packed = pack(Case("llama_biases", "int8"))
    decoder = SimDecoder(packed, MAX_SEQ_LEN, kv_dtype="int8")
    config = packed.config
    offset = vector_offsets(config)["qkv_bias"][0]
    heads = config.num_heads + (config.num_kv_heads if vector == "value" else 0)
    decoder._vectors[0, offset + heads * config.head_dim] = value
    with pytest.raises(GenerationError, match="non-finite"):
        decoder.forward(case_tokens(packed, 3), 0)


def test_appended_to_every_list(pack: Callable[[Case], PackedModel]) -> None:
    """Rows of several slots each append their own token, whose ids the next pass finds on the device."""
    packed = pack(Case("llama2", "int4", 32, changes={"num_hidden_layers": 1, "vocab_size": 67}))
    decoder, tokens = SimDecoder(packed, MAX_SEQ_LEN, num_slots=3), case_tokens(packed, 5)
    works = [Work(2, tokens[:3], 0, ()), Work(1, tokens[3:4], 0, ()), Work(0, tokens[4:], 0, ())]
    logits = decoder.launch(works, [2, 3, 4])
    for appended in ([2, 3, 4], [3], [4]):
        lists = {row: np.setdiff1d(np.arange(0, 67, row), tokens) for row in (2, 3, 4)}
        decoder._queried_ids[...] = -1
        found = decoder.ask_rows(works, {row: query(ids) for row, ids in lists.items()}, appended)
        for place, (row, ids) in enumerate(lists.items()):
            asked = np.append(ids, tokens[row]) if row in appended else ids
            check_candidates(found[row], logits[place], asked, 1.0)
            held = decoder._queried_ids[place]
            assert np.array_equal(held[held >= 0], asked)


# ---- candidates ----------------------------------------------------------------------------------------


LISTS = {  # vocabulary, rows, grids
    "a block without a tile": (64, 1, (1, 3, 7)),
    "some rows": (515, 8, (2, 7)),
    "more tokens than a block looks at together": (4099, 1, (1, 2)),
}


@pytest.mark.parametrize("name", LISTS)
def test_candidates(pack: Callable[[Case], PackedModel], name: str) -> None:
    """What the host gets of a pass is what NumPy makes of its logits."""
    vocab, rows, grids = LISTS[name]
    packed = pack(Case("llama2", changes={"vocab_size": vocab, "num_hidden_layers": 1}))
    decoder, tokens = SimDecoder(packed, MAX_SEQ_LEN, rows=rows), case_tokens(packed, rows)
    logits = decoder.forward(tokens, 0, "all")
    wanted = {row: np.float32(1 / (0.4 + row)) for row in (0, 3, 7) if row < rows}
    most = logits[0].argsort()[: -min(vocab // 2, 500) : -1]
    for i, blocks in enumerate(grids):
        for ids in ([], [vocab - 1, 0, vocab - 3], most, range(min(vocab, 1024))):
            decoder.blocks, decoder.seed, ids = blocks, 7 * i, np.array(ids, np.int32)
            for row, found in decoder.listed(tokens, 0, ids, wanted).items():
                check_candidates(found, logits[row], ids, 0.4 + row)


DRAWS = {  # temperature, Draw without its uniform
    "greedy": (1.0, (1.0, 0.0, 1)),
    "top_k": (0.3, (1.0, 0.0, 5)),
    "top_k of many": (0.5, (1.0, 0.0, 60)),
    "top_p of top_k": (0.2, (0.7, 0.0, 33)),
    "top_p": (0.05, (0.9, 0.0, 0)),
    "top_p of flat logits": (3.0, (0.9, 0.0, 0)),
    "min_p": (0.3, (1.0, 0.3, 0)),
    "all three": (0.2, (0.95, 0.05, 7)),
    "min_p decides": (0.1, (0.99999, 0.02, 0)),
    "nearly everything": (0.4, (1.0, 1e-30, 0)),
}


OF_ALL = {"top_p of flat logits", "nearly everything"}  # what takes more than the exact candidates
DRAWN = {  # vocabulary, rows, grids, what is not drawn at times
    "all are listed": (8, 1, (1, 2), set()),
    "few are exact": (515, 8, (2, 7), OF_ALL | {"top_k of many", "top_p of top_k"}),
    "many are exact": (544, 1, (34,), OF_ALL),
}


@pytest.mark.parametrize("name", DRAWN)
def test_draws(pack: Callable[[Case], PackedModel], name: str) -> None:
    """A pass draws the token that the sampler does from its candidates; none if they don't decide."""
    vocab, rows, grids, missing = DRAWN[name]
    packed = pack(Case("llama2", changes={"vocab_size": vocab, "num_hidden_layers": 1}))
    decoder = SimDecoder(packed, MAX_SEQ_LEN, rows=rows, blocks=grids[-1])
    tokens = case_tokens(packed, rows)
    uniforms, drawn = [0.0, 1 - 2**-53, *np.random.default_rng(0).random(2)], {}
    for (what, (temperature, how)), blocks in itertools.product(DRAWS.items(), grids):
        decoder.blocks, scale = blocks, np.float32(1 / temperature)
        for uniform in uniforms:
            asked = Draw(uniform, *how, ())
            found = decoder.listed(tokens, 0, NO_IDS, {rows - 1: scale}, draw=asked)[rows - 1]
            expected = drawn_by_host(found, asked, float(scale))
            assert decoder.drawn(rows - 1) == expected, (what, blocks, uniform)
            drawn.setdefault(expected is not None, set()).add(what)
    assert drawn.get(False, set()) == missing and drawn[True] >= set(DRAWS) - missing


def test_what_is_not_given_to_the_pass_behind(pack: Callable[[Case], PackedModel]) -> None:
    """A token that ends the text, any where something is queried, and where a logit is not finite."""
    packed = pack(Case("llama2", changes={"vocab_size": 64, "num_hidden_layers": 1}))
    decoder, tokens = SimDecoder(packed, MAX_SEQ_LEN, rows=1), case_tokens(packed, 1)
    asked = Draw(0.4, 1.0, 0.0, 5, ())
    decoder.listed(tokens, 0, NO_IDS, {0: 1.0}, draw=asked)
    token = decoder.drawn()
    others = tuple((token + i) % 64 for i in range(1, 4))
    for ends, drawn in (((token,), None), ((*others, token), None), (others, token)):
        decoder.listed(tokens, 0, NO_IDS, {0: 1.0}, draw=asked._replace(end_token_ids=ends))
        assert decoder.drawn() == drawn
    decoder.listed(tokens, 0, [others[0]], {0: 1.0}, draw=asked)
    assert decoder.drawn() is None
    decoder._arrays["norm"][...] = 3e38
    with pytest.raises(GenerationError, match="non-finite"):
        decoder.listed(tokens, 0, NO_IDS, {0: 1.0}, draw=asked)
    assert (
        decoder.drawn() is None and int(decoder._mail[(decoder._pass + 1) % 2]) % 2**32 != decoder._pass + 1
    )


def drawn_by_host(found: Candidates, asked: Draw, inverse_temperature: float) -> int | None:
    """As Sampler does."""
    options = GenerationOptions(top_k=asked.top_k, top_p=asked.top_p, min_p=asked.min_p)
    ranking = rank(found, NO_IDS, np.zeros(0, np.float32), asked.top_k or len(found.ids))
    reached = survivors(ranking, options, np.array(inverse_temperature), found.total)
    return None if reached is None else int(ranking.ids[draw(reached, asked.uniform)])


def test_the_last_of_many_rows(pack: Callable[[Case], PackedModel]) -> None:
    packed = pack(SMALL)
    decoder, tokens = SimDecoder(packed, MAX_SEQ_LEN, rows=8), case_tokens(packed, 19)
    found = decoder.candidates(tokens, 0, query([2, 1], 0.5))
    check_candidates(found, decoder.forward(tokens, 0)[0], np.array([2, 1]), 0.5)


def test_equal_logits(pack: Callable[[Case], PackedModel]) -> None:
    """The lower id comes first, within a lane, a warp, a block and among blocks."""
    packed = pack(Case("llama2", "int8", changes={"vocab_size": 1090}))
    tiles = packed.lm_head.reshape(packed.layouts["lm_head"].tiles, -1)
    tiles[2::2], tiles[3::2] = tiles[0], tiles[1]
    tokens = case_tokens(packed, 1)
    for blocks in (1, 2, 3):
        decoder = SimDecoder(packed, MAX_SEQ_LEN, rows=1, blocks=blocks, seed=blocks)
        found = decoder.candidates(tokens, 0, query([17, 49]))
        assert len(np.unique(found.logits)) < len(found.ids) // 3
        check_candidates(found, found.fetch(), np.array([17, 49]), 1.0)


def test_more_candidates_than_are_left(pack: Callable[[Case], PackedModel]) -> None:
    """Blocks list all others, but the host gets only the first of them and learns that some are missing."""
    blocks = MOST_LISTED // LISTED + 1
    packed = pack(Case("llama2", changes={"vocab_size": 16 * blocks, "num_hidden_layers": 1}))
    decoder, tokens = SimDecoder(packed, MAX_SEQ_LEN, rows=1, blocks=blocks), case_tokens(packed, 1)
    for count, complete in ((MOST_LISTED + LISTED, False), (MOST_LISTED, True)):
        others = np.concatenate([np.arange(blocks) * 16 + i for i in range(LISTED)])[:count]
        ids = np.setdiff1d(np.arange(16 * blocks), others)
        found = decoder.candidates(tokens, 0, query(ids))
        assert (len(found.ids), found.complete) == (MOST_LISTED, complete)
        check_candidates(found, found.fetch(), ids, 1.0)


# ---- builds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ring", [BULK, COPY])
def test_stage_times(pack: Callable[[Case], PackedModel], ring: str) -> None:
    """A thread of each block notes when it passes each mark, in this order, layer by layer."""
    decoder = SimDecoder(pack(SMALL), MAX_SEQ_LEN, rows=8, stage_times=True, bulk_copies=ring == BULK)
    decoder.forward(case_tokens(pack(SMALL), 8), 0)
    marks = decoder.build_info["marks"]
    times = decoder.stage_times.reshape(-1, decoder.blocks)[: decoder.config.num_layers * marks + 2]
    assert times[0].min() > 0 and times.max() < 1 << 40
    assert (np.diff(times, axis=0) >= 0).all()


def test_sanitizers() -> None:
    """AddressSanitizer and UndefinedBehaviorSanitizer find nothing in bf16, in int4 and its int8 lm_head."""
    tests = [f"{__file__}::test_matches_cpu[{name}]" for name in SANITIZED]
    command = [sys.executable, "-m", "pytest", "-q", *tests]
    result = subprocess.run(command, env=sanitized_environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    assert "3 passed" in result.stdout


def test_missing_compiler(pack: Callable[[Case], PackedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack(SMALL)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SimError, match=r"g\+\+ not found"):
        SimDecoder(packed, MAX_SEQ_LEN)
