"""Guesses from earlier text: which ones, how long, how often, and how fast."""

from __future__ import annotations

from time import perf_counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffmini.lookup import MAX_PAUSE, SIZES, PromptLookup


@pytest.mark.parametrize(
    ("tokens", "most", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], 9, [4, 5, 1, 2, 3, 4, 5, 1, 2]),  # goes round
        ([1, 2, 3, 4, 5, 1, 2, 3], 2, [4, 5]),
        ([1, 2, 8, 9, 1, 2, 7, 3, 1, 2], 2, [7, 3]),  # the most recent of two
        ([5, 1, 2, 8, 9, 7, 1, 2, 4, 5, 1, 2], 2, [8, 9]),  # three tokens before two
        ([1, 2, 3, 9, 8, 3], 4, []),  # one token is too little
        ([7, 7, 7], 3, [7, 7, 7]),
        ([1], 3, []),
        ([], 3, []),
    ],
)
def test_what_followed_before_is_proposed(tokens: list[int], most: int, expected: list[int]) -> None:
    assert PromptLookup(tokens, 100).propose(most) == expected


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 8))
def test_proposals_are_those_of_a_search(tokens: list[int], most: int) -> None:
    expected: list[int] = []
    for size in SIZES:
        ends = [end for end in range(size, len(tokens)) if tokens[end - size : end] == tokens[-size:]]
        if ends:
            text = list(tokens)
            for at in range(max(ends), max(ends) + most):
                text.append(text[at])
            expected = text[len(tokens) :]
            break
    assert PromptLookup(tokens, most).propose(100) == expected


def test_length_follows_success() -> None:
    lookup = PromptLookup([1, 1, 1], 8)
    assert len(lookup.propose(100)) == 8
    lookup.judge(8, 3)
    assert len(lookup.propose(100)) == 3
    lookup.judge(3, 3)
    assert len(lookup.propose(100)) == 6
    lookup.judge(6, 6)
    assert len(lookup.propose(100)) == 8
    lookup.judge(8, 0)
    assert len(lookup.propose(100)) == 4


def test_guesses_that_fail_become_rare() -> None:
    lookup = PromptLookup([1, 1, 1], 8)
    drafted = []
    for _ in range(1000):
        draft = lookup.propose(8)
        drafted.append(len(draft))
        lookup.judge(len(draft), 0)
    assert sum(drafted[:100]) < 20 and sum(drafted[500:]) <= 500 / MAX_PAUSE + 1
    lookup.judge(1, 1)  # one success, and all is well again
    lookup._pause = 0
    assert len(lookup.propose(8)) == 2
    lookup.judge(2, 0)
    assert len(lookup.propose(8)) == 1


def test_a_token_costs_microseconds_in_any_text() -> None:
    rng = np.random.default_rng(0)
    lookup = PromptLookup(rng.integers(0, 50, 60000).tolist(), 8)
    best = 1.0
    for token in rng.integers(0, 50, 300).tolist():
        began = perf_counter()
        lookup.note(token)
        lookup.propose(8)
        best = min(best, perf_counter() - began)
    assert best < 1e-4  # a search through the text takes milliseconds
