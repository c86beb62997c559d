"""What a decoder leaves of a row's logits, against full sorts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ffmini.candidates import MAX_LISTED, MAX_QUERIED, Query, largest, summarise

# A coarse grid makes ties common.
coarse = st.integers(-6, 6).map(lambda n: n / 2)
rows = hnp.arrays(np.float32, st.integers(1, 300), elements=coarse)


def in_order(values: np.ndarray) -> list[int]:
    """Indices by descending value, the lower index first of equals."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


@given(rows, st.integers(0, 320))
def test_largest_is_a_stable_sort_cut_off(values: np.ndarray, k: int) -> None:
    assert largest(values, k).tolist() == in_order(values)[:k]


@pytest.mark.parametrize("k", [1, 50, 700, 9000, 40000])
def test_largest_of_a_big_vocabulary(k: int) -> None:
    values = np.random.default_rng(0).normal(size=32003).astype(np.float32).round(2)
    values[::7] = -np.inf
    assert largest(values, k).tolist() == in_order(values)[:k]


@given(rows, st.data(), st.sampled_from([0.4, 1.0, 3.0]))
def test_summary_of_queried_tokens_and_others(
    logits: np.ndarray, data: st.DataObject, inverse: float
) -> None:
    before = logits.copy()
    queried = data.draw(st.lists(st.integers(0, len(logits) - 1), unique=True))
    found = summarise(logits, Query(np.array(queried, np.int32), np.float32(inverse)))
    others = [i for i in in_order(logits) if i not in queried]
    assert found.queried.tolist() == logits[queried].tolist()
    assert found.ids.tolist() == others and found.ids.dtype == np.int64
    assert found.logits.tolist() == logits[others].tolist() and found.logits.dtype == np.float32
    assert found.complete
    scaled = [float(logits[i] - logits[others[0]]) * float(np.float32(inverse)) for i in others]
    expected = sum(map(math.exp, scaled))
    assert found.total == pytest.approx(expected, rel=1e-12)
    assert np.array_equal(found.fetch(), before)


def test_a_long_list_is_cut_and_its_total_is_not() -> None:
    logits = np.random.default_rng(1).normal(size=9 * MAX_LISTED).astype(np.float32)
    queried = np.argsort(-logits)[:MAX_QUERIED].astype(
        np.int32
    )  # none of the most likely is among the others
    found = summarise(logits, Query(queried, np.float32(1)))
    others = in_order(logits)[MAX_QUERIED:]
    assert found.ids.tolist() == others[:MAX_LISTED] and not found.complete
    assert found.total == pytest.approx(np.exp(logits[others] - logits[others[0]]).sum(), rel=1e-5)


@pytest.mark.parametrize(("size", "complete"), [(MAX_LISTED, True), (MAX_LISTED + 1, False)])
def test_a_list_of_all_says_so(size: int, complete: bool) -> None:
    nothing = Query(np.empty(0, np.int32), np.float32(1))
    assert summarise(np.zeros(size, np.float32), nothing).complete == complete


def test_no_others() -> None:
    found = summarise(np.array([1, 2], np.float32), Query(np.array([1, 0], np.int32), np.float32(1)))
    assert found.queried.tolist() == [2, 1]
    assert (len(found.ids), len(found.logits), found.complete, found.total) == (0, 0, True, 0.0)
