"""The cases of each suite of benchmarks/coverage.py, and the worker that tries them: a name in, a line of JSON out."""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from coverage_models import TIMM, TRANSFORMERS, timm_model, transformers_model
from torch import nn
from torch.utils import _pytree as pytree

import specqd
from specqd.errors import CaptureError, CodegenError, InputError

__all__ = ["SUITES", "names"]

#: of an output's largest element, and of each element
TOLERANCE = 1e-4
REFUSALS = (CaptureError, CodegenError, InputError)

Case = tuple[nn.Module, tuple[Any, ...]]


class Call(nn.Module):
    """A function of the tensors among nested arguments; the rest stays as it is."""

    def __init__(self, function: Callable[..., Any], arguments: Any) -> None:
        super().__init__()
        self.function = function
        self.leaves, self.spec = pytree.tree_flatten(arguments)
        self.places = [at for at, leaf in enumerate(self.leaves) if isinstance(leaf, torch.Tensor)]

    def forward(self, *tensors: torch.Tensor) -> Any:
        leaves = list(self.leaves)
        for at, tensor in zip(self.places, tensors, strict=True):
            leaves[at] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.function(*args, **kwargs)


@functools.cache
def _operators() -> dict[str, Any]:
    from torch.testing._internal.common_methods_invocations import op_db

    found = {}
    for info in op_db:
        if torch.float32 in info.supported_dtypes("cpu") and _in_scope(info):
            found[f"{info.name}.{info.variant_test_name}".rstrip(".")] = info
    return found


def _in_scope(info: Any) -> bool:
    """Core ATen operators, and the layers of torch.nn.functional."""
    packet = getattr(torch.ops.aten, info.aten_name or info.name, None)
    core = packet is not None and any(torch.Tag.core in getattr(packet, o).tags for o in packet.overloads())
    return core or info.name.startswith("nn.functional.")


@functools.cache
def _samples(operator: str) -> list[Any]:
    torch.manual_seed(0)
    return list(_operators()[operator].sample_inputs("cpu", torch.float32))


def _sample_names(quick: bool) -> list[str]:
    """An operator and the number of a sample: first samples first, so that a part of them is of all operators."""
    numbers = {operator: range(len(_samples(operator))) for operator in _operators()}
    steps = {operator: max(1, len(every) // 4) if quick else 1 for operator, every in numbers.items()}
    found = [(at, operator) for operator, every in numbers.items() for at in every[:: steps[operator]]]
    return [f"{operator} {at}" for at, operator in sorted(found)]


def _sample(name: str) -> Case:
    operator, _, at = name.rpartition(" ")
    sample = _samples(operator)[int(at)]
    module = Call(_operators()[operator].op, ((sample.input, *sample.args), sample.kwargs))
    return module, tuple(module.leaves[place].detach() for place in module.places)


def _node_test(name: str) -> tuple[str, str]:
    import coverage_onnx

    return coverage_onnx.attempt(name, coverage_onnx.compiled, REFUSALS)


def _node_test_in_tvm(name: str) -> tuple[str, str]:
    import coverage_onnx
    import coverage_tvm

    return coverage_onnx.attempt(name, coverage_tvm.imported, (coverage_tvm.RefusedError,))


def _damaged_file(name: str) -> tuple[str, str]:
    import fuzz_onnx

    return fuzz_onnx.attempt(name)


#: suites whose cases are modules with inputs, to be compared with eager torch
CASES: dict[str, Callable[[str], Case]] = {
    "opinfo": _sample,
    "timm": timm_model,
    "transformers": transformers_model,
}

#: suites whose cases know what comes out. onnx-node-tvm: TVM's own importer; onnx-fuzz: damaged files, captured only
TESTS: dict[str, Callable[[str], tuple[str, str]]] = {
    "onnx-node": _node_test,
    "onnx-node-tvm": _node_test_in_tvm,
    "onnx-fuzz": _damaged_file,
}
SUITES = (*CASES, *TESTS)


def names(suite: str, quick: bool) -> list[str]:
    """The cases of a suite; of a quick one about a tenth."""
    if suite == "opinfo":
        return _sample_names(quick)
    if suite in CASES:
        every = list(TIMM if suite == "timm" else TRANSFORMERS)
    elif suite == "onnx-fuzz":
        import fuzz_onnx

        every = fuzz_onnx.names()
    else:
        import coverage_onnx

        every = coverage_onnx.names()
    return every[::10] if quick else every


def outcome(module: nn.Module, tensors: tuple[Any, ...]) -> tuple[str, str] | None:
    """Say `passed`, `refused`, `wrong`, `unstable` or `crashed`, and why; None for what eager torch cannot do either.

    Unstable is what eager torch itself computes otherwise, beyond the tolerance, of inputs that are a last bit away.
    """
    try:
        expected = _computed(module, tensors)
    except Exception:
        return None
    if not tensors or not expected:
        return None
    try:
        with tempfile.TemporaryDirectory() as folder:
            specqd.compile(module, Path(folder) / "artifact", example_inputs=tensors)
            got = specqd.load(Path(folder) / "artifact")(*tensors)
    except REFUSALS as error:
        return "refused", f"{error}"
    except Exception as error:
        return "crashed", f"{type(error).__name__}: {error}"
    wrong = _difference(got if isinstance(got, tuple) else (got,), expected)
    if wrong is None:
        return "passed", ""
    moved = _difference(_computed(module, tuple(map(_a_bit_away, tensors))), expected)
    return (
        ("wrong", wrong)
        if moved is None
        else ("unstable", f"specqd: {wrong} Eager torch, a bit away: {moved}")
    )


def _computed(module: nn.Module, tensors: tuple[Any, ...]) -> list[torch.Tensor]:
    with torch.no_grad():
        found = module(*(tensor.clone() for tensor in tensors))
    return [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor)]


def _a_bit_away(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype is not torch.float32:
        return tensor
    ways = torch.randint(0, 2, tensor.shape, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    return torch.nextafter(tensor, ways * torch.inf)


def _difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> str | None:
    try:
        for a, b in zip(found, expected, strict=True):
            finite = b[b.isfinite()] if b.is_floating_point() else b.new_empty(0)
            scale = float(finite.abs().max()) if finite.numel() else 0.0
            torch.testing.assert_close(
                a, b, rtol=TOLERANCE, atol=TOLERANCE * max(scale, 1e-2), equal_nan=True
            )
    except (AssertionError, ValueError) as error:
        return " ".join(str(error).split())
    return None


def _attempt(suite: str, name: str) -> tuple[str, str]:
    if suite in TESTS:
        return TESTS[suite](name)
    try:
        module, tensors = CASES[suite](name)
    except Exception as error:
        return "skipped", f"it cannot be made: {type(error).__name__}: {error}"
    return outcome(module, tensors) or ("skipped", "eager torch cannot run it, or it has no tensor")


def main() -> None:
    (suite,) = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        name = line.removesuffix("\n")
        found, why = _attempt(suite, name)
        print(json.dumps({"case": name, "outcome": found, "why": why[:600]}), file=answers)


if __name__ == "__main__":
    main()
