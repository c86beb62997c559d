"""What a decoder leaves of a pass's logits for the sampler: a few exact candidates and the normaliser.

A sampler seldom needs the whole vocabulary. It names the tokens whose logits it is going to alter (penalties,
bias, bans); of all others it gets the most likely ones and the sum of all their exponentials. Only when these
do not decide does it fetch every logit; it then goes on with the same normaliser, so both ways agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

MAX_QUERIED = 1024  # token ids in a Query


@dataclass(frozen=True)
class Query:
    """What a sampler wants to know of a row's logits."""

    token_ids: np.ndarray  # int32 [n], distinct, n <= MAX_QUERIED: whose logits the sampler alters itself
    inverse_temperature: np.float32  # of the normaliser; 1 if decoding is greedy


@dataclass(frozen=True)
class Candidates:
    """What a pass says of one row; "others" are the tokens that were not queried."""

    queried: np.ndarray  # float32 [n]: the logits of the query's token_ids
    ids: np.ndarray  # int64 [m]: the first m of the others by descending logit, of equals the lower id first
    logits: np.ndarray  # float32 [m]: theirs
    complete: bool  # ids holds all others
    total: float  # sum over all others of exp((logit - logits[0]) * inverse_temperature); 0 if there are none
    fetch: Callable[[], np.ndarray]  # all logits, float32 [vocab_size]; only until the decoder's next pass
