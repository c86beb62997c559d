"""Picks the next token from what a pass says of its logits, with NumPy on the host.

Order: repetition, presence and frequency penalty, logit_bias, the ban on ending before min_new_tokens,
temperature, top_k, top_p, min_p, then one draw by the inverse of the distribution function: over the
tokens that survive truncation in the order of their ranking (below), over the whole vocabulary in ascending
order of id if nothing truncates. Each emitted token, a greedy one too, uses up one number of PCG64(seed), so
token i of a text always meets random number i, whatever the options and the device. Wherever tokens are
equally likely the lower id wins.

The logits after penalties, bias and bans are called scores. All truncation keeps a beginning of the ranking,
which is the tokens by descending score. So the exact candidates often decide; where they do not, all logits
are fetched, and the same steps on a longer ranking give the same token, bit for bit.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .candidates import MAX_QUERIED, Candidates, Draw, Query, largest
from .errors import GenerationError
from .options import GenerationOptions

# Of all scores, where top_k does not say how many; eight times as many if they don't suffice.
_FIRST_RANKED = 64


MAX_INVERSE_TEMPERATURE = 1e38


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probabilities after penalties, bias and bans, at temperature 1, before any truncation."""

    token: int
    logprob: float
    top: dict[int, float]  # the most likely tokens, in descending order


class Ranking(NamedTuple):
    """The first tokens of a row by descending score, of equals the lower id first."""

    ids: np.ndarray  # integers [m], m > 0
    scores: np.ndarray  # float32 [m]
    complete: bool  # no token is missing


def draw_seed() -> int:
    """A fresh seed, short enough to be typed again."""
    return secrets.randbits(32)


def rank(candidates: Candidates, ids: np.ndarray, scores: np.ndarray, wanted: int) -> Ranking:
    """What the candidates tell of the ranking; `scores` [n] are those of the queried `ids` [n].

    It ends with the last exact candidate: others that are not known may come before a queried token after it.
    No more than the first `wanted` exact candidates are looked at, so it has at least so many tokens if there
    are so many candidates.
    """
    others, logits, complete = candidates.ids, candidates.logits, candidates.complete
    if wanted < len(others):
        others, logits, complete = others[:wanted], logits[:wanted], False
    if len(ids) == 0:
        return Ranking(others, logits, complete)
    if not complete:
        near = np.flatnonzero(scores >= logits[-1])
        if len(near) == 0:
            return Ranking(others, logits, False)
        ids, scores = ids[near], scores[near]
    ids, scores = np.concatenate((others, ids)), np.concatenate((logits, scores))
    order = np.lexsort((ids, -scores))
    if not complete:
        order = order[: int(np.flatnonzero(order == len(others) - 1)[0]) + 1]
    return Ranking(ids[order], scores[order], complete)


def weigh(scores: np.ndarray, top: np.float32, inverse_temperature: np.ndarray) -> np.ndarray:
    """Unnormalised probabilities (float64 [n]) of `scores` [n]; one equal to `top` has 1.

    `inverse_temperature` [] is a float64 with the value of the Query's float32; an array, since NumPy makes
    one of a number first, which for a few scores costs as much as the product.
    """
    weights = scores.astype(np.float64)
    weights -= np.array(float(top))  # in place: for a whole vocabulary fresh memory costs more than all else
    weights *= inverse_temperature
    return np.exp(weights, weights)


def survivors(
    ranking: Ranking, options: GenerationOptions, inverse_temperature: np.ndarray, total: float
) -> np.ndarray | None:
    """What top_k, top_p and min_p leave: running sums (float64 [n]) of the first n tokens' weights.

    `inverse_temperature`: see weigh(). `total` is the weight of the whole vocabulary, the most likely token
    having 1; top_p needs it where top_k is 0.
    None if the ranking is not long enough to tell; it is if it is complete, or
    - for top_k, if it has so many tokens;
    - for top_p, if their weight reaches top_p of the total, which after top_k is the sum over the k tokens;
    - for min_p, if its last token has less than that.
    A token stays in top_p if those before it hold less than top_p, as in Hugging Face's warper.
    """
    k = options.top_k
    scores = ranking.scores[:k] if k else ranking.scores
    decided = ranking.complete or 0 < k == len(scores)
    weights = weigh(scores, scores[0], inverse_temperature)
    reached = np.add.accumulate(weights)
    if options.top_p < 1:
        if k and not decided:
            return None
        target = options.top_p * (reached.item(-1) if k else total)
        keep = 1 + int(reached.searchsorted(target, side="left"))
        decided |= keep <= len(reached)
        reached = reached[:keep]
    if options.min_p > 0:
        unlikely = np.flatnonzero(weights[: len(reached)] < options.min_p)
        if len(unlikely):
            decided, reached = True, reached[: unlikely[0]]
    return reached if decided else None


