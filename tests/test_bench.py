"""What bench counts, makes up, checks and times; the speed of the machine that runs this is no matter."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from comparison import share_cache
from tiny import tiny_config, tiny_tensors, with_changes, write_checkpoint, write_safetensors

import ffmini
from ffmini import bench, gpu
from ffmini.bench import Plan, fill_cache, measure, pass_bytes, perplexity, random_model
from ffmini.cli import main, make_parser
from ffmini.config import ModelConfig, parse_config
from ffmini.convert import pack_checkpoint
from ffmini.cpu import CPUDecoder
from ffmini.errors import GenerationError, UnsupportedError
from ffmini.kernel import compile_cubin, has_bulk_copies
from ffmini.layout import VectorLayout
from ffmini.model import bundled_model_path
from ffmini.numerics import from_bf16, round_bf16, split_vectors
from ffmini.packing import LAYER_MATRICES, make_layouts, unpack_matrix
from ffmini.passes import Work
from ffmini.shapes import SHAPES

ROOT = Path(__file__).parent.parent
TINY = tiny_config("llama2", intermediate_size=176)
PLAN = Plan([5], [3], depths=[0, 7], repetitions=2, rows=[2, 5], end_to_end=4, guesses=6)
TESTS = [
    *[("pp5", 0), ("tg3", 0), ("pp5", 7), ("tg3", 7), ("e2e4", 0)],
    *[("edit6", 0), ("new6", 0)],
    *[("rows2", 0), ("rows5", 0), ("rows2", 7), ("rows5", 7)],
]
KEYS = (
    "shape dtype kv_dtype engine test depth rows tokens_per_s us_per_token us_per_pass bytes "
    "peak_bytes_per_s fraction over_queued device driver commit"
)

# Parameters of the published models, tied embeddings counted once.
PARAMETERS = {"llama-3.2-1b": 1_235_814_400, "llama-3.1-8b": 8_030_261_248, "qwen3-0.6b": 596_049_920}


def config_of(raw: dict[str, Any]) -> ModelConfig:
    return parse_config(raw, "config.json")


@pytest.fixture(autouse=True)
def small_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's speed does not matter here."""
    monkeypatch.setattr(bench, "CPU_PEAK_BYTES", 16 << 20)


# ---- bytes ---------------------------------------------------------------------------------------------


def skeleton(config: ModelConfig, format: str) -> bench.PackedModel:
    """A PackedModel without weights: all that pass_bytes looks at."""
    layouts, none = make_layouts(config, format), np.zeros(0, np.uint8)
    return bench.PackedModel(config, format, 128, layouts, [], none, None, none, None)


@pytest.mark.parametrize("shape", SHAPES)
def test_pass_bytes_of_published_shapes(shape):
    """bf16: two bytes per parameter of a matrix, four of a vector; one row of an untied embedding."""
    config = config_of(SHAPES[shape])
    hidden, layers = config.hidden_size, config.num_layers
    vectors = (2 * layers + 1) * hidden + (2 * layers * config.head_dim if config.qk_norm else 0)
    table = 0 if config.tie_word_embeddings else config.vocab_size * hidden
    expected = 2 * (PARAMETERS[shape] - vectors - table) + 4 * vectors + (2 * hidden if table else 0)
    assert pass_bytes(skeleton(config, "bf16"), 0) == expected
    assert pass_bytes(skeleton(config, "bf16"), 1000) == expected + 1000 * gpu.kv_cache_bytes(config, 1)
    more = 3 * 2 * hidden if table else 0  # embeddings are all that a row of its own adds
    assert pass_bytes(skeleton(config, "bf16"), 0, rows=4) == expected + more


@pytest.mark.parametrize(("format", "bits"), [("int8", 8.125), ("int4", 4.25)])
def test_pass_bytes_count_scales(format, bits):
    config = config_of(SHAPES["llama-3.1-8b"])
    head = config.vocab_size * config.hidden_size
    projections = PARAMETERS["llama-3.1-8b"] - 2 * head - 65 * config.hidden_size
    expected = (
        projections * bits / 8 + head * 8.125 / 8 + 4 * 65 * config.hidden_size + 2 * config.hidden_size
    )
    assert pass_bytes(skeleton(config, format), 0) == expected


@pytest.mark.parametrize("family", ["llama2", "llama_biases", "smollm2", "qwen2", "qwen3"])
@pytest.mark.parametrize("format", ["bf16", "int4"])
def test_pass_bytes_are_those_of_the_arrays(tmp_path, family, format):
    packed = pack_checkpoint(write_checkpoint(tmp_path / family, tiny_config(family)), format, progress=False)
    layers = sum(
        layer.vectors.nbytes + sum(getattr(layer, name).nbytes for name in LAYER_MATRICES)
        for layer in packed.layers
    )
    row = 0 if packed.embed_tokens is None else packed.embed_tokens[0].nbytes
    assert pass_bytes(packed, 0) == layers + packed.norm.nbytes + packed.lm_head.nbytes + row


def test_pass_bytes_leave_out_what_a_window_hides():
    """Layer 0 sees everything; layers 1 and 2 a window of 12, the row itself included."""
    config = config_of(tiny_config("qwen2"))
    packed = skeleton(config, "bf16")
    position = 2 * 2 * config.num_kv_heads * config.head_dim
    assert config.layer_windows == (0, 12, 12)
    assert pass_bytes(packed, 8) - pass_bytes(packed, 0) == 3 * 8 * position
    assert pass_bytes(packed, 100) - pass_bytes(packed, 0) == (100 + 11 + 11) * position


