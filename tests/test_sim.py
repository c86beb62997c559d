"""The kernel's own source on the simulated device (tests/sim) against the CPU path, under many schedules."""

from __future__ import annotations

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
from sim.driver import SimDecoder, SimError, sanitized_environment
from sim_cases import (
    DEEP,
    GOLDEN_CASES,
    MAX_SEQ_LEN,
    Case,
    case_tokens,
    pack_case,
    packed_digest,
    random_cache,
)

from ffmini.cpu import CPUDecoder
from ffmini.errors import GenerationError
from ffmini.numerics import from_bf16
from ffmini.packing import PackedModel
from ffmini.resources import resource_dir

# Every format with every number of rows; families, group sizes, head sizes, ratios of heads and grids.
CASES = {
    "llama2": Case("llama2", "bf16", rows=8, blocks=3),
    "llama3.1": Case("llama3.1", "int8", rows=1, blocks=7, changes={"intermediate_size": 300}),
    "biases": Case("llama_biases", "int4", 32, rows=2, blocks=1),
    "head_dim_48": Case("llama_head_dim", "int8", 32, rows=4, blocks=2),
    "smollm2": Case("smollm2", "int4", 64, rows=8, blocks=2),
    "mistral": Case("mistral", "int8", 64, rows=4, blocks=3),
    "qwen2": Case("qwen2", "bf16", rows=2, blocks=7, changes={"hidden_size": 128}),
    "qwen3": Case("qwen3", "int4", rows=1, blocks=3),
    # More segments and tiles than one round of additions takes, in a grid of one block.
    "wide": Case(
        "llama2",
        "int4",
        rows=8,
        blocks=1,
        changes={
            "hidden_size": 528,
            "intermediate_size": 1100,
            "head_dim": 64,
            "num_attention_heads": 7,
            "num_key_value_heads": 1,
        },
    ),
    "head_dim_8": Case(
        "llama2",
        "bf16",
        rows=8,
        blocks=3,
        changes={"head_dim": 8, "num_key_value_heads": 1, "hidden_size": 72},
    ),
    "head_dim_256": Case(
        "qwen3",
        "int8",
        rows=4,
        blocks=1,
        changes={"head_dim": 256, "num_attention_heads": 4, "num_key_value_heads": 1},
    ),
    "head_dim_80": Case(
        "llama2", "int4", 64, rows=1, blocks=1, changes={"head_dim": 80, "num_key_value_heads": 2}
    ),
}


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


@pytest.mark.parametrize("name", CASES)
def test_matches_cpu(pack: Callable[[Case], PackedModel], name: str) -> None:
    """The whole model from position 0, then every stage of a pass deep in the context."""
    case = CASES[name]
    packed = pack(case)
    oracle = CPUDecoder(packed, MAX_SEQ_LEN, progress=False)
    exact = CPUDecoder(packed, MAX_SEQ_LEN, precision="float64", progress=False)
    decoder = SimDecoder(packed, MAX_SEQ_LEN, rows=case.rows, blocks=case.blocks, seed=1)
    prompt = case_tokens(packed, 2 * case.rows + 3)
    reference = exact.forward(prompt, 0, "all")
    own_error = error(oracle.forward(prompt, 0, "all"), reference)
    check_logits(error(decoder.forward(prompt, 0, "all"), reference), own_error)

    fill_cache(decoder)
    share_cache(oracle, decoder.key_cache[:, 0], decoder.value_cache[:, 0], DEEP)
    tokens = prompt[: case.rows]
    logits = decoder.forward(tokens, DEEP, "all")
    check_stages(decoder.stages(), oracle, tokens, DEEP)
    assert error(logits, oracle.norm_lm_head(decoder.stages()[-1]["hidden"])) < 1e-3
    for found, kept in ((decoder.key_cache, oracle.key_cache), (decoder.value_cache, oracle.value_cache)):
        after = slice(DEEP, DEEP + case.rows)
        assert error(from_bf16(found[:, 0, :, after]), kept[:, :, after]) < 4e-3
        assert (found[:, :, :, after.stop :] == 0xFFFF).all()


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
    packed = pack(CASES["llama2"])
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
    for seed in range(1, 201):
        decoder.seed, decoder.blocks = seed, 7 if seed % 20 == 0 else 2 + seed % 2
        assert same_bits(decoder.forward(tokens, DEEP, "all"), expected), f"seed {seed}"


