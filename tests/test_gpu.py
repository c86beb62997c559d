"""The kernel on a real GPU against the CPU path; `pytest -m gpu`. Skipped only where there is no device."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comparison import (
    ask,
    check_candidates,
    check_logits,
    check_stages,
    error,
    flat,
    query,
    share_cache,
    values_of,
)
from packets import PACKET, stages
from tiny import FAMILIES, tiny_config, tiny_prompt, write_checkpoint

from ffmini import gpu
from ffmini.bench import fill_cache, random_model
from ffmini.config import parse_config
from ffmini.convert import pack_checkpoint
from ffmini.cpu import CPUDecoder
from ffmini.errors import DeviceError, GenerationError
from ffmini.layout import KV_DTYPES
from ffmini.model import bundled_model_path
from ffmini.options import GenerationOptions
from ffmini.packing import PackedModel
from ffmini.passes import Work
from ffmini.sampler import Sampler
from ffmini.shapes import SHAPES
from ffmini.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(gpu.why_unusable() is not None, reason=f"no device: {gpu.why_unusable()}"),
]

ROOT = Path(__file__).parent.parent
TALE = ROOT / "tests" / "tale.txt"
FORMATS = ("bf16", "int8", "int4")
# Sizes that are multiples of no tile, all head sizes, GQA ratios up to 16; small otherwise.
AWKWARD: dict[str, dict[str, Any]] = {
    "head_dim_8": {"head_dim": 8, "num_attention_heads": 6, "num_key_value_heads": 3},
    "head_dim_16_gqa16": {"head_dim": 16, "num_attention_heads": 16, "num_key_value_heads": 1},
    "head_dim_64_gqa7": {"head_dim": 64, "num_attention_heads": 7, "num_key_value_heads": 1},
    "head_dim_80": {"head_dim": 80, "num_attention_heads": 4, "num_key_value_heads": 2},
    "head_dim_96_gqa12": {"head_dim": 96, "num_attention_heads": 12, "num_key_value_heads": 1},
    # Parts of o_proj's input end within a head.
    "head_dim_80_parts": {"head_dim": 80, "num_attention_heads": 56, "num_key_value_heads": 7},
    "head_dim_128": {"head_dim": 128, "hidden_size": 576, "intermediate_size": 1540},
    "head_dim_256": {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1},
    "vocab_32003": {"vocab_size": 32003, "hidden_size": 200, "head_dim": 48, "tie_word_embeddings": True},
    "wide": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}


def pack(directory: Path, family: str, dtype: str, group_size: int = 128, **changes: Any) -> PackedModel:
    source = write_checkpoint(directory / f"{family}-{dtype}-{group_size}", tiny_config(family, **changes))
    return pack_checkpoint(source, dtype, group_size, progress=False)


def poison(decoder: gpu.GPUDecoder) -> None:
    """Every output that the next pass must write holds NaN; stale packets keep their old tags."""
    for logits in decoder._logits:
        logits.fill(np.nan)


def check_last_pass(
    decoder: gpu.GPUDecoder, rows: int, oracle: CPUDecoder, tokens: np.ndarray, start: int
) -> None:
    """Each stage of the last pass, which took `tokens` at position `start`, against the CPU path."""
    exchange = decoder._builds[rows].exchange.get().view(PACKET)
    # What no pass has written is not read here either: initcheck watches.
    caches = [
        cache[:, 0, :, :start].get()
        if start
        else np.zeros((*cache.shape[:1], *cache.shape[2:3], 0, cache.shape[-1]), cache.dtype)
        for cache in (decoder.key_cache, decoder.value_cache)
    ]
    share_cache(oracle, *caches, start)
    check_stages(stages(exchange, decoder.config, rows, len(tokens)), oracle, tokens, start)


def check_model(packed: PackedModel, length: int = 70, tail: int = 6, kv_dtype: str = "bf16") -> None:
    """Whole model and every stage: a prompt in passes of many rows, then token by token."""
    prompt = tiny_prompt({"vocab_size": packed.config.vocab_size}, length + tail)
    oracle = CPUDecoder(packed, length + tail, kv_dtype=kv_dtype, progress=False)
    exact = CPUDecoder(packed, length + tail, precision="float64", progress=False)
    reference = exact.forward(prompt, 0, "all")
    own_error = error(oracle.forward(prompt, 0, "all"), reference)
    decoder = gpu.GPUDecoder(packed, length + tail, kv_dtype=kv_dtype, chunks=False, progress=False)
    most = decoder.max_rows
    poison(decoder)
    logits = [decoder.forward(prompt[:length], 0, "all")]
    last = length - (length - 1) // most * most
    check_last_pass(decoder, 1 if last == 1 else most, oracle, prompt[length - last : length], length - last)
    for i in range(length, length + tail):
        poison(decoder)
        logits.append(decoder.forward(prompt[i : i + 1], i))
    check_last_pass(decoder, 1, oracle, prompt[-1:], length + tail - 1)
    found = np.concatenate(logits)
    decoder.close()
    check_logits(error(found, reference), own_error)
    worst = np.abs(found - reference).max(axis=1)
    top = np.sort(reference, axis=1)[:, -2:]
    clear = top[:, 1] - top[:, 0] > 4 * worst
    assert (found.argmax(axis=1) == reference.argmax(axis=1))[clear].all()


@pytest.mark.parametrize(("family", "dtype"), list(itertools.product(FAMILIES, FORMATS)))
def test_family(tmp_path: Path, family: str, dtype: str) -> None:
    positions = tiny_config(family)["max_position_embeddings"]
    check_model(pack(tmp_path, family, dtype), length=min(70, positions - 6))


@pytest.mark.parametrize(("shape", "dtype"), list(itertools.product(AWKWARD, FORMATS)))
def test_awkward_sizes(tmp_path: Path, shape: str, dtype: str) -> None:
    check_model(pack(tmp_path, "llama2", dtype, **AWKWARD[shape]), length=20)


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_group_sizes(tmp_path: Path, dtype: str, group_size: int) -> None:
    check_model(pack(tmp_path, "qwen3", dtype, group_size), length=20)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("shape", AWKWARD)
def test_int8_keys_and_values(tmp_path: Path, shape: str, dtype: str) -> None:
    check_model(pack(tmp_path, "qwen3", dtype, **AWKWARD[shape]), length=20, kv_dtype="int8")


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("family", ["llama3.1", "mistral"])
def test_long_context(tmp_path: Path, family: str, kv_dtype: str) -> None:
    changes = {"max_position_embeddings": 4096, "sliding_window": 600 if family == "mistral" else None}
    check_model(pack(tmp_path, family, "bf16", **changes), length=1100, kv_dtype=kv_dtype)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("family", ["llama3.1", "mistral"])
def test_deep_context(tmp_path: Path, family: str, kv_dtype: str) -> None:
    """36 blocks of positions, or the 20 of a window: partial softmaxes merged in several runs."""
    changes = {"max_position_embeddings": 10_000, "sliding_window": 5000 if family == "mistral" else None}
    packed = pack(tmp_path, family, "bf16", **changes)
    oracle = CPUDecoder(packed, 9300, kv_dtype=kv_dtype, progress=False)
    decoder = gpu.GPUDecoder(packed, 9300, rows=(4,), kv_dtype=kv_dtype, progress=False)
    poison(decoder)
    fill_cache(decoder, 9214)
    tokens = tiny_prompt({"vocab_size": packed.config.vocab_size}, 4)
    decoder.forward(tokens, 9214, "all")
    check_last_pass(decoder, 4, oracle, tokens, 9214)
    decoder.close()


@pytest.mark.parametrize("dtype", FORMATS)
def test_bundled_model(dtype: str) -> None:
    """200 teacher-forced tokens of a tale, under DESIGN's rule for ties."""
    packed = pack_checkpoint(bundled_model_path(), dtype, progress=False)
    tokens = np.array(Tokenizer(packed.directory).encode(TALE.read_text())[:201])
    oracle = CPUDecoder(packed, 256, progress=False)
    exact = CPUDecoder(packed, 256, precision="float64", progress=False)
    decoder = gpu.GPUDecoder(packed, 256, progress=False)
    found = np.concatenate([decoder.forward(tokens[i : i + 1], i) for i in range(200)])
    decoder.close()
    reference, expected = (path.forward(tokens[:200], 0, "all") for path in (exact, oracle))
    check_logits(error(found, reference), error(expected, reference))
    top = np.sort(expected, axis=1)[:, -2:]
    clear = top[:, 1] - top[:, 0] > 4 * np.abs(found - expected).max(axis=1)
    assert clear.mean() > 0.8  # the rule must bite: most choices are clear ones
    assert (found.argmax(axis=1) == expected.argmax(axis=1))[clear].all()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("dtype", FORMATS)
