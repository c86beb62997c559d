"""Keys and values on disk: they go from model to model of the same weights, and to no other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_engine import plain
from test_model import write_tokenizer
from tiny import tiny_config, write_checkpoint

from ffmini.checkpoint import SafetensorsFile
from ffmini.config import parse_config
from ffmini.convert import convert, pack_checkpoint
from ffmini.errors import BusyError, CheckpointError
from ffmini.model import Model, load
from ffmini.packing import weights_digest
from ffmini.snapshot import Snapshot, read_snapshot, write_snapshot

SHAPE = {"vocab_size": 260, "eos_token_id": 256}
PROMPT = list(range(40))
OPTIONS: dict[str, Any] = {"temperature": 1.0, "seed": 2, "max_new_tokens": 8, "ignore_eos": True}


def make_checkpoint(directory: Path, family: str = "llama2", seed: int = 0) -> Path:
    write_checkpoint(directory, tiny_config(family, **SHAPE), seed)
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("snapshot") / "model")


def make_model(directory: Path, **options: Any) -> Model:
    return load(directory, device="cpu", **options)


@pytest.fixture(scope="module")
def saved(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the cache of PROMPT and the seven tokens after it that were run."""
    path = tmp_path_factory.mktemp("saved") / "cache.safetensors"
    with make_model(checkpoint) as model:
        model.generate(PROMPT, **OPTIONS)
        assert model.save_cache(path) == 47
    return path


def test_a_loaded_cache_saves_the_prompt_and_changes_no_bit(checkpoint: Path, saved: Path) -> None:
    with make_model(checkpoint) as model:
        expected = model.generate([*PROMPT, 9], **OPTIONS)
    with make_model(checkpoint, max_seq_len=64, max_batch_size=2) as model:
        assert model.load_cache(saved) == 47
        model.generate([200], max_new_tokens=2)  # in the other slot
        found = model.generate([*PROMPT, 9], **OPTIONS)
    assert found.usage.cached_tokens == 40 and plain(found) == plain(expected)


