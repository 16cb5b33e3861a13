"""The contract of a graph rewrite: what a pass declares, what it yields, and what is checked around it."""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, dataclass_transform

from torch import fx

from specqd.errors import ContractError, InputError, SpecqdError
from specqd.program import Entry, Event, Program

from .options import fault, options, write

__all__ = ["Note", "Pass", "Progress", "Refusal", "Result", "Tell"]

Tell = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and of how much."""


@dataclass(frozen=True)
class Refusal:
    """A node that a pass looked at and left alone, and why, in words that can be printed."""

    node: str
    why: str


@dataclass(frozen=True)
class Note:
    """What a pass has to say of a node, or of the whole entry where `node` is empty, in words that can be printed."""

    node: str
    what: str


@dataclass(frozen=True)
class Progress:
    """How far a pass is that takes long: `done` `of` so much of `what`, in words that can be printed."""

    what: str
    done: int
    of: int


@dataclass(frozen=True)
class Result:
    """The program after a pass, the names of the nodes it made in `entry`'s graph, what it refused and noted."""

    program: Program
    entry: str
    rewritten: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[Note, ...] = ()

    @property
    def rewrites(self) -> int:
        """How many rewrites the pass made."""
        return len(self.rewritten)


@dataclass_transform(frozen_default=True)
class Pass(ABC):
    """A graph rewrite; subclasses become frozen dataclasses, and their fields are their options.

    Calling a pass checks `requires`, runs it on a copy of the program, removes dead nodes, lints, checks
    `ensures` and appends an Event to the program's history. A subclass has a `name` in kebab-case and a
    docstring that is its specification; the docstring's `Attributes:` section documents the options, which
    all have defaults.

    Raises InputError for option values of the wrong type and ContractError for a subclass that breaks these
    rules.
    """

    registry: ClassVar[dict[str, type[Pass]]] = {}
    name: ClassVar[str]
    acts_on: ClassVar[Literal["every entry", "the target"]] = "every entry"
    """What a pipeline step of this pass applies to when the step names no entry."""
    for_language_models: ClassVar[bool] = False
    """Whether it can only act on an entry that takes tokens; any other is refused whole, at its output."""

    def __init_subclass__(cls) -> None:
        """Make the subclass a frozen dataclass and register it under its name."""
        name, doc = vars(cls).get("name"), vars(cls).get("__doc__")
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
            raise ContractError(f"the pass {cls.__name__} needs a name in kebab-case, not {name!r}")
        if not doc:
            raise ContractError(f"the pass {cls.__name__} needs a docstring: it is its specification")
        _make_dataclass(cls, name)
        known = Pass.registry.setdefault(name, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ContractError(f"two passes are named {name!r}: {known.__module__} and {cls.__module__}")
        Pass.registry[name] = cls

    def __post_init__(self) -> None:
        """Check the options' types; a subclass that checks more calls this first."""
        for option in options(type(self)):
            wrong = fault(option.kind, getattr(self, option.name))
            if wrong:
                raise InputError(f"{self.name}: option {option.name}: {wrong}")

    @property
    def lossless(self) -> bool:
        """Whether logits stay the same but for the order of float additions; `verify` checks that."""
        return True

    def requires(self, program: Program, entry: Entry) -> str | None:
        """Say what is wrong with the incoming program, or nothing."""
        return None

    def ensures(self, program: Program, entry: Entry) -> str | None:
        """Say what is wrong with the outgoing program, or nothing."""
        return None

    @abstractmethod
    def run(self, program: Program, entry: Entry) -> Iterator[fx.Node | Refusal | Note | Progress]:
        """Rewrite `entry` of `program` (a copy) in place, yielding each new node and each refusal.

        A pass that takes long yields Progress in between; one that has more to say yields Notes. A node whose stored
        weight it changed counts as new.
        """

    def __call__(self, program: Program, entry: str | None = None, tell: Tell | None = None) -> Result:
        """Apply the pass to the entry of that name (default: the target) of a copy of `program`.

        `tell` hears of the progress of a pass that takes long. Raises ContractError if the pass breaks its
        contract, and InputError if its options do not suit the program.
        """
        program = program.copy()
        own = program.target if entry is None else program.entry(entry)
        own.graph.eliminate_dead_code()
        if self.for_language_models and not own.of_language_model:
            why = f"{self.name} is for language models, and this takes {', '.join(map(str, own.inputs))}"
            refusal = Refusal(own.graph.output_node().name, why)
            program.history.append(Event(str(self), own.name, (), ((refusal.node, why),)))
            return Result(program, own.name, (), (refusal,))
        self._demand(self.requires(program, own), own, "before")
        before = str(own.graph)
        made, refusals, notes = self._collect(program, own, tell)
        for e in program.entries.values():
            e.graph.eliminate_dead_code()
            e.graph.lint()
        if not made and str(own.graph) != before:
            raise ContractError(f"{self.name} changed {own.name} without yielding a node; yield what it made")
        self._demand(self.ensures(program, own), own, "after")
        refused = tuple((r.node, r.why) for r in refusals)
        noted = tuple((n.node, n.what) for n in notes)
        program.history.append(Event(str(self), own.name, made, refused, noted))
        return Result(program, own.name, made, refusals, notes)

    def __str__(self) -> str:
        """Give the pass as text: its name and the options that differ from their defaults, in order."""
        given = [
            (o.name, getattr(self, o.name)) for o in options(type(self)) if getattr(self, o.name) != o.default
        ]
        return self.name + ("{" + ",".join(f"{n}={write(v)}" for n, v in given) + "}" if given else "")

    def _collect(
        self, program: Program, entry: Entry, tell: Tell | None
    ) -> tuple[tuple[str, ...], tuple[Refusal, ...], tuple[Note, ...]]:
        seen: list[fx.Node | Refusal | Note] = []
        try:
            for made in self.run(program, entry):
                if not isinstance(made, Progress):
                    seen.append(made)
                elif tell:
                    tell(made.what, made.done, made.of)
        except SpecqdError:
            raise
        except Exception as error:
            raise ContractError(
                f"{self.name} failed on {entry.name}, a bug in the pass: {error!r}"
            ) from error
        graphs = [e.graph for e in program.entries.values()]
        for item in seen:
            if not isinstance(item, (Refusal, Note)) and not (
                isinstance(item, fx.Node) and item.graph in graphs
            ):
                raise ContractError(
                    f"{self.name} yielded {item!r}; yield new nodes of the program, refusals and notes"
                )
        made = tuple(item.name for item in seen if isinstance(item, fx.Node))
        refusals = tuple(item for item in seen if isinstance(item, Refusal))
        return made, refusals, tuple(item for item in seen if isinstance(item, Note))

    def _demand(self, wrong: str | None, entry: Entry, when: str) -> None:
        if wrong:
            raise ContractError(f"{self.name} on {entry.name}: {when} the pass, {wrong}")


def _make_dataclass(cls: type[Pass], name: str) -> None:
    try:
        dataclass(frozen=True)(cls)
    except (TypeError, ValueError) as error:
        raise ContractError(f"the options of the pass {name} need plain defaults: {error}") from error
    for option in dataclasses.fields(cls):  # type: ignore[arg-type]
        if option.default is dataclasses.MISSING:
            raise ContractError(
                f"the option {option.name!r} of the pass {name} needs a default, not a factory"
            )
        if option.name == "name" or hasattr(Pass, option.name):
            raise ContractError(f"the pass {name} cannot have an option {option.name!r}: every pass has that")
