"""The sampler and its options against closed forms, brute force and fixed seeds."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ffmini.config import GenerationDefaults
from ffmini.errors import GenerationError
from ffmini.options import GenerationOptions, resolve_options
from ffmini.sampler import Sampler, distribution, draw, largest, log_softmax, nucleus

GREEDY = GenerationDefaults()
# A coarse grid makes ties common.
coarse = st.integers(-6, 6).map(lambda n: n / 2)
score_arrays = hnp.arrays(np.float32, st.integers(1, 300), elements=coarse)


def make_sampler(vocab_size=8, prompt=(), eos=(), **options):
    return Sampler(GenerationOptions(**options), np.array(prompt, np.int64), eos, vocab_size)


def in_order(values):
    """Indices by descending value, the lower index first of equals."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def brute_force(scores, temperature, top_k, top_p, min_p):
    """{token: probability} by the definitions of the four steps, each over a full sort."""
    order = in_order(scores)[: top_k or len(scores)]
    weights = {i: math.exp((float(scores[i]) - float(max(scores))) / temperature) for i in order}
    total, before, kept = sum(weights.values()), 0.0, []
    for i in order:
        if not kept or before < top_p * total or top_p == 1:
            kept.append(i)
        before += weights[i]
    kept = [i for i in kept if weights[i] >= min_p * weights[order[0]]]
    total = sum(weights[i] for i in kept)
    return {i: weights[i] / total for i in sorted(kept)}


# ---- picking candidates --------------------------------------------------------------------------------


@given(score_arrays, st.integers(0, 320))
def test_largest_is_a_stable_sort_cut_off(scores, k):
    assert largest(scores, k).tolist() == in_order(scores)[:k]


@pytest.mark.parametrize("k", [1, 50, 700, 9000, 40000])
def test_largest_of_a_big_vocabulary(k):
    scores = np.random.default_rng(0).normal(size=32003).astype(np.float32).round(2)
    scores[::7] = -np.inf
    assert largest(scores, k).tolist() == in_order(scores)[:k]


@pytest.mark.parametrize("top_p, expected", [(0.0, 1), (0.5, 1), (0.5001, 2), (0.75, 2), (0.8, 3), (1.0, 4)])
def test_nucleus_is_the_smallest_set_that_reaches_top_p(top_p, expected):
    weights = np.array([0.125, 0.5, 0.25, 0.125])
    assert nucleus(weights, top_p).tolist() == sorted([1, 2, 0, 3][:expected])


def test_nucleus_grows_beyond_its_first_look():
    assert nucleus(np.ones(5000), 0.9).tolist() == list(range(4500))


@settings(max_examples=100)
@given(
    score_arrays,
    st.sampled_from([0.3, 1.0, 2.5]),
    st.integers(0, 40),
    st.sampled_from([0.0, 0.123, 0.7, 0.937, 1.0]),
    st.sampled_from([0.0, 0.013, 0.31, 1.0]),
)
def test_distribution_is_that_of_the_definitions(scores, temperature, top_k, top_p, min_p):
    options = GenerationOptions(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ids, weights = distribution(scores, options)
    expected = brute_force(scores, temperature, top_k, top_p, min_p)
    assert ids.tolist() == list(expected)
    np.testing.assert_allclose(weights / weights.sum(), list(expected.values()), rtol=1e-12)


def test_ties_at_the_edge_of_top_k_go_to_the_lower_ids():
    scores = np.array([1, 3, 2, 2, 2, 3], np.float32)
    ids, _ = distribution(scores, GenerationOptions(temperature=1.0, top_k=4))
    assert ids.tolist() == [1, 2, 3, 5]


def test_top_p_counts_only_what_top_k_left():
    scores = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    # Of the two that top_k leaves the first has 4/7 = 0.571, of all four 0.4.
    ids, _ = distribution(scores, GenerationOptions(temperature=1.0, top_k=2, top_p=0.57))
    assert ids.tolist() == [0]


def test_a_tiny_temperature_is_greedy():
    ids, weights = distribution(np.array([1, 5, 4.999], np.float32), GenerationOptions(temperature=1e-300))
    assert ids[weights > 0].tolist() == [1]


# ---- the draw ------------------------------------------------------------------------------------------


@given(
    hnp.arrays(np.float64, st.integers(1, 50), elements=st.sampled_from([0.0, 1e-300, 0.1, 1.0])),
    st.floats(0, 1, exclude_max=True),
)
def test_draw_never_takes_a_token_without_weight(weights, uniform):
    weights[len(weights) // 2] = 0.3
    for u in (uniform, 0.0, np.nextafter(1, 0)):
        assert weights[draw(np.arange(len(weights)), weights, u)] > 0


def test_draw_inverts_the_distribution_function():
    ids, weights = np.array([2, 5, 9]), np.array([1.0, 2.0, 1.0])
    drawn = [draw(ids, weights, u) for u in (0.0, 0.2499, 0.25, 0.7499, 0.75, 0.999)]
    assert drawn == [2, 2, 5, 5, 9, 9]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.7, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.1},
    ],
)
def test_frequencies_pass_a_chi_square_test(options):
    count = 8000
    logits = np.random.default_rng(5).normal(0, 1.5, 12).astype(np.float32)
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **options}
    expected = brute_force(logits, **full)
    sampler = make_sampler(12, seed=11, **options)
    seen = np.bincount([sampler.sample(logits)[0] for _ in range(count)], minlength=12)
    assert set(np.flatnonzero(seen)) <= set(expected)
    statistic = sum((seen[i] - count * p) ** 2 / (count * p) for i, p in expected.items())
    freedom = len(expected) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


