"""Conversion: what comes out is what went in, in bounded memory, and all of it or nothing."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections import namedtuple
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_config, tiny_tensors, write_checkpoint, write_safetensors

from ffmini import convert as conversion
from ffmini.checkpoint import PACKED_FILE, expected_tensors
from ffmini.config import load_config
from ffmini.convert import add_parser, convert, main, pack_checkpoint
from ffmini.errors import CheckpointError, FFMiniError, UnsupportedError
from ffmini.numerics import round_bf16, to_bf16
from ffmini.packing import (
    PackedModel,
    interleave_gate_up,
    is_packed,
    read_packed,
    unpack_matrix,
    vector_offsets,
)
from ffmini.quant import quantize

ROOT = Path(__file__).resolve().parent.parent
LLAMA = tiny_config("llama_head_dim")
SHAPES_THAT_DIFFER = ("llama_head_dim", "llama_biases", "smollm2", "qwen2", "qwen3")
Weights = Mapping[str, np.ndarray]


def dense_layer(weights: Weights, layer: int) -> Weights:
    """The matrices and vectors of a layer as they are before packing, put together by hand."""
    prefix = f"model.layers.{layer}."

    def get(name: str) -> np.ndarray:
        return weights[prefix + name]

    dense = {
        "qkv_proj": np.concatenate([get(f"self_attn.{n}_proj.weight") for n in "qkv"]),
        "o_proj": get("self_attn.o_proj.weight"),
        "gate_up_proj": interleave_gate_up(get("mlp.gate_proj.weight"), get("mlp.up_proj.weight")),
        "down_proj": get("mlp.down_proj.weight"),
        "input_layernorm": get("input_layernorm.weight"),
        "post_attention_layernorm": get("post_attention_layernorm.weight"),
    }
    if prefix + "self_attn.q_norm.weight" in weights:
        dense |= {f"{n}_norm": get(f"self_attn.{n}_norm.weight") for n in "qk"}
    if prefix + "self_attn.q_proj.bias" in weights:
        dense["qkv_bias"] = np.concatenate([get(f"self_attn.{n}_proj.bias") for n in "qkv"])
    if prefix + "self_attn.o_proj.bias" in weights:
        dense["o_bias"] = get("self_attn.o_proj.bias")
    if prefix + "mlp.down_proj.bias" in weights:
        dense["gate_up_bias"] = interleave_gate_up(get("mlp.gate_proj.bias"), get("mlp.up_proj.bias"))
        dense["down_bias"] = get("mlp.down_proj.bias")
    return dense


def rounded(w: np.ndarray, format: str, group_size: int) -> np.ndarray:
    return round_bf16(w) if format == "bf16" else quantize(w, format, group_size).dequantize(group_size)


def check_model(model: PackedModel, weights: Weights) -> None:
    """Every matrix and vector of `model` must be what `weights` become when rounded as the format says."""
    for index, layer in enumerate(model.layers):
        dense = dense_layer(weights, index)
        for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
            back = unpack_matrix(getattr(layer, name), model.layouts[name])
            np.testing.assert_array_equal(
                back, rounded(dense.pop(name), model.format, model.group_size), err_msg=name
            )
        offsets = vector_offsets(model.config)
        assert offsets.keys() == dense.keys()
        for name, (offset, length) in offsets.items():
            np.testing.assert_array_equal(layer.vectors[offset : offset + length], dense[name], err_msg=name)
    np.testing.assert_array_equal(model.norm, weights["model.norm.weight"])
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    head_format = "bf16" if model.format == "bf16" else "int8"
    back = unpack_matrix(model.lm_head, model.layouts["lm_head"])
    np.testing.assert_array_equal(back, rounded(head, head_format, 128))
    if model.config.tie_word_embeddings:
        assert model.embed_tokens is None
    else:
        np.testing.assert_array_equal(model.embed_tokens, to_bf16(weights["model.embed_tokens.weight"]))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A Hugging Face directory with the small files that a real one has."""
    directory = write_checkpoint(tmp_path / "src", LLAMA)
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    return directory


