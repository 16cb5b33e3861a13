"""select-kv: keep the part of the cache that attention needs, in the model itself or for a draft alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import fx

from specqd.errors import InputError
from specqd.manifest import OBSERVER, Selection
from specqd.passes.contract import Pass, Refusal
from specqd.passes.match import arguments, cache_of, calls, changed
from specqd.program import Entry, Program
from specqd.selection import Budget, Method, method

__all__ = ["SelectKV"]

ops = torch.ops.specqd

_SHOWN = {"received", "newest", "keys"}  # what of a method's needs an engine can show


class SelectKV(Pass):
    """Say which positions stay in the cache, by what the latest queries attend to.

        target  ->  target, observer
        cached_attention(q, ...)  ->  cached_attention(q, ..., kv_received)

    The observer is the target with attention that also says how much weight each slot gets; it takes the place of the
    target in one pass of `window` rows whenever something is to be selected: at the end of the prompt and each
    time that `every` more positions have come. So scores cost no pass of their own: for a draft it is one that checks
    what the draft proposed. The matrix of weights is never whole.

    1. On the target: what is not selected is dropped from the cache, which then holds `tokens` and, until the next
       selection, the newest ones. The output is that of the model with this cache, and speculation leaves it so.
    2. On a draft that shares the target's cache: the target keeps everything, and the draft attends to the selected
       blocks only. The output cannot change. Layers may keep different numbers of them (pyramidkv).
    3. Refused: an entry without a cache, one that rounds whole blocks (int4, or recent positions in BF16), layers with
       a sliding window (slots would no longer say how far a position is away), a draft with a cache of its own, a
       program in which something is selected already, an entry named observer, and in the target a method that gives
       layers sizes of their own.

    Attributes:
        method: how to score: a name of `specqd.selection` whose methods need no more than what slots received, and the
            keys, which the runtime reads from the cache.
        scorer: the method whose scores `kvcrush` goes by.
        share: how much of what `kvcrush` chooses are proxies of the rest.
        anchor: the code that `kvcrush` measures distances from.
        seed: of `kvcrush`'s random anchor, and of `random`.
        tokens: positions to keep, with the first ones and the newest ones among them; 0: as many as `mb` or `ratio`
            says, or 1024.
        mb: megabytes (10^6 bytes) that the target's caches may take for what is kept.
        ratio: part of the cache's capacity that is not kept, from 0 to below 1.
        above: texts of no more positions are left whole; 0: four times what a draft keeps, since a selection costs more
            than reading that, and no more than what the target keeps.
        every: positions that come until the next selection.
        window: latest queries that are looked at, rows of the observer; 0: 4 for a draft, 16 in the target.
        sinks: first positions, always kept.
        recent: newest positions, always kept.
    """

    name = "select-kv"
    for_language_models = True
    acts_on: ClassVar[Literal["every entry", "the target"]] = "the target"
    method: str = "snapkv"
    scorer: str = "snapkv"
    share: float = 0.25
    anchor: Literal["random", "mean", "inverse-mean", "alternating", "zeros", "ones"] = "random"
    seed: int = 0
    tokens: int = 0
    mb: float = 0.0
    ratio: float = 0.0
    above: int = 0
    every: int = 512
    window: int = 0
    sinks: int = 4
    recent: int = 64

    def __post_init__(self) -> None:
        """Check the sizes."""
        super().__post_init__()
        if (
            min(self.sinks, self.above, self.window) < 0
            or self.every < 1
            or self.recent < max(1, self.window)
        ):
            raise InputError(
                f"{self.name}: {self.sinks} sinks, {self.recent} recent positions, a window of {self.window} and a "
                f"selection every {self.every} above {self.above}: give 0 or more sinks, above and window, 1 or more "
                "of the rest, and at least the window as recent"
            )
        given = [name for name in ("tokens", "mb", "ratio") if getattr(self, name)]
        if len(given) > 1 or min(self.tokens, self.mb, self.ratio) < 0 or self.ratio >= 1:
            raise InputError(
                f"{self.name}: tokens={self.tokens}, mb={self.mb:g}, ratio={self.ratio:g}: give one of them, above 0, "
                "and a ratio below 1"
            )
        self._demand_method()
        if self.tokens:
            self._demand_tokens(self.tokens)

    def _demand_method(self) -> None:
        chosen = self._method()
        lacks = set(chosen.needs) - _SHOWN
        if lacks:
            known = ", ".join(
                sorted(name for name, kind in Method.registry.items() if set(kind.needs) <= _SHOWN)
            )
            raise InputError(
                f"{self.name}: {self.method} needs {' and '.join(sorted(lacks))}, which no compiled code hands out: "
                f"the observer tells what slots received, and the cache holds keys; choose one of {known}, for kvcrush "
                "also as its scorer"
            )
        if "newest" in chosen.needs and self.window != 1:
            raise InputError(f"{self.name}: {self.method} looks at the newest query alone: give window=1")

    def _demand_tokens(self, tokens: int) -> None:
        if tokens <= self.sinks + self.recent:
            raise InputError(
                f"{self.name}: {tokens} tokens are no more than the {self.sinks} sinks and {self.recent} recent "
                "positions that are always kept: give more tokens, or keep fewer of those"
            )

    def _tokens(self, program: Program) -> int:
        """Return how many positions are kept."""
        caches = [program.caches[name] for name in _caches(program.target)]
        of_position = sum(cache.bytes / cache.capacity for cache in caches)
        unit = next((name for name in ("tokens", "mb", "ratio") if getattr(self, name)), "tokens")
        budget = Budget.parse(f"{unit}={getattr(self, unit) or 1024}")
        tokens = budget.tokens(min(cache.capacity for cache in caches), of_position)
        self._demand_tokens(tokens)
        return tokens

    @property
    def lossless(self) -> bool:
        """Only a draft's selection leaves the logits of the entry as they are, and it changes those of the draft."""
        return False

    def run(self, program: Program, entry: Entry) -> Iterator[fx.Node | Refusal]:
        """Derive the observer and declare the selection."""
        output = next(n for n in reversed(entry.graph.nodes) if n.op == "output")
        reason = self._unsuitable(program, entry)
        if reason:
            yield Refusal(output.name, reason)
            return
        tokens, in_target = self._tokens(program), entry.name == program.chain[0]
        program.selection = Selection(
            entry=entry.name,
            method=self.method,
            options=self._options(),
            tokens=tokens,
            above=max(tokens, self.above or tokens * (1 if in_target else 4)),
            every=self.every,
            window=self.window or min(self.recent, 16 if in_target else 4),
            sinks=self.sinks,
            recent=self.recent,
        )
        yield from _derive_observer(program)

    def _method(self) -> Method:
        return method(self.method, **self._options())

    def _options(self) -> dict[str, str | int | float]:
        """Return the options that are the method's own."""
        if self.method == "kvcrush":
            return {"scorer": self.scorer, "share": self.share, "anchor": self.anchor, "seed": self.seed}
        return {"seed": self.seed} if self.method == "random" else {}

    def _unsuitable(self, program: Program, entry: Entry) -> str | None:
        attentions = [n for n in entry.graph.nodes if calls(n, ops.cached_attention)]
        own, shared = _caches(entry), _caches(program.target)
        if not own or not shared:
            return "it has no cache to select from; put insert-kv-cache first"
        if program.selection:
            done = program.selection.entry
            return f"something is selected for {done} already, and all tables follow that; select once"
        if OBSERVER in program.entries:
            return f"an entry is named {OBSERVER!r}, as the one that this pass derives; choose another name for it"
        windowed = [n.name for n in attentions if arguments(n)["window"]]
        if windowed:
            return (
                f"{windowed[0]} attends to a sliding window, and slots of a selected cache do not say how far apart "
                "positions are; such a model needs little cache as it is"
            )
        whole = [name for name in own if program.caches[name].whole_blocks]
        if whole:
            return (
                f"the cache {whole[0]} ({program.caches[whole[0]].dtype}) rounds whole blocks of the text together, "
                "and what is selected is none; choose int8 or turbo formats without recent positions"
            )
        if not set(own) <= set(shared):
            return f"{entry.name} has a cache of its own; put share-kv first"
        in_target = entry.name == program.chain[0]
        if in_target and len(set(self._method().shares(2, 10, 20))) > 1:
            return (
                f"{self.method} gives layers sizes of their own, and a block of the cache is one of all layers: it is "
                "given back when none needs it; choose the scores alone (snapkv), or select for a draft"
            )
        others = [name for name in program.caches if name not in shared]
        if in_target and others:
            return (
                f"the cache {others[0]} of a draft keeps every position and follows the same tables as the target's; "
                "share the target's cache (share-kv), leave the draft out, or select for a draft only"
            )
        return None


def _caches(entry: Entry) -> list[str]:
    """Names of the caches that an entry attends to."""
    reading = (n for n in entry.graph.nodes if calls(n, ops.cached_attention))
    return list(dict.fromkeys(cache_of(node) for node in reading))


def _derive_observer(program: Program) -> Iterator[fx.Node]:
    observer = program.target.copy()
    observer.name, observer.derived_from = OBSERVER, program.target.name
    program.entries[OBSERVER] = observer
    last = [n for n in observer.graph.nodes if n.op == "placeholder"][-1]
    received: dict[str, fx.Node] = {}
    for name in _caches(observer):
        with observer.graph.inserting_after(last):
            received[name] = last = observer.graph.placeholder(f"{name}_received")
    for node in [n for n in observer.graph.nodes if calls(n, ops.cached_attention)]:
        node.args = changed(node, received=received[cache_of(node)])
        yield node
