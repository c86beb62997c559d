"""The device code of tools/ compiles without a GPU, and the skeleton takes what is fetched and ends."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from packets import packet_counts
from sim.driver import SimDecoder
from sim_cases import Case, pack_case

from ffmini.config import ModelConfig, parse_config
from ffmini.errors import GenerationError
from ffmini.kernel import has_bulk_copies
from ffmini.launch import why_unusable
from ffmini.packing import PackedModel
from ffmini.resources import resource_dir
from ffmini.shapes import SHAPES
from tools import sanitize
from tools.kernel_report import DEVICES, read_build_info, read_registers, read_spills
from tools.ring_reports import SLOT_WORDS, THREADS, compile_ring, expected_sums
from tools.skeleton import EXCHANGES, Form

ROOT = Path(__file__).parent.parent
CASE = Case("llama2", "int4")
# The packets of an exchange (tests/packets.py) by the stage whose input it is (EXCHANGES).
PACKETS_OF = {
    "norm_qkv": "hidden",
    "attention": "qkv",
    "o_proj": "attention",
    "norm_gate_up": "mid_hidden",
    "down_proj": "activation",
}
TOKEN = np.zeros(1, np.int32)
SEEDS = (*range(4), 28, 56)  # 28: some copies land late, 56: all of them


def form_of(name: str, dtype: str, arch: str, exchanges: int) -> Form:
    return Form(parse_config(SHAPES[name], name), dtype, 128, exchanges, 1, has_bulk_copies(arch))


# ---- builds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "exchanges"), [*zip(SHAPES, ("bf16", "int8", "int4"), (0, 2, 5), strict=True)]
)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_skeleton_has_no_spills(arch: str, name: str, dtype: str, exchanges: int) -> None:
    limit, blocks = DEVICES[arch]
    cubin, log = form_of(name, dtype, arch, exchanges).compile(arch, limit, blocks)
    assert read_spills(log) == 0
    assert read_registers(log) <= 96
    assert read_build_info(cubin, "one")["ring_slots"] >= 2


def test_copies_in_flight_change_the_build() -> None:
    one = form_of("llama-3.1-8b", "int4", "sm_90", 5)
    four = dataclasses.replace(one, in_flight=4)
    assert one.compile("sm_90", *DEVICES["sm_90"])[0] != four.compile("sm_90", *DEVICES["sm_90"])[0]


def test_bytes_of_a_pass() -> None:
    weights = 6_979_321_856 + 525_336_576  # of 32 layers and of the lm_head
    form = dataclasses.replace(form_of("llama-3.1-8b", "bf16", "sm_90", 5), position=0)
    assert form.pass_bytes() == 2 * weights
    assert dataclasses.replace(form, position=3).pass_bytes() - 2 * weights == 3 * 32 * 2 * 2 * 8 * 128


@pytest.mark.parametrize("with_race", [False, True])
def test_the_ring_has_no_spills(with_race: bool) -> None:
    assert read_spills(compile_ring("sm_90", with_race)[1]) == 0


def test_sums_of_the_ring() -> None:
    words = np.random.default_rng(0).integers(0, 2**32, 2 * SLOT_WORDS, np.uint32)
    found = [0] * THREADS
    for i, word in enumerate(words.tolist()):
        found[i % THREADS] = (found[i % THREADS] + word * (2 * i + 1)) % 2**32
    assert expected_sums(words).tolist() == found


@pytest.mark.parametrize(
    "command",
    [
        ("skeleton.py", "qwen3-0.6b", "int4"),
        ("memory.py", "qwen3-0.6b", "int4"),
        ("ring_reports.py",),
    ],
)
def test_without_a_gpu_one_line_says_so(command: tuple[str, ...]) -> None:
    if why_unusable() is None:
        pytest.skip("there is a GPU")
    arguments = [sys.executable, str(ROOT / "tools" / command[0]), *command[1:]]
    result = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": "."})
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and "a GPU expected" in result.stderr


def test_clang_format() -> None:
    command = [str(Path(sys.executable).parent / "clang-format"), "--dry-run", "-Werror"]
    files = [str(path) for path in sorted((ROOT / "tools").glob("*.cu"))]
    result = subprocess.run([*command, *files], capture_output=True, text=True)
    assert files and result.returncode == 0, result.stderr[:2000]


# ---- the skeleton on the simulated device --------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    return pack_case(tmp_path_factory.mktemp("checkpoint") / "model", CASE)


@pytest.fixture
def simulate(packed: PackedModel, tmp_path: Path) -> Callable[[int, bool], SimDecoder]:
    """A decoder of (exchanges, bulk copies) whose kernel is the skeleton."""
    cuda = tmp_path / "cuda"
    shutil.copytree(resource_dir("cuda"), cuda)

    def decoder(exchanges: int, bulk_copies: bool) -> SimDecoder:
        text = (ROOT / "tools" / "skeleton.cu").read_text(encoding="utf-8")
        text = text.replace("skeleton_pass", "ffmini_pass")
        (cuda / "ffmini.cu").write_text(f"#define EXCHANGES {exchanges}\n{text}", encoding="utf-8")
        return SimDecoder(packed, 300, rows=1, bulk_copies=bulk_copies, cuda=cuda)

    return decoder


def wanted_packets(config: ModelConfig, exchanges: int) -> int:
    """How many a pass sends: those of every layer, and the residual stream that leaves the last one."""
    counts = packet_counts(config)
    layer = sum(counts[PACKETS_OF[stage]] for stage in EXCHANGES[:exchanges])
    return config.num_layers * layer + (counts["hidden"] if exchanges else 0)


def fill_with_ones(decoder: SimDecoder) -> None:
    """Every word of the layers' matrices is 1.0f, of keys and values 1000.0f."""
    decoder._layers.view(np.float32)[...] = 1.0
    for cache in (decoder.key_cache, decoder.value_cache):
        cache.view(np.float32)[...] = 1000.0


