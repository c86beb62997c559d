"""Continues a prompt greedily on the simulated kernel and on the CPU path; exits with 1 if they differ.

python tests/sim/run.py MODEL --prompt "Once upon a time" --tokens 10 --blocks 3 --seed 5
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 2)]  # tests/, the project

from sim.driver import SimDecoder, is_sanitized, sanitized_environment  # noqa: E402

from ffmini.convert import pack_checkpoint  # noqa: E402
from ffmini.cpu import CPUDecoder  # noqa: E402
from ffmini.tokenizer import Tokenizer  # noqa: E402


def continue_greedily(decoder: SimDecoder | CPUDecoder, prompt: list[int], count: int) -> list[int]:
    """The `count` ids that follow `prompt`."""
    ids = list(prompt)
    logits = decoder.forward(np.array(ids), 0)
    for _ in range(count):
        ids.append(int(logits[-1].argmax()))
        logits = decoder.forward(np.array(ids[-1:]), len(ids) - 1)
    return ids[len(prompt) :]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "model", type=Path, help="a Hugging Face directory; small, or it takes minutes a token"
    )
    parser.add_argument("--prompt", default="Once upon a time", help="needs the model's tokenizer.json")
    parser.add_argument("--ids", help="token ids instead of a prompt, such as 3,1,4")
    parser.add_argument("--tokens", type=int, default=10)
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "int8", "int4"))
    parser.add_argument("--rows", type=int, default=8, help="rows of a pass, 1 to 8")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--sanitize", action="store_true", help="AddressSanitizer, UndefinedBehaviorSanitizer"
    )
    args = parser.parse_args()
    if args.sanitize and not is_sanitized():
        return subprocess.run(
            [sys.executable, *sys.argv], env=sanitized_environment(), check=False
        ).returncode
    tokenizer = None if args.ids else Tokenizer(args.model)
    prompt = [int(i) for i in args.ids.split(",")] if args.ids else tokenizer.encode(args.prompt)
    packed = pack_checkpoint(args.model, args.dtype)
    limit = len(prompt) + args.tokens
    sim = SimDecoder(packed, limit, rows=args.rows, blocks=args.blocks, seed=args.seed)
    found = continue_greedily(sim, prompt, args.tokens)
    expected = continue_greedily(CPUDecoder(packed, limit), prompt, args.tokens)
    for name, ids in (("simulated kernel", found), ("CPU path", expected)):
        print(f"{name}: {tokenizer.decode(ids) if tokenizer else ids}")
    return int(found != expected)


if __name__ == "__main__":
    sys.exit(main())
