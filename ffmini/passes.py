"""What a decoder's passes are asked for, and what every decoder demands of that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .candidates import Draw, Query
from .layout import KV_DTYPES, VectorLayout
from .numerics import split_vectors


class Work(NamedTuple):
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


def check_slot(slot: int, num_slots: int) -> None:
    """Raise ValueError unless there is a slot of this number."""
    if not 0 <= slot < num_slots:
        raise ValueError(f"slot {slot} asked for, 0 to {num_slots - 1} exist")


def check_works(
    works: Sequence[Work], ahead: bool, num_slots: int, max_rows: int, max_seq_len: int, vocab_size: int
) -> tuple[int, int]:
    """How many rows `works` have, and how many of them are queried.

    ValueError unless begin() can take them: of distinct slots, at most `max_rows` queries; `ahead` goes with
    a single work of one query.
    """
    rows = asked = 0
    for work in works:
        check_pass(work.tokens, work.start, "last", max_seq_len, vocab_size)
        check_slot(work.slot, num_slots)
        count, queries = len(work.tokens), len(work.queries)
        if queries > count:
            raise ValueError(f"{queries} rows queried, there are {count}")
        rows += count
        asked += queries
    if len(works) != 1 and (not works or len({work.slot for work in works}) < len(works)):
        raise ValueError(f"works of distinct slots expected, found {[work.slot for work in works]}")
    if asked > max_rows:
        raise ValueError(f"at most {max_rows} rows can be queried together, found {asked}")
    if ahead and (len(works) != 1 or asked != 1):
        raise ValueError(f"a pass ahead of one query expected, found {len(works)} works of {asked} queries")
    return rows, asked


def check_draws(draws: tuple[Draw, Draw] | None, works: Sequence[Work], ahead: bool) -> None:
    """Raise ValueError unless begin() can take `draws`: none, or with `ahead` and queries without ids."""
    if draws is not None and (not ahead or any(len(q.token_ids) for w in works for q in w.queries)):
        raise ValueError("draws: a pass ahead of a query without ids expected")


def check_kv_dtype(kv_dtype: str) -> None:
    """Raise ValueError unless keys and values can be kept like that."""
    if kv_dtype not in KV_DTYPES:
        raise ValueError(f"kv_dtype must be one of {', '.join(KV_DTYPES)}, not {kv_dtype!r}")


def check_cache(
    keys: np.ndarray,
    values: np.ndarray,
    num_layers: int,
    num_kv_heads: int,
    layout: VectorLayout,
    max_seq_len: int,
) -> None:
    """Raise ValueError unless `keys` and `values` can be those of a slot's first positions.

    Both are plain vectors of finite numbers, [num_layers, num_kv_heads, count, layout.plain_size], count <=
    max_seq_len.
    """
    count = keys.shape[2] if keys.ndim == 4 else 0
    shape, dtype = (num_layers, num_kv_heads, count, layout.plain_size), np.dtype(layout.dtype)
    for vectors in (keys, values):
        if vectors.dtype != dtype or vectors.shape != shape:
            expected = f"{dtype} [{num_layers}, {num_kv_heads}, n, {layout.plain_size}]"
            found = f"{vectors.dtype} {list(vectors.shape)}"
            raise ValueError(f"keys and values: {expected} expected, found {found}")
        if not _are_finite(vectors, layout):
            raise ValueError("keys and values: finite numbers expected, found others")
    if count > max_seq_len:
        raise ValueError(f"keys and values of at most {max_seq_len} positions expected, found {count}")


def _are_finite(vectors: np.ndarray, layout: VectorLayout) -> bool:
    if layout.kv_dtype == "int8":
        return bool(np.isfinite(split_vectors(vectors)[1]).all())
    return not bool(((vectors & 0x7F80) == 0x7F80).any())
