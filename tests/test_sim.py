"""The kernel's own source on the simulated device (tests/sim) against the CPU path, under many schedules."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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
from packets import packet_counts
from sim.driver import EVENTS, SHARED_LIMIT, NoTokenError, SimDecoder, SimError, sanitized_environment
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

from ffmini.cpu import CPUDecoder
from ffmini.errors import GenerationError
from ffmini.kernel import LISTED, MAIL_LEAVE, MOST_LISTED
from ffmini.layout import KEY_ROTATION, VALUE_ROTATION
from ffmini.packing import PackedModel, vector_offsets
from ffmini.passes import Work

BUILDS = {f"{build.family}-{build.dtype}": build for build in COVER}
INT8_KV = (  # builds that run with int8 keys and values too: those of test_sim_chunk.py, and windows
    *("llama_biases-bf16", "qwen2-bf16", "qwen3-int8", "llama2-int8", "llama3.1-int8", "llama3.1-int4"),
    "mistral-bf16",
)
SANITIZED = ("llama_biases-int4-bf16", "llama_biases-bf16-bf16", "llama_biases-bf16-int8")
SMALL = Case("llama2", "bf16", rows=8)
SEEDS = range(1, 201)
MUTATION_SEEDS = (*range(4), 28, 56)  # 28: some copies land late, 56: all of them


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], PackedModel]:
    return make_packer(lambda: tmp_path_factory.mktemp("checkpoint"))


def fill_cache(decoder: SimDecoder, start: int = DEEP) -> None:
    for cache in (decoder.key_cache, decoder.value_cache):
        cache[...] = random_cache(cache.shape, start, decoder.vectors)


def deep_logits(decoder: SimDecoder, tokens: np.ndarray, chunk: int) -> np.ndarray:
    """The logits of `tokens` from position DEEP on, in passes of `chunk` rows."""
    fill_cache(decoder)
    pieces = [decoder.forward(tokens[i : i + chunk], DEEP + i, "all") for i in range(0, len(tokens), chunk)]
    return np.concatenate(pieces)


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
    large = build.widths == "wide" or kv_dtype == "int8"  # the ring's places are larger
    limit = LARGE_SHARED_LIMIT if large else SHARED_LIMIT
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
    packed = pack(Case("qwen2", dtype))
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


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
def test_input_in_parts(pack: Callable[[Case], PackedModel], dtype: str) -> None:
    """down_proj's input of five and a half segments, held two or four at a time: the same bits as whole."""
    packed = pack(Case("llama_biases", dtype, 64, changes={"intermediate_size": 1400}))
    tokens = case_tokens(packed, 9)
    expected = deep_logits(SimDecoder(packed, MAX_SEQ_LEN, rows=8, blocks=1), tokens, 8)
    for part_segments, ring in ((2, BULK), (4, COPY)):
        decoder = SimDecoder(
            packed, MAX_SEQ_LEN, rows=8, part_segments=part_segments, bulk_copies=ring == BULK
        )
        for decoder.blocks, decoder.seed, chunk in ((1, 3, 8), (3, 28, 8), (7, 5, 3)):
            found = deep_logits(decoder, tokens, chunk)
            assert same_bits(found, expected), (part_segments, decoder.blocks)


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


# ---- schedules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bulk_copies", [True, False])
def test_schedules(pack: Callable[[Case], PackedModel], bulk_copies: bool) -> None:
    """200 seeds: lanes in any order, blocks and warps starved, stores and copies late."""
    packed = pack(Case("llama2", "int4", 32, changes={"vocab_size": 64}))
    decoder = SimDecoder(packed, MAX_SEQ_LEN, rows=1, bulk_copies=bulk_copies)
    tokens = case_tokens(packed, 1)
    expected = deep_logits(decoder, tokens, 1)
    seen = dict.fromkeys(EVENTS, 0)  # in how many seeds
    for seed in SEEDS:
        decoder.seed, decoder.blocks = seed, 7 if seed % 20 == 0 else 2 + seed % 2
        assert same_bits(decoder.forward(tokens, DEEP, "all"), expected), f"seed {seed}"
        events = decoder.events()
        if events["async copies at once"] > 0:
            events["async copies as late as allowed"] = 0  # some were not
        seen = {name: count + (events[name] > 0) for name, count in seen.items()}
    assert min(seen.values()) >= 50, seen


def test_packets_held_back(pack: Callable[[Case], PackedModel]) -> None:
    """The test build with pauses computes the same, under as many seeds."""
    packed = pack(Case("llama2", "int4", 32, changes={"num_hidden_layers": 1, "vocab_size": 64}))
    decoder = SimDecoder(packed, MAX_SEQ_LEN, rows=1)
    pausing = SimDecoder(packed, MAX_SEQ_LEN, rows=1, test_pauses=True)
    tokens = case_tokens(packed, 1)
    expected = deep_logits(decoder, tokens, 1)
    fill_cache(pausing)
    for seed in SEEDS:
        pausing.seed, pausing.blocks = seed, 2 + seed % 2
        assert same_bits(pausing.forward(tokens, DEEP, "all"), expected), f"seed {seed}"


