"""Make tests/goldens/sim_*.npz on a GPU: what the blocks tell each other there, to hold the simulator to.

    PYTHONPATH=. python3 tools/sim_golden.py OUT_DIR

Each case of tests/sim_cases.py is one pass over a random cache. Kept are the payload of every packet but the
partial softmaxes, which later layers overwrite; the rows that the pass appended to the cache; the logits.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from packets import PACKET, kept_packets
from sim_cases import (
    GOLDEN_CASES,
    MAX_SEQ_LEN,
    Case,
    case_tokens,
    pack_case,
    packed_digest,
    random_cache,
)

from ffmini.gpu import GPUDecoder
from ffmini.launch import import_cupy
from ffmini.layout import VectorLayout


def run_case(case: Case, directory: Path) -> dict[str, Any]:
    """The arrays of one golden; `directory` takes the case's checkpoint."""
    packed = pack_case(directory, case)
    decoder = GPUDecoder(packed, MAX_SEQ_LEN, rows=(case.rows,), progress=False)
    before = random_cache(decoder.key_cache.shape, case.start, VectorLayout(packed.config.head_dim, "bf16"))
    decoder.key_cache.set(before)
    decoder.value_cache.set(before)
    tokens = case_tokens(packed, case.rows)
    logits = decoder.forward(tokens, case.start, "all")
    exchange = decoder._builds[case.rows].exchange.get().view(PACKET)
    appended = slice(case.start, case.start + case.rows)
    golden = {
        "digest": packed_digest(packed),
        "tokens": tokens.astype(np.int32),
        "words": exchange["words"][: kept_packets(packed.config, case.rows)],
        "keys": decoder.key_cache.get()[:, 0, :, appended],
        "values": decoder.value_cache.get()[:, 0, :, appended],
        "logits": logits,
    }
    decoder.close()
    return golden


def device_name() -> str:
    """The GPU's name and compute capability."""
    properties = import_cupy().cuda.runtime.getDeviceProperties(0)
    return f"{properties['name'].decode()}, sm_{properties['major']}{properties['minor']}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes tests/goldens/sim_*.npz on a GPU.")
    parser.add_argument("out_dir", type=Path)
    out_dir = parser.parse_args().out_dir
    out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, case in GOLDEN_CASES.items():
            golden = run_case(case, Path(scratch) / name)
            path = out_dir / f"sim_{name}.npz"
            np.savez_compressed(path, device=device_name(), **golden)
            print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
