"""The draft length that pays: draft on while the next token's expected gain is above its cost, both as measured."""

from __future__ import annotations

import math

__all__ = ["CostAwareLength", "PassCost"]


class PassCost:
    """Seconds of a pass as a line over its rows, fitted by least squares to recent passes, old ones fading."""

    _MEMORY = 0.97  # weight of a pass after each further one
    _FLATTEST, _USUAL, _STEEPEST = 0.005, 0.04, 1.0  # bounds of a row's cost over that of a pass of one row

    def __init__(self) -> None:
        self._sums = [0.0] * 5  # of 1, rows, seconds, rows^2, rows * seconds

    def learn(self, rows: int, seconds: float) -> None:
        """Take a pass; one that took far longer than expected was interrupted, and is not believed."""
        if self._sums[0] > 4:
            seconds = min(seconds, 1.5 * self.of(rows))
        terms = (1, rows, seconds, rows * rows, rows * seconds)
        self._sums = [self._MEMORY * past + term for past, term in zip(self._sums, terms, strict=True)]

    @property
    def row(self) -> float:
        """Seconds that one row more costs."""
        rows, seconds, rows2, product = self._means()
        spread = rows2 - rows**2

        def of_first(share: float) -> float:
            """The slope that is this share of the line's value at one row."""
            return seconds * share / (1 + share * (rows - 1))

        if spread < 0.1:
            return of_first(self._USUAL)
        slope = (product - rows * seconds) / spread
        return min(max(slope, of_first(self._FLATTEST)), of_first(self._STEEPEST))

    def of(self, rows: int) -> float:
        """Seconds of a pass of so many rows; infinite before the first pass."""
        if not self._sums[0]:
            return math.inf
        mean_rows, seconds, *_ = self._means()
        return seconds + self.row * (rows - mean_rows)

    def _means(self) -> list[float]:
        return [total / self._sums[0] for total in self._sums[1:]]


class CostAwareLength:
    """Goes on drafting while the next token's expected gain is above its cost, from recent measurements.

    The next token is of use if all drafts up to it are right. With S the probability that those so far are and a
    the acceptance rate, it then saves what a token takes on the whole, `pace` seconds (the rule of the marginal
    value: Charnov 1976). It costs a draft step and a row of the verify pass. S is a product over the drafted tokens;
    how often a token is right follows from how probable the draft held it, by what became of such tokens before.
    """

    _MEMORY = 0.98  # weight of a token's outcome after each further one of its kind
    _KINDS = 10  # of tokens, by their probability in the draft
    _UNKNOWN = _KINDS  # the kind of a token that came without a probability
    _IDLE, _TRIALS = 24, 3  # rounds without a draft before so many rounds with one

    def __init__(self, most: int) -> None:
        self._most = most
        # Begin with the belief that a draft is right somewhat more often than it thinks.
        self._right = [0.6 + 1.4 * (kind + 0.5) / self._KINDS for kind in range(self._KINDS)] + [1.5]
        self._seen = [2.0] * (self._KINDS + 1)
        self._all_right, self._all_seen = 3.0, 4.0
        self._step = math.nan
        self._verify = PassCost()
        self._pace = math.inf
        self._kinds: list[int] = []
        self._survival = 1.0
        self._idle = 0

    def choose(self, pace: float) -> int:
        """Return the most tokens to draft next, 0 if not even the first would pay."""
        self._kinds, self._survival, self._pace = [], 1.0, pace
        if self._pays() or self._idle >= self._IDLE:
            return self._most
        return 0

    def goes_on(self, drafted: int, probability: float, entropy: float) -> bool:
        """Say whether the token after the `drafted` ones is worth its cost."""
        while len(self._kinds) < drafted:
            known = len(self._kinds) == drafted - 1 and not math.isnan(probability)
            kind = min(int(probability * self._KINDS), self._KINDS - 1) if known else self._UNKNOWN
            self._kinds.append(kind)
            self._survival *= self._right[kind] / self._seen[kind]
        return self._pays()

    def learn(self, drafted: int, agreed: int, draft_seconds: float, verify_seconds: float) -> None:
        """Take the outcome of a round: the first `agreed` of `drafted` tokens were right."""
        self._verify.learn(drafted + 1, verify_seconds)
        if not drafted:
            self._idle += 1
            return
        trying = self._IDLE <= self._idle < self._IDLE + self._TRIALS - 1
        self._idle = self._idle + 1 if trying else 0
        step = draft_seconds / drafted
        self._step = (
            step if math.isnan(self._step) else self._step + 0.1 * (min(step, 3 * self._step) - self._step)
        )
        kinds = self._kinds + [self._UNKNOWN] * (drafted - len(self._kinds))
        for place in range(min(agreed + 1, drafted)):
            kind, right = kinds[place], place < agreed
            self._right[kind] = self._MEMORY * self._right[kind] + right
            self._seen[kind] = self._MEMORY * self._seen[kind] + 1
            self._all_right = self._MEMORY * self._all_right + right
            self._all_seen = self._MEMORY * self._all_seen + 1

    def _pays(self) -> bool:
        """Whether one token more gains more than it costs; before anything is measured, whether it is likely right."""
        likely = self._survival * self._all_right / self._all_seen
        if math.isnan(self._step):
            return likely > 0.5
        pace = min(self._pace, self._verify.of(1))
        return likely * pace > self._step + self._verify.row
