"""How many tokens to draft before the level above checks them."""

from __future__ import annotations

import math
from typing import Protocol

from specqd.errors import InputError
from specqd.runtime.cost_aware import CostAwareLength

__all__ = ["ConfidentLength", "DraftLength", "EntropyLength", "FixedLength", "HeuristicLength", "length_rule"]

_MOST = 15  # tokens asked for unless a rule says fewer: a verify pass of sixteen rows


class DraftLength(Protocol):
    """Decides the draft length of each round from what earlier rounds showed."""

    def choose(self, pace: float) -> int:
        """Return how many tokens to draft next at most; 0: let the level above go on alone.

        `pace`: seconds that a token of the level above took lately, infinite if that is not known.
        """
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

    def share(self) -> DraftLength:
        """Return the rule for another sequence, whose rounds may come in between: what one learns, the other knows."""
        ...


class FixedLength:
    """Always the same length."""

    def __init__(self, length: int) -> None:
        self._length = length

    def choose(self, pace: float) -> int:
        """Return the length."""
        return self._length

    def goes_on(self, drafted: int, probability: float, entropy: float) -> bool:
        """Go on until the length is reached."""
        return True

    def learn(self, drafted: int, agreed: int, draft_seconds: float, verify_seconds: float) -> None:
        """Learn nothing."""

    def share(self) -> FixedLength:
        """Return itself: a round leaves nothing behind until it is learned from."""
        return self


class ConfidentLength(FixedLength):
    """As long as the draft is sure of its last token, up to a length (Hugging Face's assisted generation)."""

    def __init__(self, threshold: float, most: int) -> None:
        super().__init__(most)
        self._threshold = threshold

    def goes_on(self, drafted: int, probability: float, entropy: float) -> bool:
        """Stop when the last choice's probability is below the threshold."""
        return not probability < self._threshold


class EntropyLength(FixedLength):
    """As long as the draft's entropy promises acceptance (AdaEDL, arXiv 2410.18351).

    A token is accepted with a probability of at least 1 - sqrt(0.2 H), H the entropy in nats of the draft's
    distribution. Drafting stops when that falls below a threshold, which moves so that a share of 0.9 is accepted.
    """

    _WANTED, _STEP, _MEMORY = 0.9, 0.01, 0.5

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self._threshold, self._accepted = 0.4, self._WANTED

    def goes_on(self, drafted: int, probability: float, entropy: float) -> bool:
        """Stop when the bound is below the threshold."""
        return not 1 - math.sqrt(0.2 * entropy) < self._threshold

    def learn(self, drafted: int, agreed: int, draft_seconds: float, verify_seconds: float) -> None:
        """Ask for more certainty if fewer than wanted are accepted, for less if more are."""
        if drafted:
            self._accepted += (1 - self._MEMORY) * (agreed / drafted - self._accepted)
            self._threshold += math.copysign(self._STEP, self._WANTED - self._accepted)
            self._threshold = min(max(self._threshold, 0.0), 1.0)


class HeuristicLength(FixedLength):
    """Two more after a round in which all were right, else one fewer (Hugging Face's and OpenVINO's heuristic)."""

    def __init__(self, start: int, most: int) -> None:
        super().__init__(start)
        self._most = most

    def learn(self, drafted: int, agreed: int, draft_seconds: float, verify_seconds: float) -> None:
        """Lengthen or shorten; a round cut short by the end of the text says nothing."""
        if agreed < drafted:
            self._length = max(1, self._length - 1)
        elif drafted >= self._length:
            self._length = min(self._length + 2, self._most)


def length_rule(text: str) -> DraftLength:
    """Make the rule that a text names.

    `fixed:N`; `confidence:P` (stop below the probability P); `entropy`; `heuristic:N` (its start); `adaptive`, the
    cost-aware rule. `rule/M` asks for at most M tokens.

    Raises:
        InputError: it names none, or its number is out of range.
    """
    rule, slash, most_text = text.partition("/")
    kind, _, number = rule.partition(":")
    most = int(most_text) if most_text.isdecimal() else 0 if slash else _MOST
    count = int(number) if number.isdecimal() else 0
    if most > 0:
        if kind == "fixed" and count and not slash:
            return FixedLength(count)
        if kind == "heuristic" and count:
            return HeuristicLength(min(count, most), most)
        if kind == "confidence" and number.replace(".", "", 1).isdecimal() and 0 < float(number) < 1:
            return ConfidentLength(float(number), most)
        if rule == "entropy":
            return EntropyLength(most)
        if rule == "adaptive":
            return CostAwareLength(most)
    raise InputError(
        f"there is no draft-length rule {text!r}; write fixed:N with N of 1 or more, confidence:P with P between 0 "
        "and 1, entropy, heuristic:N or adaptive, all but the first with /M for at most M tokens"
    )
