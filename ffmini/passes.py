"""What a decoder is asked for, and what every one demands of its arguments."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .candidates import Query


@dataclass(frozen=True)
class Work:
    """What one sequence adds to a pass: tokens at consecutive positions of its slot."""

    slot: int
    tokens: np.ndarray  # integers [n], n > 0
    start: int  # the position of the first
    queries: tuple[Query, ...]  # what is asked of the last rows' logits, one each; none: only K and V count


def check_pass(tokens: np.ndarray, start: int, logits: str, max_seq_len: int, vocab_size: int) -> None:
    """Raise ValueError unless `tokens` [R], R > 0, are ids that fit at positions start .. start + R - 1.

    `logits` must be "last", "all" or "none".
    """
    if logits not in ("last", "all", "none"):
        raise ValueError(f'logits must be "last", "all" or "none", not {logits!r}')
    if tokens.ndim != 1 or len(tokens) == 0 or tokens.dtype.kind not in "iu":
        raise ValueError(f"expected token ids [R], R > 0, found {tokens.dtype} {list(tokens.shape)}")
    end = start + len(tokens)
    if start < 0 or end > max_seq_len:
        raise ValueError(f"positions {start} to {end - 1} asked for, 0 to {max_seq_len - 1} exist")
    ids = tokens.tolist()  # faster than NumPy for the one token of most passes
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise ValueError(f"token ids must be in [0, {vocab_size}), found {tokens}")
