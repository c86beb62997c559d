"""Runs several sequences at once: which slot each one has, and which of them the next pass advances.

Sequences enter when a slot is free and leave when they end, in the middle of the others' texts. What one of
them says does not depend on the others: not on who is in its passes, nor on which slot it has. A slot that
was left keeps its keys and values, and a prompt that begins like what they are of is computed from there on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from .cpu import CPUDecoder
from .errors import GenerationError
from .generation import Run
from .gpu import GPUDecoder
from .snapshot import Snapshot

Decoder = CPUDecoder | GPUDecoder

PROMPT_CHUNK = 512  # rows per call of the decoder, between which Ctrl-C is noticed


@dataclass(eq=False)
class _Slot:
    """Room for one sequence's keys and values."""

    run: Run | None = None  # that has it
    # Whose K and V it holds, int64 [n]; while a run has it, those of the run before.
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    left: int = 0  # when, counted in slots left

    def cached(self, prompt: np.ndarray) -> int:
        """How many of the prompt's first tokens need not be computed: never the last, whose logits count."""
        return min(common_prefix(self.tokens, prompt), len(prompt) - 1)


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many first elements of `a` [n] and `b` [m] are equal."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length


class Engine:
    """Drives runs on one decoder, as many at a time as it has slots; the others wait."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._slots = [_Slot() for _ in range(decoder.num_slots)]
        self._times_left = 0  # of all slots
        self._waiting: deque[Run] = deque()  # for a slot
        self._ready: deque[Run] = deque()  # have a slot and wait for their next pass
        self._begun: list[Run] = []  # in the pass under way
        self._failed: list[Run] = []  # that the caller does not know of
        self._began_at: dict[Run, float] = {}  # of those that have a slot, by _now()
        self._ahead = False
        self._spent = self._entered = 0.0  # seconds in steps that are over; when this one began

    @property
    def busy(self) -> bool:
        """Whether a step is left to make."""
        return bool(self._begun or self._ready or self._waiting or self._failed)

    def start(self, runs: Sequence[Run], ahead: bool) -> None:
        """Begin with `runs`, in their order, instead of what was left of others.

        `ahead`: each step follows the one before at once, so passes may begin in advance.
        """
        self._clear()
        self._waiting.extend(run for run in runs if run.goes_on)
        self._ahead = ahead

    def step(self) -> list[tuple[Run, str]]:
        """Advance some of the runs by a token; returns them, each with the text that can be shown now.

        A GenerationError ends the runs that it is about, and they are among those returned. Any other error
        is raised, and `stop` is to be called.
        """
        self._entered = perf_counter()
        if not self._begun:
            self._begin()
        taken, self._begun = self._begun, []
        if taken:
            self._take(taken)
        if self._ahead:
            self._begin()  # the text can wait while the pass runs
        news = [(run, run.show()) for run in dict.fromkeys((*taken, *self._failed))]
        self._failed = []
        self._spent += perf_counter() - self._entered
        for run, _ in news:
            if not run.goes_on:
                self._note_end(run)
        return news

    def drop(self, run: Run) -> None:
        """Let go of `run`, if it is still here; between steps."""
        for queue in (self._waiting, self._ready):
            if run in queue:
                queue.remove(run)
        self._release(run)
        self._began_at.pop(run, None)

    def stop(self) -> None:
        """Let go of all runs, whatever went wrong before, and leave nothing under way."""
        for queue in (self._waiting, self._ready, self._begun, self._failed):
            queue.clear()
        for slot in self._slots:
            if slot.run is not None:
                self._release(slot.run)
        self._began_at.clear()
        self._decoder.settle()

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Logits (float32 [n, vocab_size]) after each of `tokens` (int64 [n]), in a slot of their own."""
        self._clear()
        number = self._choose(tokens)
        slot = self._slots[number]
        slot.tokens = slot.tokens[:0]
        out = np.empty((len(tokens), self._decoder.config.vocab_size), np.float32)
        for start in range(0, len(tokens), PROMPT_CHUNK):
            rows = slice(start, start + PROMPT_CHUNK)
            out[rows] = self._decoder.forward(tokens[rows], start, "all", number)
        self._leave(slot, tokens)
        return out

    def read_slot(self) -> Snapshot | None:
        """What the slot that was left last holds, of those that hold something; None if there is none."""
        self._clear()
        slot = max(self._slots, key=lambda slot: (len(slot.tokens) > 0, slot.left))
        if not len(slot.tokens):
            return None
        keys, values = self._decoder.read_cache(self._slots.index(slot), len(slot.tokens))
        return Snapshot(slot.tokens, keys, values)

    def write_slot(self, snapshot: Snapshot) -> None:
        """Have a slot hold what `snapshot` says; ValueError if its numbers are not finite."""
        self._clear()
        number = self._choose(snapshot.tokens)
        slot = self._slots[number]
        slot.tokens = slot.tokens[:0]
        self._decoder.write_cache(number, snapshot.keys, snapshot.values)
        self._leave(slot, snapshot.tokens.astype(np.int64))

    def _clear(self) -> None:
        """Let go of runs that a caller has left behind, at whatever point."""
        if self._waiting or self._failed or any(slot.run is not None for slot in self._slots):
            self.stop()

    def _choose(self, prompt: np.ndarray) -> int:
        """The free slot for `prompt`: one with much of it, else the one that was left first."""

        def merit(number: int) -> tuple[int, int]:
            slot = self._slots[number]
            cached = slot.cached(prompt)
            # All prompts may begin alike, if with one token only: that is no reason to write over the rest.
            is_much = 2 * cached > min(len(prompt), len(slot.tokens))
            return cached if is_much else 0, -slot.left

        return max((i for i, slot in enumerate(self._slots) if slot.run is None), key=merit)

    def _admit(self) -> None:
        """Give free slots to runs that wait for one, and run their prompts up to the last chunk."""
        while self._waiting and any(slot.run is None for slot in self._slots):
            run = self._waiting.popleft()
            number = self._choose(run.prompt)
            slot = self._slots[number]
            run.enter(number, slot.cached(run.prompt))
            slot.run = run
            self._began_at[run] = self._now()
            try:
                self._run_prompt(run)
                self._ready.append(run)
            except GenerationError as error:
                self._fail(run, error)

    def _begin(self) -> None:
        """Start the next pass, with those that have waited longest, as many as it has rows for."""
        if self._waiting:
            self._admit()
        decoder = self._decoder
        count = min(len(self._ready), decoder.max_rows)
        if not count:
            return
        runs = [self._ready.popleft() for _ in range(count)]
        self._begun = runs
        most_drafts = decoder.max_rows // len(runs) - 1
        works = [run.work(most_drafts) for run in runs]
        ahead = self._ahead and len(runs) == 1 and not self._ready and runs[0].may_go_ahead
        try:
            decoder.begin(works, ahead, runs[0].draws() if ahead else None)
        except GenerationError as error:
            self._begun = []
            for run in runs:
                self._fail(run, error)

    def _run_prompt(self, run: Run) -> None:
        """Run so much of its prompt that one chunk is left, with the last token."""
        while len(run.prompt) - run.computed > PROMPT_CHUNK:
            end = run.computed + PROMPT_CHUNK
            self._decoder.forward(run.prompt[run.computed : end], run.computed, "none", run.slot)
            run.computed = end

    def _take(self, runs: Sequence[Run]) -> None:
        """Let `runs` sample from the pass that they are in, once it has ended."""
        try:
            said = self._decoder.candidates()
        except GenerationError as error:
            for run in runs:
                self._fail(run, error)
            return
        for run, rows in zip(runs, said, strict=True):
            try:
                run.take(rows, self._decoder.deliver)
            except GenerationError as error:
                self._fail(run, error)
                continue
            if run.num_tokens == 1:
                run.prompt_seconds = self._now() - self._began_at[run]
            if run.goes_on:
                self._ready.append(run)
            else:
                self._release(run)

    def _fail(self, run: Run, error: GenerationError) -> None:
        run.fail(error)
        self._release(run)
        self._failed.append(run)

    def _release(self, run: Run) -> None:
        """Free the slot of `run`, if it has one."""
        slot = self._slots[run.slot]
        if slot.run is run:
            self._leave(slot, run.held())

    def _leave(self, slot: _Slot, tokens: np.ndarray) -> None:
        self._times_left += 1
        slot.run, slot.tokens, slot.left = None, tokens, self._times_left

    def _note_end(self, run: Run) -> None:
        """Tell a run that has ended with this step how long it took."""
        seconds = self._spent - self._began_at.pop(run)
        if run.num_tokens:
            run.generation_seconds = seconds - run.prompt_seconds

    def _now(self) -> float:
        """Seconds in steps so far, this one included."""
        return self._spent + perf_counter() - self._entered