def test_packets_held_back(pack: Callable[[Case], PackedModel]) -> None:
    """The test build with pauses computes the same."""
    packed = pack(CASES["llama2"])
    tokens = case_tokens(packed, 8)
    plain, pausing = (SimDecoder(packed, MAX_SEQ_LEN, test_pauses=pauses) for pauses in (False, True))
    assert same_bits(deep_logits(pausing, tokens, 8), deep_logits(plain, tokens, 8))


def lost_packets(decoder: SimDecoder) -> dict[str, int]:
    """Indices into the exchange: a packet of each kind of layer 1, the last hidden, a partial softmax."""
    counts = packet_counts(decoder.config)
    starts = np.cumsum([0, *counts.values()])
    before = decoder.config.num_layers * starts[-1]
    places = {f"layer 1 {name}": starts[-1] + at for name, at in zip(counts, starts, strict=False)}
    places |= {"last hidden": before, "partial": before + counts["hidden"]}
    return {name: int(decoder.rows * at) for name, at in places.items()}


LOST = {  # where a packet gets lost: in which layer the pass must end
    "layer 1 hidden": 1,
    "layer 1 qkv": 1,
    "layer 1 attention": 1,
    "layer 1 mid_hidden": 1,
    "layer 1 activation": 1,
    "last hidden": 2,
    "partial": 0,
}


@pytest.mark.parametrize("stage", LOST)
def test_a_lost_packet(pack: Callable[[Case], PackedModel], stage: str) -> None:
    """A deadlock is reported; where time passes the kernel gives up, says where and stays usable."""
    packed = pack(Case("llama2", changes={"vocab_size": 64}))
    decoder = SimDecoder(packed, MAX_SEQ_LEN, rows=1)
    tokens = case_tokens(packed, 1)
    expected = deep_logits(decoder, tokens, 1)
    place = lost_packets(decoder)[stage]
    for seed in range(1, 201):
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

# File, the text that stands there once, what a careless change would make of it.
MUTATIONS = {
    "barrier before the additions": (
        "matvec.cuh",
        "__syncthreads();\n        add_segments<M>",
        "add_segments<M>",
    ),
    "barrier after the additions": (
        "matvec.cuh",
        "parity, epilogue);\n        __syncthreads();",
        "parity, epilogue);",
    ),
    "slot given back too early": (
        "stream.cuh",
        "void release() {\n        __syncwarp();",
        "void release() {",
    ),
    "copy not waited for": ("stream.cuh", "copy_async_wait<SLOTS - 1>", "copy_async_wait<SLOTS>"),
    "tag not compared": ("exchange.cuh", "packet[i].w != tag", "packet[i].w == 0"),
    "tag without the layer": (
        "exchange.cuh",
        "(NUM_LAYERS + 1) + static_cast<uint32_t>(layer)",
        "(NUM_LAYERS + 1)",
    ),
    "read beyond shared memory": (
        "matvec.cuh",
        "column * MAX_GROUPS + group",
        "column * MAX_GROUPS + group + (1 << 17)",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_found(pack: Callable[[Case], PackedModel], tmp_path: Path, name: str) -> None:
    """A mistake in a copy of the source gives other logits, or an error, under one of a few seeds."""
    file, old, new = MUTATIONS[name]
    cuda = tmp_path / "cuda"
    shutil.copytree(resource_dir("cuda"), cuda)
    text = (cuda / file).read_text()
    assert text.count(old) == 1
    (cuda / file).write_text(text.replace(old, new))
    packed = pack(Case("qwen2", "int4"))
    tokens = case_tokens(packed, 11)
    expected = deep_logits(SimDecoder(packed, MAX_SEQ_LEN, rows=8), tokens, 8)
    decoder = SimDecoder(packed, MAX_SEQ_LEN, rows=8, cuda=cuda)

    def is_wrong(seed: int) -> bool:
        decoder.seed, decoder.blocks = seed, 1 + 2 * (seed % 2)
        try:
            return not same_bits(deep_logits(decoder, tokens, 8), expected)
        except (SimError, GenerationError):
            return True

    assert any(is_wrong(seed) for seed in range(12))


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
    tests = [f"{__file__}::test_matches_cpu[{name}]" for name in ("biases", "head_dim_8")]
    command = [sys.executable, "-m", "pytest", "-q", *tests]
    result = subprocess.run(command, env=sanitized_environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    assert "2 passed" in result.stdout


def test_missing_compiler(pack: Callable[[Case], PackedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack(CASES["llama2"])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SimError, match=r"g\+\+ not found"):
        SimDecoder(packed, MAX_SEQ_LEN)