def spoil(directory: Path, name: str, index: tuple[int, ...], value: float) -> Path:
    """A checkpoint in float32 that has `value` in one place."""
    write_checkpoint(directory, LLAMA)
    tensors = tiny_tensors(LLAMA)
    tensors[name][index] = value
    write_safetensors(directory / "model.safetensors", tensors, "F32")
    return directory


@pytest.mark.parametrize(("dtype", "group_size"), [("bf16", 128), ("int8", 64), ("int4", 32)])
@pytest.mark.parametrize("family", SHAPES_THAT_DIFFER)
def test_families(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dtype: str, group_size: int
) -> None:
    monkeypatch.setattr(
        conversion, "BLOCK_WEIGHTS", 3000
    )  # several blocks per matrix, pieces of q, k, v in one
    weights = tiny_tensors(tiny_config(family))
    write_checkpoint(tmp_path / "src", tiny_config(family))
    check_model(pack_checkpoint(tmp_path / "src", dtype, group_size), weights)
    convert(tmp_path / "src", tmp_path / "dst", dtype, group_size)
    check_model(read_packed(tmp_path / "dst"), weights)


def test_the_result_does_not_depend_on_blocks(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(checkpoint, tmp_path / "a", "int4", 32)
    monkeypatch.setattr(conversion, "BLOCK_WEIGHTS", 1)
    monkeypatch.setattr(conversion, "MAX_THREADS", 1)
    convert(checkpoint, tmp_path / "b", "int4", 32)
    assert (tmp_path / "a" / PACKED_FILE).read_bytes() == (tmp_path / "b" / PACKED_FILE).read_bytes()


def test_a_converted_directory_is_self_contained(tmp_path: Path, checkpoint: Path) -> None:
    (checkpoint / "pytorch_model.bin").write_text("not needed")
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    names = ["chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json"]
    copies = {name: (checkpoint / name).read_bytes() for name in names}
    convert(checkpoint, tmp_path / "dst", "int8")
    shutil.rmtree(checkpoint)
    assert sorted(os.listdir(tmp_path / "dst")) == sorted([*names, PACKED_FILE])
    assert {name: (tmp_path / "dst" / name).read_bytes() for name in names} == copies
    assert read_packed(tmp_path / "dst").format == "int8"


def test_the_summary_is_measured(tmp_path: Path, checkpoint: Path) -> None:
    summary = convert(checkpoint, tmp_path / "dst", "int4", 64)
    model = read_packed(tmp_path / "dst")
    parts = {part.name: part for part in summary.parts}
    matrices = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    assert list(parts) == [*matrices, "vectors", "norm", "lm_head", "embed_tokens"]
    config = load_config(checkpoint)
    assert parts["gate_up_proj"].weights == 2 * 2 * 172 * 64  # rows of padding are not weights
    assert parts["down_proj"].nbytes == 2 * model.layouts["down_proj"].nbytes
    assert summary.total.weights == sum(np.prod(shape) for shape in expected_tensors(config).values())

    weights = tiny_tensors(LLAMA)
    errors, squares = {}, [0.0, 0.0]
    for layer in range(2):
        w = dense_layer(weights, layer)["down_proj"].astype(np.float64)
        difference = unpack_matrix(model.layers[layer].down_proj, model.layouts["down_proj"]) - w
        errors[f"layers.{layer}.down_proj"] = np.linalg.norm(difference) / np.linalg.norm(w)
        squares = [squares[0] + np.square(difference).sum(), squares[1] + np.square(w).sum()]
    worst = max(errors, key=lambda name: errors[name])
    assert (parts["down_proj"].worst_tensor, parts["down_proj"].worst_error) == (
        worst,
        pytest.approx(errors[worst], rel=1e-5),
    )
    assert parts["down_proj"].relative_error == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-5)
    assert 0 < parts["lm_head"].relative_error < 0.01 < parts["qkv_proj"].relative_error < 0.083
    assert summary.total.worst_error == max(part.worst_error for part in summary.parts)
    assert summary.total.worst_error > 0.07


