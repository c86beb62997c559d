"""The sampler and its options against closed forms, brute force and fixed seeds."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import ffmini.sampler
from ffmini.candidates import MAX_LISTED, MAX_QUERIED, Query, largest, summarise
from ffmini.config import GenerationDefaults
from ffmini.errors import GenerationError
from ffmini.options import GenerationOptions, resolve_options
from ffmini.sampler import Ranking, Sampler, draw, log_softmax, rank, survivors, weigh

GREEDY = GenerationDefaults()
# A coarse grid makes ties common.
coarse = st.integers(-6, 6).map(lambda n: n / 2)
score_arrays = hnp.arrays(np.float32, st.integers(1, 300), elements=coarse)


def make_sampler(vocab_size=8, prompt=(), eos=(), **options):
    return Sampler(GenerationOptions(**options), np.array(prompt, np.int64), eos, vocab_size)


def pick(sampler, logits):
    """The sampler's next token after a pass that ends in `logits`."""
    return sampler.sample(summarise(np.asarray(logits, np.float32), sampler.query()))[0]


def cut(candidates, length, fetch=None):
    """The same with at most `length` of the others listed, and `fetch` in place of its own if given."""
    length = min(length, len(candidates.ids))
    return candidates._replace(
        ids=candidates.ids[:length],
        logits=candidates.logits[:length],
        complete=candidates.complete and length == len(candidates.ids),
        fetch=fetch or candidates.fetch,
    )


def distribution(scores, **options):
    """What temperature, top_k, top_p and min_p leave of all `scores`: ascending ids and their weights."""
    options = GenerationOptions(**options)
    inverse = np.array(np.float32(1 / options.temperature), np.float64)
    order = largest(scores, len(scores))
    total = weigh(scores, scores.max(), inverse).sum()
    reached = survivors(Ranking(order, scores[order], True), options, inverse, total)
    weights = weigh(scores[order], scores.max(), inverse)[: len(reached)]
    assert np.array_equal(reached, weights.cumsum())
    ids = order[: len(weights)]
    return np.sort(ids), weights[ids.argsort()]


