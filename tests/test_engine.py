"""Several sequences at once on a real, tiny model: each says what it says alone, whatever the others do."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_model import write_tokenizer
from tiny import tiny_config, write_checkpoint

from ffmini.candidates import NON_FINITE, Draw
from ffmini.errors import BusyError, GenerationError
from ffmini.generation import Completion, Timings
from ffmini.model import Model, load

VOCAB, EOS = 260, 256
MAX_SEQ_LEN = 700  # a prompt may need more than one chunk

# Prompts and options of seven sequences, as different as they can be.
REQUESTS: list[tuple[Any, dict[str, Any]]] = [
    ("Once upon a time", {"temperature": 1.0, "top_k": 40, "seed": 1, "max_new_tokens": 25}),
    ([5, 6, 7, 5, 6, 7], {"max_new_tokens": 9, "logprobs": 3, "seed": 8}),
    ("x" * 600, {"temperature": 0.8, "seed": 2, "repetition_penalty": 1.3, "max_new_tokens": 12}),
    ("a", {"temperature": 1.3, "top_p": 0.9, "seed": 3, "stop": ["e", "th"], "max_new_tokens": 60}),
    (
        "the king",
        {"temperature": 1.0, "seed": 4, "logit_bias": {65: 4.0, 66: -np.inf}, "presence_penalty": 0.5},
    ),
    ("y" * 690, {"temperature": 1.0, "min_p": 0.02, "seed": 5, "ignore_eos": True}),
    (
        "z",
        {"temperature": 2.0, "seed": 6, "frequency_penalty": 1.0, "min_new_tokens": 5, "stop_token_ids": [7]},
    ),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("engine")
    shape = {"vocab_size": VOCAB, "eos_token_id": EOS, "max_position_embeddings": 1024}
    write_checkpoint(directory, tiny_config("mistral", **shape))
    write_tokenizer(directory)
    return directory


def make_model(checkpoint: Path, slots: int) -> Model:
    return load(checkpoint, device="cpu", max_seq_len=MAX_SEQ_LEN, max_batch_size=slots)


@pytest.fixture(scope="module")
def batched(checkpoint: Path) -> Iterator[Model]:
    with make_model(checkpoint, 3) as model:
        yield model


def plain(completion: Completion) -> Completion:
    """`completion` without what differs from time to time."""
    usage = dataclasses.replace(completion.usage, cached_tokens=0)
    return dataclasses.replace(completion, timings=Timings(0, 0, 0, 0), usage=usage)


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> list[Completion]:
    """What each of REQUESTS gives alone."""
    with make_model(checkpoint, 1) as model:
        return [plain(model.generate(prompt, **options)) for prompt, options in REQUESTS]


def in_lists(requests: list[tuple[Any, dict[str, Any]]]) -> tuple[list[Any], dict[str, list[Any]]]:
    """The prompts, and each option as a list of one value per prompt."""
    names = {name for _, options in requests for name in options}
    values = {name: [options.get(name) for _, options in requests] for name in names}
    return [prompt for prompt, _ in requests], values


# ---- batches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 3, 7])
@pytest.mark.parametrize("rows", [1, 2, 64])
def test_each_text_is_what_it_is_alone(
    checkpoint: Path, alone: list[Completion], slots: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More prompts than slots, and more slots than a pass has rows."""
    prompts, options = in_lists(REQUESTS)
    with make_model(checkpoint, slots) as model:
        monkeypatch.setattr(model._decoder, "max_rows", rows)
        found = model.generate(prompts, **options)
        assert [plain(completion) for completion in found] == alone
    assert {completion.finish_reason for completion in alone} == {"stop", "length"}
    for completion in found:
        timings = completion.timings
        assert timings.prompt_seconds > 0 and timings.generation_seconds >= 0