def test_memory_is_bounded_by_blocks_and_not_by_the_model(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 64 bytes per thread and weight of a block: 1 GiB with the constants as they are."""
    assert 64 * conversion.BLOCK_WEIGHTS * conversion.MAX_THREADS <= 2**30
    block_weights, threads = 1 << 15, 2
    monkeypatch.setattr(conversion, "BLOCK_WEIGHTS", block_weights)
    monkeypatch.setattr(conversion, "MAX_THREADS", threads)
    convert(checkpoint, tmp_path / "warm", "int4")  # what Python itself allocates once is not meant
    hidden, intermediate = 1024, block_weights // 16  # the widest rows of which 16 make no more than a block
    big = LLAMA | {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": 1}
    write_checkpoint(tmp_path / "big", big)
    for dtype in ("bf16", "int8", "int4"):
        tracemalloc.start()
        try:
            convert(tmp_path / "big", tmp_path / dtype, dtype)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 64 * block_weights * threads + (1 << 20), dtype
        assert peak < 4 * hidden * intermediate, dtype  # less than one of its matrices in float32


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_failure_in_the_middle_leaves_nothing(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    add = conversion.PackedWriter.add

    def failing_add(self: conversion.PackedWriter, name: str, data: np.ndarray) -> None:
        if name == "layers.1.o_proj":
            raise error
        add(self, name, data)

    monkeypatch.setattr(conversion.PackedWriter, "add", failing_add)
    with pytest.raises((KeyboardInterrupt, OSError)):
        convert(checkpoint, tmp_path / "dst", "int4")
    assert os.listdir(tmp_path) == ["src"]


KILLED = """
import os, signal, sys
from ffmini import convert as conversion
add = conversion.PackedWriter.add
def add_and_die(self, name, data):
    add(self, name, data)
    if name == "layers.1.o_proj":
        os.kill(os.getpid(), signal.SIGKILL)
conversion.PackedWriter.add = add_and_die
conversion.convert(sys.argv[1], sys.argv[2], "int4")
"""


def test_a_killed_conversion_leaves_nothing_that_passes(tmp_path: Path, checkpoint: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(checkpoint), str(tmp_path / "dst")]
    assert subprocess.run(command, check=False, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    (left,) = set(tmp_path.iterdir()) - {checkpoint}
    assert left.name.startswith(".dst.partial-") and not is_packed(left)
    convert(checkpoint, tmp_path / "dst", "int4")  # what is left is in nobody's way
    assert read_packed(tmp_path / "dst").format == "int4"


def test_a_failed_replacement_leaves_the_old_one(tmp_path: Path, checkpoint: Path) -> None:
    convert(checkpoint, tmp_path / "dst", "bf16")
    before = (tmp_path / "dst" / PACKED_FILE).read_bytes()
    bad = spoil(tmp_path / "bad", "lm_head.weight", (258, 63), np.nan)
    with pytest.raises(
        CheckpointError, match=r"lm_head.weight: expected finite values, found nan at \[258, 63\]"
    ):
        convert(bad, tmp_path / "dst", "int8", force=True)
    assert (tmp_path / "dst" / PACKED_FILE).read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["bad", "dst", "src"]


def test_replacing_needs_force(tmp_path: Path, checkpoint: Path) -> None:
    convert(checkpoint, tmp_path / "dst", "bf16")
    with pytest.raises(CheckpointError, match="--force replaces it"):
        convert(checkpoint, tmp_path / "dst", "int4")
    convert(checkpoint, tmp_path / "dst", "int4", force=True)
    assert read_packed(tmp_path / "dst").format == "int4"


def test_weights_too_large_for_a_format_are_named(tmp_path: Path) -> None:
    spoil(tmp_path / "src", "model.layers.1.mlp.up_proj.weight", (3, 5), 1e6)
    with pytest.raises(
        UnsupportedError, match=r"^model.layers.1.gate_up_proj: int4 .* up to 491280, found 1e\+06$"
    ):
        convert(tmp_path / "src", tmp_path / "dst", "int4")
    assert not (tmp_path / "dst").exists()


def test_packed_sources_are_refused(tmp_path: Path, checkpoint: Path) -> None:
    convert(checkpoint, tmp_path / "dst", "int8")
    with pytest.raises(CheckpointError, match="expected a Hugging Face checkpoint, found a packed model"):
        convert(tmp_path / "dst", tmp_path / "other", "int4")


def test_too_little_disk_space_is_refused_with_the_numbers(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(FFMiniError, match=r"expected 0.001 GB of free disk space, found 0.000 GB"):
        convert(checkpoint, tmp_path / "dst", "int4")
    assert os.listdir(tmp_path) == ["src"]


def test_bf16_of_bf16_is_without_error(tmp_path: Path, checkpoint: Path) -> None:
    summary = convert(checkpoint, tmp_path / "dst", "bf16")
    assert summary.total.relative_error == 0 and summary.total.worst_error == 0


def test_other_sources_are_rounded_to_bf16_and_measured(tmp_path: Path) -> None:
    spoil(tmp_path / "src", "model.layers.1.self_attn.v_proj.weight", (7, 9), 50.1)
    total = convert(tmp_path / "src", tmp_path / "dst", "bf16").total
    weights = tiny_tensors(LLAMA)
    weights["model.layers.1.self_attn.v_proj.weight"][7, 9] = 50.1
    check_model(read_packed(tmp_path / "dst"), weights)
    norm = np.sqrt(sum(np.square(w, dtype=np.float64).sum() for w in weights.values()))
    error = abs(np.float32(50.1) - np.float32(50.0))  # a bf16 near 50 is a multiple of a quarter
    assert total.relative_error == pytest.approx(error / norm, rel=1e-4)
    assert total.worst_tensor == "layers.1.qkv_proj"


def test_the_table(tmp_path: Path, checkpoint: Path) -> None:
    summary = convert(checkpoint, tmp_path / "dst", "int4", 32)
    lines = summary.table().splitlines()
    assert lines[0].split() == ["part", "weights", "MB", "bits/weight", "error", "largest", "in"]
    total = lines[-1].split()
    assert total[0] == "total" and total[1] == f"{summary.total.weights:,}"
    assert float(total[4].rstrip("%")) == pytest.approx(100 * summary.total.relative_error, abs=1e-3)
    assert total[6].startswith("layers.")


# ---- the command ----------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, checkpoint: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "convert.py"), str(checkpoint), str(tmp_path / "dst")]
    options = {
        "capture_output": True,
        "text": True,
        "cwd": ROOT,
        "env": os.environ | {"PYTHONPATH": str(ROOT)},
    }
    done = subprocess.run([*command, "--dtype", "int4", "--group-size", "64"], check=False, **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("total")
    assert read_packed(tmp_path / "dst").group_size == 64
    again = subprocess.run([*command, "--dtype", "bf16"], check=False, **options)
    assert again.returncode == 1 and again.stdout == ""
    assert (
        again.stderr == f"convert: {tmp_path / 'dst'}: a packed model is there already; --force replaces it\n"
    )


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "absent"), str(tmp_path / "dst"), "--dtype", "int8"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("convert: ")
    assert not is_packed(tmp_path / "dst")


@pytest.mark.parametrize("options", [[], ["--dtype", "int3"], ["--dtype", "int4", "--group-size", "48"]])
def test_wrong_options_are_refused(tmp_path: Path, checkpoint: Path, options: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(checkpoint), str(tmp_path / "dst"), *options])
    assert stop.value.code == 2


def test_the_subcommand(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["convert", str(checkpoint), str(tmp_path / "dst"), "--dtype", "bf16"])
    assert args.run(args) == 0
    assert "total" in capsys.readouterr().out
    assert read_packed(tmp_path / "dst").format == "bf16"
