"""The kernel's own source on the simulated device (tests/sim) against the CPU path, under many schedules."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bounds import check_logits_sent, check_sent
from comparison import check_logits, check_stages, error, share_cache
from packets import packet_counts
from sim.driver import EVENTS, SHARED_LIMIT, SimDecoder, SimError, sanitized_environment
from sim_cases import (
    COVER,
    DEEP,
    GOLDEN_CASES,
    MAX_SEQ_LEN,
    ROPES,
    Case,
    case_tokens,
    covered_pairs,
    pack_case,
    packed_digest,
    random_cache,
    wanted_pairs,
)

from ffmini.cpu import CPUDecoder
from ffmini.errors import GenerationError
from ffmini.numerics import from_bf16
from ffmini.packing import PackedModel
from ffmini.resources import resource_dir

BUILDS = {f"{build.family}-{build.dtype}": build for build in COVER}
SANITIZED = ("llama_biases-int4", "llama_biases-bf16")
LARGE_SHARED_LIMIT = 163 * 1024  # of sm_80 and sm_87: 8 rows of the wide builds do not fit the smallest GPUs
SMALL = Case("llama2", "bf16", rows=8)
SEEDS = range(1, 201)
MUTATION_SEEDS = range(12)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], PackedModel]:
    """The packed model of a case, made once."""

    made: dict[str, PackedModel] = {}

    def packed(case: Case) -> PackedModel:
        key = repr((case.family, case.dtype, case.group_size, case.changes))
        if key not in made:
            made[key] = pack_case(tmp_path_factory.mktemp("checkpoint") / "model", case)
        return made[key]

    return packed


def fill_cache(decoder: SimDecoder, start: int = DEEP) -> None:
    for cache in (decoder.key_cache, decoder.value_cache):
        cache[...] = random_cache(cache.shape, start)


def deep_logits(decoder: SimDecoder, tokens: np.ndarray, chunk: int) -> np.ndarray:
    """The logits of `tokens` from position DEEP on, in passes of `chunk` rows."""
    fill_cache(decoder)
    pieces = [decoder.forward(tokens[i : i + chunk], DEEP + i, "all") for i in range(0, len(tokens), chunk)]
    return np.concatenate(pieces)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


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
    check_stages(decoder.stages(), oracle, tokens, DEEP)
    assert error(logits, oracle.norm_lm_head(decoder.stages()[-1]["hidden"])) < 1e-3
    for found, kept in ((decoder.key_cache, oracle.key_cache), (decoder.value_cache, oracle.value_cache)):
        after = slice(DEEP, DEEP + len(tokens))
        assert error(from_bf16(found[:, 0, :, after]), kept[:, :, after]) < 4e-3
        assert (found[:, :, :, after.stop :] == 0xFFFF).all()


@pytest.mark.parametrize("name", BUILDS)
def test_matches_cpu(pack: Callable[[Case], PackedModel], name: str) -> None:
    """Both runs of a build of the cover."""
    build = BUILDS[name]
    packed = pack(build.case())
    rows, blocks = build.prompt
    limit = LARGE_SHARED_LIMIT if build.widths == "wide" else SHARED_LIMIT
    decoder = SimDecoder(packed, MAX_SEQ_LEN, rows=rows, blocks=blocks, seed=1, shared_limit=limit)
    oracle = CPUDecoder(packed, MAX_SEQ_LEN, progress=False)
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


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
def test_same_bits(pack: Callable[[Case], PackedModel], dtype: str) -> None:
    """However the rows are grouped, however many blocks there are, whatever the schedule is."""
    packed = pack(Case("qwen2", dtype))
    tokens = case_tokens(packed, 9)
    many = SimDecoder(packed, MAX_SEQ_LEN, rows=8, blocks=1)
    one = SimDecoder(packed, MAX_SEQ_LEN, rows=1, shared_limit=227 * 1024)  # a deeper ring
    expected = deep_logits(many, tokens, 8)
    for decoder, chunk, blocks, seed in (
        (many, 8, 2, 0),
        (many, 3, 7, 11),
        (many, 5, 3, 12),
        (one, 1, 3, 13),
    ):
        decoder.blocks, decoder.seed = blocks, seed
        assert same_bits(deep_logits(decoder, tokens, chunk), expected), (chunk, blocks, seed)


def test_logits_as_asked(pack: Callable[[Case], PackedModel]) -> None:
    packed = pack(SMALL)
    decoder = SimDecoder(packed, MAX_SEQ_LEN, rows=8)
    tokens = case_tokens(packed, 10)
    every = decoder.forward(tokens, 0, "all")
    assert same_bits(decoder.forward(tokens, 0, "last"), every[-1:])
    assert decoder.forward(tokens, 0, "none").shape == (0, packed.config.vocab_size)
    assert same_bits(decoder.launch(tokens[:8], 0, [1, 6]), every[[1, 6]])


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
    check_logits_sent(logits, golden["logits"], fed[-1]["hidden"], packed)


# ---- schedules -----------------------------------------------------------------------------------------


def test_schedules(pack: Callable[[Case], PackedModel]) -> None:
    """200 seeds: lanes in any order, blocks and warps starved, stores and copies late."""
    packed = pack(Case("llama2", "int4", 32, changes={"vocab_size": 64}))
    decoder = SimDecoder(packed, MAX_SEQ_LEN, rows=1)
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
    decoder = SimDecoder(packed, MAX_SEQ_LEN, rows=1)
    tokens = case_tokens(packed, 1)
    expected = deep_logits(decoder, tokens, 1)
    place = lost_packets(decoder)[stage]
    for seed in SEEDS:
        decoder.seed, decoder.blocks, decoder.lost_packet = seed, 2 + seed % 2, place
        decoder.give_up = seed % 2 == 0
        if decoder.give_up:
            with pytest.raises(GenerationError, match="a wait gave up"):
                decoder.forward(tokens, DEEP)
            assert decoder.status["stage"] // 8 == LOST[stage]
        else:
            with pytest.raises(SimError, match=r"deadlock: .*exchange.cuh:\d+ for exchange \("):
                decoder.forward(tokens, DEEP)
        if seed % 50 == 0:
            decoder.lost_packet = None
            assert same_bits(decoder.forward(tokens, DEEP), expected)


def test_non_finite_logits(pack: Callable[[Case], PackedModel]) -> None:
    packed = pack(Case("llama2", changes={"vocab_size": 67}))
    packed.norm = np.full_like(packed.norm, 3e38)
    with pytest.raises(GenerationError, match="non-finite"):
        SimDecoder(packed, MAX_SEQ_LEN).forward(case_tokens(packed, 3), 0)


# ---- that all this can fail ----------------------------------------------------------------------------

# File, an expression that stands there once, what a careless change would make of it.
MUTATIONS = {
    "copy not waited for": ("stream.cuh", "copy_async_wait<SLOTS - 1>()", "copy_async_wait<SLOTS>()"),
    "copies never closed": ("stream.cuh", "copy_async_commit()", "void()"),
    "ring wraps a slot early": ("stream.cuh", "head_ + 1 == SLOTS", "head_ + 2 == SLOTS"),
    "ring wraps a slot late": ("stream.cuh", "head_ + 1 == SLOTS", "head_ == SLOTS"),
    "a slot more in flight than there is": ("stream.cuh", "slot < SLOTS", "slot <= SLOTS"),
    "tail fetched as a whole slot": ("stream.cuh", "ends_tile_ && slots_left_ == 1", "false"),
    "store torn": (
        "exchange.cuh",
        "store_relaxed_128(packet, make_uint4(x, y, z, tag))",
        "(store_relaxed_32(&packet->x, x), store_relaxed_32(&packet->y, y), "
        "store_relaxed_32(&packet->z, z), store_relaxed_32(&packet->w, tag))",
    ),
    "load torn": (
        "exchange.cuh",
        "load_relaxed_128(packets + index)",
        "uint4{load_relaxed_32(&packets[index].x), load_relaxed_32(&packets[index].y), "
        "load_relaxed_32(&packets[index].z), load_relaxed_32(&packets[index].w)}",
    ),
    "first load torn": (
        "exchange.cuh",
        "load_relaxed_128(packets + begin + i * step)",
        "uint4{load_relaxed_32(&packets[begin + i * step].x), load_relaxed_32(&packets[begin + i * step].y), "
        "load_relaxed_32(&packets[begin + i * step].z), load_relaxed_32(&packets[begin + i * step].w)}",
    ),
    "published without a tag": ("exchange.cuh", "make_uint4(x, y, z, tag)", "make_uint4(x, y, z, 0)"),
    "tag not compared": ("exchange.cuh", "packet[i].w != tag", "false"),
    "any tag taken": ("exchange.cuh", "packet[i].w != tag", "packet[i].w == 0"),
    "tag without the layer": ("exchange.cuh", "static_cast<uint32_t>(layer)", "0u"),
    "tag without the pass": ("exchange.cuh", "args.pass * (NUM_LAYERS + 1)", "(NUM_LAYERS + 1)"),
    "shuffle of half a warp under a full mask": (
        "ffmini.cu",
        "__shfl_sync(0xffffu << base, __float_as_uint(value), source)",
        "__shfl_sync(0xffffffff, __float_as_uint(value), source)",
    ),
    "read beyond shared memory": (
        "matvec.cuh",
        "column * MAX_GROUPS + group",
        "column * MAX_GROUPS + group + (1 << 17)",
    ),
}

# A barrier, alone or with a vote.
BARRIER = re.compile(r"__sync(?:threads|warp)\(\)|__syncthreads_or\(([^()]*)\)")
SOURCES = sorted(path for path in resource_dir("cuda").glob("*.cu*") if path.name != "ptx.cuh")


def barriers() -> dict[str, str]:
    """Each barrier of the source: its place, `file:line`, and its text."""
    found = {}
    for path in SOURCES:
        lines = path.read_text().splitlines()
        for line, match in ((i, m) for i, text in enumerate(lines, 1) for m in BARRIER.finditer(text)):
            found[f"{path.name}:{line}"] = match[0]
    return found


BARRIERS = barriers()
VOTES = [place for place, text in BARRIERS.items() if "_or" in text]
# All that can be switched on in the one build of mutable_source().
SWITCHES = [*MUTATIONS, *BARRIERS, *(f"vote {place}" for place in VOTES)]


def switched(name: str, new: str, old: str) -> str:
    return f"(sim_mutation == {SWITCHES.index(name)} ? ({new}) : ({old}))"


def mutable_source(directory: Path) -> Path:
    """A copy of cuda/ in which setting sim_mutation to an index into SWITCHES makes that one mistake."""
    shutil.copytree(resource_dir("cuda"), directory)
    for source in SOURCES:
        text = source.read_text()
        mine = {name: edit[1:] for name, edit in MUTATIONS.items() if edit[0] == source.name}
        for old in sorted({old for old, _ in mine.values()}, key=len, reverse=True):  # the inner ones last
            assert text.count(old) == 1, old
            expression = old
            for name in (name for name in mine if mine[name][0] == old):
                expression = switched(name, mine[name][1], expression)
            text = text.replace(old, expression)
        lines = text.splitlines()
        for i, line in enumerate(lines):
            lines[i] = BARRIER.sub(functools.partial(switched_barrier, f"{source.name}:{i + 1}"), line)
        (directory / source.name).write_text("\n".join(lines))
    config = directory / "config.cuh"
    config.write_text('extern "C" { inline int sim_mutation = -1; }\n' + config.read_text())
    return directory


def switched_barrier(place: str, match: re.Match[str]) -> str:
    """The barrier of `match` with one switch that takes it away and, where it votes, one for the vote."""
    if match[1] is None:
        return switched(place, "void()", match[0])
    alone = switched(f"vote {place}", f"(__syncthreads(), {match[1]})", match[0])
    return switched(place, match[1], alone)


class Mutable:
    """The build with switches, what it must compute and whether it does.

    Its model has more than HEAD_CHUNK heads to an item, more units than a round, and an o_proj whose input
    covers all of attention's scratch: else some barriers guard nothing.
    """

    CASE = Case(
        "qwen3",
        "int4",
        32,
        changes={"num_attention_heads": 72, "num_key_value_heads": 12, "vocab_size": 64},
    )

    def __init__(self, packed: PackedModel, cuda: Path) -> None:
        self.tokens = case_tokens(packed, 11)
        self.expected = self.logits(SimDecoder(packed, MAX_SEQ_LEN, rows=8))
        self.decoder = SimDecoder(packed, MAX_SEQ_LEN, rows=8, cuda=cuda)

    def logits(self, decoder: SimDecoder) -> np.ndarray:
        """Of a pass that sees one block of positions, and of two that see three."""
        first = decoder.forward(self.tokens[:8], 0, "all")
        return np.concatenate([first, deep_logits(decoder, self.tokens, 8)])

    def start(self, name: str | None, seed: int) -> None:
        """Like a new decoder, with the switch `name` on."""
        decoder = self.decoder
        decoder.set_word("sim_mutation", -1 if name is None else SWITCHES.index(name))
        decoder.reset()
        decoder.seed, decoder.blocks = seed, 1 + 2 * (seed % 2)

    def is_wrong(self, name: str | None, seed: int) -> bool:
        """Whether two passes give other logits or an error."""
        self.start(name, seed)
        try:
            return not same_bits(self.logits(self.decoder), self.expected)
        except (SimError, GenerationError):
            return True


@pytest.fixture(scope="module")
def mutable(pack: Callable[[Case], PackedModel], tmp_path_factory: pytest.TempPathFactory) -> Mutable:
    return Mutable(pack(Mutable.CASE), mutable_source(tmp_path_factory.mktemp("mutable") / "cuda"))


def test_no_mutation_is_right(mutable: Mutable) -> None:
    assert not any(mutable.is_wrong(None, seed) for seed in MUTATION_SEEDS)


@pytest.mark.parametrize("name", [*MUTATIONS, *BARRIERS])
def test_mutation_is_found(mutable: Mutable, name: str) -> None:
    """A mistake, or a barrier less, gives other logits, or an error, under one of a few seeds."""
    assert any(mutable.is_wrong(name, seed) for seed in MUTATION_SEEDS)


@pytest.mark.parametrize("place", VOTES)
def test_a_vote_less_is_found(mutable: Mutable, place: str) -> None:
    """Where threads do not hear that a wait of others gave up, the block does not leave as one."""
    decoder = mutable.decoder

    def leaves(switch: str | None, lost: int) -> bool:
        mutable.start(switch, 0)
        decoder.lost_packet, decoder.give_up = lost, True
        try:
            mutable.logits(decoder)
        except (SimError, GenerationError) as raised:
            return "a wait gave up" in str(raised)
        finally:
            decoder.lost_packet, decoder.give_up = None, False
        return False

    places = lost_packets(decoder).values()
    assert all(leaves(None, lost) for lost in places)
    assert not all(leaves(f"vote {place}", lost) for lost in places)


def test_all_barriers_are_mutated() -> None:
    """None is written in a way that the sweep does not see."""
    code = "\n".join(re.sub("//.*", "", path.read_text()) for path in SOURCES)
    assert len(re.findall("__sync", code)) == len(BARRIERS)


COVERED = {  # together these run every line
    "biases, carried sums": Case(
        "llama_biases", "int4", 32, rows=8, blocks=1, changes={"hidden_size": 528, "head_dim": 16}
    ),
    "tied bf16": Case("smollm2", "bf16", rows=2, blocks=2),
    "tied int8, norm of q and k": Case("qwen3", "int8", rows=4),
}


def test_every_line_runs(pack: Callable[[Case], PackedModel]) -> None:
    """gcov finds no line of cuda/ that runs nowhere: not the pauses, not a single wait that gives up."""
    counts: dict[tuple[str, int], int] = {}
    for name, case in COVERED.items():
        packed = pack(case)
        decoder = SimDecoder(
            packed, MAX_SEQ_LEN, rows=case.rows, blocks=case.blocks, test_pauses=True, coverage=True
        )
        tokens = case_tokens(packed, case.rows)
        deep_logits(decoder, tokens, case.rows)
        decoder.forward(tokens, 0, "none")
        if name == "tied bf16":
            decoder.give_up = True
            for place in lost_packets(decoder).values():
                decoder.lost_packet = place
                with pytest.raises(GenerationError, match="a wait gave up"):
                    deep_logits(decoder, tokens, case.rows)
            decoder.lost_packet = None
            decoder._arrays["norm"][...] = 3e38
            with pytest.raises(GenerationError, match="non-finite"):
                deep_logits(decoder, tokens, case.rows)
        for file, lines in decoder.coverage().items():
            for line, count in lines.items():
                counts[file, line] = max(counts.get((file, line), 0), count)
    sources = {path.name for path in resource_dir("cuda").glob("*.cu*")}
    assert {file for file, _ in counts} == sources - {"ptx.cuh", "read_peak.cu"}
    never = sorted(place for place, count in counts.items() if count == 0)
    assert never == []


def test_sanitizers() -> None:
    """AddressSanitizer and UndefinedBehaviorSanitizer find nothing in bf16, in int4 and its int8 lm_head."""
    tests = [f"{__file__}::test_matches_cpu[{name}]" for name in SANITIZED]
    command = [sys.executable, "-m", "pytest", "-q", *tests]
    result = subprocess.run(command, env=sanitized_environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    assert "2 passed" in result.stdout


def test_missing_compiler(pack: Callable[[Case], PackedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack(SMALL)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SimError, match=r"g\+\+ not found"):
        SimDecoder(packed, MAX_SEQ_LEN)
