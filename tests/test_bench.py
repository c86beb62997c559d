"""What bench counts, makes up, checks and times; the speed of the machine that runs this is no matter."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_config, tiny_tensors, with_changes, write_checkpoint, write_safetensors

import ffmini
from ffmini import bench, gpu
from ffmini.bench import Plan, fill_cache, measure, pass_bytes, perplexity, random_model
from ffmini.cli import main
from ffmini.config import ModelConfig, parse_config
from ffmini.convert import pack_checkpoint
from ffmini.cpu import CPUDecoder
from ffmini.errors import GenerationError, UnsupportedError
from ffmini.kernel import compile_cubin, has_bulk_copies
from ffmini.model import bundled_model_path
from ffmini.numerics import from_bf16, round_bf16
from ffmini.packing import LAYER_MATRICES, make_layouts, unpack_matrix
from ffmini.shapes import SHAPES

ROOT = Path(__file__).parent.parent
TINY = tiny_config("llama2", intermediate_size=176)
PLAN = Plan(prompts=[5], generations=[3], depths=[0, 7], repetitions=2)

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


def test_random_weights_come_from_the_seed():
    config = config_of(TINY)
    first, again, other = (random_model(config, "int4", seed) for seed in (1, 1, 2))
    assert (first.lm_head == again.lm_head).all() and (first.lm_head != other.lm_head).any()


def test_random_weights_refuse_odd_sizes():
    with pytest.raises(ValueError, match="intermediate_size must be a multiple of 8, not 172"):
        random_model(config_of(tiny_config("llama2")), "bf16")


def test_filled_cache_is_random_and_as_deep_as_asked():
    decoder = CPUDecoder(random_model(config_of(TINY), "bf16"), 64, progress=False)
    fill_cache(decoder, 40, seed=3)
    for cache in (decoder.key_cache, decoder.value_cache):
        filled = cache[:, :, :40]
        assert filled.std() == pytest.approx(1, abs=0.05)
        assert (filled == round_bf16(filled)).all()
        assert (cache[:, :, 40:] == 0).all()
    assert (decoder.key_cache != decoder.value_cache)[:, :, :40].any()
    before = decoder.key_cache.copy()
    fill_cache(decoder, 40, seed=3)
    assert (decoder.key_cache == before).all()
    fill_cache(decoder, 40, seed=4)
    assert (decoder.key_cache != before).any()


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
    monkeypatch.setattr(bench, "make_decoder", lambda packed, _, length: WrongDecoder(packed, length))


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


def check_records(records: list[bench.Record], packed: bench.PackedModel, unpacked: bool) -> None:
    """The tests of PLAN in order, and figures that fit each other."""
    tests = [(record.test, record.depth) for record in records]
    assert tests == [("pp5", 0), ("tg3", 0), ("pp5", 7), ("tg3", 7)]
    for record in records:
        assert record.tokens_per_s > 0 and record.tokens_per_s_deviation >= 0
        assert record.peak_bytes_per_s > 1e8 and record.logits_error < bench.TOLERANCE
        # The mean of rates and the mean of times: inverse up to the spread of two repetitions.
        assert record.tokens_per_s * record.us_per_token >= 0.999e6
        if record.test == "pp5":
            assert record.bytes is None and record.fraction is None
        else:  # three passes, at depths of on average one more
            assert record.bytes == pass_bytes(packed, record.depth + 1, unpacked)
            speed = record.bytes / record.us_per_token * 1e6
            assert record.fraction == pytest.approx(speed / record.peak_bytes_per_s)


def test_measure():
    packed = random_model(config_of(TINY), "bf16")
    records = measure(packed, "tiny", PLAN, 32, None)
    check_records(records, packed, unpacked=True)
    assert {(record.shape, record.dtype, record.repetitions) for record in records} == {("tiny", "bf16", 2)}


def test_measured_passes_are_the_ones_named(monkeypatch):
    """One warm-up and each repetition: a prompt at once, tokens one by one, from the depth on."""
    calls: list[tuple[int, int]] = []

    class Recorder(CPUDecoder):
        def forward(self, tokens: np.ndarray, start: int, logits: str = "last") -> np.ndarray:
            calls.append((len(tokens), start))
            return super().forward(tokens, start, logits)

    monkeypatch.setattr(bench, "check_logits", lambda *_: 0.0)
    monkeypatch.setattr(bench, "make_decoder", lambda packed, _, length: Recorder(packed, length))
    measure(random_model(config_of(TINY), "bf16"), "tiny", PLAN, 32, None)
    expected = []
    for depth in (0, 7):
        expected += 3 * [(5, depth)] + 3 * [(1, depth), (1, depth + 1), (1, depth + 2)]
    assert calls == expected


def test_plan_positions():
    assert PLAN.positions == 12
    assert Plan([], [3], [5, 1], 1).positions == 8


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
    keys = "shape dtype test depth tokens_per_s us_per_token bytes peak_bytes_per_s fraction device driver"
    assert {*keys.split(), "commit"} <= set(records[0])
    assert records[0]["shape"] == "tiny" and records[0]["driver"] is None and records[0]["commit"]


def test_random_shape_by_the_command(monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    argv = [
        "bench",
        "--random",
        "tiny",
        "--dtype",
        "int8",
        "--device",
        "cpu",
        "-p",
        "0",
        "-n",
        "2",
        "-r",
        "1",
    ]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| tiny | int8 | tg2 | ") and lines[2].endswith("% |")
    assert len(lines) == 5 and "GB/s; relative error of the logits" in lines[4]


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
        records = measure(packed, "tiny", PLAN, 32, 0)
        check_records(records, packed, unpacked=False)
        assert records[0].peak_bytes_per_s > 5e10 and records[0].driver

    def test_filled_caches_are_the_same(self):
        packed = random_model(config_of(TINY), "bf16")
        theirs, mine = gpu.GPUDecoder(packed, 300, progress=False), CPUDecoder(packed, 300, progress=False)
        for decoder in (theirs, mine):
            fill_cache(decoder, 290)
        keys = from_bf16(theirs.key_cache.get())[:, 0, :, :290]
        assert (keys == mine.key_cache[:, :, :290]).all()
        tokens = np.arange(5)
        found, expected = (decoder.forward(tokens, 290, "all") for decoder in (theirs, mine))
        theirs.close()
        assert np.linalg.norm(found - expected) < bench.TOLERANCE * np.linalg.norm(expected)