def test_token_i_meets_random_number_i_whatever_the_options():
    logits = np.zeros(1000, np.float32)
    numbers = np.random.Generator(np.random.PCG64(3)).random(4)
    sampler = make_sampler(1000, seed=3, temperature=1.0)
    assert [sampler.sample(logits)[0] for _ in range(4)] == [int(1000 * u) for u in numbers]
    greedy = make_sampler(1000, seed=3)
    for _ in range(3):
        greedy.sample(logits)
    assert greedy._random.random() == numbers[3]


def test_a_seed_is_drawn_and_reported():
    first, second = make_sampler(1000, temperature=1.0), make_sampler(1000, temperature=1.0)
    assert first.seed != second.seed
    again = make_sampler(1000, temperature=1.0, seed=first.seed)
    logits = np.zeros(1000, np.float32)
    assert [first.sample(logits)[0] for _ in range(9)] == [again.sample(logits)[0] for _ in range(9)]


def test_greedy_takes_the_lowest_of_equals():
    assert make_sampler().sample(np.array([0, 2, 1, 2, 2, 0, 0, 0], np.float32))[0] == 1


# ---- penalties, bias, bans -----------------------------------------------------------------------------


def test_repetition_penalty_counts_prompt_and_text_once():
    sampler = make_sampler(4, prompt=[1, 1], repetition_penalty=2.0)
    logits = np.array([8, 6, -2, -4], np.float32)
    assert sampler.processed(logits).tolist() == [8, 3, -2, -4]
    assert sampler.sample(logits)[0] == 0
    assert sampler.processed(logits).tolist() == [4, 3, -2, -4]
    sampler = make_sampler(4, prompt=[2, 3], repetition_penalty=2.0)
    assert sampler.processed(logits).tolist() == [8, 6, -4, -8]


def test_presence_and_frequency_count_the_text_only():
    sampler = make_sampler(3, prompt=[2], presence_penalty=0.5, frequency_penalty=0.25)
    logits = np.array([9, 0, 8], np.float32)
    for expected in ([9, 0, 8], [8.25, 0, 8], [8, 0, 8], [7.75, 0, 8], [7.75, 0, 7.25]):
        assert sampler.processed(logits).tolist() == expected
        sampler.sample(logits)


def test_order_of_penalties_and_bias():
    sampler = make_sampler(2, prompt=[0], repetition_penalty=4.0, logit_bias={0: 6.0})
    assert sampler.processed(np.array([4, 0], np.float32)).tolist() == [7, 0]
    # Repetition before presence: (8 / 2) - 3, not (8 - 3) / 2.
    sampler = make_sampler(2, repetition_penalty=2.0, presence_penalty=3.0)
    logits = np.array([8, 0], np.float32)
    sampler.sample(logits)
    assert sampler.processed(logits).tolist() == [1, 0]


def test_the_given_logits_are_left_alone():
    logits = np.array([1, 2, 3], np.float32)
    make_sampler(3, prompt=[0, 1], repetition_penalty=3.0, logit_bias={2: -5.0}).sample(logits)
    assert logits.tolist() == [1, 2, 3]


def test_nothing_ends_the_text_before_min_new_tokens():
    logits = np.array([5, 4, 3, 2], np.float32)
    sampler = make_sampler(4, eos=(0,), stop_token_ids=(1,), min_new_tokens=2)
    assert [sampler.sample(logits)[0] for _ in range(3)] == [2, 2, 0]
    assert sampler.end_token_ids == {0, 1}


def test_ignore_eos_makes_eos_a_token_like_any_other():
    sampler = make_sampler(4, eos=(0,), stop_token_ids=(1,), min_new_tokens=2, ignore_eos=True)
    assert sampler.sample(np.array([5, 6, 3, 2], np.float32))[0] == 0
    assert sampler.end_token_ids == {1}


