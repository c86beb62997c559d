"""Drafts without a second model: what followed the last time that the text ended as it does now.

Texts that repeat their prompt, such as summaries, edits and code, are guessed well; a pass then checks
several tokens at once. Where guesses fail they become shorter and rarer.
"""

from __future__ import annotations

from collections.abc import Iterable

SIZES = (3, 2)  # of the n-grams that are looked up, the longest first
MAX_PAUSE = 64  # passes without a draft after many that failed


class PromptLookup:
    """Proposes tokens that may follow a text, which it is told token by token."""

    def __init__(self, tokens: Iterable[int], most: int) -> None:
        """`tokens`: the prompt; `most`: no draft is longer."""
        self._most = self._length = most
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # where the latest occurrence of an n-gram ends
        self._found = 0  # where an earlier occurrence of the text's end ends; 0: there is none
        self._failures = self._pause = 0
        for token in tokens:
            self.note(token)

    def note(self, token: int) -> None:
        """The text has got one more token."""
        self._tokens.append(token)
        end, self._found = len(self._tokens), 0
        for size in SIZES:
            if size <= end:
                ngram = tuple(self._tokens[-size:])
                if not self._found:
                    self._found = self._after.get(ngram, 0)
                self._after[ngram] = end

    def propose(self, most: int) -> list[int]:
        """At most `most` tokens that may come next, often none; to be asked once per pass."""
        if self._pause:
            self._pause -= 1
            return []
        if not self._found:
            return []
        draft, known = [], len(self._tokens)
        for at in range(self._found, self._found + min(most, self._length)):
            # What repeats itself goes on to do so: beyond its end the text continues with the draft.
            draft.append(self._tokens[at] if at < known else draft[at - known])
        return draft

    def judge(self, proposed: int, accepted: int) -> None:
        """So many tokens of the last draft have come true: adapt the length of the next ones to that."""
        if accepted:
            self._failures = 0
            if accepted < proposed:
                self._length = accepted
            else:  # it may have been short for want of room
                self._length = max(self._length, min(self._most, 2 * accepted))
        else:
            self._failures += 1
            self._length = max(1, self._length // 2)
            self._pause = min(MAX_PAUSE, 2**self._failures - 2)
