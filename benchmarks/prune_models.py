"""A language model that `prune_quality.py` prunes, scored by perplexity; errors that pruning makes in layers."""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

import specqd
from specqd.passes import Pipeline
from specqd.passes.match import arguments, weight_of
from specqd.program import Program
from specqd.reference import Interpreter, inputs, new_caches, run

__all__ = ["Subject", "language", "layer_errors", "moved", "peak_mb"]

_PRODUCTS = (torch.ops.aten.linear.default, torch.ops.aten.conv2d.default)


@dataclass(frozen=True)
class Subject:
    """A model to prune.

    Attributes:
        program: as it is before.
        batches: values of its placeholders, to measure errors of layers on.
        scores: figures of a program by the name of the metric.
        data: what a pass's option `data` says, by name.
        larger_is_better: metrics whose drop is dense minus value.
    """

    program: Program
    batches: Callable[[], Iterator[tuple[Any, ...]]]
    scores: Callable[[Program], dict[str, float]]
    data: dict[str, str]
    larger_is_better: frozenset[str] = frozenset()


def language(folder: Path, text: str, made: Path, tokens: int, window: int) -> Subject:
    """A checkpoint scored on `text`; calibration is on Python's own library, which ships with every Python."""
    prepare = "conv1d-to-linear, fuse-rms-norm, fuse-rope, fuse-linear"
    program = Pipeline.parse(prepare)(specqd.capture(folder))
    tokenizer = _tokenizer(folder)
    ids = tokenizer.encode(text[: tokens * 8], add_special_tokens=False).ids[:tokens]
    windows = [ids[at : at + window] for at in range(0, len(ids) - 1, window)]

    def scores(pruned: Program) -> dict[str, float]:
        losses = [_nll(run(pruned, pruned.target, torch.tensor([w]))[0], w) for w in windows]
        return {"perplexity": math.exp(torch.cat(losses).mean())}

    def batches() -> Iterator[tuple[Any, ...]]:
        for w in windows[:2]:
            positions = torch.arange(len(w))[None]
            yield tuple(inputs(program.target, torch.tensor([w]), positions, new_caches(program)))

    return Subject(program, batches, scores, {"text": str(_library_text(made)), "random": "random"})


def layer_errors(subject: Subject, pruned: Program) -> list[float]:
    """Mean squared error of each product's output to that of its dense output, for inputs of the dense model."""
    sums: dict[str, list[float]] = {}
    device = next(iter(subject.program.weights.values())).device
    for batch in subject.batches():
        with torch.no_grad():
            _Watched(subject.program, pruned, sums).run(*(value.to(device) for value in batch))
    return [error / max(size, 1e-300) for error, size in sums.values()]


class _Watched(Interpreter):
    """Runs the dense model, and each product with the other weights on the side."""

    def __init__(self, dense: Program, pruned: Program, sums: dict[str, list[float]]) -> None:
        super().__init__(dense, dense.target)
        self.other, self.sums = pruned.weights, sums

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        name = weight_of(node) if node.target in _PRODUCTS else None
        if name is not None and not torch.equal(self.other[name], self.weights[name]):
            given = {key: self.env[a] if isinstance(a, fx.Node) else a for key, a in arguments(node).items()}
            bias = arguments(node)["bias"]
            given |= {"weight": self.other[name].to(given["weight"].dtype)}
            given |= (
                {"bias": self.other[str(bias.target)].to(given["bias"].dtype)} if bias is not None else {}
            )
            error = node.target(**given) - value
            entry = self.sums.setdefault(node.name, [0.0, 0.0])
            entry[0] += float(error.double().square().sum())
            entry[1] += float(value.double().square().sum())
        return value


def moved(program: Program, device: str) -> Program:
    """Put a program's weights on a device, where passes then work."""
    program.weights = {name: weight.to(device) for name, weight in program.weights.items()}
    return program


def peak_mb() -> float:
    """Return the highest memory of this process (Linux, `man 5 proc`)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1e3


def _nll(logits: Tensor, window: list[int]) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(window[1:]), reduction="none")


def _tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _library_text(made: Path) -> Path:
    path = made / "python-library.txt"
    if not path.is_file():
        made.mkdir(parents=True, exist_ok=True)
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        path.write_text("\n\n".join(file.read_text("utf-8", "ignore")[:4000] for file in files), "utf-8")
    return path