def test_a_stream_of_several_texts(batched: Model, alone: list[Completion]) -> None:
    prompts, options = in_lists(REQUESTS)
    stream = batched.stream(prompts, **options)
    texts, order = [""] * len(prompts), []
    for index, piece in stream:
        assert piece
        texts[index] += piece
        order.append(index)
    assert texts == [completion.text for completion in alone]
    assert [plain(completion) for completion in stream.completions] == alone
    assert order != sorted(order)  # they come side by side
    assert not stream.is_open


def test_sequences_enter_as_others_leave(batched: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    begin = batched._decoder.begin

    def count(works: Any, *hints: Any) -> None:
        sizes.append(len(works))
        begin(works, *hints)

    monkeypatch.setattr(batched._decoder, "begin", count)
    lengths = [2, 9, 3, 8, 4]
    found = batched.generate(["a", "b", "c", "d", "e"], max_new_tokens=lengths, ignore_eos=True)
    assert [len(completion.tokens) for completion in found] == lengths
    # Three at a time while three are left; a text of n tokens takes n passes.
    assert sum(sizes) == sum(lengths) and sizes == [3] * 7 + [2] * 2 + [1]


def test_passes_go_ahead_for_one_sequence_only(batched: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    begin = batched._decoder.begin

    def note(works: Any, *hints: Any) -> None:
        calls.append((len(works), *hints))
        begin(works, *hints)

    monkeypatch.setattr(batched._decoder, "begin", note)
    batched.generate(["a", "b"], max_new_tokens=[2, 5], ignore_eos=True)
    greedy = (Draw(0.0, 1.0, 0.0, 1, ()),) * 2
    assert calls == [(2, False, None)] * 2 + [(1, True, greedy)] * 2 + [(1, False, None)]


@pytest.mark.parametrize("guesses", [0, 3])
def test_the_next_tokens_are_said_to_be_drawn(
    batched: Model, monkeypatch: pytest.MonkeyPatch, guesses: int
) -> None:
    """Each pass says how its own token will be drawn and the next one's; none do where guesses may come."""
    said = []
    begin = batched._decoder.begin

    def note(works: Any, ahead: bool, draws: Any) -> None:
        said.append(draws)
        begin(works, ahead, draws)

    monkeypatch.setattr(batched._decoder, "begin", note)
    options = {"temperature": 0.7, "top_k": 5, "seed": 3, "ignore_eos": True, "max_new_tokens": 6}
    options["stop_token_ids"] = [9]
    batched.generate("go", prompt_lookup_num_tokens=guesses, **options)
    uniforms = np.random.Generator(np.random.PCG64(3)).random(6).tolist()
    draws = [Draw(uniform, 1.0, 0.0, 5, (9,)) for uniform in uniforms]
    if guesses:
        assert not any(said)
    else:
        assert said == [*itertools.pairwise(draws), None]


# ---- streams that are closed ---------------------------------------------------------------------------


def test_closing_one_text_lets_the_next_in(batched: Model) -> None:
    options = {"max_new_tokens": [600, 5, 600, 6, 7], "ignore_eos": True}
    with batched.stream(["a", "b", "c", "d", "e"], **options) as stream:
        seen = [index for index, _ in zip(range(3), stream, strict=False)]
        stream.close(0)
        stream.close(2)
        stream.close(2)
        seen = [index for index, _ in stream]
    assert set(seen) == {1, 3, 4}
    assert [c is not None and len(c.tokens) for c in stream.completions] == [False, 5, False, 6, 7]
    assert batched.generate("a", max_new_tokens=1).tokens


def test_closing_the_stream_frees_everything(batched: Model, alone: list[Completion]) -> None:
    prompts, options = in_lists(REQUESTS)
    stream = batched.stream(prompts, **options)
    next(stream)
    with pytest.raises(BusyError):
        batched.generate("a")
    stream.close()
    assert list(stream) == [] and stream.completions == [None] * len(prompts)
    stream.close(1)
    found = batched.generate(prompts, **options)
    stream.close(1)
    assert [plain(completion) for completion in found] == alone


def test_a_stream_interrupted_while_it_waits_leaves_the_model_usable(
    batched: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    for prompt in ("a", ["a", "b", "c", "d"]):
        stream = batched.stream(prompt, max_new_tokens=9, ignore_eos=True)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(batched._decoder, "candidates", interrupt)
            next(stream)
        assert not stream.is_open
        with batched.stream(["a"] * 3, max_new_tokens=9, ignore_eos=True) as after:
            batched._engine.step()
            assert {slot.run for slot in batched._engine._slots} == set(after._runs)


def test_a_stream_closed_by_another_thread_in_the_middle_of_a_step(
    batched: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = batched.stream(["a", "b"], max_new_tokens=9, ignore_eos=True)
    candidates = batched._decoder.candidates

    def close_meanwhile() -> Any:
        stream.close()
        return candidates()

    with monkeypatch.context() as patch:
        patch.setattr(batched._decoder, "candidates", close_meanwhile)
        assert list(stream) == []
    assert batched.generate("a", max_new_tokens=1).tokens


# ---- sequences that fail -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("long", [False, True])
def test_a_failed_sequence_harms_no_other(checkpoint: Path, alone: list[Completion], long: bool) -> None:
    """Its numbers are not finite; the long one fails before its last chunk."""
    poison = min(set(range(128, VOCAB)).difference(*(completion.tokens for completion in alone)))
    bad = [poison, *[5] * 600] if long else [5, poison]
    prompts, options = in_lists([*REQUESTS[:3], (bad, {"seed": 9}), *REQUESTS[3:]])
    with make_model(checkpoint, 3) as model:
        model._decoder._embed_bits = model._decoder._embed_bits.copy()
        model._decoder._embed_bits[poison] = 0x7F80
        found = model.generate(prompts, **options)
        failed = found.pop(3)
        assert (failed.finish_reason, failed.text, failed.tokens) == ("error", "", [])
        assert "finite" in failed.error and failed.usage.prompt_tokens == len(bad)
        assert [plain(completion) for completion in found] == alone
        with pytest.raises(GenerationError, match="finite"):
            model.generate(bad)
        stream = model.stream(bad)
        with pytest.raises(GenerationError, match="finite"):
            next(stream)
        assert list(stream) == [] and stream.completion is None and not stream.is_open
        with model.stream([bad, "a"], max_new_tokens=4, ignore_eos=True) as batch:
            assert {index for index, _ in batch} <= {1}
        assert [completion.finish_reason for completion in batch.completions] == ["error", "length"]


def test_a_sequence_without_a_choice_ends_alone(batched: Model) -> None:
    """After two tokens the ban on EOS is all that is left; what came before stays."""
    bans = dict.fromkeys(range(VOCAB), -np.inf)
    both = batched.generate(["a", "b"], logit_bias=[bans, None], max_new_tokens=4, ignore_eos=True)
    assert [completion.finish_reason for completion in both] == ["error", "length"]
    assert both[0].error == "logit_bias and min_new_tokens leave no token to choose"
    assert both[1].error is None


@pytest.mark.parametrize("error", [KeyboardInterrupt(), GenerationError("a wait gave up")])
def test_a_pass_that_fails(batched: Model, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GenerationError ends those that were in the pass, anything else all; the model stays usable."""
    calls = []
    candidates = batched._decoder.candidates

    def fail_once() -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise error
        return candidates()

    monkeypatch.setattr(batched._decoder, "candidates", fail_once)
    options = {"max_new_tokens": [2, 9, 9, 9], "ignore_eos": True}
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            batched.generate(["a", "b", "c", "d"], **options)
    else:
        found = batched.generate(["a", "b", "c", "d", "e"], **{**options, "max_new_tokens": [2, 9, 9, 9, 3]})
        reasons = [completion.finish_reason for completion in found]
        assert reasons == ["length", "error", "error", "error", "length"]
        assert [len(completion.tokens) for completion in found] == [2, 2, 2, 0, 3]
        assert found[1].error == "a wait gave up"
    assert len(batched.generate("a", max_new_tokens=3, ignore_eos=True).tokens) == 3


# ---- arguments -----------------------------------------------------------------------------------------


def test_options_of_several_prompts(batched: Model) -> None:
    found = batched.generate([[1, 2], np.array([3])], max_tokens=(2, 4), seed=7, ignore_eos=True)
    assert [len(completion.tokens) for completion in found] == [2, 4]
    assert [completion.seed for completion in found] == [7, 7]
    for stop, expected in ((["a", "b"], [("a", "b")] * 2), ([["a"], None], [("a",), ()])):
        runs = batched._runs(["x", "y"], {"stop": stop}, is_batch=True)
        assert [tuple(run._filter._stops) for run in runs] == expected


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        (
            ["a", "b"],
            {"seed": [1]},
            ValueError,
            "seed: a list of 2 values, one per prompt, expected, found 1",
        ),
        (["a", "b"], {"stop": [["x"]]}, ValueError, "stop: a list of 2 values"),
        (["a", "b"], {"seed": [1, "x"]}, ValueError, "seed must be an integer"),
        (["a", "b"], {"sed": [1, 2]}, TypeError, "the nearest is 'seed'"),
        (["a", ""], {}, ValueError, "the prompt is empty"),
        (["a", 5], {}, ValueError, "flat list of token ids"),
        ("a", {"seed": [1]}, ValueError, "seed must be an integer"),
    ],
)
def test_bad_arguments_of_batches(
    batched: Model, prompts: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    for call in (batched.generate, batched.stream):
        with pytest.raises(error, match=message):
            call(prompts, **options)
    assert batched.generate("a", max_new_tokens=1).tokens


def test_load_says_how_many_slots_there_are(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model(checkpoint, 1).close()
    make_model(checkpoint, 4).close()
    one, four = capsys.readouterr().err.splitlines()
    assert one.endswith(
        "on cpu, context 700, KV cache 0.3 MiB in bf16"
    )  # 2 * 2 layers * 2 heads * 32 * 700 * 2 bytes
    assert four.endswith("on cpu, 4 slots of context 700, KV cache 1.4 MiB in bf16")


# ---- drafts --------------------------------------------------------------------------------------------

PHRASE = "the old king and the young king and the "


@pytest.fixture
def passes(batched: Model, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Of every begin(), the number of queries of each sequence."""
    counts: list[list[int]] = []
    begin = batched._decoder.begin

    def count(works: Any, *hints: Any) -> None:
        counts.append([len(work.queries) for work in works])
        begin(works, *hints)

    monkeypatch.setattr(batched._decoder, "begin", count)
    return counts


# Peaked by a bias, so that a random model repeats itself and some guesses come true.
REPEATING: list[dict[str, Any]] = [
    {"temperature": 0.0, "logit_bias": dict.fromkeys(PHRASE.encode(), 6.0)},
    {"temperature": 0.7, "logit_bias": {32: 14.0, 97: 13.0}, "logprobs": 2},
    {"temperature": 0.7, "top_k": 3, "logit_bias": {32: 9.0, 97: 9.0}},
    {"temperature": 0.9, "top_p": 0.9, "logit_bias": {32: 12.0, 97: 12.0}, "repetition_penalty": 1.1},
    {"temperature": 1.0, "logit_bias": {32: 12.0}, "presence_penalty": 0.3, "frequency_penalty": 0.05},
    {"temperature": 0.8, "logit_bias": {32: 13.0, 97: 12.0}, "stop": ["  a "], "logprobs": 0},
    {"temperature": 0.8, "logit_bias": {32: 13.0, EOS: 9.0}, "min_new_tokens": 20},
]


@pytest.mark.parametrize("options", REPEATING, ids=range(len(REPEATING)))
@pytest.mark.parametrize("drafts", [1, 5, 500])
def test_drafts_change_no_text(
    batched: Model, passes: list[list[int]], options: dict[str, Any], drafts: int
) -> None:
    drafted = accepted = 0
    for seed in range(4):
        options = {**options, "seed": seed, "max_new_tokens": 70}
        expected = batched.generate(PHRASE, **options)
        passes.clear()
        found = batched.generate(PHRASE, prompt_lookup_num_tokens=drafts, **options)
        assert plain(found) == plain(expected)
        drafted += sum(rows - 1 for [rows] in passes)
        accepted += len(found.tokens) - len(passes)
        assert max(rows for [rows] in passes) <= min(drafts, 63) + 1
        stream = batched.stream(PHRASE, prompt_lookup_num_tokens=drafts, **options)
        assert "".join(stream) == expected.text and plain(stream.completion) == plain(expected)
    # Both ways are taken.
    assert accepted > 0 and (accepted < drafted or options["temperature"] == 0)


@pytest.mark.parametrize("rows", [2, 7])
def test_drafts_in_a_batch(
    batched: Model, passes: list[list[int]], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sequences of a pass share its rows; what they say stays the same."""
    requests = [(PHRASE, {"seed": i, "max_new_tokens": 40, **o}) for i, o in enumerate(REPEATING)]
    prompts, options = in_lists(requests)
    expected = batched.generate(prompts, **options)
    passes.clear()
    monkeypatch.setattr(batched._decoder, "max_rows", rows)
    found = batched.generate(prompts, prompt_lookup_num_tokens=[8, 8, None, 8, 1, 8, 8], **options)
    assert [plain(completion) for completion in found] == [plain(completion) for completion in expected]
    assert all(sum(counts) <= rows for counts in passes)
    assert max(map(max, passes)) == (2 if rows == 2 else 7)


def test_drafts_end_with_the_context(batched: Model, passes: list[list[int]]) -> None:
    prompt = "ab" * 345
    options = {"logit_bias": {97: 50.0}, "ignore_eos": True}
    found = batched.generate(prompt, prompt_lookup_num_tokens=20, **options)
    assert found.finish_reason == "length" and found.usage.total_tokens == MAX_SEQ_LEN
    assert len(passes) < 10


def test_text_with_nothing_to_look_up_is_seldom_guessed(batched: Model, passes: list[list[int]]) -> None:
    options = {"temperature": 1.0, "seed": 1, "max_new_tokens": 300, "ignore_eos": True}
    batched.generate("ab" * 50, prompt_lookup_num_tokens=8, **options)
    assert sum(rows - 1 for [rows] in passes) < 30


def test_rows_after_a_wrong_guess_are_not_looked_at(
    batched: Model, passes: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text is 99 for ever; 5 is guessed once, and what follows 5 is not finite."""
    candidates = batched._decoder.candidates
    monkeypatch.setattr(
        batched._decoder,
        "candidates",
        lambda: [[rows[0], *[NON_FINITE] * 8][: len(rows)] for rows in candidates()],
    )
    options = {"max_new_tokens": 4, "logit_bias": {99: 90.0}, "prompt_lookup_num_tokens": 1}
    assert batched.generate([99, 99, 5, 1], **options).tokens == [99] * 4
    assert passes == [[1], [1], [2], [1]]


# ---- prefixes that were computed before ----------------------------------------------------------------


def forget(model: Model) -> None:
    """Make the slots hold nothing."""
    model._engine._slots = [type(slot)() for slot in model._engine._slots]


@pytest.fixture
def computed(batched: Model, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Slot, position and number of the rows of every call of the decoder; no slot holds anything yet."""
    rows: list[tuple[int, int, int]] = []
    begin, forward = batched._decoder.begin, batched._decoder.forward
    forget(batched)

    def note_begin(works: Any, *hints: Any) -> None:
        rows.extend((work.slot, work.start, len(work.tokens)) for work in works)
        begin(works, *hints)

    def note_forward(tokens: np.ndarray, start: int, logits: str = "last", slot: int = 0) -> np.ndarray:
        rows.append((slot, start, len(tokens)))
        return forward(tokens, start, logits, slot)

    monkeypatch.setattr(batched._decoder, "begin", note_begin)
    monkeypatch.setattr(batched._decoder, "forward", note_forward)
    return rows


def test_only_what_is_new_in_a_prompt_is_computed(
    checkpoint: Path, batched: Model, computed: list[tuple[int, int, int]]
) -> None:
    options = {"temperature": 1.0, "seed": 3, "max_new_tokens": 6, "ignore_eos": True, "logprobs": 2}
    first = batched.generate([1, 2, 3, 4, 5], **options)
    assert first.usage.cached_tokens == 0
    text = [1, 2, 3, 4, 5, *first.tokens]
    for prompt, cached in [
        ([*text, 7, 8, 9], 10),  # the last token of a text was never run
        (text, 10),
        (text, 10),  # its own last token is computed, whatever there is
        ([1, 2, 3, 4, 6, 6, 6], 4),
        ([1, 2, 3, 4, 6, 6], 5),
        ([9, 9], 0),
    ]:
        computed.clear()
        found = batched.generate(prompt, **options)
        assert found.usage.cached_tokens == cached
        assert computed[0][1:] == (cached, len(prompt) - cached)
        assert found.usage.prompt_tokens == len(prompt)
        rate = found.timings.prompt_tokens_per_second * found.timings.prompt_seconds
        assert rate == pytest.approx(len(prompt) - cached)
        with make_model(checkpoint, 1) as fresh:
            assert plain(fresh.generate(prompt, **options)) == plain(found)


def test_each_conversation_keeps_its_slot(batched: Model, computed: list[tuple[int, int, int]]) -> None:
    """They share their first token, which is no reason to write over each other."""
    texts = [[0, i, *range(i, i + 20)] for i in (1, 50, 100)]
    for turn in range(3):
        for slot in (2, 0, 1) if turn else range(3):
            computed.clear()
            done = batched.generate(texts[slot], max_new_tokens=5, ignore_eos=True)
            assert computed[0][0] == slot and done.usage.cached_tokens == (
                len(texts[slot]) - 3 if turn else 0
            )
            texts[slot] += [*done.tokens, 5, 6][-7:]
    done = batched.generate([77] * 9, max_new_tokens=2)  # a fourth takes the place that was left first
    assert computed[-1][0] == 2 and done.usage.cached_tokens == 0
    found = batched.generate(texts[1::-1], max_new_tokens=1, ignore_eos=True)
    assert [completion.usage.cached_tokens for completion in found] == [len(texts[0]) - 3] * 2


def test_calls_that_are_cut_short_leave_what_is_true(batched: Model) -> None:
    """A stream that is left in the middle, behind which wrong guesses lie; logits."""
    options = {"max_new_tokens": 12, "ignore_eos": True, "seed": 1}
    options["logit_bias"] = {batched.encode("a")[0]: 50.0}
    forget(batched)
    prompt = batched.encode("abcabcabcabc")
    expected = batched.generate(prompt, **options)
    text = [*prompt, *expected.tokens]
    forget(batched)
    with batched.stream(prompt, prompt_lookup_num_tokens=7, **options) as stream:
        assert [next(stream), next(stream)] == ["a", "a"]  # guessed: b
    again = batched.generate(text, **options)
    assert again.usage.cached_tokens == len(prompt) + 1
    forget(batched)
    assert plain(batched.generate(text, **options)) == plain(again)
    logits = batched.logits(text)
    assert batched.generate(text, **options).usage.cached_tokens == len(text) - 1
    forget(batched)
    np.testing.assert_array_equal(batched.logits(text), logits)


def test_an_interrupted_prompt_is_computed_from_where_it_stopped(
    batched: Model, computed: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, options = [3] * 600, {"max_new_tokens": 5, "ignore_eos": True, "seed": 1}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(batched._decoder, "candidates", interrupt)
        batched.generate(prompt, **options)
    computed.clear()
    found = batched.generate(prompt, **options)
    assert found.usage.cached_tokens == 512 and computed[0] == (0, 512, 88)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(batched._decoder, "forward", interrupt)
        batched.generate([4, *prompt], **options)
    forget(batched)
    assert plain(batched.generate(prompt, **options)) == plain(found)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