def test_pass_bytes_count_what_int8_vectors_take():
    """Codes, a scale of four bytes and its padding; two vectors for each layer and head."""
    config = config_of(SHAPES["llama-3.1-8b"])
    packed, vectors = skeleton(config, "int4"), 2 * 32 * 8
    found = [pass_bytes(packed, depth, kv_dtype="int8") for depth in (0, 1000)]
    assert found[1] - found[0] == 1000 * vectors * (128 + 16) == gpu.kv_cache_bytes(config, 1000, "int8")
    found = [pass_bytes(packed, depth, unpacked=True, kv_dtype="int8") for depth in (0, 1000)]
    assert found[1] - found[0] == 1000 * vectors * 4 * (128 + 1)


def test_pass_bytes_unpacked_are_those_of_the_cpu_decoder(tmp_path):
    packed = pack_checkpoint(write_checkpoint(tmp_path / "tiny", TINY), "int8", progress=False)
    decoder = CPUDecoder(packed, 256, progress=False)
    held = sum(getattr(layer, name).nbytes for layer in decoder._layers for name in LAYER_MATRICES) + sum(
        vector.nbytes for layer in decoder._layers for vector in layer.vectors.values()
    )
    held += decoder._lm_head.nbytes + decoder._norm.nbytes + decoder._embed_bits[0].nbytes
    assert pass_bytes(packed, 0, unpacked=True) == held
    cache = decoder.key_cache.nbytes + decoder.value_cache.nbytes
    assert pass_bytes(packed, 256, unpacked=True) == held + cache


# ---- random weights and caches -------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("family", ["llama2", "qwen3"])
def test_random_weights_are_like_a_fresh_model(format, family):
    config = config_of(tiny_config(family, intermediate_size=176, vocab_size=9001))
    packed = random_model(config, format)
    assert len(packed.layers) == config.num_layers and packed.layers[0] is packed.layers[-1]
    matrices = {name: getattr(packed.layers[0], name) for name in LAYER_MATRICES}
    matrices["lm_head"] = packed.lm_head
    for name, matrix in matrices.items():
        weights = unpack_matrix(matrix, packed.layouts[name])
        assert weights.std() * np.sqrt(weights.shape[1]) == pytest.approx(1, abs=0.06), name
        assert abs(weights.mean()) < 0.1 * weights.std(), name
        assert (weights[0] != weights[16]).any()
    assert (packed.embed_tokens is None) == config.tie_word_embeddings
    if packed.embed_tokens is not None:
        embedding = from_bf16(packed.embed_tokens)
        assert embedding.shape == (9001, config.hidden_size) and 0.05 < embedding.std() < 1.1
    logits = CPUDecoder(packed, 16, progress=False).forward(np.arange(16), 0, "all")
    assert 0.3 < logits.std() < 3


@pytest.mark.parametrize("format", ["bf16", "int8"])
def test_random_rows_differ(format):
    """Of 13,113 rows, three times as many as there are different ones, no two have two slots in common."""
    config = config_of(tiny_config("llama2", hidden_size=320, intermediate_size=176, vocab_size=13_113))
    packed = random_model(config, format)
    layout = packed.layouts["lm_head"]
    tiles = packed.lm_head.reshape(-1, layout.tile_bytes)
    slots = [tiles[:, i * layout.slot_bytes : (i + 1) * layout.slot_bytes] for i in range(layout.slots)]
    numbers = [np.unique(slot, axis=0, return_inverse=True)[1].ravel() for slot in slots]
    common = sum(number[:, None] == number for number in numbers)
    assert (common - layout.slots * np.eye(len(tiles), dtype=int)).max() == 1
    assert len(np.unique(unpack_matrix(packed.lm_head, layout), axis=0)) == 13_113


def test_random_weights_come_from_the_seed():
    config = config_of(TINY)
    first, again, other = (random_model(config, "int4", seed) for seed in (1, 1, 2))
    assert (first.lm_head == again.lm_head).all() and (first.lm_head != other.lm_head).any()


def test_random_weights_refuse_odd_sizes():
    with pytest.raises(ValueError, match="intermediate_size must be a multiple of 8, not 172"):
        random_model(config_of(tiny_config("llama2")), "bf16")


def test_filled_cache_is_random_and_as_deep_as_asked(monkeypatch):
    monkeypatch.setattr(bench, "FILLED_POSITIONS", 16)
    decoder = CPUDecoder(random_model(config_of(TINY), "bf16"), 64, progress=False)
    fill_cache(decoder, 40, seed=3)
    for cache in (decoder.key_cache, decoder.value_cache):
        filled = cache[:, 0, :, :40]
        assert filled.std() == pytest.approx(1, abs=0.05)
        assert (filled == round_bf16(filled)).all()
        assert (cache[:, 0, :, 40:] == 0).all()
        assert (cache[:, 0, :, :16] != cache[:, 0, :, 16:32]).any()
    assert (decoder.key_cache != decoder.value_cache)[:, 0, :, :40].any()
    before = decoder.key_cache.copy()
    fill_cache(decoder, 40, seed=3)
    assert (decoder.key_cache == before).all()
    fill_cache(decoder, 40, seed=4)
    assert (decoder.key_cache != before).any()