def draw(reached: np.ndarray, uniform: float) -> int:
    """The index at which `reached` [n], the running sums of n weights, passes `uniform` times their total.

    `uniform` is in [0, 1); an index without weight is never taken.
    """
    # The largest uniform is 1 - 2**-53: its product with the total, rounded, is still below the total.
    return int(reached.searchsorted(uniform * reached.item(-1), side="right"))


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Log-probabilities (float64, same shape [n]) of the logits `scores` [n]."""
    shifted = scores.astype(np.float64) - scores.max()
    return shifted - np.log(np.exp(shifted).sum())


class Alterations:
    """The tokens whose logits the options change, and how: penalties, bias and the ban on ending early."""

    def __init__(
        self, options: GenerationOptions, prompt: np.ndarray, end_token_ids: frozenset[int], vocab_size: int
    ) -> None:
        self._options = options
        self._slots: dict[int, int] = {}  # where in the arrays below a token is
        self._ids = np.empty(vocab_size, np.int32)
        self._seen = np.zeros(vocab_size, bool)  # in prompt or text
        self._penalties = np.zeros(vocab_size, np.float32)  # presence and frequency
        self._counts: Counter[int] = Counter()  # of tokens in the text
        self._emitted = 0
        self._repeats = options.repetition_penalty != 1
        self._subtracts = options.presence_penalty != 0 or options.frequency_penalty != 0
        self._tracks = self._repeats or self._subtracts  # the tokens of the text
        self._biases = np.array(list(options.logit_bias.values()), np.float32)
        for token in options.logit_bias:  # the first slots
            self._slot(token)
        early = sorted(t for t in end_token_ids if t < vocab_size) if options.min_new_tokens else []
        self._banned_at_first = np.array([self._slot(token) for token in early], np.intp)
        if self._repeats:
            for token in np.unique(prompt).tolist():
                self._seen[self._slot(token)] = True

    @property
    def are_possible(self) -> bool:
        """Whether a logit is or can come to be altered."""
        return self._tracks or len(self._slots) > 0

    @property
    def ids(self) -> np.ndarray:
        """The tokens (int32 [n], distinct); only the text's newest token is ever added, at the end."""
        return self._ids[: len(self._slots)]

    def would_add(self, token: int) -> bool:
        """Whether `token`, as the text's next one, would be new to `ids`."""
        return self._tracks and token not in self._slots

    def apply(self, logits: np.ndarray) -> np.ndarray:
        """The scores (float32 [n]) of the tokens `ids` [n], given their logits."""
        scores, count = logits, len(logits)
        if self._repeats:
            penalty = np.float32(self._options.repetition_penalty)
            penalised = np.where(scores < 0, scores * penalty, scores / penalty)
            scores = np.where(self._seen[:count], penalised, scores)
        if self._subtracts:
            scores = scores - self._penalties[:count]
        if len(self._biases) or len(self._banned_at_first):
            scores = scores.copy()
            scores[: len(self._biases)] += self._biases
            if self._emitted < self._options.min_new_tokens:
                scores[self._banned_at_first] = -np.inf
        return scores

    def note(self, token: int) -> bool:
        """The text has got one more token; returns whether it is new to `ids`."""
        self._emitted += 1
        if not self._tracks:
            return False
        known = len(self._slots)
        slot = self._slot(token)
        self._seen[slot] = True
        self._counts[token] += 1
        options, count = self._options, self._counts[token]
        self._penalties[slot] = options.presence_penalty + options.frequency_penalty * count
        return slot == known

    def _slot(self, token: int) -> int:
        """The place of `token`, a new one at the end if it has none."""
        slot = self._slots.setdefault(token, len(self._slots))
        self._ids[slot] = token
        return slot


