"""The plan of a speculation: which levels draft for which, and how many tokens, as text that round-trips.

    target <- suffix:4@adaptive | draft@adaptive <- suffix:3@fixed:4

Read from the left, each level is drafted for by the next. `a | b` asks `b` only when `a` proposes nothing; levels
further right draft for the last compiled alternative. A level is an entry of the artifact, or `suffix:N`, which
looks the text up for where its last N tokens or more occurred before; `draft:whole` attends to the whole cache though
the artifact selects positions for it (passes/kv/select.py). `@rule` says how many tokens it is asked for (see
specqd.runtime.drafting.length_rule).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from specqd.errors import InputError
from specqd.runtime.asking import Alone, Entries, Level, Place, Round
from specqd.runtime.choosing import Chooser
from specqd.runtime.drafting import DraftLength, length_rule
from specqd.runtime.levels import Looked, Source, Verifier
from specqd.runtime.lookup import SuffixLookup
from specqd.runtime.selecting import Schedule

__all__ = ["SEARCH", "Link", "Plan", "Rules"]

_LINK = re.compile(
    r"(?P<name>[A-Za-z_]\w*)(?::(?P<least>\d+)|:(?P<whole>whole))?(?:@(?P<rule>[a-z]+(?::[\d.]+)?(?:/\d+)?))?"
)
SEARCH = "suffix"
"""The name of the level that looks the text up."""

_USUAL = 3  # tokens that must recur, unless the plan says otherwise


@dataclass(frozen=True)
class Link:
    """One level: an entry, or a search with the fewest tokens that must recur; and its draft-length rule.

    `whole`: the entry attends to everything, also where positions are selected for it.
    """

    name: str
    least: int | None = None
    rule: str = "adaptive"
    whole: bool = False

    @property
    def searches(self) -> bool:
        """Whether it looks the text up instead of running a model."""
        return self.name == SEARCH

    def __str__(self) -> str:
        """Give the text that `Plan.parse` reads."""
        how = ":whole" if self.whole else "" if self.least is None else f":{self.least}"
        return f"{self.name}{how}@{self.rule}"


#: draft-length rules by depth in a plan and link
Rules = dict[tuple[int, Link], DraftLength]


@dataclass(frozen=True)
class Plan:
    """The target, then the alternatives of each level below it."""

    target: str
    levels: tuple[tuple[Link, ...], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read a plan; raises InputError that says what is wrong."""
        target, *parts = (part.strip() for part in text.split("<-"))
        if not target.isidentifier():
            raise InputError(
                f"the plan {text!r} does not begin with the name of an entry, such as `target <- draft`"
            )
        plan = cls(target, tuple(tuple(_link(one, text) for one in part.split("|")) for part in parts))
        if any(_last_compiled(level) is None for level in plan.levels[:-1]):
            raise InputError(
                f"in the plan {text!r} a level drafts for a search, which needs no draft; put it last"
            )
        names = [target, *(link.name for level in plan.levels for link in level if not link.searches)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"the plan {text!r} names the level {twice} twice, which has one cache")
        return plan

    @classmethod
    def usual(cls, chain: Sequence[str]) -> Plan:
        """Return what serves most texts: look them up, else ask the drafts in turn; the last one looks the text up too.

        `chain`: the target, then its drafts, the quickest first. One that does not pay is not asked, and the next one
        is.
        """
        target, *drafts = chain
        if not drafts:
            return cls(target)
        return cls(target, ((Link(SEARCH, 4), *map(Link, drafts)), (Link(SEARCH, 3),)))

    def demand(self, entries: Collection[str]) -> None:
        """Check that all levels are among `entries` or need none; raises InputError naming the first that is not."""
        for name in (
            self.target,
            *(link.name for level in self.levels for link in level if not link.searches),
        ):
            if name not in entries:
                raise InputError(
                    f"the plan names a level {name!r}, which the artifact has not; it has {', '.join(entries)}, and "
                    f"any artifact has {SEARCH}"
                )

    def __str__(self) -> str:
        """Give the text that `parse` reads."""
        return " <- ".join([self.target, *(" | ".join(map(str, level)) for level in self.levels)])

    def build(
        self,
        engine: Entries,
        chooser: Chooser,
        stop: Collection[int] = (),
        on_round: Callable[[Round], None] | None = None,
        rules: Rules | None = None,
        place: Place | None = None,
    ) -> Verifier:
        """Make the chain for one sequence; `rules` keeps what the draft-length rules learn, for the next one.

        `place` says what the sequence may use, if it is not alone.

        Raises:
            InputError: the artifact lacks an entry of the plan, or a rule is unknown.
        """
        self.demand(engine.entries)
        place = place or Alone()
        shares = self._shares(engine)
        rules = {} if rules is None else rules
        below: list[Source] = []
        for depth, level in reversed(list(enumerate(self.levels))):
            made: list[Source] = []
            for link in level:
                if link.searches:
                    made_level: Level = Looked(link.name, SuffixLookup(link.least or _USUAL))
                else:
                    mine = below if link == _last_compiled(level) else []
                    made_level = Verifier(
                        engine, link.name, chooser, mine, shares[link], stop, on_round, place
                    )
                made.append(
                    Source(made_level, rules.setdefault((depth, link), length_rule(link.rule)).share())
                )
            below = made
        return Verifier(
            engine,
            self.target,
            chooser,
            below,
            stop=stop,
            on_round=on_round,
            place=place,
            schedule=self._schedule(engine),
        )

    def _schedule(self, engine: Entries) -> Schedule | None:
        """Say when to select positions: never, if no level of the plan has to do with those only."""
        schedule = engine.schedule()
        if schedule is None:
            return None
        entry = schedule.selection.entry
        links = [link for level in self.levels for link in level if not link.searches]
        wrong = next((link.name for link in links if link.whole and link.name != entry), None)
        if wrong is not None:
            raise InputError(
                f"the plan asks for {wrong}:whole, and it is {entry} that positions are selected for: write {wrong}"
            )
        return schedule if entry in {self.target, *(link.name for link in links if not link.whole)} else None

    def _shares(self, engine: Entries) -> dict[Link, bool]:
        """Say which compiled level works on the cache of the one that asks it."""
        asking = taken = engine.caches(self.target)
        shares: dict[Link, bool] = {}
        for level in self.levels:
            compiled = [link for link in level if not link.searches]
            for link in compiled:
                shares[link] = engine.caches(link.name) <= asking
                if not shares[link] and engine.caches(link.name) & taken:
                    raise InputError(
                        f"in the plan, {link.name} would overwrite a cache that another level relies on: let it draft "
                        "directly for the level whose cache it shares"
                    )
                taken |= engine.caches(link.name)
            if compiled:
                asking = engine.caches(compiled[-1].name)
        return shares


def _last_compiled(level: tuple[Link, ...]) -> Link | None:
    return next((link for link in reversed(level) if not link.searches), None)


def _link(text: str, plan: str) -> Link:
    found = _LINK.fullmatch(text.strip())
    if found is None or found["whole" if found["name"] == SEARCH else "least"]:
        raise InputError(
            f"the plan {plan!r} has a level {text.strip()!r}; write `entry@rule`, `entry:whole@rule` or "
            "`suffix:N@rule`"
        )
    rule = found["rule"] or "adaptive"
    length_rule(rule)
    return Link(found["name"], int(found["least"]) if found["least"] else None, rule, bool(found["whole"]))