def test_the_last_sequence_is_saved(checkpoint: Path, saved: Path, tmp_path: Path) -> None:
    with make_model(checkpoint, max_batch_size=3) as model:
        with pytest.raises(ValueError, match="nothing has been computed yet"):
            model.save_cache(tmp_path / "none")
        model.load_cache(saved)
        model.save_cache(tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == saved.read_bytes()
        model.generate([5, 6, 7], max_new_tokens=1)
        assert model.save_cache(tmp_path / "again") == 3
        with model.stream("a") as stream:
            next(stream)
            with pytest.raises(BusyError):
                model.save_cache(tmp_path / "busy")
            with pytest.raises(BusyError):
                model.load_cache(saved)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_weights_are_known_however_they_are_loaded(checkpoint: Path, saved: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "packed", "bf16", progress=False)
    with make_model(tmp_path / "packed") as model:
        assert model.load_cache(saved) == 47
    packed = pack_checkpoint(checkpoint, "int8", progress=False)
    digests = {weights_digest(packed)}
    packed.layers[1].vectors[3] += 1
    digests.add(weights_digest(packed))
    packed.layers[0].down_proj[-1] ^= 1
    digests.add(weights_digest(packed))
    packed.lm_head[0] ^= 1
    digests.add(weights_digest(packed))
    assert len(digests) == 4


def test_other_weights_are_refused(checkpoint: Path, saved: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", seed=1)
    for directory, options in ((checkpoint, {"dtype": "int8"}), (other, {})):
        with make_model(directory, **options) as model:
            with pytest.raises(
                CheckpointError, match=r"expected a cache of weights [0-9a-f]{32}, found [0-9a-f]{32}$"
            ):
                model.load_cache(saved)
            assert model.generate([*PROMPT, 9], **OPTIONS).usage.cached_tokens == 0
    too_long = r"expected 1 to 46 tokens \(max_seq_len\), found \[47\]"
    with make_model(checkpoint, max_seq_len=46) as model, pytest.raises(CheckpointError, match=too_long):
        model.load_cache(saved)


def test_another_kv_dtype_is_refused(checkpoint: Path, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "int8"
    with make_model(checkpoint, kv_dtype="int8") as model:
        expected = model.generate([*PROMPT, 9], **OPTIONS)
        model.generate(PROMPT, **OPTIONS)
        model.save_cache(path)
        with pytest.raises(CheckpointError, match=r"kv_dtype int8, found bf16$"):
            model.load_cache(saved)
    with make_model(checkpoint, kv_dtype="int8") as model:
        assert model.load_cache(path) == 47
        found = model.generate([*PROMPT, 9], **OPTIONS)
        assert found.usage.cached_tokens == 40 and plain(found) == plain(expected)
    with (
        make_model(checkpoint) as model,
        pytest.raises(CheckpointError, match=r"kv_dtype bf16, found int8$"),
    ):
        model.load_cache(path)
    file = SafetensorsFile(path)
    assert {name: info.dtype for name, info in file.tensors.items()} == {
        "tokens": "I64",
        "keys": "U8",
        "values": "U8",
    }


def test_a_rope_that_depends_on_the_context(tmp_path: Path) -> None:
    directory, path = make_checkpoint(tmp_path / "model", "llama_dynamic"), tmp_path / "cache"
    with make_model(directory, max_seq_len=64) as model:
        model.generate(PROMPT, **OPTIONS)
        model.save_cache(path)
        assert model.load_cache(path) == 47
    with (
        make_model(directory, max_seq_len=63) as model,
        pytest.raises(CheckpointError, match="max_seq_len 63, f"),
    ):
        model.load_cache(path)


def test_damaged_files_are_refused(checkpoint: Path, saved: Path, tmp_path: Path) -> None:
    config = parse_config(tiny_config("llama2", **SHAPE), "test")
    shape = (config.num_layers, config.num_kv_heads, 3, config.head_dim)
    bits = np.zeros(shape, np.uint16)
    path = tmp_path / "cache"
    with make_model(checkpoint) as model:
        origin = model._cache_origin()
        origin_of = origin, "bf16"

        def refuses(message: str) -> None:
            with pytest.raises(CheckpointError, match=message) as caught:
                model.load_cache(path)
            assert "\n" not in str(caught.value) and str(path) in str(caught.value)

        refuses("readable file|No such file|expected")
        path.write_bytes(saved.read_bytes()[:-1])
        refuses("expected")
        save_file({"tokens": np.zeros(3, np.int64)}, path)
        refuses("expected a cache of version 2, found none")
        metadata = {"ffmini_snapshot": "2", "weights": origin}
        save_file({"tokens": np.zeros(3, np.int64)}, path, metadata)
        refuses("expected a cache of kv_dtype bf16, found none")
        save_file({"tokens": np.zeros(3, np.int64)}, path, metadata | {"kv_dtype": "bf16"})
        refuses("expected .*'keys'.*, found .*'tokens'")
        write_snapshot(path, Snapshot(np.arange(3), bits, bits[:, :, :2]), *origin_of)
        refuses(r"values: expected BF16 \[2, 4, 3, 16\], found BF16 \[2, 4, 2, 16\]")
        write_snapshot(path, Snapshot(np.array([1, 2, 260]), bits, bits), *origin_of)
        refuses("expected ids below 260")
        write_snapshot(path, Snapshot(np.arange(3), bits, bits | 0x7F80), *origin_of)
        refuses("finite numbers expected")
        assert model.generate([0, 1, 2, 3], max_new_tokens=1).usage.cached_tokens == 0
        write_snapshot(path, Snapshot(np.arange(3), bits, bits), *origin_of)
        assert read_snapshot(path, *origin_of, config, 3).tokens.tolist() == [0, 1, 2]


def test_a_file_that_can_not_be_finished_leaves_the_old_one(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache"
    path.write_bytes(saved.read_bytes())

    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_snapshot(path, Snapshot(np.arange(1), *[np.zeros((2, 4, 1, 16), np.uint16)] * 2), "x", "bf16")
    assert [entry.name for entry in tmp_path.iterdir()] == ["cache"]
    assert path.read_bytes() == saved.read_bytes()