class Sampler:
    """Picks the tokens of one text: `queries` before each pass, `sample` after it for each row that counts.

    `draws` tells before a pass how its token and the next are going to be picked.

    The exact candidates of a pass suffice for greedy decoding, and for top_k, top_p and min_p as `survivors`
    says. All logits are fetched if they do not, for a temperature without truncation unless the candidates
    are complete, if logprobs are asked for, and if more than MAX_QUERIED tokens are altered. In the last case
    nothing is queried, and top_p's total is the float64 sum over all weights in ascending order of id;
    else it is always the decoder's total plus the float64 sum over the queried tokens in their order.
    """

    def __init__(
        self, options: GenerationOptions, prompt: np.ndarray, eos_token_ids: tuple[int, ...], vocab_size: int
    ) -> None:
        """`prompt` [n] are the token ids that the repetition penalty counts too."""
        self.seed = draw_seed() if options.seed is None else options.seed
        eos = () if options.ignore_eos else eos_token_ids
        self.end_token_ids = frozenset((*eos, *options.stop_token_ids))
        if options.top_k >= vocab_size:
            options = dataclasses.replace(options, top_k=0)
        self._options = options
        self._random = np.random.Generator(np.random.PCG64(self.seed))
        self._uniforms: deque[float] = deque()  # of the next tokens, as far as they were looked at
        self._alterations = Alterations(options, prompt, self.end_token_ids, vocab_size)
        self._inverse_temperature = np.float32(1)
        if options.temperature > 0:
            # So large that it is as good as greedy, and still a float32 when it is multiplied by log2 e.
            self._inverse_temperature = np.float32(min(1 / options.temperature, MAX_INVERSE_TEMPERATURE))
        self._scale = np.array(float(self._inverse_temperature))  # for weigh()
        self._truncates = options.top_k > 0 or options.top_p < 1 or options.min_p > 0
        self._needs_total = options.top_k == 0 and options.top_p < 1
        self._update_query()

    def query(self) -> Query:
        """What the next pass is to say of its logits."""
        return self._query

    def draws(self) -> tuple[Draw, Draw] | None:
        """How the next two tokens are going to be drawn; None if that takes more than exact candidates.

        A hint to decoders: a token is what `sample` says, whose sums are rounded in another way. Their random
        numbers leave the generator here, and are kept until `sample` gets there.
        """
        options, ends = self._options, tuple(self.end_token_ids)
        is_greedy = options.temperature == 0
        if self._alterations.are_possible or not (is_greedy or self._truncates):
            return None
        if is_greedy:
            return (Draw(0.0, 1.0, 0.0, 1, ends),) * 2
        while len(self._uniforms) < 2:
            self._uniforms.append(self._random.random())
        first, second = self._uniforms
        how = options.top_p, options.min_p, options.top_k, ends
        return Draw(first, *how), Draw(second, *how)

    def queries(self, drafts: Sequence[int]) -> tuple[Query, ...]:
        """What a pass of the newest token and of `drafts` [n] is to say: n + 1 queries, one per row.

        Each is what `query` will be once the drafts before it have become text. Nothing is drawn or noted: if
        they do become text, `sample` takes the rows one after the other; the rest is as if never asked.
        """
        queries, ids = [self._query], self._alterations.ids
        known = len(ids)
        for draft in drafts:
            if self._alterations.would_add(draft) and draft not in ids[known:]:
                ids = np.append(ids, np.int32(draft))  # not in place: another token may come instead
                queries.append(self._make_query(ids))
            else:
                queries.append(queries[-1])
        return tuple(queries)

    def sample(self, candidates: Candidates) -> tuple[int, TokenLogprobs | None]:
        """The next token from what a pass said to `query`, with its logprobs if asked for.

        Raises GenerationError if bias and bans leave no token.
        """
        uniform = self._uniforms.popleft() if self._uniforms else self._random.random()
        altered = token = scores = None
        if not self._is_overfull:
            altered = self._alterations.apply(candidates.queried)
            token = self._from_candidates(candidates, altered, uniform)
        if token is None or self._options.logprobs is not None:
            scores = self.processed(candidates.fetch())
        if token is None:
            token = self._from_scores(scores, candidates, altered, uniform)
        if self._alterations.note(token):
            self._update_query()
        return token, self._logprobs(scores, token)

    def processed(self, logits: np.ndarray) -> np.ndarray:
        """The scores (float32 [vocab_size], a copy) of `logits` [vocab_size]."""
        scores, ids = logits.astype(np.float32), self._alterations.ids
        scores[ids] = self._alterations.apply(scores[ids])
        return scores

    def _update_query(self) -> None:
        ids = self._alterations.ids
        self._is_overfull = len(ids) > MAX_QUERIED
        self._query = self._make_query(ids)

    def _make_query(self, ids: np.ndarray) -> Query:
        return Query(ids[:0] if len(ids) > MAX_QUERIED else ids, self._inverse_temperature)

    def _from_candidates(self, candidates: Candidates, altered: np.ndarray, uniform: float) -> int | None:
        """The token, given the scores `altered` [n] of what was queried; None if they don't decide."""
        options, ids = self._options, self._query.token_ids
        if options.temperature == 0:
            ranking = rank(candidates, ids, altered, 1)
            _require_choice(ranking.scores[0])
            return int(ranking.ids[0])
        if not self._truncates:
            return self._from_all(candidates, altered, uniform) if candidates.complete else None
        count = options.top_k or _FIRST_RANKED
        while True:
            ranking = rank(candidates, ids, altered, count)
            _require_choice(ranking.scores[0])
            total = self._total(candidates, altered, ranking.scores[0]) if self._needs_total else 0.0
            token = self._pick(ranking, total, uniform)
            if token is not None or count >= len(candidates.ids):
                return token
            count *= 8

    def _from_scores(
        self, scores: np.ndarray, candidates: Candidates, altered: np.ndarray | None, uniform: float
    ) -> int:
        """The token, given all `scores` [vocab_size]; `altered` is None if nothing was queried."""
        top = scores.max()
        _require_choice(top)
        if self._options.temperature == 0:
            return int(scores.argmax())
        if not self._truncates:
            return self._draw_any(scores, top, uniform)
        total = 0.0
        if self._needs_total and altered is None:
            total = float(weigh(scores, top, self._scale).sum())
        elif self._needs_total:
            total = self._total(candidates, altered, top)
        count, token = self._options.top_k or _FIRST_RANKED, None
        while token is None:
            ids = largest(scores, count)
            token = self._pick(Ranking(ids, scores[ids], len(ids) == len(scores)), total, uniform)
            count *= 8
        return token

    def _pick(self, ranking: Ranking, total: float, uniform: float) -> int | None:
        """The token drawn from the survivors; None if the ranking is not long enough."""
        reached = survivors(ranking, self._options, self._scale, total)
        return None if reached is None else int(ranking.ids[draw(reached, uniform)])

    def _from_all(self, candidates: Candidates, altered: np.ndarray, uniform: float) -> int:
        """The token drawn from the whole vocabulary, which the candidates and what was queried make up."""
        scores = np.empty(len(candidates.ids) + len(altered), np.float32)
        scores[candidates.ids], scores[self._query.token_ids] = candidates.logits, altered
        top = scores.max()
        _require_choice(top)
        return self._draw_any(scores, top, uniform)

    def _draw_any(self, scores: np.ndarray, top: np.float32, uniform: float) -> int:
        """The token drawn from all of `scores` [vocab_size], the highest of which is `top`."""
        return draw(np.add.accumulate(weigh(scores, top, self._scale)), uniform)

    def _total(self, candidates: Candidates, altered: np.ndarray, top: np.float32) -> float:
        """The weight of the whole vocabulary: of the others as the decoder says, and of `altered`."""
        total = float(weigh(altered, top, self._scale).sum())
        if len(candidates.logits):
            total += candidates.total * float(weigh(candidates.logits[:1], top, self._scale)[0])
        return total

    def _logprobs(self, scores: np.ndarray | None, token: int) -> TokenLogprobs | None:
        if self._options.logprobs is None or scores is None:
            return None
        logprobs = log_softmax(scores)
        top = largest(scores, self._options.logprobs)
        return TokenLogprobs(token, float(logprobs[token]), {int(i): float(logprobs[i]) for i in top})


def _require_choice(top: np.float32) -> None:
    """Raise GenerationError if the highest score is that of a banned token."""
    if top == -np.inf:
        raise GenerationError("logit_bias and min_new_tokens leave no token to choose")