def test_filled_int8_cache_is_that_of_a_gpu():
    config = config_of(TINY)
    decoder = CPUDecoder(random_model(config, "bf16"), 64, kv_dtype="int8", progress=False)
    fill_cache(decoder, 40)
    keys, values = decoder.read_cache(0, 64)
    assert not keys[:, :, 40:].any() and not values[:, :, 40:].any() and (keys != values).any()
    numbers = np.random.default_rng(bench.SEED).standard_normal((config.num_kv_heads, 40, config.head_dim))
    cached = bench._cached(numbers.astype(np.float32), VectorLayout(config.head_dim, "int8"))
    codes = np.ascontiguousarray(cached[..., : config.head_dim]).view(np.int8)
    assert (np.abs(codes).max(axis=-1) == 127).all()
    for plain in (keys, values):
        codes, scale = split_vectors(plain[:, :, :40])
        assert (codes * scale[..., None]).std() == pytest.approx(1, abs=0.05)


# ---- the check and the clock ---------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_check_passes_the_cpu_path(format):
    error = bench.check_logits(random_model(config_of(TINY), format), None)
    assert 1e-5 < error < bench.TOLERANCE  # bf16 against float64: never exact


class WrongDecoder(CPUDecoder):
    """Its logits are off by a few per cent in the last row only."""

    def forward(self, tokens: np.ndarray, start: int, logits: str = "last") -> np.ndarray:
        out = super().forward(tokens, start, logits)
        return out * np.float32(1.1) if len(tokens) == 1 else out


@pytest.fixture
def wrong_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bench, "make_decoder", lambda packed, _, length, **kind: WrongDecoder(packed, length, **kind)
    )


@pytest.mark.usefixtures("wrong_decoder")
def test_check_finds_wrong_numbers():
    with pytest.raises(GenerationError, match=r"relative error of at most 0\.02 expected, found"):
        bench.check_logits(random_model(config_of(TINY), "bf16"), None)


@pytest.mark.usefixtures("wrong_decoder")
def test_no_speed_of_wrong_numbers(tmp_path, capsys):
    directory = write_checkpoint(tmp_path / "tiny", TINY)
    status = main(["bench", "-m", str(directory), "--device", "cpu", "-p", "2", "-n", "2", "-r", "1"])
    out, err = capsys.readouterr()
    assert (status, out) == (1, "")
    assert "the speed of wrong numbers is not measured" in err


@pytest.mark.parametrize("context", [1, 5, 9, 300])
def test_check_covers_every_build(monkeypatch, context):
    """One build for a prompt, one for a token, and each of those for passes of many rows."""
    calls: list[list[int]] = []

    class Recorder(CPUDecoder):
        def forward(self, tokens: np.ndarray, start: int, logits: str = "last") -> np.ndarray:
            calls[-1].append(len(tokens))
            return super().forward(tokens, start, logits)

    def make(packed: bench.PackedModel, _: int | None, length: int, **kind: str) -> CPUDecoder:
        calls.append([])
        return Recorder(packed, length, **kind)

    monkeypatch.setattr(bench, "make_decoder", make)
    config = dataclasses.replace(config_of(TINY), max_position_embeddings=context)
    assert bench.check_logits(random_model(config, "bf16"), None, [2, 3]) < bench.TOLERANCE
    assert (
        calls
        == {
            1: [[1], [1]],
            5: [[5], [2, 3]],
            9: [[8, 1], [4, 2, 3]],
            300: [[256, 8, 1], [260, 2, 3]],
        }[context]
    )


def check_records(records: list[bench.Record], packed: bench.PackedModel, unpacked: bool) -> None:
    """The tests of PLAN in order, and figures that fit each other."""
    assert [(record.test, record.depth) for record in records] == TESTS
    for record in records:
        assert record.engine == "ffmini" and record.versions is None
        assert record.tokens_per_s > 0 and record.tokens_per_s_deviation >= 0
        assert record.peak_bytes_per_s > 1e8 and record.logits_error < bench.TOLERANCE
        assert record.tokens_per_s * record.us_per_token == pytest.approx(1e6)  # both from the median
        assert (record.over_queued is not None) == (record.test == "e2e4")
        assert (record.over_unguessed is not None) == (record.test in ("edit6", "new6"))
        if record.test in ("pp5", "edit6", "new6"):
            assert (record.rows, record.us_per_pass, record.bytes, record.fraction) == (None,) * 4
            continue
        assert record.rows == int(record.test.removeprefix("rows")) if "rows" in record.test else 1
        assert record.us_per_pass == pytest.approx(record.us_per_token * record.rows)
        # Three passes each: at depths of on average one more, or two where they follow a token.
        depth = record.depth + (2 if record.test == "e2e4" else 1)
        assert record.bytes == pass_bytes(packed, depth, unpacked, record.rows)
        speed = record.bytes / record.us_per_pass * 1e6
        assert record.fraction == pytest.approx(speed / record.peak_bytes_per_s)


def test_measure():
    packed = random_model(config_of(TINY), "bf16")
    records = list(measure(packed, "tiny", PLAN, 32, None))
    check_records(records, packed, unpacked=True)
    assert {(record.shape, record.dtype, record.repetitions) for record in records} == {("tiny", "bf16", 2)}


