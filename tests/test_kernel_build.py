"""The kernel compiles for every architecture without a GPU, and its structs are the host's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ffmini import kernel, results
from ffmini.config import load_config, parse_config
from ffmini.errors import DeviceError
from ffmini.model import bundled_model_path
from ffmini.packing import make_layouts
from ffmini.shapes import SHAPES
from tools.kernel_report import DEVICES, MAX_SEQ_LEN, report

NAMES = [*SHAPES, "bundled"]
FORMATS = ("bf16", "int8", "int4")
MAX_REGISTERS = {256: 255, 384: 168, 512: 128, 640: 96}  # of a thread, by the threads that share 65,536
MAX_SECONDS = 40  # two busy cores take twice what one takes alone


def a_cover() -> list[tuple[str, str, str, str, str]]:
    """Every architecture with a chunk and a pass; every format with every kind; wgmma with all formats.

    Every architecture with int8 keys and values, in a chunk or a pass. What has the fewest registers left.
    """
    wgmma = [("sm_90", "llama-3.1-8b", dtype, "chunk", "bf16") for dtype in ("bf16", "int4")]
    plain = [
        (arch, NAMES[(i + j) % len(NAMES)], FORMATS[(i + j) % 3], kind, "bf16")
        for i, arch in enumerate(DEVICES)
        for j, kind in enumerate(("chunk", ("one", "many")[i % 2]))
    ]
    kinds = ("many", "chunk", "one")
    int8 = [
        (arch, "llama-3.1-8b", FORMATS[i % 2 * 2], kinds[i % 3], "int8") for i, arch in enumerate(DEVICES)
    ]
    full = [
        ("sm_90", "llama-3.1-8b", "int8", "one", "int8"),
        ("sm_90", "llama-3.1-8b", "int4", "many", "int8"),
        ("sm_90", "llama-3.2-1b", "int4", "many", "bf16"),
    ]
    return wgmma + plain + int8 + full


@pytest.mark.parametrize(("arch", "name", "dtype", "kind", "kv_dtype"), a_cover())
def test_compiles_without_spills(arch: str, name: str, dtype: str, kind: str, kv_dtype: str) -> None:
    config = load_config(bundled_model_path()) if name == "bundled" else parse_config(SHAPES[name], name)
    found = report(arch, config, dtype, kind, kv_dtype)
    assert found.spill_bytes == 0
    assert found.registers <= MAX_REGISTERS[found.threads]
    if found.threads == 640 and arch != "sm_120":  # what computing warps take was counted on at the launch
        assert found.registers == MAX_REGISTERS[640]
    assert found.seconds <= MAX_SECONDS
    assert found.shared_bytes <= DEVICES[arch][0] and found.ring_slots >= 1
    if kind == "chunk":
        bound = kernel.chunk_scratch_bound(config, make_layouts(config, dtype), MAX_SEQ_LEN)
        assert found.scratch_bytes <= bound <= 1.5 * found.scratch_bytes


def test_the_bound_for_builds_to_come() -> None:
    """What load() counts for a build of eight rows: eight times one row's packets, and split products."""
    config = parse_config(SHAPES["llama-3.1-8b"], "llama-3.1-8b")
    one, many = (report("sm_90", config, "int4", kind).scratch_bytes for kind in ("one", "many"))
    products = kernel.product_bytes(make_layouts(config, "int4"), 8)
    assert products > 0 and 0.9 * (8 * one + products) <= many <= 8 * one + products


def bundled_defines() -> dict[str, str]:
    config = load_config(bundled_model_path())
    limit, blocks = DEVICES["sm_90"]
    layouts = make_layouts(config, "int4")
    return kernel.kernel_defines(
        config,
        layouts,
        rows=1,
        max_seq_len=512,
        shared_limit=limit,
        blocks=blocks,
        bulk_copies=True,
        in_flight=1,
    )


@pytest.mark.parametrize("name", ["HEAD_DIM", "KV_BITS"])
def test_a_missing_constant_is_an_error(name: str) -> None:
    defines = bundled_defines()
    del defines[name]
    with pytest.raises(DeviceError, match="a -D constant of the model is missing"):
        kernel.compile_cubin(defines, "sm_90")