def in_order(values):
    """Indices by descending value, the lower index first of equals."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def brute_force(scores, temperature, top_k, top_p, min_p):
    """{token: probability} by the definitions of the four steps, each over a full sort."""
    temperature = 1 / float(np.float32(1 / temperature))
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


# ---- truncation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_p, expected", [(0.0, 1), (0.5, 1), (0.5001, 2), (0.75, 2), (0.8, 3), (1.0, 4)])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, expected):
    scores = np.array([-3, -1, -2, -3], np.float32)  # powers of two: 1/8, 1/2, 1/4, 1/8
    ids, _ = distribution(scores, temperature=1 / math.log(2), top_p=top_p)
    assert ids.tolist() == sorted([1, 2, 0, 3][:expected])


@settings(max_examples=100)
@given(
    score_arrays,
    st.sampled_from([0.3, 1.0, 2.5]),
    st.integers(0, 40),
    st.sampled_from([0.0, 0.123, 0.7, 0.937, 1.0]),
    st.sampled_from([0.0, 0.013, 0.31, 1.0]),
)
def test_distribution_is_that_of_the_definitions(scores, temperature, top_k, top_p, min_p):
    ids, weights = distribution(scores, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = brute_force(scores, temperature, top_k, top_p, min_p)
    assert ids.tolist() == list(expected)
    np.testing.assert_allclose(weights / weights.sum(), list(expected.values()), rtol=1e-12)


def test_ties_at_the_edge_of_top_k_go_to_the_lower_ids():
    scores = np.array([1, 3, 2, 2, 2, 3], np.float32)
    ids, _ = distribution(scores, temperature=1.0, top_k=4)
    assert ids.tolist() == [1, 2, 3, 5]


def test_top_p_counts_only_what_top_k_left():
    scores = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    # Of the two that top_k leaves the first has 4/7 = 0.571, of all four 0.4.
    ids, _ = distribution(scores, temperature=1.0, top_k=2, top_p=0.57)
    assert ids.tolist() == [0]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-38, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature):
    sampler = make_sampler(3, temperature=temperature, seed=0)
    assert {pick(sampler, [1, 5, 4.999]) for _ in range(9)} == {1}
    assert np.isfinite(
        sampler.query().inverse_temperature * np.float32(np.log2(np.e))
    )  # as the kernel has it


# ---- the draw ------------------------------------------------------------------------------------------


@given(
    hnp.arrays(np.float64, st.integers(1, 50), elements=st.sampled_from([0.0, 1e-300, 0.1, 1.0])),
    st.floats(0, 1, exclude_max=True),
)
def test_draw_never_takes_an_index_without_weight(weights, uniform):
    weights[len(weights) // 2] = 0.3
    for u in (uniform, 0.0, np.nextafter(1, 0)):
        assert weights[draw(weights.cumsum(), u)] > 0


def test_draw_inverts_the_distribution_function():
    weights = np.array([1.0, 2.0, 1.0])
    drawn = [draw(weights.cumsum(), u) for u in (0.0, 0.2499, 0.25, 0.7499, 0.75, 0.999)]
    assert drawn == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("top_k, order", [(0, [0, 1, 2, 3]), (3, [1, 2, 0])])
def test_the_draw_goes_by_id_or_where_something_truncates_by_likelihood(top_k, order):
    p = np.array([0.2, 0.4, 0.3, 0.1])
    logits = np.log(p).astype(np.float32)
    numbers = np.random.Generator(np.random.PCG64(5)).random(50)
    reached = np.cumsum(p[order] / p[order].sum())
    sampler = make_sampler(4, seed=5, temperature=1.0, top_k=top_k)
    assert [pick(sampler, logits) for _ in numbers] == [order[np.searchsorted(reached, u)] for u in numbers]


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
    seen = np.bincount([pick(sampler, logits) for _ in range(count)], minlength=12)
    assert set(np.flatnonzero(seen)) <= set(expected)
    statistic = sum((seen[i] - count * p) ** 2 / (count * p) for i, p in expected.items())
    freedom = len(expected) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


def test_token_i_meets_random_number_i_whatever_the_options():
    logits = np.zeros(1000, np.float32)
    numbers = np.random.Generator(np.random.PCG64(3)).random(4)
    sampler = make_sampler(1000, seed=3, temperature=1.0)
    assert [pick(sampler, logits) for _ in range(4)] == [int(1000 * u) for u in numbers]
    greedy = make_sampler(1000, seed=3)
    for _ in range(3):
        pick(greedy, logits)
    assert greedy._random.random() == numbers[3]


def test_looking_at_the_next_draws_changes_no_token():
    """However often, and when; they are the numbers that the tokens meet."""
    options = {"temperature": 0.9, "top_k": 6, "top_p": 0.9, "min_p": 0.01, "seed": 5}
    plain, looking = make_sampler(64, **options), make_sampler(64, **options)
    rng, uniforms = np.random.default_rng(0), np.random.Generator(np.random.PCG64(5)).random(60).tolist()
    for i in range(50):
        for _ in range(rng.integers(3)):
            assert looking.draws() == tuple((u, 0.9, 0.01, 6, ()) for u in uniforms[i : i + 2])
        logits = rng.standard_normal(64).astype(np.float32)
        assert pick(looking, logits) == pick(plain, logits)


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({"temperature": 0}, ((0.0, 1.0, 0.0, 1, ()),) * 2),
        ({"temperature": 1.0}, None),
        ({"temperature": 1.0, "top_k": 64}, None),
        ({"temperature": 0, "repetition_penalty": 1.2}, None),
        ({"temperature": 0, "presence_penalty": 0.1}, None),
        ({"temperature": 0, "frequency_penalty": 0.1}, None),
        ({"temperature": 0, "logit_bias": {3: 1.0}}, None),
        ({"temperature": 0, "eos": (2,), "min_new_tokens": 1}, None),
        ({"temperature": 0, "eos": (2,)}, ((0.0, 1.0, 0.0, 1, (2,)),) * 2),
    ],
)
def test_draws_are_known_where_candidates_decide_and_none_is_altered(options, known):
    assert make_sampler(64, **options).draws() == known


def test_a_seed_is_drawn_and_reported():
    first, second = make_sampler(1000, temperature=1.0), make_sampler(1000, temperature=1.0)
    assert first.seed != second.seed
    again = make_sampler(1000, temperature=1.0, seed=first.seed)
    logits = np.zeros(1000, np.float32)
    assert [pick(first, logits) for _ in range(9)] == [pick(again, logits) for _ in range(9)]


def test_greedy_takes_the_lowest_of_equals():
    assert pick(make_sampler(), [0, 2, 1, 2, 2, 0, 0, 0]) == 1


# ---- penalties, bias, bans -----------------------------------------------------------------------------


def test_repetition_penalty_counts_prompt_and_text_once():
    sampler = make_sampler(4, prompt=[1, 1], repetition_penalty=2.0)
    logits = np.array([8, 6, -2, -4], np.float32)
    assert sampler.processed(logits).tolist() == [8, 3, -2, -4]
    assert pick(sampler, logits) == 0
    assert sampler.processed(logits).tolist() == [4, 3, -2, -4]
    sampler = make_sampler(4, prompt=[2, 3], repetition_penalty=2.0)
    assert sampler.processed(logits).tolist() == [8, 6, -4, -8]


def test_presence_and_frequency_count_the_text_only():
    sampler = make_sampler(3, prompt=[2], presence_penalty=0.5, frequency_penalty=0.25)
    logits = np.array([9, 0, 8], np.float32)
    for expected in ([9, 0, 8], [8.25, 0, 8], [8, 0, 8], [7.75, 0, 8], [7.75, 0, 7.25]):
        assert sampler.processed(logits).tolist() == expected
        pick(sampler, logits)


def test_order_of_penalties_and_bias():
    sampler = make_sampler(2, prompt=[0], repetition_penalty=4.0, logit_bias={0: 6.0})
    assert sampler.processed(np.array([4, 0], np.float32)).tolist() == [7, 0]
    # Repetition before presence: (8 / 2) - 3, not (8 - 3) / 2.
    sampler = make_sampler(2, repetition_penalty=2.0, presence_penalty=3.0)
    logits = np.array([8, 0], np.float32)
    pick(sampler, logits)
    assert sampler.processed(logits).tolist() == [1, 0]


def test_the_given_logits_are_left_alone():
    logits = np.array([1, 2, 3], np.float32)
    sampler = make_sampler(3, prompt=[0, 1], repetition_penalty=3.0, logit_bias={2: -5.0}, logprobs=1)
    pick(sampler, logits)
    assert logits.tolist() == [1, 2, 3]


def test_nothing_ends_the_text_before_min_new_tokens():
    logits = np.array([5, 4, 3, 2], np.float32)
    sampler = make_sampler(4, eos=(0,), stop_token_ids=(1,), min_new_tokens=2)
    assert [pick(sampler, logits) for _ in range(3)] == [2, 2, 0]
    assert sampler.end_token_ids == {0, 1}


def test_ignore_eos_makes_eos_a_token_like_any_other():
    sampler = make_sampler(4, eos=(0,), stop_token_ids=(1,), min_new_tokens=2, ignore_eos=True)
    assert pick(sampler, [5, 6, 3, 2]) == 0
    assert sampler.end_token_ids == {1}


def test_a_bias_of_minus_infinity_bans():
    sampler = make_sampler(3, temperature=1.0, seed=0, logit_bias={0: -math.inf, 2: -math.inf})
    assert {pick(sampler, np.zeros(3)) for _ in range(50)} == {1}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_token_left_raises(temperature):
    sampler = make_sampler(2, eos=(1,), min_new_tokens=1, logit_bias={0: -math.inf}, temperature=temperature)
    with pytest.raises(GenerationError, match="no token to choose"):
        pick(sampler, np.zeros(2))


# ---- logprobs ------------------------------------------------------------------------------------------


def test_logprobs_are_after_bias_and_before_temperature_and_truncation():
    p = np.array([0.1, 0.2, 0.3, 0.4])
    sampler = make_sampler(4, logprobs=2, temperature=0.1, top_k=1, logit_bias={0: math.log(10.0)})
    token, logprobs = sampler.sample(summarise(np.log(p).astype(np.float32), sampler.query()))
    assert token == logprobs.token == 0
    assert list(logprobs.top) == [0, 3]
    assert logprobs.logprob == pytest.approx(math.log(1.0 / 1.9), rel=1e-6)
    assert logprobs.top[3] == pytest.approx(math.log(0.4 / 1.9), rel=1e-6)


def test_logprobs_of_zero_report_the_chosen_token_only():
    sampler, silent = make_sampler(2, logprobs=0), make_sampler(2)
    candidates = summarise(np.zeros(2, np.float32), sampler.query())
    _, logprobs = sampler.sample(candidates)
    assert logprobs.top == {} and logprobs.logprob == pytest.approx(-math.log(2))
    assert silent.sample(candidates)[1] is None


@given(hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(-80, 80, width=32)))
def test_log_softmax_adds_up_to_one(scores):
    logprobs = log_softmax(scores)
    assert np.exp(logprobs).sum() == pytest.approx(1, rel=1e-12)
    np.testing.assert_allclose(logprobs - logprobs[0], scores.astype(np.float64) - scores[0], atol=1e-9)


# ---- queries -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 3}, {"stop_token_ids": (4,)}])
def test_nothing_is_queried_where_nothing_is_altered(options):
    sampler = make_sampler(8, prompt=[1, 2], eos=(0,), **options)
    first = sampler.query()
    pick(sampler, np.arange(8))
    assert sampler.query() is first and first.token_ids.tolist() == []


def test_a_query_names_every_altered_token_and_grows_at_its_end():
    sampler = make_sampler(
        9,
        prompt=[5, 2, 5],
        eos=(8, 99),
        repetition_penalty=1.5,
        logit_bias={7: 1.0, 2: -1.0},
        min_new_tokens=1,
    )
    before = [7, 2, 8, 5]  # bias, bans, prompt
    assert sampler.query().token_ids.dtype == np.int32
    for token, expected in ((2, []), (6, [6]), (8, [6]), (0, [6, 0]), (6, [6, 0])):
        logits = np.full(9, -50, np.float32)
        logits[token] = 50
        old = sampler.query()
        assert pick(sampler, logits) == token
        assert sampler.query().token_ids.tolist() == before + expected
        assert old.token_ids.tolist() == (before + expected)[: len(old.token_ids)]


@given(
    drafts=st.lists(st.integers(0, 7), max_size=6),
    true=st.integers(0, 6),
    options=st.sampled_from(
        [
            {"presence_penalty": 0.5},
            {"frequency_penalty": 0.5, "logit_bias": {3: 1.0}},
            {"repetition_penalty": 1.2, "min_new_tokens": 3},
            {"logit_bias": {1: -1.0}},
            {},
        ]
    ),
    limit=st.sampled_from([3, 5, MAX_QUERIED]),
)
def test_queries_of_drafts_are_those_of_texts(drafts, true, options, limit):
    """Row by row as long as the drafts come true; then, and if nothing is sampled, as if never asked."""
    true = min(true, len(drafts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ffmini.sampler, "MAX_QUERIED", limit)
        sampler, other = (make_sampler(8, [5, 6], (2,), **options) for _ in range(2))
        for token in (0, 6):
            for each in (sampler, other):
                each._alterations.note(token)
                each._update_query()
        foreseen = sampler.queries(drafts)
        assert len(foreseen) == len(drafts) + 1 and foreseen[0] is sampler.query()
        assert [q.token_ids.tolist() for q in sampler.queries(drafts)] == [
            q.token_ids.tolist() for q in foreseen
        ]
        before = [q.token_ids.tolist() for q in foreseen]
        for draft, query in zip(drafts[:true], foreseen, strict=False):
            assert (
                query.token_ids.tolist()
                == other.query().token_ids.tolist()
                == sampler.query().token_ids.tolist()
            )
            for each in (sampler, other):
                if each._alterations.note(draft):
                    each._update_query()
        assert foreseen[true].token_ids.tolist() == other.query().token_ids.tolist()
        sampler._alterations.note(4)  # in place of a draft: what was asked does not change
        assert [q.token_ids.tolist() for q in foreseen] == before


def test_drafts_under_a_penalty_change_no_text():
    """Every other draft is new to the text, and the penalty alters what follows it."""
    table = np.random.default_rng(0).normal(0, 2, (8, 8)).astype(np.float32)
    options = {"presence_penalty": 1.5, "frequency_penalty": 0.5, "temperature": 0.7, "seed": 4}
    plain, drafting = make_sampler(**options), make_sampler(**options)
    last, expected = 0, []
    for _ in range(40):
        last = pick(plain, table[last])
        expected.append(last)
    found, accepted = [], 0
    while len(found) < 40:
        drafts = expected[len(found) : len(found) + 3]
        if len(found) % 2:
            drafts[-1] = (drafts[-1] + 1) % 8
        fed = [found[-1] if found else 0, *drafts]
        rows = [summarise(table[t], q) for t, q in zip(fed, drafting.queries(drafts), strict=True)]
        for i, row in enumerate(rows):
            found.append(drafting.sample(row)[0])
            if i == len(drafts) or found[-1] != drafts[i]:
                break
            accepted += 1
    assert found[:40] == expected and accepted > 20


def test_presence_and_frequency_query_the_text_only():
    sampler = make_sampler(4, prompt=[1, 2], frequency_penalty=1.0)
    assert [pick(sampler, [0, 0, 0, 1.5]) for _ in range(3)] == [3, 3, 0]
    assert sampler.query().token_ids.tolist() == [3, 0]


@pytest.mark.parametrize("temperature, inverse", [(0.0, 1.0), (1.0, 1.0), (0.7, 1 / 0.7), (1000.0, 0.001)])
def test_the_query_has_the_temperature_as_a_float32(temperature, inverse):
    found = make_sampler(temperature=temperature).query().inverse_temperature
    assert found == np.float32(inverse) and found.dtype == np.float32


# ---- exact candidates and all logits -------------------------------------------------------------------


@st.composite
def cases(draw):
    """A vocabulary's size, a prompt and options of every kind."""
    size = draw(st.integers(1, 40))
    tokens = st.integers(0, size - 1)
    bias = st.sampled_from([-math.inf, -1.5, -0.5, 0.5, 1.0])
    penalty = st.sampled_from([0.0, 0.0, 0.5, -0.25])
    options = {
        "temperature": draw(st.sampled_from([0.0, 0.3, 1.0, 2.5])),
        "top_k": draw(st.sampled_from([0, 0, 1, 2, 3, 5, 20])),
        "top_p": draw(st.sampled_from([1.0, 0.0, 0.3, 0.5, 0.9, 0.999999])),
        "min_p": draw(st.sampled_from([0.0, 0.0, 0.05, 0.4, 1.0])),
        "repetition_penalty": draw(st.sampled_from([1.0, 1.3, 0.8, 2.0])),
        "presence_penalty": draw(penalty),
        "frequency_penalty": draw(penalty),
        "logit_bias": draw(st.dictionaries(tokens, bias, max_size=size)),
        "min_new_tokens": draw(st.sampled_from([0, 0, 2, 3])),
        "stop_token_ids": tuple(draw(st.lists(tokens, max_size=2))),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }
    return size, draw(st.lists(tokens, max_size=6)), options