def test_same_bits(tmp_path: Path, dtype: str, kv_dtype: str) -> None:
    """However the rows are grouped, however many blocks there are, with either ring, and from run to run."""
    packed = pack(tmp_path, "qwen2", dtype)
    prompt = tiny_prompt({"vocab_size": packed.config.vocab_size}, 300)
    expected = None
    for blocks, rows, chunk, bulk_copies in [
        (None, (8,), 300, None),
        (None, (1,), 300, None),
        (None, (1,), 300, False),
        (3, (4,), 300, None),
        (1, (8,), 3, False),
        (70, (2,), 5, None),
    ]:
        options = {"bulk_copies": bulk_copies, "kv_dtype": kv_dtype}
        decoder = gpu.GPUDecoder(packed, 300, blocks=blocks, rows=rows, progress=False, **options)
        for _ in range(2):
            poison(decoder)
            parts = [decoder.forward(prompt[i : i + chunk], i, "all") for i in range(0, 300, chunk)]
            found = np.concatenate(parts)
            expected = found if expected is None else expected
            assert np.array_equal(found.view(np.uint32), expected.view(np.uint32)), (blocks, rows, chunk)
        decoder.close()


def test_many_passes_give_the_same_bits() -> None:
    """A pass of a wide model, over and over: an error that moves is a race."""
    config = parse_config(SHAPES["llama-3.1-8b"] | {"num_hidden_layers": 3, "vocab_size": 4096}, "wide")
    packed = random_model(config, "int4")
    decoder = gpu.GPUDecoder(packed, 129, rows=(1,), progress=False)
    fill_cache(decoder, 128)
    expected = decoder.forward(np.array([5]), 128)
    for i in range(500):
        found = decoder.forward(np.array([5]), 128)
        assert np.array_equal(found.view(np.uint32), expected.view(np.uint32)), i
    decoder.close()


