"""Runs several sequences at once: which slot each one has, and which of them the next pass advances.

Sequences enter when a slot is free and leave when they end, in the middle of the others' texts. What one of
them says does not depend on the others: not on who is in its passes, nor on which slot it has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from time import perf_counter

from .cpu import CPUDecoder
from .errors import GenerationError
from .generation import Run
from .gpu import GPUDecoder

Decoder = CPUDecoder | GPUDecoder

PROMPT_CHUNK = 512  # rows per call of the decoder, between which Ctrl-C is noticed


class Engine:
    """Drives runs on one decoder, as many at a time as it has slots; the others wait."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._slots: list[Run | None] = [None] * decoder.num_slots
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
        if self.busy:
            self.stop()
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
        for run in self._slots:
            if run is not None:
                self._release(run)
        self._began_at.clear()
        self._decoder.settle()

    def _admit(self) -> None:
        """Give free slots to runs that wait for one."""
        while self._waiting and None in self._slots:
            run = self._waiting.popleft()
            run.slot = self._slots.index(None)
            self._slots[run.slot] = run
            self._began_at[run] = self._now()
            self._ready.append(run)

    def _begin(self) -> None:
        """Start the next pass, with those that have waited longest, as many as it has rows for."""
        if self._waiting:
            self._admit()
        decoder = self._decoder
        count = min(len(self._ready), decoder.max_rows)
        runs = [run for run in [self._ready.popleft() for _ in range(count)] if self._run_prompt(run)]
        if not runs:
            return
        self._begun = runs
        most_drafts = decoder.max_rows // len(runs) - 1
        works = [run.work(most_drafts) for run in runs]
        ahead = self._ahead and len(runs) == 1 and not self._ready and runs[0].may_go_ahead
        try:
            decoder.begin(works, ahead)
        except GenerationError as error:
            self._begun = []
            for run in runs:
                self._fail(run, error)

    def _run_prompt(self, run: Run) -> bool:
        """Run all of its prompt but what fits a pass with others; False if that fails."""
        last = len(run.prompt) - 1
        try:
            while last - run.computed >= PROMPT_CHUNK:
                end = run.computed + PROMPT_CHUNK
                self._decoder.forward(run.prompt[run.computed : end], run.computed, "none", run.slot)
                run.computed = end
        except GenerationError as error:
            self._fail(run, error)
            return False
        return True

    def _take(self, runs: Sequence[Run]) -> None:
        """Let `runs` sample from the pass that they are in, once it has ended."""
        try:
            said = self._decoder.candidates()
        except GenerationError as error:
            for run in runs:
                self._fail(run, error)
            return
        for run, rows in zip(runs, said, strict=True):
            is_first = run.num_tokens == 0
            try:
                run.take(rows)
            except GenerationError as error:
                self._fail(run, error)
                continue
            if is_first:
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
        if self._slots[run.slot] is run:
            self._slots[run.slot] = None

    def _note_end(self, run: Run) -> None:
        """Tell a run that has ended with this step how long it took."""
        seconds = self._spent - self._began_at.pop(run)
        if run.num_tokens:
            run.generation_seconds = seconds - run.prompt_seconds

    def _now(self) -> float:
        """Seconds in steps so far, this one included."""
        return self._spent + perf_counter() - self._entered