def test_measured_passes_are_the_ones_named(monkeypatch):
    """One warm-up and each repetition: a prompt at once, passes one by one, each a position further on."""
    calls: list[tuple[int, int]] = []

    class Recorder(CPUDecoder):
        def forward(self, tokens: np.ndarray, start: int, logits: str = "last") -> np.ndarray:
            calls.append((len(tokens), start))
            return super().forward(tokens, start, logits)

        def begin(self, works: Sequence[Work], *hints: Any) -> None:
            calls.extend((len(work.tokens), work.start) for work in works)
            super().begin(works, *hints)

    monkeypatch.setattr(bench, "check_logits", lambda *_: 0.0)
    monkeypatch.setattr(
        bench, "make_decoder", lambda packed, _, length, **kind: Recorder(packed, length, **kind)
    )
    plan = dataclasses.replace(PLAN, guesses=0)
    list(measure(random_model(config_of(TINY), "bf16"), "tiny", plan, 32, None))
    expected = []
    for depth in (0, 7):
        expected += 3 * [(5, depth)] + 3 * [(1, depth), (1, depth + 1), (1, depth + 2)]
    expected += 3 * [(1, 0), (1, 1), (1, 2), (1, 3)] + 3 * [(1, 1), (1, 2), (1, 3)]
    for depth in (0, 7):
        for rows in (2, 5):
            expected += 3 * [(rows, depth), (rows, depth + 1), (rows, depth + 2)]
    assert calls == expected


def test_a_gpus_passes_are_queued():
    """launch(rows, tokens, position, a bit per row of logits), and one wait after all of them."""
    calls: list[Any] = []
    decoder = SimpleNamespace(launch=lambda *args: calls.append(args), finish=lambda: calls.append("finish"))
    tokens = np.arange(6).reshape(2, 3)
    assert bench.time_passes(decoder, tokens, 7) > 0
    launched = [(rows, part.tolist(), start, wanted) for rows, part, start, wanted in calls[:-1]]
    assert launched == [(3, [0, 1, 2], 7, 0b111), (3, [3, 4, 5], 8, 0b111)] and calls[-1] == "finish"


def test_a_batch_is_queued():
    """launch_works(rows, a token in each slot, a bit per row of logits); K and V are those of all slots."""
    calls: list[Any] = []
    decoder = SimpleNamespace(
        launch_works=lambda *args: calls.append(args),
        finish=lambda: calls.append("finish"),
        config=config_of(TINY),
        kv_dtype="int8",
    )
    packed = skeleton(config_of(TINY), "bf16")
    plan = Plan([], [2], [7], 1, batch=[3])
    given = {
        "shape",
        "dtype",
        "kv_dtype",
        "engine",
        "logits_error",
        "repetitions",
        "rest",
        "device",
        "driver",
        "commit",
        "versions",
    }
    common = dict.fromkeys(given | {"over_queued", "over_unguessed"})
    common |= {"peak_bytes_per_s": 1e9, "depth": 7, "test": "batch3"}
    record = bench._time_batch(packed, decoder, plan, 3, common)
    assert record.us_per_pass == pytest.approx(3 * record.us_per_token) and record.rows == 3
    deeper = pass_bytes(packed, 8, kv_dtype="int8") - pass_bytes(packed, 7, kv_dtype="int8")
    of_all = pass_bytes(packed, 7, rows=3, sequences=3, kv_dtype="int8")
    assert record.bytes == of_all + 3 * deeper // 2
    run = calls[: len(calls) // 2]
    assert run[-1] == "finish" and len(calls) == 6
    for i, (rows, works, wanted) in enumerate(run[:-1]):
        assert (rows, wanted) == (3, 0b111)
        assert [(work.slot, len(work.tokens), work.start) for work in works] == [
            (slot, 1, 7 + i) for slot in range(3)
        ]


def test_figures_come_from_the_median(monkeypatch):
    """The first run does not count; a slow one among the others changes the deviation only."""
    times = iter([9.0, 2.0, 1.0, 7.0])
    monkeypatch.setattr(bench, "time_passes", lambda *_: next(times))
    monkeypatch.setattr(bench, "read_peak", lambda _: 1e9)
    packed = random_model(config_of(TINY), "bf16")
    (record,) = measure(packed, "tiny", Plan([], [4], [0], 3), 32, None)
    assert (record.tokens_per_s, record.us_per_token, record.us_per_pass) == (2.0, 0.5e6, 0.5e6)
    assert record.tokens_per_s_deviation == pytest.approx(np.std([2.0, 4.0, 4 / 7], ddof=1))
    assert record.fraction == pytest.approx(record.bytes * 2 / 1e9)


def test_end_to_end_samples_and_is_set_against_queued_passes(monkeypatch):
    times = iter([9.0, 2.0, 1.0, 7.0])
    monkeypatch.setattr(bench, "time_passes", lambda *_: next(times))
    monkeypatch.setattr(bench, "check_logits", lambda *_: 0.0)
    asked: list[tuple[Any, dict[str, Any]]] = []
    generate = ffmini.Model.generate

    def spy(self: ffmini.Model, prompt: Any, **options: Any) -> ffmini.Completion:
        done = generate(self, prompt, **options)
        asked.append((prompt, options))
        assert len(done.text.split()) == len(done.tokens) == 6
        timings = dataclasses.replace(done.timings, generation_seconds=3.0)
        return dataclasses.replace(done, timings=timings)

    monkeypatch.setattr(ffmini.Model, "generate", spy)
    packed = random_model(config_of(TINY), "bf16")
    (record,) = measure(packed, "tiny", Plan([], [], [0], 3, end_to_end=6), 32, None)
    options = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 1, "ignore_eos": True}
    assert asked == 4 * [([0], options | {"max_new_tokens": 6})]
    assert (record.us_per_token, record.over_queued) == (0.6e6, 1.5)