def test_many_passes_with_pauses(tmp_path: Path) -> None:
    """200,000 passes whose packets are held back at random, across the wrap of the pass number."""
    packed = pack(tmp_path, "llama2", "int4", num_hidden_layers=1, vocab_size=64)
    decoder = gpu.GPUDecoder(packed, 300, rows=(1,), test_pauses=True, progress=False)
    decoder._pass = (2**32 - 2) // 2 - 1000
    prompt = tiny_prompt({"vocab_size": 64}, 4)
    expected = [decoder.forward(prompt[i : i + 1], i) for i in range(4)]
    for i in range(200_000 // 4):
        for position in range(4):
            decoder.launch(1, prompt[position : position + 1], position, 1)
        if i % 100 == 0:
            assert np.array_equal(decoder.finish(1), expected[3]), i
    decoder.finish(1)
    assert decoder._pass < 200_000
    decoder.close()


def test_a_hopeless_wait_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FFMINI_SPIN_SECONDS", "0.2")
    packed = pack(tmp_path, "llama2", "bf16")
    decoder = gpu.GPUDecoder(packed, 64, rows=(8,), progress=False)
    prompt = tiny_prompt({"vocab_size": packed.config.vocab_size}, 8)
    expected = decoder.forward(prompt, 0)
    # Two rows of one slot with a gap between them break the contract: the K and V of the gap never come.
    decoder._args["rows"]["position"][:2] = 0, 5
    args = decoder._args.copy()
    args["pass"], args["num_rows"], args["logits_rows"] = decoder._next_pass(), 2, 0
    decoder._builds[8].launch(gpu.import_cupy(), np.array([args.ctypes.data], np.uint64))
    decoder.launch(8, prompt, 0, 0)  # a good pass behind it hides nothing
    # Blocks without a tile wait in a later layer, as long.
    with pytest.raises(GenerationError, match=r"gave up after 0\.2 s: layer \d, "):
        decoder.finish(0)
    assert np.array_equal(decoder.forward(prompt, 0), expected)
    decoder.close()


# ---- candidates and passes ahead of their token --------------------------------------------------------


@pytest.mark.parametrize("shape", ["vocab_32003", "head_dim_80"])
@pytest.mark.parametrize("dtype", FORMATS)
def test_candidates(tmp_path: Path, shape: str, dtype: str) -> None:
    """What the host gets is what NumPy makes of the same pass's logits, whatever the grid and the rows."""
    packed = pack(tmp_path, "llama2", dtype, **AWKWARD[shape])
    vocab = packed.config.vocab_size
    prompt = tiny_prompt({"vocab_size": vocab}, 20)
    for blocks, rows in [(None, None), (3, (4,)), (1, (1,))]:
        decoder = gpu.GPUDecoder(packed, 32, blocks=blocks, rows=rows, progress=False)
        for length, temperature, count in [(20, 1.0, 0), (1, 0.3, 7), (3, 2.0, 1024)]:
            tokens, logits = prompt[:length], decoder.forward(prompt[:length], 0)[0]
            ids = logits.argsort()[-min(count, vocab) :] if count else np.zeros(0, int)
            asked = query(ids, temperature)
            found = [ask(decoder, tokens, 0, asked) for _ in range(2)]
            check_candidates(found[1], logits, ids, temperature)
            repeated = [found[1].total, *found[1].ids], [found[0].total, *found[0].ids]
            assert repeated[0] == repeated[1]
        decoder.close()


def test_a_whole_vocabulary_queried(tmp_path: Path) -> None:
    packed = pack(tmp_path, "llama2", "bf16", vocab_size=64)
    decoder = gpu.GPUDecoder(packed, 32, progress=False)
    for ids in (np.arange(64), np.arange(5, 64)):  # no others; all of them listed
        found = ask(decoder, np.array([1, 2]), 0, query(ids))
        assert found.complete
        check_candidates(found, found.fetch(), ids, 1.0)
    decoder.close()


def run_greedily(
    decoder: gpu.GPUDecoder, count: int, ahead: bool, pause: float = 0.0, ids: list[int] | None = None
) -> list[np.ndarray]:
    """All that `count` passes say, each of the token that came first in the one before and is queried now.

    `ids`: an empty list, which gets those that were queried.
    """
    ids = [] if ids is None else ids
    token, results = 1, []
    for position in range(count):
        if token not in ids:
            ids.append(token)
        found = ask(decoder, np.array([token]), position, query(ids, 0.8), ahead=ahead)
        results.append(flat(found))
        token = int(found.ids[0])
        time.sleep(pause)
    return results


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x.view(np.uint32), y.view(np.uint32)) for x, y in zip(a, b, strict=True))