def check_payload(decoder: SimDecoder) -> None:
    """A packet holds the sum of what a lane has read: that many whole slots, of the stage and no other."""
    at = 0
    for _ in range(decoder.config.num_layers):
        for name, count in packet_counts(decoder.config).items():
            sums = decoder.exchange["words"][at : at + count, 0].view(np.float32)
            unit, most = (1000, 1e6) if name == "attention" else (1, 999)
            assert np.all((sums % unit == 0) & (sums >= 0) & (sums <= most)), name
            at += count


@pytest.mark.parametrize("bulk_copies", [False, True])
@pytest.mark.parametrize("exchanges", range(len(EXCHANGES) + 1))
def test_the_skeleton_ends(
    simulate: Callable[[int, bool], SimDecoder], exchanges: int, bulk_copies: bool
) -> None:
    """Under every schedule: a slot too many or too few, or a packet that nobody sends, is a deadlock."""
    decoder = simulate(exchanges, bulk_copies)
    fill_with_ones(decoder)
    cases = itertools.product((1, 5), SEEDS, (0, 17, 280))
    for number, (decoder.blocks, decoder.seed, start) in enumerate(cases, 1):
        decoder.forward(TOKEN, start)
        tags = decoder.exchange["tag"] // (decoder.config.num_layers + 1)
        assert np.sum(tags == number) == wanted_packets(decoder.config, exchanges)
        check_payload(decoder)


@pytest.mark.parametrize("bulk_copies", [False, True])
def test_the_skeleton_gives_up(simulate: Callable[[int, bool], SimDecoder], bulk_copies: bool) -> None:
    """Where a packet never comes, all blocks leave; the next pass is right again."""
    decoder = simulate(len(EXCHANGES), bulk_copies)
    decoder.forward(TOKEN, 17)
    decoder.give_up, decoder.lost_packet = True, 0
    with pytest.raises(GenerationError, match="gave up"):
        decoder.forward(TOKEN, 17)
    decoder.give_up, decoder.lost_packet = False, None
    decoder.forward(TOKEN, 17)


# ---- the sanitizers ------------------------------------------------------------------------------------


def test_sanitizers_are_run_and_what_is_not_clean_is_named(tmp_path, monkeypatch, capsys):
    program = tmp_path / sanitize.PROGRAM
    program.write_text('#!/bin/sh\necho "$@"\n[ "$2" != synccheck ] || exit 9\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(sanitize, "why_unusable", lambda: "none here")
    with pytest.raises(SystemExit, match="a GPU expected: none here"):
        sanitize.main([])
    monkeypatch.setattr(sanitize, "why_unusable", lambda: None)
    logs = tmp_path / "logs"
    assert sanitize.main(["--logs", str(logs), "--jobs", "2"]) == 1
    said = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert set(said) == {str(run) for run in sanitize.RUNS}
    for run in sanitize.RUNS:
        log = logs / f"{run.tool}-{run.dtype}-{run.ring}-{run.rows}.txt"
        assert said[str(run)] == (f"exit status 9, see {log}" if run.tool == "synccheck" else "clean")
        assert log.read_text().endswith(f"--passes {run.dtype} {run.ring} {run.rows}\n")
    program.write_text("#!/bin/sh\n")
    assert sanitize.main(["--logs", str(logs)]) == 0


def test_sanitizers_that_are_missing_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="compute-sanitizer expected on PATH, found none"):
        sanitize.main([])
