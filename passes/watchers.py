"""Watchers: look at a pipeline from outside, step by step. Passes themselves never print."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from specqd import reference
from specqd.errors import ContractError, InputError
from specqd.program import Entry, Program

from .pipeline import Applied, Watcher

__all__ = ["Timing", "diff", "dump_to", "readable", "verify"]


def readable(entry: Entry) -> str:
    """Give a graph as text, a node a line."""
    return "\n".join(filter(None, (node.format_node() for node in entry.graph.nodes))) + "\n"


def dump_to(folder: Path) -> Watcher:
    """Write the graph after each step to `<step>-<pass>-<entry>.txt` in a folder, which is made if need be.

    Steps are numbered from 001; 000 is the entry as it came.
    """

    def write(applied: Applied) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if applied.number == 0:
            for name, entry in applied.before.entries.items():
                (folder / f"000-captured-{name}.txt").write_text(readable(entry))
        made = applied.result.program.entries
        touched = {applied.result.entry, *(made.keys() - applied.before.entries.keys())}
        for name in sorted(touched):
            file = folder / f"{applied.number + 1:03}-{applied.step.action.name}-{name}.txt"
            file.write_text(readable(made[name]))

    return write


def diff(show: Callable[[str], None]) -> Watcher:
    """Call `show` with a line a step: `fuse-rope on target: 12 rewrites, 0 refusals, 297 -> 213 nodes`."""

    def tell(applied: Applied) -> None:
        result = applied.result
        before, after = (
            sum(n.op == "call_function" for n in p.entries[result.entry].graph.nodes)
            for p in (applied.before, result.program)
        )
        show(
            f"{applied.step.action} on {result.entry}: {result.rewrites} rewrites, "
            f"{len(result.refusals)} refusals, {before} -> {after} nodes"
        )

    return tell


@dataclass
class Timing:
    """Adds up the seconds of each step; a watcher.

    Attributes:
        seconds: step text to seconds, in order of first use.
    """

    seconds: dict[str, float] = field(default_factory=dict)

    def __call__(self, applied: Applied) -> None:
        """Add a step's time."""
        text = str(applied.step)
        self.seconds[text] = self.seconds.get(text, 0.0) + applied.seconds

    def __str__(self) -> str:
        """List the steps with their seconds."""
        return "\n".join(f"{seconds:8.2f} s  {text}" for text, seconds in self.seconds.items())


def verify(
    given: torch.Tensor | tuple[torch.Tensor, ...], *, atol: float = 1e-4, rtol: float = 1e-4
) -> Watcher:
    """Compare what an entry gives before and after each step whose pass says it is lossless, in the reference.

    Given are tokens int64 `[1, S]`, fed at positions 0 to S-1 into fresh caches, or a tuple of the inputs of a
    module. The watcher raises ContractError, naming the step and the largest difference, where one exceeds
    `atol + rtol * |before|`.
    """
    inputs = given if isinstance(given, tuple) else (given,)
    if isinstance(given, torch.Tensor) and (given.dim() != 2 or given.shape[0] != 1 or not given.shape[1]):
        raise InputError(f"verify needs tokens of shape [1, length], not {list(given.shape)}")

    def compare(applied: Applied) -> None:
        if not applied.step.action.lossless:
            return
        old, new = applied.before, applied.result.program
        for name in {applied.result.entry, *(new.entries.keys() - old.entries.keys())}:
            origin = name if name in old.entries else str(new.entries[name].derived_from)
            pairs = zip(_outputs(old, origin, inputs), _outputs(new, name, inputs), strict=True)
            for before, after in pairs:
                if not torch.allclose(after, before, rtol=rtol, atol=atol, equal_nan=True):
                    what = "logits" if new.entries[name].of_language_model else "output"
                    raise ContractError(
                        f"step {applied.number + 1} ({applied.step}) changed the {what} of {name} by up to "
                        f"{(after - before).abs().max():.3g}, but it calls itself lossless; a bug in the pass"
                    )

    return compare


def _outputs(program: Program, entry: str, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    outputs = reference.run(program, program.entries[entry], *inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [output for output in outputs if isinstance(output, torch.Tensor)]
