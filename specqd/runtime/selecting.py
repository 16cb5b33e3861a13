"""When positions are selected: at lengths of the text that do not depend on how it is decoded."""

from __future__ import annotations

from dataclasses import dataclass, field

from specqd.manifest import LONGEST_PASS, Selection

__all__ = ["Schedule"]


@dataclass
class Schedule:
    """Of one text: `due`, the number of positions in the cache at which the next selection is made.

    The selection's last position is fed by an observer, which looks at the `window` last ones. `dropped` positions are
    not in the cache any more, which has `slots`; all of them are, if the selection is a draft's.
    """

    selection: Selection
    slots: int
    drops: bool
    due: int = field(init=False)
    dropped: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        """Let the first selection come when there is enough to select from, or no room for more."""
        self.due = max(self.selection.tokens + self.selection.every, self.selection.above + 1)
        if self.drops:
            self.due = min(self.due, self.slots)

    def begin(self, length: int) -> None:
        """Say that a prompt has `length` positions.

        It is selected from as soon as it is fed, if it is long, or on the way where the cache is full.
        """
        if self.drops and length - self.dropped > self.slots:
            self.due = self.dropped + self.slots
        elif length - self.dropped > self.selection.above:
            self.due = length

    def rows(self, fed: int, length: int) -> int:
        """Return most rows of a pass from position `fed` of a text, which has `length` positions.

        Where the target selects, the text must end as it would without drafts. A draft is selected for in the first
        pass that is due, whatever it checks.
        """
        if self.drops:
            return self.due - 1 - fed
        return self.selection.window if self.due <= length else LONGEST_PASS

    def done(self) -> None:
        """Say that the selection was made; the next is due `every` positions later."""
        if self.drops:
            self.dropped = self.due - min(self.selection.tokens, self.due - self.dropped)
        self.due += self.selection.every