def test_plan_positions():
    assert PLAN.positions == 14  # rows5 at depth 7: three passes, the last one of five positions
    assert Plan([], [3], [5, 1], 1).positions == 8
    assert Plan([], [3], [0], 1, end_to_end=9).positions == 10
    assert Plan([], [], [0], 1, rows=[3]).positions == bench.QUEUED_PASSES + 2
    assert Plan([], [], [3], 1, batch=[8]).positions == bench.QUEUED_PASSES + 3


def test_command_by_its_wrapper(tmp_path):
    """tools/bench.py in a process of its own: JSON on stdout."""
    directory = write_checkpoint(tmp_path / "tiny", TINY)
    command = [sys.executable, ROOT / "tools" / "bench.py", "-m", directory, "--device", "cpu", "--json"]
    command += ["-p", "3,4", "-n", "2", "-d", "0,9", "-r", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    records = json.loads(result.stdout)
    tests = [(record["test"], record["depth"]) for record in records]
    assert tests == [(test, depth) for depth in (0, 9) for test in ("pp3", "pp4", "tg2")]
    assert set(KEYS.split()) <= set(records[0])
    assert records[0]["shape"] == "tiny" and records[0]["driver"] is None and records[0]["commit"]


QUICK = ["--device", "cpu", "-p", "0", "-n", "2", "-r", "1"]


@pytest.fixture
def tiny_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes that a test can afford, in place of the published ones."""
    monkeypatch.setattr(bench, "SHAPES", {"tiny": TINY, "small": with_changes(TINY, {"vocab_size": 300})})


@pytest.mark.usefixtures("tiny_shapes")
def test_random_shape_by_the_command(capsys):
    assert main(["bench", "--random", "tiny", "--dtype", "int8", *QUICK]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"tiny int8 tg2: [\d.]+ tokens/s, [\d.]+ us per token, [\d.]+ GB/s, [\d.]+% of the read peak "
        r"[\d.]+ GB/s",
        lines[0],
    )
    assert lines[4].startswith("| tiny | int8 | ffmini | tg2 | ") and lines[4].endswith("% |")
    assert len(lines) == 7 and "GB/s; relative error of the logits" in lines[6]


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with room for four rows of TINY; it does nothing."""
    properties = {"sharedMemPerBlockOptin": 79_000, "multiProcessorCount": 4}
    runtime = SimpleNamespace(getDeviceProperties=lambda _: properties)
    cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(gpu, "import_cupy", lambda: cupy)
    monkeypatch.setattr(bench, "choose_device", lambda _: 0)


@pytest.mark.usefixtures("small_gpu", "tiny_shapes")
def test_rows_without_room_are_left_out(capsys):
    packed = random_model(config_of(TINY), "bf16")
    assert bench._rows_that_fit(packed, "tiny", [1, 4, 5, 8], 64, 0) == [1, 4]
    said = "ffmini: tiny bf16: a pass has room for 4 rows, not measured: 5, 8\n"
    assert capsys.readouterr().err == said
    argv = [
        "bench",
        "--random",
        "all",
        "--rows",
        "5,8",
        "-p",
        "0",
        "-n",
        "0",
        "--end-to-end",
        "0",
        "--compare",
    ]
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1].startswith("ffmini: nothing measured: no shape has room")


