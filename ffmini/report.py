"""What `ffmini bench` found, as records, JSON and lines for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

ENGINE = "ffmini"


@dataclass(frozen=True)
class Record:
    """One measurement, from the median of its repetitions.

    A prompt has no passes to count: each reads the weights once for as many tokens as the build takes.
    """

    shape: str
    dtype: str
    kv_dtype: str
    engine: str  # ENGINE, or what else ran the shape
    test: str  # pp<tokens>, tg<tokens>, rows<rows of a pass>, batch<sequences>, (e2e, edit, new)<tokens>
    depth: int  # positions in the cache before the test
    rows: int | None  # of a pass
    tokens_per_s: float
    tokens_per_s_deviation: float  # of the repetitions
    us_per_token: float
    us_per_pass: float | None
    bytes: int | None  # that a pass has to read, see pass_bytes
    peak_bytes_per_s: float
    fraction: float | None  # of the peak
    over_queued: float | None  # end to end: its time over that of queued passes at the same positions
    over_unguessed: float | None  # edit, new: its time over that of the same text without guesses
    logits_error: float | None  # see check_logits; None for other engines, whose numbers are not checked
    repetitions: int
    rest: float  # seconds after each, at most; less if that was shorter
    device: str
    driver: str | None
    commit: str  # of ffmini
    versions: str | None  # of another engine


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text."""

    shape: str
    dtype: str
    kv_dtype: str
    file: str
    tokens: int
    bytes: int
    context: int
    perplexity: float  # per token
    bits_per_byte: float
    device: str
    commit: str


def to_json(results: Sequence[Record | Score]) -> str:
    """A JSON list with an object per result."""
    return json.dumps([asdict(result) for result in results], indent=1)


def score_line(score: Score) -> str:
    """A Score for people."""
    return (
        f"{score.shape} ({_dtypes(score)}), {score.file}: {score.tokens} tokens, {score.bytes} bytes, "
        f"context {score.context}: perplexity {score.perplexity:.3f} per token, "
        f"{score.bits_per_byte:.4f} bits per byte"
    )


# ---- records for people --------------------------------------------------------------------------------


def summary_line(records: Sequence[Record]) -> str:
    """The first test of one shape and dtype that has bytes, or else the first, in one line."""
    record = next((record for record in records if record.bytes is not None), records[0])
    peak = f"{record.peak_bytes_per_s / 1e9:.1f} GB/s"
    speed = f"read peak {peak}"
    if record.fraction is not None:
        found = record.fraction * record.peak_bytes_per_s / 1e9
        speed = f"{found:.1f} GB/s, {record.fraction:.1%} of the read peak {peak}"
    return (
        f"{record.shape} {_dtypes(record)} {_test(record)}: {record.tokens_per_s:.1f} tokens/s, "
        f"{record.us_per_token:.1f} us per token, {speed}"
    )


def records_table(records: Sequence[Record]) -> str:
    """A Markdown table for people, what its rows say about each other, and what they have in common."""
    lines = [
        "| shape | dtype | engine | test | tokens/s | us/token | us/pass | MB/pass | GB/s | of the peak |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for record in records:
        rate = f"{record.tokens_per_s:.1f} ± {record.tokens_per_s_deviation:.1f}"
        a_pass, reads = "-", "- | - | -"
        if record.us_per_pass is not None:
            a_pass = f"{record.us_per_pass:.1f}"
        if record.bytes is not None and record.fraction is not None:
            speed = record.fraction * record.peak_bytes_per_s
            reads = f"{record.bytes / 1e6:.1f} | {speed / 1e9:.1f} | {record.fraction:.1%}"
        lines.append(
            f"| {record.shape} | {_dtypes(record)} | {record.engine} | {_test(record)} | {rate} | "
            f"{record.us_per_token:.1f} | {a_pass} | {reads} |"
        )
    notes = [*_depth_notes(records), *_end_to_end_notes(records)]
    notes += [*_guess_notes(records), *_engine_notes(records)]
    return "\n".join([*lines, "", *notes, *_common_lines(records)])


def _dtypes(result: Record | Score) -> str:
    """The weights' format, and that of K and V if it is not the usual one."""
    return result.dtype if result.kv_dtype == "bf16" else f"{result.dtype}, {result.kv_dtype} KV"


def _test(record: Record) -> str:
    return record.test + (f" @ d{record.depth}" if record.depth else "")


def _depth_notes(records: Iterable[Record]) -> list[str]:
    """What a deeper cache adds to a pass, beside what its bytes take at the read peak."""
    shallowest: dict[Any, Record] = {}
    lines = []
    for record in sorted(records, key=lambda record: record.depth):
        if record.bytes is None or record.us_per_pass is None:
            continue
        key = record.shape, record.dtype, record.kv_dtype, record.engine, record.test
        first = shallowest.setdefault(key, record)
        added = record.bytes - (first.bytes or 0)
        if added <= 0:  # the first itself, or a window hides the rest
            continue
        spent = record.us_per_pass - (first.us_per_pass or 0.0)
        least = 1e6 * added / record.peak_bytes_per_s
        lines.append(
            f"{record.shape} {_dtypes(record)} {record.test}, depth {first.depth} to {record.depth}: "
            f"{spent:.1f} us more, {added / 1e6:.1f} MB more, which take {least:.1f} us at the read peak: "
            f"ratio {spent / least:.2f}"
        )
    return lines


def _end_to_end_notes(records: Iterable[Record]) -> list[str]:
    return [
        f"{record.shape} {_dtypes(record)} {record.test}: {record.over_queued:.3f} times the queued passes"
        for record in records
        if record.over_queued is not None
    ]


def _guess_notes(records: Iterable[Record]) -> list[str]:
    return [
        f"{record.shape} {_dtypes(record)} {record.test}: {record.over_unguessed:.3f} times the time without "
        "guesses"
        for record in records
        if record.over_unguessed is not None
    ]


def _engine_notes(records: Sequence[Record]) -> list[str]:
    """How many times as long as ffmini other engines take for the same test, whatever ffmini's dtype."""
    lines = []
    for other in records:
        if other.engine == ENGINE:
            continue
        ratios = [
            f"{other.us_per_token / mine.us_per_token:.2f} times ffmini's {_dtypes(mine)}"
            for mine in records
            if mine.engine == ENGINE
            and (mine.shape, mine.test, mine.depth) == (other.shape, other.test, other.depth)
        ]
        lines.append(
            f"{other.shape} {_test(other)}, {other.engine} ({other.versions}): "
            f"{other.us_per_token:.1f} us per token, {', '.join(ratios) or 'nothing of ffmini to compare'}"
        )
    return lines


def _common_lines(records: Sequence[Record]) -> list[str]:
    peaks = [record.peak_bytes_per_s / 1e9 for record in records]
    errors = [record.logits_error for record in records if record.logits_error is not None]
    last = records[-1]
    return [
        f"{last.device}, driver {last.driver or 'none'}, ffmini {last.commit}; read peak "
        f"{_span(min(peaks), max(peaks), '.1f')} GB/s; relative error of the logits "
        f"{_span(min(errors), max(errors), '.1e')}"
    ]


def _span(low: float, high: float, form: str) -> str:
    return f"{low:{form}}" if low == high else f"{low:{form}} to {high:{form}}"
