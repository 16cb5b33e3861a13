"""How large a compressed cache may be, as a text: `tokens=512`, `mb=20` or `ratio=0.75`."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from specqd.errors import InputError

__all__ = ["Budget"]


@dataclass(frozen=True)
class Budget:
    """A size of a cache.

    Attributes:
        unit: `tokens` a layer on average, `mb` (10^6 bytes) of all layers, or `ratio`: the share of tokens that goes.
        amount: how many, exactly as written.
    """

    unit: Literal["tokens", "mb", "ratio"]
    amount: Fraction

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read `unit=amount`.

        Raises:
            InputError: it is none, or its amount is out of range.
        """
        unit, _, number = text.partition("=")
        try:
            amount = Fraction(number)
        except (ValueError, ZeroDivisionError):
            amount = Fraction(-1)
        if unit == "tokens" and amount > 0 and amount.denominator == 1:
            return cls("tokens", amount)
        if unit == "mb" and amount > 0:
            return cls("mb", amount)
        if unit == "ratio" and 0 <= amount < 1:
            return cls("ratio", amount)
        raise InputError(
            f"{text!r} is no budget of a cache; write tokens=N (a layer), mb=X (all layers), or ratio=R, the share of "
            "the tokens that is removed, from 0 to below 1 (4 times smaller is ratio=0.75)"
        )

    def tokens(self, length: int, bytes_a_token: float) -> int:
        """Return how many of `length` tokens a layer keeps, if a token takes `bytes_a_token` in all layers together."""
        if self.unit == "tokens":
            return min(int(self.amount), length)
        if self.unit == "mb":
            return min(int(self.amount * 10**6 / Fraction(bytes_a_token)), length)
        return int(length * (1 - self.amount))