@pytest.mark.usefixtures("tiny_shapes")
def test_int8_keys_and_values_by_the_command(capsys):
    assert main(["bench", "--random", "tiny", "--kv-dtype", "int8", *QUICK]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tiny bf16, int8 KV tg2: ")
    assert lines[4].startswith("| tiny | bf16, int8 KV | ffmini | tg2 | ")


@pytest.mark.usefixtures("tiny_shapes")
@pytest.mark.parametrize("shapes", ["tiny,small", "all"])
def test_several_shapes_and_dtypes(capsys, shapes):
    """All of them one after the other; with --json the line for each is on stderr."""
    assert main(["bench", "--random", shapes, "--dtype", "bf16,int4", "--json", *QUICK]) == 0
    out, err = capsys.readouterr()
    pairs = [(shape, dtype) for shape in ("tiny", "small") for dtype in ("bf16", "int4")]
    assert [(record["shape"], record["dtype"]) for record in json.loads(out)] == pairs
    said = [line for line in err.splitlines() if "us per token" in line]
    assert [tuple(line.split()[:2]) for line in said] == pairs


@pytest.mark.usefixtures("tiny_shapes")
def test_output_file_grows_with_every_record(tmp_path, monkeypatch, capsys):
    """What was measured before an error is in the file; the lines of what was finished are on stdout."""
    file, sizes = tmp_path / "out.json", []

    def time_passes(*_: Any) -> float:
        sizes.append(len(json.loads(file.read_text() or "[]")))
        if len(sizes) == 7:
            raise GenerationError("a pass went wrong")
        return 1.0

    monkeypatch.setattr(bench, "time_passes", time_passes)
    argv = ["bench", "--random", "tiny", "--dtype", "bf16,int8", *QUICK, "-n", "2,3", "-o", str(file)]
    assert main(argv) == 1
    assert sizes == [0, 0, 1, 1, 2, 2, 3]
    tests = [(record["dtype"], record["test"]) for record in json.loads(file.read_text())]
    assert tests == [("bf16", "tg2"), ("bf16", "tg3"), ("int8", "tg2")]
    out, err = capsys.readouterr()
    assert out.startswith("tiny bf16 tg2: 2.0 tokens/s, 500000.0 us per token") and out.count("\n") == 1
    assert "a pass went wrong" in err


def test_output_file_that_cannot_be_written_is_known_first(tmp_path, capsys):
    assert main(["bench", "-o", str(tmp_path / "no" / "out.json"), *QUICK]) == 1
    assert "No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (["--random", "tinny"], 2, "found 'tinny'"),
        (["--dtype", "bf16,fp4"], 2, "expected bf16, int8, int4, found 'fp4'"),
        ([*QUICK, "--rows", "1,9"], 1, "--rows: a pass has 1 to 8 rows, found 9"),
        ([*QUICK, "--batch", "9"], 1, "--batch: a pass has 1 to 8 rows, found 9"),
        ([*QUICK, "--batch", "2", "--device", "cpu"], 1, "--batch: a GPU expected, found the CPU"),
        ([*QUICK, "--guesses", "1"], 1, "--guesses: expected 2 tokens or more, or 0 for none, found 1"),
        ([*QUICK, "--rest", "soon"], 2, "--rest: expected seconds, 0 or more, found 'soon'"),
        ([*QUICK, "--rest", "inf"], 2, "--rest: expected seconds, 0 or more, found 'inf'"),
        ([*QUICK, "--rest", "nan"], 2, "--rest: expected seconds, 0 or more, found 'nan'"),
        ([*QUICK, "--end-to-end", "1"], 1, "--end-to-end: expected 2 tokens or more, or 0 for none, found 1"),
    ],
)
def test_wrong_arguments(capsys, argv, status, words):
    try:
        found = main(["bench", *argv])
    except SystemExit as error:
        found = error.code
    assert found == status and words in capsys.readouterr().err


def test_default_tests_depend_on_the_device():
    args = make_parser().parse_args(["bench"])
    assert bench._plan(args, None) == Plan([512], [128], [0], 5)
    assert bench._plan(args, 0) == Plan([512], [200], [0], 5, [], 128, rest=0.3)
    args = make_parser().parse_args(["bench", "--rest", "0"])
    assert bench._plan(args, 0).rest == 0


def test_a_rest_is_as_long_as_the_repetition_up_to_a_limit(monkeypatch):
    rests: list[float] = []
    monkeypatch.setattr(bench, "sleep", rests.append)
    times = iter([0.5, 0.1, 0.2, 0.4])
    assert bench._repeat(Plan([], [4], [0], 3, rest=0.3), lambda: next(times)) == [0.1, 0.2, 0.4]
    assert rests == [0.3, 0.1, 0.2, 0.3]


# ---- what the table says about its rows ----------------------------------------------------------------


def record_of(**changes: Any) -> bench.Record:
    """200 us for a pass of 100 MB at a peak of 1 TB/s: half the peak."""
    values: dict[str, Any] = dict.fromkeys([field.name for field in dataclasses.fields(bench.Record)])
    values |= {
        "shape": "s",
        "dtype": "bf16",
        "kv_dtype": "bf16",
        "engine": "ffmini",
        "test": "tg200",
        "depth": 0,
        "rows": 1,
    }
    values |= {"tokens_per_s": 5000.0, "tokens_per_s_deviation": 1.0, "us_per_token": 200.0}
    values |= {"us_per_pass": 200.0, "bytes": 100_000_000, "peak_bytes_per_s": 1e12, "fraction": 0.5}
    values |= {"logits_error": 1e-3, "repetitions": 5, "rest": 0.3, "device": "d", "commit": "c"}
    return bench.Record(**(values | changes))


def notes(*records: bench.Record) -> list[str]:
    """The lines between the table and the last line."""
    return bench.records_table(records).splitlines()[len(records) + 3 : -1]


def test_note_on_depth():
    shallow = record_of(depth=256)
    deep = record_of(depth=32768, us_per_pass=325.0, us_per_token=325.0, bytes=200_000_000)
    other = record_of(depth=32768, dtype="int8", bytes=200_000_000)
    assert notes(shallow, deep, other) == [
        "s bf16 tg200, depth 256 to 32768: 125.0 us more, 100.0 MB more, which take 100.0 us at the read "
        "peak: ratio 1.25"
    ]
    assert notes(shallow, record_of(depth=999)) == []  # a window hides the rest
    assert notes(record_of(test="pp512", bytes=None), record_of(test="pp512", bytes=None, depth=9)) == []


def test_note_on_end_to_end():
    assert notes(record_of(test="e2e128", over_queued=1.0625)) == [
        "s bf16 e2e128: 1.062 times the queued passes"
    ]


def test_note_on_guesses():
    assert notes(record_of(test="edit128", over_unguessed=0.375)) == [
        "s bf16 edit128: 0.375 times the time without guesses"
    ]


