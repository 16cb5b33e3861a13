"""Stop strings: where an answer's text ends, found while the text still comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence

from specqd.errors import InputError

__all__ = ["StopStrings"]


class StopStrings:
    """Lets text through up to the stop string that is complete first; of those that end together, the longest.

    Text that may be the beginning of a stop string is held back, so what was let through is never taken back, and
    does not depend on how the text was cut into pieces.

    Raises:
        InputError: a stop string is empty or no string, or there is one string instead of a list.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        if isinstance(stop, str):
            raise InputError(f"stop strings are a list: give [{stop!r}], not {stop!r}")
        for one in stop:
            if not isinstance(one, str) or not one:
                raise InputError(f"cannot stop at {one!r}: give strings of at least one character")
        self._stop = tuple(stop)
        self._held = ""
        self.met = False

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._stop)

    def add(self, piece: str) -> str:
        """Take a piece of text; return what is now certain to come before any stop string."""
        if self.met:
            return ""
        text = self._held + piece
        found = [(at + len(one), at) for one in self._stop if (at := text.find(one)) >= 0]
        if found:
            self.met, self._held = True, ""
            return text[: min(found)[1]]
        held = max((_begun(text, one) for one in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """Return what is still held back: no more text comes."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` begin `stop`, at most all but its last."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
