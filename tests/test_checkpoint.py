"""Checkpoints: a table of malformed files, each refused with one line, and what good ones read as."""

from __future__ import annotations

import json
import math
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from ffmini.checkpoint import (
    INDEX_FILE,
    Checkpoint,
    SafetensorsFile,
    check_tensors,
    expected_tensors,
    resolve_model,
)
from ffmini.config import load_config, parse_config
from ffmini.errors import CheckpointError, FFMiniError, UnsupportedError
from ffmini.numerics import from_bf16, to_bf16

CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 11,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 4976698672\n"

Tensors = dict[str, tuple[str, np.ndarray]]


def file_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of a header (an object or raw bytes) and data; `length` overrides the true one."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def save(path: Path, tensors: Tensors) -> None:
    """Write tensors given as name -> (dtype, array as stored)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, array) in tensors.items():
        raw = array.tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    path.write_bytes(file_bytes(header, data))


def random_tensors(**changes: Any) -> Tensors:
    """bf16 tensors of CONFIG with `changes`, all values random."""
    rng = np.random.default_rng(7)
    shapes = expected_tensors(parse_config(CONFIG | changes, "config.json"))
    return {name: ("BF16", to_bf16(rng.standard_normal(shape, np.float32))) for name, shape in shapes.items()}


def write_model(directory: Path, tensors: Tensors | None = None, **changes: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))
    save(directory / "model.safetensors", random_tensors(**changes) if tensors is None else tensors)
    return directory


def write_sharded(directory: Path) -> Path:
    """The same model in two shards, a.safetensors and b.safetensors, with an index."""
    write_model(directory)
    (directory / "model.safetensors").unlink()
    names = list(random_tensors())
    shards = {"a.safetensors": names[:8], "b.safetensors": names[8:]}
    for shard, members in shards.items():
        save(directory / shard, {name: random_tensors()[name] for name in members})
    write_index(directory, {name: shard for shard, members in shards.items() for name in members})
    return directory


def write_index(directory: Path, weight_map: Any) -> None:
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def load_all(directory: Path) -> dict[str, np.ndarray]:
    """Everything that loading a model does with its config and weights."""
    config = load_config(directory)
    checkpoint = Checkpoint(directory)
    check_tensors(checkpoint, config)
    return {name: checkpoint.read(name) for name in checkpoint.names}


# ---- malformed files ------------------------------------------------------------------------------------


@dataclass
class Case:
    """A way to spoil a good model, and what the error must name."""

    name: str
    spoil: Callable[[Path], None]
    says: tuple[str, ...]
    error: type[Exception] = CheckpointError
    sharded: bool = False


def header_case(
    name: str, header: Any, *says: str, data: bytes = bytes(8), length: int | None = None
) -> Case:
    """model.safetensors with this header and these data bytes."""
    content = file_bytes(header, data, length)
    return Case(name, lambda d: (d / "model.safetensors").write_bytes(content), ("model.safetensors", *says))


def entry_case(name: str, entry: Any, *says: str, data: bytes = bytes(8)) -> Case:
    """model.safetensors with one tensor called "t" of this header entry."""
    return header_case(name, {"t": entry}, ": t: ", *says, data=data)


def tensor_case(name: str, spoil: Callable[[Tensors], Any], *says: str, **options: Any) -> Case:
    """A well-formed model.safetensors whose tensors `spoil` has changed in place."""

    def rewrite(directory: Path) -> None:
        tensors = random_tensors()
        spoil(tensors)
        save(directory / "model.safetensors", tensors)

    return Case(name, rewrite, ("model.safetensors", *says), **options)


def index_case(name: str, changes: dict[str, Any] | None, *says: str) -> Case:
    """An index whose weight_map has `changes`, or is empty if they are None."""

    def rewrite(directory: Path) -> None:
        weight_map = json.loads((directory / INDEX_FILE).read_text())["weight_map"]
        write_index(directory, {} if changes is None else weight_map | changes)

    return Case(name, rewrite, says, sharded=True)


def file_case(name: str, file: str, content: bytes | None, *says: str, sharded: bool = False) -> Case:
    """One file replaced by `content`, or removed."""

    def rewrite(directory: Path) -> None:
        if content is None:
            (directory / file).unlink()
        else:
            (directory / file).write_bytes(content)

    return Case(name, rewrite, says, sharded=sharded)


def as_directory(file: str) -> Callable[[Path], None]:
    def rewrite(directory: Path) -> None:
        (directory / file).unlink()
        (directory / file).mkdir()

    return rewrite


def as_broken_link(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").symlink_to(directory / "gone")


def only_pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def set_value(name: str, index: tuple[int, ...], bits: int) -> Callable[[Tensors], None]:
    def spoil(tensors: Tensors) -> None:
        tensors[name][1][index] = bits

    return spoil


def two_tensors(*offsets: list[int]) -> dict[str, Any]:
    """A header of tensors a, b, ... of two F16 values each at these offsets."""
    names = "abc"
    return {names[i]: {"dtype": "F16", "shape": [2], "data_offsets": span} for i, span in enumerate(offsets)}


def duplicate_tensor(directory: Path) -> None:
    tensors = random_tensors()
    save(directory / "b.safetensors", {n: tensors[n] for n in [EMBEDDING, *list(tensors)[8:]]})


def unlisted_tensor(directory: Path) -> None:
    tensors = random_tensors()
    extra = {n: tensors[n] for n in list(tensors)[8:]} | {"extra": tensors[NORM]}
    save(directory / "b.safetensors", extra)


F32_2 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HUGE = 1 << 62

CASES = [
    # the frame of a safetensors file
    file_case("empty file", "model.safetensors", b"", "model.safetensors", "safetensors file", "0 bytes"),
    file_case("seven bytes", "model.safetensors", b"1234567", "model.safetensors", "found only 7 bytes"),
    header_case("header longer than the file", {}, "header length", "found 1000", data=b"", length=1000),
    header_case("header length of 2 ** 63", {}, "header length", "found 9223372036854775808", length=1 << 63),
    header_case("header length of 0", {}, "header length", "found 0", length=0),
    header_case("header is not UTF-8", b'{"\xff": 1}', "header", "expected UTF-8", "0xff at 2"),
    header_case("header is not JSON", b'{"t": }', "header", "expected JSON", "line 1 column 7"),
    header_case("header is a list", b"[1, 2]", "header", "expected a JSON object", "[1, 2]"),
    header_case("header begins with a space", b' {"t": 1}', "header", "expected a JSON object"),
    header_case("header nested too deeply", b'{"t":' + b"[" * 100_000, "header", "nested too deeply"),
    header_case("header says NaN", b'{"t": NaN}', "header", "expected JSON", "NaN"),
    header_case(
        "a tensor twice",
        b'{"t": %b, "t": %b}' % (json.dumps(F32_2).encode(), json.dumps(F32_2).encode()),
        "the key 't' twice",
    ),
    header_case("metadata is not text", {"__metadata__": {"n": 1}, "t": F32_2}, "__metadata__", "{'n': 1}"),
    header_case("a name of two lines", {"a\nb": F32_2}, "names of 1 to 256", r"'a\nb'"),
    header_case("a name of nothing", {"": F32_2}, "names of 1 to 256", "found ''"),
    file_case(
        "Git-LFS pointer",
        "model.safetensors",
        LFS_POINTER,
        "model.safetensors",
        "Git-LFS pointer",
        "git lfs pull",
    ),
    # one entry of the header
    entry_case("entry is a list", [], "expected dtype, shape and data_offsets", "found []"),
    entry_case("entry without shape", {"dtype": "F32", "data_offsets": [0, 8]}, "expected dtype, shape"),
    entry_case("unknown key in an entry", F32_2 | {"stride": 1}, "expected dtype, shape", "stride"),
    entry_case("unknown dtype", F32_2 | {"dtype": "F31"}, "dtype", "BF16", "found 'F31'"),
    entry_case("dtype is a number", F32_2 | {"dtype": 4}, "dtype", "found 4"),
    entry_case("shape is a number", F32_2 | {"shape": 2}, "shape", "found 2"),
    entry_case("negative size", F32_2 | {"shape": [-2]}, "shape", "from 1 to 2**63 - 1", "found [-2]"),
    entry_case("size of zero", F32_2 | {"shape": [0], "data_offsets": [0, 0]}, "shape", "found [0]"),
    entry_case("size is a float", F32_2 | {"shape": [2.0]}, "shape", "found [2.0]"),
    entry_case("size is a boolean", F32_2 | {"shape": [2, True]}, "shape", "found [2, True]"),
    entry_case("nine sizes", F32_2 | {"shape": [2] + [1] * 8}, "shape", "at most 8"),
    entry_case("size of 4000 digits", F32_2 | {"shape": [10**3999] * 2}, "shape", "from 1 to 2**63 - 1"),
    entry_case(
        "product beyond 64 bits", F32_2 | {"shape": [HUGE, HUGE]}, "data_offsets", f"{4 * HUGE**2}", "found 8"
    ),
    entry_case(
        "product that wraps to 8 bytes", F32_2 | {"shape": [HUGE + 2]}, f"expected {4 * (HUGE + 2)} bytes"
    ),
    entry_case("shape against offsets", F32_2 | {"shape": [3]}, "expected 12 bytes for F32 [3]", "found 8"),
    entry_case("negative offset", F32_2 | {"data_offsets": [-8, 0]}, "data_offsets", "found [-8, 0]"),
    entry_case("offsets reversed", F32_2 | {"data_offsets": [8, 0]}, "data_offsets", "found [8, 0]"),
    entry_case("three offsets", F32_2 | {"data_offsets": [0, 8, 8]}, "data_offsets", "found [0, 8, 8]"),
    entry_case("tensor out of the file", F32_2, "data_offsets", "at or before 7", "found 8", data=bytes(7)),
    # all entries together
    header_case(
        "a hole",
        two_tensors([0, 4], [6, 10]),
        ": b: data_offsets",
        "begin at 4",
        "found 6: a hole",
        data=bytes(10),
    ),
    header_case(
        "a hole in front",
        two_tensors([2, 6]),
        ": a: data_offsets",
        "begin at 0",
        "found 2: a hole",
        data=bytes(6),
    ),
    header_case(
        "an overlap",
        two_tensors([0, 4], [2, 6]),
        ": b: data_offsets",
        "begin at 4",
        "found 2: an overlap",
        data=bytes(6),
    ),
    header_case("the same bytes twice", two_tensors([0, 4], [0, 4]), "an overlap", data=bytes(4)),
    header_case("trailing bytes", two_tensors([0, 4]), "expected the file to end after", data=bytes(9)),
    header_case("no tensors but data", {}, "expected the file to end after 10 bytes, found 18"),
    # files that are not there
    file_case(
        "no weights",
        "model.safetensors",
        None,
        "model.safetensors or model.safetensors.index.json",
        "neither",
    ),
    Case("only a pickle", only_pickle, ("expected model.safetensors", "pytorch_model.bin", "not supported")),
    Case(
        "weights are a directory", as_directory("model.safetensors"), ("model.safetensors", "something else")
    ),
    Case("weights are a broken link", as_broken_link, ("model.safetensors", "a broken link")),
    file_case("no config", "config.json", None, "config.json", "found none"),
    file_case("config is a pointer", "config.json", LFS_POINTER, "config.json", "Git-LFS pointer"),
    file_case(
        "config is not UTF-8", "config.json", b'{"a": "\xe9"}', "config.json", "expected UTF-8", "0xe9"
    ),
    file_case("config is cut off", "config.json", b'{"a": 1', "config.json", "expected JSON", "line 1"),
    file_case(
        "config has a key twice", "config.json", b'{"a": 1, "a": 1}', "config.json", "the key 'a' twice"
    ),
    file_case("config is a list", "config.json", b"[]", "config.json", "JSON object", "found []"),
    file_case(
        "config has a giant number",
        "config.json",
        b'{"a": %b}' % (b"9" * 5000),
        "config.json",
        "expected JSON",
    ),
    # the index and its shards
    file_case("index is not JSON", INDEX_FILE, b"weights", INDEX_FILE, "expected JSON", sharded=True),
    file_case(
        "index without weight_map", INDEX_FILE, b"{}", INDEX_FILE, "weight_map", "found null", sharded=True
    ),
    file_case("index is a pointer", INDEX_FILE, LFS_POINTER, INDEX_FILE, "Git-LFS pointer", sharded=True),
    index_case("weight_map is empty", None, INDEX_FILE, "weight_map", "found {}"),
    index_case(
        "shard outside", {NORM: "../b.safetensors"}, INDEX_FILE, NORM, "bare name", "'../b.safetensors'"
    ),
    index_case("shard absolute", {NORM: "/etc/b.safetensors"}, INDEX_FILE, NORM, "'/etc/b.safetensors'"),
    index_case("shard is ..", {NORM: ".."}, INDEX_FILE, NORM, "bare name", "found '..'"),
    index_case("shard with backslash", {NORM: "x\\b.safetensors"}, NORM, "bare name"),
    index_case("shard with a line break", {NORM: "b.safetensors\n"}, NORM, r"safetensors\n'"),
    index_case("shard is a number", {NORM: 2}, INDEX_FILE, NORM, "bare name", "found 2"),
    index_case("shard is a pickle", {NORM: "b.bin"}, INDEX_FILE, NORM, "found 'b.bin'"),
    index_case("shard not there", {NORM: "c.safetensors"}, "c.safetensors", "expected a file", "none"),
    index_case(
        "tensor listed but absent", {"extra": "b.safetensors"}, "b.safetensors", "extra", "in no shard"
    ),
    index_case(
        "tensor in the other shard",
        {NORM: "a.safetensors"},
        "a.safetensors",
        NORM,
        "found it in b.safetensors",
    ),
    index_case("listed name of two lines", {"a\nb": "a.safetensors"}, INDEX_FILE, r"'a\nb'"),
    Case(
        "tensor in two shards",
        duplicate_tensor,
        ("b.safetensors", EMBEDDING, "in one shard", "a.safetensors too"),
        sharded=True,
    ),
    Case(
        "tensor not listed", unlisted_tensor, ("b.safetensors", "extra", INDEX_FILE, "no entry"), sharded=True
    ),
    file_case(
        "shard is a pointer", "b.safetensors", LFS_POINTER, "b.safetensors", "Git-LFS pointer", sharded=True
    ),
    # weights against the config
    Case(
        "missing tensor",
        lambda d: save(d / "model.safetensors", {k: v for k, v in random_tensors().items() if k != Q_PROJ}),
        (Q_PROJ, "shape [16, 16]", "found none (1 of 21 tensors are missing)"),
    ),
    tensor_case("unknown tensor", lambda t: t.update(extra=t[NORM]), "extra", "no such tensor", "BF16 [16]"),
    tensor_case(
        "unknown bias", lambda t: t.update({Q_PROJ[:-6] + "bias": t[NORM]}), "q_proj.bias", "no such tensor"
    ),
    tensor_case(
        "wrong shape",
        lambda t: t.update({Q_PROJ: ("BF16", t[Q_PROJ][1][:8])}),
        Q_PROJ,
        "[16, 16]",
        "found [8, 16]",
    ),
    tensor_case(
        "transposed",
        lambda t: t.update({EMBEDDING: ("BF16", t[EMBEDDING][1].T)}),
        EMBEDDING,
        "[11, 16]",
        "found [16, 11]",
    ),
    tensor_case(
        "wrong rank", lambda t: t.update({NORM: ("BF16", t[NORM][1][None])}), NORM, "[16]", "found [1, 16]"
    ),
    tensor_case(
        "weights of fp64",
        lambda t: t.update({NORM: ("F64", np.ones(16))}),
        NORM,
        "BF16, F16, F32",
        "found F64",
        error=UnsupportedError,
    ),
    tensor_case(
        "weights of fp8",
        lambda t: t.update({NORM: ("F8_E4M3", np.ones(16, np.uint8))}),
        NORM,
        "found F8_E4M3",
        error=UnsupportedError,
    ),
    tensor_case("NaN", set_value(Q_PROJ, (3, 5), 0x7FC0), Q_PROJ, "finite", "found nan at [3, 5]"),
    tensor_case("infinity", set_value(NORM, (9,), 0xFF80), NORM, "finite", "found -inf at [9]"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_malformed_files_are_refused_with_one_line(case: Case, tmp_path: Path) -> None:
    directory = (write_sharded if case.sharded else write_model)(tmp_path / "model")
    load_all(directory)  # good before
    case.spoil(directory)
    with pytest.raises(case.error) as caught:
        load_all(directory)
    message = str(caught.value)
    assert type(caught.value) is case.error
    assert message.startswith(str(directory)) and "\n" not in message and message.isprintable()
    for part in ("expected", "found", *case.says):
        assert part in message


def test_the_table_is_long_and_without_repetition() -> None:
    assert len(CASES) == len({case.name for case in CASES}) >= 30


def test_refusals_allocate_nothing_large(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    entry = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}
    for content in (
        file_bytes({"t": entry}, bytes(8)),
        file_bytes({}, b"", 1 << 30),
        file_bytes({}, b"", 90_000_000),
    ):
        path.write_bytes(content)
        tracemalloc.start()
        try:
            with pytest.raises(CheckpointError):
                SafetensorsFile(path)
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(max_size=3)), min_size=1, max_size=4))
def test_any_damage_is_refused_or_harmless(edits: list[tuple[int, bytes]], tmp_path: Path) -> None:
    """Bytes inserted or replaced anywhere raise an error of ours or leave every tensor inside the file."""
    path = tmp_path / "model.safetensors"
    save(path, {"a": ("F32", np.ones((2, 3), np.float32)), "b": ("BF16", np.ones(5, np.uint16))})
    data = bytearray(path.read_bytes())
    for place, new in edits:
        start = place % len(data)
        data[start : start + place % 3] = new
    path.write_bytes(bytes(data))
    try:
        file = SafetensorsFile(path)
        for name, info in file.tensors.items():
            assert info.offset + file.view(name).nbytes <= len(data)
    except FFMiniError as error:
        assert "\n" not in str(error)


# ---- good files -----------------------------------------------------------------------------------------


def test_views_are_what_the_safetensors_library_wrote(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    dtypes = ["?", "u1", "i1", "<u2", "<i2", "<f2", "<u4", "<i4", "<f4", "<u8", "<i8", "<f8"]
    arrays = {f"t{i}": rng.integers(0, 2, (3, i + 1)).astype(dtype) for i, dtype in enumerate(dtypes)}
    arrays["scalar"] = np.array(2.5, np.float32)
    save_file(arrays, tmp_path / "x.safetensors", metadata={"made": "here"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert dict(file.metadata) == {"made": "here"}
    assert set(file.tensors) == set(arrays)
    for name, array in arrays.items():
        view = file.view(name)
        assert view.dtype == array.dtype and view.shape == array.shape and not view.flags.writeable
        np.testing.assert_array_equal(view, array)
        assert file.tensors[name].nbytes == array.nbytes


def test_a_header_padded_with_spaces_is_fine(tmp_path: Path) -> None:
    text = json.dumps({"t": F32_2}).encode() + b" " * 13
    (tmp_path / "x.safetensors").write_bytes(file_bytes(text, struct.pack("<ff", 1.5, -2.0)))
    assert SafetensorsFile(tmp_path / "x.safetensors").view("t").tolist() == [1.5, -2.0]


def test_views_without_a_tensor_or_a_numpy_dtype_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "x.safetensors", {"t": ("F8_E5M2", np.ones(4, np.uint8))})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: u: expected a tensor, found none"):
        file.view("u")
    with pytest.raises(UnsupportedError, match=r"x\.safetensors: t: found dtype F8_E5M2"):
        file.view("t")


def test_weights_of_every_dtype_read_exactly(tmp_path: Path) -> None:
    values = np.random.default_rng(1).standard_normal((16, 16), np.float32)
    half = values.astype(np.float16)
    half[0, :2] = [6e-8, 65504]  # a subnormal and the largest
    stored = {"BF16": to_bf16(values), "F16": half, "F32": values}
    exact = {"BF16": from_bf16(to_bf16(values)), "F16": half.astype(np.float32), "F32": values}
    for dtype, array in stored.items():
        tensors = random_tensors() | {Q_PROJ: (dtype, array)}
        checkpoint = Checkpoint(write_model(tmp_path / dtype, tensors))
        check_tensors(checkpoint, load_config(checkpoint.directory))
        assert checkpoint.info(Q_PROJ).dtype == dtype and checkpoint.info(Q_PROJ).shape == (16, 16)
        for rows in (None, slice(3, 9), slice(14, 99), slice(-2, None)):
            read = checkpoint.read(Q_PROJ, rows)
            assert read.dtype == np.float32
            np.testing.assert_array_equal(read, exact[dtype] if rows is None else exact[dtype][rows])


def test_a_bad_value_is_found_only_in_the_rows_that_are_read(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors[Q_PROJ][1][7, 2] = 0x7F80
    checkpoint = Checkpoint(write_model(tmp_path / "m", tensors))
    assert checkpoint.read(Q_PROJ, slice(0, 7)).shape == (7, 16)
    with pytest.raises(
        CheckpointError, match=r"q_proj\.weight: expected finite values, found inf at \[7, 2\]"
    ):
        checkpoint.read(Q_PROJ, slice(4, 9))


def test_one_file_and_shards_read_the_same(tmp_path: Path) -> None:
    single, sharded = load_all(write_model(tmp_path / "a")), load_all(write_sharded(tmp_path / "b"))
    assert single.keys() == sharded.keys()
    for name, values in single.items():
        np.testing.assert_array_equal(values, sharded[name])


def test_arrays_outlive_close_and_the_files_do_not(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "m")
    checkpoint = Checkpoint(directory)
    values = checkpoint.read(NORM)
    checkpoint.close()
    assert math.isfinite(values.sum())
    assert str(directory) not in Path("/proc/self/maps").read_text()
    with pytest.raises(CheckpointError, match="expected a tensor, found none"):
        checkpoint.read(NORM)


def test_rotary_frequencies_are_ignored(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors = random_tensors() | {name: ("F64", np.full(4, np.nan))}
    directory = write_model(tmp_path / "m", tensors)
    check_tensors(Checkpoint(directory), load_config(directory))


def test_the_head_of_a_tied_model_must_equal_its_embedding(tmp_path: Path) -> None:
    tensors = random_tensors(tie_word_embeddings=True)
    assert "lm_head.weight" not in tensors
    load_all(write_model(tmp_path / "without", tensors, tie_word_embeddings=True))
    embedding = tensors[EMBEDDING][1]
    wide = from_bf16(embedding)
    load_all(
        write_model(tmp_path / "equal", tensors | {"lm_head.weight": ("F32", wide)}, tie_word_embeddings=True)
    )
    wide[6, 3] += 1e-3
    odd = write_model(tmp_path / "odd", tensors | {"lm_head.weight": ("F32", wide)}, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: expected the values of .* in row 6"):
        load_all(odd)


@pytest.mark.parametrize(
    ("changes", "extra"),
    [
        ({}, {}),
        (
            {"attention_bias": True},
            {"q_proj.bias": 16, "k_proj.bias": 8, "v_proj.bias": 8, "o_proj.bias": 16},
        ),
        ({"mlp_bias": True}, {"gate_proj.bias": 12, "up_proj.bias": 12, "down_proj.bias": 16}),
        ({"model_type": "mistral"}, {}),
        ({"model_type": "qwen2"}, {"q_proj.bias": 16, "k_proj.bias": 8, "v_proj.bias": 8}),
        ({"model_type": "qwen3", "head_dim": 8}, {"q_norm.weight": 8, "k_norm.weight": 8}),
    ],
)
def test_families_differ_in_their_vectors(changes: dict[str, Any], extra: dict[str, int]) -> None:
    plain = set(expected_tensors(parse_config(CONFIG, "config.json")))
    shapes = expected_tensors(parse_config(CONFIG | changes, "config.json"))
    layer = {name.rsplit(".", 2)[-2] + "." + name.rsplit(".", 1)[-1]: name for name in set(shapes) - plain}
    assert {name: shapes[full] for name, full in layer.items()} == {k: (v,) for k, v in extra.items()}
    assert len(set(shapes) - plain) == 2 * len(extra)  # in each of two layers


# ---- where models lie -----------------------------------------------------------------------------------


def fill_cache(cache: Path, name: str = "org/tiny-1.5", commit: str = "0a1b2c") -> Path:
    """A cached model as Hugging Face's tools leave it: a snapshot of links to blobs. Returns the snapshot."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    blobs = repository / "blobs"
    for folder in (snapshot, blobs, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    write_model(blobs)
    for file in ("config.json", "model.safetensors"):
        (blobs / file).rename(blobs / f"blob-of-{file}")
        (snapshot / file).symlink_to(f"../../blobs/blob-of-{file}")
    return snapshot


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    for variable in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return monkeypatch


@pytest.mark.parametrize(
    ("variable", "below"),
    [("HF_HUB_CACHE", ""), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub"), (None, None)],
)
def test_cached_models_are_found(
    variable: str | None, below: str | None, no_cache: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if variable is None:
        cache = tmp_path / "home" / ".cache" / "huggingface" / "hub"
    else:
        no_cache.setenv(variable, str(tmp_path / "cache"))
        cache = tmp_path / "cache" / str(below)
    snapshot = fill_cache(cache)
    assert resolve_model("org/tiny-1.5") == snapshot
    assert load_all(snapshot)[EMBEDDING].shape == (11, 16)


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == tmp_path


def test_absent_models_are_refused_with_the_command(no_cache: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache = tmp_path / "home/.cache/huggingface/hub"
    with pytest.raises(CheckpointError) as caught:
        resolve_model("org/tiny-1.5")
    assert str(caught.value) == (
        f"org/tiny-1.5: expected a directory or a model in {cache}, found neither; "
        "get it with: hf download org/tiny-1.5"
    )


def test_half_downloaded_models_count_as_absent(no_cache: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_cache.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = fill_cache(tmp_path)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"hf download org/tiny-1\.5"):
        resolve_model("org/tiny-1.5")


@pytest.mark.parametrize(
    "name", ["no/such/model", "../up", "/absent/model", "model", "a b/c", "org/..", "x" * 5000]
)
def test_other_names_are_refused_without_a_command(name: str, no_cache: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        CheckpointError, match="expected a directory or a name like org/name, found neither"
    ) as caught:
        resolve_model(name)
    assert len(str(caught.value)) < 200


def test_a_file_is_not_a_model_directory(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"model\.gguf: expected a model directory, found a file"):
        resolve_model(tmp_path / "model.gguf")


def test_a_ref_that_leads_elsewhere_is_refused(no_cache: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_cache.setenv("HF_HUB_CACHE", str(tmp_path))
    fill_cache(tmp_path)
    (tmp_path / "models--org--tiny-1.5/refs/main").write_text("../../elsewhere")
    with pytest.raises(
        CheckpointError, match=r"expected the name of a snapshot, found '\.\./\.\./elsewhere'"
    ):
        resolve_model("org/tiny-1.5")
