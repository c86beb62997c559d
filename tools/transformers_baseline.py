"""Time what a user would pick instead: transformers on a shape with random bf16 weights, eager and compiled.

    python3 tools/transformers_baseline.py --passes 200 --prompts 512 < config.json

`ffmini bench --compare` runs it and makes records of what it prints: per test and engine, as soon as it is
measured, a JSON line with "test", "engine", "versions" and "seconds", those that each repetition took for all
its passes. A pass is one token at batch 1 with a static cache, from token id to logits, as `ffmini bench`
times its own; the host waits for the GPU once per repetition. A prompt goes through eager, in one call that
makes the last token's logits. Needs torch and transformers; a failure is one line on stderr.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter, sleep
from typing import Any

try:
    import torch
    import transformers
except ImportError as error:
    raise SystemExit(f"{error}: pip install torch transformers") from None

CACHE_STEP = 512  # the static cache's length is a multiple: all of it takes part in every pass
ENGINES = ("transformers", "transformers compiled")


class Baseline:
    """A model with random weights, its static cache, and the passes of one repetition."""

    def __init__(
        self, raw: dict[str, Any], device: str, depth: int, passes: int, prompts: Sequence[int]
    ) -> None:
        """`raw`: a config.json. The passes, and prompts of so many tokens, begin at position `depth`."""
        raw = dict(raw)
        config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
        length = -(-(depth + max(passes, *prompts, 1)) // CACHE_STEP) * CACHE_STEP
        torch.manual_seed(1)
        with torch.device(device):
            self.model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
            self._cache = transformers.StaticCache(config=config, max_cache_len=length)
            self._prompt = torch.randint(config.vocab_size, (1, depth))
            # Tensors of their own: parts of one would differ in alignment, which compiled code cares about.
            self._tokens = [torch.randint(config.vocab_size, (1, 1)) for _ in range(passes)]
            self._positions = [torch.tensor([depth + i]) for i in range(passes)]
            self._prompts = {n: torch.randint(config.vocab_size, (1, n)) for n in prompts}
        self._parameters = inspect.signature(self.model.forward).parameters

    def seconds(self, forward: Callable[..., Any]) -> float:
        """Time all passes by `forward`, the model's own or a compiled one."""
        self._fill()
        began = perf_counter()
        for token, position in zip(self._tokens, self._positions, strict=True):
            torch.compiler.cudagraph_mark_step_begin()
            self._run(forward, token, position)
        self._wait()
        return perf_counter() - began

    def prompt_seconds(self, tokens: int) -> float:
        """Time a prompt of so many tokens by the model's own forward."""
        self._fill()
        first = self._prompt.numel()
        positions = torch.arange(first, first + tokens, device=self._prompt.device)
        began = perf_counter()
        self._run(self.model.forward, self._prompts[tokens], positions)
        self._wait()
        return perf_counter() - began

    def _fill(self) -> None:
        """Have the cache hold what comes before the passes."""
        self._cache.reset()
        if self._prompt.numel():
            positions = torch.arange(self._prompt.numel(), device=self._prompt.device)
            self._run(self.model.forward, self._prompt, positions)
        self._wait()

    def _run(self, forward: Callable[..., Any], tokens: torch.Tensor, positions: torch.Tensor) -> None:
        """One pass over `tokens` [1, n] at `positions` [n]; releases of transformers name arguments apart."""
        arguments = {"cache" if "cache" in self._parameters else "past_key_values": self._cache}
        if "cache_position" in self._parameters:
            arguments["cache_position"] = positions
        if "logits_to_keep" in self._parameters:
            arguments["logits_to_keep"] = 1
        forward(input_ids=tokens, position_ids=positions[None], use_cache=True, **arguments)

    def _wait(self) -> None:
        if self._prompt.is_cuda:
            torch.cuda.synchronize(self._prompt.device)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time transformers on the config.json on stdin.")
    parser.add_argument("--device", default="cuda", help="as PyTorch calls it (cuda)")
    parser.add_argument("--depth", type=int, default=0, help="positions in the cache before the passes (0)")
    parser.add_argument("--passes", type=int, default=200, help="of a repetition (200)")
    parser.add_argument("--prompts", type=int, nargs="*", default=[], help="tokens of prompts, timed as well")
    parser.add_argument("--repetitions", type=int, default=5, help="after one that does not count (5)")
    text = "seconds after each, at most: as long as it took (0)"
    parser.add_argument("--rest", type=float, default=0.0, help=text)
    args = parser.parse_args()
    raw, results = json.load(sys.stdin), sys.stdout
    sys.stdout = sys.stderr  # whatever the libraries print
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    engine = ENGINES[0]
    try:
        with torch.no_grad():
            baseline = Baseline(raw, args.device, args.depth, args.passes, args.prompts)
            forward = baseline.model.forward
            compiled = torch.compile(forward, mode="reduce-overhead", fullgraph=True)
            tests: list[tuple[str, str, Callable[[], float]]] = [
                (f"pp{n}", ENGINES[0], partial(baseline.prompt_seconds, n)) for n in args.prompts
            ]
            tests += [
                (f"tg{args.passes}", name, partial(baseline.seconds, run))
                for name, run in zip(ENGINES, (forward, compiled), strict=True)
            ]
            for test, engine, time in tests:
                seconds: list[float] = []
                for _ in range(args.repetitions + 1):
                    seconds.append(time())
                    sleep(min(args.rest, seconds[-1]))
                found = {"test": test, "engine": engine, "versions": versions, "seconds": seconds[1:]}
                print(json.dumps(found), file=results, flush=True)
    except Exception as error:  # of two large libraries: of any type, and of many lines
        reason = str(error).strip().partition("\n")[0]
        raise SystemExit(f"{engine}: {type(error).__name__}: {reason}") from None


if __name__ == "__main__":
    main()
