"""Kernels of a module's artifact, timed one by one for `specqd profile`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from specqd.artifact import Artifact
from specqd.errors import InputError
from specqd.manifest import KernelCall, ModuleRecord, TensorRecord
from specqd.profile import Row
from specqd.runtime.module import Module

__all__ = ["example_inputs", "kernels"]

_WARM_UP = 3
_DYNAMIC = 16  # a dynamic size, if it may be that and none is given


def kernels(
    artifact: Artifact, runs: int, threads: int, sizes: dict[str, int], tell: Callable[[str, int, int], None]
) -> tuple[list[Row], float]:
    """Run a module on random inputs, first as it is and then with a clock around each kernel.

    Returns a row for each function, and the seconds of a run without clocks. Raises as specqd.profile.profile does.
    """
    module = Module(artifact, threads)
    given = example_inputs(module.record, sizes)
    plain = []
    for at in range(_WARM_UP + runs):
        began = time.perf_counter()
        module(*given)
        plain.append(time.perf_counter() - began)
        tell("running", at, _WARM_UP + runs)
    watch = _Watch()
    module.instrument(watch.note)
    for at in range(runs):
        watch.calls = []
        module(*given)
        watch.finished.append(watch.calls)
        tell("timing kernels", at, runs)
    rows = sorted(_rows(watch.finished, module.record.kernels), key=lambda row: -row.seconds)
    return rows, median(plain[_WARM_UP:])


class _Watch:
    """Keeps the name, the time and the bytes of each call of a kernel; calls do not nest."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float, int]] = []
        self.finished: list[list[tuple[str, float, int]]] = []
        self.began = 0.0

    def note(self, name: str, begins: bool, arguments: tuple[Any, ...]) -> None:
        if name.startswith("vm."):
            return
        if begins:
            self.began = time.perf_counter()
            return
        seconds = time.perf_counter() - self.began
        tensors = (a for a in arguments if hasattr(a, "dtype") and hasattr(a, "shape"))
        self.calls.append((name, seconds, sum(_bytes(str(a.dtype), tuple(a.shape)) for a in tensors)))


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * (np.dtype(dtype).itemsize if dtype != "bfloat16" else 2)


def _rows(finished: list[list[tuple[str, float, int]]], kernels: Sequence[KernelCall]) -> Iterator[Row]:
    """Add up the calls of each function; the record of calls in order says what each is for."""
    order = [name for name, _, _ in finished[0]]
    kernels = _recorded(order, kernels)
    for function in dict.fromkeys(order):
        places = [at for at, name in enumerate(order) if name == function]
        seconds = median(sum(calls[at][1] for at in places) for calls in finished)
        size, flops = (
            sum(v) for v in ([finished[0][at][2] for at in places], [kernels[at].flops for at in places])
        )
        made_for = [kernels[at] for at in places]
        yield Row(
            function,
            len(places),
            seconds,
            flops / seconds / 1e9 if flops else None,
            size / seconds / 1e9,
            made_for[0].operator.removeprefix("aten."),
            _together([k.module for k in made_for]),
        )


def _recorded(order: list[str], kernels: Sequence[KernelCall]) -> list[KernelCall]:
    """Find the record of each call; the virtual machine has functions of its own, and an old artifact no record."""
    known = {kernel.function for kernel in kernels}
    in_turn = iter(kernels if [n for n in order if n in known] == [k.function for k in kernels] else ())
    nothing = (KernelCall(function=name, operator="", module="", flops=0) for name in order)
    return [next(in_turn, none) if none.function in known else none for none in nothing]


def _together(paths: list[str]) -> str:
    """Give several paths as one, with `*` where they differ in a part; the first if they differ in length."""
    parts = [path.split(".") for path in dict.fromkeys(paths)]
    if len({len(p) for p in parts}) > 1:
        return f"{paths[0]} ..."
    return ".".join(words[0] if len(set(words)) == 1 else "*" for words in zip(*parts, strict=True))


def example_inputs(module: ModuleRecord, sizes: dict[str, int]) -> list[np.ndarray]:
    """Make inputs: random numbers, and zeros where they are integers; raises InputError for a size that is none."""
    names = {size for record in module.inputs for size in record.shape if isinstance(size, str)}
    for name, size in sizes.items():
        if name not in names:
            have = f"has {', '.join(sorted(names))}" if names else "has none"
            raise InputError(f"the artifact has no dynamic size {name!r}; it {have}")
        if size < 1:
            raise InputError(f"the size {name} is {size}: give 1 or more")
    for name in names - sizes.keys():
        least, most = module.ranges.get(name, (1, None))
        sizes[name] = max(least, min(_DYNAMIC, _DYNAMIC if most is None else most))
    rng = np.random.default_rng(0)
    return [_example(record, sizes, rng) for record in module.inputs]


def _example(record: TensorRecord, sizes: Mapping[str, int], rng: np.random.Generator) -> np.ndarray:
    shape = [sizes[size] if isinstance(size, str) else int(size or 1) for size in record.shape]
    if record.dtype.startswith("float"):
        return rng.standard_normal(shape).astype(record.dtype)
    return np.zeros(shape, record.dtype)  # which may index whatever it is an index of
