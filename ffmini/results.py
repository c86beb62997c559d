"""Memory of the host that a pass writes into: its status, and what its last stage says of the wanted rows.

The other end of cuda/candidates.cuh. Whoever owns the memory decides how it is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from .candidates import MAX_QUERIED, Candidates, Query
from .kernel import MOST_LISTED, STATUS

# A packet. The header has the number of candidates as its id, whether they are all that were not queried and,
# twice, which of them the pass has drawn (from 1 on, 0: none), and the total over those. The packet of a
# queried token has its logit, that of a candidate its id and logit.
RESULT = np.dtype([("id", "<i4"), ("about", "<u4"), ("value", "<f4"), ("tag", "<u4")])
RESULT_PACKETS = 1 + MAX_QUERIED + MOST_LISTED  # of a row: the header, the queried tokens, the candidates
_NO_TOKEN, _GAVE_UP = (STATUS.names.index(name) for name in ("no_token", "gave_up"))
_NO_VALUES = np.empty(0, np.float32)
_LINE = 128  # bytes: what the host writes and what the device writes is not in the same line


class RowResults:
    """The packets of one row: RESULT [RESULT_PACKETS]."""

    def __init__(self, packets: np.ndarray) -> None:
        self.packets = packets
        self._header = memoryview(packets[:1].view(np.uint32))  # its words are read faster than an array's
        self._ids, self._values, self._tags = packets["id"], packets["value"], packets["tag"]

    def are_there(self, number: int, num_queried: int) -> bool:
        """Whether all that pass `number` says has come."""
        if self._header[3] != number:
            return False
        end = 1 + num_queried + self._header[0]
        # Bytes: they are copied and compared in half the time that NumPy takes to compare.
        return self._tags[:end].tobytes() == number.to_bytes(4, "little") * end

    def assemble(self, num_queried: int, fetch: Callable[[], np.ndarray]) -> Candidates:
        """What the packets say, once they are there. NaN stays NaN."""
        split = 1 + num_queried
        end = split + self._header[0]
        total, finite, queried = float(self._values[0]), True, _NO_VALUES
        if num_queried:
            queried = self._values[1:split].copy()
            finite = np.count_nonzero(np.isfinite(queried)) == num_queried
        ids, logits = self._ids[split:end].copy(), self._values[split:end].copy()
        complete, finite = self._header[1] % 2 != 0, finite and math.isfinite(total)
        return Candidates(queried, ids, logits, complete, total, fetch, finite)

    def drawn(self) -> int | None:
        """The token that the pass has drawn and given to the one behind, if it has; nothing was queried."""
        place = self._header[1] // 2
        return int(self._ids[place]) if place else None


class HostMemory:
    """The parts of one piece of memory."""

    def __init__(self, memory: np.ndarray, rows: int) -> None:
        """The parts of `memory`, uint8 [nbytes(rows)], which begins at a multiple of 16 bytes.

        A pass's results are at the last bit of its number: the pass behind may be done before they are read.
        """
        self.status = memory[: STATUS.itemsize].view(STATUS)  # [1]
        self._status = memoryview(self.status.view(np.uint32))
        self.mailbox = memory[_LINE : _LINE + 8].view(np.uint64)  # [1]: a pass below, token and flags above
        results = memory[2 * _LINE : HostMemory.nbytes(rows)].view(RESULT)
        self.results = results.reshape(2, rows, RESULT_PACKETS)
        self.addresses = [of_pass.ctypes.data for of_pass in self.results]
        self.rows = [[RowResults(row) for row in of_pass] for of_pass in self.results]

    @property
    def no_token(self) -> int:
        """The last pass that ended for want of its token."""
        return self._status[_NO_TOKEN]

    @property
    def gave_up(self) -> int:
        """The last pass that a wait gave up in."""
        return self._status[_GAVE_UP]

    @staticmethod
    def nbytes(rows: int) -> int:
        """Bytes for passes of up to `rows` rows."""
        return 2 * _LINE + 2 * rows * RESULT_PACKETS * RESULT.itemsize


def check_query(query: Query, vocab_size: int) -> np.ndarray:
    """The query's ids as int32 [n]; ValueError if they are too many or no ids of the vocabulary."""
    ids = np.array(query.token_ids, dtype=np.int32)  # a copy, to be kept
    if ids.ndim != 1 or len(ids) > MAX_QUERIED:
        raise ValueError(f"expected at most {MAX_QUERIED} queried ids [n], found {list(ids.shape)}")
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"queried ids must be in [0, {vocab_size}), found {ids.min()} to {ids.max()}")
    return ids