def test_note_on_other_engines():
    other = record_of(engine="transformers", versions="v 1", us_per_token=500.0, logits_error=None)
    mine = [record_of(), record_of(dtype="int4", us_per_token=100.0), record_of(shape="t", us_per_token=1.0)]
    assert notes(*mine, other) == [
        "s tg200, transformers (v 1): 500.0 us per token, 2.50 times ffmini's bf16, 5.00 times ffmini's int4"
    ]
    (line,) = notes(mine[2], other)
    assert line.endswith("500.0 us per token, nothing of ffmini to compare")


class Counting(CPUDecoder):
    """Counts the passes that are begun."""

    passes = 0

    def begin(self, works: Any, *hints: Any) -> None:
        self.passes += 1
        super().begin(works, *hints)


def test_a_replay_says_the_text_whatever_the_model_says():
    """Guesses that come true save passes; a text that repeats nothing takes one for each token."""
    decoder = Counting(random_model(config_of(TINY), "bf16"), 80)
    tokenizer = bench._tokenizer(random_model(config_of(TINY), "bf16"))
    prompt, new = np.arange(20, 50), np.arange(100, 130)
    passes = []
    for text, guesses in ((prompt, 0), (prompt, 7), (new, 7)):
        decoder.passes = 0
        assert bench.time_replay(decoder, tokenizer, prompt, text, guesses) > 0
        passes.append(decoder.passes)
    assert passes[0] == passes[2] == 30 and passes[1] < 12


# ---- what a user would pick instead --------------------------------------------------------------------


def compared(plan: Plan = PLAN) -> list[bench.Record]:
    """compare() for a GPU, beside records of the test that it looks for and of others."""
    mine = [record_of(shape="tiny", test="tg3", bytes=77), record_of(shape="tiny", test="tg9", bytes=5)]
    return list(bench.compare(TINY, plan, 1, mine))


FAKE = """
import json, sys
assert json.load(sys.stdin)["vocab_size"] == 259
assert sys.argv[1:] == "--device cuda:1 --depth 0 --passes 3 --repetitions 2 --rest 0.0 --prompts 5".split()
print(json.dumps({"test": "pp5", "engine": "transformers", "versions": "v 1", "seconds": [1e-2, 3e-2]}))
print(json.dumps({"test": "tg3", "engine": "transformers", "versions": "v 1", "seconds": [3e-3, 6e-3]}))
print("much ado", file=sys.stderr)
"""


def test_compare_makes_records(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "BASELINE", tmp_path / "fake.py")
    bench.BASELINE.write_text(FAKE)
    prompt, record = compared()
    assert (prompt.test, prompt.rows, prompt.bytes) == ("pp5", None, None)
    assert prompt.us_per_token == pytest.approx(4000.0)
    assert capsys.readouterr().err == ""
    expected = {"shape": "tiny", "dtype": "bf16", "engine": "transformers", "test": "tg3", "versions": "v 1"}
    expected |= {"us_per_token": pytest.approx(1500.0), "bytes": 77, "rows": 1, "logits_error": None}
    expected |= {"rest": 0.3}
    assert {key: getattr(record, key) for key in expected} == expected
    bench.BASELINE.write_text(FAKE + "raise SystemExit('transformers compiled: no luck')")
    assert compared() == [prompt, record]
    reason = "tiny: comparison with transformers failed: transformers compiled: no luck\n"
    assert capsys.readouterr().err == f"ffmini: {reason}"
    bench.BASELINE.write_text("import os; os._exit(3)")
    assert compared() == []
    assert capsys.readouterr().err.endswith("failed: exit status 3\n")


def test_compare_without_torch_is_one_line(tmp_path, monkeypatch, capsys):
    """The real script where torch can't be imported."""
    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert compared() == []
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("failed: No module named torch: pip install torch transformers")


@pytest.mark.usefixtures("tiny_shapes")
def test_compare_leaves_the_records_alone(tmp_path, monkeypatch, capsys):
    """On the CPU, and where only the package is installed: one line, and status 0."""
    argv = ["bench", "--random", "tiny", "--json", *QUICK, "--compare"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert [record["test"] for record in json.loads(out)] == ["tg2"]
    assert "ffmini: tiny: nothing compared with transformers: needs a GPU\n" in err
    monkeypatch.setattr(bench, "BASELINE", tmp_path / "none.py")
    assert compared() == []
    assert "needs a checkout of ffmini with" in capsys.readouterr().err


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "transformers"))), reason="needs torch and transformers"
)
def test_baseline_runs_on_the_cpu():
    """The API that it takes for granted; its time here means nothing."""
    command = [sys.executable, bench.BASELINE, "--device", "cpu", "--passes", "3", "--depth", "2"]
    command += ["--prompts", "5", "9"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "--repetitions", "2"],
        input=json.dumps(tiny_config("llama3.1")),
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    engines = ["transformers", "transformers", "transformers", "transformers compiled"]
    assert [each["engine"] for each in found] == engines
    assert [each["test"] for each in found] == ["pp5", "pp9", "tg3", "tg3"]
    assert all(len(each["seconds"]) == 2 and "torch" in each["versions"] for each in found)


# ---- odds and ends -------------------------------------------------------------------------------------


