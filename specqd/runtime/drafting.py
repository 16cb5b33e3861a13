"""How many tokens to draft before the level above checks them."""

from __future__ import annotations

import statistics
from collections import deque
from typing import Protocol

from specqd.errors import InputError

__all__ = ["AdaptiveLength", "ConfidentLength", "DraftLength", "FixedLength", "length_rule"]

_MOST = 7  # tokens an adaptive rule asks for: a verify pass of eight rows
_USUAL = 3


class DraftLength(Protocol):
    """Decides the draft length of each round from what earlier rounds showed."""

    def choose(self) -> int:
        """Return how many tokens to draft next; 0: let the target go on alone."""
        ...

    def goes_on(self, drafted: int, probability: float, entropy: float) -> bool:
        """Say whether to draft more after `drafted` tokens.

        `probability` is that of the draft's last greedy choice and `entropy` (nats) that of its distribution; both
        are NaN for a draft that does not know them.
        """
        ...

    def learn(self, drafted: int, agreed: int, draft_seconds: float, verify_seconds: float) -> None:
        """Take the outcome of a round: the first `agreed` of `drafted` tokens were right."""
        ...


class FixedLength:
    """Always the same length."""

    def __init__(self, length: int) -> None:
        self._length = length

    def choose(self) -> int:
        """Return the length."""
        return self._length

    def goes_on(self, drafted: int, probability: float, entropy: float) -> bool:
        """Go on until the length is reached."""
        return True

    def learn(self, drafted: int, agreed: int, draft_seconds: float, verify_seconds: float) -> None:
        """Learn nothing."""


class ConfidentLength(FixedLength):
    """As long as the draft is sure of its last token, up to a length (Hugging Face's assisted generation)."""

    def __init__(self, threshold: float, most: int) -> None:
        super().__init__(most)
        self._threshold = threshold

    def goes_on(self, drafted: int, probability: float, entropy: float) -> bool:
        """Stop when the last choice's probability is below the threshold."""
        return not probability < self._threshold


class AdaptiveLength:
    """The length with the most tokens a second by what was measured lately, 0 (no draft) included.

    With acceptance rate a, drafting g tokens gives E = 1 + a + ... + a^g tokens (Leviathan et al. 2023) for g
    draft steps and one verify pass of g + 1 rows. Costs are medians of recent rounds. For a row count not seen
    lately the least it can cost is taken, so that whatever may be better is tried, once.
    """

    _MEMORY = 0.97  # weight of a round's acceptance after each further round
    _BETTER = 1.03  # another length must promise this much more, lest noise decide
    _RENEW = 24  # rounds between looks at something known for long: a row count, or the draft if it is unused

    def __init__(self, start: int, most: int) -> None:
        self._length = min(start, most)
        self._most = most
        self._agreed, self._examined = 3.0, 4.0  # begin with the belief that 3 of 4 are right
        self._draft: deque[float] = deque(maxlen=7)
        self._verify: dict[int, deque[float]] = {}  # by rows, the one measured longest ago first
        self._rounds = 0

    def choose(self) -> int:
        """Return how many tokens to draft next; 0: let the target go on alone."""
        if not self._draft:
            return max(1, self._length)
        renew = self._rounds % self._RENEW == self._RENEW - 1
        if renew and self._length == 0:
            return 1
        if renew and len(self._verify) > 1:
            del self._verify[next(iter(self._verify))]
        rates = [self._rate(length) for length in range(self._most + 1)]
        if max(rates) > self._BETTER * rates[self._length]:
            self._length = rates.index(max(rates))
        return self._length

    def goes_on(self, drafted: int, probability: float, entropy: float) -> bool:
        """Go on until the length is reached."""
        return True

    def learn(self, drafted: int, agreed: int, draft_seconds: float, verify_seconds: float) -> None:
        """Take the outcome of a round: the first `agreed` of `drafted` tokens were right."""
        self._rounds += 1
        known = self._verify.pop(drafted + 1, deque(maxlen=7))
        self._verify[drafted + 1] = known
        known.append(verify_seconds)
        if drafted:
            self._draft.append(draft_seconds / drafted)
            self._agreed = self._MEMORY * self._agreed + agreed
            self._examined = self._MEMORY * self._examined + min(agreed + 1, drafted)

    def _rate(self, length: int) -> float:
        """Tokens a second that a round of this length promises."""
        acceptance = self._agreed / self._examined
        tokens = sum(acceptance**i for i in range(length + 1))
        return tokens / (length * statistics.median(self._draft) + self._pass_seconds(length + 1))

    def _pass_seconds(self, rows: int) -> float:
        """Time of a verify pass, or the least it can be: fewer rows save their share, more cost nothing."""
        if rows in self._verify:
            return statistics.median(self._verify[rows])
        near = min(self._verify, key=lambda seen: abs(seen - rows))
        return statistics.median(self._verify[near]) * min(1.0, rows / near)


def length_rule(text: str) -> DraftLength:
    """Make the rule that `fixed:N`, `confidence:P` (a probability), `adaptive` or `adaptive:N` (its start) names.

    Raises:
        InputError: it names none, or its number is out of range.
    """
    kind, colon, number = text.partition(":")
    if kind == "adaptive" and not colon:
        return AdaptiveLength(_USUAL, _MOST)
    if kind in {"adaptive", "fixed"} and number.isdecimal() and int(number) > 0:
        return FixedLength(int(number)) if kind == "fixed" else AdaptiveLength(int(number), _MOST)
    if kind == "confidence" and number.replace(".", "", 1).isdecimal() and 0 < float(number) < 1:
        return ConfidentLength(float(number), _MOST)
    raise InputError(
        f"there is no draft-length rule {text!r}; write fixed:N with N of 1 or more, confidence:P with P between 0 "
        "and 1, adaptive, or adaptive:N"
    )