def outcome(sampler, candidates):
    """The next token, or what the sampler says if there is none."""
    try:
        return sampler.sample(candidates)[0]
    except GenerationError as error:
        return str(error)


@settings(max_examples=400, deadline=None)
@given(cases(), st.booleans(), st.data())
def test_any_number_of_exact_candidates_gives_the_same_tokens(case, ties, data):
    size, prompt, options = case
    random = np.random.default_rng(data.draw(st.integers(0, 999)))
    whole, short, single = (make_sampler(size, prompt, **options) for _ in range(3))
    for _ in range(5):
        logits = random.normal(0, 2, size).astype(np.float32)
        candidates = summarise(logits.round() if ties else logits, whole.query())
        # Decoders round the total as they like. All ways must believe it, which a gross error shows.
        candidates = candidates._replace(total=candidates.total * random.uniform(0.7, 1.4))
        length = data.draw(st.integers(1, size))
        tokens = [outcome(whole, candidates)]
        tokens += [outcome(short, cut(candidates, length)), outcome(single, cut(candidates, 1))]
        assert tokens[0] == tokens[1] == tokens[2]
        assert whole.query().token_ids.tolist() == short.query().token_ids.tolist()


@pytest.mark.parametrize("spread", [0.02, 2.0], ids=["flat", "peaked"])
@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.9},
        {"top_p": 0.6, "min_p": 0.01, "repetition_penalty": 1.2},
        {"top_k": 1500, "top_p": 0.95},
        {"top_k": 40, "presence_penalty": 0.5, "logit_bias": {3: -math.inf, 8: 4.0}},
        {"min_p": 0.1},
        {},
    ],
)
def test_a_big_vocabulary_gives_the_same_tokens(options, spread):
    """More tokens than are listed, so that there are several looks at the ranking."""
    random = np.random.default_rng(3)
    prompt = random.integers(0, 5000, 300)
    listed, single = (make_sampler(5000, prompt, seed=4, temperature=0.8, **options) for _ in range(2))
    for _ in range(20):
        candidates = summarise(random.normal(0, spread, 5000).astype(np.float32), listed.query())
        assert len(candidates.ids) == MAX_LISTED
        assert listed.sample(candidates) == single.sample(cut(candidates, 1))


