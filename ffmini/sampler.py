"""Picks the next token from the logits, with NumPy on the host.

Order: repetition, presence and frequency penalty, logit_bias, the ban on ending before min_new_tokens,
temperature, top_k, top_p, min_p, then one draw by the inverse of the distribution function over the
surviving tokens in ascending order of id. Each emitted token, a greedy one too, uses up one number of
PCG64(seed), so token i of a text always meets random number i, whatever the options and the device.
Wherever tokens are equally likely the lower id wins.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import numpy as np

from .errors import GenerationError
from .options import GenerationOptions

_BLOCKS_PER_PICK = 4  # `largest` bounds the k-th value well with so many block maxima per element asked for
_FIRST_NUCLEUS = 64  # candidates that top_p looks at first; eight times as many whenever they don't suffice


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probabilities after penalties, bias and bans, at temperature 1, before any truncation."""

    token: int
    logprob: float
    top: dict[int, float]  # the most likely tokens, in descending order


def draw_seed() -> int:
    """A fresh seed, short enough to be typed again."""
    return secrets.randbits(32)


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


def nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Ascending indices of the smallest set of the largest `weights` [n] that holds top_p of their sum.

    Like Hugging Face's warper: a token stays if those before it hold less than top_p; at least one stays.
    """
    target = top_p * weights.sum()
    k = _FIRST_NUCLEUS
    while True:
        order = largest(weights, k)
        reached = np.cumsum(weights[order])
        keep = 1 + int(np.searchsorted(reached, target, side="left"))
        if keep <= len(order) or len(order) == len(weights):
            return np.sort(order[:keep])
        k *= 8


def distribution(scores: np.ndarray, options: GenerationOptions) -> tuple[np.ndarray, np.ndarray]:
    """What temperature, top_k, top_p and min_p leave of `scores` (float32 [vocab_size], not all -inf).

    Returns the surviving token ids, ascending, and their unnormalised probabilities (float64), the most
    likely token having 1. The temperature must be above 0.
    """
    ids = np.arange(len(scores))
    if 0 < options.top_k < len(scores):
        ids = np.sort(largest(scores, options.top_k))
        scores = scores[ids]
    wide = scores.astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature: -inf is meant
        weights = np.exp((wide - wide.max()) / options.temperature)
    if options.top_p < 1:
        keep = nucleus(weights, options.top_p)
        ids, weights = ids[keep], weights[keep]
    if options.min_p > 0:
        keep = weights >= options.min_p
        ids, weights = ids[keep], weights[keep]
    return ids, weights


def draw(ids: np.ndarray, weights: np.ndarray, uniform: float) -> int:
    """The token of `ids` [n] at which the running sum of `weights` [n] passes `uniform` times the total.

    `uniform` is in [0, 1); a token without weight is never taken.
    """
    reached = np.cumsum(weights)
    # The largest uniform is 1 - 2**-53: its product with the total, rounded, is still below the total.
    return int(ids[np.searchsorted(reached, uniform * reached[-1], side="right")])


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Log-probabilities (float64, same shape [n]) of the logits `scores` [n]."""
    shifted = scores.astype(np.float64) - scores.max()
    return shifted - np.log(np.exp(shifted).sum())


class Sampler:
    """Picks the tokens of one text, one `sample` call each."""

    def __init__(
        self, options: GenerationOptions, prompt: np.ndarray, eos_token_ids: tuple[int, ...], vocab_size: int
    ) -> None:
        """`prompt` [n] are the token ids that the repetition penalty counts too."""
        self.seed = draw_seed() if options.seed is None else options.seed
        eos = () if options.ignore_eos else eos_token_ids
        self.end_token_ids = frozenset((*eos, *options.stop_token_ids))
        self._options = options
        self._random = np.random.Generator(np.random.PCG64(self.seed))
        self._emitted = 0
        self._seen = np.zeros(vocab_size, bool)  # in prompt or text
        self._seen[prompt] = True
        self._counts = np.zeros(vocab_size, np.int32)  # in the text
        self._bias_ids = np.array(list(options.logit_bias), np.intp)
        self._biases = np.array(list(options.logit_bias.values()), np.float32)
        self._banned_at_first = np.array([t for t in self.end_token_ids if t < vocab_size], np.intp)

    def sample(self, logits: np.ndarray) -> tuple[int, TokenLogprobs | None]:
        """The next token from finite `logits` (float32 [vocab_size]), with its logprobs if asked for.

        Raises GenerationError if bias and bans leave no token.
        """
        scores = self.processed(logits)
        uniform = self._random.random()
        best = int(scores.argmax())
        if scores[best] == -np.inf:
            raise GenerationError("logit_bias and min_new_tokens leave no token to choose")
        token = best
        if self._options.temperature > 0:
            token = draw(*distribution(scores, self._options), uniform)
        self._emitted += 1
        self._seen[token] = True
        self._counts[token] += 1
        return token, self._logprobs(scores, token)

    def processed(self, logits: np.ndarray) -> np.ndarray:
        """`logits` [vocab_size] after penalties, bias and the ban on ending early: float32, a copy."""
        options = self._options
        scores = logits.astype(np.float32)
        if options.repetition_penalty != 1:
            ids = np.flatnonzero(self._seen)
            old = scores[ids]
            penalty = np.float32(options.repetition_penalty)
            scores[ids] = np.where(old < 0, old * penalty, old / penalty)
        if options.presence_penalty != 0 or options.frequency_penalty != 0:
            ids = np.flatnonzero(self._counts)
            penalties = options.presence_penalty + options.frequency_penalty * self._counts[ids]
            scores[ids] -= penalties.astype(np.float32)
        scores[self._bias_ids] += self._biases
        if self._emitted < options.min_new_tokens:
            scores[self._banned_at_first] = -np.inf
        return scores

    def _logprobs(self, scores: np.ndarray, token: int) -> TokenLogprobs | None:
        if self._options.logprobs is None:
            return None
        logprobs = log_softmax(scores)
        top = largest(scores, self._options.logprobs)
        return TokenLogprobs(token, float(logprobs[token]), {int(i): float(logprobs[i]) for i in top})
