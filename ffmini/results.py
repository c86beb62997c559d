"""Memory of the host that a pass writes into: its status, and what its last stage says of the wanted rows.

The other end of cuda/candidates.cuh. Whoever owns the memory decides how it is allocated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .candidates import MAX_QUERIED, Candidates, Query
from .kernel import LISTED, STATUS

# A packet: of a candidate its entry and the block's sum, of a queried token its logit. An entry is a logit's
# rank above and a token id below, so entries ascend from the most likely token on.
RESULT = np.dtype([("entry", "<u8"), ("value", "<f4"), ("tag", "<u4")])
NO_ENTRY = np.uint64(2**64 - 1)
_LINE = 128  # bytes: what the host writes and what the device writes is not in the same line


@dataclass(frozen=True)
class HostMemory:
    """The parts of one piece of memory."""

    status: np.ndarray  # STATUS [1]
    mailbox: np.ndarray  # uint64 [1]: a pass below, its token and flags above
    results: np.ndarray  # RESULT [rows, blocks * LISTED + MAX_QUERIED]

    @staticmethod
    def nbytes(rows: int, blocks: int) -> int:
        """Bytes for a grid of `blocks` blocks and passes of up to `rows` rows."""
        return 2 * _LINE + rows * (blocks * LISTED + MAX_QUERIED) * RESULT.itemsize

    @staticmethod
    def inside(memory: np.ndarray, rows: int, blocks: int) -> HostMemory:
        """The parts of `memory`, uint8 [nbytes(rows, blocks)], which begins at a multiple of 16 bytes."""
        results = memory[2 * _LINE : HostMemory.nbytes(rows, blocks)].view(RESULT)
        return HostMemory(
            memory[: STATUS.itemsize].view(STATUS),
            memory[_LINE : _LINE + 8].view(np.uint64),
            results.reshape(rows, blocks * LISTED + MAX_QUERIED),
        )


def check_query(query: Query, vocab_size: int) -> np.ndarray:
    """The query's ids as int32 [n]; ValueError if they are too many or no ids of the vocabulary."""
    ids = np.array(query.token_ids, dtype=np.int32)  # a copy, to be kept
    if ids.ndim != 1 or len(ids) > MAX_QUERIED:
        raise ValueError(f"expected at most {MAX_QUERIED} queried ids [n], found {list(ids.shape)}")
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"queried ids must be in [0, {vocab_size}), found {ids.min()} to {ids.max()}")
    return ids


def assemble(
    packets: np.ndarray,
    num_queried: int,
    inverse_temperature: float,
    vocab_size: int,
    fetch: Callable[[], np.ndarray],
) -> Candidates:
    """What a row's packets say: RESULT [blocks * LISTED + num_queried], all there. NaN stays NaN.

    Nothing unlisted comes before the last entry of its own, full block: up to the first of these last ones
    the merged order is exact.
    """
    split = len(packets) - num_queried
    entries = np.ascontiguousarray(packets["entry"][:split]).reshape(-1, LISTED)
    others = vocab_size - num_queried
    complete = others <= entries.size and np.count_nonzero(entries != NO_ENTRY) == others
    exact = entries[entries != NO_ENTRY if complete else entries <= entries[:, -1].min()]
    exact.sort()
    return Candidates(
        queried=packets["value"][split:].copy(),
        ids=exact.view(np.uint32)[::2].astype(np.int64),
        logits=logits_of(exact),
        complete=complete,
        total=_total(entries[:, 0].copy(), packets["value"][:split:LISTED], inverse_temperature),
        fetch=fetch,
    )


def logits_of(entries: np.ndarray) -> np.ndarray:
    """The logits in `entries` [n], which are contiguous: float32 [n]."""
    ranks = entries.view(np.int32)[1::2]
    return (ranks ^ (~(ranks >> 31) & 0x7FFFFFFF)).view(np.float32)


def _total(firsts: np.ndarray, sums: np.ndarray, inverse_temperature: float) -> float:
    """The blocks' `sums` [blocks], each relative to its first entry, under the first of all."""
    logits = logits_of(firsts).astype(np.float64)
    weights = np.exp((logits - logits[firsts.argmin()]) * float(inverse_temperature))
    total = float((sums * weights).sum())
    if total == total:
        return total
    held = firsts != NO_ENTRY  # else a block has no others, and its logit is NaN
    return float((sums[held] * weights[held]).sum()) if held.any() else 0.0
