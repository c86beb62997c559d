"""One sequence on its way from a prompt to a text: what its passes run, and what becomes of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .candidates import Candidates, Draw, Query
from .config import ModelConfig
from .errors import NON_FINITE_LOGITS, GenerationError
from .lookup import PromptLookup
from .options import GenerationOptions
from .passes import Work
from .sampler import Sampler, TokenLogprobs
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Usage:
    """How many tokens went in and came out."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int = 0  # of the prompt: their K and V were there from an earlier prompt


@dataclass(frozen=True)
class Timings:
    """Wall time inside ffmini from when the prompt was begun, passes shared with other sequences included.

    The prompt's pass yields the first token, so the rate of generation counts the others. The prompt's rate
    counts the tokens that were computed, not usage.cached_tokens.
    """

    prompt_seconds: float
    prompt_tokens_per_second: float
    generation_seconds: float
    generation_tokens_per_second: float  # 0 if there is no second token


@dataclass(frozen=True)
class Completion:
    """What a model made of a prompt."""

    text: str  # what the new tokens add to the prompt: no special tokens, cut before a stop string
    tokens: list[int]  # all new tokens, those of a stop string and the one that ended the text included
    # "stop": EOS, stop_token_ids, stop string; "length": max_new_tokens or a full context; "error": see
    # there, only one of several prompts has it, a single one raises
    finish_reason: str
    usage: Usage
    timings: Timings
    logprobs: list[TokenLogprobs] | None  # one per new token, if asked for
    seed: int  # gives the same text again on the same device and build
    error: str | None = None  # why the text could not go on