def test_top_p_beyond_every_look_at_a_flat_ranking():
    sampler = make_sampler(5000, temperature=1.0, top_p=0.9, seed=2)
    numbers = np.random.Generator(np.random.PCG64(2)).random(30)
    assert [pick(sampler, np.zeros(5000)) for _ in numbers] == [int(4500 * u) for u in numbers]


# Each token is half as likely as the one before it.
HALVES = -math.log(2) * np.arange(12, dtype=np.float32)
NO_TOP = {"logit_bias": {0: -math.inf}}


@pytest.mark.parametrize(
    "options, listed, fetches",
    [
        ({}, 1, False),
        ({"repetition_penalty": 5.0, "logit_bias": {4: 1.0}}, 1, False),
        ({"temperature": 1.0}, 11, True),
        ({"temperature": 1.0}, 12, False),
        ({"temperature": 1.0, "top_k": 3}, 3, False),
        ({"temperature": 1.0, "top_k": 3}, 2, True),
        ({"temperature": 1.0, "top_k": 3, "logit_bias": {5: 9.0}}, 2, False),
        ({"temperature": 1.0, "top_k": 3, "logit_bias": {5: -9.0}}, 2, True),
        ({"temperature": 1.0, "top_k": 3, **NO_TOP}, 3, False),
        ({"temperature": 1.0, "top_k": 3, **NO_TOP}, 2, True),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.1}, 2, True),
        ({"temperature": 1.0, "top_k": 12}, 11, True),
        ({"temperature": 1.0, "top_k": 12, "top_p": 0.74}, 2, False),
        ({"temperature": 1.0, "top_p": 0.74}, 2, False),
        ({"temperature": 1.0, "top_p": 0.76}, 2, True),
        ({"temperature": 1.0, "top_p": 0.74, **NO_TOP}, 2, False),
        ({"temperature": 1.0, "top_p": 0.76, **NO_TOP}, 2, True),
        ({"temperature": 1.0, "min_p": 0.3}, 3, False),
        ({"temperature": 1.0, "min_p": 0.3}, 2, True),
        ({"temperature": 1.0, "min_p": 0.3, "top_p": 0.95}, 3, False),
        ({"temperature": 1.0, "min_p": 0.1, "top_p": 0.74}, 2, False),
        ({"logprobs": 1}, 12, True),
        ({"temperature": 1.0, "top_k": 3, "logprobs": 1}, 2, True),
    ],
)
def test_logits_are_fetched_only_if_the_candidates_do_not_decide(options, listed, fetches):
    sampler, fetched = make_sampler(12, **options), []
    candidates = summarise(HALVES, sampler.query())
    sampler.sample(cut(candidates, listed, lambda: fetched.append(None) or HALVES))
    assert len(fetched) == fetches