def struct_checks(structs: dict[str, np.dtype]) -> str:
    """Static assertions that the device's structs have the host's sizes and offsets."""
    lines = []
    for name, dtype in structs.items():
        lines.append(f'static_assert(sizeof({name}) == {dtype.itemsize}, "sizeof {name}");')
        for field in dtype.names:
            offset = dtype.fields[field][1]
            lines.append(f'static_assert(__builtin_offsetof({name}, {field}) == {offset}, "{name}.{field}");')
    return "\n".join(lines)


STRUCTS = {
    "Row": kernel.ROW,
    "Draw": kernel.DRAW,
    "Status": kernel.STATUS,
    "PassArgs": kernel.PASS_ARGS,
    "BuildInfo": kernel.BUILD_INFO,
}


CONSTANTS = (
    "MERGE_RUN",
    "LISTED",
    "MOST_LISTED",
    "MAX_BLOCKS",
    "MAX_ROWS",
    "AWAITED",
    "MAIL_APPEND",
    "MAIL_LEAVE",
    "MAX_ENDS",
    "NO_DRAW",
)


def constant_checks() -> str:
    """Static assertions that the device's constants have the host's values."""
    values = {name: getattr(kernel, name) for name in CONSTANTS} | {"RESULT_PACKETS": results.RESULT_PACKETS}
    return "\n".join(f'static_assert({name} == {value}, "{name}");' for name, value in values.items())


CHUNK_STRUCTS = {"ChunkArgs": kernel.CHUNK_ARGS, "ChunkInfo": kernel.CHUNK_INFO}


def compile_with(checks: str, monkeypatch: pytest.MonkeyPatch, source: str = "ffmini.cu") -> None:
    sources = dict(kernel.device_sources())
    sources[source] += checks
    monkeypatch.setattr(kernel, "device_sources", lambda: tuple(sources.items()))
    kernel.compile_cubin(bundled_defines(), "sm_90", source)


def test_host_and_device_share_their_structs(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_with(struct_checks(STRUCTS) + constant_checks(), monkeypatch)
    compile_with(struct_checks(CHUNK_STRUCTS), monkeypatch, "chunk.cu")


def test_a_struct_that_differs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, *others = kernel.STATUS.names
    swapped = np.dtype([(name, "<u4") for name in (second, first, *others)])
    with pytest.raises(DeviceError, match="static assertion"):
        compile_with(struct_checks(STRUCTS | {"Status": swapped}), monkeypatch)


def test_the_cache_keeps_a_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FFMINI_CACHE_DIR", str(tmp_path / "cache"))
    defines = bundled_defines()
    first = kernel.cached_cubin(defines, "sm_90")
    assert first.parent == tmp_path / "cache" and first.read_bytes()[:4] == b"\x7fELF"
    monkeypatch.setattr(kernel, "compile_cubin", lambda *_: pytest.fail("compiled again"))
    assert kernel.cached_cubin(defines, "sm_90") == first
    with pytest.raises(pytest.fail.Exception, match="compiled again"):
        kernel.cached_cubin(defines | {"ROWS": "2"}, "sm_90")


def test_an_unwritable_cache_gives_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FFMINI_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(kernel, "compile_cubin", lambda *_: (b"\x7fELF", ""))
    for _ in range(2):
        assert kernel.cached_cubin(bundled_defines(), "sm_90").read_bytes() == b"\x7fELF"
    assert capsys.readouterr().err.count("can't be cached") == 1


def test_copies_in_flight_follow_the_memory() -> None:
    """One per ring feeds an H100's 3.35 TB/s on 132 multiprocessors, two an H200's 4.9; never none."""
    layouts = make_layouts(parse_config(SHAPES["llama-3.1-8b"], "shape"), "int4")
    found = [kernel.copies_in_flight(bandwidth, 132, layouts) for bandwidth in (1e9, 3.35e12, 4.92e12)]
    assert found == [1, 1, 2]
