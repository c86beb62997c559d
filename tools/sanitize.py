"""What compute-sanitizer says of passes: two layers of llama-3.1-8b with candidates, on both rings.

A line for each run, its whole output in a file; the exit status is 1 if one is not clean. Needs a GPU and
compute-sanitizer. racecheck does not know of bulk copies (see tools/ring_reports.py) and gets the other ring.

python tools/sanitize.py --logs /tmp/sanitizers
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ffmini.bench import fill_cache, random_model
from ffmini.candidates import Draw, Query
from ffmini.config import parse_config
from ffmini.gpu import GPUDecoder, why_unusable
from ffmini.passes import Work
from ffmini.shapes import SHAPES

PROGRAM = "compute-sanitizer"
POSITION = 128  # of the first row; the cache before it is filled
FOUND = 9  # the exit status of a tool that has found something


class Run(NamedTuple):
    """A tool, and the build that it looks at."""

    tool: str
    dtype: str
    ring: str  # "bulk" or "copy"
    rows: int

    def __str__(self) -> str:
        return f"{self.tool} {self.dtype} {self.ring} {self.rows}"


BUILDS = (("int4", 1), ("bf16", 1), ("int4", 8))
RINGS = {
    "memcheck": ("bulk", "copy"),
    "initcheck": ("bulk",),
    "synccheck": ("bulk", "copy"),
    "racecheck": ("copy",),
}
RUNS = [
    Run(tool, dtype, ring, rows) for dtype, rows in BUILDS for tool, rings in RINGS.items() for ring in rings
]


def make_passes(dtype: str, ring: str, rows: int) -> None:
    """Two passes of `rows` rows, the last of which is asked for candidates and two other logits.

    And two more, the second of which has the token that the first one draws.
    """
    config = parse_config(SHAPES["llama-3.1-8b"] | {"vocab_size": 2048}, "llama-3.1-8b").first_layers(2)
    packed, bulk = random_model(config, dtype), ring == "bulk"
    options = {"rows": (rows,), "bulk_copies": bulk, "progress": False, "chunks": False}
    with closing(GPUDecoder(packed, POSITION + rows + 2, **options)) as decoder:
        fill_cache(decoder, POSITION)
        query = Query(np.array([3, 9], np.int32), np.float32(1.25))
        for _ in range(2):
            decoder.begin([Work(0, np.arange(rows) + 5, POSITION, (query,))])
            ((found,),) = decoder.candidates()
            print("candidates", *found.ids[:3], "logits", *found.logits[:3], flush=True)
        plain, draw = query._replace(token_ids=query.token_ids[:0]), Draw(0.0, 0.9, 0.01, 20, (0,))
        work = Work(0, np.arange(rows) + 5, POSITION, (plain,))
        for _ in range(2):
            decoder.begin([work], ahead=True, draws=(draw, draw))
            ((found,),) = decoder.candidates()
            print("drawn", *found.ids[:1], flush=True)
            work = Work(0, found.ids[:1], work.start + len(work.tokens), (plain,))


def check(run: Run, logs: Path) -> bool:
    """Whether a run is clean; says so in a line. Its output goes to a file in `logs`."""
    log = logs / f"{str(run).replace(' ', '-')}.txt"
    command = [PROGRAM, "--tool", run.tool, "--error-exitcode", str(FOUND), sys.executable, __file__]
    command += ["--passes", run.dtype, run.ring, str(run.rows)]
    environment = os.environ | {"FFMINI_SPIN_SECONDS": "100"}  # a pass takes a hundred times as long
    with log.open("w") as output:
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment).returncode
    print(f"{run}: {'clean' if status == 0 else f'exit status {status}, see {log}'}", flush=True)
    return status == 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run compute-sanitizer's tools on passes.")
    parser.add_argument("--logs", type=Path, default=Path("sanitizers"), help="directory (sanitizers)")
    parser.add_argument("--jobs", type=int, default=6, help="runs at a time (6)")
    parser.add_argument("--passes", nargs=3, metavar=("DTYPE", "RING", "ROWS"), help="no tool, passes alone")
    args = parser.parse_args(argv)
    if args.passes:
        make_passes(args.passes[0], args.passes[1], int(args.passes[2]))
        return 0
    if shutil.which(PROGRAM) is None:
        raise SystemExit(f"sanitize: {PROGRAM} expected on PATH, found none")
    if (reason := why_unusable()) is not None:
        raise SystemExit(f"sanitize: a GPU expected: {reason}")
    args.logs.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        return 0 if all([*pool.map(lambda run: check(run, args.logs), RUNS)]) else 1


if __name__ == "__main__":
    sys.exit(main())