class StopFilter:
    """Cuts text before the stop string that is complete first, however the text comes in pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stopped = False
        self._stops = stops
        self._held = ""  # could be the beginning of a stop string

    def push(self, piece: str) -> str:
        """The text that can be shown now that `piece` has come; nothing more once `stopped` is set."""
        self._held += piece
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        self.stopped = bool(found)
        cut = min(found)[1] if found else len(self._held) - self._partial()
        shown, self._held = self._held[:cut], "" if found else self._held[cut:]
        return shown

    def flush(self) -> str:
        """The text that was held back in vain."""
        shown, self._held = self._held, ""
        return shown

    def _partial(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0


class Run:
    """One generation under way. An engine drives it by `work` and `take`, and asks for text by `show`."""

    def __init__(
        self,
        prompt: np.ndarray,
        options: GenerationOptions,
        config: ModelConfig,
        tokenizer: Tokenizer,
        max_seq_len: int,
        sampler: Sampler | None = None,
    ) -> None:
        """`prompt`: token ids, int64 [n], 0 < n <= max_seq_len; `sampler`: instead of one by the options."""
        self.prompt = prompt
        self.finish_reason: str | None = None  # set by the last `show` at the latest
        self.error: GenerationError | None = None
        self.goes_on = True  # whether another token is wanted; known before the text is
        self.slot = 0  # where its K and V are, while it has one
        self.computed = 0  # positions whose K and V are there
        self.cached = 0  # of them those that were there before
        self.prompt_seconds = self.generation_seconds = 0.0
        self._budget = min(options.max_new_tokens, max_seq_len - len(prompt))
        self._sampler = sampler or Sampler(options, prompt, config.eos_token_ids, config.vocab_size)
        self._pieces = tokenizer.stream(prompt.tolist())
        self._filter = StopFilter(options.stop)
        self._has_stops = len(options.stop) > 0
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] | None = None if options.logprobs is None else []
        most = options.prompt_lookup_num_tokens
        self._lookup = PromptLookup(prompt.tolist(), most) if most else None
        self._drafts: list[int] = []  # guesses at the tokens of the rows of `work`
        self._read = 0  # tokens whose text is in the two below
        self._text: list[str] = []
        self._fresh = ""  # not yet asked for
        if self._budget == 0:
            self.finish_reason, self.goes_on = "length", False

    @property
    def num_tokens(self) -> int:
        """How many new tokens there are."""
        return len(self._tokens)

    @property
    def may_go_ahead(self) -> bool:
        """Whether the pass of `work` has one query, whose token another one may follow."""
        return not self._drafts and len(self._tokens) + 1 < self._budget

    def draws(self) -> tuple[Draw, Draw] | None:
        """How the tokens of the passes of `work` and of the next one will be drawn; None if nobody can tell.

        None too if guesses may come: a pass that has got a drawn token does not make way for theirs.
        """
        return self._sampler.draws() if self._lookup is None else None

    def enter(self, slot: int, cached: int) -> None:
        """Take a slot, which holds K and V of the prompt's first `cached` tokens."""
        self.slot, self.cached, self.computed = slot, cached, cached

    def held(self) -> np.ndarray:
        """The tokens whose K and V its slot holds, int64 [computed]."""
        return np.concatenate((self.prompt, np.array(self._tokens, np.int64)))[: self.computed]

    def work(self, most_drafts: int) -> Work:
        """What the next pass is to run: the rest of the prompt, or the newest token and guesses at the next.

        At most `most_drafts` guesses; each row from the newest token's on has a query.
        """
        if not self._tokens:
            rest = self.prompt[self.computed :]
            return Work(self.slot, rest, self.computed, (self._sampler.query(),))
        if self._lookup is not None:
            self._drafts = self._lookup.propose(min(most_drafts, self._budget - len(self._tokens) - 1))
        if not self._drafts:
            return Work(self.slot, np.array(self._tokens[-1:]), self.computed, (self._sampler.query(),))
        tokens = np.array([self._tokens[-1], *self._drafts])
        return Work(self.slot, tokens, self.computed, self._sampler.queries(self._drafts))

    def take(self, said: Sequence[Candidates], deliver: Callable[[int, Query], None]) -> None:
        """Sample from what the pass of `work` said of its rows, as far as the guesses come true.

        `deliver` gets a token, and the query of the next, as soon as it is known that they are what the next
        `work` will be. A row after a wrong guess tells nothing of this text; its K and V are written over by
        the next pass.
        GenerationError if there is nothing to sample from.
        """
        for i, row in enumerate(said):
            token = self._take_row(row, deliver)
            if not self.goes_on or i == len(self._drafts) or token != self._drafts[i]:
                break
        if self._drafts:
            self._lookup.judge(len(self._drafts), i)

    def _take_row(self, row: Candidates, deliver: Callable[[int, Query], None]) -> int:
        """Add the token that is sampled from a row; returns it."""
        if not row.finite:
            raise GenerationError(NON_FINITE_LOGITS)
        token, logprobs = self._sampler.sample(row)
        ends = token in self._sampler.end_token_ids or len(self._tokens) + 1 == self._budget
        if not ends and self._lookup is None:
            deliver(token, self._sampler.query())  # a stop string may end the text; looking for it can wait
        self.computed = len(self.prompt) + len(self._tokens)
        self._tokens.append(token)
        if self._lookup is not None:
            self._lookup.note(token)
        if self._logprobs is not None and logprobs is not None:
            self._logprobs.append(logprobs)
        if self._has_stops:
            self._read_token()
        self.goes_on = not (ends or self._filter.stopped)
        return token

    def fail(self, error: GenerationError) -> None:
        """End the text here, because of `error`."""
        self.error, self.finish_reason, self.goes_on = error, "error", False

    def show(self) -> str:
        """The text that has become visible since the last call, "" if none; with the last token all of it."""
        while self._read < len(self._tokens):
            self._read_token()
        if self.error is not None and not self._filter.stopped:
            self._fresh += self._filter.push(self._pieces.flush()) + self._filter.flush()
        shown, self._fresh = self._fresh, ""
        self._text.append(shown)
        return shown

    def completion(self) -> Completion:
        """The result; only after the finish."""
        assert self.finish_reason is not None
        prompt, new = len(self.prompt), len(self._tokens)
        timings = Timings(
            self.prompt_seconds,
            (prompt - self.cached) / self.prompt_seconds if self.prompt_seconds else 0.0,
            self.generation_seconds,
            (new - 1) / self.generation_seconds if new > 1 else 0.0,
        )
        return Completion(
            text="".join(self._text),
            tokens=self._tokens,
            finish_reason=self.finish_reason,
            usage=Usage(prompt, new, prompt + new, self.cached),
            timings=timings,
            logprobs=self._logprobs,
            seed=self._sampler.seed,
            error=None if self.error is None else str(self.error),
        )

    def _read_token(self) -> None:
        """Make text of the oldest token that is none yet; sets finish_reason if it is the last one."""
        token = self._tokens[self._read]
        self._read += 1
        ends = token in self._sampler.end_token_ids
        if not ends:
            self._fresh += self._filter.push(self._pieces.push(token))
        if not self._filter.stopped and (ends or self._read == self._budget):
            self._fresh += self._filter.push(self._pieces.flush())
            if not self._filter.stopped:
                self._fresh += self._filter.flush()
                self.finish_reason = "stop" if ends else "length"
        if self._filter.stopped:
            self.finish_reason = "stop"
