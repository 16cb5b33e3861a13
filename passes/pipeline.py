"""Pipeline: passes in order, each on some entries of a program, written as text that round-trips."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from specqd.errors import InputError
from specqd.program import Program

from .contract import Pass, Result, Tell
from .options import options, read, split
from .registry import find

__all__ = ["Applied", "Pipeline", "Step", "Watcher"]

_STEP = re.compile(r"(?:(?P<entry>[\w.-]+)\s*:\s*)?(?P<name>[\w-]+)\s*(?:\{(?P<options>.*)\})?", re.DOTALL)


@dataclass(frozen=True)
class Step:
    """A pass and the name of the entry it applies to; None: what the pass `acts_on`."""

    action: Pass
    entry: str | None = None

    def entries(self, program: Program) -> tuple[str, ...]:
        """Names of the entries the step applies to; raises InputError if the program lacks the one named."""
        if self.entry is not None:
            return (program.entry(self.entry).name,)
        return tuple(program.entries) if self.action.acts_on == "every entry" else (program.target.name,)

    def __str__(self) -> str:
        """Give the step as text: `draft: cast-mxfp4{scale=search}`."""
        return f"{self.entry}: {self.action}" if self.entry else str(self.action)


@dataclass(frozen=True)
class Applied:
    """What watchers see: that step `number` (from 0) took the program `before` to `result` in `seconds`."""

    number: int
    step: Step
    before: Program
    result: Result
    seconds: float


Watcher = Callable[[Applied], None]


@dataclass(frozen=True)
class Pipeline:
    """Steps in order. Text is `step, step, ...` and a step is `[entry:] pass[{option=value,...}]`.

    Pipelines, steps and passes join with `+`.
    """

    steps: tuple[Step, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Read a pipeline's text; raises InputError for an unknown pass or option, naming those there are."""
        return cls(tuple(map(_parse_step, split(text, ",")))) if text.strip() else cls()

    @classmethod
    def of(cls, *parts: Pipeline | Step | Pass | str) -> Pipeline:
        """Join pipelines, steps, passes and texts."""
        return cls(tuple(step for part in parts for step in _steps(part)))

    def __add__(self, other: Pipeline | Step | Pass | str) -> Pipeline:
        """Append steps."""
        return Pipeline.of(self, other)

    def __radd__(self, other: Step | Pass | str) -> Pipeline:
        """Prepend steps."""
        return Pipeline.of(other, self)

    def __str__(self) -> str:
        """Give the canonical text, which `parse` turns back into an equal pipeline."""
        return ", ".join(map(str, self.steps))

    def __call__(self, program: Program, *watchers: Watcher, tell: Tell | None = None) -> Program:
        """Return the program after all steps, without weights that no entry reads; `program` stays as it was.

        Each watcher is called after each step, once for each entry the step applied to. `tell` hears of the progress
        of passes that take long.
        """
        program = program.copy()
        for number, step in enumerate(self.steps):
            for entry in step.entries(program):
                start = time.perf_counter()
                result = step.action(program, entry, tell)
                applied = Applied(number, step, program, result, time.perf_counter() - start)
                for watch in watchers:
                    watch(applied)
                program = result.program
        program.drop_unused_weights()
        return program


def _steps(part: Pipeline | Step | Pass | str) -> tuple[Step, ...]:
    match part:
        case str():
            return Pipeline.parse(part).steps
        case Pipeline():
            return part.steps
        case Step():
            return (part,)
        case Pass():
            return (Step(part),)
    raise InputError(f"a pipeline is made of passes, steps and texts, not {part!r}")


def _parse_step(text: str) -> Step:
    found = _STEP.fullmatch(text)
    if not found:
        raise InputError(
            f"cannot read the pipeline step {text!r}; write pass, pass{{option=value}} or entry: pass"
        )
    kind = find(found["name"])
    given = split(found["options"], ",") if (found["options"] or "").strip() else []
    return Step(kind(**_read_options(kind, given)), found["entry"])


def _read_options(kind: type[Pass], given: list[str]) -> dict[str, Any]:
    known = {option.name: option for option in options(kind)}
    values: dict[str, Any] = {}
    for item in given:
        name, equals, text = (part.strip() for part in item.partition("="))
        if name not in known:
            have = f"it has {', '.join(known)}" if known else "it has none"
            raise InputError(f"{kind.name} has no option {name!r}; {have}")
        if not equals or name in values:
            raise InputError(f"{kind.name}: give the option {name} once, as {name}=value")
        try:
            values[name] = read(known[name].kind, text)
        except ValueError as error:
            raise InputError(f"{kind.name}: option {name}: {text!r} is not {known[name].choices}") from error
    return values
