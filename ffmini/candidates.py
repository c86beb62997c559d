"""What a decoder leaves of a pass's logits for the sampler: a few exact candidates and the normaliser.

A sampler seldom needs the whole vocabulary. It names the tokens whose logits it is going to alter (penalties,
bias, bans); of all others it gets the most likely ones and the sum of all their exponentials. Only when these
do not decide does it fetch every logit; it then goes on with the same normaliser, so both ways agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

MAX_QUERIED = 1024  # token ids in a Query
MAX_LISTED = 1024  # ids in the Candidates that `summarise` makes
_BLOCKS_PER_PICK = 4  # `largest` bounds the k-th value well with so many block maxima per element asked for


class Query(NamedTuple):
    """What a sampler wants to know of a row's logits."""

    # int32 [n], distinct, n <= MAX_QUERIED: whose logits the sampler alters itself. They never change, so a
    # decoder knows a query again.
    token_ids: np.ndarray
    inverse_temperature: np.float32  # of the normaliser; 1 if decoding is greedy


class Draw(NamedTuple):
    """How a sampler that alters no logit is going to draw a row's token; see `Sampler.draws`."""

    uniform: float  # in [0, 1)
    top_p: float
    min_p: float
    top_k: int  # 1 if decoding is greedy; 0: no limit
    end_token_ids: tuple[int, ...]  # with which the text ends


class Candidates(NamedTuple):  # made for every token: a tuple is made in a fraction of a dataclass's time
    """What a pass says of one row; "others" are the tokens that were not queried."""

    queried: np.ndarray  # float32 [n]: the logits of the query's token_ids
    ids: np.ndarray  # integers [m]: the first of the others by descending logit, of equals the lower id first
    logits: np.ndarray  # float32 [m]: theirs
    complete: bool  # ids holds all others
    total: float  # sum over all others of exp((logit - logits[0]) * inverse_temperature); 0 if there are none
    fetch: Callable[[], np.ndarray]  # all logits, float32 [vocab_size]; only until the decoder's next pass
    finite: bool = True  # False: a logit of the row is not finite, and nothing else counts


def _fetch_nothing() -> np.ndarray:
    raise ValueError("logits of a row with finite ones expected, those of another asked for")


# What every decoder says of a row whose logits are not finite.
NON_FINITE = Candidates(
    queried=np.empty(0, np.float32),
    ids=np.empty(0, np.int64),
    logits=np.empty(0, np.float32),
    complete=False,
    total=np.nan,
    fetch=_fetch_nothing,
    finite=False,
)


def largest(values: np.ndarray, k: int) -> np.ndarray:
    """Indices [min(k, n)] of the largest of `values` [n], in descending order, of equals the lower first."""
    count = len(values)
    if k <= 0:
        return np.empty(0, np.intp)
    if k >= count:
        return np.argsort(-values, kind="stable")
    width = count // (_BLOCKS_PER_PICK * k)
    if width >= 2:
        # k blocks have a maximum of at least this bound, so k values do: nothing below it can be wanted.
        blocks = count // width
        tops = values[: width * blocks].reshape(width, blocks).max(axis=0)
        bound = np.partition(tops, blocks - k)[blocks - k]
    else:
        bound = np.partition(values, count - k)[count - k]
    near = np.flatnonzero(values >= bound)
    return near[np.argsort(-values[near], kind="stable")[:k]]


def summarise(logits: np.ndarray, query: Query) -> Candidates:
    """The Candidates of a row with finite `logits` (float32 [vocab_size]); at most MAX_LISTED ids.

    Every decoder says the same, but for how many ids it lists and how it rounds the total, here in double.
    """
    queried = logits[query.token_ids]
    count = len(logits) - len(queried)  # of the others
    others = logits.copy()
    others[query.token_ids] = -np.inf  # below every other, and of no weight
    ids = largest(others, min(count, MAX_LISTED)).astype(np.int64)
    total = 0.0
    if count:
        weights = others.astype(np.float64)
        weights -= logits[ids[0]]
        weights *= query.inverse_temperature
        total = float(np.exp(weights, out=weights).sum())
    return Candidates(queried, ids, logits[ids], len(ids) == count, total, lambda: logits)