@pytest.mark.parametrize("altered, expected", [(4, [0]), (0, [0, 1])])
def test_an_altered_token_that_equals_the_last_candidate(altered, expected):
    """Others that are not listed may come between the two, unless the altered one has the lower id."""
    query = Query(np.array([altered], np.int32), np.float32(1))
    candidates = cut(summarise(np.zeros(5, np.float32), query), 1)
    ranking = rank(candidates, query.token_ids, candidates.queried, 9)
    assert (ranking.ids.tolist(), ranking.complete) == (expected, False)


def test_a_wide_nucleus_needs_no_fetch_if_it_is_listed():
    logits = -np.arange(5000, dtype=np.float32) / 300
    sampler = make_sampler(5000, temperature=1.0, top_p=0.9, seed=0)
    candidates = cut(summarise(logits, sampler.query()), MAX_LISTED, lambda: pytest.fail("fetched"))
    tokens = [sampler.sample(candidates)[0] for _ in range(200)]
    assert 512 < max(tokens) < 300 * math.log(10) + 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.2, "min_p": 0.05, "logprobs": 2},
    ],
)
def test_more_altered_tokens_than_a_query_holds(options, monkeypatch):
    """Nothing is queried, all logits are fetched, and the tokens are the same."""
    size = 2 * MAX_QUERIED
    random = np.random.default_rng(6)
    # The fourth or so of the tokens is one too many.
    prompt = random.permutation(size)[: MAX_QUERIED - 3]
    options = {"seed": 9, "repetition_penalty": 1.3, "frequency_penalty": 0.2, **options}
    logits = random.normal(0, 2, (20, size)).astype(np.float32)
    sampler = make_sampler(size, prompt, **options)
    found = [sampler.sample(summarise(row, sampler.query())) for row in logits]
    assert sampler.query().token_ids.tolist() == []
    monkeypatch.setattr(ffmini.sampler, "MAX_QUERIED", size)
    sampler = make_sampler(size, prompt, **options)
    assert [sampler.sample(summarise(row, sampler.query())) for row in logits] == found
    assert len(sampler.query().token_ids) > MAX_QUERIED


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
        ("prompt_lookup_num_tokens", -1),
        ("prompt_lookup_num_tokens", True),
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
