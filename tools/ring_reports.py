"""The smallest ring of bulk copies, to see what compute-sanitizer says of one (tools/ring_reports.cu).

    export PYTHONPATH=.
    compute-sanitizer --tool racecheck python3 tools/ring_reports.py
    compute-sanitizer --tool synccheck python3 tools/ring_reports.py
    compute-sanitizer --tool racecheck python3 tools/ring_reports.py --with-race

One lane copies random words through two slots; two warps wait for a slot, read it and give it back; the host
knows the sums. Racecheck does not follow the order that an mbarrier makes between a bulk copy and other
threads: the hazards that it reports of this ring are false, and so are reports of the same kinds of the
kernel's ring, which has this form. With --with-race the warps read a slot before they wait for it: a true
hazard, and the sums may be wrong. Needs a GPU with bulk copies.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from ffmini.kernel import has_bulk_copies
from ffmini.launch import import_cupy, why_unusable
from tools.device_code import compile_tool, device_arch, expected_errors, load_tool

THREADS, SLOT_WORDS = 64, 512  # that consume, and of a slot: as in ring_reports.cu
CHUNKS = 64  # slots' worth of words


def compile_ring(arch: str, with_race: bool) -> tuple[bytes, str]:
    """The cubin and ptxas's report."""
    return compile_tool("ring_reports.cu", {"WITH_RACE": str(int(with_race))}, arch)


def expected_sums(words: np.ndarray) -> np.ndarray:
    """What each thread of the ring makes (uint32 [THREADS]) of `words` (uint32 [n * SLOT_WORDS])."""
    weighed = words * (2 * np.arange(words.size, dtype=np.uint32) + 1)
    return weighed.reshape(-1, THREADS).sum(axis=0, dtype=np.uint32)


def run_ring(with_race: bool) -> bool:
    """Runs the ring on GPU 0; whether the sums are right."""
    cupy = import_cupy()
    words = np.random.default_rng(1).integers(0, 2**32, CHUNKS * SLOT_WORDS, np.uint32)
    source, sums = cupy.asarray(words), cupy.zeros(THREADS, cupy.uint32)
    with tempfile.TemporaryDirectory() as directory:
        cubin, _ = compile_ring(device_arch(cupy), with_race)
        module = load_tool(cupy, cubin, Path(directory) / "ring.cubin")
        module.get_function("ring_reports")((1,), (THREADS + 32,), (source, np.int32(CHUNKS), sums))
        return np.array_equal(sums.get(), expected_sums(words))


def why_no_ring() -> str | None:
    """One line that says why GPU 0 can't run it; None if it can."""
    if (reason := why_unusable()) is not None:
        return f"a GPU expected: {reason}"
    arch = device_arch(import_cupy())
    return (
        None if has_bulk_copies(arch) else f"a GPU with bulk copies (sm_90 or newer) expected, found {arch}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="A ring of bulk copies for compute-sanitizer.")
    parser.add_argument("--with-race", action="store_true", help="read a slot before waiting for it")
    args = parser.parse_args()
    if (reason := why_no_ring()) is not None:
        raise SystemExit(f"ring_reports: {reason}")
    try:
        right = run_ring(args.with_race)
    except expected_errors(import_cupy()) as error:
        raise SystemExit(f"ring_reports: {error}") from error
    if not right and not args.with_race:
        raise SystemExit(f"ring_reports: the host's sums of {CHUNKS} slots expected, found others")
    order = "with a race" if args.with_race else "in order"
    print(f"{CHUNKS} slots, {order}: sums {'right' if right else 'wrong'}")


if __name__ == "__main__":
    main()
