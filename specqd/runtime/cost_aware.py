"""The draft length that pays: draft on while the next token's expected gain is above its cost, both as measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

__all__ = ["CostAwareLength", "PassCost"]


class PassCost:
    """Seconds of a pass as a line over its rows, fitted by least squares to recent passes, old ones fading.

    `row`: seconds that one row more costs, infinite before the first pass.
    """

    _MEMORY = 0.97  # weight of a pass after each further one
    _FLATTEST, _USUAL, _STEEPEST = 0.005, 0.04, 1.0  # bounds of a row's cost over that of a pass of one row

    def __init__(self) -> None:
        self._sums = [0.0] * 5  # of 1, rows, seconds, rows^2, rows * seconds
        self._rows, self._seconds = 0.0, math.inf  # means
        self.row = math.inf

    def learn(self, rows: int, seconds: float) -> None:
        """Take a pass; one that took far longer than expected was interrupted, and is not believed."""
        if self._sums[0] > 4:
            seconds = min(seconds, 1.5 * self.of(rows))
        terms = (1, rows, seconds, rows * rows, rows * seconds)
        self._sums = [self._MEMORY * past + term for past, term in zip(self._sums, terms, strict=True)]
        self._fit()

    def of(self, rows: int) -> float:
        """Seconds of a pass of so many rows; infinite before the first pass."""
        return self._seconds + self.row * (rows - self._rows) if self._sums[0] else math.inf

    def _fit(self) -> None:
        count, *sums = self._sums
        rows, seconds, rows2, product = (total / count for total in sums)
        spread = rows2 - rows**2

        def of_first(share: float) -> float:
            """The slope that is this share of the line's value at one row."""
            return seconds * share / (1 + share * (rows - 1))

        self._rows, self._seconds, self.row = rows, seconds, of_first(self._USUAL)
        if spread >= 0.1:
            slope = (product - rows * seconds) / spread
            self.row = min(max(slope, of_first(self._FLATTEST)), of_first(self._STEEPEST))


class CostAwareLength:
    """Goes on drafting while the next token's expected gain is above its cost, from recent measurements.

    The next token is of use if all drafts up to it are right. With S the probability that those so far are and a
    the acceptance rate, it then saves what a token takes on the whole, `pace` seconds (the rule of the marginal
    value: Charnov 1976). It costs a draft step and a row of the verify pass. S is a product over the drafted tokens;
    how often a token is right follows from how probable the draft held it, by what became of such tokens before.
    """

    _IDLE, _TRIALS = 24, 3  # rounds without a draft before so many rounds with one

    def __init__(self, most: int) -> None:
        self._most = most
        self._known = _Known()
        self._pace = math.inf
        self._kinds: list[int] = []
        self._survival = 1.0

    def share(self) -> CostAwareLength:
        """Return the rule for another sequence, which has rounds of its own and knows what this one does."""
        other = CostAwareLength(self._most)
        other._known = self._known
        return other

    def choose(self, pace: float) -> int:
        """Return the most tokens to draft next, 0 if not even the first would pay."""
        self._kinds, self._survival, self._pace = [], 1.0, pace
        return self._most if self._pays() or self._known.idle >= self._IDLE else 0

    def goes_on(self, drafted: int, probability: float, entropy: float) -> bool:
        """Say whether the token after the `drafted` ones is worth its cost."""
        while len(self._kinds) < drafted:
            self._kinds.append(_kind(probability if len(self._kinds) == drafted - 1 else math.nan))
            self._survival *= self._known.chance(self._kinds[-1])
        return self._pays()

    def learn(self, drafted: int, agreed: int, draft_seconds: float, verify_seconds: float) -> None:
        """Take the outcome of a round: the first `agreed` of `drafted` tokens were right."""
        known = self._known
        known.verify.learn(drafted + 1, verify_seconds)
        if not drafted:
            known.idle += 1
            return
        trying = self._IDLE <= known.idle < self._IDLE + self._TRIALS - 1
        known.idle = known.idle + 1 if trying else 0
        known.learn_step(draft_seconds / drafted)
        kinds = self._kinds + [_UNKNOWN] * (drafted - len(self._kinds))
        for place in range(min(agreed + 1, drafted)):
            known.learn_outcome(kinds[place], place < agreed)

    def _pays(self) -> bool:
        """Whether one token more gains more than it costs; before anything is measured, whether it is likely right."""
        known = self._known
        likely = self._survival * known.all_right / known.all_seen
        if math.isnan(known.step):
            return likely > 0.5
        return likely * min(self._pace, known.verify.of(1)) > known.step + known.verify.row


_KINDS = 10  # of tokens, by their probability in the draft
_UNKNOWN = _KINDS  # the kind of a token that came without a probability


def _kind(probability: float) -> int:
    return _UNKNOWN if math.isnan(probability) else min(int(probability * _KINDS), _KINDS - 1)


@dataclass
class _Known:
    """What rounds have shown: how often tokens of each kind are right, and what passes cost."""

    _MEMORY: ClassVar[float] = 0.98  # weight of a token's outcome after each further one of its kind

    # Begin with the belief that a draft is right somewhat more often than it thinks.
    right: list[float] = field(
        default_factory=lambda: [*(0.6 + 1.4 * (kind + 0.5) / _KINDS for kind in range(_KINDS)), 1.5]
    )
    seen: list[float] = field(default_factory=lambda: [2.0] * (_KINDS + 1))
    all_right: float = 3.0
    all_seen: float = 4.0
    step: float = math.nan
    verify: PassCost = field(default_factory=PassCost)
    idle: int = 0

    def chance(self, kind: int) -> float:
        """Share of the tokens of a kind that were right."""
        return self.right[kind] / self.seen[kind]

    def learn_step(self, seconds: float) -> None:
        """Take what a drafted token cost; an interrupted one is not believed."""
        if math.isnan(self.step):
            self.step = seconds
        self.step += 0.1 * (min(seconds, 3 * self.step) - self.step)

    def learn_outcome(self, kind: int, right: bool) -> None:
        """Take whether a token that was decided on was right."""
        self.right[kind] = self._MEMORY * self.right[kind] + right
        self.seen[kind] = self._MEMORY * self.seen[kind] + 1
        self.all_right = self._MEMORY * self.all_right + right
        self.all_seen = self._MEMORY * self.all_seen + 1