def lost_packets(decoder: SimDecoder) -> dict[str, int]:
    """Indices into the exchange: a packet of each kind of layer 1, the last hidden, a partial softmax."""
    counts = packet_counts(decoder.config)
    starts = np.cumsum([0, *counts.values()])
    before = decoder.config.num_layers * starts[-1]
    places = {f"layer 1 {name}": starts[-1] + at for name, at in zip(counts, starts, strict=False)}
    places |= {"last hidden": before, "partial": before + counts["hidden"]}
    found = {name: int(decoder.rows * at) for name, at in places.items()}
    return found | {"partial vector": found["partial"] + 1}  # without the maximum and the sum


def lost_hand_overs(decoder: SimDecoder) -> dict[str, int]:
    """The same of what only a pass with candidates or an awaited token exchanges."""
    end = int(decoder.build_info["exchange_packets"])
    return {"token": end - 1, "list": end, "end of a list": end + LISTED - 1}


LOST = {  # where a packet gets lost: in which layer the pass must end
    "layer 1 hidden": 1,
    "layer 1 qkv": 1,
    "layer 1 attention": 1,
    "layer 1 mid_hidden": 1,
    "layer 1 activation": 1,
    "last hidden": 2,
    "partial": 0,
    "partial vector": 0,
}


@pytest.mark.parametrize("stage", LOST)
def test_a_lost_packet(pack: Callable[[Case], PackedModel], stage: str) -> None:
    """A deadlock is reported; where time passes the kernel gives up, says where and stays usable."""
    packed = pack(Case("llama2", changes={"vocab_size": 64}))
    decoders = [SimDecoder(packed, MAX_SEQ_LEN, rows=1, bulk_copies=bulk) for bulk in (True, False)]
    tokens = case_tokens(packed, 1)
    expected, other = (deep_logits(decoder, tokens, 1) for decoder in decoders)
    assert same_bits(expected, other)
    place = lost_packets(decoders[0])[stage]
    for seed in SEEDS:
        decoder = decoders[seed // 2 % 2]
        decoder.seed, decoder.blocks, decoder.lost_packet = seed, 2 + seed % 2, place
        decoder.give_up = seed % 2 == 0
        if decoder.give_up:
            with pytest.raises(GenerationError, match="a wait gave up"):
                decoder.forward(tokens, DEEP)
            assert decoder.status["stage"] // 8 == LOST[stage]
        else:
            with pytest.raises(SimError, match=r"deadlock: .*exchange.cuh:\d+ for exchange \("):
                decoder.forward(tokens, DEEP)
        if seed % 20 == 0:
            decoder.lost_packet = None
            assert same_bits(decoder.forward(tokens, DEEP), expected)


def test_non_finite_logits(pack: Callable[[Case], PackedModel]) -> None:
    packed = pack(Case("llama2", changes={"vocab_size": 67}))
    packed.norm = np.full_like(packed.norm, 3e38)
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
        (Case("qwen2", "int8"), "eight"),
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
    packed = pack(Case("qwen2", dtype, changes={"vocab_size": 200}))
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
    packed = pack(Case("llama2", "int8"))
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


@pytest.mark.parametrize("build", ["bulk ring", "copy ring", "packets held back"])
def test_same_candidates(pack: Callable[[Case], PackedModel], build: str) -> None:
    """Whatever the schedule is, and whether the token was known at the launch; its mail may append it."""
    packed = pack(Case("llama2", "int4", 32, changes={"num_hidden_layers": 1, "vocab_size": 67}))
    options = {"bulk_copies": build != "copy ring", "test_pauses": build == "packets held back"}
    decoder = SimDecoder(packed, MAX_SEQ_LEN, rows=1, **options)
    tokens, ids = case_tokens(packed, 1), np.arange(3, 50, 2, dtype=np.int32)
    token = int(tokens[0])
    ids = ids[ids != token]
    expected = decoder.listed(tokens, 0, ids, {0: 1.5})[0]
    appended = decoder.listed(tokens, 0, np.append(ids, np.int32(token)), {0: 1.5})[0]
    for seed in SEEDS[::3]:
        decoder.seed, append = seed, seed % 2 == 0
        mailbox = decoder.next_mail(token, append) if seed % 4 < 2 else None
        decoder._queried_ids[...] = -1
        found = decoder.listed(tokens, 0, ids, {0: 1.5}, append, mailbox)[0]
        assert same_bits(flat(found), flat(appended if append else expected)), f"seed {seed}"
        assert decoder._queried_ids[0, len(ids)] == (token if append else -1)


@pytest.mark.parametrize("bulk_copies", [True, False])
def test_no_token(pack: Callable[[Case], PackedModel], bulk_copies: bool) -> None:
    """A pass that gets none leaves quietly, when it is told to and when time has passed."""
    packed = pack(Case("llama2", "int4", 32, changes={"num_hidden_layers": 1, "vocab_size": 67}))
    decoder = SimDecoder(packed, MAX_SEQ_LEN, rows=1, bulk_copies=bulk_copies)
    tokens = case_tokens(packed, 1)
    expected = decoder.listed(tokens, 0, np.array([5]), {0: 1.0})[0]
    for seed in SEEDS[::5]:
        decoder.seed, decoder.blocks = seed, 2 + seed % 2
        with pytest.raises(SimError, match="results are missing"):
            decoder.listed(tokens, 0, [5], {0: 1.0}, mailbox=decoder.next_mail(MAIL_LEAVE))
        assert decoder.status["gave_up"] == 0 and decoder.status["no_token"] < decoder._pass
        stale = decoder.next_mail(int(tokens[0])) - 1
        with pytest.raises(SimError, match=r"deadlock: .*candidates.cuh:\d+ for host memory"):
            decoder.listed(tokens, 0, [5], {0: 1.0}, mailbox=stale)
        decoder.give_up = True
        with pytest.raises(NoTokenError):
            decoder.listed(tokens, 0, [5], {0: 1.0}, mailbox=stale + 1)
        assert decoder.status["gave_up"] == 0
        decoder.give_up, decoder.blocks = False, 3
        assert same_bits(flat(decoder.listed(tokens, 0, [5], {0: 1.0})[0]), flat(expected))


@pytest.mark.parametrize("lost, layer", [("token", 0), ("list", 1), ("end of a list", 1)])
def test_a_lost_hand_over(pack: Callable[[Case], PackedModel], lost: str, layer: int) -> None:
    """As any lost packet: the pass ends with an error that says where, also if the token came in time."""
    packed = pack(Case("llama2", "int4", 32, changes={"num_hidden_layers": 1, "vocab_size": 67}))
    decoder, tokens = SimDecoder(packed, MAX_SEQ_LEN, rows=1), case_tokens(packed, 1)
    expected = decoder.listed(tokens, 0, [5], {0: 1.0})[0]
    place = lost_hand_overs(decoder)[lost]
    for seed in SEEDS[::10]:
        decoder.seed, decoder.blocks, decoder.lost_packet = seed, 2 + seed % 2, place
        with pytest.raises(SimError, match=r"deadlock: .*exchange.cuh:\d+ for exchange \("):
            decoder.listed(tokens, 0, [5], {0: 1.0}, mailbox=decoder.next_mail(int(tokens[0])))
        decoder.give_up = True
        with pytest.raises(GenerationError, match="a wait gave up"):
            decoder.listed(tokens, 0, [5], {0: 1.0}, mailbox=decoder.next_mail(int(tokens[0])))
        assert decoder.status["stage"] // 8 == layer  # block 0 has its token and waits for what comes next
        assert decoder.status["stage"] % 8 == 6 or lost == "token"
        decoder.give_up, decoder.lost_packet, decoder.blocks = False, None, 3
        assert same_bits(flat(decoder.listed(tokens, 0, [5], {0: 1.0})[0]), flat(expected))


# ---- that all this can fail ----------------------------------------------------------------------------

# The builds; what both of the first have is switched in the first. The last one has the bulk ring.
BULK, COPY, INT8_KV_BUILD = "bulk ring", "copy ring", "int8 keys and values"


STREAM = functools.partial(Edit, "stream.cuh")
EXCHANGE = functools.partial(Edit, "exchange.cuh")
CANDIDATES = functools.partial(Edit, "candidates.cuh")
ITEMS = functools.partial(Edit, "items.cuh")
ARITHMETIC = functools.partial(Edit, "arithmetic.cuh")
VECTORS = functools.partial(Edit, "vectors.cuh")
STORE = "store_relaxed_128(packet, make_uint4(x, y, z, tag))"
LOAD = "load_relaxed_128(at(min_of(begin + i * step, count - 1)))"
MISSING = "packet[i].w != tag"
AWAIT = "await_copy(state_.full[threadIdx.x / 32] + head_, parity_)"
ARRIVE = "mbarrier_arrive(state_.empty[threadIdx.x / 32] + head_)"
PLANES = "plane_offset(column % 2, 0, block.lane() % 4)"
EXPECT = "mbarrier_arrive_expect(full, cursor.bytes())"

# Each mistake: the build in which it must be found, and the edits that make it.
MUTATIONS: dict[str, tuple[str, list[Edit]]] = {
    # The order of the stream.
    "tail fetched as a whole slot": (
        BULK,
        [STREAM("slots_left_ == 1 ? last_bytes_ : slot_bytes_", "slot_bytes_")],
    ),
    # The ring that bulk copies fill: who empties it,
    "bulk copy not waited for": (BULK, [STREAM(AWAIT, "void()")]),
    "parity of a full slot not flipped": (BULK, [STREAM("parity_ ^= 1", "parity_")]),
    "emptying wraps a slot early": (BULK, [STREAM("++head_ == SLOTS", "++head_ == SLOTS - 1")]),
    "emptying wraps a slot late": (BULK, [STREAM("++head_ == SLOTS", "++head_ == SLOTS + 1")]),
    "slot given back before it is read": (
        BULK,
        [
            STREAM(AWAIT, f"({AWAIT}, threadIdx.x % 32 == 0 ? {ARRIVE} : void())"),
            STREAM(ARRIVE, "void()"),
        ],
    ),
    "slot given back twice": (BULK, [STREAM(ARRIVE, f"({ARRIVE}, {ARRIVE})")]),
    "slot never given back": (BULK, [STREAM(ARRIVE, "void()")]),
    # ... who fills it,
    "full slot filled": (BULK, [STREAM("mbarrier_test(state.empty[warp] + tail, tail_parity)", "true")]),
    "parity of an empty slot not flipped": (BULK, [STREAM("tail_parity ^= 1", "tail_parity")]),
    "slots not empty at first": (BULK, [STREAM("1", "0", "tail_parity = 1,")]),
    "parity of a copy under way not flipped": (BULK, [STREAM("oldest_parity ^= 1", "oldest_parity")]),
    "filling wraps a slot early": (BULK, [STREAM("++tail == SLOTS", "++tail == SLOTS - 1")]),
    "filling wraps a slot late": (BULK, [STREAM("++tail == SLOTS", "++tail == SLOTS + 1")]),
    "too few bytes announced": (
        BULK,
        [STREAM(EXPECT, "mbarrier_arrive_expect(full, cursor.bytes() - 16)")],
    ),
    "too many bytes announced": (
        BULK,
        [STREAM(EXPECT, "mbarrier_arrive_expect(full, cursor.bytes() + 16)")],
    ),
    "bytes not announced": (BULK, [STREAM(EXPECT, "mbarrier_arrive(full)")]),
    # ... and what they meet at.
    "a full slot awaits two arrivals": (BULK, [STREAM("1", "2", "mbarrier_init(full[0] + i, 1)")]),
    "an empty slot awaits two arrivals": (BULK, [STREAM("1", "2", "mbarrier_init(empty[0] + i, 1)")]),
    # The ring that each warp fills itself.
    "copy not waited for": (COPY, [STREAM("copy_async_wait<SLOTS - 1>()", "copy_async_wait<SLOTS>()")]),
    "copies never closed": (
        COPY,
        [STREAM("copy_async_commit()", "void()", "copy_async_commit();\n        tail_ = next(tail_)")],
    ),
    "no group for a slot that stays empty": (
        COPY,
        [STREAM("copy_async_commit()", "void()", "} else {\n            copy_async_commit()")],
    ),
    "ring wraps a slot early": (COPY, [STREAM("slot + 1 == SLOTS", "slot + 2 == SLOTS")]),
    "ring wraps a slot late": (COPY, [STREAM("slot + 1 == SLOTS", "slot == SLOTS")]),
    "a slot more in flight than there is": (COPY, [STREAM("SLOTS", "SLOTS + 1", "empty_ = SLOTS;")]),
    "no fetch over the border of a stage": (
        COPY,
        [Edit("matvec.cuh", "block.stream.refill()", "void()")],
    ),
    "no fetch over the border of an item": (
        COPY,
        [
            Edit("attention.cuh", "block.stream.refill()", "void()", f"{before};\n    block.stream.refill()")
            for before in ("score_tile(block, item, score)", "append_to_cache(block, item, layer)")
        ],
    ),
    # The exchange.
    "store torn": (
        BULK,
        [
            EXCHANGE(
                STORE,
                "(store_relaxed_32(&packet->x, x), store_relaxed_32(&packet->y, y), "
                "store_relaxed_32(&packet->z, z), store_relaxed_32(&packet->w, tag))",
            )
        ],
    ),
    "load torn": (
        BULK,
        [
            EXCHANGE(
                LOAD,
                f"uint4{{{', '.join(f'load_relaxed_32(&{LOAD[17:-1]}->{word})' for word in 'xyzw')}}}",
            )
        ],
    ),
    "published without a tag": (BULK, [EXCHANGE(STORE, STORE.replace("tag", "0"))]),
    "tag not compared": (BULK, [EXCHANGE(MISSING, "false")]),
    "any tag taken": (BULK, [EXCHANGE(MISSING, MISSING.replace("!= tag", "== 0"))]),
    "only the first packet of a batch awaited": (BULK, [EXCHANGE(MISSING, f"i == 0 && {MISSING}")]),
    # The partial softmaxes alone are in one place in all layers.
    "tag without the layer": (BULK, [EXCHANGE("static_cast<uint32_t>(layer)", "0u")]),
    "tag without the pass": (BULK, [EXCHANGE("args.pass * (NUM_LAYERS + 1)", "(NUM_LAYERS + 1)")]),
    "partials of all splits in one place": (
        BULK,
        [Edit("attention.cuh", "item.split", "0", "MAX_SPLITS + item.split")],
    ),
    # Candidates.
    "candidates without a tag": (
        BULK,
        [CANDIDATES("block.args.pass", "0u", "__float_as_uint(logit_of(entry)), block.args.pass")],
    ),
    "header without a tag": (
        BULK,
        [CANDIDATES("block.args.pass", "0u", "__float_as_uint(total), block.args.pass")],
    ),
    "queried logits without a tag": (
        BULK,
        [CANDIDATES("args.pass", "0u", "__float_as_uint(logit), args.pass")],
    ),
    "a mark replaces others": (
        BULK,
        [
            CANDIDATES(
                "set_bits_shared(marks + own / 32, 1u << own % 32)", "void(marks[own / 32] = 1u << own % 32)"
            )
        ],
    ),
    "a token of another rank": (BULK, [CANDIDATES("rank == least", "true")]),
    "sums of warps not rescaled": (BULK, [CANDIDATES("share.sum * scale", "share.sum")]),
    "sums of blocks not rescaled": (
        BULK,
        [CANDIDATES("rescale(entry, row.first, inverse_temperature)", "1.0f")],
    ),
    "a list's end does not bound the others": (
        BULK,
        [CANDIDATES("index % LISTED == LISTED - 1", "false")],
    ),
    "cut lists taken for all": (
        BULK,
        [CANDIDATES("listed == static_cast<float>(VOCAB_SIZE - num_queried)", "true")],
    ),
    "exact entries in one place": (
        BULK,
        [CANDIDATES("kept > 0 ? fetch_add_shared(&s.count, kept) : 0", "(s.count += kept, 0)")],
    ),
    "entries before one counted by one lane": (BULK, [CANDIDATES("block.lane() ^ 1", "block.lane()")]),
    "the count of the row before": (BULK, [CANDIDATES("s.count = 0", "s.count += 0")]),
    "mail not handed on": (BULK, [CANDIDATES("publish(packet, mail, 0, 0, tag)", "void()")]),
    "mail handed on empty": (
        BULK,
        [CANDIDATES("publish(packet, mail, 0, 0, tag)", "publish(packet, 0, 0, 0, tag)")],
    ),
    "queried ids without the appended one": (
        BULK,
        [CANDIDATES("block.args.num_queried[row] + appends(block, row)", "block.args.num_queried[row]")],
    ),
    "token not appended": (
        BULK,
        [CANDIDATES("blockIdx.x == 0 && block.thread == 0", "false")],
    ),
    # What is a row's own.
    "one list of queried ids": (BULK, [CANDIDATES("list * MAX_QUERIED", "0 * list")]),
    "another row's list": (BULK, [CANDIDATES("(1u << row) - 1", "(2u << row) - 1")]),
    "marks of all rows in one place": (BULK, [CANDIDATES("row * MARK_WORDS", "0 * row")]),
    "as many ids as the first row": (
        BULK,
        [
            CANDIDATES(
                "block.args.num_queried[row]",
                "block.args.num_queried[0]",
                "known = block.args.num_queried[row]",
            )
        ],
    ),
    "all rows append": (BULK, [CANDIDATES("block.args.append >> row", "block.args.append >> 7")]),
    "another row's token appended": (
        BULK,
        [CANDIDATES("token_of(block, row)", "token_of(block, 0)", "= token_of(block, row);\n        }")],
    ),
    "another row's token queried": (
        BULK,
        [CANDIDATES("token_of(block, row)", "token_of(block, 0)", "list[i] : token_of(block, row)")],
    ),
    "rows of all slots in one": (
        BULK,
        [ITEMS("args.rows[first_row - 1].slot == args.rows[row].slot", "true")],
    ),
    "items of all slots in one": (
        BULK,
        [ITEMS("args.rows[end].slot == args.rows[first].slot", "true")],
    ),
    "one slot in the cache": (BULK, [ITEMS("args.rows[row].slot", "0", "+ args.rows[row].slot")]),
    "the first row's splits for all": (
        BULK,
        [Edit("ffmini.cu", "items.splits(item.row) == 1", "items.splits(0) == 1")],
    ),
    "a finished row merged": (BULK, [Edit("ffmini.cu", "items.splits(row) == 1", "false")]),
    # Lanes and memory.
    "half a warp does not shuffle": (
        BULK,
        [Edit("block.cuh", "first < jobs", "first + block.lane() / 16 < jobs")],
    ),
    "read beyond shared memory": (
        BULK,
        [Edit("matvec.cuh", PLANES, f"{PLANES} + (1 << 18)")],
    ),
    # Integers.
    "high bytes cut, not rounded": (BULK, [ARITHMETIC("ROUNDER + 128", "ROUNDER + 0")]),
    "one plane twice": (BULK, [Edit("matvec.cuh", PLANES, PLANES.replace("column % 2", "0"))]),
    "a segment's power of two too large": (BULK, [ARITHMETIC("(largest + 1) >> 7", "largest >> 7")]),
    "another segment's power of two": (
        BULK,
        [Edit("matvec.cuh", "row * MAX_SEGMENTS + segment", "row * MAX_SEGMENTS")],
    ),
    "segments of a batch in one place": (BULK, [Edit("activations.cuh", "unit += WARPS", "unit += 0")]),
    # Keys and values.
    "keys as values are rotated": (BULK, [VECTORS("rotated(d, turn, KEY_ROTATION)", "rotated(d, turn, 1)")]),
    "what the row does not see is not hidden": (BULK, [VECTORS("loaded[0] & seen", "loaded[0]")]),
    "the largest of a lane for all": (INT8_KV_BUILD, [ARITHMETIC("warp_max(largest)", "largest")]),
    "codes of another scale": (INT8_KV_BUILD, [ARITHMETIC("1.0f / 127", "1.0f / 128")]),
    "a key without its scale": (INT8_KV_BUILD, [VECTORS("scale(key) * SCORE_SCALE", "SCORE_SCALE")]),
    "one scale for two values": (INT8_KV_BUILD, [VECTORS("scales[1]", "scales[0]", "* scales[1]")]),
    "another key's scale": (INT8_KV_BUILD, [VECTORS("4 * column(c)", "column(c)")]),
    "weights of what the row does not see": (
        INT8_KV_BUILD,
        [VECTORS("pack_bf16x2(low, high) & seen", "pack_bf16x2(low, high)")],
    ),
    "codes without a sign": (INT8_KV_BUILD, [VECTORS("(bytes & 0x00800080) | 0xc300c300", "0xc300c300")]),
    "even codes twice": (INT8_KV_BUILD, [VECTORS("codes >> 8", "codes")]),
    "dimensions of bf16": (
        INT8_KV_BUILD,
        [VECTORS("threadIdx.x % 32 / 4 * 2 + half", "threadIdx.x % 32 / 4 + 8 * half")],
    ),
    "the scale not appended": (
        INT8_KV_BUILD,
        [Edit("attention.cuh", "i < VECTOR_DATA", "i < HEAD_DIM")],
    ),
}
# The same where a wait gives up.
LEAVING: dict[str, tuple[str, list[Edit]]] = {
    "fetching goes on": (BULK, [STREAM("load_relaxed_shared(&state.abandoned) != 0", "false")]),
    "fetching does not hear of it": (BULK, [STREAM("store_relaxed_shared(&state_.abandoned, 1)", "void()")]),
    "copies left under way": (COPY, [STREAM("copy_async_wait<0>()", "void()")]),
    "any mail taken": (BULK, [CANDIDATES("static_cast<uint32_t>(mail) == args.pass", "true")]),
    "a token awaited for ever": (BULK, [CANDIDATES("global_timer_ns() < deadline", "true")]),
    "leave not handed on": (
        BULK,
        [
            CANDIDATES(
                "publish(packet, mail, 0, 0, tag)",
                "mail == MAIL_LEAVE ? void() : publish(packet, mail, 0, 0, tag)",
            )
        ],
    ),
}

SOURCES = sources_of("ffmini.cu")
BARRIERS = find_barriers(SOURCES)
VOTES = [place for place, match in BARRIERS.items() if match["vote"] is not None]
# Barriers whose lack no schedule shows: the file, the end of what stands before one, and why.
UNSEEN = [
    # The greatest of the lanes' values makes them meet too.
    ("activations.cuh", "warp_max(largest_bits(pairs_[i]));\n"),
    # fetch() has one before it starts copies, wait() has one before the cursor is looked at again.
    ("stream.cuh", "if (!all_have(result)) return;\n"),
]


SEEN = [place for place in BARRIERS if place not in {place_after(SOURCES, *barrier) for barrier in UNSEEN}]

# Every mistake that the builds of mutable_source() can make.
MISTAKES: dict[str, list[Change]] = {
    **{name: [change(SOURCES, edit) for edit in edits] for name, (_, edits) in (MUTATIONS | LEAVING).items()},
    **{place: [barrier_change(place, match)] for place, match in BARRIERS.items()},
    **{f"vote {place}": [vote_change(place, BARRIERS[place])] for place in VOTES},
}


def ring_of(place: str) -> str:
    """The build that has the code of `place`."""
    at, text = BARRIERS[place].start(), SOURCES["stream.cuh"]
    copies = range(text.index("class CopyRing"), text.index("struct BulkState"))
    return COPY if place.startswith("stream.cuh") and at in copies else BULK


class Mutable:
    """A build with switches, what it must compute and whether it does.

    Its model has more dimensions to a head than one sweep adds up and than one warp merges, more units than
    a round, an o_proj whose input covers all of attention's scratch, and odd numbers of tiles for a block:
    else some barriers guard nothing. Its rings have more than one slot.
    """

    CASE = Case(
        "qwen3",
        "int8",
        changes={"num_attention_heads": 24, "num_key_value_heads": 4, "head_dim": 96, "vocab_size": 64},
    )
    SHARED_LIMIT = 128 * 1024
    QUERIED = np.arange(0, 64, dtype=np.int32)[np.arange(64) % 3 > 0]  # marked by two warps
    FEW = np.arange(0, 64, 12)  # others that one block lists

    def __init__(self, packed: PackedModel, cuda: Path, ring: str) -> None:
        self.tokens = case_tokens(packed, self.CASE.rows + 1)
        options = {"rows": self.CASE.rows, "shared_limit": self.SHARED_LIMIT}
        options |= {"num_slots": 2, "kv_dtype": "int8" if ring == INT8_KV_BUILD else "bf16"}
        options["bulk_copies"] = ring != COPY
        self.decoder = SimDecoder(packed, MAX_SEQ_LEN, cuda=cuda, **options)
        exact = SimDecoder(packed, MAX_SEQ_LEN, **options)
        self.expected = {}
        for exact.blocks in (1, 3):  # as many candidates as blocks have room for
            self.expected[exact.blocks] = self.results(exact)

    def results(self, decoder: SimDecoder) -> np.ndarray:
        """Of a pass that sees one block of positions, one whose token comes by mail, three that see three.

        The first pass leaves out some of the candidates, the second none. The first and the last one have
        rows of two slots; what the first one's two wanted rows are asked for differs.
        """
        rows = self.CASE.rows
        works = [Work(1, self.tokens[:3], 0, ()), Work(0, self.tokens[3:rows], 0, ())]
        queries = {0: query(self.QUERIED, 1 / 0.8), rows - 1: query(self.QUERIED[::2])}
        first = decoder.ask_rows(works, queries, appended=[rows - 1])
        known = decoder._queried_ids[1, : len(self.QUERIED[::2]) + 1]
        mailbox = decoder.next_mail(int(self.tokens[rows]))
        known = np.union1d(known, np.setdiff1d(np.arange(64), self.FEW))
        awaited = decoder.listed(self.tokens[rows:], rows - 3, known, {0: 1.0}, mailbox=mailbox)
        deep = deep_logits(decoder, self.tokens, rows)
        works = [Work(0, self.tokens[2:4], DEEP, ()), Work(1, self.tokens[:2], 7, ())]
        mixed = decoder.launch(works, [1, 2])
        return np.concatenate([*map(flat, [*first.values(), awaited[0]]), deep.ravel(), mixed.ravel()])

    def start(self, name: str | None, seed: int) -> None:
        """Like a new decoder, with the mistake `name`."""
        decoder = self.decoder
        decoder.set_word("sim_mutation", -1 if name is None else list(MISTAKES).index(name))
        decoder.reset()
        decoder.seed, decoder.blocks = seed, 1 + 2 * (seed % 2)

    def is_wrong(self, name: str | None, seed: int) -> bool:
        """Whether the passes give other results or an error."""
        self.start(name, seed)
        try:
            return not same_bits(self.results(self.decoder), self.expected[self.decoder.blocks])
        except (SimError, GenerationError, NoTokenError, ValueError):
            return True

    def leaves(self, name: str | None, lost: int, blocks: int) -> bool:
        """Whether all blocks leave the pass when a packet got lost and a wait gives up."""
        self.start(name, 0)
        self.decoder.blocks = blocks
        self.decoder.lost_packet, self.decoder.give_up = lost, True
        try:
            self.results(self.decoder)
        except (SimError, GenerationError) as raised:
            return "a wait gave up" in str(raised)
        finally:
            self.decoder.lost_packet, self.decoder.give_up = None, False
        return False

    def leaves_without_token(self, name: str | None) -> bool:
        """Whether all blocks leave a pass when the mailbox keeps the mail of the one before."""
        self.start(name, 1)
        self.decoder.give_up = True
        stale = self.decoder.next_mail(int(self.tokens[0])) - 1
        try:
            self.decoder.listed(self.tokens[:1], 0, self.QUERIED, {0: 1.0}, mailbox=stale)
        except (SimError, GenerationError, NoTokenError) as raised:
            return isinstance(raised, NoTokenError)
        finally:
            self.decoder.give_up = False
        return False


@pytest.fixture(scope="module")
def mutable(
    pack: Callable[[Case], PackedModel], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Mutable]:
    """The mutable build with a ring, made once."""
    cuda = mutable_source(tmp_path_factory.mktemp("mutable") / "cuda", SOURCES, MISTAKES)
    return functools.cache(lambda ring: Mutable(pack(Mutable.CASE), cuda, ring))


@pytest.mark.parametrize("ring", [BULK, COPY, INT8_KV_BUILD])
def test_no_mutation_is_right(mutable: Callable[[str], Mutable], ring: str) -> None:
    assert not any(mutable(ring).is_wrong(None, seed) for seed in MUTATION_SEEDS)


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_found(mutable: Callable[[str], Mutable], name: str) -> None:
    """A mistake gives other logits, or an error, under one of a few seeds."""
    ring, _ = MUTATIONS[name]
    assert any(mutable(ring).is_wrong(name, seed) for seed in MUTATION_SEEDS)


@pytest.mark.parametrize("place", SEEN)
def test_a_barrier_less_is_found(mutable: Callable[[str], Mutable], place: str) -> None:
    assert any(mutable(ring_of(place)).is_wrong(place, seed) for seed in MUTATION_SEEDS)


def leaves_always(build: Mutable, name: str | None) -> bool:
    left = all(build.leaves(name, lost, blocks=1) for lost in lost_packets(build.decoder).values())
    left = left and all(
        build.leaves(name, lost, blocks=3) for lost in lost_hand_overs(build.decoder).values()
    )
    return left and build.leaves_without_token(name)


@pytest.mark.parametrize("ring", [BULK, COPY])
def test_no_mutation_leaves(mutable: Callable[[str], Mutable], ring: str) -> None:
    assert leaves_always(mutable(ring), None)


@pytest.mark.parametrize("name", [*LEAVING, *(f"vote {place}" for place in VOTES)])
def test_a_bad_leave_is_found(mutable: Callable[[str], Mutable], name: str) -> None:
    """Where a part of the block does not hear that a wait gave up, the block does not leave as one."""
    ring = LEAVING[name][0] if name in LEAVING else BULK
    assert not leaves_always(mutable(ring), name)


def test_all_barriers_are_mutated() -> None:
    """None is written in a way that the sweep does not see."""
    assert count_barriers(SOURCES) == len(BARRIERS) == len(SEEN) + len(UNSEEN)


COVERED = {  # together these run every line; "parts": down_proj's input is held so
    "biases, carried sums, parts": (
        BULK,
        Case(
            "llama_biases",
            "int4",
            32,
            rows=8,
            blocks=1,
            changes={"hidden_size": 528, "head_dim": 16, "intermediate_size": 400},
        ),
    ),
    "tied bf16, given up": (COPY, Case("smollm2", "bf16", rows=2, blocks=2)),
    "tied int8, norm of q and k, batches of packets, given up": (
        BULK,
        Case("qwen3", "int8", rows=4, changes={"intermediate_size": 1100}),
    ),
    "windows, int8 keys and values": (COPY, Case("qwen2", "int4", rows=1, changes={"head_dim": 32})),
}


def run_all(decoder: SimDecoder, tokens: np.ndarray, gives_up: bool) -> None:
    """Passes of all kinds; if `gives_up`, those too that end in an error, each in its place."""
    for seed in (0, 28):  # all copies late, some of them
        decoder.seed = seed
        deep_logits(decoder, tokens, decoder.rows)
    decoder.forward(tokens, 0, "none")
    decoder.finish_rows(np.ones((1, decoder.config.hidden_size), np.float32))
    if decoder.rows > 1:
        decoder.launch([Work(1, tokens[:1], 0, ()), Work(0, tokens[1:2], DEEP, ())], [0])
    decoder.listed(tokens, 0, [3, 7], {0: 1.0}, append=True)
    mailbox = decoder.next_mail(int(tokens[0]), append=True)
    decoder.listed(tokens[:1], 0, [3, 7], {0: 1.0}, mailbox=mailbox)
    if not gives_up:
        return
    decoder.give_up = True
    with pytest.raises(NoTokenError):
        decoder.listed(tokens[:1], 0, [3, 7], {0: 1.0}, mailbox=mailbox)
    for lost in lost_packets(decoder).values():
        decoder.lost_packet = lost
        with pytest.raises(GenerationError, match="a wait gave up"):
            deep_logits(decoder, tokens, decoder.rows)
    decoder.lost_packet = None
    decoder._arrays["norm"][...] = 3e38
    with pytest.raises(GenerationError, match="non-finite"):
        deep_logits(decoder, tokens, decoder.rows)


def test_every_line_runs(pack: Callable[[Case], PackedModel]) -> None:
    """gcov finds no line of cuda/ that runs nowhere: not the pauses, not a single wait that gives up."""
    counts: dict[tuple[str, int], int] = {}
    for name, (ring, case) in COVERED.items():
        packed = pack(case)
        options = {"test_pauses": True, "stage_times": True, "coverage": True}
        options["shared_limit"] = LARGE_SHARED_LIMIT  # eight rows of all tiles in one block need it
        decoder = SimDecoder(
            packed,
            MAX_SEQ_LEN,
            rows=case.rows,
            blocks=case.blocks,
            bulk_copies=ring == BULK,
            part_segments=1 if "parts" in name else None,
            kv_dtype="int8" if "int8 keys" in name else "bf16",
            num_slots=2,
            **options,
        )
        run_all(decoder, case_tokens(packed, case.rows), name.endswith("given up"))
        for file, lines in decoder.coverage().items():
            for line, count in lines.items():
                counts[file, line] = max(counts.get((file, line), 0), count)
    assert {file for file, _ in counts} == SOURCES.keys()
    # A template that no build uses has no lines to gcov.
    copies = re.compile("^ .*(copy_async|copy_bulk|mbarrier|global_timer_ns)")
    used = [
        (name, i)
        for name, text in SOURCES.items()
        for i, line in enumerate(text.splitlines(), 1)
        if copies.match(line)
    ]
    assert [place for place in used if place not in counts] == []
    assert sorted(place for place, count in counts.items() if count == 0) == []


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