def test_passes_ahead_say_the_same(tmp_path: Path) -> None:
    """The same bits as passes that were launched with their token; with a slow host too, and in any grid."""
    packed = pack(tmp_path, "qwen2", "int8", max_position_embeddings=128)
    decoder = gpu.GPUDecoder(packed, 128, progress=False)
    expected = run_greedily(decoder, 128, ahead=False)
    launched, limit = decoder._pass, int(decoder._args["token_limit_ns"])
    decoder._args["token_limit_ns"] = 10**10
    assert same(run_greedily(decoder, 128, ahead=True), expected)
    assert decoder._pass == launched + 128  # each but the first had been launched when its token came
    decoder._args["token_limit_ns"] = limit
    assert same(run_greedily(decoder, 8, ahead=True, pause=0.1), expected[:8])
    assert same(run_greedily(decoder, 8, ahead=True, pause=gpu.TOKEN_SECONDS), expected[:8])
    decoder.close()
    for bulk_copies, blocks in ((False, None), (None, 3)):
        decoder = gpu.GPUDecoder(
            packed, 128, rows=(8,), blocks=blocks, bulk_copies=bulk_copies, progress=False
        )
        found = run_greedily(decoder, 30, ahead=True)
        decoder.close()
        assert all(
            same([x[: packed.config.vocab_size]], [y[: packed.config.vocab_size]])
            for x, y in zip(found, expected, strict=False)
        )


SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top_k and top_p": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
    "top_p": {"temperature": 0.05, "top_p": 0.9},
    "min_p, and all logits for logprobs": {"temperature": 0.1, "min_p": 0.2, "logprobs": 2},
}


def run_sampled(decoder: gpu.GPUDecoder, count: int, draws: bool, pause: float, **options: Any) -> list[Any]:
    """What the sampler makes of `count` passes ahead; with `draws` the device draws their tokens too."""
    sampler = Sampler(
        GenerationOptions(seed=5, **options), np.ones(1, np.int64), (), decoder.config.vocab_size
    )
    token, found = 1, []
    for position in range(count):
        work = Work(0, np.array([token]), position, (sampler.query(),))
        decoder.begin([work], ahead=True, draws=sampler.draws() if draws else None)
        time.sleep(pause)
        [[said]] = decoder.candidates()
        if decoder._waiting is not None:
            assert (decoder._waiting.drawn is not None) == draws
        token, logprobs = sampler.sample(said)
        decoder.deliver(token, sampler.query())
        found.append((token, logprobs))
    decoder.settle()
    return found


@pytest.mark.parametrize("name", SAMPLINGS)
def test_drawn_tokens(tmp_path: Path, name: str) -> None:
    """The text is that of tokens that the host sends, with a slow host too and in any build and grid."""
    packed = pack(tmp_path, "llama2", "int8", vocab_size=32003)
    options = SAMPLINGS[name]
    for build in ({}, {"rows": (8,), "blocks": 40, "bulk_copies": False}):
        decoder = gpu.GPUDecoder(packed, 128, progress=False, **build)
        expected = run_sampled(decoder, 128, False, 0.0, **options)
        for pause in (0.0, 0.005):
            before = decoder._pass
            assert run_sampled(decoder, 128, True, pause, **options) == expected
            assert decoder._pass == before + 128  # none was in vain
        decoder.close()