def test_a_bias_of_minus_infinity_bans():
    sampler = make_sampler(3, temperature=1.0, seed=0, logit_bias={0: -math.inf, 2: -math.inf})
    assert {sampler.sample(np.zeros(3, np.float32))[0] for _ in range(50)} == {1}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_token_left_raises(temperature):
    sampler = make_sampler(2, eos=(1,), min_new_tokens=1, logit_bias={0: -math.inf}, temperature=temperature)
    with pytest.raises(GenerationError, match="no token to choose"):
        sampler.sample(np.zeros(2, np.float32))


# ---- logprobs ------------------------------------------------------------------------------------------


def test_logprobs_are_after_bias_and_before_temperature_and_truncation():
    p = np.array([0.1, 0.2, 0.3, 0.4])
    sampler = make_sampler(4, logprobs=2, temperature=0.1, top_k=1, logit_bias={0: math.log(10.0)})
    token, logprobs = sampler.sample(np.log(p).astype(np.float32))
    assert token == logprobs.token == 0
    assert list(logprobs.top) == [0, 3]
    assert logprobs.logprob == pytest.approx(math.log(1.0 / 1.9), rel=1e-6)
    assert logprobs.top[3] == pytest.approx(math.log(0.4 / 1.9), rel=1e-6)


def test_logprobs_of_zero_report_the_chosen_token_only():
    _, logprobs = make_sampler(2, logprobs=0).sample(np.zeros(2, np.float32))
    assert logprobs.top == {} and logprobs.logprob == pytest.approx(-math.log(2))
    assert make_sampler(2).sample(np.zeros(2, np.float32))[1] is None


@given(hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(-80, 80, width=32)))
def test_log_softmax_adds_up_to_one(scores):
    logprobs = log_softmax(scores)
    assert np.exp(logprobs).sum() == pytest.approx(1, rel=1e-12)
    np.testing.assert_allclose(logprobs - logprobs[0], scores.astype(np.float64) - scores[0], atol=1e-9)


# ---- options -------------------------------------------------------------------------------------------


def test_greedy_without_do_sample_else_the_models_defaults():
    assert resolve_options(GREEDY, {}, 10).temperature == 0
    defaults = GenerationDefaults(
        do_sample=True, temperature=0.6, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.1
    )
    options = resolve_options(defaults, {"top_k": 7, "top_p": None}, 10)
    found = (options.temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty)
    assert found == (0.6, 7, 0.95, 0.01, 1.1)


def test_aliases_and_plain_values():
    given_options = {"max_tokens": np.int32(3), "repeat_penalty": 1.5, "stop": "x", "stop_token_ids": 4}
    options = resolve_options(GREEDY, given_options, 10)
    assert (options.max_new_tokens, options.repetition_penalty) == (3, 1.5)
    assert (options.stop, options.stop_token_ids) == (("x",), (4,))


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("temprature", "temperature"),
        ("max_length", "max_tokens"),
        ("stop_strings", "stop"),
        ("topk", "top_k"),
    ],
)
def test_an_unknown_option_is_a_type_error_naming_the_nearest(name, nearest):
    with pytest.raises(TypeError) as error:
        resolve_options(GREEDY, {name: 1}, 10)
    assert repr(name) in str(error.value) and nearest in str(error.value)


def test_an_option_given_under_both_names():
    with pytest.raises(TypeError, match="max_new_tokens was given twice"):
        resolve_options(GREEDY, {"max_tokens": 3, "max_new_tokens": 3}, 10)


@pytest.mark.parametrize(
    "name, value",
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", True),
        ("max_new_tokens", 2.0),
        ("min_new_tokens", 257),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", "1"),
        ("top_k", -1),
        ("top_p", 1.01),
        ("top_p", math.inf),
        ("min_p", -0.5),
        ("repetition_penalty", 0),
        ("presence_penalty", math.inf),
        ("frequency_penalty", "a"),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 1.5),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", 5),
        ("stop", b"x"),
        ("stop_token_ids", [10]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["a"]),
        ("ignore_eos", 1),
        ("logprobs", 11),
        ("logprobs", -1),
        ("logit_bias", [1]),
        ("logit_bias", {"1": 0.5}),
        ("logit_bias", {10: 0.5}),
        ("logit_bias", {1: math.inf}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: None}),
    ],
)
def test_a_bad_value_is_a_value_error_of_one_line_naming_the_option(name, value):
    with pytest.raises(ValueError, match=name) as error:
        resolve_options(GREEDY, {name: value}, 10)
    assert "\n" not in str(error.value)


def test_truncation_without_a_temperature_warns_where_the_default_is_greedy():
    with pytest.warns(UserWarning, match="top_p: no effect"):
        resolve_options(GREEDY, {"top_p": 0.9}, 10)