def test_build_version_without_a_checkout(monkeypatch, tmp_path):
    assert bench.build_version() != ""
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "ffmini" / "bench.py"))
    assert bench.build_version() == ffmini.__version__


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_read_peak_kernel_compiles(arch):
    cubin, log = compile_cubin({"BULK_COPIES": str(int(has_bulk_copies(arch)))}, arch, "read_peak.cu")
    assert cubin.startswith(b"\x7fELF") and "0 bytes spill stores, 0 bytes spill loads" in log


# ---- perplexity ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ffmini.Model]:
    """A tiny random model that shares the bundled tokenizer, with a context of 32."""
    directory = tmp_path_factory.mktemp("scored")
    raw = tiny_config("smollm2", vocab_size=4096, bos_token_id=0, eos_token_id=1)
    write_checkpoint(directory / "model", raw)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (directory / "model" / file).write_bytes((bundled_model_path() / file).read_bytes())
    with ffmini.load(directory / "model", device="cpu", max_seq_len=32) as model:
        yield model


TEXT = (ROOT / "tests" / "tale.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("length", [1, 20, 32, 33, 48, 49, 90])
def test_perplexity_follows_the_protocol(scored, length):
    """Every token on its own: after BOS and the tokens from the start of its window on."""
    ids = scored.encode(TEXT, add_special_tokens=False)[:length]
    text = scored.decode(ids)
    assert scored.encode(text, add_special_tokens=False) == ids
    nats = 0.0
    for at in range(length):
        start = max(0, (at - 16) // 16 * 16)  # the first window with at least 16 tokens before `at`
        logits = scored.logits([0, *ids[start:at]])[-1].astype(np.float64)
        nats += np.log(np.exp(logits - logits[ids[at]]).sum())
    per_token, bits_per_byte = perplexity(scored, text)
    assert np.log(per_token) * length == pytest.approx(nats, rel=1e-6)
    assert bits_per_byte == pytest.approx(nats / np.log(2) / len(text.encode()), rel=1e-6)


def test_perplexity_of_a_model_that_knows_nothing(tmp_path, scored):
    """Embeddings of zero make all tokens equally likely."""
    raw = json.loads((scored.tokenizer._directory / "config.json").read_text())
    tensors = tiny_tensors(raw)
    tensors["model.embed_tokens.weight"][:] = 0
    (tmp_path / "config.json").write_text(json.dumps(raw))
    write_safetensors(tmp_path / "model.safetensors", tensors)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((bundled_model_path() / file).read_bytes())
    (tmp_path / "text").write_text("Once there was a hare.", encoding="utf-8")
    with ffmini.load(tmp_path, device="cpu", max_seq_len=8) as model:
        assert perplexity(model, "Once there was a hare.")[0] == pytest.approx(4096, rel=1e-6)
        with pytest.raises(ValueError, match="found 0 tokens"):
            perplexity(model, "")


def test_perplexity_by_the_command(scored, tmp_path, capsys):
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    argv = ["bench", "-m", str(scored.tokenizer._directory), "--device", "cpu", "--max-seq-len", "32"]
    argv += ["--perplexity", str(tmp_path / "text")]
    expected = perplexity(scored, TEXT)
    capsys.readouterr()
    assert main([*argv, "--json"]) == 0
    (score,) = json.loads(capsys.readouterr().out)
    assert (score["perplexity"], score["bits_per_byte"]) == pytest.approx(expected)
    assert (score["bytes"], score["context"], score["file"]) == (len(TEXT.encode()), 32, "text")
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert f"perplexity {expected[0]:.3f} per token, {expected[1]:.4f} bits per byte\n" in out
    (tmp_path / "text").write_bytes(b"ab\xffcd")
    assert main(argv) == 1
    assert "expected UTF-8, found byte 0xff" in capsys.readouterr().err


def test_perplexity_without_bos(scored, monkeypatch):
    monkeypatch.setattr(scored.tokenizer, "bos_token_id", None)
    expected = perplexity(scored, "A hare.")  # the config's BOS, the same token
    monkeypatch.setattr(scored, "config", dataclasses.replace(scored.config, bos_token_id=None))
    with pytest.raises(UnsupportedError, match="needs a BOS token"):
        perplexity(scored, "A hare.")
    monkeypatch.undo()
    assert perplexity(scored, "A hare.") == expected


# ---- on a GPU ------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(gpu.why_unusable() is not None, reason=f"no device: {gpu.why_unusable()}")
class TestGPU:
    @pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
    def test_measure(self, format):
        packed = random_model(config_of(with_changes(TINY, {"num_hidden_layers": 3})), format)
        records = list(measure(packed, "tiny", PLAN, 32, 0))
        check_records(records, packed, unpacked=False)
        assert records[0].peak_bytes_per_s > 5e10 and records[0].driver

    def test_a_filled_cache_is_attended_to(self):
        packed = random_model(config_of(TINY), "bf16")
        theirs, mine = gpu.GPUDecoder(packed, 300, progress=False), CPUDecoder(packed, 300, progress=False)
        fill_cache(theirs, 290)
        share_cache(mine, theirs.key_cache.get()[:, 0], theirs.value_cache.get()[:, 0], 290)
        tokens = np.arange(5)
        found, expected = (decoder.forward(tokens, 290, "all") for decoder in (theirs, mine))
        theirs.close()
        assert np.linalg.norm(found - expected) < bench.TOLERANCE * np.linalg.norm(expected)