def test_many_drawn_tokens(tmp_path: Path) -> None:
    """20,000 tokens, across the wrap of the pass number, with a host that is late at times."""
    packed = pack(tmp_path, "llama2", "int4", num_hidden_layers=1, vocab_size=96)
    decoder = gpu.GPUDecoder(packed, 64, rows=(1,), test_pauses=True, progress=False)
    expected = run_sampled(decoder, 64, False, 0.0, temperature=0.8, top_k=4)
    decoder._pass = decoder._checked = (2**32 - 2) // 2 - 5000
    for i in range(20_000 // 64):
        pause = 0.0002 if i % 8 == 0 else 0.0
        assert run_sampled(decoder, 64, True, pause, temperature=0.8, top_k=4) == expected, i
    assert decoder._pass < 100_000
    decoder.close()


def test_another_thread(tmp_path: Path) -> None:
    """One that has not used CUDA yet gets the same bits."""
    packed = pack(tmp_path, "llama2", "bf16")
    decoder = gpu.GPUDecoder(packed, 64, progress=False)
    expected, found = run_greedily(decoder, 12, ahead=True), []

    def run() -> None:
        found.append(run_greedily(decoder, 12, ahead=True))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(found) == 1 and same(found[0], expected)
    decoder.close()


def test_a_generation_that_is_abandoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted anywhere, with a pass waiting: whatever comes next works, as do close() and settle()."""
    packed = pack(tmp_path, "llama2", "bf16")
    decoder = gpu.GPUDecoder(packed, 64, progress=False)
    expected = run_greedily(decoder, 12, ahead=False)
    plain = decoder.forward(np.array([1, 2, 3]), 0)
    for name in ("_await_results", "deliver", "_list"):
        ids: list[int] = []
        assert same(run_greedily(decoder, 12, ahead=True, ids=ids), expected)
        with monkeypatch.context() as patch:
            patch.setattr(decoder, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                ask(decoder, np.array(ids[-1:]), 12, query(ids, 0.8), ahead=True)
        assert np.array_equal(decoder.forward(np.array([1, 2, 3]), 0), plain)
    assert same(run_greedily(decoder, 12, ahead=True), expected)
    decoder.settle()
    decoder.launch(1, np.array([1]), 0, 1)
    assert np.array_equal(decoder.finish(1)[0], ask(decoder, np.array([1]), 0, query([])).fetch())
    ask(decoder, np.array([1]), 0, query([]), ahead=True)
    decoder.close()


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_many_passes_ahead(tmp_path: Path) -> None:
    """20,000 tokens, across the wrap of the pass number, with pauses about as long as a pass waits."""
    packed = pack(tmp_path, "llama2", "int4", num_hidden_layers=1, vocab_size=96)
    decoder = gpu.GPUDecoder(packed, 64, rows=(1,), test_pauses=True, progress=False)
    expected = run_greedily(decoder, 64, ahead=False)
    decoder._args["token_limit_ns"] = 200_000
    decoder._pass = decoder._checked = (2**32 - 2) // 2 - 5000
    for i in range(20_000 // 64):
        pause = 0.0002 if i % 8 == 0 else 0.0
        assert same(run_greedily(decoder, 64, ahead=True, pause=pause), expected), i
    assert decoder._pass < 100_000
    decoder.close()


def test_non_finite_candidates_say_so(tmp_path: Path) -> None:
    packed = pack(tmp_path, "llama2", "bf16")
    packed.norm = np.full_like(packed.norm, 3e38)
    decoder = gpu.GPUDecoder(packed, 64, progress=False)
    for _ in range(2):
        assert not ask(decoder, np.array([1]), 0, query([3]), ahead=True).finite
    decoder.close()


# ---- slots ---------------------------------------------------------------------------------------------

DEPTHS = (508, 0, 255, 40, 590)  # of each slot's context
ROWS_OF_SLOTS = (2, 1, 2, 1, 2)


def slots_filled(packed: PackedModel, **options: Any) -> tuple[gpu.GPUDecoder, list[Work], list[np.ndarray]]:
    """A decoder whose slots hold contexts of DEPTHS, works for the rows behind them, all tokens of each."""
    decoder = gpu.GPUDecoder(packed, 600, num_slots=len(DEPTHS), progress=False, **options)
    tokens = tiny_prompt({"vocab_size": packed.config.vocab_size}, 1000)
    works, texts = [], []
    for slot, (depth, rows) in enumerate(zip(DEPTHS, ROWS_OF_SLOTS, strict=True)):
        texts.append(tokens[50 * slot : 50 * slot + depth + rows])
        if depth:
            decoder.forward(texts[-1][:depth], 0, "none", slot)
        asked = tuple(query(np.arange(slot, 40 * slot, row + 1), 0.5 + row) for row in range(rows))
        works.append(Work(slot, texts[-1][depth:], depth, asked))
    return decoder, works, texts


def say(decoder: gpu.GPUDecoder, works: list[Work]) -> list[np.ndarray]:
    """All that each queried row says."""
    decoder.begin(works)
    return [flat(found) for of_work in decoder.candidates() for found in of_work]


@pytest.mark.parametrize(
    ("family", "dtype", "kv_dtype"),
    [
        ("llama3.1", "bf16", "bf16"),
        ("qwen2", "int8", "bf16"),
        ("qwen3", "int4", "bf16"),
        ("qwen2", "bf16", "int8"),
        ("qwen3", "int4", "int8"),
    ],
)
def test_rows_of_several_slots(tmp_path: Path, family: str, dtype: str, kv_dtype: str) -> None:
    """The same bits as in passes of one slot, in another order and grid too; near the CPU path's."""
    packed = pack(tmp_path, family, dtype, max_position_embeddings=600)
    vocab = packed.config.vocab_size
    for options in ({}, {"blocks": 3}, {"bulk_copies": False}, {"rows": (8,), "test_pauses": True}):
        decoder, works, texts = slots_filled(packed, kv_dtype=kv_dtype, **options)
        poison(decoder)
        alone = [row for work in works for row in say(decoder, [work])]
        poison(decoder)
        assert same(say(decoder, works), alone), options
        backwards = [row for work in works[::-1] for row in say(decoder, [work])]
        for _ in range(20):
            assert same(say(decoder, works[::-1]), backwards), options
        decoder.close()
    found = np.stack([row[:vocab] for row in alone])
    exact = CPUDecoder(packed, 600, precision="float64", progress=False)
    oracle = CPUDecoder(packed, 600, kv_dtype=kv_dtype, progress=False)
    expected, own = (
        np.concatenate(
            [path.forward(text, 0, "all")[-n:] for text, n in zip(texts, ROWS_OF_SLOTS, strict=True)]
        )
        for path in (exact, oracle)
    )
    check_logits(error(found, expected), error(own, expected))


def test_a_batch_of_generations(tmp_path: Path) -> None:
    """Each sequence's ids grow on the device, pass by pass, as if it were alone; one joins late."""
    packed = pack(tmp_path, "llama2", "int4")
    decoder = gpu.GPUDecoder(packed, 64, num_slots=4, progress=False)
    expected = run_greedily(decoder, 40, ahead=True)
    ids: list[list[int]] = [[] for _ in range(4)]
    token, position = [1] * 4, [0] * 4
    for step in range(40):
        slots = range(4 if step >= 10 else 3)
        for slot in slots:
            if token[slot] not in ids[slot]:
                ids[slot].append(token[slot])
        works = [Work(s, np.array([token[s]]), position[s], (query(ids[s], 0.8),)) for s in slots]
        decoder.begin(works)
        for slot, (found,) in enumerate(decoder.candidates()):
            assert same([flat(found)], [expected[position[slot]]]), (step, slot)
            token[slot] = int(found.ids[0])
            position[slot] += 1
    decoder.close()


def test_a_prompt_beside_a_generation(tmp_path: Path) -> None:
    """Its rows without queries go before, and beside the others as far as there is room."""
    packed = pack(tmp_path, "qwen2", "bf16")
    tokens = tiny_prompt({"vocab_size": packed.config.vocab_size}, 60)
    decoder = gpu.GPUDecoder(packed, 64, num_slots=3, progress=False)
    asked = (query([3, 1]),)
    works = [Work(0, tokens[:45], 0, asked), Work(2, tokens[7:50], 0, asked), Work(1, tokens[:5], 0, ())]
    expected = [say(decoder, [work])[0] for work in works[:2]]
    poison(decoder)
    for cache in (decoder.key_cache, decoder.value_cache):
        cache.fill(0)
    assert same(say(decoder, works), expected)
    assert same(say(decoder, [Work(1, tokens[5:45], 5, asked)]), expected[:1])
    decoder.close()


# Chunks against passes: formats, sizes of heads, windows, groups, several runs of partial softmaxes.
CHUNKED: list[tuple[str, str, int, int, dict[str, Any]]] = [
    ("llama2", "int8", 128, 600, {}),
    ("llama_biases", "bf16", 128, 300, {}),
    ("llama_biases", "int4", 64, 300, {}),
    ("mistral", "bf16", 128, 900, {"sliding_window": 300}),
    ("qwen3", "int4", 32, 300, {}),
    ("qwen2", "int8", 32, 300, {}),
    ("llama2", "bf16", 128, 300, AWKWARD["head_dim_8"]),
    ("llama2", "bf16", 128, 300, AWKWARD["head_dim_16_gqa16"]),
    ("llama2", "int8", 128, 300, AWKWARD["head_dim_64_gqa7"]),
    ("llama2", "int4", 128, 300, AWKWARD["head_dim_80"]),
    ("llama2", "bf16", 128, 300, AWKWARD["head_dim_96_gqa12"]),
    ("llama2", "bf16", 128, 600, AWKWARD["head_dim_256"]),
    ("llama2", "bf16", 128, 300, {"intermediate_size": 9000}),  # down_proj's input has three parts
    ("qwen3", "int4", 128, 300, {"intermediate_size": 9000}),
    ("llama_biases", "int8", 64, 300, AWKWARD["head_dim_80_parts"]),
    # Sixteen segments: a warp's units are of one.
    ("llama2", "int4", 128, 300, {"hidden_size": 4096, "head_dim": 64, "num_hidden_layers": 1}),
    ("mistral", "bf16", 128, 4700, {"max_position_embeddings": 6000, "sliding_window": 4500}),
]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize(("family", "dtype", "group_size", "length", "changes"), CHUNKED)
def test_chunks_give_the_same_bits(
    tmp_path: Path,
    family: str,
    dtype: str,
    group_size: int,
    length: int,
    changes: dict[str, Any],
    kv_dtype: str,
) -> None:
    """Logits, keys and values of a prompt: in passes, in chunks by mma.sync, by wgmma where there is that."""
    packed = pack(tmp_path, family, dtype, group_size, **({"max_position_embeddings": 1024} | changes))
    tokens = tiny_prompt({"vocab_size": packed.config.vocab_size}, length)
    wanted, cut = ("last" if length > 1000 else "all"), length // 3 + 1
    expected: list[np.ndarray] = []
    for options in ({"chunks": False}, {"wgmma": False}, {}):
        common = {"rows": (8,), "num_slots": 2, "kv_dtype": kv_dtype, "progress": False}
        decoder = gpu.GPUDecoder(packed, length, **common, **options)
        first = decoder.forward(tokens[:cut], 0, "all" if wanted == "all" else "none", 1)
        found = [first, decoder.forward(tokens[cut:], cut, wanted, 1), *decoder.read_cache(1, length)]
        decoder.close()
        expected = expected or found
        assert all(map(np.array_equal, found, expected)), options


def test_chunk_times(tmp_path: Path) -> None:
    """Every block comes to every meeting, later than to the one before."""
    packed = pack(tmp_path, "llama2", "int8", max_position_embeddings=1024)
    decoder = gpu.GPUDecoder(packed, 200, stage_times=True, progress=False)
    decoder.forward(np.arange(200) % packed.config.vocab_size, 0, "none")
    times = decoder.chunk_times()
    decoder.close()
    assert len(times) == 1 + 10 * packed.config.num_layers and (times > 0).all()
    assert (times[1:].min(axis=1) >= times[:-1].max(axis=1)).all()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_chunks_of_any_size_give_the_same_bits(tmp_path: Path, kv_dtype: str) -> None:
    """Rows of a prompt in chunks and passes of 1, 3, 16, 128 and 300, and what comes of the last one."""
    packed = pack(tmp_path, "qwen3", "int4", max_position_embeddings=1024)
    tokens = tiny_prompt({"vocab_size": packed.config.vocab_size}, 449)
    decoder = gpu.GPUDecoder(packed, 449, kv_dtype=kv_dtype, progress=False)
    expected = decoder.forward(tokens, 0, "all")
    for sizes in ((448,), (300, 148), (1, 3, 16, 128, 300), (128, 16, 300, 3, 1)):
        found, at = [], 0
        for size in sizes:
            found.append(decoder.forward(tokens[at : at + size], at, "all"))
            at += size
        assert np.array_equal(np.concatenate(found), expected[:448])
    assert ask(decoder, tokens, 0, query([7])).queried[0] == expected[-1, 7]
    decoder.close()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_the_cache_of_a_slot(tmp_path: Path, kv_dtype: str) -> None:
    """What a slot held goes on in another one; it is near what the CPU path holds."""
    packed = pack(tmp_path, "qwen3", "int8")
    tokens = tiny_prompt({"vocab_size": packed.config.vocab_size}, 41)
    decoder = gpu.GPUDecoder(packed, 64, num_slots=3, kv_dtype=kv_dtype, progress=False)
    decoder.forward(tokens[:40], 0, "none", 2)
    keys, values = decoder.read_cache(2, 40)
    oracle = CPUDecoder(packed, 64, kv_dtype=kv_dtype, progress=False)
    oracle.forward(tokens[:40], 0, "none")
    for found, expected in zip((keys, values), oracle.read_cache(0, 40), strict=True):
        assert error(values_of(found, kv_dtype), values_of(expected, kv_dtype)) < 2e-2
    decoder.write_cache(0, keys, values)
    assert all(map(np.array_equal, decoder.read_cache(0, 40), (keys, values)))
    last = [Work(slot, tokens[40:], 40, (query([5]),)) for slot in (2, 0, 1)]
    expected, found, other = say(decoder, last)
    assert same([found], [expected]) and not same([other], [expected])
    decoder.close()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_slot_that_is_not_finite(tmp_path: Path, kv_dtype: str) -> None:
    """The other slots' rows say what they say without it."""
    packed = pack(tmp_path, "llama2", "bf16", max_position_embeddings=600)
    decoder, works, _ = slots_filled(packed, kv_dtype=kv_dtype)
    expected = say(decoder, works)
    # The bits of a NaN, or all of an int8 vector's, its scale among them.
    decoder.value_cache[:, 3, :, 20].fill(0x7FC0 if kv_dtype == "bf16" else 0xFF)
    decoder.begin(works)
    said = decoder.candidates()
    assert [found.finite for of_work in said for found in of_work] == [True] * 5 + [False] + [True] * 2
    rows = [flat(found) for of_work in said for found in of_work]
    assert same(rows[:5] + rows[6:], expected[:5] + expected[6:])
    decoder.close()


# ---- errors --------------------------------------------------------------------------------------------


def test_a_grid_that_cannot_be_resident_is_refused(tmp_path: Path) -> None:
    packed = pack(tmp_path, "llama2", "bf16")
    with pytest.raises(DeviceError, match=r"100000 blocks .* must be resident together, found room for"):
        gpu.GPUDecoder(packed, 64, blocks=100_000, progress=False)


def test_an_error_of_cuda_is_one_line(tmp_path: Path) -> None:
    packed = pack(tmp_path, "llama2", "bf16")
    decoder = gpu.GPUDecoder(packed, 64, rows=(1,), progress=False)
    expected, build = decoder.forward(np.array([1]), 0), decoder._builds[1]
    shared_bytes, build.shared_bytes = build.shared_bytes, 1 << 30
    with pytest.raises(DeviceError, match=r"cuda:\d+: a pass failed \(.*\)"):
        decoder.forward(np.array([1]), 0)
    build.shared_bytes = shared_bytes
    assert np.array_equal(decoder.forward(np.array([1]), 0), expected)
    decoder.close()


def test_non_finite_logits_raise(tmp_path: Path) -> None:
    packed = pack(tmp_path, "llama2", "bf16")
    packed.norm = np.full_like(packed.norm, 3e38)
    decoder = gpu.GPUDecoder(packed, 64, progress=False)
    with pytest.raises(GenerationError, match="non-finite"):
        decoder.forward(np.array([1, 2, 3]), 0)
    decoder.close()


def test_memory_is_free_after_close(tmp_path: Path) -> None:
    packed = pack(tmp_path, "llama2", "bf16", max_position_embeddings=200_000)
    decoder = gpu.GPUDecoder(packed, 200_000, progress=False)
    pool = decoder._pool  # what it holds of the device, whatever other processes do there
    assert pool.total_bytes() >= gpu.kv_cache_bytes(packed.config, 200_000)
    decoder.close()
    assert pool.total_bytes() == 0


def test_llama_8b_with_32k_positions_takes_8_gib() -> None:
    """By nvidia-smi, in a process of its own: weights in int4, int8 keys and values, CUDA's context."""
    command = [sys.executable, str(ROOT / "tools" / "memory.py"), "llama-3.1-8b", "int4"]
    command += ["--kv-dtype", "int8", "--positions", "32768"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
    assert float(re.search(r"([\d.]+) GiB more used than before", done.stdout)[1]) <= 8
